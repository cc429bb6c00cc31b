"""Axes that were one axis further up: a fused projection `[B, T, 3 H d]` read as `[B, T, 3, H, d]`.

An op that takes positions out of such an axis (split, slice, gather) takes other channels each time, not the same
channels in another row. Its row then links the asked axes to the wider element that holds the axis as well, so
that what is taken out at other positions stays free.
"""

from __future__ import annotations

from planish.ir.graph import Node, Value
from planish.ir.ops.align import attribute, static_dims, tie_pairs
from planish.ir.ops.base import Axes, Carry, Link, Port, normal_axis
from planish.ir.ops.regroup import find_groups
from planish.ir.shapes import known_ints

DEPTH = 12  # ops between the reshape and the cut
_RESHAPES = frozenset({"transpose", "reshape", "flatten", "unsqueeze", "squeeze", "expand"})
_VIEWS = _RESHAPES | {"gather", "slice", "split", "cast", "identity"}
_ELEMENTWISE = frozenset({"add", "sub", "mul", "div", "cast", "identity", "neg", "silu", "gelu", "relu"})


def stacked(value: Value | None, axis: int, axes: Axes) -> bool:
    """True if `axis` and one of `axes` are parts of one axis of a tensor that `value` is a view of."""
    for _ in range(DEPTH):
        node = None if value is None else value.producer
        if node is None or value is None or value.shape is None:
            return False
        source = node.operand(0)
        if source is None or source.shape is None:
            return False
        match node.op.name:
            case "reshape" | "flatten":
                places = _regrouped(value, source, axis, axes)
                if isinstance(places, bool):
                    return places
            case "transpose":
                perm = attribute(node, "perm")
                places = dict(enumerate(perm or reversed(range(len(value.shape)))))
            case "unsqueeze" | "squeeze":
                places = _units(node, len(value.shape), len(source.shape))
            case "split":
                cut = normal_axis(attribute(node, "axis"), len(value.shape))
                places = {a: a for a in range(len(value.shape)) if a != cut}
            case "slice":
                cuts = known_ints(node.operand(3))
                if cuts is None or not all(isinstance(c, int) for c in cuts):
                    return False
                gone = {normal_axis(int(c), len(value.shape)) for c in cuts if isinstance(c, int)}
                places = {a: a for a in range(len(value.shape)) if a not in gone}
            case name if name in _ELEMENTWISE and source.shape == value.shape:
                places = {a: a for a in range(len(value.shape))}
            case _:
                return False
        if axis not in places:
            return False
        axis, axes, value = places[axis], tuple(places[a] for a in axes if a in places), source
        if not axes:
            return False
    return False


def widened(node: Node, port: Port, axis: int, axes: Axes) -> Carry | None:
    """The link from `axes` of a result to the element of it that holds `axis` as well; None if they are no stack.

    What is asked of the axes then holds for the positions that this op takes, not for the others.
    """
    value = node.port(port)
    if value is None or not stacked(node.operand(0), axis, axes):
        return None
    joint = tuple(sorted((*axes, axis)))
    dims = static_dims(value, joint)
    if dims is None:
        return None
    asked = [1 if a == axis else dim for a, dim in zip(joint, dims, strict=True)]
    return Carry((Link(port, joint, pairs=tie_pairs(asked, dims)),))


def from_constant(value: Value | None) -> bool:
    """True for a constant, and for what is looked up in one: the weights of the experts that rows chose."""
    for _ in range(DEPTH):
        if value is None or value.is_constant:
            return value is not None
        if value.producer is None or value.producer.op.name not in _VIEWS:
            return False
        value = value.producer.operand(0)
    return False


def _regrouped(value: Value, source: Value, axis: int, axes: Axes) -> bool | dict[int, int]:
    """The answer, where the reshape decides it; else where the axes of its result come from."""
    assert value.shape is not None
    assert source.shape is not None
    places = {}
    for group in find_groups(value.shape, source.shape):
        if axis in group.left and len(group.left) > 1:
            return group.known and len(group.right) == 1 and any(a in group.left for a in axes)
        if len(group.left) == len(group.right) == 1:
            places[group.left[0]] = group.right[0]
    return places


def _units(node: Node, rank: int, source_rank: int) -> dict[int, int]:
    """unsqueeze, squeeze: where each axis of the result comes from."""
    longer = max(rank, source_rank)
    units = {normal_axis(a, longer) for a in attribute(node, "axes")}
    kept = [a for a in range(longer) if a not in units]
    pairs = enumerate(kept)
    return {b: a for a, b in pairs} if rank > source_rank else dict(pairs)
