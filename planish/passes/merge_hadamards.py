"""Drop Hadamard transforms that meet their inverse, and fold those that a weight takes up for free.

    x D H' . H D = x          x H D . D H' = x          x H' . H' = x where H is symmetric
    x D H' . H E = x (D E)    two transforms become a product with signs
    H (W y + b) = (H W) y + H b                         what constants alone write takes the transform up
    (x A) B -> W B'                                     the second of two that do not cancel goes into its readers

Exact over the reals. A transform whose operand no constant writes freely stays where it is: it was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planish.ir.absorb import absorb
from planish.ir.constant import Constant
from planish.ir.graph import Graph, Node, Value
from planish.ir.hadamard import symmetric
from planish.ir.ops.base import Act, Port, normal_axis
from planish.ir.ops.rotation import block_size, signs_of
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import ChannelSpaces, Member, analyse
from planish.passes.base import Context, Exactness, Pass, PassReport, place
from planish.passes.finite import require_finite_space
from planish.passes.hadamard import block_rotation
from planish.passes.match import attribute

Step = Callable[[Graph, Node, ChannelSpaces, Context], str | None]


@dataclass(frozen=True)
class MergeHadamards(Pass):
    """Adjacent Hadamard transforms cancel or merge."""

    name = "merge-hadamards"
    exactness = Exactness.EXACT

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        steps: tuple[Step, ...] = (_cancel, _into_writers, _into_readers)
        spaces: ChannelSpaces | None = analyse(graph)
        while spaces is not None:  # None: nothing has changed since they were found
            found, spaces = spaces, None
            for node in [n for n in graph.nodes if n.op.name == "hadamard"]:
                where = place(node)
                said = next((line for step in steps if (line := step(graph, node, found, context)) is not None), None)
                if said is not None:
                    report.applied.append(f"{where}: {said}")
                    spaces = analyse(graph)
                    break
        if not report.applied and not any(n.op.name == "hadamard" for n in graph.nodes):
            report.misses.append("no hadamard op")
        return report


def _axis(node: Node) -> int:
    rank = node.result.rank
    return normal_axis(int(attribute(node, "axis")), 0 if rank is None else rank)


def _inverse(node: Node) -> bool:
    return bool(attribute(node, "transpose"))


def _signs(node: Node) -> np.ndarray | None:
    found = signs_of(node)
    return None if found is None else found.wide()


def _before(node: Node) -> Node | None:
    """The hadamard of the same axis and block that a node reads, if it reads one."""
    source = node.operands[0]
    first = source.producer if source is not None else None
    if first is None or first.op.name != "hadamard" or _axis(first) != _axis(node):
        return None
    return first if block_size(first) == block_size(node) is not None else None


def _cancel(graph: Graph, node: Node, spaces: ChannelSpaces, context: Context) -> str | None:
    """The pair of a hadamard and the one it reads, if they come to nothing but signs."""
    first = _before(node)
    source = first.operands[0] if first is not None else None
    block = block_size(node)
    if first is None or source is None or block is None:
        return None
    outer, inner = _outer_signs(first, node, block)
    if inner is not None or outer is None:
        return None
    with Rewriter(graph) as rewriter:
        if (outer == 1.0).all():
            rewriter.replace(node.result, source)
            return f"cancels {place(first)}"
        shape = [1] * (source.rank or 1)
        shape[_axis(node)] = len(outer)
        data = outer.reshape(shape[_axis(node) :])
        by = rewriter.constant(Constant(data, source.dtype or "f32", data.shape), f"{node.result.name}.signs")
        made = rewriter.insert("mul", [source, by], before=node, source=node.source).result
        rewriter.replace(node.result, made)
    return f"cancels {place(first)} but for signs"


def _outer_signs(first: Node, second: Node, block: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(the signs that a pair comes to; the signs left between the two matrices, None if the matrices cancel)."""
    size = first.result.shape[_axis(first)] if first.result.shape else None
    if not isinstance(size, int):
        return None, None
    one = np.ones(size)
    d, e = (one if s is None else s for s in (_signs(first), _signs(second)))
    match _inverse(first), _inverse(second):
        case False, True:  # x D H' H E
            outer, inner, matched = d * e, one, True
        case True, False:  # x H D E H'
            outer, inner, matched = one, d * e, True
        case False, False:  # x D H' E H'
            outer, inner, matched = d, e, symmetric(block)
        case _:  # x H D H E
            outer, inner, matched = e, d, symmetric(block)
    return (outer, None) if matched and (inner == 1.0).all() else (None, inner)


def _into_writers(graph: Graph, node: Node, spaces: ChannelSpaces, context: Context) -> str | None:
    return _absorbed(graph, node, 0, spaces, context)


def _into_readers(graph: Graph, node: Node, spaces: ChannelSpaces, context: Context) -> str | None:
    return _absorbed(graph, node, -1, spaces, context) if _before(node) is not None else None


def _absorbed(graph: Graph, node: Node, port: Port, spaces: ChannelSpaces, context: Context) -> str | None:
    """Let the constants of the space at a port take the transform up, where only this node blocks it."""
    value, block = node.port(port), block_size(node)
    if value is None or value.shape is None or block is None:
        return None
    axis = _axis(node)
    size = value.shape[axis]
    found = spaces.at(value, (axis,), Act.ROTATE)
    if len(found) != 1 or not isinstance(size, int):
        return None
    space = found[0]
    if any(b.node is not node or b.port != port for b in space.blockers) or not _in_order(space.activations, value):
        return None
    transform = block_rotation(size, block, _signs(node), transpose=_inverse(node))
    source = node.operands[0]
    assert source is not None
    with Rewriter(graph) as rewriter:
        try:
            # behind: x B is read through W; reading x instead, the space carries the inverse of what it carried
            moved = transform if port == 0 else transform.inverse()
            require_finite_space(space)
            absorb(rewriter, replace(space, blockers=[]), moved)
        except Declined:
            return None
        context.transformed(rewriter, space, moved)
        rewriter.replace(node.result, source)
    return "folded into what writes it" if port == 0 else "folded into what reads it"


def _in_order(members: Sequence[Member], value: Value) -> bool:
    """True if position i of the value is channel i of the space."""
    return any(m.value is value and m.atoms is None for m in members)
