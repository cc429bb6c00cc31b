"""Patterns: what the raising rules share.

A rule matches backwards (or forwards) from an anchor node and says at which of its steps it fell down:
`Trail` keeps the furthest miss, which the pass reports. Matching looks through `identity` and casts
between floats, takes commuted operands either way, and reads scalars from constants of one element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Attribute, Graph, Node, Value
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.types import WIDE_FLOATS
from planish.passes.base import Context, PassReport, RewritePass, place


@dataclass
class Trail:
    """How far the rule `rule` of `steps` steps got at `root`."""

    rule: str
    steps: int
    root: Node
    depth: int = -1
    what: str = ""
    where: Node | Value | None = None

    def miss(self, depth: int, what: str, where: Node | Value | None = None) -> Site | None:
        """It broke at `where`, after `depth` steps. Returns None: what a failed match returns."""
        if depth > self.depth:
            self.depth, self.what, self.where = depth, what, where
        return None

    def __str__(self) -> str:
        broke = f" at {place(self.where)}" if self.where is not None else ""
        steps = f"{self.depth} of {self.steps} steps matched"
        return f"{self.rule}: {steps} for {place(self.root)}; {self.what}{broke}"


@dataclass(frozen=True)
class Rule:
    """A pattern and what it becomes.

    Attributes:
        name: of the rule, for reports.
        anchors: the ops at which `match` starts.
        steps: the number of steps of the pattern.
        match: finds the parts, or None with the miss noted in the trail. It changes nothing.
        apply: rewrites what `match` found; raises `Declined` where that is unsafe.
    """

    name: str
    anchors: frozenset[str]
    steps: int
    match: Callable[[Node, Trail], Any | None]
    apply: Callable[[Any, Rewriter], None]


@dataclass(frozen=True)
class PatternPass(RewritePass):
    """A pass made of rules. After it ran, it reports the nearest miss of each rule."""

    rules: ClassVar[tuple[Rule, ...]]

    def rewrite(self, node: Node, rewriter: Rewriter, context: Context) -> bool:
        for rule in self.rules:
            if node.op.name in rule.anchors:
                found = rule.match(node, Trail(rule.name, rule.steps, node))
                if found is not None:
                    rule.apply(found, rewriter)
                    return True
        return False

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = super().run(graph, context)
        least = 0.5 if report.applied else 0.0  # a pass that did something reports near misses only
        for rule in self.rules:
            best: Trail | None = None
            for node in graph.nodes:
                if node.op.name in rule.anchors:
                    trail = Trail(rule.name, rule.steps, node)
                    if rule.match(node, trail) is None and trail.depth > (best.depth if best else 0):
                        best = trail
            if best is not None and best.depth >= least * rule.steps:
                report.misses.append(str(best))
            elif best is None and not report.applied:
                report.misses.append(f"{rule.name}: no candidate among {', '.join(sorted(rule.anchors))}")
        return report


# -- reading -----------------------------------------------------------------------------------------


def attribute(node: Node, name: str) -> Any:
    """An attribute, or its default."""
    value: Attribute = node.attributes.get(name)
    return node.op.attributes.get(name) if value is None else value


def is_op(value: Value | None, *names: str) -> bool:
    """True if the value is the (first) result of one of these ops."""
    return value is not None and value.producer is not None and value.producer.op.name in names


def origin(value: Value) -> Value:
    """The value seen through identities and casts between floats."""
    while (node := value.producer) is not None:
        source = node.operand(0)
        if source is None or not (
            node.op.name == "identity" or (node.op.name == "cast" and {source.dtype, value.dtype} <= WIDE_FLOATS)
        ):
            break
        value = source
    return value


def same(one: Value | None, two: Value | None) -> bool:
    """True if both are the same tensor but for casts between floats."""
    return one is not None and two is not None and origin(one) is origin(two)


def scalar(value: Value | None) -> float | None:
    """The number in a float or integer constant of one element."""
    if value is None:
        return None
    constant = origin(value).constant if origin(value).is_constant else None
    if constant is None or constant.size != 1 or constant.dtype in ("str", "c64", "c128"):
        return None
    return float(constant.wide().reshape(()))


def near(value: float | None, number: float, tolerance: float = 1e-12) -> bool:
    """True if a constant is a number up to a relative tolerance."""
    return value is not None and math.isclose(value, number, rel_tol=tolerance, abs_tol=1e-300)


def both(node: Node) -> Iterator[tuple[Value, Value]]:
    """The operands of a commutative node, either way round."""
    one, two = node.operand(0), node.operand(1)
    if one is not None and two is not None:
        yield one, two
        if one is not two:
            yield two, one


def factor_of(node: Node) -> tuple[Value, float] | None:
    """(x, s) of a node s x or x / (1 / s)."""
    one, two = node.operand(0), node.operand(1)
    if one is None or two is None:
        return None
    if node.op.name == "div":
        number = scalar(two)
        return (one, 1.0 / number) if number else None
    if node.op.name == "mul":
        for x, other in both(node):
            number = scalar(other)
            if number is not None:
                return x, number
    return None


def with_constant(node: Node) -> tuple[Value, Value] | None:
    """(the other operand, the constant) of a commutative node with exactly one constant operand."""
    for one, two in both(node):
        if two.is_constant and not one.is_constant:
            return one, two
    return None


def is_output(value: Value) -> bool:
    graph = value.producer.graph if value.producer is not None else None
    return graph is not None and any(v is value for v in graph.output_values())


def only_reader(value: Value) -> Node | None:
    """The one node that reads a value; None if several do, none does, or it is an output."""
    readers = dict.fromkeys(value.users)
    return next(iter(readers)) if len(readers) == 1 and not is_output(value) else None


def last_axis_vector(constant: Constant, size: int) -> np.ndarray | None:
    """The float64 data [size] of a constant that broadcasts along the last axis only; None for any other."""
    if constant.size not in (1, size) or any(d != 1 for d in constant.shape[:-1]):
        return None
    return np.array(np.broadcast_to(constant.wide().reshape(-1), (size,)))


def nan_guarded(value: Value) -> Value | None:
    """p of where(is_nan(p), 0, p)."""
    node = value.producer
    if node is None or node.op.name != "where":
        return None
    condition, zero, kept = node.operands
    test = condition.producer if condition is not None else None
    if kept is None or test is None or test.op.name != "is_nan" or scalar(zero) != 0.0:
        return None
    return kept if test.operand(0) is kept else None


def widens(addend: Value, value: Value) -> bool:
    """True if adding it to a value may give that more axes or larger dims."""
    if addend.shape is None or value.shape is None or len(addend.shape) > len(value.shape):
        return True
    pairs = zip(reversed(addend.shape), reversed(value.shape), strict=False)
    return any(have == 1 != dim for dim, have in pairs)


# -- changing ----------------------------------------------------------------------------------------


def interior(root: Node, sources: Iterable[Value | None]) -> list[Node]:
    """The nodes between the sources (not included) and `root` (included), from the root on."""
    stops = {origin(v) for v in sources if v is not None} | {v for v in sources if v is not None}
    found: dict[Node, None] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found[node] = None
        for value in node.operands:
            if value is not None and value.producer is not None and not {value, origin(value)} & stops:
                stack.append(value.producer)
    return list(found)


def check_private(nodes: Iterable[Node], root: Node) -> None:
    """Raise `Declined` if anything outside of `nodes` reads a result of theirs other than the root's.

    Sizes may be read elsewhere: they cost nothing to keep.
    """
    inside = set(nodes)
    for node in inside - {root}:
        for result in node.results:
            if result.dtype in ("i64", "i32"):
                continue
            if is_output(result):
                raise Declined("an intermediate value is a graph output", node)
            if any(user not in inside for user in result.users):
                raise Declined("an intermediate value is read elsewhere", node)


@dataclass
class Site:
    """A matched subgraph: from `sources` to `root`, with what the rule found there."""

    root: Node
    sources: tuple[Value | None, ...]
    parts: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `Declined` unless the intermediate values are this subgraph's own."""
        check_private(interior(self.root, self.sources), self.root)

    def as_read(self, source: Value) -> Value:
        """The source as the subgraph reads it: behind a cast to the dtype of the root, if there is one."""
        for node in interior(self.root, self.sources):
            for value in node.operands:
                if value is not None and same(value, source) and value.dtype == self.root.result.dtype:
                    return value
        return source

    def supersede(self, rewriter: Rewriter, value: Value) -> None:
        """Replace the root by a new value, which takes over its name, and erase what became dead."""
        dead = interior(self.root, self.sources)
        dtype, name = self.root.result.dtype, self.root.result.name
        if dtype is not None and value.dtype != dtype:
            value = rewriter.insert("cast", [value], {"to": dtype}, before=self.root).result
        rewriter.replace_node(self.root, value)
        rewriter.rename(value, name)
        erase_dead(rewriter, dead)


def erase_dead(rewriter: Rewriter, nodes: Iterable[Node]) -> None:
    """Erase those of the nodes that nobody reads any more."""
    rest = [n for n in nodes if n.graph is not None]
    while True:
        dead = [n for n in rest if not any(r.users or is_output(r) for r in n.results)]
        if not dead:
            return
        for node in dead:
            rewriter.erase(node)
        rest = [n for n in rest if n.graph is not None]
