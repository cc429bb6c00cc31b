"""Shift channels so that their ranges are centred (Outlier Suppression+).

    x' = x - z          z_j = (max x_j + min x_j) / 2
    b' = b + W z        in every linear that reads x        (W as it is: methods of OS+, R2)
    b_p' = b_p - z      in whatever writes x (a norm's bias, a linear's bias)

Exact over the reals for every z. Costs no op: where the shifted tensor is also read by a residual sum,
the other addend's bias takes +z, so that post-norm models are covered too; shifts pass attention as a
constant, since its rows sum to one. Wei et al., Outlier Suppression+, arXiv 2304.09145, without its
search: a shift alone never widens a range. `amount` below 1 shifts part of the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planish.ir.absorb import absorb
from planish.ir.graph import Graph
from planish.ir.ops.base import Act
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import analyse
from planish.ir.transform import Shift
from planish.passes.base import Context, Exactness, Pass, PassReport
from planish.passes.finite import require_finite_space
from planish.passes.options import Range, option
from planish.passes.sites import Site, site_of


def choose_shift(low: np.ndarray, high: np.ndarray, amount: float = 1.0) -> np.ndarray:
    """The offsets t = -z [n] that centre channels with these extremes (float64 [n])."""
    offsets: np.ndarray = -amount * (low + high) / 2.0
    return offsets


@dataclass(frozen=True)
class ShiftChannels(Pass):
    """Centre the range of every channel that a linear reads."""

    name = "shift-channels"
    exactness = Exactness.EXACT
    breaks = frozenset({"norm-bias-free"})
    needs_stats = True

    amount: float = option(1.0, Range(0))  # 1: centre fully
    min_gain: float = option(
        0.01, Range(0, 1)
    )  # decline a site whose per-tensor range would shrink by less than this fraction

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        assert context.stats is not None
        spaces = analyse(graph).of(Act.SHIFT)
        found = [(space, site_of(space, context.stats)) for space in spaces]
        sites = [(space, site) for space, site in found if site is not None]
        with Rewriter(graph) as rewriter:
            for space, site in sites:
                try:
                    transform, gain = self._choose(site)
                    require_finite_space(space)
                    absorb(rewriter, space, transform)
                except Declined as refusal:
                    report.decline(str(refusal), refusal.node if refusal.node is not None else site.name)
                    continue
                context.transformed(rewriter, space, transform)
                report.applied.append(f"%{site.name}: range {gain:.0%} smaller for {len(site.readers)} readers")
                report.figures[site.name] = {"range_reduction": gain}
        if not sites:
            report.misses.append("no linear with a constant weight reads a shift space")
        return report

    def _choose(self, site: Site) -> tuple[Shift, float]:
        offsets = choose_shift(site.low, site.high, self.amount)
        width = max(site.high.max(), 0.0) - min(site.low.min(), 0.0)
        shifted = max((site.high + offsets).max(), 0.0) - min((site.low + offsets).min(), 0.0)
        gain = float(1.0 - shifted / width) if width > 0 else 0.0
        if gain < self.min_gain:
            raise Declined("its range would hardly shrink", site.readers[0])
        return Shift(offsets), gain
