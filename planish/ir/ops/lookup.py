"""Ops that look positions up by tensors of indices, write to them, or order and add up along an axis.

    cumsum             y[.., i, ..] = sum_{j <= i} x[.., j, ..]
    gather_elements    y[i, j] = x[i, indices[i, j]] along the axis
    gather_nd          y[.., k.., ..] = x[.., i0[k], i1[k], .., ..]: tensors of indices on neighbouring axes
    scatter_elements   x with x[i, indices[i, j]] = updates[i, j]
    index_add          x with x[indices[i], ..] + source[i, ..]
    topk               the k largest of each row, and where they are
    nonzero            where a vector is not 0: as many positions as there are

Along their own axis none of them lets a transform pass. Along another axis, whatever treats each position of that
axis by itself passes if the op does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node
from planish.ir.ops.align import attribute, conservative, numeric, static_dims
from planish.ir.ops.base import Act, Axes, Block, Carry, Link, Param, Port, Relation, Wide, normal_axis
from planish.ir.ops.structural import NO_RANK, NOT_DATA, operand_shape, structural_row, typed
from planish.ir.shapes import broadcast_shapes
from planish.ir.types import TensorType, Type

LOOKS_UP = Block("it looks positions up along the axis")
_SINGLE = (Act.SCALE, Act.SHIFT)
_MIXES = (Act.ROTATE, Act.LINEAR)


def _axis(node: Node) -> int:
    shape = operand_shape(node)
    return normal_axis(int(attribute(node, "axis")), len(shape)) if shape is not None else int(attribute(node, "axis"))


def _same(node: Node) -> Sequence[Type]:
    return typed(node, operand_shape(node))


# -- cumsum ---------------------------------------------------------------------------------------


def _evaluate_cumsum(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    (x,) = operands
    return (torch.cumsum(x, normal_axis(int(attribute(node, "axis")), x.dim()), dtype=x.dtype),)


def _relate_cumsum(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    refusal = numeric(node, act, port)
    if refusal is not None:
        return refusal
    if operand_shape(node) is None:
        return NO_RANK
    if _axis(node) in axes:
        return Block("it adds up along the axis")
    if act is Act.SHIFT:
        return Block("a shift adds up too")
    return Carry((Link(-1 if port == 0 else 0, axes),))


# -- gather_elements, scatter_elements ------------------------------------------------------------


def _infer_gather_elements(node: Node) -> Sequence[Type]:
    x, indices = operand_shape(node), operand_shape(node, 1)
    if x is not None and indices is not None and len(x) != len(indices):
        raise InvalidModelError("gather_elements: x and indices have different ranks", where=str(node))
    return typed(node, indices)


def _evaluate_gather_elements(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, indices = operands
    axis = normal_axis(int(attribute(node, "axis")), x.dim())
    indices = indices.to(torch.int64)
    return (torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices)),)


def _evaluate_scatter(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, indices, updates = operands
    axis = normal_axis(int(attribute(node, "axis")), x.dim())
    indices = indices.to(torch.int64)
    return (torch.scatter(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices), updates.to(x.dtype)),)


def _elementwise(data: Sequence[Port], indices: Sequence[Port]) -> Callable[[Node, Act, Port, Axes], Relation]:
    """The rule of an op that treats every position of its other axes by itself.

    Args:
        data: the ports of which the positions are chosen.
        indices: the ports that choose; they follow a permutation only.
    """

    def relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
        refusal = numeric(node, act, port)
        if refusal is not None:
            return refusal
        if port in indices and act is not Act.PERMUTE:
            return NOT_DATA
        if operand_shape(node) is None:
            return NO_RANK
        if _axis(node) in axes:
            return LOOKS_UP
        if act in _MIXES:
            return Block("it chooses for each position by itself")
        ports = (*data, *indices) if act is Act.PERMUTE else data
        dims = {static_dims(value, axes) for value in map(node.port, ports) if value is not None}
        if len(dims) != 1 or None in dims:
            return Block("its operands differ in size along the axis")
        return Carry(tuple(Link(other, axes) for other in ports if other != port), (), act is Act.SCALE)

    return relate


# -- gather_nd ------------------------------------------------------------------------------------


def _indexed(node: Node) -> int | None:
    """The number of axes that are indexed."""
    if not node.attributes.get("stacked", False):
        return len(node.operands) - 1
    span = operand_shape(node, 1)
    return span[-1] if span and isinstance(span[-1], int) else None


def _infer_gather_nd(node: Node) -> Sequence[Type]:
    shape, taken = operand_shape(node), _indexed(node)
    spans = [operand_shape(node, index) for index in range(1, len(node.operands))]
    if shape is None or taken is None or any(span is None for span in spans):
        return typed(node, None)
    if node.attributes.get("stacked", False):
        spans = [spans[0][:-1]] if spans[0] is not None else []
    axis = _axis(node)
    if axis + taken > len(shape):
        raise InvalidModelError(f"gather_nd: {taken} indices from axis {axis} of rank {len(shape)}", where=str(node))
    middle = broadcast_shapes(*spans, node=node)
    assert middle is not None
    return typed(node, (*shape[:axis], *middle, *shape[axis + taken :]))


def _evaluate_gather_nd(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, *indices = operands
    if node.attributes.get("stacked", False):
        indices = indices[0].unbind(-1)
    axis = normal_axis(int(attribute(node, "axis")), x.dim())
    return (x[(slice(None),) * axis + tuple(i.to(torch.int64) for i in indices)],)


def _relate_gather_nd(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    if port not in (0, -1):
        return NOT_DATA
    refusal = numeric(node, act, port)
    if refusal is not None:
        return refusal
    shape, result, taken = operand_shape(node), node.result.shape, _indexed(node)
    if shape is None or result is None or taken is None:
        return NO_RANK
    axis = _axis(node)
    span = len(result) - (len(shape) - taken)
    width = taken if port == 0 else span
    if any(axis <= a < axis + width for a in axes):
        return LOOKS_UP
    step = span - taken if port == 0 else taken - span
    return Carry((Link(-1 if port == 0 else 0, tuple(a + step if a >= axis else a for a in axes)),))


# -- index_add ------------------------------------------------------------------------------------


def _evaluate_index_add(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, indices, source = operands
    axis = normal_axis(int(attribute(node, "axis")), x.dim())
    return (torch.index_add(x, axis, indices.to(torch.int64), source.to(x.dtype)),)


def _relate_index_add(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    if port == 1:
        return NOT_DATA
    refusal = numeric(node, act, port)
    if refusal is not None:
        return refusal
    if operand_shape(node) is None:
        return NO_RANK
    if act is Act.SHIFT and port == 2:
        return Block("a row may be added more than once, or not at all")
    if _axis(node) in axes and act is not Act.SHIFT:
        return LOOKS_UP
    ports = (0, -1) if act is Act.SHIFT else (0, 2, -1)
    return Carry(tuple(Link(other, axes) for other in ports if other != port))


# -- topk -----------------------------------------------------------------------------------------


def _infer_topk(node: Node) -> Sequence[Type]:
    shape, k = operand_shape(node), int(attribute(node, "k"))
    if shape is None:
        return (*typed(node, None), TensorType("i64", None))
    axis = _axis(node)
    dim = shape[axis]
    if isinstance(dim, int) and k > dim:
        raise InvalidModelError(f"topk: the {k} largest of {dim}", where=str(node))
    result = (*shape[:axis], k, *shape[axis + 1 :])
    return (*typed(node, result), TensorType("i64", result))


def _evaluate_topk(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    (x,) = operands
    axis = normal_axis(int(attribute(node, "axis")), x.dim())
    largest, in_order = bool(attribute(node, "largest")), bool(attribute(node, "sorted"))
    return list(torch.topk(x, int(attribute(node, "k")), axis, largest, in_order))


def _relate_topk(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    refusal = numeric(node, act, port)
    if refusal is not None:
        return refusal
    if operand_shape(node) is None:
        return NO_RANK
    if _axis(node) in axes:
        return Block("it orders the positions of the axis")
    if act in _MIXES:
        return Block("it orders each row by itself")
    ports = (0, -1, -2) if act is Act.PERMUTE else (0, -1)
    return Carry(tuple(Link(other, axes) for other in ports if other != port), (), act is Act.SCALE)


# -- nonzero --------------------------------------------------------------------------------------


def _infer_nonzero(node: Node) -> Sequence[Type]:
    shape = operand_shape(node)
    if shape is not None and len(shape) != 1:
        raise InvalidModelError(f"nonzero: a tensor of rank {len(shape)}; expected a vector", where=str(node))
    return (TensorType("i64", (None,)),)


def _evaluate_nonzero(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    (x,) = operands
    return (torch.nonzero(x).reshape(-1),)


def _relate_nonzero(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    return Block("it says where a vector is not 0, and of what size the result is")


_X, _INDICES = Param("x"), Param("indices")
structural_row(
    "cumsum",
    (_X,),
    _same,
    _evaluate_cumsum,
    _relate_cumsum,
    "y[.., i, ..] = the sum of x[.., j, ..] over j <= i along `axis`",
    {"axis": -1},
    family="lookup",
)
structural_row(
    "gather_elements",
    (_X, _INDICES),
    _infer_gather_elements,
    _evaluate_gather_elements,
    _elementwise((0, -1), (1,)),
    "y[i, j] = x[i, indices[i, j]] for the second axis being `axis`",
    {"axis": 0},
    family="lookup",
    conservative=conservative((Act.PERMUTE,), (1, -1), "indices and result could be permuted along the axis alike"),
)
structural_row(
    "gather_nd",
    (_X, Param("indices", variadic=True)),
    _infer_gather_nd,
    _evaluate_gather_nd,
    _relate_gather_nd,
    "y[.., k, ..] = x[.., i0[k], i1[k], .., ..], the indices from `axis` on, broadcast against each other, or "
    "stacked on the last axis of one tensor",
    {"axis": 0, "stacked": False},
    family="lookup",
    conservative=conservative((Act.PERMUTE,), (1, 2, -1), "all indices and the result could be permuted alike"),
)
structural_row(
    "scatter_elements",
    (_X, _INDICES, Param("updates")),
    _same,
    _evaluate_scatter,
    _elementwise((0, 2, -1), (1,)),
    "x with x[i, indices[i, j]] = updates[i, j] for the second axis being `axis`",
    {"axis": 0},
    family="lookup",
    conservative=conservative((Act.PERMUTE,), (1, 2), "indices and updates could be permuted along the axis alike"),
)
structural_row(
    "index_add",
    (_X, _INDICES, Param("source")),
    _same,
    _evaluate_index_add,
    _relate_index_add,
    "x with source[i, ..] added to x[indices[i], ..] along `axis`",
    {"axis": 0},
    family="lookup",
    conservative=conservative((Act.PERMUTE,), (1, 2), "indices and source could be permuted along the axis alike"),
)
structural_row(
    "topk",
    (_X,),
    _infer_topk,
    _evaluate_topk,
    _relate_topk,
    "the `k` largest (or smallest) of each row along `axis`, and their positions",
    {"k": 1, "axis": -1, "largest": True, "sorted": True},
    family="lookup",
)
structural_row(
    "nonzero",
    (_X,),
    _infer_nonzero,
    _evaluate_nonzero,
    _relate_nonzero,
    "the positions at which the vector x is not 0, ascending: as many as there are",
    family="lookup",
    conservative={"scale": "no factor but 0 moves a position; nothing needs it yet"},
)
