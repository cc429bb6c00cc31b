"""Linear - activation function - linear, with the channels in between divided into parts.

    f(x W1^T + b1) W2^T + b2  =  sum over parts P of  f(x W1[P]^T + b1[P]) W2[:, P]^T   + b2

f acts channel by channel, so that every part is a chain of its own. Exact; each part is then a tensor with a range,
and weights with scales, of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Graph, Node, Value
from planish.ir.ops.base import Act, Carry
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.stats import Stats
from planish.passes.sites import reads_by_weight

PARTS = "channel-parts"  # graph.meta: the activations that are parts of one that was divided


@dataclass(frozen=True, eq=False)
class Chain:
    """A linear, the function of its result alone, and the linear that reads that.

    Attributes:
        writer, act, reader: the nodes.
    """

    writer: Node
    act: Node
    reader: Node

    @property
    def read(self) -> Value:
        """What the reader reads: the activation that is divided."""
        return self.act.result

    @property
    def channels(self) -> int:
        """How many channels it has."""
        weight = self.reader.operands[1]
        assert weight is not None and weight.constant is not None
        return weight.constant.shape[0 if _transposed(self.reader) else 1]


def chain_before(reader: Node) -> Chain | None:
    """The chain that ends in a linear; None where there is no such chain."""
    x = reader.operands[0] if reader.op.name == "linear" else None
    if x is None or x.producer is None or x.rank is None or not reads_by_weight(reader, x):
        return None
    act = x.producer
    before = act.operands[0] if act.operands else None
    if any(v is not None and (v.constant is None or v.constant.size != 1) for v in act.operands[1:]):
        return None
    writer = before.producer if before is not None else None
    if writer is None or writer.op.name != "linear" or not _acts_alone(act, x.rank):
        return None
    return Chain(writer, act, reader)


def check_chain(chain: Chain, graph: Graph) -> None:
    """Check that a chain may be divided.

    Raises:
        Declined: something else reads what would be divided, or a weight is shared or computed.
    """
    x, before = chain.read, chain.act.operands[0]
    assert before is not None
    if [*x.users, *before.users] != [chain.reader, chain.act] or any(v in (x, before) for v in graph.output_values()):
        raise Declined("others read what would be split", chain.act)
    weights = [chain.writer.operand(1), chain.writer.operand(2), chain.reader.operand(1)]
    if any(w is not None and (not w.is_constant or len(w.users) > 1) for w in weights):
        raise Declined("a weight is shared or computed", chain.writer)


def divide(
    chain: Chain, parts: Sequence[tuple[str, np.ndarray]], rewriter: Rewriter, stats: Stats | None
) -> tuple[Node, int]:
    """Replace a chain that was checked by one per part and their sum; statistics follow.

    Args:
        parts: a label and the channels of each part; together all channels. The last part keeps the bias b2.

    Returns:
        The node that adds the last part up, and the number of nodes that the graph has more.
    """
    reader, before = chain.reader, len(rewriter.graph)
    made = [_part(chain, label, index, label == parts[-1][0], rewriter, stats) for label, index in parts]
    total = made[-1]
    for part in made[:-1]:
        total = rewriter.insert("add", [total, part], before=reader, source=reader.source).result
    if stats is not None:
        stats.rename(reader.result.name, total.name)
    rewriter.replace_node(reader, total)
    assert total.producer is not None
    return total.producer, len(rewriter.graph) - before - 2  # the linear and the function before go with the sweep


def parts_of(graph: Graph) -> set[str]:
    """The names of activations that are parts already, of those that are still there."""
    names = graph.meta.get(PARTS, ())
    assert isinstance(names, tuple)
    return {name for name in names if isinstance(name, str) and name in graph.values}


def _part(chain: Chain, label: str, index: np.ndarray, biased: bool, rewriter: Rewriter, stats: Stats | None) -> Value:
    """The chain of one part, before the reader."""
    writer, act, reader = chain.writer, chain.act, chain.reader

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

    assert writer.operands[0] is not None
    made = linear(writer.operands[0], taken(writer, 1, 1 if _transposed(writer) else 0), taken(writer, 2, 0), writer)
    name = f"{act.result.name}.{label}"
    operands = [made, *act.operands[1:]]
    made = rewriter.insert(act.op, operands, act.attributes, before=reader, names=[name], source=act.source).result
    rewriter.graph.meta[PARTS] = tuple(sorted({*parts_of(rewriter.graph), made.name}))
    if stats is not None and chain.read.name in stats:
        stats.channels[made.name] = stats.of(chain.read.name).take(index)
    bias = reader.operand(2) if biased else None
    return linear(made, taken(reader, 1, 0 if _transposed(reader) else 1), bias, reader)


def _transposed(node: Node) -> bool:
    return bool(node.attributes.get("transposed", False))


def _acts_alone(node: Node, rank: int) -> bool:
    """True if every channel of the result depends on the same channel of the operand alone."""
    if len(node.results) != 1 or node.result.rank != rank:
        return False
    relation = node.op.relate(node, Act.PERMUTE, 0, (rank - 1,))
    if not isinstance(relation, Carry) or relation.block_axes or len(relation.links) != 1:
        return False
    link = relation.links[0]
    alone = node.op.family == "elementwise" or node.op.name == "clip"
    return alone and link.port == -1 and link.axes == (rank - 1,) and link.pairs is None
