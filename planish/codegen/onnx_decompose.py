"""How canonical ops are written for which an opset may have no operator: from standard ones.

layer_norm   (x - mean) / sqrt(mean((x - mean)^2) + eps) * gain + bias
rms_norm     x / sqrt(mean(x^2) + eps) * (gain + gain_offset) + bias
gelu         x / 2 * (1 + erf(x / sqrt 2)), or the tanh form
attention    softmax(scale q k^T + mask) v, key and value heads repeated where queries share them
rope         x * cos + rotate_half(x) * sin
hadamard     a Reshape and a MatMul for each dense factor of the matrix
"""

from __future__ import annotations

import math

import numpy as np

from planish.codegen.onnx_emission import Emission, emitter
from planish.ir import hadamard
from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.ops.rotation import block_size, signs_of
from planish.ir.types import onnx_enum

_HALF = ("f16", "bf16")


def _x(node: Node) -> Value:
    value = node.operands[0]
    assert value is not None
    return value


# -- activations ---------------------------------------------------------------------------------


@emitter("gelu")
def _gelu(node: Node, e: Emission) -> None:
    approximate = str(node.attributes.get("approximate", "none"))
    x, value = e.name(_x(node)), _x(node)
    if e.since("Gelu") >= 20:
        kind = None if approximate == "none" else approximate
        e.add("Gelu", [x], e.outputs(node), approximate=kind)
        return
    if approximate == "tanh":
        cube = e.add("Mul", [e.add("Mul", [x, x]), x])
        inner = e.add("Add", [x, e.add("Mul", [cube, e.scalar(0.044715, value)])])
        inner = e.add("Tanh", [e.add("Mul", [inner, e.scalar(math.sqrt(2 / math.pi), value)])])
    else:
        inner = e.add("Erf", [e.add("Div", [x, e.scalar(math.sqrt(2.0), value)])])
    product = e.add("Mul", [x, e.add("Add", [inner, e.scalar(1.0, value)])])
    e.add("Mul", [product, e.scalar(0.5, value)], e.outputs(node))


@emitter("rsqrt")
def _rsqrt(node: Node, e: Emission) -> None:
    e.add("Reciprocal", [e.add("Sqrt", [e.name(_x(node))])], e.outputs(node))


@emitter("silu")
def _silu(node: Node, e: Emission) -> None:
    x = e.name(_x(node))
    if e.since("Swish") >= 24:
        e.add("Swish", [x], e.outputs(node))
    else:
        e.add("Mul", [x, e.add("Sigmoid", [x])], e.outputs(node))


@emitter("hard_swish")
def _hard_swish(node: Node, e: Emission) -> None:
    x = e.name(_x(node))
    if e.since("HardSwish") >= 14:
        e.add("HardSwish", [x], e.outputs(node))
    else:
        e.add("Mul", [x, e.add("HardSigmoid", [x], alpha=1 / 6, beta=0.5)], e.outputs(node))


@emitter("softmax", "log_softmax")
def _softmax(node: Node, e: Emission) -> None:
    op_type = {"softmax": "Softmax", "log_softmax": "LogSoftmax"}[node.op.name]
    axis, x = node.attributes.get("axis", -1), _x(node)
    assert isinstance(axis, int)
    if e.since(op_type) >= 13 or (axis == -1 and e.since(op_type) == 11):
        e.add(op_type, [e.name(x)], e.outputs(node), axis=axis)
        return
    if x.shape is not None and all(d == 1 for d in x.shape[axis % len(x.shape) + 1 :]):
        e.add(op_type, [e.name(x)], e.outputs(node), axis=axis % len(x.shape))  # it flattens from `axis` on
        return
    shifted = e.add("Sub", [e.name(x), e.reduce("ReduceMax", e.name(x), (axis,), True)])
    powers = e.add("Exp", [shifted])
    total = e.reduce("ReduceSum", powers, (axis,), True)
    if op_type == "Softmax":
        e.add("Div", [powers, total], e.outputs(node))
    else:
        e.add("Sub", [shifted, e.add("Log", [total])], e.outputs(node))


# -- normalisation -------------------------------------------------------------------------------


def _normal_axes(node: Node, e: Emission, x: Value) -> tuple[int, ...]:
    """The axes from `axis` to the last."""
    axis = node.attributes.get("axis", -1)
    assert isinstance(axis, int)
    if axis < 0:
        return tuple(range(axis, 0))
    if x.rank is None:
        raise e.fail(node, "an unknown rank is not possible")
    return tuple(range(axis, x.rank))


def _eps(node: Node) -> float:
    return float(node.attributes.get("eps", 1e-5))  # type: ignore[arg-type]


def _normalised(e: Emission, x: str, like: Value, axes: tuple[int, ...], eps: float, centre: bool) -> str:
    """(x - mean) / sqrt(variance + eps), or without the mean; halves are widened to float32."""
    narrow = like.dtype in _HALF
    if narrow:
        x = e.add("Cast", [x], to=onnx_enum("f32"))
    if centre:
        x = e.add("Sub", [x, e.reduce("ReduceMean", x, axes, True)])
    variance = e.reduce("ReduceMean", e.add("Mul", [x, x]), axes, True)
    dtype = "f32" if narrow else like.dtype or "f32"
    small = e.weight(Constant(np.array(eps, np.float64), dtype, ()), "eps")
    y = e.add("Div", [x, e.add("Sqrt", [e.add("Add", [variance, small])])])
    return e.add("Cast", [y], to=onnx_enum(like.dtype or "f32")) if narrow else y


def _affine(node: Node, e: Emission, y: str, gain: str, bias: str) -> None:
    """y * gain + bias, either of which may be absent."""
    steps = [(op, name) for op, name in (("Mul", gain), ("Add", bias)) if name]
    for index, (op_type, name) in enumerate(steps):
        y = e.add(op_type, [y, name], e.outputs(node) if index == len(steps) - 1 else None)
    if not steps:
        e.add("Identity", [y], e.outputs(node))


@emitter("layer_norm")
def _layer_norm(node: Node, e: Emission) -> None:
    x, gain, bias = _x(node), node.operand(1), node.operand(2)
    axis, eps = node.attributes.get("axis", -1), _eps(node)
    if e.since("LayerNormalization") >= 17 and node.attributes.get("stash", "f32") == "f32":
        scale = e.name(gain) if gain is not None else _ones(node, e, x)
        if scale:
            e.add(
                "LayerNormalization",
                [e.name(x), scale, e.name(bias)],
                e.outputs(node),
                axis=axis,
                epsilon=eps,
            )
            return
    y = _normalised(e, e.name(x), x, _normal_axes(node, e, x), eps, centre=True)
    _affine(node, e, y, e.name(gain), e.name(bias))


def _ones(node: Node, e: Emission, x: Value) -> str:
    """A gain of ones, for an operator that must have one; empty if the shape is not static."""
    shape = [] if x.shape is None else [x.shape[a] for a in _normal_axes(node, e, x)]
    static = tuple(d for d in shape if isinstance(d, int))
    if not shape or len(static) != len(shape):
        return ""
    return e.weight(Constant(np.ones(static), x.dtype or "f32", static), "ones", key=("ones", x.dtype, static))


@emitter("rms_norm")
def _rms_norm(node: Node, e: Emission) -> None:
    x, gain, bias = _x(node), node.operand(1), node.operand(2)
    offset = float(node.attributes.get("gain_offset", 0.0))  # type: ignore[arg-type]
    scale = e.name(gain)
    if gain is not None and offset:
        if gain.is_constant and gain.constant is not None:
            shifted = Constant(gain.constant.wide() + offset, gain.constant.dtype, gain.constant.shape)
            scale = e.weight(shifted, f"{scale}_plus", key=("plus", gain, offset))
        else:
            scale = e.add("Add", [scale, e.scalar(offset, gain)])
    axis, eps = node.attributes.get("axis", -1), _eps(node)
    if e.since("RMSNormalization") >= 23 and scale and bias is None:
        e.add("RMSNormalization", [e.name(x), scale], e.outputs(node), axis=axis, epsilon=eps)
        return
    y = _normalised(e, e.name(x), x, _normal_axes(node, e, x), eps, centre=False)
    _affine(node, e, y, scale, e.name(bias))


@emitter("batch_norm")
def _batch_norm(node: Node, e: Emission) -> None:
    e.add("BatchNormalization", [e.name(v) for v in node.operands], e.outputs(node), epsilon=_eps(node))


@emitter("instance_norm")
def _instance_norm(node: Node, e: Emission) -> None:
    e.add("InstanceNormalization", [e.name(v) for v in node.operands], e.outputs(node), epsilon=_eps(node))


@emitter("group_norm")
def _group_norm(node: Node, e: Emission) -> None:
    x, gain, bias = _x(node), node.operand(1), node.operand(2)
    groups = node.attributes["groups"]
    assert isinstance(groups, int)
    if e.since("GroupNormalization") >= 21 and gain is not None and bias is not None:
        names = [e.name(v) for v in (x, gain, bias)]
        e.add("GroupNormalization", names, e.outputs(node), num_groups=groups, epsilon=_eps(node))
        return
    if x.rank is None:
        raise e.fail(node, "an unknown rank is not possible")
    grouped = e.add("Reshape", [e.name(x), e.ints((0, groups, -1), "group_shape")])
    y = _normalised(e, grouped, x, (2,), _eps(node), centre=True)
    y = e.add("Reshape", [y, e.add("Shape", [e.name(x)])])
    trailing = tuple(range(1, x.rank - 1))
    _affine(node, e, y, _trailing_ones(e, gain, trailing), _trailing_ones(e, bias, trailing))


def _trailing_ones(e: Emission, value: Value | None, axes: tuple[int, ...]) -> str:
    """A vector over channels, shaped to broadcast over the axes after them."""
    if value is None or not axes:
        return e.name(value)
    if e.since("Unsqueeze") >= 13:
        return e.add("Unsqueeze", [e.name(value), e.ints(axes, "axes")])
    return e.add("Unsqueeze", [e.name(value)], axes=axes)


# -- attention -----------------------------------------------------------------------------------


@emitter("attention")
def _attention(node: Node, e: Emission) -> None:
    q, k, v, mask = (node.operand(i) for i in range(4))
    scale, causal = node.attributes.get("scale"), bool(node.attributes.get("causal", False))
    safe = bool(node.attributes.get("safe", False))
    sinks, cap = node.operand(4), node.attributes.get("softcap")
    plain = sinks is None and cap is None  # the operator caps behind the mask
    if e.since("Attention") >= 23 and plain and not safe and (mask is None or _covers_keys(mask)):
        names = [e.name(q), e.name(k), e.name(v), _full_rows(e, mask, q)]
        e.add("Attention", names, e.outputs(node), scale=scale, is_causal=1 if causal else None)
        return
    if q is None or k is None or v is None:
        raise e.fail(node, "an absent operand is not possible")
    if scale is None:
        depth = q.shape[3] if q.shape is not None else None
        if not isinstance(depth, int):
            raise e.fail(node, "an unknown head size is not possible")
        scale = depth**-0.5
    assert isinstance(scale, float | int)
    keys = e.add("Transpose", [_shared_heads(node, e, q, k)], perm=(0, 1, 3, 2))
    queries = e.add("Mul", [e.name(q), e.scalar(float(scale), q)])
    scores = e.add("MatMul", [queries, keys], hint=f"{e.name(node.result)}_scores")
    if cap is not None:
        assert isinstance(cap, float | int)
        limit = e.scalar(float(cap), q)
        scores = e.add("Mul", [e.add("Tanh", [e.add("Div", [scores, limit])]), limit])
    if mask is not None and mask.dtype == "bool":
        scores = e.add("Where", [e.name(mask), scores, e.scalar(-math.inf, q)])
    elif mask is not None:
        scores = e.add("Add", [scores, e.name(mask)])
    if causal:
        scores = e.add("Where", [_causal(e, q, k, scores), scores, e.scalar(-math.inf, q)])
    axis = -1 if e.since("Softmax") >= 11 else 3
    if sinks is not None:
        scores = _with_sinks(e, scores, sinks)
    weights = e.add("Softmax", [scores], axis=axis)
    if sinks is not None:
        bounds = [e.ints((n,), hint) for n, hint in ((0, "start"), (-1, "end"), (3, "axis"))]
        weights = e.add("Slice", [weights, *bounds])
    if safe:  # a row that is masked throughout gives zeros
        weights = e.add("Where", [e.add("IsNaN", [weights]), e.scalar(0.0, q), weights])
    e.add("MatMul", [weights, _shared_heads(node, e, q, v)], e.outputs(node))


def _covers_keys(mask: Value) -> bool:
    """True if the operator takes the mask: ONNX Runtime's does not broadcast it over the keys."""
    return mask.shape is not None and len(mask.shape) >= 2 and mask.shape[-1] != 1


def _full_rows(e: Emission, mask: Value | None, q: Value | None) -> str:
    """The mask with its query axis at full length: ONNX Runtime's operator does not broadcast it."""
    if mask is None or mask.shape is None or q is None or mask.shape[-2] != 1:
        return e.name(mask)
    if q.shape is not None and q.shape[2] == 1:
        return e.name(mask)
    ones = [e.ints((1,), "one")] * (len(mask.shape) - 2)
    length = e.add("Shape", [e.name(q)], start=2, end=3)
    dims = e.add("Concat", [*ones, length, e.ints((1,), "one")], axis=0)
    return e.add("Expand", [e.name(mask), dims])


def _shared_heads(node: Node, e: Emission, q: Value, k: Value) -> str:
    """Keys or values with each head repeated for the queries that share it."""
    heads, own = (x.shape[1] if x.shape is not None else None for x in (q, k))
    if heads == own and heads is not None:
        return e.name(k)
    depth = k.shape[3] if k.shape is not None else None
    if not (isinstance(heads, int) and isinstance(own, int) and isinstance(depth, int)):
        raise e.fail(node, "shared heads of unknown number or size are not possible")
    if e.since("Unsqueeze") >= 13:
        wide = e.add("Unsqueeze", [e.name(k), e.ints((2,), "axes")])
    else:
        wide = e.add("Unsqueeze", [e.name(k)], axes=(2,))
    wide = e.add("Expand", [wide, e.ints((1, 1, heads // own, 1, 1), "repeat")])
    return e.add("Reshape", [wide, e.ints((0, heads, -1, depth), "heads")])


def _with_sinks(e: Emission, scores: str, sinks: Value) -> str:
    """The scores with one more column: the sink of each head."""
    column = e.add("Reshape", [e.name(sinks), e.ints((1, -1, 1, 1), "sinks")])
    rows = e.add("Slice", [e.add("Shape", [scores]), e.ints((0,), "start"), e.ints((3,), "end")])
    dims = e.add("Concat", [rows, e.ints((1,), "one")], axis=0)
    return e.add("Concat", [scores, e.add("Expand", [column, dims])], axis=3)


def _causal(e: Emission, q: Value, k: Value, scores: str) -> str:
    """True where query t may read key s: s <= t."""
    rows, columns = (x.shape[2] if x.shape is not None else None for x in (q, k))
    if isinstance(rows, int) and isinstance(columns, int) and rows * columns <= 1 << 20:
        keep = np.tril(np.ones((rows, columns), bool))
        return e.weight(Constant.of(keep, "bool"), "causal", key=("causal", rows, columns))
    shape = e.add("Shape", [scores])
    last = e.add("Slice", [shape, e.ints((-2,), "start"), e.ints((4,), "end")])
    one = Constant.of(np.ones(1, np.float32), "f32")
    ones = e.add("ConstantOfShape", [last], value=one)
    return e.add("Cast", [e.add("Trilu", [ones], upper=0)], to=onnx_enum("bool"))


@emitter("rope")
def _rope(node: Node, e: Emission) -> None:
    x = _x(node)
    depth = x.shape[-1] if x.shape else None
    if x.shape is None or not isinstance(depth, int):
        raise e.fail(node, "an unknown head size is not possible")
    rank, half = len(x.shape), depth // 2
    source = e.name(x)
    interleaved = bool(node.attributes.get("interleaved", False))
    if interleaved:
        source = e.add("Reshape", [source, e.ints((*[0] * (rank - 1), half, 2), "pairs")])
    first, second = e.fresh("first"), e.fresh("second")
    sizes = (1, 1) if interleaved else (half, half)
    if e.since("Split") >= 13:
        e.add("Split", [source, e.ints(sizes, "halves")], [first, second], axis=-1)
    else:
        axis = rank if interleaved else rank - 1
        e.add("Split", [source], [first, second], axis=axis, split=sizes)
    last = rank if interleaved else rank - 1
    turned = e.add("Concat", [e.add("Neg", [second]), first], axis=last)
    if interleaved:
        turned = e.add("Reshape", [turned, e.ints((*[0] * (rank - 1), depth), "flat")])
    cos, sin = (e.name(node.operand(i)) for i in (1, 2))
    e.add("Add", [e.add("Mul", [e.name(x), cos]), e.add("Mul", [turned, sin])], e.outputs(node))


# -- rotation --------------------------------------------------------------------------------------


@emitter("hadamard")
def _hadamard(node: Node, e: Emission) -> None:
    x, block, signs = _x(node), block_size(node), signs_of(node)
    if x.rank is None or block is None:
        raise e.fail(node, "an unknown rank or number of channels is not possible")
    axis, inverse = node.attributes.get("axis", -1), bool(node.attributes.get("transpose", False))
    assert isinstance(axis, int)
    swap = list(range(x.rank))
    swap[axis], swap[-1] = swap[-1], swap[axis]
    y = e.name(x)
    if axis % x.rank != x.rank - 1:
        y = e.add("Transpose", [y], perm=tuple(swap))
    factor = "" if signs is None else e.weight(Constant(signs.wide(), x.dtype or "f32", signs.shape), "signs")
    if factor and not inverse:
        y = e.add("Mul", [y, factor])
    assert x.shape is not None
    size = x.shape[axis]
    assert isinstance(size, int)
    kept, left, right = [0] * (x.rank - 1), size // block, block
    for order in hadamard.factors(block):
        right //= order
        matrix = hadamard.dense(order) / math.sqrt(order)
        matrix = matrix.T if inverse != (right == 1) else matrix  # from the right: transposed
        weight = e.weight(
            Constant(matrix, x.dtype or "f32", matrix.shape),
            f"hadamard.{order}",
            key=("hadamard", order, inverse != (right == 1), x.dtype),
        )
        shape = [*kept, left, order] if right == 1 else [*kept, left, order, right]
        y = e.add("Reshape", [y, e.ints(shape, "blocks")])
        y = e.add("MatMul", [y, weight] if right == 1 else [weight, y])
        left *= order
    steps: list[tuple[str, list[str], tuple[int, ...] | None]] = [
        ("Reshape", [e.ints([*kept, size], "channels")], None)
    ]
    if factor and inverse:
        steps.append(("Mul", [factor], None))
    if axis % x.rank != x.rank - 1:
        steps.append(("Transpose", [], tuple(swap)))
    for index, (op_type, more, perm) in enumerate(steps):
        y = e.add(op_type, [y, *more], e.outputs(node) if index == len(steps) - 1 else None, perm=perm)
