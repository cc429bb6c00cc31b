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
    awq           per site the best of m^alpha and m^alpha / w^(1 - alpha) for a grid of alpha, m = mean|x_j|, w that
                  of weights relative to their block; for weights only          (Lin et al., arXiv 2306.00978)
    smoothquant-plus   smoothquant with one alpha for the model: that of a grid with the least squared error of the
                  model's outputs on calibration data, weights rounded          (Pan et al., arXiv 2312.03788)
    balance       s = (max|V_j:| / w)^(1/2), V what writes the channel: no statistics, on every free SCALE space
                                                                       (Nagel et al., arXiv 1906.04721)

A site is a space that linears or convolutions read, grouped and depthwise ones too, or (smoothquant, os-plus,
search) that an attention contracts: keys then stand for the weights of queries, and rotary pairs share a factor.
`os-plus`, `search` and `awq` minimise the squared output error of the site's linears with quantised activations and
weights, on the sampled rows; leaving the site alone is always among the candidates. What they are rounded to:
`weights` and `activations`, formats or none; `auto` is int8 per row and uint8 by `granularity`, for the weight-only
methods uint4:g128 and none. `clip=mse` lets each block of a weight have its best range (the clipping of AWQ).
Where ops block a space (a residual that reads the norm too, an activation function before the
linear), `insert=true` puts one explicit Mul there, if the error falls by the fraction `min_gain`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from planish.ir.absorb import absorb
from planish.ir.errors import PlanishError
from planish.ir.formats import Format
from planish.ir.graph import Graph
from planish.ir.ops.base import Act
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import Space, analyse
from planish.ir.transform import Scale
from planish.passes.balance import balance
from planish.passes.base import Context, Exactness, Pass, PassReport
from planish.passes.finite import require_finite_space
from planish.passes.named import check_format
from planish.passes.options import Range, option
from planish.passes.scales import (
    FormatQuantiser,
    Judge,
    Pair,
    Quantiser,
    Rounding,
    awq_scale,
    awq_weight,
    percentile_scale,
    smoothquant_scale,
    threshold_scale,
)
from planish.passes.sites import Site, dual_site_of, site_of
from planish.passes.whole_model import WholeModel, round_weights

LARGE = 1 << 24  # elements of a model's constants of which no copies may wait to be collected
WEIGHT_ONLY = frozenset({"awq", "smoothquant-plus"})
DUAL = frozenset({"smoothquant", "os-plus", "search"})  # methods that weigh both sides: keys are activations too


@dataclass(frozen=True)
class ScaleChannels(Pass):
    """Move the difficulty of quantisation from activations to weights, site by site."""

    name = "scale-channels"
    exactness = Exactness.EXACT
    breaks = frozenset({"norm-gain-free"})

    method: Literal[
        "search", "smoothquant", "os-plus", "percentile", "outliertune", "balance", "awq", "smoothquant-plus"
    ] = "search"
    alpha: float = option(0.5, Range(0, 1))  # smoothquant: the share of the difficulty that weights take
    granularity: Literal["tensor", "token", "static"] = "tensor"  # of the activations in the search
    weights: str = "auto"  # format of the weights in the search
    activations: str = "auto"  # format of the activations in the search
    clip: Literal["max", "mse"] = "max"  # of the weights in the search
    batches: int = option(8, Range(1))  # of calibration data on which smoothquant-plus runs the model, at most
    steps: int = option(20, Range(1))  # grid points of alpha, and of the threshold
    rows: int = option(384, Range(1))  # sampled rows in the search
    insert: bool = False  # an explicit Mul where a space is blocked
    min_gain: float = option(0.1, Range(0, 1))  # the fraction by which the error must fall to be worth an inserted Mul

    @property
    def needs_stats(self) -> bool:
        return self.method != "balance"

    @property
    def reads_data(self) -> bool:
        return self.method == "smoothquant-plus"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option_name in ("weights", "activations"):
            check_format(self, option_name, "auto", "none")
        if self.method == "smoothquant-plus" and self.weights == "none":
            raise PlanishError("pass 'scale-channels': method 'smoothquant-plus' rounds weights; got weights=none")

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        if self.method == "balance":
            balance(graph, context, report)
            return report
        assert context.stats is not None
        fixed = self._whole_model_alpha(graph, context, report) if self.method == "smoothquant-plus" else self
        if fixed is not None:
            fixed._sites(graph, context, report)
        return report

    def _sites(self, graph: Graph, context: Context, report: PassReport) -> None:
        """Scale site by site."""
        assert context.stats is not None
        found = []
        for space in (context.guarded(graph, s) for s in analyse(graph).of(Act.SCALE)):
            site = site_of(space, context.stats, grouped=True)
            if site is None and self.method in DUAL:
                site = dual_site_of(space, context.stats)
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

    def _whole_model_alpha(self, graph: Graph, context: Context, report: PassReport) -> ScaleChannels | None:
        """The pass with the alpha that serves the whole model best; None if that is to scale nothing."""
        form = self._formats()[0]
        assert form is not None and context.stats is not None
        model = WholeModel(graph, (context.data or ())[: self.batches], context.row_mask, self.name)
        large = sum(v.constant.size for v in graph.constants if v.constant is not None) > LARGE
        losses: dict[float | str, float] = {"none": model.loss(round_weights(graph.clone(), form))}
        for i in context.progress(range(self.steps + 1), "scale-channels: alpha"):
            trial, scaled = replace(self, alpha=i / self.steps), graph.clone()
            trial._sites(scaled, Context(context.stats.copy(), context.seed), PassReport(self.name))
            losses[trial.alpha] = model.loss(round_weights(scaled, form))
            del scaled
            if large:
                gc.collect()  # a graph is a ring of nodes and values, which hold its weights
        report.figures["losses"] = losses
        best = min(losses, key=lambda a: losses[a])
        said = f"alpha={best:g}" if isinstance(best, float) else best
        note = f"{said}: the model's outputs are off by {losses[best]:.3g} of their energy"
        report.notes.append(f"{note}, {losses['none']:.3g} as it was")
        if isinstance(best, float):
            return replace(self, alpha=best)
        report.decline("no alpha beats leaving the model alone", None)
        return None

    def _formats(self) -> tuple[Format | None, Format | None]:
        """Of weights and activations, where they are given by formats; None is float."""
        texts = [self.weights, self.activations]
        if self.method in WEIGHT_ONLY:
            texts = [new if old == "auto" else old for old, new in zip(texts, ("uint4:g128", "none"), strict=True)]
        weights, inputs = (None if text in ("none", "auto") else Format.parse(text) for text in texts)
        return weights, inputs

    def _rounding(self, site: Site) -> Rounding:
        weights, inputs = self._formats()
        plain = Quantiser(self.granularity, site.low, site.high)
        if self.method not in WEIGHT_ONLY and self.weights == self.activations == "auto":
            return plain
        given = FormatQuantiser(weights, inputs, site.low, site.high, self.clip)
        named = self.method in WEIGHT_ONLY
        return Pair(*(given if named or text != "auto" else plain for text in (self.weights, self.activations)))

    def _site(self, rewriter: Rewriter, space: Space, site: Site, context: Context, report: PassReport) -> None:
        if space.blockers and not self.insert:
            raise Declined(space.blockers[0].reason, space.blockers[0].node)
        require_finite_space(space)
        picked = np.linspace(0, len(site.samples) - 1, min(self.rows, len(site.samples))).astype(np.int64)
        samples = torch.from_numpy(np.ascontiguousarray(site.samples[picked]))
        exact = site.weights()
        weights = [torch.from_numpy(w.astype(np.float32)) for w in exact]
        judge = Judge(samples, weights, self._rounding(site))
        candidates = list(self._candidates(site, exact))
        del exact
        before, *errors = judge.errors([np.ones(space.size), *(factors for _, factors in candidates)])
        searching = self.method in ("search", "os-plus", "awq")
        label, s, after = "none", None, before
        for (candidate, factors), error in zip(candidates, errors, strict=True):
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

    def _candidates(self, site: Site, weights: list[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        largest = site.largest
        weight = np.max([np.abs(w).max(0) for w in weights], axis=0)
        match self.method:
            case "smoothquant" | "smoothquant-plus":
                yield f"smoothquant alpha={self.alpha:g}", smoothquant_scale(largest, weight, self.alpha)
            case "percentile":
                yield "percentile", percentile_scale(largest)
            case "outliertune":
                yield "outliertune", smoothquant_scale(largest, weight, 1.0)
            case "os-plus":
                yield from self._thresholds(largest)
            case "awq":
                mean = np.abs(site.samples).mean(0).astype(np.float64)
                shares = awq_weight(weights, self._formats()[0] or Format.parse("int8"))
                for alpha in (i / self.steps for i in range(self.steps + 1)):
                    yield f"awq alpha={alpha:g}", awq_scale(mean, None, alpha)
                    yield f"awq alpha={alpha:g} weights", awq_scale(mean, shares, alpha)
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
