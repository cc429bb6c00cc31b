"""Shifting channels: exact, centred, declined with a reason, and checked by the validator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoder_blocks import BLOCKS, linear, norm, pre_norm, record, statistics
from helpers import check_text
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import TOLERANCE, Build, counts, golden

from planish.ir import absorb
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError, ValidationError
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph
from planish.ir.ops import get
from planish.ir.ops.contraction import linear as linear_row
from planish.ir.stats import Stats
from planish.ir.types import TensorType
from planish.passes.base import Context, PassReport
from planish.passes.manager import Pipeline
from planish.passes.shift_channels import ShiftChannels, choose_shift


def run(graph: Graph, stats: Stats, pipeline: str = "shift-channels") -> tuple[Graph, PassReport]:
    after, report = Pipeline(pipeline).run(graph, stats=stats)
    assert report.validated
    check_text(after)
    return after, report.passes[-1]


# -- the choice ----------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
def test_after_the_shift_ranges_are_centred(seed: int) -> None:
    """max = -min (methods/a.md, 1), and the widest range is that of the tensor."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(50, 8)) * rng.lognormal(0, 2, 8) + rng.normal(0, 30, 8)
    low, high = x.min(0), x.max(0)
    shifted = x + choose_shift(low, high)
    assert np.allclose(shifted.max(0), -shifted.min(0), rtol=1e-9, atol=1e-9)
    assert np.abs(shifted).max() <= (high - low).max() / 2 + 1e-9


def test_part_of_the_way() -> None:
    low, high = np.array([-1.0, 10.0]), np.array([3.0, 20.0])
    assert choose_shift(low, high).tolist() == [-1.0, -15.0]
    assert choose_shift(low, high, 0.5).tolist() == [-0.5, -7.5]


# -- the pass ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", BLOCKS)
def test_exact_and_free(kind: str, bias: bool) -> None:
    """No op is added, in post-norm blocks neither, and the function stays to 1e-10 in float64."""
    graph = pre_norm(bias=bias) if kind == "pre-norm" else BLOCKS[kind]()
    stats = statistics(graph)
    after, report = run(graph, stats)
    assert report.error is not None and report.error <= TOLERANCE
    assert counts(after) == counts(graph)
    assert report.inserted == 0
    assert len(report.applied) == len(report.figures) >= 3
    assert sum("for 3 readers" in line for line in report.applied) == 1  # queries, keys and values
    assert all(0.01 <= f["range_reduction"] < 1.0 for f in report.figures.values())


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.sampled_from(sorted(BLOCKS)), st.sampled_from([0.25, 1.0, 2.0]))
def test_exact_for_any_block(seed: int, kind: str, amount: float) -> None:
    graph = BLOCKS[kind](seed)
    _, report = run(graph, statistics(graph, seed), f"shift-channels{{amount={amount} min-gain=0}}")
    assert report.applied
    assert report.error is not None and report.error <= TOLERANCE


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_linears_read_is_centred(kind: str) -> None:
    graph = BLOCKS[kind]()
    stats = statistics(graph)
    after, report = run(graph, stats)
    again = statistics(after)
    assert report.figures
    for name in report.figures:
        now, before = again.of(name), stats.of(name)
        scale = np.abs(before.maximum).max()
        assert np.allclose(now.maximum, -now.minimum, rtol=1e-4, atol=1e-4 * scale)
        assert now.largest.max() < before.largest.max()


def test_the_statistics_follow() -> None:
    """What later passes read is what a second calibration would have found."""
    graph = pre_norm()
    stats = statistics(graph)
    before = {name: stats.of(name) for name in stats}
    context = Context(stats.copy())
    after = graph.clone()
    report = ShiftChannels().run(after, context)
    assert report.applied
    assert all(stats.of(name) is before[name] for name in stats)
    again = statistics(after)
    assert context.stats is not None
    gone = set(again) - set(context.stats)  # described along one axis, shifted along two: no longer true
    assert all(graph.values[name].rank == 4 for name in gone)
    for name in context.stats:
        for part in ("minimum", "maximum", "mean_square", "samples"):
            got, expected = getattr(context.stats.of(name), part), getattr(again.of(name), part)
            assert np.allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()), (name, part)


def test_a_second_run_finds_nothing_to_do() -> None:
    graph = pre_norm()
    after, report = Pipeline("shift-channels,shift-channels").run(graph, stats=statistics(graph))
    first, second = report.passes
    assert first.applied and not second.applied
    assert len(second.declined["its range would hardly shrink"]) == len(first.applied)
    check_text(after)


def small() -> Graph:
    b = Build()
    x = b.input("x", "f32[b, 2]")
    normed = b("layer_norm", x, b.constant([1.0, 2.0], name="gain"), b.constant([5.0, 0.0], name="beta"))
    return b.output(b("linear", normed, b.constant([[1.0, 2.0], [3.0, -4.0]], name="weight")))


def test_golden(update_golden: bool) -> None:
    before = small()
    stats = Stats({"layer_norm": record([[4.0, -1.0], [6.0, 2.0]])})
    after, report = run(before, stats)
    assert report.applied == ["%layer_norm: range 57% smaller for 1 readers"]
    golden("shift-channels", before, after, update_golden)


# -- refusals ------------------------------------------------------------------------------------


def test_a_range_that_is_centred_already() -> None:
    stats = Stats({"layer_norm": record([[-4.0, -2.0], [4.0, 2.0]])})
    before = small()
    after, report = run(before, stats)
    assert after == before
    assert dict(report.declined) == {"its range would hardly shrink": ["linear %linear"]}
    silent = Stats({"layer_norm": record([[0.0, 0.0], [0.0, 0.0]])})
    assert list(run(before, silent)[1].declined) == ["its range would hardly shrink"]


def test_a_gain_that_is_asked_for() -> None:
    stats = Stats({"layer_norm": record([[4.0, -1.0], [6.0, 2.0]])})
    assert run(small(), stats, "shift-channels{min-gain=0.5}")[1].applied
    assert not run(small(), stats, "shift-channels{min-gain=0.7}")[1].applied


def test_blocked_spaces_name_what_blocks() -> None:
    graph = pre_norm()
    _, report = run(graph, statistics(graph))
    assert report.declined["graph input"] == ["x"]
    (place,) = report.declined["a shift of its operand does not shift its result"]
    assert place.startswith("gelu %gelu")


def test_a_norm_that_is_also_given_out() -> None:
    b = Build()
    normed = norm(b, b.input("x", "f32[batch, tokens, 8]"), "norm")
    graph = b.output(linear(b, normed, 8, "a"), normed)
    after, report = run(graph, statistics(graph))
    assert after == graph
    assert dict(report.declined) == {"graph output": ["layer_norm"]}


def test_nothing_to_shift() -> None:
    b = Build()
    graph = b.output(b("relu", b.input("x", "f32[batch, tokens, 8]")))
    _, report = run(graph, Stats())
    assert report.misses == ["no linear with a constant weight reads a shift space"]


def test_needs_statistics() -> None:
    with pytest.raises(PlanishError) as caught:
        Pipeline("shift-channels").run(pre_norm())
    assert str(caught.value) == (
        "pass 'shift-channels': needs calibration statistics\n"
        "  hint: give calibration data (--calibrate, or planish.collect)"
    )


def test_a_bias_free_norm_is_so_no_longer() -> None:
    assert ShiftChannels.breaks == {"norm-bias-free"}
    assert ShiftChannels.needs_stats


# -- teeth ---------------------------------------------------------------------------------------


WRONG = {
    "dropped": lambda true: lambda node, *rest: true(node, *rest[:3], rest[3] * 0.0),
    "sign": lambda true: lambda node, *rest: true(node, *rest[:3], -rest[3]),
    "1.001": lambda true: lambda node, *rest: true(node, *rest[:3], rest[3] * 1.001),
}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("what", WRONG)
def test_the_validator_rejects_a_wrong_fold(monkeypatch: pytest.MonkeyPatch, what: str, kind: str) -> None:
    """W z dropped from the bias, with the wrong sign, or off by a thousandth."""
    graph = BLOCKS[kind]()
    stats = statistics(graph)
    monkeypatch.setitem(vars(linear_row), "fold", WRONG[what](linear_row.fold))
    with pytest.raises(ValidationError, match=r"^pass 'shift-channels': changed the function"):
        Pipeline("shift-channels").run(graph, stats=stats)


def test_the_validator_rejects_a_forgotten_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    true = absorb._fold
    seen = []

    def fold(rewriter, site, transform):
        seen.append(site)
        if len(seen) != 3:  # of the values; one of the keys would not show
            true(rewriter, site, transform)

    monkeypatch.setattr(absorb, "_fold", fold)
    graph = pre_norm()
    with pytest.raises(ValidationError, match=r"^pass 'shift-channels': changed the function"):
        Pipeline("shift-channels").run(graph, stats=statistics(graph))
    assert len(seen) > 3


def test_without_validation_the_wrong_graph_would_come_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is what stops it: switched off, the function differs."""
    graph = pre_norm()
    stats = statistics(graph)
    monkeypatch.setitem(vars(linear_row), "fold", WRONG["sign"](linear_row.fold))
    after, report = Pipeline("shift-channels").run(graph, stats=stats, validate=False)
    assert report.validated == 0
    x = {"x": torch.randn(2, 4, 8, dtype=torch.float64)}
    one, two = (evaluate(g, x, torch.float64)[graph.outputs[0][0]] for g in (graph, after))
    assert float((one - two).abs().max()) > 0.1


def test_nothing_to_shift_is_said() -> None:
    """A graph with spaces but no linear that reads one reports the nearest miss."""
    graph = Graph("g")
    x = graph.add_input("x", TensorType("f32", (2, 4)))
    gain = graph.add_constant("gain", Constant.of(np.ones(4, np.float32)))
    graph.add_output("y", graph.append(get("rms_norm"), [x, gain], {"eps": 1e-6}).result)
    check_text(graph)
    _, report = Pipeline("shift-channels").run(graph, stats=Stats())
    assert report["shift-channels"].misses == ["no linear with a constant weight reads a shift space"]
