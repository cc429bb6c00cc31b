"""Quantisation: rounding to codes and back, with the arithmetic of ONNX.

    quantize          c = clamp(round(x / scale) + zero)                  (ties to even; floats: the nearest element)
    dynamic_quantize  the same with scale and zero taken from x: one pair for the tensor, for each row or each block
    dequantize        y = (c - zero) * scale
    dequantize_split  y = (c - zero[k]) * scale[k]                        k: the cluster of each element

`axis` says where a vector of scales lies; None means that scale and zero broadcast against x (a scalar, or one
scale per row with a trailing 1). With `block`, scale and zero have the rank of x and one element for each `block`
consecutive ones on `axis` (the last block may be shorter). The two of `dequantize_split` have a leading axis of
clusters; with `index` the result is 0 where an element is of another cluster, so that the sum over all `index` is
the whole. Scales may be f8e8m0 or f8e4m3fn: `dtype` then says what the result is (f32 by default). The codes of
`dequantize_split` may be a wide float: with scales of 1 it splits a tensor that is not quantised yet.

`dynamic_quantize` takes its ranges from x: [min, max]; symmetric, max |x|, with a zero point in the middle of an
unsigned dtype; or with `floor` c > 0, [-c, max], for what hardly falls below zero: scale = c / zero exactly, so
that the codes stand for x + c without a zero point. `scale` is the dtype of the scales (None: that of x): f8e8m0 for
powers of two by `rule` (`planish.ir.formats`), f8e4m3fn for scales beside one of the whole tensor, the second
operand (1 if it is absent): the reader multiplies the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planish.ir.graph import Node, Value
from planish.ir.ops import register
from planish.ir.ops.base import Act, Axes, Block, Carry, Link, OpDef, Param, Port, Relation, Wide
from planish.ir.ops.codes import RANGES, from_clusters, from_codes, to_codes, to_codes_by_format, to_codes_by_range
from planish.ir.types import UNKNOWN, WIDE_FLOATS, Dim, TensorType, Type

__all__ = ["RANGES", "ROUNDS", "from_clusters", "from_codes", "to_codes", "to_codes_by_format", "to_codes_by_range"]

ROUNDS = Block("rounds to codes: a transform would change what is rounded")


def _integer(node: Node, name: str) -> int | None:
    held = node.attributes.get(name)
    assert held is None or isinstance(held, int)
    return held


def _axis(node: Node) -> int | None:
    return _integer(node, "axis")


def result_dtype(node: Node, scale: Value | None) -> str:
    """The dtype of a dequantised value: what the node says, else that of its scale, f32 for a narrow one."""
    own = node.attributes.get("dtype")
    if isinstance(own, str):
        return own
    return scale.dtype if scale is not None and scale.dtype in WIDE_FLOATS else "f32"


def _quantize(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, scale, zero = (*operands, None)[:3]
    dtype = str(node.attributes.get("dtype", "u8"))
    return (to_codes(x, scale, zero, dtype, _axis(node), _integer(node, "block"), wide.of(dtype)),)


def _quantize_infer(node: Node) -> Sequence[Type]:
    x = node.operand(0)
    shape = x.shape if x is not None else None
    return (TensorType(str(node.attributes.get("dtype", "u8")), shape),)


def by_format(node: Node) -> bool:
    """True for a `dynamic_quantize` that says more than how a uint8 range is taken."""
    own = node.attributes
    plain = own.get("dtype", "u8") == "u8" and own.get("granularity", "tensor") in ("tensor", "token")
    return not plain or own.get("scale") is not None or own.get("rule") is not None


def _dynamic(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, outer = (*operands, None)[:2]
    own, floor = node.attributes, node.attributes.get("floor")
    granularity, symmetric = str(own.get("granularity", "tensor")), bool(own.get("symmetric", False))
    if not by_format(node):
        return to_codes_by_range(x, granularity, symmetric, floor if isinstance(floor, float) else None)
    dtype, scale, rule = str(own.get("dtype", "u8")), own.get("scale"), own.get("rule")
    return to_codes_by_format(
        x,
        outer,
        dtype,
        granularity,
        _integer(node, "block"),
        None if scale is None else str(scale),
        None if rule is None else str(rule),
        symmetric,
        wide.of(dtype),
        None if scale is None else wide.of(str(scale)),
    )


def _dynamic_infer(node: Node) -> Sequence[Type]:
    own, x = node.attributes, node.operand(0)
    dtype, scale, block = str(own.get("dtype", "u8")), own.get("scale"), _integer(node, "block")
    if x is None or not isinstance(x.type, TensorType):
        return (TensorType(dtype), UNKNOWN if scale is None else TensorType(str(scale)), TensorType(dtype))
    rows: tuple[Dim, ...] | None = ()
    granularity, shape = own.get("granularity", "tensor"), x.type.shape
    if granularity != "tensor":
        last: Dim = 1
        if granularity == "group" and shape:
            last = -(-shape[-1] // block) if isinstance(shape[-1], int) and block else None
        rows = None if shape is None else (*shape[:-1], last)
    kind = x.type.dtype if scale is None else str(scale)
    return (TensorType(dtype, shape), TensorType(kind, rows), TensorType(dtype, rows))


def _dequantize(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    codes, scale, zero = (*operands, None)[:3]
    target = wide.of(result_dtype(node, node.operand(1)))
    return (from_codes(codes, scale, zero, _axis(node), _integer(node, "block"), target),)


def _split(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    codes, ids, scale, zero = (*operands, None)[:4]
    target = wide.of(result_dtype(node, node.operand(2)))
    block, index = _integer(node, "block"), _integer(node, "index")
    return (from_clusters(codes, ids, scale, zero, _axis(node), block, index, target),)


def _dequantize_infer(node: Node) -> Sequence[Type]:
    codes = node.operand(0)
    scale = node.operand(2 if node.op.name == "dequantize_split" else 1)
    return (TensorType(result_dtype(node, scale), codes.shape if codes is not None else None),)


def _quantize_relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    return ROUNDS


def _scale_axes(node: Node, port: Port, axes: Axes) -> Axes | None:
    """The axes of the scales (operand `port`) on which each of these axes of the codes has a scale of its own."""
    codes, scale, axis = node.operand(0), node.operand(port), _axis(node)
    if codes is None or scale is None or codes.shape is None or scale.shape is None:
        return None
    lead, rank = port - 1, len(codes.shape)  # a split has a leading axis of clusters
    found = []
    for a in axes:
        if axis is None:
            there = a - rank + len(scale.shape)
        elif node.attributes.get("block") is None:
            there = lead if a == axis % rank and len(scale.shape) == 1 + lead else -1
        else:
            there = a + lead if a != axis % rank else -1
        if there < lead or not isinstance(codes.shape[a], int) or scale.shape[there] != codes.shape[a]:
            return None
        found.append(there)
    return tuple(found)


def _dequantize_relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    """A scale of the result is a scale of the scales."""
    at = 2 if node.op.name == "dequantize_split" else 1
    codes, scale = node.operand(0), node.operand(at)
    if act is Act.SCALE and codes is not None and codes.shape is not None and scale is not None:
        if scale.dtype not in WIDE_FLOATS:
            return Block(f"its scales are rounded to {scale.dtype}")
        if port == -1:
            there = _scale_axes(node, at, axes)
            if there is not None:
                return Carry((Link(at, there),))
            if at == 1 and scale.rank == 0 and node.operand(2) is None and len(axes) == 1 and scale.is_constant:
                shape = [1] * len(codes.shape)
                dim = codes.shape[axes[0]]
                if isinstance(dim, int):
                    shape[axes[0]] = dim
                    return Carry((Link(1, axes, grow=tuple(shape)),))
        if port == at:
            for there in ((a,) for a in range(len(codes.shape))):
                if _scale_axes(node, at, there) == axes:
                    return Carry((Link(-1, there),))
    return Block("its codes are rounded: only a scale of its scales can be taken up")


def _channels(node: Node) -> Sequence[tuple[Port, Axes]]:
    codes, axis = node.operand(0), _axis(node)
    if codes is None or codes.rank is None or axis is None:
        return ()
    axis %= codes.rank
    if node.attributes.get("block") is None:
        return [(-1, (axis,))]
    return [(-1, (a,)) for a in range(codes.rank) if a != axis]


_CONSERVATIVE = {
    "permute": "passes if codes and scales are permuted; weights are quantised last",
    "rotate": "never: codes are rounded", "linear": "never: codes are rounded",
    "shift": "a zero point could take a multiple of the scale",
    "scale": "zero points, scalar scales and scales of narrow dtypes",
}  # fmt: skip
register(
    OpDef(
        "quantize", (Param("x"), Param("scale"), Param("zero", optional=True)), _quantize_infer, _quantize,
        _quantize_relate, attributes={"dtype": "u8", "axis": None, "block": None}, family="quantization",
        summary="c = clamp(round(x / scale) + zero); floats: the nearest element",
        conservative={"permute": "passes where the scale does not vary; nothing needs it yet"},
    )
)  # fmt: skip
register(
    OpDef(
        "dynamic_quantize", (Param("x"), Param("global_scale", optional=True)), _dynamic_infer, _dynamic,
        _quantize_relate, attributes={"granularity": "tensor", "block": None, "dtype": "u8", "symmetric": False,
                                      "floor": None, "scale": None, "rule": None}, family="quantization",
        summary="codes, scale, zero from the range of x: of the tensor, of each row, of each block of the last axis",
        conservative={
            "permute": "passes but for rows; nothing needs it yet",
            "scale": "a factor for a whole row goes into the row's scale; nothing needs it yet",
        },
    )
)  # fmt: skip
register(
    OpDef(
        "dequantize", (Param("codes"), Param("scale"), Param("zero", optional=True)), _dequantize_infer, _dequantize,
        _dequantize_relate, _channels, attributes={"axis": None, "block": None, "dtype": None},
        family="quantization", summary="y = (c - zero) * scale", conservative=_CONSERVATIVE,
    )
)  # fmt: skip
register(
    OpDef(
        "dequantize_split", (Param("codes"), Param("clusters"), Param("scale"), Param("zero", optional=True)),
        _dequantize_infer, _split, _dequantize_relate, _channels,
        attributes={"axis": None, "block": None, "index": None, "dtype": None}, family="quantization",
        summary="y = (c - zero[k]) * scale[k], k the cluster of each element; 0 where k is not `index`",
        conservative=_CONSERVATIVE,
    )
)  # fmt: skip
