"""Give channel spaces an invertible transform that makes their channels alike.

    x' = M x        W_out' = M W_out, b' = M b        W_in' = W_in M^-1

on the spaces that admit any invertible map: values per key/value head, queries against keys without positions, and what
lies between two linear layers. The residual stream admits rotations only. Exact over the reals; no op is added.

    kind       kronecker: M_1 (x) M_2 of sizes near the root of n; invertible: one matrix; block: two layers of block
               rotations with a permutation between them, orthogonal, wherever a rotation passes
    matrices   a safetensors file: <tensor> [n, n] or [blocks, n, n] by the name of a tensor in the space, or
               <tensor>.left and <tensor>.right for kronecker; spaces that it does not name are left alone
    strength   chosen from statistics: 1 whitens, 0 only rotates (`planish.passes.channel_transforms`); without
               statistics matrices are random
    condition  the largest condition number that is chosen or accepted

FlatQuant, arXiv:2410.09426; DuQuant, arXiv:2406.01721.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from planish.ir.absorb import absorb
from planish.ir.errors import PlanishError
from planish.ir.graph import Graph
from planish.ir.ops.base import Act
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import Space, analyse
from planish.ir.transform import Mix
from planish.passes.base import Context, Exactness, Pass, PassReport
from planish.passes.channel_transforms import block_rotations, invertible, kronecker, kronecker_sizes
from planish.passes.channels import kind_of, positions, title
from planish.passes.finite import require_finite_space
from planish.passes.mixing_sites import mixable, said_blocks, second_moment
from planish.passes.options import Range, option


def load_matrices(path: str) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, float64.

    Raises:
        PlanishError: no such file, or not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not Path(path).is_file():
        raise PlanishError(f"{path}: no such file of matrices")
    try:
        return {name: data.astype(np.float64) for name, data in load_file(path).items()}
    except (SafetensorError, ValueError) as error:
        raise PlanishError(f"{path}: not a file of matrices: {error}") from error


@dataclass(frozen=True)
class TransformChannels(Pass):
    """Invertible maps, given or chosen, on the spaces that admit them."""

    name = "transform-channels"
    exactness = Exactness.EXACT

    kind: Literal["kronecker", "block", "invertible"] = "kronecker"
    space: Literal["value", "residual", "all"] = "all"
    block: int = option(128, Range(1))  # of kind block; where it does not divide a space, the largest divisor below it
    matrices: str | None = None
    strength: float = option(0.5, Range(0, 1))
    condition: float = option(100.0, Range(1))
    seed: int | None = option(None, Range(0))  # none: the pipeline's

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        rng = np.random.default_rng(context.seed if self.seed is None else self.seed)
        given = load_matrices(self.matrices) if self.matrices is not None else None
        act = Act.ROTATE if self.kind == "block" else Act.LINEAR
        place = positions(graph)
        kinds = [(space, kind_of(space, place)) for space in analyse(graph).of(act) if mixable(space)]
        found = [(space, kind) for space, kind in kinds if self.space in ("all", kind)]
        if not found:
            report.misses.append(f"no space of kind {self.space} that a {act.value} map could act on")
        with Rewriter(graph) as rewriter:
            for space, kind in context.progress(found, self.name):
                try:
                    self._space(rewriter, space, kind, given, rng, context, report)
                except Declined as refusal:
                    report.decline(refusal.reason, refusal.node or space.activations[0].value)
        return report

    def _space(
        self,
        rewriter: Rewriter,
        space: Space,
        kind: str,
        given: Mapping[str, np.ndarray] | None,
        rng: np.random.Generator,
        context: Context,
        report: PassReport,
    ) -> None:
        if space.blockers:
            raise Declined(space.blockers[0].reason, space.blockers[0].node or space.blockers[0].value)
        if not space.constants:
            return
        require_finite_space(space)
        moment = second_moment(space, context.stats) if context.stats is not None else None
        blocks = [index for index in space.blocks if len(index) > 1]
        if given is not None:
            matrices = self._given(space, blocks, given)
        else:
            matrices = [self._chosen(len(i), None if moment is None else moment[np.ix_(i, i)], rng) for i in blocks]
        if not all(np.isfinite(matrix).all() for matrix in matrices):
            raise Declined("its matrix is not finite")
        worst = max(float(np.linalg.cond(m)) for m in matrices)
        if not worst <= self.condition * (1.0 + 1e-9):
            raise Declined(f"the condition number of its matrix is {worst:.3g}; expected at most {self.condition:g}")
        transform = Mix(list(zip(blocks, matrices, strict=True)), space.size, orthogonal=self.kind == "block")
        absorb(rewriter, space, transform)
        context.transformed(rewriter, space, transform)
        source = "given" if given is not None else "from statistics" if moment is not None else self._unmeasured()
        sizes = {len(i) for i in blocks}
        shape = f" {' x '.join(map(str, kronecker_sizes(max(sizes))))}" if self.kind == "kronecker" else ""
        what = f"{self.kind}{shape}, {source}, condition {worst:.3g}"
        report.applied.append(f"%{title(space)}: {kind}, {said_blocks(blocks)}: {what}")
        report.figures[title(space)] = {"condition": worst}

    def _unmeasured(self) -> str:
        return "without statistics: no permutation" if self.kind == "block" else "random"

    def _chosen(self, n: int, moment: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
        if self.kind == "block":
            size = next(d for d in range(min(self.block, n), 0, -1) if n % d == 0)
            return block_rotations(n, size, moment, rng)
        choose = kronecker if self.kind == "kronecker" else invertible
        return choose(n, moment, self.strength, self.condition, rng)

    def _given(self, space: Space, blocks: list[np.ndarray], given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The matrix of each block from the file.

        Raises:
            Declined: the file names no tensor of the space, or its matrix has another shape or is not orthogonal.
        """
        names = [member.value.name for member in space.activations if member.value is not None]
        for name in names:
            if name in given:
                data = given[name]
            elif f"{name}.left" in given and f"{name}.right" in given:
                data = np.kron(given[f"{name}.left"], given[f"{name}.right"])
            else:
                continue
            matrices = [data] * len(blocks) if data.ndim == 2 else list(data)
            expected = [(len(index), len(index)) for index in blocks]
            if [m.shape for m in matrices] != expected:
                raise Declined(f"%{name}: its matrices have shape {list(data.shape)}, its blocks {expected[0]}")
            if self.kind == "block" and any(np.abs(m @ m.T - np.eye(len(m))).max() > 1e-12 for m in matrices):
                raise Declined(f"%{name}: its matrix is not orthogonal to 1e-12")
            return matrices
        raise Declined("the file has no matrix for it")
