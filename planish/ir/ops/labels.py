"""Contractions by labels: which axis of one port is which axis of another.

A `Site` gives each axis of a port a label, as an einsum does: `x[b0, k], weight[n, k] -> result[b0, n]`.
An axis that meets no other port has a label of its own. From the labels alone follow the links between
ports (`link_between`) and what a contraction does with a linear act (`contract`).

    y[.., m, n] = sum_k a[.., m, k] b[.., k, n]

A transform on a contracted label (k) is undone by the inverse transpose on the other factor; one on an outer
label (m, n) shows on the result. Along every other label that the asker spans and the partner does not, the
transform is one and the same (tied by `Link.pairs`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from planish.ir import shapes
from planish.ir.graph import Node, Value
from planish.ir.ops.align import attribute
from planish.ir.ops.base import MIXING, Act, Axes, Block, Carry, Link, OneOf, Port, Relation
from planish.ir.types import UNKNOWN, Dim, Shape, TensorType, Type


def integer(node: Node, name: str) -> int:
    value = attribute(node, name)
    assert isinstance(value, int)
    return int(value)


def number(node: Node, name: str) -> float:
    value = attribute(node, name)
    assert isinstance(value, (int, float))
    return float(value)


def flag(node: Node, name: str) -> bool:
    return bool(attribute(node, name))


def integers(node: Node, name: str) -> tuple[int, ...]:
    """A tuple of ints; () if the attribute is absent."""
    value = attribute(node, name)
    if value is None:
        return ()
    assert isinstance(value, tuple)
    return tuple(int(v) for v in value)


def tensor_type(value: Value | None) -> TensorType | None:
    """The type of a value if it is a tensor."""
    return value.type if value is not None and isinstance(value.type, TensorType) else None


def like(value: Value | None, shape: Shape) -> Type:
    """A tensor type of the dtype of `value` with this shape; UNKNOWN if that is no tensor."""
    own = tensor_type(value)
    return UNKNOWN if own is None else TensorType(own.dtype, shape)


def broadcast_dim(one: Dim, two: Dim) -> Dim:
    """The dim of two broadcast dims; None where that cannot be told."""
    try:
        return shapes.broadcast_dims(one, two)
    except ValueError:
        return None


def broadcast_dims(one: tuple[Dim, ...], two: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Broadcast from the right."""
    rank = max(len(one), len(two))
    left: tuple[Dim, ...] = (1,) * (rank - len(one)) + one
    right: tuple[Dim, ...] = (1,) * (rank - len(two)) + two
    return tuple(broadcast_dim(a, b) for a, b in zip(left, right, strict=True))


@dataclass(frozen=True, slots=True)
class Site:
    """A port and the labels of its axes.

    Attributes:
        port: the port.
        labels: one for each axis (of the grown shape or the view, where those are set).
        dims: the dims of these axes.
        grow, view, neutral, offset: for the links to this port; see `Link`.
    """

    port: Port
    labels: tuple[str, ...]
    dims: tuple[Dim, ...]
    grow: tuple[int, ...] | None = None
    view: tuple[int, ...] | None = None
    neutral: float | None = None
    offset: float = 0.0

    def dim(self, label: str) -> Dim:
        """The dim of a label, 1 if the port does not have it."""
        return self.dims[self.labels.index(label)] if label in self.labels else 1

    def spans(self, label: str) -> bool:
        """True if the port is not broadcast along the label, as far as one can tell."""
        return self.dim(label) != 1


DYNAMIC = Block("one of its operands has a dynamic dim there")


def link_between(
    asker: Site, axes: Axes, other: Site, variance: int = 1, grouped: frozenset[str] = frozenset()
) -> Link | Block | None:
    """The link from `axes` of the asker to the same labels of another port.

    Labels that the asker spans and the other port does not are tied; so are atoms of `grouped` labels,
    of which one port may have a whole multiple of the other's (query heads that share a key head).
    None: the other port spans none of the axes.
    """
    sizes = {asker.labels[a]: asker.dims[a] for a in axes}
    wide = {label for label, n in sizes.items() if n != 1}
    shared = []
    for label, n in sizes.items():
        m = other.dim(label)
        if label not in other.labels or (m == 1 and n != 1):
            continue
        if n == 1 and wide:
            continue
        if not isinstance(n, int) or not isinstance(m, int):
            return DYNAMIC
        if n not in (1, m) and (label not in grouped or (n % m and m % n)):
            return DYNAMIC
        shared.append(label)
    if not shared:
        return None
    shared.sort(key=other.labels.index)
    target = tuple(other.labels.index(label) for label in shared)
    link = Link(other.port, target, variance, None, other.grow, other.view, other.neutral, other.offset)
    own = [label for label, n in sizes.items() if n != 1 or label in shared]
    mine, theirs = [int(sizes[k] or 0) for k in own], [int(other.dims[a] or 0) for a in target]
    if own == shared and mine == theirs:
        return link
    grid_dims = [max(n, int(other.dim(k) or 0)) if k in shared else n for k, n in zip(own, mine, strict=True)]
    grid = np.indices(grid_dims).reshape(len(own), -1)
    full = [int(sizes[k] or 0) for k in sizes]
    place = {k: grid[i] * n // d for i, (k, n, d) in enumerate(zip(own, mine, grid_dims, strict=True))}
    zero = np.zeros(grid.shape[1], np.int64)
    mine_at = np.ravel_multi_index([place.get(k, zero) for k in sizes], full)
    at = [own.index(k) for k in shared]
    theirs_at = np.ravel_multi_index([grid[i] * m // grid_dims[i] for i, m in zip(at, theirs, strict=True)], theirs)
    return replace(link, pairs=(mine_at, theirs_at))


def pairs_to(asker: Site, axes: Axes, others: Iterable[Site], variance: int = 1) -> Carry | Block:
    """Links to several ports; a port that spans none of the axes is left out."""
    links = []
    for other in others:
        link = link_between(asker, axes, other, variance)
        if isinstance(link, Block):
            return link
        if link is not None:
            links.append(link)
    return Carry(tuple(links))


def contract(act: Act, sites: Mapping[Port, Site], port: Port, axes: Axes) -> Relation:
    """What a contraction of operands 0 and 1 to result 0 does with a linear act (not SHIFT)."""
    asker = sites[port]
    others = [site for p, site in sites.items() if p != port]
    live = tuple(a for a in axes if asker.dims[a] != 1) or axes
    having = {}
    for axis in live:
        label = asker.labels[axis]
        narrow = asker.dims[axis] == 1
        having[axis] = [s for s in others if (label in s.labels if narrow else s.spans(label))]
    partners = [h for h in having.values() if len(h) == 1]
    if not partners and not any(having.values()):
        return Block("no other operand has these axes")
    if not partners:
        return _batch(act, asker, live, others)
    partner = partners[-1][0]
    variance = -1 if port >= 0 and partner.port >= 0 else 1
    link = link_between(asker, axes, partner, variance)
    if isinstance(link, Block):
        return link
    assert link is not None
    third = next(s for s in others if s is not partner)
    walls: Axes = ()
    if act in MIXING:  # tied labels, and those along which the other factor varies
        walls = tuple(a for a in live if third.spans(asker.labels[a]) or partner not in having[a])
    return Carry((link,), walls)


def _batch(act: Act, asker: Site, axes: Axes, others: list[Site]) -> Relation:
    """Only labels that all three ports have."""
    if act in (Act.ROTATE, Act.LINEAR) and any(asker.dims[a] != 1 for a in axes):
        return Block("it mixes the batch, over which each element has its own factors")
    if act is Act.PERMUTE:
        carry = pairs_to(asker, axes, others)
        if isinstance(carry, Carry) and any(link.pairs is not None for link in carry.links):
            return Block("an operand is broadcast over some of the axes")
        return carry
    options = []
    for other in sorted(others, key=lambda s: s.port >= 0):
        link = link_between(asker, axes, other, -1 if asker.port >= 0 and other.port >= 0 else 1)
        if isinstance(link, Link):
            options.append(Carry((link,)))
    if not options:
        return DYNAMIC
    return OneOf(tuple(options), "its other factor took the transform")


def with_addend(relation: Relation, act: Act, asker: Site, axes: Axes, addend: Site, absent: bool) -> Relation:
    """A relation that reaches the result (or asks from it), for a result to which `addend` is added."""
    if not isinstance(relation, Carry) or absent:
        return relation
    link = link_between(asker, axes, addend)
    if isinstance(link, Block):
        return link
    if link is None:
        if act is Act.PERMUTE:
            return relation
        return Block("the bias, which has no such axis, would have to carry it too")
    return replace(relation, links=(*relation.links, link))


def permute_all(sites: Mapping[Port, Site], asker: Site, axes: Axes) -> Relation:
    """Every other port that has the labels changes places as the asker does; it must have all of them, or none."""
    links = []
    for site in sites.values():
        if site.port == asker.port:
            continue
        link = link_between(asker, axes, site)
        if isinstance(link, Block):
            return link
        if link is not None and link.pairs is not None:
            return Block("an operand has only some of these axes")
        if link is not None:
            links.append(link)
    return Carry(tuple(links))
