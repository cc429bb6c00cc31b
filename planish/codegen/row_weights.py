"""What row programs read besides rows, made from what the graph holds: matrices and index tables.

hadamard_base(order)        the dense factor of an order, 1 for a power of two
hadamard_matrix(order)      that factor, as the row `hadamard` reads it
folded_down(weight, ..)     a down-projection that takes over the transform in front of it: x H' W' = x (W H)'
segment_tables(..)          `reassemble`'s index, sizes and weights as tables [T, C]
"""

from __future__ import annotations

import math

import numpy as np
import torch

from planish.ir import hadamard

LARGEST_BASE = 64  # the largest dense factor that a row program multiplies by


def hadamard_base(order: int) -> int:
    """The product of the factors of H_order that are no powers of two; 1 if there are none."""
    return math.prod(f for f in hadamard.factors(order) if f & (f - 1))


def hadamard_matrix(order: int, transpose: bool = False) -> torch.Tensor | None:
    """The dense factor of H_order, or its transpose: int8 [base, base] for `hadamard_base(order)`; None for 1."""
    made = np.ones((1, 1), np.int8)
    for factor in hadamard.factors(order):
        if factor & (factor - 1):
            made = np.kron(made, hadamard.dense(factor))
    if len(made) == 1:
        return None
    return torch.from_numpy(np.ascontiguousarray(made.T if transpose else made))


def folded_down(
    weight: torch.Tensor, block: int, signs: torch.Tensor | None = None, transpose: bool = False
) -> torch.Tensor:
    """The weight of a linear whose input is a Hadamard transform, for the transform's own input.

    Args:
        weight: [rank, K].
        block, signs, transpose: of the transform.

    Returns:
        float64 [rank, K]: W H diag(signs) / sqrt(block), or for the inverse W diag(signs) H' / sqrt(block).
    """
    wide = weight.double()
    if signs is not None and transpose:
        wide = wide * signs.double()
    turned: torch.Tensor = hadamard.apply(wide, block, transpose=not transpose)
    return turned * signs.double() if signs is not None and not transpose else turned


def segment_tables(
    index: torch.Tensor, sizes: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables of a `reassemble`: int32 index and float32 weights, [T, C] each.

    Args:
        index, weights: of all entries, in order of the segments.
        sizes: [C], the entries of each segment.
    """
    counts = sizes.to(torch.int64)
    terms, columns = int(counts.max()), len(counts)
    places = torch.zeros((terms, columns), dtype=torch.int32)
    factors = torch.zeros((terms, columns), dtype=torch.float32)
    segment = torch.repeat_interleave(torch.arange(columns), counts)
    term = torch.arange(len(index)) - (torch.cumsum(counts, 0) - counts)[segment]
    places[term, segment] = index.to(torch.int32)
    factors[term, segment] = weights.float()
    return places, factors
