"""Split outlier channels, and merge as many alike ones, so that what is quantised has one range that fits all.

    y = sum_j x_j W_:j  ~  sum_c x'_c W'_:c      x'_c = x_j / T_j, or the mean of a group      W'_c = W_:j, or the sum

First channels are split, T_j = max(1, ceil(max |x_j| / theta)): r more channels, exact. Then r pairs are merged, those
with the least error |x_i - x_j|^2 |W_:i - W_:j|^2 / 4 by a bipartite matching: C channels again, and that is lossy.
theta is the one, of several that add up to ratio C channels, with the least error of the block (what the linears
compute, and the gate or activation function behind them) with weights and activations rounded to the formats given;
where none is better than no change by `min-gain`, nothing is changed.

What is left to do at run time is one op, `reassemble`: a gather of C + r channels and sums in segments. It stands
behind norms and products, whose other readers still see what they saw. Where a linear alone makes the channels, it is
folded into its rows. With `fold=rows` splits go into the rows of what writes a product too (`disassemble-channels`):
those linears are then r rows wider and only the merge is left, which pays where a kernel wants plain sums.

QLLM (Liu et al., arXiv 2310.08041), without its low-rank correction, which merges worse than none at 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.formats import Format
from planish.ir.graph import Graph, Node, Value
from planish.ir.ops.base import Act
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import analyse
from planish.ir.stats import ChannelStats
from planish.ir.types import WIDE_FLOATS
from planish.passes.base import Context, Exactness, Pass, PassReport, kept_float, place
from planish.passes.channels import positions
from planish.passes.named import check_format
from planish.passes.options import Range, option
from planish.passes.reassembly import Matching, Reassembly, choose_reassembly
from planish.passes.row_blocks import BlockError, row_block
from planish.passes.sites import reads_by_weight, weight_matrix
from planish.passes.splits import Splitter, remember_split, split_values


@dataclass(frozen=True)
class ReassembleChannels(Pass):
    """Split outlier channels and merge as many alike ones in front of linears that will be quantised."""

    name = "reassemble-channels"
    exactness = Exactness.LOSSY
    needs_stats = True

    ratio: float = option(0.2, Range(0, 0.5))  # channels that are split off and merged again, per channel, at most
    weights: str = "int4:channel"  # the formats under which theta is chosen; none: not rounded
    activations: str = "int4:token"
    steps: int = option(12, Range(1))  # thresholds that are tried
    min_gain: float = option(0.05, Range(0, 1))  # the part of the error that a change must take away
    rows: int = option(256, Range(1))  # samples on which the error is measured
    fold: Literal["producer", "rows", "none"] = "producer"  # what is folded into weights

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, default in (("weights", "channel"), ("activations", "token")):
            check_format(self, name, "none")
            self._format(name, default)

    def _format(self, name: str, default: Any) -> Format | None:
        text = getattr(self, name)
        found = None if text == "none" else Format.parse(text, default)
        if found is not None and found.clusters > 1:
            raise PlanishError(f"pass '{self.name}': option '{name}': expected a format without clusters; got '{text}'")
        return found

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        sites = _sites(graph, context)
        if not sites:
            report.misses.append("no linear with a constant weight reads a value that has statistics")
            return report
        order = positions(graph)
        spaces = analyse(graph) if self.fold == "rows" else None
        with Rewriter(graph) as rewriter:
            splitter = Splitter(rewriter, context, spaces) if spaces is not None else None
            for value, readers in context.progress(list(sites.items()), self.name):
                try:
                    self._site(rewriter, context, value, readers, order, splitter, report)
                except Declined as refusal:
                    report.decline(str(refusal), refusal.node or value)
        return report

    def _site(
        self,
        rewriter: Rewriter,
        context: Context,
        value: Value,
        readers: list[Node],
        order: dict[Node, int],
        splitter: Splitter | None,
        report: PassReport,
    ) -> None:
        assert context.stats is not None
        record = context.stats.of(value.name)
        if value.name in split_values(rewriter.graph):
            raise Declined("its channels were reassembled or split before", value)
        if not int(self.ratio * len(record.largest)):
            raise Declined("ratio of its channels is less than one channel", value)
        if not np.isfinite(record.samples).all():
            raise Declined("its samples are not finite", value)
        if any(len(w.users) > 1 for node in readers if (w := node.operands[1]) is not None):
            raise Declined("a weight has other readers: it would be copied", value)
        taken = np.linspace(0, len(record.samples) - 1, min(self.rows, len(record.samples))).astype(int)
        samples = record.samples[taken]
        formats = self._format("weights", "channel"), self._format("activations", "token")
        error = BlockError(row_block(readers, order), torch.from_numpy(samples).float(), *formats)
        matching = Matching.of(samples, np.concatenate([weight_matrix(node) for node in readers]))
        found = choose_reassembly(record.largest, matching, error, self.ratio, self.steps)
        before = error.of(None)
        if found is None or found[2] > before * (1.0 - self.min_gain):
            raise Declined("no threshold makes the error of its block smaller", value)
        change, theta, after = found
        merged = error.of(change, rounded=False)
        form = self._apply(rewriter, context, value, readers, change, order, splitter)
        added = int(change.counts.sum()) - len(change.counts)
        report.inserted += form != "folded"
        report.applied.append(
            f"{place(value)}: {int((change.counts > 1).sum())} of {len(change.counts)} channels became {added} more, "
            f"as many merged; error of the block {before:.3g} -> {after:.3g} ({merged:.3g} of it unrounded); {form}"
        )
        report.figures[value.name] = {
            "channels": len(change.counts),
            "added": added,
            "threshold": theta,
            "range_before": float(record.largest.max()),
            "error_before": before,
            "error_after": after,
            "error_unrounded": merged,
            "form": form,
        }

    def _apply(
        self,
        rewriter: Rewriter,
        context: Context,
        value: Value,
        readers: list[Node],
        change: Reassembly,
        order: dict[Node, int],
        splitter: Splitter | None,
    ) -> str:
        """Change the graph; says how: folded, rows and run time, run time."""
        assert context.stats is not None
        record = context.stats.of(value.name)
        if self.fold != "none" and _folds(rewriter.graph, value, readers):
            producer = value.producer
            assert producer is not None
            _set_weight(rewriter, producer, change.activations(weight_matrix(producer).T).T)
            bias = producer.operand(2)
            if bias is not None and bias.constant is not None:
                _give(rewriter, producer, 2, change.activations(bias.constant.wide()))
            for node in readers:
                _set_weight(rewriter, node, change.columns(weight_matrix(node)))
            context.stats.channels[value.name] = _followed(record, change)
            remember_split(rewriter.graph, value)
            return "folded"
        form = "run time"
        if splitter is not None and _split_rows(splitter, value, change):
            change, form = change.behind_split(), "splits in rows, run time"
            record = context.stats.of(value.name)
        for node in readers:
            _set_weight(rewriter, node, change.columns(weight_matrix(node)))
        dtype = value.dtype if value.dtype in WIDE_FLOATS else "f32"
        constants = [
            rewriter.constant(Constant(data, kind, data.shape), f"{value.name}.{name}")
            for name, data, kind in (
                ("index", change.index, "i64"),
                ("sizes", change.sizes, "i64"),
                ("weights", change.weights, dtype),
            )
        ]
        first = min(readers, key=order.__getitem__)
        made = rewriter.insert(
            "reassemble", [value, *constants], {"axis": -1}, before=first, names=[f"{value.name}.reassembled"],
            source=first.source,
        )  # fmt: skip
        rewriter.replace(value, made.result, users=readers)
        context.stats.channels[made.result.name] = _followed(record, change)
        remember_split(rewriter.graph, made.result)
        return form


def _sites(graph: Graph, context: Context) -> dict[Value, list[Node]]:
    """The values that linears read whose weights are constant, with those linears."""
    kept = kept_float(graph)
    found: dict[Value, list[Node]] = {}
    for node in graph.nodes:
        value = node.operands[0] if node.op.name == "linear" else None
        if value is None or not reads_by_weight(node, value) or node.result.name in kept:
            continue
        bias = node.operand(2)
        if (bias is not None and bias.constant is None) or context.stats is None or value.name not in context.stats:
            continue
        if context.stats.of(value.name).axis == -1:
            found.setdefault(value, []).append(node)
    return found


def _folds(graph: Graph, value: Value, readers: list[Node]) -> bool:
    """True if a linear alone makes the value, only the readers read it, and its constants are its own."""
    producer = value.producer
    if producer is None or producer.op.name != "linear" or set(value.users) != set(readers):
        return False
    if any(v is value for v in graph.output_values()):
        return False
    return all(v is None or v.constant is not None for v in producer.operands[1:])


def _split_rows(splitter: Splitter, value: Value, change: Reassembly) -> bool:
    """Put the splits into the constants that write the value, if they can be."""
    assert value.rank is not None
    for space in splitter.spaces.at(value, (value.rank - 1,), Act.SPLIT):
        member = next(m for m in space.activations if m.value is value)
        if space.size != len(change.counts) or member.atoms is not None or space.blockers:
            continue
        try:
            splitter.split(space, member, change.counts)
        except Declined:
            return False
        return True
    return False


def _set_weight(rewriter: Rewriter, node: Node, matrix: np.ndarray) -> None:
    """Give a linear the weight [outputs, inputs]; other readers of the old one keep it."""
    _give(rewriter, node, 1, matrix.T if node.attributes.get("transposed", False) else matrix)


def _give(rewriter: Rewriter, node: Node, port: int, data: np.ndarray) -> None:
    old = node.operands[port]
    assert old is not None and old.dtype is not None
    constant = Constant(np.ascontiguousarray(data), old.dtype, data.shape)
    if len(old.users) == 1 and not any(v is old for v in rewriter.graph.output_values()):
        rewriter.set_constant(old, constant)
    else:
        rewriter.set_operand(node, port, rewriter.constant(constant, old.name))


def _followed(record: ChannelStats, change: Reassembly) -> ChannelStats:
    """The statistics behind the map: exact for parts of channels, for means of channels bounds of the range."""
    samples = change.activations(record.samples.astype(np.float64))
    low, high = change.activations(record.minimum), change.activations(record.maximum)
    return ChannelStats(-1, low, high, (samples**2).mean(0), samples.astype(np.float32), record.count)
