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

from planish.ir.constant import Constant
from planish.ir.graph import Graph, Node, Value
from planish.ir.ops.base import Act, Carry
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.stats import ChannelStats, Stats
from planish.passes.base import Context, Exactness, Pass, PassReport, place
from planish.passes.options import Range, option
from planish.passes.sites import reads_by_weight


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
                    line = self._site(node, rewriter, context.stats)
                except Declined as refusal:
                    report.decline(str(refusal), refusal.node if refusal.node is not None else node)
                    continue
                if line:
                    report.applied.append(line)
                    report.inserted += 4
        return report

    def _site(self, reader: Node, rewriter: Rewriter, stats: Stats) -> str:
        x = reader.operands[0] if reader.op.name == "linear" else None
        if x is None or x.producer is None or not reads_by_weight(reader, x):
            return ""
        act = x.producer
        before = act.operands[0] if len(act.operands) == 1 else None
        writer = before.producer if before is not None else None
        if (
            before is None
            or writer is None
            or writer.op.name != "linear"
            or x.rank is None
            or not _acts_alone(act, x.rank)
        ):
            return ""
        if x.name not in stats:
            raise Declined("no statistics of what it reads", reader)
        record = stats.of(x.name)
        chosen = choose_outliers(record.largest, self.count, self.ratio)
        if not len(chosen):
            raise Declined("its channels are of like size", reader)
        if [*x.users, *before.users] != [reader, act] or any(v in (x, before) for v in rewriter.graph.output_values()):
            raise Declined("others read what would be split", act)
        weights = [writer.operand(1), writer.operand(2), reader.operand(1)]
        if any(w is not None and (not w.is_constant or len(w.users) > 1) for w in weights):
            raise Declined("a weight is shared or computed", writer)
        rest = np.setdiff1d(np.arange(len(record.largest)), chosen)
        parts = [
            self._part(index, label, writer, act, reader, rewriter, stats)
            for index, label in ((chosen, "outliers"), (rest, "rest"))
        ]
        total = rewriter.insert("add", [parts[1], parts[0]], before=reader, source=reader.source)
        rewriter.replace_node(reader, total.result)
        largest = float(record.largest[rest].max())
        return f"{place(total)}: {len(chosen)} channels, range {float(record.largest.max()):.3g} -> {largest:.3g}"

    def _part(
        self, index: np.ndarray, label: str, writer: Node, act: Node, reader: Node, rewriter: Rewriter, stats: Stats
    ) -> Value:
        """The chain of one part, before `reader`; only the rest keeps the bias behind it."""

        def taken(node: Node, port: int, axis: int) -> Value | None:
            value = node.operand(port)
            if value is None or value.constant is None:
                return None
            held = value.constant
            data = np.take(held.wide(), index, axis)
            return rewriter.constant(Constant(data, held.dtype, data.shape), f"{value.name}.{label}")

        def linear(x: Value, weight: Value | None, bias: Value | None, like: Node) -> Value:
            name = f"{like.result.name}.{label}"
            return rewriter.insert(
                "linear", [x, weight, bias], like.attributes, before=reader, names=[name], source=like.source
            ).result

        flipped = [bool(n.attributes.get("transposed", False)) for n in (writer, reader)]
        assert writer.operands[0] is not None
        made = linear(writer.operands[0], taken(writer, 1, 1 if flipped[0] else 0), taken(writer, 2, 0), writer)
        name = f"{act.result.name}.{label}"
        made = rewriter.insert(act.op, [made], act.attributes, before=reader, names=[name], source=act.source).result
        record = stats.of(act.result.name)
        stats.channels[made.name] = ChannelStats(
            record.axis, record.minimum[index], record.maximum[index],
            record.mean_square[index], record.samples[:, index], record.count,
        )  # fmt: skip
        bias = reader.operand(2) if label == "rest" else None
        return linear(made, taken(reader, 1, 0 if flipped[1] else 1), bias, reader)


def _acts_alone(node: Node, rank: int) -> bool:
    """True if every channel of the result depends on the same channel of the operand alone."""
    if len(node.results) != 1 or node.result.rank != rank:
        return False
    relation = node.op.relate(node, Act.PERMUTE, 0, (rank - 1,))
    if not isinstance(relation, Carry) or relation.block_axes or len(relation.links) != 1:
        return False
    link = relation.links[0]
    return node.op.family == "elementwise" and link.port == -1 and link.axes == (rank - 1,) and link.pairs is None
