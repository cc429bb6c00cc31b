"""Codes of 4 and 2 bits in planes of a byte, as the container "triton" stores them.

    plane p of a byte q:   code = ((q >> BITS p) & (2^BITS - 1)) - 2^(BITS - 1)

As int8 the codes keep their place at the top of the byte, 2^(8 - BITS) times too large, which the scale takes back: a
`xor` makes the code signed and a mask cuts it out, four codes an instruction. As float16 and bfloat16 they go into the
mantissa of a power of two: 0x6400 | u is 1024 + u, exactly, and a multiplication takes back the plane's place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def scaled_plane(packed, BITS: tl.constexpr, PLANE: tl.constexpr):
    """Codes of a plane as int8, times 2^(8 - BITS)."""
    TOP: tl.constexpr = 8 - BITS - BITS * PLANE
    MASK: tl.constexpr = -(1 << (8 - BITS))
    SIGNS: tl.constexpr = -120 if BITS == 4 else -86  # the top bit of each plane: 0x88, 0xAA
    return ((packed ^ SIGNS) << TOP).to(tl.int8) & MASK


@triton.jit
def plane_less_zero(packed, zero, BITS: tl.constexpr, PLANE: tl.constexpr):
    """Codes of a plane less a zero point as int8; zero int8, that of signed codes, broadcasts."""
    unsigned = (packed >> (BITS * PLANE)) & ((1 << BITS) - 1)
    return (unsigned - (zero + (1 << (BITS - 1))).to(tl.int8)).to(tl.int8)


@triton.jit
def unsigned_plane(packed, BITS: tl.constexpr, PLANE: tl.constexpr):
    """Codes from 0 on as they are, int8: of activations that cannot be negative."""
    return (packed >> (BITS * PLANE)) & ((1 << BITS) - 1)


@triton.jit
def signed_plane(packed, BITS: tl.constexpr, PLANE: tl.constexpr):
    """Codes in two's complement, as activations have them, as int8, times 2^(8 - BITS)."""
    TOP: tl.constexpr = 8 - BITS - BITS * PLANE
    MASK: tl.constexpr = -(1 << (8 - BITS))
    return (packed << TOP).to(tl.int8) & MASK


@triton.jit
def half_plane(packed, zero, BITS: tl.constexpr, PLANE: tl.constexpr):
    """Codes of a plane less an integer zero point in float16; zero float16, that of signed codes, broadcasts.

    Exact: no number here has more than 11 bits.
    """
    MASK: tl.constexpr = ((1 << BITS) - 1) << (BITS * PLANE)
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    POWER: tl.constexpr = 1.0 / (1 << (BITS * PLANE))
    placed = ((packed.to(tl.int16) & MASK) | 0x6400).to(tl.float16, bitcast=True)
    if PLANE > 0:
        placed = (placed * POWER).to(tl.float16)
    return placed - (zero + (1024.0 * POWER + MIDDLE))


@triton.jit
def float_plane(packed, zero, BITS: tl.constexpr, PLANE: tl.constexpr, DTYPE: tl.constexpr):
    """The same in another float."""
    MASK: tl.constexpr = (1 << BITS) - 1
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    unsigned = (packed.to(tl.int16) >> (BITS * PLANE)) & MASK
    return (unsigned.to(tl.float32) - (zero + MIDDLE)).to(DTYPE)


def planes_reference(packed: torch.Tensor, bits: int, span: int, columns: int) -> torch.Tensor:
    """Codes from 0 on, float64 [N, columns], of int8 [N, K_pad * bits / 8] in spans of `span` columns."""
    spans = packed.view(torch.uint8).reshape(packed.shape[0], -1, 1, span * bits // 8)
    places = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8).reshape(1, 1, -1, 1)
    codes = (spans >> places) & ((1 << bits) - 1)
    return codes.reshape(packed.shape[0], -1)[:, :columns].double()
