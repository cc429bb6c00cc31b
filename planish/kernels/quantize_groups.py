"""Codes of rows with a scale for each group of consecutive columns.

    scale = max |x| / levels       code = round(x / scale)         levels: 7, 127; 7.5 for the rule "half"

as `planish.ir.rounding.grid_of` has it, in float32: a group of zeros has scale 1, a scale is at least the least normal
float32. Columns beyond the row are 0 and count in no range. The ratio is x times 1 / scale (see quantize_rows); under
the rule "half" the extremes are ties, and the ratio is the correctly rounded quotient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from planish.kernels.rounding import clamp, code_of


@triton.jit
def group_codes(
    x,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    LEVELS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Codes int8 [ROWS, WIDTH] and scales [ROWS, WIDTH / GROUP] of x [ROWS, WIDTH]."""
    groups = tl.reshape(x, (ROWS, WIDTH // GROUP, GROUP))
    extreme = tl.max(tl.abs(groups), 2)
    if LEVELS % 1 == 0:
        scale = tl.where(extreme == 0.0, 1.0, tl.maximum(extreme / LEVELS, 1.1754943508222875e-38))
        ratio = groups * (1.0 / scale)[:, :, None]
    else:
        scale = tl.where(extreme == 0.0, 1.0, tl.maximum(tl.div_rn(extreme, LEVELS), 1.1754943508222875e-38))
        ratio = tl.div_rn(groups, scale[:, :, None])
    return tl.reshape(code_of(clamp(ratio, LOW, HIGH)), (ROWS, WIDTH)), scale


def group_codes_reference(
    x: torch.Tensor, group: int, levels: float, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, K] as float32 integers and scales [M, ceil(K / group)] of float32 x [M, K]."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, -columns % group)).reshape(rows, -1, group)
    extreme = padded.abs().amax(-1, keepdim=True)
    scale = (extreme / levels).clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(extreme == 0, torch.ones_like(scale), scale)
    ratio = padded * (1.0 / scale) if levels % 1 == 0 else padded / scale
    codes = torch.round(ratio).clamp(low, high)
    return codes.reshape(rows, -1)[:, :columns], scale.squeeze(-1)
