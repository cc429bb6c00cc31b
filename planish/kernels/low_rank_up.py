"""A float branch of a linear, on the sums of a tile: low-rank up, outlier columns.

    sums [BLOCK_N, BLOCK_M] += right [BLOCK_N, R] left [BLOCK_M, R]^T

(The second half of SVDQuant's fused branch, arXiv 2411.05007: the first is `low_rank_down`, in the prologue.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def low_rank_up(sums, left, right, m, n, RANK: tl.constexpr, CHUNK: tl.constexpr):
    """sums, float32, plus the branch.

    Args:
        left, right: pointers to the first row of the tile, rows of RANK numbers.
        m, n: rows of the tile.
        CHUNK: columns of the rank at a time, a power of two of at least 16.
    """
    r = tl.arange(0, CHUNK)
    for start in tl.static_range(0, RANK, CHUNK):
        if RANK % CHUNK == 0:
            narrow = tl.load(left + m[:, None] * RANK + (start + r)[None, :])
            wide = tl.load(right + n[:, None] * RANK + (start + r)[None, :])
        else:
            there = (start + r < RANK)[None, :]
            narrow = tl.load(left + m[:, None] * RANK + (start + r)[None, :], mask=there, other=0.0)
            wide = tl.load(right + n[:, None] * RANK + (start + r)[None, :], mask=there, other=0.0)
        sums = tl.dot(wide, tl.trans(narrow), sums, input_precision="ieee")
    return sums


def low_rank_up_reference(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The branch, float32 [M, N], of [M, R] and [N, R]: rounded once."""
    return (left.double() @ right.double().T).float()
