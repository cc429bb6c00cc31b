"""Sort channels so that those which share a range are alike, or so that no block holds all the large ones.

    x' = P x        W' = W P^T        b' = P b          P a permutation

Exact to the bit: no number changes, only its place. Every PERMUTE space that is free takes part: hidden
channels, the residual stream with its embeddings, values, and keys with queries. Channels of different heads
never mix. Under rotary embeddings a pair of channels moves as one, and the tables of angles with it: constant tables
become the layer's own, with one order for all its heads (`tables=head`: one per key head, the tables grow by the
number of heads); tables that are computed are one for the model, and so is the order.

    sort            by falling calibrated range; without statistics, by the norm of the weights that write
    zigzag          sorted, then dealt to blocks of `group` there and back, so that blocks balance
                                                            (DuQuant, Lin et al., arXiv 2406.01721)
    k-sort          keys alone, by r_c = |W_k[c, :]|_2 (of a rotary pair r_j^2 + r_(j + d/2)^2), or by the gain of
                    a norm on the keys                      (Trukhanov and Soloveychik, arXiv 2403.20137)
    group-by-range  the order, of several, with the least sum of group ranges
                                                            (RPTQ, Yuan et al., arXiv 2304.01089)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from planish.ir.absorb import absorb
from planish.ir.graph import Graph, Node
from planish.ir.ops.base import Act
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import Member, Space, analyse
from planish.ir.stats import Stats
from planish.ir.transform import Permute, apply
from planish.passes.base import Context, Exactness, Pass, PassReport
from planish.passes.channels import behind, channel_norms, channel_ranges, key_side, kind_of, positions, title
from planish.passes.finite import require_finite_space
from planish.passes.head_tables import widen_tables
from planish.passes.options import Range, option
from planish.passes.orders import choose_order, imbalance, mean_group_range
from planish.passes.sites import reads_by_weight


@dataclass(frozen=True)
class PermuteChannels(Pass):
    """Put channels in an order that suits quantisation in groups."""

    name = "permute-channels"
    exactness = Exactness.EXACT

    method: Literal["sort", "zigzag", "k-sort", "group-by-range"] = "sort"
    group: int = option(64, Range(1))  # channels that share a range
    space: Literal["all", "residual", "hidden", "key", "value"] = "all"
    tables: Literal["layer", "head"] = "layer"  # rotary tables: one order for the heads of a layer, or one per head

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        if self.tables == "head" and self.space in ("all", "key"):
            changed, grown = widen_tables(graph)
            report.notes.append(f"{changed} rotary embeddings got tables per head: {grown} bytes more")
        place = positions(graph)
        found = 0
        with Rewriter(graph) as rewriter:
            for space in context.progress(analyse(graph).of(Act.PERMUTE), self.name):
                if not space.constants or not self._mine(space, place):
                    continue
                found += 1
                try:
                    self._permute(rewriter, space, kind_of(space, place), context, report)
                except Declined as refusal:
                    report.decline(str(refusal), refusal.node if refusal.node is not None else title(space))
        if not found:
            kind = "key " if self.method == "k-sort" else "" if self.space == "all" else f"{self.space} "
            report.misses.append(f"no space of {kind}channels that constants write or read")
        return report

    def _mine(self, space: Space, place: dict[Node, int]) -> bool:
        wanted = "key" if self.method == "k-sort" and self.space == "all" else self.space
        if self.method == "k-sort" and wanted != "key":
            return False
        return wanted == "all" or kind_of(space, place) == wanted

    def _permute(self, rewriter: Rewriter, space: Space, kind: str, context: Context, report: PassReport) -> None:
        if space.blockers:
            raise Declined(space.blockers[0].reason, space.blockers[0].node)
        member, segments = _shown(space, context.stats)
        if max(map(len, segments)) <= self.group:
            raise Declined("its channels are one group: no order changes it", member.value)
        low, high = _extremes(space, member, context.stats if self.method != "k-sort" else None, keys=kind == "key")
        order = choose_order(low, high, space.blocks, self.group, self.method)
        atoms = np.arange(space.size) if member.atoms is None else member.atoms
        inside = atoms >= 0
        low_at, high_at = (np.where(inside, end[atoms], 0.0) for end in (low, high))
        low_then, high_then = (apply(end, (0,), Permute(order), atoms) for end in (low_at, high_at))
        ranges = [mean_group_range(low_at, high_at, segments, self.group)]
        ranges.append(mean_group_range(low_then, high_then, segments, self.group))
        balances = [imbalance(low_at, high_at, segments, self.group)]
        balances.append(imbalance(low_then, high_then, segments, self.group))
        what, (before, after) = ("imbalance", balances) if self.method == "zigzag" else ("mean group range", ranges)
        if after >= before * (1.0 - 1e-9):
            raise Declined("no better order was found", member.value)
        transform = Permute(order)
        absorb(rewriter, space, transform)
        context.transformed(rewriter, space, transform)
        name = title(space)
        report.applied.append(f"%{name}: {space.size} {kind} channels, {what} {before:.3g} -> {after:.3g}")
        report.figures[name] = {
            "kind": kind,
            "channels": space.size,
            "group_range_before": ranges[0],
            "group_range_after": ranges[1],
            "imbalance_before": balances[0],
            "imbalance_after": balances[1],
        }


def _shown(space: Space, stats: Stats | None) -> tuple[Member, list[np.ndarray]]:
    """The activation in which groups are counted, and its segments: the positions of each block of the space."""

    def rank(member: Member) -> tuple[bool, bool, int]:
        value = member.value
        measured = stats is not None and channel_ranges(member, space.size, stats) is not None
        read = value is not None and any(reads_by_weight(user, value) for user in value.users)
        return not measured, not read, space.size if member.atoms is None else len(member.atoms)

    key = key_side(space)
    members = [m for m in space.activations if key is None or m.value is key] or space.activations
    member = min(members, key=rank)
    atoms = np.arange(space.size) if member.atoms is None else member.atoms
    place = np.flatnonzero(atoms >= 0)
    if space.labels is None:
        return member, [place]
    cuts = np.flatnonzero(np.diff(space.labels[atoms[place]])) + 1
    return member, list(np.split(place, cuts))


def _extremes(space: Space, member: Member, stats: Stats | None, *, keys: bool) -> tuple[np.ndarray, np.ndarray]:
    """The extremes of each channel: calibrated where there are statistics, else minus and plus a norm of weights."""
    if stats is not None:
        for candidate in (member, *space.activations):
            found = channel_ranges(candidate, space.size, stats)
            if found is not None:
                return found
    writers = space.producers
    key = key_side(space) if keys else None
    if key is not None:
        side = [m for m in behind(key, space) if m.value is not None and m.value.dtype is not None]
        gains = [m for m in side if m.node is not None and m.node.op.family == "normalisation"]
        writers = gains or [m for m in side if m.node is not None and m.node.op.family == "contraction"]
    matrices = [m for m in writers if m.value is not None and (m.value.rank or 0) > 1]
    require_finite_space(space)
    for members in (matrices, writers, space.consumers):
        norms = channel_norms(members, space.size, "euclidean")
        if norms.any():
            return -norms, norms
    raise Declined("no statistics and no weights say which channels are alike", member.value)
