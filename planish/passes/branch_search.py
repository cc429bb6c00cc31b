"""Choosing the smoothing and the low-rank branch of linears that read one value: the search of `extract-low-rank`.

A candidate s is judged with everything active that will be there: with L = up down near W diag(s),

    y = Q((x + c) / s) Q(W diag(s) - L)^T - (c / s) (W diag(s) - L)^T + (x / s) L^T

against x W^T, on the sampled rows. c is the shift that makes x + c unsigned, 0 without one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from planish.ir.formats import Format
from planish.passes.low_rank import (
    Branch,
    Decomposer,
    LowRank,
    choose_branch,
    smoothing_candidates,
    truncated_svd,
)
from planish.passes.scales import OUTPUTS, FormatQuantiser, Judge

STEP = 128  # shifts are multiples of 1 / STEP
SEARCHED = 4096  # outputs of a group on which its smoothing is chosen; of a larger one every so many-th


def choose_shift(bound: float) -> float:
    """c >= 0, the least multiple of 1/128 with x + c >= 0 for all x >= bound: 22/128 for gelu, 0 for relu."""
    return max(float(np.ceil(-bound * STEP)) / STEP, 0.0)


def unsigned(form: Format) -> Format:
    """The format without a sign bit: for integers with a symmetric range; others as they are."""
    if form.is_float or not form.symmetric or form.scale == "f8e8m0":
        return form
    return replace(form, element=f"u{form.element[1:]}", rule="max")


@dataclass(frozen=True, eq=False)
class Choice:
    """What the search found.

    Attributes:
        label: of the candidate.
        s: the smoothing, float64 [n].
        error: with it, a branch and rounded residuals.
    """

    label: str
    s: np.ndarray
    error: float


class BranchSearch:
    """The candidates of one group of linears, and their errors.

    Args:
        samples: float32 [N, n], what the linears read.
        weights: of each linear, float64 [outputs, n].
        quantiser: what weights and activations are rounded to.
        rank: of the branch.
        shift: c.
        seed: of random subspaces.
    """

    def __init__(
        self,
        samples: torch.Tensor,
        weights: Sequence[np.ndarray],
        quantiser: FormatQuantiser,
        rank: int,
        shift: float = 0.0,
        seed: int = 0,
    ) -> None:
        parts = [torch.from_numpy(w.astype(np.float32)) for w in weights]
        starts = np.cumsum([0, *map(len, parts)])
        judged = [np.arange(a, a + len(p), -(-len(p) // OUTPUTS)) for a, p in zip(starts, parts, strict=False)]
        self.judged = torch.from_numpy(np.concatenate(judged))
        self.parts = parts
        self.weight = torch.cat(parts)
        self.samples = samples
        self.rank = rank
        self.shift = shift
        self.seed = seed
        self.judge = Judge(samples, parts, quantiser)
        self.quantiser = replace(quantiser, low=quantiser.low + shift, high=quantiser.high + shift)

    @property
    def plain(self) -> float:
        """The error of rounding alone."""
        ones = np.ones(self.weight.shape[1])
        held = self.quantiser.weight(self.weight)
        nothing = LowRank(torch.zeros(len(self.weight), 1), torch.zeros(1, len(ones)))
        return self._error(ones)(nothing, self.weight, held)

    def _error(self, s: np.ndarray) -> Callable[[LowRank, torch.Tensor, torch.Tensor], float]:
        factors = torch.from_numpy(s.astype(np.float32))
        x = self.samples / factors
        read = self.quantiser.activations(x + self.shift / factors, s)

        def error(low: LowRank, residual: torch.Tensor, held: torch.Tensor) -> float:
            up, down = low.up.float()[self.judged], low.down.float()
            y = read @ held[self.judged].T
            y += (x @ down.T) @ up.T
            if self.shift:
                y -= residual[self.judged] @ (self.shift / factors)
            return self.judge.measure(y)

        return error

    def smoothing(self, largest: np.ndarray, grid: int, weight: np.ndarray | None = None) -> Choice:
        """The best of the candidates of `smoothing_candidates`, each with the branch of one SVD.

        Args:
            largest: max |x_j|, float64 [n].
            grid: steps of alpha.
            weight: max |W_:j| over all linears, float64 [n], if it is not that of these.
        """
        weight = self.weight.abs().amax(0).double().numpy() if weight is None else weight
        if len(self.weight) > SEARCHED + len(self.parts):
            return self._thinned().smoothing(largest, grid, weight)
        decompose = Decomposer(self.rank, self.seed)
        best: Choice | None = None
        for label, s in smoothing_candidates(largest, weight, grid):
            scaled = self.weight * torch.from_numpy(s.astype(np.float32))
            found = choose_branch(scaled, decompose, self.quantiser.weight, self._error(s), 1)
            if best is None or found.error < best.error:
                best = Choice(label, s, found.error)
        assert best is not None
        return best

    def _thinned(self) -> BranchSearch:
        """The same with at most `SEARCHED` outputs (and one of each reader)."""
        step = -(-len(self.weight) // SEARCHED)
        weights = [part[::step].numpy() for part in self.parts]
        own = self.quantiser
        plain = replace(own, low=own.low - self.shift, high=own.high - self.shift)
        return BranchSearch(self.samples, weights, plain, self.rank, self.shift, self.seed)

    def branch(self, s: np.ndarray, iterations: int) -> Branch:
        """The branch for a smoothing, iterated; its decomposition is the certified one."""
        scaled = self.weight * torch.from_numpy(s.astype(np.float32))
        decompose, error = Decomposer(self.rank, self.seed), self._error(s)
        found = choose_branch(scaled, decompose, self.quantiser.weight, error, iterations)
        low = truncated_svd(found.target, self.rank, self.seed)
        residual = scaled - (low.up @ low.down).float()
        return replace(found, low=low, error=error(low, residual, self.quantiser.weight(residual)))
