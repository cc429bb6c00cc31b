"""Ops between tensors and their shapes: shape, constant_of_shape, range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from planish.ir.constant import Constant
from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node
from planish.ir.ops.align import LINEAR_ACTS, attribute
from planish.ir.ops.base import Act, Axes, Block, Carry, Param, Port, Relation, Wide
from planish.ir.ops.structural import NOT_DATA, element_count, operand_shape, structural_row, typed
from planish.ir.shapes import known_ints, static_ints, subtract
from planish.ir.types import Dim, TensorType, Type


def _infer_shape(node: Node) -> Sequence[Type]:
    shape = operand_shape(node)
    length = None if shape is None else len(shape[attribute(node, "start") : attribute(node, "end")])
    return (TensorType("i64", (length,)),)


def _evaluate_shape(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    dims = list(operands[0].shape)[attribute(node, "start") : attribute(node, "end")]
    return (torch.tensor(dims, dtype=torch.int64),)


def _relate_shape(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    return Carry() if port == 0 else Block("it holds sizes")


def _fill(node: Node) -> Constant:
    value = attribute(node, "value")
    if not isinstance(value, Constant) or value.size != 1:
        raise InvalidModelError("constant_of_shape: value is not a tensor of one element", where=str(node))
    return value


def _infer_filled(node: Node) -> Sequence[Type]:
    dims = known_ints(node.operand(0))
    if dims is None:
        count = element_count(node.operand(0))
        return (TensorType(_fill(node).dtype, None if count is None else (None,) * count),)
    return (TensorType(_fill(node).dtype, dims),)


def _evaluate_filled(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    fill = _fill(node)
    value = fill.tensor(wide.of(fill.dtype)).reshape(())
    return (value.expand([int(d) for d in operands[0].reshape(-1).tolist()]),)


def _relate_filled(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    if port >= 0:
        return NOT_DATA
    if act is Act.PERMUTE or (act in LINEAR_ACTS and not _fill(node).array().reshape(-1)[0]):
        return Carry()
    return Block("it fills every channel with one value")


def _infer_range(node: Node) -> Sequence[Type]:
    start, limit, delta = (known_ints(node.operand(index)) for index in range(3))
    length: Dim = None
    if start and limit and delta:
        if delta[0] == 1:
            length = subtract(limit[0], start[0])
            length = max(length, 0) if isinstance(length, int) else length if start[0] == 0 else None
        else:
            bounds = [static_ints(node.operand(index)) for index in range(3)]
            flat = [b[0] for b in bounds if b]
            length = len(range(*flat)) if len(flat) == 3 and flat[2] else None
    return typed(node, (length,))


def _evaluate_range(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    start, limit, delta = (x.reshape(()) for x in operands)
    count = max(math.ceil((limit.item() - start.item()) / delta.item()), 0)
    return (start + torch.arange(count).to(delta.dtype) * delta,)


def _relate_range(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    return NOT_DATA if port >= 0 else Block("it counts along the axis")


structural_row(
    "shape",
    (Param("x"),),
    _infer_shape,
    _evaluate_shape,
    _relate_shape,
    "the dims of x from `start` to `end`",
    {"start": 0, "end": None},
    family="sizes",
)
structural_row(
    "constant_of_shape",
    (Param("shape"),),
    _infer_filled,
    _evaluate_filled,
    _relate_filled,
    "a tensor filled with `value`",
    {"value": None},
    family="sizes",
)
structural_row(
    "range",
    (Param("start"), Param("limit"), Param("delta")),
    _infer_range,
    _evaluate_range,
    _relate_range,
    "start, start + delta, ... up to and without limit",
    family="sizes",
)
