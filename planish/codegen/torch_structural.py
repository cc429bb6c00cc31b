"""Torch code for the rows of the op table that move elements: shapes, slices, indices, sizes, counts."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from planish.codegen import torch_functions as functions
from planish.codegen.torch_emission import Emission, attributes_of, emitter, scalar, shape_of
from planish.codegen.torch_lookup import index
from planish.codegen.torch_sizes import dim, integers, product, size, sizes
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.ops.base import normal_axis

if TYPE_CHECKING:
    import torch.fx

    from planish.ir.graph import Node

aten = torch.ops.aten


@emitter("reshape", reads="allowzero")
def _reshape(emission: Emission, node: Node) -> torch.fx.Node:
    x, source = emission.tensor(node.operand(0)), node.operand(0)
    assert source is not None
    allowzero = bool(attributes_of(node)["allowzero"])
    wanted = sizes(emission, node.operand(1))
    if not isinstance(wanted, list):
        return emission.call(functions.reshape_by_copy, x, wanted, allowzero)
    if not allowzero:
        wanted = [dim(emission, source, axis) if one == 0 else one for axis, one in enumerate(wanted)]
    return emission.call(aten.reshape.default, x, wanted)


@emitter("flatten", reads="axis")
def _flatten(emission: Emission, node: Node) -> torch.fx.Node:
    x, source = emission.tensor(node.operand(0)), node.operand(0)
    assert source is not None
    rank = len(shape_of(source))
    axis = normal_axis(int(attributes_of(node)["axis"]), rank)
    if axis == rank:
        return emission.call(aten.reshape.default, x, [-1, 1])
    rows = product(emission, [dim(emission, source, a) for a in range(axis)])
    columns = product(emission, [dim(emission, source, a) for a in range(axis, rank)])
    return emission.call(aten.reshape.default, x, [rows, columns])


@emitter("transpose", reads="perm")
def _transpose(emission: Emission, node: Node) -> torch.fx.Node:
    perm = attributes_of(node)["perm"]
    order = list(reversed(range(len(shape_of(node.operand(0)))))) if perm is None else [int(a) for a in perm]
    return emission.call(aten.permute.default, emission.tensor(node.operand(0)), order)


@emitter("unsqueeze", reads="axes")
def _unsqueeze(emission: Emission, node: Node) -> torch.fx.Node:
    made, axes = emission.tensor(node.operand(0)), attributes_of(node)["axes"]
    rank = len(shape_of(node.operand(0))) + len(axes)
    for axis in sorted(normal_axis(int(a), rank) for a in axes):
        made = emission.call(aten.unsqueeze.default, made, axis)
    return made


@emitter("squeeze", reads="axes")
def _squeeze(emission: Emission, node: Node) -> torch.fx.Node:
    axes = [int(a) for a in attributes_of(node)["axes"]]
    x = emission.tensor(node.operand(0))
    return emission.call(aten.squeeze.dims, x, axes) if axes else x


@emitter("expand")
def _expand(emission: Emission, node: Node) -> torch.fx.Node:
    source, x = node.operand(0), emission.tensor(node.operand(0))
    assert source is not None
    wanted = sizes(emission, node.operand(1))
    if not isinstance(wanted, list):
        return emission.call(functions.broadcast_to, x, wanted)
    shape = shape_of(source)
    rank = max(len(shape), len(wanted))
    own: list[Any] = [1] * (rank - len(shape)) + list(shape)
    target = [1] * (rank - len(wanted)) + wanted
    result = node.result.shape
    filled: list[Any] = []
    for axis, (mine, one) in enumerate(zip(own, target, strict=True)):
        if mine == 1:
            filled.append(one)
        elif one == 1 or one == mine or (isinstance(mine, str) and result is not None and result[axis] == mine):
            filled.append(-1)
        elif isinstance(mine, int):
            filled.append(mine if isinstance(one, int) else -1)
        else:
            return emission.call(functions.broadcast_to, x, wanted)
    return emission.call(aten.expand.default, x, filled)


@emitter("concat", reads="axis")
def _concat(emission: Emission, node: Node) -> torch.fx.Node:
    parts = [emission.tensor(operand) for operand in node.operands]
    return emission.call(aten.cat.default, parts, int(attributes_of(node)["axis"]))


@emitter("split", reads="axis sizes")
def _split(emission: Emission, node: Node) -> list[torch.fx.Node]:
    own = attributes_of(node)
    lengths = [int(length) for length in own["sizes"]]
    made = emission.call(aten.split_with_sizes.default, emission.tensor(node.operand(0)), lengths, int(own["axis"]))
    return [emission.call(operator.getitem, made, index) for index in range(len(node.results))]


@emitter("slice")
def _slice(emission: Emission, node: Node) -> torch.fx.Node:
    made = emission.tensor(node.operand(0))
    starts, ends = sizes(emission, node.operand(1)), sizes(emission, node.operand(2))
    axes = None if node.operand(3) is None else sizes(emission, node.operand(3))
    steps = None if node.operand(4) is None else sizes(emission, node.operand(4))
    if isinstance(starts, list) and axes is None:
        axes = list(range(len(starts)))
    if isinstance(starts, list) and steps is None:
        steps = [1] * len(starts)
    columns = (starts, ends, axes, steps)
    if not all(isinstance(column, list) for column in columns) or not _literal(steps, axes):
        return emission.call(functions.slice_where, made, starts, ends, axes, steps)
    for start, end, axis, step in zip(*(c for c in columns if isinstance(c, list)), strict=True):
        if step < 0:
            made = emission.call(functions.slice_backwards, made, axis, start, end, step)
        else:
            made = emission.call(aten.slice.Tensor, made, axis, start, end, step)
    return made


def _literal(*columns: Any) -> bool:
    return all(isinstance(one, int) for column in columns for one in column)


@emitter("gather", reads="axis")
def _gather(emission: Emission, node: Node) -> torch.fx.Node:
    source, places = node.operand(0), node.operand(1)
    assert source is not None and places is not None
    axis = normal_axis(int(attributes_of(node)["axis"]), len(shape_of(source)))
    x = emission.tensor(source)
    if places.rank == 0:
        found = integers(emission, places)
        if found is not None:
            return emission.call(aten.select.int, x, axis, found[0])
    return emission.call(aten.index.Tensor, x, [*(None,) * axis, index(emission, places)])


@emitter("embedding")
def _embedding(emission: Emission, node: Node) -> torch.fx.Node:
    table, ids = node.operand(0), node.operand(1)
    assert ids is not None
    if not emission.from_torch:  # elsewhere, ids may count from the end
        return emission.call(aten.index.Tensor, emission.tensor(table), [index(emission, ids)])
    made = emission.tensor(ids) if ids.dtype in ("i64", "i32") else index(emission, ids)
    return emission.call(aten.embedding.default, emission.tensor(table), made)


@emitter("tile")
def _tile(emission: Emission, node: Node) -> torch.fx.Node:
    return emission.call(aten.repeat.default, emission.tensor(node.operand(0)), sizes(emission, node.operand(1)))


@emitter("pad", reads="mode")
def _pad(emission: Emission, node: Node) -> torch.fx.Node:
    x, rank = emission.tensor(node.operand(0)), len(shape_of(node.operand(0)))
    mode, pads = str(attributes_of(node)["mode"]), sizes(emission, node.operand(1))
    chosen = list(range(rank)) if node.operand(3) is None else integers(emission, node.operand(3))
    if chosen is None or not _literal(chosen):
        raise PlanishError("pad: its axes must be constant to write torch code", where=str(node))
    axes = [normal_axis(axis, rank) for axis in chosen]
    value: Any = None
    if mode == "constant" and node.operand(2) is not None:
        value = emission.number(node.operand(2))
        value = emission.tensor(node.operand(2)) if value is None else value
    if mode == "constant" and isinstance(pads, list) and (value is None or isinstance(value, bool | int | float)):
        first = min((a for i, a in enumerate(axes) if pads[i] != 0 or pads[i + len(axes)] != 0), default=rank)
        if first == rank:
            return x
        amounts: list[Any] = []
        for axis in reversed(range(first, rank)):
            place = axes.index(axis) if axis in axes else None
            amounts += [0, 0] if place is None else [pads[place], pads[place + len(axes)]]
        return emission.call(aten.constant_pad_nd.default, x, amounts, *(() if not value else (value,)))
    return emission.call(functions.pad, x, pads, axes, mode, *(() if value is None else (value,)))


@emitter("trilu", reads="upper")
def _trilu(emission: Emission, node: Node) -> torch.fx.Node:
    function = aten.triu.default if attributes_of(node)["upper"] else aten.tril.default
    diagonal = 0 if node.operand(1) is None else size(emission, node.operand(1))
    return emission.call(function, emission.tensor(node.operand(0)), diagonal)


# -- sizes and counts ------------------------------------------------------------------------------------


@emitter("shape", reads="start end")
def _shape(emission: Emission, node: Node) -> torch.fx.Node:
    integers(emission, node.result)
    if emission.integers.get(node.result) is None:
        raise PlanishError("shape: the rank of its operand must be known to write torch code", where=str(node))
    return emission.tensor(node.result)


@emitter("constant_of_shape", reads="value")
def _constant_of_shape(emission: Emission, node: Node) -> torch.fx.Node:
    fill = attributes_of(node)["value"]
    if not isinstance(fill, Constant):
        raise PlanishError("constant_of_shape: value is not a tensor of one element", where=str(node))
    return emission.call(
        aten.full.default, sizes(emission, node.operand(0)), scalar(fill), dtype=emission.dtype(fill.dtype),
        device=emission.device(),
    )  # fmt: skip


@emitter("range")
def _range(emission: Emission, node: Node) -> torch.fx.Node:
    bounds = [emission.number(operand) for operand in node.operands]
    if any(bound is None for bound in bounds):
        return emission.call(functions.count_from, *(emission.tensor(operand) for operand in node.operands))
    dtype = emission.dtype(node.result.dtype or "i64")
    return emission.call(aten.arange.start_step, *bounds, dtype=dtype, device=emission.device())


# -- rows with a matrix or a recurrence of their own -----------------------------------------------------


@emitter("hadamard", reads="axis block transpose signs")
def _hadamard(emission: Emission, node: Node) -> torch.fx.Node:
    from planish.ir import hadamard as matrices

    own, x = attributes_of(node), node.operand(0)
    shape = shape_of(x)
    axis = normal_axis(int(own["axis"]), len(shape))
    block = own["block"] if isinstance(own["block"], int) else shape[axis]
    if not isinstance(block, int):
        raise PlanishError("hadamard: the size of its axis must be known to write torch code", where=str(node))
    dtype = node.result.dtype or "f32"
    factors = [
        emission.shared(f"hadamard_{order}_{dtype}", Constant.of(matrices.dense(order), dtype))
        for order in matrices.factors(block)
    ]
    signs = own["signs"]
    held = None if not isinstance(signs, Constant) else emission.shared(f"{node.result.name}_signs", signs)
    return emission.call(functions.hadamard, emission.tensor(x), factors, held, axis, bool(own["transpose"]))


@emitter("selective_scan")
def _selective_scan(emission: Emission, node: Node) -> torch.fx.Node:
    operands = [emission.optional(node.operand(index)) for index in range(6)]
    return emission.call(functions.selective_scan, *operands)


__all__: Sequence[str] = []
