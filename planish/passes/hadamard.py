"""Which orthogonal matrix n channels get: what the rotating passes choose from.

    hadamard        H diag(+-1) / sqrt(n), signs drawn by seed             (QuaRot, arXiv:2404.00456)
    random          Haar: the Q of a Gaussian matrix                       (SpinQuant's start, arXiv:2405.16406)
    klt             K', the eigenvectors of the second moment C = K L K'
    klt-hadamard    H diag(+-1) K' / sqrt(n): every channel gets the energy tr(C) / n
                                                                           (MambaQuant, arXiv:2501.13484)

An order n without a Hadamard matrix gets (orthonormal DCT of m) (x) H_h, h the largest order that divides n = m h,
or m blocks H_h: what was taken is always said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
from scipy.fft import dct

from planish.ir.hadamard import Rotation, apply, factors, known
from planish.ir.transform import Mix

Kind = Literal["hadamard", "random", "klt", "klt-hadamard"]
Fallback = Literal["dct", "block"]
Block = tuple[np.ndarray, np.ndarray]


def largest_order(n: int) -> int:
    """The largest order that divides n and has a matrix."""
    return next(h for h in range(n, 0, -1) if n % h == 0 and known(h))


def describe(n: int, fallback: Fallback) -> str:
    """What `hadamard_blocks` takes for n channels."""
    if known(n):
        return f"hadamard {' x '.join(map(str, factors(n)))}"
    h = largest_order(n)
    if fallback == "block":
        return f"{n // h} blocks of hadamard {h} (there is none of order {n})"
    return f"dct {n // h} x hadamard {h} (there is none of order {n})"


def hadamard_blocks(index: np.ndarray, rng: np.random.Generator, fallback: Fallback) -> list[Block]:
    """Randomised Hadamard matrices on the channels `index` [n], as blocks of a `Mix`."""
    n = len(index)
    signs = rng.choice([-1.0, 1.0], n)
    if known(n):
        return [(index, cast(np.ndarray, Rotation(n, signs)))]
    h = largest_order(n)
    if fallback == "block":
        parts = np.split(index, n // h)
        return [(p, cast(np.ndarray, Rotation(h, s))) for p, s in zip(parts, np.split(signs, n // h), strict=True)]
    cosines = dct(np.eye(n // h), norm="ortho", axis=0)
    return [(index, np.kron(cosines, apply(np.eye(h), h).T) * signs)]


def random_orthogonal(n: int, rng: np.random.Generator) -> np.ndarray:
    """An orthogonal matrix [n, n] from the Haar measure (Mezzadri, arXiv:math-ph/0609050)."""
    q, r = np.linalg.qr(rng.normal(size=(n, n)))
    turned: np.ndarray = q * np.where(np.diag(r) < 0, -1.0, 1.0)
    return turned


def karhunen_loeve(moment: np.ndarray) -> np.ndarray:
    """K': the eigenvectors of a second moment [n, n] as rows, those of the largest eigenvalue first."""
    _, vectors = np.linalg.eigh((moment + moment.T) / 2.0)
    return np.ascontiguousarray(vectors[:, ::-1].T)


def choose_rotation(
    size: int,
    blocks: Sequence[np.ndarray],
    kind: Kind,
    rng: np.random.Generator,
    *,
    fallback: Fallback = "dct",
    moment: np.ndarray | None = None,
) -> Mix:
    """An orthogonal block-diagonal transform.

    Args:
        size: the number of channels.
        blocks: channel indices that may be mixed with each other; channels in no block stay.
        kind: see above.
        rng: of the signs or matrices.
        fallback: for block sizes without a Hadamard matrix.
        moment: float64 [size, size], for the kinds that need the second moment.
    """
    made: list[Block] = []
    for index in blocks:
        if len(index) < 2:
            continue
        if kind == "random":
            made.append((index, random_orthogonal(len(index), rng)))
        elif kind == "hadamard":
            made += hadamard_blocks(index, rng, fallback)
        else:
            assert moment is not None
            basis = karhunen_loeve(moment[np.ix_(index, index)])
            if kind == "klt-hadamard":
                spread = Mix(hadamard_blocks(np.arange(len(index)), rng, fallback), len(index), orthogonal=True)
                basis = mixed(basis, spread)
            made.append((index, basis))
    return Mix(made, size, orthogonal=True)


def mixed(matrix: np.ndarray, transform: Mix) -> np.ndarray:
    """T M: the transform of the rows of a matrix [n, m]."""
    out = np.array(matrix)
    for index, block in transform.blocks:
        out[index] = (matrix[index].T @ block.T).T
    return out


def cut(blocks: Sequence[np.ndarray], size: int | None) -> list[np.ndarray]:
    """Blocks cut into smaller ones of `size` channels; one that `size` does not divide stays whole."""
    made: list[np.ndarray] = []
    for index in blocks:
        made += np.split(index, len(index) // size) if size and len(index) % size == 0 else [index]
    return made


def block_rotation(n: int, block: int, signs: np.ndarray | None = None, *, transpose: bool = False) -> Mix:
    """What a `hadamard` op of these options does to n channels.

    Args:
        n: the number of channels, a multiple of `block`.
        block: a known order.
        signs: float64 [n] of +-1.
        transpose: the inverse.
    """
    made: list[Block] = []
    for start in range(0, n, block):
        own = None if signs is None else signs[start : start + block]
        rotation = Rotation(block, own, transposed=transpose)
        made.append((np.arange(start, start + block), cast(np.ndarray, rotation)))
    return Mix(made, n, orthogonal=True)
