"""Low-rank branches: exact before rounding, shared, better than rounding alone; shifts, folds, refusals, teeth."""

from __future__ import annotations

import numpy as np
import pytest
from channel_blocks import BLOCKS as CHANNELS
from channel_blocks import calibration
from encoder_blocks import BLOCKS, linear, norm, pre_norm, record, statistics
from helpers import check_text
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import TOLERANCE, Build, counts, golden

from planish.calibrate.collect import collect
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError, ValidationError
from planish.ir.graph import Graph, Node
from planish.ir.stats import Stats
from planish.passes import extract_low_rank
from planish.passes.base import PassReport, keep_float, kept_float
from planish.passes.bounds import lower_bound
from planish.passes.float_branches import branch_of
from planish.passes.manager import Pipeline
from planish.passes.sites import weight_matrix

TEXT = "extract-low-rank{rank=2 iterations=6 grid=6}"
FOLD = "extract-low-rank{rank=2 iterations=6 grid=6 fold=true}"
PLAIN = "extract-low-rank{rank=2 iterations=1 smooth=false shift=none}"


def run(graph: Graph, stats: Stats, pipeline: str = TEXT) -> tuple[Graph, PassReport]:
    after, report = Pipeline(pipeline).run(graph, stats=stats)
    assert report.validated
    check_text(after)
    return after, report.passes[-1]


def node_of(graph: Graph, name: str) -> Node:
    node = graph.values[name].producer
    assert node is not None
    return node


# -- exactness -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(
    "options", ["", " fold=true", " smooth=false", " shift=none", " activations=none weights=mxfp4"]
)
def test_exact_at_every_linear(kind: str, options: str) -> None:
    """Eight linears of an encoder block, the three that read one norm with one down projection."""
    graph = BLOCKS[kind]()
    after, report = run(graph, statistics(graph), TEXT.replace("}", f"{options}}}"))
    assert report.error is not None
    assert report.error <= TOLERANCE
    assert len(report.applied) == len(report.figures) == 6
    assert not report.declined
    assert len(after) - len(graph) == report.inserted
    assert sum(branch_of(v) is not None for n in after.nodes for v in n.results) == 8
    assert len(kept_float(after)) == 6 + 8
    for figures in report.figures.values():
        assert figures["error_after"] < figures["error_before"]


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.sampled_from(sorted(CHANNELS)), st.booleans(), st.integers(1, 3))
def test_exact_on_any_block(seed: int, kind: str, fold: bool, rank: int) -> None:
    graph = CHANNELS[kind](seed)
    text = f"extract-low-rank{{rank={rank} iterations=2 grid=3 fold={str(fold).lower()}}}"
    _, report = run(graph, collect(graph, calibration(graph, seed)), text)
    assert report.error is None or report.error <= TOLERANCE
    assert bool(report.applied) == (kind != "convolutions")


def test_one_down_for_linears_that_read_one_value() -> None:
    graph = pre_norm()
    after, _ = run(graph, statistics(graph))
    downs = {branch_of(after.values[name]).down for name in ("linear_1", "linear_2", "linear_6")}
    assert len(downs) == 1
    (down,) = downs
    assert down.operand(0).name == "layer_norm"  # x as it was
    assert weight_matrix(down).shape == (2, 8)
    for name in ("linear_1", "linear_2", "linear_6"):
        assert node_of(after, f"{name}.residual").operand(0).name == "layer_norm.smoothed"
        assert weight_matrix(branch_of(after.values[name]).up).shape == (8, 2)


# -- the algebra (methods/a.md, 7) -----------------------------------------------------------------------


def test_residual_and_branch_are_the_weight() -> None:
    """R = W diag(s) - up down diag(s), with the factors as float32 holds them."""
    graph = pre_norm()
    before = {n.result.name: weight_matrix(n) for n in graph.nodes if n.op.name == "linear"}
    after, _ = run(graph, statistics(graph))
    for name, weight in before.items():
        branch = branch_of(after.values[name])
        assert branch is not None
        up, down = weight_matrix(branch.up), weight_matrix(branch.down)
        assert np.array_equal(up, up.astype(np.float32))
        assert np.array_equal(down, down.astype(np.float32))
        main = node_of(after, f"{name}.residual")
        read = main.operand(0).producer
        s = 1.0 / read.operand(1).constant.wide()
        assert np.allclose(
            weight_matrix(main), weight * s - up @ (down * s), rtol=0, atol=1e-12 * np.abs(weight * s).max()
        )


def test_what_is_left_is_the_tail() -> None:
    """One SVD without smoothing: |R|_F^2 is the energy beyond rank 2, over the readers together."""
    graph = pre_norm()
    readers = ("linear_1", "linear_2", "linear_6")
    stacked = np.concatenate([weight_matrix(node_of(graph, name)) for name in readers])
    after, report = run(graph, statistics(graph), PLAIN)
    left = np.concatenate([weight_matrix(node_of(after, f"{name}.residual")) for name in readers])
    tail = np.linalg.svd(stacked, compute_uv=False)[2:]
    assert np.isclose((left**2).sum(), (tail**2).sum(), rtol=1e-5)
    assert report.figures["layer_norm"]["choice"] == "none"
    assert report.figures["layer_norm"]["full_svd"]
    assert "mul" not in counts(after)


def test_more_of_the_search_is_never_worse() -> None:
    graph = pre_norm()
    stats = statistics(graph)
    errors = []
    for options in ("smooth=false iterations=1", "smooth=false iterations=8", "iterations=8 grid=10"):
        _, report = run(graph, stats, f"extract-low-rank{{rank=2 shift=none {options}}}")
        errors.append(report.figures["layer_norm"]["error_after"])
    assert errors[0] >= errors[1] > errors[2]


# -- shifts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "c"), [("gelu", 22 / 128), ("silu", 36 / 128), ("relu", 0.0)])
def test_unsigned_behind_an_activation(activation: str, c: float) -> None:
    """(x + c) / s >= 0 by its ops; b' = b - R (c / s)."""
    graph = pre_norm(activation=activation)
    bias = node_of(graph, "linear_15").operand(2).constant.wide()
    after, report = run(graph, statistics(graph))
    assert report.figures[activation]["shift"] == c
    main = node_of(after, "linear_15.residual")
    read = main.operand(0)
    assert lower_bound(read) is not None
    assert lower_bound(read) >= 0
    s = 1.0 / read.producer.operand(1).constant.wide() if read.producer.op.name == "mul" else np.ones(12)
    expected = bias - weight_matrix(main) @ (c / s)
    assert np.allclose(main.operand(2).constant.wide(), expected, rtol=1e-12)
    shifts = [n for n in after.nodes if n.result.name.endswith(".shifted")]
    assert len(shifts) == (c > 0)


def test_a_bias_is_made_for_a_shift() -> None:
    graph = pre_norm(bias=False)
    after, report = run(graph, statistics(graph))
    assert report.figures["gelu"]["shift"] == 22 / 128
    assert node_of(after, "linear_15.residual").operand(2).name == "linear_15.bias"


@pytest.mark.parametrize("options", ["shift=none", "activations=nvfp4", "activations=none", "activations=uint4:g64"])
def test_no_shift(options: str) -> None:
    """Not wanted; floats keep their sign; nothing is rounded; or the format has a zero point."""
    graph = pre_norm()
    after, report = run(graph, statistics(graph), TEXT.replace("}", f" {options}}}"))
    assert report.figures["gelu"]["shift"] == 0.0
    assert not [n for n in after.nodes if n.result.name.endswith(".shifted")]


def test_a_shift_must_lower_the_error() -> None:
    """Where values reach just as far below zero as above, a sign costs less than a shift."""
    b = Build()
    x = b("tanh", b.input("x", "f32[n, 4]"))
    graph = b.output(linear(b, x, 4, "a"))
    rng = np.random.default_rng(0)
    near = record(rng.uniform(-0.05, 0.05, (64, 4)))
    _, report = run(graph, Stats({"tanh": near}), "extract-low-rank{rank=1 grid=2}")
    assert report.figures["tanh"]["shift"] == 0.0
    wide = record(rng.uniform(-1.0, 1.0, (64, 4)) + 2)
    _, report = run(graph, Stats({"tanh": wide}), "extract-low-rank{rank=1 grid=2 weights=int8}")
    assert report.figures["tanh"]["shift"] == 1.0


# -- folding ---------------------------------------------------------------------------------------------


def test_a_fold_costs_no_op() -> None:
    """Norms and values take 1 / s up; the input, the residual and what stands behind gelu cannot."""
    graph = pre_norm()
    after, report = run(graph, statistics(graph), FOLD)
    folded = {name for name, f in report.figures.items() if f["folded"]}
    assert folded == {"layer_norm", "layer_norm_13", "reshape_11"}
    assert counts(after)["mul"] == 3
    for name in folded:
        branch = branch_of(
            after.values[{"layer_norm": "linear_1", "layer_norm_13": "linear_14", "reshape_11": "linear_12"}[name]]
        )
        assert branch is not None
        assert branch.down.operand(0).name == name
    again = statistics(after)
    _, plain = run(graph, statistics(graph))
    assert not np.allclose(again.of("layer_norm").largest, statistics(graph).of("layer_norm").largest)
    assert all(not f["folded"] for f in plain.figures.values())


# -- options and order -------------------------------------------------------------------------------------


def test_skip_and_only() -> None:
    graph = pre_norm()
    stats = statistics(graph)
    _, report = run(graph, stats, TEXT.replace("}", " skip=[^linear_1$ gelu]}"))
    assert report.declined == {"skipped by name": ["linear %linear_1"]}
    _, report = run(graph, stats, TEXT.replace("}", " only=[^linear_1$]}"))
    assert list(report.figures) == ["layer_norm"]
    assert len(report.declined["not among those named"]) == 7


def test_a_second_run_does_nothing() -> None:
    graph = pre_norm()
    once, _ = run(graph, statistics(graph))
    twice, report = run(once, statistics(once))
    assert twice == once
    assert report.applied == []
    assert {r: len(p) for r, p in report.declined.items()} == {
        "it is a float branch itself": 14,
        "it has a branch already": 8,
    }


def test_same_seed_same_bytes() -> None:
    graph = pre_norm()
    stats = statistics(graph)
    assert str(run(graph, stats)[0]) == str(run(graph, stats)[0])


def test_branches_are_not_merged_into_what_is_quantised() -> None:
    graph = pre_norm()
    after, report = run(graph, statistics(graph), f"{TEXT},merge-linears")
    assert len(kept_float(after)) == 14
    assert len(report.applied) == 1  # the residuals of q, k and v
    ups = ["linear %linear_1.up", "linear %linear_2.up", "linear %linear_6.up"]
    assert report.declined["it stays in float beside what is quantised"] == ups


def test_a_linear_behind_a_linear() -> None:
    """The second reads the sum of the first with its branch."""
    b = Build()
    h = linear(b, b.input("x", "f32[n, 4]"), 4, "a")
    graph = b.output(linear(b, h, 4, "b"))
    after, report = run(graph, statistics_of(graph), "extract-low-rank{rank=1 grid=3}")
    assert list(report.figures) == ["x", "linear"]
    branch = branch_of(after.values["linear_1"])
    assert branch is not None
    assert branch.down.operand(0) is after.values["linear"]
    assert branch_of(after.values["linear"]) is not None


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_either_way(transposed: bool) -> None:
    b = Build()
    x = norm(b, b.input("x", "f32[n, 8]"), "norm")
    weight = b.random(8, 6, name="w") if transposed else b.random(6, 8, name="w")
    graph = b.output(b("linear", x, weight, **({"transposed": True} if transposed else {})))
    rng = np.random.default_rng(0)
    after, report = run(graph, collect(graph, [{"x": rng.normal(size=(32, 8)).astype(np.float32)}]))
    assert len(report.applied) == 1
    main = node_of(after, "linear.residual")
    assert bool(main.attributes.get("transposed", False)) == transposed


def small() -> Graph:
    b = Build()
    x = b.input("x", "f32[b, 2]")
    normed = b("rms_norm", x, b.constant([8.0, 2.0], name="gain"))
    return b.output(b("linear", normed, b.constant([[1.0, 2.0], [3.0, -4.0]], name="weight")))


def test_golden(update_golden: bool) -> None:
    before = small()
    stats = Stats({"rms_norm": record([[8.0, -1.0], [-4.0, 2.0]])})
    after, _ = run(before, stats, "extract-low-rank{rank=1 smooth=false}")
    golden("extract-low-rank", before, after, update_golden)


# -- refusals --------------------------------------------------------------------------------------------


def refused(graph: Graph, stats: Stats, text: str = TEXT) -> dict[str, list[str]]:
    after, report = run(graph, stats, text)
    assert report.applied == []
    assert after == graph
    return report.declined


def test_refusals() -> None:
    graph = small()
    stats = Stats({"rms_norm": record([[8.0, -1.0], [-4.0, 2.0]])})
    assert refused(graph, stats) == {"its weight has no more than 2 rows or columns": ["linear %linear"]}
    assert refused(graph, Stats(), "extract-low-rank{rank=1}") == {"no statistics of what it reads": ["linear %linear"]}
    keep_float(graph, graph.values["linear"])
    assert refused(graph, stats, "extract-low-rank{rank=1}") == {"it is a float branch itself": ["linear %linear"]}

    b = Build()
    x = b.input("x", "f32[n, 4]")
    shared = b.random(4, 4)
    graph = b.output(b("linear", b("linear", x, shared), shared))
    assert refused(graph, statistics_of(graph)) == {
        "its weight is tied: something else reads it": ["linear %linear", "linear %linear_1"]
    }
    b = Build()
    graph = b.output(b("linear", b.input("x", "f32[n, 4]"), b.random(4, 4, dtype="f16")))
    assert refused(graph, Stats()) == {"its operands are f32 and f16; expected the same float": ["linear %linear"]}
    b = Build()
    bad = np.ones((4, 4), np.float32)
    bad[1, 2] = np.nan
    graph = b.output(b("linear", b.input("x", "f32[n, 4]"), b.constant(bad, name="w")))
    assert refused(graph, Stats({"x": record(np.ones((3, 4)))})) == {"the constant %w holds NaN": ["linear %linear"]}


def statistics_of(graph: Graph) -> Stats:
    rng = np.random.default_rng(0)
    return collect(graph, [{"x": rng.normal(size=(32, 4)).astype(np.float32)}])


def test_no_branch_helps() -> None:
    """Four bits hold the weight and what it reads exactly."""
    b = Build()
    graph = b.output(b("linear", b.input("x", "f32[n, 4]"), np.full((4, 4), 7.0, np.float32)))
    assert refused(graph, Stats({"x": record(np.full((3, 4), 7.0))})) == {
        "no branch lowers its error": ["linear %linear"]
    }


def test_nothing_there() -> None:
    b = Build()
    _, report = run(b.output(b("relu", b.input("x", "f32[n, 4]"))), Stats())
    assert report.misses == ["no linear with a constant weight"]


def test_options_are_checked() -> None:
    for text, expected in {
        "extract-low-rank{rank=0}": "option 'rank': expected an integer of at least 1; got 0",
        "extract-low-rank{weights=int5}": "option 'weights': format 'int5': 'int5' is unknown; expected one of ",
        "extract-low-rank{weights=none}": "option 'weights': format 'none': 'none' is unknown; expected one of ",
        "extract-low-rank{activations=int4:g1}": "option 'activations': format 'int4:g1': 'g1' is no group; expected "
        "2 to 1048576 elements; or none",
        "extract-low-rank{weights=int4:token}": "option 'weights': int4:token: a weight has no tokens; expected ",
        "extract-low-rank{activations=int4:channel}": "option 'activations': int4:channel: an activation has no output "
        "channels; expected tensor, token or gN",
        'extract-low-rank{skip=["("]}': "option 'skip': '(' is no regular expression: ",
        "extract-low-rank{shift=always}": "option 'shift': expected one of bounded, none; got 'always'",
    }.items():
        with pytest.raises(PlanishError) as caught:
            Pipeline(text)
        assert caught.value.what.startswith(f"pass 'extract-low-rank': {expected}")
    with pytest.raises(PlanishError, match=r"^pass 'extract-low-rank': needs calibration statistics"):
        Pipeline("extract-low-rank").run(pre_norm())


# -- teeth -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["1.001", "a forgotten bias", "factors rounded after"])
def test_the_validator_rejects(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    graph = pre_norm()
    stats = statistics(graph)
    give, lower = (getattr(extract_low_rank, name) for name in ("give_weight", "lower_bias"))
    replaced = {
        "1.001": ("give_weight", lambda r, n, matrix, suffix: give(r, n, matrix * 1.001, suffix)),
        "a forgotten bias": ("lower_bias", lambda r, n, amount, dtype: lower(r, n, amount * 0, dtype)),
        "factors rounded after": ("Constant", lambda data, dtype, shape: Constant(np.round(data, 3), dtype, shape)),
    }
    monkeypatch.setattr(extract_low_rank, *replaced[wrong])
    with pytest.raises(ValidationError) as caught:
        Pipeline(TEXT).run(graph, stats=stats)
    assert caught.value.what.startswith("pass 'extract-low-rank': changed the function: relative error ")
