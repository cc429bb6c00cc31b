"""Channels gathered and summed in segments: what reassembled channels leave to be done at run time.

    reassemble      y[.., c] = sum_{k in segment c} weights[k] x[.., index[k]] along `axis`

Segment c is the `sizes[c]` entries of `index` and `weights` that follow those of segment c - 1. A channel that is
split stands in several segments with weight 1 / T, channels that are merged in one segment with weight 1 / size
(QLLM, arXiv 2310.08041).

The op is linear. On other axes linear acts pass. On its own axis the weights take up a scale of either side; to move
channels, the index and the sizes would have to follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node
from planish.ir.ops import register
from planish.ir.ops.affine import UNKNOWN_RANK
from planish.ir.ops.align import conservative, numeric, static_dims
from planish.ir.ops.base import Act, Axes, Block, Carry, Link, OpDef, Param, Port, Relation, Wide, normal_axis
from planish.ir.ops.labels import integer, like, tensor_type
from planish.ir.types import WIDE_FLOATS, Type

PLACES = Block("its index names the places of channels")


def segments(sizes: np.ndarray) -> np.ndarray:
    """The segment of each entry, int64 [entries]."""
    return np.repeat(np.arange(len(sizes)), sizes)


def _infer(node: Node) -> Sequence[Type]:
    own, index, sizes, weights = (tensor_type(node.operand(i)) for i in range(4))
    if own is None or own.shape is None:
        return (like(node.operand(0), None),)
    axis, where = integer(node, "axis"), f"reassemble of {own}"
    if not -len(own.shape) <= axis < len(own.shape):
        raise InvalidModelError(f"reassemble: axis {axis} of a tensor of rank {len(own.shape)}", where=where)
    for name, vector in (("index", index), ("sizes", sizes), ("weights", weights)):
        if vector is not None and vector.shape is not None and len(vector.shape) != 1:
            raise InvalidModelError(f"reassemble: {name} is no vector", where=where)
    if index is not None and weights is not None and None not in (index.shape, weights.shape):
        if index.shape != weights.shape:
            raise InvalidModelError("reassemble: index and weights differ in length", where=where)
    given = node.operand(2)
    if given is not None and given.constant is not None:
        counts, entries = given.constant.array(), None if index is None or index.shape is None else index.shape[0]
        if (counts < 1).any() or (isinstance(entries, int) and counts.sum() != entries):
            raise InvalidModelError("reassemble: sizes must be at least 1 and sum to the length of index", where=where)
    shape = list(own.shape)
    shape[normal_axis(axis, len(shape))] = None if sizes is None or sizes.shape is None else sizes.shape[0]
    return (like(node.operand(0), tuple(shape)),)


def _evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, index, sizes, weights = operands
    axis = normal_axis(integer(node, "axis"), x.dim())
    shape = [1] * x.dim()
    shape[axis] = -1
    taken = x.index_select(axis, index.to(torch.int64)) * weights.to(x.dtype).reshape(shape)
    segment = torch.repeat_interleave(torch.arange(len(sizes)), sizes.to(torch.int64))
    shape = list(x.shape)
    shape[axis] = len(sizes)
    return (torch.zeros(shape, dtype=x.dtype).index_add(axis, segment, taken),)


def _relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    if port in (1, 2):
        return PLACES
    refused = numeric(node, act, port)
    if refused is not None:
        return refused
    x = node.operand(0)
    if x is None or x.rank is None:
        return UNKNOWN_RANK
    axis = normal_axis(integer(node, "axis"), x.rank)
    if port == 3:
        return Block("its weights belong to pairs of channels") if act is Act.SCALE else PLACES
    if axis not in axes:
        if act is Act.SHIFT:
            return Block("a shift of its operand shows on its result as another")
        return Carry((Link(~port, axes),))
    if act is not Act.SCALE or axes != (axis,):
        return PLACES
    return _scaled(node, port, axis)


def _scaled(node: Node, port: Port, axis: int) -> Relation:
    """A scale of the channels of one side: the weights take it up, besides what they take from the other."""
    index, sizes, weights = (node.operand(i) for i in (1, 2, 3))
    if index is None or sizes is None or weights is None or index.constant is None or sizes.constant is None:
        return Block("its index is not constant")
    if not weights.is_constant or weights.dtype not in WIDE_FLOATS:
        return Block("its weights are no constants that could take a scale up")
    own = node.port(port)
    dims = None if own is None else static_dims(own, (axis,))
    if dims is None:
        return Block("the sizes along the axis are not known")
    entries = np.arange(index.constant.size)
    if port == 0:
        taken = index.constant.array() % dims[0]
        return Carry((Link(3, (0,), -1, (taken, entries), apart=True),))
    return Carry((Link(3, (0,), 1, (segments(sizes.constant.array()), entries)),))


def _channels(node: Node) -> Sequence[tuple[Port, Axes]]:
    x = node.operand(0)
    if x is None or x.rank is None:
        return ()
    axis = normal_axis(integer(node, "axis"), x.rank)
    return [(0, (axis,)), (-1, (axis,))]


reassemble = register(
    OpDef(
        "reassemble",
        (Param("x"), Param("index"), Param("sizes"), Param("weights")),
        _infer,
        _evaluate,
        _relate,
        _channels,
        family="reassembly",
        summary="y[.., c] = sum of weights[k] x[.., index[k]] over the k of segment c, of sizes[c] entries, on `axis`",
        attributes={"axis": -1},
        conservative={
            **conservative((Act.PERMUTE,), (0, 1, 2, 3, -1), "index, sizes and weights could follow the channels"),
            **conservative((Act.SCALE,), (3, -1), "weights that are computed, one for each channel, could be scaled"),
        },
    )
)
