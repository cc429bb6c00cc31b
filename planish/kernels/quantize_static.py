"""Codes of a tensor with a scale from calibration.

    code = clamp(round(x / scale) + zero, low, high)

The ratio is x times 1 / scale (see quantize_rows), clamped before it is rounded, to 4 times the largest code: what lies
outside saturates in any case.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from planish.kernels.rounding import clamp, code_of, round_even


@triton.jit
def static_codes(x, scale, zero, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Codes int8 in [LOW, HIGH]; scale and zero broadcast against x, |zero| <= 255."""
    ratio = clamp(x * (1.0 / scale), -1024.0, 1024.0)
    return code_of(clamp(round_even(ratio) + zero, LOW, HIGH))


def static_codes_reference(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, low: float, high: float
) -> torch.Tensor:
    """Codes as float32 integers: float32 x [.., K], scale and zero that broadcast against it."""
    codes = torch.round(x * (1.0 / scale))
    codes = codes if zero is None else codes + zero.float()
    return codes.clamp(low, high)
