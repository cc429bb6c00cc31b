"""Choosing the scale of each channel, and judging it: the solvers of `scale-channels`.

The choosers are pure functions of ranges, a = max|x_j| of activations and w = max|W_:j| of weights, both
float64 [n]; the activation is divided by what they return.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from planish.ir.formats import Format
from planish.ir.rounding import best_grid, blocks_of, fake_quantize, grid_of, unblocked
from planish.passes.sites import row_floor
from planish.passes.threads import each_by_one, team

FLOOR = 1e-5
LIMIT = 1e4  # of a factor that weights alone choose
OUTPUTS = 8192  # of one reader that are judged; of a larger one (a head over a vocabulary) every so many-th
WORKERS = 8  # candidates that are judged at once, at most
HELD = 1 << 25  # elements of the matrices that candidates judged at once hold, at most


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

    def product(self, x: torch.Tensor, s: np.ndarray, w: torch.Tensor) -> torch.Tensor:
        """`activations(x, s)` times the transpose of `weight(w)`, [N, outputs], a tensor of its own."""
        return self.activations(x, s) @ self.weight(w).T


@functools.cache
def has_int8_products() -> bool:
    """True where `torch._int_mm` is fast here, and right: without VNNI its sums of pairs may saturate."""
    try:
        if not torch.cpu.get_capabilities().get("avx512_vnni"):
            return False
        x, w = torch.full((65, 130), -128, dtype=torch.int8), torch.full((70, 130), 127, dtype=torch.int8)
        return bool((torch._int_mm(x, w.T) == -128 * 127 * 130).all())
    except (AttributeError, RuntimeError):
        return False


@dataclass(frozen=True, eq=False)
class FormatQuantiser(Rounding):
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
class Quantiser(Rounding):
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
        codes, scale, zero = self._codes(x, s)
        return (codes if zero is None else codes - zero) * scale

    def weight(self, w: torch.Tensor) -> torch.Tensor:
        """w [outputs, n] rounded to int8 codes with one scale per output."""
        codes, scale = self._weight_codes(w)
        return codes * scale

    def product(self, x: torch.Tensor, s: np.ndarray, w: torch.Tensor) -> torch.Tensor:
        """As `Rounding.product`; where the processor has products of int8 by the codes, whose sums are exact."""
        if not has_int8_products() or not x.numel() or not w.numel():
            return super().product(x, s, w)
        codes, scale, zero = self._codes(x, s)
        weight, by = self._weight_codes(w)
        narrow = weight.to(torch.int8)
        if zero is None:
            sums = torch._int_mm(codes.to(torch.int8), narrow.T).to(torch.float32)
        else:  # codes of 0 to 255 as int8, and what that takes away
            sums = torch._int_mm((codes - 128.0).to(torch.int8), narrow.T).to(torch.float32)
            sums.add_((128.0 - zero) * weight.sum(1))
        return sums.mul_(by.T).mul_(scale)

    def _codes(
        self, x: torch.Tensor, s: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | float | None]:
        """Codes [N, n] of x in float32, their scale and zero point, [N, 1] or a number; no zero point: symmetric."""
        low, high = min(float((self.low / s).min()), 0.0), max(float((self.high / s).max()), 0.0)
        if self.granularity == "token":
            floor = row_floor(low, high)
            if floor is None:
                scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127.0
                return torch.div(x, scale).round_(), scale, None
            zero = torch.floor(255.0 * floor / (x.amax(-1, keepdim=True).clamp(min=0.0) + floor)).clamp(min=1.0)
            return (x * zero).div_(floor).round_().add_(zero).clamp_(0, 255), floor / zero, zero
        if self.granularity == "tensor":
            low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        step = max((high - low) / 255.0, 1e-12)
        offset = float(round(-low / step))
        return torch.div(x, step).round_().add_(offset).clamp_(0, 255), step, offset

    @staticmethod
    def _weight_codes(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [outputs, n] of w in float32, and their scales [outputs, 1]."""
        scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127.0
        return torch.div(w, scale).round_(), scale


@dataclass(frozen=True, eq=False)
class Pair(Rounding):
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
        return self.measure(self.quantiser.product(self.samples / factors, s, self.weight * factors))

    def errors(self, candidates: Sequence[np.ndarray]) -> list[float]:
        """`error` of each of the candidates.

        Several are judged at once, each by one thread: next to another busy process, matrices as small as these lose
        far more in the barriers of a team of threads than they win. Large ones are left to torch's threads.
        """
        held = self.weight.numel() + self.samples.numel() + self.exact.numel()
        workers = min(WORKERS, team(), len(candidates), HELD // max(held, 1))
        if workers < 2:
            return [self.error(s) for s in candidates]
        return each_by_one(self.error, candidates, workers)

    def measure(self, outputs: torch.Tensor) -> float:
        """The error of outputs [N, all outputs of the readers judged]; they are not kept."""
        parts = torch.split(outputs.sub_(self.exact), self.readers, 1)
        return sum(float((self._rows(p) / e).mean()) for p, e in zip(parts, self.energy, strict=True))
