"""Converters of elementwise torch ops: arithmetic, comparisons, activations, casts.

torch computes an elementwise op in the dtype that its operands promote to: operands of another dtype get
an explicit cast, and a Python number becomes a scalar of that dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from planish.capture.fx_builder import Builder, Size
from planish.capture.fx_table import Converter, Made, aten
from planish.ir.graph import Value
from planish.ir.types import from_torch_dtype, is_float, torch_dtype


def promoted(b: Builder, *operands: Any) -> str:
    """The dtype that torch computes in."""
    kinds: list[Any] = []
    for operand in operands:
        if isinstance(operand, Value):
            kinds.append(torch.empty((1,) * b.rank(operand), dtype=torch_dtype(b.dtype(operand))))
        else:
            kinds.append(1 if isinstance(operand, Size) else operand)
    result = kinds[0]
    for kind in kinds[1:]:
        joined = torch.result_type(result, kind)
        rank = max((k.dim() for k in (result, kind) if isinstance(k, torch.Tensor)), default=0)
        result = torch.empty((1,) * rank, dtype=joined)
    return from_torch_dtype(result.dtype)


def is_number(operand: Any, number: float) -> bool:
    return isinstance(operand, int | float) and not isinstance(operand, bool) and operand == number


def _numbers(*operands: Any) -> bool:
    """True if torch computes with the operands as they are."""
    return all(not isinstance(o, Value) or o.dtype not in ("bool", "c64", "c128") for o in operands)


# -- one operand -----------------------------------------------------------------------------------

_UNARY = {
    "neg": "neg", "abs": "abs", "relu": "relu", "sigmoid": "sigmoid", "tanh": "tanh", "erf": "erf", "exp": "exp",
    "log": "log", "sqrt": "sqrt", "rsqrt": "rsqrt", "reciprocal": "reciprocal", "sin": "sin", "cos": "cos",
    "floor": "floor", "ceil": "ceil", "round": "round", "sign": "sign", "sgn": "sign", "silu": "silu",
    "hardswish": "hard_swish",
}  # fmt: skip


def _unary(op: str) -> Converter:
    def converter(b: Builder, x: Value) -> Made:
        return b.op(op, b.cast(x, b.out.dtype)) if _numbers(x) else None

    return converter


for _name, _op in _UNARY.items():
    aten(f"{_name}.default")(_unary(_op))


@aten("isnan.default")
def _is_nan(b: Builder, x: Value) -> Made:
    return b.op("is_nan", x)


@aten("logical_not.default", "bitwise_not.default")
def _not(b: Builder, x: Value) -> Made:
    return b.op("logical_not", b.cast(x, "bool")) if b.out.dtype == "bool" else None


@aten("gelu.default")
def _gelu(b: Builder, x: Value, approximate: str = "none") -> Made:
    return b.op("gelu", x, approximate=approximate)


@aten("leaky_relu.default")
def _leaky_relu(b: Builder, x: Value, negative_slope: float = 0.01) -> Made:
    return b.op("leaky_relu", x, alpha=float(negative_slope))


@aten("elu.default", "celu.default")
def _elu(b: Builder, x: Value, alpha: float = 1.0, scale: float = 1, input_scale: float = 1) -> Made:
    return b.op("elu", x, alpha=float(alpha)) if scale == 1 == input_scale else None


@aten("hardsigmoid.default")
def _hard_sigmoid(b: Builder, x: Value) -> Made:
    return b.op("hard_sigmoid", x, alpha=1 / 6, beta=0.5)


@aten("softplus.default")
def _softplus(b: Builder, x: Value, beta: float = 1, threshold: float = 20) -> Made:
    if beta * threshold < 20 * beta:  # it turns into the identity where that still shows
        return None
    dtype = b.dtype(x)
    y = b.op("softplus", b.scaled(x, beta))
    return y if beta == 1 else b.op("div", y, b.scalar(beta, dtype))


@aten("log_sigmoid.default", "log_sigmoid_forward.default")
def _log_sigmoid(b: Builder, x: Value) -> Made:
    return b.op("neg", b.op("softplus", b.op("neg", x)))


@aten("mish.default")
def _mish(b: Builder, x: Value) -> Made:
    return b.op("mul", x, b.op("tanh", b.op("softplus", x)))


@aten("glu.default")
def _glu(b: Builder, x: Value, dim: int = -1) -> Made:
    axis = b.axis(dim, b.rank(x))
    size = b.shape(x)[axis]
    if not isinstance(size, int):
        return None
    value, gate = b.results("split", (x,), {"axis": axis, "sizes": (size // 2, size // 2)})
    return b.op("mul", value, b.op("sigmoid", gate))


@aten("prelu.default", "_prelu_kernel.default")
def _prelu(b: Builder, x: Value, weight: Value) -> Made:
    shape = b.shape(weight)
    if len(shape) == 1 and shape != (1,) and b.rank(x) > 2:
        weight = b.op("reshape", weight, b.ints([-1] + [1] * (b.rank(x) - 2)))
    return b.op("prelu", x, weight)


# -- two operands ----------------------------------------------------------------------------------


@aten("add.Tensor", "add.Scalar")
def _add(b: Builder, x: Any, other: Any, alpha: Any = 1) -> Made:
    dtype = b.out.dtype
    if not _numbers(x, other) and dtype in ("bool", "c64", "c128"):
        return None
    if is_number(other, 0) and not is_float(dtype):
        return b.like(x, dtype)
    return b.op("add", b.like(x, dtype), b.scaled(b.like(other, dtype), alpha))


@aten("sub.Tensor", "sub.Scalar")
def _sub(b: Builder, x: Any, other: Any, alpha: Any = 1) -> Made:
    dtype = b.out.dtype
    if is_number(other, 0):
        return b.like(x, dtype)
    return b.op("sub", b.like(x, dtype), b.scaled(b.like(other, dtype), alpha))


@aten("rsub.Scalar", "rsub.Tensor")
def _rsub(b: Builder, x: Any, other: Any, alpha: Any = 1) -> Made:
    dtype = b.out.dtype
    return b.op("sub", b.like(other, dtype), b.scaled(b.like(x, dtype), alpha))


@aten("mul.Tensor", "mul.Scalar")
def _mul(b: Builder, x: Any, other: Any) -> Made:
    dtype = b.out.dtype
    if dtype in ("c64", "c128"):
        return None
    if dtype == "bool":
        return b.op("logical_and", b.like(x, "bool"), b.like(other, "bool"))
    if is_number(other, 1):
        return b.like(x, dtype)
    return b.op("mul", b.like(x, dtype), b.like(other, dtype))


@aten("outer.default", "ger.default")
def _outer(b: Builder, x: Value, vec2: Value) -> Made:
    dtype = b.out.dtype
    return b.op("mul", b.unsqueeze(b.cast(x, dtype), 1), b.cast(vec2, dtype)) if _numbers(x, vec2) else None


@aten("div.Tensor", "div.Scalar", "true_divide.Tensor")
def _div(b: Builder, x: Any, other: Any) -> Made:
    dtype = b.out.dtype
    if not is_float(dtype):
        return None
    if is_number(other, 1):
        return b.like(x, dtype)
    return b.op("div", b.like(x, dtype), b.like(other, dtype))


@aten("div.Tensor_mode", "div.Scalar_mode", "floor_divide.default", "floor_divide.Scalar")
def _divide(b: Builder, x: Any, other: Any, rounding_mode: str | None = "floor") -> Made:
    dtype = b.out.dtype
    if rounding_mode is None:
        return _div(b, x, other)
    one, two = b.like(x, dtype), b.like(other, dtype)
    if rounding_mode == "trunc":
        return None if is_float(dtype) else b.op("div", one, two)
    if is_float(dtype):
        return None
    return b.op("div", b.op("sub", one, b.op("mod", one, two)), two)  # floor(x / y), of any signs


@aten("remainder.Tensor", "remainder.Scalar")
def _remainder(b: Builder, x: Any, other: Any) -> Made:
    dtype = b.out.dtype
    return b.op("mod", b.like(x, dtype), b.like(other, dtype))


@aten("fmod.Tensor", "fmod.Scalar")
def _fmod(b: Builder, x: Any, other: Any) -> Made:
    dtype = b.out.dtype
    return b.op("mod", b.like(x, dtype), b.like(other, dtype), fmod=True)


@aten("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
def _pow(b: Builder, x: Any, exponent: Any) -> Made:
    dtype = b.out.dtype
    if dtype in ("bool", "c64", "c128"):
        return None
    return b.op("pow", b.like(x, dtype), b.like(exponent, dtype))


@aten("square.default")
def _square(b: Builder, x: Value) -> Made:
    return b.op("pow", x, b.scalar(2, b.dtype(x))) if _numbers(x) else None


def _extreme(op: str) -> Converter:
    def converter(b: Builder, x: Value, other: Value) -> Made:
        dtype = b.out.dtype
        return b.op(op, b.like(x, dtype), b.like(other, dtype)) if dtype != "bool" else None

    return converter


aten("maximum.default", "max.other")(_extreme("max"))
aten("minimum.default", "min.other")(_extreme("min"))


@aten("addcmul.default")
def _addcmul(b: Builder, x: Value, tensor1: Value, tensor2: Value, value: Any = 1) -> Made:
    dtype = b.out.dtype
    product = b.op("mul", b.scaled(b.cast(tensor1, dtype), value), b.cast(tensor2, dtype))
    return b.op("add", b.cast(x, dtype), product)


@aten("addcdiv.default")
def _addcdiv(b: Builder, x: Value, tensor1: Value, tensor2: Value, value: Any = 1) -> Made:
    dtype = b.out.dtype
    quotient = b.op("div", b.scaled(b.cast(tensor1, dtype), value), b.cast(tensor2, dtype))
    return b.op("add", b.cast(x, dtype), quotient)


# -- comparisons, logic, choices -------------------------------------------------------------------


def _comparison(op: str, *, negated: bool = False) -> Converter:
    def converter(b: Builder, x: Any, other: Any) -> Made:
        dtype = promoted(b, x, other)
        if dtype in ("c64", "c128"):
            return None
        if dtype == "bool":
            if op != "equal":
                return None
            differ = b.op("logical_xor", b.like(x, "bool"), b.like(other, "bool"))
            return differ if negated else b.op("logical_not", differ)
        found = b.op(op, b.like(x, dtype), b.like(other, dtype))
        return b.op("logical_not", found) if negated else found

    return converter


for _names, _op, _negated in (
    ("eq", "equal", False), ("ne", "equal", True), ("lt", "less", False), ("le", "less_equal", False),
    ("gt", "greater", False), ("ge", "greater_equal", False),
):  # fmt: skip
    aten(f"{_names}.Tensor", f"{_names}.Scalar")(_comparison(_op, negated=_negated))


def _logic(op: str, *, bitwise: bool) -> Converter:
    def converter(b: Builder, x: Any, other: Any) -> Made:
        if bitwise and b.out.dtype != "bool":
            return None
        return b.op(op, b.like(x, "bool"), b.like(other, "bool"))

    return converter


for _word, _op in (("and", "logical_and"), ("or", "logical_or"), ("xor", "logical_xor")):
    aten(f"logical_{_word}.default")(_logic(_op, bitwise=False))
    _spelled = (f"bitwise_{_word}.Tensor", f"bitwise_{_word}.Scalar", f"__{_word}__.Tensor", f"__{_word}__.Scalar")
    aten(*_spelled)(_logic(_op, bitwise=True))


@aten("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def _where(b: Builder, condition: Value, x: Any, other: Any) -> Made:
    dtype = b.out.dtype
    return b.op("where", b.cast(condition, "bool"), b.like(x, dtype), b.like(other, dtype))


@aten("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(b: Builder, x: Value, mask: Value, value: Any) -> Made:
    return b.op("where", mask, b.like(value, b.dtype(x)), x)


@aten("clamp.default", "clamp.Tensor", "hardtanh.default", "clip.default", "clip.Tensor")
def _clamp(b: Builder, x: Value, min: Any = None, max: Any = None, min_val: Any = None, max_val: Any = None) -> Made:
    dtype = b.out.dtype
    low, high = (min_val if min is None else min), (max_val if max is None else max)
    return b.op("clip", b.cast(x, dtype), *(None if o is None else b.like(o, dtype) for o in (low, high)))


@aten("clamp_min.default", "clamp_min.Tensor")
def _clamp_min(b: Builder, x: Value, min: Any) -> Made:
    return _clamp(b, x, min)


@aten("clamp_max.default", "clamp_max.Tensor")
def _clamp_max(b: Builder, x: Value, max: Any) -> Made:
    return _clamp(b, x, None, max)


@aten("relu6.default")
def _relu6(b: Builder, x: Value) -> Made:
    return _clamp(b, x, 0, 6)


# -- the same elements -----------------------------------------------------------------------------


@aten(
    "alias.default", "clone.default", "contiguous.default", "detach.default", "lift_fresh_copy.default",
    "lift_fresh.default", "positive.default", "alias_copy.default", "detach_copy.default",
)  # fmt: skip
def _same(b: Builder, x: Value) -> Made:
    return x


@aten("dropout.default", "feature_dropout.default", "alpha_dropout.default")
def _dropout(b: Builder, x: Value, p: float, train: bool) -> Made:
    return x if not train or p == 0 else None


@aten("native_dropout.default")
def _native_dropout(b: Builder, x: Value, p: float, train: bool | None) -> Made:
    return (x, None) if not train else None


@aten("_to_copy.default", "to.dtype", "to.dtype_layout", "to.device", "type_as.default", "_to_cpu.default")
def _to(b: Builder, x: Value, dtype: Any = None, other: Any = None) -> Made:
    return b.cast(x, b.out.dtype)
