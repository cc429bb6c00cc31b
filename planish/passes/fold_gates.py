"""Fold constant gates into the weights around them.

    g * (W x + b)  =  (diag(g) W) x + diag(g) b          or          V (g * h)  =  (V diag(g)) h

The gates: a factor per channel on a branch before the residual sum (LayerScale, Touvron et al.,
arXiv 2103.17239), an unconditional gate per head behind an attention (its sigmoid is a constant once
constants are folded), and one number for a whole tensor (multipliers of embeddings, residual branches and
logits), by a product or a division. The gate's operand gets the scale that makes the gate one, through its
channel space, and the gate's node goes. Exact over the reals. Declined: a gate that depends on the data, a gate
that is zero somewhere, a space that an op blocks. Gated attention: Bondarenko et al., arXiv 2306.12929.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from planish.ir.absorb import absorb
from planish.ir.constant import Constant
from planish.ir.graph import Graph, Node, Value
from planish.ir.ops.base import Act
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import ChannelSpaces, Member, Space, analyse
from planish.ir.transform import Scale
from planish.ir.types import WIDE_FLOATS
from planish.passes.base import Context, Exactness, Pass, PassReport, place
from planish.passes.finite import require_finite_space

SQUASHING = frozenset({"sigmoid", "hard_sigmoid", "tanh", "softmax"})
ROUNDS = 8


@dataclass(eq=False)
class Gate:
    """`node` multiplies `x` with (or divides it by) the constant operand `port`.

    Attributes:
        old: the constant that stood there before.
        changed: folding it changed other constants: it was not one.
    """

    node: Node
    port: int
    old: Value
    changed: bool = False

    @property
    def x(self) -> Value:
        """What the gate multiplies now: another one, if a gate before it was folded."""
        value = self.node.operands[1 - self.port]
        assert value is not None
        return value

    @property
    def factor(self) -> Value:
        """The constant, as long as the node is in the graph."""
        value = self.node.operands[self.port]
        return self.old if value is None else value


@dataclass(frozen=True)
class FoldGates(Pass):
    """Constant factors of channels, heads and whole tensors move into the layers around them."""

    name = "fold-gates"
    exactness = Exactness.EXACT
    breaks = frozenset({"norm-gain-free"})

    scalars: bool = True  # fold single numbers too

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        declined: dict[str, tuple[str, Node | Value]] = {}
        for _ in range(ROUNDS):
            declined.clear()
            with Rewriter(graph) as rewriter:
                gates = [g for g in _gates(graph) if self.scalars or g.old.constant is None or g.old.constant.size > 1]
                if not gates:
                    break
                _widen(rewriter, gates)
                folded = _fold(rewriter, gates, context, declined)
            report.applied += folded
            if not folded:
                break
        for reason, where in declined.values():
            report.decline(reason, where)
        for node in graph.nodes:
            if _depends(node):
                report.decline("its gate depends on the data", node)
        if not report.applied and not report.declined:
            report.misses.append("no product or quotient of an activation and a constant")
        return report


def _gates(graph: Graph) -> Iterator[Gate]:
    """The products and quotients with a constant of floats."""
    for node in graph.nodes:
        if node.op.name not in ("mul", "div") or len(node.operands) != 2:
            continue
        for port in (1, 0) if node.op.name == "mul" else (1,):
            factor, x = node.operands[port], node.operands[1 - port]
            if factor is None or x is None or x.is_constant or factor.constant is None or factor.is_input:
                continue
            if factor.dtype in WIDE_FLOATS and x.dtype in WIDE_FLOATS:
                yield Gate(node, port, factor)
                break


def _depends(node: Node) -> bool:
    """True for a product with a squashed activation: a gate that the data opens and shuts."""
    if node.op.name != "mul" or len({id(v) for v in node.operands}) != 2:
        return False
    if any(v is None or v.is_constant for v in node.operands):
        return False
    makers = [v.producer for v in node.operands if v is not None]
    operands = {id(v) for v in node.operands}
    return any(m is not None and m.op.name in SQUASHING and id(m.operands[0]) not in operands for m in makers)


def _widen(rewriter: Rewriter, gates: Sequence[Gate]) -> None:
    """Write gates out along all channels of what they multiply, so that spaces can end in them."""
    axes: dict[Value, tuple[int, ...]] = {}
    for space in analyse(rewriter.graph).of(Act.SCALE):
        for member in space.activations if space.constants else ():
            if member.value is not None and len(member.axes) > len(axes.get(member.value, ())):
                axes[member.value] = member.axes
    for gate in gates:
        shape, old = gate.x.shape, gate.old.constant
        if gate.x not in axes or shape is None or old is None:
            continue
        dims = [shape[a] if a in axes[gate.x] else 1 for a in range(axes[gate.x][0], len(shape))]
        sizes = tuple(d for d in dims if isinstance(d, int))
        size = int(np.prod(sizes))
        if (
            len(sizes) != len(dims)
            or size <= old.size
            or (old.size > 1 and np.broadcast_shapes(old.shape, sizes) != sizes)
        ):
            continue
        made = rewriter.constant(Constant(np.broadcast_to(old.wide(), sizes).copy(), old.dtype, sizes), gate.old.name)
        rewriter.set_operand(gate.node, gate.port, made)


def _fold(
    rewriter: Rewriter, gates: Sequence[Gate], context: Context, declined: dict[str, tuple[str, Node | Value]]
) -> list[str]:
    """Fold what can be folded by one analysis; gates that stay get constants of their own shapes back."""
    factors = {g.factor for g in gates}
    by_factor = _by_factor(analyse(rewriter.graph), factors)
    done: set[int] = set()
    lines = []
    for gate in gates:
        where = place(gate.node)
        parts = by_factor.get(gate.factor, [])
        try:
            if any(id(space) in done for space, _ in parts):
                raise Declined("another gate on its channels was folded first", gate.node)
            _fold_one(rewriter, gate, parts, context)
        except Declined as refusal:
            declined[where] = refusal.reason, refusal.node if refusal.node is not None else gate.node
            continue
        done.update(id(space) for space, _ in parts)
        takers = {m.value.name: None for s, _ in parts for m in s.constants if m.value and m.value not in factors}
        lines.append(f"{where}: into {', '.join(takers)}" if gate.changed else f"{where}: it is one")
    for gate in gates:
        if gate.node.graph is not None:
            _narrow(rewriter, gate)
    return lines


def _narrow(rewriter: Rewriter, gate: Gate) -> None:
    """Give a gate that stays a constant of its old shape; what was folded next to it may have changed its numbers."""
    wide, old = gate.factor.constant, gate.old.constant
    if gate.factor is gate.old or wide is None or old is None:
        return
    data = wide.wide()
    dims = (1,) * (data.ndim - len(old.shape)) + old.shape[max(len(old.shape) - data.ndim, 0) :]
    small = data[tuple(slice(0, 1) if dim == 1 else slice(None) for dim in dims)]
    if not (small == data).all():
        return
    value = gate.old
    if not (data == old.wide()).all():
        value = rewriter.constant(Constant(small.reshape(old.shape), old.dtype, old.shape), gate.old.name)
    rewriter.set_operand(gate.node, gate.port, value)


def _by_factor(spaces: ChannelSpaces, factors: set[Value]) -> dict[Value, list[tuple[Space, Member]]]:
    found: dict[Value, list[tuple[Space, Member]]] = {}
    for space in spaces.of(Act.SCALE):
        for member in space.constants:
            if member.value in factors and member.value is not None and not member.private:
                found.setdefault(member.value, []).append((space, member))
    return found


def _fold_one(rewriter: Rewriter, gate: Gate, parts: Sequence[tuple[Space, Member]], context: Context) -> None:
    """Make the gate one and erase its node."""
    node, factor, x = gate.node, gate.factor, gate.x
    assert factor.constant is not None
    data = factor.constant.wide()
    if node.result.type != x.type:
        raise Declined("it changes the type of what it multiplies", node)
    gate.changed = not bool((data == 1.0).all())
    if gate.changed:
        if (data == 0.0).any():
            raise Declined("it is zero somewhere: the scale has no inverse", node)
        if len(factor.users) > 1:
            raise Declined("other nodes read it", factor)
        chosen = [(context.guarded(rewriter.graph, space), member) for space, member in parts]
        for space, _ in chosen:
            if not space.blockers:
                require_finite_space(space)
        transforms = _transforms(data, chosen, node)
        for (space, _), transform in zip(chosen, transforms, strict=True):
            absorb(rewriter, space, transform)
            context.transformed(rewriter, space, transform)
    if context.stats is not None and node.result.name in context.stats:
        context.stats.rename(node.result.name, x.name)
    rewriter.replace_node(node, x)


def _transforms(data: np.ndarray, parts: Sequence[tuple[Space, Member]], node: Node) -> list[Scale]:
    """What makes the factor one, for each space in which it lies.

    Raises:
        Declined: a space is blocked, ties channels whose factors differ, or the spaces leave a channel out.
    """
    if not parts:
        raise Declined("nothing next to it can take it up", node)
    covered, made = 0, []
    for space, member in parts:
        if space.blockers:
            raise Declined(space.blockers[0].reason, space.blockers[0].node or space.blockers[0].value)
        atoms = np.arange(space.size) if member.atoms is None else member.atoms
        if len(atoms) != data.size:
            raise Declined("it varies along other axes than channels", node)
        values = data.reshape(-1)
        inside = np.flatnonzero(atoms >= 0)
        channel = np.ones(space.size)
        channel[atoms[inside]] = values[inside]
        if (channel[atoms[inside]] != values[inside]).any():
            raise Declined("its space ties channels whose factors differ", node)
        covered += len(inside)
        made.append(Scale(1.0 / channel if member.variance > 0 else channel))
    if covered != data.size:
        raise Declined("some of its channels lie in no space", node)
    return made
