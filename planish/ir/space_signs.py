"""Which elements of a component carry T and which its inverse transpose, and elements that answer twice.

The last steps of `planish.ir.spaces`, after `planish.ir.space_refine`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from planish.ir.graph import Node
from planish.ir.ops.base import MIXING, Act, Axes, Carry, Fold, OneOf, Port
from planish.ir.space_refine import Part
from planish.ir.space_search import LinkRecord, Member, Search


def block_nested(search: Search, settled: Mapping[tuple[Node, Axes], frozenset[Port]]) -> None:
    """Block the elements on nested axes of one tensor that a node answers in two ways.

    They are one transform, seen on more axes or on fewer: a node that lets the one show on its result and
    undoes the other in an operand would carry it out twice. Elements on axes that cross (tied by one that holds
    both) leave one channel, and constants would take it up once for each. Permutations ask for every port that has
    the axis, so that both answers hold together.
    """
    if search.act is Act.PERMUTE:
        return
    members = search.members
    for value, numbers in search.by_value.items():
        if len(numbers) < 2 or (value.is_constant and len(value.users) < 2):
            continue
        for group in _overlapping([n for n in numbers if members[n].view is None], members):
            places = [(value.producer, ~value.producer.results.index(value))] if value.producer is not None else []
            places += [(u, i) for u in dict.fromkeys(value.users) for i, v in enumerate(u.operands) if v is value]
            sets = [set(members[n].axes) for n in group]
            if any(len(one | two) > max(len(one), len(two)) for one in sets for two in sets):
                for n in group:
                    search.blocked[n].append((None, 0, "it is on axes of this tensor that cross"))
                continue
            for node, port in places:
                answers = {_ports(search, settled, node, port, members[n].axes) for n in group} - {None}
                if len(answers) > 1:
                    for n in group:
                        search.blocked[n].append((node, port, "it meets nested axes of this tensor in two ways"))


def _overlapping(numbers: list[int], members: Sequence[Member]) -> list[list[int]]:
    """Groups of two or more elements whose axes meet, directly or through another."""
    groups: list[tuple[set[int], list[int]]] = []
    for number in numbers:
        axes, own = set(members[number].axes), [number]
        apart = []
        for others, inside in groups:
            if others & axes:
                axes |= others
                own += inside
            else:
                apart.append((others, inside))
        groups = [*apart, (axes, own)]
    return [own for _, own in groups if len(own) > 1]


def _ports(
    search: Search, settled: Mapping[tuple[Node, Axes], frozenset[Port]], node: Node, port: Port, axes: Axes
) -> frozenset[tuple[Port, int]] | None:
    """The other ports that carry the transform, each with its variance; None where the row says nothing new."""
    relation = search.questions.ask(search.answers, node, search.act, port, axes)
    if isinstance(relation, Carry):
        links = [k for k in relation.links if k.port != port and node.port(k.port) is not None]
        if relation.links and not links:
            return None  # ties within the port
        return frozenset((k.port, 1 if search.act is Act.ROTATE else k.variance) for k in links)
    if isinstance(relation, OneOf):
        value = node.port(port)
        assert value is not None and value.rank is not None
        rank = value.rank
        chosen = settled.get((node, tuple(a - rank for a in axes)))
        return None if chosen is None else frozenset((p, 0) for p in chosen if p != port)
    return frozenset({(port, 2)}) if isinstance(relation, Fold) else None


def signs(search: Search, elements: list[int], links: Sequence[LinkRecord]) -> dict[int, int] | None:
    """The variance of each element (+1 where missing; +1 at the first activation).

    None: they clash, and each atom needs a variance of its own (`AtomSigns`).
    """
    members = search.members
    if search.act in (
        Act.PERMUTE,
        Act.ROTATE,
    ):  # their own inverse transposes: only tell readers from writers
        readers = {two if members[two].is_constant else one for one, two, _, variance in links if variance < 0}
        return {e: -1 for e in readers if members[e].is_constant}
    if all(variance > 0 for _, _, _, variance in links):
        return {}
    near: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for one, two, _, variance in links:
        near[one].append((two, variance))
        near[two].append((one, variance))
    start = next((e for e in elements if not members[e].is_constant), elements[0])
    sign = {start: 1}
    stack = [start]
    while stack:
        element = stack.pop()
        for other, variance in near[element]:
            expected = sign[element] * variance
            if other not in sign:
                sign[other] = expected
                stack.append(other)
            elif sign[other] != expected:
                return None
    return sign


class AtomSigns:
    """The variance of each atom of a component whose elements hold channels of both kinds.

    A weight that makes queries and keys at once carries the transform on some rows and its inverse transpose
    on others. The double cover of the graph of atoms (each atom once as +, once as -) tells them apart: an
    atom whose two copies are connected meets its own inverse.
    """

    def __init__(self, search: Search, elements: list[int], links: Sequence[LinkRecord]) -> None:
        sizes = [search.sizes[e] for e in elements]
        self.starts = dict(zip(elements, np.cumsum([0, *sizes]).tolist(), strict=False))
        self.sizes = search.sizes
        self.mixing = search.act in MIXING
        self.total = sum(sizes)
        rows, columns = [], []
        for one, two, pairs, variance in links:
            mine, theirs = pairs if pairs is not None else (np.arange(search.sizes[one]), np.arange(search.sizes[two]))
            left, right = mine + self.starts[one], theirs + self.starts[two]
            crossed = 0 if variance > 0 else self.total
            rows += [left, left + self.total]
            columns += [right + crossed, right + self.total - crossed]
        row, column = np.concatenate(rows), np.concatenate(columns)
        cover = coo_array((np.ones(len(row), np.int8), (row, column)), shape=(2 * self.total, 2 * self.total))
        self.label = connected_components(cover, directed=False)[1]

    def of(self, part: Part, root: int) -> tuple[int | None, dict[int, np.ndarray]]:
        """The variance of each atom of a part, int8 by element: +1 at the first atom of each channel in `root`.

        Returns:
            an element where a channel meets its own inverse, or whose channels cannot be mixed alike (None if
            there is none), and the variances (0 at atoms outside of the part).
        """
        channels = {e: np.arange(self.sizes[e]) if atoms is None else atoms for e, atoms in part.atoms.items()}
        first = np.zeros(part.size, np.int64)
        own = channels[root]
        places = np.flatnonzero(own >= 0)[::-1]
        first[own[places]] = places + self.starts[root]
        clash, found = None, {}
        for element, channel in channels.items():
            atom = np.arange(len(channel)) + self.starts[element]
            inside = channel >= 0
            base = first[np.where(inside, channel, 0)]
            sign = np.where(self.label[atom] == self.label[base], 1, -1)
            sign = np.where(inside, sign, 0).astype(np.int8)
            if (inside & (self.label[atom] == self.label[atom + self.total])).any():
                clash = element
            if self.mixing:
                pattern = sign[inside][np.argsort(channel[inside], kind="stable")].reshape(part.size, -1)
                if (pattern != pattern[0]).any():
                    clash = element
            found[element] = sign
        return clash, found
