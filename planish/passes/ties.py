"""Constants that write a space and read from it too: an embedding table that is the head's weight as well.

One constant carries one transform. Where a transform must stop between the two, the readers need a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from planish.ir.graph import Graph, Node
from planish.ir.ops.base import Act, Axes, Carry, Port
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import Space


@dataclass(frozen=True)
class Tie:
    """A constant, by name, and the results (by name) of the nodes that read a space with it; others write one."""

    name: str
    readers: tuple[str, ...]


def tied(space: Space) -> list[Tie]:
    """The constants of a space that some nodes write it with and others read it with."""
    found = []
    for member in space.constants:
        value = member.value
        if value is None or member.private:
            continue
        uses = [(n, i) for n in dict.fromkeys(value.users) for i, v in enumerate(n.operands) if v is value]
        readers = [node for node, port in uses if _reads(node, port, member.axes)]
        if readers and len(readers) < len(uses):
            found.append(Tie(value.name, tuple(node.result.name for node in readers)))
    return list(dict.fromkeys(found))


def shared(space: Space) -> list[Tie]:
    """The constants of a space that several nodes use: the first, and all others as the readers of a tie."""
    found = []
    for member in space.constants:
        users = [] if member.value is None or member.private else list(dict.fromkeys(member.value.users))
        if member.value is not None and len(users) > 1:
            found.append(Tie(member.value.name, tuple(node.result.name for node in users[1:])))
    return list(dict.fromkeys(found))


def _reads(node: Node, port: Port, axes: Axes) -> bool:
    """True if the constant at `port` contracts these axes with another operand."""
    relation = node.op.relate(node, Act.LINEAR, port, axes)
    return isinstance(relation, Carry) and any(k.port >= 0 and k.variance < 0 for k in relation.links)


def copy_name(tie: Tie) -> str:
    """The name of the copy, if it is free."""
    return f"{tie.name}.untied"


def untie(graph: Graph, ties: Iterable[Tie]) -> list[str]:
    """Give the readers of each tie a copy of the constant. Returns a line for each: what it costs."""
    lines = []
    rewriter = Rewriter(graph)
    for tie in ties:
        value = graph.values[tie.name]
        assert value.constant is not None
        copy = rewriter.constant(value.constant, copy_name(tie))
        for name in tie.readers:
            node = graph.values[name].producer
            assert node is not None
            for index, operand in enumerate(node.operands):
                if operand is value:
                    rewriter.set_operand(node, index, copy)
        readers = ", ".join(f"%{n}" for n in tie.readers)
        lines.append(f"%{tie.name} untied for {readers}: a copy of {value.constant.nbytes} bytes")
    return lines


def untie_where_it_helps(
    graph: Graph, wanted: Mapping[str, Sequence[Tie]], attempts: Callable[[Graph], Callable[[Node], object]]
) -> list[str]:
    """Untie what keeps nodes from being rewritten, if untying it helps: tried on a copy of the graph.

    Args:
        wanted: the name of a node's result -> the ties that are in its way.
        attempts: of the copy, with everything untied, a function that raises `Declined` for a node that still cannot be
            rewritten.

    Returns:
        a note on each constant untied.
    """
    if not wanted:
        return []
    trial = graph.clone()
    untie(trial, dict.fromkeys(tie for ties in wanted.values() for tie in ties))
    attempt = attempts(trial)
    helped: dict[Tie, None] = {}
    for name, ties in wanted.items():
        node = trial.values[name].producer
        assert node is not None
        with suppress(Declined):
            attempt(node)
            helped.update(dict.fromkeys(ties))
    return untie(graph, helped)
