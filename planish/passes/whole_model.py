"""What rounding does to a whole model: its outputs on calibration data beside those of the float model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from planish.ir.errors import PlanishError
from planish.ir.evaluator import Evaluator
from planish.ir.formats import Format
from planish.ir.graph import Graph
from planish.ir.rewriter import Rewriter
from planish.ir.rounding import fake_quantize
from planish.ir.row_mask import RowMask, rows_of
from planish.ir.types import numpy_dtype
from planish.passes.base import kept_float
from planish.passes.float_branches import give_weight
from planish.passes.quantize_weights import CHUNK, rounds_alone
from planish.passes.sites import reads_by_weight, weight_matrix

COLUMNS = 8192  # of an output that are compared; of a larger one (logits of a vocabulary) every so many-th


class WholeModel:
    """The float outputs of a model on some batches, and the error of other graphs against them.

    Args:
        graph: the float model.
        batches: from input names to arrays or tensors.
        row_mask: the input that is non-zero where a row counts; None: every row does.
        who: the pass that asks, for errors.

    Raises:
        PlanishError: no data, or no output that is a float tensor.
    """

    def __init__(self, graph: Graph, batches: Sequence[Mapping[str, Any]], row_mask: str | None, who: str) -> None:
        if not batches:
            raise PlanishError(
                f"pass '{who}': needs calibration data, not only its statistics: it runs the model",
                hint="give batches (--calibrate, or data= of Pipeline.run)",
            )
        self.batches = batches
        self.row_mask = row_mask
        self.exact = [self._outputs(graph, batch) for batch in batches]
        if not any(self.exact):
            raise PlanishError(f"pass '{who}': the graph has no float output that could be compared")

    def _outputs(self, graph: Graph, batch: Mapping[str, Any]) -> list[torch.Tensor]:
        """The float outputs as rows [N, C] that count."""
        mask = None if self.row_mask is None else RowMask(graph, self.row_mask)
        if mask is not None:
            mask.start(batch)
        found = Evaluator(graph).run(batch)
        outputs = []
        for name, value in graph.outputs:
            tensor = found[name]
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.ndim:
                rows = rows_of(value, tensor, -1, mask)
                outputs.append(rows[:, :: max(1, -(-rows.shape[1] // COLUMNS))].clone())
        return outputs

    def loss(self, graph: Graph) -> float:
        """The squared error of a graph's outputs over the energy of the exact ones, the mean over the outputs."""
        count = len(self.exact[0])
        noise, energy = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        for batch, exact in zip(self.batches, self.exact, strict=True):
            for i, (got, expected) in enumerate(zip(self._outputs(graph, batch), exact, strict=True)):
                noise[i] += (got - expected).double().square().sum()
                energy[i] += expected.double().square().sum()
        return float((noise / energy.clamp(min=1e-30)).mean())


def round_weights(graph: Graph, form: Format) -> Graph:
    """The graph with the weights of its linears rounded to nearest, in place, and returned.

    They stay constants of their dtype; a weight that something else reads (an embedding) is copied first.
    """
    kept = kept_float(graph)
    with Rewriter(graph) as rewriter:
        for node in list(graph.nodes):
            x = node.operand(0)
            if node.op.name != "linear" or x is None or not reads_by_weight(node, x) or node.result.name in kept:
                continue
            weight = node.operands[1]
            assert weight is not None and weight.dtype is not None
            matrix = weight_matrix(node)
            rounded = np.empty(matrix.shape, numpy_dtype(weight.dtype))  # not held in float64
            step = CHUNK if rounds_alone(form) else max(len(matrix), 1)
            for start in range(0, len(matrix), step):
                part = slice(start, start + step)
                rounded[part] = fake_quantize(torch.from_numpy(matrix[part]).float(), form).numpy()
            give_weight(rewriter, node, rounded)
    return graph
