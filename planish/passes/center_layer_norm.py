"""Turn layer norms into RMS norms by centring everything that writes what they read.

    LN(x; g, b) = RMS(C x; g, b),    C = I - 11'/n    the mean over the channels taken off

C is linear, so that the weights, biases and embeddings that write x can take it up:

    W' = C W    b' = C b    E' = E C        then the mean of x is 0, its variance E[x^2], and LN is RMS

Exact over the reals, with the same eps. Allowed where x lies in a space that only constants write, that a linear map
passes through, and whose readers all subtract the mean themselves; else a reader would miss it: a linear straight from
the residual stream, a graph output. Where a norm writes the stream (post-norm), its gain stands in the way of C.
A table that is both embedding and head would be centred as a writer and must not be as a reader: `untie` gives the
head a copy.
Afterwards a rotation passes the norm. SliceGPT, arXiv:2401.15024, section 3.3; QuaRot, arXiv:2404.00456.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from planish.ir.absorb import absorb
from planish.ir.graph import Graph, Node, Value
from planish.ir.ops.base import Act, Axes, Block, Carry, OneOf, Port, normal_axis
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import ChannelSpaces, Space, analyse
from planish.ir.transform import Mix
from planish.passes.base import Context, Exactness, Pass, PassReport, place
from planish.passes.channels import title
from planish.passes.finite import require_finite_space
from planish.passes.match import attribute
from planish.passes.ties import Tie, tied, untie_where_it_helps


def centring(size: int) -> Mix:
    """C = I - 11'/n. It is no invertible map: only what carries T itself (never its inverse) may be given it."""
    matrix = np.eye(size) - 1.0 / size
    return Mix([(np.arange(size), matrix)], size, orthogonal=False)


@dataclass(frozen=True)
class CenterLayerNorm(Pass):
    """Layer norms become RMS norms where all that writes their input can be centred.

    Args:
        untie: where a constant that writes the norm's input also reads from the stream (a tied head), give the readers
            a copy, if that is what it takes.
    """

    untie: bool = False

    name = "center-layer-norm"
    exactness = Exactness.EXACT

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        norms = [n for n in graph.nodes if n.op.name == "layer_norm"]
        if not norms:
            count = sum(n.op.name == "rms_norm" for n in graph.nodes)
            report.misses.append(f"no layer_norm: {count} RMS norms subtract no mean and are left alone")
            return report
        if self.untie:
            report.notes += _untie(graph, norms)
        spaces = analyse(graph)
        centred: set[int] = set()
        with Rewriter(graph) as rewriter:
            for norm in norms:
                try:
                    space = _space_of(norm, spaces)
                    if id(space) not in centred:
                        _check(space)
                        require_finite_space(space)
                        transform = centring(space.size)
                        absorb(rewriter, replace(space, act=Act.LINEAR, blockers=[]), transform)
                        context.transformed(rewriter, space, transform)
                        centred.add(id(space))
                        report.notes.append(f"%{title(space)}: {len(space.constants)} constants centred")
                except Declined as refusal:
                    report.decline(refusal.reason, refusal.node if refusal.node is not None else norm)
                    continue
                report.applied.append(place(norm))
                _rewrite(rewriter, norm)
        return report


def _untie(graph: Graph, norms: list[Node]) -> list[str]:
    """Untie what keeps a norm from being centred, if untying it helps: tried on a copy of the graph."""
    spaces = analyse(graph)
    wanted: dict[str, list[Tie]] = {}
    for norm in norms:
        with suppress(Declined):
            ties = tied(_space_of(norm, spaces))
            if ties:
                wanted[norm.result.name] = ties

    def attempts(trial: Graph) -> Callable[[Node], None]:
        untied = analyse(trial)
        return lambda norm: _check(_space_of(norm, untied))

    return untie_where_it_helps(graph, wanted, attempts)


def _space_of(norm: Node, spaces: ChannelSpaces) -> Space:
    """The space of what a norm reads.

    Raises:
        Declined: it normalises several axes, or its channels lie in no space or in several.
    """
    x = norm.operands[0]
    if x is None or x.rank is None:
        raise Declined("the rank of its input is not known", norm)
    if normal_axis(int(attribute(norm, "axis")), x.rank) != x.rank - 1:
        raise Declined("it normalises over several axes", norm)
    if x.is_constant or x.is_input:
        raise Declined("its input is no result of the graph, whose mean could be taken off", norm)
    found = spaces.at(x, (x.rank - 1,), Act.ROTATE)
    if len(found) != 1 or found[0].size != x.shape[x.rank - 1]:  # type: ignore[index]
        raise Declined("its channels lie in no one space that linear maps pass through", norm)
    return found[0]


def _check(space: Space) -> None:
    """Raise `Declined` unless C may be given to the space."""
    ties = tied(space)
    if ties:
        raise Declined(f"the tied %{ties[0].name} writes the stream and reads from it: untie=true copies it")
    if len(space.blocks) > 1:
        raise Declined("its channels cannot be mixed freely", space.activations[0].value)
    for member in space.activations:
        assert member.value is not None
        for node, port in _ports(member.value):
            if _subtracts(node, port, member.axes):
                continue
            relation = node.op.relate(node, Act.LINEAR, port, member.axes)
            if isinstance(relation, Block):
                raise Declined(_reason(node, port, relation.reason), node)
            carries = relation.options if isinstance(relation, OneOf) else (relation,)
            if any(isinstance(c, Carry) and any(link.variance < 0 for link in c.links) for c in carries):
                raise Declined("it reads the stream without a norm that takes the mean off", node)
    for blocker in space.blockers:
        if blocker.node is None:
            raise Declined(f"{blocker.reason}: its mean may be wanted there", blocker.value)
        if not _subtracts(blocker.node, blocker.port, blocker.axes):
            raise Declined(_reason(blocker.node, blocker.port, blocker.reason), blocker.node)


def _reason(node: Node, port: Port, reason: str) -> str:
    if port < 0 and node.op.name in ("layer_norm", "rms_norm"):
        return "a norm writes the stream, and its gain stands before the mean"
    return reason


def _ports(value: Value) -> Iterator[tuple[Node, Port]]:
    """Where a value is written and read."""
    if value.producer is not None:
        yield value.producer, ~value.producer.results.index(value)
    for node in dict.fromkeys(value.users):
        for index, operand in enumerate(node.operands):
            if operand is value:
                yield node, index


def _subtracts(node: Node, port: Port, axes: Axes) -> bool:
    """True for a layer norm that reads a tensor over exactly these axes."""
    value = node.port(port)
    if node.op.name != "layer_norm" or port != 0 or value is None or value.rank is None:
        return False
    return tuple(range(normal_axis(int(attribute(node, "axis")), value.rank), value.rank)) == axes


def _rewrite(rewriter: Rewriter, norm: Node) -> None:
    result = norm.result
    attributes = {"axis": -1, "eps": float(attribute(norm, "eps"))}
    made = rewriter.insert("rms_norm", norm.operands, attributes, before=norm, source=norm.source).result
    name = result.name
    rewriter.replace_node(norm, made)
    rewriter.rename(made, name)
