"""Scales that need no statistics: the weights that write a channel and those that read it get equal ranges.

Every space by itself is solved in closed form (`balance_scale`), but neighbours share weights: one's readers
are the next one's writers. So the spaces are gone through again until nothing moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planish.ir.absorb import absorb
from planish.ir.graph import Graph
from planish.ir.ops.base import Act
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import Member, Space, analyse
from planish.ir.transform import Scale
from planish.passes.base import Context, PassReport
from planish.passes.channels import channel_norms, kind_of, positions, title
from planish.passes.finite import require_finite_space
from planish.passes.scales import balance_scale

SWEEPS = 32  # over all spaces, at most
SETTLED = 0.01  # a space whose factors are this close to 1 stays


@dataclass(eq=False)
class Balanced:
    """A space in the course of the sweeps: the factors so far, and how unequal it was."""

    space: Space
    factors: np.ndarray
    before: float
    kind: str


def writers(space: Space) -> list[Member]:
    """The constants whose size says how large a channel is: matrices that write it, else gains, else vectors."""
    found = [m for m in space.producers if m.value is not None]
    matrices = [m for m in found if m.value is not None and (m.value.rank or 0) > 1]
    return matrices or [m for m in found if _is_gain(m)] or found


def _is_gain(member: Member) -> bool:
    node = member.node
    return node is not None and node.op.family == "normalisation" and node.operand(1) is member.value


def readers(space: Space) -> list[Member]:
    """The matrices that read a space, else all that carry the inverse."""
    found = [m for m in space.consumers if m.value is not None]
    return [m for m in found if m.value is not None and (m.value.rank or 0) > 1] or found


def ranges(space: Space) -> tuple[np.ndarray, np.ndarray]:
    """max |W| of what writes and of what reads each channel, float64 [n] each."""
    written, read = (channel_norms(side(space), space.size, "largest") for side in (writers, readers))
    return written, read


def unevenness(written: np.ndarray, read: np.ndarray) -> float:
    """The largest ratio between the two sides of a channel, either way; 1: balanced."""
    live = (written > 0) & (read > 0)
    return float(np.exp(np.abs(np.log(written[live] / read[live])).max())) if live.any() else 1.0


def balance(graph: Graph, context: Context, report: PassReport) -> None:
    """Balance every free SCALE space of a graph."""
    place = positions(graph)
    with Rewriter(graph) as rewriter:
        started: list[Balanced] = []
        for space in analyse(graph).of(Act.SCALE):
            space = context.guarded(graph, space)
            try:
                started.append(_start(space, kind_of(space, place) if space.admitted else ""))
            except Declined as refusal:
                report.decline(str(refusal), refusal.node if refusal.node is not None else title(space))
        for _ in range(SWEEPS):
            moved = [_step(rewriter, item, context) for item in started]
            if not any(moved):
                break
        for item in started:
            _finish(item, report)
    gained = [i for i in started if (i.factors != 1.0).any() and any(map(_is_gain, i.space.producers))]
    if gained:
        report.notes.append(f"{len(gained)} gains of norms took scales up (first: %{title(gained[0].space)})")


def _start(space: Space, kind: str) -> Balanced:
    if space.blockers:
        raise Declined(space.blockers[0].reason, space.blockers[0].node)
    require_finite_space(space)
    written, read = ranges(space)
    if not ((written > 0) & (read > 0)).any():
        raise Declined("constants stand on one side of it only", space.activations[0].value)
    return Balanced(space, np.ones(space.size), unevenness(written, read), kind)


def _step(rewriter: Rewriter, item: Balanced, context: Context) -> bool:
    """Balance one space; False if it is."""
    s = balance_scale(*ranges(item.space))
    if np.abs(np.log(s)).max() < SETTLED:
        return False
    transform = Scale(1.0 / s)
    absorb(rewriter, item.space, transform)
    context.transformed(rewriter, item.space, transform)
    item.factors *= s
    return True


def _finish(item: Balanced, report: PassReport) -> None:
    if (item.factors == 1.0).all():
        report.decline("its weights are balanced already", title(item.space))
        return
    name, after = title(item.space), unevenness(*ranges(item.space))
    low, high = float(item.factors.min()), float(item.factors.max())
    line = f"%{name}: {item.space.size} {item.kind} channels by {low:.3g} to {high:.3g}"
    report.applied.append(f"{line}, sides apart by {item.before:.3g} -> {after:.3g}")
    report.figures[name] = {"kind": item.kind, "channels": item.space.size, "before": item.before, "after": after}
