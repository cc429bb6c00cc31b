"""Ranges of activations from statistics, and how errors are stated."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from planish.ir.formats import Format
from planish.ir.rounding import CLIPS, Grid, grid_of_range
from planish.ir.stats import ChannelStats

Clip = Literal["max", "mse"]
StaticRange = Literal["min-max", "percentile", "mse"]


def decibels(signal: float, noise: float) -> float:
    """The ratio of two energies in dB; infinity without noise."""
    return float("inf") if noise == 0 else 10.0 * float(np.log10(max(signal, 1e-300) / noise))


def sqnr(exact: np.ndarray, got: np.ndarray) -> float:
    """Signal-to-quantisation-noise ratio in dB."""
    return decibels(float((exact**2).sum()), float(((exact - got) ** 2).sum()))


def static_grid(low: float, high: float, form: Format) -> Grid:
    """The grid of a tensor with that range, its scale and zero point [1, 1]."""
    ends = (torch.full((1, 1), v, dtype=torch.float64) for v in (low, high))
    return grid_of_range(next(ends), next(ends), form)


def choose_static_range(
    record: ChannelStats, form: Format, rule: StaticRange = "min-max", percentile: float = 99.99
) -> tuple[float, float]:
    """The range of a tensor from its statistics; it contains 0.

    Args:
        rule: `min-max` of all calibration data; the central `percentile` of the sampled elements; `mse`, the clipping
            of the first with the least squared rounding error on the samples.
    """
    low, high = min(float(record.minimum.min()), 0.0), max(float(record.maximum.max()), 0.0)
    if rule == "percentile":
        tail = (100.0 - percentile) / 2.0
        low, high = (float(v) for v in np.percentile(record.samples, [tail, 100.0 - tail]))
        return min(low, 0.0), max(high, 0.0)
    if rule == "mse":
        x = torch.from_numpy(record.samples.astype(np.float64)).reshape(1, -1)
        trials = []
        for fraction in CLIPS:
            ends = low * fraction, high * fraction
            grid = static_grid(*ends, form)
            trials.append((float((grid.values(grid.codes(x)) - x).square().sum()), ends))
        return min(trials)[1]
    return low, high
