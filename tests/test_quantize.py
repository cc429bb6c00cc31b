"""Quantisation: codes and scales against numpy, ranges, sharing, refusals, and ONNX Runtime on what is emitted."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from encoder_blocks import BLOCKS, data, linear, pre_norm, record, statistics
from helpers import ACTIVATIONS, check_text, relative_error
from hypothesis import given
from hypothesis import strategies as st
from patterns import Build, golden

from planish.calibrate.collect import collect
from planish.codegen.onnx import to_model
from planish.ir.errors import PlanishError
from planish.ir.evaluator import evaluate
from planish.ir.formats import Format
from planish.ir.graph import Graph, Node
from planish.ir.qnodes import weight_of
from planish.ir.rounding import quantize_array
from planish.ir.stats import ChannelStats, Stats
from planish.ir.verifier import verify
from planish.passes.base import PassReport
from planish.passes.manager import Pipeline
from planish.passes.solvers import StaticRange, choose_static_range, sqnr, static_grid

seeds = st.integers(0, 10_000)
RULES: tuple[StaticRange, StaticRange] = ("min-max", "mse")


def run(
    graph: Graph, options: str = "activations=uint8:tensor", stats: Stats | None = None
) -> tuple[Graph, PassReport]:
    after, report = Pipeline(f"quantize{{{options}}}" if options else "quantize").run(graph, stats=stats)
    verify(after)
    check_text(after)
    return after, report.passes[-1]


def nodes(graph: Graph, op: str) -> list[Node]:
    return [n for n in graph.nodes if n.op.name == op]


def held(graph: Graph, name: str) -> np.ndarray:
    constant = graph.values[name].constant
    assert constant is not None
    return constant.array()


def choose_weight_scale(w: np.ndarray, clip: str) -> np.ndarray:
    return quantize_array(w, Format.parse("int8:channel"), clip).scale  # type: ignore[arg-type]


def ort(graph: Graph, inputs: dict[str, np.ndarray], *, optimise: bool, target: str = "onnx") -> dict[str, np.ndarray]:
    model = to_model(graph, target=target)
    if target == "onnx":
        onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def error(got: dict[str, np.ndarray], expected: dict[str, torch.Tensor]) -> float:
    return max(relative_error(torch.from_numpy(got[name]), tensor) for name, tensor in expected.items())


# -- weights -------------------------------------------------------------------------------------


@given(seeds)
def test_weight_scales_and_codes(seed: int) -> None:
    """max |row| / 127; codes are the nearest of -127 ... 127; half a step is the largest error."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(5, 7)) * rng.lognormal(0, 3, (5, 1))
    scale = choose_weight_scale(w, "max")
    assert np.allclose(scale, np.abs(w).max(1) / 127, rtol=1e-7)
    codes = np.round(w / scale[:, None])
    assert np.abs(codes).max() == 127
    assert (np.abs(codes * scale[:, None] - w) <= scale[:, None] / 2 * (1 + 1e-5)).all()


@given(seeds)
def test_clipping_for_the_least_squares_is_never_worse(seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_t(3, size=(6, 40))

    def squares(scale: np.ndarray) -> np.ndarray:
        codes = np.clip(np.round(w / scale[:, None]), -127, 127)
        return ((codes * scale[:, None] - w) ** 2).sum(1)

    best, plain = choose_weight_scale(w, "mse"), choose_weight_scale(w, "max")
    assert (squares(best) <= squares(plain) * (1 + 1e-9)).all()
    assert (best <= plain).all()


@pytest.mark.parametrize("clip", ["max", "mse"])
def test_rows_of_zeros(clip: str) -> None:
    w = np.array([[0.0, 0.0], [1.0, -2.0]])
    before = w.copy()
    scale = choose_weight_scale(w, clip)  # type: ignore[arg-type]
    assert (scale > 0).all()
    assert (np.round(w[0] / scale[0]) == 0).all()
    assert (w == before).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_codes_of_a_linear(transposed: bool) -> None:
    b = Build()
    w = b.rng.normal(size=(4, 6)).astype(np.float32)
    w[2] = 0.0
    weight = b.constant(w.T if transposed else w, name="w")
    graph = b.output(b("linear", b.input("x", "f32[b, 6]"), weight, transposed=transposed))
    after, report = run(graph, "activations=none")
    (made,) = nodes(after, "dequantize")
    assert made.attributes["axis"] == (1 if transposed else 0)
    codes, scale = held(after, "w.codes"), held(after, "w.scale")
    assert codes.dtype == np.int8
    assert scale.dtype == np.float32
    expected = np.where(np.abs(w).max(1) > 0, np.abs(w).max(1) / 127, 1.0)
    assert np.allclose(scale, expected, rtol=1e-6)
    codes = codes.T if transposed else codes
    assert np.array_equal(codes, np.round(w.astype(np.float64) / scale.astype(np.float64)[:, None]))
    assert report.figures["weights"]["w"]["sqnr_db"] == pytest.approx(sqnr(w, codes * scale[:, None]), abs=1e-3)
    assert 35 < report.figures["weights"]["w"]["sqnr_db"] < 60


def test_codes_of_a_gemm_and_a_convolution() -> None:
    b = Build()
    y = b("gemm", b.input("x", "f32[5, 6]"), b.random(6, 4, name="g"))
    z = b("conv", b.input("i", "f32[2, 3, 8, 8]"), b.random(4, 3, 3, 3, name="k"))
    graph = b.output(y, z)
    after, _ = run(graph, "activations=none")
    assert [n.attributes["axis"] for n in nodes(after, "dequantize")] == [1, 0]
    kernel = held(graph, "k")
    assert np.allclose(held(after, "k.scale"), np.abs(kernel).max((1, 2, 3)) / 127, rtol=1e-6)
    again = held(after, "k.codes") * held(after, "k.scale")[:, None, None, None]
    assert np.abs(again - kernel).max() <= held(after, "k.scale").max() / 2 * 1.001


def test_one_weight_for_two_readers() -> None:
    b = Build()
    w = b.random(6, 6, name="w")
    graph = b.output(b("linear", b("linear", b.input("x", "f32[b, 6]"), w), w))
    after, _ = run(graph, "activations=none")
    assert Counter(n.op.name for n in after.nodes) == {"dequantize": 1, "linear": 2}


def test_golden(update_golden: bool) -> None:
    b = Build()
    x = b.input("x", "f32[b, 2]")
    before = b.output(b("linear", x, b.constant([[127.0, -63.5], [0.5, 0.25]], name="w"), b.constant([1.0, 2.0])))
    after, _ = run(before)
    golden("quantize", before, after, update_golden)


# -- static ranges -------------------------------------------------------------------------------


def static_codes(known: ChannelStats, rule: StaticRange, percentile: float = 99.99) -> tuple[float, int]:
    """Scale and zero point of uint8."""
    form = Format.parse("uint8:tensor:static")
    grid = static_grid(*choose_static_range(known, form, rule, percentile), form)
    assert grid.zero is not None
    return float(grid.scale), int(grid.zero)


@given(seeds, st.floats(-50, 50))
def test_the_static_range_holds_all_and_zero(seed: int, offset: float) -> None:
    x = np.random.default_rng(seed).normal(size=(64, 3)) + offset
    scale, zero = static_codes(record(x), "min-max")
    assert 0 <= zero <= 255
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    assert scale == pytest.approx((high - low) / 255, rel=1e-5)
    assert abs(zero - -low / scale) <= 0.5 + 1e-3
    assert -zero * scale <= low + scale and (255 - zero) * scale >= high - scale


def squares(x: np.ndarray, scale: float, zero: int) -> float:
    codes = np.clip(np.round(x / scale) + zero, 0, 255)
    return float((((codes - zero) * scale - x) ** 2).sum())


@given(seeds)
def test_static_clipping(seed: int) -> None:
    """mse is no worse than min-max on the samples; a percentile leaves out the tail."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, size=(400, 4)).astype(np.float32)
    whole, best = (static_codes(record(x), rule) for rule in RULES)
    assert squares(x, *best) <= squares(x, *whole)
    assert best[0] <= whole[0]
    narrow = static_codes(record(x), "percentile", 90.0)
    low, high = np.percentile(x, [5.0, 95.0])
    assert narrow[0] == pytest.approx((high - low) / 255, rel=1e-4)


@pytest.mark.parametrize("rule", ["min-max", "percentile", "mse"])
def test_a_static_range_of_nothing(rule: str) -> None:
    assert static_codes(record(np.zeros((4, 2))), rule) == (1.0, 0)  # type: ignore[arg-type]


def test_sqnr() -> None:
    x = np.array([3.0, 4.0])
    assert sqnr(x, x) == float("inf")
    assert sqnr(x, x + [0.0, 0.5]) == pytest.approx(20.0)
    assert sqnr(np.zeros(2), np.ones(2)) < -1000


# -- activations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["dynamic", "token", "static"])
def test_shared_activations_are_quantised_once(activations: str) -> None:
    graph = pre_norm()
    stats = statistics(graph)
    after, report = run(graph, f"activations={ACTIVATIONS[activations]}", stats)
    assert len(report.applied) == len(nodes(graph, "linear"))
    read = {n.operands[0].name for n in nodes(graph, "linear")}
    op = "quantize" if activations == "static" else "dynamic_quantize"
    assert {n.operands[0].name for n in nodes(after, op)} == read
    assert len(nodes(after, op)) == len(read) < len(report.applied)
    assert len(nodes(after, "dequantize")) == len(read) + len(report.applied)
    assert all(n.operands[0].producer.op.name == "dequantize" for n in nodes(after, "linear"))
    if activations == "static":
        assert set(report.figures["activations"]) == read


def test_behind_a_graph_input() -> None:
    b = Build()
    x = b.input("x", "f32[b, 8]")
    graph = b.output(b("relu", x), linear(b, x, 4, "a"))
    after, _ = run(graph)
    assert next(iter(after.nodes)).op.name == "dynamic_quantize"
    assert nodes(after, "relu")[0].operands[0] is after.inputs[0]


@pytest.mark.parametrize("optimise", [False, True])
@pytest.mark.parametrize("activations", ["dynamic", "token", "floors", "static", "none"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_onnx_runtime_computes_the_same(kind: str, activations: str, optimise: bool) -> None:
    """The evaluator in float32 and ONNX Runtime on the emitted model, and both near the float model.

    `floors`: per row, with statistics that tell which activations hardly fall below zero.
    """
    graph = BLOCKS[kind]()
    stats = None if activations == "token" else statistics(graph)
    after, _ = run(graph, f"activations={ACTIVATIONS[activations]}", stats)
    inputs = data(samples=1)[0]  # of the calibration data: what lies outside of its range is clipped
    expected = evaluate(after, inputs)
    exact = evaluate(graph, inputs, torch.float64)
    # a rounding that falls otherwise in one place shows as one step of one activation; with its optimiser on, the
    # session rounds the activations of weight-only products too
    assert error(ort(after, inputs, optimise=optimise), expected) < 0.05
    noise = max(relative_error(expected[n], exact[n]) for n in exact)
    assert 0 < noise < 0.1


@pytest.mark.parametrize("activations", ["dynamic", "token", "static", "none"])
def test_the_evaluator_against_numpy(activations: str) -> None:
    b = Build()
    w, bias = b.rng.normal(size=(4, 6)), b.rng.normal(size=4)
    x = b.input("x", "f32[n, 6]")
    graph = b.output(b("linear", x, b.constant(w, name="w"), b.constant(bias)))
    rows = b.rng.normal(size=(5, 6)) * b.rng.lognormal(0, 1, (5, 1)) - 0.5
    stats = Stats({"x": record(rows)}) if activations == "static" else None
    after, _ = run(graph, f"activations={ACTIVATIONS[activations]}", stats)
    got = evaluate(after, {"x": torch.from_numpy(rows)}, torch.float64)["linear"].numpy()

    if activations == "token":
        step = np.abs(rows).max(1, keepdims=True) / 127
        zero = np.float64(128)
    else:
        low, high = min(rows.min(), 0.0), max(rows.max(), 0.0)
        step, zero = (high - low) / 255, np.round(-low / ((high - low) / 255))
    codes = rows if activations == "none" else (np.clip(np.round(rows / step) + zero, 0, 255) - zero) * step
    scale = np.abs(w.astype(np.float32)).max(1) / 127
    weight = np.round(w.astype(np.float32) / scale[:, None]) * scale[:, None]
    expected = codes @ weight.T + bias.astype(np.float32)
    assert np.allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("low", [0.0, -0.01, -0.2])
def test_rows_that_hardly_fall_below_zero(low: float) -> None:
    """All 8 bits for the positive side; nothing is clipped, with zeros alone below and with rows larger than seen."""
    b = Build()
    x = b.input("x", "f32[n, 8]")
    graph = b.output(linear(b, x, 4, "a"))
    rows = np.maximum(b.rng.normal(size=(40, 8)) * b.rng.lognormal(0, 1, (40, 1)), low).astype(np.float32)
    after, _ = run(graph, "activations=int8:token", Stats({"x": record(rows / 3)}))
    got = evaluate(after, {"x": rows}, torch.float64, keep=["x.dequantized"])["x.dequantized"].numpy()
    inside = rows >= rows.min() / 3 - 1e-6
    step = rows.max(1, keepdims=True) / 255
    assert np.abs(got - rows)[inside].max() <= 0.75 * np.broadcast_to(step, rows.shape).max()


# -- embeddings ------------------------------------------------------------------------------------


def embedded(rows: int = 300, *, tied: bool = False) -> Graph:
    b = Build()
    table = b.random(rows, 8, name="table")
    h = b("embedding", table, b.input("ids", "i64[b, t]"))
    return b.output(b("linear", h, table) if tied else linear(b, h, 4, "head"))


def test_an_embedding_table() -> None:
    graph = embedded()
    after, report = run(graph, "activations=none")
    assert len(report.applied) == 2
    assert Counter(n.op.name for n in after.nodes)["embedding"] == 2
    codes, scale, table = held(after, "table.codes"), held(after, "table.scale"), held(graph, "table")
    assert (codes.dtype, codes.shape, scale.shape) == (np.int8, (300, 8), (300, 1))
    assert np.allclose(scale[:, 0], np.abs(table).max(1) / 127, rtol=1e-6)
    assert np.abs(codes * scale - table).max() <= scale.max() / 2 * 1.001
    ids = np.random.default_rng(0).integers(0, 300, (2, 5))
    expected = evaluate(after, {"ids": torch.from_numpy(ids)})
    for optimise in (False, True):
        assert error(ort(after, {"ids": ids}, optimise=optimise), expected) < 1e-4


def test_tables_that_stay() -> None:
    assert len(run(embedded(255), "activations=none")[1].applied) == 1  # too small to be worth it
    assert len(run(embedded(255), "activations=none min-rows=10")[1].applied) == 2
    assert len(run(embedded(), "activations=none embeddings=none")[1].applied) == 1


def test_a_tied_table_is_quantised_once() -> None:
    """In the format of `embeddings`; the head reads the same codes."""
    graph = embedded(tied=True)
    after, report = run(graph, "weights=int8:channel embeddings=int4:g4")
    assert len(report.applied) == 2 and not report.declined
    assert list(report.figures["weights"]) == ["table"]
    codes = after.values["table.codes"]
    assert codes.dtype == "i4"
    assert sorted(n.op.name for n in codes.users) == ["dequantize", "embedding"]
    weight = weight_of(nodes(after, "linear")[0])
    assert weight is not None
    ids = np.arange(12).reshape(2, 6)
    rows = evaluate(after, {"ids": torch.from_numpy(ids)}, torch.float64, keep=["table.rows"])["table.rows"]
    assert np.allclose(rows.numpy(), weight.dequantize()[ids], rtol=1e-12)


@pytest.mark.parametrize("options", ["skip=[linear]", "weights=none", "activations=uint8:tensor:static"])
def test_a_tied_table_stays_where_the_head_does(options: str) -> None:
    graph = embedded(tied=True)
    after, report = run(
        graph, f"weights=int8:channel {options}".replace("weights=int8:channel weights", "weights"), Stats()
    )
    assert report.declined["its table has other readers (a tied head)"] == ["embedding %embedding"]
    assert nodes(after, "embedding")[0].operands[0] is after.values["table"]


# -- convolutions ----------------------------------------------------------------------------------


def convolved(groups: int = 1) -> Graph:
    b = Build()
    x = b.input("x", "f32[2, 4, 8, 8]")
    h = b("relu", b("conv", x, b.random(4, 4 // groups, 3, 3, name="k"), b.random(4), pads=(1, 1, 1, 1), groups=groups))
    return b.output(b("conv", h, b.random(2, 4, 1, 1, name="m")))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_static_convolutions(groups: int) -> None:
    from planish.calibrate.collect import collect

    graph = convolved(groups)
    rng = np.random.default_rng(0)
    batches = [{"x": rng.normal(size=(2, 4, 8, 8)).astype(np.float32)} for _ in range(3)]
    stats = collect(graph, batches)
    after, report = run(graph, "activations=uint8:tensor:static", stats)
    assert len(report.applied) == 2
    expected, exact = evaluate(after, batches[0]), evaluate(graph, batches[0])
    assert 0 < relative_error(expected["conv_1"], exact["conv_1"]) < 0.05
    for optimise in (False, True):
        assert error(ort(after, batches[0], optimise=optimise), expected) < 0.02


@pytest.mark.parametrize("activations", ["dynamic", "token"])
def test_convolutions_at_run_time(activations: str) -> None:
    before = convolved()
    after, report = run(before, f"activations={ACTIVATIONS[activations]}")
    assert after == before
    reason = "no target multiplies run-time quantised convolutions faster than float"
    assert {k: len(v) for k, v in report.declined.items()} == {reason: 2}


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite(bad: float) -> None:
    b = Build()
    w = np.ones((4, 8))
    w[1, 2] = bad
    graph = b.output(b("linear", b.input("x", "f32[b, 8]"), b.constant(w, name="w")))
    with pytest.raises(PlanishError) as caught:
        run(graph)
    assert str(caught.value) == "weight 'w': holds NaN or infinity\n  in linear %linear"
    b = Build()
    table = np.ones((300, 8))
    table[3] = bad
    graph = b.output(b("embedding", b.constant(table, name="table"), b.input("ids", "i64[b]")))
    with pytest.raises(PlanishError) as caught:
        run(graph)
    assert str(caught.value) == "table 'table': holds NaN or infinity\n  in embedding %embedding"


def test_static_needs_statistics() -> None:
    with pytest.raises(PlanishError) as caught:
        run(pre_norm(), "activations=uint8:tensor:static")
    assert caught.value.what == "pass 'quantize': needs calibration statistics"
    after, report = run(pre_norm(), "activations=uint8:tensor:static", Stats())
    assert after == pre_norm()
    assert list(report.declined) == ["no statistics of what it reads"]
    assert not report.applied


def test_a_transposed_gemm_is_declined() -> None:
    b = Build()
    graph = b.output(b("gemm", b.input("x", "f32[6, 5]"), b.random(6, 4), trans_a=True))
    after, report = run(graph)
    assert after == graph
    assert dict(report.declined) == {"this form of gemm is not quantised": ["gemm %gemm"]}


def test_a_weight_that_is_no_constant_is_not_its_business() -> None:
    b = Build()
    graph = b.output(b("linear", b.input("x", "f32[b, 8]"), b.input("w", "f32[4, 8]")))
    after, report = run(graph)
    assert after == graph
    assert not report.declined and not report.applied


def test_skipped_by_name() -> None:
    graph = pre_norm()
    for index, node in enumerate(nodes(graph, "linear")):
        node.source = f"/layer.{index}/MatMul"
    _, report = run(graph, 'skip=[layer.0 "layer\\.[23]/" ^linear_17$]')
    assert {k: len(v) for k, v in report.declined.items()} == {"skipped by name": 4}
    assert len(report.applied) == 4


def test_a_second_run_finds_nothing_to_do() -> None:
    for graph in (pre_norm(), embedded()):
        once, _ = run(graph)
        twice, report = run(once)
        assert twice == once
        assert not report.applied


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(PlanishError) as caught:
        run(pre_norm(), 'skip=["("]')
    assert caught.value.what.startswith("pass 'quantize': option 'skip': '(' is no regular expression: ")


def test_quantised_is_a_fact() -> None:
    from planish.passes.base import Exactness
    from planish.passes.quantize import Quantize

    assert Quantize.gives == {"quantised"}
    assert Quantize.exactness is Exactness.LOSSY


# -- with statistics -------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["solver=gptq", "bias-correction=true"])
def test_what_needs_statistics(option: str) -> None:
    with pytest.raises(PlanishError) as caught:
        run(pre_norm(), option)
    assert caught.value.what == "pass 'quantize': needs calibration statistics"


def correlated() -> tuple[Graph, Stats, np.ndarray]:
    """A linear on channels that move together."""
    b = Build()
    graph = b.output(linear(b, b.input("x", "f32[n, 16]"), 8, "a"))
    rows = (
        b.rng.normal(size=(200, 3)) @ b.rng.normal(size=(3, 16)) + 0.05 * b.rng.normal(size=(200, 16)) + 1.0
    ).astype(np.float32)
    return graph, Stats({"x": record(rows)}), rows


def test_gptq_keeps_the_output() -> None:
    graph, stats, rows = correlated()
    exact = evaluate(graph, {"x": rows}, torch.float64)["linear"]
    errors = {}
    for solver in ("rtn", "gptq"):
        after, _ = run(graph, f"activations=none solver={solver}", stats)
        codes = held(after, "a.weight.codes")
        assert codes.dtype == np.int8 and np.abs(codes.astype(int)).max() <= 127
        got = evaluate(after, {"x": rows}, torch.float64)["linear"]
        errors[solver] = float(((got - exact) ** 2).sum())
    assert errors["gptq"] < errors["rtn"] / 2


@pytest.mark.parametrize("activations", ["none", "token", "dynamic", "static"])
@pytest.mark.parametrize("bias", [True, False])
def test_bias_correction_removes_the_mean_error(activations: str, bias: bool) -> None:
    graph, stats, rows = correlated()
    if not bias:
        b = Build()
        graph = b.output(linear(b, b.input("x", "f32[n, 16]"), 8, "a", bias=False))
    exact = evaluate(graph, {"x": rows}, torch.float64)["linear"]
    means = []
    for correct in ("false", "true"):
        after, _ = run(graph, f"activations={ACTIVATIONS[activations]} bias-correction={correct}", stats)
        got = evaluate(after, {"x": rows}, torch.float64)["linear"]
        means.append(float((got - exact).mean(0).abs().max()))
    assert means[1] < means[0] / 5


def test_bias_correction_sees_rows_with_a_floor() -> None:
    """One-sided rows are quantised from a floor: the corrected bias must follow that form, not the symmetric one."""
    b = Build()
    graph = b.output(linear(b, b.input("x", "f32[n, 16]"), 8, "a"))
    rows = np.abs(b.rng.normal(size=(200, 16))).astype(np.float32) - 0.05
    stats = collect(graph, [{"x": rows}], rows=200)
    exact = evaluate(graph, {"x": torch.from_numpy(rows)}, torch.float64)
    after, report = run(graph, "activations=int8:token bias-correction=true", stats)
    assert any("floor" in n.attributes for n in after.nodes)
    got = evaluate(after, {"x": torch.from_numpy(rows)}, torch.float64)
    for name, tensor in exact.items():
        assert float((got[name] - tensor).mean(0).abs().max()) <= 1e-9
    assert report.figures["activations"]["x"]["sqnr_db"] > 40


@pytest.mark.parametrize("option", ["solver=gptq", "bias-correction=true"])
def test_statistics_of_another_axis_are_not_rows(option: str) -> None:
    """A convolution reads the value too, whose channels lie elsewhere: a linear's columns are unknown."""
    b = Build()
    h = b("relu", b.input("x", "f32[2, 4, 5, 6]"))
    graph = b.output(b("conv", h, b.random(4, 4, 1, 1)), b("linear", h, b.random(3, 6), b.random(3)))
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 6)).astype(np.float32)
    stats = collect(graph, [{"x": x}])
    assert stats.of("relu").axis == -3
    after, report = run(graph, option, stats)
    check_text(after)
    assert [line.partition(" ")[0] for line in report.applied] == ["conv", "linear"]


def test_a_vector_by_groups() -> None:
    """An activation of rank 1: its one axis is that of the groups, also where its error is told."""
    b = Build()
    graph = b.output(linear(b, b("relu", b.input("x", "f32[12]")), 4, "a"))
    rows = np.random.default_rng(0).normal(size=(6, 12)).astype(np.float32)
    after, report = run(graph, "activations=int4:g8", collect(graph, [{"x": row} for row in rows]))
    check_text(after)
    assert 10 < report.figures["activations"]["relu"]["sqnr_db"] < 40
