"""Which rows of a value count: padded tokens are no data.

An input of the graph says so (non-zero where a row counts); its symbolic dims say on which axes of a value
it lies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from planish.ir.errors import PlanishError, nearest
from planish.ir.graph import Graph, Value

if TYPE_CHECKING:
    import torch


class RowMask:
    """The mask input of a graph, and what it says of the values of one batch.

    Args:
        graph: the graph.
        name: of the input.

    Raises:
        PlanishError: there is no such input, or it is a scalar.
    """

    def __init__(self, graph: Graph, name: str) -> None:
        inputs = {v.name: v for v in graph.inputs}
        if name not in inputs:
            raise PlanishError(
                f"row mask '{name}': not an input of the graph; expected one of {', '.join(inputs)}",
                hint=nearest(name, inputs),
            )
        self.value = inputs[name]
        if self.value.rank == 0:
            raise PlanishError(f"row mask '{name}': is a scalar; expected a mask over rows")
        self.name = name
        self.mask: torch.Tensor | None = None

    def start(self, batch: Mapping[str, Any]) -> None:
        """Take the mask of a batch; where it has none, all of its rows count."""
        import torch

        given = batch.get(self.name)
        self.mask = None if given is None else torch.as_tensor(given) != 0

    def over(self, value: Value, lead: tuple[int, ...], axes: tuple[int, ...]) -> torch.Tensor | None:
        """The mask over the dims `lead` (the axes `axes` of the value), flattened; None: every row counts."""
        mask = self.mask
        if mask is None:
            return None
        if lead == tuple(mask.shape) or (len(lead) == 1 and lead[0] == mask.numel() > 1):
            return mask.reshape(-1)
        places = self._places(value, axes)
        if places is None or [lead[p] for p in places] != list(mask.shape):
            return None
        shape = [1] * len(lead)
        for place, size in zip(places, mask.shape, strict=True):
            shape[place] = size
        return mask.reshape(shape).expand(lead).reshape(-1)

    def _places(self, value: Value, axes: tuple[int, ...]) -> list[int] | None:
        """For each axis of the mask, the position among `axes` of the value's axis with the same symbol."""
        if self.value.shape is None or value.shape is None:
            return None
        places: list[int] = []
        for symbol in self.value.shape:
            later = [
                i
                for i, axis in enumerate(axes)
                if value.shape[axis] == symbol and i not in places and i > max(places, default=-1)
            ]
            if symbol is None or not later:
                return None
            places.append(later[0])
        return places


def rows_of(value: Value, tensor: torch.Tensor, axis: int, mask: RowMask | None) -> torch.Tensor:
    """The rows of a value that count, [N, C], float32 or wider: `axis` (negative) last, the others flattened."""
    data = (tensor if tensor.is_floating_point() and tensor.itemsize > 4 else tensor.float()).movedim(axis, -1)
    lead = tuple(int(d) for d in data.shape[:-1])
    axes = tuple(a for a in range(tensor.ndim) if a != axis + tensor.ndim)
    data = data.reshape(math.prod(lead), data.shape[-1])
    chosen = mask.over(value, lead, axes) if mask is not None else None
    return data if chosen is None else data[chosen]
