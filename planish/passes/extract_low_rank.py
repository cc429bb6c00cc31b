"""Take the directions that quantise worst out of the weights, into a branch of low rank that stays in float.

    y = x W^T + b  =  (x / s) R^T + (x down^T) up^T + b
    W diag(s) ~ L = up (down diag(s))        R = W diag(s) - L        s_j = max|x_j|^alpha / max|W_:j|^beta

Exact over the reals for every s, L: R is computed from the factors as they are stored. Linears that read one value
share s and `down`: their weights are stacked, decomposed once, and `up` is cut. What rounds is R and x / s, later,
in `quantize`, which leaves `down` and `up` in float; statistics of x / s are there for its solvers.

s is the best of 2 grid - 1 candidates, (alpha, beta) = (0, 0), (i / grid, 0) and (i / grid, 1 - i / grid), and L of the
iterates L_(t+1) = SVD_r(W' - Q(W' - L_t)), W' = W diag(s), by the output error on the sampled rows with the branch and
both quantisers active (`planish.passes.branch_search`, `planish.passes.low_rank`).

    fold     where the space of x takes a scale up, what writes x is divided by s: no op is left, and `down` reads
             x / s. Elsewhere, and by default, one explicit Mul stands before the residual, and `down` reads x as it
             was (so that a LoRA made for the model can be added to it: `planish.add_lora`).
    shift    `bounded`: behind an op with a least value the residual reads (x + c) / s, c the least multiple of 1/128
             that makes it unsigned (22/128 behind gelu), where that lowers the error; b' = b - R (c / s).

Li et al., SVDQuant, arXiv 2411.05007.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from planish.ir.constant import Constant
from planish.ir.formats import Format
from planish.ir.graph import Graph, Node, Value
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import analyse
from planish.ir.types import WIDE_FLOATS
from planish.passes.base import Context, Exactness, Pass, PassReport, keep_float, kept_float, place
from planish.passes.bounds import lower_bound
from planish.passes.branch_search import BranchSearch, choose_shift, unsigned
from planish.passes.finite import require_finite
from planish.passes.float_branches import add_branch, branch_behind, give_weight, lower_bias, stored
from planish.passes.named import check_format, check_patterns, require_named
from planish.passes.options import Range, option
from planish.passes.scales import FormatQuantiser
from planish.passes.sites import reads_by_weight, weight_matrix
from planish.passes.smoothing import fold_smoothing, smoothed


@dataclass(frozen=True, eq=False)
class _Group:
    """Linears that read one value, and what was chosen for them.

    Attributes:
        s: the smoothing [n]; ones after it was folded.
        label: of the candidate it is.
        shift: c; None: activations are signed.
        before: the error of rounding alone.
    """

    value: Value
    readers: list[Node]
    s: np.ndarray
    label: str
    shift: float | None
    before: float
    folded: bool = False


@dataclass(frozen=True)
class ExtractLowRank(Pass):
    """A float branch of low rank beside each linear, so that what is left quantises to 4 bits."""

    name = "extract-low-rank"
    exactness = Exactness.EXACT
    breaks = frozenset({"norm-gain-free"})
    needs_stats = True

    rank: int = option(32, Range(1))
    weights: str = "int4:g64"  # the format of the residual, as quantize will be told
    activations: str = "int4:g64"  # the format of x / s; none: float
    smooth: bool = True
    grid: int = option(20, Range(1))  # steps of alpha; 2 grid - 1 candidates
    iterations: int = option(100, Range(1))  # decompositions at most; the first that is worse is the last
    fold: bool = False  # divide what writes x by s, where that costs no op
    shift: Literal["bounded", "none"] = "bounded"
    rows: int = option(384, Range(1))  # sampled rows
    skip: tuple[str, ...] = ()  # regular expressions: linears whose source or result name matches are left alone
    only: tuple[str, ...] = ()  # if there are any: the linears that are not

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format(self, "weights")
        check_format(self, "activations", "none")
        check_patterns(self, "skip", "only")

    def run(self, graph: Graph, context: Context) -> PassReport:
        report = PassReport(self.name)
        groups = self._groups(graph, context, report)
        if not groups and not report.declined:
            report.misses.append("no linear with a constant weight")
        spaces = analyse(graph) if self.fold else None
        chosen = []
        with Rewriter(graph) as rewriter:
            for value, readers in context.progress(list(groups.items()), "extract-low-rank: smoothing"):
                group = self._choose(value, readers, context)
                if spaces is not None and not group.shift and (group.s != 1).any():
                    folded = fold_smoothing(rewriter, value, group.s, spaces, context)
                    group = replace(group, s=np.ones(len(group.s)), folded=True) if folded else group
                chosen.append(group)
            for group in context.progress(chosen, "extract-low-rank: branches"):
                try:
                    self._apply(rewriter, group, context, report)
                except Declined as refusal:
                    report.decline(refusal.reason, refusal.node)
        return report

    def _groups(self, graph: Graph, context: Context, report: PassReport) -> dict[Value, list[Node]]:
        groups: dict[Value, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            x = node.operand(0)
            if node.op.name != "linear" or x is None or not reads_by_weight(node, x):
                continue
            try:
                self._check(graph, node, x, context)
            except Declined as refusal:
                report.decline(refusal.reason, node)
                continue
            groups[x].append(node)
        return groups

    def _check(self, graph: Graph, node: Node, x: Value, context: Context) -> None:
        """Raise `Declined` unless the linear can be given a branch."""
        weight, stats = node.operand(1), context.stats
        assert weight is not None and weight.constant is not None and stats is not None
        require_named(node, self.skip, self.only)
        if node.result.name in kept_float(graph):
            raise Declined("it is a float branch itself")
        if branch_behind(node) is not None:
            raise Declined("it has a branch already")
        if len(weight.users) > 1 or any(v is weight for v in graph.output_values()):
            raise Declined("its weight is tied: something else reads it")
        if x.dtype not in WIDE_FLOATS or weight.dtype != x.dtype:
            raise Declined(f"its operands are {x.dtype} and {weight.dtype}; expected the same float")
        if min(weight.constant.shape) <= self.rank:
            raise Declined(f"its weight has no more than {self.rank} rows or columns")
        if stats.along(x.name) is None:
            raise Declined("no statistics of what it reads")
        require_finite(weight, node)

    # -- choosing --------------------------------------------------------------------------------------

    def _choose(self, value: Value, readers: list[Node], context: Context) -> _Group:
        inputs = _format(self.activations)
        signed = self.shift == "none" or inputs is None or unsigned(inputs) == inputs
        bound = None if signed else lower_bound(value)
        biases = [node.operand(2) for node in readers]
        shift, search = None, self._search(value, readers, context, None)
        before = search.plain
        if bound is not None and all(b is None or b.is_constant for b in biases):
            other = self._search(value, readers, context, choose_shift(bound))
            if other.plain < before:
                shift, search = other.shift, other
        label, s = "none", np.ones(search.weight.shape[1])
        if self.smooth:
            assert context.stats is not None
            found = search.smoothing(context.stats.of(value.name).largest, self.grid)
            label, s = found.label, found.s
        return _Group(value, readers, s, label, shift, before)

    def _search(self, value: Value, readers: list[Node], context: Context, shift: float | None) -> BranchSearch:
        """The search of a group; with a shift (0 is one) for unsigned activations."""
        assert context.stats is not None
        record = context.stats.of(value.name)
        picked = np.linspace(0, len(record.samples) - 1, min(self.rows, len(record.samples))).astype(np.int64)
        inputs = _format(self.activations)
        if shift is not None and inputs is not None:
            inputs = unsigned(inputs)
        quantiser = FormatQuantiser(_format(self.weights), inputs, record.minimum, record.maximum)
        samples = torch.from_numpy(np.ascontiguousarray(record.samples[picked]))
        matrices = [weight_matrix(node) for node in readers]
        return BranchSearch(samples, matrices, quantiser, self.rank, shift or 0.0, context.seed)

    # -- applying --------------------------------------------------------------------------------------

    def _apply(self, rewriter: Rewriter, group: _Group, context: Context, report: PassReport) -> None:
        readers, s = group.readers, group.s
        value = readers[0].operands[0]  # it may have become a sum: what wrote it has been given a branch
        assert value is not None
        places = ", ".join(place(n) for n in readers)
        found = self._search(value, readers, context, group.shift).branch(s, self.iterations)
        if not found.error < group.before:
            raise Declined("no branch lowers its error", readers[0])
        dtype = value.dtype or "f32"
        down = stored(found.low.down.numpy() / s, dtype)
        first = value.producer._next if value.producer is not None else rewriter.graph._first
        source = readers[0].source
        read, inserted = smoothed(rewriter, value, s, group.shift or 0.0, first, context.stats, source)
        held = rewriter.constant(Constant(down, dtype, down.shape), f"{value.name}.down.weight")
        narrow = rewriter.insert("linear", [value, held], before=first, names=[f"{value.name}.down"], source=source)
        keep_float(rewriter.graph, narrow.result)
        row = 0
        for node in readers:
            weight = weight_matrix(node) * s
            up = stored(found.low.up[row : row + len(weight)].numpy(), dtype)
            row += len(weight)
            residual = weight - up @ (down * s)
            if group.shift:
                lower_bias(rewriter, node, residual @ (group.shift / s), dtype)
            give_weight(rewriter, node, residual, ".residual")
            rewriter.set_operand(node, 0, read)
            add_branch(rewriter, node, narrow.result, up, dtype)
        report.inserted += inserted + 1 + 2 * len(readers)
        notes = [group.label, f"rank {self.rank} of {found.steps} tried"]
        notes += ["folded"] if group.folded else []
        notes += [f"shift {group.shift:g}"] if group.shift else []
        report.applied.append(
            f"%{value.name}: {', '.join(notes)}, error {group.before:.3g} -> {found.error:.3g} for {places}"
        )
        report.figures[value.name] = {
            "choice": group.label, "shift": group.shift or 0.0, "folded": group.folded, "rank": self.rank,
            "decompositions": found.steps, "full_svd": found.low.full, "excess_bound": found.low.excess,
            "error_before": group.before, "error_after": found.error,
        }  # fmt: skip


def _format(text: str) -> Format | None:
    return None if text == "none" else Format.parse(text)
