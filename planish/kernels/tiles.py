"""Which tile of the result a program computes, and the last of several programs to arrive.

Tiles are taken in groups of GROUP_M row blocks, column after column, so that programs that run at the same time share
rows of the activation and columns of the weight in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The block of rows and the block of columns of a tile."""
    columns = tl.cdiv(N, BLOCK_N)
    group = index // (GROUP_M * columns)
    size = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
    within = index % (GROUP_M * columns)
    return group * GROUP_M + within % size, within // size


@triton.jit
def arrived(counter):
    """How many programs came to this counter before; what they stored before is visible to those that come later."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel")
