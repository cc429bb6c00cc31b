"""The products of a gemm in plain torch.

integers   y = sum over groups g of (a_g w_g^T) * w_scale[g] * a_scale[g]     a_g w_g^T exact, the rest in float32
floats     y = a w^T in float64, rounded once
"""

from __future__ import annotations

import torch


def integer_product_reference(
    left: torch.Tensor,
    right: torch.Tensor,
    scale: torch.Tensor,
    group: int,
    left_scale: torch.Tensor | None,
    left_group: int,
) -> torch.Tensor:
    """float32 [M, N] of codes, float64 [M, K] and [N, K], before the scales of rows of the left side.

    Args:
        scale: [N], or with a group [ceil(K / group), N].
        left_scale: with `left_group` [M, ceil(K / left_group)], else None.
    """
    unit = min(g for g in (group, left_group, left.shape[1]) if g)
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.float32, device=left.device)
    for start in range(0, left.shape[1], unit):
        part = (left[:, start : start + unit] @ right[:, start : start + unit].T).float()
        factor = scale.float()[start // group] if group else torch.ones_like(scale[..., :1], dtype=torch.float32)
        if left_scale is not None:
            factor = factor * left_scale.float()[:, start // left_group, None]
        total = total + part * factor
    return total if group else total * scale.float()


def float_product_reference(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """float32 [M, N] of float64 [M, K] and [N, K]."""
    return (left.double() @ right.double().T).float()


def signed_reference(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes in two's complement, from 0 on, as signed numbers."""
    return codes - (codes >= 2 ** (bits - 1)) * 2.0**bits
