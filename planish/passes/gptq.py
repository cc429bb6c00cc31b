"""GPTQ: codes of a weight that keep the output of its layer, on the grid of any number format.

    minimise  |X W^T - X Q^T|^2 / T  =  tr((W - Q) H (W - Q)^T) / 2,     H = (2 / T) X^T X + damping
    H = R R^T, R upper triangular;  with D = W - Q  the loss is  sum_j e_j^2 / 2,
    e_j = (w'_j - q_j) R_jj,        w'_j = w_j + sum_{i<j} D_i R_ij / R_jj,        q_j = nearest level to w'_j

Column by column: each takes up what the columns before it left, a few in turn and many at once in products of
matrices. This is the recursion of Frantar et al. (arXiv 2210.17323) with R in place of the inverse of the Cholesky
factor of H^-1 (U = R^-1): the same numbers from one factorisation and no inverse. The identity of the first two lines
is what the tests hold it to.

Scales, zero points and blocks are those of the weight as it came (static groups), so that the order of the
columns is free: by falling diag(H) (act-order), or as they stand. A column that is never used (H_jj = 0) is
rounded to nearest and passes nothing on. With clusters a column takes the nearest level of any cluster of its
block, and the cluster with it. The first line of `damping` to make H positive definite is taken, a tenth more
than the one before each time it fails.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from planish.ir.errors import PlanishError
from planish.ir.formats import Format
from planish.ir.qtensor import QTensor
from planish.ir.rounding import round_element

LEAF = 32  # columns that are rounded one by one before the others take up their errors in one product
ROWS = 8192  # of a weight that are in work at once
RETRIES = 20  # of the factorisation, each with more damping


@dataclass(frozen=True)
class Solution:
    """A weight whose codes were chosen.

    Attributes:
        weight: the codes, on the grid they were asked for.
        loss: sum of e^2 / 2 with the damped H.
        damping: the fraction of the mean of diag(H) that was added to it.
    """

    weight: QTensor
    loss: float
    damping: float


def gptq(
    weight: np.ndarray,
    rounded: QTensor,
    form: Format,
    curvature: torch.Tensor | np.ndarray,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Solution:
    """Choose the codes of a weight.

    Args:
        weight: [rows, columns], finite.
        rounded: the weight on its grid, rounded to nearest (`quantize_array`): its scales, zero points and blocks
            are kept, its codes (and clusters) are chosen again.
        form: the format.
        curvature: H without damping, [columns, columns]; not changed.
        damping: added to the diagonal of H, as a fraction of its mean.
        act_order: columns by falling diag(H).
        dtype: of the columns; H is factored in float64.

    Raises:
        PlanishError: H is not finite, or could not be factored with any damping.
    """
    h = torch.as_tensor(curvature).to(torch.float64)
    if not bool(torch.isfinite(h.sum())):
        raise PlanishError("gptq: what the layer reads is not finite")
    # the first to be rounded stands last: then R is the transpose of the Cholesky factor as it comes
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if act_order else torch.arange(len(h))
    order = order.flip(0)
    factor, energies, used = _factor(h, order, damping)
    factor = factor.to(dtype)
    columns, back = order.tolist(), torch.argsort(order)
    codes = np.empty_like(rounded.codes)
    clusters = None if rounded.clusters is None else np.empty_like(rounded.clusters)
    loss = 0.0
    with torch.no_grad():
        for start in range(0, len(weight), ROWS):
            rows = slice(start, start + ROWS)
            chunk = _Chunk(torch.from_numpy(weight[rows]).T[order].to(dtype), _Levels(rounded, form, dtype, rows))
            chunk.solve(factor, columns, 0, len(columns))
            loss += float((chunk.losses * energies).sum()) / 2.0
            codes[rows] = chunk.codes[back].T.double().numpy().astype(codes.dtype)
            if clusters is not None and chunk.clusters is not None:
                clusters[rows] = chunk.clusters[back].T.numpy()
    return Solution(replace(rounded, codes=codes, clusters=clusters), loss, used)


class _Chunk:
    """Some rows of the weight while their codes are chosen; everything is [columns, rows], in the order of work."""

    def __init__(self, wanted: torch.Tensor, levels: _Levels) -> None:
        self.wanted = wanted.contiguous()
        self.target = wanted.clone()  # w'
        self.left = torch.empty_like(wanted)  # D
        self.codes = torch.empty_like(wanted)
        self.levels = levels
        self.clusters = torch.empty(wanted.shape, dtype=torch.uint8) if len(levels.scales) > 1 else None
        self.losses = torch.zeros(len(wanted), dtype=torch.float64)

    def solve(self, factor: torch.Tensor, columns: list[int], start: int, stop: int) -> None:
        """Choose the codes of columns `stop` - 1 down to `start`, all from `stop` on taken up already."""
        if stop - start > LEAF:
            middle = start + max((stop - start) // 2 // LEAF, 1) * LEAF
            self.solve(factor, columns, middle, stop)
            self.target[start:middle].addmm_(factor[start:middle, middle:stop], self.left[middle:stop])
            self.solve(factor, columns, start, middle)
            return
        for j in reversed(range(start, stop)):
            row = self.target[j]
            if j + 1 < stop:
                row.addmv_(self.left[j + 1 : stop].T, factor[j, j + 1 : stop])
            got, self.codes[j], ids = self.levels.nearest(row, columns[j])
            if self.clusters is not None and ids is not None:
                self.clusters[j] = ids
            torch.sub(self.wanted[j], got, out=self.left[j])
            self.losses[j] = (row - got).square_().sum()


def damped(curvature: torch.Tensor | np.ndarray, damping: float) -> torch.Tensor:
    """H as `gptq` sees it: columns that are never used have 1 on the diagonal; float64."""
    h = torch.as_tensor(curvature).to(torch.float64).clone()
    h.diagonal()[h.diagonal() == 0] = 1.0
    h.diagonal().add_(damping * float(h.diagonal().mean()))
    return h


def _factor(h: torch.Tensor, order: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """With H = L L^T in that order, damped as much as it takes: L_ij / L_jj as [j, i], L_jj^2, and the damping."""
    held = h[order[:, None], order[None, :]]
    diagonal = held.diagonal()
    diagonal[diagonal == 0] = 1.0
    plain, mean = diagonal.clone(), float(diagonal.mean())
    for attempt in range(RETRIES):
        used = damping * (1.0 + attempt / 10.0)
        diagonal.copy_(plain + used * mean)
        lower, failed = torch.linalg.cholesky_ex(held)
        if not int(failed) and bool(torch.isfinite(lower.diagonal()).all()):
            upper = lower.mT.contiguous()
            pivots = upper.diagonal().clone()
            return upper.div_(pivots[:, None]), pivots**2, used
    raise PlanishError(
        f"gptq: the Hessian could not be factored with a damping of {damping:g} to {used:g}",
        hint="more damping, or more calibration data",
    )


class _Levels:
    """The nearest level of a quantised weight to a column, by the grid of the column's block."""

    def __init__(self, q: QTensor, form: Format, dtype: torch.dtype, chosen: slice) -> None:
        self.element = q.element
        self.is_float = form.is_float
        self.float_zero = q.zero_is_float
        self.low, self.high = form.range
        rows, columns = q.codes.shape
        factor = 1.0 if q.global_scale is None else q.global_scale
        split = q.clusters is not None

        def grids(held: np.ndarray | None, times: float) -> list[torch.Tensor] | None:
            """One [blocks or 1, rows] for each cluster."""
            if held is None:
                return None
            made = []
            for one in held if split else [held]:
                if q.block is not None:
                    table = one.T[:, chosen]
                else:
                    table = np.broadcast_to(one, (rows,))[None, chosen] if q.axis != 1 else one[:, None]
                made.append(torch.from_numpy(np.ascontiguousarray(table * times)).to(dtype))
            return made

        scales = grids(q.scale, factor)
        assert scales is not None
        self.scales = scales
        self.zeros = grids(q.zero, 1.0)
        if q.group_index is not None:
            self.block_of = [int(g) for g in q.group_index]
        elif q.block is not None:
            self.block_of = [k // q.block for k in range(columns)]
        else:
            self.block_of = list(range(columns)) if q.axis == 1 else [0] * columns

    def nearest(self, wanted: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The numbers nearest to `wanted` [rows] that the column can hold, their codes, and their clusters."""
        block = self.block_of[column]
        value, codes = self._of(wanted, block, 0)
        if len(self.scales) == 1:
            return value, codes, None
        clusters = torch.zeros_like(wanted, dtype=torch.uint8)
        least = (value - wanted).abs_()
        for k in range(1, len(self.scales)):
            other, other_codes = self._of(wanted, block, k)
            distance = (other - wanted).abs_()
            better = distance < least
            value, codes = torch.where(better, other, value), torch.where(better, other_codes, codes)
            least = torch.where(better, distance, least)
            clusters.masked_fill_(better, k)
        return value, codes, clusters

    def _of(self, wanted: torch.Tensor, block: int, cluster: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.scales[cluster][block]
        if self.is_float:
            codes = round_element(wanted / scale, self.element)
            return codes * scale, codes
        codes = torch.div(wanted, scale)
        if self.zeros is None:
            codes.round_().clamp_(self.low, self.high)
            return codes * scale, codes
        zero = self.zeros[cluster][block]
        codes = codes.add_(zero).round_() if self.float_zero else codes.round_().add_(zero)
        codes.clamp_(self.low, self.high)
        return (codes - zero).mul_(scale), codes
