"""The product of mixtures of experts: rows sorted by expert, each group with a weight of its own.

    grouped_matmul    y[t, n] = sum_k x[t, k] weight[e, k, n] for offsets[e - 1] <= t < offsets[e]

Rows from the last offset on are zero. A transform on k or n is the same for every expert: the expert axis of the
weight ties nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node
from planish.ir.ops import register
from planish.ir.ops.affine import UNKNOWN_RANK
from planish.ir.ops.align import numeric
from planish.ir.ops.base import Act, Axes, Block, Carry, Link, OpDef, Param, Port, Relation, Wide
from planish.ir.ops.labels import like, tensor_type
from planish.ir.types import UNKNOWN, Type


def _infer(node: Node) -> Sequence[Type]:
    x, weight = tensor_type(node.operand(0)), tensor_type(node.operand(1))
    if x is None or weight is None:
        return (UNKNOWN,)
    if x.shape is None or weight.shape is None:
        return (like(node.operand(0), (None, None)),)
    if len(x.shape) != 2 or len(weight.shape) != 3:
        raise InvalidModelError("grouped_matmul: expected x of rank 2 and weight of rank 3", where=f"{x}, {weight}")
    if isinstance(x.shape[1], int) and isinstance(weight.shape[1], int) and x.shape[1] != weight.shape[1]:
        raise InvalidModelError(f"grouped_matmul: {x.shape[1]} channels meet {weight.shape[1]}", where=f"{x}, {weight}")
    return (like(node.operand(0), (x.shape[0], weight.shape[2])),)


def _evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, weight, offsets = operands
    y = x.new_zeros((x.shape[0], weight.shape[2]))
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        y[start:end] = x[start:end] @ weight[expert]
        start = end
    return (y,)


_PARTNER: dict[tuple[Port, int], Link] = {
    (0, 1): Link(1, (1,), -1),
    (1, 1): Link(0, (1,), -1),
    (1, 2): Link(-1, (1,)),
    (-1, 1): Link(1, (2,)),
    (0, 0): Link(-1, (0,)),
    (-1, 0): Link(0, (0,)),
}


def _relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    refused = numeric(node, act, port)
    if refused is not None:
        return refused
    if tensor_type(node.operand(0)) is None or tensor_type(node.operand(1)) is None:
        return UNKNOWN_RANK
    if act is Act.SHIFT:
        return Block("it has no bias to take the shift up")
    if port == 2:
        return Block("it reads this operand as positions")
    if port == 1 and 0 in axes:
        return Block("each expert has rows of its own")
    if len(axes) > 1:
        return Block("rows and channels meet different operands")
    if axes == (0,) and act is not Act.SCALE:
        return Block("rows belong to experts by their place")
    return Carry((_PARTNER[port, axes[0]],))


def _channels(node: Node) -> Sequence[tuple[Port, Axes]]:
    return [(0, (1,)), (-1, (1,))]


grouped_matmul = register(
    OpDef(
        "grouped_matmul",
        (Param("x"), Param("weight"), Param("offsets")),
        _infer,
        _evaluate,
        _relate,
        _channels,
        family="grouped",
        summary="y[t, n] = sum_k x[t, k] weight[e, k, n] for the rows t of expert e, "
        "which end before offsets[e]; zero from the last offset on",
    )
)
