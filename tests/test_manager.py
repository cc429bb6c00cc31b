"""The manager: order, validation, instruments, and that nothing is changed in place."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from encoder_blocks import WIDTH, data, linear, post_norm, pre_norm, statistics
from helpers import check_text
from patterns import Build

from planish.codegen.onnx import to_model
from planish.ir import ops
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError, ValidationError, VerificationError
from planish.ir.graph import Graph
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.stats import ChannelStats, Stats
from planish.ir.text import difference, parse, print_graph, render
from planish.ir.types import TensorType
from planish.passes.base import Context, Exactness, Pass, PassReport, RewritePass, place
from planish.passes.manager import DumpInstrument, Instrument, Pipeline
from planish.passes.shift_channels import ShiftChannels


@dataclasses.dataclass(frozen=True)
class Make(Pass):
    """For tests: gives, breaks or needs a fact, or spoils the graph."""

    name = "make"
    exactness = Exactness.EXACT

    spoil: Literal["", "weight", "shape", "silently", "type"] = ""

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        node = next(n for n in graph.nodes if n.op.name == "linear")
        weight = node.operands[1]
        assert weight is not None and weight.constant is not None
        with Rewriter(graph) as rewriter:
            if self.spoil in ("weight", "silently"):
                wrong = weight.constant.wide() * (1 + 1e-6)
                rewriter.set_constant(weight, Constant(wrong, "f32", wrong.shape))
            if self.spoil == "type":
                rewriter.retype(node.result, TensorType("f16", (3, 3)))
        if self.spoil != "silently":
            report.applied.append("something")
        return report


@dataclasses.dataclass(frozen=True)
class Give(Make):
    name = "give"
    gives = frozenset({"fact"})


@dataclasses.dataclass(frozen=True)
class Break(Make):
    name = "break"
    breaks = frozenset({"fact"})


@dataclasses.dataclass(frozen=True)
class Need(Make):
    name = "need"
    needs = frozenset({"fact"})


@dataclasses.dataclass(frozen=True)
class Lossy(Make):
    name = "lossy"
    exactness = Exactness.LOSSY


# -- order ---------------------------------------------------------------------------------------


def test_an_order_that_holds() -> None:
    assert len(Pipeline([Give(), Need()]).passes) == 2
    assert len(Pipeline([Give(), Break(), Give(), Need()]).passes) == 4


def test_a_pass_needs_what_nothing_gave() -> None:
    with pytest.raises(PlanishError) as caught:
        Pipeline([Make(), Need()])
    assert str(caught.value) == "pass 'need': needs 'fact'\n  in make,need"


def test_a_pass_needs_what_an_earlier_one_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both names, and who could give it again."""
    from planish.passes import pipeline

    monkeypatch.setitem(pipeline.REGISTRY, "give", (__name__, "Give"))
    with pytest.raises(PlanishError) as caught:
        Pipeline([Give(), Break(), Need()])
    assert str(caught.value) == (
        "pass 'need': needs 'fact', which 'break' before it breaks\n  in give,break,need\n  hint: run give before it"
    )


def test_nothing_comes_after_the_lowering() -> None:
    with pytest.raises(PlanishError) as caught:
        Pipeline("lower,quantize")
    assert str(caught.value) == (
        "pass 'quantize': comes after 'lower', which writes the forms of a target\n"
        "  in lower,quantize\n  hint: put 'lower' at the end"
    )
    assert len(Pipeline("quantize,lower,lower{target=ort}").passes) == 3


def test_the_real_facts() -> None:
    """What breaks a fact that another pass gives is said for the passes that come with planish."""
    from planish.passes.fold_norm_gain import FoldNormGain
    from planish.passes.scale_channels import ScaleChannels

    assert "norm-gain-free" in FoldNormGain.gives
    assert ScaleChannels.breaks == {"norm-gain-free"}
    assert ShiftChannels.breaks == {"norm-bias-free"}


# -- what a run leaves alone -----------------------------------------------------------------------

PIPELINE = "shift-channels,scale-channels{insert=true},quantize"


def test_nothing_is_changed_in_place() -> None:
    graph = pre_norm()
    stats = statistics(graph)
    text, records = render(graph)[0], {name: stats.of(name) for name in stats}
    arrays = {v.name: v.constant for v in graph.constants}
    after, report = Pipeline(PIPELINE).run(graph, stats=stats, samples=data(3, samples=1))
    assert render(graph)[0] == text
    assert all(v.constant is arrays[v.name] for v in graph.constants)
    assert {name: stats.of(name) for name in stats} == records
    assert after is not graph
    assert not {id(n) for n in graph.nodes} & {id(n) for n in after.nodes}
    assert report["shift-channels"].applied
    check_text(after)


@pytest.mark.parametrize("build", [pre_norm, post_norm])
def test_same_seed_same_bytes(build) -> None:
    graph = build()
    stats = statistics(graph)
    models = []
    for _ in range(2):
        after, report = Pipeline(PIPELINE).run(graph, stats=stats, seed=3)
        models.append(to_model(after).SerializeToString(deterministic=True))
        assert report.seed == 3
    assert models[0] == models[1]


def test_an_empty_pipeline_copies() -> None:
    graph = pre_norm()
    after, report = Pipeline([]).run(graph)
    assert after == graph and after is not graph
    assert report.passes == [] and report.validated == 0


# -- validation ------------------------------------------------------------------------------------


def test_a_wrong_weight_is_found() -> None:
    with pytest.raises(ValidationError) as caught:
        Pipeline([Make(spoil="weight")]).run(pre_norm())
    assert caught.value.what.startswith("pass 'make': changed the function: relative error ")
    assert caught.value.what.endswith("; expected <= 1e-10")
    assert caught.value.where is not None
    assert caught.value.where.startswith("output 'linear_17' at [")
    assert "the first value that differs is %linear (linear), by " in caught.value.where
    assert caught.value.hint == "this is a bug of the pass or of an op's row: please report it with the model"


def test_validation_may_be_switched_off() -> None:
    _, report = Pipeline([Make(spoil="weight")]).run(pre_norm(), validate=False)
    assert report.validated == 0
    assert report.passes[0].error is None


def test_a_lossy_pass_is_not_compared() -> None:
    _, report = Pipeline([Lossy(spoil="weight")]).run(pre_norm())
    assert report.passes[0].error is None
    assert report.validated == 0


def test_what_was_applied_is_compared_with_the_graph_before_it() -> None:
    """A lossy pass before an exact one is not blamed on it."""
    _, report = Pipeline([Lossy(spoil="weight"), Make()]).run(pre_norm())
    assert [p.error for p in report.passes] == [None, 0.0]


def test_samples_are_probes_too() -> None:
    graph = pre_norm()
    _, report = Pipeline([Make()]).run(graph, samples=data(1, samples=5))
    assert report.validated == 3  # a random one and two of the samples
    with pytest.raises(ValidationError):
        Pipeline([Make(spoil="weight")]).run(graph, samples=data(1, samples=1))


def test_a_graph_that_cannot_be_evaluated() -> None:
    """Said, with the reason, rather than passed over."""
    b = Build()
    h = linear(b, b.input("x", f"f32[2, {WIDTH}]"), WIDTH, "a")
    odd = b.graph.append(ops.get("my.domain::Odd"), [h], types=[TensorType("f32", (2, WIDTH))]).result
    _, report = Pipeline([Make()]).run(b.output(odd))
    assert report.validated == 0
    assert report.unchecked.startswith("the graph could not be evaluated: ")
    assert "Odd" in report.unchecked
    assert report.as_dict()["unchecked"] == report.unchecked


def test_the_verifier_runs_after_every_pass() -> None:
    with pytest.raises(VerificationError):
        Pipeline([Lossy(spoil="type")]).run(pre_norm(), validate=False)


def test_needs_statistics_before_anything_runs() -> None:
    seen: list[str] = []

    class Watch(Instrument):
        def before(self, instance: Pass, graph: Graph) -> None:
            seen.append(instance.name)

    with pytest.raises(PlanishError, match=r"^pass 'shift-channels': needs calibration statistics"):
        Pipeline("raise-norms,shift-channels").run(pre_norm(), instruments=[Watch()])
    assert seen == []


# -- reports and instruments -----------------------------------------------------------------------


def test_the_report() -> None:
    graph = pre_norm()
    _, report = Pipeline(PIPELINE).run(graph, stats=statistics(graph))
    assert [p.name for p in report.passes] == ["shift-channels", "scale-channels", "quantize"]
    assert report["scale-channels"] is report.passes[1]
    with pytest.raises(KeyError):
        report["lower"]
    plain = report.as_dict()
    assert list(plain) == ["passes", "seed", "validated", "unchecked", "freedoms", "results"]
    assert plain["passes"][0]["applied"] == report.passes[0].applied
    assert all(p.seconds > 0 for p in report.passes)
    reasons = report.passes[1].reasons()
    assert sum(reasons.values()) == sum(len(v) for v in report.passes[1].declined.values())


def test_place() -> None:
    b = Build()
    h = linear(b, b.input("x", "f32[2, 8]"), 8, "a")
    node = h.producer
    assert node is not None
    assert (place(None), place("here"), place(b.graph.inputs[0])) == ("", "here", "%x")
    assert place(node) == place(h) == "linear %linear"
    node.source = "/layer/MatMul"
    assert place(node) == "linear %linear (/layer/MatMul)"


def test_dumps(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "dumps"
    graph = pre_norm()
    after, _ = Pipeline("shift-channels,raise-norms").run(
        graph, stats=statistics(graph), instruments=[DumpInstrument(folder)]
    )
    assert sorted(p.name for p in folder.iterdir()) == [
        "00-input.ir",
        "01-shift-channels.diff",
        "01-shift-channels.ir",
        "02-raise-norms.diff",
        "02-raise-norms.ir",
    ]
    assert (folder / "00-input.ir").read_text() == print_graph(graph)
    assert (folder / "02-raise-norms.ir").read_text() == print_graph(after)
    lines = (folder / "01-shift-channels.diff").read_text().splitlines()
    assert lines[:2] == ["--- before", "+++ after"]
    assert any(line.startswith("+  %norm1.bias = constant") for line in lines)
    assert (folder / "02-raise-norms.diff").read_text() == "\n"


def test_instruments_stand_around_every_pass() -> None:
    calls: list[tuple[str, str, int]] = []

    class Watch(Instrument):
        def before(self, instance: Pass, graph: Graph) -> None:
            calls.append(("before", instance.name, len(graph.constants)))

        def after(self, instance: Pass, graph: Graph, report: PassReport) -> None:
            calls.append(("after", instance.name, len(graph.constants)))
            assert report.name == instance.name
            assert report.seconds > 0

    Pipeline([Give(), Need()]).run(pre_norm(), instruments=[Watch(), Instrument()])
    assert [c[:2] for c in calls] == [("before", "give"), ("after", "give"), ("before", "need"), ("after", "need")]


def test_progress_wraps_the_passes() -> None:
    labels: list[str] = []

    def progress(items, label):
        labels.append(label)
        return items

    graph = pre_norm()
    Pipeline("shift-channels,scale-channels").run(graph, stats=statistics(graph), progress=progress)
    assert labels[0] == "passes"
    assert "scale-channels" in labels


# -- rewriting node by node ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Neg(RewritePass):
    """neg(neg(x)) -> x; declines what is given out."""

    name = "neg"
    exactness = Exactness.EXACT

    def rewrite(self, node, rewriter, context):
        inner = node.operands[0].producer if node.op.name == "neg" else None
        if inner is None or inner.op.name != "neg":
            return False
        if any(v is inner.result for v in rewriter.graph.output_values()):
            raise Declined("its operand is given out")
        rewriter.replace_node(node, inner.operands[0])
        return True


def test_rounds_run_until_nothing_changes() -> None:
    b = Build()
    x = b.input("x", "f32[2]")
    h = x
    for _ in range(6):
        h = b("neg", h)
    graph = b.output(b("relu", h))
    after, report = Pipeline([Neg()]).run(graph)
    check_text(after)
    assert [n.op.name for n in after.nodes] == ["relu"]
    assert len(report.passes[0].applied) == 3
    assert report.passes[0].error == 0.0


def test_a_refusal_is_recorded_once_with_its_node() -> None:
    b = Build()
    inner = b("neg", b.input("x", "f32[2]"))
    graph = b.output(b("neg", inner), inner)
    after, report = Pipeline([Neg()]).run(graph)
    assert after == graph
    assert report.passes[0].declined == {"its operand is given out": ["neg %neg_1"]}


def test_the_text_of_what_comes_out_parses() -> None:
    graph = post_norm()
    after, _ = Pipeline(PIPELINE).run(graph, stats=statistics(graph))
    text, constants = render(after)
    assert difference(after, parse(text, constants)) is None


def test_context() -> None:
    """Without statistics a pass may still tell that it transformed something."""
    from planish.ir.ops.base import Act
    from planish.ir.spaces import analyse
    from planish.ir.transform import Shift

    graph = pre_norm()
    (space,) = analyse(graph).at(graph.values["layer_norm"], (2,), Act.SHIFT)
    for context in (Context(), Context(Stats())):
        context.transformed(Rewriter(graph), space, Shift(np.ones(WIDTH)))
        assert not context.stats
        assert list(context.progress([1, 2], "x")) == [1, 2]


def test_statistics_of_another_model_are_refused() -> None:
    b = Build()
    graph = b.output(b("relu", b.input("x", "f32[n, 4]")))

    def record(axis: int, channels: int) -> ChannelStats:
        return ChannelStats(axis, *(np.zeros(channels) for _ in range(3)), np.zeros((1, channels), np.float32), 1)

    Pipeline("fold-constants").run(graph, stats=Stats({"x": record(-1, 4), "other": record(-1, 3)}))
    Pipeline("fold-constants").run(graph, stats=Stats({"x": record(-2, 7)}))  # a dim of any size
    Pipeline("fold-constants").run(graph, stats=Stats())
    for held, expected in (
        ({"x": record(-1, 3)}, "statistics: value 'x': 3 channels on axis -1; got f32[n, 4]"),
        ({"x": record(-3, 4)}, "statistics: value 'x': 4 channels on axis -3; got f32[n, 4]"),
        ({"y": record(-1, 4)}, "statistics: none of their 1 values is in the graph"),
    ):
        with pytest.raises(PlanishError) as caught:
            Pipeline("fold-constants").run(graph, stats=Stats(held))
        assert caught.value.what == expected
        assert caught.value.hint == "they are of another model: collect them on this one"
