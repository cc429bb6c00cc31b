"""What the rows of a value lead to: through the linears that read it, and the ops behind them that take rows apart.

For choosers that compare candidates by the error behind an activation function or a gate, on samples of rows: queries,
keys and values for the linears of an attention, gate times up for those of a gated block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from planish.ir.formats import Format
from planish.ir.graph import Node, Value
from planish.ir.ops.base import Wide
from planish.ir.rounding import fake_quantize
from planish.passes.sites import weight_matrix

_BY_CHANNEL = frozenset({"elementwise", "arithmetic"})


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Linears that read one value, and the ops behind them.

    Attributes:
        readers: linears with constant weights (and biases).
        nodes: the ops behind them, in order: each reads results of these, and constants that are vectors at most.
        ends: the values at which other ops take over.
    """

    readers: tuple[Node, ...]
    nodes: tuple[Node, ...]
    ends: tuple[Value, ...]

    def weights(self) -> list[torch.Tensor]:
        """The weights of the linears, float32 [outputs, inputs] each."""
        return [torch.from_numpy(weight_matrix(node)).float() for node in self.readers]

    def run(self, rows: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The ends, [N, channels] each, for rows [N, inputs] and weights [outputs, inputs] in place of the linears'."""
        found: dict[Value, torch.Tensor] = {}
        for node, weight in zip(self.readers, weights, strict=True):
            bias = node.operand(2)
            y = rows @ weight.T
            found[node.result] = y if bias is None or bias.constant is None else y + bias.constant.tensor().to(y.dtype)
        wide = Wide(rows.dtype)
        for node in self.nodes:
            operands = [None if v is None else _held(v, found, wide) for v in node.operands]
            found[node.result] = node.op.evaluate(node, operands, wide)[0]
        return [found[v] for v in self.ends]


def _held(value: Value, found: Mapping[Value, torch.Tensor], wide: Wide) -> torch.Tensor:
    if value in found:
        return found[value]
    assert value.constant is not None
    held: torch.Tensor = wide.hold(value.constant)
    return held


def row_block(readers: Sequence[Node], place: Mapping[Node, int]) -> RowBlock:
    """The block behind linears that read one value.

    Args:
        readers: linears with constant weights, and constant biases where they have any.
        place: the place of each node in the order of the graph (`channels.positions`).
    """
    inside = {node.result for node in readers}
    nodes: list[Node] = []
    waiting: dict[int, Node] = {place[user]: user for value in inside for user in value.users if user in place}
    while waiting:
        node = waiting.pop(min(waiting))
        if not _takes_rows(node, inside):
            continue
        nodes.append(node)
        inside.add(node.result)
        waiting |= {place[user]: user for user in node.result.users if user in place}
    kept = set(nodes)
    ends = [n.result for n in (*readers, *nodes) if not n.result.users or any(u not in kept for u in n.result.users)]
    return RowBlock(tuple(readers), tuple(nodes), tuple(ends))


def _takes_rows(node: Node, inside: set[Value]) -> bool:
    if node.op.family not in _BY_CHANNEL or len(node.results) != 1:
        return False
    for value in node.operands:
        if value is None or value in inside:
            continue
        if value.constant is None or len(value.constant.shape) > 1:
            return False
    return True


class ChannelMap(Protocol):
    """A change of what the linears of a block read, with the weights that go with it."""

    def activations(self, x: np.ndarray) -> np.ndarray:
        """Rows [N, C] after the change."""

    def columns(self, weight: np.ndarray) -> np.ndarray:
        """The weight [outputs, C] that reads them."""


@dataclass(frozen=True, eq=False)
class BlockError:
    """The relative error of a block on rows x float32 [N, C], with weights and activations rounded to formats.

    None stands for no rounding. A static format takes its range from the rows.
    """

    block: RowBlock
    x: torch.Tensor
    weights: Format | None
    activations: Format | None

    @cached_property
    def _own(self) -> list[torch.Tensor]:
        return self.block.weights()

    @cached_property
    def _wanted(self) -> list[torch.Tensor]:
        return self.block.run(self.x, self._own)

    def of(self, change: ChannelMap | None, *, rounded: bool = True) -> float:
        """|y' - y|^2 / |y|^2 over the ends of the block; `rounded` False: without rounding."""
        x, own, wanted = self.x, self._own, self._wanted
        if change is not None:
            x = torch.from_numpy(change.activations(x.numpy()))
            own = [torch.from_numpy(change.columns(w.numpy())) for w in own]
        if rounded and self.activations is not None:
            x = fake_quantize(x, self.activations, float(x.min()), float(x.max()))
        if rounded and self.weights is not None:
            own = [fake_quantize(w, self.weights) for w in own]
        got = self.block.run(x, own)
        total = sum(float(y.double().square().sum()) for y in wanted)
        return sum(float((a - b).double().square().sum()) for a, b in zip(got, wanted, strict=True)) / (total or 1.0)
