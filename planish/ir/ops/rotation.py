"""The explicit rotation that an outlier-spreading pass leaves in a graph.

    hadamard        y = (x * signs) H_b' / sqrt(b) on each block of b channels of `axis`; transpose: the inverse,
                    y = (x H_b / sqrt(b)) * signs

H_b is the matrix of `planish.ir.hadamard`. The op is linear and treats the other axes alike, so that a linear
act on those passes. On its own axis it mixes what a transform keeps apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planish.ir import hadamard as matrices
from planish.ir.constant import Constant
from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node
from planish.ir.ops import register
from planish.ir.ops.affine import UNKNOWN_RANK
from planish.ir.ops.align import attribute, numeric
from planish.ir.ops.base import Act, Axes, Block, Carry, Link, OpDef, Param, Port, Relation, Wide, normal_axis
from planish.ir.ops.labels import flag, integer, tensor_type
from planish.ir.types import UNKNOWN, Type


def block_size(node: Node) -> int | None:
    """The number of channels that a `hadamard` node mixes; None: the size of its axis is not known."""
    block = attribute(node, "block")
    if isinstance(block, int):
        return int(block)
    own = tensor_type(node.operand(0))
    if own is None or own.shape is None:
        return None
    size = own.shape[normal_axis(integer(node, "axis"), len(own.shape))]
    return size if isinstance(size, int) else None


def signs_of(node: Node) -> Constant | None:
    """The signs of a `hadamard` node, float [n]."""
    found = attribute(node, "signs")
    return found if isinstance(found, Constant) else None


def _infer(node: Node) -> Sequence[Type]:
    own = tensor_type(node.operand(0))
    if own is None or own.shape is None:
        return (UNKNOWN if own is None else own,)
    axis, where = integer(node, "axis"), f"hadamard of {own}"
    if not -len(own.shape) <= axis < len(own.shape):
        raise InvalidModelError(f"hadamard: axis {axis} of a tensor of rank {len(own.shape)}", where=where)
    block, signs = block_size(node), signs_of(node)
    size = own.shape[normal_axis(axis, len(own.shape))]
    if isinstance(size, int) and block is not None:
        if block < 1 or size % block:
            raise InvalidModelError(f"hadamard: blocks of {block} do not divide {size} channels", where=where)
        if signs is not None and signs.shape != (size,):
            raise InvalidModelError(f"hadamard: expected {size} signs, got shape {signs.shape}", where=where)
    if block is not None and not matrices.known(block):
        raise InvalidModelError(f"hadamard: there is no matrix of order {block}", where=where)
    return (own,)


def _evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    (x,) = operands
    axis = normal_axis(integer(node, "axis"), x.dim())
    x = x.movedim(axis, -1)
    constant, inverse = signs_of(node), flag(node, "transpose")
    signs = None if constant is None else wide.hold(constant).to(x.dtype)
    if signs is not None and not inverse:
        x = x * signs
    block = attribute(node, "block")
    x = matrices.apply(x, x.shape[-1] if block is None else block, transpose=inverse)
    if signs is not None and inverse:
        x = x * signs
    return (x.movedim(-1, axis),)


def _relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    refused = numeric(node, act, port)
    if refused is not None:
        return refused
    own = tensor_type(node.operand(0))
    if own is None or own.shape is None:
        return UNKNOWN_RANK
    if normal_axis(integer(node, "axis"), len(own.shape)) in axes:
        return Block("it mixes the channels that a transform keeps apart")
    if act is Act.SHIFT:
        return Block("a shift of its operand shows on its result as another")
    return Carry((Link(-1 if port == 0 else 0, axes),))


hadamard = register(
    OpDef(
        "hadamard",
        (Param("x"),),
        _infer,
        _evaluate,
        _relate,
        family="rotation",
        summary="(x * signs) H' / sqrt(b) on each block of b channels of `axis` (none: one block); "
        "transpose: (x H / sqrt(b)) * signs",
        attributes={"axis": -1, "block": None, "transpose": False, "signs": None},
    )
)
