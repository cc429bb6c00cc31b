"""Exact 1-D k-means by dynamic programming.

    D_1(i) = c(0, i)        D_j(i) = min over m <= i of D_{j-1}(m) + c(m, i)

over the sorted values v of a row, with the cost of a run from prefix sums of weights w, sums and squares:

    c(m, i) = sum w v^2 - (sum w v)^2 / sum w        over positions m <= t < i

An optimal clustering of numbers cuts their sorted order, and the best m grows with i: each stage of the recurrence
is solved by halving the positions (divide and conquer), level by level, all rows and all positions of a level at
once. n log n a row and stage; equal values never part. This is ckmeans.1d.dp (Wang and Song, R Journal 3(2), 2011;
the monotone search: Gronlund et al., arXiv 1701.07204). No start, no seed: the same values give the same clusters.

`cluster_values` is exact up to `exact_limit` distinct values. Beyond, values are first gathered into `BINS` bins of
equal width, and the recurrence is exact on the bins' means. With W the squared error inside of the bins and M the
cost of the clustered means, the clustering found costs at most M + W, and none costs less than
(sqrt(M) - sqrt(W))^2, because replacing each value by its bin's mean moves the data by sqrt(W).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EXACT_LIMIT = 1 << 20  # distinct values on which the recurrence runs: 2^20 take half a second and 200 MB
BINS = EXACT_LIMIT
CHUNK = 1 << 19  # elements of the rows that are clustered at once


@dataclass(frozen=True, eq=False)
class Clusters:
    """A clustering of rows of numbers.

    Attributes:
        lower: float64 [R, k - 1], ascending: the least value of each cluster but the first; infinity for a cluster
            without values. An element lies in cluster sum(element >= lower).
        cost: float64 [R], the sum of squared distances to the means of the clusters.
        least: float64 [R], what no clustering into k can fall below; equal to `cost` where it is exact.
    """

    lower: np.ndarray
    cost: np.ndarray
    least: np.ndarray

    @property
    def exact(self) -> bool:
        """True if no better clustering exists."""
        return bool((self.cost == self.least).all())

    def ids(self, values: np.ndarray) -> np.ndarray:
        """The cluster of each element of rows [R, n], uint8."""
        found = np.zeros(values.shape, np.uint8)
        for j in range(self.lower.shape[1]):
            found += values >= self.lower[:, j, None]
        return found


class _Costs:
    """The cost of runs of sorted rows, from prefix sums over [R, n + 1], flattened."""

    def __init__(self, values: np.ndarray, weights: np.ndarray) -> None:
        # about the weighted mean, or the difference of squares would cancel
        total = weights.sum(1, keepdims=True)
        centred = values - (weights * values).sum(1, keepdims=True) / np.where(total == 0, 1.0, total)

        def prefix(terms: np.ndarray) -> np.ndarray:
            return np.pad(np.cumsum(terms, 1), ((0, 0), (1, 0))).reshape(-1)

        self.weight = prefix(weights)
        self.sum = prefix(weights * centred)
        self.square = prefix(weights * centred**2)

    def of(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """c(first, last), of flat positions in the same row."""
        mass = self.weight[last] - self.weight[first]
        sums = self.sum[last] - self.sum[first]
        cost = self.square[last] - self.square[first] - sums**2 / np.where(mass == 0, 1.0, mass)
        found: np.ndarray = np.maximum(cost, 0.0)
        return found


def cluster_sorted(values: np.ndarray, weights: np.ndarray, clusters: int) -> Clusters:
    """The best clustering of each of R rows.

    Args:
        values: float64 [R, n], ascending along each row, n >= 1.
        weights: float64 [R, n], above 0 (0: padding at the end of a row).
        clusters: k >= 1.
    """
    rows, n = values.shape
    costs, size = _Costs(values, weights), n + 1
    base = np.arange(rows) * size
    ends = base + n
    best = costs.of(np.repeat(base, size), np.arange(rows * size))  # D_1
    cuts: list[np.ndarray] = []
    for _ in range(clusters - 2):
        best, cut = _stage(costs, best, rows, size)
        cuts.append(cut)
    lower = np.full((rows, clusters - 1), np.inf)
    if clusters == 1:
        return Clusters(lower, best[ends], best[ends])
    # the last stage is asked for whole rows only
    every = np.arange(rows * size)
    last = (best + costs.of(every, np.repeat(ends, size))).reshape(rows, size)
    place = ends - last[:, ::-1].argmin(1)  # of equals the last: clusters without values are the upper ones
    total: np.ndarray = last.min(1)
    padded = np.pad(np.where(weights > 0, values, np.inf), ((0, 0), (0, 1)), constant_values=np.inf).reshape(-1)
    for j in range(clusters - 2, -1, -1):
        lower[:, j] = padded[place]
        if j:
            place = cuts[j - 1][place]
    return Clusters(lower, total, total)


def _stage(costs: _Costs, before: np.ndarray, rows: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """D_j and its best cut at every position of every row, from D_{j-1}; both flat [rows * size]."""
    best, cut = np.empty(rows * size), np.zeros(rows * size, np.int64)
    base = np.arange(rows) * size
    step = 1 << max(size - 1, 1).bit_length()
    while step >= 1:  # positions step - 1, 3 step - 1, ..: halfway between those that are known
        places = np.arange(step - 1, size, 2 * step)
        if len(places):
            left, right = places - step, places + step
            at = (base[:, None] + places).reshape(-1)
            low = np.where(left >= 0, cut[(base[:, None] + np.maximum(left, 0))], base[:, None]).reshape(-1)
            known = right < size
            high = np.where(known, cut[base[:, None] + np.where(known, right, 0)], at.reshape(rows, -1)).reshape(-1)
            best[at], cut[at] = _ragged_min(costs, before, at, low, np.minimum(high, at))
        step //= 2
    return best, cut


def _ragged_min(
    costs: _Costs, before: np.ndarray, at: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each position the least before[m] + c(m, position) over low <= m <= high, and the last such m."""
    lengths = high - low + 1
    starts = np.cumsum(lengths) - lengths
    owner = np.repeat(np.arange(len(at)), lengths)
    m = np.arange(int(lengths.sum())) - (starts - low)[owner]
    cost = before[m] + costs.of(m, at[owner])
    least = np.minimum.reduceat(cost, starts)
    hit = np.flatnonzero(cost == least[owner])
    chosen = hit[np.searchsorted(owner[hit], np.arange(len(at)), side="right") - 1]
    return least, m[chosen]


def cluster_rows(rows: np.ndarray, clusters: int) -> Clusters:
    """The best clustering of each row by itself, exactly.

    Args:
        rows: [R, n], finite.
        clusters: k >= 1.
    """
    data = np.asarray(rows, np.float64)
    height = max(CHUNK // max(data.shape[1], 1), 1)
    if not data.size:
        return Clusters(np.full((len(data), clusters - 1), np.inf), np.zeros(len(data)), np.zeros(len(data)))
    parts = []
    for start in range(0, len(data), height):
        block = np.sort(data[start : start + height], 1)
        # equal values become one of several times the weight: a cut can lie at the first of a run only
        first = np.ones(block.shape, bool)
        first[:, 1:] = block[:, 1:] != block[:, :-1]
        place = np.cumsum(first, 1) - 1
        width = int(place.max()) + 1
        index = np.arange(len(block))[:, None]
        values = np.repeat(block[:, -1:], width, 1)
        values[index, place] = block
        weights = np.bincount((index * width + place).reshape(-1), minlength=len(block) * width)
        weights = weights.reshape(values.shape).astype(np.float64)
        parts.append(cluster_sorted(values, weights, clusters))
    return Clusters(*(np.concatenate([getattr(p, a) for p in parts]) for a in ("lower", "cost", "least")))


def cluster_values(values: np.ndarray, clusters: int, exact_limit: int = EXACT_LIMIT) -> Clusters:
    """The best clustering of all elements of an array (R = 1): exact where there are few distinct values, else bounded.

    Args:
        values: any shape, finite.
        clusters: k >= 1.
        exact_limit: distinct values up to which it is exact.
    """
    flat = np.asarray(values, np.float64).reshape(-1)
    if flat.size == 0:
        return Clusters(np.full((1, clusters - 1), np.inf), np.zeros(1), np.zeros(1))
    distinct, counts = np.unique(flat, return_counts=True)
    if len(distinct) <= exact_limit:
        return cluster_sorted(distinct[None], counts[None].astype(np.float64), clusters)
    low, width = distinct[0], (distinct[-1] - distinct[0]) / BINS
    place = np.minimum(((distinct - low) / width).astype(np.int64), BINS - 1)
    edges = np.flatnonzero(np.diff(place, prepend=-1))
    mass = np.add.reduceat(counts, edges).astype(np.float64)
    means = np.add.reduceat(distinct * counts, edges) / mass
    inside = float((counts * (distinct - np.repeat(means, np.diff(edges, append=len(distinct)))) ** 2).sum())
    found = cluster_sorted(means[None], mass[None], clusters)
    starts = np.append(distinct[edges], np.inf)  # a bin lies in a cluster as a whole
    lower = starts[np.searchsorted(means, found.lower)]
    least = np.maximum(np.sqrt(found.cost) - np.sqrt(inside), 0.0) ** 2
    return Clusters(lower, found.cost + inside, least)


def choose_clusters(weight: np.ndarray, clusters: int, scope: str) -> np.ndarray:
    """The cluster of each element of a weight, uint8 of its shape: 0 holds the least values.

    Args:
        weight: float64 [N, K], finite.
        clusters: 2 to 4.
        scope: who is clustered by itself: "tensor", "row", or "gN" (N consecutive elements of a row).
    """
    if weight.size == 0:
        return np.zeros(weight.shape, np.uint8)
    if scope == "tensor":
        return cluster_values(weight, clusters).ids(weight.reshape(1, -1)).reshape(weight.shape)
    if scope == "row":
        return cluster_rows(weight, clusters).ids(weight)
    group = int(scope[1:])
    n, k = weight.shape
    whole = k // group * group
    ids = np.zeros(weight.shape, np.uint8)
    blocks = np.ascontiguousarray(weight[:, :whole]).reshape(-1, group)
    ids[:, :whole] = cluster_rows(blocks, clusters).ids(blocks).reshape(n, whole)
    if whole < k:  # the last group of a row is shorter
        ids[:, whole:] = cluster_rows(weight[:, whole:], clusters).ids(weight[:, whole:])
    return ids
