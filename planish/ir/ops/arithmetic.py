"""Elementwise ops of several tensors, broadcast from the right.

A transform on x of y = x + c or y = x * c also meets the other operand. A constant is expanded where
it is broadcast along the asked axes (`Link.grow`); an activation that is broadcast along some of them
ties the channels that it meets, or keeps a mixing transform within blocks (`Carry.block_axes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from planish.ir.graph import Node
from planish.ir.ops import register
from planish.ir.ops.align import (
    Kind,
    asked_dims,
    attribute,
    conservative,
    numeric,
    scalar_value,
    see_all,
    turned,
    wider,
)
from planish.ir.ops.base import (
    MIXING,
    Act,
    Axes,
    Block,
    Carry,
    Link,
    OneOf,
    OpDef,
    Param,
    Port,
    Relation,
    Wide,
    repeats_by_channel,
)
from planish.ir.ops.elementwise import BENDS, REASONS, SHIFT_LOST, UNSIGNED, widened
from planish.ir.shapes import broadcast_shapes
from planish.ir.types import UNKNOWN, WIDE_FLOATS, TensorType, Type

_NONLINEAR = (Act.ROTATE, Act.LINEAR)


# -- types ----------------------------------------------------------------------------------------


def _broadcast_type(node: Node, operands: Sequence[int] | None = None, dtype: str | None = None) -> Sequence[Type]:
    """All present operands broadcast; the dtype of the first tensor among `operands`, or `dtype`."""
    present = [v for v in node.operands if v is not None]
    if dtype is None:
        chosen = present if operands is None else [v for i in operands if (v := node.operand(i)) is not None]
        dtype = next((v.dtype for v in chosen if v.dtype is not None), None)
        if dtype is None:
            return (UNKNOWN,)
    return (TensorType(dtype, broadcast_shapes(*(v.shape for v in present), node=node)),)


def _bool_type(node: Node) -> Sequence[Type]:
    return _broadcast_type(node, dtype="bool")


def _where_type(node: Node) -> Sequence[Type]:
    return _broadcast_type(node, (1, 2))


# -- joins: every operand and the result carry the same -------------------------------------------


def _operands(node: Node) -> list[Port]:
    return [index for index, operand in enumerate(node.operands) if operand is not None]


def join(node: Node, act: Act, port: Port, axes: Axes, ports: Sequence[Port], *, positive: bool = False) -> Relation:
    """All of `ports` carry the same transform as the asker, which is one of them.

    Right for PERMUTE with every elementwise op, for the linear acts with a sum, and for SCALE and SHIFT
    with a choice of one operand's element (max, min, where).
    """
    axes = wider(asked_dims(node, port, axes), axes)
    found = see_all(node, port, axes, ports)
    if isinstance(found, Block):
        return found if act is not Act.PERMUTE or any(d != 1 for d in asked_dims(node, port, axes)) else Carry()
    links: list[Link] = []
    walls: set[int] = set()
    for seen in found:
        scalar = scalar_value(seen.constant)
        if seen.kind is Kind.FULL:
            links.append(seen.link)
        elif act is Act.PERMUTE:
            if seen.kind is Kind.PART and seen.grown is not None:
                links.append(seen.grown)
            elif seen.kind is Kind.PART:
                walls.update(seen.inner)
        elif scalar == 0 and act is not Act.SHIFT:
            continue  # a linear map leaves zero alone
        elif scalar is not None and not math.isfinite(scalar):
            if act in MIXING:
                return Block("it mixes with a constant that is not finite")
            positive = positive or act is Act.SCALE
        elif seen.grown is not None:
            links.append(seen.grown)
        elif seen.kind is Kind.PART and act not in MIXING:
            links.append(seen.link)
        else:
            return Block("another operand is broadcast along the axis")
    return Carry(tuple(links), tuple(sorted(walls)), positive)


def _same_operands(node: Node) -> bool:
    return len(node.operands) == 2 and node.operands[0] is node.operands[1]


# -- add, sub: sum of +-x_i - y = 0 ---------------------------------------------------------------


def _relate_sum(signs: tuple[int, int]) -> Callable[[Node, Act, Port, Axes], Relation]:
    weights = {0: signs[0], 1: signs[1], -1: -1}

    def relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
        refusal = numeric(node, act, port)
        if refusal is not None:
            return refusal
        if act is not Act.SHIFT:
            return join(node, act, port, axes, (0, 1, -1))
        if _same_operands(node):
            return Block("both operands are the same value")
        return _one_of(node, port, axes, weights, "another operand took the shift", grow_scalars=True)

    return relate


def _one_of(
    node: Node, port: Port, axes: Axes, weights: Mapping[Port, int], reason: str, *, grow_scalars: bool
) -> Relation:
    """One port takes up what the asker carries: vector constants, the result, activations, scalars.

    The ports obey sum_p weights[p] value_p = 0 (in logarithms, for a product).
    """
    axes = wider(asked_dims(node, port, axes), axes)
    found = see_all(node, port, axes, (0, 1, -1))
    if isinstance(found, Block):
        return found
    vectors, passed, scalars = [], [], []
    for seen in sorted(found, key=lambda s: s.port):  # the result first
        variance = -weights[port] * weights[seen.port]
        if seen.constant is not None and seen.kind is not Kind.NONE:
            vectors.append(Carry((turned(seen.carried(), variance),)))
        elif seen.kind is not Kind.NONE:
            passed.append(Carry((turned(seen.link, variance),)))
        elif seen.grown is not None:
            scalars.append(Carry((turned(seen.grown, variance),)))
    options = (*vectors, *passed, *(scalars if grow_scalars or not (passed or vectors) else ()))
    if not options:
        return Block("another operand is broadcast along the axis")
    return options[0] if len(options) == 1 else OneOf(options, reason)


# -- mul, div: product of x_i^(+-1) / y = 1 -------------------------------------------------------


def _relate_product(exponents: tuple[int, int]) -> Callable[[Node, Act, Port, Axes], Relation]:
    weights = {0: exponents[0], 1: exponents[1], -1: -1}

    def relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
        refusal = numeric(node, act, port)
        if refusal is not None:
            return refusal
        if act is Act.PERMUTE:
            return join(node, act, port, axes, (0, 1, -1))
        if act is Act.SHIFT:
            return Block(SHIFT_LOST)
        if _same_operands(node):
            return Block("both factors are the same value")
        if act is Act.SCALE:
            return _one_of(node, port, axes, weights, "its other factor took the scale", grow_scalars=False)
        return _mix_product(node, port, axes, weights)

    return relate


def _mix_product(node: Node, port: Port, axes: Axes, weights: Mapping[Port, int]) -> Relation:
    """ROTATE, LINEAR: one factor and the result carry it if the other factor is broadcast along the axes."""
    axes = wider(asked_dims(node, port, axes), axes)
    found = see_all(node, port, axes, (0, 1, -1))
    if isinstance(found, Block):
        return found
    if port >= 0 and weights[port] < 0:
        return Block("it divides by each channel")
    full = [s for s in found if s.kind is Kind.FULL]
    rest = [s for s in found if s.kind is not Kind.FULL]
    if len(full) != 1 or (weights[full[0].port] < 0 and full[0].port >= 0):
        return Block("it multiplies each channel by a factor of its own")
    walls = sorted({axis for s in rest for axis in s.inner})
    return Carry((full[0].link,), tuple(walls))


def _vector_channels(node: Node) -> Sequence[tuple[Port, Axes]]:
    """The result's axis along which a constant operand is a vector."""
    rank = node.result.rank
    sites: list[tuple[Port, Axes]] = []
    if rank is None:
        return sites
    for operand in node.operands:
        if operand is None or not operand.is_constant or operand.dtype not in WIDE_FLOATS or operand.shape is None:
            continue
        wide = [axis for axis, dim in enumerate(operand.shape) if dim != 1]
        if len(wide) == 1:
            axis = wide[0] + rank - len(operand.shape)
            if isinstance(node.result.shape[axis] if node.result.shape else None, int):
                sites.append((-1, (axis,)))
    return sites


# -- the other rows -------------------------------------------------------------------------------


def _permutes(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    if act is not Act.PERMUTE:
        return Block(REASONS[act])
    return join(node, act, port, axes, (*_operands(node), -1))


def _relate_choice(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    """max, min: they commute with every increasing map that all operands share."""
    refusal = numeric(node, act, port)
    if refusal is not None:
        return refusal
    if act in _NONLINEAR:
        return Block("it chooses for each channel by itself")
    return join(node, act, port, axes, (*_operands(node), -1), positive=act is Act.SCALE)


def _relate_where(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    if act is Act.PERMUTE:
        return join(node, act, port, axes, (0, 1, 2, -1))
    refusal = numeric(node, act, port)
    if refusal is not None or port == 0:
        return refusal or Block("it chooses by this operand")
    relation = join(node, act, port, axes, (1, 2, -1))
    if act not in MIXING or not isinstance(relation, Carry):
        return relation
    asked = wider(asked_dims(node, port, axes), axes)
    condition = see_all(node, port, asked, (0,))
    if isinstance(condition, Block):
        return condition
    if any(s.kind is Kind.FULL for s in condition):
        return Block("it chooses for each channel by itself")
    return Carry(relation.links, tuple(sorted({axis for s in condition for axis in s.inner})))


def _relate_prelu(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    if act is Act.SCALE and port == 1:
        return Block("it is the slope of another operand")
    if act is Act.SCALE:
        refusal = numeric(node, act, port)
        return refusal or join(node, act, port, axes, (0, -1), positive=True)
    return _permutes(node, act, port, axes)


def _relate_clip(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    if act is not Act.PERMUTE and node.operand(1) is None and node.operand(2) is None:
        return numeric(node, act, port) or Carry((Link(-1 if port >= 0 else 0, axes),))
    if act is Act.PERMUTE:
        return join(node, act, port, axes, (*_operands(node), -1))
    return Block("its bounds are the same for every channel" if act not in MIXING else BENDS)


# -- evaluation -----------------------------------------------------------------------------------


def _evaluator(function: Callable[..., torch.Tensor]) -> Callable[..., Sequence[Any]]:
    def evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
        result = function(node, *(None if x is None else widened(x) for x in operands))
        own = next((x.dtype for x in operands if x is not None and x.dtype is not torch.bool), None)
        return (result.to(own) if own in UNSIGNED and result.dtype is not torch.bool else result,)

    return evaluate


def _plain(function: Callable[..., torch.Tensor]) -> Callable[..., Sequence[Any]]:
    return _evaluator(lambda node, *operands: function(*operands))


def _div(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _pow(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    if x.is_floating_point():
        return torch.pow(x, exponent.to(x.dtype))
    if exponent.is_floating_point():
        return torch.pow(x.to(torch.float64), exponent.to(torch.float64)).to(x.dtype)
    return torch.pow(x, exponent.to(x.dtype))


def _mod(node: Node, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.fmod(x, y) if attribute(node, "fmod") else torch.remainder(x, y)


def _clip(x: torch.Tensor, low: torch.Tensor | None = None, high: torch.Tensor | None = None) -> torch.Tensor:
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _extreme(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def over(first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        for other in others:
            first = function(first, other)
        return first

    return over


def _prelu(x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 0, slope * x, x)


# -- rows -----------------------------------------------------------------------------------------

_X, _Y = Param("x"), Param("y")
_BOTH_SIDES = "both sides of a comparison may be changed alike"


def _row(
    name: str,
    evaluate: Callable[..., Sequence[Any]],
    summary: str,
    relate: Callable[[Node, Act, Port, Axes], Relation] = _permutes,
    *,
    params: tuple[Param, ...] = (_X, _Y),
    infer: Callable[[Node], Sequence[Type]] = _broadcast_type,
    **extra: Any,
) -> None:
    register(
        OpDef(
            name=name,
            params=params,
            infer=infer,
            evaluate=evaluate,
            relate=relate,
            family="arithmetic",
            summary=summary,
            repeats=repeats_by_channel,
            **extra,
        )
    )


_row("add", _plain(torch.add), "z = x + y", _relate_sum((1, 1)), channels=_vector_channels)
_row("sub", _plain(torch.sub), "z = x - y", _relate_sum((1, -1)), channels=_vector_channels)
_row("mul", _plain(torch.mul), "z = x y", _relate_product((1, 1)), channels=_vector_channels)
_row(
    "div",
    _plain(_div),
    "z = x / y; integers towards zero",
    _relate_product((1, -1)),
    channels=_vector_channels,
)
_row("pow", _plain(_pow), "z = x ** y, in the dtype of x")
_row(
    "max",
    _plain(_extreme(torch.maximum)),
    "y = the largest of the operands",
    _relate_choice,
    params=(Param("xs", variadic=True),),
)
_row(
    "min",
    _plain(_extreme(torch.minimum)),
    "y = the smallest of the operands",
    _relate_choice,
    params=(Param("xs", variadic=True),),
)
_row(
    "mod",
    _evaluator(_mod),
    "z = x mod y, of the sign of y (of x with `fmod`)",
    attributes={"fmod": False},
    conservative=conservative((Act.SCALE,), (0, 1, -1), "both operands may be scaled alike; no model needs it"),
)
for _name, _function, _sign in (
    ("equal", torch.eq, "=="),
    ("less", torch.lt, "<"),
    ("less_equal", torch.le, "<="),
    ("greater", torch.gt, ">"),
    ("greater_equal", torch.ge, ">="),
):
    _row(
        _name,
        _plain(_function),
        f"z = x {_sign} y",
        infer=_bool_type,
        conservative=conservative((Act.SCALE, Act.SHIFT), (0, 1), _BOTH_SIDES),
    )
_row("logical_and", _plain(torch.logical_and), "z = x and y", infer=_bool_type)
_row("logical_or", _plain(torch.logical_or), "z = x or y", infer=_bool_type)
_row("logical_xor", _plain(torch.logical_xor), "z = x xor y", infer=_bool_type)
_row(
    "clip",
    _plain(_clip),
    "y = min(max(x, low), high)",
    _relate_clip,
    params=(_X, Param("low", optional=True), Param("high", optional=True)),
    infer=_broadcast_type,
    conservative=conservative((Act.SCALE,), (0, -1), "a clip at 0 alone is a relu: write it so")
    | conservative((Act.SCALE, Act.SHIFT), (0, 1, 2, -1), "bounds of each channel's own could follow"),
)
_row(
    "where",
    _plain(torch.where),
    "y = a where the condition holds, else b",
    _relate_where,
    params=(Param("condition"), Param("a"), Param("b")),
    infer=_where_type,
)
_row(
    "prelu",
    _plain(_prelu),
    "z = x for x >= 0, slope x below",
    _relate_prelu,
    params=(_X, Param("slope")),
)
