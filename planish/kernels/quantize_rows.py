"""Codes of whole rows with a scale, and perhaps a zero point, from the row's own range ("token").

    symmetric    scale = max |x| / levels                     code = round(x / scale)
    range        scale = (max - min) / levels                 zero = round(-min / scale), min <= 0 <= max
    floor        zero = max(1, floor(levels f / (max + f)))   scale = f / zero: for what hardly falls below -f

The formulas are those of `planish.ir.ops.codes`, in float32, but for three things. The row is multiplied by 1 / scale,
as a division of each element would cost more than all the rest: a ratio differs from the quotient by at most 3
roundings (relative 3 * 2^-24), a code by one, and only where the ratio lies that close to the middle between two. On a
GPU, Triton's division is within 2 units in the last place; the correctly rounded one is a subroutine, around which
registers spill. And a scale is at least the least normal float32. Unsigned codes are stored less -LOW, and so are
their zero points: u8 as -128 to 127. A row of zeros has scale 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from planish.kernels.rounding import clamp, code_of, round_even


@triton.jit
def token_scale(extreme, LEVELS: tl.constexpr):
    """The scale of rows whose range is `extreme` wide; 1 where they are all zero."""
    return tl.where(extreme == 0.0, 1.0, tl.maximum(extreme / LEVELS, 1.1754943508222875e-38))


@triton.jit
def token_codes(x, scale, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Codes int8 of rows [ROWS, WIDTH] by the scale [ROWS] of each."""
    return code_of(clamp(x * (1.0 / scale)[:, None], LOW, HIGH))


@triton.jit
def token_zero(low, scale, LEVELS: tl.constexpr, LOW: tl.constexpr):
    """The zero points [ROWS] of rows whose least element is `low` <= 0, less -LOW."""
    return clamp(round_even(-low / scale), 0.0, LEVELS) + LOW


@triton.jit
def floor_zero(high, FLOOR: tl.constexpr, LEVELS: tl.constexpr, LOW: tl.constexpr):
    """The zero points [ROWS] of rows from -FLOOR to `high`, less -LOW; torch divides a number by a tensor like this."""
    return tl.maximum(tl.floor(1.0 / (tl.maximum(high, 0.0) + FLOOR) * (LEVELS * FLOOR)), 1.0) + LOW


@triton.jit
def shifted_codes(x, scale, zero, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Codes int8 of rows [ROWS, WIDTH] by a scale and a zero point [ROWS] of each."""
    ratio = clamp(x * (1.0 / scale)[:, None], -1024.0, 1024.0)
    return code_of(clamp(round_even(ratio) + zero[:, None], LOW, HIGH))


def token_codes_reference(
    x: torch.Tensor, mode: str, levels: float, low: float, high: float, floor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [M, K] and zero points [M] as float32 integers, scales [M], of float32 x [M, K].

    Args:
        mode: "symmetric", "range" or "floor".
        low, high: the codes that are stored.
    """
    bottom, top = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if mode == "floor":
        zero = torch.floor(levels * floor / (top.clamp(min=0.0) + floor)).clamp(min=1.0)
        scale = floor / zero
    else:
        bottom, top = (bottom, top) if mode == "symmetric" else (bottom.clamp(max=0.0), top.clamp(min=0.0))
        extreme = torch.maximum(-bottom, top) if mode == "symmetric" else top - bottom
        scale = (extreme / levels).clamp(min=torch.finfo(torch.float32).tiny)
        scale = torch.where(extreme == 0, torch.ones_like(scale), scale)
        zero = torch.round(-bottom / scale).clamp(0.0, levels)
    ratio = x * (1.0 / scale)
    if mode == "symmetric":
        return torch.round(ratio).clamp(low, high), scale.squeeze(-1), torch.zeros_like(scale).squeeze(-1)
    codes = torch.round(ratio) + zero + low
    return codes.clamp(low, high), scale.squeeze(-1), zero.squeeze(-1) + low
