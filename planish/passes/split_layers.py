"""Cut a weight into clusters of like values, each with a range of its own.

    W  =  W_0 + W_1 + .. + W_{k-1}         W_j: the elements of cluster j, 0 elsewhere
    x W^T + b  =  sum over j of (x W_j^T + b_j)

The clusters come from exact 1-D k-means (`planish.passes.kmeans`), three by default. Exact: every element lies in one
cluster, so that the parts add up to W bit for bit. A few weights that are far larger than the others then get a scale
of their own and no longer spoil that of the rest. (SplitQuant, Song and Lin, arXiv 2501.12428; SplitQuantV2, arXiv
2503.07657.)

`packed` puts the cluster ids beside the weight, which stays one tensor read by one linear: b + 2 bits per weight after
quantisation. `layers` makes a linear of every part and adds them up, the bias clustered by itself: three times the
products, but any runtime can do it. Both read the same two constants, and give the same numbers after `quantize`, which
takes the range of a cluster from its own elements: the zeros that fill a part would pull it back to 0, and lose what
the split won (NMSE of int2 on Gaussian weights with 0.1 % outliers: .88 plain, .81 with the zeros, .29 without).

Linears are clustered as one tensor, convolutions per output kernel, as in the paper; `scope` clusters linears per
row or per group of a row instead. With `activations`, the channels between two linears around an activation function
are divided into as many parts too: by their largest magnitude where there are statistics, else into parts of equal
size as in the paper. Put this pass behind those that transform channels: the split weight takes up no transform.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.graph import Graph, Node, Value
from planish.ir.qtensor import cluster_dtype
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.stats import Stats
from planish.ir.types import WIDE_FLOATS, numpy_dtype
from planish.passes.base import Context, Exactness, Pass, PassReport, kept_float, place
from planish.passes.channel_parts import chain_before, check_chain, divide, parts_of
from planish.passes.kmeans import choose_clusters, cluster_values
from planish.passes.named import check_patterns, require_named
from planish.passes.options import Range, option
from planish.passes.sites import READERS


def choose_parts(largest: np.ndarray | None, channels: int, count: int) -> list[np.ndarray]:
    """The channels of each part, ascending; parts are not empty.

    Args:
        largest: float64 [C], max |x| of each channel: channels of like size come together; None: equal parts.
        channels: C.
        count: of parts, at most.
    """
    if largest is None:
        return [part for part in np.array_split(np.arange(channels), count) if len(part)]
    ids = cluster_values(largest, count).ids(largest[None])[0]
    return [np.flatnonzero(ids == j) for j in np.unique(ids)]


@dataclass(frozen=True)
class SplitLayers(Pass):
    """Split the weights of linears and convolutions by value."""

    name = "split-layers"
    exactness = Exactness.EXACT

    clusters: int = option(3, Range(2, 4))  # parts of a weight
    form: Literal["packed", "layers"] = "packed"
    scope: str = "tensor"  # who is clustered by itself: tensor, row, or gN: N consecutive elements of a row
    activations: bool = False  # divide the channels behind activation functions too
    skip: tuple[str, ...] = ()  # regular expressions: nodes whose source or result name matches stay whole

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"tensor|row|g[1-9][0-9]*", self.scope):
            raise PlanishError(
                f"pass 'split-layers': option 'scope': expected tensor, row or g64 (any number); got '{self.scope}'"
            )
        check_patterns(self, "skip")

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        if self.activations:
            self._activations(graph, report, context.stats)
        kept = kept_float(graph)
        splits: dict[Value, list[Value]] = {}
        with Rewriter(graph) as rewriter:
            for node in context.progress(list(graph.nodes), "split-layers"):
                weight = node.operand(1) if node.op.name in READERS else None
                if weight is None or not weight.is_constant or node.result.name in kept:
                    continue
                before = len(graph)
                try:
                    require_named(node, self.skip, ())
                    if weight not in splits:
                        splits[weight] = self._split(node, weight, rewriter, report)
                    self._apply(node, splits[weight], rewriter, context.stats)
                except Declined as refusal:
                    report.decline(str(refusal), node)
                    continue
                report.applied.append(place(node))
                report.inserted += len(graph) - before
        if not report.applied and not report.declined:
            report.misses.append("no linear or convolution with a constant weight")
        return report

    def _activations(self, graph: Graph, report: PassReport, stats: Stats | None) -> None:
        done = parts_of(graph)
        with Rewriter(graph) as rewriter:
            for node in list(graph.nodes):
                chain = chain_before(node)
                if chain is None or chain.read.name in done:
                    continue
                try:
                    check_chain(chain, graph)
                    record = stats.along(chain.read.name) if stats is not None else None
                    parts = choose_parts(record.largest if record else None, chain.channels, self.clusters)
                    if len(parts) < 2:
                        raise Declined("its channels are of like size", node)
                except Declined as refusal:
                    report.decline(str(refusal), refusal.node)
                    continue
                labels = [f"part{j}" for j in range(len(parts))]
                total, inserted = divide(chain, list(zip(labels, parts, strict=True)), rewriter, stats)
                report.applied.append(f"{place(total)}: channels in parts of {', '.join(str(len(p)) for p in parts)}")
                report.inserted += inserted

    def _split(self, node: Node, weight: Value, rewriter: Rewriter, report: PassReport) -> list[Value]:
        """The split of a weight: itself, or its parts."""
        assert weight.constant is not None
        if weight.dtype not in WIDE_FLOATS:
            raise Declined(f"its weight is {weight.dtype}; expected floats", node)
        if any(n.op.name not in READERS or n.operand(1) is not weight for n in weight.users):
            raise Declined("its weight has other readers", node)
        data = weight.constant.wide()
        if not np.isfinite(data).all():
            raise PlanishError(f"weight '{weight.name}': holds NaN or infinity", where=place(node))
        ids = cluster_ids(node, data, self.clusters, self.scope) if data.size else np.empty(0, np.int64)
        used = np.unique(ids)
        if len(used) < 2:
            raise Declined("its weight holds one value or none", node)
        shares = np.bincount(ids.reshape(-1), minlength=self.clusters) / ids.size
        report.figures.setdefault("shares", {})[weight.name] = [round(float(s), 6) for s in shares]
        narrow = cluster_dtype(self.clusters)
        held = rewriter.constant(
            Constant(ids.astype(numpy_dtype(narrow)), narrow, ids.shape), f"{weight.name}.clusters"
        )
        ones = np.ones(self.clusters)
        scale = rewriter.constant(Constant(ones, weight.constant.dtype, ones.shape), f"{weight.name}.scales")

        def part(label: str, attributes: dict[str, int]) -> Value:
            return rewriter.insert(
                "dequantize_split", [weight, held, scale], attributes, before=node,
                names=[f"{weight.name}.{label}"], source=node.source,
            ).result  # fmt: skip

        if self.form == "packed":
            return [part("split", {})]
        return [part(f"part{j}", {"index": int(j)}) for j in used]

    def _apply(self, node: Node, parts: list[Value], rewriter: Rewriter, stats: Stats | None) -> None:
        """Make a node read the split weight: as it is, or by one node for each part."""
        if len(parts) == 1:
            rewriter.set_operand(node, 1, parts[0])
            return
        total: Value | None = None
        for j, (part, bias) in enumerate(zip(parts, _bias_parts(node, len(parts), rewriter), strict=True)):
            made = rewriter.insert(
                node.op, [node.operands[0], part, bias], node.attributes, before=node,
                names=[f"{node.result.name}.part{j}"], source=node.source,
            ).result  # fmt: skip
            total = made if total is None else rewriter.insert(
                "add", [total, made], before=node, source=node.source
            ).result  # fmt: skip
        assert total is not None
        if stats is not None:
            stats.rename(node.result.name, total.name)
        rewriter.replace_node(node, total)


def cluster_ids(node: Node, data: np.ndarray, clusters: int, scope: str) -> np.ndarray:
    """The cluster of each element of the weight of a linear, gemm or convolution, uint8 of its shape.

    Args:
        data: the weight, float64; its rows are what one output reads.
        clusters, scope: see `SplitLayers`; a convolution is clustered per kernel where a linear is per tensor.
    """
    turned = node.op.name == "linear" and bool(node.attributes.get("transposed", False))
    axis = int(turned or (node.op.name == "gemm" and not node.attributes.get("trans_b", False)))
    moved = np.moveaxis(data, axis, 0)
    scope = "row" if node.op.name == "conv" and scope == "tensor" else scope
    ids = choose_clusters(moved.reshape(len(moved), -1), clusters, scope).reshape(moved.shape)
    return np.ascontiguousarray(np.moveaxis(ids, 0, axis))


def _bias_parts(node: Node, count: int, rewriter: Rewriter) -> list[Value | None]:
    """The bias for each part: clustered by itself, 0 elsewhere; one that is computed goes with the first part."""
    bias = node.operand(2)
    if bias is None or bias.constant is None:
        return [bias, *(None for _ in range(count - 1))]
    data, dtype = bias.constant.wide(), bias.constant.dtype
    ids = cluster_values(data, count).ids(data.reshape(1, -1)).reshape(data.shape)
    found: list[Value | None] = []
    for j in range(count):
        held = Constant(np.where(ids == j, data, 0.0), dtype, data.shape)
        found.append(rewriter.constant(held, f"{bias.name}.part{j}") if (ids == j).any() else None)
    return found
