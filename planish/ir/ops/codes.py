"""The arithmetic of the quantisation rows, on torch tensors: also what generated torch code calls.

Integer codes of less than 8 bits are held one a byte, floats that torch lacks in a wider float (`Wide.of`).
Scales and zero points lie as the rows say: broadcast, a vector along an axis, or one per block of an axis.
"""

from __future__ import annotations

import torch

from planish.ir.formats import Format
from planish.ir.ops.base import HELD_AS
from planish.ir.rounding import blocks_of, grid_of, round_element, unblocked
from planish.ir.types import bits, is_float, torch_dtype

RANGES = {f"u{n}": (0, 2**n - 1) for n in (2, 3, 4, 8, 16)} | {
    f"i{n}": (-(2 ** (n - 1)), 2 ** (n - 1) - 1) for n in (2, 3, 4, 8, 16, 32)
}


def spread(held: torch.Tensor, shape: torch.Size, axis: int | None, block: int | None) -> torch.Tensor:
    """A scale or zero point so that it broadcasts against a tensor of that shape."""
    if axis is None or held.ndim == 0:
        return held
    if block is not None:
        axis %= len(shape)
        index = torch.arange(shape[axis], device=held.device) // block
        return held.index_select(axis, index)
    along = [1] * len(shape)
    along[axis] = -1
    return held.reshape(along)


def held_dtype(dtype: str) -> torch.dtype:
    """The torch dtype in which codes of an IR dtype are held."""
    return torch_dtype(HELD_AS.get(dtype, dtype))


def to_codes(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    dtype: str,
    axis: int | None,
    block: int | None = None,
    held: torch.dtype = torch.uint8,
) -> torch.Tensor:
    """clamp(round(x / scale) + zero), ties to even; for float dtypes the nearest element to x / scale, saturated.

    Args:
        held: the torch dtype of the result.
    """
    factor = spread(scale.to(x.dtype), x.shape, axis, block)
    offset = None if zero is None else spread(zero, x.shape, axis, block)
    return _codes(x, factor, offset, dtype, held)


def _codes(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: str, held: torch.dtype = torch.uint8
) -> torch.Tensor:
    ratio = x / scale
    if is_float(dtype):
        ratio = ratio.float() if ratio.dtype in (torch.float16, torch.bfloat16) else ratio
        return round_element(ratio, dtype).to(held)
    codes = torch.round(ratio)
    if zero is not None:
        codes = codes + zero.to(codes.dtype)
    return codes.clamp(*RANGES[dtype]).to(held)


def from_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    axis: int | None,
    block: int | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """(codes - zero) * scale, in `dtype`, by default that of the scale."""
    target = dtype or scale.dtype
    x = codes.to(target)
    if zero is not None:
        x = x - spread(zero.to(target), codes.shape, axis, block)
    return x * spread(scale.to(target), codes.shape, axis, block)


def from_clusters(
    codes: torch.Tensor,
    clusters: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    axis: int | None,
    block: int | None = None,
    index: int | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """(codes - zero[k]) * scale[k], k the cluster of each element; with `index`, 0 where k is another."""
    target = dtype or scale.dtype
    ids, found = clusters.to(torch.uint8), torch.zeros(codes.shape, dtype=target, device=codes.device)
    for k in range(scale.shape[0]) if index is None else (index,):
        part = from_codes(codes, scale[k], None if zero is None else zero[k], axis, block, target)
        found = torch.where(ids == k, part, found)
    return found


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


def format_of(
    dtype: str, granularity: str, block: int | None, scale: str | None, rule: str | None, symmetric: bool
) -> Format:
    """The format in which `to_codes_by_format` computes: unsigned codes of a symmetric range as signed ones."""
    element = "i" + dtype[1:] if symmetric and dtype.startswith("u") else dtype
    rule = rule or ("floor" if scale == "f8e8m0" else "max")
    return Format(element, granularity, block, scale or "f32", rule)  # type: ignore[arg-type]


def to_codes_by_format(
    x: torch.Tensor,
    global_scale: torch.Tensor | None,
    dtype: str,
    granularity: str,
    block: int | None,
    scale: str | None,
    rule: str | None,
    symmetric: bool,
    codes_dtype: torch.dtype,
    scale_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zero points from the extremes of the tensor, of each row or of each block of the last axis.

    Args:
        global_scale: of a two-level format, a scalar; None: 1, the scales of the blocks alone.
        codes_dtype, scale_dtype: the torch dtypes of codes and scales; None: that of x.
    """
    form = format_of(dtype, granularity, block, scale, rule, symmetric)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    blocks = blocks_of(wide, form)
    outer = wide.new_ones(()) if global_scale is None else global_scale.to(wide.dtype)
    grid = grid_of(blocks, form, global_scale=outer)
    codes = unblocked(grid.codes(blocks), tuple(x.shape))
    shift = float(1 << (bits(dtype) - 1)) if form.element != dtype else 0.0
    zero = torch.full_like(grid.stored, shift) if grid.zero is None else grid.zero

    def placed(held: torch.Tensor) -> torch.Tensor:
        return held.reshape(()) if granularity == "tensor" else held.squeeze(-1 if granularity == "group" else -2)

    return (codes + shift).to(codes_dtype), placed(grid.stored).to(scale_dtype or x.dtype), placed(zero).to(codes_dtype)
