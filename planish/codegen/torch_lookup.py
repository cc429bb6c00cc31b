"""Torch code for the rows that look positions up, sort, resize, or group rows by expert."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from planish.codegen import torch_functions as functions
from planish.codegen.torch_emission import Emission, attributes_of, emitter, shape_of
from planish.codegen.torch_sizes import sizes
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.ops.base import normal_axis
from planish.ir.ops.reassembly import segments
from planish.ir.ops.resize import torch_name
from planish.ir.types import is_float, torch_dtype

if TYPE_CHECKING:
    import torch.fx

    from planish.ir.graph import Node, Value

aten = torch.ops.aten


def index(emission: Emission, value: Value | None) -> torch.fx.Node:
    """Positions as torch takes them: int64."""
    made = emission.tensor(value)
    return made if value is not None and value.dtype == "i64" else emission.method("to", made, torch.int64)


def _axis(node: Node) -> int:
    return normal_axis(int(attributes_of(node)["axis"]), len(shape_of(node.operand(0))))


def _from_the_start(emission: Emission, node: Node) -> torch.fx.Node:
    """The indices counted from the start: those of torch's own ops are, of other front ends they may be negative."""
    made = index(emission, node.operand(1))
    if emission.from_torch:
        return made
    return emission.call(functions.from_the_start, made, emission.tensor(node.operand(0)), _axis(node))


@emitter("cumsum", reads="axis")
def _cumsum(emission: Emission, node: Node) -> torch.fx.Node:
    dtype = node.result.dtype
    kept: dict[str, Any] = {} if is_float(dtype) or dtype == "i64" else {"dtype": torch_dtype(dtype or "i64")}
    return emission.call(aten.cumsum.default, emission.tensor(node.operand(0)), _axis(node), **kept)


@emitter("gather_elements", reads="axis")
def _gather_elements(emission: Emission, node: Node) -> torch.fx.Node:
    return emission.call(
        aten.gather.default, emission.tensor(node.operand(0)), _axis(node), _from_the_start(emission, node)
    )


@emitter("scatter_elements", reads="axis")
def _scatter_elements(emission: Emission, node: Node) -> torch.fx.Node:
    x, updates = emission.tensor(node.operand(0)), emission.tensor(node.operand(2))
    return emission.call(aten.scatter.src, x, _axis(node), _from_the_start(emission, node), updates)


@emitter("gather_nd", reads="axis stacked")
def _gather_nd(emission: Emission, node: Node) -> torch.fx.Node:
    places = [index(emission, value) for value in node.operands[1:]]
    if node.attributes.get("stacked", False):
        shape = node.operands[1].shape if node.operands[1] is not None else None
        if not shape or not isinstance(shape[-1], int):
            raise PlanishError("gather_nd: how many axes it indexes must be known to write torch code", where=str(node))
        places = [emission.call(aten.select.int, places[0], -1, i) for i in range(shape[-1])]
    return emission.call(aten.index.Tensor, emission.tensor(node.operand(0)), [*(None,) * _axis(node), *places])


@emitter("index_add", reads="axis")
def _index_add(emission: Emission, node: Node) -> torch.fx.Node:
    x, source = emission.tensor(node.operand(0)), emission.tensor(node.operand(2))
    return emission.call(aten.index_add.default, x, _axis(node), index(emission, node.operand(1)), source)


@emitter("reassemble", reads="axis")
def _reassemble(emission: Emission, node: Node) -> torch.fx.Node:
    x, _, sizes, _ = node.operands
    if sizes is None or sizes.constant is None:
        raise PlanishError("reassemble: its sizes must be constant to write torch code", where=str(node))
    counts = sizes.constant.array()
    segment = emission.shared(f"{node.result.name}_segments", Constant.of(segments(counts)))
    entries, weights = index(emission, node.operand(1)), emission.tensor(node.operand(3))
    return emission.call(functions.reassemble, emission.tensor(x), entries, segment, weights, _axis(node), len(counts))


@emitter("topk", reads="k axis largest sorted")
def _topk(emission: Emission, node: Node) -> list[torch.fx.Node]:
    own = attributes_of(node)
    made = emission.call(
        aten.topk.default, emission.tensor(node.operand(0)), int(own["k"]), _axis(node), bool(own["largest"]),
        bool(own["sorted"]),
    )  # fmt: skip
    return [emission.call(operator.getitem, made, place) for place in range(len(node.results))]


@emitter("nonzero")
def _nonzero(emission: Emission, node: Node) -> torch.fx.Node:
    found = emission.call(aten.nonzero.default, emission.tensor(node.operand(0)))
    return emission.call(aten.view.default, found, [-1])


@emitter("resize", reads="mode align_corners scales")
def _resize(emission: Emission, node: Node) -> torch.fx.Node:
    own = attributes_of(node)
    mode, name = str(own["mode"]), torch_name(str(own["mode"]), len(shape_of(node.operand(0))) - 2)
    if name is None:
        raise PlanishError(f"resize: mode '{mode}' has no torch form", where=str(node))
    given = None if node.operand(1) is None else sizes(emission, node.operand(1))
    corners = () if mode.startswith("nearest") else (bool(own["align_corners"]),)
    scales = None if own["scales"] is None else [float(s) for s in own["scales"]]
    return emission.call(getattr(aten, name).vec, emission.tensor(node.operand(0)), given, *corners, scales)


@emitter("grouped_matmul")
def _grouped_matmul(emission: Emission, node: Node) -> torch.fx.Node:
    operands = [emission.tensor(node.operand(place)) for place in range(3)]
    return emission.call(functions.grouped_matmul, *operands)
