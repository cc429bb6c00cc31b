"""Exact 1-D k-means: against brute force, against scikit-learn, and the bound of what is not exact."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from planish.passes import kmeans
from planish.passes.kmeans import choose_clusters, cluster_rows, cluster_sorted, cluster_values


def brute_force(values: np.ndarray, clusters: int) -> float:
    """The least cost over all ways of cutting the sorted values."""
    values, n, best = np.sort(values), len(values), np.inf
    for cuts in itertools.combinations_with_replacement(range(n + 1), clusters - 1):
        ends = [0, *cuts, n]
        runs = [values[a:b] for a, b in itertools.pairwise(ends) if b > a]
        best = min(best, sum(float(((run - run.mean()) ** 2).sum()) for run in runs))
    return best


def cost_of(values: np.ndarray, ids: np.ndarray) -> float:
    return sum(float(((values[ids == j] - values[ids == j].mean()) ** 2).sum()) for j in np.unique(ids))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(-100, 100) | st.integers(-3, 3).map(float), min_size=1, max_size=10),
    st.integers(1, 4),
    st.sampled_from([0.0, 1000.0]),
)
def test_as_good_as_brute_force(values: list[float], clusters: int, offset: float) -> None:
    held = np.array(values) + offset
    slack = 1e-9 * float((held**2).sum()) + 1e-300
    best = brute_force(held, clusters)
    for found in (cluster_values(held, clusters), cluster_rows(held[None], clusters)):
        assert found.exact
        ids = found.ids(held[None])[0]
        assert abs(found.cost[0] - best) <= slack
        assert abs(cost_of(held, ids) - best) <= slack
        assert ids.max() < clusters
        for a, b in itertools.pairwise(np.argsort(held, kind="stable")):  # ids ascend, and equal values agree
            assert ids[a] <= ids[b]
            assert held[a] != held[b] or ids[a] == ids[b]


def test_rows_are_clustered_by_themselves() -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(size=(30, 41)), rng.integers(0, 2, (5, 41)), np.zeros((2, 41))])
    together = cluster_rows(rows, 3)
    for r, row in enumerate(rows):
        alone = cluster_values(row, 3)
        np.testing.assert_allclose(together.cost[r], alone.cost[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(together.lower[r], alone.lower[0])


def test_chunks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(1).normal(size=(20, 16))
    whole = cluster_rows(rows, 3).ids(rows)
    monkeypatch.setattr(kmeans, "CHUNK", 40)
    np.testing.assert_array_equal(cluster_rows(rows, 3).ids(rows), whole)


def test_never_worse_than_lloyd() -> None:
    """What the reference code runs: scikit-learn's k-means, ten starts."""
    values = np.random.default_rng(2).standard_t(3, 3000)
    ours = cluster_values(values, 3)
    theirs = KMeans(3, n_init=10, random_state=0).fit(values[:, None])
    assert ours.cost[0] <= theirs.inertia_ * (1 + 1e-12)
    assert ours.cost[0] >= theirs.inertia_ * 0.9


def test_weights_count_copies() -> None:
    values, copies = np.array([0.0, 1.0, 5.0, 6.0]), np.array([3, 1, 1, 7])
    weighted = cluster_sorted(values[None], copies[None].astype(float), 2)
    plain = cluster_values(np.repeat(values, copies), 2)
    np.testing.assert_allclose(weighted.cost, plain.cost, rtol=1e-12)
    np.testing.assert_array_equal(weighted.lower, plain.lower)


def test_bins_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit of distinct values the result lies between the bound and the stated cost."""
    monkeypatch.setattr(kmeans, "BINS", 64)
    values = np.random.default_rng(3).standard_t(4, 5000)
    exact, binned = cluster_values(values, 3), cluster_values(values, 3, exact_limit=1000)
    assert exact.exact
    assert not binned.exact
    assert binned.least[0] <= exact.cost[0] <= binned.cost[0]
    assert binned.cost[0] - binned.least[0] < 0.5 * exact.cost[0]
    assert cost_of(values, binned.ids(values[None])[0]) <= binned.cost[0] * (1 + 1e-9)


def test_scopes() -> None:
    weight = np.random.default_rng(4).normal(size=(6, 10))
    weight[3] *= 100
    np.testing.assert_array_equal(choose_clusters(weight, 3, "row"), cluster_rows(weight, 3).ids(weight))
    assert set(np.unique(choose_clusters(weight, 3, "tensor")[:3])) == {1}  # row 3 has the rest to itself
    grouped = choose_clusters(weight, 3, "g4")  # 4 + 4 + 2
    for start, stop in ((0, 4), (4, 8), (8, 10)):
        block = weight[:, start:stop]
        np.testing.assert_array_equal(grouped[:, start:stop], cluster_rows(block, 3).ids(block))
    assert choose_clusters(np.zeros((0, 4)), 3, "tensor").shape == (0, 4)
    assert choose_clusters(np.zeros((4, 0)), 3, "row").shape == (4, 0)
    assert not choose_clusters(np.full((4, 4), 2.5), 3, "tensor").any()
