"""Channel spaces: the sets of tensor axes that must carry the same transform.

The analysis reads nothing but the op table (`OpDef.relate`). For one act (permute, scale, shift,
rotate, linear, split) it starts where constants could take a transform up (`OpDef.channels`) and follows
what each row demands until every demand is met:

1. *Closure.* An element is a value with some of its axes. Each row that touches an element links it
   to elements that must carry the same transform, folds it into its own constants, or blocks it.
   Products and sums that leave a choice (`OneOf`) are kept aside.
2. *Refinement.* Links say which positions are one channel (concat, slice, head splits, repeats).
   Channels that appear in the same elements form one space: that is where concat and fused QKV cut.
3. *Choices* are made so that no blocked element is drawn in: a scale on a product rides on the factor
   that can take it.

A constant that only one node reads ends the search: it absorbs. A constant with several readers is
followed to all of them, so that tied parameters are one by construction.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from planish.ir.graph import Graph, Node, Value
from planish.ir.ops.base import MIXING, Act, Axes, Port
from planish.ir.space_refine import Chooser, Part, Refiner, grouped
from planish.ir.space_search import Member, Questions, Search
from planish.ir.space_signs import AtomSigns, block_nested, signs

__all__ = ["Blocker", "ChannelSpaces", "FoldSite", "Member", "Space", "analyse"]


@dataclass(frozen=True, eq=False, slots=True)
class FoldSite:
    """A node whose own constants take a transform up by a formula (a linear layer's bias and a shift)."""

    node: Node
    port: Port
    axes: Axes
    variance: int = 1
    atoms: np.ndarray | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Blocker:
    """Why a space does not admit its act: the node, its port that carries the transform, and the reason.

    `node` is None at the border of the graph. An explicit op on the edge into `port` (or, for a graph
    output, before it) lifts the blocker.
    """

    node: Node | None
    port: Port
    value: Value
    axes: Axes
    reason: str
    variance: int = 1
    atoms: np.ndarray | None = None

    def __str__(self) -> str:
        where = f"{self.node.op.name} %{self.node.result.name}" if self.node is not None else f"%{self.value.name}"
        source = f" ({self.node.source})" if self.node is not None and self.node.source else ""
        return f"{where}{source}: {self.reason}"


@dataclass(eq=False, slots=True)
class Space:
    """A set of tensor axes that must carry the same transform of one act.

    Attributes:
        act: the act.
        size: the number of channels n.
        activations: the activations that carry the transform.
        constants: the constants that absorb it.
        folds: nodes that take it up by a formula.
        labels: int [n]: channels with equal labels may be mixed with each other; None: all.
        positive: SCALE: the factors must be positive.
        blockers: why it is not admitted; empty: the act is free of cost.
    """

    act: Act
    size: int
    activations: list[Member]
    constants: list[Member]
    folds: list[FoldSite]
    labels: np.ndarray | None = None
    positive: bool = False
    blockers: list[Blocker] = field(default_factory=list)

    @property
    def admitted(self) -> bool:
        return not self.blockers

    @property
    def maximal_constants(self) -> list[Member]:
        """The constants without those whose axes lie within another member's on the same tensor."""
        return _maximal(self.constants)

    @property
    def maximal_folds(self) -> list[FoldSite]:
        """The fold sites without those whose axes lie within another site's at the same port."""
        wide: dict[tuple[Node, Port, int], list[set[int]]] = {}
        for site in self.folds:
            wide.setdefault((site.node, site.port, site.variance), []).append(set(site.axes))
        return [
            site
            for site in self.folds
            if not any(set(site.axes) < axes for axes in wide[site.node, site.port, site.variance])
        ]

    @property
    def nested(self) -> set[Value]:
        """The activations that are in the space on several sets of axes that meet."""
        axes: dict[Value, set[Axes]] = {}
        for member in self.activations:
            if member.value is not None:
                axes.setdefault(member.value, set()).add(member.axes)
        return {v for v, sets in axes.items() if any(set(a) & set(b) for a, b in combinations(sets, 2))}

    @property
    def producers(self) -> list[Member]:
        """Constants that carry T itself: weights that write the space."""
        return [m for m in self.constants if m.variance > 0]

    @property
    def consumers(self) -> list[Member]:
        """Constants that carry the inverse transpose: weights that read the space."""
        return [m for m in self.constants if m.variance < 0]

    @property
    def blocks(self) -> list[np.ndarray]:
        """The channel indices of each block within which a mixing act may act."""
        if self.labels is None:
            return [np.arange(self.size)]
        order = np.argsort(self.labels, kind="stable")
        cuts = np.flatnonzero(np.diff(self.labels[order])) + 1
        return list(np.split(order, cuts))

    def key(self) -> frozenset[tuple[str, Axes]]:
        """Which activations it spans: equal for the spaces of several acts on the same tensors."""
        return frozenset((m.value.name, m.axes) for m in self.activations if m.value is not None)


def _element(member: Member) -> tuple[object, ...]:
    """What a member is of: equal for the two that one element gives whose atoms carry T here and its inverse there."""
    reader = (id(member.node), member.port) if member.private else ()
    return id(member.value), member.axes, member.grow, member.view, reader


def _maximal(members: list[Member]) -> list[Member]:
    """Members on nested axes of one tensor are tied: the widest says what happens to the tensor.

    Private copies of a constant come first, and wider members before narrower ones: a copy is made from the data
    before the change.
    """
    kept: list[Member] = []
    covered: dict[tuple[int, ...], list[frozenset[int]]] = {}
    variance: dict[tuple[object, ...], int] = {}

    def within(tensor: tuple[int, ...], axes: frozenset[int]) -> bool:
        return any(axes <= other for other in covered.get(tensor, ()))

    for member in sorted(members, key=lambda m: (not m.private, -len(m.axes))):
        shape = member.grow or member.view or (member.value.shape if member.value is not None else None) or ()
        axes = frozenset(a - len(shape) for a in member.axes)  # from the right: grown shapes differ in rank
        tensor = (id(member.node), member.port) if member.private else (id(member.value),)
        if member.apart:
            kept.append(member)
            continue
        if variance.get(_element(member), member.variance) != member.variance:
            kept.append(member)  # the other half of one that is kept
            continue
        if within(tensor, axes):
            continue
        if not member.private and member.is_constant and member.value is not None:
            readers = [(id(n), i) for n in member.value.users for i, v in enumerate(n.operands) if v is member.value]
            if readers and all(within(reader, axes) for reader in readers):
                continue
        covered.setdefault(tensor, []).append(axes)
        variance[_element(member)] = member.variance
        kept.append(member)
    return kept


def _spaces(search: Search) -> Iterator[Space]:
    """The spaces of a finished search."""
    chooser = Chooser(search)
    chooser.run()
    block_nested(search, chooser.settled)
    refiner = Refiner(search)
    mixing = search.act in MIXING
    for elements, links in grouped(search, [*search.links, *chooser.links]):
        if all(search.members[e].is_constant for e in elements):
            continue
        sign = signs(search, elements, links)
        finer = AtomSigns(search, elements, links) if sign is None else None
        for part in refiner.parts(elements, links):
            space = Space(search.act, part.size, [], [], [], part.labels if mixing else None)
            if finer is None:
                assert sign is not None
                for element, atoms in part.atoms.items():
                    _add(space, search, element, atoms, sign.get(element, 1))
            else:
                _add_by_atoms(space, search, part, finer)
            if space.activations:
                yield space


def _add_by_atoms(space: Space, search: Search, part: Part, signs: AtomSigns) -> None:
    """Add the elements of a part, each once for the atoms that carry T and once for those that carry the inverse."""
    members = search.members
    root = next((e for e in part.atoms if not members[e].is_constant), next(iter(part.atoms)))
    clash, found = signs.of(part, root)
    for element, atoms in part.atoms.items():
        sign = found[element]
        channel = np.arange(len(sign)) if atoms is None else atoms
        for variance in (1, -1):
            chosen = sign == variance
            if not chosen.any():
                continue
            whole = atoms if chosen.sum() == (channel >= 0).sum() else np.where(chosen, channel, -1)
            _add(space, search, element, whole, variance)
    if clash is not None:
        value = members[clash].value or members[root].value
        assert value is not None
        space.blockers.append(Blocker(None, 0, value, members[clash].axes, "it meets its own inverse"))


def _add(space: Space, search: Search, element: int, atoms: np.ndarray | None, variance: int) -> None:
    found = search.members[element]
    if atoms is not None or variance != 1:
        member = Member(
            found.value, found.axes, variance, atoms, found.node, found.port,
            found.grow, found.view, found.neutral, found.offset, found.apart,
        )  # fmt: skip
    else:
        member = found
    (space.constants if member.is_constant else space.activations).append(member)
    if element in search.folded:
        for node, port in search.folded[element]:
            space.folds.append(FoldSite(node, port, member.axes, variance, atoms))
    if element in search.blocked:
        for owner, port, reason in search.blocked[element]:
            value = member.value
            if value is None:
                assert owner is not None
                value = owner.result
            space.blockers.append(Blocker(owner, port, value, member.axes, reason, variance, atoms))
    if element in search.positive:
        space.positive = True
    if search.act is Act.SPLIT and variance < 0 and not member.is_constant and member.value is not None:
        reason = "another activation of the space would carry the division by the number of copies"
        space.blockers.append(Blocker(None, 0, member.value, member.axes, reason, variance, atoms))


class ChannelSpaces:
    """The spaces of a graph, by act, computed when first asked for."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._by_act: dict[Act, list[Space]] = {}
        self._index: dict[Act, dict[tuple[Value, Axes], list[Space]]] = {}
        self._questions = Questions()

    def of(self, act: Act) -> list[Space]:
        """All spaces of an act, admitted or not, in the order of their first tensor.

        For LINEAR only those are searched that admit ROTATE: it asks for more.
        """
        if act not in self._by_act:
            enabled = gc.isenabled()
            gc.disable()  # the search makes many small objects and no cycles
            try:
                search = Search(self.graph, act, self._questions)
                search.run(self._seeds(act))
                self._by_act[act] = list(_spaces(search))
            finally:
                if enabled:
                    gc.enable()
        return self._by_act[act]

    def _seeds(self, act: Act) -> Iterator[tuple[Value, Axes]]:
        if act is Act.LINEAR:
            for space in self.admitted(Act.ROTATE):
                for member in space.activations:
                    assert member.value is not None
                    yield member.value, member.axes
            return
        for node in self.graph.nodes:
            for port, axes in node.op.channels(node):
                value = node.port(port)
                if value is not None and not value.is_constant:
                    yield value, axes

    def admitted(self, act: Act) -> list[Space]:
        """The spaces of an act that no op blocks."""
        return [s for s in self.of(act) if s.admitted]

    def at(self, value: Value, axes: Axes, act: Act) -> list[Space]:
        """The spaces that contain (some channels of) these axes of a value."""
        if act not in self._index:
            table = self._index[act] = {}
            for space in self.of(act):
                for key in dict.fromkeys((m.value, m.axes) for m in space.activations if m.value is not None):
                    table.setdefault(key, []).append(space)
        return self._index[act].get((value, axes), [])


def analyse(graph: Graph) -> ChannelSpaces:
    """The channel spaces of a graph."""
    return ChannelSpaces(graph)
