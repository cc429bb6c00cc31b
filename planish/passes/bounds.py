"""How far below zero a value can fall, whatever its inputs: from the ops that made it.

    gelu(x) > -0.1701    silu(x) > -0.2785    relu(x) >= 0    softmax(x) >= 0    tanh(x) >= -1

Sums with constants, products with constants that are not negative, and changes of shape keep a bound. A value that
cannot be negative needs no sign bit.
"""

from __future__ import annotations

import numpy as np

from planish.ir.graph import Node, Value
from planish.passes.match import attribute

# of activation functions over all real numbers; rounded away from zero, so that they hold in floats too
LEAST = {
    "abs": 0.0, "exp": 0.0, "hard_sigmoid": 0.0, "relu": 0.0, "sigmoid": 0.0, "softmax": 0.0, "softplus": 0.0,
    "sqrt": 0.0, "rsqrt": 0.0, "gelu": -0.1701, "silu": -0.2785, "hard_swish": -0.3751, "tanh": -1.0, "erf": -1.0,
    "sin": -1.0, "cos": -1.0,
}  # fmt: skip
KEEPS = frozenset(
    {"expand", "gather", "identity", "reshape", "slice", "split", "squeeze", "tile", "transpose", "unsqueeze"}
)


def lower_bound(value: Value | None) -> float | None:
    """A number below which no element of the value can fall; None: the ops that made it tell none."""
    node = value.producer if value is not None else None
    if node is None:
        return None
    first = node.operand(0)
    if node.op.name in LEAST:
        return LEAST[node.op.name]
    if node.op.name in KEEPS:
        return lower_bound(first)
    match node.op.name:
        case "elu":
            return min(0.0, -float(str(attribute(node, "alpha"))))
        case "clip":
            return _least(node.operand(1), lower_bound(first))
        case "concat":
            return _all(node)
        case "max":
            known = [b for b in map(_bound, node.operands) if b is not None]
            return max(known) if known else None
        case "cast":
            below = lower_bound(first)  # rounding may pass any other bound
            return 0.0 if below is not None and below >= 0 else None
        case "add":
            left, right = map(_bound, node.operands[:2])
            return None if left is None or right is None else left + right
        case "mul":
            return _product(node)
    return None


def _least(constant: Value | None, otherwise: float | None) -> float | None:
    """The least element of a constant; `otherwise` if it is none or empty."""
    data = constant.constant if constant is not None and constant.is_constant else None
    if data is None or data.size == 0:
        return otherwise
    least = float(data.wide().min())
    return least if np.isfinite(least) else otherwise


def _bound(value: Value | None) -> float | None:
    return _least(value, None) if value is not None and value.is_constant else lower_bound(value)


def _all(node: Node) -> float | None:
    bounds = [_bound(v) for v in node.operands if v is not None]
    known = [b for b in bounds if b is not None]
    return min(known) if known and len(known) == len(bounds) else None


def _product(node: Node) -> float | None:
    """Of a product of two that are not negative, or of a constant that is not with anything that is bounded."""
    left, right = node.operands[:2]
    first, second = _bound(left), _bound(right)
    if first is None or second is None:
        return None
    if first >= 0 and second >= 0:
        return first * second
    for factor, least, other in ((left, first, second), (right, second, first)):
        if factor is not None and factor.constant is not None and factor.is_constant and least >= 0 > other:
            return other * float(factor.constant.wide().max())
    return None
