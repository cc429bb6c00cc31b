"""Norms with one gain and bias per channel, on axis 1: batch_norm, group_norm, instance_norm.

batch_norm      (x - mean[c]) / sqrt(var[c] + eps) * gain[c] + bias[c]
group_norm      layer_norm over each group of channels and all that follows, * gain[c] + bias[c]
instance_norm   the same with one channel a group
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from planish.ir.graph import Node
from planish.ir.ops import register
from planish.ir.ops.affine import UNKNOWN_RANK
from planish.ir.ops.base import (
    Act,
    Axes,
    Block,
    Carry,
    OpDef,
    Param,
    Port,
    Relation,
    Wide,
    repeats_by_channel,
)
from planish.ir.ops.labels import integer, number
from planish.ir.ops.norms import JOIN, Norm, affine_norm, norm_sites, ranked, scaled, stashed


def _along_channels(vector: Any, x: Any) -> Any:
    return vector.reshape(1, -1, *(1,) * (x.dim() - 2))


def _batch_norm_evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, *vectors = operands
    gain, bias, mean, variance = (_along_channels(v, x) for v in vectors)
    y = (x - mean) / torch.sqrt(variance + number(node, "eps")) * gain + bias
    return (y.to(x.dtype),)


def _batch_norm_relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    sites = norm_sites(node, (1, 2, 3, 4), 1)
    if sites is None:
        return UNKNOWN_RANK
    norm = Norm(node, sites, port, axes, (), channel=1)
    everyone = ((0, None, 1), (-1, None, 1), *((p, None, 1) for p in (1, 2, 3, 4)))
    channel = "a1" in {norm.asker.labels[a] for a in axes}
    if act in (Act.ROTATE, Act.LINEAR):
        return Block("it treats each channel by itself")
    if act is Act.PERMUTE:
        return norm.links(act, everyone)
    if not channel:
        return Block("its statistics have no such axis")
    if act is Act.SCALE:
        if port == 4:
            return Block("its variance is read beside eps")
        if port in (0, 3):
            # gain / s * (s x - s mean), whatever scale the result carries
            relation = norm.links(act, ((0, None, 1), (3, None, 1), (1, None, -1)))
            if isinstance(relation, Carry):
                return Carry(tuple(replace(k, apart=True) if k.port == 1 else k for k in relation.links))
            return relation
        return norm.links(act, ((-1, None, 1), (1, None, 1), (2, None, 1)))
    if port in (0, 3):
        return norm.links(act, ((0, None, 1), (3, None, 1)))
    if port in (-1, 2):
        return norm.links(act, ((-1, None, 1), (2, None, 1)))
    return Block("its gain and variance are factors")


def _second_axis(node: Node) -> Sequence[tuple[Port, Axes]]:
    rank = node.result.rank
    return [] if rank is None or rank < 2 else [(0, (1,)), (-1, (1,))]


batch_norm = register(
    OpDef(
        "batch_norm",
        (Param("x"), Param("gain"), Param("bias"), Param("mean"), Param("var")),
        lambda node: ranked(node, 2),
        _batch_norm_evaluate,
        _batch_norm_relate,
        _second_axis,
        family="normalisation",
        summary="(x - mean[c]) / sqrt(var[c] + eps) * gain[c] + bias[c], c on axis 1",
        attributes={"eps": 1e-5},
        repeats=repeats_by_channel,
    )
)


def _groups(node: Node) -> int | None:
    """The number of groups; None if it is the number of channels."""
    return integer(node, "groups") if node.op.name == "group_norm" else None


def _group_norm_evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, gain, bias = (*operands, None, None)[:3]
    groups = _groups(node) or x.shape[1]
    own = stashed(node, x, wide)
    rows = own.reshape(x.shape[0], groups, -1)
    rows = rows - rows.mean(-1, keepdim=True)
    rows = rows / torch.sqrt((rows * rows).mean(-1, keepdim=True) + number(node, "eps"))
    vectors = (None if v is None else _along_channels(v, x) for v in (gain, bias))
    return (scaled(rows.reshape(x.shape).to(x.dtype), *vectors),)


def _group_norm_relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    sites = norm_sites(node, (1, 2), 1)
    if sites is None:
        return UNKNOWN_RANK
    channels, groups = sites[0].dims[1], _groups(node)
    rank = len(sites[0].dims)
    alone = groups is None or groups == channels
    norm = Norm(node, sites, port, axes, tuple(range(2 if alone else 1, rank)), channel=1)
    channel = "a1" in {norm.asker.labels[a] for a in axes}
    if act in (Act.ROTATE, Act.LINEAR):
        return Block("it treats each channel by itself")
    if act is Act.PERMUTE:
        if channel and not alone and groups != 1:
            return Block("the channels of a group must stay together")
        return norm.links(act, JOIN)
    return affine_norm(norm, act, invisible_shift=True)


_GROUP_PARAMS = (Param("x"), Param("gain", optional=True), Param("bias", optional=True))

group_norm = register(
    OpDef(
        "group_norm",
        _GROUP_PARAMS,
        lambda node: ranked(node, 2),
        _group_norm_evaluate,
        _group_norm_relate,
        lambda node: _second_axis(node)[1:],
        family="normalisation",
        summary="layer_norm over each of `groups` groups of channels (axis 1) and all that follows, "
        "* gain[c] + bias[c]",
        attributes={"groups": 1, "eps": 1e-5},
    )
)

instance_norm = register(
    OpDef(
        "instance_norm",
        (Param("x"), Param("gain"), Param("bias")),
        lambda node: ranked(node, 2),
        _group_norm_evaluate,
        _group_norm_relate,
        lambda node: _second_axis(node)[1:],
        family="normalisation",
        summary="layer_norm over all that follows axis 1, * gain[c] + bias[c]",
        attributes={"eps": 1e-5},
    )
)
