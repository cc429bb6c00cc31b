"""Merge linears that read one value into one linear and a split.

    x Wq, x Wk, x Wv  ->  split(x [Wq Wk Wv])        biases alike, zeros where only some have one

The columns of a product do not see each other: an identity, for every dtype. One large product is
faster than several small ones, and a quantised x is read once. A weight that something else reads stays by
itself, since merging would copy it; so does a branch that is to stay in float.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Graph, Node, Value
from planish.ir.rewriter import Declined, Rewriter
from planish.passes.base import Context, Exactness, Pass, PassReport, kept_float, place
from planish.passes.match import attribute
from planish.passes.options import Range, option


@dataclass(frozen=True)
class MergeLinears(Pass):
    """Linears that read one value become one.

    Args:
        min_group: merge groups of at least this many.
    """

    min_group: int = option(2, Range(1))

    name = "merge-linears"
    exactness = Exactness.IDENTITY

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        groups: dict[tuple[Value, str | None], list[Node]] = defaultdict(list)
        readers: dict[Value, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            x = node.operand(0)
            if node.op.name == "linear" and x is not None:
                readers[x].append(node)
        outputs, kept = set(graph.output_values()), kept_float(graph)
        for x, nodes in readers.items():
            for node in nodes if len(nodes) >= self.min_group else ():
                try:
                    if node.result.name in kept:
                        raise Declined("it stays in float beside what is quantised", node)
                    groups[x, _check(node, outputs)].append(node)
                except Declined as refusal:
                    report.decline(refusal.reason, refusal.node)
        sizes = {len(nodes) for nodes in readers.values()}
        with Rewriter(graph) as rewriter:
            for (x, _), nodes in groups.items():
                if len(nodes) >= max(2, self.min_group):
                    report.applied.append(", ".join(place(n) for n in nodes))
                    report.inserted += 2
                    _merge(rewriter, nodes)
                elif len(nodes) < len(readers[x]):
                    report.decline("too few of its siblings can be merged with it", nodes[0])
        if not report.applied and sizes:
            report.misses.append(f"the value with most linears is read by {max(sizes)} of them")
        return report


def _check(node: Node, outputs: set[Value]) -> str | None:
    """The dtype of a linear that can be merged.

    Raises:
        Declined: its weight or bias is no constant of its own.
    """
    weight, bias = node.operand(1), node.operand(2)
    if weight is None or not weight.is_constant or (bias is not None and not bias.is_constant):
        raise Declined("its weight or bias is no constant", node)
    if len(weight.users) > 1 or weight in outputs:
        raise Declined("its weight is tied: something else reads it", node)
    if bias is not None and (bias.rank != 1 or bias.dtype != weight.dtype or bias.shape != (_size(node),)):
        raise Declined("its bias is no vector of the dtype of its weight", node)
    return weight.dtype


def _size(node: Node) -> int:
    """The number of outputs."""
    weight = node.operand(1)
    assert weight is not None
    assert weight.constant is not None
    return weight.constant.shape[1 if attribute(node, "transposed") else 0]


def _merge(rewriter: Rewriter, nodes: list[Node]) -> None:
    """One linear for `nodes`, at the place of the first. Its weight is transposed as most of theirs are."""
    turned = sum(bool(attribute(n, "transposed")) for n in nodes) * 2 > len(nodes)
    axis = 1 if turned else 0
    parts = []
    for node in nodes:
        constant = _constant(node, 1)
        parts.append(_data(constant).T if bool(attribute(node, "transposed")) != turned else _data(constant))
    dtype = _constant(nodes[0], 1).dtype
    operands = [nodes[0].operand(0), _joined(rewriter, parts, axis, dtype, nodes, 1)]
    if any(node.operand(2) is not None for node in nodes):
        biases = [
            _data(_constant(n, 2)) if n.operand(2) is not None else np.zeros(_size(n), parts[0].dtype) for n in nodes
        ]
        operands.append(_joined(rewriter, biases, 0, dtype, nodes, 2))
    sizes = tuple(_size(n) for n in nodes)
    first = nodes[0]
    attributes = {"transposed": True} if turned else {}
    name = f"{first.result.name}.merged"
    merged = rewriter.insert("linear", operands, attributes, before=first, names=[name], source=first.source)
    split = rewriter.insert("split", [merged.result], {"axis": -1, "sizes": sizes}, before=first, source=first.source)
    for node, part in zip(nodes, split.results, strict=True):
        name = node.result.name
        rewriter.replace_node(node, part)
        rewriter.rename(part, name)


def _constant(node: Node, port: int) -> Constant:
    value = node.operand(port)
    assert value is not None
    assert value.constant is not None
    return value.constant


def _data(constant: Constant) -> np.ndarray:
    """The data as it is held: unrounded where a fold left it so."""
    return constant.wide() if constant.is_wide else constant.array()


def _joined(rewriter: Rewriter, parts: list[np.ndarray], axis: int, dtype: str, nodes: list[Node], port: int) -> Value:
    """The constant of several; held in float64 if one of them is."""
    wide = any(p.dtype == np.float64 for p in parts)
    data = np.concatenate([p.astype(np.float64) if wide else p for p in parts], axis)
    names = [v.name for v in (n.operand(port) for n in nodes) if v is not None]
    return rewriter.constant(Constant(data, dtype, data.shape), f"{names[0]}.merged")
