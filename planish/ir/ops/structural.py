"""Ops that give the same elements another shape: reshape, transpose, expand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node, Value
from planish.ir.ops import register
from planish.ir.ops.align import (
    Kind,
    asked_dims,
    attribute,
    permuted_axes,
    seen,
    static_dims,
    tie_pairs,
    wider,
)
from planish.ir.ops.base import (
    MIXING,
    Act,
    Axes,
    Block,
    Carry,
    Link,
    OpDef,
    Param,
    Port,
    Relation,
    Wide,
    normal_axis,
    repeats_by_channel,
)
from planish.ir.ops.regroup import DYNAMIC, UNIT, Group, carry_axes, find_groups
from planish.ir.shapes import (
    broadcast_shapes,
    exact_quotient,
    floor_divide,
    known_ints,
    product,
)
from planish.ir.types import UNKNOWN, Dim, Shape, TensorType, Type

NOT_DATA = Block("it reads this operand as a shape or an index")
NO_RANK = Block("a rank is unknown")


def typed(node: Node, shape: Shape, operand: int = 0) -> Sequence[Type]:
    """One result of the dtype of an operand; unknown if that is no tensor."""
    value = node.operand(operand)
    return (UNKNOWN if value is None or value.dtype is None else TensorType(value.dtype, shape),)


def operand_shape(node: Node, index: int = 0) -> Shape:
    """The shape of an operand; None if it is unknown."""
    value = node.operand(index)
    return None if value is None else value.shape


def element_count(value: Value | None) -> int | None:
    """The number of elements of a vector, None if it is unknown."""
    if value is None or value.shape is None or len(value.shape) != 1:
        return None
    return value.shape[0] if isinstance(value.shape[0], int) else None


def structural_row(
    name: str,
    params: Sequence[Param],
    infer: Callable[[Node], Sequence[Type]],
    evaluate: Callable[[Node, Sequence[Any], Wide], Sequence[Any]],
    relate: Callable[[Node, Act, Port, Axes], Relation],
    summary: str,
    attributes: Mapping[str, Any] | None = None,
    *,
    family: str = "structural",
    **extra: Any,
) -> OpDef:
    """Register a row whose operand 0 is the data that is moved."""
    return register(
        OpDef(
            name=name,
            params=tuple(params),
            infer=infer,
            evaluate=evaluate,
            relate=relate,
            summary=summary,
            attributes=attributes or {},
            family=family,
            **extra,
        )
    )


def ports_of_data(node: Node, port: Port) -> tuple[Port, Shape, Shape] | Block:
    """For an op with one data operand: the other data port, the asker's shape and the other's shape."""
    if port not in (0, -1):
        return NOT_DATA
    other = -1 if port == 0 else 0
    mine, value = node.port(port), node.port(other)
    if mine is None or value is None or mine.shape is None or value.shape is None:
        return NO_RANK
    return other, mine.shape, value.shape


# -- reshape, flatten -----------------------------------------------------------------------------


def _infer_reshape(node: Node) -> Sequence[Type]:
    target = known_ints(node.operand(1))
    if target is None:
        count = element_count(node.operand(1))
        return typed(node, None if count is None else (None,) * count)
    shape = operand_shape(node)
    dims: list[Dim] = list(target)
    rest: list[Dim] | None = None if shape is None else list(shape)
    if not attribute(node, "allowzero"):
        for axis in [axis for axis, dim in enumerate(target) if dim == 0]:
            dims[axis] = shape[axis] if shape is not None and axis < len(shape) else None
    if -1 in dims and rest is not None and shape is not None:
        place = dims.index(-1)
        others = [dim for axis, dim in enumerate(dims) if axis != place]
        for axis, dim in enumerate(target):
            if dim == 0 and axis < len(shape) and shape[axis] is None and None in others:
                others.remove(None)  # a dim that is copied is the same on both sides
                rest.remove(None)
        whole, part = product(rest), product(others)
        if isinstance(whole, int) and isinstance(part, int) and (whole % part if part else whole):
            raise InvalidModelError(f"reshape: {whole} elements do not fill {list(target)}", where=str(node))
        quotient = exact_quotient(whole, part)
        dims[place] = 0 if part == 0 else quotient if quotient is not None else floor_divide(whole, part)
    elif shape is not None:
        whole, part = product(shape), product(dims)
        if isinstance(whole, int) and isinstance(part, int) and whole != part:
            raise InvalidModelError(f"reshape: {whole} elements do not fill {list(target)}", where=str(node))
    return typed(node, tuple(None if dim == -1 else dim for dim in dims))


def _evaluate_reshape(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, shape = operands
    dims = [int(d) for d in shape.reshape(-1).tolist()]
    if not attribute(node, "allowzero"):
        dims = [x.shape[axis] if dim == 0 else dim for axis, dim in enumerate(dims)]
    if -1 in dims:
        others = math.prod(d for d in dims if d != -1)
        dims[dims.index(-1)] = x.numel() // others if others else 0
    return (x.reshape(dims),)


def _named(left: Shape, right: Shape, copied: Sequence[int]) -> tuple[list[Dim], list[Dim]]:
    """The dims with unknown ones named, the same name where the reshape copies the dim."""
    assert left is not None
    assert right is not None
    ours: list[Dim] = [f"?{axis}" if dim is None else dim for axis, dim in enumerate(left)]
    theirs: list[Dim] = list(right)
    for axis in copied:
        if axis < len(ours) and axis < len(theirs) and theirs[axis] is None:
            theirs[axis] = ours[axis]
    return ours, theirs


def _relate_reshape(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    ports = ports_of_data(node, port)
    if isinstance(ports, Block):
        return ports
    copied = () if attribute(node, "allowzero") else known_ints(node.operand(1)) or ()
    source, target = operand_shape(node), node.result.shape
    left, right = _named(source, target, [axis for axis, dim in enumerate(copied) if dim == 0])
    return _regrouped(find_groups(left, right), left, right, act, port, axes)


def _regrouped(
    groups: Sequence[Group], left: Sequence[Dim], right: Sequence[Dim], act: Act, port: Port, axes: Axes
) -> Relation:
    if port < 0:
        groups = [Group(g.right, g.left, g.known) for g in groups]
        left, right = right, left
    carried = carry_axes(groups, left, right, axes)
    if isinstance(carried, Block):
        return Carry() if carried is UNIT and act is Act.PERMUTE else carried
    places, pairs = carried
    return Carry((Link(-1 if port >= 0 else 0, places, pairs=pairs),))


def _infer_flatten(node: Node) -> Sequence[Type]:
    shape = operand_shape(node)
    if shape is None:
        return typed(node, (None, None))
    axis = normal_axis(attribute(node, "axis"), len(shape))
    return typed(node, (product(shape[:axis]), product(shape[axis:])))


def _evaluate_flatten(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    (x,) = operands
    axis = normal_axis(attribute(node, "axis"), x.dim())
    return (x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:])),)


def _relate_flatten(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    ports = ports_of_data(node, port)
    if isinstance(ports, Block):
        return ports
    shape, target = operand_shape(node), node.result.shape
    assert shape is not None
    assert target is not None
    axis = normal_axis(attribute(node, "axis"), len(shape))
    halves = ((range(axis), 0), (range(axis, len(shape)), 1))
    groups = [Group(tuple(a for a in side if shape[a] != 1), (place,)) for side, place in halves]
    return _regrouped([g for g in groups if g.left], shape, target, act, port, axes)


# -- transpose, unsqueeze, squeeze: every axis has a place -----------------------------------------


def _placed(places: Sequence[int | None], act: Act, port: Port, axes: Axes, dims: Sequence[int]) -> Relation:
    """Axis i of the asker is axis places[i] of the other data port; None: it has size 1 and is dropped."""
    kept = [(axis, dim) for axis, dim in zip(axes, dims, strict=True) if places[axis] is not None]
    if not kept:
        return Carry() if act is Act.PERMUTE else UNIT
    targets = [place for axis, _ in kept if (place := places[axis]) is not None]
    other_axes, pairs = permuted_axes(tuple(a for a, _ in kept), targets, [d for _, d in kept])
    return Carry((Link(-1 if port >= 0 else 0, other_axes, pairs=pairs),))


def _perm(node: Node, rank: int) -> list[int]:
    perm = attribute(node, "perm")
    return [normal_axis(a, rank) for a in perm] if perm is not None else list(reversed(range(rank)))


def _infer_transpose(node: Node) -> Sequence[Type]:
    shape = operand_shape(node)
    if shape is None:
        perm = attribute(node, "perm")
        return typed(node, None if perm is None else (None,) * len(perm))
    perm = _perm(node, len(shape))
    if sorted(perm) != list(range(len(shape))):
        raise InvalidModelError(f"transpose: perm {tuple(perm)} does not fit rank {len(shape)}", where=str(node))
    return typed(node, tuple(shape[axis] for axis in perm))


def _evaluate_transpose(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    (x,) = operands
    return (x.permute(_perm(node, x.dim())),)


def _relate_transpose(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    value = node.port(port)
    assert value is not None
    assert value.rank is not None
    perm = _perm(node, value.rank)
    places = [perm.index(axis) for axis in range(value.rank)] if port >= 0 else perm
    return _placed(places, act, port, axes, asked_dims(node, port, axes))


def _inserted(node: Node) -> list[int]:
    """unsqueeze: the new axes, non-negative."""
    axes = attribute(node, "axes")
    shape = operand_shape(node)
    rank = len(shape) + len(axes) if shape is not None else 0
    return sorted(normal_axis(a, rank) for a in axes)


def _infer_unsqueeze(node: Node) -> Sequence[Type]:
    shape = operand_shape(node)
    if shape is None:
        return typed(node, None)
    dims = list(shape)
    for axis in _inserted(node):
        dims.insert(axis, 1)
    return typed(node, tuple(dims))


def _evaluate_unsqueeze(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    (x,) = operands
    axes = attribute(node, "axes")
    for axis in sorted(normal_axis(a, x.dim() + len(axes)) for a in axes):
        x = x.unsqueeze(axis)
    return (x,)


def _relate_unsqueeze(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    return _relate_units(node, act, port, axes, from_operand=False)


def _dropped(node: Node) -> list[int]:
    """squeeze: the axes that go, non-negative."""
    shape = operand_shape(node)
    return sorted(normal_axis(a, len(shape)) for a in attribute(node, "axes")) if shape is not None else []


def _infer_squeeze(node: Node) -> Sequence[Type]:
    shape = operand_shape(node)
    if shape is None:
        return typed(node, None)
    dropped = _dropped(node)
    for axis in dropped:
        dim = shape[axis] if axis < len(shape) else None
        if isinstance(dim, int) and dim != 1:
            raise InvalidModelError(f"squeeze: axis {axis} has size {dim}, expected 1", where=str(node))
    return typed(node, tuple(dim for axis, dim in enumerate(shape) if axis not in dropped))


def _evaluate_squeeze(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    (x,) = operands
    dropped = {normal_axis(a, x.dim()) for a in attribute(node, "axes")}
    return (x.reshape([d for axis, d in enumerate(x.shape) if axis not in dropped]),)


def _relate_squeeze(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    return _relate_units(node, act, port, axes, from_operand=True)


def _relate_units(node: Node, act: Act, port: Port, axes: Axes, *, from_operand: bool) -> Relation:
    """unsqueeze, squeeze: the long side (the operand of a squeeze) has axes of size 1 more."""
    ports = ports_of_data(node, port)
    if isinstance(ports, Block):
        return ports
    _, mine, other = ports
    assert mine is not None
    assert other is not None
    units = _dropped(node) if from_operand else _inserted(node)
    kept = [axis for axis in range(max(len(mine), len(other))) if axis not in units]
    asker_is_long = (port >= 0) is from_operand
    places: list[int | None]
    if asker_is_long:
        places = [kept.index(axis) if axis in kept else None for axis in range(len(mine))]
    else:
        places = list(kept)
    return _placed(places, act, port, axes, asked_dims(node, port, axes))


# -- expand ---------------------------------------------------------------------------------------


def _infer_expand(node: Node) -> Sequence[Type]:
    shape, target = operand_shape(node), known_ints(node.operand(1))
    if target is None:
        count = element_count(node.operand(1))
        if count is None or shape is None:
            return typed(node, None)
        target = (None,) * count
    return typed(node, broadcast_shapes(shape, target, node=node))


def _evaluate_expand(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, shape = operands
    target = [int(d) for d in shape.reshape(-1).tolist()]
    return (x.expand(np.broadcast_shapes(tuple(x.shape), tuple(target))),)


def _relate_expand(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    ports = ports_of_data(node, port)
    if isinstance(ports, Block):
        return ports
    other, mine, theirs = ports
    assert mine is not None
    assert theirs is not None
    dims = asked_dims(node, port, axes)
    asked = wider(dims, axes)
    if all(dim == 1 for dim in dims):
        return Carry() if act is Act.PERMUTE else _one_to_many(node, act, port, asked)
    found = seen(node, port, asked, other)
    if isinstance(found, Block):
        return found
    if found.kind is Kind.FULL:
        return Carry((found.link,))
    if found.grown is not None:
        return Carry((found.grown,))
    if found.kind is Kind.PART:
        return Carry((found.link,))
    return Carry() if act is Act.PERMUTE else Block("it repeats one element along the axis")


def _one_to_many(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    """One element that is repeated: SCALE and SHIFT show on all copies alike."""
    ports = ports_of_data(node, port)
    if isinstance(ports, Block) or act in MIXING or port < 0:
        return UNIT
    other, mine, theirs = ports
    assert mine is not None
    assert theirs is not None
    places = tuple(axis + len(theirs) - len(mine) for axis in axes)
    dims = static_dims(node.result, places)
    if dims is None:
        return DYNAMIC
    return Carry((Link(other, places, pairs=tie_pairs((1,) * len(dims), dims)),))


_X, _SHAPE = Param("x"), Param("shape")
structural_row(
    "reshape",
    (_X, _SHAPE),
    _infer_reshape,
    _evaluate_reshape,
    _relate_reshape,
    "the same elements in C order; 0 copies a dim, -1 is what remains",
    {"allowzero": False},
)
structural_row(
    "flatten",
    (_X,),
    _infer_flatten,
    _evaluate_flatten,
    _relate_flatten,
    "the same elements as a matrix: axes before `axis`, axes from `axis` on",
    {"axis": 1},
)
structural_row(
    "transpose",
    (_X,),
    _infer_transpose,
    _evaluate_transpose,
    _relate_transpose,
    "axis i of y is axis perm[i] of x; reversed if perm is absent",
    {"perm": None},
    repeats=repeats_by_channel,
)
structural_row(
    "unsqueeze",
    (_X,),
    _infer_unsqueeze,
    _evaluate_unsqueeze,
    _relate_unsqueeze,
    "axes of size 1 are put in; `axes` are places in y",
    {"axes": ()},
)
structural_row(
    "squeeze",
    (_X,),
    _infer_squeeze,
    _evaluate_squeeze,
    _relate_squeeze,
    "axes of size 1 are taken out",
    {"axes": ()},
)
structural_row(
    "expand",
    (_X, _SHAPE),
    _infer_expand,
    _evaluate_expand,
    _relate_expand,
    "x broadcast against a shape; new axes are copies",
)
