"""The freedoms of a graph that no pass has used: what more a model would admit.

For each act: the channel spaces that are free (no op blocks them), and of these the ones in which no pass
applied a transform of that act. `Context.transformed`, through which every pass goes, says which those are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from planish.ir.graph import Graph
from planish.ir.ops.base import ACTS, Act, Axes
from planish.ir.spaces import ChannelSpaces, Space, analyse
from planish.passes.base import Exactness, Pass
from planish.passes.manager import Instrument
from planish.report.labels import label

Used = Mapping[Act, set[tuple[str, Axes]]]
EXAMPLES = 3
FREE = tuple(act for act in ACTS if act is not Act.SPLIT)  # a split makes weights wider


@dataclass(frozen=True)
class Freedom:
    """What one act leaves to be used.

    Attributes:
        act: the act.
        free: the number of spaces that admit it.
        unused: of these, the spaces in which no pass used it.
        channels: the channels in those.
        examples: where the largest of them lie, at most three.
    """

    act: str
    free: int
    unused: int
    channels: int
    examples: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        spaces = f"{self.unused} of {self.free} free spaces" if self.unused < self.free else f"{self.free} free spaces"
        return f"{self.act}: {spaces} unused ({self.channels} channels)"


def freedoms(
    graph: Graph,
    used: Used | None = None,
    *,
    spaces: ChannelSpaces | None = None,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, label: items,
) -> tuple[Freedom, ...]:
    """What passes could still do to a graph at no cost, an entry for each act.

    Args:
        graph: as it is now.
        used: what passes did to it (`Report.used`); None: nothing.
        spaces: an analysis of this graph that is already there.
        progress: wraps the loop over the acts in a progress bar.
    """
    found = spaces or analyse(graph)
    done = used or {}
    return tuple(_freedom(act, found.admitted(act), done.get(act, set())) for act in progress(FREE, "free spaces"))


def _freedom(act: Act, free: Sequence[Space], used: set[tuple[str, Axes]]) -> Freedom:
    free = [s for s in free if s.size > 1 and (s.constants or s.folds)]
    unused = [s for s in free if not used & s.key()]
    largest = sorted(unused, key=lambda s: -s.size)[:EXAMPLES]
    return Freedom(act.value, len(free), len(unused), sum(s.size for s in unused), tuple(map(_where, largest)))


def _where(space: Space) -> str:
    value = space.activations[0].value
    if value is None:
        return ""
    return label(value.producer) if value.producer is not None else f"input %{value.name}"


def summary(found: Iterable[Freedom]) -> str:
    """One line: what is left by act; empty if nothing is."""
    left = [f for f in found if f.unused]
    parts = [f"{f.act} {f.unused} of {f.free} ({f.channels} channels)" for f in left]
    return f"free and unused channel spaces: {', '.join(parts)}" if parts else ""


class FreedomInstrument(Instrument):
    """Keeps the graph as it is before the first pass that changes numbers on purpose: quantised weights hide spaces."""

    def __init__(self) -> None:
        self.graph: Graph | None = None

    def before(self, instance: Pass, graph: Graph) -> None:
        if self.graph is None and instance.exactness not in (Exactness.EXACT, Exactness.IDENTITY):
            self.graph = graph.clone()
