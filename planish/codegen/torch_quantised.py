"""What generated torch code calls to round to integer codes and back, with the arithmetic of ONNX."""

from __future__ import annotations

import torch

from planish.ir.ops.quantization import RANGES


def _along(vector: torch.Tensor, rank: int, axis: int | None) -> torch.Tensor:
    if axis is None or vector.dim() == 0:
        return vector
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)


def _codes(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: str) -> torch.Tensor:
    low, high = RANGES[dtype]
    codes = torch.round(x / scale)
    if zero is not None:
        codes = codes + zero.to(codes.dtype)
    held = {"u4": torch.uint8, "i4": torch.int8, "u8": torch.uint8, "i8": torch.int8, "u16": torch.uint16}
    return codes.clamp(low, high).to(held.get(dtype) or {"i16": torch.int16, "i32": torch.int32}[dtype])


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: str, axis: int | None
) -> torch.Tensor:
    """clamp(round(x / scale) + zero), ties to even."""
    shaped = None if zero is None else _along(zero, x.dim(), axis)
    return _codes(x, _along(scale.to(x.dtype), x.dim(), axis), shaped, dtype)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, axis: int | None) -> torch.Tensor:
    """(codes - zero) * scale"""
    x = codes.to(scale.dtype)
    if zero is not None:
        x = x - _along(zero.to(scale.dtype), x.dim(), axis)
    return x * _along(scale, x.dim(), axis)


def dynamic_quantize(
    x: torch.Tensor, granularity: str, symmetric: bool, floor: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 codes, scale and zero point from the range of x: of the tensor, or of each row ("token")."""
    rows = granularity == "token"
    low = x.amin(-1, keepdim=True) if rows else x.amin()
    high = x.amax(-1, keepdim=True) if rows else x.amax()
    if floor is not None:
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
