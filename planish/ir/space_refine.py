"""Cutting components into parts, and settling choices.

Steps 2 and 3 of `planish.ir.spaces`: the channels that appear in the same elements of a component form
one part; a `OneOf` is settled so that no blocked part is drawn in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from planish.ir.graph import Node
from planish.ir.ops.base import MIXING, Axes, Port
from planish.ir.space_search import Choice, LinkRecord, Option, Search


def components(count: int, links: Sequence[LinkRecord]) -> list[list[int]]:
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
class Part:
    """Channels that appear in the same elements. `atoms[element]` is None where position i is channel i."""

    size: int
    atoms: dict[int, np.ndarray | None]
    labels: np.ndarray | None = None


class Refiner:
    """Cuts components into parts; equal components (the layers of a model) are cut once."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.walls: dict[int, list[Axes]] = defaultdict(list)
        if search.act in MIXING:
            for number, axes in search.walls:
                if axes not in self.walls[number]:
                    self.walls[number].append(axes)
        self._cut: dict[object, list[Part]] = {}

    def parts(self, elements: list[int], links: Sequence[LinkRecord]) -> list[Part]:
        """The parts of a component."""
        sizes = [self.search.sizes[e] for e in elements]
        plain = all(link[2] is None for link in links)
        walls = [(i, self._wall_dims(e), tuple(self.walls[e])) for i, e in enumerate(elements) if e in self.walls]
        if plain and not walls:
            return [Part(self._one_size(sizes), dict.fromkeys(elements))]
        local = {e: i for i, e in enumerate(elements)}
        # the arrays of pairs live as long as the links do: their identity tells them apart
        key = (tuple(sizes), tuple((local[a], local[b], id(pairs)) for a, b, pairs, _ in links), tuple(walls))
        cut = self._cut.get(key)
        if cut is None:
            renumbered = [(local[a], local[b], pairs, sign) for a, b, pairs, sign in links]
            cut = self._cut[key] = _cut(sizes, renumbered, walls, plain, self.search.act in MIXING)
        return [Part(p.size, {elements[i]: atoms for i, atoms in p.atoms.items()}, p.labels) for p in cut]

    def _wall_dims(self, element: int) -> tuple[tuple[int, int], ...]:
        member = self.search.members[element]
        assert member.value is not None
        assert member.value.shape is not None
        return tuple((a, int(member.value.shape[a])) for a in member.axes)  # type: ignore[arg-type]

    @staticmethod
    def _one_size(sizes: list[int]) -> int:
        if any(size != sizes[0] for size in sizes):
            raise AssertionError("linked elements of different sizes")  # a wrong row: the audit finds it first
        return sizes[0]


Wall = tuple[int, tuple[tuple[int, int], ...], tuple[Axes, ...]]  # element, (axis, dim) of it, walls


def _cut(sizes: list[int], links: Sequence[LinkRecord], walls: Sequence[Wall], plain: bool, mixing: bool) -> list[Part]:
    count = len(sizes)
    if plain:
        size = Refiner._one_size(sizes)
        own = [np.arange(size)] * count
        return [Part(size, dict.fromkeys(range(count)), _labels(own, walls, np.zeros(size, np.uint64)))]
    starts = np.cumsum([0, *sizes])
    total = int(starts[-1])
    left, right = [], []
    for one, two, pairs, _ in links:
        mine, theirs = pairs if pairs is not None else (np.arange(sizes[one]), np.arange(sizes[two]))
        left.append(mine + starts[one])
        right.append(theirs + starts[two])
    rows, columns = np.concatenate(left), np.concatenate(right)
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(total, total))
    number, label = connected_components(graph, directed=False)
    first = np.full(number, total)
    np.minimum.at(first, label, np.arange(total))
    label = _ranked(first)[label]  # channels are numbered by their first atom
    signature = np.zeros(number, np.uint64)
    classes = []
    for element in range(count):
        own_label = label[starts[element] : starts[element + 1]]
        classes.append(own_label)
        channels, multiplicity = np.unique(own_label, return_counts=True)
        kinds = np.unique(multiplicity)
        salt = np.array([_hash(element, int(m)) for m in kinds], np.uint64)
        signature[channels] += salt[np.searchsorted(kinds, multiplicity)]
    _, kind = np.unique(signature, return_inverse=True)
    labels = _labels(classes, walls, _copies(classes, links, number)) if mixing else None
    parts = []
    for k in dict.fromkeys(kind.tolist()):
        members = np.flatnonzero(kind == k)
        renumber = np.full(number, -1)
        renumber[members] = np.arange(len(members))
        atoms: dict[int, np.ndarray | None] = {}
        for element, own_label in enumerate(classes):
            mapped = renumber[own_label]
            if (mapped >= 0).any():
                same = len(mapped) == len(members) and bool((mapped == np.arange(len(mapped))).all())
                atoms[element] = None if same else mapped
        own_labels = None if labels is None else np.unique(labels[members], return_inverse=True)[1]
        if own_labels is not None and not own_labels.any():
            own_labels = None
        parts.append(Part(len(members), atoms, own_labels))
    return parts


def _ranked(first: np.ndarray) -> np.ndarray:
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank


def _copies(classes: Sequence[np.ndarray], links: Sequence[LinkRecord], count: int) -> np.ndarray:
    """For each channel a hash of how its copies in one element answer to its copies in another.

    Mixing channels mixes copy k with copy k in every element: that is one thing only for channels whose
    copies are linked alike. Zeros where every channel stands once in every element.
    """
    mixed = np.zeros(count, np.uint64)
    ranks = []
    for own in classes:
        order = np.argsort(own, kind="stable")
        starts = np.flatnonzero(np.diff(own[order], prepend=-1))
        rank = np.empty(len(own), np.int64)
        rank[order] = np.arange(len(own)) - np.repeat(starts, np.diff(starts, append=len(own)))
        ranks.append(rank)
    if not any(rank.any() for rank in ranks):
        return mixed
    for number, (one, two, pairs, _) in enumerate(links):
        left, right = pairs if pairs is not None else (np.arange(len(classes[one])),) * 2
        both = np.stack([ranks[one][left], ranks[two][right]])
        kinds, kind = np.unique(both, axis=1, return_inverse=True)
        salt = np.array([_hash(~number, int(a), int(b)) for a, b in kinds.T], np.uint64)
        np.add.at(mixed, classes[one][left], salt[kind.reshape(-1)])
    return mixed


def _labels(classes: Sequence[np.ndarray], walls: Sequence[Wall], mixed: np.ndarray) -> np.ndarray | None:
    """Which channels may be mixed: equal labels iff no wall separates them and `mixed` (one number each) is equal."""
    if not walls and not mixed.any():
        return None
    mixed = mixed.copy()
    for element, axes_dims, all_axes in walls:
        places = [axis for axis, _ in axes_dims]
        dims = [dim for _, dim in axes_dims]
        grid = np.indices(dims).reshape(len(dims), -1)
        for axes in all_axes:
            chosen = [places.index(a) for a in axes]
            wall = np.ravel_multi_index([grid[p] for p in chosen], [dims[p] for p in chosen])
            salt = np.array([_hash(element, *axes, int(w)) for w in range(int(wall.max()) + 1)], np.uint64)
            np.add.at(mixed, classes[element], salt[wall])
    _, first, label = np.unique(mixed, return_index=True, return_inverse=True)
    label = _ranked(first)[label]
    return label if label.any() else None


def grouped(search: Search, links: Sequence[LinkRecord]) -> list[tuple[list[int], list[LinkRecord]]]:
    """The components of the elements, each with its links."""
    found = components(len(search.members), links)
    home = np.empty(len(search.members), np.int64)
    for number, elements in enumerate(found):
        home[elements] = number
    of = home.tolist()
    own: list[list[LinkRecord]] = [[] for _ in found]
    for link in links:
        own[of[link[0]]].append(link)
    return list(zip(found, own, strict=True))


class Chooser:
    """Settles every choice of a search; `links` are the links that were chosen."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.links: list[LinkRecord] = []
        self.parent: list[int] = []
        self.dead: list[bool] = []
        self.waiting: list[int] = []  # choices that are open at the part
        self.of: dict[int, list[int]] = {}
        self.settled: dict[tuple[Node, Axes], frozenset[Port]] = {}

    def run(self) -> None:
        search = self.search
        if not search.choices:
            return
        refiner = Refiner(search)
        for elements, links in grouped(search, search.links):
            for part in refiner.parts(elements, links):
                number = len(self.parent)
                self.parent.append(number)
                self.dead.append(any(e in search.blocked for e in part.atoms))
                self.waiting.append(0)
                for element in part.atoms:
                    self.of.setdefault(element, []).append(number)
        for choice in search.choices:
            for p in self.of[choice.element]:
                self.waiting[p] += 1
        # options that end in constants or draw in nothing open first, then the rest, then blocked elements
        rest = [c for c in search.choices if self._alive(c.element)]
        for _ in range(2):
            rest = [c for c in rest if not self._settle(c, easy=True)]
        for choice in rest:
            self._settle(choice, easy=False)
        for choice in search.choices:
            if not self._alive(choice.element):
                self._settle_blocked(choice)

    def _find(self, p: int) -> int:
        parent = self.parent
        while parent[p] != p:
            parent[p] = parent[parent[p]]
            p = parent[p]
        return p

    def _alive(self, element: int) -> bool:
        dead = self.dead
        return not any(dead[self._find(p)] for p in self.of[element])

    def _spot(self, choice: Choice) -> tuple[Node, Axes]:
        value = choice.node.port(choice.port)
        assert value is not None
        assert value.rank is not None
        rank = value.rank
        return choice.node, tuple(a - rank for a in self.search.members[choice.element].axes)

    def _block(self, choice: Choice) -> None:
        found = self.search.blocked[choice.element]
        if all((node, port) != (choice.node, choice.port) for node, port, _ in found):
            found.append((choice.node, choice.port, choice.reason))
        for p in self.of[choice.element]:
            self.dead[self._find(p)] = True

    def _agreed(self, choice: Choice, spot: tuple[Node, Axes]) -> bool:
        """True if another port of the node has chosen what this one wants too."""
        ports = self.settled[spot]
        return any(frozenset({choice.port, *(k.port for k, _ in o.targets)}) == ports for o in choice.options)

    def _settle(self, choice: Choice, easy: bool) -> bool:
        """Settle one choice; False: later."""
        if not self._alive(choice.element):
            return True
        spot = self._spot(choice)
        if spot in self.settled:
            if not self._agreed(choice, spot):
                self._block(choice)
            return True
        fallback: Option | None = None
        mine = {self._find(p) for p in self.of[choice.element]}
        for option in choice.options:
            if not all(self._alive(t) for _, t in option.targets):
                continue
            roots = {self._find(p) for _, t in option.targets for p in self.of[t]}
            if not any(self.waiting[p] > 1 for p in roots - mine):
                self._take(choice, option, spot)
                return True
            fallback = fallback or option
        if easy:
            return False
        if fallback is not None:
            self._take(choice, fallback, spot)
        else:
            self._block(choice)
        return True

    def _settle_blocked(self, choice: Choice) -> None:
        """A blocked element draws in constants only: an explicit op can then stand on this edge."""
        spot = self._spot(choice)
        if spot in self.settled and self._agreed(choice, spot):
            return
        members = self.search.members
        for option in choice.options if spot not in self.settled else ():
            if all(members[t].is_constant and self._alive(t) for _, t in option.targets):
                self._take(choice, option, spot)
                return
        self._block(choice)

    def _take(self, choice: Choice, option: Option, spot: tuple[Node, Axes]) -> None:
        search = self.search
        self.settled[spot] = frozenset({choice.port, *(k.port for k, _ in option.targets)})
        if option.carry.block_axes:
            search.walls.append((choice.element, option.carry.block_axes))
        if option.carry.positive:
            search.positive.add(choice.element)
        for link, target in option.targets:
            self.links.append((choice.element, target, link.pairs, link.variance))
            mine, theirs = self.of[choice.element], self.of[target]
            if len(mine) == len(theirs):
                for p, q in zip(mine, theirs, strict=True):
                    self._union(p, q)
            else:
                for p in mine:
                    for q in theirs:
                        self._union(p, q)

    def _union(self, p: int, q: int) -> None:
        p, q = self._find(p), self._find(q)
        if p != q:
            self.parent[q] = p
            self.dead[p] = self.dead[p] or self.dead[q]
            self.waiting[p] += self.waiting[q]
