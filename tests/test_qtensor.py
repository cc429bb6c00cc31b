"""The quantised tensor, alone and in a graph."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import check_text
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.evaluator import evaluate
from planish.ir.formats import Format
from planish.ir.graph import Graph
from planish.ir.ops import get
from planish.ir.qnodes import insert_dequantize, qtensor_of, weight_of
from planish.ir.qtensor import QTensor
from planish.ir.rewriter import Rewriter
from planish.ir.rounding import quantize_array
from planish.ir.types import TensorType, is_float, numpy_dtype

FORMATS = ["int2:channel", "int3:g8", "int4:g8", "int8:tensor", "uint3:g8:f16", "uint4:channel:bf16", "uint8:tensor",
           "e4m3:channel", "e2m3:g8", "mxfp4", "mxfp6", "mxint8", "nvfp4", "uint2:g8:split3", "int4:channel:split2",
           "uint4:tensor:split4"]  # fmt: skip


def made(text: str, rows: int = 4, columns: int = 24, seed: int = 0) -> QTensor:
    form, rng = Format.parse(text), np.random.default_rng(seed)
    weight = rng.normal(size=(rows, columns))
    ids = rng.integers(0, form.clusters, weight.shape).astype(np.uint8) if form.clusters > 1 else None
    return quantize_array(weight, form, clusters=ids)


def in_a_graph(q: QTensor, transposed: bool = False) -> tuple[Graph, QTensor]:
    """linear(x, q) in a graph, and the tensor that is read back from it."""
    graph = Graph("g")
    rows, columns = q.shape
    x = graph.add_input("x", TensorType("f32", (2, rows if transposed else columns)))
    weight = graph.add_input("w", TensorType("f32", q.shape))
    node = graph.append(get("linear"), [x, weight], {"transposed": True} if transposed else {})
    graph.add_output("y", node.result)
    with Rewriter(graph) as rewriter:
        rewriter.set_operand(node, 1, insert_dequantize(rewriter, q, "w.held", before=node, source="from"))
    check_text(graph)
    held = qtensor_of(node.operands[1])
    assert held is not None
    return graph, held


def by_elements(q: QTensor) -> np.ndarray:
    """The numbers, one by one, from the definition."""
    out = np.zeros(q.shape)
    for at in np.ndindex(q.shape):
        k: tuple[int, ...] = () if q.clusters is None else (int(q.clusters[at]),)
        if q.axis is None:
            place: tuple[int, ...] = ()
        elif q.block is None:
            place = (at[q.axis],)
        else:
            index = at[q.axis] // q.block if q.group_index is None else int(q.group_index[at[q.axis]])
            place = tuple(index if a == q.axis else i for a, i in enumerate(at))
        zero = 0.0 if q.zero is None else q.zero[k + place]
        out[at] = (float(q.codes[at]) - zero) * q.scale[k + place] * (q.global_scale or 1.0)
    return out


def same(one: QTensor, two: QTensor) -> None:
    for name in ("codes", "scale", "zero", "clusters", "group_index"):
        a, b = getattr(one, name), getattr(two, name)
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_array_equal(a.astype(np.float64), b.astype(np.float64), name)
    for name in ("element", "axis", "block", "scale_dtype", "zero_is_float", "global_scale"):
        assert getattr(one, name) == getattr(two, name), name


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_numbers_by_the_definition(text: str, rows: int, columns: int, seed: int) -> None:
    q = made(text, rows, columns, seed)
    np.testing.assert_allclose(q.dequantize(), by_elements(q), rtol=1e-15)
    turned = q.transposed()
    np.testing.assert_array_equal(turned.dequantize(), q.dequantize().T)
    same(turned.transposed(), q)


def test_codes_are_held_unpacked() -> None:
    for text in FORMATS:
        q = made(text)
        expected = numpy_dtype(q.element) if is_float(q.element) else np.uint8 if q.element[0] == "u" else np.int8
        assert q.codes.dtype == expected


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("int8:channel", 8 + 32 / 64),
        ("int4:g32", 4 + 32 / 32),
        ("int4:g32:f16", 4 + 16 / 32),
        ("uint4:g32", 4 + (32 + 4) / 32),
        ("int3:g64:f16", 3.25),
        ("mxfp4", 4 + 8 / 32),
        ("mxfp6", 6 + 8 / 32),
        ("nvfp4", 4 + 8 / 16 + 32 / 128),
        ("uint2:g32:split3", 2 + 2 + 3 * (32 + 32) / 32),
        ("int8:tensor", 8 + 32 / 128),
    ],
)
def test_bits_count_the_scales(text: str, bits: float) -> None:
    assert made(text, 2, 64).bits == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("text", FORMATS)
def test_a_graph_gives_it_back(text: str, transposed: bool) -> None:
    q = made(text)
    graph, held = in_a_graph(q.transposed() if transposed else q, transposed)
    same(held, q.transposed() if transposed else q)
    reader = next(n for n in graph.nodes if n.op.name == "linear")
    read = weight_of(reader)
    assert read is not None
    same(read, q)
    x = np.random.default_rng(1).normal(size=(2, 24)).astype(np.float32)
    (y,) = evaluate(graph, {"x": x, "w": np.zeros(held.shape, np.float32)}).values()
    np.testing.assert_allclose(y.numpy(), x @ q.dequantize().T, rtol=1e-5, atol=1e-5)
    assert all(n.source == "from" for n in graph.nodes if "dequantize" in n.op.name)


@pytest.mark.parametrize("text", ["int4:g8", "uint4:g8", "uint2:g8:split3"])
def test_groups_that_are_not_consecutive(text: str) -> None:
    """Columns of one group stand together in the graph; a gather puts them back."""
    groups = np.random.default_rng(2).permutation(np.arange(24) // 8)
    q = replace(made(text), group_index=groups)
    np.testing.assert_allclose(q.dequantize(), by_elements(q), rtol=1e-15)
    graph, held = in_a_graph(q)
    assert [n.op.name for n in graph.nodes][-2:] == ["gather", "linear"]
    same(held, q)
    assert held.bits == made(text).bits + 32 * 24 / (4 * 24)


def test_what_is_no_quantised_tensor() -> None:
    graph, _ = in_a_graph(made("int4:g8"))
    node = next(n for n in graph.nodes if n.op.name == "linear")
    assert qtensor_of(node.operands[0]) is None
    assert qtensor_of(None) is None
    assert qtensor_of(node.result) is None
    scale = graph.add_input("scale", TensorType("f32", (4, 3)))
    made_node = node.operands[1].producer
    with Rewriter(graph) as rewriter:
        rewriter.set_operand(made_node, 1, scale)
    assert qtensor_of(node.operands[1]) is None  # a scale that is computed at run time
    assert weight_of(node) is None
