"""The quantize pass on every number format: weights, activations, tables, split weights, choices of sites."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from encoder_blocks import WIDTH, data, linear, pre_norm, record, statistics
from helpers import check_text, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import Build

from planish.calibrate.collect import collect
from planish.ir.errors import PlanishError
from planish.ir.evaluator import evaluate
from planish.ir.formats import Format
from planish.ir.graph import Graph, Node
from planish.ir.qnodes import qtensor_of, weight_of
from planish.ir.rounding import fake_quantize, quantize_array
from planish.ir.stats import Stats
from planish.ir.verifier import verify
from planish.passes.base import PassReport, keep_float
from planish.passes.gptq import damped
from planish.passes.manager import Pipeline
from planish.passes.quantize import Quantize
from planish.passes.quantize_weights import round_rows, weight_sqnr
from planish.passes.solvers import sqnr

WEIGHTS = [
    "int2:g16", "int3:tensor", "int4:channel", "int4:g16:half", "int4:g24:extreme", "int4:g16:f16", "int8:channel",
    "uint2:g16", "uint3:channel", "uint4:g16", "uint4:tensor", "uint8:channel:bf16", "e4m3:channel", "e5m2:g16",
    "e2m1:g16", "e3m2:tensor", "e2m3:g8", "mxfp4:even", "mxfp6", "mxfp6-e2m3:rceil", "mxfp8:ceil", "mxint8", "nvfp4",
]  # fmt: skip
ACTIVATIONS = [
    "int8:token", "int8:tensor", "uint8:tensor", "uint8:token", "int8:g16", "int4:token", "int4:g16", "uint4:g16",
    "e4m3:token", "e4m3:tensor", "e5m2:g24", "mxfp4:even", "mxfp8", "mxint8", "nvfp4",
]  # fmt: skip
COLUMNS = 48


def run(graph: Graph, options: str, stats: Stats | None = None, **more: Any) -> tuple[Graph, PassReport]:
    after, report = Pipeline(f"quantize{{{options}}}").run(graph, stats=stats, **more)
    verify(after)
    check_text(after)
    return after, report.passes[-1]


def nodes(graph: Graph, op: str) -> list[Node]:
    return [n for n in graph.nodes if n.op.name == op]


def one(weight: np.ndarray, op: str = "linear", **attributes: Any) -> Graph:
    """A linear (or gemm) of that weight [outputs, inputs]; with `turned` it is stored the other way round."""
    b = Build()
    turned = attributes.get("transposed", op == "gemm" and not attributes.get("trans_b", False))
    x = b.input("x", f"f32[n, {weight.shape[1]}]")
    return b.output(b(op, x, b.constant(weight.T if turned else weight, name="w"), **attributes))


def matrix(seed: int = 0, rows: int = 5, columns: int = COLUMNS) -> np.ndarray:
    w: np.ndarray = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    return w


# -- weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["max", "mse"])
@pytest.mark.parametrize("text", WEIGHTS)
def test_weights(text: str, clip: Any) -> None:
    """What the linear multiplies is the rounded weight, and the report says how far off it is."""
    w = matrix()
    after, report = run(one(w), f"weights={text} clip={clip}")
    expected = quantize_array(w.astype(np.float64), Format.parse(text), clip)
    q = weight_of(nodes(after, "linear")[0])
    assert q is not None
    assert q.element == Format.parse(text).element and q.block == Format.parse(text).block
    assert np.array_equal(q.dequantize(), expected.dequantize())
    rows = np.eye(COLUMNS, dtype=np.float32)
    got = evaluate(after, {"x": rows}, torch.float64)["linear"].numpy()
    assert np.allclose(got.T, expected.dequantize(), rtol=1e-6, atol=1e-9)
    figure = report.figures["weights"]["w"]
    noise = ((w - expected.dequantize()) ** 2).sum() / (w.astype(np.float64) ** 2).sum()
    assert figure["sqnr_db"] == pytest.approx(-10 * np.log10(noise), abs=1e-3)
    assert figure["bits"] == pytest.approx(expected.bits, abs=1e-4)


@pytest.mark.parametrize("text", ["int4:g16", "uint4:channel", "nvfp4", "int8:tensor"])
@pytest.mark.parametrize(
    ("op", "attributes"), [("linear", {"transposed": True}), ("gemm", {}), ("gemm", {"trans_b": True})]
)
def test_weights_that_are_stored_the_other_way_round(text: str, op: str, attributes: dict[str, Any]) -> None:
    w = matrix()
    after, _ = run(one(w, op, **attributes), f"weights={text}")
    q = weight_of(nodes(after, op)[0])
    assert q is not None
    assert np.array_equal(q.dequantize(), quantize_array(w.astype(np.float64), Format.parse(text)).dequantize())
    got = evaluate(after, {"x": np.eye(COLUMNS, dtype=np.float32)}, torch.float64)[op].numpy()
    assert np.allclose(got.T, q.dequantize(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("text", ["int4:channel", "uint4:tensor", "int4:g4", "uint8:g4", "mxfp4"])
def test_kernels(text: str, groups: int) -> None:
    """A group is a run of input channels of one tap."""
    b = Build()
    channels = 64 if text == "mxfp4" else 8
    x = b.input("x", f"f32[2, {channels}, 6, 6]")
    graph = b.output(b("conv", x, b.random(4, channels // groups, 3, 3, name="k"), groups=groups))
    kernel = graph.values["k"].constant.wide()  # type: ignore[union-attr]
    after, _ = run(graph, f"weights={text}")
    q = qtensor_of(nodes(after, "conv")[0].operands[1])
    assert q is not None and q.shape == kernel.shape
    form = Format.parse(text)
    if form.block is None:
        expected = quantize_array(kernel.reshape(4, -1), form).dequantize().reshape(kernel.shape)
    else:
        assert (q.axis, q.scale.shape) == (1, (4, channels // groups // form.block, 3, 3))
        taps = [quantize_array(kernel[:, :, i, j], form).dequantize() for i in range(3) for j in range(3)]
        expected = np.stack(taps, -1).reshape(kernel.shape)
    assert np.array_equal(q.dequantize(), expected)


def test_a_kernel_with_less_channels_than_a_group() -> None:
    b = Build()
    graph = b.output(b("conv", b.input("x", "f32[2, 3, 6, 6]"), b.random(4, 3, 3, 3)))
    after, report = run(graph, "weights=int4:g16")
    assert after == graph
    assert dict(report.declined) == {"its kernel has 3 input channels, less than a group of int4:g16": ["conv %conv"]}


def test_tied_weights_are_quantised_once() -> None:
    b = Build()
    w = b.random(16, 16, name="w")
    graph = b.output(b("linear", b("linear", b.input("x", "f32[n, 16]"), w), w))
    after, report = run(graph, "weights=int4:g8")
    assert len(nodes(after, "dequantize")) == 1
    assert len(report.applied) == 2


@pytest.mark.parametrize("text", ["int4:g16", "uint4:channel", "int8:tensor", "nvfp4", "mxfp4", "uint2:g16:split3"])
def test_many_rows_are_rounded_in_parts(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, form = matrix(1, rows=11).astype(np.float64), Format.parse(text)
    ids = (w > 0).astype(np.uint8) + (w > 1) if form.clusters > 1 else None
    monkeypatch.setattr("planish.passes.quantize_weights.CHUNK", 4)
    q, whole = round_rows(w, form, "max", ids), quantize_array(w, form, clusters=ids)
    assert np.array_equal(q.dequantize(), whole.dequantize())
    assert (q.bits, q.scale.shape) == (whole.bits, whole.scale.shape)
    assert weight_sqnr(w, q) == pytest.approx(sqnr(w, whole.dequantize()), rel=1e-9)


# -- split weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
@pytest.mark.parametrize("text", ["uint2:g24", "uint4:channel", "int2:g12", "uint2:tensor:split3"])
def test_split_weights(text: str, solver: str) -> None:
    """Every cluster has a range of its own, and both forms of the split give the same numbers."""
    w = matrix(3, rows=12).astype(np.float64) ** 3
    rows = np.random.default_rng(0).normal(size=(100, COLUMNS)).astype(np.float32)
    graph = one(w.astype(np.float32))
    outputs, errors = {}, {}
    for form in ("packed", "layers", "none"):
        if form == "none" and "split" in text:
            continue
        split = graph if form == "none" else Pipeline(f"split-layers{{form={form}}}").run(graph)[0]
        stats = Stats({"x": record(rows)})
        after, report = run(split, f"weights={text} solver={solver}", stats)
        assert not report.declined
        outputs[form] = evaluate(after, {"x": rows}, torch.float64)
        (outputs[form],) = outputs[form].values()
        exact = torch.from_numpy(rows.astype(np.float64) @ w.T)
        errors[form] = float((outputs[form] - exact).norm() / exact.norm())
    if solver == "rtn":
        assert relative_error(outputs["packed"], outputs["layers"]) < 1e-12
    if "none" in errors:
        assert errors["packed"] < errors["none"] * 0.7
    codes = {n.operands[0].name for n in after.nodes if n.op.name == "dequantize_split"}
    assert len(codes) <= 1


def test_formats_that_cannot_hold_a_split() -> None:
    split, _ = Pipeline("split-layers").run(one(matrix()))
    for text, what in {"mxfp4": "mxfp4", "e4m3:channel": "e4m3:channel", "int4:g8:split2": "int4:g8:split2"}.items():
        after, report = run(split, f"weights={text}")
        assert after == split
        assert list(report.declined) == [f"its weight is split into 3 clusters, which {what} cannot hold"]
    _, report = run(one(matrix()), "weights=uint2:g8:split3")
    assert list(report.declined) == ["its weight is not split: run split-layers before"]
    assert not report.applied


# -- activations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ACTIVATIONS)
def test_activations_at_run_time(text: str) -> None:
    rows = matrix(5, rows=7) * np.random.default_rng(1).lognormal(0, 1, (7, 1)).astype(np.float32)
    after, report = run(one(np.eye(COLUMNS, dtype=np.float32)), f"weights=none activations={text}")
    assert len(report.applied) == 1
    got = evaluate(after, {"x": rows}, torch.float64)["linear"]
    form = Format.parse(text)
    if form.scale == "f8e4m3fn":  # the scale of the tensor is 1
        from planish.ir.rounding import blocks_of, grid_of, unblocked

        blocks = blocks_of(torch.from_numpy(rows.astype(np.float64)), form)
        grid = grid_of(blocks, form, global_scale=1.0)
        expected = unblocked(grid.values(grid.codes(blocks)), rows.shape)
    else:
        expected = fake_quantize(torch.from_numpy(rows.astype(np.float64)), form)
    assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("text", ["uint8:tensor:static", "int8:tensor:static", "int4:tensor:static",
                                  "e4m3:tensor:static", "uint4:tensor:static:bf16"])  # fmt: skip
@pytest.mark.parametrize("rule", ["min-max", "mse"])
def test_activations_with_a_calibrated_range(text: str, rule: str) -> None:
    rows = matrix(5, rows=40)
    options = f"weights=none activations={text} static-range={rule}"
    after, report = run(one(np.eye(COLUMNS, dtype=np.float32)), options, Stats({"x": record(rows)}))
    got = evaluate(after, {"x": rows}, torch.float64)["linear"].numpy()
    noise = ((got - rows) ** 2).sum()
    assert report.figures["activations"]["x"]["sqnr_db"] == pytest.approx(
        10 * np.log10((rows.astype(np.float64) ** 2).sum() / noise), abs=1e-3
    )
    if rule == "min-max":
        wide, (low, high) = torch.from_numpy(rows.astype(np.float64)), (rows.min(), rows.max())
        expected = fake_quantize(wide, Format.parse(text), float(low), float(high))
        assert relative_error(torch.from_numpy(got), expected) < 1e-6


def test_the_scale_of_the_tensor_beside_those_of_its_blocks() -> None:
    """nvfp4:static: amax of the calibration data / (448 * 6), as deployed."""
    rows = matrix(5, rows=40) * 1e-3
    graph = one(np.eye(COLUMNS, dtype=np.float32))
    stats = Stats({"x": record(rows)})
    after, report = run(graph, "weights=none activations=nvfp4:static", stats)
    held = after.values["x.global_scale"].constant
    assert held is not None
    assert float(held.wide()) == pytest.approx(np.abs(rows).max() / 2688, rel=1e-6)
    _, plain = run(graph, "weights=none activations=nvfp4", stats)
    gain = [r.figures["activations"]["x"]["sqnr_db"] for r in (report, plain)]
    assert gain[0] > gain[1] + 3  # small numbers: their scales fall among the subnormal ones of e4m3


@pytest.mark.parametrize(("activation", "element"), [("relu", "u4"), ("gelu", "i4"), (None, "i4")])
def test_what_cannot_be_negative_has_unsigned_codes(activation: str | None, element: str) -> None:
    b = Build()
    x = b.input("x", "f32[n, 16]")
    graph = b.output(linear(b, b(activation, x) if activation else x, 4, "a"))
    after, _ = run(graph, "weights=int4:g8 activations=int4:g8")
    (made,) = nodes(after, "dynamic_quantize")
    assert made.attributes["dtype"] == element
    shifted = Build()
    h = shifted("add", shifted("gelu", shifted.input("x", "f32[n, 16]")), np.float32(0.18))
    after, _ = run(shifted.output(linear(shifted, h, 4, "a")), "weights=int4:g8 activations=int4:g8")
    assert nodes(after, "dynamic_quantize")[0].attributes["dtype"] == "u4"


# -- tables ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["int8:channel", "int4:channel", "uint4:g8", "int4:g16", "int8:tensor", "mxfp4", "nvfp4"]
)
@pytest.mark.parametrize("rank", [1, 2])
def test_tables(text: str, rank: int) -> None:
    """Rows of codes and of scales are looked up; nothing makes a float of the whole table."""
    b = Build()
    table = b.random(300, 64, name="table")
    graph = b.output(b("embedding", table, b.input("ids", "i64[b]" if rank == 1 else "i64[b, t]")))
    after, report = run(graph, f"embeddings={text}")
    exact = graph.values["table"].constant.wide()  # type: ignore[union-attr]
    expected = quantize_array(exact, Format.parse(text))
    ids = np.random.default_rng(0).integers(0, 300, (7,) if rank == 1 else (2, 7))
    (got,) = evaluate(after, {"ids": torch.from_numpy(ids)}, torch.float64).values()
    assert np.allclose(got.numpy(), expected.dequantize()[ids], rtol=1e-6, atol=1e-9)
    assert all(v.shape[0] != 300 for n in after.nodes for v in n.results if v.shape and n.op.name != "embedding")
    assert report.figures["weights"]["table"]["bits"] == pytest.approx(expected.bits, abs=1e-4)


# -- which sites -------------------------------------------------------------------------------------


def done(graph: Graph, options: str) -> set[str]:
    after, _ = run(graph, options)
    return {n.operands[1].producer.operands[0].name[:-13] for n in nodes(after, "linear") if weight_of(n) is not None}  # type: ignore[union-attr]


def test_sites_by_what_they_read() -> None:
    graph = pre_norm()
    assert done(graph, "sites=[hidden]") == {"first", "down"}  # channels of the input are hidden channels too
    assert done(graph, "sites=[value]") == {"o"}
    assert done(graph, "sites=[residual]") == {"q", "k", "v", "up", "last"}
    assert done(graph, "sites=[value hidden]") == {"first", "o", "down"}
    assert done(graph, "") == {"first", "q", "k", "v", "o", "up", "down", "last"}
    _, report = run(graph, "sites=[hidden]")
    assert {k: len(v) for k, v in report.declined.items()} == {
        "reads residual channels": 5,
        "reads value channels": 1,
    }


def test_sites_by_name() -> None:
    graph = pre_norm()
    for node in nodes(graph, "linear"):
        node.source = f"/block/{node.operands[1].name.split('.')[0]}/MatMul"  # type: ignore[union-attr]
    assert done(graph, "only=[/(q|k)/]") == {"q", "k"}
    assert done(graph, "only=[/(q|k)/] skip=[/k/]") == {"q"}
    _, report = run(graph, "only=[/q/]")
    assert {k: len(v) for k, v in report.declined.items()} == {"not among those named": 7}


def test_linears_that_are_kept_in_float() -> None:
    graph = pre_norm()
    keep_float(graph, nodes(graph, "linear")[2].result)
    after, report = run(graph, "activations=int8:token")
    assert dict(report.declined) == {"an earlier pass keeps it in float": ["linear %linear_2"]}
    kept = nodes(after, "linear")[2]
    assert kept.operands[0].producer.op.name == "layer_norm"  # type: ignore[union-attr]
    assert kept.operands[1].is_constant  # type: ignore[union-attr]


# -- gptq in the pass --------------------------------------------------------------------------------


def output_error(graph: Graph, after: Graph, batches: list[dict[str, np.ndarray]]) -> float:
    total = 0.0
    for batch in batches:
        exact, got = evaluate(graph, batch, torch.float64), evaluate(after, batch, torch.float64)
        total += sum(float((got[n] - exact[n]).square().sum()) for n in exact)
    return total


@pytest.mark.parametrize("inputs", ["float", "quantised"])
@pytest.mark.parametrize("text", ["int4:channel", "uint3:g4", "mxfp4"])
def test_gptq_in_the_pass(text: str, inputs: str) -> None:
    graph, batches = pre_norm(), data(samples=20)
    stats = statistics(graph)
    options = f"weights={text} solver=gptq inputs={inputs}"
    after, report = run(graph, options, stats, data=batches)
    plain, _ = run(graph, f"weights={text}", stats)
    assert output_error(graph, after, batches) < output_error(graph, plain, batches)
    for figure in report.figures["weights"].values():
        assert figure["output_sqnr_db"] >= figure["output_sqnr_db_rounded"] - 0.5
        assert figure["damping"] == 0.01
    (note,) = report.notes
    assert note.startswith("20 calibration batches, at most ") and note.endswith(" MiB held at once")


def test_the_inputs_are_those_of_the_quantised_graph() -> None:
    """H of each linear, recomputed from the finished graph: what it reads there is what it was solved for."""
    graph, batches = pre_norm(), data(samples=8)
    stats = statistics(graph)
    after, report = run(graph, "weights=int3:channel activations=int8:token solver=gptq inputs=quantised", stats,
                        data=batches)  # fmt: skip
    for node in nodes(after, "linear"):
        name = node.operands[1].name.removesuffix(".dequantized")  # type: ignore[union-attr]
        x = node.operands[0]
        assert x is not None
        rows = np.concatenate(
            [evaluate(after, b, keep=[x.name])[x.name].reshape(-1, x.shape[-1]).numpy() for b in batches]  # type: ignore[index,arg-type]
        )
        h = damped(2 / len(rows) * rows.astype(np.float64).T @ rows.astype(np.float64), 0.01)
        q, exact = weight_of(node), graph.values[name].constant
        assert q is not None and exact is not None
        d = torch.from_numpy(exact.wide() - q.dequantize())
        assert report.figures["weights"][name]["loss"] == pytest.approx(float(((d @ h) * d).sum()) / 2, rel=1e-3)


def test_the_sweep_goes_through_quantised_tables_and_kernels() -> None:
    b = Build()
    table, kernel = b.random(300, 16, name="table"), b.random(16, 16, 1, name="k")
    h = b("transpose", b("embedding", table, b.input("ids", "i64[b, t]")), perm=(0, 2, 1))
    h = b("transpose", b("relu", b("conv", h, kernel)), perm=(0, 2, 1))
    graph = b.output(linear(b, linear(b, h, 16, "a"), 4, "c"))
    ids = np.random.default_rng(0).integers(0, 300, (4, 8, 6))
    batches = [{"ids": i} for i in ids]
    stats = collect(graph, batches)
    options = "weights=int4:channel embeddings=int4:g8 solver=gptq inputs=quantised"
    after, report = run(graph, options, stats, data=batches)
    assert len(report.applied) == 4
    plain, _ = run(graph, "weights=int4:channel embeddings=int4:g8")
    rounded, _ = run(graph, "weights=int4:channel embeddings=int4:g8 only=[embedding conv]")
    assert output_error(rounded, after, batches) < output_error(rounded, plain, batches)


@pytest.mark.parametrize("activations", ["int8:token", "uint8:tensor", "int4:g4"])
def test_a_value_that_is_read_again_behind_other_linears(activations: str) -> None:
    """The last linear reads x as it was rounded for the first; another was quantised in between."""
    b = Build()
    x = b.input("x", "f32[n, 16]")
    h = b("relu", b("linear", x, b.random(16, 16)))
    graph = b.output(b("add", b("linear", h, b.random(4, 16)), b("linear", x, b.random(4, 16))))
    batches = [{"x": np.random.default_rng(seed).normal(size=(20, 16)).astype(np.float32)} for seed in range(2)]
    options = f"weights=int4:g8 activations={activations} solver=gptq inputs=quantised"
    after, report = run(graph, options, collect(graph, batches), data=batches)
    assert len(report.applied) == 3 and not report.declined
    assert all("loss" in figure for figure in report.figures["weights"].values())
    expected, got = (evaluate(g, batches[0])["add"] for g in (graph, after))
    assert relative_error(got, expected) < 0.2


def test_weights_first_and_activations_later() -> None:
    """What one run leaves in float another may round; what is rounded is not rounded again."""
    graph = one(matrix())
    weights, _ = run(graph, "weights=int4:g16")
    both, _ = run(graph, "weights=int4:g16 activations=int8:token")
    later, report = run(weights, "weights=none activations=int8:token")
    assert len(report.applied) == 1
    x = {"x": np.random.default_rng(1).normal(size=(3, COLUMNS)).astype(np.float32)}
    assert torch.equal(evaluate(both, x)["linear"], evaluate(later, x)["linear"])
    for options in ("weights=none activations=int4:token", "weights=none activations=uint8:tensor"):
        again, report = run(later, options)
        assert again == later
        assert dict(report.declined) == {"what it reads is rounded already": ["linear %linear"]}
    first, _ = run(graph, "weights=none activations=int8:token")
    assert torch.equal(evaluate(run(first, "weights=int4:g16")[0], x)["linear"], evaluate(both, x)["linear"])


@pytest.mark.parametrize("clip", ["max", "mse"])
@pytest.mark.parametrize(("text", "size"), [
    ("uint4:g16:f16", 1e6), ("e2m1:g16:f16", 1e30), ("int4:channel:f16", 1e-30), ("int8:channel", 1e-40),
    ("mxfp4", 1e-42), ("int3:tensor:bf16", 1e-42),
])  # fmt: skip
def test_weights_that_no_scale_reaches(text: str, size: float, clip: str) -> None:
    """All of it would be clipped, or become 0: it stays float, and so does a table."""
    w = (matrix().astype(np.float64) * size).astype(np.float32)
    graph = one(w)
    after, report = run(graph, f"weights={text} clip={clip}")
    assert after == graph
    ((reason, where),) = report.declined.items()
    most, scale = abs(w).max().astype(np.float64), Format.parse(text).scale
    assert reason == f"its weight reaches {most:.3g}, which scales of {scale} in {text} cannot hold"
    assert where == ["linear %linear"]
    b = Build()
    rows = b.output(b("embedding", b.constant(w, name="table"), b.input("ids", "i64[n]")))
    after, report = run(rows, f"embeddings={text} clip={clip} min-rows=0")
    assert after == rows
    assert list(report.declined) == [reason]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(WEIGHTS), st.sampled_from(["max", "mse"]), st.integers(0, 999),
    st.sampled_from([-20, -5, 0, 5, 15]), st.booleans(),
)  # fmt: skip
def test_weights_of_any_common_size_are_reached(text: str, clip: str, seed: int, power: int, heavy: bool) -> None:
    """The check is for what is lost, not for what is rounded coarsely."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_t(1.3, size=(4, COLUMNS)) if heavy else rng.normal(size=(4, COLUMNS))) * 2.0**-8
    if "f16" not in text.split(":"):
        w = w * 10.0**power
    _, report = run(one(w.astype(np.float32)), f"weights={text} clip={clip}")
    assert not report.declined


@pytest.mark.parametrize("text", ["uint2:channel", "uint4:channel", "uint4:channel:f16"])
def test_a_tied_table_with_zero_points_of_few_bits(text: str) -> None:
    b = Build()
    table = b.random(40, 16, name="table")
    graph = b.output(b("linear", b("embedding", table, b.input("ids", "i64[n]")), table))
    after, report = run(graph, f"weights={text} embeddings={text} min-rows=0")
    assert len(report.applied) == 2
    q = quantize_array(table.constant.wide(), Format.parse(text)).dequantize()  # type: ignore[union-attr]
    got = evaluate(after, {"ids": np.arange(40)}, torch.float64)["linear"].numpy()
    assert np.allclose(got, q @ q.T)


def test_nothing_to_do_is_said() -> None:
    b = Build()
    _, report = run(b.output(b("relu", b.input("x", "f32[n]"))), "")
    assert report.misses == ["no linear, convolution or embedding with a constant float weight"]


def test_padded_tokens_do_not_count() -> None:
    b = Build()
    x, mask = b.input("x", f"f32[batch, tokens, {WIDTH}]"), b.input("mask", "i64[batch, tokens]")
    graph = b.output(linear(b, x, 4, "a"), b("identity", mask))
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4, 6, WIDTH)).astype(np.float32)
    kept = np.ones((4, 6), np.int64)
    padded = np.concatenate([rows, 100 * np.ones((4, 3, WIDTH), np.float32)], 1)
    codes = []
    for batch in ({"x": rows, "mask": kept}, {"x": padded, "mask": np.pad(kept, ((0, 0), (0, 3)))}):
        stats = collect(graph, [batch], row_mask="mask")
        after, _ = run(graph, "weights=int3:channel solver=gptq inputs=quantised", stats, data=[batch], row_mask="mask")
        codes.append(weight_of(nodes(after, "linear")[0]).codes)  # type: ignore[union-attr]
    assert np.array_equal(*codes)


def test_quantised_inputs_need_the_data() -> None:
    graph = pre_norm()
    with pytest.raises(PlanishError) as caught:
        run(graph, "solver=gptq inputs=quantised", statistics(graph))
    what = "pass 'quantize': inputs=quantised evaluates the quantised graph: statistics are not enough"
    assert caught.value.what == what
    assert caught.value.hint == "give the calibration data itself, or inputs=float"
    assert Quantize(solver="gptq").reads_data and not Quantize().reads_data


# -- the grammar -------------------------------------------------------------------------------------

REFUSED = {
    "weights=int5": "option 'weights': format 'int5': 'int5' is unknown; expected one of int2, ",
    "weights=int4:token": "option 'weights': int4:token: a weight has no tokens; expected tensor, channel or gN",
    "weights=uint8:tensor:static": "option 'weights': uint8:tensor:static: static is for activations",
    "embeddings=uint4:g8:split3": "option 'embeddings': uint4:g8:split3: a table is not split into clusters",
    "activations=int8:channel": (
        "option 'activations': int8:channel: an activation has no output channels; expected tensor, token or gN"
    ),
    "activations=uint2:g8:split3": "option 'activations': uint2:g8:split3: an activation is not split into clusters",
    "activations=int8:token:static": (
        "option 'activations': int8:token:static: only one range per tensor can be calibrated; expected tensor"
    ),
    "activations=dynamic": "option 'activations': format 'dynamic': 'dynamic' is unknown; expected one of int2, ",
    "damping=0": "option 'damping': expected a number above 0; got 0.0",
    "sites=[head]": "option 'sites': expected one of residual, hidden, key, value; got 'head'",
    "only=[(]": "option 'only': '(' is no regular expression: ",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_the_grammar_refuses(options: str) -> None:
    with pytest.raises(PlanishError) as caught:
        Pipeline(f"quantize{{{options}}}")
    assert caught.value.what.startswith(f"pass 'quantize': {REFUSED[options]}")


@pytest.mark.parametrize("text", [*WEIGHTS, *ACTIVATIONS])
def test_pipelines_print_their_formats(text: str) -> None:
    option = "weights" if text in WEIGHTS and ":token" not in text else "activations"
    if option == "weights" and text == "int8:channel":
        pytest.fail("the default is not printed") if str(
            Pipeline("quantize{weights=int8:channel}")
        ) != "quantize" else None
        return
    pipeline = f"quantize{{{option}={text}}}"
    assert str(Pipeline(pipeline)) == pipeline
    assert str(Format.parse(text, "token" if option == "activations" else "channel")) == text


@pytest.mark.parametrize("text", ["int4:g8", "e4m3:channel", "nvfp4"])
def test_bias_correction_on_any_format(text: str) -> None:
    w, rows = matrix(2, rows=6, columns=32), matrix(4, rows=60, columns=32) + 1.0
    graph, stats = one(w), Stats({"x": record(rows)})
    exact = evaluate(graph, {"x": rows}, torch.float64)["linear"]
    means = []
    for correct in ("false", "true"):
        after, _ = run(graph, f"weights={text} activations=int4:g8 bias-correction={correct}", stats)
        got = evaluate(after, {"x": rows}, torch.float64)["linear"]
        means.append(float((got - exact).mean(0).abs().max()))
    assert means[1] < means[0] / 100
