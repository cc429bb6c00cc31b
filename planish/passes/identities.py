"""Nodes that do nothing, or what the node beside them does as well: rules of `fold_constants`.

    x * 1, x + 0, x / 1, ..        ->  x
    x / expand(n, shape of x)      ->  x / n       every element is computed from the same numbers

Exact, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from planish.ir.graph import Node, Value
from planish.ir.rewriter import Rewriter
from planish.ir.shapes import static_ints
from planish.ir.types import Shape
from planish.passes.match import attribute, is_op, scalar

FAMILY = "arithmetic"  # the ops that broadcast their operands
NEUTRAL: Mapping[str, tuple[float, bool]] = {  # op: (neutral element, whether on either side)
    "mul": (1.0, True),
    "add": (0.0, True),
    "div": (1.0, False),
    "sub": (0.0, False),
    "pow": (1.0, False),
    "logical_and": (1.0, True),
    "logical_or": (0.0, True),
}


def _same_shape(one: Value, two: Value) -> bool:
    return one.shape is not None and None not in one.shape and one.shape == two.shape and one.dtype == two.dtype


def neutral(node: Node, rewriter: Rewriter) -> Value | None:
    """x of x * 1, x + 0, .."""
    if node.op.name not in NEUTRAL or len(node.operands) != 2:
        return None
    element, either = NEUTRAL[node.op.name]
    one, two = node.operands
    for x, constant in ((one, two), (two, one))[: 2 if either else 1]:
        if x is None or constant is None or constant.constant is None or not constant.is_constant:
            continue
        if x.is_constant or x.dtype != node.result.dtype or constant.constant.size > 1 << 16:
            continue
        single = scalar(constant) is not None and x.rank is not None and (constant.rank or 0) <= x.rank
        if not single and not _same_shape(x, node.result):
            continue
        if constant.constant.size and (constant.constant.wide() == element).all():
            return x
    return None


def unchanged(node: Node, rewriter: Rewriter) -> Value | None:
    """x of a node that gives x itself."""
    x = node.operand(0)
    if x is None or x.is_constant:
        return None
    match node.op.name:
        case "identity":
            return x
        case "cast":
            return x if x.dtype is not None and x.dtype == node.result.dtype else None
        case "concat":
            return x if len(node.operands) == 1 else None
        case "reshape" | "expand" | "flatten" | "tile":
            return x if _same_shape(x, node.result) else None
        case "transpose":
            perm = tuple(attribute(node, "perm"))
            return x if perm == tuple(range(len(perm))) else None
        case "squeeze" | "unsqueeze":
            return x if not attribute(node, "axes") and x.rank == node.result.rank else None
    return None


def merged(node: Node, rewriter: Rewriter) -> Value | None:
    """One node for a transpose of a transpose, or a reshape of a reshape."""
    inner = node.operand(0)
    if inner is None or not is_op(inner, node.op.name) or inner.producer is None:
        return None
    x = inner.producer.operand(0)
    if x is None:
        return None
    operands: list[Value | None] = [x]
    if node.op.name == "transpose":
        first, second = tuple(attribute(inner.producer, "perm")), tuple(attribute(node, "perm"))
        attributes: dict[str, Any] = {"perm": tuple(first[a] for a in second)}
    elif node.op.name == "reshape":
        shape = node.operand(1)
        target = static_ints(shape)
        if target is None or (0 in target and not attribute(node, "allowzero")):
            return None
        operands, attributes = [x, shape], dict(node.attributes)
    else:
        return None
    types = [r.type for r in node.results]
    return rewriter.insert(node.op, operands, attributes, before=node, types=types, source=node.source).result


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
