"""Applying a transform to a channel space: the one mechanism behind every channel pass.

Every constant of the space is replaced by its transformed self, computed in float64 from the
unrounded data; every fold site computes its new constants by the formula of its row. An admitted
space needs nothing else: the graph has the same nodes afterwards. Where ops block the space, an
explicit op on each blocked edge (`insert=True`) undoes the transform just there.
"""

from __future__ import annotations

import math

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.ops.base import Act, Axes
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import Blocker, FoldSite, Member, Space
from planish.ir.transform import Mix, Permute, Scale, Shift, Split, Transform, Unsplit, apply
from planish.ir.types import TensorType


def absorb(rewriter: Rewriter, space: Space, transform: Transform, *, insert: bool = False) -> int:
    """Give the tensors of a space the transform, so that the graph computes the same function.

    Args:
        rewriter: of the space's graph. The graph must not have changed where the space lies since it was analysed.
        space: from `planish.ir.spaces`.
        transform: of the space's act, on `space.size` channels; block diagonal where the space demands it.
        insert: put an explicit op on each blocked edge instead of declining.

    Returns:
        The number of ops inserted.

    Raises:
        Declined: the space is blocked (and `insert` is False, or an edge cannot take an op), or the transform
            does not fit the group of the space.
    """
    _check(space, transform)
    if space.blockers and not insert:
        raise Declined(space.blockers[0].reason, space.blockers[0].node)
    # readers first: an op behind a blocked producer then stands before theirs
    edges = sorted(dict.fromkeys(map(_Edge, space.blockers)), key=lambda edge: not edge.into)
    _check_edges(edges, space)
    if isinstance(transform, Split):
        _check_split(space)
    for site in space.maximal_folds:
        if not isinstance(transform, Shift) or site.node.op.fold is None:
            raise Declined(f"{site.node.op.name} has no formula for this transform", site.node)
    done: dict[Value, set[int]] = {}
    for member in space.maximal_constants:
        _transform_constant(rewriter, member, transform, done)
    for site in space.maximal_folds:
        _fold(rewriter, site, transform)
    if isinstance(transform, Split):
        fixed = {edge.blocker.value for edge in edges if not edge.into}
        _retype(rewriter, [m for m in space.activations if m.value not in fixed], transform)
    for edge in edges:
        edge.insert(rewriter, transform)
    return len(edges)


def _check_split(space: Space) -> None:
    """Raise `Declined` unless each tensor is as large as when the space was found."""
    for member in (*space.activations, *space.constants):
        value = member.current
        if value is None or member.private or len(member.axes) != 1 or (member.variance < 0 and not member.is_constant):
            raise Declined("the space has a tensor that cannot be split", member.node or member.value)
        assert value.shape is not None
        if value.shape[member.axes[0]] != (space.size if member.atoms is None else len(member.atoms)):
            raise Declined("another split has changed a tensor of the space: analyse again", value)


def _retype(rewriter: Rewriter, members: list[Member], transform: Split) -> None:
    """Give activations their new sizes."""
    for member in members:
        value = member.value
        assert value is not None and isinstance(value.type, TensorType) and value.type.shape is not None
        (axis,) = member.axes
        shape = list(value.type.shape)
        count = shape[axis]
        assert isinstance(count, int)
        shape[axis] = int(transform.copies(member.atoms, count).sum())
        rewriter.retype(value, TensorType(value.type.dtype, tuple(shape)))


def _check_edges(edges: list[_Edge], space: Space) -> None:
    """Raise `Declined` unless an explicit op may stand on each edge, and nothing else at its node takes part."""
    if not edges:
        return
    nested, inside = space.nested, {m.value for m in space.activations}
    blocked: dict[Node | None, set[Value]] = {}
    for blocker in space.blockers:
        blocked.setdefault(blocker.node, set()).add(blocker.value)
    for edge in edges:
        edge.check(space.act)
        node = edge.blocker.node
        if edge.blocker.value in nested:
            raise Declined("an explicit op on nested axes of one tensor is not supported", node)
        if node is not None and any(
            v is not None and v in inside and v not in blocked[node] for v in (*node.operands, *node.results)
        ):
            raise Declined("another operand or result of the op carries the transform", node)


def _check(space: Space, transform: Transform) -> None:
    if transform.act is not space.act and not (space.act is Act.LINEAR and isinstance(transform, Mix)):
        raise Declined(f"a {transform.act.value} is not a {space.act.value}")
    if space.act is Act.SPLIT and not space.admitted and not all(b.variance > 0 for b in space.blockers):
        raise Declined("no explicit op divides split channels", space.blockers[0].node)
    if transform.size != space.size:
        raise Declined(f"the transform has {transform.size} channels, the space {space.size}")
    match transform:
        case Scale(values) | Shift(values):
            if not np.isfinite(values).all():
                raise Declined("the transform is not finite")
            if isinstance(transform, Scale):
                if (values == 0).any():
                    raise Declined("a scale is zero")
                if space.positive and (values < 0).any():
                    raise Declined("a scale is negative and the space admits positive ones only")
        case Permute(order):
            if not (np.sort(order) == np.arange(space.size)).all():
                raise Declined("not a permutation")
            if space.labels is not None and not (space.labels[order] == space.labels).all():
                raise Declined("the permutation leaves its blocks")
        case Split(counts):
            if (counts < 1).any():
                raise Declined("a channel would be dropped")
        case Mix():
            for index, matrix in transform.blocks:
                if not np.isfinite(matrix).all():
                    raise Declined("the transform is not finite")
                if space.labels is not None and len(set(space.labels[index].tolist())) > 1:
                    raise Declined("the transform leaves its blocks")


def transformed(member: Member, transform: Transform) -> np.ndarray:
    """The data of a constant member after the transform, float64 (under a permutation in the dtype it is held in)."""
    value = member.current
    if value is None:
        assert member.grow is not None and member.neutral is not None
        return _applied(member, np.full(member.grow, member.neutral), transform)
    assert value.constant is not None
    data = _held(value.constant, transform)
    if member.grow is not None:
        data = np.broadcast_to(data, np.broadcast_shapes(data.shape, member.grow))
    return _applied(member, data, transform)


def _applied(member: Member, data: np.ndarray, transform: Transform) -> np.ndarray:
    """The transform on an array of the member's shape, or on one that was grown from it to the left."""
    if isinstance(transform, Split):
        return apply(data, member.axes, transform, member.atoms, member.variance)
    shape = data.shape
    data, axes = member.seen(data)
    if isinstance(transform, Permute):
        return apply(data, axes, transform, member.atoms, member.variance).reshape(shape)
    data = apply(data + member.offset, axes, transform, member.atoms, member.variance) - member.offset
    return data.reshape(shape)


def _transform_constant(rewriter: Rewriter, member: Member, transform: Transform, done: dict[Value, set[int]]) -> None:
    """Transform one member.

    `done` holds the private constants that this space has transformed, with the axes, counted from the right: what
    a shared constant carries on others of its axes they carry as well.
    """
    if member.private:
        assert member.node is not None
        data = transformed(member, transform)
        axes = {a - len(member.grow or data.shape) for a in member.axes}
        done.setdefault(_give(rewriter, member.node, member.port, data), set()).update(axes)
        return
    assert member.value is not None and member.value.rank is not None
    rank = len(member.view) if member.view is not None else member.value.rank
    heirs = [member.value]
    for value in heirs:  # and the copies that another space of the same analysis made private
        heirs += rewriter.heirs.get(value, ())
        if done.get(value, set()) & {a - rank for a in member.axes}:
            continue
        assert value.constant is not None
        data = _applied(member, _held(value.constant, transform), transform)
        rewriter.set_constant(value, Constant(data, value.constant.dtype, data.shape), readers="all")


def _held(constant: Constant, transform: Transform) -> np.ndarray:
    """The data to transform: float64, or as it is where numbers only change places."""
    if isinstance(transform, Permute) and not constant.is_wide:
        return constant.array()
    return constant.wide()


def _give(rewriter: Rewriter, node: Node, port: int, data: np.ndarray) -> Value:
    """Make operand `port` of a node a constant of its own with this data.

    A constant keeps its shape: what is grown is a new one, since members name axes of the old.
    """
    old = node.operand(port)
    dtype = old.dtype if old is not None else node.result.dtype
    assert dtype is not None
    constant = Constant(np.array(data), dtype, data.shape)
    if old is not None and old.is_constant and len(old.users) == 1 and old.shape == constant.shape:
        if not any(v is old for v in rewriter.graph.output_values()):
            rewriter.set_constant(old, constant)
            return old
    made = rewriter.constant(
        constant, old.name if old is not None else f"{node.result.name}.{node.op.params[port].name}"
    )
    rewriter.set_operand(node, port, made)
    if old is not None:
        rewriter.heirs.setdefault(old, []).append(made)
    return made


def _spread(transform: Shift, atoms: np.ndarray | None, count: int, variance: int) -> np.ndarray:
    index = np.arange(count) if atoms is None else atoms
    return np.where(index >= 0, variance * transform.offsets[index], 0.0)


def _fold(rewriter: Rewriter, site: FoldSite, transform: Transform) -> None:
    value = site.node.port(site.port)
    assert isinstance(transform, Shift) and site.node.op.fold is not None
    assert value is not None and value.shape is not None
    dims = [int(value.shape[a]) for a in site.axes]  # type: ignore[arg-type]
    offsets = _spread(transform, site.atoms, math.prod(dims), site.variance).reshape(dims)
    for port, data in site.node.op.fold(site.node, transform.act, site.port, site.axes, offsets).items():
        _give(rewriter, site.node, port, np.asarray(data, np.float64))


class _Edge:
    """An edge that cannot carry the transform: into a node's operand, out of a node's result, or at the border."""

    def __init__(self, blocker: Blocker) -> None:
        self.blocker = blocker
        self.identity: tuple[int, int, int, Axes, int, str] = (
            id(blocker.node),
            blocker.port,
            id(blocker.value),
            blocker.axes,
            blocker.variance,
            blocker.reason if blocker.node is None else "",
        )

    def __hash__(self) -> int:
        return hash(self.identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Edge) and self.identity == other.identity

    @property
    def into(self) -> bool:
        """True where a reader is blocked: it must see the value as it was."""
        if self.blocker.node is not None:
            return self.blocker.port >= 0
        return self.blocker.reason == "graph output"

    def check(self, act: Act) -> None:
        blocker = self.blocker
        if blocker.value.is_constant or (
            blocker.node is None and blocker.reason not in ("graph input", "graph output")
        ):
            raise Declined(f"no explicit op can lift it: {blocker.reason}", blocker.node)
        if act not in (Act.SCALE, Act.SHIFT) and len(blocker.axes) > 1:
            raise Declined("an explicit op on joint axes is not supported", blocker.node)
        if act in (Act.ROTATE, Act.LINEAR) and blocker.axes[0] != (blocker.value.rank or 0) - 1:
            raise Declined("an explicit rotation needs the last axis", blocker.node)
        if blocker.value.dtype not in ("f32", "f16", "bf16", "f64"):
            raise Declined("an explicit op needs a float tensor", blocker.node)

    def insert(self, rewriter: Rewriter, transform: Transform) -> None:
        blocker, value = self.blocker, self.blocker.value
        if self.into:
            undone = transform.inverse()
            node = blocker.node
            if node is not None:
                value = node.operands[blocker.port] or value  # behind an op that another space needed here
            else:
                value = rewriter.heirs.get(value, [value])[-1]
            out = _explicit(rewriter, value, blocker.axes, undone, blocker.atoms, blocker.variance, before=node)
            if node is not None:
                rewriter.set_operand(node, blocker.port, out)
            else:
                rewriter.graph.outputs = [(n, out if v is value else v) for n, v in rewriter.graph.outputs]
                rewriter.heirs.setdefault(blocker.value, []).append(out)
            return
        readers = list(value.users)
        first = value.producer._next if value.producer is not None else rewriter.graph._first
        out = _explicit(rewriter, value, blocker.axes, transform, blocker.atoms, blocker.variance, before=first)
        rewriter.replace(value, out, users=[r for r in readers if r is not out.producer])
        rewriter.behind[value] = out
        rewriter.graph.outputs = [(n, out if v is value else v) for n, v in rewriter.graph.outputs]


def _explicit(
    rewriter: Rewriter,
    value: Value,
    axes: Axes,
    transform: Transform | Unsplit,
    atoms: np.ndarray | None,
    variance: int,
    *,
    before: Node | None,
) -> Value:
    """`value` under the transform, by an explicit op."""
    assert value.shape is not None and value.rank is not None and value.dtype is not None
    dims = [int(value.shape[a]) for a in axes]  # type: ignore[arg-type]
    count = math.prod(dims)
    hint = f"{value.name}.{transform.act.value}"

    def constant(data: np.ndarray, dtype: str) -> Value:
        return rewriter.constant(Constant(data, dtype, data.shape), f"{hint}.by")

    match transform:
        case Scale() | Shift():
            neutral = np.ones(count) if isinstance(transform, Scale) else np.zeros(count)
            data = apply(neutral, (0,), transform, atoms, variance)
            shape = [1] * value.rank
            for axis, dim in zip(axes, dims, strict=True):
                shape[axis] = dim
            data = data.reshape(shape[axes[0] :])
            op = "mul" if isinstance(transform, Scale) else "add"
            node = rewriter.insert(op, [value, constant(data, value.dtype)], before=before, names=[hint])
        case Split() | Unsplit():
            size = transform.size if atoms is None else len(atoms)
            full = Split(transform.counts).copies(atoms, size)
            kept = np.repeat(np.arange(size), full) if isinstance(transform, Split) else np.cumsum(full) - full
            node = rewriter.insert(
                "gather", [value, constant(kept, "i64")], {"axis": axes[0]}, before=before, names=[hint]
            )
        case Permute():
            order = apply(np.arange(count), (0,), transform, atoms, variance).astype(np.int64)
            node = rewriter.insert(
                "gather", [value, constant(order, "i64")], {"axis": axes[0]}, before=before, names=[hint]
            )
        case Mix():
            matrix = apply(np.eye(count), (1,), transform, atoms, variance)  # row vector times matrix
            node = rewriter.insert("matmul", [value, constant(matrix, value.dtype)], before=before, names=[hint])
    return node.result
