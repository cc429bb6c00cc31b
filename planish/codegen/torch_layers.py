"""Torch code for the rows of the op table that are layers: contractions, norms, reductions, attention, quantisation.

Where ATen has the op, it is called, so that a captured model comes back bit for bit.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from planish.codegen import torch_functions as functions
from planish.codegen import torch_windows as windows
from planish.codegen.torch_emission import UNSIGNED, Emission, attributes_of, emitter, is_floating, shape_of
from planish.codegen.torch_ops import back
from planish.codegen.torch_sizes import dim
from planish.ir.ops.attention import attend, turn
from planish.ir.ops.base import normal_axis
from planish.ir.ops.codes import (
    from_clusters,
    from_codes,
    held_dtype,
    to_codes,
    to_codes_by_format,
    to_codes_by_range,
)
from planish.ir.ops.quantization import by_format, result_dtype
from planish.ir.types import WIDE_FLOATS, torch_dtype

if TYPE_CHECKING:
    import torch.fx

    from planish.ir.graph import Node

aten = torch.ops.aten


# -- contractions ----------------------------------------------------------------------------------------


@emitter("matmul")
def _matmul(emission: Emission, node: Node) -> torch.fx.Node:
    a, b = node.operand(0), node.operand(1)
    right = emission.tensor(b)
    if a is not None and b is not None and a.dtype != b.dtype:
        right = emission.method("to", right, emission.dtype(a.dtype or "f32"))
    return emission.call(torch.matmul, emission.tensor(a), right)


@emitter("linear", reads="transposed")
def _linear(emission: Emission, node: Node) -> torch.fx.Node:
    x, weight, bias = (emission.optional(node.operand(index)) for index in range(3))
    own, outer = node.operand(2), shape_of(node.result)[-1]
    if attributes_of(node)["transposed"]:
        if own is not None and own.shape == (outer,) and len(shape_of(node.operand(0))) == 2:
            return emission.call(aten.addmm.default, bias, x, weight)
        made = emission.call(torch.matmul, x, weight)
        return made if bias is None else emission.call(operator.add, made, bias)
    if own is not None and own.shape != (outer,):
        return emission.call(operator.add, emission.call(aten.linear.default, x, weight), bias)
    return emission.call(aten.linear.default, *(v for v in (x, weight, bias) if v is not None))


@emitter("gemm", reads="alpha beta trans_a trans_b")
def _gemm(emission: Emission, node: Node) -> torch.fx.Node:
    own = attributes_of(node)
    a, b, c = (emission.optional(node.operand(index)) for index in range(3))
    if own["trans_a"]:
        a = emission.method("t", a)
    if own["trans_b"]:
        b = emission.method("t", b)
    alpha, beta = float(own["alpha"]), float(own["beta"])
    if c is not None:
        factors = {name: f for name, f in (("beta", beta), ("alpha", alpha)) if f != 1.0}
        return emission.call(aten.addmm.default, c, a, b, **factors)
    made = emission.call(torch.matmul, a, b)
    return made if alpha == 1.0 else emission.call(operator.mul, made, alpha)


def _window(node: Node, spatial: int) -> tuple[list[int], list[int], list[int], str]:
    """Strides, pads (all before, all after), dilations, auto_pad."""
    own = attributes_of(node)
    strides, dilations = list(own["strides"]) or [1] * spatial, list(own["dilations"]) or [1] * spatial
    pads, auto = list(own["pads"]) or [0] * (2 * spatial), str(own["auto_pad"])
    return strides, pads if auto == "notset" else [0] * (2 * spatial), dilations, auto


@emitter("conv", reads="strides pads dilations groups auto_pad")
def _conv(emission: Emission, node: Node) -> torch.fx.Node:
    x, weight, bias = (emission.optional(node.operand(index)) for index in range(3))
    spatial = len(shape_of(node.operand(1))) - 2
    strides, pads, dilations, auto = _window(node, spatial)
    groups = int(attributes_of(node)["groups"])
    if auto.startswith("same"):
        return emission.call(windows.conv, x, weight, bias, strides, dilations, groups, auto)
    before, after = pads[:spatial], pads[spatial:]
    if before != after:
        amounts = [pad for pair in zip(reversed(before), reversed(after), strict=True) for pad in pair]
        x, before = emission.call(aten.constant_pad_nd.default, x, amounts), [0] * spatial
    overload = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)[spatial - 1]
    return emission.call(overload, x, weight, bias, strides, before, dilations, groups)


@emitter("conv_transpose", reads="strides pads dilations groups auto_pad output_padding output_shape")
def _conv_transpose(emission: Emission, node: Node) -> torch.fx.Node:
    from planish.ir.ops.convolution import _transpose_window

    own = attributes_of(node)
    x, weight, bias = (emission.optional(node.operand(index)) for index in range(3))
    spatial = len(shape_of(node.operand(1))) - 2
    strides, pads, dilations, auto = _window(node, spatial)
    groups, extra = int(own["groups"]), list(own["output_padding"]) or [0] * spatial
    if not auto.startswith("same") and not own["output_shape"] and pads[:spatial] == pads[spatial:]:
        overload = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
        return emission.call(overload[spatial - 1], x, weight, bias, strides, pads[:spatial], extra, groups, dilations)
    cut = _transpose_window(node, shape_of(node.operand(0))[2:], shape_of(node.operand(1))[2:])
    kept = [(begin, size) for size, begin, _ in cut]
    return emission.call(windows.conv_transpose, x, weight, bias, strides, groups, dilations, kept)


# -- norms and softmax -----------------------------------------------------------------------------------


def _normalised(emission: Emission, node: Node) -> tuple[list[int], list[Any], bool]:
    """The normalised axes, their dims, and whether gain and bias have exactly these."""
    x = node.operand(0)
    assert x is not None
    shape = shape_of(x)
    axes = list(range(normal_axis(int(attributes_of(node)["axis"]), len(shape)), len(shape)))
    dims = shape[axes[0] :]
    plain = all(v is None or v.shape == dims for v in (node.operand(1), node.operand(2)))
    return axes, [dim(emission, x, axis) for axis in axes] if plain else [], plain


@emitter("layer_norm", reads="axis eps stash")
def _layer_norm(emission: Emission, node: Node) -> torch.fx.Node:
    x, gain, bias = (emission.optional(node.operand(index)) for index in range(3))
    axes, dims, plain = _normalised(emission, node)
    eps = float(attributes_of(node)["eps"])
    if not plain:
        return emission.call(functions.layer_norm, x, gain, bias, axes, eps)
    return emission.call(aten.layer_norm.default, x, dims, gain, bias, eps)


@emitter("rms_norm", reads="axis eps gain_offset")
def _rms_norm(emission: Emission, node: Node) -> torch.fx.Node:
    x, gain, bias = (emission.optional(node.operand(index)) for index in range(3))
    own = attributes_of(node)
    axes, dims, plain = _normalised(emission, node)
    if plain and bias is None and float(own["gain_offset"]) == 0.0:
        return emission.call(aten.rms_norm.default, x, dims, gain, float(own["eps"]))
    return emission.call(functions.rms_norm, x, gain, bias, axes, float(own["eps"]), float(own["gain_offset"]))


@emitter("batch_norm", reads="eps")
def _batch_norm(emission: Emission, node: Node) -> torch.fx.Node:
    x, gain, bias, mean, variance = (emission.tensor(node.operand(index)) for index in range(5))
    eps = float(attributes_of(node)["eps"])
    return emission.call(aten.batch_norm.default, x, gain, bias, mean, variance, False, 0.1, eps, True)


@emitter("group_norm", reads="groups eps")
def _group_norm(emission: Emission, node: Node) -> torch.fx.Node:
    x, gain, bias = (emission.optional(node.operand(index)) for index in range(3))
    own = attributes_of(node)
    return emission.call(aten.group_norm.default, x, int(own["groups"]), gain, bias, float(own["eps"]))


@emitter("instance_norm", reads="eps")
def _instance_norm(emission: Emission, node: Node) -> torch.fx.Node:
    x, gain, bias = (emission.optional(node.operand(index)) for index in range(3))
    eps = float(attributes_of(node)["eps"])
    return emission.call(aten.instance_norm.default, x, gain, bias, None, None, True, 0.1, eps, True)


@emitter("softmax", "log_softmax", reads="axis")
def _softmax(emission: Emission, node: Node) -> torch.fx.Node:
    function = aten.softmax.int if node.op.name == "softmax" else aten.log_softmax.int
    return emission.call(function, emission.tensor(node.operand(0)), int(attributes_of(node)["axis"]))


# -- reductions ------------------------------------------------------------------------------------------


@emitter("reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_prod", "reduce_l2", reads="axes keepdims")
def _reduce(emission: Emission, node: Node) -> torch.fx.Node:
    own, source, name = attributes_of(node), node.operand(0), node.op.name
    x, keep = emission.computed(source), bool(own["keepdims"])
    rank = len(shape_of(source))
    axes = list(range(rank)) if own["axes"] is None else [normal_axis(int(a), rank) for a in own["axes"]]
    everything = own["axes"] is None and not keep
    if not axes:
        return emission.call(aten.abs.default, x) if name == "reduce_l2" else emission.tensor(source)
    floats = is_floating(source)
    match name:
        case "reduce_sum" if floats and everything:
            made = emission.call(aten.sum.default, x)
        case "reduce_sum":
            kept = {} if floats else {"dtype": torch_dtype(node.result.dtype or "i64")}
            if source is not None and source.dtype in UNSIGNED:
                kept = {}
            made = emission.call(aten.sum.dim_IntList, x, axes, keep, **kept)
        case "reduce_mean" if floats and everything:
            made = emission.call(aten.mean.default, x)
        case "reduce_mean" if floats:
            made = emission.call(aten.mean.dim, x, axes, keep)
        case "reduce_mean":
            made = emission.call(functions.integer_mean, x, axes, keep)
        case "reduce_max":
            made = emission.call(aten.amax.default, x, axes, keep)
        case "reduce_min":
            made = emission.call(aten.amin.default, x, axes, keep)
        case "reduce_prod":
            made = emission.call(functions.product_over, x, axes, keep)
        case _:
            x = x if floats else emission.method("double", x)
            made = emission.call(aten.linalg_vector_norm.default, x, 2, axes, keep)
            if not floats:
                made = emission.method("to", made, torch_dtype(node.result.dtype or "i64"))
    return back(emission, node, made)


@emitter("global_average_pool", "global_max_pool")
def _global_pool(emission: Emission, node: Node) -> torch.fx.Node:
    axes = list(range(2, len(shape_of(node.operand(0)))))
    function = aten.mean.dim if node.op.name == "global_average_pool" else aten.amax.default
    return emission.call(function, emission.tensor(node.operand(0)), axes, True)


@emitter("max_pool", "average_pool", reads="kernel strides pads dilations ceil_mode count_include_pad auto_pad")
def _pool(emission: Emission, node: Node) -> torch.fx.Node:
    own = attributes_of(node)
    kernel = [int(k) for k in own["kernel"]]
    spatial, ceil = len(kernel), bool(own["ceil_mode"])
    strides, pads, dilations, auto = _window(node, spatial)
    x = emission.computed(node.operand(0))
    symmetric = pads[:spatial] == pads[spatial:] and all(2 * p <= k for p, k in zip(pads, kernel, strict=False))
    plain = symmetric and not auto.startswith("same") and is_floating(node.operand(0))
    if node.op.name == "max_pool":
        if plain:
            overload = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)[spatial - 1]
            return emission.call(overload, x, kernel, strides, pads[:spatial], dilations, ceil)
        return back(emission, node, emission.call(windows.max_pool, x, kernel, strides, pads, dilations, ceil, auto))
    count = bool(own["count_include_pad"])
    if plain and dilations == [1] * spatial and spatial <= 3:
        overload = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)[spatial - 1]
        return emission.call(overload, x, kernel, strides, pads[:spatial], ceil, count)
    return emission.call(windows.average_pool, x, kernel, strides, pads, dilations, ceil, auto, count)


# -- attention -------------------------------------------------------------------------------------------


def _shares(q: Sequence[Any], k: Sequence[Any], v: Sequence[Any]) -> bool | None:
    """Whether query heads share key heads; None where sdpa could not tell."""
    if q[0] != k[0] or q[0] != v[0] or k[1] != v[1] or not all(isinstance(s[1], int) for s in (q, k, v)):
        return None
    return bool(q[1] != k[1])


@emitter("attention", reads="scale causal safe softcap")
def _attention(emission: Emission, node: Node) -> torch.fx.Node:
    """A row that is masked throughout gives zeros in sdpa, also where the row would give NaN."""
    q, k, v, mask = (emission.optional(node.operand(index)) for index in range(4))
    own = attributes_of(node)
    scale = None if own["scale"] is None else float(own["scale"])
    causal, value = bool(own["causal"]), node.operand(3)
    shared = _shares(*(shape_of(node.operand(index)) for index in range(3)))
    dtype = None if node.operands[0] is None else node.operands[0].dtype
    odd = value is not None and (causal or value.rank is None or value.rank < 2 or value.dtype not in ("bool", dtype))
    if node.operand(4) is not None or own.get("softcap") is not None or shared is None or odd:
        rest = {"softcap": own["softcap"]} if own.get("softcap") is not None else {}
        if node.operand(4) is not None:
            rest["sinks"] = emission.tensor(node.operand(4))
        return emission.call(attend, q, k, v, mask, scale, causal, bool(own["safe"]), **rest)
    options: dict[str, Any] = {} if scale is None else {"scale": scale}
    one = shape_of(node.operand(1))[1] == 1  # a single key head is broadcast by itself
    if shared and not (one and emission.from_torch and node.result.name not in emission.shared_heads):
        options["enable_gqa"] = True
    return emission.call(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, causal, **options)


@emitter("rope", reads="interleaved")
def _rope(emission: Emission, node: Node) -> torch.fx.Node:
    x, cos, sin = (emission.tensor(node.operand(index)) for index in range(3))
    return emission.call(turn, x, cos, sin, bool(attributes_of(node)["interleaved"]))


# -- quantised numbers -----------------------------------------------------------------------------------


@emitter("quantize", reads="dtype axis block")
def _quantize(emission: Emission, node: Node) -> torch.fx.Node:
    x, scale, zero = (emission.optional(node.operand(index)) for index in range(3))
    own, dtype = attributes_of(node), str(attributes_of(node)["dtype"])
    return emission.call(to_codes, x, scale, zero, dtype, own["axis"], own["block"], held_dtype(dtype))


@emitter("dequantize", reads="axis block dtype")
def _dequantize(emission: Emission, node: Node) -> torch.fx.Node:
    codes, scale, zero = (emission.optional(node.operand(index)) for index in range(3))
    own = attributes_of(node)
    return emission.call(from_codes, codes, scale, zero, own["axis"], own["block"], _result(emission, node, 1))


@emitter("dequantize_split", reads="axis block index dtype")
def _dequantize_split(emission: Emission, node: Node) -> torch.fx.Node:
    codes, ids, scale, zero = (emission.optional(node.operand(index)) for index in range(4))
    own, to = attributes_of(node), _result(emission, node, 2)
    return emission.call(from_clusters, codes, ids, scale, zero, own["axis"], own["block"], own["index"], to)


def _result(emission: Emission, node: Node, port: int) -> Any:
    """The dtype of a dequantised value; None: that of its scale."""
    scale = node.operand(port)
    plain = node.attributes.get("dtype") is None and scale is not None and scale.dtype in WIDE_FLOATS
    return None if plain else emission.dtype(result_dtype(node, scale))


@emitter("dynamic_quantize", reads="granularity block dtype symmetric floor scale rule")
def _dynamic_quantize(emission: Emission, node: Node) -> list[torch.fx.Node]:
    own, x = attributes_of(node), emission.tensor(node.operand(0))
    granularity, symmetric = str(own["granularity"]), bool(own["symmetric"])
    if by_format(node):
        outer, dtype, scale = emission.optional(node.operand(1)), str(own["dtype"]), own["scale"]
        dtypes = held_dtype(dtype), None if scale is None else held_dtype(str(scale))
        said = (dtype, granularity, own["block"], scale, own["rule"], symmetric, *dtypes)
        made = emission.call(to_codes_by_format, x, outer, *said)
    else:
        floor = own["floor"] if isinstance(own["floor"], float) else None
        made = emission.call(to_codes_by_range, x, granularity, symmetric, floor)
    return [emission.call(operator.getitem, made, index) for index in range(len(node.results))]
