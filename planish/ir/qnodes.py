"""Quantised tensors in a graph: constants and the `dequantize` node that reads them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Attribute, Node, Value
from planish.ir.qtensor import QTensor, cluster_dtype
from planish.ir.rewriter import Rewriter
from planish.ir.types import WIDE_FLOATS, numpy_dtype


def insert_dequantize(
    rewriter: Rewriter, q: QTensor, name: str, *, before: Node, source: str = "", dtype: str = "f32"
) -> Value:
    """Write a quantised tensor into a graph and return its numbers, a value of `dtype` called `name`.dequantized.

    The constants are called `name`.codes, `name`.scale, `name`.zero, `name`.clusters; of a tensor with a group
    index the columns stand in the order of their groups, with a gather behind that puts them back.
    """
    if q.group_index is not None:
        return _regrouped(rewriter, q, name, before, source, dtype)

    def constant(data: np.ndarray, element: str, suffix: str) -> Value:
        return rewriter.constant(Constant(data, element, data.shape), f"{name}.{suffix}")

    operands: list[Value | None] = [constant(q.codes.astype(numpy_dtype(q.element)), q.element, "codes")]
    attributes: dict[str, Attribute] = {"axis": q.axis}
    if q.block is not None:
        attributes["block"] = q.block
    if q.clusters is not None:
        ids = cluster_dtype(len(q.scale))
        operands.append(constant(q.clusters.astype(numpy_dtype(ids)), ids, "clusters"))
    if q.global_scale is not None:
        stored = q.scale.astype(numpy_dtype(q.scale_dtype))
        levels = [
            constant(stored, q.scale_dtype, "block_scale"),
            constant(np.array(q.global_scale), "f32", "global_scale"),
        ]
        names = [f"{name}.scale"]
        operands.append(rewriter.insert("dequantize", levels, before=before, names=names, source=source).result)
    else:
        operands.append(constant(q.scale, q.scale_dtype, "scale"))
    if q.zero is not None:
        element = q.scale_dtype if q.zero_is_float else q.element
        zero = q.zero if q.zero_is_float else q.zero.astype(numpy_dtype(element))
        operands.append(constant(zero, element, "zero"))
    if q.scale_dtype != dtype:
        attributes["dtype"] = dtype
    row = "dequantize" if q.clusters is None else "dequantize_split"
    return rewriter.insert(
        row, operands, attributes, before=before, names=[f"{name}.dequantized"], source=source
    ).result


def _regrouped(rewriter: Rewriter, q: QTensor, name: str, before: Node, source: str, dtype: str) -> Value:
    assert q.group_index is not None and q.axis is not None
    order = np.argsort(q.group_index, kind="stable")
    grouped = replace(q, codes=np.take(q.codes, order, q.axis), group_index=None)
    if q.clusters is not None:
        grouped = replace(grouped, clusters=np.take(q.clusters, order, q.axis))
    made = insert_dequantize(rewriter, grouped, f"{name}.grouped", before=before, source=source, dtype=dtype)
    index = rewriter.constant(Constant.of(np.argsort(order)), f"{name}.order")
    names = [f"{name}.dequantized"]
    return rewriter.insert("gather", [made, index], {"axis": q.axis}, before=before, names=names, source=source).result


def qtensor_of(value: Value | None) -> QTensor | None:
    """The quantised tensor whose numbers a value is: read back from what `insert_dequantize` writes; None: it is none.

    A scale or zero point that is computed at run time makes it none.
    """
    node = value.producer if value is not None else None
    if node is None:
        return None
    if node.op.name == "gather":
        return _with_group_index(node)
    if node.op.name not in ("dequantize", "dequantize_split"):
        return None
    split = node.op.name == "dequantize_split"
    if split and node.attributes.get("index") is not None:
        return None
    codes, zero = node.operand(0), node.operand(3 if split else 2)
    scale, ids = node.operand(2 if split else 1), node.operand(1) if split else None
    if codes is None or codes.constant is None or codes.dtype is None or codes.dtype in WIDE_FLOATS or scale is None:
        return None
    if any(v is not None and v.constant is None for v in (zero, ids)):
        return None
    global_scale: float | None = None
    if scale.constant is None:  # two levels
        made = scale.producer
        levels = made.operands[:2] if made is not None and made.op.name == "dequantize" else []
        if len(levels) < 2 or any(v is None or v.constant is None for v in levels):
            return None
        if made is None or made.operand(2) is not None or levels[1].rank != 0:  # type: ignore[union-attr]
            return None
        scale, outer = levels
        assert scale is not None and outer is not None and outer.constant is not None
        global_scale = float(outer.constant.wide())
    assert scale.constant is not None and scale.dtype is not None
    axis, block = node.attributes.get("axis"), node.attributes.get("block")
    return QTensor(
        codes.constant.array(),
        codes.dtype,
        None if axis is None else int(axis) % len(codes.constant.shape),  # type: ignore[arg-type]
        None if block is None else int(block),  # type: ignore[arg-type]
        scale.constant.wide(),
        scale.dtype,
        None if zero is None or zero.constant is None else zero.constant.array().astype(np.float64),
        zero_is_float=zero is not None and zero.dtype in WIDE_FLOATS,
        global_scale=global_scale,
        clusters=None if ids is None or ids.constant is None else ids.constant.array().astype(np.uint8),
    )


def _with_group_index(node: Node) -> QTensor | None:
    """The tensor whose grouped columns a gather puts back in order."""
    held, index = qtensor_of(node.operands[0]), node.operand(1)
    if held is None or held.block is None or held.group_index is not None or index is None or index.constant is None:
        return None
    positions = index.constant.array()
    if positions.ndim != 1 or node.attributes.get("axis", 0) != held.axis:
        return None
    assert held.axis is not None
    if not np.array_equal(np.sort(positions), np.arange(held.codes.shape[held.axis])):
        return None
    codes = np.take(held.codes, positions, held.axis)
    ids = None if held.clusters is None else np.take(held.clusters, positions, held.axis)
    return replace(held, codes=codes, clusters=ids, group_index=positions.astype(np.int64) // held.block)


def by_columns(node: Node) -> bool:
    """True if the weight of a linear, gemm or matmul is stored as [inputs, outputs]; a kernel never is."""
    match node.op.name:
        case "linear":
            return bool(node.attributes.get("transposed", False))
        case "conv" | "conv_transpose":
            return False
        case _:
            return not node.attributes.get("trans_b", False)


def weight_of(node: Node) -> QTensor | None:
    """The quantised weight of a linear or gemm as [outputs, inputs]; None if it is not quantised."""
    q = qtensor_of(node.operand(1))
    if q is None or len(q.shape) != 2:
        return None
    return q.transposed() if by_columns(node) else q
