"""Following the axes of a value back through views: what a product of broadcast tensors is made of.

A *label* stands on each axis of a value: a name (whatever the caller calls the axis), a position where one
element of the axis is taken, or None where the axis has size 1 and says nothing. `follow` walks from a value
to the tensor that it is a view of, and says which label each axis of that tensor has:

    unsqueeze(a[:, t], 1) [b, 1, n]  with (b, None, n)   is   a [b, T, n]  with (b, t, n)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.rewriter import Rewriter
from planish.ir.shapes import static_ints
from planish.ir.types import WIDE_FLOATS, Dim
from planish.passes.match import attribute

Label = str | int | None
Labels = tuple[Label, ...]


@dataclass(frozen=True)
class Seen:
    """A tensor and the labels of its axes."""

    value: Value
    labels: Labels

    def has(self, *labels: Label) -> bool:
        """True if exactly these labels stand on its axes, axes of size 1 left aside where they are too many."""
        return self.axes(*labels) is not None

    def axes(self, *labels: Label) -> tuple[int, ...] | None:
        """The axis of each of the labels; None if an axis has another label and is wider than 1."""
        shape = self.value.shape
        if shape is None or any(self.labels.count(label) != 1 for label in labels):
            return None
        if any(label not in labels and dim != 1 for label, dim in zip(self.labels, shape, strict=True)):
            return None
        return tuple(self.labels.index(label) for label in labels)

    def dim(self, label: Label) -> Dim:
        """The size of the axis with a label."""
        assert self.value.shape is not None
        return self.value.shape[self.labels.index(label)]


def broadcast(operand: Value, result: Value, labels: Labels) -> Labels | None:
    """The labels of an operand that is broadcast to a result with these labels; None if a rank is unknown."""
    if operand.shape is None or result.shape is None or len(operand.shape) > len(result.shape):
        return None
    skip = len(result.shape) - len(operand.shape)
    pairs = zip(operand.shape, result.shape[skip:], labels[skip:], strict=True)
    return tuple(None if own == 1 != dim else label for own, dim, label in pairs)


def factors(seen: Seen, op: str) -> tuple[Seen, Seen] | None:
    """The operands of a node of this (binary, broadcasting) op that makes the value, as far back as views go."""
    node = seen.value.producer
    if node is None or node.op.name != op:
        return None
    made = []
    for operand in node.operands[:2]:
        labels = None if operand is None else broadcast(operand, seen.value, seen.labels)
        if operand is None or labels is None:
            return None
        made.append(follow(Seen(operand, labels)))
    return made[0], made[1]


def follow(seen: Seen) -> Seen:
    """The tensor that a value is a view of: through casts between floats and views, one position taken at most."""
    while (node := seen.value.producer) is not None:
        step = _step(node, seen)
        if step is None:
            break
        seen = step
    return seen


def _step(node: Node, seen: Seen) -> Seen | None:
    source, labels = node.operand(0), list(seen.labels)
    if source is None or source.shape is None:
        return None
    rank = len(source.shape)
    match node.op.name:
        case "identity" | "cast":
            if not {source.dtype, seen.value.dtype} <= WIDE_FLOATS:
                return None
        case "transpose":
            perm = attribute(node, "perm") or tuple(reversed(range(rank)))
            labels = [seen.labels[list(perm).index(axis)] for axis in range(rank)]
        case "unsqueeze":
            gone = {a % len(labels) for a in attribute(node, "axes")}
            labels = [label for axis, label in enumerate(labels) if axis not in gone]
        case "squeeze":
            axes = attribute(node, "axes")
            if not axes:
                return None
            for axis in sorted(a % rank for a in axes):
                labels.insert(axis, None)
        case "gather" | "slice" | "split":
            taken = _taken(node, seen)
            if taken is None:
                return None
            labels = taken
        case _:
            return None
    return Seen(source, tuple(labels))


def _taken(node: Node, seen: Seen) -> list[Label] | None:
    """The labels of a tensor of which one position along an axis was taken."""
    source, labels = node.operand(0), list(seen.labels)
    assert source is not None and source.shape is not None
    found = _position(node, seen.value, source.shape)
    if found is None:
        return None
    axis, position, kept = found
    dim = source.shape[axis]
    if not isinstance(dim, int) or not -dim <= position < dim:
        return None
    label: Label = None if dim == 1 else position % dim
    if label is not None and any(isinstance(other, int) for other in labels):
        return None
    if not kept:
        labels.insert(axis, label)
    elif dim > 1:
        labels[axis] = label
    return labels


def _position(node: Node, value: Value, shape: Sequence[Dim]) -> tuple[int, int, bool] | None:
    """(axis, position, the axis is kept with size 1) of a node that takes one position; None for any other."""
    rank = len(shape)
    if node.op.name == "gather":
        index = node.operand(1)
        positions = static_ints(index)
        if index is None or index.shape != () or positions is None:
            return None
        return attribute(node, "axis") % rank, positions[0], False
    if node.op.name == "split":
        axis = attribute(node, "axis") % rank
        return (axis, node.results.index(value), True) if set(attribute(node, "sizes")) == {1} else None
    starts, axes = static_ints(node.operand(1)), static_ints(node.operand(3))
    if starts is None or len(starts) != 1 or (axes is None and node.operand(3) is not None):
        return None
    axis = (axes[0] if axes else 0) % rank
    if value.shape is None or value.shape[axis] != 1:
        return None
    return axis, starts[0], True


def arranged(
    rewriter: Rewriter, seen: Seen, labels: Sequence[Label], before: Node, nearby: Collection[Node] = ()
) -> Value:
    """The tensor with its axes in the order of the labels (see `Seen.axes`), before a node.

    A transpose among the nodes `nearby`, which stand before that node, is used again; a constant is made anew.
    """
    axes, value = seen.axes(*labels), seen.value
    assert axes is not None and value.shape is not None
    extra = tuple(a for a in range(len(value.shape)) if a not in axes)
    perm = tuple(sum(other not in extra for other in range(axis)) for axis in axes)
    constant = value.constant if value.is_constant else None
    if constant is not None and (extra or perm != tuple(range(len(perm)))):
        shape = [constant.shape[axis] for axis in axes]
        data = constant.wide().transpose((*axes, *extra)).reshape(shape)
        return rewriter.constant(Constant(data, constant.dtype, data.shape), value.name)
    if extra:
        value = rewriter.insert("squeeze", [value], {"axes": extra}, before=before).result
    if perm == tuple(range(len(perm))):
        return value
    for reader in value.users:
        if reader in nearby and reader.op.name == "transpose" and tuple(attribute(reader, "perm") or ()) == perm:
            return reader.result
    return rewriter.insert("transpose", [value], {"perm": perm}, before=before).result
