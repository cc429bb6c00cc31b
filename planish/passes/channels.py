"""What the constants of a channel space and its statistics say about its channels, and what a space is for.

The choosers of the channel passes are pure functions of these numbers. Nothing here knows a model: what a
space is for (`kind_of`) follows from the ops that read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from planish.ir.graph import Graph, Node, Value
from planish.ir.spaces import Member, Space
from planish.ir.stats import Stats

Kind = Literal["residual", "hidden", "key", "value"]
_PRODUCTS = frozenset({"matmul", "gemm", "linear"})


def member_data(member: Member) -> np.ndarray:
    """A constant member as [rest, positions], float64: the positions are those of its axes, flattened in C order.

    Raises:
        ValueError: the constant has yet to be made (an absent bias).
    """
    value = member.current
    if value is None or value.constant is None:
        raise ValueError("a constant that is not there has no data")
    data = value.constant.wide()
    if member.grow is not None:
        data = np.broadcast_to(data, np.broadcast_shapes(data.shape, member.grow))
    data, axes = member.seen(data)
    moved = np.moveaxis(data, axes, tuple(range(data.ndim - len(axes), data.ndim)))
    count = int(np.prod([data.shape[a] for a in axes], dtype=np.int64))
    return moved.reshape(-1, count) + member.offset


def position_norms(member: Member, order: Literal["largest", "euclidean"]) -> np.ndarray:
    """max |w| or |w|_2 of each position of a constant member, float64 [positions]."""
    data = member_data(member)
    if not data.size:
        return np.zeros(data.shape[1])
    norms: np.ndarray = np.abs(data).max(0) if order == "largest" else np.sqrt((data**2).sum(0))
    return norms


def channel_norms(members: Iterable[Member], size: int, order: Literal["largest", "euclidean"]) -> np.ndarray:
    """max |w| or |w|_2 of each channel over constant members and all of a channel's copies, float64 [size]."""
    total = np.zeros(size)
    for member in members:
        if member.value is None:
            continue
        norms = position_norms(member, order)
        atoms = np.arange(len(norms)) if member.atoms is None else member.atoms
        inside = atoms >= 0
        if order == "largest":
            np.maximum.at(total, atoms[inside], norms[inside])
        else:
            np.add.at(total, atoms[inside], norms[inside] ** 2)
    return total if order == "largest" else np.sqrt(total)


def channel_ranges(member: Member, size: int, stats: Stats) -> tuple[np.ndarray, np.ndarray] | None:
    """The extremes of each channel in an activation, float64 [size] each.

    None without statistics on that axis, or where the activation holds only some of the channels.
    """
    value = member.value
    if value is None or value.rank is None or value.name not in stats or len(member.axes) != 1:
        return None
    record = stats.of(value.name)
    if record.axis != member.axes[0] - value.rank:
        return None
    atoms = np.arange(len(record.minimum)) if member.atoms is None else member.atoms
    inside = atoms >= 0
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    np.minimum.at(low, atoms[inside], record.minimum[inside])
    np.maximum.at(high, atoms[inside], record.maximum[inside])
    return (low, high) if np.isfinite(low).all() and np.isfinite(high).all() else None


def title(space: Space) -> str:
    """The name of the first activation that lies in a space with all of its channels, else of the first."""
    whole = [m for m in space.activations if m.atoms is None or (m.atoms >= 0).all()]
    value = (whole or space.activations)[0].value
    return value.name if value is not None else ""


# -- what a space is for ---------------------------------------------------------------------------


def key_side(space: Space) -> Value | None:
    """The activation that a product of two activations contracts with another of the same space: keys, or None."""
    names = {(id(m.value), m.axes[-1]) for m in space.activations if m.value is not None}
    for member in space.activations:
        value = member.value
        if value is None or value.rank is None or member.axes[-1] != value.rank - 1:
            continue
        for node in value.users:
            if node.operands[0] is value and _contracted(node) in names:
                return node.operands[1]
    return None


def _contracted(node: Node) -> tuple[int, int] | None:
    """The second operand of a product of two activations (by id), and the axis of it that is contracted."""
    if node.op.name != "attention" and node.op.name not in _PRODUCTS:
        return None
    left, right = node.operand(0), node.operand(1)
    if left is None or right is None or left.is_constant or right.is_constant or right.rank is None:
        return None
    by_last = node.op.name == "attention" or (node.op.name == "linear" and not node.attributes.get("transposed", False))
    by_last = by_last or (node.op.name == "gemm" and bool(node.attributes.get("trans_b", False)))
    return id(right), right.rank - (1 if by_last else 2)


def _mixed(space: Space) -> bool:
    """True if rows of the space are summed by weights that are no constants: the values of an attention."""
    inside = {id(m.value) for m in space.activations}
    for member in space.activations:
        for node in member.value.users if member.value is not None else ():
            if node.op.name == "attention" and node.operand(2) is member.value and id(node.result) in inside:
                return True
            if node.op.name == "matmul" and node.operands[1] is member.value and id(node.result) in inside:
                left = node.operands[0]
                if left is not None and not left.is_constant and id(left) not in inside:
                    return True
    return False


def positions(graph: Graph) -> dict[Node, int]:
    """The place of each node in the order of the graph."""
    return {node: index for index, node in enumerate(graph.nodes)}


def _skips(space: Space, place: dict[Node, int]) -> bool:
    """True if a sum in the space adds to a value what was computed from it: a residual stream."""
    inside = {id(m.value) for m in space.activations}
    for member in space.activations:
        node = member.value.producer if member.value is not None else None
        if node is None or node.op.name != "add":
            continue
        addends = [v for v in node.operands if v is not None and not v.is_constant and id(v) in inside]
        if len(addends) == 2 and (_reaches(addends[0], addends[1], place) or _reaches(addends[1], addends[0], place)):
            return True
    return False


def _reaches(start: Value, end: Value, place: dict[Node, int]) -> bool:
    """True if `end` is computed from `start`."""
    first = place[start.producer] if start.producer is not None else -1
    waiting, seen = [end], {end}
    while waiting:
        value = waiting.pop()
        if value is start:
            return True
        node = value.producer
        if node is None or place[node] <= first:
            continue
        for operand in node.operands:
            if operand is not None and operand not in seen and not operand.is_constant:
                seen.add(operand)
                waiting.append(operand)
    return False


def kind_of(space: Space, place: dict[Node, int]) -> Kind:
    """What a space is for: keys (and queries), values of an attention, a residual stream, or hidden channels.

    Args:
        place: `positions` of the graph.
    """
    if key_side(space) is not None:
        return "key"
    if _skips(space, place):
        return "residual"
    return "value" if _mixed(space) else "hidden"


def behind(value: Value, space: Space) -> list[Member]:
    """The constants of a space that act on what flows into `value`: found by walking back within the space."""
    inside = {id(m.value) for m in space.activations}
    nodes: set[Node] = set()
    waiting, seen = [value], {value}
    while waiting:
        node = waiting.pop().producer
        if node is None:
            continue
        nodes.add(node)
        for operand in node.operands:
            if operand is not None and id(operand) in inside and operand not in seen:
                seen.add(operand)
                waiting.append(operand)
    return [
        m for m in space.constants if m.node in nodes or any(u in nodes for u in (m.value.users if m.value else ()))
    ]
