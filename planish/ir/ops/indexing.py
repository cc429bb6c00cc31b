"""Ops that look positions of an axis up, repeat them or add some: gather, embedding, tile, pad, trilu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node
from planish.ir.ops.affine import is_constant
from planish.ir.ops.align import (
    LINEAR_ACTS,
    attribute,
    conservative,
    scalar_value,
    static_dims,
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
from planish.ir.ops.selection import DYNAMIC, moved, relate_positions, take
from planish.ir.ops.stacks import stacked, widened
from planish.ir.ops.structural import (
    NOT_DATA,
    operand_shape,
    ports_of_data,
    structural_row,
    typed,
)
from planish.ir.shapes import add, known_ints, multiply, static_ints
from planish.ir.types import Dim, Shape, Type

# -- gather, embedding ----------------------------------------------------------------------------


def _infer_gather(node: Node) -> Sequence[Type]:
    data, indices = operand_shape(node), operand_shape(node, 1)
    if data is None or indices is None:
        return typed(node, None)
    axis = normal_axis(_gather_axis(node), len(data))
    return typed(node, data[:axis] + indices + data[axis + 1 :])


def _gather_axis(node: Node) -> int:
    return int(attribute(node, "axis")) if "axis" in node.op.attributes else 0


def _evaluate_gather(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, indices = operands
    axis = normal_axis(_gather_axis(node), x.dim())
    flat = indices.reshape(-1).to(torch.int64)
    flat = torch.where(flat < 0, flat + x.shape[axis], flat)
    return (take(x, axis, flat).reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :]),)


def _constant_indices(node: Node, dim: Dim) -> np.ndarray | None:
    """The indices as a vector of non-negative positions; None if they are not constant."""
    indices = node.operand(1)
    if indices is None or not isinstance(dim, int):
        return None
    if indices.is_constant and indices.constant is not None:
        flat = indices.constant.array().reshape(-1).astype(np.int64)
    else:
        known = static_ints(indices)
        if known is None:
            return None
        flat = np.array(known, np.int64)
    return np.where(flat < 0, flat + dim, flat)


def _relate_gather(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    data, index_shape = operand_shape(node), operand_shape(node, 1)
    if data is None or index_shape is None:
        return Block("a rank is unknown")
    axis, span = normal_axis(_gather_axis(node), len(data)), len(index_shape)
    if port == 1:
        if act is Act.PERMUTE:
            return Carry((Link(-1, tuple(a + axis for a in axes)),))
        return NOT_DATA
    if port == 0:
        places = tuple(a + span - 1 if a > axis else a for a in axes if a != axis)
        if axis not in axes:
            return Carry((Link(-1, places),))
        region = tuple(range(axis, axis + span))
        targets = tuple(sorted((*places, *region)))
        if not targets:
            return Block("it takes one channel out")
        return _gathered(node, -1, axes, targets, data, axis, axes)
    region = tuple(a for a in axes if axis <= a < axis + span)
    outside = tuple(a - span + 1 if a >= axis + span else a for a in axes if a not in region)
    if span == 1 and not region and (stack := widened(node, port, axis, axes)) is not None:
        return stack
    if not region and not (span == 0 and stacked(node.operand(0), axis, outside)):
        return Carry((Link(0, outside),))
    if act is Act.PERMUTE and not outside and not is_constant(node.operand(1)):
        return Carry((Link(1, tuple(a - axis for a in axes)),))
    if any(index_shape[a - axis] != 1 for a in range(axis, axis + span) if a not in region):
        return Block("it permutes some axes of the indices")
    targets = tuple(sorted((*outside, axis)))
    return _gathered(node, 0, targets, targets, data, axis, axes)


def _gathered(
    node: Node, other: Port, source: Axes, targets: Axes, data: Sequence[Dim], axis: int, asked: Axes
) -> Relation:
    """The link along the gathered axis: `source` are the axes of x, `targets` those of the linked port."""
    if node.op.name == "embedding":
        return Block("it looks rows up")
    positions = _constant_indices(node, data[axis])
    dims = None if node.operands[0] is None else static_dims(node.operands[0], source)
    if positions is None or dims is None:
        return Block("its indices are not constant")
    indices = [positions if a == axis else None for a in source]
    return Carry((moved(other, targets, dims, indices, from_source=other < 0),))


def _embedding_channels(node: Node) -> Sequence[tuple[Port, Axes]]:
    rank = node.result.rank
    return [(-1, (rank - 1,))] if rank is not None and rank > 0 else []


# -- tile -----------------------------------------------------------------------------------------


def _infer_tile(node: Node) -> Sequence[Type]:
    shape, repeats = operand_shape(node), known_ints(node.operand(1))
    if shape is None:
        return typed(node, None if repeats is None else (None,) * len(repeats))
    counts: Shape = repeats if repeats is not None and len(repeats) == len(shape) else (None,) * len(shape)
    assert counts is not None
    return typed(node, tuple(multiply(dim, count) for dim, count in zip(shape, counts, strict=True)))


def _evaluate_tile(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, repeats = operands
    return (x.repeat([int(r) for r in repeats.reshape(-1).tolist()]),)


def _relate_tile(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    ports = ports_of_data(node, port)
    if isinstance(ports, Block):
        return ports
    source, target = operand_shape(node), node.result.shape
    assert source is not None
    assert target is not None
    indices: dict[int, np.ndarray | None] = {}
    for axis in axes:
        small, large = source[axis], target[axis]
        if isinstance(small, int) and isinstance(large, int):
            if small != large:
                indices[axis] = np.arange(large) % small
        else:
            indices[axis] = None
    return relate_positions(node, port, axes, indices)


# -- pad ------------------------------------------------------------------------------------------


def _pads(node: Node, rank: int) -> dict[int, tuple[Dim, Dim]] | None:
    """(before, after) of each axis that is padded; None if the axes are unknown."""
    axes: Sequence[int] | None = range(rank)
    if node.operand(3) is not None:
        axes = static_ints(node.operand(3))
    if axes is None:
        return None
    axes = [normal_axis(a, rank) for a in axes]
    pads = known_ints(node.operand(1)) or (None,) * (2 * len(axes))
    if len(pads) != 2 * len(axes):
        raise InvalidModelError(f"pad: {len(pads)} pads for {len(axes)} axes", where=str(node))
    both = {axis: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    return {axis: pair for axis, pair in both.items() if pair != (0, 0)}


def _infer_pad(node: Node) -> Sequence[Type]:
    shape = operand_shape(node)
    if shape is None:
        return typed(node, None)
    pads = _pads(node, len(shape))
    if pads is None:
        return typed(node, (None,) * len(shape))
    dims = list(shape)
    for axis, (before, after) in pads.items():
        dims[axis] = add(add(dims[axis], before), after)
    return typed(node, tuple(dims))


def _padded_positions(size: int, before: int, after: int, mode: str) -> np.ndarray:
    """Where the positions of a padded axis come from, -1: nowhere. Negative pads crop."""
    positions = np.arange(size)[max(-before, 0) : size - max(-after, 0)]
    grow = (max(before, 0), max(after, 0))
    if mode == "constant":
        return np.pad(positions, grow, constant_values=-1)
    if grow == (0, 0):
        return positions
    padded: np.ndarray = np.pad(positions, grow, mode=mode)  # type: ignore[call-overload]
    return padded


def _evaluate_pad(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, pads, *more = operands
    value = more[0] if more else None
    axes = more[1].reshape(-1).tolist() if len(more) > 1 else range(x.dim())
    amounts = [int(p) for p in pads.reshape(-1).tolist()]
    mode = str(attribute(node, "mode"))
    for place, axis in enumerate(axes):
        axis = normal_axis(int(axis), x.dim())
        before, after = amounts[place], amounts[place + len(amounts) // 2]
        if before == after == 0:
            continue
        positions = torch.from_numpy(_padded_positions(x.shape[axis], before, after, mode))
        inside = positions >= 0
        if bool(inside.all()):
            x = take(x, axis, positions)
            continue
        shape = (*x.shape[:axis], len(positions), *x.shape[axis + 1 :])
        padded = torch.zeros(shape, dtype=x.dtype)
        if value is not None:
            padded = value.reshape(()).to(x.dtype).expand(shape).clone()
        start = int(inside.nonzero()[0]) if bool(inside.any()) else 0
        kept = take(x, axis, positions[inside])
        padded.narrow(axis, start, kept.shape[axis]).copy_(kept)
        x = padded
    return (x,)


def _relate_pad(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    ports = ports_of_data(node, port)
    if isinstance(ports, Block):
        return ports
    shape, mode = operand_shape(node), str(attribute(node, "mode"))
    assert shape is not None
    pads = _pads(node, len(shape))
    if pads is None:
        return DYNAMIC
    adds = any(not isinstance(pad, int) or pad > 0 for pair in pads.values() for pad in pair)
    if mode == "constant" and adds and act is not Act.PERMUTE:
        filler = node.operand(2)
        zero = filler is None or scalar_value(filler.constant if filler.is_constant else None) == 0
        if act not in LINEAR_ACTS or not zero:
            return Block("what it pads with does not carry the transform")
    indices: dict[int, np.ndarray | None] = {}
    for axis, (before, after) in pads.items():
        dim = shape[axis]
        indices[axis] = None
        if isinstance(dim, int) and isinstance(before, int) and isinstance(after, int):
            indices[axis] = _padded_positions(dim, before, after, mode)
    return relate_positions(node, port, axes, indices)


# -- trilu ----------------------------------------------------------------------------------------


def _infer_trilu(node: Node) -> Sequence[Type]:
    return typed(node, operand_shape(node))


def _evaluate_trilu(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x = operands[0]
    diagonal = int(operands[1].item()) if len(operands) > 1 and operands[1] is not None else 0
    return ((torch.triu if attribute(node, "upper") else torch.tril)(x, diagonal),)


def _relate_trilu(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    value = node.port(port)
    if port not in (0, -1) or value is None or value.rank is None:
        return NOT_DATA
    if act is Act.SHIFT:
        return Block("its zeros do not carry a shift")
    if act is not Act.SCALE and any(axis >= value.rank - 2 for axis in axes):
        return Block("it keeps a triangle of these axes")
    return Carry((Link(-1 if port == 0 else 0, axes),))


_X = Param("x")
structural_row(
    "gather",
    (_X, Param("indices")),
    _infer_gather,
    _evaluate_gather,
    _relate_gather,
    "y[.., i, ..] = x[.., indices[i], ..] along `axis`",
    {"axis": 0},
    family="indexing",
    conservative={
        "permute@-1": "constant indices with several axes could be permuted along one of them",
    },
    beyond=frozenset(Act),  # whether the axis was one with the asked ones, by its producers
)
structural_row(
    "embedding",
    (Param("table"), Param("ids")),
    _infer_gather,
    _evaluate_gather,
    _relate_gather,
    "y[i, :] = table[ids[i], :]",
    channels=_embedding_channels,
    conservative=conservative(
        tuple(Act), (0, -1), "the vocabulary axis would need the ids to follow: a constant of them could"
    ),
    family="indexing",
    repeats=repeats_by_channel,
)
structural_row(
    "tile",
    (_X, Param("repeats")),
    _infer_tile,
    _evaluate_tile,
    _relate_tile,
    "x repeated along each axis",
    family="indexing",
)
structural_row(
    "pad",
    (_X, Param("pads"), Param("value", optional=True), Param("axes", optional=True)),
    _infer_pad,
    _evaluate_pad,
    _relate_pad,
    "x with positions added (or cropped) at both ends of each axis",
    {"mode": "constant"},
    conservative=conservative(
        (Act.SCALE, Act.SHIFT, Act.ROTATE, Act.LINEAR),
        (0, -1),
        "along a padded axis alone the pads could stay",
    ),
    family="indexing",
)
structural_row(
    "trilu",
    (_X, Param("k", optional=True)),
    _infer_trilu,
    _evaluate_trilu,
    _relate_trilu,
    "x with zeros below (above, where not `upper`) diagonal k",
    {"upper": True},
    family="indexing",
)
