"""RMSNorm and LayerNorm on whole rows, statistics in float32.

    rms_norm      y = x / sqrt(sum x^2 / K + eps) * gain + bias
    layer_norm    y = (x - mean) / sqrt(sum (x - mean)^2 / K + eps) * gain + bias

The row is multiplied by the reciprocal root, which GPUs have as one instruction (2 roundings off at most; exact roots
and quotients are subroutines, around which registers spill). Sums run in the order of the tile, so that results differ
from another order's by a few roundings of the sum of squares (relative), which the tests bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def rms_factor(squares, COUNT: tl.constexpr, EPS: tl.constexpr):
    """1 / sqrt(squares / COUNT + EPS) of the sums of squares [ROWS]."""
    return tl.rsqrt(squares * (1.0 / COUNT) + EPS)


def rms_norm_reference(
    x: torch.Tensor, gain: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Float32 [M, K] of float32 x [M, K], gain and bias [K]."""
    y = x * torch.rsqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps)
    y = y if gain is None else y * gain.float()
    return y if bias is None else y + bias.float()


def layer_norm_reference(
    x: torch.Tensor, gain: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Float32 [M, K] of float32 x [M, K], gain and bias [K]."""
    return rms_norm_reference(x - x.sum(-1, keepdim=True) / x.shape[-1], gain, bias, eps)
