"""Which channels are split and which are merged so that as many remain: the choice behind `reassemble-channels`.

    disassembly    channel j becomes T_j channels x_j / T_j                        (exact; `planish.passes.splits`)
    assembly       x_i W_:i + x_j W_:j  ~  (x_i + x_j) / 2 (W_:i + W_:j)           (r pairs, so that C channels remain)

The error of merging i and j is, exactly, that of a product of rank one:

    D(i, j) = |(x_i - x_j) / 2 (W_:i - W_:j)^T|^2 = |x_i - x_j|^2 |W_:i - W_:j|^2 / 4

so two matrices of distances give all of them. Even channels are matched with odd ones: each even channel names the
odd one with the least D, and the r least of these edges are merged. Several may name one channel: a group takes the
mean of its activations and the sum of its weights. Channels that were split are not merged.

QLLM (Liu et al., arXiv 2310.08041); the matching is that of Bolya et al., arXiv 2210.09461. The published code scores
a pair by ((sum of w_i + sum of w_j) |x_i - x_j|)^2: weights summed before they are squared, with the wrong sign. The
closed form is used here, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planish.passes.row_blocks import BlockError
from planish.passes.splits import choose_threshold


@dataclass(frozen=True, eq=False)
class Reassembly:
    """A map from C channels to as many: gather, weigh, sum in segments.

    Attributes:
        counts: int [C], T_j.
        index: int [C + r], the source channel of each entry; entries of a segment stand beside each other.
        sizes: int [C], entries of each segment, falling.
        weights: float64 [C + r]: 1 / T_j for a part of a split channel, 1 / size in a merged group.
    """

    counts: np.ndarray
    index: np.ndarray
    sizes: np.ndarray
    weights: np.ndarray

    @property
    def segments(self) -> np.ndarray:
        """The segment of each entry, int [C + r]."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def activations(self, x: np.ndarray) -> np.ndarray:
        """x [.., C] after the map, [.., C]."""
        out = np.zeros((len(self.sizes), *x.shape[:-1]), x.dtype)
        np.add.at(out, self.segments, np.moveaxis(x, -1, 0)[self.index] * self._column(x.ndim).astype(x.dtype))
        return np.moveaxis(out, 0, -1)

    def _column(self, rank: int) -> np.ndarray:
        return self.weights.reshape(-1, *(1,) * (rank - 1))

    def columns(self, weight: np.ndarray) -> np.ndarray:
        """The weight [outputs, C] that reads the mapped channels: the sum of the columns of each segment."""
        starts = np.cumsum(self.sizes) - self.sizes
        summed: np.ndarray = np.add.reduceat(weight[:, self.index], starts, axis=1)
        return summed

    def behind_split(self) -> Reassembly:
        """The same map from the C + r channels that are there after channels were split."""
        first = np.cumsum(self.counts) - self.counts
        index, weights, used = first[self.index], self.weights.copy(), np.zeros(len(self.counts), np.int64)
        for entry in np.flatnonzero(self.counts[self.index] > 1):
            channel = self.index[entry]
            index[entry] += used[channel]
            used[channel] += 1
            weights[entry] = 1.0
        return Reassembly(np.ones(int(self.counts.sum()), np.int64), index, self.sizes, weights)


def merge_errors(x: np.ndarray, weight: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """D(i, j) for i in `left` and j in `right`, float64 [len(left), len(right)].

    Args:
        x: rows [N, C]. weight: [outputs, C], of all that reads x.
    """
    errors: np.ndarray = _squares(x, left, right) * _squares(weight, left, right) / 4.0
    return errors


def _squares(columns: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """|a_i - a_j|^2 of columns."""
    one, two = columns[:, left].astype(np.float64), columns[:, right].astype(np.float64)
    found: np.ndarray = (one**2).sum(0)[:, None] + (two**2).sum(0)[None, :] - 2.0 * (one.T @ two)
    return found.clip(min=0.0)


@dataclass(frozen=True, eq=False)
class Matching:
    """The errors of merging each even channel with each odd one: independent of what is split."""

    errors: np.ndarray

    @staticmethod
    def of(x: np.ndarray, weight: np.ndarray) -> Matching:
        """From rows x [N, C] and the weights [outputs, C] that read them."""
        channels = np.arange(x.shape[1])
        return Matching(merge_errors(x, weight, channels[::2], channels[1::2]))

    def pairs(self, free: np.ndarray, merged: int) -> np.ndarray | None:
        """The `merged` least edges among free channels, int [merged, 2] (even, odd); None: there are not as many.

        Args:
            free: bool [C], the channels that may be merged.
        """
        even, odd = np.flatnonzero(free[::2]), np.flatnonzero(free[1::2])
        if merged == 0:
            return np.zeros((0, 2), np.int64)
        if len(even) < merged or not len(odd):
            return None
        errors = self.errors[np.ix_(even, odd)]
        nearest = errors.argmin(1)
        chosen = np.argsort(errors[np.arange(len(even)), nearest], kind="stable")[:merged]
        return np.stack([2 * even[chosen], 2 * odd[nearest[chosen]] + 1], 1)


def assembled(counts: np.ndarray, pairs: np.ndarray) -> Reassembly:
    """The map that splits channels into `counts` int [C] and merges pairs, int [r, 2] (one channel, the one named).

    C channels again if the counts sum to C + r. Larger groups come first, then all others in their order.
    """
    groups: dict[int, list[int]] = {}
    for one, named in pairs.tolist():
        groups.setdefault(named, [named]).append(one)
    gone = {channel for group in groups.values() for channel in group}
    segments = sorted(groups.values(), key=lambda g: -len(g))
    segments += [[j] for j, count in enumerate(counts.tolist()) if j not in gone for _ in range(count)]
    index = np.array([j for group in segments for j in group], np.int64)
    sizes = np.array([len(group) for group in segments], np.int64)
    weights = 1.0 / (np.repeat(sizes, sizes) * counts[index])
    return Reassembly(counts, index, sizes, weights)


def choose_reassembly(
    largest: np.ndarray, matching: Matching, error: BlockError, ratio: float, steps: int
) -> tuple[Reassembly, float, float] | None:
    """The map of least block error, its theta and that error; None where no change is better than all.

    Args:
        largest: max |x_j|, float64 [C].
        matching: of the rows and weights of the site.
        ratio: channels that are split off, per channel, at most.
        steps: how many numbers of channels are tried.
    """
    best: tuple[Reassembly, float, float] | None = None
    least = error.of(None)
    most = int(ratio * len(largest))
    budgets = np.unique(np.geomspace(1, most, steps).astype(np.int64)) if most else np.zeros(0, np.int64)
    for added in budgets.tolist():
        theta, counts = choose_threshold(largest, added)
        more = int(counts.sum()) - len(counts)
        pairs = matching.pairs(counts == 1, more)
        if more == 0 or pairs is None:
            continue
        change = assembled(counts, pairs)
        found = error.of(change)
        if found < least:
            best, least = (change, theta, found), found
    return best
