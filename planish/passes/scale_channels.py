"""Scale channels so that activations become easy to quantise and weights take the difficulty up.

    x' = x / s        W' = W diag(s)          s_j > 0

Exact over the reals for every s. `method` says how s is chosen, from a = max|x_j| and w = max|W_:j|
over all readers:

    smoothquant   s = a^alpha / w^(1 - alpha)                          (Xiao et al., arXiv 2211.10438)
    os-plus       s = max(1, a / t), the threshold t by search          (Wei et al., arXiv 2304.09145)
    percentile    s = a / base where a > base, the k-th largest a, k = int(0.005 n + 1.5)
                                                                       (Zhang et al., arXiv 2310.04836)
    outliertune   s = a: the static per-channel scale, folded           (Wang et al., arXiv 2406.18832)
    search        per site the best of: none, smoothquant for a grid of alpha, os-plus for a grid of t

`os-plus` and `search` minimise the squared output error of the site's linears with quantised
activations and weights, on the sampled rows; leaving the site alone is always among the candidates.
Where ops block a space (a residual that reads the norm too, an activation function before the
linear), `insert=true` puts one explicit Mul there, if the error falls by the fraction `min_gain`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from planish.ir.absorb import absorb
from planish.ir.graph import Graph
from planish.ir.ops.base import Act
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import Space, analyse
from planish.ir.transform import Scale
from planish.passes.base import Context, Exactness, Pass, PassReport
from planish.passes.sites import Site, row_floor, site_of

FLOOR = 1e-5


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


class Judge:
    """Judges scales of one site: the relative squared error of its readers' outputs under fake quantisation.

    Args:
        samples: float32 [N, n], what the readers read.
        weights: of each reader, float32 [outputs, n].
    """

    def __init__(self, samples: torch.Tensor, weights: Sequence[torch.Tensor], quantiser: Quantiser) -> None:
        self.samples = samples
        self.weight = torch.cat(list(weights))
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
        noise = (x @ self.quantiser.weight(self.weight * factors).T).sub_(self.exact)
        parts = torch.split(noise, self.readers, 1)
        return sum(float((self._rows(p) / e).mean()) for p, e in zip(parts, self.energy, strict=True))


@dataclass(frozen=True)
class ScaleChannels(Pass):
    """Move the difficulty of quantisation from activations to weights, site by site."""

    name = "scale-channels"
    exactness = Exactness.EXACT
    breaks = frozenset({"norm-gain-free"})
    needs_stats = True

    method: Literal["search", "smoothquant", "os-plus", "percentile", "outliertune"] = "search"
    alpha: float = 0.5  # smoothquant: the share of the difficulty that weights take
    granularity: Literal["tensor", "token", "static"] = "tensor"  # of the activations in the search
    steps: int = 20  # grid points of alpha, and of the threshold
    rows: int = 384  # sampled rows in the search
    insert: bool = False  # an explicit Mul where a space is blocked
    min_gain: float = 0.1  # the fraction by which the error must fall to be worth an inserted Mul

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        assert context.stats is not None
        found = []
        for space in analyse(graph).of(Act.SCALE):
            site = site_of(space, context.stats)
            if site is not None:
                found.append((space, site))
        if not found:
            report.misses.append("no linear with a constant weight reads a scale space with statistics")
        with Rewriter(graph) as rewriter:
            for space, site in context.progress(found, "scale-channels"):
                try:
                    self._site(rewriter, space, site, context, report)
                except Declined as refusal:
                    report.decline(str(refusal), refusal.node if refusal.node is not None else site.name)
        return report

    def _site(self, rewriter: Rewriter, space: Space, site: Site, context: Context, report: PassReport) -> None:
        if space.blockers and not self.insert:
            raise Declined(space.blockers[0].reason, space.blockers[0].node)
        picked = np.linspace(0, len(site.samples) - 1, min(self.rows, len(site.samples))).astype(np.int64)
        samples = torch.from_numpy(np.ascontiguousarray(site.samples[picked]))
        weights = [torch.from_numpy(w.astype(np.float32)) for w in site.weights()]
        judge = Judge(samples, weights, Quantiser(self.granularity, site.low, site.high))
        before = judge.error(np.ones(space.size))
        searching = self.method in ("search", "os-plus")
        label, s, after = "none", None, before
        for candidate, factors in self._candidates(site):
            error = judge.error(factors)
            if error < after or not searching:
                label, s, after = candidate, factors, error
        if s is None:
            raise Declined("no candidate beats leaving it alone", site.readers[0])
        gain = 1.0 - after / before if before > 0 else 0.0
        if space.blockers and gain < self.min_gain:
            raise Declined("an explicit op would not be worth it", site.readers[0])
        transform = Scale(1.0 / s)
        inserted = absorb(rewriter, space, transform, insert=self.insert)
        context.transformed(rewriter, space, transform)
        report.inserted += inserted
        ops = f", {inserted} op inserted" if inserted else ""
        report.applied.append(f"%{site.name}: {label}, error {before:.3g} -> {after:.3g}{ops}")
        report.figures[site.name] = {
            "choice": label,
            "error_before": before,
            "error_after": after,
            "inserted": inserted,
        }

    def _candidates(self, site: Site) -> Iterator[tuple[str, np.ndarray]]:
        largest = site.largest
        weight = np.max([np.abs(w).max(0) for w in site.weights()], axis=0)
        match self.method:
            case "smoothquant":
                yield f"smoothquant alpha={self.alpha:g}", smoothquant_scale(largest, weight, self.alpha)
            case "percentile":
                yield "percentile", percentile_scale(largest)
            case "outliertune":
                yield "outliertune", smoothquant_scale(largest, weight, 1.0)
            case "os-plus":
                yield from self._thresholds(largest)
            case "search":
                for i in range(self.steps + 1):
                    alpha = i / self.steps
                    yield f"smoothquant alpha={alpha:g}", smoothquant_scale(largest, weight, alpha)
                yield from self._thresholds(largest)

    def _thresholds(self, largest: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        top = float(largest.max())
        for i in range(1, self.steps):
            threshold = top * (1.0 - i / self.steps)
            yield f"os-plus t={threshold:.3g}", threshold_scale(largest, threshold)
