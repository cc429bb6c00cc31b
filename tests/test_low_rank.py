"""The decompositions: as good as a full SVD to the bound that they state; the iteration keeps the best."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.passes import low_rank
from planish.passes.low_rank import (
    Decomposer,
    LowRank,
    choose_branch,
    excess_bound,
    smoothing_candidates,
    subspace,
    truncated_svd,
)

SHAPES = [(400, 300), (300, 400)]
SPECTRA = {"flat": 0.0, "falling": -0.7, "steep": -2.0}


def matrix(shape: tuple[int, int], kind: str = "flat", seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall like k^power; flat: of independent normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if kind == "flat":
        return plain
    left, values, right = torch.linalg.svd(plain, full_matrices=False)
    return left * torch.arange(1, len(values) + 1, dtype=torch.float64) ** SPECTRA[kind] @ right


def tail(weight: torch.Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(weight)[rank:].square().sum())


def energy_left(weight: torch.Tensor, low: LowRank) -> float:
    return float((weight - low.up @ low.down).square().sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("rank", [1, 16, 32])
def test_as_good_as_a_full_svd_to_the_bound(shape: tuple[int, int], kind: str, rank: int) -> None:
    weight = matrix(shape, kind)
    low = truncated_svd(weight, rank)
    assert not low.full
    assert low.excess <= low_rank.TOLERANCE
    true = energy_left(weight, low) / tail(weight, rank) - 1
    assert -1e-9 <= true <= low.excess + 1e-9
    assert low.up.shape == (shape[0], rank)
    assert low.down.shape == (rank, shape[1])
    assert torch.allclose(low.down @ low.down.T, torch.eye(rank, dtype=torch.float64), atol=1e-10)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from(sorted(SPECTRA)), st.integers(0, 3))
def test_the_bound_holds_however_bad_the_subspace(seed: int, kind: str, steps: int) -> None:
    weight = matrix((120, 90), kind, seed)
    basis = torch.randn(90, 14, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    left, values, right = subspace(weight, basis, steps)
    bound = excess_bound(weight, left, values, right, 6, seed)
    low = LowRank(left[:, :6] * values[:6], right[:6])
    assert energy_left(weight, low) / tail(weight, 6) - 1 <= bound + 1e-9


def test_a_bad_subspace_is_seen() -> None:
    """Teeth: a subspace that misses the largest direction has a bound that says so."""
    weight = matrix((300, 300), "steep")
    left, values, right = torch.linalg.svd(weight)
    missing = excess_bound(weight, left[:, 1:30], values[1:30], right[1:30], 8)
    assert missing > 10
    assert excess_bound(weight, left[:, :30], values[:30], right[:30], 8) < 1e-9


def test_small_ones_are_exact() -> None:
    """|R|_F^2 is the energy of the tail (methods/a.md, 7)."""
    weight = matrix((64, 48))
    low = truncated_svd(weight, 8)
    assert low.full
    assert low.excess == 0.0
    assert np.isclose(energy_left(weight, low), tail(weight, 8), rtol=1e-12)


def test_what_is_not_tight_is_done_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "TOLERANCE", 1e-15)
    monkeypatch.setattr(low_rank, "ROUNDS", 1)
    weight = matrix((300, 290))
    low = truncated_svd(weight, 8)
    assert low.full
    assert np.isclose(energy_left(weight, low), tail(weight, 8), rtol=1e-12)


def test_same_seed_same_factors() -> None:
    weight = matrix((300, 290))
    one, two = (truncated_svd(weight, 8, seed=3) for _ in range(2))
    assert torch.equal(one.up, two.up)
    assert torch.equal(one.down, two.down)


def test_the_quick_one_comes_close_and_starts_where_it_ended() -> None:
    weight = matrix((300, 290), "falling").float()
    decompose = Decomposer(8)
    first, second = (energy_left(weight, decompose(weight)) / tail(weight, 8) for _ in range(2))
    assert first < 1.05
    assert second <= first * (1 + 1e-6)
    small = matrix((40, 30)).float()
    assert np.isclose(energy_left(small, Decomposer(8)(small)), tail(small, 8), rtol=1e-4)


# -- the iteration -------------------------------------------------------------------------------------


def rounded(x: torch.Tensor) -> torch.Tensor:
    """4 bits per row."""
    step = x.abs().amax(1, keepdim=True) / 7
    return torch.round(x / step) * step


def test_the_best_is_kept_and_the_first_worse_one_ends_it() -> None:
    """Errors as told: 3, 2, 1, then worse; and never a NaN."""
    weight = matrix((40, 30))
    for told, steps, kept in (([3.0, 2.0, 1.0, 1.5, 0.1], 4, 1.0), ([3.0, float("nan")], 2, 3.0), ([2.0], 1, 2.0)):
        errors = iter(told)
        found = choose_branch(weight, lambda t: truncated_svd(t, 4), rounded, lambda *_: next(errors), len(told))  # noqa: B023
        assert (found.steps, found.error) == (steps, kept)


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_the_kept_error_never_rises_with_more_iterations(seed: int, rank: int) -> None:
    """Outliers in a few columns: the iteration lowers the error of the weight, monotonically for what is kept."""
    weight = matrix((40, 30), "flat", seed)
    weight[:, :3] *= 20

    def error(low: LowRank, residual: torch.Tensor, held: torch.Tensor) -> float:
        assert torch.allclose(residual + low.up @ low.down, weight)  # branch and residual are the weight
        return float((low.up @ low.down + held - weight).square().sum())

    errors = [choose_branch(weight, lambda t: truncated_svd(t, rank), rounded, error, n).error for n in (1, 2, 4, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < float((rounded(weight) - weight).square().sum())


def test_the_toy_of_the_paper_falls() -> None:
    """Neither > low rank once > low rank iterated (methods/a.md, 7: 330,298, 23,996, 13,549 on its own toy)."""
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.normal(size=(128, 128)) + 8 * rng.normal(size=(128, 4)) @ rng.normal(size=(4, 128)))

    def error(low: LowRank, residual: torch.Tensor, held: torch.Tensor) -> float:
        return float((residual - held).square().sum())

    plain = float((weight - rounded(weight)).square().sum())
    once, often = (choose_branch(weight, lambda t: truncated_svd(t, 16), rounded, error, n) for n in (1, 50))
    assert once.error < plain / 20
    assert often.error < once.error
    assert often.steps > 2


# -- the candidates --------------------------------------------------------------------------------------


def test_the_thirty_nine_candidates() -> None:
    rng = np.random.default_rng(0)
    largest, weight = rng.lognormal(0, 2, 16), rng.lognormal(-1, 1, 16)
    found = dict(smoothing_candidates(largest, weight, 20))
    assert len(found) == 39
    assert np.array_equal(found["none"], np.ones(16))
    assert np.allclose(found["alpha=0.5 beta=0"], largest**0.5, rtol=1e-12)
    assert np.allclose(found["alpha=0.3 beta=0.7"], largest**0.3 / weight**0.7, rtol=1e-12)
    assert len(dict(smoothing_candidates(largest, weight, 10))) == 19


def test_candidates_of_zeros_are_harmless() -> None:
    for largest, weight in ((np.array([0.0, 2.0]), np.array([1.0, 1.0])), (np.array([1.0, 2.0]), np.array([0.0, 1.0]))):
        for _, s in smoothing_candidates(largest, weight, 5):
            assert np.isfinite(s).all()
            assert (s > 0).all()
