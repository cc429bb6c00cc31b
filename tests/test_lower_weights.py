"""Lowering of low-bit weights and tables: the same numbers on onnxruntime, with its optimiser on and off."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import check_text
from patterns import Build

from planish.calibrate.collect import collect
from planish.codegen.onnx import to_model
from planish.ir.errors import PlanishError
from planish.ir.evaluator import evaluate
from planish.ir.formats import Format
from planish.ir.graph import Graph, Node, Value
from planish.ir.ops import get
from planish.ir.qnodes import insert_dequantize
from planish.ir.qtensor import QTensor
from planish.ir.rewriter import Rewriter
from planish.ir.rounding import quantize_array
from planish.ir.verifier import verify
from planish.passes.base import PassReport
from planish.passes.manager import Pipeline

LEVELS = [
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
]
NBITS, GATHER = "com.microsoft::MatMulNBits", "com.microsoft::GatherBlockQuantized"
MATMUL = "com.microsoft::MatMulIntegerToFloat"
ACTIVATIONS: dict[str, dict[str, object]] = {
    "dynamic": {},
    "token": {"granularity": "token", "symmetric": True},
    "floors": {"granularity": "token", "floor": 0.2},
    "zeros": {"granularity": "token"},
}
EXACT = 2e-6  # relative, in float32 on whatever kernel


def quantised(b: Build, text: str | QTensor, rows: int, columns: int, name: str = "w") -> Value:
    """The numbers of a random matrix in a format."""
    if isinstance(text, str):
        weight = b.rng.normal(size=(rows, columns)) * 0.1
        text = quantize_array(weight, Format.parse(text))
    # at the end of the graph, and without the sweep that takes away what nothing reads yet
    return insert_dequantize(Rewriter(b.graph), text, name, before=None)  # type: ignore[arg-type]


def linear(
    text: str | QTensor, *, rows: int = 24, columns: int = 96, rank: int = 3, bias: bool = True,
    transposed: bool = False, activation: str = "", leading: str = "batch, tokens",
) -> Graph:  # fmt: skip
    """A linear whose weight is in a format; `activation`: of 8 bits, see ACTIVATIONS."""
    b = Build()
    x = b.input("x", f"f32[{leading if rank == 3 else 'batch'}, {columns}]")
    if transposed:
        text = quantize_array(b.rng.normal(size=(rows, columns)) * 0.1, Format.parse(str(text))).transposed()
    w = quantised(b, text, rows, columns)
    if activation:
        codes = b.graph.append(get("dynamic_quantize"), [x], ACTIVATIONS[activation])
        x = b.graph.append(get("dequantize"), list(codes.results)).result
    vector = b.random(rows, name="bias") if bias else None
    return b.output(b("linear", x, w, vector, transposed=transposed))


def table(text: str, *, rows: int = 40, columns: int = 96, tied: bool = False) -> Graph:
    """Rows of a table, quantised by the pass; `tied`: a linear reads the table too."""
    b = Build()
    ids = b.input("ids", "i64[batch, tokens]")
    weight = b.constant(b.rng.normal(size=(rows, columns)) * 0.1, name="table")
    x = b("embedding", weight, ids)
    graph = b.output(b("linear", x, weight) if tied else b("add", np.float32(0), x))
    pipeline = f"quantize{{weights={text} embeddings={text} min-rows=0}}"
    return Pipeline(pipeline).run(graph)[0]


def whole(text: str, *, rows: int = 40, columns: int = 96) -> Graph:
    """The same as an embedding of the numbers of the table."""
    b = Build()
    ids = b.input("ids", "i64[batch, tokens]")
    return b.output(b("embedding", quantised(b, text, rows, columns), ids))


def feeds(graph: Graph, rows: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    value = graph.inputs[0]
    if value.dtype == "i64":
        return {"ids": rng.integers(0, 40, (2, rows))}
    shape = [d if isinstance(d, int) else {"batch": 2, "tokens": rows}[str(d)] for d in value.shape or ()]
    return {"x": rng.normal(size=shape).astype(np.float32)}


def lower(graph: Graph, target: str, options: str = "") -> tuple[Graph, PassReport]:
    lowered, report = Pipeline(f"lower{{target={target}{' ' + options if options else ''}}}").run(graph)
    verify(lowered)
    check_text(graph)
    check_text(lowered)
    return lowered, report.passes[-1]


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray], level: object) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]  # type: ignore[no-any-return]


def errors(graph: Graph, lowered: Graph, target: str, rows: int = 5) -> list[float]:
    """Relative errors of onnxruntime, by level, to what the graph says."""
    inputs = feeds(graph, rows)
    (expected,) = (v.numpy() for v in evaluate(graph, inputs).values())
    model = to_model(lowered, target=target)
    found = [run(model, inputs, level) for level in LEVELS]
    return [float(np.abs(f - expected).max() / np.abs(expected).max()) for f in found]


def counts(graph: Graph) -> Counter[str]:
    return Counter(n.op.name for n in graph.nodes)


def nodes(graph: Graph, name: str) -> list[Node]:
    return [n for n in graph.nodes if n.op.name == name]


# -- target onnx -----------------------------------------------------------------------------------

WEIGHTS = [
    "int8:channel", "uint8:channel", "int8:tensor", "int4:channel", "int4:g32", "uint4:g16", "uint4:g32:f16", "int4:g8",
    "int3:g32", "int2:g32", "uint2:g64", "e4m3:channel", "e2m1:g32", "mxfp4", "mxfp8", "mxint8", "nvfp4",
]  # fmt: skip


@pytest.mark.parametrize("columns", [96, 100])
@pytest.mark.parametrize("text", WEIGHTS)
def test_standard_operators_keep_the_numbers(text: str, columns: int) -> None:
    """methods: the optimiser would put MatMulNBits of level 4 here, with errors of 5e-3."""
    for graph in (linear(text, columns=columns), linear(text, columns=columns, rank=2, transposed=True)):
        lowered, _ = lower(graph, "onnx")
        assert max(errors(graph, lowered, "onnx")) < EXACT
        assert {i.domain for i in to_model(lowered).opset_import} <= {""}


@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize("text", ["int8:channel", "uint4:g32"])
@pytest.mark.parametrize("op", ["gemm", "gemm turned", "matmul"])
def test_products_that_are_no_linears(op: str, text: str, target: str) -> None:
    b = Build()
    x = b.input("x", "f32[batch, 96]")
    q = quantize_array(b.rng.normal(size=(24, 96)), Format.parse(text))
    if op == "gemm turned":
        made = b("gemm", x, quantised(b, q, 24, 96), b.random(24), trans_b=True)
    else:
        made = b(op, x, quantised(b, q.transposed(), 24, 96), *([b.random(24)] if op == "gemm" else []))
    graph = b.output(made)
    lowered, report = lower(graph, target)
    assert len(report.applied) == counts(lowered)["squeeze"] == 1
    assert max(errors(graph, lowered, target)) < EXACT


def test_a_vector_as_input() -> None:
    b = Build()
    graph = b.output(b("linear", b.input("x", "f32[96]"), quantised(b, "int4:g32", 24, 96)))
    for target in ("onnx", "ort"):
        assert max(errors(graph, lower(graph, target)[0], target)) < EXACT


@pytest.mark.parametrize("text", ["int8:channel", "int4:g32"])
def test_the_plain_pair_would_not(text: str) -> None:
    """What the lowering is for: without it the default session changes the numbers."""
    graph = linear(text, transposed=True)
    off, _, default = errors(graph, graph, "onnx")
    assert off < EXACT
    assert default > 1e-3


def test_an_integer_pair_stays() -> None:
    graph = linear("int8:channel", activation="dynamic")
    lowered, report = lower(graph, "onnx")
    assert lowered == graph
    assert not report.applied
    assert max(errors(graph, lowered, "onnx")) < EXACT
    rows = linear("int8:channel", activation="token")
    lowered, report = lower(rows, "onnx")
    assert counts(lowered)["squeeze"] == len(report.applied) == 1
    assert max(errors(rows, lowered, "onnx")) < EXACT


@pytest.mark.parametrize("activation", ["dynamic", "token"])
@pytest.mark.parametrize("leading", ["2, 5, ", "1, 1, ", "2, 1, 5, ", ""])
def test_an_integer_pair_of_known_sizes(leading: str, activation: str) -> None:
    """Where sizes are known the optimiser draws MatMul and the sum of a vector into a Gemm, that into MatMulNBits."""
    b = Build()
    x = b.input("x", f"f32[{leading}96]")
    codes = b.graph.append(get("dynamic_quantize"), [x], ACTIVATIONS[activation])
    x = b.graph.append(get("dequantize"), list(codes.results)).result
    graph = b.output(b("linear", x, quantised(b, "int8:channel", 24, 96), b.random(24, name="bias")))
    if activation == "dynamic":
        assert errors(graph, graph, "onnx")[-1] > 1e-3
    lowered, report = lower(graph, "onnx")
    assert len(report.applied) == 1
    assert [name for name, _ in lowered.outputs] == [name for name, _ in graph.outputs]
    assert max(errors(graph, lowered, "onnx")) < EXACT


@pytest.mark.parametrize("columns", [96, 33])
@pytest.mark.parametrize(
    "text",
    ["int8:channel", "uint4:g16", "int4:channel", "int4:tensor", "int3:g32", "uint2:g32:f16", "int2:g32",
     "e4m3:channel", "mxfp4", "nvfp4", "e2m3:channel", "uint8:channel"],
)  # fmt: skip
def test_tables_in_standard_operators(text: str, columns: int) -> None:
    stays = text in ("int8:channel", "uint8:channel")
    for graph in (table(text, columns=columns), whole(text, columns=columns)):
        lowered, report = lower(graph, "onnx")
        assert bool(report.applied) == (not stays or counts(graph)["embedding"] == 1)
        assert max(errors(graph, lowered, "onnx")) < EXACT
        bits = {"int8": 8, "uint8": 8, "e4m3": 8, "e2m3": 8, "uint2": 2, "int2": 2}.get(text.split(":")[0], 4)
        held = [t for t in to_model(lowered).graph.initializer if t.data_type in (2, 3)]
        codes = max(held, key=lambda t: len(t.raw_data))
        least = 40 * -(-columns * bits // 8)
        assert least <= len(codes.raw_data) <= least * (1 if columns == 96 else 2)


# -- target ort ------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [96, 100])
@pytest.mark.parametrize("text", ["int4:g32", "uint4:g16:f16", "int4:channel", "uint2:g32", "int8:g64", "uint8:tensor"])
def test_weights_alone(text: str, columns: int) -> None:
    for graph in (linear(text, columns=columns), linear(text, columns=columns, rank=2, transposed=True, bias=False)):
        lowered, report = lower(graph, "ort")
        (node,) = nodes(lowered, NBITS)
        assert node.attributes["accuracy_level"] == 0
        assert (node.operand(5) is not None) == (nodes(graph, "linear")[0].operand(2) is not None)
        assert not report.declined
        assert counts(lowered)["linear"] == counts(lowered)["dequantize"] == 0
        assert max(errors(graph, lowered, "ort")) < EXACT


@pytest.mark.parametrize("text", ["int4:g32", "uint4:g16", "uint2:g32"])
def test_groups_that_are_not_consecutive(text: str) -> None:
    """g_idx where the kernel gets it right: zero points then are floats."""
    q = quantize_array(np.random.default_rng(0).normal(size=(24, 96)), Format.parse(text))
    graph = linear(dataclasses.replace(q, group_index=np.arange(96) * 7 % q.scale.shape[1]))
    lowered, report = lower(graph, "ort")
    assert counts(lowered)[NBITS] == (text != "uint2:g32")
    for node in nodes(lowered, NBITS):
        assert node.operands[4].dtype == "i32"
        assert node.operands[3] is None or node.operands[3].dtype == "f32"
    assert bool(report.declined) == (text == "uint2:g32")
    for target in ("onnx", "ort"):
        assert max(errors(graph, lower(graph, target)[0], target)) < EXACT


def test_a_slow_kernel_is_noted() -> None:
    for text, options, noted in (
        ("int4:g32", "", False),
        ("int8:g32", "", True),
        ("uint2:g32", "", True),
        ("uint2:g32", "accuracy-level=4", False),
    ):
        _, report = lower(linear(text), "ort", options)
        assert any("1 linears of 2 or 8 bits with float activations" in n for n in report.notes) == noted


def test_scales_of_16_bits_stay_so() -> None:
    lowered, _ = lower(linear("int4:g32:f16"), "ort")
    (node,) = nodes(lowered, NBITS)
    assert node.operands[2].dtype == "f32"
    assert node.operands[2].producer.operands[0].dtype == "f16"
    model = to_model(lowered, target="ort")
    assert sum(t.data_type == 10 for t in model.graph.initializer) == 1


def test_the_accuracy_level() -> None:
    """4 rounds the activations to int8: an error of 5e-3, and by default only where the graph rounds them too."""
    graph = linear("int4:g32")
    lowered, _ = lower(graph, "ort", "accuracy-level=4")
    assert nodes(lowered, NBITS)[0].attributes["accuracy_level"] == 4
    assert 1e-4 < max(errors(graph, lowered, "ort")) < 2e-2
    for activation in ("dynamic", "token"):
        graph = linear("int4:g32", activation=activation)
        lowered, _ = lower(graph, "ort")
        (node,) = nodes(lowered, NBITS)
        assert node.attributes["accuracy_level"] == 4
        assert node.operands[0] is lowered.inputs[0]
        assert counts(lowered)["dynamic_quantize"] == 0
        assert max(errors(graph, lowered, "ort")) < 2e-2
        exact, _ = lower(graph, "ort", "accuracy-level=0")
        assert counts(exact)["dynamic_quantize"] == 1
        assert max(errors(graph, exact, "ort")) < EXACT


@pytest.mark.parametrize("activation", ["dynamic", "token", "floors"])
@pytest.mark.parametrize("text", ["int4:channel", "uint4:channel", "int3:channel", "uint2:channel", "uint8:channel"])
def test_prefill(text: str, activation: str) -> None:
    """Codes of 4 bits, cast to int8 in front of the integer product."""
    graph = linear(text, activation=activation)
    lowered, report = lower(graph, "ort")
    (node,) = nodes(lowered, MATMUL)
    assert counts(lowered)[NBITS] == 0
    assert not report.declined
    codes = node.operands[1]
    if "8" not in text:
        assert codes.producer.op.name == "cast"
        assert codes.producer.operands[0].dtype == "i4"
    assert codes.dtype == "i8"
    assert (node.operand(5) is not None) == text.startswith("u")
    # one step of one activation may fall otherwise
    assert max(errors(graph, lowered, "ort")) < 1e-2


def test_rows_with_zero_points() -> None:
    """No fast kernel: 8-bit weights stay in standard operators, others go in blocks."""
    why = "its rows have zero points of their own: no fast kernel"
    for text, name in (("int8:channel", "squeeze"), ("int4:channel", NBITS)):
        graph = linear(text, activation="zeros")
        lowered, report = lower(graph, "ort")
        assert list(report.declined) == [why]
        assert counts(lowered)[name] == 1
        assert counts(lowered)[MATMUL] == 0
        assert max(errors(graph, lowered, "ort")) < (EXACT if text == "int8:channel" else 2e-2)


def test_what_no_operator_says_names_the_target_that_can() -> None:
    graph = linear("int8:channel")
    with pytest.raises(PlanishError) as caught:
        to_model(lower(graph, "onnx")[0], opset=12)
    assert caught.value.what == "op 'dequantize': a scale per channel is not possible in ONNX opset 12"
    assert caught.value.where is not None
    assert caught.value.hint == "the torch target can: planish.to_torch(graph)"
    with pytest.raises(PlanishError) as caught:
        to_model(lower(graph, "ort")[0], target="onnx")
    assert caught.value.what == f"op '{NBITS}': is not in target onnx"
    assert caught.value.hint == "write for --target ort"


def test_the_form_of_four_bits_with_eight() -> None:
    graph = linear("int4:channel", activation="token")
    assert counts(lower(graph, "ort", "form=prefill")[0])[MATMUL] == 1
    decoded, _ = lower(graph, "ort", "form=decode")
    assert counts(decoded)[NBITS] == 1
    assert max(errors(graph, decoded, "ort")) < 2e-2
    single = linear("int4:channel", activation="token", leading="1, 1")
    assert counts(lower(single, "ort")[0])[NBITS] == 1
    assert counts(lower(single, "ort", "form=prefill")[0])[MATMUL] == 1
    eight = linear("int8:channel", activation="token")
    assert counts(lower(eight, "ort", "form=decode")[0])[MATMUL] == 1
    blocks, report = lower(linear("int4:g32", activation="token"), "ort", "form=prefill")
    assert counts(blocks)[NBITS] == 1
    assert list(report.declined) == ["its weight has not one scale for each output: no integer product"]


def test_weights_that_no_kernel_holds() -> None:
    """They stay in standard form, and the report says why; the numbers are the same."""
    q = quantize_array(np.random.default_rng(0).normal(size=(24, 96)), Format.parse("int4:g32"))
    ids = np.random.default_rng(1).integers(0, 3, q.shape).astype(np.uint8)
    split = dataclasses.replace(q, clusters=ids, scale=np.stack([q.scale, 2 * q.scale, 3 * q.scale]))
    cases: list[tuple[str | QTensor, str]] = [
        ("int4:g8", "blocks of 8; expected a power of two of at least 16"),
        ("int3:g32", "elements i3; expected i2, u2, i4, u4, i8, u8"),
        ("e4m3:channel", "elements f8e4m3fn; expected i2, u2, i4, u4, i8, u8"),
        (split, "a scale for each of 3 clusters"),
    ]
    for text, why in cases:
        graph = linear(text)
        lowered, report = lower(graph, "ort")
        assert dict(report.declined) == {f"its weight has {why}: MatMulNBits cannot hold it": ["linear %linear"]}
        assert max(errors(graph, lowered, "ort")) < EXACT


@pytest.mark.parametrize("text", ["uint4:g32", "int4:g32:f16"])
def test_a_residual_sum_of_blocks(text: str) -> None:
    """The sign of the linear goes into the scales."""
    b = Build()
    x = b.input("x", "f32[batch, tokens, 96]")
    w = quantised(b, text, 96, 96)
    total = b("add", x, b("linear", x, w, b.random(96, name="bias")))
    graph = b.output(b("layer_norm", total, b.random(96), b.random(96), eps=1e-5))
    lowered, report = lower(graph, "ort")
    assert [a for a in report.applied if a.endswith(": residual")]
    assert counts(lowered)["sub"] == 1
    assert max(errors(graph, lowered, "ort")) < 1e-5


@pytest.mark.parametrize(
    "text", ["int4:channel", "uint4:channel", "int8:channel", "int8:channel:extreme", "uint8:tensor"]
)
@pytest.mark.parametrize("activation", ["dynamic", "token"])
def test_a_residual_sum_of_integers(text: str, activation: str) -> None:
    b = Build()
    x = b.input("x", "f32[batch, tokens, 96]")
    w = quantised(b, text, 96, 96)
    more = {} if activation == "dynamic" else {"granularity": "token", "symmetric": True}
    codes = b.graph.append(get("dynamic_quantize"), [x], more)
    back = b.graph.append(get("dequantize"), list(codes.results)).result
    total = b("add", x, b("linear", back, w, b.random(96, name="bias")))
    graph = b.output(b("layer_norm", total, b.random(96), b.random(96), eps=1e-5))
    lowered, report = lower(graph, "ort")
    assert [a for a in report.applied if a.endswith(": residual")]
    assert counts(lowered)[MATMUL] == counts(lowered)["sub"] == 1
    assert max(errors(graph, lowered, "ort")) < 1e-2


@pytest.mark.parametrize(
    "text", ["int8:channel", "uint4:g16", "int4:channel", "int4:g32:f16", "uint2:g32", "uint8:tensor"]
)
def test_tables_by_their_kernel(text: str) -> None:
    for graph in (table(text), whole(text)):
        lowered, report = lower(graph, "ort")
        if text in ("int8:channel", "uint8:tensor") and nodes(graph, "embedding")[0].operands[0].is_constant:
            assert lowered == graph  # gathered codes, gathered scales: faster
            continue
        (node,) = nodes(lowered, GATHER)
        assert not report.declined
        assert node.result.dtype == "f32"
        assert max(errors(graph, lowered, "ort")) < EXACT


def test_tables_that_it_cannot_hold() -> None:
    graph = whole("int4:g32", columns=33)
    lowered, report = lower(graph, "ort")
    why = "its table has rows of 33 elements of 4 bits; expected whole bytes: GatherBlockQuantized cannot hold it"
    assert dict(report.declined) == {why: ["embedding %embedding"]}
    assert len(report.applied) == 1
    assert max(errors(graph, lowered, "ort")) < EXACT
    for graph in (table("mxfp4"), table("nvfp4")):
        lowered, report = lower(graph, "ort")
        assert len(report.declined) == len(report.applied) == 1
        assert max(errors(graph, lowered, "ort")) < EXACT


@pytest.mark.parametrize("text", ["int4:g32", "uint4:g16", "int8:channel"])
def test_a_tied_head(text: str) -> None:
    """One quantised table that an embedding and a linear read: for onnxruntime, the same bytes for both kernels."""
    graph = table(text, columns=128, tied=True)
    for target in ("ort", "onnx"):
        lowered, _ = lower(graph, target)
        assert max(errors(graph, lowered, target)) < EXACT
    lowered, _ = lower(graph, "ort")
    (head,), (rows,) = nodes(lowered, NBITS), nodes(lowered, GATHER)
    assert rows.operands[0].producer.operands[0] is head.operands[1]
    assert rows.operands[2] is head.operands[2]


# -- what onnxruntime's optimiser would spoil -------------------------------------------------------


@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize("activations", ["uint8:tensor", "int8:token", "e4m3:tensor", "mxfp8", "e4m3:tensor:static",
                                         "int8:tensor:static"])  # fmt: skip
@pytest.mark.parametrize("weights", ["e4m3:channel", "e5m2:g16", "mxfp6", "int8:channel", "uint4:g16"])
def test_fp8_codes_load_and_keep_their_numbers(weights: str, activations: str, target: str) -> None:
    """The optimiser makes an integer product of fp8 codes, and drops a Relu in front of them."""
    b = Build()
    h = b("relu", b("linear", b.input("x", "f32[n, 32]"), b.random(32, 32), b.random(32)))
    graph = b.output(b("linear", h, b.random(8, 32)))
    inputs = {"x": np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)}
    pipeline = Pipeline(f"quantize{{weights={weights} activations={activations}}}")
    graph, _ = pipeline.run(graph, stats=collect(graph, [inputs]))
    lowered, _ = lower(graph, target)
    near(graph, lowered, target, inputs, 2e-2)


def near(graph: Graph, lowered: Graph, target: str, inputs: dict[str, np.ndarray], tolerance: float) -> None:
    (expected,) = (v.numpy() for v in evaluate(graph, inputs).values())
    for level in LEVELS:
        got = run(to_model(lowered, target=target), inputs, level)
        assert np.abs(got - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize(
    "options",
    ["weights=e4m3:channel activations=e4m3:tensor:static", "weights=e4m3:g4 activations=e4m3:tensor:static",
     "weights=int4:channel activations=int4:tensor:static", "weights=uint4:tensor activations=uint8:tensor:static",
     "weights=int8:channel activations=uint4:tensor:static"],
)  # fmt: skip
def test_kernels_behind_a_clip(options: str, target: str) -> None:
    """The optimiser makes QLinearConv of codes that it does not take, and fails at a Clip in front of 4-bit codes."""
    b = Build()
    h = b("clip", b("conv", b.input("x", "f32[1, 4, 6, 6]"), b.random(8, 4, 3, 3)), np.float32(0), np.float32(6))
    h = b("conv", h, b.random(8, 8, 3, 3), b.random(8))
    graph = b.output(b("conv", b("clip", h, np.float32(0), np.float32(6)), b.random(4, 8, 1, 1)))
    inputs = {"x": np.random.default_rng(0).normal(size=(1, 4, 6, 6)).astype(np.float32)}
    graph, _ = Pipeline(f"quantize{{{options}}}").run(graph, stats=collect(graph, [inputs]))
    lowered, _ = lower(graph, target)
    near(graph, lowered, target, inputs, 2e-2)


@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize("activation", ["uint8", "int8", "e4m3"])
def test_a_float_weight_beside_codes(activation: str, target: str) -> None:
    """The optimiser rounds a float kernel whose input comes from DequantizeLinear: 1e-2 off, or no session at all."""
    b = Build()
    h = b("gelu", b("conv", b.input("x", "f32[1, 4, 6, 6]"), b.random(8, 4, 3, 3), b.random(8)))
    h = b("conv", h, b.random(4, 8, 3, 3), b.random(4))
    h = b("reshape", h, np.array([1, 16], np.int64))
    graph = b.output(b("gemm", h, b.random(5, 16), b.random(5), trans_b=True))
    inputs = {"x": np.random.default_rng(0).normal(size=(1, 4, 6, 6)).astype(np.float32)}
    pipeline = Pipeline(f"quantize{{weights=none activations={activation}:tensor:static}}")
    graph, _ = pipeline.run(graph, stats=collect(graph, [inputs]))
    lowered, _ = lower(graph, target)
    near(graph, lowered, target, inputs, 1e-5)


@pytest.mark.parametrize("opset", [19, 20])
def test_fp8_behind_a_relu_at_an_older_opset(opset: int) -> None:
    b = Build()
    graph = b.output(b("linear", b("relu", b.input("x", "f32[n, 32]")), b.random(8, 32)))
    inputs = {"x": np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)}
    pipeline = Pipeline("quantize{weights=e4m3:channel activations=e4m3:tensor:static}")
    graph, _ = pipeline.run(graph, stats=collect(graph, [inputs]))
    lowered, _ = lower(graph, "onnx")
    (expected,) = (v.numpy() for v in evaluate(graph, inputs).values())
    for level in LEVELS:
        got = run(to_model(lowered, opset=opset), inputs, level)
        assert np.abs(got - expected).max() < EXACT * np.abs(expected).max()


@pytest.mark.parametrize("text", ["int4:g32:f16", "uint4:g16:f16", "int8:g32:f16", "uint2:g32:f16"])
def test_narrow_scales_at_level_4(text: str) -> None:
    """The kernel is wrong, without an error, where a Cast of its scales is not folded: with the optimiser off."""
    graph = linear(text, activation="token")
    lowered, _ = lower(graph, "ort", "accuracy-level=4")
    (node,) = nodes(lowered, NBITS)
    assert node.operands[2] is not None and node.operands[2].is_constant and node.operands[2].dtype == "f32"
    assert max(errors(graph, lowered, "ort")) < 2e-2


@pytest.mark.parametrize("text", ["int4:g16", "uint2:channel", "e4m3:channel", "nvfp4", "mxfp4", "int3:channel"])
def test_tables_without_lowering(text: str) -> None:
    """ONNX's Gather takes no narrow types: the table is wider there, and its rows are cast."""
    graph = table(text)
    assert max(errors(graph, graph, "onnx")) < EXACT


@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize("text", ["int4:g16", "uint4:g12", "mxfp4", "int8:g100"])
def test_blocks_of_a_vector(text: str, target: str) -> None:
    """onnxruntime's DequantizeLinear has none."""
    b = Build()
    graph = b.output(b("linear", b.input("x", "f32[32]"), b.random(8, 32)))
    graph, _ = Pipeline(f"quantize{{activations={text}}}").run(graph)
    lowered, _ = lower(graph, target)
    near(graph, lowered, target, {"x": np.random.default_rng(0).normal(size=32).astype(np.float32)}, 1e-2)


@pytest.mark.parametrize("opset", [-1, 6, 9999])
def test_an_opset_that_there_is_not(opset: int) -> None:
    with pytest.raises(PlanishError, match=f"opset {opset}: (unknown|is not written); expected 7 to "):
        Pipeline(f"lower{{opset={opset}}}").run(linear("int4:g32"))
