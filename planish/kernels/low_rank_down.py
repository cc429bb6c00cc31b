"""The down-projection of a low-rank branch: left = x W', W [rank, K], rank small.

The row is rounded to the weight's float dtype, products are added in float32. Blocks of 16 rows and more go through
tensor cores; fewer rows are multiplied and summed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def down_part(total, x, weight, HEIGHT: tl.constexpr):
    """total [HEIGHT, R] + x weight of x [HEIGHT, BLOCK_K] float32 and a weight [BLOCK_K, R]."""
    rounded = x.to(weight.dtype)
    if HEIGHT >= 16:
        return tl.dot(rounded, weight, total, input_precision="ieee")
    return total + tl.sum(rounded.to(tl.float32)[:, :, None] * weight.to(tl.float32)[None, :, :], 1)


def down_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Float32 [M, rank] of float32 x [M, K], weight [rank, K]."""
    return x.to(weight.dtype).float() @ weight.float().T
