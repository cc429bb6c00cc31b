"""How the asked axes of one port lie on another port: broadcasting, transposed and tied axes.

Helpers of the rows' `relate`. Atoms are positions on the flattened axes, in C order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.ops.base import Act, Axes, Block, Link, Port
from planish.ir.types import WIDE_FLOATS, Dim

Pairs = tuple[np.ndarray, np.ndarray]
LINEAR_ACTS = frozenset({Act.PERMUTE, Act.SCALE, Act.ROTATE, Act.LINEAR})


def attribute(node: Node, name: str) -> Any:
    """An attribute of a node, or the row's default for it."""
    return node.attributes.get(name, node.op.attributes[name])


def numeric(node: Node, act: Act, port: Port) -> Block | None:
    """A refusal if the port holds no wide float: integers and booleans can only be permuted."""
    value = node.port(port)
    if act is Act.PERMUTE or value is None or value.dtype in WIDE_FLOATS:
        return None
    return Block(f"{value.dtype} values can only be permuted")


def static(dims: tuple[Dim, ...]) -> tuple[int, ...] | None:
    """The dims as ints, None if one is not static."""
    sizes = tuple(d for d in dims if isinstance(d, int))
    return sizes if len(sizes) == len(dims) else None


def static_dims(value: Value, axes: Axes) -> tuple[int, ...] | None:
    """The dims of `axes`, None if one is not static."""
    shape = value.shape
    if shape is None or not all(0 <= axis < len(shape) for axis in axes):
        return None
    return static(tuple(shape[axis] for axis in axes))


def asked_dims(node: Node, port: Port, axes: Axes) -> tuple[int, ...]:
    """The dims of the asked axes, which are always static."""
    value = node.port(port)
    dims = None if value is None else static_dims(value, axes)
    if dims is None:
        raise ValueError(f"axes {axes} of port {port} are not static in {node.op.name}")
    return dims


def wider(dims: Sequence[int], axes: Axes) -> Axes:
    """The axes without those of size 1, on which there is nothing to tell apart; all if all are."""
    kept = tuple(axis for axis, dim in zip(axes, dims, strict=True) if dim != 1)
    return kept or axes


def aligned_axes(port_rank: int, other_rank: int, axes: Axes) -> tuple[int | None, ...]:
    """The axes that lie at the same place from the right in a tensor of another rank, None: missing."""
    shifted = [axis + other_rank - port_rank for axis in axes]
    return tuple(axis if axis >= 0 else None for axis in shifted)


def tie_pairs(asked_dims: Sequence[int], other_dims: Sequence[int]) -> Pairs | None:
    """The pairs (asker's atoms, other's atoms) of axes that are broadcast against each other.

    Args:
        asked_dims: the asker's dims, 1 where it is broadcast or lacks the axis.
        other_dims: the other's dims for the same axes, 1 likewise.

    Returns:
        None if the dims are equal (atom i is atom i).
    """
    if tuple(asked_dims) == tuple(other_dims):
        return None
    full = tuple(np.broadcast_shapes(tuple(asked_dims), tuple(other_dims)))
    return _spread(asked_dims, full), _spread(other_dims, full)


def _spread(dims: Sequence[int], full: tuple[int, ...]) -> np.ndarray:
    atoms = np.arange(int(np.prod(dims, dtype=np.int64))).reshape(tuple(dims))
    return np.ascontiguousarray(np.broadcast_to(atoms, full)).reshape(-1)


def permuted_axes(axes: Axes, place: Sequence[int], dims: Sequence[int]) -> tuple[Axes, Pairs | None]:
    """Axes that come to lie at other places, which may be in another order.

    Args:
        axes: the asked axes.
        place: for each of them, the axis of the other port.
        dims: for each of them, its dim.

    Returns:
        the other port's axes, ascending, and the pairs (None: the order is the same).
    """
    order = sorted(range(len(axes)), key=lambda i: place[i])
    other = tuple(place[i] for i in order)
    if order == list(range(len(axes))):
        return other, None
    asker = np.arange(int(np.prod(dims, dtype=np.int64))).reshape(tuple(dims)).transpose(order).reshape(-1)
    return other, (np.ascontiguousarray(asker), np.arange(asker.size))


def index_pairs(dims: Sequence[int], indices: Sequence[np.ndarray | None]) -> Pairs:
    """The pairs of a tensor and of what is taken out of it by indices along some of its axes.

    Args:
        dims: the source's dims of the asked axes.
        indices: per axis, the source index at each place of the taken axis (None: the whole axis; -1: a
            place that comes from nowhere).

    Returns:
        (source atoms, taken atoms); what is not taken, and what comes from nowhere, is in no pair.
    """
    taken = np.zeros((), np.int64)
    valid = np.ones((), np.bool_)
    for dim, index in zip(dims, indices, strict=True):
        index = np.arange(dim) if index is None else np.asarray(index, np.int64)
        taken = taken[..., None] * dim + index
        valid = valid[..., None] & (index >= 0)
    flat = np.nonzero(valid.reshape(-1))[0]
    return taken.reshape(-1)[flat], flat


def swapped(pairs: Pairs | None) -> Pairs | None:
    """The same pairs, seen from the other port."""
    return None if pairs is None else (pairs[1], pairs[0])


class Kind(Enum):
    """How much of the asked axes a broadcast port has."""

    FULL = "full"  # every asked axis, at full size
    PART = "part"  # some at full size, some broadcast
    NONE = "none"  # broadcast along all of them: it cannot tell them apart


@dataclass(frozen=True, slots=True)
class Seen:
    """How a port that is broadcast against the asker sees the asked axes.

    Attributes:
        link: the port with its own axes and tied pairs; axes are empty for `Kind.NONE`.
        grown: for a constant that is not FULL: the link to it expanded along all asked axes.
        inner: the asked axes that the port has at full size.
    """

    port: Port
    kind: Kind
    link: Link
    grown: Link | None
    inner: Axes
    constant: Constant | None

    def carried(self) -> Link:
        """The link that gives every asked atom its own element, where there is one: grown if need be."""
        return self.grown or self.link


def seen(node: Node, asker: Port, axes: Axes, port: Port) -> Seen | Block:
    """How `port` sees the asked axes of `asker` under broadcasting from the right.

    `axes` must come from `wider`: they have size > 1, or all have size 1.
    """
    value, own = node.port(port), node.port(asker)
    if value is None or own is None or own.rank is None:
        raise ValueError(f"{node.op.name} has no port {port} beside {asker}")
    shape = value.shape
    if shape is None:
        return Block("an operand's rank is unknown" if port >= 0 else "the result's rank is unknown")
    dims = asked_dims(node, asker, axes)
    places = aligned_axes(own.rank, len(shape), axes)
    theirs: list[Dim] = [1 if place is None else shape[place] for place in places]
    if all(d == 1 for d in dims):
        if any(d != 1 for d in theirs):
            return Block("the axis has size 1 and is broadcast")
        if any(place is None for place in places):
            return Seen(port, Kind.NONE, Link(port, ()), None, (), _constant(value))
    elif port < 0:
        theirs = [d if isinstance(d, int) else dims[i] for i, d in enumerate(theirs)]
    if any(their not in (1, dim) for their, dim in zip(theirs, dims, strict=True)):
        return Block("an operand's size along the axis is unknown")
    inner = tuple(axis for axis, their, dim in zip(axes, theirs, dims, strict=True) if their == dim)
    link_axes = tuple(
        place for place, their, dim in zip(places, theirs, dims, strict=True) if their == dim and place is not None
    )
    constant = _constant(value)
    if len(inner) == len(axes):
        return Seen(port, Kind.FULL, Link(port, link_axes), None, inner, constant)
    grown = _grown(port, constant, own.rank, axes, dims) if constant is not None else None
    if not inner:
        return Seen(port, Kind.NONE, Link(port, ()), grown, (), constant)
    other_dims = [dim if their == dim else 1 for their, dim in zip(theirs, dims, strict=True)]
    return Seen(port, Kind.PART, Link(port, link_axes, pairs=tie_pairs(dims, other_dims)), grown, inner, constant)


def _constant(value: Value) -> Constant | None:
    return value.constant if value.is_constant else None


def _grown(port: Port, constant: Constant, rank: int, axes: Axes, dims: Sequence[int]) -> Link:
    """The link to a constant expanded along the asked axes of a port of rank `rank`."""
    size = max(len(constant.shape), rank - min(axes))
    shape = [1] * (size - len(constant.shape)) + list(constant.shape)
    places = tuple(axis + size - rank for axis in axes)
    for place, dim in zip(places, dims, strict=True):
        shape[place] = dim
    return Link(port, places, grow=tuple(shape))


def see_all(node: Node, asker: Port, axes: Axes, ports: Sequence[Port]) -> list[Seen] | Block:
    """`seen` for every present port of `ports` but the asker; the first refusal if there is one."""
    found = []
    for port in ports:
        if port == asker or node.port(port) is None:
            continue
        one = seen(node, asker, axes, port)
        if isinstance(one, Block):
            return one
        found.append(one)
    return found


def scalar_value(constant: Constant | None) -> float | None:
    """The value of a constant of one element, else None."""
    if constant is None or constant.size != 1 or constant.dtype == "str":
        return None
    return float(constant.wide().reshape(-1)[0])


def turned(link: Link, variance: int) -> Link:
    """The link with another variance."""
    if link.variance == variance:
        return link
    return Link(link.port, link.axes, variance, link.pairs, link.grow, link.view, link.neutral, link.offset)


def conservative(acts: Sequence[Act], ports: Sequence[Port], why: str) -> dict[str, str]:
    """Entries of `OpDef.conservative`: `<act>@<port>`."""
    return {f"{act.value}@{port}": why for act in acts for port in ports}
