"""Elementwise ops of one tensor: activations, rounding, casts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from planish.ir.errors import PlanishError
from planish.ir.graph import Node
from planish.ir.ops import register
from planish.ir.ops.align import attribute, conservative, numeric
from planish.ir.ops.base import (
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
    repeats_by_channel,
)
from planish.ir.types import UNKNOWN, WIDE_FLOATS, TensorType, Type, is_float, numpy_dtype

UNSIGNED = frozenset({torch.uint16, torch.uint32, torch.uint64})  # torch computes little with them
BENDS = "it bends each channel by itself"
SCALE_LOST = "its result is not proportional to its operand"
SHIFT_LOST = "a shift of its operand does not shift its result"
REASONS = {Act.SCALE: SCALE_LOST, Act.SHIFT: SHIFT_LOST, Act.ROTATE: BENDS, Act.LINEAR: BENDS}


def widened(x: torch.Tensor) -> torch.Tensor:
    """The tensor in a dtype that torch computes with."""
    return x.to(torch.int64) if x.dtype in UNSIGNED else x


def same_type(node: Node) -> Sequence[Type]:
    """The result has the type of operand 0."""
    operand = node.operand(0)
    return (UNKNOWN if operand is None else operand.type,)


def bool_type(node: Node) -> Sequence[Type]:
    operand = node.operand(0)
    return (TensorType("bool", None if operand is None else operand.shape),)


def unary_relate(
    scale: int = 0, shift: int = 0, *, linear: bool = False, positive: bool = False
) -> Callable[[Node, Act, Port, Axes], Relation]:
    """The `relate` of y = f(x) elementwise; PERMUTE always passes.

    Args:
        scale: +1 if f(s x) = s f(x), -1 if f(s x) = f(x) / s, 0 if neither.
        shift: +1 if f(x + t) = f(x) + t, -1 if f(x + t) = f(x) - t, 0 if neither.
        linear: f(M x) = M f(x).
        positive: only factors s > 0 pass.
    """
    variances = {Act.PERMUTE: 1, Act.SCALE: scale, Act.SHIFT: shift, Act.ROTATE: linear, Act.LINEAR: linear}

    def relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
        variance = int(variances[act])
        if not variance:
            return Block(REASONS[act])
        refusal = numeric(node, act, port)
        if refusal is not None:
            return refusal
        return Carry((Link(-1 if port >= 0 else 0, axes, variance),), positive=positive and act is Act.SCALE)

    return relate


PASSES_ALL = unary_relate(1, 1, linear=True)
PERMUTES = unary_relate()


def _evaluator(function: Callable[..., torch.Tensor], names: Sequence[str]) -> Callable[..., Sequence[Any]]:
    def evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
        (x,) = operands
        result = function(widened(x), *(attribute(node, name) for name in names))
        return (result.to(x.dtype) if x.dtype in UNSIGNED and result.dtype != torch.bool else result,)

    return evaluate


def _unary(
    name: str,
    function: Callable[..., torch.Tensor],
    summary: str,
    relate: Callable[[Node, Act, Port, Axes], Relation] = PERMUTES,
    *,
    infer: Callable[[Node], Sequence[Type]] = same_type,
    attributes: Mapping[str, Any] | None = None,
    absent: Mapping[str, str] | None = None,
) -> OpDef:
    """Register `y = function(x, *attributes)`."""
    attributes = attributes or {}
    return register(
        OpDef(
            name=name,
            params=(Param("x"),),
            infer=infer,
            evaluate=_evaluator(function, tuple(attributes)),
            relate=relate,
            family="elementwise",
            summary=summary,
            attributes=attributes,
            conservative=absent or {},
            repeats=repeats_by_channel,
        )
    )


def _softplus(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x) + torch.log1p(torch.exp(-x.abs()))  # exact where F.softplus turns into the identity


def _hard_sigmoid(x: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    return (alpha * x + beta).clamp(0, 1)


def _hard_swish(x: torch.Tensor) -> torch.Tensor:
    return x * (x / 6 + 0.5).clamp(0, 1)


def _gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    return F.gelu(x, approximate=approximate)


_unary("neg", torch.neg, "y = -x", unary_relate(1, -1, linear=True))
_unary("abs", torch.abs, "y = |x|", unary_relate(1, positive=True))
_unary("relu", torch.relu, "y = max(x, 0)", unary_relate(1, positive=True))
_unary(
    "leaky_relu",
    F.leaky_relu,
    "y = x for x >= 0, alpha x below",
    unary_relate(1, positive=True),
    attributes={"alpha": 0.01},
)
_unary("elu", F.elu, "y = x for x > 0, alpha (exp(x) - 1) below", attributes={"alpha": 1.0})
_unary("gelu", _gelu, "y = x Phi(x), Phi the normal distribution function", attributes={"approximate": "none"})
_unary("silu", F.silu, "y = x sigmoid(x)")
_unary("sigmoid", torch.sigmoid, "y = 1 / (1 + exp(-x))")
_unary("hard_sigmoid", _hard_sigmoid, "y = clip(alpha x + beta, 0, 1)", attributes={"alpha": 0.2, "beta": 0.5})
_unary("hard_swish", _hard_swish, "y = x clip(x / 6 + 1/2, 0, 1)")
_unary("tanh", torch.tanh, "y = tanh(x)")
_unary("erf", torch.erf, "y = erf(x)")
_unary("exp", torch.exp, "y = exp(x)")
_unary("log", torch.log, "y = ln(x)")
_unary("sqrt", torch.sqrt, "y = sqrt(x)")
_unary("rsqrt", torch.rsqrt, "y = 1 / sqrt(x)")
_unary("reciprocal", torch.reciprocal, "y = 1 / x", unary_relate(-1))
_unary("softplus", _softplus, "y = ln(1 + exp(x))")
_unary("sin", torch.sin, "y = sin(x)")
_unary("cos", torch.cos, "y = cos(x)")
_unary("floor", torch.floor, "y = the largest integer <= x")
_unary("ceil", torch.ceil, "y = the smallest integer >= x")
_unary("round", torch.round, "y = the nearest integer, halves to even")
_unary(
    "sign",
    torch.sign,
    "y = -1, 0 or 1",
    absent=conservative((Act.SCALE,), (0,), "a positive scale leaves the result as it is"),
)
_unary("logical_not", torch.logical_not, "y = not x")
_unary(
    "is_nan",
    torch.isnan,
    "y = x is not a number",
    infer=bool_type,
    absent=conservative(
        (Act.SCALE, Act.SHIFT, Act.ROTATE, Act.LINEAR),
        (0,),
        "the result only looks for values that are not numbers",
    ),
)

register(
    OpDef(
        name="identity",
        params=(Param("x"),),
        infer=same_type,
        evaluate=lambda node, operands, wide: (operands[0],),
        relate=PASSES_ALL,
        family="elementwise",
        summary="y = x",
        repeats=repeats_by_channel,
    )
)


# -- cast -----------------------------------------------------------------------------------------

_SUB_BYTE = {"u4": 4, "i4": 4, "u3": 3, "i3": 3, "u2": 2, "i2": 2, "u1": 1}
_NARROW_LIMITS = {
    "f8e4m3fn": 448.0,
    "f8e4m3fnuz": 240.0,
    "f8e5m2": 57344.0,
    "f8e5m2fnuz": 57344.0,
    "f6e3m2": 28.0,
    "f6e2m3": 7.5,
    "f4e2m1": 6.0,
}


def _infer_cast(node: Node) -> Sequence[Type]:
    operand = node.operand(0)
    return (TensorType(str(attribute(node, "to")), None if operand is None else operand.shape),)


def _evaluate_cast(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    (x,) = operands
    to = str(attribute(node, "to"))
    if to == "str" or not isinstance(x, torch.Tensor):
        raise PlanishError("cast: strings are not supported", where=str(node))
    if to in _SUB_BYTE:
        width = _SUB_BYTE[to]
        codes = widened(x).to(torch.int64) & ((1 << width) - 1)
        if to.startswith("i"):
            half = 1 << (width - 1)
            return (((codes ^ half) - half).to(torch.int8),)
        return (codes.to(torch.uint8),)
    if is_float(to) and wide.dtype is None and to not in WIDE_FLOATS:
        return (_rounded(node, x, to).to(wide.of(to)),)
    target = wide.of(to)
    if target in UNSIGNED and x.is_floating_point():
        x = x.to(torch.int64)
    return (x.to(target),)


def _rounded(node: Node, x: torch.Tensor, to: str) -> torch.Tensor:
    """The nearest values of an 8- or 4-bit float; torch's own casts saturate in some dtypes only."""
    if to not in _NARROW_LIMITS:
        raise PlanishError(f"cast: rounding to dtype {to} is not supported", where=str(node))
    array = x.to(torch.float64 if x.dtype is torch.float64 else torch.float32).numpy()
    if attribute(node, "saturate") or to[1] in "46":
        array = np.clip(array, -_NARROW_LIMITS[to], _NARROW_LIMITS[to])
    with np.errstate(invalid="ignore", over="ignore"):
        return torch.from_numpy(array.astype(numpy_dtype(to)).astype(np.float32))


def _relate_cast(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    to, operand = str(attribute(node, "to")), node.operand(0)
    if act is not Act.PERMUTE:
        source = None if operand is None else operand.dtype
        if source not in WIDE_FLOATS:
            return Block(f"it casts from {source or 'an unknown dtype'}")
        if to not in WIDE_FLOATS:
            return Block(f"it rounds to {to}")
    return PASSES_ALL(node, act, port, axes)


register(
    OpDef(
        name="cast",
        params=(Param("x"),),
        infer=_infer_cast,
        evaluate=_evaluate_cast,
        relate=_relate_cast,
        family="elementwise",
        summary="y = x in dtype `to`; between floats of 16 bits or more every act passes",
        attributes={"to": "f32", "saturate": True},
        conservative=conservative(
            (Act.SCALE, Act.SHIFT, Act.ROTATE, Act.LINEAR),
            (0, -1),
            "rounding to a narrow dtype is not undone",
        ),
        repeats=repeats_by_channel,
    )
)
