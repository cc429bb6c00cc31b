"""What the channel spaces of a graph are, as data: the table behind `planish inspect`.

One row per set of activations that must carry the same transform, whatever the act: the group of
transforms it admits, the constants that absorb them, and for everything it does not admit the op
that blocks it and the explicit op that would lift the blocker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from planish.ir.graph import Graph, Node, Value
from planish.ir.ops.base import ACTS, MIXING, Act, Axes
from planish.ir.spaces import Blocker, ChannelSpaces, Space, analyse
from planish.ir.types import WIDE_FLOATS
from planish.passes.base import place
from planish.report.freedoms import Freedom, freedoms
from planish.report.labels import label

LIFTS = {
    Act.PERMUTE: "Gather",
    Act.SCALE: "Mul",
    Act.SHIFT: "Add",
    Act.ROTATE: "MatMul/Hadamard",
    Act.LINEAR: "MatMul",
    Act.SPLIT: "Gather",
}
LINEARS = frozenset({"linear", "gemm", "conv", "conv_transpose", "matmul"})
ABSORBERS = (
    Act.LINEAR,
    Act.ROTATE,
    Act.SCALE,
    Act.PERMUTE,
    Act.SPLIT,
    Act.SHIFT,
)  # whose writers and readers are shown
_BORDERS = ("graph input", "graph output")


@dataclass(frozen=True)
class Obstacle:
    """Why a space does not admit an act, at one place.

    Attributes:
        act: the act.
        op: the op that blocks it, or "graph input", "graph output", "graph".
        reason: why.
        where: the node, or the value at the border.
        tensor: the value on the blocked edge.
        lift: the explicit op on that edge that would lift it; None: none can.
    """

    act: str
    op: str
    reason: str
    where: str
    tensor: str
    lift: str | None

    def __str__(self) -> str:
        return self.where if self.op == self.reason else f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class SpaceRow:
    """A set of activations that must carry the same transform.

    Attributes:
        id: numbered from 1 in the order of the graph.
        tensors: the names of the activations, in the order of the graph.
        first, last: where they are made.
        size: the number of channels.
        structure: "384", or "12 x 32" where transforms stay within blocks or heads.
        group: the name of the group of transforms that cost nothing.
        acts: whether each act is admitted; an act is absent where another set of tensors must carry it.
        writers: constants that write the space and absorb the transform (of the largest group that is free).
        readers: constants that read it and absorb the inverse.
        folds: nodes that take a shift up by a formula.
        blockers: by act.
        repeats: how many rows of the graph are like this one (1 where rows are not grouped).
    """

    id: int
    tensors: tuple[str, ...]
    first: str
    last: str
    size: int
    structure: str
    group: str
    acts: dict[str, bool]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    folds: tuple[str, ...]
    blockers: dict[str, tuple[Obstacle, ...]]
    repeats: int = 1

    @property
    def admitted(self) -> tuple[str, ...]:
        """The acts that cost nothing."""
        return tuple(act for act, free in self.acts.items() if free)


@dataclass(frozen=True)
class ActCount:
    """How many spaces an act has, how many of them admit it, and the channels in those."""

    spaces: int
    admitted: int
    channels: int


@dataclass(frozen=True)
class Inspection:
    """The channel spaces of a graph.

    Attributes:
        graph: its name.
        nodes: the number of nodes.
        opaque: of these, nodes of which nothing is known, by op.
        rows: the spaces in the order of the graph.
        by_act: counts of spaces.
        by_group: the number of rows for each group.
        linears: linears, convolutions and products with a constant weight.
        linears_with: of these, those whose input admits the act (scale, rotate, ...).
        obstacles: how often each (act, op, reason) blocks, most frequent first.
        lifts: act -> the number of explicit ops that would lift all of its blockers that can be lifted.
        freedoms: for each act what passes could still use, with examples.
    """

    graph: str
    nodes: int
    opaque: dict[str, int]
    rows: tuple[SpaceRow, ...]
    by_act: dict[str, ActCount]
    by_group: dict[str, int]
    linears: int
    linears_with: dict[str, int]
    obstacles: tuple[tuple[str, str, str, int], ...]
    lifts: dict[str, int] = field(default_factory=dict)
    freedoms: tuple[Freedom, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def grouped(self) -> list[SpaceRow]:
        """The rows; those that differ in names only (one a layer) are merged into the first of them."""
        groups: dict[Any, list[SpaceRow]] = {}
        for row in self.rows:
            groups.setdefault(_likeness(row), []).append(row)
        return [_merged(rows) for rows in groups.values()]


def _merged(rows: Sequence[SpaceRow]) -> SpaceRow:
    return replace(rows[0], repeats=len(rows))


def _likeness(row: SpaceRow) -> Any:
    """Equal for rows that differ in names only."""
    blockers = tuple(
        sorted((act, o.op, o.reason, n) for act, found in row.blockers.items() for o, n in _counted(found))
    )
    absorbers = (len(row.writers), len(row.readers), len(row.folds))
    ends = row.first.partition(" ")[0], row.last.partition(" ")[0]
    acts = tuple(row.acts.items())
    return ends, row.size, row.structure, row.group, acts, absorbers, len(row.tensors), blockers


def _counted(obstacles: Iterable[Obstacle]) -> list[tuple[Obstacle, int]]:
    first: dict[tuple[str, str], Obstacle] = {}
    count: Counter[tuple[str, str]] = Counter()
    for o in obstacles:
        first.setdefault((o.op, o.reason), o)
        count[o.op, o.reason] += 1
    return [(first[k], n) for k, n in count.items()]


def inspect(
    graph: Graph,
    *,
    spaces: ChannelSpaces | None = None,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, label: items,
) -> Inspection:
    """Find the channel spaces of a graph, the group each admits, its absorbers and its blockers.

    Args:
        graph: usually after the passes of the `raise` group, which make linears, norms and attention visible.
        spaces: an analysis of this graph that is already there.
        progress: wraps the loop over the acts in a progress bar.
    """
    found = spaces or analyse(graph)
    order = _order(graph)
    sets: dict[Any, dict[Act, Space]] = {}
    by_act: dict[str, ActCount] = {}
    for act in progress(ACTS, "channel spaces"):
        counts: Counter[Any] = Counter()
        of_act = _of(found, act)
        for space in of_act:
            key = (space.key(), space.size)
            sets.setdefault((*key, counts[key]), {})[act] = space
            counts[key] += 1
        free = [s for s in of_act if s.admitted]
        by_act[act.value] = ActCount(len(of_act), len(free), sum(s.size for s in free))
    rows = [_row(acts, order) for acts in sets.values()]
    # what only a split tells apart comes last: it is no group of transforms
    rows.sort(key=lambda r: ([*r.acts] == [Act.SPLIT.value], order[r.tensors[0]], -len(r.tensors), r.tensors))
    numbered = tuple(_number(row, i + 1) for i, row in enumerate(rows))
    linears, linears_with = _linears(graph, found)
    return Inspection(
        graph.name,
        len(graph),
        dict(Counter(n.op.name for n in graph.nodes if n.op.opaque).most_common()),
        numbered,
        by_act,
        dict(Counter(r.group for r in numbered).most_common()),
        linears,
        linears_with,
        _obstacle_counts(numbered),
        _lift_counts(numbered),
        freedoms(graph, spaces=found),
    )


def _of(spaces: ChannelSpaces, act: Act) -> list[Space]:
    """The spaces of an act; what blocks a rotation blocks every larger linear map, which nobody searched then."""
    found = spaces.of(act)
    if act is not Act.LINEAR:
        return found
    known = {s.key() for s in found}
    blocked = [s for s in spaces.of(Act.ROTATE) if s.blockers and s.key() not in known]
    return [*found, *(replace(s, act=act) for s in blocked)]


def _number(row: SpaceRow, number: int) -> SpaceRow:
    return replace(row, id=number)


def _order(graph: Graph) -> dict[str, int]:
    """The position of each activation in the graph."""
    values = [*graph.inputs, *(v for n in graph.nodes for v in n.results)]
    return {v.name: i for i, v in enumerate(values)}


def _row(acts: dict[Act, Space], order: dict[str, int]) -> SpaceRow:
    acts = {act: acts[act] for act in ACTS if act in acts}
    any_space = next(iter(acts.values()))
    values = {m.value.name: m.value for m in any_space.activations if m.value is not None}
    names = sorted(values, key=order.__getitem__)
    free = (acts[act] for act in ABSORBERS if act in acts and acts[act].admitted)
    absorbing = next(free, acts.get(Act.SCALE, any_space))
    return SpaceRow(
        0,
        tuple(names),
        _origin(values[names[0]]),
        _origin(values[names[-1]]),
        any_space.size,
        _structure(acts),
        group_name(acts),
        {act.value: space.admitted for act, space in acts.items()},
        _names(m.value for m in absorbing.producers),
        _names(m.value for m in absorbing.consumers),
        tuple(place(f.node) for f in acts[Act.SHIFT].folds) if Act.SHIFT in acts else (),
        {act.value: _obstacles(act, space) for act, space in acts.items() if space.blockers},
    )


def _origin(value: Value) -> str:
    return label(value.producer) if value.producer is not None else f"input %{value.name}"


def _names(values: Iterable[Value | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys("(absent)" if v is None else v.name for v in values))


def _obstacles(act: Act, space: Space) -> tuple[Obstacle, ...]:
    unique: dict[Any, Blocker] = {}
    for b in space.blockers:
        unique.setdefault((id(b.node), b.port, id(b.value), b.axes, b.reason), b)
    return tuple(_obstacle(act, b) for b in unique.values())


def _obstacle(act: Act, blocker: Blocker) -> Obstacle:
    if blocker.node is not None:
        op, where = blocker.node.op.name, label(blocker.node)
    else:
        op = blocker.reason if blocker.reason in _BORDERS else "graph"
        where = f"{op} %{blocker.value.name}"
    return Obstacle(act.value, op, blocker.reason, where, blocker.value.name, _lift(act, blocker))


def _lift(act: Act, blocker: Blocker) -> str | None:
    """The explicit op on the blocked edge that would lift it (as `planish.ir.absorb` would insert it)."""
    if blocker.value.is_constant or (blocker.node is None and blocker.reason not in _BORDERS):
        return None
    if blocker.value.dtype not in WIDE_FLOATS:
        return None
    if (act in MIXING or act is Act.SPLIT) and len(blocker.axes) > 1:
        return None
    if act in (Act.ROTATE, Act.LINEAR) and blocker.axes[0] + 1 != (blocker.value.rank or 0):
        return None
    return LIFTS[act]


def group_name(acts: dict[Act, Space]) -> str:
    """The name of the group that a set of spaces on the same tensors admits, in the lattice of groups.

    none < permutation, positive scale < signed scale < invertible; permutation < orthogonal < invertible. A
    mixing group that stays within blocks of b channels says so: "block-orthogonal 32". Shifts stand beside.
    """
    free = {act: space for act, space in acts.items() if space.admitted}
    names = []
    if Act.LINEAR in free:
        names.append(_blocked("invertible", free[Act.LINEAR]))
    if Act.ROTATE in free and not _within(free[Act.ROTATE], free.get(Act.LINEAR)):
        names.append(_blocked("orthogonal", free[Act.ROTATE]))
    if Act.SCALE in free and Act.LINEAR not in free:
        names.append("positive scale" if free[Act.SCALE].positive else "signed scale")
    if Act.PERMUTE in free:
        mixing = free.get(Act.LINEAR) or free.get(Act.ROTATE)
        if not _within(free[Act.PERMUTE], mixing):
            names.append(_blocked("permutation", free[Act.PERMUTE]))
    if Act.SHIFT in free:
        names.append("shift")
    return " + ".join(names) or "none"


def _within(space: Space, larger: Space | None) -> bool:
    """True if every transform of `space`'s act is one of `larger`'s: its blocks lie within the larger's."""
    if larger is None or space.size != larger.size:
        return False
    if larger.labels is None:
        return True
    if space.labels is None:
        return False
    return all(len(np.unique(larger.labels[block])) == 1 for block in space.blocks)


def _blocked(name: str, space: Space) -> str:
    sizes = {len(b) for b in space.blocks}
    if space.labels is None:
        return name
    return f"block-{name} {sizes.pop()}" if len(sizes) == 1 else f"block-{name}"


def _structure(acts: dict[Act, Space]) -> str:
    for act in (Act.LINEAR, Act.ROTATE, Act.PERMUTE):
        if act in acts and acts[act].labels is not None:
            sizes = [len(b) for b in acts[act].blocks]
            if len(set(sizes)) == 1:
                return f"{len(sizes)} x {sizes[0]}"
            return f"{acts[act].size} in {len(sizes)} blocks"
    space = next(iter(acts.values()))
    for member in space.activations:
        if member.value is not None and len(member.axes) > 1 and member.atoms is None:
            shape = member.value.shape or ()
            return " x ".join(str(shape[a]) for a in member.axes)
    return str(space.size)


# -- sums ----------------------------------------------------------------------------------------


def reads_weight(node: Node) -> tuple[Value, Axes] | None:
    """The activation that a linear or convolution multiplies with a constant weight, and its channel axis."""
    if node.op.name not in LINEARS or len(node.operands) < 2:
        return None
    left, right = node.operands[0], node.operands[1]
    if left is None or right is None or left.is_constant == right.is_constant:
        return None
    if right.is_constant:
        value, port = left, 0
    else:
        value, port = right, 1
    weight = left if port else right
    if value.rank is None or weight.constant is None or weight.constant.size <= 1:
        return None
    for owner, axes in node.op.channels(node):
        if owner == port:
            return value, tuple(axes)
    return value, (value.rank - 1,)


def _linears(graph: Graph, spaces: ChannelSpaces) -> tuple[int, dict[str, int]]:
    total = 0
    free = dict.fromkeys((act.value for act in ACTS), 0)
    for node in graph.nodes:
        read = reads_weight(node)
        if read is None:
            continue
        total += 1
        for act in ACTS:
            found = spaces.at(*read, act)
            free[act.value] += bool(found) and all(s.admitted for s in found)
    return total, free


def _obstacle_counts(rows: Sequence[SpaceRow]) -> tuple[tuple[str, str, str, int], ...]:
    count = Counter((o.act, o.op, o.reason) for r in rows for found in r.blockers.values() for o in found)
    return tuple((*key, n) for key, n in count.most_common())


def _lift_counts(rows: Sequence[SpaceRow]) -> dict[str, int]:
    lifted = Counter(o.act for r in rows for found in r.blockers.values() for o in found if o.lift)
    return {act.value: lifted[act.value] for act in ACTS if lifted[act.value]}
