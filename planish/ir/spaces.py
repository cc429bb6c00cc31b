"""Channel spaces: the sets of tensor axes that must carry the same transform.

The analysis reads nothing but the op table (`OpDef.relate`). For one act (permute, scale, shift,
rotate, linear) it starts where constants could take a transform up (`OpDef.channels`) and follows
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
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from planish.ir.graph import Graph, Node, Value
from planish.ir.ops.base import MIXING, Act, Axes, Block, Carry, Fold, Link, OneOf, Port, static_size

SIZE_LIMIT = 1 << 26  # atoms of one element; larger ones are not searched


@dataclass(frozen=True, eq=False, slots=True)
class Member:
    """A tensor that carries a space's transform on some of its axes.

    Attributes:
        value: the tensor; None for a constant that has yet to be made (an absent bias).
        axes: the axes, flattened in C order (axes of `grow` or `view` where those are set).
        variance: +1 it carries T, -1 the inverse transpose.
        atoms: int [product of the axes]: the channel of each position, -1 if it is in another space.
            None: position i is channel i.
        node, port: for a constant: the reader through which it was reached.
        grow, view, neutral, offset: see `planish.ir.ops.base.Link`.
    """

    value: Value | None
    axes: Axes
    variance: int = 1
    atoms: np.ndarray | None = None
    node: Node | None = None
    port: Port = 0
    grow: tuple[int, ...] | None = None
    view: tuple[int, ...] | None = None
    neutral: float | None = None
    offset: float = 0.0

    @property
    def is_constant(self) -> bool:
        return self.value is None or self.value.is_constant

    @property
    def private(self) -> bool:
        """The constant is made anew for its node; other readers keep the old one."""
        return self.value is None or self.grow is not None


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
    """Why a space does not admit its act: the node, the port of it that carries the transform, and the reason.

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


class _Search:
    """The closure for one act. Elements are numbered; everything is kept in parallel lists."""

    def __init__(self, graph: Graph, act: Act) -> None:
        self.graph = graph
        self.act = act
        self.ids: dict[tuple[Any, ...], int] = {}
        self.members: list[Member] = []  # without atoms and with the variance left open
        self.sizes: list[int] = []
        self.links: list[tuple[int, int, tuple[np.ndarray, np.ndarray] | None, int]] = []
        self.blocked: dict[int, list[tuple[Node | None, Port, str]]] = defaultdict(list)
        self.folded: dict[int, list[tuple[Node, Port]]] = defaultdict(list)
        self.walls: list[tuple[int, Axes]] = []  # (element, block axes)
        self.positive: set[int] = set()
        self.choices: list[tuple[Node, Port, int, OneOf]] = []
        self.by_value: dict[Value, list[int]] = {}
        self.asked: set[tuple[Node, Port, Axes]] = set()
        self.queue: list[int] = []
        self.outputs = {id(v) for v in graph.output_values()}

    # -- elements --------------------------------------------------------------------------------

    def element(self, value: Value, axes: Axes) -> int | None:
        """The number of (value, axes); None if a dim is not static."""
        key = (value, axes)
        number = self.ids.get(key)
        if number is not None:
            return number
        size = static_size(value, axes)
        if size is None or size > SIZE_LIMIT or size == 0:
            return None
        number = self._new(key, Member(value, axes), size)
        others = self.by_value.setdefault(value, [])
        for other in others:
            self._overlap(number, other)
        others.append(number)
        self.queue.append(number)
        return number

    def _new(self, key: tuple[Any, ...], member: Member, size: int) -> int:
        number = self.ids[key] = len(self.members)
        self.members.append(member)
        self.sizes.append(size)
        return number

    def _overlap(self, one: int, two: int) -> None:
        """Two elements of one value on axes that meet: a transform on one shows on the other."""
        a, b = self.members[one], self.members[two]
        if not set(a.axes) & set(b.axes) or a.view is not None or b.view is not None:
            return
        assert a.value is not None
        union = tuple(sorted({*a.axes, *b.axes}))
        if union in (a.axes, b.axes):
            wide, narrow = (one, two) if union == a.axes else (two, one)
            self._tie(wide, narrow)
            return
        joint = self.element(a.value, union)
        if joint is None:
            self.blocked[one].append((None, 0, "its axes meet another element's on a dynamic axis"))

    def _tie(self, wide: int, narrow: int) -> None:
        member = self.members[wide]
        assert member.value is not None and member.value.shape is not None
        dims = [int(member.value.shape[a]) for a in member.axes]  # type: ignore[arg-type]
        inner = self.members[narrow].axes
        grid = np.indices(dims).reshape(len(dims), -1)
        own = [grid[member.axes.index(a)] for a in inner]
        target = np.ravel_multi_index(own, [dims[member.axes.index(a)] for a in inner])
        self.links.append((wide, narrow, (np.arange(self.sizes[wide]), target), 1))

    def constant_element(self, node: Node, link: Link) -> int | str | None:
        """The element of a constant (or absent) operand; a string says why there can be none; None: no need."""
        value = node.port(link.port)
        if value is None and link.neutral is None:
            return None
        if value is None and self.act is not Act.SHIFT and link.neutral == 0.0:
            return None  # a linear map leaves the zeros of an absent bias alone
        if value is None or link.grow is not None:
            shape = link.grow
            if shape is None:
                return "an absent operand would be needed"
            key: tuple[Any, ...] = (node, link.port, link.axes, shape)
            size = int(np.prod([shape[a] for a in link.axes]))
        elif link.view is not None:
            key = (value, link.axes, link.view)
            size = int(np.prod([link.view[a] for a in link.axes]))
            if len(value.users) > 1:
                return "its kernel has other readers"
        else:
            key = (value, link.axes)
            size = static_size(value, link.axes) or 0
        number = self.ids.get(key)
        if number is not None:
            if self.members[number].offset != link.offset:
                return "its gain is read in two ways"
            return number
        member = Member(
            value, link.axes, 1, None, node, link.port, link.grow, link.view, link.neutral, link.offset
        )
        number = self._new(key, member, size)
        if value is not None and link.grow is None:
            if id(value) in self.outputs:
                self.blocked[number].append((None, 0, "the constant is a graph output"))
            others = self.by_value.setdefault(value, [])
            if any(self.members[o].view != link.view for o in others):
                self.blocked[number].append((node, link.port, "its kernel is read in two shapes"))
            for other in others:
                self._overlap(number, other)
            others.append(number)
            if len(value.users) > 1:
                self.queue.append(number)
        return number

    # -- closure ---------------------------------------------------------------------------------

    def run(self) -> None:
        for node in self.graph.nodes:
            for port, axes in node.op.channels(node):
                value = node.port(port)
                if value is not None and not value.is_constant:
                    self.element(value, axes)
        position = 0
        while position < len(self.queue):
            self.visit(self.queue[position])
            position += 1

    def visit(self, number: int) -> None:
        member = self.members[number]
        value, axes = member.value, member.axes
        assert value is not None
        if value.producer is not None:
            self.ask(value.producer, ~value.producer.results.index(value), number)
        elif not value.is_constant:
            self.blocked[number].append((None, 0, "graph input"))
        for node in dict.fromkeys(value.users):
            for index, operand in enumerate(node.operands):
                if operand is value:
                    self.ask(node, index, number)
        if id(value) in self.outputs:
            self.blocked[number].append((None, 0, "graph output"))

    def ask(self, node: Node, port: Port, number: int) -> None:
        axes = self.members[number].axes
        if (node, port, axes) in self.asked:
            return
        if self.members[number].is_constant and self.members[number].offset:
            self.blocked[number].append((node, port, "its gain has several readers"))
            return
        relation = node.op.relate(node, self.act, port, axes)
        if type(relation) is Carry:
            self.carry(node, port, number, relation)
        elif type(relation) is Block:
            self.blocked[number].append((node, port, relation.reason))
        elif type(relation) is Fold:
            self.folded[number].append((node, port))
        else:
            assert type(relation) is OneOf
            self.choices.append((node, port, number, relation))
            for option in relation.options:
                for link in option.links:
                    self.target(node, link)

    def target(self, node: Node, link: Link) -> int | str | None:
        value = node.port(link.port)
        if value is None or value.is_constant:
            return self.constant_element(node, link)
        if link.grow is not None or link.view is not None:
            return "it would need a constant here"
        if link.offset:
            return "its gain is an activation"
        number = self.element(value, link.axes)
        return "it meets a dynamic axis" if number is None else number

    def carry(self, node: Node, port: Port, number: int, relation: Carry) -> None:
        if relation.block_axes:
            self.walls.append((number, relation.block_axes))
        if relation.positive:
            self.positive.add(number)
        for link in relation.links:
            target = self.target(node, link)
            if target is None:
                continue
            if isinstance(target, str):
                self.blocked[number].append((node, port, target))
                continue
            self.links.append((number, target, link.pairs, link.variance))
            if link.pairs is None and link.port != port:
                self.asked.add((node, link.port, link.axes))


def _components(count: int, links: Sequence[tuple[int, int, Any, int]]) -> list[list[int]]:
    """Connected components of elements, as lists of ascending element numbers."""
    if count == 0:
        return []
    rows = np.fromiter((e[0] for e in links), np.int64, len(links))
    columns = np.fromiter((e[1] for e in links), np.int64, len(links))
    graph = coo_array((np.ones(len(links), np.int8), (rows, columns)), shape=(count, count))
    number, label = connected_components(graph, directed=False)
    order = np.argsort(label, kind="stable")
    return [part.tolist() for part in np.split(order, np.cumsum(np.bincount(label, minlength=number))[:-1])]


_MASK = (1 << 64) - 1


def _hash(*numbers: int) -> int:
    """A 64-bit mix of small integers (splitmix64), the same in every run."""
    state = 0x9E3779B97F4A7C15
    for n in numbers:
        state = (state ^ (n & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


@dataclass(eq=False, slots=True)
class _Part:
    """Channels that appear in the same elements. `atoms[element]` is None where position i is channel i."""

    size: int
    atoms: dict[int, np.ndarray | None]
    labels: np.ndarray | None = None


class _Refiner:
    """Cuts a component into parts (step 2)."""

    def __init__(self, search: _Search) -> None:
        self.search = search
        self.walls: dict[int, list[Axes]] = defaultdict(list)
        if search.act in MIXING:
            for number, axes in search.walls:
                if axes not in self.walls[number]:
                    self.walls[number].append(axes)

    def parts(self, elements: list[int], links: Sequence[tuple[int, int, Any, int]]) -> list[_Part]:
        sizes = self.search.sizes
        size = sizes[elements[0]]
        if all(pairs is None for _, _, pairs, _ in links):
            if any(sizes[e] != size for e in elements):
                raise AssertionError("linked elements of different sizes")  # a wrong row; the audit finds it
            part = _Part(size, dict.fromkeys(elements))
            part.labels = self._labels(elements, [np.arange(size)] * len(elements), np.arange(size), size)
            return [part]
        starts = dict(zip(elements, np.cumsum([0, *(sizes[e] for e in elements[:-1])]).tolist(), strict=True))
        total = sum(sizes[e] for e in elements)
        left, right = [], []
        for one, two, pairs, _ in links:
            mine, theirs = pairs if pairs is not None else (np.arange(sizes[one]), np.arange(sizes[two]))
            left.append(mine + starts[one])
            right.append(theirs + starts[two])
        rows, columns = np.concatenate(left), np.concatenate(right)
        graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(total, total))
        count, label = connected_components(graph, directed=False)
        # number the channels by their first atom
        first = np.full(count, total)
        np.minimum.at(first, label, np.arange(total))
        rank = np.empty(count, np.int64)
        rank[np.argsort(first)] = np.arange(count)
        label = rank[label]
        signature = np.zeros(count, np.uint64)
        classes = []
        for element in elements:
            own = label[starts[element] : starts[element] + sizes[element]]
            classes.append(own)
            channels, multiplicity = np.unique(own, return_counts=True)
            salt = np.array([_hash(element, int(m)) for m in np.unique(multiplicity)], np.uint64)
            signature[channels] += salt[np.searchsorted(np.unique(multiplicity), multiplicity)]
        _, kind = np.unique(signature, return_inverse=True)
        labels = self._labels(elements, classes, np.arange(count), count)
        parts = []
        for k in dict.fromkeys(kind.tolist()):
            channels = np.flatnonzero(kind == k)
            renumber = np.full(count, -1)
            renumber[channels] = np.arange(len(channels))
            atoms: dict[int, np.ndarray | None] = {}
            for element, own in zip(elements, classes, strict=True):
                mapped = renumber[own]
                if (mapped >= 0).any():
                    plain = len(mapped) == len(channels) and bool((mapped == np.arange(len(mapped))).all())
                    atoms[element] = None if plain else mapped
            own_labels = None if labels is None else np.unique(labels[channels], return_inverse=True)[1]
            if own_labels is not None and not own_labels.any():
                own_labels = None
            parts.append(_Part(len(channels), atoms, own_labels))
        return parts

    def _labels(
        self, elements: list[int], classes: Sequence[np.ndarray], channels: np.ndarray, count: int
    ) -> np.ndarray | None:
        """Which channels may be mixed: equal labels iff no wall separates them."""
        if not any(e in self.walls for e in elements):
            return None
        mixed = np.zeros(count, np.uint64)
        for element, own in zip(elements, classes, strict=True):
            for axes in self.walls.get(element, ()):
                member = self.search.members[element]
                assert member.value is not None and member.value.shape is not None
                dims = [int(member.value.shape[a]) for a in member.axes]  # type: ignore[arg-type]
                grid = np.indices(dims).reshape(len(dims), -1)
                places = [member.axes.index(a) for a in axes]
                wall = np.ravel_multi_index([grid[p] for p in places], [dims[p] for p in places])
                salt = np.array([_hash(element, *axes, int(w)) for w in range(int(wall.max()) + 1)], np.uint64)
                np.add.at(mixed, own, salt[wall])
        _, first, label = np.unique(mixed, return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        label = rank[label]
        return label if label.any() else None


class _Analysis:
    """Steps 2 and 3 for one act."""

    def __init__(self, search: _Search) -> None:
        self.search = search
        self.refiner = _Refiner(search)
        self.chosen: list[tuple[int, int, Any, int]] = []

    def _group(self, links: Sequence[tuple[int, int, Any, int]]) -> list[tuple[list[int], list[tuple[int, int, Any, int]]]]:
        components = _components(len(self.search.members), links)
        home = np.empty(len(self.search.members), np.int64)
        for number, elements in enumerate(components):
            home[elements] = number
        grouped: list[list[tuple[int, int, Any, int]]] = [[] for _ in components]
        for link in links:
            grouped[home[link[0]]].append(link)
        return list(zip(components, grouped, strict=True))

    def choose(self) -> None:
        """Settle every OneOf; a choice that fails blocks its element."""
        search = self.search
        if not search.choices:
            return
        parent: list[int] = []
        dead: list[bool] = []
        waiting: list[int] = []
        of: dict[int, list[int]] = {}
        for elements, links in self._group(search.links):
            for part in self.refiner.parts(elements, links):
                number = len(parent)
                parent.append(number)
                dead.append(any(e in search.blocked for e in part.atoms))
                waiting.append(0)
                for element in part.atoms:
                    of.setdefault(element, []).append(number)

        def find(p: int) -> int:
            while parent[p] != p:
                parent[p] = parent[parent[p]]
                p = parent[p]
            return p

        def union(p: int, q: int) -> None:
            p, q = find(p), find(q)
            if p != q:
                parent[q] = p
                dead[p] = dead[p] or dead[q]
                waiting[p] += waiting[q]

        def alive(element: int) -> bool:
            return not any(dead[find(p)] for p in of[element])

        for _, _, element, _ in search.choices:
            for p in of[element]:
                waiting[p] += 1
        settled: dict[tuple[Node, Axes], frozenset[Port]] = {}

        def place(node: Node, port: Port, element: int) -> tuple[Node, Axes]:
            value = node.port(port)
            assert value is not None and value.rank is not None
            return node, tuple(a - value.rank for a in search.members[element].axes)

        def targets(node: Node, option: Carry) -> list[tuple[Link, int]] | None:
            found = []
            for link in option.links:
                target = search.target(node, link)
                if isinstance(target, str):
                    return None
                if target is not None:
                    found.append((link, target))
            return found

        def settle(node: Node, port: Port, element: int, relation: OneOf, easy: bool) -> bool:
            """Try to settle; False: later. With `easy`, only options that end in constants or draw in nothing open."""
            if not alive(element):
                return True
            spot = place(node, port, element)
            if spot in settled:
                ports = settled[spot]
                for option in relation.options:
                    if frozenset({port, *(link.port for link in option.links)}) == ports:
                        return True
                search.blocked[element].append((node, port, relation.reason))
                for p in of[element]:
                    dead[find(p)] = True
                return True
            fallback = None
            for option in relation.options:
                found = targets(node, option)
                if found is None or not all(alive(t) for _, t in found):
                    continue
                mine = {find(p) for p in of[element]}
                opens = any(waiting[find(p)] > 1 and find(p) not in mine for _, t in found for p in of[t])
                if opens and fallback is None:
                    fallback = (option, found)
                if not opens:
                    take(node, port, element, option, found, spot)
                    return True
            if easy:
                return False
            if fallback is not None:
                take(node, port, element, fallback[0], fallback[1], spot)
                return True
            search.blocked[element].append((node, port, relation.reason))
            for p in of[element]:
                dead[find(p)] = True
            return True

        def take(
            node: Node, port: Port, element: int, option: Carry, found: list[tuple[Link, int]], spot: tuple[Node, Axes]
        ) -> None:
            settled[spot] = frozenset({port, *(link.port for link in option.links)})
            if option.block_axes:
                search.walls.append((element, option.block_axes))
            if option.positive:
                search.positive.add(element)
            for link, target in found:
                self.chosen.append((element, target, link.pairs, link.variance))
                mine, theirs = of[element], of[target]
                pairs = zip(mine, theirs, strict=True) if len(mine) == len(theirs) else ((p, q) for p in mine for q in theirs)
                for p, q in pairs:
                    union(p, q)

        pending = search.choices
        while pending:
            rest = [c for c in pending if not settle(*c, easy=True)]
            if len(rest) == len(pending):
                settle(*rest[0], easy=False)
                rest = rest[1:]
            pending = rest

    def spaces(self) -> Iterable[Space]:
        search = self.search
        self.refiner = _Refiner(search)
        mixing = search.act in MIXING
        for elements, links in self._group([*search.links, *self.chosen]):
            clash, sign = self._variances(elements, links)
            for part in self.refiner.parts(elements, links):
                space = Space(search.act, part.size, [], [], [], part.labels if mixing else None)
                for element, atoms in part.atoms.items():
                    member = search.members[element]
                    variance = sign.get(element, 1)
                    full = Member(
                        member.value, member.axes, variance, atoms, member.node, member.port,
                        member.grow, member.view, member.neutral, member.offset,
                    )  # fmt: skip
                    (space.constants if member.is_constant else space.activations).append(full)
                    for node, port in search.folded.get(element, ()):
                        space.folds.append(FoldSite(node, port, member.axes, variance, atoms))
                    for owner, port, reason in search.blocked.get(element, ()):
                        value = member.value
                        if value is None:
                            assert owner is not None
                            value = owner.result
                        space.blockers.append(Blocker(owner, port, value, member.axes, reason, variance, atoms))
                    if element in search.positive:
                        space.positive = True
                    if clash is not None and element == clash:
                        assert member.value is not None
                        space.blockers.append(
                            Blocker(None, 0, member.value, member.axes, "it meets its own inverse", variance, atoms)
                        )
                if space.activations:
                    yield space

    def _variances(self, elements: list[int], links: Sequence[tuple[int, int, Any, int]]) -> tuple[int | None, dict[int, int]]:
        """The sign of each element, +1 at the first activation; and an element where the signs clash."""
        if self.search.act in (Act.PERMUTE, Act.ROTATE):
            signs: dict[int, int] = {}
            for one, two, _, variance in links:  # only to tell readers from writers
                if variance < 0:
                    signs[two if self.search.members[two].is_constant else one] = -1
            return None, {e: s for e, s in signs.items() if self.search.members[e].is_constant}
        if all(variance > 0 for _, _, _, variance in links):
            return None, {}
        near: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for one, two, _, variance in links:
            near[one].append((two, variance))
            near[two].append((one, variance))
        start = next((e for e in elements if not self.search.members[e].is_constant), elements[0])
        sign = {start: 1}
        stack = [start]
        clash = None
        while stack:
            element = stack.pop()
            for other, variance in near[element]:
                expected = sign[element] * variance
                if other not in sign:
                    sign[other] = expected
                    stack.append(other)
                elif sign[other] != expected:
                    clash = other
        return clash, sign


class ChannelSpaces:
    """The spaces of a graph, by act, computed when first asked for."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._by_act: dict[Act, list[Space]] = {}

    def of(self, act: Act) -> list[Space]:
        """All spaces of an act, admitted or not, in the order of their first tensor."""
        if act not in self._by_act:
            enabled = gc.isenabled()
            gc.disable()  # the search makes many small objects and no cycles
            try:
                search = _Search(self.graph, act)
                search.run()
                analysis = _Analysis(search)
                analysis.choose()
                self._by_act[act] = list(analysis.spaces())
            finally:
                if enabled:
                    gc.enable()
        return self._by_act[act]

    def admitted(self, act: Act) -> list[Space]:
        """The spaces of an act that no op blocks."""
        return [s for s in self.of(act) if s.admitted]

    @cached_property
    def _index(self) -> dict[tuple[Act, Value, Axes], list[Space]]:
        return {}

    def at(self, value: Value, axes: Axes, act: Act) -> list[Space]:
        """The spaces that contain (some channels of) these axes of a value."""
        table = self._index
        if (act, value, axes) not in table and not any(k[0] is act for k in table):
            for space in self.of(act):
                for member in space.activations:
                    assert member.value is not None
                    table.setdefault((act, member.value, member.axes), []).append(space)
        return table.get((act, value, axes), [])


def analyse(graph: Graph) -> ChannelSpaces:
    """The channel spaces of a graph."""
    return ChannelSpaces(graph)
