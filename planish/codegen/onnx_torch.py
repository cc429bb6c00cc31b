"""How torch ops without a row are written for ONNX, where standard operators say the same.

argmax, argmin       ArgMax, ArgMin: the first place of several; over the whole tensor after a Reshape
max.dim, min.dim     ReduceMax and ArgMax, ReduceMin and ArgMin

What these operators do not take (bool, 16-bit floats) goes through a wider dtype, which keeps the order.
"""

from __future__ import annotations

from planish.codegen.onnx_emission import Emission, emitter
from planish.ir.graph import Node
from planish.ir.types import onnx_enum

_WIDER = {"bool": "i32", "f16": "f32", "bf16": "f32"}
_KINDS = {"max": "ReduceMax", "min": "ReduceMin"}


def _operand(node: Node, e: Emission) -> tuple[str, str | None]:
    """The operand in a dtype that is compared in, and the dtype that it was cast from."""
    x = node.operands[0]
    assert x is not None
    wider = _WIDER.get(x.dtype or "")
    return (e.name(x), None) if wider is None else (e.add("Cast", [e.name(x)], to=onnx_enum(wider)), x.dtype)


def _axis(node: Node, e: Emission) -> int | None:
    """The axis, None for the whole tensor."""
    x, axis = node.operands[0], node.attributes.get("dim")
    if x is None or not x.rank:
        raise e.fail(node, "a scalar or an unknown rank is not possible")
    return axis % x.rank if isinstance(axis, int) else None


@emitter("torch::aten.argmax.default", "torch::aten.argmin.default")
def _place(node: Node, e: Emission) -> None:
    x, axis = _operand(node, e)[0], _axis(node, e)
    keep = bool(node.attributes.get("keepdim", False))
    if axis is None:
        if keep:
            raise e.fail(node, "dims kept over the whole tensor are not possible")
        x, axis = e.add("Reshape", [x, e.ints((-1,), "whole")]), 0
    e.add("ArgMax" if "argmax" in node.op.name else "ArgMin", [x], e.outputs(node), axis=axis, keepdims=int(keep))


@emitter("torch::aten.max.dim", "torch::aten.min.dim")
def _extreme(node: Node, e: Emission) -> None:
    (x, narrow), axis = _operand(node, e), _axis(node, e)
    assert axis is not None
    keep = bool(node.attributes.get("keepdim", False))
    kind = "max" if "max" in node.op.name else "min"
    values, places = e.outputs(node)
    reduced = e.reduce(_KINDS[kind], x, (axis,), keep, None if narrow else [values])
    if narrow:
        e.add("Cast", [reduced], [values], to=onnx_enum(narrow))
    e.add("ArgMax" if kind == "max" else "ArgMin", [x], [places], axis=axis, keepdims=int(keep))
