"""Weights whose elements belong to clusters, each with a scale and a zero point of its own (SplitQuant).

    weight = (code - zero[k]) * scale[k]      k: the cluster of the element

In float16 the scales of a row are divided by the largest of them, which multiplies the sums: they cannot underflow.
(arXiv 2501.12428.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def choose2(ids, first, second):
    """first where ids are 0, second where they are 1."""
    return tl.where(ids == 0, first, second)


@triton.jit
def choose3(ids, first, second, third):
    """first, second or third where ids are 0, 1, 2."""
    return tl.where(ids == 0, first, tl.where(ids == 1, second, third))


@triton.jit
def choose4(ids, first, second, third, fourth):
    """first to fourth where ids are 0 to 3."""
    return tl.where(ids < 2, tl.where(ids == 0, first, second), tl.where(ids == 2, third, fourth))


@triton.jit
def largest(first, second):
    """The larger magnitude of two vectors of scales; 1 where both are 0."""
    top = tl.maximum(tl.abs(first), tl.abs(second))
    return tl.where(top == 0.0, 1.0, top)


def split_reference(
    codes: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, group: int
) -> torch.Tensor:
    """The weight, float64 [N, K].

    Args:
        codes: signed, float64 [N, K].
        ids: float64 [N, K].
        scale, zero: [clusters, N] or, with a group, [clusters, ceil(K / group), N].
    """
    found = torch.zeros_like(codes)
    for k in range(scale.shape[0]):
        less = codes if zero is None else codes - spread_reference(zero[k], group, codes.shape[1])
        found = torch.where(ids == k, less * spread_reference(scale[k], group, codes.shape[1]), found)
    return found


def spread_reference(held: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    """Scales or zero points [N] or [ceil(K / group), N] as float64 that broadcasts against [N, K]."""
    if not group:
        return held.double()[:, None]
    return held.double().T.repeat_interleave(group, 1)[:, :columns]
