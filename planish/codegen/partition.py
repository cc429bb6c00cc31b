"""Groups of nodes that may become one node each: joined only while the graph of groups keeps no cycle.

Every node starts as a group of its own. Two regions can each be convex and still read each other; so a join is
judged on the graph in which all groups so far are single nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from planish.ir.graph import Graph, Node


class Partition:
    """A partition of a graph's nodes whose quotient is acyclic."""

    def __init__(self, graph: Graph) -> None:
        self.nodes: list[Node] = list(graph.nodes)
        self.place: dict[Node, int] = {node: index for index, node in enumerate(self.nodes)}
        self._group: dict[Node, int] = dict(self.place)
        self._members: dict[int, list[Node]] = {index: [node] for node, index in self.place.items()}

    def group(self, node: Node) -> int:
        """The number of the group that a node is in."""
        return self._group[node]

    def members(self, node: Node) -> list[Node]:
        """The nodes of a node's group, in the order of the graph."""
        return self._members[self._group[node]]

    def together(self, nodes: Iterable[Node]) -> list[Node]:
        """The members of the groups of these nodes, in the order of the graph."""
        groups = {self._group[node] for node in nodes}
        return sorted((node for group in groups for node in self._members[group]), key=self.place.__getitem__)

    def can_join(self, nodes: Collection[Node]) -> bool:
        """True if the groups of these nodes as one group leave the quotient acyclic."""
        groups = {self._group[node] for node in nodes}
        last = max(self.place[self._members[group][-1]] for group in groups)
        waiting = [group for group in self._next(groups) if group not in groups]
        seen = set(waiting)
        while waiting:
            group = waiting.pop()
            if self.place[self._members[group][0]] > last:
                continue  # nothing behind it is read by a member
            for following in self._next((group,)):
                if following in groups:
                    return False
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
        return True

    def join(self, nodes: Collection[Node]) -> bool:
        """Make one group of the groups of these nodes; False, and nothing is done, if that would close a cycle."""
        groups = {self._group[node] for node in nodes}
        if len(groups) < 2:
            return True
        if not self.can_join(nodes):
            return False
        joined = self.together(nodes)
        kept = min(groups)
        for group in groups:
            del self._members[group]
        self._members[kept] = joined
        for node in joined:
            self._group[node] = kept
        return True

    def ordered(self, apart: Collection[Node]) -> list[list[Node]]:
        """The groups in topological order: those with a node of `apart`, and the others, in runs as long as can be."""
        apart = set(apart)
        missing = {
            group: len(
                {self._group[v.producer] for n in members for v in n.operands if v is not None and v.producer} - {group}
            )
            for group, members in self._members.items()
        }
        ready: tuple[list[int], list[int]] = ([], [])

        def add(group: int) -> None:
            ready[any(node in apart for node in self._members[group])].append(group)

        for group in sorted(self._members):
            if not missing[group]:
                add(group)
        found: list[list[Node]] = []
        kind = 0
        while ready[0] or ready[1]:
            kind = kind if ready[kind] else 1 - kind
            queue = ready[kind]
            queue.sort(key=self._rank, reverse=True)
            group = queue.pop()
            found.append(self._members[group])
            for following in sorted({g for g in self._next((group,)) if g != group}):
                missing[following] -= 1
                if not missing[following]:
                    add(following)
        assert len(found) == len(self._members), "the groups read each other"
        return found

    def _rank(self, group: int) -> int:
        return self.place[self._members[group][-1]]

    def _next(self, groups: Iterable[int]) -> Sequence[int]:
        """The groups that read what these make."""
        return [
            self._group[user]
            for group in groups
            for node in self._members[group]
            for result in node.results
            for user in result.users
        ]
