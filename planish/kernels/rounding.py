"""Rounding to integers, ties to even, on float32 tiles.

    round(v) = (v + 1.5 * 2^23) - 1.5 * 2^23      exact for |v| < 2^22: the sum has no bits below 1

Triton has no rounding instruction without libdevice; the compilers do not simplify the sum, as it is not exact in
floats. Callers clamp first.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_even(v):
    """The nearest integers, halves to even, of float32 |v| < 2^22."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def code_of(v):
    """The nearest int8, halves to even, of float32 |v| < 128.5: the last bits of v + 1.5 * 2^23 are the integer's."""
    return (v + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def clamp(v, LOW: tl.constexpr, HIGH: tl.constexpr):
    """v kept within [LOW, HIGH]."""
    return tl.minimum(tl.maximum(v, LOW), HIGH)
