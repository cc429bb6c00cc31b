"""8-bit codes of weights and activations: what a tensor core multiplies as it lies in memory.

    weight = (code - zero) * scale

A zero point makes a difference of 9 bits, exact in float16 and float32: such weights are multiplied as floats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def half_of_int8(codes, zero):
    """codes - zero in float16; int8 codes, zero a float16 integer that broadcasts against them.

    0x6400 | (code + 128) is 1024 + 128 + code, exactly.
    """
    placed = (((codes ^ -128).to(tl.int16) & 255) | 0x6400).to(tl.float16, bitcast=True)
    return placed - (zero + 1152.0)


@triton.jit
def float_of_int8(codes, zero, DTYPE: tl.constexpr):
    """codes - zero in another float; zero a float that broadcasts against the codes."""
    return (codes.to(tl.float32) - zero).to(DTYPE)


def int8_reference(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Signed codes, float64 [N, columns], of int8 [N, K_pad]."""
    return packed[:, :columns].double()
