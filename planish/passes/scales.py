"""Choosing the scale of each channel, and judging it: the solvers of `scale-channels`.

The choosers are pure functions of ranges, a = max|x_j| of activations and w = max|W_:j| of weights, both
float64 [n]; the activation is divided by what they return.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from planish.ir.formats import Format
from planish.ir.rounding import best_grid, blocks_of, fake_quantize, grid_of, unblocked
from planish.passes.sites import row_floor

FLOOR = 1e-5
LIMIT = 1e4  # of a factor that weights alone choose
OUTPUTS = 8192  # of one reader that are judged; of a larger one (a head over a vocabulary) every so many-th


def smoothquant_scale(largest: np.ndarray, weight: np.ndarray, alpha: float) -> np.ndarray:
    """s = a^alpha / w^(1 - alpha), both clamped to 1e-5; float64 [n]."""
    s: np.ndarray = np.maximum(largest, FLOOR) ** alpha / np.maximum(weight, FLOOR) ** (1.0 - alpha)
    return s.clip(min=FLOOR)


def threshold_scale(largest: np.ndarray, threshold: float) -> np.ndarray:
    """s = max(1, a / t): channels within the threshold stay; float64 [n]."""
    return np.maximum(1.0, largest / max(threshold, FLOOR))


def percentile_scale(largest: np.ndarray, fraction: float = 0.005) -> np.ndarray:
    """The top channels are scaled down to the k-th largest, k = int(fraction n + 1.5); float64 [n]."""
    k = min(int(fraction * len(largest) + 1.5), len(largest))
    base = max(float(np.sort(largest)[-k]), FLOOR)
    return np.maximum(1.0, largest / base)


def balance_scale(written: np.ndarray, read: np.ndarray) -> np.ndarray:
    """s = (written / read)^(1/2), after which both sides are equal; 1 where one is zero; float64 [n].

    Args:
        written: max |W| of the weights that write each channel.
        read: max |W| of those that read it.
    """
    live = (written > 0) & (read > 0)
    s: np.ndarray = np.sqrt(np.where(live, written, 1.0) / np.where(live, read, 1.0))
    return s.clip(1.0 / LIMIT, LIMIT)


def awq_weight(weights: Sequence[np.ndarray], form: Format) -> np.ndarray:
    """w_j, the mean over all rows of |W_:j| / max |W| of its block: the weight side of AWQ; float64 [n].

    Args:
        weights: of each reader, float64 [outputs, n].
        form: says what a block is.
    """
    rows = torch.from_numpy(np.concatenate(weights)).abs()
    blocks = blocks_of(rows, form)
    shares = unblocked(blocks / blocks.amax(-1, keepdim=True).clamp(min=FLOOR), tuple(rows.shape))
    mean: np.ndarray = shares.mean(0).numpy()
    return mean


def awq_scale(mean: np.ndarray, weight: np.ndarray | None, alpha: float) -> np.ndarray:
    """s = m^alpha or m^alpha / w^(1 - alpha), divided by sqrt(max s min s); float64 [n].

    Args:
        mean: m, the mean of |x_j|.
        weight: w of `awq_weight`, or None.
    """
    s = np.maximum(mean, 1e-4) ** alpha
    if weight is not None:
        s = s / (weight + 1e-4) ** (1.0 - alpha)
    s = s.clip(min=1e-4)
    balanced: np.ndarray = s / np.sqrt(s.max() * s.min())
    return balanced


class Rounding(Protocol):
    """What stands for the quantiser while candidates are judged."""

    def activations(self, x: torch.Tensor, s: np.ndarray) -> torch.Tensor:
        """x [N, n], already divided by s [n], as its readers will see it."""

    def weight(self, w: torch.Tensor) -> torch.Tensor:
        """w [outputs, n] as it will be stored."""


@dataclass(frozen=True, eq=False)
class FormatQuantiser:
    """Rounding to any formats.

    Attributes:
        weights, inputs: the formats; None leaves that side in float.
        low, high: float64 [n], the calibrated extremes of the channels, for a static format.
        clip: `mse` takes, block by block, the fraction of a weight's range with the least squared error.
    """

    weights: Format | None
    inputs: Format | None
    low: np.ndarray
    high: np.ndarray
    clip: Literal["max", "mse"] = "max"

    def activations(self, x: torch.Tensor, s: np.ndarray) -> torch.Tensor:
        """x [N, n], already divided by s [n], as its readers will see it."""
        if self.inputs is None:
            return x
        if self.inputs.scale == "f8e4m3fn" and not self.inputs.static:  # at run time there is no scale of the tensor
            blocks = blocks_of(x, self.inputs)
            grid = grid_of(blocks, self.inputs, global_scale=1.0)
            return unblocked(grid.values(grid.codes(blocks)), tuple(x.shape))
        return fake_quantize(x, self.inputs, float((self.low / s).min()), float((self.high / s).max()))

    def weight(self, w: torch.Tensor) -> torch.Tensor:
        """w [outputs, n] as it will be stored."""
        if self.weights is None:
            return w
        if self.clip == "max":
            return fake_quantize(w, self.weights)
        blocks = blocks_of(w, self.weights)
        grid = best_grid(blocks, self.weights)
        return unblocked(grid.values(grid.codes(blocks)), tuple(w.shape))


@dataclass(frozen=True, eq=False)
class Quantiser:
    """The fake quantisation under which candidates are judged: uint8 activations, int8 weights per output.

    Attributes:
        granularity: of the activations: `tensor`, the range of the rows at hand; `token`, one range per row;
            `static`, the calibrated extremes of the channels.
        low, high: float64 [n], those extremes.
    """

    granularity: Literal["tensor", "token", "static"]
    low: np.ndarray
    high: np.ndarray

    def activations(self, x: torch.Tensor, s: np.ndarray) -> torch.Tensor:
        """x [N, n], already divided by s [n], as its readers will see it."""
        low, high = min(float((self.low / s).min()), 0.0), max(float((self.high / s).max()), 0.0)
        if self.granularity == "token":
            floor = row_floor(low, high)
            if floor is None:
                scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127.0
                return torch.round(x / scale) * scale
            zero = torch.floor(255.0 * floor / (x.amax(-1, keepdim=True).clamp(min=0.0) + floor)).clamp(min=1.0)
            return (torch.clamp(torch.round(x * zero / floor) + zero, 0, 255) - zero) * floor / zero
        if self.granularity == "tensor":
            low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        step = max((high - low) / 255.0, 1e-12)
        offset = round(-low / step)
        return (torch.clamp(torch.round(x / step) + offset, 0, 255) - offset) * step

    def weight(self, w: torch.Tensor) -> torch.Tensor:
        """w [outputs, n] rounded to int8 codes with one scale per output."""
        scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127.0
        return torch.round(w / scale) * scale


@dataclass(frozen=True, eq=False)
class Pair:
    """Weights as one rounds them, activations as another does."""

    of_weights: Rounding
    of_activations: Rounding

    def activations(self, x: torch.Tensor, s: np.ndarray) -> torch.Tensor:
        """x [N, n], already divided by s [n], as its readers will see it."""
        return self.of_activations.activations(x, s)

    def weight(self, w: torch.Tensor) -> torch.Tensor:
        """w [outputs, n] as it will be stored."""
        return self.of_weights.weight(w)


class Judge:
    """Judges scales of one site: the relative squared error of its readers' outputs under fake quantisation.

    Args:
        samples: float32 [N, n], what the readers read.
        weights: of each reader, float32 [outputs, n].
    """

    def __init__(self, samples: torch.Tensor, weights: Sequence[torch.Tensor], quantiser: Rounding) -> None:
        weights = [w[:: -(-len(w) // OUTPUTS)] for w in weights]
        self.samples = samples
        self.weight = torch.cat(weights)
        self.quantiser = quantiser
        self.exact = samples @ self.weight.T
        self.readers = [len(w) for w in weights]
        self.energy = [self._rows(part) for part in torch.split(self.exact, self.readers, 1)]

    @staticmethod
    def _rows(part: torch.Tensor) -> torch.Tensor:
        return part.square().sum(1).clamp(min=1e-30)

    def error(self, s: np.ndarray) -> float:
        """Mean over the rows, summed over the readers, of |Q(x / s) Q(W s)^T - x W^T|^2 / |x W^T|^2.

        Row by row, because norms behind the readers make every row count the same.
        """
        factors = torch.from_numpy(s.astype(np.float32))
        x = self.quantiser.activations(self.samples / factors, s)
        return self.measure(x @ self.quantiser.weight(self.weight * factors).T)

    def measure(self, outputs: torch.Tensor) -> float:
        """The error of outputs [N, all outputs of the readers judged]; they are not kept."""
        parts = torch.split(outputs.sub_(self.exact), self.readers, 1)
        return sum(float((self._rows(p) / e).mean()) for p, e in zip(parts, self.energy, strict=True))
