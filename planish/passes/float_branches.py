"""Float branches of low rank beside linears: finding them, and making them.

total = main + up(down(x))        down and up are linears that stay in float (`planish.passes.base.keep_float`)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.rewriter import Rewriter
from planish.passes.base import keep_float, kept_float


@dataclass(frozen=True, eq=False)
class FloatBranch:
    """The two linears of a branch that stay in float."""

    down: Node
    up: Node


def _float_linears(total: Value) -> Iterator[tuple[Node, Node]]:
    """The linears in a sum that stay in float, each with the node that makes what it reads."""
    node = total.producer
    if node is None or node.op.name != "add" or node.graph is None:
        return
    kept = kept_float(node.graph)
    for addend in node.operands:
        linear = addend.producer if addend is not None else None
        if linear is None or linear.op.name != "linear" or linear.result.name not in kept:
            continue
        read = linear.operand(0)
        if read is not None and read.producer is not None:
            yield linear, read.producer


def branch_of(total: Value) -> FloatBranch | None:
    """The branch that is added in a sum; None if the value is no such sum."""
    for up, down in _float_linears(total):
        if down.op.name == "linear" and down.graph is not None and down.result.name in kept_float(down.graph):
            return FloatBranch(down, up)
    return None


def columns_of(total: Value) -> Node | None:
    """The gather of the columns that a float linear in a sum reads (`extract-outliers`); None if there is none."""
    return next((made for _, made in _float_linears(total) if made.op.name == "gather"), None)


def sums_of(value: Value) -> list[Value]:
    """A value and the sums that float branches make of it, one after the other."""
    found = [value]
    while True:
        users = dict.fromkeys(found[-1].users)
        sums = [u.result for u in users if u.op.name == "add" and (branch_of(u.result) or columns_of(u.result))]
        if len(sums) != 1:
            return found
        found += sums


def branch_behind(node: Node) -> FloatBranch | None:
    """The branch that is added to what a node gives."""
    for user in dict.fromkeys(node.result.users):
        found = branch_of(user.result) if user.op.name == "add" else None
        if found is not None and found.up is not node:
            return found
    return None


def stored(data: np.ndarray, dtype: str) -> np.ndarray:
    """Float64 numbers that the dtype holds, the nearest to `data`."""
    rounded: np.ndarray = Constant(data, dtype, data.shape).array().astype(np.float64)
    return rounded


def lower_bias(rewriter: Rewriter, node: Node, amount: np.ndarray, dtype: str) -> None:
    """bias -= amount [outputs]; made where there is none."""
    bias = node.operand(2)
    old = bias.constant.wide() if bias is not None and bias.constant is not None else np.zeros(len(amount))
    name = bias.name if bias is not None else f"{node.result.name}.bias"
    data = old - amount
    rewriter.set_operand(node, 2, rewriter.constant(Constant(data, dtype, data.shape), name))


def give_weight(rewriter: Rewriter, node: Node, matrix: np.ndarray, suffix: str = "") -> None:
    """Another weight [outputs, inputs] for a linear."""
    old = node.operand(1)
    assert old is not None and old.dtype is not None
    data = np.ascontiguousarray(matrix.T if node.attributes.get("transposed", False) else matrix)
    held = Constant(data, old.dtype, data.shape)
    if not suffix and len(old.users) == 1 and not any(v is old for v in rewriter.graph.output_values()):
        rewriter.set_constant(old, held)
    else:
        rewriter.set_operand(node, 1, rewriter.constant(held, old.name + suffix))


def add_branch(rewriter: Rewriter, node: Node, narrow: Value, up: np.ndarray, dtype: str) -> None:
    """result += narrow up^T; the sum takes the name that the result had."""
    name = node.result.name
    held = rewriter.constant(Constant(up, dtype, up.shape), f"{name}.up.weight")
    wide = rewriter.insert("linear", [narrow, held], before=node._next, names=[f"{name}.up"], source=node.source)
    keep_float(rewriter.graph, wide.result)
    total = rewriter.insert("add", [node.result, wide.result], before=wide._next, source=node.source)
    rewriter.replace(node.result, total.result)
    rewriter.rename(node.result, rewriter.graph.fresh_name(f"{name}.residual"))
    rewriter.rename(total.result, name)
