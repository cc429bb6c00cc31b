"""Guards around a softmax against rows whose scores are all -inf, for `raise_attention`."""

from __future__ import annotations

import numpy as np

from planish.ir.graph import Node, Value
from planish.passes.match import is_op, same, scalar


def _zero(value: Value | None) -> bool:
    constant = value.constant if value is not None and value.is_constant else None
    return constant is not None and not constant.wide().any()


def rows_guarded(node: Node, softmax: Node) -> bool:
    """True for where(not any(s != -inf), 0, softmax(s)): torch's own decomposition of a safe softmax."""
    condition, zero, kept = node.operands
    if kept is not softmax.result or not _zero(zero):
        return False
    steps: list[str] = []
    while condition is not None and is_op(condition, "logical_not", "cast", "reduce_max") and condition.producer:
        if not is_op(condition, "cast"):
            steps.append(condition.producer.op.name)
        condition = condition.producer.operand(0)
    test = condition.producer if condition is not None else None
    if steps != ["logical_not", "reduce_max", "logical_not"] or test is None or test.op.name != "equal":
        return False
    return same(test.operand(0), softmax.operand(0)) and scalar(test.operand(1)) == -np.inf
