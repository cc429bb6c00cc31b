"""Rounding to a number format: scales of blocks, codes, and the numbers that these stand for.

Everything works on *blocks* [..., size]: the elements that share a scale lie along the last axis
(`blocks_of`). The rules are those of `planish.ir.formats`; a range with two ends contains 0; a block of zeros has
scale 1. Rounding is to nearest, ties to even, and saturates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from planish.ir.errors import PlanishError
from planish.ir.formats import FLOATS, Format
from planish.ir.qtensor import QTensor
from planish.ir.types import numpy_dtype

CLIPS = tuple(1.0 - i / 100 for i in range(51))  # fractions of the range that the mse search tries
E4M3_TINY = 2.0**-9  # the least e4m3 number
# the dtypes of scales: least (float16 needs its numbers below the normal ones) and largest
SCALE_LIMITS = {
    "f32": (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max),
    "f16": (2.0**-24, torch.finfo(torch.float16).max),
    "bf16": (torch.finfo(torch.bfloat16).tiny, torch.finfo(torch.bfloat16).max),
}


def _power(exponent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """2^exponent of integers, exact: below the least normal number 0."""
    return torch.ldexp(torch.ones((), dtype=torch.float64), exponent.double()).to(dtype)


def _exponent(x: torch.Tensor) -> torch.Tensor:
    """floor(log2 |x|) of numbers that are not 0."""
    return torch.frexp(x)[1] - 1


def round_element(x: torch.Tensor, element: str) -> torch.Tensor:
    """The nearest numbers that a float element holds, in the dtype of x (at least float32); NaN stays."""
    largest, mantissa, least, _ = FLOATS[element]
    step = _power(_exponent(x).clamp(min=least) - mantissa, x.dtype)
    return (torch.round(x / step) * step).clamp(-largest, largest)


def round_scale(scale: torch.Tensor, dtype: str) -> torch.Tensor:
    """Scales as their dtype (f32, f16, bf16) holds them: in the dtype of the argument, none of them 0."""
    narrow = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    return scale.clamp(*SCALE_LIMITS[dtype]).to(narrow).to(scale.dtype)


def blocks_of(x: torch.Tensor, form: Format) -> torch.Tensor:
    """The blocks of x [..., n] along its last axis: [..., blocks, size], or [1, everything] for one scale.

    A last block that is not full is padded with zeros.
    """
    match form.granularity:
        case "tensor":
            return x.reshape(1, -1)
        case "group":
            assert form.block is not None
            block = min(form.block, max(x.shape[-1], 1))  # a block that is never full is no longer than the row
            short = -x.shape[-1] % block
            padded = torch.nn.functional.pad(x, (0, short)) if short else x
            return padded.reshape(*x.shape[:-1], padded.shape[-1] // block, block)
        case _:
            return x.unsqueeze(-2)


def unblocked(blocks: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor [..., n] of that shape whose blocks these are; the padding goes."""
    if blocks.ndim == 2 and blocks.shape[0] == 1 and len(shape) != 1:
        return blocks.reshape(shape)  # one scale for everything
    flat = blocks.flatten(-2)
    return flat[..., : shape[-1]].reshape(shape)


@dataclass(frozen=True, eq=False)
class Grid:
    """What the codes of each block stand for: y = (code - zero) * scale.

    Attributes:
        form: the format.
        scale: [..., 1] against blocks [..., size], the factor of the tensor included.
        zero: like scale; None without zero points.
        stored: what is stored per block: equal to `scale` but for a second level.
        global_scale: of the tensor, if it is a number; None: 1, or computed at run time.
    """

    form: Format
    scale: torch.Tensor
    zero: torch.Tensor | None
    stored: torch.Tensor
    global_scale: float | None = None

    def codes(self, blocks: torch.Tensor) -> torch.Tensor:
        """The codes (floats: the elements) of blocks [..., size], in their dtype."""
        if self.form.is_float:
            return round_element(blocks / self.scale, self.form.element)
        if self.zero is not None and self.form.clusters > 1:  # no integer: it is rounded with the code
            return torch.round(blocks / self.scale + self.zero).clamp(*self.form.range)
        ratio = blocks / self.scale
        if self.form.rule == "half":  # every extreme is a tie: as the float32 arithmetic of compressed-tensors has it
            ratio = (blocks.float() / self.scale.float()).to(blocks.dtype)
        codes = torch.round(ratio)
        if self.zero is not None:
            codes = codes + self.zero
        return codes.clamp(*self.form.range)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The numbers that codes stand for."""
        return (codes if self.zero is None else codes - self.zero) * self.scale


def grid_of(
    blocks: torch.Tensor, form: Format, fraction: float = 1.0, global_scale: float | torch.Tensor | None = None
) -> Grid:
    """The grid of blocks [..., size] from their extremes.

    Args:
        fraction: of the range that is kept; what lies outside saturates.
        global_scale: of a two-level format; by default from the largest magnitude of all blocks.
    """
    return grid_of_range(blocks.amin(-1, keepdim=True) * fraction, blocks.amax(-1, keepdim=True) * fraction,
                         form, global_scale)  # fmt: skip


def grid_of_range(
    low: torch.Tensor, high: torch.Tensor, form: Format, global_scale: float | torch.Tensor | None = None
) -> Grid:
    """The grid of blocks whose extremes are known, [..., 1] each; a `global_scale` is a number or a scalar tensor."""
    lowest, highest = form.range
    if not form.symmetric:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = (high - low) / (highest - lowest)
        scale = round_scale(torch.where(scale == 0, torch.ones_like(scale), scale), form.scale)
        return Grid(form, scale, torch.round(-low / scale).clamp(lowest, highest), scale)
    largest = torch.maximum(-low, high)
    empty = largest == 0
    if form.scale == "f8e8m0":
        scale = torch.where(empty, torch.ones_like(largest), _power_scale(largest, form))
        return Grid(form, scale, None, scale)
    if form.scale == "f8e4m3fn":
        if global_scale is None:
            global_scale = float(np.float32(float(largest.max()) / (448.0 * highest))) or 1.0
        stored = round_element(largest / highest / global_scale, "f8e4m3fn").clamp(min=E4M3_TINY)
        stored = torch.where(empty, torch.ones_like(stored), stored)
        outer = global_scale if isinstance(global_scale, float) else None
        return Grid(form, stored * global_scale, None, stored, outer)
    match form.rule:
        case "half":
            scale = largest / (highest + 0.5)
        case "extreme":
            scale = torch.where(high > -low, high, low) / lowest
        case _:
            scale = largest / highest
    sign = torch.where(scale < 0, -1.0, 1.0).to(scale.dtype)
    scale = sign * round_scale(torch.where(empty, torch.ones_like(scale), scale.abs()), form.scale)
    return Grid(form, scale, None, scale)


def _power_scale(largest: torch.Tensor, form: Format) -> torch.Tensor:
    """The power of two of a microscaling block, by the rule of the format; of magnitudes above 0."""
    most, mantissa, _, top = FLOATS.get(form.element, (127.0, 6, 0, 6))  # mxint8: codes in [-127, 127]
    base = largest.to(torch.float32)  # the rules are stated for the bits of a float32
    exponent = _exponent(base)
    match form.rule:
        case "ceil":
            exponent = exponent + (base > _power(exponent, base.dtype)).to(exponent.dtype) - top
        case "even":
            fraction = base / _power(exponent, base.dtype)
            exponent = exponent + (fraction >= 2.0 - 2.0 ** -(mantissa + 1)).to(exponent.dtype) - top
        case "rceil":
            ratio = base / most
            lower = _exponent(ratio)
            exponent = lower + (ratio > _power(lower, ratio.dtype)).to(exponent.dtype)
        case _:
            exponent = exponent - top
    return _power(exponent.clamp(-127, 127), largest.dtype)


def best_grid(blocks: torch.Tensor, form: Format, importance: torch.Tensor | None = None) -> Grid:
    """The grid of blocks [..., size] with the fraction of the range, block by block, of least squared error.

    Args:
        importance: weighs the errors, broadcastable against blocks; by default all count alike.
    """
    best = grid_of(blocks, form)
    if form.scale == "f8e4m3fn":  # one scale of the tensor for all fractions
        fixed: float | None = best.global_scale
    else:
        fixed = None
    least: torch.Tensor | None = None
    scale, zero, stored = best.scale, best.zero, best.stored
    for fraction in CLIPS:
        grid = grid_of(blocks, form, fraction, fixed)
        error = (grid.values(grid.codes(blocks)) - blocks).square()
        error = (error if importance is None else error * importance).sum(-1, keepdim=True)
        better = error < least if least is not None else torch.ones_like(error, dtype=torch.bool)
        scale = torch.where(better, grid.scale, scale)
        stored = torch.where(better, grid.stored, stored)
        if zero is not None and grid.zero is not None:
            zero = torch.where(better, grid.zero, zero)
        least = error if least is None else torch.minimum(error, least)
    return Grid(form, scale, zero, stored, best.global_scale)


def cluster_grids(blocks: torch.Tensor, ids: torch.Tensor, form: Format) -> list[Grid]:
    """One grid per cluster, from the extremes of its elements alone: elsewhere zeros would count in.

    The zero point is no integer: the least element of a cluster has code 0 exactly. A cluster without elements in a
    block has scale 1 and zero point 0.

    Args:
        ids: the cluster of each element, like blocks.
    """
    lowest, highest = form.range
    grids = []
    for k in range(form.clusters):
        inside = ids == k
        low = torch.where(inside, blocks, torch.inf).amin(-1, keepdim=True)
        high = torch.where(inside, blocks, -torch.inf).amax(-1, keepdim=True)
        missing = low > high
        low, high = low.masked_fill(missing, 0.0), high.masked_fill(missing, 0.0)
        if form.symmetric:
            grids.append(grid_of_range(low, high, form))
            continue
        spread = (high - low) / (highest - lowest)
        lone = torch.where(low == 0, torch.ones_like(low), low.abs())
        scale = round_scale(torch.where(spread == 0, lone, spread), form.scale)
        zero = round_scale((low / scale).abs(), form.scale) * -torch.sign(low)
        grids.append(Grid(form, scale, torch.where(low == 0, torch.zeros_like(zero), zero), scale))
    return grids


def fake_quantize(x: torch.Tensor, form: Format, low: float | None = None, high: float | None = None) -> torch.Tensor:
    """x [..., n] as the format holds it, in the dtype of x.

    Args:
        low, high: the calibrated range of the tensor, for a static format; by default that of x.
    """
    blocks = blocks_of(x, form)
    if form.static and low is not None and high is not None:
        grid = grid_of_range(torch.full((1, 1), low, dtype=x.dtype), torch.full((1, 1), high, dtype=x.dtype), form)
    else:
        grid = grid_of(blocks, form)
    return unblocked(grid.values(grid.codes(blocks)), tuple(x.shape))


def quantize_array(
    weight: np.ndarray,
    form: Format,
    clip: Literal["max", "mse"] = "max",
    *,
    clusters: np.ndarray | None = None,
    importance: np.ndarray | None = None,
) -> QTensor:
    """A weight [outputs, inputs] rounded to nearest.

    Args:
        weight: float64, finite.
        clip: `mse` takes, block by block, the fraction of the range with the least squared error.
        clusters: for a format with clusters: the id of each element, uint8 [outputs, inputs].
        importance: float64 [inputs], weighs the errors of the mse search.

    Raises:
        PlanishError: the weight is empty, holds NaN or infinity, or clusters are missing.
    """
    if weight.size == 0:
        raise PlanishError(f"weight: is empty, of shape {weight.shape}; expected at least one element")
    if not np.isfinite(weight).all():
        raise PlanishError("weight: holds NaN or infinity; expected finite numbers")
    x = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float64))
    blocks = blocks_of(x, form)
    if form.clusters > 1:
        if clusters is None:
            raise PlanishError(f"format '{form}': needs the cluster of each element")
        ids = blocks_of(torch.from_numpy(clusters.astype(np.int64)), form)
        grids = cluster_grids(blocks, ids, form)
        codes = torch.zeros_like(blocks)
        for k, grid in enumerate(grids):
            codes = torch.where(ids == k, grid.codes(blocks), codes)
        return assemble(unblocked(codes, tuple(x.shape)), grids, clusters)
    if clip == "mse":
        weighed = None
        if importance is not None:
            weighed = blocks_of(torch.from_numpy(importance.astype(np.float64)).expand_as(x), form)
        grid = best_grid(blocks, form, weighed)
    else:
        grid = grid_of(blocks, form)
    return assemble(unblocked(grid.codes(blocks), tuple(x.shape)), [grid])


def assemble(codes: torch.Tensor, grids: list[Grid], clusters: np.ndarray | None = None) -> QTensor:
    """The quantised matrix [outputs, inputs] of codes on grids: one, or one per cluster."""
    form = grids[0].form

    def stacked(parts: list[torch.Tensor]) -> np.ndarray:
        arrays: list[np.ndarray] = []
        for part in parts:
            array: np.ndarray = part.double().numpy()
            match form.granularity:
                case "tensor":
                    arrays.append(array.reshape(()))
                case "group":
                    arrays.append(array[..., 0])
                case _:
                    arrays.append(array.reshape(-1))
        return np.stack(arrays) if clusters is not None else arrays[0]

    zeros = [g.zero for g in grids if g.zero is not None]
    axis, block = {"tensor": (None, None), "group": (1, form.block)}.get(form.granularity, (0, None))
    held = codes.double().numpy()
    return QTensor(
        held.astype(numpy_dtype(form.element) if form.is_float else np.int8 if form.symmetric else np.uint8),
        form.element,
        axis,
        block,
        stacked([g.stored for g in grids]),
        form.scale,
        stacked(zeros) if zeros else None,
        zero_is_float=clusters is not None and bool(zeros),
        global_scale=grids[0].global_scale,
        clusters=clusters,
    )
