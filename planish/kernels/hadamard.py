"""The Walsh-Hadamard transform on blocks of a row, and orders with a dense factor.

    y = (x * signs) H' / sqrt(b)          transpose: (x H / sqrt(b)) * signs           H of planish.ir.hadamard

A power of two takes log2(b) rounds of sums and differences, exact in their order: the reference makes the same
float32 operations. An order base * 2^k, base a product of Paley orders (12, 20, 28 ..), is their Kronecker product:
the rounds on the 2^k inner columns, one product with the dense matrix of the base over the outer ones. That runs on
tensor cores of every target as two float16 products: with p the power of two below the row's largest magnitude,
x / p = high + low / 2048, where high and low are float16, but for 2^-22 of each element (and 2^-36 of the largest).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def walsh(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, LOG: tl.constexpr, FAR: tl.constexpr):
    """x [ROWS, WIDTH] times Sylvester's matrix of order 2^LOG, block by block, not normalised.

    Near pairs first takes fewer instructions; far pairs first (FAR) leaves neighbouring columns to a thread in the end,
    which then has few scales of groups to compute.
    """
    for i in tl.static_range(LOG):
        if FAR:
            pairs = tl.reshape(x, (ROWS, WIDTH >> (LOG - i), 2, 1 << (LOG - 1 - i)))
        else:
            pairs = tl.reshape(x, (ROWS, WIDTH >> (i + 1), 2, 1 << i))
        a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, WIDTH))
    return x


@triton.jit
def walsh_dense(
    x,
    matrix_ptr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BASE: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
):
    """x [ROWS, WIDTH] as [.., PADDED, INNER] times the matrix [BASE, BASE] (int8) over its first BASE of PADDED."""
    OUTER: tl.constexpr = ROWS * (WIDTH // (PADDED * INNER))
    at = tl.arange(0, PADDED)
    real = (at < BASE)[:, None] & (at < BASE)[None, :]
    turned = tl.load(matrix_ptr + at[:, None] + at[None, :] * BASE, mask=real, other=0)
    most = tl.maximum(tl.max(tl.abs(x), 1), 1e-30).to(tl.int32, bitcast=True) & 0x7F800000
    p = most.to(tl.float32, bitcast=True)[:, None]
    inverse = (0x7F000000 - most).to(tl.float32, bitcast=True)[:, None]
    lines = tl.permute(tl.reshape(x * inverse, (OUTER, PADDED, INNER)), (0, 2, 1))
    lines = tl.reshape(lines, (OUTER * INNER, PADDED))
    if OUTER * INNER >= 16:
        high = lines.to(tl.float16)
        low = ((lines - high.to(tl.float32)) * 2048.0).to(tl.float16)
        y = tl.dot(low, turned.to(tl.float16)) * (1.0 / 2048.0)
        y = tl.dot(high, turned.to(tl.float16), y)
    else:
        y = tl.sum(lines[:, :, None] * turned.to(tl.float32)[None, :, :], 1)
    y = tl.permute(tl.reshape(y, (OUTER, INNER, PADDED)), (0, 2, 1))
    return tl.reshape(y, (ROWS, WIDTH)) * p


def walsh_reference(x: torch.Tensor, order: int, far: bool) -> torch.Tensor:
    """x [.., m order] times Sylvester's matrix of a power of two, by sums and differences, not normalised.

    Args:
        far: far pairs first.
    """
    halves = [1 << i for i in range(order.bit_length() - 1)]
    for half in reversed(halves) if far else halves:
        a, b = x.reshape(*x.shape[:-1], x.shape[-1] // (2 * half), 2, half).unbind(-2)
        x = torch.stack([a + b, a - b], -2).reshape(x.shape)
    return x


def hadamard_reference(
    x: torch.Tensor,
    signs: torch.Tensor | None,
    matrix: torch.Tensor | None,
    block: int,
    base: int,
    transpose: bool,
    far: bool,
) -> torch.Tensor:
    """Float32 [M, K] of float32 x [M, K].

    Args:
        signs: [K] of +-1; None: ones.
        matrix: [base, base]; None for a power of two.
        base: the dense factor of the block's order, 1 for a power of two.
        transpose: the inverse; the matrix is transposed already.
        far: see `walsh`.
    """
    if signs is not None and not transpose:
        x = x * signs.float()
    inner = block // base
    y = walsh_reference(x, inner, far)
    if matrix is not None:
        blocks = y.reshape(x.shape[0], -1, base, inner)
        y = (matrix.float() @ blocks).reshape(x.shape)
    y = y * (1.0 / block**0.5)
    return y * signs.float() if signs is not None and transpose else y
