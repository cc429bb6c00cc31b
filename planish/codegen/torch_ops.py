"""Torch code for the elementwise rows of the op table, of one tensor or of several.

Where ATen has the op, it is called, so that a captured model comes back bit for bit.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from planish.codegen import torch_functions as functions
from planish.codegen.torch_emission import (
    UNSIGNED,
    Emission,
    attributes_of,
    emitter,
    is_floating,
)
from planish.ir.ops.base import HELD_AS
from planish.ir.types import WIDE_FLOATS, bits, is_float, torch_dtype

if TYPE_CHECKING:
    import torch.fx

    from planish.ir.graph import Node, Value

aten = torch.ops.aten


def back(emission: Emission, node: Node, made: torch.fx.Node) -> torch.fx.Node:
    """In the dtype of the row's result, where torch had to compute in int64."""
    dtype = node.result.dtype
    return emission.method("to", made, torch_dtype(dtype)) if dtype in UNSIGNED else made


# -- elementwise -----------------------------------------------------------------------------------------

_UNARY: dict[str, Callable[..., Any]] = {
    "neg": operator.neg,
    "abs": aten.abs.default,
    "relu": aten.relu.default,
    "silu": aten.silu.default,
    "sigmoid": aten.sigmoid.default,
    "hard_swish": aten.hardswish.default,
    "tanh": aten.tanh.default,
    "erf": aten.erf.default,
    "exp": aten.exp.default,
    "log": aten.log.default,
    "sqrt": aten.sqrt.default,
    "rsqrt": aten.rsqrt.default,
    "reciprocal": aten.reciprocal.default,
    "softplus": aten.softplus.default,
    "sin": aten.sin.default,
    "cos": aten.cos.default,
    "floor": aten.floor.default,
    "ceil": aten.ceil.default,
    "round": aten.round.default,
    "sign": aten.sign.default,
    "logical_not": aten.logical_not.default,
    "is_nan": aten.isnan.default,
}


@emitter(*_UNARY)
def _unary(emission: Emission, node: Node) -> torch.fx.Node:
    return back(emission, node, emission.call(_UNARY[node.op.name], emission.computed(node.operand(0))))


@emitter("leaky_relu", reads="alpha")
def _leaky_relu(emission: Emission, node: Node) -> torch.fx.Node:
    return emission.call(aten.leaky_relu.default, emission.tensor(node.operand(0)), attributes_of(node)["alpha"])


@emitter("elu", reads="alpha")
def _elu(emission: Emission, node: Node) -> torch.fx.Node:
    return emission.call(aten.elu.default, emission.tensor(node.operand(0)), attributes_of(node)["alpha"])


@emitter("gelu", reads="approximate")
def _gelu(emission: Emission, node: Node) -> torch.fx.Node:
    x, approximate = emission.tensor(node.operand(0)), attributes_of(node)["approximate"]
    return emission.call(aten.gelu.default, x, **({} if approximate == "none" else {"approximate": approximate}))


@emitter("hard_sigmoid", reads="alpha beta")
def _hard_sigmoid(emission: Emission, node: Node) -> torch.fx.Node:
    x, own = emission.tensor(node.operand(0)), attributes_of(node)
    if math.isclose(own["alpha"], 1 / 6, rel_tol=1e-12) and own["beta"] == 0.5:
        return emission.call(aten.hardsigmoid.default, x)
    return emission.call(functions.hard_sigmoid, x, own["alpha"], own["beta"])


@emitter("identity")
def _identity(emission: Emission, node: Node) -> torch.fx.Node:
    return emission.tensor(node.operand(0))


@emitter("cast", reads="to saturate")
def _cast(emission: Emission, node: Node) -> torch.fx.Node:
    x, own = emission.tensor(node.operand(0)), attributes_of(node)
    to, source = str(own["to"]), None if node.operands[0] is None else node.operands[0].dtype
    if to == source:
        return x
    if bits(to) < 8 and not is_float(to):
        return emission.call(functions.to_bits, x, bits(to), to.startswith("i"))
    if is_float(to) and bits(to) < 8:
        return emission.call(functions.to_narrow, x, to)
    if is_float(to) and to not in WIDE_FLOATS and to not in HELD_AS:
        return emission.call(functions.to_float8, x, torch_dtype(to), bool(own["saturate"]))
    if to in UNSIGNED and is_float(source):
        x = emission.method("to", x, torch.int64)
    return emission.method("to", x, emission.dtype(to))


# -- arithmetic ------------------------------------------------------------------------------------------

_BINARY: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "equal": operator.eq,
    "less": operator.lt,
    "less_equal": operator.le,
    "greater": operator.gt,
    "greater_equal": operator.ge,
}


def _pair(emission: Emission, node: Node) -> tuple[Any, Any]:
    """Both operands, at least one of them a tensor."""
    x, y = emission.operand(node.operand(0)), emission.operand(node.operand(1))
    if not is_tensor(emission, node.operand(0)) and not is_tensor(emission, node.operand(1)):
        x = emission.computed(node.operand(0))
    return x, y


def is_tensor(emission: Emission, value: Value | None) -> bool:
    """False if `Emission.operand` gives a number for it."""
    return value is None or value.rank != 0 or emission.number(value) is None


@emitter(*_BINARY)
def _binary(emission: Emission, node: Node) -> torch.fx.Node:
    return back(emission, node, emission.call(_BINARY[node.op.name], *_pair(emission, node)))


@emitter("div")
def _div(emission: Emission, node: Node) -> torch.fx.Node:
    x, y = _pair(emission, node)
    if is_floating(node.result):
        # 1 / x in Python is x.reciprocal() * 1
        return emission.call(aten.div.Tensor if isinstance(x, int | float) else operator.truediv, x, y)
    return back(emission, node, emission.call(torch.div, x, y, rounding_mode="trunc"))


@emitter("pow")
def _pow(emission: Emission, node: Node) -> torch.fx.Node:
    base, exponent = node.operand(0), node.operand(1)
    if not is_floating(base) and is_floating(exponent):
        return emission.call(functions.integer_pow, emission.computed(base), emission.operand(exponent))
    x, y = _pair(emission, node)
    if base is not None and exponent is not None and base.dtype != exponent.dtype and is_tensor(emission, exponent):
        y = emission.method("to", y, emission.dtype(base.dtype or "f32"))
    return back(emission, node, emission.call(operator.pow, x, y))


@emitter("max", "min")
def _extreme(emission: Emission, node: Node) -> torch.fx.Node:
    largest = node.op.name == "max"
    function = torch.maximum if largest else torch.minimum
    # a tensor first; numbers bound it
    order = sorted(node.operands, key=lambda v: not is_tensor(emission, v)) if len(node.operands) > 1 else node.operands
    made = emission.computed(order[0])
    for operand in order[1:]:
        if is_tensor(emission, operand):
            made = emission.call(function, made, emission.computed(operand))
        else:
            made = emission.call(torch.clamp, made, **{"min" if largest else "max": emission.operand(operand)})
    return back(emission, node, made)


@emitter("mod", reads="fmod")
def _mod(emission: Emission, node: Node) -> torch.fx.Node:
    function = torch.fmod if attributes_of(node)["fmod"] else torch.remainder
    return back(emission, node, emission.call(function, *_pair(emission, node)))


@emitter("logical_and", "logical_or", "logical_xor")
def _logical(emission: Emission, node: Node) -> torch.fx.Node:
    function = getattr(torch, node.op.name)
    return emission.call(function, emission.tensor(node.operand(0)), emission.tensor(node.operand(1)))


@emitter("clip")
def _clip(emission: Emission, node: Node) -> torch.fx.Node:
    x, low, high = emission.computed(node.operand(0)), node.operand(1), node.operand(2)
    bounds = [None if v is None else emission.operand(v) for v in (low, high)]
    if any(v is not None and is_tensor(emission, v) for v in (low, high)):
        bounds = [None if v is None else emission.computed(v) for v in (low, high)]
    if bounds == [None, None]:
        return emission.tensor(node.operand(0))
    return back(emission, node, emission.call(torch.clamp, x, *bounds))


@emitter("where")
def _where(emission: Emission, node: Node) -> torch.fx.Node:
    one, two = node.operand(1), node.operand(2)
    a, b = emission.operand(one), emission.operand(two)
    if not is_tensor(emission, one) and not is_tensor(emission, two):
        a = emission.computed(one)  # two numbers would be float32, or int64
        b = emission.computed(two)
    return back(emission, node, emission.call(torch.where, emission.tensor(node.operand(0)), a, b))


@emitter("prelu")
def _prelu(emission: Emission, node: Node) -> torch.fx.Node:
    return emission.call(functions.prelu, emission.tensor(node.operand(0)), emission.operand(node.operand(1)))
