"""Choosing an order of channels, and what quantisation in groups of channels makes of it.

A group is a run of consecutive channels that share one range. `mean_group_range` is what group-wise
quantisation pays: the width of a group's range, averaged over the groups. `imbalance` is what rotations
within blocks pay: the largest mean magnitude of a block over the average one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Method = Literal["sort", "zigzag", "k-sort", "group-by-range"]
CLUSTER_ROUNDS = 16  # of Lloyd's iteration


def runs(count: int, group: int) -> list[np.ndarray]:
    """Consecutive groups of `group` out of `count` positions; the last may be shorter."""
    return [np.arange(i, min(i + group, count)) for i in range(0, count, group)]


def group_widths(low: np.ndarray, high: np.ndarray, group: int) -> np.ndarray:
    """max high - min low of each group of consecutive channels, float64 [groups]."""
    starts = np.arange(0, len(low), group)
    widths: np.ndarray = np.maximum.reduceat(high, starts) - np.minimum.reduceat(low, starts)
    return widths


def mean_group_range(low: np.ndarray, high: np.ndarray, segments: Sequence[np.ndarray], group: int) -> float:
    """The mean width of the groups of consecutive channels; no group reaches over the border of a segment.

    Args:
        low, high: float64 [positions], the extremes of each.
        segments: the positions of each segment, in order.
    """
    return float(np.mean(np.concatenate([group_widths(low[s], high[s], group) for s in segments])))


def imbalance(low: np.ndarray, high: np.ndarray, segments: Sequence[np.ndarray], group: int) -> float:
    """The largest mean magnitude of a group over the mean of all; 1: balanced."""
    largest = np.maximum(np.abs(low), np.abs(high))
    means = [largest[s[run]].mean() for s in segments for run in runs(len(s), group)]
    whole = float(np.mean([largest[s].mean() for s in segments]))
    return float(max(means)) / whole if whole > 0 else 1.0


def falling(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Indices by falling magnitude, ties in order."""
    return np.argsort(-np.maximum(np.abs(low), np.abs(high)), kind="stable")


def zigzag(low: np.ndarray, high: np.ndarray, group: int) -> np.ndarray:
    """Channels sorted by magnitude, dealt to the groups there and back: 0, 1, .., K-1, K-1, .., 1, 0, 0, ...

    The k-th largest of all lies in group k, and the sums of the groups balance (DuQuant, arXiv 2406.01721).
    """
    order = falling(low, high)
    room = [len(run) for run in runs(len(order), group)]
    dealt: list[list[int]] = [[] for _ in room]
    there = range(len(room))
    taken = iter(order.tolist())
    for turn in range(max(room)):
        for index in there if turn % 2 == 0 else reversed(there):
            if len(dealt[index]) < room[index]:
                dealt[index].append(next(taken))
    return np.array([channel for part in dealt for channel in part], np.int64)


def group_by_range(low: np.ndarray, high: np.ndarray, group: int) -> np.ndarray:
    """The order, of several, with the smallest sum of group ranges.

    Tried: as it is; by magnitude (the best there is where ranges are symmetric), by the lower end, by the upper
    end, by the middle; by clusters of (low, high) (RPTQ, arXiv 2304.01089), each sorted by magnitude.
    """
    candidates = [
        np.arange(len(low)),
        falling(low, high),
        np.argsort(low, kind="stable"),
        np.argsort(high, kind="stable"),
        np.argsort(low + high, kind="stable"),
        np.lexsort((-(high - low), _clusters(low, high, max(len(low) // group, 1)))),
    ]
    costs = [group_widths(low[order], high[order], group).sum() for order in candidates]
    return candidates[int(np.argmin(costs))]


def _clusters(low: np.ndarray, high: np.ndarray, count: int) -> np.ndarray:
    """The cluster of each channel in the plane of (low, high): Lloyd's iteration from evenly spaced quantiles."""
    points = np.stack([low, high], 1)
    start = falling(low, high)[np.linspace(0, len(low) - 1, count).astype(np.int64)]
    centres = points[start]
    nearest = np.zeros(len(low), np.int64)
    for _ in range(CLUSTER_ROUNDS):
        nearest = ((points[:, None] - centres[None]) ** 2).sum(-1).argmin(1)
        means = np.array([points[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(count)])
        if (means == centres).all():
            break
        centres = means
    rank = np.empty(count, np.int64)
    rank[np.lexsort((centres[:, 1], centres[:, 0]))] = np.arange(count)
    return rank[nearest]


def choose_order(
    low: np.ndarray, high: np.ndarray, blocks: Sequence[np.ndarray], group: int, method: Method
) -> np.ndarray:
    """The permutation of a space's channels, int64 [n]; it stays within the blocks.

    Args:
        low, high: float64 [n], the extremes of each channel (of weights alone: minus and plus its norm).
        blocks: the channels of each block, ascending.
        group: channels that share a range.
    """
    order = np.arange(len(low))
    for block in blocks:
        a, b = low[block], high[block]
        match method:
            case "sort" | "k-sort":
                local = falling(a, b)
            case "zigzag":
                local = zigzag(a, b, group)
            case "group-by-range":
                local = group_by_range(a, b, group)
        order[block] = block[local]
    return order
