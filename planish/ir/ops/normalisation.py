"""Norms over the last axes, and softmax; `channel_norms` holds batch_norm, group_norm, instance_norm.

    layer_norm      (x - mean) / sqrt(var + eps) * gain + bias     over the axes from `axis` on
    rms_norm        x / sqrt(mean(x^2) + eps) * (gain + gain_offset) + bias
    softmax         exp(x) / sum(exp(x))

Gain and bias take up what happens to the result. What happens to x must leave the statistics alone:
a permutation does within the normalised axes, and for the root mean square a rotation does too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import planish.ir.ops.channel_norms  # noqa: F401 (registers its rows)
from planish.ir.graph import Node
from planish.ir.ops import register
from planish.ir.ops.affine import UNKNOWN_RANK
from planish.ir.ops.align import numeric
from planish.ir.ops.base import (
    INVISIBLE,
    Act,
    Axes,
    Block,
    OpDef,
    Param,
    Port,
    Relation,
    Wide,
    normal_axis,
)
from planish.ir.ops.labels import integer, number
from planish.ir.ops.norms import Norm, affine_norm, norm_sites, ranked, scaled, stashed


def last_channels(node: Node) -> Sequence[tuple[Port, Axes]]:
    rank = node.result.rank
    return [] if rank is None or rank == 0 else [(-1, (rank - 1,))]


def _split(x: Any, axis: int) -> tuple[int, ...]:
    return tuple(range(normal_axis(axis, x.dim()), x.dim()))


# -- layer_norm and rms_norm -------------------------------------------------------------------------


def _layer_norm_evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, gain, bias = (*operands, None, None)[:3]
    dims = _split(x, integer(node, "axis"))
    own = stashed(node, x, wide)
    centred = own - own.mean(dims, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(dims, keepdim=True) + number(node, "eps"))
    return (scaled(y.to(x.dtype), gain, bias),)


def _over_last(node: Node, port: Port, axes: Axes, offset: float = 0.0) -> Norm | None:
    sites = norm_sites(node, (1, 2), None)
    if sites is None:
        return None
    rank = len(sites[0].dims)
    within = tuple(range(normal_axis(integer(node, "axis"), rank), rank))
    return Norm(node, sites, port, axes, within, offset=offset)


def _layer_norm_relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    norm = _over_last(node, port, axes)
    if norm is None:
        return UNKNOWN_RANK
    if act in (Act.ROTATE, Act.LINEAR):
        if port in (0, -1) and norm.outside != axes:
            return Block("it subtracts the mean over the channels: centre it first")
        return Block("it treats each channel by itself")
    return affine_norm(norm, act, invisible_shift=True)


layer_norm = register(
    OpDef(
        "layer_norm",
        (Param("x"), Param("gain", optional=True), Param("bias", optional=True)),
        lambda node: ranked(node, 1),
        _layer_norm_evaluate,
        _layer_norm_relate,
        last_channels,
        family="normalisation",
        summary="(x - mean) / sqrt(var + eps) * gain + bias, over the axes from `axis` on",
        attributes={"axis": -1, "eps": 1e-5, "stash": "f32"},
    )
)


def _rms_norm_evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, gain, bias = (*operands, None, None)[:3]
    dims = _split(x, integer(node, "axis"))
    own = stashed(node, x, wide)
    y = (own / torch.sqrt((own * own).mean(dims, keepdim=True) + number(node, "eps"))).to(x.dtype)
    offset = number(node, "gain_offset")
    if offset != 0.0:
        gain = torch.full((), offset, dtype=x.dtype) if gain is None else gain + offset
    return (scaled(y, gain, bias),)


def _uniform_gain(norm: Norm) -> bool:
    """True if the gain is the same for all channels that the asked axes mix."""
    gain = norm.node.operand(1)
    if gain is None:
        return True
    site = norm.sites[1]
    mixed = [
        site.labels.index(k)
        for k in (norm.asker.labels[a] for a in norm.axes)
        if k in norm.within and site.spans(k) and k in site.labels
    ]
    if not mixed:
        return True
    if gain.constant is None or not gain.is_constant:
        return False
    data = gain.constant.wide()
    return bool((np.ptp(data, axis=tuple(mixed)) == 0.0).all())


def _rms_norm_relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    norm = _over_last(node, port, axes, number(node, "gain_offset"))
    if norm is None:
        return UNKNOWN_RANK
    if act is Act.LINEAR:
        return Block("only rotations keep the root mean square")
    if act is Act.ROTATE:
        if port == 1 or norm.outside == axes:
            return Block("it treats each row by itself")
        if not _uniform_gain(norm):
            return Block("its gain differs between channels: fold it first")
        return norm.links(act, ((0, None, 1), (-1, None, 1), (2, None, 1)))
    return affine_norm(norm, act, invisible_shift=False)


rms_norm = register(
    OpDef(
        "rms_norm",
        (Param("x"), Param("gain", optional=True), Param("bias", optional=True)),
        lambda node: ranked(node, 1),
        _rms_norm_evaluate,
        _rms_norm_relate,
        last_channels,
        beyond=frozenset({Act.ROTATE, Act.LINEAR}),  # the data of the gain
        family="normalisation",
        summary="x / sqrt(mean(x^2) + eps) * (gain + gain_offset) + bias, over the axes from `axis` on",
        attributes={"axis": -1, "eps": 1e-5, "gain_offset": 0.0},
    )
)


# -- softmax -----------------------------------------------------------------------------------------


def _softmax_evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    (x,) = operands
    function = torch.softmax if node.op.name == "softmax" else torch.log_softmax
    return (function(x, integer(node, "axis")),)


def _softmax_relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    refused = numeric(node, act, port)
    if refused is not None:
        return refused
    sites = norm_sites(node, (), None)
    if sites is None:
        return UNKNOWN_RANK
    axis = normal_axis(integer(node, "axis"), len(sites[0].dims))
    norm = Norm(node, sites, port, axes, (axis,))
    if act is Act.PERMUTE:
        return norm.links(act, ((0, None, 1), (-1, None, 1)))
    if act is Act.SHIFT and port == 0 and axis not in axes:
        return INVISIBLE
    return Block("it only keeps the order of its channels apart")


def _softmax(name: str, summary: str) -> OpDef:
    return register(
        OpDef(
            name,
            (Param("x"),),
            lambda node: ranked(node, 1),
            _softmax_evaluate,
            _softmax_relate,
            family="normalisation",
            summary=summary,
            attributes={"axis": -1},
        )
    )


softmax = _softmax("softmax", "exp(x) / sum(exp(x)) over `axis`")
log_softmax = _softmax("log_softmax", "x - log(sum(exp(x))) over `axis`")
