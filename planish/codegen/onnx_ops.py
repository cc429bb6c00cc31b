"""How canonical ops are written as ONNX operators: those that have one of their own.

The decompositions of ops that an opset may lack are in `onnx_decompose`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from planish.codegen import (  # noqa: F401  register their emitters
    onnx_codes,
    onnx_decompose,
    onnx_lookup,
    onnx_quantised,
    onnx_scan,
    onnx_torch,
)
from planish.codegen.onnx_emission import Emission, emitter
from planish.ir.constant import Constant
from planish.ir.graph import Attribute, Node, Value
from planish.ir.types import onnx_enum

_PLAIN = {
    "neg": "Neg", "abs": "Abs", "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "erf": "Erf",
    "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "reciprocal": "Reciprocal", "softplus": "Softplus",
    "sin": "Sin", "cos": "Cos", "floor": "Floor", "ceil": "Ceil", "round": "Round", "sign": "Sign",
    "logical_not": "Not", "is_nan": "IsNaN", "identity": "Identity", "add": "Add", "sub": "Sub",
    "mul": "Mul", "div": "Div", "pow": "Pow", "max": "Max", "min": "Min", "equal": "Equal", "less":
    "Less", "less_equal": "LessOrEqual", "greater": "Greater", "greater_equal": "GreaterOrEqual",
    "logical_and": "And", "logical_or": "Or", "logical_xor": "Xor", "where": "Where", "prelu":
    "PRelu", "matmul": "MatMul", "expand": "Expand", "tile": "Tile", "range": "Range",
    "global_average_pool": "GlobalAveragePool", "global_max_pool": "GlobalMaxPool",
}  # fmt: skip


def get(node: Node, name: str) -> Any:
    """An attribute, or the default that the op's row gives it."""
    if name in node.attributes:
        return node.attributes[name]
    return node.op.attributes.get(name)


def operands(node: Node, e: Emission) -> list[str]:
    return [e.name(v) for v in node.operands]


def unless(value: Any, default: Any) -> Any:
    """None, which leaves an attribute out, where it has its default."""
    return None if value == default else value


@emitter(*_PLAIN)
def _plain(node: Node, e: Emission) -> None:
    e.add(_PLAIN[node.op.name], operands(node, e), e.outputs(node))


# -- elementwise ---------------------------------------------------------------------------------

_SLOPED = {"leaky_relu": "LeakyRelu", "elu": "Elu", "hard_sigmoid": "HardSigmoid"}


@emitter(*_SLOPED)
def _sloped(node: Node, e: Emission) -> None:
    slopes: dict[str, Attribute] = {"alpha": get(node, "alpha"), "beta": get(node, "beta")}
    e.add(_SLOPED[node.op.name], operands(node, e), e.outputs(node), slopes)


@emitter("mod")
def _mod(node: Node, e: Emission) -> None:
    e.add("Mod", operands(node, e), e.outputs(node), fmod=unless(int(get(node, "fmod")), 0))


@emitter("cast")
def _cast(node: Node, e: Emission) -> None:
    saturate = unless(int(get(node, "saturate")), 1)
    e.add("Cast", operands(node, e), e.outputs(node), to=onnx_enum(get(node, "to")), saturate=saturate)


@emitter("clip")
def _clip(node: Node, e: Emission) -> None:
    if e.since("Clip") >= 11:
        e.add("Clip", operands(node, e), e.outputs(node))
        return
    limits: dict[str, Attribute] = {}
    for index, name in ((1, "min"), (2, "max")):
        value = node.operand(index)
        if value is not None:
            limits[name] = float(_fixed(node, e, value, name).array().reshape(-1)[0])
    e.add("Clip", [e.name(node.operands[0])], e.outputs(node), limits)


def _fixed(node: Node, e: Emission, value: Value | None, what: str) -> Constant:
    """The data of an operand that old opsets want as an attribute."""
    if value is None or value.constant is None or value.is_input:
        raise e.fail(node, f"a computed '{what}' is not possible")
    return value.constant


def _fixed_ints(node: Node, e: Emission, index: int, what: str) -> tuple[int, ...] | None:
    value = node.operand(index)
    if value is None:
        return None
    return tuple(int(i) for i in _fixed(node, e, value, what).array().reshape(-1))


# -- structure -----------------------------------------------------------------------------------


@emitter("reshape")
def _reshape(node: Node, e: Emission) -> None:
    allowzero = unless(int(get(node, "allowzero")), 0)
    dims = node.operands[1]
    if e.since("Reshape") < 14 and dims is not None and dims.is_constant and dims.constant is not None:
        allowzero = allowzero if (dims.constant.array() == 0).any() else None
    e.add("Reshape", operands(node, e), e.outputs(node), allowzero=allowzero)


@emitter("transpose")
def _transpose(node: Node, e: Emission) -> None:
    e.add("Transpose", operands(node, e), e.outputs(node), perm=get(node, "perm"))


@emitter("concat")
def _concat(node: Node, e: Emission) -> None:
    e.add("Concat", operands(node, e), e.outputs(node), axis=get(node, "axis"))


@emitter("split")
def _split(node: Node, e: Emission) -> None:
    x, sizes = e.name(node.operands[0]), get(node, "sizes")
    if e.since("Split") >= 13:
        sizes_name = e.ints(sizes, f"sizes_of_{e.name(node.result)}")
        e.add("Split", [x, sizes_name], e.outputs(node), axis=get(node, "axis"))
    else:
        e.add("Split", [x], e.outputs(node), axis=get(node, "axis"), split=sizes)


@emitter("slice")
def _slice(node: Node, e: Emission) -> None:
    if e.since("Slice") >= 10:
        e.add("Slice", operands(node, e), e.outputs(node))
        return
    steps = _fixed_ints(node, e, 4, "steps")
    if steps is not None and any(s != 1 for s in steps):
        raise e.fail(node, "steps are not possible")
    parts: dict[str, Attribute] = {
        name: _fixed_ints(node, e, index, name) for index, name in ((1, "starts"), (2, "ends"), (3, "axes"))
    }
    e.add("Slice", [e.name(node.operands[0])], e.outputs(node), parts)


@emitter("gather", "embedding")
def _gather(node: Node, e: Emission) -> None:
    axis, table = unless(get(node, "axis") or 0, 0), node.operands[0]
    wide = onnx_codes.gathered_as(e, table)
    if table is None or table.constant is None or wide is None:
        e.add("Gather", operands(node, e), e.outputs(node), axis=axis)
        return
    held = e.weight(onnx_codes.as_dtype(table.constant, wide), f"{e.name(table)}_{wide}", key=(table, wide))
    found = e.add("Gather", [held, e.name(node.operands[1])], axis=axis)
    e.add("Cast", [found], e.outputs(node), to=onnx_enum(table.dtype or wide))


@emitter("unsqueeze", "squeeze")
def _squeeze(node: Node, e: Emission) -> None:
    op_type = {"unsqueeze": "Unsqueeze", "squeeze": "Squeeze"}[node.op.name]
    x, axes = e.name(node.operands[0]), get(node, "axes")
    if not axes:
        e.add("Identity", [x], e.outputs(node))
    elif e.since(op_type) >= 13:
        e.add(op_type, [x, e.ints(axes, f"axes_of_{e.name(node.result)}")], e.outputs(node))
    else:
        e.add(op_type, [x], e.outputs(node), axes=axes)


@emitter("flatten")
def _flatten(node: Node, e: Emission) -> None:
    e.add("Flatten", operands(node, e), e.outputs(node), axis=unless(get(node, "axis"), 1))


@emitter("pad")
def _pad(node: Node, e: Emission) -> None:
    mode, since = get(node, "mode"), e.since("Pad")
    if since >= 11:
        if node.operand(3) is not None and since < 18:
            raise e.fail(node, "axes of a pad are not possible")
        e.add("Pad", operands(node, e), e.outputs(node), mode=unless(mode, "constant"))
        return
    value = node.operand(2)
    fill = None if value is None else float(_fixed(node, e, value, "value").array().reshape(-1)[0])
    pads = _fixed_ints(node, e, 1, "pads")
    e.add("Pad", [e.name(node.operands[0])], e.outputs(node), mode=mode, pads=pads, value=fill)


@emitter("shape")
def _shape(node: Node, e: Emission) -> None:
    start, end = unless(get(node, "start"), 0), get(node, "end")
    if e.since("Shape") >= 15 or (start is None and end is None):
        e.add("Shape", operands(node, e), e.outputs(node), start=start, end=end)
        return
    whole, limits = e.add("Shape", operands(node, e)), (start or 0, 1 << 31 if end is None else end)
    if e.since("Slice") >= 10:
        e.add("Slice", [whole, *(e.ints((i,), "limit") for i in limits)], e.outputs(node))
    else:
        e.add("Slice", [whole], e.outputs(node), starts=limits[:1], ends=limits[1:])


@emitter("constant_of_shape")
def _constant_of_shape(node: Node, e: Emission) -> None:
    value: Constant = get(node, "value")
    if value.shape != (1,):
        value = Constant(value.array().reshape(1), value.dtype, (1,))
    e.add("ConstantOfShape", operands(node, e), e.outputs(node), value=value)


@emitter("trilu")
def _trilu(node: Node, e: Emission) -> None:
    e.add("Trilu", operands(node, e), e.outputs(node), upper=int(get(node, "upper")))


# -- contraction ---------------------------------------------------------------------------------


class Transposed(Constant):
    """The transpose of a matrix, made when it is read and not kept."""

    __slots__ = ("base",)

    def __init__(self, base: Constant) -> None:
        super().__init__(None, base.dtype, base.shape[::-1])
        self.base = base

    def _raw(self) -> np.ndarray:
        return np.ascontiguousarray(self.base._raw().T)


@emitter("linear")
def _linear(node: Node, e: Emission) -> None:
    """Gemm where x is a matrix and there is a bias; else MatMul and Add."""
    x, weight, bias = (node.operand(i) for i in range(3))
    transposed = bool(get(node, "transposed"))
    if x is None or weight is None:
        raise e.fail(node, "an absent operand is not possible")
    if bias is not None and x.rank == 2 and bias.rank is not None and e.since("Gemm") >= 7:
        trans_b = None if transposed else 1
        e.add("Gemm", [e.name(x), e.name(weight), e.name(bias)], e.outputs(node), transB=trans_b)
        return
    if transposed:
        matrix = e.name(weight)
    elif weight.is_constant and weight.constant is not None:
        matrix = e.weight(Transposed(weight.constant), f"{e.name(weight)}_t", key=("transposed", weight))
    else:
        matrix = e.add("Transpose", [e.name(weight)], perm=(1, 0))
    if bias is None:
        e.add("MatMul", [e.name(x), matrix], e.outputs(node))
    else:
        product = e.add("MatMul", [e.name(x), matrix], hint=f"{e.name(node.result)}_matmul")
        e.add("Add", [product, e.name(bias)], e.outputs(node))


@emitter("gemm")
def _gemm(node: Node, e: Emission) -> None:
    e.add(
        "Gemm",
        operands(node, e),
        e.outputs(node),
        alpha=unless(float(get(node, "alpha")), 1.0),
        beta=unless(float(get(node, "beta")), 1.0),
        transA=unless(int(get(node, "trans_a")), 0),
        transB=unless(int(get(node, "trans_b")), 0),
    )


def _window(node: Node) -> dict[str, Attribute]:
    """What convolutions and pools share; empty tuples stand for the defaults."""
    auto_pad = str(get(node, "auto_pad") or "notset").upper()
    pads = get(node, "pads") or None
    return {
        "strides": get(node, "strides") or None,
        "dilations": get(node, "dilations") or None,
        "pads": pads if auto_pad == "NOTSET" else None,
        "auto_pad": unless(auto_pad, "NOTSET"),
    }


@emitter("conv", "conv_transpose")
def _conv(node: Node, e: Emission) -> None:
    attributes = _window(node) | {"group": unless(get(node, "groups"), 1)}
    weight = node.operands[1]
    kernel = weight.shape[2:] if weight is not None and weight.shape is not None else ()
    if kernel and all(isinstance(k, int) for k in kernel):
        attributes["kernel_shape"] = kernel
    if node.op.name == "conv":
        e.add("Conv", operands(node, e), e.outputs(node), attributes)
        return
    padding = get(node, "output_padding") or ()
    attributes["output_padding"] = padding if any(padding) else None
    attributes["output_shape"] = get(node, "output_shape") or None
    e.add("ConvTranspose", operands(node, e), e.outputs(node), attributes)


@emitter("average_pool", "max_pool")
def _pool(node: Node, e: Emission) -> None:
    op_type = {"average_pool": "AveragePool", "max_pool": "MaxPool"}[node.op.name]
    attributes = _window(node) | {"kernel_shape": get(node, "kernel")}
    attributes["ceil_mode"] = unless(int(get(node, "ceil_mode") or 0), 0)
    if node.op.name == "average_pool":
        attributes["count_include_pad"] = unless(int(get(node, "count_include_pad") or 0), 0)
    if all(d == 1 for d in get(node, "dilations") or ()):
        attributes["dilations"] = None  # which AveragePool has only since opset 19
    e.add(op_type, operands(node, e), e.outputs(node), attributes)


# -- reduction -----------------------------------------------------------------------------------

_REDUCE = {
    "reduce_sum": "ReduceSum", "reduce_mean": "ReduceMean", "reduce_max": "ReduceMax", "reduce_min":
    "ReduceMin", "reduce_prod": "ReduceProd", "reduce_l2": "ReduceL2",
}  # fmt: skip


@emitter(*_REDUCE)
def _reduce(node: Node, e: Emission) -> None:
    axes = get(node, "axes")
    x = e.name(node.operands[0])
    keep = bool(get(node, "keepdims"))
    if axes == ():
        raise e.fail(node, "a reduction over no axes is not possible")
    e.reduce(_REDUCE[node.op.name], x, axes, keep, e.outputs(node))
