"""Quantisation: rounding to integer codes and back, with the arithmetic of ONNX.

    quantize          c = clamp(round(x / scale) + zero)                  (ties to even)
    dynamic_quantize  the same with scale and zero taken from x: one pair for the tensor or one per row
    dequantize        y = (c - zero) * scale

`dynamic_quantize` has three ranges: [min, max] of x; symmetric, max |x| with zero point 128; or with `floor`
c > 0, [-c, max], for what hardly falls below zero: scale = c / zero exactly, so that the codes stand for
x + c without a zero point.

`axis` says where a vector of scales lies; None means that scale and zero broadcast against x (a
scalar, or one scale per row with a trailing 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from planish.ir.graph import Node
from planish.ir.ops import register
from planish.ir.ops.base import Act, Axes, Block, Carry, Link, OpDef, Param, Port, Relation, Wide
from planish.ir.types import UNKNOWN, TensorType, Type

RANGES = {f"u{n}": (0, 2**n - 1) for n in (4, 8, 16)} | {
    f"i{n}": (-(2 ** (n - 1)), 2 ** (n - 1) - 1) for n in (4, 8, 16, 32)
}
ROUNDS = Block("rounds to codes: a transform would change what is rounded")


def _along(vector: torch.Tensor, rank: int, axis: int | None) -> torch.Tensor:
    """A scale or zero point shaped to broadcast against a tensor of that rank."""
    if axis is None or vector.ndim == 0:
        return vector
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)


def _axis(node: Node) -> int | None:
    axis = node.attributes.get("axis")
    assert axis is None or isinstance(axis, int)
    return axis


_HELD = {"u4": torch.uint8, "i4": torch.int8, "u8": torch.uint8, "i8": torch.int8, "u16": torch.uint16}
_HELD |= {"i16": torch.int16, "i32": torch.int32}


def _codes(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: str) -> torch.Tensor:
    low, high = RANGES[dtype]
    codes = torch.round(x / scale)
    if zero is not None:
        codes = codes + zero.to(codes.dtype)
    return codes.clamp(low, high).to(_HELD[dtype])


def to_codes(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: str, axis: int | None
) -> torch.Tensor:
    """clamp(round(x / scale) + zero), ties to even; 4-bit codes are held in 8 bits."""
    shaped = None if zero is None else _along(zero, x.ndim, axis)
    return _codes(x, _along(scale.to(x.dtype), x.ndim, axis), shaped, dtype)


def from_codes(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, axis: int | None) -> torch.Tensor:
    """(codes - zero) * scale, in the dtype of the scale."""
    x = codes.to(scale.dtype)
    if zero is not None:
        x = x - _along(zero.to(scale.dtype), x.ndim, axis)
    return x * _along(scale, x.ndim, axis)


def to_codes_by_range(
    x: torch.Tensor, granularity: str, symmetric: bool, floor: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 codes, scale and zero point from the range of x: of the tensor, or of each row ("token")."""
    if granularity == "token":
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    else:
        low, high = x.amin(), x.amax()
    if floor is not None:
        # the zero point is rounded down and the scale follows it, so that zero * scale is the floor exactly
        zero = torch.floor(255.0 * floor / (high.clamp(min=0.0) + floor)).clamp(min=1.0)
        return _codes(x, floor / zero, zero, "u8"), floor / zero, zero.to(torch.uint8)
    if symmetric:
        scale = torch.maximum(-low, high) / 127.0
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = torch.full_like(scale, 128.0)
    else:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = (high - low) / 255.0
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = torch.round(-low / scale).clamp(0, 255)
    return _codes(x, scale, zero, "u8"), scale, zero.to(torch.uint8)


def _quantize(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, scale, zero = (*operands, None)[:3]
    return (to_codes(x, scale, zero, str(node.attributes.get("dtype", "u8")), _axis(node)),)


def _quantize_infer(node: Node) -> Sequence[Type]:
    x = node.operand(0)
    shape = x.shape if x is not None else None
    return (TensorType(str(node.attributes.get("dtype", "u8")), shape),)


def _dynamic(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    own, floor = node.attributes, node.attributes.get("floor")
    granularity, symmetric = str(own.get("granularity", "tensor")), bool(own.get("symmetric", False))
    return to_codes_by_range(operands[0], granularity, symmetric, floor if isinstance(floor, float) else None)


def _dynamic_infer(node: Node) -> Sequence[Type]:
    x = node.operand(0)
    if x is None or not isinstance(x.type, TensorType):
        return (TensorType("u8"), UNKNOWN, TensorType("u8"))
    rows: tuple[int | str | None, ...] | None = ()
    if node.attributes.get("granularity", "tensor") == "token":
        rows = None if x.type.shape is None else (*x.type.shape[:-1], 1)
    return (TensorType("u8", x.type.shape), TensorType(x.type.dtype, rows), TensorType("u8", rows))


def _dequantize(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    codes, scale, zero = (*operands, None)[:3]
    return (from_codes(codes, scale, zero, _axis(node)),)


def _dequantize_infer(node: Node) -> Sequence[Type]:
    codes, scale = node.operand(0), node.operand(1)
    return (
        TensorType((scale.dtype if scale is not None else None) or "f32", codes.shape if codes is not None else None),
    )


def _quantize_relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    return ROUNDS


def _dequantize_relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    """A scale of the result is a scale of the scales."""
    codes, scale, axis = node.operand(0), node.operand(1), _axis(node)
    if port == -1 and act is Act.SCALE and codes is not None and scale is not None and codes.rank is not None:
        if axis is not None and axes == (axis % codes.rank,) and scale.rank == 1:
            return Carry((Link(1, (0,)),))
        if scale.rank == 0 and node.operand(2) is None and len(axes) == 1 and scale.is_constant:
            shape = [1] * codes.rank
            dim = codes.shape[axes[0]] if codes.shape is not None else None
            if isinstance(dim, int):
                shape[axes[0]] = dim
                return Carry((Link(1, axes, grow=tuple(shape)),))
    if (
        port == 1
        and act is Act.SCALE
        and scale is not None
        and scale.rank == 1
        and axis is not None
        and codes is not None
        and codes.rank
    ):
        return Carry((Link(-1, (axis % codes.rank,)),))
    return Block("its codes are integers: only a scale of its scales can be taken up")


def _channels(node: Node) -> Sequence[tuple[Port, Axes]]:
    codes, axis = node.operand(0), _axis(node)
    return [(-1, (axis % codes.rank,))] if codes is not None and codes.rank and axis is not None else ()


register(
    OpDef(
        "quantize", (Param("x"), Param("scale"), Param("zero", optional=True)), _quantize_infer, _quantize,
        _quantize_relate, attributes={"dtype": "u8", "axis": None}, family="quantization",
        summary="c = clamp(round(x / scale) + zero)",
        conservative={"permute": "passes where the scale does not vary; nothing needs it yet"},
    )
)  # fmt: skip
register(
    OpDef(
        "dynamic_quantize", (Param("x"),), _dynamic_infer, _dynamic, _quantize_relate,
        attributes={"granularity": "tensor", "symmetric": False, "floor": None}, family="quantization",
        summary="codes, scale, zero from the range of x: of the tensor, or of each row",
        conservative={
            "permute": "passes but for rows; nothing needs it yet",
            "scale": "a factor for a whole row goes into the row's scale; nothing needs it yet",
        },
    )
)  # fmt: skip
register(
    OpDef(
        "dequantize", (Param("codes"), Param("scale"), Param("zero", optional=True)), _dequantize_infer, _dequantize,
        _dequantize_relate, _channels, attributes={"axis": None}, family="quantization",
        summary="y = (c - zero) * scale",
        conservative={
            "permute": "passes if codes and scales are permuted; weights are quantised last",
            "rotate": "never: codes are integers", "linear": "never: codes are integers",
            "shift": "a zero point could take a multiple of the scale", "scale": "zero points and scalar scales",
        },
    )
)  # fmt: skip
