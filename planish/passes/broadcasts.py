"""Drop an expansion that the op behind it makes itself, for `fold_constants`.

x / expand(n, shape of x)  ->  x / n        exact, bit for bit: every element is computed from the same numbers
"""

from __future__ import annotations

from collections.abc import Sequence

from planish.ir.graph import Node, Value
from planish.ir.rewriter import Rewriter
from planish.ir.types import Shape
from planish.passes.match import is_op

FAMILY = "arithmetic"  # the ops that broadcast their operands


def drop_expansions(node: Node, rewriter: Rewriter) -> bool:
    """Let an op read what is expanded, where its own broadcast gives the same shape; False if nothing changed."""
    if node.op.family != FAMILY or len(node.operands) < 2:
        return False
    changed = False
    for port, value in enumerate(node.operands):
        if value is None or value.producer is None or not is_op(value, "expand"):
            continue
        inner = value.producer.operand(0)
        others = [v for i, v in enumerate(node.operands) if i != port]
        if inner is not None and inner.dtype == value.dtype and _gives(node.result.shape, [inner, *others]):
            rewriter.set_operand(node, port, inner)
            changed = True
    return changed


def _gives(shape: Shape, operands: Sequence[Value | None]) -> bool:
    """True if the operands broadcast to that shape for any sizes of its symbolic dims."""
    shapes = [v.shape for v in operands if v is not None]
    if shape is None or any(s is None or len(s) > len(shape) for s in shapes):
        return False
    for axis in range(-len(shape), 0):
        dims = {s[axis] for s in shapes if s is not None and len(s) >= -axis} - {1}
        if None in dims or dims != {shape[axis]} - {1}:
            return False
    return True
