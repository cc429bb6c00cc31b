"""Ops that cut and join axes at whole positions of an axis: concat, split, slice.

A transform along the axis itself is carried position by position (`Link.pairs`), along any other axis
as it is. Positions that only one side has are free: nothing else meets them there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node
from planish.ir.ops.align import (
    asked_dims,
    attribute,
    index_pairs,
    static_dims,
    swapped,
)
from planish.ir.ops.base import (
    Act,
    Axes,
    Block,
    Carry,
    Link,
    Param,
    Port,
    Relation,
    Wide,
    normal_axis,
    repeats_by_channel,
)
from planish.ir.ops.stacks import widened
from planish.ir.ops.structural import (
    NOT_DATA,
    element_count,
    operand_shape,
    structural_row,
    typed,
)
from planish.ir.shapes import add, known_ints, static_ints, subtract
from planish.ir.types import UNKNOWN, Dim, TensorType, Type

DYNAMIC = Block("the sizes along the axis are not known")
_FAR = 1 << 31  # a slice end from here on means the end of the axis
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, *_SIGNED.values()}
)


def take(x: torch.Tensor, axis: int, index: torch.Tensor) -> torch.Tensor:
    """The elements of x at a vector of non-negative positions along an axis; for every dtype."""
    if x.dtype in _PLAIN or x.is_complex():
        return x.index_select(axis, index)
    return x.contiguous().view(_SIGNED[x.element_size()]).index_select(axis, index).view(x.dtype)


def moved(
    port: Port, axes: Axes, dims: Sequence[int], indices: Sequence[np.ndarray | None], *, from_source: bool
) -> Link:
    """The link from the source of positions to what is taken of them, or back.

    `dims` are the source's; `indices` say for each axis where the taken positions come from.
    """
    whole = all(i is None or (len(i) == d and (i == np.arange(d)).all()) for i, d in zip(indices, dims, strict=True))
    if whole:
        return Link(port, axes)
    pairs = index_pairs(dims, indices)
    return Link(port, axes, pairs=pairs if from_source else swapped(pairs))


def relate_positions(node: Node, port: Port, axes: Axes, indices: Mapping[int, np.ndarray | None]) -> Carry | Block:
    """slice, tile, pad: axes keep their places; `indices[axis]` are the sources of the result's positions.

    An axis that is not in `indices` stays as it is; None: nothing is known.
    """
    if port not in (0, -1):
        return NOT_DATA
    touched = [axis for axis in axes if axis in indices]
    other = -1 if port == 0 else 0
    if not touched:
        return Carry((Link(other, axes),))
    source = node.operand(0)
    dims = None if source is None else static_dims(source, axes)
    if dims is None or any(indices[axis] is None for axis in touched):
        return DYNAMIC
    return Carry((moved(other, axes, dims, [indices.get(a) for a in axes], from_source=port == 0),))


# -- concat ---------------------------------------------------------------------------------------


def _infer_concat(node: Node) -> Sequence[Type]:
    shapes = [None if v is None else v.shape for v in node.operands]
    known = [shape for shape in shapes if shape is not None]
    dtype = next((v.dtype for v in node.operands if v is not None and v.dtype is not None), None)
    if dtype is None:
        return (UNKNOWN,)
    if not known:
        return (TensorType(dtype),)
    rank = len(known[0])
    if any(len(shape) != rank for shape in known):
        raise InvalidModelError("concat: the operands have different ranks", where=str(node))
    axis = normal_axis(attribute(node, "axis"), rank)
    dims: list[Dim] = []
    for place in range(rank):
        column = [shape[place] for shape in known]
        if place == axis:
            total: Dim = 0
            for dim in column if len(known) == len(shapes) else [None]:
                total = add(total, dim)
            dims.append(total)
            continue
        static = {dim for dim in column if isinstance(dim, int)}
        if len(static) > 1:
            raise InvalidModelError(f"concat: dims {sorted(static)} of axis {place} differ", where=str(node))
        dims.append(next(iter(static), None) if static else next((d for d in column if d is not None), None))
    return (TensorType(dtype, tuple(dims)),)


def _evaluate_concat(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    axis = normal_axis(attribute(node, "axis"), operands[0].dim())
    if operands[0].dtype in _PLAIN or operands[0].is_complex():
        return (torch.cat(tuple(operands), dim=axis),)
    signed = [x.contiguous().view(_SIGNED[x.element_size()]) for x in operands]
    return (torch.cat(signed, dim=axis).view(operands[0].dtype),)


def _relate_concat(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    value = node.port(port)
    assert value is not None
    assert value.rank is not None
    axis = normal_axis(attribute(node, "axis"), value.rank)
    ports = [*range(len(node.operands)), -1]
    if axis not in axes:
        return Carry(tuple(Link(other, axes) for other in ports if other != port))
    lengths = []
    for operand in node.operands:
        dims = None if operand is None else static_dims(operand, (axis,))
        if dims is None:
            return DYNAMIC
        lengths.append(dims[0])
    place = axes.index(axis)
    starts = np.cumsum([0, *lengths])
    links = []
    for index, length in enumerate(lengths):
        if port in (index, -1) and length:
            own = list(asked_dims(node, port, axes))
            own[place] = length
            positions = np.full(int(starts[-1]), -1)
            positions[starts[index] : starts[index + 1]] = np.arange(length)
            indices = [positions if a == axis else None for a in axes]
            links.append(moved(~0 if port >= 0 else index, axes, own, indices, from_source=port >= 0))
    return Carry(tuple(links))


# -- split ----------------------------------------------------------------------------------------


def _split_sizes(node: Node) -> tuple[int, ...]:
    return tuple(int(size) for size in attribute(node, "sizes"))


def _infer_split(node: Node) -> Sequence[Type]:
    shape, sizes = operand_shape(node), _split_sizes(node)
    dtype = None if node.operands[0] is None else node.operands[0].dtype
    if dtype is None:
        return (UNKNOWN,) * len(sizes)
    if shape is None:
        return (TensorType(dtype),) * len(sizes)
    axis = normal_axis(attribute(node, "axis"), len(shape))
    whole = shape[axis]
    if isinstance(whole, int) and whole != sum(sizes):
        raise InvalidModelError(f"split: sizes {sizes} do not add up to {whole}", where=str(node))
    return [TensorType(dtype, (*shape[:axis], size, *shape[axis + 1 :])) for size in sizes]


def _evaluate_split(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    (x,) = operands
    return list(torch.split(x, list(_split_sizes(node)), dim=normal_axis(attribute(node, "axis"), x.dim())))


def _relate_split(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    value, sizes = node.port(port), _split_sizes(node)
    assert value is not None
    assert value.rank is not None
    axis = normal_axis(attribute(node, "axis"), value.rank)
    ports = [0, *(~index for index in range(len(sizes)))]
    if axis not in axes and port < 0 and (stack := widened(node, port, axis, axes)) is not None:
        return stack
    if axis not in axes:
        return Carry(tuple(Link(other, axes) for other in ports if other != port))
    whole = list(asked_dims(node, port, axes))
    whole[axes.index(axis)] = sum(sizes)
    links = []
    starts = np.cumsum([0, *sizes])
    for index, size in enumerate(sizes):
        if port in (0, ~index) and size:
            positions = np.arange(starts[index], starts[index + 1])
            indices = [positions if a == axis else None for a in axes]
            links.append(moved(~index if port == 0 else 0, axes, whole, indices, from_source=port == 0))
    return Carry(tuple(links))


# -- slice ----------------------------------------------------------------------------------------


def _slice_axes(node: Node, rank: int) -> list[int] | None:
    """The axes that are sliced; None if they are unknown."""
    if node.operand(3) is not None:
        axes = static_ints(node.operand(3))
        return None if axes is None else [normal_axis(a, rank) for a in axes]
    starts = known_ints(node.operand(1))
    count = len(starts) if starts is not None else element_count(node.operand(1))
    return None if count is None else list(range(count))


def _slices(node: Node, shape: Sequence[Dim]) -> dict[int, tuple[Dim, Dim, Dim]] | None:
    """(start, end, step) of each sliced axis; None if the axes are unknown."""
    axes = _slice_axes(node, len(shape))
    if axes is None:
        return None
    unknown = (None,) * len(axes)
    columns = [known_ints(node.operand(index)) or unknown for index in (1, 2)]
    steps = (1,) * len(axes) if node.operand(4) is None else known_ints(node.operand(4)) or unknown
    if any(len(column) != len(axes) for column in (*columns, steps)):
        raise InvalidModelError("slice: starts, ends, axes and steps differ in length", where=str(node))
    return dict(zip(axes, zip(*columns, steps, strict=True), strict=True))


def _is_whole(dim: Dim, start: Dim, end: Dim, step: Dim) -> bool:
    reaches = (isinstance(end, int) and end >= (dim if isinstance(dim, int) else _FAR)) or (
        dim is not None and end == dim
    )
    return start == 0 and step == 1 and reaches


def _sliced_dim(dim: Dim, start: Dim, end: Dim, step: Dim) -> Dim:
    if _is_whole(dim, start, end, step):
        return dim
    if not isinstance(start, int) or not isinstance(step, int) or step == 0:
        return None
    if isinstance(dim, int) and isinstance(end, int):
        return len(range(*slice(start, end, step).indices(dim)))
    if isinstance(dim, int) and isinstance(end, str) and step == 1 and start >= 0:
        return subtract(end, start)  # an end that is a symbol is taken to lie within the axis
    return None


def _infer_slice(node: Node) -> Sequence[Type]:
    shape = operand_shape(node)
    if shape is None:
        return typed(node, None)
    slices = _slices(node, shape)
    if slices is None:
        return typed(node, (None,) * len(shape))
    dims = list(shape)
    for axis, (start, end, step) in slices.items():
        if axis >= len(dims):
            raise InvalidModelError(f"slice: axis {axis} of a tensor of rank {len(dims)}", where=str(node))
        dims[axis] = _sliced_dim(dims[axis], start, end, step)
    return typed(node, tuple(dims))


def _evaluate_slice(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, *rest = operands
    bounds: list[list[int] | None] = [None if b is None else b.reshape(-1).tolist() for b in rest]
    starts, ends, axes, steps = [*bounds, None, None][:4]
    if starts is None or ends is None:
        raise InvalidModelError("slice: starts or ends are missing", where=str(node))
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis = normal_axis(int(axis), x.dim())
        positions = range(*slice(start, end, step).indices(x.shape[axis]))  # torch warns of bounds near 2^63
        if step > 0:
            x = x[(slice(None),) * axis + (slice(positions.start, positions.stop, step),)]
        else:
            x = take(x, axis, torch.tensor(list(positions), dtype=torch.int64))
    return (x,)


def _relate_slice(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    shape = operand_shape(node)
    slices = None if shape is None else _slices(node, shape)
    if shape is None or slices is None:
        return DYNAMIC if port in (0, -1) else NOT_DATA
    indices: dict[int, np.ndarray | None] = {}
    for axis, (start, end, step) in slices.items():
        dim = shape[axis]
        if _is_whole(dim, start, end, step):
            continue
        indices[axis] = None
        if isinstance(dim, int) and isinstance(start, int) and isinstance(end, int) and isinstance(step, int):
            indices[axis] = np.arange(dim)[start:end:step]
    for axis in indices if port == -1 else ():
        if axis not in axes and (stack := widened(node, port, axis, axes)) is not None:
            return stack
    return relate_positions(node, port, axes, indices)


_X = Param("x")
structural_row(
    "concat",
    (Param("xs", variadic=True),),
    _infer_concat,
    _evaluate_concat,
    _relate_concat,
    "the operands one after the other along `axis`",
    {"axis": 0},
    family="selection",
    repeats=repeats_by_channel,
)
structural_row(
    "split",
    (_X,),
    _infer_split,
    _evaluate_split,
    _relate_split,
    "x cut along `axis` into parts of `sizes`",
    {"axis": 0, "sizes": ()},
    family="selection",
    beyond=frozenset(Act),  # whether the axis was one with the asked ones, by its producers
)
structural_row(
    "slice",
    (_X, Param("starts"), Param("ends"), Param("axes", optional=True), Param("steps", optional=True)),
    _infer_slice,
    _evaluate_slice,
    _relate_slice,
    "y = x[start:end:step] along each of the axes",
    family="selection",
    beyond=frozenset(Act),  # as for split
)
