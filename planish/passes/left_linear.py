"""Linear layers that are written with the weight on the left: rules of `raise-linear`.

    matmul(W, transpose(x))               ->  transpose(linear(x, W))      W constant [N, K], x [..., T, K]
    add(transpose(linear(x, W)), b)       ->  transpose(linear(x, W, b))   b constant [N, 1]

Only where the transpose swaps the last two axes, so that one transpose takes the place of another.
"""

from __future__ import annotations

from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.types import WIDE_FLOATS
from planish.passes.match import Rule, Site, Trail, attribute, both, is_op, only_reader


def _unswapped(value: Value | None) -> Value | None:
    """x of a value that is x with its last two axes swapped."""
    if value is None or value.rank is None or value.producer is None or not is_op(value, "transpose"):
        return None
    perm = attribute(value.producer, "perm") or tuple(reversed(range(value.rank)))
    return value.producer.operand(0) if tuple(perm) == _swap(value) else None


def _swap(value: Value) -> tuple[int, ...]:
    """The permutation that swaps the last two axes."""
    assert value.rank is not None
    return (*range(value.rank - 2), value.rank - 1, value.rank - 2)


def _match_product(node: Node, trail: Trail) -> Site | None:
    weight, turned = node.operand(0), node.operand(1)
    x = _unswapped(turned)
    if weight is None or not weight.is_constant or weight.rank != 2 or weight.dtype not in WIDE_FLOATS or x is None:
        return None
    if x.dtype != weight.dtype:
        return trail.miss(2, f"the dtypes differ: {x.dtype} and {weight.dtype}", node)
    return Site(node, (x, weight))


def _apply_product(site: Site, rewriter: Rewriter) -> None:
    made = rewriter.insert("linear", list(site.sources), before=site.root, source=site.root.source).result
    site.supersede(rewriter, rewriter.insert("transpose", [made], {"perm": _swap(made)}, before=site.root).result)


def _match_bias(node: Node, trail: Trail) -> Site | None:
    for product, value in both(node):
        inner = _unswapped(product)
        linear = inner.producer if inner is not None else None
        constant = value.constant if value.is_constant else None
        if inner is None or linear is None or linear.op.name != "linear" or constant is None or inner.shape is None:
            continue
        size, shape = inner.shape[-1], constant.shape
        column = len(shape) >= 2 and shape[-1] == 1 and shape[-2] == size and constant.size == size
        if linear.operand(2) is not None or not column or len(shape) > len(inner.shape):
            trail.miss(1, "the linear has a bias already, or the constant is no column over its channels", node)
            continue
        if value.dtype != product.dtype:
            trail.miss(1, f"the dtypes differ: {product.dtype} and {value.dtype}", node)
            continue
        return Site(node, (linear.operand(0), linear.operand(1), value), {"linear": linear, "turned": product})
    return None


def _apply_bias(site: Site, rewriter: Rewriter) -> None:
    linear, turned, (x, weight, value) = site.parts["linear"], site.parts["turned"], site.sources
    if only_reader(turned) is not site.root or only_reader(linear.result) is not turned.producer:
        raise Declined("the linear is read elsewhere without the sum", linear)
    assert value is not None and value.constant is not None
    data = value.constant.wide().reshape(-1)
    bias = rewriter.constant(Constant(data, value.constant.dtype, data.shape), value.name)
    operands = [x, weight, bias]
    made = rewriter.insert("linear", operands, linear.attributes, before=site.root, source=linear.source).result
    site.supersede(rewriter, rewriter.insert("transpose", [made], {"perm": _swap(made)}, before=site.root).result)


RULES = (
    Rule("linear from the left", frozenset({"matmul"}), 3, _match_product, _apply_product),
    Rule("bias from the left", frozenset({"add"}), 2, _match_bias, _apply_bias),
)
