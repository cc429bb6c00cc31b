"""Give outlier channels behind an activation function a linear of their own.

    f(x W1^T + b1) W2^T + b2  =  f(x A1^T + a1) A2^T  +  f(x B1^T + c1) B2^T + b2

with A the rows of W1 (columns of W2) of the outlier channels and B the rest: f acts channel by channel.
Exact. A few channels that are far larger than the others (one token's channel at ten times the range)
spoil the one range that a tensor gets; no scale passes f, so here they get a tensor, a range and
weight scales of their own. Costs two small products and one sum for each site.

A channel is an outlier if its largest magnitude exceeds `ratio` times the largest of the channels that
stay, at most `count` of them. The idea of holding outlier columns apart is that of LLM.int8()
(Dettmers et al., arXiv 2208.07339), here with static columns and both parts in 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planish.ir.graph import Graph, Node
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.stats import Stats
from planish.passes.base import Context, Exactness, Pass, PassReport, place
from planish.passes.channel_parts import chain_before, check_chain, divide
from planish.passes.options import Range, option


def choose_outliers(largest: np.ndarray, count: int, ratio: float) -> np.ndarray:
    """Ascending indices of at most `count` channels: the largest, if they exceed `ratio` times the next; else none."""
    order = np.argsort(-largest, kind="stable")
    count = min(count, len(largest) - 1)
    if count < 1 or largest[order[0]] <= ratio * largest[order[count]]:
        return np.zeros(0, np.int64)
    return np.sort(order[:count])


@dataclass(frozen=True)
class IsolateOutliers(Pass):
    """Split linear - activation function - linear into an outlier part and the rest."""

    name = "isolate-outliers"
    exactness = Exactness.EXACT
    needs_stats = True

    count: int = option(8, Range(1))  # channels that are held apart, at most
    ratio: float = option(2.0, Range(1))  # by which the largest must exceed the largest of those that stay

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        assert context.stats is not None
        with Rewriter(graph) as rewriter:
            for node in list(graph.nodes):
                try:
                    line, inserted = self._site(node, rewriter, context.stats)
                except Declined as refusal:
                    report.decline(str(refusal), refusal.node if refusal.node is not None else node)
                    continue
                if line:
                    report.applied.append(line)
                    report.inserted += inserted
        return report

    def _site(self, reader: Node, rewriter: Rewriter, stats: Stats) -> tuple[str, int]:
        chain = chain_before(reader)
        if chain is None:
            return "", 0
        record = stats.along(chain.read.name)
        if record is None:
            raise Declined("no statistics of what it reads", reader)
        largest = record.largest
        chosen = choose_outliers(largest, self.count, self.ratio)
        if not len(chosen):
            raise Declined("its channels are of like size", reader)
        check_chain(chain, rewriter.graph)
        rest = np.setdiff1d(np.arange(len(largest)), chosen)
        total, inserted = divide(chain, [("outliers", chosen), ("rest", rest)], rewriter, stats)
        line = f"{len(chosen)} channels, range {float(largest.max()):.3g} -> {float(largest[rest].max()):.3g}"
        return f"{place(total)}: {line}", inserted
