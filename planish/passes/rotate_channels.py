"""Rotate channels so that no channel stands out.

    x' = Q x        W_out' = Q W_out, b' = Q b        W_in' = W_in Q'        Q orthogonal

on every channel space that admits a rotation: the residual stream between norms without a gain (R1), the values of each
key/value head (R2), and whatever lies between two linear layers. Exact over the reals; no op is added. Embeddings,
routers and experts are writers and readers like any other, and a table that is read twice stays one. Where a gain is in
the way, fold-norm-gain lifts it; where a mean is, center-layer-norm.

    kind     hadamard | random | klt | klt-hadamard: see `planish.passes.hadamard`; the last two need statistics
    space    residual: a sum of activations lies in it; value: what attention averages does; all: any
    block    rotate blocks of this many channels, rather than all that may be mixed
    untie    where a constant with several users is all that ties a space to one that no rotation reaches, the users
             other than the first get a copy

QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406; MambaQuant, arXiv:2501.13484.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from planish.ir.absorb import absorb
from planish.ir.graph import Graph, Node
from planish.ir.ops.base import Act
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import Space, analyse
from planish.passes.base import Context, Exactness, Pass, PassReport
from planish.passes.channels import kind_of, positions, title
from planish.passes.finite import require_finite_space
from planish.passes.hadamard import choose_rotation, cut, describe
from planish.passes.mixing_sites import mixable, said_blocks, said_ties, second_moment
from planish.passes.options import Range, option
from planish.passes.ties import Tie, copy_name, shared, untie


@dataclass(frozen=True)
class RotateChannels(Pass):
    """Spread outliers over all channels by rotations that weights absorb."""

    name = "rotate-channels"
    exactness = Exactness.EXACT

    kind: Literal["hadamard", "random", "klt", "klt-hadamard"] = "hadamard"
    space: Literal["residual", "value", "all"] = "all"
    block: int | None = option(None, Range(1))
    untie: bool = False
    fallback: Literal["dct", "block"] = "dct"  # for orders without a Hadamard matrix: dct-mixed or block-diagonal
    seed: int | None = option(None, Range(0))  # none: the pipeline's

    @property
    def needs_stats(self) -> bool:
        return self.kind in ("klt", "klt-hadamard")

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        rng = np.random.default_rng(context.seed if self.seed is None else self.seed)
        if self.untie:
            report.notes += untie(graph, self._ties(graph))
        place = positions(graph)
        found = analyse(graph).of(Act.ROTATE)
        wanted = [(space, kind_of(space, place)) for space in found if self._wants(space, place)]
        if not wanted:
            which = "rotation" if self.space == "all" else self.space
            report.misses.append(
                f"no {which} space: {len(found)} spaces, none of which can be mixed and is of that kind"
            )
        with Rewriter(graph) as rewriter:
            for space, what in context.progress(wanted, self.name):
                try:
                    self._space(rewriter, space, what, rng, context, report)
                except Declined as refusal:
                    report.decline(refusal.reason, refusal.node or space.activations[0].value)
        return report

    def _wants(self, space: Space, place: dict[Node, int]) -> bool:
        return mixable(space) and (self.space == "all" or self.space == kind_of(space, place))

    def _ties(self, graph: Graph) -> list[Tie]:
        """The constants that keep a rotation from a space which it reaches once they are untied, tried on a copy."""
        place = positions(graph)
        spaces = [space for space in analyse(graph).of(Act.ROTATE) if self._wants(space, place)]
        ties = list(dict.fromkeys(tie for space in spaces if space.blockers for tie in shared(space)))
        if not ties:
            return []
        trial = graph.clone()
        untie(trial, ties)
        place = positions(trial)
        free = [space for space in analyse(trial).admitted(Act.ROTATE) if self._wants(space, place)]
        before = set[str]().union(*(_tensors(space) for space in spaces if space.admitted))
        won = [space for space in free if not _tensors(space) <= before]
        reached = {m.value.name for space in won for m in space.constants if m.value is not None}
        return [tie for tie in ties if {tie.name, copy_name(tie)} & reached]

    def _space(
        self,
        rewriter: Rewriter,
        space: Space,
        what: str,
        rng: np.random.Generator,
        context: Context,
        report: PassReport,
    ) -> None:
        if space.blockers:
            blocker = space.blockers[0]
            raise Declined(blocker.reason, blocker.node or blocker.value)
        if not space.constants:
            return
        require_finite_space(space)
        moment = None
        if self.needs_stats:
            assert context.stats is not None
            moment = second_moment(space, context.stats)
            if moment is None:
                raise Declined("no linear that reads it has statistics")
        blocks = cut(space.blocks, self.block)
        transform = choose_rotation(space.size, blocks, self.kind, rng, fallback=self.fallback, moment=moment)
        absorb(rewriter, space, transform)
        context.transformed(rewriter, space, transform)
        report.applied.append(
            f"%{title(space)}: {what}, {said_blocks(blocks)}: {self._matrix(blocks)}{said_ties(space)}"
        )

    def _matrix(self, blocks: list[np.ndarray]) -> str:
        if "hadamard" not in self.kind:
            return self.kind
        sizes = sorted({len(index) for index in blocks if len(index) > 1})
        return self.kind.replace("hadamard", "") + ", ".join(describe(n, self.fallback) for n in sizes)


def _tensors(space: Space) -> set[str]:
    return {member.value.name for member in space.activations if member.value is not None}
