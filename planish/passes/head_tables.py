"""Rotary tables of their own for each head, so that each head may have an order of its own.

A table of angles [T, d] serves all heads: what moves its pairs moves those of every head alike. As [H, T, d] it
takes an order per head. No op is added; the tables grow by the number of heads.
"""

from __future__ import annotations

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Graph, Node, Value
from planish.ir.ops.base import Act
from planish.ir.rewriter import Rewriter
from planish.ir.spaces import analyse


def widen_tables(graph: Graph) -> tuple[int, int]:
    """Give every `rope` whose tables are constants tables per head.

    Returns:
        the number of nodes changed, and the bytes that the tables grew by.
    """
    ropes = [n for n in graph.nodes if n.op.name == "rope" and all(v is not None and v.is_constant for v in _tables(n))]
    heads: dict[Value, int] = {}
    for space in analyse(graph).of(Act.PERMUTE):
        for member in space.activations:
            if member.value is not None and member.value.rank is not None and len(member.axes) == 2:
                if member.axes[1] == member.value.rank - 1:
                    heads[member.value] = member.axes[0]
    changed = grown = 0
    with Rewriter(graph) as rewriter:
        for node in ropes:
            x = node.operands[0]
            if x in heads:
                bytes_more = sum(_widen(rewriter, node, port, heads[x]) for port in (1, 2))
                grown += bytes_more
                changed += bytes_more > 0
    return changed, grown


def _tables(node: Node) -> tuple[Value | None, Value | None]:
    return node.operand(1), node.operand(2)


def _widen(rewriter: Rewriter, node: Node, port: int, axis: int) -> int:
    """Spread one table along the heads; the bytes that it grew by, 0 if it has them or their number is unknown."""
    x, table = node.operands[0], node.operands[port]
    assert x is not None and table is not None and x.shape is not None and table.constant is not None
    count, rank = x.shape[axis], len(x.shape)
    old = table.constant
    shape = [1] * (rank - len(old.shape)) + list(old.shape)
    if not isinstance(count, int) or shape[axis] == count:
        return 0
    shape[axis] = count
    data = old.wide() if old.is_wide else old.array()
    wide = Constant(np.broadcast_to(data, shape).copy(), old.dtype, tuple(shape))
    rewriter.set_operand(node, port, rewriter.constant(wide, table.name))
    return wide.nbytes - old.nbytes
