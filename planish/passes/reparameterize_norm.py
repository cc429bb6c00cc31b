"""Make one scale and zero point fit every channel of a norm's result.

    s_c = (max_c - min_c) / (2^b - 1)     z_c = -min_c / s_c          per channel, calibrated
    x'_c = x_c s / s_c + (z_c - z) s      so that every channel spans [-z s, (2^b - 1 - z) s]

with one s = median s_c or mean s_c and one integer z = round(median z_c) or round(mean z_c). The scale goes into
the norm's gain and the columns of the layers that read it, the shift into its bias and theirs:

    g' = g s / s_c     b' = b s / s_c + (z_c - z) s     W' = W diag(s_c / s)     c' = c - W' (z_c - z) s

Exact over the reals for any s and z. A norm without a bias (unless `grow_bias` gives it one), or whose shift an
op blocks, is treated symmetrically: s_c = max|x_c| / (2^(b - 1) - 1), z = 0.
RepQ-ViT (Li et al., arXiv 2212.08254); the median is the optimal scaling factor of DopQ-ViT (MOSF,
arXiv 2408.03291): it minimises sum_c |s_c - s|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from planish.ir.absorb import absorb
from planish.ir.graph import Graph, Value
from planish.ir.ops.base import Act
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import Space, analyse
from planish.ir.stats import Stats
from planish.ir.transform import Scale, Shift
from planish.passes.base import Context, Exactness, Pass, PassReport
from planish.passes.channels import channel_ranges
from planish.passes.finite import require_finite_space
from planish.passes.options import Range, option


def choose_center(
    low: np.ndarray, high: np.ndarray, center: Literal["median", "mean"], bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The factors s / s_c and the offsets (z_c - z) s, float64 [n] each; a channel without a range stays.

    Args:
        low, high: float64 [n], the extremes of each channel.
        bits: of the codes.
        symmetric: no offsets: z is 0.
    """
    middle = np.median if center == "median" else np.mean
    if symmetric:
        scales = np.maximum(np.abs(low), np.abs(high)) / (2 ** (bits - 1) - 1)
    else:
        scales = (high - low) / (2**bits - 1)
    live = scales > 1e-9 * scales.max(initial=0.0)
    if not live.any():
        return np.ones(len(low)), np.zeros(len(low))
    scale = float(middle(scales[live]))
    own = np.where(live, scales, scale)
    if symmetric:
        return scale / own, np.zeros(len(low))
    zeros = -low / own
    zero = float(np.round(middle(zeros[live])))
    return scale / own, np.where(live, (zeros - zero) * scale, 0.0)


def used_share(low: np.ndarray, high: np.ndarray) -> float:
    """The share of the tensor's range that a channel uses, on average; 1: one scale fits all."""
    width = float(high.max() - low.min())
    return float((high - low).mean() / width) if width > 0 else 1.0


@dataclass(frozen=True)
class ReparameterizeNorm(Pass):
    """Turn a scale and zero point for each channel behind a norm into one for all."""

    name = "reparameterize-norm"
    exactness = Exactness.EXACT
    breaks = frozenset({"norm-gain-free", "norm-bias-free"})
    needs_stats = True

    center: Literal["median", "mean"] = "median"
    bits: int = option(8, Range(2, 16))  # of the codes
    grow_bias: bool = False  # give a norm that has no bias one: it costs a sum

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        assert context.stats is not None
        spaces = analyse(graph)
        shifts = {name: space for space in spaces.of(Act.SHIFT) for name in _norms(space)}
        symmetric: dict[str, list[str]] = {}
        pending: dict[str, np.ndarray] = {}  # offsets of each norm's result, channel by channel of its SHIFT space
        with Rewriter(graph) as rewriter:
            for space in (context.guarded(graph, s) for s in spaces.of(Act.SCALE)):
                for norm in _norms(space)[:1]:
                    try:
                        offsets = self._scale(rewriter, space, norm, shifts.get(norm), context, report, symmetric)
                    except Declined as refusal:
                        report.decline(str(refusal), refusal.node if refusal.node is not None else norm)
                        continue
                    if offsets is not None:
                        pending[norm] = offsets
        with Rewriter(graph) as rewriter:
            for space in analyse(graph).of(Act.SHIFT) if pending else ():
                for norm in [n for n in _norms(space) if n in pending][:1]:
                    transform = Shift(pending.pop(norm))
                    absorb(rewriter, space, transform)
                    context.transformed(rewriter, space, transform)
        for why, norms in symmetric.items():
            report.notes.append(f"{len(norms)} norms treated symmetrically: {why} (first: %{norms[0]})")
        if not report.applied and not report.declined:
            report.misses.append("no norm with statistics of its result")
        return report

    def _scale(
        self,
        rewriter: Rewriter,
        space: Space,
        norm: str,
        shift: Space | None,
        context: Context,
        report: PassReport,
        symmetric: dict[str, list[str]],
    ) -> np.ndarray | None:
        """Scale the result of a norm; the offsets that are due, or None (and in `symmetric`, why)."""
        assert context.stats is not None
        ranges = _ranges(space, norm, context.stats)
        if ranges is None:
            raise Declined("no statistics of its result", rewriter.graph.values[norm])
        if space.blockers:
            raise Declined(space.blockers[0].reason, space.blockers[0].node)
        require_finite_space(space)
        stays = self._symmetric(space, shift, rewriter.graph.values[norm])
        free = not stays
        factors, offsets = choose_center(*ranges, self.center, self.bits, symmetric=not free)
        ends = [end * factors + offsets for end in ranges]
        before, after = used_share(*ranges), used_share(*ends)
        if after <= before * (1.0 + 1e-3):
            raise Declined("one scale fits its channels already", rewriter.graph.values[norm])
        transform = Scale(factors)
        absorb(rewriter, space, transform)
        context.transformed(rewriter, space, transform)
        kind = "scale and shift" if free else "scale"
        report.applied.append(f"%{norm}: {kind}, a channel uses {before:.0%} -> {after:.0%} of the range")
        report.figures[norm] = {"symmetric": not free, "used_before": before, "used_after": after}
        if stays:
            symmetric.setdefault(stays, []).append(norm)
        return offsets if free else None

    def _symmetric(self, space: Space, shift: Space | None, norm: Value) -> str:
        """Why the result of a norm cannot take a shift; empty if it can."""
        if shift is None:
            return "nothing takes a shift"
        if shift.blockers:
            return shift.blockers[0].reason
        if not _aligned(space, shift, norm.name):
            return "a shift and a scale of it span different tensors"
        absent = [m for m in shift.constants if m.value is None and m.node is norm.producer]
        return "it has no bias" if absent and not self.grow_bias else ""


def _norms(space: Space) -> list[str]:
    """The results of norms that lie in a space on one axis, in order, and that it scales or shifts as they are."""
    return [
        m.value.name
        for m in space.activations
        if m.value is not None
        and m.value.producer is not None
        and m.value.producer.op.family == "normalisation"
        and m.value.producer.results[0] is m.value
        and len(m.axes) == 1
        and m.variance > 0
    ]


def _ranges(space: Space, norm: str, stats: Stats) -> tuple[np.ndarray, np.ndarray] | None:
    """The extremes of each channel over all results of norms in the space that the statistics know."""
    member = next(m for m in space.activations if m.value is not None and m.value.name == norm)
    return channel_ranges(member, space.size, stats)


def _aligned(one: Space, two: Space, norm: str) -> bool:
    """True if both spaces number the channels of a norm's result alike."""
    first, second = (
        next(m for m in space.activations if m.value is not None and m.value.name == norm) for space in (one, two)
    )
    if one.size != two.size or first.axes != second.axes or second.variance < 0:
        return False
    left, right = (np.arange(s.size) if m.atoms is None else m.atoms for s, m in ((one, first), (two, second)))
    return len(left) == len(right) and bool((left == right).all())
