"""Converters of the ops of neural networks: products, convolutions, norms, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from planish.capture.fx_builder import Builder
from planish.capture.fx_reductions import spread
from planish.capture.fx_table import Converter, Made, aten, register
from planish.ir.graph import Value
from planish.ir.ops import resize
from planish.ir.types import torch_dtype

# -- products --------------------------------------------------------------------------------------


@aten("linear.default")
def _linear(b: Builder, x: Value, weight: Value, bias: Value | None = None) -> Made:
    return b.op("linear", x, weight, bias) if b.rank(weight) == 2 else None


@aten("matmul.default", "mm.default", "bmm.default", "mv.default", "dot.default")
def _matmul(b: Builder, x: Value, other: Any = None, mat2: Any = None, vec: Any = None, tensor: Any = None) -> Made:
    y = next(o for o in (other, mat2, vec, tensor) if o is not None)
    return b.op("matmul", x, y)


@aten("addmm.default")
def _addmm(b: Builder, x: Value, mat1: Value, mat2: Value, beta: Any = 1, alpha: Any = 1) -> Made:
    """x is the bias; a weight of [in, out] is a linear."""
    if beta == 1 and alpha == 1 and b.rank(x) == 1 and b.shape(x) == b.shape(mat2)[1:]:
        return b.op("linear", mat1, mat2, x, transposed=True)
    return b.op("gemm", mat1, mat2, x if beta else None, alpha=float(alpha), beta=float(beta))


@aten("baddbmm.default")
def _baddbmm(b: Builder, x: Value, batch1: Value, batch2: Value, beta: Any = 1, alpha: Any = 1) -> Made:
    product = b.scaled(b.op("matmul", batch1, batch2), alpha)
    return b.op("add", b.scaled(x, beta), product) if beta else product  # beta 0: x is not read at all


# -- convolutions ----------------------------------------------------------------------------------


def _convolved(
    b: Builder, op: str, x: Value, weight: Value, bias: Value | None, attributes: dict[str, Any], rank: int
) -> Value:
    bare = b.rank(x) == rank + 1
    y = b.op(op, b.unsqueeze(x, 0) if bare else x, weight, bias, **attributes)
    return b.squeeze(y, 0) if bare else y


def _attributes(rank: int, stride: Any, pads: Sequence[int], dilation: Any, groups: int) -> dict[str, Any]:
    made: dict[str, Any] = {"strides": spread(stride, rank), "pads": tuple(pads), "dilations": spread(dilation, rank)}
    defaults: dict[str, Any] = {"strides": (1,) * rank, "pads": (0,) * 2 * rank, "dilations": (1,) * rank}
    made = {name: value for name, value in made.items() if value != defaults[name]}
    return {**made, "groups": groups} if groups != 1 else made


def _conv(
    b: Builder, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Made:  # fmt: skip
    rank = b.rank(weight) - 2
    if isinstance(padding, str):
        kernel, dilations = b.shape(weight)[2:], spread(dilation, rank)
        if padding == "valid":
            total = [0] * rank
        elif padding == "same" and all(isinstance(k, int) for k in kernel):
            total = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True) if isinstance(k, int)]
        else:
            return None
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = list(spread(padding, rank)) * 2
    return _convolved(b, "conv", x, weight, bias, _attributes(rank, stride, pads, dilation, groups), rank)


def _conv_transpose(
    b: Builder, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Made:  # fmt: skip
    rank = b.rank(weight) - 2
    attributes = _attributes(rank, stride, list(spread(padding, rank)) * 2, dilation, groups)
    if any(spread(output_padding, rank)):
        attributes["output_padding"] = spread(output_padding, rank)
    return _convolved(b, "conv_transpose", x, weight, bias, attributes, rank)


aten("conv1d.default", "conv2d.default", "conv3d.default")(_conv)
aten("conv1d.padding", "conv2d.padding", "conv3d.padding")(_conv)
aten("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input")(_conv_transpose)


@aten("convolution.default", "_convolution.default")
def _convolution(
    b: Builder, x: Value, weight: Value, bias: Value | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> Made:  # fmt: skip
    if transposed:
        return _conv_transpose(b, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _conv(b, x, weight, bias, stride, padding, dilation, groups)


# -- norms -----------------------------------------------------------------------------------------


@aten("layer_norm.default")
def _layer_norm(
    b: Builder, x: Value, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Made:
    return b.op("layer_norm", x, weight, bias, axis=-len(normalized_shape), eps=float(eps))


@aten("native_layer_norm.default")
def _native_layer_norm(
    b: Builder, x: Value, normalized_shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> Made:
    return _layer_norm(b, x, normalized_shape, weight, bias, eps), None, None  # type: ignore[return-value]


@aten("rms_norm.default", "_fused_rms_norm.default")
def _rms_norm(
    b: Builder, x: Value, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Made:
    found = torch.finfo(torch_dtype(b.dtype(x))).eps if eps is None else eps
    y = b.op("rms_norm", x, weight, axis=-len(normalized_shape), eps=float(found))
    return (y, None) if len(b.types) > 1 else y


@aten("group_norm.default")
def _group_norm(b: Builder, x: Value, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Made:
    return b.op("group_norm", x, weight, bias, groups=num_groups, eps=float(eps))


@aten("native_group_norm.default")
def _native_group_norm(
    b: Builder, x: Value, weight: Any, bias: Any, N: Any, C: Any, HxW: Any, group: int, eps: float
) -> Made:
    return _group_norm(b, x, group, weight, bias, eps), None, None  # type: ignore[return-value]


def _vector(b: Builder, given: Value | None, like: Value, number: float) -> Value:
    """A gain or bias that stands for itself, or the constant that its absence stands for."""
    if given is not None:
        return given
    size = b.shape(like)[1]
    return b.constant(np.full((int(size or 0),), number), b.dtype(like), "ones" if number else "zeros")


@aten("batch_norm.default", "instance_norm.default")
def _batch_norm(
    b: Builder, x: Value, weight: Any, bias: Any, running_mean: Any, running_var: Any, eps: float,
    training: bool | None = None, use_input_stats: bool | None = None,
) -> Made:  # fmt: skip
    if not isinstance(b.shape(x)[1], int):
        return None
    gain, shift = _vector(b, weight, x, 1.0), _vector(b, bias, x, 0.0)
    if use_input_stats:
        return b.op("instance_norm", x, gain, shift, eps=float(eps))
    if training or running_mean is None or running_var is None:
        return None
    return b.op("batch_norm", x, gain, shift, running_mean, running_var, eps=float(eps))


@aten("_native_batch_norm_legit_no_training.default")
def _eval_batch_norm(
    b: Builder, x: Value, weight: Any, bias: Any, running_mean: Any, running_var: Any, eps: float
) -> Made:
    y = _batch_norm(b, x, weight, bias, running_mean, running_var, eps)
    return (y, None, None) if isinstance(y, Value) else None


@aten("cudnn_batch_norm.default", "miopen_batch_norm.default", "native_batch_norm.default")
def _full_batch_norm(
    b: Builder, x: Value, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, eps: float
) -> Made:
    y = _batch_norm(b, x, weight, bias, running_mean, running_var, eps, training)
    return (y, *(None for _ in b.types[1:])) if isinstance(y, Value) else None


# -- attention -------------------------------------------------------------------------------------


@aten("scaled_dot_product_attention.default")
def _attention(
    b: Builder, query: Value, key: Value, value: Value, attn_mask: Value | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Made:  # fmt: skip
    """[batch, head, row, channel]; a missing batch or head axis is put in."""
    rank = b.rank(query)
    if dropout_p or not 2 <= rank <= 4 or {b.rank(key), b.rank(value)} != {rank}:
        return None
    missing = tuple(range(4 - rank))
    q, k, v = (b.unsqueeze(t, *missing) for t in (query, key, value))
    if attn_mask is not None and attn_mask.dtype != "bool":
        attn_mask = b.cast(attn_mask, b.dtype(query))
    if attn_mask is not None and b.rank(attn_mask) > 4:
        return None
    attributes: dict[str, Any] = {"safe": True}
    if scale is not None:
        attributes["scale"] = float(scale)
    if is_causal:
        attributes["causal"] = True
    return b.squeeze(b.op("attention", q, k, v, attn_mask, **attributes), *missing)


# -- mixtures of experts, resizing -----------------------------------------------------------------


@aten("_grouped_mm.default")
@register("transformers.grouped_mm_fallback.default")
def _grouped(
    b: Builder, x: Value, weight: Value | None = None, mat2: Value | None = None, offs: Value | None = None,
    bias: Value | None = None, out_dtype: Any = None,
) -> Made:  # fmt: skip
    weight = mat2 if weight is None else weight
    if offs is None or bias is not None or weight is None or b.rank(x) != 2 or b.rank(weight) != 3:
        return None
    return b.cast(b.op("grouped_matmul", x, weight, offs), b.out.dtype)


def _resize(mode: str) -> Converter:
    def converter(
        b: Builder, x: Value, output_size: Any = None, scale_factors: Any = None, align_corners: bool = False
    ) -> Made:
        attributes: dict[str, Any] = {} if mode == "nearest" else {"mode": mode}
        if align_corners:
            attributes["align_corners"] = True
        if scale_factors is not None:
            if not all(isinstance(s, int | float) for s in scale_factors):
                return None
            return b.op("resize", x, None, **attributes, scales=tuple(float(s) for s in scale_factors))
        return b.op("resize", x, b.ints(list(output_size)), **attributes)

    return converter


for (_mode, _spatial), _name in resize.TORCH.items():
    aten(f"{_name}.vec")(_resize(_mode))
