"""Quantised linears on the integer matrix product: uint8 activations times int8 weights.

    y = (c_x - z_x) (c_w - z_w)^T d_x d_w + b            com.microsoft::MatMulIntegerToFloat

The weight has one scale for each output. Codes of less than 8 bits are stored as int4 and cast: the session folds the
cast when it loads the model, so that a 4-bit file runs at the speed of 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from planish.codegen.onnx_emission import CONTRIB
from planish.codegen.ort_rows import Rows, quantise_rows
from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.qnodes import weight_of
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.types import TensorType, bits, is_float, numpy_dtype

Form = Literal["auto", "decode", "prefill"]


def source_of(value: Value | None) -> Node | None:
    """The node that makes a value, or None."""
    return value.producer if value is not None else None


def contrib(name: str) -> tuple[str, dict[str, int]]:
    """An operator of ONNX Runtime's own domain, and the attributes that every node of it has."""
    return f"{CONTRIB}::{name}", {"onnx_opset": 1}


@dataclass(frozen=True)
class _Weight:
    """A weight for the integer product: codes int8 [K, N], scale f32 [N], zero int8 [N] or None."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    width: int  # bits of a code

    def sums(self) -> np.ndarray:
        """The sum of each output's numbers, [1, N]."""
        wide = self.codes.astype(np.float64) - (0.0 if self.zero is None else self.zero)
        total: np.ndarray = wide.sum(0, keepdims=True) * self.scale
        return total


def _weight(node: Node) -> _Weight | None:
    """The quantised weight of a linear, if it has integer codes under one scale for each output."""
    q = weight_of(node)
    if q is None or is_float(q.element) or q.clusters is not None or q.group_index is not None:
        return None
    if q.block is not None or q.axis not in (0, None) or q.zero_is_float or q.global_scale is not None:
        return None
    outputs, shift = q.shape[0], 0 if q.element.startswith("i") else 1 << (bits(q.element) - 1)

    def vector(held: np.ndarray) -> np.ndarray:
        return np.broadcast_to(held.reshape(-1), (outputs,)).copy()

    codes = (q.codes.astype(np.int16) - shift).astype(np.int8)
    zero = None
    if q.zero is not None or shift:
        zero = vector(np.zeros(1) if q.zero is None else q.zero).astype(np.int16) - shift
        zero = zero.astype(np.int8) if zero.any() else None
    return _Weight(np.ascontiguousarray(codes.T), vector(q.scale), zero, bits(q.element))


def _held(
    weight: _Weight, name: str, node: Node, rewriter: Rewriter, narrow: bool
) -> tuple[Value, Value, Value | None]:
    """Codes as int8 [K, N], scales and zero points in the graph."""
    if weight.width == 8 or not narrow:
        codes = rewriter.constant(Constant.of(weight.codes), f"{name}.codes")
    else:
        small = rewriter.constant(Constant.of(weight.codes.astype(numpy_dtype("i4"))), f"{name}.codes")
        codes = rewriter.insert("cast", [small], {"to": "i8"}, before=node, source=node.source).result
    scale = rewriter.constant(Constant(weight.scale, "f32", weight.scale.shape), f"{name}.scale")
    zero = None if weight.zero is None else rewriter.constant(Constant.of(weight.zero), f"{name}.zero")
    return codes, scale, zero


def single_row(node: Node) -> bool:
    """True if a linear is known to read one row at a time."""
    x = node.operands[0]
    return x is not None and x.shape is not None and all(d == 1 for d in x.shape[:-1])


def integer_linear(
    node: Node, rewriter: Rewriter, rows: dict[Value, Rows], form: Form = "auto", *, narrow: bool = True
) -> bool:
    """Rewrite a linear of uint8 activations; False if it is none, or the form is for another kernel.

    Args:
        rows: the values that are quantised per row already.
        form: of weights of less than 8 bits.
        narrow: whether the opset has int4.

    Raises:
        Declined: its activation is quantised in a way that the product does not take.
    """
    activation = source_of(node.operand(0))
    if activation is None or activation.op.name != "dequantize":
        return False
    weight = _weight(node)
    if weight is None:
        if form == "prefill" and weight_of(node) is not None:
            raise Declined("its weight has not one scale for each output: no integer product", node)
        return False
    if weight.width < 8 and (form == "decode" or (form == "auto" and single_row(node))):
        return False
    codes, scale, zero = (activation.operand(i) for i in range(3))
    if codes is None or scale is None or codes.dtype != "u8":
        raise Declined("its activation codes are not uint8: no fast kernel", node)
    dynamic = codes.producer
    granularity = dynamic.attributes.get("granularity") if dynamic is not None else None
    if granularity == "group" or (granularity != "token" and scale.rank != 0):
        raise Declined("its activation has a vector of scales: no fast kernel", node)
    held, weight_scale, weight_zero = _held(weight, node.result.name, node, rewriter, narrow)
    op, attributes = contrib("MatMulIntegerToFloat")
    if granularity != "token":
        operands = [codes, held, scale, weight_scale, zero, weight_zero, node.operand(2)]
        types, names = [node.result.type], [node.result.name]
        made = rewriter.insert(op, operands, attributes, before=node, types=types, names=names, source=node.source)
        rewriter.replace_node(node, made.result)
        return True
    assert dynamic is not None
    x = dynamic.operands[0]
    assert x is not None
    if x not in rows:
        rows[x] = quantise_rows(x, dynamic, rewriter)
    flat = rows[x]
    one = rewriter.constant(Constant.of(np.float32(1.0)), "one")
    half = rewriter.constant(Constant.of(np.uint8(flat.zero)), "zero")
    outputs = weight.codes.shape[1]
    flat_type = TensorType("f32", (None, outputs))
    operands = [flat.codes, held, one, weight_scale, half, weight_zero]
    product = rewriter.insert(op, operands, attributes, before=node, types=[flat_type], source=node.source).result
    scaled = rewriter.insert("mul", [product, flat.scale], before=node, types=[flat_type], source=node.source).result
    bias = _row_bias(node, rewriter, weight, flat.offset)
    if bias is not None:
        scaled = rewriter.insert("add", [scaled, bias], before=node, types=[flat_type], source=node.source).result
    last = rewriter.constant(Constant.of(np.array([outputs], np.int64)), "last")
    dims = rewriter.insert("concat", [flat.dims, last], {"axis": 0}, before=node, source=node.source).result
    back = rewriter.insert("reshape", [scaled, dims], before=node, types=[node.result.type], source=node.source)
    rewriter.replace_node(node, back.result)
    return True


def _row_bias(node: Node, rewriter: Rewriter, weight: _Weight, offset: float) -> Value | None:
    """The bias as [1, N], with what the offset of the codes adds to each output."""
    bias = node.operand(2)
    if bias is not None and not bias.is_constant:
        if offset:
            raise Declined("its bias is not a constant", node)
        return bias
    if bias is None and not offset:
        return None
    matrix = bias.constant.wide().reshape(1, -1) if bias is not None and bias.constant is not None else 0.0
    if offset:
        matrix = matrix + offset * weight.sums()
    assert isinstance(matrix, np.ndarray)
    name = bias.name if bias is not None else f"{node.result.name}.bias"
    return rewriter.constant(Constant(matrix, "f32", matrix.shape), name)
