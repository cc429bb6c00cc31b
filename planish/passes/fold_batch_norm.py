"""Fold batch norm (inference) into the layer before it, or into all layers behind it.

    BN(y)[c]  =  s[c] y[c] + t[c],    s = g / sqrt(var + eps),    t = b - s mean

    BN(W x + b0)  =  (s W) x + (s b0 + t)
    W BN(x) + b0  =  (W s) x + (b0 + W t)        no padding, or t = 0: zeros that pad BN(x) are no BN of anything

for conv, conv_transpose, linear and gemm. Exact over the reals; s, t and the products are computed in
float64 and rounded once. arXiv:1712.05877, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.rewriter import Declined, Rewriter
from planish.passes.base import Context, Exactness, RewritePass
from planish.passes.finite import require_finite
from planish.passes.match import attribute, is_op, is_output, last_axis_vector, only_reader

LAYERS = ("conv", "conv_transpose", "linear", "gemm")


def _wide(value: Value | None) -> np.ndarray:
    assert value is not None
    assert value.constant is not None
    require_finite(value)
    return value.constant.wide()


def affine(node: Node) -> tuple[np.ndarray, np.ndarray]:
    """(s, t), each [channels], of a batch norm with constant statistics.

    Raises:
        Declined: an operand is no constant, or var + eps is not positive.
    """
    if not all(v is not None and v.is_constant for v in node.operands[1:5]):
        raise Declined("its statistics are not constants", node)
    gain, bias, mean, variance = (_wide(v) for v in node.operands[1:5])
    under = variance + float(attribute(node, "eps"))
    if not (under > 0.0).all():
        raise Declined("its variance plus eps is not positive", node)
    scale = gain / np.sqrt(under)
    return scale, bias - scale * mean


def _groups(layer: Node) -> int:
    return int(attribute(layer, "groups")) if layer.op.name in ("conv", "conv_transpose") else 1


def _matrix(layer: Node, weight: np.ndarray) -> np.ndarray:
    """A view of the weight as [groups, outputs of a group, inputs of a group, kernel]."""
    groups = _groups(layer)
    match layer.op.name:
        case "conv":
            return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        case "conv_transpose":
            return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).swapaxes(1, 2)
        case "linear":
            outer_first = not attribute(layer, "transposed")
        case _:
            outer_first = bool(attribute(layer, "trans_b"))
    return (weight if outer_first else weight.T)[None, :, :, None]


def _check(layer: Node) -> None:
    """Raise `Declined` unless the weight and bias of a layer are its own constants."""
    weight, bias, result = layer.operand(1), layer.operand(2), layer.result
    if weight is None or not weight.is_constant:
        raise Declined("the weight of the layer is no constant", layer)
    if len(weight.users) > 1 or any(v is weight for v in _outputs(layer)):
        raise Declined("the weight of the layer has other readers", layer)
    if bias is not None and (not bias.is_constant or _bias(layer) is None):
        raise Declined("the bias of the layer is no constant vector", layer)
    if layer.op.name in ("linear", "gemm") and result.rank != 2:
        raise Declined("the channels of the layer are not on axis 1", layer)


def _outputs(node: Node) -> list[Value]:
    return node.graph.output_values() if node.graph is not None else []


def _bias(layer: Node) -> np.ndarray | None:
    """The bias [outputs] in float64, with beta; None if it is no vector."""
    weight, bias = layer.operand(1), layer.operand(2)
    view = _matrix(layer, _wide(weight))
    size = view.shape[0] * view.shape[1]
    if bias is None:
        return np.zeros(size)
    assert bias.constant is not None
    require_finite(bias)
    vector = last_axis_vector(bias.constant, size)
    if vector is None or layer.op.name != "gemm":
        return vector
    return vector * float(attribute(layer, "beta"))


def _give(rewriter: Rewriter, layer: Node, weight: np.ndarray, bias: np.ndarray) -> None:
    old, old_bias = layer.operand(1), layer.operand(2)
    assert old is not None
    assert old.constant is not None
    rewriter.set_constant(old, Constant(weight, old.constant.dtype, weight.shape))
    name = old_bias.name if old_bias is not None else f"{layer.result.name}.bias"
    made = rewriter.constant(Constant(bias, old.constant.dtype, bias.shape), name)
    rewriter.set_operand(layer, 2, made)
    if layer.op.name == "gemm":
        rewriter.set_attributes(layer, {"beta": 1.0})


def fold_into_producer(rewriter: Rewriter, layer: Node, scale: np.ndarray, shift: np.ndarray) -> None:
    """Make a layer compute s y + t instead of y."""
    _check(layer)
    weight, bias = np.array(_wide(layer.operand(1)), order="C"), _bias(layer)
    assert bias is not None
    view = _matrix(layer, weight)
    view *= scale.reshape(view.shape[0], view.shape[1], 1, 1)
    _give(rewriter, layer, weight, scale * bias + shift)


def check_consumer(layer: Node, value: Value, shift: np.ndarray) -> None:
    """Raise `Declined` unless a layer that reads s x + t can read x instead."""
    if layer.op.name not in LAYERS or layer.operand(0) is not value or sum(v is value for v in layer.operands) > 1:
        raise Declined("it is read by an op that is no layer", layer)
    _check(layer)
    if layer.op.name == "gemm" and attribute(layer, "trans_a"):
        raise Declined("the layer reads it transposed", layer)
    for constant in layer.operands[1:]:
        require_finite(constant)
    if not shift.any():
        return
    if layer.op.name == "conv_transpose":
        raise Declined("a shift reaches the border of the layer's result in another strength", layer)
    pads, auto = attribute(layer, "pads") or (), attribute(layer, "auto_pad") or "notset"
    if layer.op.name == "conv" and (any(pads) or auto not in ("notset", "valid")):
        raise Declined("the layer pads with zeros, which a shift does not reach", layer)


def fold_into_consumer(rewriter: Rewriter, layer: Node, scale: np.ndarray, shift: np.ndarray) -> None:
    """Make a layer read x instead of s x + t; see `check_consumer`."""
    weight, bias = np.array(_wide(layer.operand(1)), order="C"), _bias(layer)
    assert bias is not None
    view = _matrix(layer, weight)
    alpha = float(attribute(layer, "alpha")) if layer.op.name == "gemm" else 1.0
    moved = np.einsum("goik,gi->go", view, shift.reshape(view.shape[0], view.shape[2])).reshape(-1)
    view *= scale.reshape(view.shape[0], 1, view.shape[2], 1)
    _give(rewriter, layer, weight, bias + alpha * moved)


@dataclass(frozen=True)
class FoldBatchNorm(RewritePass):
    """Batch norms become part of the layers around them."""

    name = "fold-batch-norm"
    exactness = Exactness.EXACT

    def rewrite(self, node: Node, rewriter: Rewriter, context: Context) -> bool:
        if node.op.name != "batch_norm":
            return False
        scale, shift = affine(node)
        x = node.operand(0)
        assert x is not None
        source, reader = x, node
        while is_op(source, "identity") and only_reader(source) is reader and source.producer is not None:
            reader = source.producer
            inner = reader.operand(0)
            assert inner is not None
            source = inner
        refusal = Declined("no layer stands before it", source.producer or source)
        if is_op(source, *LAYERS) and source.producer is not None:
            if only_reader(source) is not reader:
                refusal = Declined("the layer before it is read elsewhere", source.producer)
            else:
                try:
                    fold_into_producer(rewriter, source.producer, scale, shift)
                except Declined as error:
                    refusal = error
                else:
                    if context.stats is not None:  # the layer now gives what the norm gave
                        for name in dict.fromkeys((source.name, x.name)):
                            context.stats.copy_record(node.result.name, name)
                    rewriter.replace_node(node, x)
                    return True
        if is_output(node.result) or not node.result.users:
            raise refusal
        for layer in node.result.users:
            try:
                check_consumer(layer, node.result, shift)
            except Declined as error:
                reason = f"before it: {refusal.reason}; behind it: {error.reason}"
                raise Declined(reason, node) from error
        for layer in list(node.result.users):
            fold_into_consumer(rewriter, layer, scale, shift)
        rewriter.replace_node(node, x)
        return True
