"""Fold the gain (and bias) of a norm into the layers that read it.

    W (norm(x) * g + b) + c  =  (W diag(g)) norm(x) + (c + W b)

The norm's result lies in a channel space; the pass gives that space the scale 1 / g, and before it the
shift -b, so that every reader takes part: several linears, tied weights, whatever the op table lets through.
Afterwards the gain is one (zero where the norm multiplies by 1 + g) and the bias is zero: what a rotation needs
of an RMS norm, and what makes all channels of the result alike. Exact over the reals. Declined where the space
is blocked (post-norm residuals: the next norm reads the result too) and where a gain is zero. A table that is both
embedding and head gives the norm's input the transform of its result; `untie` lets the head read a copy.
A gain near zero may hide a channel that is large in front of it: folding re-exposes that, which is measured and noted.
QuaRot, arXiv:2404.00456, section 4; SliceGPT, arXiv:2401.15024.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from planish.ir.absorb import absorb
from planish.ir.constant import Constant
from planish.ir.graph import Graph, Node
from planish.ir.ops.base import Act
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import Space, analyse
from planish.ir.transform import Scale, Shift
from planish.passes.base import Context, Exactness, Pass, PassReport, place
from planish.passes.finite import require_finite_space
from planish.passes.match import attribute
from planish.passes.options import Range, option
from planish.passes.residual_sinks import Sink, residual_sinks, warning
from planish.passes.ties import Tie, tied, untie_where_it_helps

NORMS = ("layer_norm", "rms_norm")


@dataclass(frozen=True)
class FoldNormGain(Pass):
    """The gains and biases of layer norms and RMS norms move into the readers.

    Args:
        bias: fold biases too.
        untie: where a constant that writes the norm's input reads its result too (a tied head), give the readers a
            copy, if that is what it takes.
        sink_factor: note channels that stand out this many times from the median channel once their gain is folded.
    """

    bias: bool = True
    untie: bool = False
    sink_factor: float = option(8.0, Range(above=0))

    name = "fold-norm-gain"
    exactness = Exactness.EXACT
    gives = frozenset({"norm-gain-free"})

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        acts = [(Act.SHIFT, 2)] * self.bias + [(Act.SCALE, 1)]
        for act, port in acts:
            if self.untie:
                report.notes += _untie(graph, act, port)
            self._fold(graph, context, report, act, port)
        return report

    def _fold(self, graph: Graph, context: Context, report: PassReport, act: Act, port: int) -> None:
        """Fold operand `port` of every norm. The spaces of an act share no constant's axis: one analysis serves."""
        norms = _norms(graph, port)
        if not norms:
            return
        spaces = _by_norm(analyse(graph).of(act), port)
        what = "gain" if port == 1 else "bias"
        done: set[int] = set()
        with Rewriter(graph) as rewriter:
            for norm in norms:
                found = spaces.get(norm, [])
                if any(id(part.space) in done for part in found):
                    continue  # a tied norm: its constant went with the first
                try:
                    transforms = _transforms(norm, port, found)
                    for part in found:
                        require_finite_space(part.space)
                    sinks = _sinks(norm, context, self.sink_factor) if port == 1 else []
                    for part, transform in zip(found, transforms, strict=True):
                        absorb(rewriter, part.space, transform)
                        context.transformed(rewriter, part.space, transform)
                        done.add(id(part.space))
                    _settle(rewriter, norm, port)
                except Declined as refusal:
                    report.decline(f"{what}: {refusal.reason}", refusal.node if refusal.node is not None else norm)
                    continue
                report.applied.append(f"{what} of {place(norm)}")
                if sinks:
                    report.notes.append(warning(place(norm), sinks))
                    report.figures[norm.result.name] = {"sinks": [asdict(sink) for sink in sinks]}


def _norms(graph: Graph, port: int) -> list[Node]:
    return [n for n in graph.nodes if n.op.name in NORMS and _pending(n, port)]


def _untie(graph: Graph, act: Act, port: int) -> list[str]:
    """Untie what keeps a norm from being folded, if untying it helps: tried on a copy of the graph."""
    pairs: dict[str, list[Tie]] = {}
    for norm, parts in _by_norm(analyse(graph).of(act), port).items():
        ties = [tie for part in parts if part.space.blockers for tie in tied(part.space)]
        if ties and _pending(norm, port):
            pairs[norm.result.name] = list(dict.fromkeys(ties))

    def attempts(trial: Graph) -> Callable[[Node], object]:
        found = _by_norm(analyse(trial).of(act), port)
        return lambda norm: _transforms(norm, port, found.get(norm, []))

    return untie_where_it_helps(graph, pairs, attempts)


def _sinks(norm: Node, context: Context, factor: float) -> list[Sink]:
    """The channels of a norm that its gain hides."""
    gain = norm.operand(1)
    assert gain is not None
    assert gain.constant is not None
    data = gain.constant.wide().reshape(-1) + (1.0 - _neutral(norm, 1))
    largest, name = None, norm.result.name
    if context.stats is not None and name in context.stats and len(context.stats.of(name).minimum) == len(data):
        bias = norm.operand(2)
        record = context.stats.of(name)
        largest = record.largest
        if bias is not None and bias.is_constant and bias.constant is not None:
            offset = np.broadcast_to(bias.constant.wide().reshape(-1), data.shape)
            largest = np.maximum(np.abs(record.minimum - offset), np.abs(record.maximum - offset))
    return residual_sinks(data, largest, factor)


def _neutral(norm: Node, port: int) -> float:
    offset = attribute(norm, "gain_offset") if norm.op.name == "rms_norm" else 0.0
    return 1.0 - float(offset) if port == 1 else 0.0


def _pending(norm: Node, port: int) -> bool:
    """True if the norm has this operand and it does something."""
    value = norm.operand(port)
    if value is None:
        return False
    if not value.is_constant or value.constant is None:
        return True
    return not (value.constant.wide() == _neutral(norm, port)).all()


@dataclass(frozen=True)
class _Part:
    """A space in which the operand of a norm lies: the channel of each element (-1: none), and its variance."""

    space: Space
    atoms: np.ndarray
    variance: int


def _by_norm(spaces: list[Space], port: int) -> dict[Node, list[_Part]]:
    """The spaces in which the operand of each norm lies."""
    found: dict[Node, list[_Part]] = {}
    for space in spaces:
        for member in space.constants:
            for norm in member.value.users if member.value is not None else ():
                if norm.op.name in NORMS and norm.operand(port) is member.value:
                    assert member.value is not None
                    assert member.value.constant is not None
                    size = member.value.constant.size
                    atoms = member.atoms if member.atoms is not None else np.arange(space.size)
                    if len(atoms) == size and not any(p.space is space for p in found.get(norm, [])):
                        found.setdefault(norm, []).append(_Part(space, atoms, member.variance))
    return found


def _transforms(norm: Node, port: int, parts: list[_Part]) -> list[Scale | Shift]:
    """What makes the operand neutral, for each space.

    Raises:
        Declined: the operand is no constant, has a zero, or lies in no space or a blocked one.
    """
    value = norm.operand(port)
    if value is None or not value.is_constant or value.constant is None:
        raise Declined("it is no constant", norm)
    data = value.constant.wide().reshape(-1) + (1.0 - _neutral(norm, port) if port == 1 else 0.0)
    if port == 1 and (data == 0.0).any():
        raise Declined(f"it is zero at channel {int(np.flatnonzero(data == 0.0)[0])}", norm)
    covered = np.zeros(len(data), bool)
    made: list[Scale | Shift] = []
    for part in parts:
        space, atoms = part.space, part.atoms
        if space.blockers:
            ties = tied(space) if any(member.value is norm.operands[0] for member in space.activations) else []
            if ties:
                name = f"the tied %{ties[0].name}"
                raise Declined(f"{name} gives the norm's input the transform of its result: untie=true copies it", norm)
            blocker = space.blockers[0]
            raise Declined(blocker.reason, blocker.node if blocker.node is not None else blocker.value)
        mine = atoms >= 0
        covered |= mine
        channel = np.full(space.size, np.nan)
        channel[atoms[mine]] = data[mine]
        if np.isnan(channel).any() or (channel[atoms[mine]] != data[mine]).any():
            raise Declined("its space ties channels that differ, or has more of them", norm)
        if port == 1:
            made.append(Scale(1.0 / channel if part.variance > 0 else channel))
        else:
            made.append(Shift(-part.variance * channel))
        if space.positive and port == 1 and (channel < 0).any():
            raise Declined("it is negative and its space admits positive scales only", norm)
    if not covered.all():
        raise Declined("it lies in no channel space with static channels", norm)
    return made


def _settle(rewriter: Rewriter, norm: Node, port: int) -> None:
    """Make the operand neutral to the bit: g * (1 / g) may be off by a rounding."""
    value = norm.operand(port)
    assert value is not None
    assert value.constant is not None
    data = np.full(value.constant.shape, _neutral(norm, port))
    rewriter.set_constant(value, Constant(data, value.constant.dtype, data.shape), readers="all")
