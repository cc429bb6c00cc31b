"""The best matrix of low rank, how far from it we are, and the branch that quantisation needs: pure functions.

    W ~ up down        up [O, r] = U_r diag(sigma_r)        down [r, C] = V_r^T

Small matrices get a full SVD in float64. Large ones get a subspace iteration with oversampling (Halko, Martinsson,
Tropp, arXiv 0909.4061), and a bound on what it misses, computed from its own result:

    Q = range found, B = Q^T W = U' diag(sigma) V^T, E = W - Q B, S = E V diag(sigma), m >= |E|_2^2
    for each t > 0:  W W^T  <=  [[diag(sigma^2) + S^T S / t, 0], [0, (m + t) I]]       in the basis (Q U', rest)

so that the r largest eigenvalues of the right side sum to at least the most energy that rank r can hold. m comes from
k Lanczos steps with a random start, which fall short of |E|_2^2 by a fraction e with a probability of at most
1.648 sqrt(n) exp(-sqrt(e) (2k - 1)) (Kuczynski, Wozniakowski, SIAM J. Matrix Anal. 13, 1992): here 1e-9.

The branch for a quantiser Q (SVDQuant, arXiv 2411.05007) is iterated while the output error falls:

    L_1 = SVD_r(W)        L_(t+1) = SVD_r(W - Q(W - L_t))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal

SMALL = 256  # the shorter side up to which a full SVD is taken
OVERSAMPLING = 16  # directions beyond the rank
ROUNDS = 6  # of subspace iterations, each of POWER steps, until the bound is tight
POWER = 4
LANCZOS = 60
FAILURE = 1e-9  # probability that the bound does not hold
TOLERANCE = 0.01  # energy beyond the least possible, as a fraction of it, above which a full SVD is taken


@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix of low rank, close to some W.

    Attributes:
        up, down: float64 [O, r] and [r, C].
        excess: an upper bound on |W - up down|_F^2 / least - 1, least that of the best matrix of this rank; 0 from
            a full SVD.
        full: a full SVD was taken.
    """

    up: torch.Tensor
    down: torch.Tensor
    excess: float = 0.0
    full: bool = True


def truncated_svd(weight: torch.Tensor, rank: int, seed: int = 0, *, small: int = SMALL) -> LowRank:
    """The best matrix of a rank, or one that is proven to be nearly as good.

    Args:
        weight: [O, C], computed with in float64.
        rank: at most min(O, C).
        seed: of the random subspace.
        small: the shorter side up to which a full SVD is taken at once.
    """
    weight = weight.double()
    wide = rank + OVERSAMPLING
    if min(weight.shape) > max(small, wide):
        generator = torch.Generator().manual_seed(seed)
        basis = torch.randn(weight.shape[1], wide, generator=generator, dtype=torch.float64)
        for _ in range(ROUNDS):
            left, values, right = subspace(weight, basis, POWER)
            excess = excess_bound(weight, left, values, right, rank, seed)
            if excess <= TOLERANCE:
                return LowRank(left[:, :rank] * values[:rank], right[:rank], excess, full=False)
            basis = right.T
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return LowRank(left[:, :rank] * values[:rank], right[:rank])


def subspace(weight: torch.Tensor, basis: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(left [O, l], values [l] falling, right [l, C]) of W restricted to a subspace near its largest directions.

    Args:
        weight: [O, C].
        basis: [C, l], where to start; after each of the steps the error falls by (sigma_l / sigma_r)^2.
    """
    q = torch.linalg.qr(weight @ basis).Q
    for _ in range(steps):
        q = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ q).Q).Q
    left, values, right = torch.linalg.svd(q.T @ weight, full_matrices=False)
    return q @ left, values, right


def excess_bound(
    weight: torch.Tensor, left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, rank: int, seed: int = 0
) -> float:
    """An upper bound on |W - W'|_F^2 / |W - best|_F^2 - 1, W' the first `rank` directions of a `subspace`.

    Infinite where nothing can be said.
    """
    energy = values.square()
    missed = weight @ right.T - left * values  # E V
    coupling = missed * values  # S
    bound = _largest_outside(weight, left, seed)
    gram = coupling.T @ coupling
    most = float("inf")
    for share in np.geomspace(1e-4, 10.0, 26):
        t = max(share * bound, 1e-300)
        inside = torch.linalg.eigvalsh(torch.diag(energy) + gram / t).flip(0)
        most = min(most, float(inside[:rank].clamp(min=bound + t).sum()))
    kept = float(energy[:rank].sum())
    least = float(weight.square().sum()) - most
    return max(most - kept, 0.0) / least if least > 0 else float("inf")


def _largest_outside(weight: torch.Tensor, left: torch.Tensor, seed: int) -> float:
    """An upper bound on |E|_2^2, E = W without its part in the span of `left`; it fails with probability FAILURE."""
    n = weight.shape[1]
    generator = torch.Generator().manual_seed(seed + 1)
    v = torch.randn(n, generator=generator, dtype=weight.dtype)
    v /= v.norm()
    known: list[torch.Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []
    steps = min(LANCZOS, n)
    for step in range(steps):
        known.append(v)
        y = weight @ v
        y = y - left @ (left.T @ y)
        y = weight.T @ (y - left @ (left.T @ y))
        diagonal.append(float(v @ y))
        basis = torch.stack(known)
        y = y - basis.T @ (basis @ y)
        y = y - basis.T @ (basis @ y)
        norm = float(y.norm())
        if step + 1 == steps or norm <= 1e-14 * max(diagonal[0], 1e-300):
            break
        beside.append(norm)
        v = y / norm
    found = float(eigh_tridiagonal(np.array(diagonal), np.array(beside[: len(diagonal) - 1]), eigvals_only=True)[-1])
    short = (np.log(1.648 * np.sqrt(n) / FAILURE) / (2 * len(diagonal) - 1)) ** 2
    return max(found, 0.0) / (1.0 - short) if short < 1.0 else float("inf")


class Decomposer:
    """Quick decompositions of matrices that change little from one to the next, in their own dtype.

    Small ones get a full SVD; of large ones a subspace iteration, which starts where the last ended.

    Args:
        rank: of the results.
        seed: of the first subspace.
    """

    def __init__(self, rank: int, seed: int = 0) -> None:
        self.rank = rank
        self.seed = seed
        self.basis: torch.Tensor | None = None

    def __call__(self, target: torch.Tensor) -> LowRank:
        """The matrix of low rank near `target` [O, C]."""
        wide = self.rank + OVERSAMPLING
        if min(target.shape) <= max(SMALL, wide):
            left, values, right = torch.linalg.svd(target, full_matrices=False)
        else:
            steps = 1
            if self.basis is None:
                generator = torch.Generator().manual_seed(self.seed)
                self.basis = torch.randn(target.shape[1], wide, generator=generator, dtype=target.dtype)
                steps = 2
            left, values, right = subspace(target, self.basis, steps)
            self.basis = right.T
        return LowRank(left[:, : self.rank] * values[: self.rank], right[: self.rank], full=False)


@dataclass(frozen=True, eq=False)
class Branch:
    """A low-rank branch beside a quantised residual.

    Attributes:
        low: up and down.
        target: the matrix that they are the decomposition of, [O, C].
        error: the output error with it, residual quantised.
        steps: how many decompositions were tried.
    """

    low: LowRank
    target: torch.Tensor
    error: float
    steps: int


def choose_branch(
    weight: torch.Tensor,
    decompose: Callable[[torch.Tensor], LowRank],
    rounded: Callable[[torch.Tensor], torch.Tensor],
    error: Callable[[LowRank, torch.Tensor, torch.Tensor], float],
    iterations: int,
) -> Branch:
    """The branch with the least output error along L_(t+1) = SVD_r(W - Q(W - L_t)), up to the first that is worse.

    Args:
        weight: W [O, C].
        decompose: a matrix of that shape to one of low rank.
        rounded: Q.
        error: of a branch, its residual W - L and the rounded residual.
        iterations: decompositions at most.
    """
    target = weight
    best: Branch | None = None
    for step in range(1, iterations + 1):
        low = decompose(target)
        residual = weight - (low.up @ low.down).to(weight.dtype)
        held = rounded(residual)
        now = error(low, residual, held)
        if best is not None and not now < best.error:
            return Branch(best.low, best.target, best.error, step)
        best = Branch(low, target, now, step)
        target = weight - held
    assert best is not None
    return best


def smoothing_candidates(largest: np.ndarray, weight: np.ndarray, grid: int) -> Iterator[tuple[str, np.ndarray]]:
    """s = a^alpha / w^beta for (0, 0), (alpha, 0) and (alpha, 1 - alpha), alpha = i / grid: 2 grid - 1 of them.

    Args:
        largest: a = max |x_j|, float64 [n].
        weight: w = max |W_:j| over all readers, float64 [n].

    Yields:
        A label and s, float64 [n]: where it is zero or not finite, 1.
    """
    yield "none", np.ones(len(largest))
    for i in range(1, grid):
        alpha = i / grid
        for beta in (0.0, 1.0 - alpha):
            with np.errstate(divide="ignore", invalid="ignore"):
                s = largest**alpha / weight**beta
            s[s == 0] = 1.0
            yield f"alpha={alpha:g} beta={beta:g}", s if np.isfinite(s).all() else np.ones(len(s))
