"""Split outlier channels into several channels that are small.

    y = sum_j x_j W_:j = sum_j sum_{t <= T_j} (x_j / T_j) W_:j        T_j = max(1, ceil(max |x_j| / theta))

The rows of what writes x_j are repeated and one factor of them divided by T_j; the columns that read it are repeated.
C channels become C + sum_j (T_j - 1), no op is added, and no channel is larger than theta: the range that one scale
must cover shrinks, at the price of wider weights. Exact over the reals; in floats the weights that are divided by a
T_j that is no power of two are rounded once.

It takes place where the space of the channels admits SPLIT with constants on both sides, and SCALE where linears read
it: behind products of a linear and a gate, behind relu and its like, between linears. Behind a norm or gelu it would
cost a gather at run time (`reassemble-channels`): declined, with the node.

Channel disassembly of QLLM (Liu et al., arXiv 2310.08041).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planish.ir.graph import Graph
from planish.ir.ops.base import Act
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import Space, analyse
from planish.passes.base import Context, Exactness, Pass, PassReport, place
from planish.passes.options import Range, option
from planish.passes.sites import Site, site_of
from planish.passes.splits import AGAIN, Splitter, blocked_by, choose_counts, choose_threshold, split_values


def choose_split(largest: np.ndarray, threshold: float | None, ratio: float) -> tuple[float, np.ndarray]:
    """theta and T_j, int [C]: of the threshold, or the smallest theta that adds at most ratio C channels.

    Raises:
        Declined: the threshold would add more.
    """
    added = int(ratio * len(largest))
    if threshold is None:
        return choose_threshold(largest, added)
    counts = choose_counts(largest, threshold)
    more = int(counts.sum()) - len(counts)
    if more > added:
        raise Declined(f"the threshold would add {more} channels to {len(counts)}: more than ratio allows")
    return threshold, counts


@dataclass(frozen=True)
class DisassembleChannels(Pass):
    """Split outlier channels into smaller ones, by wider weights alone."""

    name = "disassemble-channels"
    exactness = Exactness.EXACT
    needs_stats = True
    breaks = frozenset({"norm-gain-free"})  # where a norm writes what a gate multiplies, its gain takes the division

    threshold: float | None = option(None, Range(above=0))  # theta; none: the smallest that `ratio` allows
    ratio: float = option(0.1, Range(0, 4))  # channels that may be added, per channel

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        assert context.stats is not None
        tried: set[str] = set()
        again = True
        with Rewriter(graph) as rewriter:
            while again:
                again = False
                splitter = Splitter(rewriter, context, analyse(graph))
                for space in context.progress(splitter.spaces.of(Act.SPLIT), self.name):
                    site = site_of(space, context.stats)
                    if site is None or site.name in tried:
                        continue
                    try:
                        self._site(splitter, space, site, report)
                    except Declined as refusal:
                        if str(refusal) == AGAIN:
                            again = True
                            continue
                        report.decline(str(refusal), refusal.node or site.member.value)
                    tried.add(site.name)
        if not tried:
            report.misses.append("no linear with statistics reads channels that constants write")
        return report

    def _site(self, splitter: Splitter, space: Space, site: Site, report: PassReport) -> None:
        if space.blockers:
            raise Declined(space.blockers[0].reason, blocked_by(space))
        if site.name in split_values(splitter.rewriter.graph):
            raise Declined("its channels were split before", site.member.value)
        theta, counts = choose_split(site.largest, self.threshold, self.ratio)
        if (counts == 1).all():
            raise Declined("no channel exceeds the threshold, or ratio allows no more channels", site.member.value)
        before = float(site.largest.max())
        splitter.split(space, site.member, counts)
        after, size = float((site.largest / counts).max()), int(counts.sum())
        where = place(site.member.value)
        report.applied.append(f"{where}: {space.size} -> {size} channels, range {before:.3g} -> {after:.3g}")
        report.figures[site.name] = {
            "channels_before": space.size,
            "channels_after": size,
            "threshold": theta,
            "range_before": before,
            "range_after": after,
        }
