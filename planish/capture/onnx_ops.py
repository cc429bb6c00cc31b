"""Converters: ONNX nodes to canonical ops, where that keeps the function to the bit.

A converter answers None when the node says something that the canonical op cannot: the node then
stays opaque. An attribute that a converter does not read also keeps the node opaque, so that nothing
is dropped by oversight.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planish.capture.onnx_proto import constant_of
from planish.capture.onnx_quantised import CONVERTERS
from planish.capture.onnx_view import Fresh, Made, Operand, View
from planish.ir.constant import Constant
from planish.ir.graph import Attribute
from planish.ir.ops.base import HELD_AS
from planish.ir.types import OtherType, TensorType, from_onnx_enum, numpy_dtype

# Element types that torch cannot hold: the canonical ops, which torch evaluates, do not take them, but for codes.
UNSUPPORTED = frozenset({"str", *HELD_AS})

Converter = Callable[[View], Made | None]
_table: dict[str, Converter] = dict(CONVERTERS)


def convert(view: View) -> Made | None:
    """The canonical form of a node, or None."""
    converter = _table.get(view.proto.op_type)
    if converter is None:
        return None
    for name in view.proto.input:
        type_ = view.scope.type(name) if name else None
        if isinstance(type_, OtherType) and type_.text:
            return None
        if isinstance(type_, TensorType) and type_.dtype in UNSUPPORTED and view.proto.op_type not in CONVERTERS:
            return None
    made = converter(view)
    if made is None or view.unread or (made.results is not None and not view.only_first):
        return None
    operands = list(made.operands)
    while operands and operands[-1] is None:
        operands.pop()
    made.operands = operands
    return made


def _for(*op_types: str) -> Callable[[Converter], Converter]:
    def register(converter: Converter) -> Converter:
        _table.update(dict.fromkeys(op_types, converter))
        return converter

    return register


# -- one operator, one op, nothing to say -------------------------------------------------------

# operator: (op, operands, version from which it broadcasts as today and has no `consumed_inputs`)
_PLAIN = {
    "Neg": ("neg", 1, 6), "Abs": ("abs", 1, 6), "Relu": ("relu", 1, 6), "Sigmoid": ("sigmoid", 1, 6),
    "Tanh": ("tanh", 1, 6), "Erf": ("erf", 1, 9), "Exp": ("exp", 1, 6), "Log": ("log", 1, 6),
    "Sqrt": ("sqrt", 1, 6), "Reciprocal": ("reciprocal", 1, 6), "Softplus": ("softplus", 1, 1),
    "Sin": ("sin", 1, 7), "Cos": ("cos", 1, 7), "Floor": ("floor", 1, 6), "Ceil": ("ceil", 1, 6),
    "Round": ("round", 1, 11), "Sign": ("sign", 1, 9), "Not": ("logical_not", 1, 1),
    "IsNaN": ("is_nan", 1, 9), "Identity": ("identity", 1, 1), "HardSwish": ("hard_swish", 1, 14),
    "Add": ("add", 2, 7), "Sub": ("sub", 2, 7), "Mul": ("mul", 2, 7), "Div": ("div", 2, 7),
    "Pow": ("pow", 2, 7), "Max": ("max", 2, 8), "Min": ("min", 2, 8), "Sum": ("add", 2, 8),
    "Equal": ("equal", 2, 7), "Less": ("less", 2, 7), "LessOrEqual": ("less_equal", 2, 12),
    "Greater": ("greater", 2, 7), "GreaterOrEqual": ("greater_equal", 2, 12), "And": ("logical_and", 2, 7),
    "Or": ("logical_or", 2, 7), "Xor": ("logical_xor", 2, 7), "Where": ("where", 3, 9),
    "PRelu": ("prelu", 2, 7), "MatMul": ("matmul", 2, 1), "Expand": ("expand", 2, 8), "Tile": ("tile", 2, 6),
    "Range": ("range", 3, 11), "GlobalAveragePool": ("global_average_pool", 1, 1),
    "GlobalMaxPool": ("global_max_pool", 1, 1),
}  # fmt: skip


@_for(*_PLAIN)
def _plain(view: View) -> Made | None:
    op, count, since = _PLAIN[view.proto.op_type]
    operands = view.inputs(len(view.proto.input))
    if view.since < since or len(operands) != count or None in operands:
        return None
    return Made(op, operands)


# -- elementwise ---------------------------------------------------------------------------------


@_for("LeakyRelu", "Elu")
def _sloped(view: View) -> Made | None:
    op, alpha = {"LeakyRelu": ("leaky_relu", 0.01), "Elu": ("elu", 1.0)}[view.proto.op_type]
    return Made(op, view.inputs(1), {"alpha": view.get_float("alpha", alpha)}) if view.since >= 6 else None


@_for("HardSigmoid")
def _hard_sigmoid(view: View) -> Made | None:
    if view.since < 6:
        return None
    return Made(
        "hard_sigmoid",
        view.inputs(1),
        {"alpha": view.get_float("alpha", 0.2), "beta": view.get_float("beta", 0.5)},
    )


@_for("Gelu")
def _gelu(view: View) -> Made | None:
    approximate = view.get_str("approximate", "none")
    if approximate not in ("none", "tanh"):
        return None
    return Made("gelu", view.inputs(1), {"approximate": approximate})


@_for("Swish")
def _swish(view: View) -> Made | None:
    return Made("silu", view.inputs(1)) if view.get_float("alpha", 1.0) == 1.0 else None


@_for("Mod")
def _mod(view: View) -> Made | None:
    return Made("mod", view.inputs(2), {"fmod": bool(view.get_int("fmod"))})


@_for("Cast")
def _cast(view: View) -> Made | None:
    if view.since < 6 or view.get_str("round_mode", "up") != "up":
        return None
    try:
        to = from_onnx_enum(view.get_int("to"))
    except KeyError:
        return None
    if to in UNSUPPORTED:
        return None
    return Made("cast", view.inputs(1), {"to": to, "saturate": bool(view.get_int("saturate", 1))})


@_for("Clip")
def _clip(view: View) -> Made | None:
    if view.since >= 11:
        return Made("clip", view.inputs(3))
    dtype = view.dtype(0)
    if view.since < 6 or dtype is None:
        return None
    limits: list[Operand] = []
    for name in ("min", "max"):
        found = view.attribute(name)
        data = None if found is None else np.array(found.f, np.float32).astype(numpy_dtype(dtype))
        limits.append(None if data is None else Fresh(Constant(data, dtype, ()), name))
    return Made("clip", [view.input(0), *limits])


@_for("Dropout")
def _dropout(view: View) -> Made | None:
    """In inference, the identity."""
    view.skip("seed", "ratio")
    if view.since < 7:
        return None
    if view.since >= 12 and view.input(2):
        training = view.constant(2)
        if training is None or training.size != 1 or bool(training.array().reshape(-1)[0]):
            return None
    return Made("identity", view.inputs(1))


# -- structure -----------------------------------------------------------------------------------


def _axes(axes: tuple[int, ...] | None, rank: int | None) -> tuple[int, ...] | None:
    """Non-negative ascending axes where the rank is known, else as they are; None if they are not valid."""
    if axes is None:
        return None
    if rank is None:
        return axes
    positive = sorted(a + rank if a < 0 else a for a in axes)
    if len(set(positive)) != len(positive) or any(not 0 <= a < rank for a in positive):
        return None
    return tuple(positive)


def _given_axes(view: View, index: int, by_operand: bool) -> tuple[int, ...] | None:
    return view.constant_ints(index) if by_operand else view.get_ints("axes")


@_for("Reshape")
def _reshape(view: View) -> Made | None:
    if view.since < 5:
        return None
    return Made("reshape", view.inputs(2), {"allowzero": bool(view.get_int("allowzero"))})


@_for("Transpose")
def _transpose(view: View) -> Made | None:
    rank, perm = view.rank(0), view.get_ints("perm")
    if perm is None:
        if rank is None:
            return None
        perm = tuple(reversed(range(rank)))
    if sorted(perm) != list(range(len(perm))) or (rank is not None and rank != len(perm)):
        return None
    return Made("transpose", view.inputs(1), {"perm": perm})


@_for("Concat")
def _concat(view: View) -> Made | None:
    if view.since < 4:
        return None
    return Made("concat", view.inputs(len(view.proto.input)), {"axis": view.get_int("axis")})


@_for("Split")
def _split(view: View) -> Made | None:
    count, axis, shape = len(view.proto.output), view.get_int("axis"), view.shape(0)
    if view.since < 2 or shape is None or not -len(shape) <= axis < len(shape):
        return None
    dim = shape[axis]
    if view.since >= 13 and view.input(1):
        sizes = view.constant_ints(1)
    else:
        sizes = view.get_ints("split")
        if sizes is None and isinstance(dim, int):
            parts = view.get_int("num_outputs", count)
            chunk = -(-dim // count)
            uneven = dim % count != 0
            if parts != count or (uneven and "num_outputs" not in view.given) or chunk * (count - 1) > dim:
                return None
            sizes = (*[chunk] * (count - 1), dim - chunk * (count - 1))
    if sizes is None or len(sizes) != count or (isinstance(dim, int) and sum(sizes) != dim):
        return None
    return Made("split", view.inputs(1), {"axis": axis, "sizes": sizes}, results=None)


@_for("Slice")
def _slice(view: View) -> Made | None:
    if view.since >= 10:
        return Made("slice", view.inputs(5))
    operands: list[Operand] = [view.input(0)]
    for name in ("starts", "ends", "axes"):
        found = view.get_ints(name)
        operands.append(None if found is None else Fresh(Constant.of(np.array(found, np.int64), "i64"), name))
    return Made("slice", operands)


@_for("Gather")
def _gather(view: View) -> Made | None:
    return Made("gather", view.inputs(2), {"axis": view.get_int("axis")})


@_for("GatherND")
def _gather_nd(view: View) -> Made | None:
    if view.get_int("batch_dims", 0) != 0:
        return None
    return Made("gather_nd", view.inputs(2), {"stacked": True})


@_for("Unsqueeze")
def _unsqueeze(view: View) -> Made | None:
    axes, rank = _given_axes(view, 1, view.since >= 13), view.rank(0)
    axes = _axes(axes, None if rank is None or axes is None else rank + len(axes))
    return None if axes is None else Made("unsqueeze", view.inputs(1), {"axes": axes})


@_for("Squeeze")
def _squeeze(view: View) -> Made | None:
    by_operand, shape = view.since >= 13, view.shape(0)
    if view.input(1) if by_operand else "axes" in view.given:
        axes = _axes(_given_axes(view, 1, by_operand), view.rank(0))
    elif shape is not None and all(isinstance(d, int) for d in shape):
        axes = tuple(i for i, d in enumerate(shape) if d == 1)
    else:
        return None
    return None if axes is None else Made("squeeze", view.inputs(1), {"axes": axes})


@_for("Flatten")
def _flatten(view: View) -> Made | None:
    return Made("flatten", view.inputs(1), {"axis": view.get_int("axis", 1)})


@_for("Pad")
def _pad(view: View) -> Made | None:
    mode = view.get_str("mode", "constant")
    if mode not in ("constant", "reflect", "edge", "wrap") or view.since < 2:
        return None
    if view.since >= 11:
        return Made("pad", view.inputs(4), {"mode": mode})
    pads, value, dtype = view.get_ints("pads"), view.get_float("value", 0.0), view.dtype(0)
    if pads is None or dtype is None:
        return None
    operands: list[Operand] = [view.input(0), Fresh(Constant.of(np.array(pads, np.int64), "i64"), "pads")]
    if mode == "constant":
        data = np.array(value, np.float32).astype(numpy_dtype(dtype))
        operands.append(Fresh(Constant(data, dtype, ()), "value"))
    return Made("pad", operands, {"mode": mode})


@_for("Shape")
def _shape(view: View) -> Made | None:
    end = view.get_int("end") if "end" in view.given else None
    return Made("shape", view.inputs(1), {"start": view.get_int("start"), "end": end})


@_for("ConstantOfShape")
def _constant_of_shape(view: View) -> Made | None:
    found = view.attribute("value")
    value = Constant.of(np.zeros(1, np.float32), "f32") if found is None else constant_of(found.t)
    if value.size != 1 or value.dtype in UNSUPPORTED:
        return None
    return Made("constant_of_shape", view.inputs(1), {"value": value})


@_for("Trilu")
def _trilu(view: View) -> Made | None:
    return Made("trilu", view.inputs(2), {"upper": bool(view.get_int("upper", 1))})


# -- contraction ---------------------------------------------------------------------------------


@_for("Gemm")
def _gemm(view: View) -> Made | None:
    if view.since < 7:
        return None
    return Made(
        "gemm",
        view.inputs(3),
        {
            "alpha": view.get_float("alpha", 1.0),
            "beta": view.get_float("beta", 1.0),
            "trans_a": bool(view.get_int("transA")),
            "trans_b": bool(view.get_int("transB")),
        },
    )


def _window(view: View, spatial: int) -> dict[str, Attribute] | None:
    """The attributes that convolutions and pools share."""
    auto_pad = view.get_str("auto_pad", "NOTSET").lower()
    strides = view.get_ints("strides") or (1,) * spatial
    dilations = view.get_ints("dilations") or (1,) * spatial
    pads = view.get_ints("pads") or (0,) * (2 * spatial)
    if auto_pad not in ("notset", "valid", "same_upper", "same_lower") or not 1 <= spatial <= 3:
        return None
    if (len(strides), len(dilations), len(pads)) != (spatial, spatial, 2 * spatial):
        return None
    return {"strides": strides, "pads": pads, "dilations": dilations, "auto_pad": auto_pad}


@_for("Conv", "ConvTranspose")
def _conv(view: View) -> Made | None:
    weight, kernel = view.shape(1), view.get_ints("kernel_shape")
    if weight is None:
        return None
    spatial = len(weight) - 2
    if kernel is not None and any(isinstance(d, int) and d != k for d, k in zip(weight[2:], kernel, strict=False)):
        return None
    attributes = _window(view, spatial)
    if attributes is None or (kernel is not None and len(kernel) != spatial):
        return None
    attributes["groups"] = view.get_int("group", 1)
    if view.proto.op_type == "Conv":
        return Made("conv", view.inputs(3), attributes)
    output_padding, output_shape = (
        view.get_ints("output_padding") or (0,) * spatial,
        view.get_ints("output_shape"),
    )
    if len(output_padding) != spatial or (output_shape and len(output_shape) != spatial):
        return None
    attributes |= {"output_padding": output_padding, "output_shape": output_shape}
    return Made("conv_transpose", view.inputs(3), attributes)


@_for("AveragePool", "MaxPool")
def _pool(view: View) -> Made | None:
    kernel = view.get_ints("kernel_shape") or ()
    attributes = _window(view, len(kernel))
    if attributes is None or view.get_int("storage_order"):
        return None
    attributes |= {"kernel": kernel, "ceil_mode": bool(view.get_int("ceil_mode"))}
    if view.proto.op_type == "MaxPool":
        return Made("max_pool", view.inputs(1), attributes)
    return Made(
        "average_pool",
        view.inputs(1),
        attributes | {"count_include_pad": bool(view.get_int("count_include_pad"))},
    )


# -- normalisation and reduction -----------------------------------------------------------------


@_for("Softmax", "LogSoftmax")
def _softmax(view: View) -> Made | None:
    op = {"Softmax": "softmax", "LogSoftmax": "log_softmax"}[view.proto.op_type]
    if view.since >= 13:
        return Made(op, view.inputs(1), {"axis": view.get_int("axis", -1)})
    axis, shape = view.get_int("axis", 1), view.shape(0)
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    axis = axis % len(shape)  # from here on it flattens, so what comes behind must have one element
    if any(d != 1 for d in shape[axis + 1 :]):
        return None
    return Made(op, view.inputs(1), {"axis": axis})


@_for("LayerNormalization", "RMSNormalization")
def _layer_norm(view: View) -> Made | None:
    attributes: dict[str, Attribute] = {
        "axis": view.get_int("axis", -1),
        "eps": view.get_float("epsilon", 1e-5),
    }
    if view.get_int("stash_type", 1) != 1:
        return None
    if view.proto.op_type == "RMSNormalization":
        return Made("rms_norm", view.inputs(2), attributes | {"gain_offset": 0.0})
    return Made("layer_norm", view.inputs(3), attributes | {"stash": "f32"})


@_for("BatchNormalization")
def _batch_norm(view: View) -> Made | None:
    view.skip("momentum")
    if view.since < 7 or view.get_int("spatial", 1) != 1 or view.get_int("training_mode"):
        return None
    if view.since < 14 and any(view.proto.output[1:]):  # more than one result meant training
        return None
    return Made("batch_norm", view.inputs(5), {"eps": view.get_float("epsilon", 1e-5)})


@_for("GroupNormalization")
def _group_norm(view: View) -> Made | None:
    if view.since < 21 or view.get_int("stash_type", 1) != 1:
        return None
    return Made(
        "group_norm",
        view.inputs(3),
        {"groups": view.get_int("num_groups"), "eps": view.get_float("epsilon", 1e-5)},
    )


@_for("InstanceNormalization")
def _instance_norm(view: View) -> Made | None:
    return Made("instance_norm", view.inputs(3), {"eps": view.get_float("epsilon", 1e-5)}) if view.since >= 6 else None


_REDUCE = {
    "ReduceSum": ("reduce_sum", 13), "ReduceMean": ("reduce_mean", 18), "ReduceMax": ("reduce_max", 18),
    "ReduceMin": ("reduce_min", 18), "ReduceProd": ("reduce_prod", 18), "ReduceL2": ("reduce_l2", 18),
}  # fmt: skip


@_for(*_REDUCE)
def _reduce(view: View) -> Made | None:
    op, by_operand_since = _REDUCE[view.proto.op_type]
    by_operand = view.since >= by_operand_since
    keepdims, nothing = bool(view.get_int("keepdims", 1)), view.get_int("noop_with_empty_axes")
    axes: tuple[int, ...] | None = None
    if view.input(1) if by_operand else "axes" in view.given:
        axes = _axes(_given_axes(view, 1, by_operand), view.rank(0))
        if axes is None or (not axes and (nothing or not by_operand)):
            return None
        axes = axes or None
    elif nothing:
        return None
    return Made(op, view.inputs(1), {"axes": axes, "keepdims": keepdims})


# -- attention -----------------------------------------------------------------------------------


@_for("Attention")
def _attention(view: View) -> Made | None:
    if any(view.rank(i) != 4 for i in range(3)) or any(view.proto.input[4:]):
        return None
    if view.get_float("softcap", 0.0) != 0.0 or view.get_int("qk_matmul_output_mode"):
        return None
    mask, key = view.shape(3), view.shape(1)
    if view.input(3) and (not mask or key is None or mask[-1] != key[2]):
        return None
    scale = view.get_float("scale", 0.0) if "scale" in view.given else None
    return Made("attention", view.inputs(4), {"scale": scale, "causal": bool(view.get_int("is_causal"))})
