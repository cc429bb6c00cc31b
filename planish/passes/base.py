"""What a pass is.

A pass is a frozen dataclass: its fields are its options. It has no state; `run` edits the graph it
is given through a rewriter and returns a `PassReport`. How exact it claims to be decides how the
manager checks it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from planish.ir.graph import Graph, Node, Value
from planish.ir.ops.base import Act, Axes
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import Blocker, Member, Space
from planish.ir.stats import Stats
from planish.ir.transform import Mix, Transform

ROTATED = "rotated-norms"  # graph.meta: the results of the norms whose operand was rotated
NORMS = frozenset({"rms_norm", "layer_norm"})
KEPT = "kept-float"  # graph.meta: the results of linears that stay in float when the rest is quantised
MOVED = "moved-channels"  # graph.meta: what linears read and give whose channels a pass transformed
FOLDED = "its gain was folded for a rotation: a scale would return into it"


def rotated_norms(graph: Graph) -> set[str]:
    """The names of the results of norms that read a rotated stream, of those that are still there."""
    return _names(graph, ROTATED)


def _names(graph: Graph, key: str) -> set[str]:
    """The names of values under a key of graph.meta, of those that are still there."""
    names = graph.meta.get(key, ())
    assert isinstance(names, tuple)
    return {name for name in names if isinstance(name, str) and name in graph.values}


def kept_float(graph: Graph) -> set[str]:
    """The names of the results of linears that stay in float: low-rank branches, outlier columns."""
    return _names(graph, KEPT)


def moved_channels(graph: Graph) -> set[str]:
    """The names of what linears read and give that are not what the model made: a pass scaled, rotated, ... them."""
    return _names(graph, MOVED)


def keep_float(graph: Graph, result: Value) -> None:
    """Say that the linear which makes `result` stays in float."""
    graph.meta[KEPT] = tuple(sorted({*kept_float(graph), result.name}))


def _gain_of(member: Member, names: set[str]) -> list[Node]:
    """The norms among those of `names` whose gain the member is."""
    readers = [member.node, *(member.value.users if member.value is not None else ())]
    if member.value is None and member.port != 1:
        return []
    return [n for n in readers if n is not None and n.result.name in names and n.operand(1) is member.value]


class Exactness(Enum):
    """What a pass promises about the function of the graph."""

    IDENTITY = "identity"  # the same operations in another form: checked like EXACT
    EXACT = "exact"  # equal over the reals: validated in float64, relative error <= 1e-10
    BOUNDED = "bounded"  # differs by no more than a stated bound
    LOSSY = "lossy"  # changes numbers on purpose: reports the error per site


@dataclass
class PassReport:
    """What a pass did.

    Attributes:
        name: the pass.
        applied: a line per site.
        declined: reason -> the places, for sites that were this pass's business but unsafe.
        misses: for rules that matched nothing: how far the best candidate got.
        inserted: ops added to the graph.
        notes: anything else the user should know.
        figures: named numbers (errors, chosen strengths), by site where that makes sense.
        seconds, error: filled in by the manager.
    """

    name: str
    applied: list[str] = field(default_factory=list)
    declined: dict[str, list[str]] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)
    inserted: int = 0
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    error: float | None = None
    checked_narrow: int = 0

    def decline(self, reason: str, where: Node | Value | str | None) -> None:
        """Record a refusal with its place."""
        self.declined.setdefault(reason, []).append(place(where))

    def reasons(self) -> Counter[str]:
        return Counter({reason: len(places) for reason, places in self.declined.items()})

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def place(where: Node | Value | str | None) -> str:
    """A short name of a node or value for reports: `mul %42 (model.layers.0.mlp.act)`."""
    if where is None:
        return ""
    if isinstance(where, str):
        return where
    if isinstance(where, Value):
        return f"%{where.name}" if where.producer is None else place(where.producer)
    name = f" %{where.results[0].name}" if where.results else ""
    return f"{where.op.name}{name}" + (f" ({where.source})" if where.source else "")


@dataclass
class Context:
    """What a pass may read besides the graph.

    Attributes:
        stats: calibration statistics; passes that transform values keep them true.
        seed: for every random choice.
        progress: `progress(iterable, label, total)` wraps a long loop in a progress bar.
        used: for each act the axes of values that were transformed, by the value's name.
        data: the calibration batches, for passes that evaluate the graph; None: there are none.
        row_mask: the input that is non-zero where a row of `data` counts; None: every row does.
    """

    stats: Stats | None = None
    seed: int = 0
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, label: items
    used: dict[Act, set[tuple[str, Axes]]] = field(default_factory=dict)
    data: Sequence[Mapping[str, Any]] | None = None
    row_mask: str | None = None

    def guarded(self, graph: Graph, space: Space) -> Space:
        """The space as a diagonal transform may use it: without the gains of norms that read a rotated stream.

        Such a gain was folded so that the stream could be rotated; a scale must not come back into it. The space
        is then blocked behind these norms, where an explicit op can stand. Equal to `space` if there are none.
        """
        names = rotated_norms(graph)
        if space.act is not Act.SCALE or not names:
            return space
        norms = {m: folded for m in space.constants if (folded := _gain_of(m, names))}
        if not norms:
            return space
        results = {node.result: node for folded in norms.values() for node in folded}
        behind = [
            Blocker(results[m.value], -1, m.value, m.axes, FOLDED, m.variance, m.atoms)
            for m in space.activations
            if m.value in results
        ]
        kept = [m for m in space.constants if m not in norms]
        return dataclasses.replace(space, constants=kept, blockers=[*space.blockers, *behind])

    def transformed(self, rewriter: Rewriter, space: Space, transform: Transform) -> None:
        """Tell the statistics that a space was transformed by that rewriter, and the graph where, and which norms."""
        self.used.setdefault(transform.act, set()).update(space.key())
        held = [rewriter.behind.get(m.value, m.value) for m in space.activations if m.value is not None]
        linears = {v.name for v in held if any(n.op.name == "linear" for n in (v.producer, *v.users) if n is not None)}
        if linears:
            rewriter.graph.meta[MOVED] = tuple(sorted(moved_channels(rewriter.graph) | linears))
        if isinstance(transform, Mix) and transform.orthogonal:
            streams = [m.value for m in space.activations if m.value is not None]
            norms = {n.result.name for v in streams for n in v.users if n.op.name in NORMS and n.operands[0] is v}
            if norms:
                rewriter.graph.meta[ROTATED] = tuple(sorted(rotated_norms(rewriter.graph).union(norms)))
        if self.stats is None:
            return
        whole = {id(m.value) for m in space.activations if len(m.axes) == 1}
        for member in space.activations:
            value = member.value
            assert value is not None and value.rank is not None
            if len(member.axes) > 1 and id(value) in whole:
                continue  # tied to the member on one of these axes
            name = value.name
            if value in rewriter.behind:  # it stays as it was: the value behind the explicit op is transformed
                name = rewriter.behind[value].name
                if value.name in self.stats:
                    self.stats.channels[name] = self.stats.of(value.name)
            self.stats.transform(name, value.rank, member.axes, transform, member.atoms, member.variance)


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses are frozen dataclasses with class attributes:

    name: the name in pipelines. exactness: the promise. needs / gives / breaks: facts about the graph that
    must hold before, hold after, or hold no longer after (see `planish.passes.manager`). final: nothing but
    a pass of its own kind may follow it.
    """

    name: ClassVar[str]
    exactness: ClassVar[Exactness]
    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()
    final: ClassVar[bool] = False

    @property
    def needs_stats(self) -> bool:
        """True if it cannot run without statistics; a pass for which its options decide overrides the property."""
        return False

    @property
    def reads_data(self) -> bool:
        """True if it evaluates the graph on calibration batches where there are some (`Context.data`)."""
        return False

    def __post_init__(self) -> None:
        from planish.passes.options import check_options

        check_options(self)

    def run(self, graph: Graph, context: Context) -> PassReport:
        """Edit `graph` and say what was done."""
        raise NotImplementedError  # abstract: every pass defines it

    def __str__(self) -> str:
        from planish.passes.pipeline import print_pass

        return print_pass(self)


class RewritePass(Pass):
    """A pass that looks at one node at a time: `rewrite` returns True where it did something.

    *Not mine* returns False; *mine but unsafe* raises `Declined`. The nodes are those at the start of a
    round; rounds repeat until nothing changes.
    """

    rounds: ClassVar[int] = 8

    def rewrite(self, node: Node, rewriter: Rewriter, context: Context) -> bool:
        raise NotImplementedError  # abstract: every pass defines it

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        declined: dict[str, tuple[str, Node | Value | str | None]] = {}
        for _ in range(self.rounds):
            changed = False
            declined.clear()
            with Rewriter(graph) as rewriter:
                for node in list(graph.nodes):
                    if node.graph is None:
                        continue
                    where = place(node)
                    try:
                        if self.rewrite(node, rewriter, context):
                            report.applied.append(where)
                            changed = True
                    except Declined as refusal:
                        declined[where] = (str(refusal), refusal.node if refusal.node is not None else node)
            if not changed:
                break
        for reason, node_or_value in declined.values():
            report.decline(reason, node_or_value)
        return report
