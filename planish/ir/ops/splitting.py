"""Splitting channels: what a row says of SPLIT follows from what it says of PERMUTE.

Let R [n', n] repeat channel j T_j times, one copy beside the other. A split gives a tensor R x instead of x. An op
that takes channels one by one cannot tell R from a permutation:

    f(R x) = R f(x)

and what contracts the axis carries the dual of R, the transpose of its pseudo-inverse D = R diag(1/T):

    sum_k (R x)_k (D w)_k = sum_j T_j x_j w_j / T_j = sum_j x_j w_j

So a constant that reads the axis has its columns repeated and divided by T_j (`Link.variance` -1). That holds of
every row whose answer for PERMUTE holds of any choice of channels (`OpDef.repeats` says where), if a transform on one
axis is asked for. Ops that count channels or name their places (reductions and norms over the axis, softmax,
reshapes, slices, heads, groups) block it.

The division by T_j that makes a split channel small, x_j / T_j (QLLM, arXiv 2310.08041), is a scale of the split
channels, and SCALE says where that may go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from planish.ir.graph import Node
from planish.ir.ops.base import Act, Axes, Block, Carry, Link, OpDef, Port, Relation
from planish.ir.types import WIDE_FLOATS

Relate = Callable[[Node, Act, Port, Axes], Relation]
JOINT = Block("channels on joint axes cannot be split")
SINGLE = Block("an axis of size 1 may be broadcast")
PLACES = Block("it gives its channels other places")


def with_splits(row: OpDef) -> OpDef:
    """The row, with an answer for SPLIT."""
    inner: Relate = row.relate

    def relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
        if act is not Act.SPLIT:
            return inner(node, act, port, axes)
        return _split(row, inner, node, port, axes)

    return replace(row, relate=relate)


def _split(row: OpDef, relate: Relate, node: Node, port: Port, axes: Axes) -> Relation:
    if row.repeats is None:
        return Block(f"{row.name} counts its channels or names their places")
    value = node.port(port)
    if len(axes) != 1 or value is None or value.shape is None:
        return JOINT
    if value.shape[axes[0]] == 1:
        return SINGLE
    refused = row.repeats(node, port, axes)
    if refused is not None:
        return Block(refused)
    relation = relate(node, Act.PERMUTE, port, axes)
    if not isinstance(relation, Carry):
        return relation if isinstance(relation, Block) else PLACES
    if relation.block_axes:
        return PLACES
    links = []
    for link in relation.links:
        kept = _link(node, value.is_constant, link)
        if isinstance(kept, Block):
            return kept
        if kept is not None:
            links.append(kept)
    return Carry(tuple(links)) if links else Block("nothing else would have the new size")


def _link(node: Node, from_constant: bool, link: Link) -> Link | Block | None:
    """The link as a split carries it; None: what is broadcast along the axis stays as it is."""
    other = node.port(link.port)
    if link.grow is not None or other is None:
        return None if link.variance > 0 else PLACES
    if len(link.axes) != 1:
        return JOINT
    if link.view is not None or (link.pairs is not None and not all(_ascends(side) for side in link.pairs)):
        return PLACES
    if link.variance < 0:
        if not other.is_constant and not from_constant:
            return Block("what it is multiplied with is no constant that could take the division up")
        if other.dtype not in WIDE_FLOATS:
            return Block(f"{other.dtype} values cannot be divided")
    return link


def _ascends(atoms: np.ndarray) -> bool:
    """True if each atom stands once, in the order of the axis."""
    return bool((np.diff(atoms) > 0).all())
