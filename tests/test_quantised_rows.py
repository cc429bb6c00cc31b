"""The rows of quantisation: by the evaluator, in ONNX Runtime with its optimisers off and on, and in torch."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnxruntime import quantization
from quantised_rows import Made, onnxruntime_results

import planish
from planish.codegen.onnx import to_model
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.evaluator import evaluate
from planish.ir.formats import Format
from planish.ir.graph import Graph
from planish.ir.ops import get
from planish.ir.qnodes import insert_dequantize
from planish.ir.qtensor import QTensor
from planish.ir.rewriter import Rewriter
from planish.ir.rounding import fake_quantize, quantize_array
from planish.ir.types import TensorType, numpy_dtype

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from ort_run import run

INTEGERS = ("i2", "u2", "i3", "u3", "i4", "u4", "i8", "u8")
NARROW = ("f8e4m3fn", "f8e5m2", "f6e3m2", "f6e2m3", "f4e2m1")


def codes(dtype: str, *shape: int) -> np.ndarray:
    """Every code in turn, in the numpy dtype that a constant of this dtype holds."""
    drawn = np.random.default_rng(7).permutation(np.arange(int(np.prod(shape))))
    width = {"i": 1, "u": 1, "f": 1}[dtype[0]] and int(dtype[1])
    raw = (drawn % 2**width).astype(np.uint8).reshape(shape)
    if dtype[0] == "f":
        made = raw.view(numpy_dtype(dtype))
        finite = np.isfinite(made.astype(np.float32))
        return np.where(finite, raw, 1).astype(np.uint8).view(numpy_dtype(dtype))
    signed = raw.astype(np.int16) - (2 ** (width - 1) if dtype[0] == "i" else 0)
    return signed.astype(numpy_dtype(dtype))


def agree(graph: Graph, feeds: dict[str, np.ndarray], opset: int | None = None) -> list[np.ndarray]:
    """The evaluator's results; ONNX Runtime and torch give the same to the bit."""
    _, found = onnxruntime_results(graph, feeds, opset)
    expected = [v.numpy() for v in evaluate(graph, feeds).values()]
    for results in found:
        for got, want in zip(results, expected, strict=True):
            np.testing.assert_array_equal(got, want)
    module = planish.to_torch(graph)
    made = module(*(torch.from_numpy(f) for f in feeds.values()))
    for got, want in zip([made] if isinstance(made, torch.Tensor) else made.values(), expected, strict=True):
        np.testing.assert_array_equal(got.numpy(), want)
    return expected


@pytest.mark.parametrize("opset", [None, 13, 25])
@pytest.mark.parametrize("dtype", [*INTEGERS, *NARROW])
@pytest.mark.parametrize(("shape", "block"), [((3, 8), 4), ((2, 5, 7), 3), ((4, 6), None)])
def test_dequantize(dtype: str, shape: tuple[int, ...], block: int | None, opset: int | None) -> None:
    made, generator = Made(), np.random.default_rng(0)
    held = codes(dtype, *shape)
    size = (*shape[:-1], -(-shape[-1] // block)) if block else shape[-1:]
    scale = np.exp2(generator.integers(-3, 4, size)).astype(np.float32) * np.float32(0.7)
    operands = [made.constant(held, dtype), made.constant(scale)]
    zero = np.zeros(size)
    if dtype[0] == "u":
        zero = (np.arange(int(np.prod(size))) % (2 ** int(dtype[1]))).reshape(size)
        operands.append(made.constant(zero.astype(numpy_dtype(dtype)), dtype))
    y = made("dequantize", *operands, axis=len(shape) - 1, **({} if block is None else {"block": block}))
    (got,) = agree(made.done(y), {}, opset)
    where = np.arange(shape[-1]) // (block or 1)
    wide = (held.astype(np.float32) - zero[..., where].astype(np.float32)) * scale[..., where]
    np.testing.assert_array_equal(got, wide)


@pytest.mark.parametrize("opset", [None, 24])
@pytest.mark.parametrize("text", ["mxfp4", "mxfp6", "mxfp6-e2m3", "mxfp8", "mxfp8-e5m2", "mxint8", "nvfp4"])
def test_scales_of_narrow_dtypes(text: str, opset: int | None) -> None:
    weight = np.random.default_rng(1).normal(size=(3, 64))
    q = quantize_array(weight, Format.parse(text))
    (got,) = agree(stored(q), {}, opset)
    np.testing.assert_allclose(got, q.dequantize(), rtol=2.5e-7 if text == "nvfp4" else 0)  # a product of two scales


def stored(q: QTensor) -> Graph:
    """A graph whose output is a quantised tensor."""
    made = Made()
    x = made.constant(np.zeros((), np.float32))
    end = made("identity", x)
    made.graph.add_output("y0", end)
    with Rewriter(made.graph) as rewriter:
        value = insert_dequantize(rewriter, q, "w", before=end.producer)
        rewriter.replace_node(end.producer, value)
    return made.graph


@pytest.mark.parametrize("opset", [None, 13, 25])
@pytest.mark.parametrize("text", ["uint2:g8:split3", "int4:g8:split2", "uint3:channel:split4", "uint8:tensor:split3"])
@pytest.mark.parametrize("index", [None, 1])
def test_clusters(text: str, opset: int | None, index: int | None) -> None:
    form = Format.parse(text)
    generator = np.random.default_rng(2)
    weight, ids = generator.normal(size=(4, 20)), generator.integers(0, form.clusters, (4, 20)).astype(np.uint8)
    q = quantize_array(weight, form, clusters=ids)
    graph = stored(q)
    (node,) = [n for n in graph.nodes if n.op.name == "dequantize_split"]
    if index is not None:
        node.attributes["index"] = index
    (got,) = agree(graph, {}, opset)
    expected = q.dequantize() if index is None else np.where(ids == index, q.dequantize(), 0.0)
    np.testing.assert_allclose(got, expected, rtol=2e-7, atol=1e-7)


def test_a_split_of_floats_is_the_whole() -> None:
    made, generator = Made(), np.random.default_rng(3)
    weight, ids = generator.normal(size=(4, 6)).astype(np.float32), generator.integers(0, 3, (4, 6))
    operands = [made.constant(weight), made.constant(ids.astype(numpy_dtype("u2")), "u2"),
                made.constant(np.ones(3, np.float32))]  # fmt: skip
    parts = [made("dequantize_split", *operands, index=i) for i in range(3)]
    graph = made.done(made("add", made("add", *parts[:2]), parts[2]), made("dequantize_split", *operands))
    for got in agree(graph, {}):
        np.testing.assert_array_equal(got, weight)


LAYOUTS = [((), None, None), ((6,), 1, None), ((4, 1), None, None), ((4, 2), 1, 4)]
STATIC = [(dtype, *layout) for dtype in (*INTEGERS, *NARROW) for layout in LAYOUTS]


@pytest.mark.parametrize("opset", [None, 13, 25])
@pytest.mark.parametrize(("dtype", "shape", "axis", "block"), STATIC)
def test_quantize(dtype: str, shape: tuple[int, ...], axis: int | None, block: int | None, opset: int | None) -> None:
    made, generator = Made(), np.random.default_rng(4)
    x = made.input("x", 4, 6)
    scale = made.constant(np.exp(generator.normal(size=shape)).astype(np.float32) / 4)
    operands = [scale]
    if dtype[0] == "u":
        operands.append(made.constant(np.full(shape, 2), dtype))
    own = {k: v for k, v in {"axis": axis, "block": block}.items() if v is not None}
    held = made("quantize", x, *operands, dtype=dtype, **own)
    graph = made.done(made("dequantize", held, *operands, **own))
    data = generator.normal(size=(4, 6)).astype(np.float32) * 3
    data[0, :3] = 0.0, -0.0, 1e6
    (got,) = agree(graph, {"x": data}, opset)
    assert got.std() > 0.1


DYNAMIC = [
    "uint8:token", "uint4:token", "int8:token", "int8:token:half", "int4:token:extreme", "int4:g8", "uint4:g8",
    "int3:g8", "uint2:tensor", "int8:tensor:f16", "int8:token:bf16", "e4m3:token", "e5m2:tensor", "e2m1:g16", "e3m2:g8",
    "e2m3:token", *(f"{n}:{r}" for n in ("mxfp4", "mxfp6", "mxfp6-e2m3", "mxfp8", "mxfp8-e5m2", "mxint8")
                    for r in ("floor", "ceil", "even", "rceil")), "nvfp4",
]  # fmt: skip


def dynamic(text: str, *shape: int | str, global_scale: float | None = None, symmetric: bool = False) -> Graph:
    """dequantize(dynamic_quantize(x)) in a format."""
    form, made = Format.parse(text, "token"), Made()
    x = made.input("x", *shape)
    own = {"granularity": form.granularity, "dtype": form.element, "rule": form.rule}
    own |= {"block": form.block} if form.block else {}
    own |= {"scale": form.scale} if form.scale != "f32" else {}
    outer = [] if global_scale is None else [made.constant(np.float32(global_scale))]
    held, scale, zero = made("dynamic_quantize", x, *outer, symmetric=symmetric, **own)
    if outer:
        scale = made("dequantize", scale, *outer)
    zeros = [zero] if not form.symmetric or symmetric else []
    layout = {"axis": -1, "block": form.block} if form.block else {}
    return made.done(made("dequantize", held, scale, *zeros, **layout, dtype="f32"))


@pytest.mark.parametrize("opset", [None, 13, 25])
@pytest.mark.parametrize("text", DYNAMIC)
def test_dynamic_quantize(text: str, opset: int | None) -> None:
    x = np.random.default_rng(5).normal(size=(2, 3, 64)).astype(np.float32)
    x[0, 0], x[1, 2] = 0.0, x[1, 2] * 1e6
    outer = float(np.float32(np.abs(x).max() / np.float32(2688))) if text == "nvfp4" else None
    (got,) = agree(dynamic(text, 2, 3, 64, global_scale=outer), {"x": x}, opset)
    expected = fake_quantize(torch.from_numpy(x), Format.parse(text, "token")).numpy()
    np.testing.assert_array_equal(got, expected)


def test_blocks_that_are_not_full() -> None:
    x = np.random.default_rng(6).normal(size=(3, 37)).astype(np.float32)
    for text in ("int4:g8", "uint4:g16", "mxfp4", "nvfp4"):
        agree(dynamic(text, 3, 37), {"x": x})


@pytest.mark.parametrize("dtype", ["u4", "u8"])
def test_unsigned_codes_of_a_symmetric_range(dtype: str) -> None:
    text = {"u4": "uint4:g8", "u8": "uint8:g8"}[dtype]
    x = np.random.default_rng(8).normal(size=(3, 16)).astype(np.float32)
    (got,) = agree(dynamic(text, 3, 16, symmetric=True), {"x": x})
    signed = fake_quantize(torch.from_numpy(x), Format.parse(text[1:])).numpy()
    np.testing.assert_array_equal(got, signed)


@pytest.mark.parametrize("text", ["uint8:token", "int4:g8", "mxfp4:even", "nvfp4", "e4m3:token"])
def test_torch_modules_are_exported_and_widened(text: str) -> None:
    graph = dynamic(text, 3, 32, global_scale=0.01 if text == "nvfp4" else None)
    x = torch.from_numpy(np.random.default_rng(10).normal(size=(3, 32)).astype(np.float32))
    module = planish.to_torch(graph)
    expected = module(x)
    program = torch.export.export(module, (x,), strict=False)
    assert torch.equal(program.module()(x), expected)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    (wide,) = evaluate(graph, {"x": x}, dtype=torch.float64).values()
    assert torch.equal(module.double()(x.double()), wide)
    torch.testing.assert_close(wide.float(), expected, rtol=1e-5, atol=1e-6)


def test_half_precision() -> None:
    """Codes of float16 values, with a result in float16."""
    made = Made()
    x = made.input("x", 3, 16, dtype="f16")
    held, scale, _ = made("dynamic_quantize", x, granularity="group", block=8, dtype="i4")
    graph = made.done(made("dequantize", held, scale, axis=1, block=8))
    data = np.random.default_rng(11).normal(size=(3, 16)).astype(np.float16)
    (got,) = agree(graph, {"x": data})
    assert got.dtype == np.float16


@pytest.mark.parametrize("text", ["int8:channel", "int3:g8", "mxfp4", "mxfp6", "mxint8"])
def test_codes_that_other_ops_read(text: str) -> None:
    """Rows of codes and scales are taken, then dequantised."""
    q = quantize_array(np.random.default_rng(15).normal(size=(10, 64)), Format.parse(text))
    made = Made()
    ids, held = made.input("ids", 3, dtype="i64"), q.scale if q.block else q.scale[:, None]
    scale = made.constant(held.astype(numpy_dtype(q.scale_dtype)), q.scale_dtype)
    rows = [made("embedding", v, ids) for v in (made.constant(q.codes, q.element), scale)]
    layout = {"axis": 1, "block": q.block} if q.block else {}
    graph = made.done(made("dequantize", *rows, **layout))
    for opset in (None, 13, 25):
        (got,) = agree(graph, {"ids": np.array([7, 0, 7])}, opset)
        np.testing.assert_array_equal(got, q.dequantize()[[7, 0, 7]].astype(np.float32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("text", ["int4:g32", "uint4:g32", "uint2:g32", "int8:channel", "mxfp4", "nvfp4", "int3:g32"])
def test_products(text: str, transposed: bool) -> None:
    """ONNX Runtime's optimiser fuses some to MatMulNBits, by default with activations of 8 bits."""
    q = quantize_array(np.random.default_rng(13).normal(size=(64, 128)), Format.parse(text))
    graph = Graph("product")
    x = graph.add_input("x", TensorType("f32", ("n", 128)))
    held = graph.add_input("w", TensorType("f32", (128, 64) if transposed else (64, 128)))
    node = graph.append(get("linear"), [x, held], {"transposed": True} if transposed else {})
    graph.add_output("y", node.result)
    with Rewriter(graph) as rewriter:
        weight = insert_dequantize(rewriter, q.transposed() if transposed else q, "w.q", before=node)
        rewriter.set_operand(node, 1, weight)
    feeds = {"x": np.random.default_rng(14).normal(size=(5, 128)).astype(np.float32), "w": np.zeros(held.shape, "f")}
    expected = evaluate(graph, feeds)["y"].numpy()
    for accuracy, tolerance in (("1", 2e-6), (None, 1e-2)):
        _, found = onnxruntime_results(graph, feeds, accuracy=accuracy)
        for (y,), bound in zip(found, (2e-6, tolerance), strict=True):
            assert np.abs(y - expected).max() <= bound * np.abs(expected).max()


# -- bytes and opsets ----------------------------------------------------------------------------------


def weights_of(dtype: str, opset: int | None) -> dict[str, int]:
    """The bytes of the codes of a [8, 64] weight in a model."""
    made = Made()
    scale = made.constant(np.ones((8, 2), np.float32))
    graph = made.done(made("dequantize", made.constant(codes(dtype, 8, 64), dtype), scale, axis=1, block=32))
    model = to_model(graph, opset=opset)
    return {
        onnx.TensorProto.DataType.Name(t.data_type): len(t.raw_data)
        for t in model.graph.initializer
        if "c1" in t.name and list(t.dims) != [8, 2]
    }


def test_codes_stay_packed_at_every_opset() -> None:
    assert weights_of("u4", None) == {"UINT4": 256}
    assert weights_of("i3", None) == {"INT4": 256}
    assert weights_of("u4", 13) == weights_of("f4e2m1", None) == weights_of("f4e2m1", 25) == {"UINT8": 256}
    assert weights_of("i2", None) == {"UINT8": 128}
    assert weights_of("i2", 25) == {"INT2": 128}
    assert weights_of("f6e3m2", None) == {"FLOAT8E4M3FN": 512}
    assert weights_of("f8e5m2", 13) == {"UINT8": 512}


def imported(opset: int) -> Graph:
    """y = x, from a model of that opset."""
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [4, 6])], [value("y", 1, [4, 6])])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    return planish.capture(made)


@pytest.mark.parametrize(
    ("dtype", "block", "opset"), [("i8", None, 13), ("i4", None, 21), ("i8", 2, 21), ("f8e4m3fn", None, 19)]
)
def test_the_opset_is_raised(dtype: str, block: int | None, opset: int) -> None:
    graph = imported(11)
    (relu,) = graph.nodes
    layout = {"axis": 1} if block is None else {"axis": 1, "block": block}
    with Rewriter(graph) as rewriter:
        scale = rewriter.constant(Constant.of(np.ones((6,) if block is None else (4, 3), np.float32)), "scale")
        held = rewriter.insert("quantize", [relu.operands[0], scale], {"dtype": dtype, **layout}, before=relu)
        end = rewriter.insert("dequantize", [held.result, scale], layout, before=relu)
        rewriter.set_operand(relu, 0, end.result)
    model, results = onnxruntime_results(graph, {"x": np.full((4, 6), 2.4, np.float32)})
    assert model.opset_import[0].version == opset
    for (y,) in results:
        assert y.tolist() == np.full((4, 6), 2.5 if dtype[0] == "f" else 2.0).tolist()


def test_refusals() -> None:
    made = Made()
    x, scale = made.input("x", 4, "n"), made.constant(np.float32(1))
    group = made.done(made("dynamic_quantize", x, granularity="group", block=8, dtype="i8")[0])
    with pytest.raises(PlanishError, match="op 'dynamic_quantize': blocks on an axis without a static size are not po"):
        to_model(group)
    made = Made()
    x, scale = made.input("x", 4, 6), made.constant(np.ones(6, np.float32))
    graph = made.done(made("quantize", x, scale, axis=1, dtype="i4"))
    with pytest.raises(PlanishError, match="op 'quantize': an output of dtype i4 needs ONNX opset 21; got 13"):
        to_model(graph, opset=13)
    with pytest.raises(PlanishError, match="op 'quantize': a scale per channel is not possible in ONNX opset 12"):
        to_model(graph, opset=12)
    made = Made()
    x, scale = made.input("x", 4, 6), made.constant(np.float32(1))
    graph = made.done(made("quantize", x, scale, dtype="f4e2m1"))
    with pytest.raises(PlanishError, match="an output of dtype f4e2m1 has no form that ONNX Runtime computes"):
        to_model(graph)
    for dtype, opset, message in (
        ("i4", 13, "op 'dequantize': an input of dtype i4 needs ONNX opset 21; got 13"),
        ("f4e2m1", 24, "op 'dequantize': an input of dtype f4e2m1 needs a form that ONNX Runtime lacks"),
    ):
        made = Made()
        graph = made.done(made("dequantize", made.input("x", 4, dtype=dtype), made.constant(np.float32(1))))
        with pytest.raises(PlanishError, match=message):
            to_model(graph, opset=opset)


# -- back from ONNX ------------------------------------------------------------------------------------


def rows_of(graph: Graph) -> list[tuple[str, dict[str, object]]]:
    return [(n.op.name, dict(n.attributes)) for n in graph.nodes if "quantize" in n.op.name]


@pytest.mark.parametrize("dtype", ["i2", "u2", "i4", "u4", "i8", "u8", "f8e4m3fn", "f8e5m2"])
@pytest.mark.parametrize(("shape", "axis", "block"), [*LAYOUTS[:2], LAYOUTS[3], ((2, 6), 0, 2), ((1,), None, None)])
def test_round_trip(dtype: str, shape: tuple[int, ...], axis: int | None, block: int | None) -> None:
    made, generator = Made(), np.random.default_rng(9)
    scale = made.constant(np.exp(generator.normal(size=shape)).astype(np.float32))
    zero = [made.constant(np.full(shape, 2), dtype)] if dtype[0] == "u" else []
    own = {k: v for k, v in {"axis": axis, "block": block}.items() if v is not None}
    x = made.input("x", 4, 6)
    codes_of_x = made("quantize", x, scale, *zero, dtype=dtype, **own)
    weight = made("dequantize", made.constant(codes(dtype, 4, 6), dtype), scale, *zero, **own)
    graph = made.done(made("mul", made("dequantize", codes_of_x, scale, *zero, **own), weight))
    again = planish.capture(to_model(graph, opset=25))
    assert rows_of(again) == rows_of(graph)
    data = generator.normal(size=(4, 6)).astype(np.float32)
    (one,), (two,) = evaluate(graph, {"x": data}).values(), evaluate(again, {"x": data}).values()
    np.testing.assert_array_equal(one.numpy(), two.numpy())
    held = [n.operands[0].constant for n in again.nodes if n.op.name == "dequantize" and n.operands[0].is_constant]
    assert [c.dtype for c in held] == [dtype]
    np.testing.assert_array_equal(held[0].array(), codes(dtype, 4, 6))


def test_dynamic_quantize_linear_comes_back() -> None:
    made = Made()
    graph = made.done(made("dequantize", *made("dynamic_quantize", made.input("x", 3, 4))))
    assert rows_of(planish.capture(to_model(graph))) == [("dynamic_quantize", {}), ("dequantize", {})]


@pytest.mark.parametrize("text", ["mxfp4", "mxfp8", "nvfp4"])
def test_what_onnxruntime_cannot_run_is_read_and_written_anew(text: str) -> None:
    """FLOAT4E2M1 codes and FLOAT8E8M0 scales of ONNX become rows; planish writes them so that they run."""
    q = quantize_array(np.random.default_rng(12).normal(size=(4, 64)), Format.parse(text))
    numpy_helper, helper = onnx.numpy_helper, onnx.helper
    weights = [numpy_helper.from_array(q.codes, "codes")]
    weights.append(numpy_helper.from_array(q.scale.astype(numpy_dtype(q.scale_dtype)), "scale"))
    nodes, scale = [], "scale"
    if q.global_scale is not None:
        weights.append(numpy_helper.from_array(np.float32(q.global_scale), "outer"))
        nodes, scale = [helper.make_node("DequantizeLinear", ["scale", "outer"], ["inner"])], "inner"
    own = {"output_dtype": onnx.TensorProto.FLOAT} if q.global_scale is None else {}
    nodes.append(helper.make_node("DequantizeLinear", ["codes", scale], ["y"], axis=1, block_size=q.block, **own))
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4, 64])]
    made = helper.make_model(
        helper.make_graph(nodes, "g", [], outputs, weights), opset_imports=[helper.make_opsetid("", 24)], ir_version=12
    )
    graph = planish.capture(made)
    assert {n.op.name for n in graph.nodes} == {"dequantize"}
    (reference,) = ReferenceEvaluator(made).run(None, {})
    (got,) = agree(graph, {})
    np.testing.assert_array_equal(got, reference)
    np.testing.assert_allclose(got, q.dequantize(), rtol=2.5e-7)


@pytest.mark.parametrize(
    ("scale", "zero", "own"),
    [
        (np.float32(1), np.array([1], np.int8), {}),  # a zero point of another shape
        (np.ones((4, 3), np.float32), None, {"axis": 5, "block_size": 2}),
    ],
)
def test_forms_that_stay_as_they_are(scale: np.ndarray, zero: np.ndarray | None, own: dict[str, int]) -> None:
    helper = onnx.helper
    weights = [onnx.numpy_helper.from_array(np.asarray(scale), "s")]
    weights += [] if zero is None else [onnx.numpy_helper.from_array(zero, "z")]
    node = helper.make_node("DequantizeLinear", ["x", *(w.name for w in weights)], ["y"], **own)
    ends = [helper.make_tensor_value_info(n, t, [4, 6]) for n, t in (("x", 3), ("y", 1))]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], weights),
                              opset_imports=[helper.make_opsetid("", 21)], ir_version=10)  # fmt: skip
    graph = planish.capture(model)
    assert [n.op.name for n in graph.nodes] == ["onnx::DequantizeLinear"]
    assert to_model(graph).graph.node[0].attribute == model.graph.node[0].attribute


@pytest.mark.parametrize("activations", ["QInt8", "QUInt8"])
def test_a_model_that_onnxruntime_quantised(activations: str, tmp_path: Path) -> None:
    """Every pair is a row, biases of int32 too; evaluated and written again it is the same to the bit."""
    helper, generator = onnx.helper, np.random.default_rng(16)
    arrays = {"w": generator.normal(size=(8, 5)), "b": generator.normal(size=5)}
    held = [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in arrays.items()]
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    x, y = (helper.make_tensor_value_info(n, 1, [3, d]) for n, d in (("x", 8), ("y", 5)))
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", [x], [y], held), opset_imports=opsets, ir_version=8),
        tmp_path / "float.onnx",
    )
    data = {"x": generator.normal(size=(3, 8)).astype(np.float32)}

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([data])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    quantization.quantize_static(
        tmp_path / "float.onnx", tmp_path / "q.onnx", Reader(), activation_type=quantization.QuantType[activations]
    )
    graph = planish.capture(tmp_path / "q.onnx")
    assert {n.op.name for n in graph.nodes} <= {"quantize", "dequantize", "gemm", "relu", "linear", "clip"}
    (expected,) = run(tmp_path / "q.onnx", [data])[0]
    np.testing.assert_array_equal(evaluate(graph, data)["y"].numpy(), expected)
    np.testing.assert_array_equal(run(to_model(graph), [data])[0][0], expected)
