"""How many channels an outlier channel is split into, and the split itself, where it costs no op.

For `disassemble-channels` and `reassemble-channels`. X [rows, C] is what linears read, m_j = max |X_j|, and
T_j = max(1, ceil(m_j / theta)) the number of channels that channel j becomes, x_j / T_j each.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np

from planish.ir.absorb import absorb
from planish.ir.graph import Graph, Node, Value
from planish.ir.ops.base import Act
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import ChannelSpaces, Member, Space
from planish.ir.transform import Scale, Split
from planish.passes.base import Context

SPLIT = "split-channels"  # graph.meta: the values whose channels were split
AGAIN = "another split changed a tensor of the space: it is analysed again"


def choose_counts(largest: np.ndarray, threshold: float) -> np.ndarray:
    """T_j = max(1, ceil(m_j / threshold)), int [C]; the largest magnitudes are float64 [C]."""
    return np.maximum(1, np.ceil(largest / threshold)).astype(np.int64)


def choose_threshold(largest: np.ndarray, added: int) -> tuple[float, np.ndarray]:
    """The smallest theta that adds at most `added` channels, and its counts, int [C].

    One channel after the other goes to the channel with the largest m_j / T_j: no choice of as many makes the
    largest smaller. Channels of zeros are never split.
    """
    counts = np.ones(len(largest), np.int64)
    heap = [(-m, j) for j, m in enumerate(largest.tolist()) if m > 0]
    heapq.heapify(heap)
    for _ in range(added if heap else 0):
        _, j = heap[0]
        counts[j] += 1
        heapq.heapreplace(heap, (-float(largest[j]) / counts[j], j))
    return (-float(heap[0][0]) if heap else 0.0), counts


def split_values(graph: Graph) -> set[str]:
    """The names of the values whose channels a pass has split, of those that are still there."""
    names = graph.meta.get(SPLIT, ())
    return {n for n in names if isinstance(n, str) and n in graph.values} if isinstance(names, tuple) else set()


def remember_split(graph: Graph, value: Value) -> None:
    """Say that a pass has split the channels of a value."""
    graph.meta[SPLIT] = tuple(sorted(split_values(graph) | {value.name}))


@dataclass
class Splitter:
    """Splits channels of several sites after one analysis.

    Attributes:
        touched: the axes of tensors that have another size since the analysis.
    """

    rewriter: Rewriter
    context: Context
    spaces: ChannelSpaces
    touched: set[tuple[Value, int]] = field(default_factory=set)

    def scales(self, value: Value, axis: int, counts: np.ndarray) -> list[tuple[Space, Scale]]:
        """The scale spaces that make each copy 1 / T_j as large, counts given for each position of the axis.

        Raises:
            Declined: one of them is blocked.
        """
        found, covered = [], np.zeros(len(counts), np.bool_)
        for space in self.spaces.at(value, (axis,), Act.SCALE):
            space = self.context.guarded(self.rewriter.graph, space)
            factors = np.ones(space.size)
            for member in space.activations:
                if member.value is not value or member.axes != (axis,):
                    continue
                atoms = np.arange(space.size) if member.atoms is None else member.atoms
                inside = atoms >= 0
                covered |= inside
                factors[atoms[inside]] = counts[inside].astype(np.float64) ** -member.variance
            if (factors == 1).all():
                continue
            if space.blockers:
                raise Declined(space.blockers[0].reason, space.blockers[0].node or space.blockers[0].value)
            found.append((space, Scale(factors)))
        if (counts[~covered] > 1).any():
            raise Declined("no constants take up the scale of its channels", value)
        return found

    def stale(self, space: Space) -> bool:
        """True if a tensor of the space has another size than when the space was found."""

        def changed(member: Member) -> bool:
            value = member.current
            axes = range(value.rank or 0) if value is not None and member.private else member.axes
            return value is not None and any((value, axis) in self.touched for axis in axes)

        return any(map(changed, (*space.activations, *space.constants)))

    def split(self, space: Space, member: Member, counts: np.ndarray) -> None:
        """Split the channels of an admitted SPLIT space; those of its activation `member` become 1 / T_j as large.

        Args:
            counts: T_j of each channel of the space, int [space.size].

        Raises:
            Declined: the space or the scale of its channels is blocked, or has changed (`AGAIN`).
        """
        value = member.value
        assert value is not None
        if space.blockers:
            raise Declined(space.blockers[0].reason, space.blockers[0].node or space.blockers[0].value)
        transform = Split(counts)
        size = space.size if member.atoms is None else len(member.atoms)
        scales = self.scales(value, member.axes[0], transform.copies(member.atoms, size))
        if any(self.stale(s) for s in (space, *(s for s, _ in scales))):
            raise Declined(AGAIN, value)
        for scaled, scale in scales:
            absorb(self.rewriter, scaled, scale)
            self.context.transformed(self.rewriter, scaled, scale)
        absorb(self.rewriter, space, transform)
        self.context.transformed(self.rewriter, space, transform)
        for other in (*space.activations, *space.constants):
            if other.value is not None:
                self.touched.update((other.value, axis) for axis in other.axes)
        remember_split(self.rewriter.graph, value)


def blocked_by(space: Space) -> Node | Value | None:
    """Where the first blocker of a space stands."""
    blocker = space.blockers[0]
    return blocker.node or blocker.value
