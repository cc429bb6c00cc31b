"""Reading moments: means, squares, roots and centring in all their spellings, for `raise_norms`."""

from __future__ import annotations

import math

from planish.ir.graph import Node, Value
from planish.passes.match import attribute, both, is_op, near, origin, same, scalar

Axes = tuple[int, ...]


def square(value: Value) -> Value | None:
    """x of x * x or x^2."""
    node = origin(value).producer
    if node is None or node.op.name not in ("mul", "pow"):
        return None
    one, two = node.operand(0), node.operand(1)
    if node.op.name == "pow":
        return origin(one) if one is not None and scalar(two) == 2.0 else None
    return origin(one) if one is not None and same(one, two) else None


def mean_of(value: Value) -> tuple[Value, Axes] | None:
    """(x, axes) of a mean with its axes kept."""
    node = origin(value).producer
    if node is None:
        return None
    if node.op.name in ("div", "mul"):  # sum / count, sum * (1 / count)
        total, count = node.operand(0), scalar(node.operand(1))
        if node.op.name == "mul" and count is None:
            total, count = node.operand(1), scalar(node.operand(0))
        if total is None or not count:
            return None
        count = 1.0 / count if node.op.name == "mul" else count
        found = _reduced(total, "reduce_sum")
        if found is None or found[0].shape is None:
            return None
        dims = [found[0].shape[a] for a in found[1]]
        return found if all(isinstance(d, int) for d in dims) and near(count, math.prod(dims)) else None  # type: ignore[arg-type]
    return _reduced(value, "reduce_mean")


def _reduced(value: Value, op: str) -> tuple[Value, Axes] | None:
    node = origin(value).producer
    lifted: Axes | None = None
    if node is not None and node.op.name == "unsqueeze":
        lifted = tuple(attribute(node, "axes"))
        operand = node.operand(0)
        node = origin(operand).producer if operand is not None else None
    if node is None or node.op.name != op:
        return None
    x, axes = node.operand(0), attribute(node, "axes")
    if x is None or x.rank is None:
        return None
    positive = tuple(sorted(a % x.rank for a in (axes if axes is not None else range(x.rank))))
    if lifted is not None:
        lifted = tuple(sorted(a % x.rank for a in lifted))
    if bool(attribute(node, "keepdims")) != (lifted is None) or lifted not in (None, positive):
        return None
    return origin(x), positive


def under_root(node: Node) -> tuple[Value, Value] | None:
    """(n, u) of a node n / sqrt(u), in any of its spellings."""
    one, two = node.operand(0), node.operand(1)
    if one is None or two is None:
        return None
    if node.op.name == "div":
        under = _root(two)
        return (one, under) if under is not None else None
    for number, factor in both(node):
        inverse = origin(factor).producer
        if inverse is None:
            continue
        operand, divisor = inverse.operand(0), inverse.operand(1)
        under = None
        if inverse.op.name == "rsqrt":
            under = operand
        elif inverse.op.name == "reciprocal" and operand is not None:
            under = _root(operand)
        elif inverse.op.name == "div" and scalar(operand) == 1.0 and divisor is not None:
            under = _root(divisor)
        elif inverse.op.name == "pow" and scalar(divisor) == -0.5:
            under = operand
        elif inverse.op.name == "sqrt" and operand is not None and is_op(origin(operand), "reciprocal"):
            under = origin(operand).producer.operand(0)  # type: ignore[union-attr]
        if under is not None:
            return number, under
    return None


def _root(value: Value) -> Value | None:
    node = origin(value).producer
    if node is None or node.op.name not in ("sqrt", "pow"):
        return None
    return node.operand(0) if node.op.name == "sqrt" or scalar(node.operand(1)) == 0.5 else None


def centred_on(value: Value) -> tuple[Value, Axes] | None:
    """(x, axes) of x - mean x."""
    node = origin(value).producer
    if node is None or node.op.name != "sub":
        return None
    x, subtracted = node.operand(0), node.operand(1)
    found = mean_of(subtracted) if subtracted is not None else None
    return found if found is not None and same(found[0], x) else None


def difference_of_moments(difference: Node) -> tuple[Value, Axes] | None:
    """(x, axes) of mean x^2 - (mean x)^2."""
    one, two = difference.operand(0), difference.operand(1)
    first = mean_of(one) if one is not None else None
    base = square(first[0]) if first is not None else None
    squared = square(two) if two is not None else None
    second = mean_of(squared) if squared is not None else None
    if first is None or second is None or base is not second[0] or first[1] != second[1]:
        return None
    return second


def variance_of(value: Value) -> tuple[Value, Axes] | None:
    """(x, axes) of torch's variance over axes that it keeps, divided by their count (not by one less)."""
    node = origin(value).producer
    if node is None or node.op.name not in ("torch::aten.var.dim", "torch::aten.var.correction"):
        return None
    x, axes = node.operand(0), node.attributes.get("dim")
    biased = node.attributes.get("unbiased") is False or node.attributes.get("correction") in (0, 0.0)
    if x is None or x.rank is None or not isinstance(axes, list | tuple) or len(node.operands) != 1:
        return None
    if not biased or not node.attributes.get("keepdim"):
        return None
    rank = x.rank
    return origin(x), tuple(sorted(a % rank for a in axes if isinstance(a, int)))
