"""Hadamard matrices of every order that Sylvester's and Paley's constructions reach, and the fast transform.

    Sylvester   H_ab = H_a (x) H_b,  H_2 = [[1, 1], [1, -1]]
    Paley I     H_(q+1)  = I + [[0, 1'], [-1, Q]]                                 q = 3 mod 4
    Paley II    H_2(q+1) = C (x) H_2 + I (x) [[1, -1], [-1, -1]],  C = [[0, 1'], [1, Q]]    q = 1 mod 4

with Q_ij = chi(a_i - a_j), chi the quadratic character of the field GF(q), q a prime power. Entries are +-1 and
H H' = n I holds in integers. An order n is written as a product of orders that are stored densely (`factors`),
H_n = H_f1 (x) H_f2 (x) ..., so that a product with H_n costs n (f1 + f2 + ...) rather than n^2.

Paley, On orthogonal matrices, J. Math. Phys. 12, 1933; Hedayat and Wallis, Ann. Statist. 6, 1978. Which orders models
need: QuaRot, arXiv:2404.00456, appendix; 11008 = 344 * 32 with Paley I over GF(7^3).
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np

DENSE = 64  # the largest power of two that is stored as one matrix


# -- finite fields -----------------------------------------------------------------------------------


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k, p prime; None if there are none."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None


def _remainder(poly: list[int], by: tuple[int, ...], p: int) -> list[int]:
    """`poly` modulo the monic polynomial `by`; coefficients ascend."""
    rest = list(poly)
    degree = len(by) - 1
    for top in range(len(rest) - 1, degree - 1, -1):
        lead = rest[top]
        for i, c in enumerate(by):
            rest[top - degree + i] = (rest[top - degree + i] - lead * c) % p
    return rest[:degree]


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """The first monic polynomial of degree k over GF(p) without a factor, coefficients ascending."""
    smaller = [(*tail, 1) for degree in range(1, k // 2 + 1) for tail in itertools.product(range(p), repeat=degree)]
    candidates = ((*tail, 1) for tail in itertools.product(range(p), repeat=k))
    return next(f for f in candidates if all(any(_remainder(list(f), g, p)) for g in smaller))


@cache
def character(q: int) -> np.ndarray:
    """chi(a_i - a_j) over the elements of GF(q): int8 [q, q], 0 on the diagonal, 1 at squares, -1 elsewhere.

    An element is the number whose digits to the base p are its coefficients.

    Raises:
        ValueError: q is no odd prime power.
    """
    found = prime_power(q)
    if found is None or found[0] == 2:
        raise ValueError(f"GF({q}): expected an odd prime power")
    p, k = found
    places = p ** np.arange(k)
    digits = (np.arange(q)[:, None] // places) % p
    modulus = _irreducible(p, k)
    square = np.zeros((q, 2 * k - 1), np.int64)
    for i, j in itertools.product(range(k), repeat=2):
        square[:, i + j] += digits[:, i] * digits[:, j]
    for top in range(2 * k - 2, k - 1, -1):
        for i in range(k + 1):
            if i < k:
                square[:, top - k + i] -= square[:, top] * modulus[i]
        square %= p
    chi = np.full(q, -1, np.int8)
    chi[(square[:, :k] % p) @ places] = 1
    chi[0] = 0
    index = np.zeros((q, q), np.int32)
    for place, digit in zip(places, digits.T, strict=True):
        index += ((digit[:, None] - digit[None, :]) % p).astype(np.int32) * int(place)
    return chi[index]


# -- orders ------------------------------------------------------------------------------------------


def _paley(n: int) -> int:
    """1 or 2 for an order of Paley's first or second construction, else 0."""
    if n % 4 == 0 and prime_power(n - 1) is not None:
        return 1
    if n % 4 == 0 and (n // 2 - 1) % 4 == 1 and prime_power(n // 2 - 1) is not None:
        return 2
    return 0


@cache
def _bases(n: int) -> tuple[int, ...] | None:
    """Paley orders and powers of two whose product is n: small orders first; None if there are none."""
    twos = n & -n
    if n == twos:
        return (n,)
    odd = n // twos
    best: tuple[int, ...] | None = None
    order = 4 * odd
    while n % order == 0:
        if _paley(order):
            return (order, n // order) if n > order else (order,)
        order *= 2
    for left in range(12, int(n**0.5) + 1, 4):
        if n % left == 0 and left & (left - 1) and _paley(left):
            rest = _bases(n // left)
            if rest is not None and (best is None or sum(rest) + left < sum(best)):
                best = (left, *rest)
    return best


def known(n: int) -> bool:
    """True if these constructions reach the order n."""
    return n >= 1 and _bases(n) is not None


def factors(n: int) -> tuple[int, ...]:
    """The orders of the dense factors of H_n, in the order of the Kronecker product.

    Raises:
        ValueError: the order is not reached.
    """
    bases = _bases(n) if n >= 1 else None
    if bases is None:
        raise ValueError(f"order {n}: no Hadamard matrix by Sylvester's and Paley's constructions")
    found: list[int] = []
    for base in bases:
        while base > DENSE and base & (base - 1) == 0:
            found.append(DENSE)
            base //= DENSE
        if base > 1 or n == 1:
            found.append(base)
    return tuple(found)


@cache
def dense(order: int) -> np.ndarray:
    """The matrix of one factor: int8 [order, order], read-only."""
    if order & (order - 1) == 0:
        made = np.ones((1, 1), np.int8)
        while len(made) < order:
            made = np.block([[made, made], [made, -made]])
    elif _paley(order) == 1:
        made = np.ones((order, order), np.int8)
        made[1:, 0] = -1
        made[1:, 1:] = character(order - 1) + np.eye(order - 1, dtype=np.int8)
    else:
        half = order // 2
        conference = np.ones((half, half), np.int8)
        conference[0, 0] = 0
        conference[1:, 1:] = character(half - 1)
        made = np.kron(conference, np.array([[1, 1], [1, -1]], np.int8))
        made += np.kron(np.eye(half, dtype=np.int8), np.array([[1, -1], [-1, -1]], np.int8))
    made.setflags(write=False)
    return made


def hadamard(n: int) -> np.ndarray:
    """H_n with entries +-1: int8 [n, n], H H' = n I.

    Raises:
        ValueError: the order is not reached (`known` tells).
    """
    made = np.ones((1, 1), np.int8)
    for order in factors(n):
        made = np.kron(made, dense(order))
    return made


def symmetric(n: int) -> bool:
    """True if H_n is its own transpose: then it is its own inverse but for the factor n."""
    return all(bool((dense(order) == dense(order).T).all()) for order in factors(n))


# -- the transform -----------------------------------------------------------------------------------


def apply(x: Any, n: int, *, transpose: bool = False) -> Any:
    """x H_n' / sqrt(n) on the last axis (blocks of n channels), or x H_n / sqrt(n): the inverse.

    Args:
        x: an array of numpy or a tensor of torch, float, of shape [..., m n].
        n: a known order.
        transpose: the inverse.

    Returns:
        Of the type, dtype and shape of x.
    """
    shape = tuple(x.shape)
    left, right = shape[-1] // n, n
    for order in factors(n):
        right //= order
        matrix = dense(order) / np.sqrt(order)
        matrix = matrix.T if transpose else matrix
        if right == 1:
            x = x.reshape((*shape[:-1], left, order)) @ _as(x, matrix.T)
        else:
            x = _as(x, matrix) @ x.reshape((*shape[:-1], left, order, right))
        left *= order
    return x.reshape(shape)


def _as(x: Any, matrix: np.ndarray) -> Any:
    """The matrix in the library and dtype of x."""
    if isinstance(x, np.ndarray):
        return matrix.astype(x.dtype)
    import torch

    return torch.from_numpy(np.ascontiguousarray(matrix)).to(x.dtype).to(x.device)


class Rotation:
    """The orthogonal matrix H_n diag(signs) / sqrt(n) (or its transpose), which numpy can multiply fast from the right.

    It stands for a matrix in `planish.ir.transform.Mix` and is never built: `array @ rotation` costs a fast transform.

    Args:
        n: a known order.
        signs: float64 [n] of +-1; None: ones.
        transposed: the transpose, which is the inverse.
    """

    def __init__(self, n: int, signs: np.ndarray | None = None, *, transposed: bool = False) -> None:
        factors(n)
        self.n = n
        self.signs = signs
        self.transposed = transposed

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.n

    @property
    def T(self) -> Rotation:
        return Rotation(self.n, self.signs, transposed=not self.transposed)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return (np.eye(self.n) @ self).astype(dtype or np.float64)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if ufunc is np.isfinite:
            return np.True_
        if ufunc is not np.matmul or method != "__call__" or inputs[1] is not self or options:
            return NotImplemented
        rows = inputs[0]
        if self.transposed:  # rows @ (H D)' = (rows * signs) @ H'
            return apply(rows if self.signs is None else rows * self.signs, self.n)
        turned = apply(rows, self.n, transpose=True)
        return turned if self.signs is None else turned * self.signs
