"""The Hessian of what a linear reads, for `planish.passes.gptq`: H = (2 / T) X^T X.

From all calibration batches where there are some, evaluated once on the float graph or on the graph as it is being
quantised; else from the rows that the statistics sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from planish.ir.errors import PlanishError
from planish.ir.graph import Graph, Value
from planish.ir.stats import Stats
from planish.ir.sweep import Sweep
from planish.passes.base import Context


class Inputs:
    """What the linears of a graph read.

    Args:
        graph: before anything is quantised.
        values: what they read.
        context: calibration batches, statistics.
        quantised: take the inputs from the graph as it is when asked; needs the batches.

    Raises:
        PlanishError: there are only statistics, and the quantised graph was asked for.
    """

    def __init__(self, graph: Graph, values: Sequence[Value], context: Context, quantised: bool) -> None:
        self.stats: Stats | None = context.stats
        self.quantised = quantised
        self.sweep: Sweep | None = None
        if context.data is None:
            if quantised:
                raise PlanishError(
                    "pass 'quantize': inputs=quantised evaluates the quantised graph: statistics are not enough",
                    hint="give the calibration data itself, or inputs=float",
                )
            return
        own = graph if quantised else graph.clone()
        targets = [own.values[v.name] for v in values]
        self.sweep = Sweep(own, context.data, targets=targets, row_mask=context.row_mask)

    @property
    def note(self) -> str:
        """How much memory it took."""
        if self.sweep is None:
            return ""
        return f"{len(self.sweep.batches)} calibration batches, at most {self.sweep.peak / 2**20:.0f} MiB held at once"

    def second_moment(self, value: Value, read: Value) -> torch.Tensor | None:
        """H of an activation of the float graph, which the linear now reads as `read`; float64. None: unknown."""
        if self.sweep is not None:
            if self.quantised:
                return self.sweep.second_moment(read, stands_for=value)
            return self.sweep.second_moment(self.sweep.graph.values[value.name])
        record = self.stats.along(value.name) if self.stats is not None else None
        return None if record is None else torch.from_numpy(hessian(record.samples))


def hessian(samples: np.ndarray) -> np.ndarray:
    """(2 / T) X^T X of rows [T, columns]; float64 [columns, columns]."""
    x = samples.astype(np.float64)
    product: np.ndarray = (2.0 / max(len(x), 1)) * (x.T @ x)
    return product
