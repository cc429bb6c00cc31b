"""extract-outliers: exact before quantisation; static columns do not see the batch, dynamic ones do."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import check_text
from patterns import Build, golden

import planish
from planish.calibrate.collect import collect
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError, ValidationError
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph
from planish.ir.ops import get
from planish.ir.stats import ChannelStats, Stats
from planish.ir.types import TensorType
from planish.passes import extract_outliers
from planish.passes.base import kept_float
from planish.passes.extract_outliers import ExtractOutliers, choose_columns
from planish.passes.manager import Pipeline

WIDTH, LOUD = 12, (2, 7)


def two_readers(*, transposed: bool = False, dtype: str = "f32", width: int = WIDTH) -> Graph:
    """x [n, 3, width], read by two linears, one with a bias; their sum is given out, and one of them."""
    rng = np.random.default_rng(0)
    graph = Graph("two")
    x = graph.add_input("x", TensorType(dtype, ("n", 3, width)))
    made = []
    for name, bias in (("a", True), ("b", False)):
        data = rng.normal(size=(5, width))
        data = np.ascontiguousarray(data.T if transposed else data)
        operands = [x, graph.add_constant(f"{name}.weight", Constant(data.astype(np.float32), dtype, data.shape))]
        if bias:
            operands.append(graph.add_constant(f"{name}.bias", Constant.of(rng.normal(size=5).astype(np.float32))))
        made.append(
            graph.append(get("linear"), operands, {"transposed": True} if transposed else {}, names=[name]).result
        )
    graph.add_output("y", graph.append(get("add"), made, names=["sum"]).result)
    graph.add_output("b", made[1])
    check_text(graph)
    return graph


def batches(seed: int = 0, n: int = 4, width: int = WIDTH) -> list[dict[str, torch.Tensor]]:
    """Inputs in (-2, 2) but for the loud columns, which reach 20."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(3):
        x = torch.rand((n, 3, width), generator=generator) * 4 - 2
        x[..., list(LOUD)] *= 10
        found.append({"x": x})
    return found


def record(largest: list[float], samples: np.ndarray | None = None) -> ChannelStats:
    top = np.array(largest)
    held = np.diag(top).astype(np.float32) if samples is None else samples
    return ChannelStats(-1, -top, top, top**2, held, len(held))


def test_choose_columns() -> None:
    held = record([1.0, 7.0, 6.0, 5.9])
    assert choose_columns(held, 6.0).tolist() == [1, 2]
    assert choose_columns(held, 6.0, count=3).tolist() == [1, 2, 3]
    assert choose_columns(held, 6.0, fraction=0.2).tolist() == [1]
    assert choose_columns(held, 6.0, fraction=0.5).tolist() == [1, 2]
    assert choose_columns(held, 8.0).tolist() == []
    # by the share of rows: column 1 reaches 6 in half of them, column 2 in a quarter
    samples = np.zeros((4, 4), np.float32)
    samples[:2, 1], samples[0, 2] = -7, 6
    held = record([1.0, 7.0, 6.0, 5.9], samples)
    assert choose_columns(held, 6.0, rows=0.3).tolist() == [1]
    assert choose_columns(held, 6.0, rows=0.5).tolist() == [1]
    assert choose_columns(held, 6.0, rows=0.6).tolist() == []
    assert choose_columns(held, 6.0, rows=0.2).tolist() == [1, 2]


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("transposed", [False, True])
def test_exact(mode: str, transposed: bool) -> None:
    graph = two_readers(transposed=transposed)
    stats = collect(graph, batches())
    after, report = Pipeline(f"extract-outliers{{mode={mode}}}").run(graph, stats=stats)
    check_text(after)
    done = report["extract-outliers"]
    assert len(done.applied) == 2
    assert done.error is not None
    assert done.error <= 1e-10
    assert done.inserted == len(after) - len(graph)
    assert kept_float(after) == {"a.loud", "b.loud"}
    expected = evaluate(graph, batches(5)[0], torch.float64)
    for name, value in evaluate(after, batches(5)[0], torch.float64).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)
    # a second run finds what was done
    _, again = Pipeline(f"extract-outliers{{mode={mode}}}").run(after, stats=collect(after, batches()))
    assert again["extract-outliers"].applied == []


def test_static_graph() -> None:
    """The columns, the weights bit for bit, and the statistics of both parts."""
    graph = two_readers()
    stats = collect(graph, batches())
    after, report = Pipeline("extract-outliers").run(graph, stats=stats)
    weight = graph.values["a.weight"].constant
    loud, quiet = after.values["a.weight.loud"].constant, after.values["a"].producer
    assert weight is not None
    assert loud is not None
    assert quiet is not None
    assert loud.dtype == "f32"
    np.testing.assert_array_equal(loud.array(), weight.array()[:, list(LOUD)])
    held = quiet.operands[1]
    assert held is not None
    assert held.constant is not None
    rest = np.delete(np.arange(WIDTH), list(LOUD))
    np.testing.assert_array_equal(held.constant.array()[:, rest], weight.array()[:, rest])
    assert not held.constant.array()[:, list(LOUD)].any()
    assert report["extract-outliers"].figures["columns"] == {"a": 2, "b": 2}
    # true statistics: a new collection says the same of what the passes made
    collected = collect(after, batches())
    carried = _stats_after(graph, stats)
    for name in ("x.quiet", "x.loud"):
        np.testing.assert_allclose(carried.of(name).minimum, collected.of(name).minimum, rtol=1e-6)
        np.testing.assert_allclose(carried.of(name).maximum, collected.of(name).maximum, rtol=1e-6)
        np.testing.assert_allclose(carried.of(name).mean_square, collected.of(name).mean_square, rtol=1e-6)


def _stats_after(graph: Graph, stats: Stats) -> Stats:
    from planish.passes.base import Context

    copied = stats.copy()
    ExtractOutliers().run(graph.clone(), Context(stats=copied))
    return copied


def test_the_batch_decides_only_in_dynamic_mode() -> None:
    """A row's result after quantisation, alone and beside a batch-mate with an outlier in column 4."""
    graph = two_readers()
    stats = collect(graph, batches())
    row = batches(3, 1)[0]["x"]
    mate = torch.zeros_like(row)
    mate[..., 4] = 50.0
    alone, together = {"x": row}, {"x": torch.cat([row, mate])}
    moved = {}
    for mode in ("static", "dynamic"):
        after, _ = Pipeline(f"extract-outliers{{mode={mode}}},quantize{{activations=int8:token}}").run(
            graph, stats=stats
        )
        first, both = (evaluate(after, inputs, torch.float64)["y"] for inputs in (alone, together))
        moved[mode] = float((first - both[:1]).abs().max())
    assert moved["static"] == 0.0
    assert moved["dynamic"] > 1e-6


def test_quantised_error_falls() -> None:
    """The outliers no longer widen the range of their rows; and a row of zeros stays finite."""
    graph = two_readers()
    stats = collect(graph, batches())
    inputs = {"x": batches(8)[0]["x"].clone()}
    inputs["x"][0] = 0.0
    exact = evaluate(graph, inputs, torch.float64)["y"]
    errors = {}
    for text in ("", "extract-outliers,", "extract-outliers{mode=dynamic},"):
        after, report = Pipeline(text + "quantize{activations=int8:token}").run(graph, stats=stats)
        check_text(after)
        got = evaluate(after, inputs)["y"]
        assert torch.isfinite(got).all()
        errors[text] = float((got - exact).norm() / exact.norm())
        assert len(report["quantize"].applied) == 2  # the float branches are left alone
        if text == "extract-outliers,":  # and their weights are those of the model, not int8 read back
            kept, whole = after.values["a.weight.loud"].constant, graph.values["a.weight"].constant
            assert kept is not None
            assert whole is not None
            np.testing.assert_array_equal(kept.array(), whole.array()[:, list(LOUD)])
    plain, static, dynamic = errors.values()
    assert static < plain / 3
    assert dynamic < plain / 3


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_onnx_and_torch(mode: str, target: str, tmp_path: object) -> None:
    """Both forms run in ONNX Runtime with its optimiser on and off and in torch; also where nothing is an outlier."""
    graph = two_readers()
    stats = collect(graph, batches())
    after, _ = Pipeline(f"extract-outliers{{mode={mode}}},quantize{{activations=int8:token}}").run(graph, stats=stats)
    path = f"{tmp_path}/m.onnx"
    planish.to_onnx(Pipeline(f"lower{{target={target}}}").run(after)[0], path, target=target)
    module = planish.to_torch(after)
    for level in (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for factor in (1.0, 0.1):  # at 0.1 no column reaches 6
            x = batches(11)[0]["x"] * factor
            x[0, 0] = 0.0  # a row of zeros has no range: no division by 0
            expected = evaluate(after, {"x": x})
            for name, value in zip(expected, session.run(None, {"x": x.numpy()}), strict=True):
                np.testing.assert_allclose(value, expected[name].numpy(), rtol=1e-4, atol=1e-4)
            for name, value in module(x).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def test_sums_beyond_2_to_24(tmp_path: object) -> None:
    """K > 1040: partial sums of codes leave float32's integers; the integer product must not round them."""
    width = 4096
    graph = Graph("long")
    x = graph.add_input("x", TensorType("f32", (1, width)))
    rng = np.random.default_rng(0)
    codes = np.where(np.arange(width) % 4 < 2, 127.0, rng.integers(-127, 128, width))  # all positive runs add up
    weight = np.full((2, width), 127.0)
    weight[1, width // 2 :] *= -1
    graph.add_output("y", graph.append(
        get("linear"), [x, graph.add_constant("w", Constant.of(weight.astype(np.float32)))], names=["y"]).result
    )  # fmt: skip
    after, _ = Pipeline("quantize{activations=int8:token},lower{target=ort}").run(graph)
    path = f"{tmp_path}/m.onnx"
    planish.to_onnx(after, path, target="ort")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": codes[None].astype(np.float32)})
    exact = weight.astype(np.int64) @ codes.astype(np.int64)
    assert abs(exact[0]) > 2**24
    np.testing.assert_array_equal(got[0], exact.astype(np.float32))


def test_narrow_floats_keep_their_dtype() -> None:
    graph = two_readers(dtype="bf16")
    held = graph.values["a.bias"]
    assert held.constant is not None
    held.constant = Constant(held.constant.wide(), "bf16", held.constant.shape)
    held.type = held.constant.type
    stats = collect(two_readers(), batches())
    after, report = Pipeline("extract-outliers").run(graph, stats=stats)
    assert len(report["extract-outliers"].applied) == 2
    kept, before = after.values["a.weight.loud"].constant, graph.values["a.weight"].constant
    assert kept is not None
    assert before is not None
    assert kept.dtype == "bf16"
    np.testing.assert_array_equal(kept.array(), before.array()[:, list(LOUD)])


def test_with_split_weights() -> None:
    """The quiet weights are split into clusters, the loud columns stay in float."""
    graph = two_readers()
    stats = collect(graph, batches())
    text = "extract-outliers,split-layers,quantize{weights=uint2:channel:split3 activations=int8:token}"
    after, report = Pipeline(text).run(graph, stats=stats)
    check_text(after)
    assert report["split-layers"].applied == ["linear %a", "linear %b"]
    assert len(report["quantize"].applied) == 2
    loud = after.values["a.loud"].producer
    assert loud is not None
    assert [v.dtype for v in loud.operands if v is not None] == ["f32", "f32"]
    assert loud.operands[1] is after.values["a.weight.loud"]


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_linear_that_reads_another(mode: str) -> None:
    """The second one reads the sum that the first has become."""
    b = Build()
    x = b.input("x", "f32[n, 3, 12]")
    h = b("linear", x, b.random(8, 12), b.random(8))
    graph = b.output(b("linear", h, b.random(8, 8)))
    options = {"static": "count=2", "dynamic": "mode=dynamic threshold=1.5"}[mode]
    after, report = Pipeline(f"extract-outliers{{{options}}}").run(graph, stats=collect(graph, batches()))
    check_text(after)
    assert len(report["extract-outliers"].applied) == 2
    expected = evaluate(graph, batches(5)[0], torch.float64)
    for name, value in evaluate(after, batches(5)[0], torch.float64).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_statistics_of_another_axis_choose_no_columns() -> None:
    """A convolution reads the value too: what is known of it is by its channels, not by the linear's columns."""
    b = Build()
    h = b("relu", b.input("x", "f32[2, 4, 4, 4]"))
    graph = b.output(b("conv", h, b.random(4, 4, 1, 1)), b("linear", h, b.random(6, 4)))
    data = [{"x": torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))}]
    stats = collect(graph, data)
    assert stats.of("relu").axis == -3
    _, report = Pipeline("extract-outliers{count=1}").run(graph, stats=stats)
    assert report["extract-outliers"].reasons() == {"no statistics of what it reads": 1}


def test_refusals() -> None:
    graph = two_readers()
    stats = collect(graph, batches())
    for text, reason in (
        ("extract-outliers{threshold=100}", "none of its columns is an outlier"),
        ("extract-outliers{count=12}", "all of its columns are outliers"),
    ):
        _, report = Pipeline(text).run(graph, stats=stats)
        assert report["extract-outliers"].declined == {reason: ["linear %a", "linear %b"]}
    graph = two_readers()
    graph.add_output("w", graph.append(get("neg"), [graph.values["b.weight"]], {}, names=["w"]).result)
    _, report = Pipeline("extract-outliers").run(graph, stats=stats)
    assert len(report["extract-outliers"].applied) == 1
    reason = "its weight has other readers: a copy without the columns would be one more"
    assert report["extract-outliers"].declined == {reason: ["linear %b"]}
    _, report = Pipeline("extract-outliers{mode=dynamic}").run(graph)  # copies nothing
    assert len(report["extract-outliers"].applied) == 2
    _, report = Pipeline("extract-outliers").run(graph, stats=Stats())
    assert set(report["extract-outliers"].declined) == {"no statistics of what it reads"}
    with pytest.raises(PlanishError, match="'count' and 'fraction' exclude each other; got both"):
        ExtractOutliers(count=1, fraction=0.1)
    with pytest.raises(PlanishError, match="option 'count' is for mode=static; got mode=dynamic"):
        ExtractOutliers(mode="dynamic", count=1)
    with pytest.raises(PlanishError, match="option 'rows' is for mode=static; got mode=dynamic"):
        ExtractOutliers(mode="dynamic", rows=0.1)
    with pytest.raises(PlanishError, match="needs calibration statistics"):
        Pipeline("extract-outliers").run(graph)


def test_a_lost_column_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded: the mask drops a column that the branch does not have."""
    graph = two_readers()
    ones = np.ones

    def holed(width: int) -> np.ndarray:
        mask = ones(width)
        mask[0] = 0.0
        return mask

    monkeypatch.setattr(extract_outliers.np, "ones", holed)
    with pytest.raises(ValidationError, match="changed the function"):
        Pipeline("extract-outliers").run(graph, stats=collect(graph, batches()))


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_golden(mode: str, update_golden: bool) -> None:
    graph = two_readers()
    after, _ = Pipeline(f"extract-outliers{{mode={mode}}}").run(graph, stats=collect(graph, batches()))
    golden(f"extract-outliers-{mode}", graph, after, update_golden)
