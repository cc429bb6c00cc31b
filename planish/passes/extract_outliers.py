"""Multiply the few loud columns of an activation in float, and leave the quiet ones to the integers.

    x W^T + b  =  (x m) (W m)^T + b  +  x[:, O] W[:, O]^T          m = 0 on the columns O, 1 elsewhere

Exact: the two sums run over disjoint columns. The first linear has no outliers left, neither in x nor in W, so that
a range serves it well; the second has a handful of columns and is marked to stay in float: its weights are those of
the model, in the dtype they came in, not rounded and read back. (LLM.int8(), Dettmers et al., arXiv 2208.07339; its
published code reads the columns of W back from int8.)

`static` chooses O from the calibration data: a column is in O if its magnitude reaches `threshold` in at least the
share `rows` of the sampled rows (the paper: 6.0 and 6 %); or the `count`, or the `fraction`, of all columns that are
the largest. Shapes are fixed, and a row's result does not depend on its batch-mates.

`dynamic` is the paper's: O = {k : |x_mk| >= threshold for any row m of the whole batch}, found at run time. A row's
result then depends on what else is in the batch. The float weight stays in the model beside the integer one, because
any of its columns may be asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.graph import Graph, Node, Value
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.stats import ChannelStats, Stats
from planish.ir.types import is_float
from planish.passes.base import Context, Exactness, Pass, PassReport, keep_float, kept_float, place
from planish.passes.options import Range, option
from planish.passes.sites import reads_by_weight


def choose_columns(
    record: ChannelStats, threshold: float, rows: float = 0.0, count: int | None = None, fraction: float | None = None
) -> np.ndarray:
    """The outlier columns of an activation, ascending.

    Args:
        record: its statistics, C channels.
        threshold: the magnitude that an outlier reaches.
        rows: in at least which share of the sampled rows; 0: in any row of all calibration data.
        count: instead of the threshold: the number of columns, the largest.
        fraction: instead of the threshold: the share of columns, the largest, rounded up.
    """
    largest = record.largest
    if fraction is not None:
        count = int(np.ceil(fraction * len(largest)))
    if count is not None:
        return np.sort(np.argsort(-largest, kind="stable")[:count])
    hit = largest >= threshold
    if rows > 0:
        hit &= (np.abs(record.samples) >= threshold).mean(0) >= rows
    return np.flatnonzero(hit)


@dataclass(frozen=True)
class ExtractOutliers(Pass):
    """Give the outlier columns of what a linear reads a float linear of their own."""

    name = "extract-outliers"
    exactness = Exactness.EXACT

    mode: Literal["static", "dynamic"] = "static"  # columns chosen from statistics, or at run time
    threshold: float = option(6.0, Range(above=0))  # magnitude from which a column is an outlier
    rows: float = option(0.0, Range(0, 1))  # static: in at least this share of the sampled rows
    count: int | None = option(None, Range(1))  # static: so many columns instead, the largest
    fraction: float | None = option(None, Range(above=0, most=1))  # static: this share of the columns instead

    @property
    def needs_stats(self) -> bool:
        return self.mode == "static"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("count", "fraction") if getattr(self, name) is not None]
        if len(given) > 1:
            raise PlanishError("pass 'extract-outliers': 'count' and 'fraction' exclude each other; got both")
        given += ["rows"] * (self.rows > 0)
        if self.mode == "dynamic" and given:
            raise PlanishError(f"pass 'extract-outliers': option '{given[0]}' is for mode=static; got mode=dynamic")

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        kept = kept_float(graph)
        sites: dict[Value, list[Node]] = {}
        for node in graph.nodes:
            x = node.operands[0] if node.op.name == "linear" else None
            if x is None or not reads_by_weight(node, x) or node.result.name in kept or _extracted(node, kept):
                continue
            sites.setdefault(x, []).append(node)
        with Rewriter(graph) as rewriter:
            for readers in sites.values():
                before = len(graph)
                x = readers[0].operands[0]  # it may have become a sum: what wrote it has been given a branch
                assert x is not None
                try:
                    if not is_float(x.dtype):
                        raise Declined(f"reads {x.dtype}; expected floats", x)
                    if self.mode == "dynamic":
                        self._dynamic(x, readers, rewriter, report, context.stats)
                    else:
                        assert context.stats is not None
                        self._static(x, readers, rewriter, report, context.stats)
                except Declined as refusal:
                    for node in readers:
                        report.decline(str(refusal), node)
                report.inserted += len(graph) - before
        if not sites:
            report.misses.append("no linear with a constant weight")
        return report

    def _static(self, x: Value, readers: list[Node], rewriter: Rewriter, report: PassReport, stats: Stats) -> None:
        record = stats.along(x.name)
        if record is None:
            raise Declined("no statistics of what it reads")
        columns = choose_columns(record, self.threshold, self.rows, self.count, self.fraction)
        width = len(record.minimum)
        if not len(columns):
            raise Declined("none of its columns is an outlier")
        if len(columns) >= width:
            raise Declined("all of its columns are outliers")
        mask = np.ones(width)
        mask[columns] = 0.0
        shared = [node for node in readers if len(_weight(node).users) > 1]
        for node in shared:
            report.decline("its weight has other readers: a copy without the columns would be one more", node)
        readers = [node for node in readers if node not in shared]
        if not readers:
            return
        assert x.dtype is not None
        before = readers[0]
        held = rewriter.constant(Constant(mask, x.dtype, mask.shape), f"{x.name}.mask")
        index = rewriter.constant(Constant.of(columns.astype(np.int64)), f"{x.name}.columns")
        quiet = rewriter.insert("mul", [x, held], before=before, names=[f"{x.name}.quiet"], source=before.source)
        loud = rewriter.insert(
            "gather", [x, index], {"axis": -1}, before=before, names=[f"{x.name}.loud"], source=before.source
        )
        stats.channels[quiet.result.name] = record.keep(mask > 0)
        stats.channels[loud.result.name] = record.take(columns)
        rest = float(np.delete(record.largest, columns).max())
        for node in readers:
            weight = _weight(node)
            assert weight.constant is not None
            data, axis = weight.constant.wide(), _input_axis(node)
            taken = np.take(data, columns, axis)
            zeroed = data * (mask if axis else mask[:, None])
            dtype = weight.constant.dtype
            branch = rewriter.constant(Constant(taken, dtype, taken.shape), f"{weight.name}.loud")
            rewriter.set_operand(node, 0, quiet.result)
            rewriter.set_operand(node, 1, rewriter.constant(Constant(zeroed, dtype, data.shape), weight.name))
            total = _add_branch(node, loud.result, branch, rewriter, stats)
            spread = f"range {float(record.largest.max()):.3g} -> {rest:.3g}"
            report.applied.append(f"{place(total)}: {len(columns)} of {width} columns, {spread}")
            report.figures.setdefault("columns", {})[node.result.name] = len(columns)

    def _dynamic(
        self, x: Value, readers: list[Node], rewriter: Rewriter, report: PassReport, stats: Stats | None
    ) -> None:
        assert x.rank is not None and x.dtype is not None
        before = readers[0]

        def insert(op: str, operands: list[Value], suffix: str, **attributes: int | bool | tuple[int, ...]) -> Value:
            made = rewriter.insert(
                op, operands, attributes, before=before, names=[f"{x.name}.{suffix}"], source=before.source
            )
            return made.result

        def scalar(number: float, suffix: str) -> Value:
            assert x.dtype is not None
            return rewriter.constant(Constant(np.array(number), x.dtype, ()), f"{x.name}.{suffix}")

        size = insert("abs", [x], "size")
        if x.rank > 1:
            size = insert("reduce_max", [size], "largest", axes=tuple(range(x.rank - 1)), keepdims=False)
        hit = insert("greater_equal", [size, scalar(self.threshold, "threshold")], "is_loud")
        columns = insert("nonzero", [hit], "columns")
        quiet = insert("where", [hit, scalar(0.0, "nothing"), x], "quiet")
        loud = insert("gather", [x, columns], "loud", axis=-1)
        record = stats.along(x.name) if stats is not None else None
        if stats is not None and record is not None:
            # a column below the threshold stays as it is, in other batches all do
            still = record.keep(record.largest < self.threshold)
            low, high = (v.clip(-self.threshold, self.threshold) for v in (record.minimum, record.maximum))
            stats.channels[quiet.name] = replace(still, minimum=low, maximum=high)
        for node in readers:
            weight = _weight(node)
            taken = rewriter.insert(
                "gather", [weight, columns], {"axis": _input_axis(node)}, before=node,
                names=[f"{weight.name}.loud"], source=node.source,
            )  # fmt: skip
            rewriter.set_operand(node, 0, quiet)
            total = _add_branch(node, loud, taken.result, rewriter, stats)
            report.applied.append(f"{place(total)}: columns that reach {self.threshold:g}")


def _weight(node: Node) -> Value:
    weight = node.operands[1]
    assert weight is not None
    return weight


def _input_axis(node: Node) -> int:
    """The axis of a linear's weight along which it sums."""
    return 0 if node.attributes.get("transposed", False) else 1


def _add_branch(node: Node, loud: Value, weight: Value, rewriter: Rewriter, stats: Stats | None) -> Node:
    """node + linear(loud, weight), the linear marked to stay in float."""
    after = node._next
    readers = list(node.result.users)
    name = f"{node.result.name}.loud"
    branch = rewriter.insert("linear", [loud, weight], node.attributes, before=after, names=[name], source=node.source)
    keep_float(rewriter.graph, branch.result)
    total = rewriter.insert("add", [node.result, branch.result], before=after, source=node.source)
    rewriter.replace(node.result, total.result, users=readers)
    rewriter.graph.outputs = [(n, total.result if v is node.result else v) for n, v in rewriter.graph.outputs]
    if stats is not None:
        stats.rename(node.result.name, total.result.name)
    return total


def _extracted(node: Node, kept: set[str]) -> bool:
    """True if a float linear of gathered columns is added to the result: this pass was here."""
    for user in node.result.users:
        for other in user.operands if user.op.name == "add" else ():
            made = other.producer if other is not None and other.name in kept else None
            read = made.operands[0].producer if made is not None and made.operands[0] is not None else None
            if read is not None and read.op.name == "gather":
                return True
    return False
