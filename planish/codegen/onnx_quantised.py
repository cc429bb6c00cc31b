"""How quantisation is written in standard ONNX.

quantize          QuantizeLinear; Div, Round, Add, Clip where the scales broadcast or the dtype is too narrow
dequantize        DequantizeLinear, with `block_size` for a scale per block; Cast, Sub, Mul where the scale is one
                  per row, the zero point a float, the codes are looked up (`planish.codegen.onnx_codes`), or a
                  product with a float weight reads it
dequantize_split  the same for each cluster, and Where(cluster = k) between them
dynamic_quantize  DynamicQuantizeLinear; per row: codes = clip(round(x / s) + 128), s = max |row| / 127;
                  with a floor: see `_floored`; all else: `planish.codegen.onnx_dynamic`

The opset of a model is raised to the first that has the dtypes and blocks of its nodes; an opset that was asked for
is kept, and what it lacks is computed another way.
"""

from __future__ import annotations

import numpy as np

from planish.codegen.onnx_codes import (
    BLOCK_OPSET,
    check_public,
    codes_of,
    dim_of,
    held,
    native,
    number,
    round_float,
    scale_of,
    spread,
)
from planish.codegen.onnx_dynamic import by_extremes
from planish.codegen.onnx_emission import AXIS_OPSET, Emission, emitter
from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.ops.codes import RANGES
from planish.ir.ops.quantization import by_format, result_dtype
from planish.ir.types import WIDE_FLOATS, Shape, bits, is_float, numpy_dtype, onnx_enum

_MOVES = ("reshape", "transpose", "squeeze", "unsqueeze", "flatten", "identity")


def _layout(node: Node, e: Emission) -> tuple[int | None, int | None]:
    """The axis and the block of a node."""
    axis, block = node.attributes.get("axis"), node.attributes.get("block")
    if axis is not None and e.opset < AXIS_OPSET:
        raise e.fail(node, "a scale per channel is not possible")
    assert axis is None or isinstance(axis, int)
    assert block is None or isinstance(block, int)
    return axis, block


def _fits(e: Emission, axis: int | None, block: int | None, shape: Shape) -> bool:
    """True if the operators of the opset read scales of that shape that lie so."""
    if block is not None:  # ONNX Runtime has no blocks of a vector
        return e.opset >= BLOCK_OPSET and shape is not None and len(shape) > 1
    return axis is not None or shape in ((), (1,))


_PRODUCTS = frozenset({"linear", "gemm", "matmul", "conv", "conv_transpose"})


def _is_clipped(x: Value) -> bool:
    """True if a value comes from a Clip, whatever moves its elements on the way."""
    node = x.producer
    while node is not None and node.op.name in _MOVES and node.operands[0] is not None:
        node = node.operands[0].producer
    return node is not None and node.op.name == "clip"


@emitter("quantize")
def _quantize(node: Node, e: Emission) -> None:
    (axis, block), (x, scale) = _layout(node, e), node.operands[:2]
    dtype, zero = str(node.attributes.get("dtype", "u8")), node.operand(2)
    assert x is not None and scale is not None
    check_public(node, e)
    factor = scale_of(e, scale, x.dtype or "f32")
    # what ONNX Runtime's optimiser would spoil: it drops a Relu in front of fp8, and fails at a Clip in front of int4
    hidden = e.opset < BLOCK_OPSET if is_float(dtype) else bits(dtype) < 8 and _is_clipped(x)
    if native(e, dtype) and _fits(e, axis, block, scale.shape) and not hidden:
        operands, own = [e.name(x), factor], None
        if zero is not None:
            operands.append(codes_of(node, e, zero)[0])
        elif block is not None or (is_float(dtype) and e.opset >= BLOCK_OPSET):
            own = onnx_enum(dtype)
        else:
            shape = tuple(int(d) for d in scale.shape or ())  # type: ignore[arg-type]
            operands.append(e.weight(Constant(np.zeros(shape, numpy_dtype(dtype)), dtype, shape), "zero"))
        e.add("QuantizeLinear", operands, e.outputs(node), axis=axis, block_size=block, output_dtype=own)
        return
    ratio = e.add("Div", [e.name(x), spread(node, e, factor, scale, x, axis, block)])
    if is_float(dtype):
        wide = ratio if x.dtype == "f32" else e.add("Cast", [ratio], to=onnx_enum("f32"))
        round_float(e, wide, dtype, e.outputs(node))
        return
    codes = e.add("Round", [ratio])
    if zero is not None:
        offset = e.add("Cast", [codes_of(node, e, zero)[0]], to=onnx_enum(x.dtype or "f32"))
        codes = e.add("Add", [codes, spread(node, e, offset, zero, x, axis, block)])
    low, high = RANGES[dtype]
    codes = e.add("Clip", [codes, e.scalar(low, x), e.scalar(high, x)])
    e.add("Cast", [codes], e.outputs(node), to=onnx_enum(held(e, dtype)))


@emitter("dequantize")
def _dequantize(node: Node, e: Emission) -> None:
    codes, scale, zero = node.operands[0], node.operands[1], node.operand(2)
    assert codes is not None and scale is not None
    _numbers(node, e, codes, codes_of(node, e, codes), scale, zero, e.outputs(node), hidden=_beside_float(node))


def _beside_float(node: Node) -> bool:
    """True if a product with a float weight reads the result: ONNX Runtime's optimiser would quantise that weight."""
    readers = [n for n in node.result.users if n.op.name in _PRODUCTS and n.operands[0] is node.result]
    weights = [n.operand(1) for n in readers]
    return any(w is not None and w.is_constant and w.dtype in WIDE_FLOATS for w in weights)


def _numbers(
    node: Node,
    e: Emission,
    codes: Value,
    written: tuple[str, str],
    scale: Value,
    zero: Value | None,
    outputs: list[str] | None,
    cluster: int | None = None,
    hidden: bool = False,
) -> str:
    """(codes - zero) * scale; of one cluster, the scale and the zero point are rows of theirs.

    Args:
        written: the codes as the model has them: name and dtype.
        hidden: in arithmetic, not as DequantizeLinear.
    """
    (axis, block), lead = _layout(node, e), int(cluster is not None)
    dtype, shape = result_dtype(node, scale), None if scale.shape is None else scale.shape[lead:]
    factor = _row(e, scale_of(e, scale, dtype), scale, cluster)
    name, kind = written
    fits = kind not in WIDE_FLOATS and _fits(e, axis, block, shape) and not hidden
    if fits and (zero is None or zero.dtype not in WIDE_FLOATS):
        operands = [name, factor]
        if zero is not None:
            offset, offset_kind = codes_of(node, e, zero)
            offset = _row(e, offset, zero, cluster)
            if offset_kind != kind:
                offset = e.add("Cast", [offset], to=onnx_enum(kind))
            operands.append(offset)
        return e.add("DequantizeLinear", operands, outputs, axis=axis, block_size=block)
    wide = name if kind == dtype else e.add("Cast", [name], to=onnx_enum(dtype))
    if zero is not None:
        offset, offset_kind = codes_of(node, e, zero)
        offset = _row(e, offset, zero, cluster)
        if offset_kind != dtype:
            offset = e.add("Cast", [offset], to=onnx_enum(dtype))
        wide = e.add("Sub", [wide, spread(node, e, offset, zero, codes, axis, block, lead)])
    return e.add("Mul", [wide, spread(node, e, factor, scale, codes, axis, block, lead)], outputs)


def _row(e: Emission, name: str, value: Value, cluster: int | None) -> str:
    """The scales or zero points of one cluster."""
    if cluster is None:
        return name
    data = value.constant if value.is_constant and name == e.name(value) else None
    if data is None:
        return e.add("Gather", [name, e.weight(Constant.of(np.array(cluster, np.int64)), "cluster")], axis=0)
    array = data.wide() if data.dtype in WIDE_FLOATS else data.array()
    part = array[cluster]
    return e.weight(Constant(part, data.dtype, part.shape), f"{name}_{cluster}", key=(value, cluster))


@emitter("dequantize_split")
def _dequantize_split(node: Node, e: Emission) -> None:
    codes, ids, scale, zero = (*node.operands, None)[:4]
    assert codes is not None and ids is not None and scale is not None
    written, index = codes_of(node, e, codes), node.attributes.get("index")
    count = dim_of(scale, 0)
    if not isinstance(count, int):
        raise e.fail(node, "a number of clusters that is not known is not possible")
    held_ids, kind = codes_of(node, e, ids)
    cluster = held_ids if kind == "f32" else e.add("Cast", [held_ids], to=onnx_enum("f32"))

    def where(k: int, rest: str, outputs: list[str] | None) -> str:
        part = _numbers(node, e, codes, written, scale, zero, None, k)
        return e.add("Where", [e.add("Equal", [cluster, number(e, float(k))]), part, rest], outputs)

    if isinstance(index, int):
        kind = result_dtype(node, scale)
        where(index, e.weight(Constant(np.zeros(()), kind, ()), "scalar"), e.outputs(node))
        return
    last = count - 1
    made = _numbers(node, e, codes, written, scale, zero, None if last else e.outputs(node), 0)
    for k in range(1, count):
        made = where(k, made, e.outputs(node) if k == last else None)


@emitter("dynamic_quantize")
def _dynamic_quantize(node: Node, e: Emission) -> None:
    x = node.operands[0]
    assert x is not None
    symmetric = bool(node.attributes.get("symmetric", False))
    token = node.attributes.get("granularity", "tensor") == "token"
    floor = node.attributes.get("floor")
    if by_format(node) or (token and not symmetric and not isinstance(floor, float)):
        check_public(node, e)
        by_extremes(node, e)
        return
    if isinstance(floor, float):
        _floored(node, e, floor, token)
        return
    if not token and not symmetric:
        e.add("DynamicQuantizeLinear", [e.name(x)], e.outputs(node))
        return
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
