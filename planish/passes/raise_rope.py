"""Raise rotary embeddings that are written as arithmetic.

    x * cos + rotate(x) * sin                        ->  rope(x, cos, sin)
    concat(x1 c - x2 s, x2 c + x1 s)                 ->  rope(x, concat(c, c), concat(s, s))
    real parts of (x1 + i x2) (c + i s)              ->  rope(x, c twice, s twice; interleaved)

rotate(x) = concat(-x2, x1), x1 and x2 the halves of the last axis; or, `interleaved`, its even and its odd
channels, set side by side again by a stack and a reshape. With the signs the other way round the sine is negated.
Two parts that turn together but are no halves of one tensor in order (even and odd channels that become halves)
are put in order first, by one gather. A rotary part of the channels is a slice that is turned and set beside the rest:
it needs nothing of its own. The tables are operands: inputs, computed or constant.
Exact over the reals. RoPE: arXiv:2104.09864.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.rewriter import Rewriter
from planish.passes.base import Exactness
from planish.passes.match import PatternPass, Rule, Site, Trail, both, is_op, origin, same, widens
from planish.passes.parts import alike, joined_of, last_dim, negated, unpaired, whole_of
from planish.passes.rope_tables import complex_parts, doubled, negative

TO_COMPLEX, TO_REAL = "torch::aten.view_as_complex.default", "torch::aten.view_as_real.default"
PRODUCT = "torch::aten.mul.Tensor"


def _match_rotated(node: Node, trail: Trail) -> Site | None:
    """x cos + rotate(x) sin, or x cos - rotate(x) sin."""
    for one, two in both(node):
        if node.op.name == "sub" and one is not node.operand(0):
            continue
        plain, turned = origin(one).producer, origin(two).producer
        if plain is None or turned is None or plain.op.name != "mul" or turned.op.name != "mul":
            continue
        for rotation, sin in both(turned):
            joined = joined_of(rotation)
            if joined is None:
                continue
            opposite, other, backward = negated(joined[0]), negated(joined[1]), node.op.name == "sub"
            if (opposite is None) == (other is None):
                continue
            backward ^= opposite is None  # concat(x2, -x1)
            found = whole_of(other or joined[1], opposite or joined[0], joined[2])
            if found is None:
                trail.miss(2, "the parts are not the two halves of one tensor", origin(rotation).producer)
                continue
            for x, cos in both(plain):
                if same(x, found[0]) and not found[2]:
                    if not found[1]:
                        return trail.miss(3, "the parts change places as well", rotation.producer)
                    return _site(node, x, cos, sin, {"interleaved": joined[2], "backward": backward}, trail)
            trail.miss(3, "another tensor stands beside the rotated one", plain)
    return None


def _site(node: Node, x: Value, cos: Value, sin: Value, parts: dict[str, bool], trail: Trail) -> Site | None:
    if widens(cos, x) or widens(sin, x):
        return trail.miss(4, "the tables have axes that x does not have", node)
    if {cos.dtype, sin.dtype, x.dtype} != {node.result.dtype}:
        return trail.miss(4, "x and the tables differ in dtype", node)
    return Site(node, (x, cos, sin), dict(parts))


def _product(node: Node | None) -> list[tuple[Value, Value]]:
    return list(both(node)) if node is not None and node.op.name == "mul" else []


def _match_parts(node: Node, trail: Trail) -> Site | None:
    """concat(x1 c - x2 s, x2 c + x1 s), or concat(x1 c + x2 s, x2 c - x1 s)."""
    joined = joined_of(node.result)
    if joined is None:
        return None
    one, two = origin(joined[0]).producer, origin(joined[1]).producer
    if one is None or two is None or {one.op.name, two.op.name} != {"sub", "add"}:
        return None
    backward = one.op.name == "add"
    for left, right in both(one):
        if not backward and left is not one.operand(0):
            continue
        for first, cos in _product(origin(left).producer):
            for second, sin in _product(origin(right).producer):
                if _is_other_part(two, first, second, cos, sin):
                    # the formula looks the same with parts and tables exchanged
                    parts = {"interleaved": joined[2], "backward": backward, "half": True}
                    site = _of_parts(node, first, second, cos, sin, parts, trail)
                    if site is not None:
                        return site
    return trail.miss(1, "no rotation of two parts", node)


def _is_other_part(node: Node, first: Value, second: Value, cos: Value, sin: Value) -> bool:
    """True for second cos +- first sin."""
    for left, right in both(node):
        if node.op.name == "sub" and left is not node.operand(0):
            continue
        one = any(alike(x, second) and alike(table, cos) for x, table in _product(origin(left).producer))
        if one and any(alike(x, first) and alike(table, sin) for x, table in _product(origin(right).producer)):
            return True
    return False


def _of_parts(
    node: Node, first: Value, second: Value, cos: Value, sin: Value, parts: dict[str, bool], trail: Trail
) -> Site | None:
    found = whole_of(first, second, parts["interleaved"])
    if found is None:
        return trail.miss(3, "the parts are not the two halves of one tensor", node)
    if widens(cos, first) or widens(sin, first):
        return trail.miss(4, "the tables have axes that x does not have", node)
    whole = found[0]
    if {cos.dtype, sin.dtype, whole.dtype} != {node.result.dtype}:
        return trail.miss(4, "x and the tables differ in dtype", node)
    if whole.shape is None or node.result.shape != (_merged(whole.shape) if found[2] else whole.shape):
        return trail.miss(4, "the result has another shape than x", node)
    return Site(node, (whole, cos, sin), {**parts, "ordered": found[1], "paired": found[2]})


def _merged(shape: tuple[int | str | None, ...]) -> tuple[int | str | None, ...]:
    """[.., d] of [.., d/2, 2]."""
    return (*shape[:-2], 2 * shape[-2]) if isinstance(shape[-2], int) else shape


def _match_complex(node: Node, trail: Trail) -> Site | None:
    """The parts of (x1 + i x2) (c + i s), one behind the other."""
    pairs = node.operand(0)
    view = pairs.producer if pairs is not None and is_op(pairs, TO_REAL) else None
    product = view.operand(0).producer if view is not None and view.operand(0) is not None else None  # type: ignore[union-attr]
    if view is None or pairs is None or product is None:
        return None
    if product.op.name != PRODUCT or len(product.operands) != 2:
        return trail.miss(1, "no product of two complex tensors", product)
    for number, angles in both(product):
        x = number.producer.operand(0) if number.producer is not None and is_op(number, TO_COMPLEX) else None
        if x is None or angles.shape is None or widens(angles, number):
            continue
        if x.shape is None or x.shape != pairs.shape or node.result.shape != _merged(x.shape):
            return trail.miss(3, "the result has another shape than x", node)
        inner = unpaired(x)
        parts = {"interleaved": True, "half": True, "ordered": True, "paired": inner is None, "view": view}
        return Site(node, (x if inner is None else inner, angles), parts)
    return trail.miss(2, "neither factor is made of pairs of real numbers", product)


def _in_order(x: Value, site: Site, rewriter: Rewriter) -> Value:
    """x [.., d] with the channels that turn together where the row looks for them."""
    node, interleaved = site.root, site.parts["interleaved"]
    if site.parts["paired"]:
        assert x.shape is not None
        numbers = [d if isinstance(d, int) else -1 for d in _merged(x.shape)]
        if numbers.count(-1) > 1:
            numbers = [0] * (len(numbers) - 1) + numbers[-1:]  # 0: as it is in x
        shape = rewriter.constant(Constant.of(np.array(numbers, np.int64), "i64"), "shape")
        x = rewriter.insert("reshape", [x, shape], before=node, source=node.source).result
    if not site.parts["ordered"]:
        order = np.arange(last_dim(x) or 0).reshape((2, -1) if interleaved else (-1, 2)).T.reshape(-1)
        index = rewriter.constant(Constant.of(np.ascontiguousarray(order), "i64"), "order")
        x = rewriter.insert("gather", [x, index], {"axis": -1}, before=node, source=node.source).result
    return x


def _apply(site: Site, rewriter: Rewriter) -> None:
    node, interleaved = site.root, site.parts["interleaved"]
    x, first, *rest = site.sources
    assert x is not None and first is not None
    if "view" in site.parts:
        cos, sin = complex_parts(rewriter, first, site.parts["view"], node)
    else:
        assert rest[0] is not None
        cos, sin = first, rest[0]
    if site.parts.get("backward"):
        sin = negative(rewriter, sin, node)
    if site.parts.get("half"):
        x = _in_order(x, site, rewriter)
        cos, sin = (doubled(rewriter, table, node, interleaved) for table in (cos, sin))
    attributes = {"interleaved": True} if interleaved else {}
    made = rewriter.insert("rope", [x, cos, sin], attributes, before=node, source=node.source)
    Site(node, site.sources).supersede(rewriter, made.result)


@dataclass(frozen=True)
class RaiseRope(PatternPass):
    """Rotary embeddings from arithmetic."""

    name = "raise-rope"
    exactness = Exactness.EXACT
    rules = (
        Rule("rope", frozenset({"add", "sub"}), 5, _match_rotated, _apply),
        Rule("rope of two parts", frozenset({"concat", "reshape", "flatten"}), 5, _match_parts, _apply),
        Rule("rope of complex numbers", frozenset({"reshape", "flatten"}), 4, _match_complex, _apply),
    )
