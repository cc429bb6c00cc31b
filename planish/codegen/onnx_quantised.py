"""How quantisation is written in standard ONNX.

quantize          QuantizeLinear
dequantize        DequantizeLinear; Cast, Sub, Mul where the scale is one per row
dynamic_quantize  DynamicQuantizeLinear; per row: codes = clip(round(x / s) + 128), s = max |row| / 127;
                  with a floor: see `_floored`
"""

from __future__ import annotations

import numpy as np

from planish.codegen.onnx_emission import AXIS_OPSET, Emission, emitter
from planish.ir.constant import Constant
from planish.ir.graph import Attribute, Node
from planish.ir.types import onnx_enum


def _axis(node: Node, e: Emission) -> Attribute:
    axis = node.attributes.get("axis")
    if axis is not None and e.opset < AXIS_OPSET:
        raise e.fail(node, "a scale per channel is not possible")
    return axis


@emitter("quantize")
def _quantize(node: Node, e: Emission) -> None:
    axis = _axis(node, e)
    dtype = str(node.attributes.get("dtype", "u8"))
    operands = [e.name(v) for v in node.operands]
    if len(operands) < 3:
        scale = node.operands[1]
        shape = tuple(int(d) for d in scale.shape or ()) if scale is not None else ()  # type: ignore[arg-type]
        operands.append(e.weight(Constant(np.zeros(shape, np.float64), dtype, shape), "zero"))
    e.add("QuantizeLinear", operands, e.outputs(node), axis=axis)


@emitter("dequantize")
def _dequantize(node: Node, e: Emission) -> None:
    axis, scale = _axis(node, e), node.operands[1]
    assert scale is not None
    operands = [e.name(v) for v in node.operands]
    if axis is not None or scale.rank == 0:
        e.add("DequantizeLinear", operands, e.outputs(node), axis=axis)
        return
    to = onnx_enum(scale.dtype or "f32")
    wide = e.add("Cast", [operands[0]], to=to)
    if len(operands) > 2:
        wide = e.add("Sub", [wide, e.add("Cast", [operands[2]], to=to)])
    e.add("Mul", [wide, operands[1]], e.outputs(node))


@emitter("dynamic_quantize")
def _dynamic_quantize(node: Node, e: Emission) -> None:
    x = node.operands[0]
    assert x is not None
    symmetric = bool(node.attributes.get("symmetric", False))
    token = node.attributes.get("granularity", "tensor") == "token"
    floor = node.attributes.get("floor")
    if isinstance(floor, float):
        _floored(node, e, floor, token)
        return
    if not token and not symmetric:
        e.add("DynamicQuantizeLinear", [e.name(x)], e.outputs(node))
        return
    if not symmetric:
        raise e.fail(node, "an asymmetric range per row has no form")
    codes, scale, zero = e.outputs(node)
    axes = (-1,) if token else None
    high = e.reduce("ReduceMax", e.name(x), axes, token)
    low = e.reduce("ReduceMin", e.name(x), axes, token)
    largest = e.add("Max", [high, e.add("Neg", [low]), e.scalar(1e-30, x)])
    e.add("Mul", [largest, e.scalar(1.0 / 127.0, x)], scale)
    rounded = e.add("Round", [e.add("Div", [e.name(x), scale])])
    shifted = e.add("Add", [rounded, e.scalar(128.0, x)])
    clipped = e.add("Clip", [shifted, e.scalar(0.0, x), e.scalar(255.0, x)])
    e.add("Cast", [clipped], codes, to=onnx_enum("u8"))
    half = e.weight(Constant.of(np.array([128], np.uint8)), "zero")
    e.add("Expand", [half, e.add("Shape", [scale])], zero)


def _floored(node: Node, e: Emission, floor: float, token: bool) -> None:
    """The range [-floor, max]: zero = floor(255 floor / (max + floor)), scale = floor / zero."""
    x = node.operands[0]
    assert x is not None
    codes, scale, zero = e.outputs(node)
    high = e.add("Max", [e.reduce("ReduceMax", e.name(x), (-1,) if token else None, token), e.scalar(0.0, x)])
    room = e.add("Add", [high, e.scalar(floor, x)])
    steps = e.add("Floor", [e.add("Div", [e.scalar(255.0 * floor, x), room])])
    steps = e.add("Max", [steps, e.scalar(1.0, x)])
    e.add("Div", [e.scalar(floor, x), steps], scale)
    shifted = e.add("Add", [e.add("Round", [e.add("Div", [e.name(x), scale])]), steps])
    clipped = e.add("Clip", [shifted, e.scalar(0.0, x), e.scalar(255.0, x)])
    e.add("Cast", [clipped], codes, to=onnx_enum("u8"))
    e.add("Cast", [steps], zero, to=onnx_enum("u8"))
