"""Choosing invertible transforms for blocks of channels: what transform-channels applies.

    invertible   M = R diag(s) K'       C = K diag(l) K' the second moment, s = l^(-strength / 2)
    kronecker    M = M_1 (x) M_2        each as above, from the moments of the rows and columns of x as a matrix
    block        T = B_2 P B_1          B block-diagonal randomised Hadamard, P deals channels out by size

R is a randomised Hadamard matrix: M C M' has the same energy in every channel. `strength` 1 whitens, 0 only rotates.
FlatQuant, arXiv:2410.09426 (learned there; its search for sizes never ends for n = 2 mod 4); DuQuant, arXiv:2406.01721.
"""

from __future__ import annotations

import numpy as np

from planish.ir.transform import Mix
from planish.passes.hadamard import hadamard_blocks, karhunen_loeve, mixed, random_orthogonal


def kronecker_sizes(n: int) -> tuple[int, int]:
    """(a, b) with a b = n, a the largest divisor up to sqrt(n); (1, n) for a prime."""
    a = next(d for d in range(int(np.sqrt(n)), 0, -1) if n % d == 0)
    return a, n // a


def spread(n: int, rng: np.random.Generator) -> np.ndarray:
    """A randomised Hadamard matrix (dct-mixed for orders without one): float64 [n, n]."""
    return mixed(np.eye(n), Mix(hadamard_blocks(np.arange(n), rng, "dct"), n, orthogonal=True))


def bounded(factors: np.ndarray, condition: float) -> np.ndarray:
    """Positive factors, the largest cut down to `condition` times the smallest."""
    cut: np.ndarray = np.minimum(factors, factors.min() * condition)
    return cut


def equalising(moment: np.ndarray, strength: float, condition: float, rng: np.random.Generator) -> np.ndarray:
    """M = R diag(s) K' of a second moment [n, n], its condition number at most `condition`."""
    n = len(moment)
    basis = karhunen_loeve(moment)
    energy = np.einsum("ij,jk,ik->i", basis, moment, basis)
    floor = max(float(energy.mean()), 1e-300) * condition**-2
    factors = np.maximum(energy / max(float(energy.mean()), 1e-300), floor) ** (-strength / 2.0)
    made: np.ndarray = spread(n, rng) @ (bounded(factors, condition)[:, None] * basis)
    return made


def well_conditioned(n: int, condition: float, rng: np.random.Generator) -> np.ndarray:
    """U diag(s) V' with orthogonal U, V and s between 1 and min(4, `condition`): float64 [n, n]."""
    factors = min(4.0, condition) ** rng.uniform(0.0, 1.0, n)
    made: np.ndarray = (random_orthogonal(n, rng) * factors) @ random_orthogonal(n, rng)
    return made


def invertible(
    n: int, moment: np.ndarray | None, strength: float, condition: float, rng: np.random.Generator
) -> np.ndarray:
    """One matrix [n, n]: equalising where there is a second moment, random otherwise."""
    if moment is None:
        return well_conditioned(n, condition, rng)
    return equalising(moment, strength, condition, rng)


def kronecker(
    n: int, moment: np.ndarray | None, strength: float, condition: float, rng: np.random.Generator
) -> np.ndarray:
    """M_1 (x) M_2 [n, n], each factor with the root of the condition number."""
    a, b = kronecker_sizes(n)
    left = right = None
    if moment is not None:
        grid = moment.reshape(a, b, a, b)
        left, right = np.einsum("ikjk->ij", grid) / b, np.einsum("kikj->ij", grid) / a
    each = condition if a == 1 else np.sqrt(condition)
    return np.kron(
        np.eye(1) if a == 1 else invertible(a, left, strength, each, rng),
        invertible(b, right, strength, each, rng),
    )


def zigzag(size: np.ndarray, blocks: int) -> np.ndarray:
    """An order that deals n channels out to blocks by falling size, there and back: the blocks' sizes even out."""
    order = np.argsort(-size, kind="stable").reshape(-1, blocks)
    order[1::2] = order[1::2, ::-1]
    return order.T.reshape(-1)


def block_rotations(n: int, block: int, moment: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """T = B_2 P B_1 for n channels, a multiple of `block`: orthogonal, float64 [n, n]. Without a moment P is 1."""

    def rotations() -> Mix:
        parts = [
            part
            for start in range(0, n, block)
            for part in hadamard_blocks(np.arange(start, start + block), rng, "dct")
        ]
        return Mix(parts, n, orthogonal=True)

    first = mixed(np.eye(n), rotations())
    if moment is not None:
        energy = np.einsum("ij,jk,ik->i", first, moment, first)
        first = first[zigzag(energy, n // block)]
    return mixed(first, rotations())
