"""Norms and softmax.

    layer_norm      (x - mean) / sqrt(var + eps) * gain + bias     over the axes from `axis` on
    rms_norm        x / sqrt(mean(x^2) + eps) * (gain + gain_offset) + bias
    batch_norm      (x - mean[c]) / sqrt(var[c] + eps) * gain[c] + bias[c]
    group_norm      layer_norm over each group of channels and all that follows; instance_norm: one channel a group

Gain and bias take up what happens to the result. What happens to x must leave the statistics alone: a permutation
does within the normalised axes, and for the root mean square a rotation does too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node
from planish.ir.ops import register
from planish.ir.ops.affine import UNKNOWN_RANK, static
from planish.ir.ops.align import numeric
from planish.ir.ops.base import (
    INVISIBLE,
    MIXING,
    Act,
    Axes,
    Block,
    Carry,
    Link,
    OpDef,
    Param,
    Port,
    Relation,
    Wide,
    normal_axis,
)
from planish.ir.ops.labels import Site, integer, link_between, number, tensor_type
from planish.ir.types import UNKNOWN, Type


def _same(node: Node) -> Sequence[Type]:
    own = tensor_type(node.operand(0))
    return (UNKNOWN if own is None else own,)


def _ranked(node: Node, least: int) -> Sequence[Type]:
    own = tensor_type(node.operand(0))
    if own is not None and own.shape is not None and len(own.shape) < least:
        raise InvalidModelError(
            f"{node.op.name}: expected a tensor of rank {least} or more", where=f"{node.op.name} of {own}"
        )
    return _same(node)


def _sites(node: Node, vectors: Sequence[Port], channel: int | None) -> dict[Port, Site] | None:
    """The sites of x, of the result and of the vectors that are present.

    Labels count the axes of x. Vectors are broadcast from the right; with `channel` they lie along that axis of x.
    """
    x = node.operand(0)
    if x is None or x.shape is None:
        return None
    rank = len(x.shape)
    labels = tuple(f"a{i}" for i in range(rank))
    sites = {0: Site(0, labels, x.shape), -1: Site(-1, labels, x.shape)}
    for port in vectors:
        value = node.operand(port)
        if value is None:
            continue
        if value.shape is None or len(value.shape) > rank:
            return None
        own = labels[rank - len(value.shape) :] if channel is None else labels[channel : channel + 1]
        sites[port] = Site(port, own, value.shape)
    return sites


class _Norm:
    """One question to a norm's row: the asker, and which other ports may carry the transform."""

    def __init__(
        self,
        node: Node,
        sites: Mapping[Port, Site],
        port: Port,
        axes: Axes,
        within: Axes,
        *,
        channel: int | None = None,
        offset: float = 0.0,
    ) -> None:
        self.node = node
        self.sites = sites
        self.asker = sites[port]
        self.port = port
        self.axes = axes
        self.channel = channel
        self.offset = offset
        self.within = {f"a{i}" for i in within}  # the labels that are normalised over

    @property
    def outside(self) -> Axes:
        """The asked axes that each have statistics of their own."""
        return tuple(a for a in self.axes if self.asker.labels[a] not in self.within)

    def links(self, act: Act, ports: Sequence[tuple[Port, float | None, int]]) -> Relation:
        """A `Carry` to (port, neutral, variance): neutral None says that an absent operand may stay absent."""
        links: list[Link] = []
        walls: set[int] = set()
        for port, neutral, variance in ports:
            if port == self.port:
                continue
            site = self.sites.get(port)
            if site is None:
                if neutral is None or port < 0:
                    continue
                site = self._grown(port, neutral)
            else:
                link = link_between(self.asker, self.axes, site, variance)
                if isinstance(link, Block):
                    return link
                if link is not None:
                    if act in MIXING:
                        walls |= {a for a in self.axes if not site.spans(self.asker.labels[a])}
                    links.append(self._with_offset(link, act))
                    continue
                if act is Act.PERMUTE:
                    continue
                site = self._grown(port, None)
            if isinstance(site, Block):
                return site
            link = link_between(self.asker, self.axes, site, variance)
            if isinstance(link, Block):
                return link
            if link is not None:
                links.append(self._with_offset(link, act))
        if act in MIXING and self.outside != self.axes:
            walls |= set(self.outside)
        return Carry(tuple(links), tuple(sorted(walls)))

    def _with_offset(self, link: Link, act: Act) -> Link:
        if link.port != 1 or act is not Act.SCALE or self.offset == 0.0:
            return link
        return Link(
            link.port, link.axes, link.variance, link.pairs, link.grow, link.view, link.neutral, self.offset
        )

    def _grown(self, port: Port, neutral: float | None) -> Site | Block:
        """A vector that has to be made or expanded: along x's axes from the first one asked on, if these are normalised."""
        value = self.node.operand(port)
        if value is not None and not value.is_constant:
            return Block("an operand that is broadcast there is no constant")
        x = self.sites[0]
        inside = [x.labels.index(label) for label in x.labels if label in self.within]
        first = min(inside, default=len(x.labels))
        asked = [x.labels.index(self.asker.labels[a]) for a in self.axes]
        if self.channel is not None:
            dims, labels = x.dims[self.channel : self.channel + 1], x.labels[self.channel : self.channel + 1]
            if self.channel not in asked:
                return Block("its gain and bias have no such axis")
        else:
            if max(asked) < first:
                return Block("its gain and bias have no such axis")
            dims, labels = x.dims[first:], x.labels[first:]
        shape = static(dims)
        if shape is None:
            return Block("its gain or bias would have a dynamic dim")
        if value is not None and value.shape is not None:
            try:
                if np.broadcast_shapes(tuple(d for d in value.shape if isinstance(d, int)), shape) != shape:
                    return Block("its gain or bias is broadcast in another way")
            except ValueError:
                return Block("its gain or bias is broadcast in another way")
        return Site(port, labels, shape, grow=shape, neutral=neutral)


_JOIN = ((0, None, 1), (-1, None, 1), (1, None, 1), (2, None, 1))


def _affine_norm(norm: _Norm, act: Act, *, invisible_shift: bool) -> Relation:
    """What gain (port 1), bias (port 2), result and, under a permutation, x have in common."""
    port = norm.port
    if act is Act.PERMUTE:
        return norm.links(act, _JOIN)
    if act is Act.SCALE:
        if port == 0:
            return Block("it divides by the scale of its input")
        if port == 1 and norm.offset != 0.0:
            return Block("its gain counts from an offset")
        return norm.links(act, ((-1, None, 1), (1, 1.0 - norm.offset, 1), (2, None, 1)))
    if act is Act.SHIFT:
        if port == 0:
            if invisible_shift and norm.outside == norm.axes:
                return INVISIBLE
            return Block("it is not invariant to a shift of its input")
        if port == 1:
            return Block("its gain is a factor")
        return norm.links(act, ((-1, None, 1), (2, 0.0, 1)))
    return Block("it treats each channel by itself")


def _last_channels(node: Node) -> Sequence[tuple[Port, Axes]]:
    rank = node.result.rank
    return [] if rank is None or rank == 0 else [(-1, (rank - 1,))]


def _split(x: Any, axis: int) -> tuple[int, ...]:
    return tuple(range(normal_axis(axis, x.dim()), x.dim()))


def _stashed(node: Node, x: Any, wide: Wide) -> Any:
    """x in the dtype of the statistics: float32 for half precision."""
    if wide.dtype is None and x.dtype in (torch.float16, torch.bfloat16):
        return x.to(torch.float32)
    return x


# -- layer_norm and rms_norm -------------------------------------------------------------------------


def _layer_norm_evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, gain, bias = (*operands, None, None)[:3]
    dims = _split(x, integer(node, "axis"))
    own = _stashed(node, x, wide)
    centred = own - own.mean(dims, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(dims, keepdim=True) + number(node, "eps"))
    return (_scaled(y.to(x.dtype), gain, bias),)


def _scaled(y: Any, gain: Any, bias: Any) -> Any:
    if gain is not None:
        y = y * gain
    return y if bias is None else y + bias


def _over_last(node: Node, port: Port, axes: Axes, offset: float = 0.0) -> _Norm | None:
    sites = _sites(node, (1, 2), None)
    if sites is None:
        return None
    rank = len(sites[0].dims)
    within = tuple(range(normal_axis(integer(node, "axis"), rank), rank))
    return _Norm(node, sites, port, axes, within, offset=offset)


def _layer_norm_relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    norm = _over_last(node, port, axes)
    if norm is None:
        return UNKNOWN_RANK
    if act in (Act.ROTATE, Act.LINEAR):
        if port in (0, -1) and norm.outside != axes:
            return Block("it subtracts the mean over the channels: centre it first")
        return Block("it treats each channel by itself")
    return _affine_norm(norm, act, invisible_shift=True)


layer_norm = register(
    OpDef(
        "layer_norm",
        (Param("x"), Param("gain", optional=True), Param("bias", optional=True)),
        lambda node: _ranked(node, 1),
        _layer_norm_evaluate,
        _layer_norm_relate,
        _last_channels,
        family="normalisation",
        summary="(x - mean) / sqrt(var + eps) * gain + bias, over the axes from `axis` on",
        attributes={"axis": -1, "eps": 1e-5, "stash": "f32"},
    )
)


def _rms_norm_evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, gain, bias = (*operands, None, None)[:3]
    dims = _split(x, integer(node, "axis"))
    own = _stashed(node, x, wide)
    y = (own / torch.sqrt((own * own).mean(dims, keepdim=True) + number(node, "eps"))).to(x.dtype)
    offset = number(node, "gain_offset")
    if offset != 0.0:
        gain = torch.full((), offset, dtype=x.dtype) if gain is None else gain + offset
    return (_scaled(y, gain, bias),)


def _uniform_gain(norm: _Norm) -> bool:
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
    return _affine_norm(norm, act, invisible_shift=False)


rms_norm = register(
    OpDef(
        "rms_norm",
        (Param("x"), Param("gain", optional=True), Param("bias", optional=True)),
        lambda node: _ranked(node, 1),
        _rms_norm_evaluate,
        _rms_norm_relate,
        _last_channels,
        family="normalisation",
        summary="x / sqrt(mean(x^2) + eps) * (gain + gain_offset) + bias, over the axes from `axis` on",
        attributes={"axis": -1, "eps": 1e-5, "gain_offset": 0.0},
    )
)


# -- batch_norm, group_norm, instance_norm -----------------------------------------------------------


def _along_channels(vector: Any, x: Any) -> Any:
    return vector.reshape(1, -1, *(1,) * (x.dim() - 2))


def _batch_norm_evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, *vectors = operands
    gain, bias, mean, variance = (_along_channels(v, x) for v in vectors)
    y = (x - mean) / torch.sqrt(variance + number(node, "eps")) * gain + bias
    return (y.to(x.dtype),)


def _batch_norm_relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    sites = _sites(node, (1, 2, 3, 4), 1)
    if sites is None:
        return UNKNOWN_RANK
    norm = _Norm(node, sites, port, axes, (), channel=1)
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
            # gain / s * (s x - s mean)
            return norm.links(act, ((0, None, 1), (3, None, 1), (1, None, -1)))
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
        lambda node: _ranked(node, 2),
        _batch_norm_evaluate,
        _batch_norm_relate,
        _second_axis,
        family="normalisation",
        summary="(x - mean[c]) / sqrt(var[c] + eps) * gain[c] + bias[c], c on axis 1",
        attributes={"eps": 1e-5},
    )
)


def _groups(node: Node) -> int | None:
    """The number of groups; None if it is the number of channels."""
    return integer(node, "groups") if node.op.name == "group_norm" else None


def _group_norm_evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, gain, bias = (*operands, None, None)[:3]
    groups = _groups(node) or x.shape[1]
    own = _stashed(node, x, wide)
    rows = own.reshape(x.shape[0], groups, -1)
    rows = rows - rows.mean(-1, keepdim=True)
    rows = rows / torch.sqrt((rows * rows).mean(-1, keepdim=True) + number(node, "eps"))
    vectors = (None if v is None else _along_channels(v, x) for v in (gain, bias))
    return (_scaled(rows.reshape(x.shape).to(x.dtype), *vectors),)


def _group_norm_relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    sites = _sites(node, (1, 2), 1)
    if sites is None:
        return UNKNOWN_RANK
    channels, groups = sites[0].dims[1], _groups(node)
    rank = len(sites[0].dims)
    alone = groups is None or groups == channels
    norm = _Norm(node, sites, port, axes, tuple(range(2 if alone else 1, rank)), channel=1)
    channel = "a1" in {norm.asker.labels[a] for a in axes}
    if act in (Act.ROTATE, Act.LINEAR):
        return Block("it treats each channel by itself")
    if act is Act.PERMUTE:
        if channel and not alone and groups != 1:
            return Block("the channels of a group must stay together")
        return norm.links(act, _JOIN)
    return _affine_norm(norm, act, invisible_shift=True)


_GROUP_PARAMS = (Param("x"), Param("gain", optional=True), Param("bias", optional=True))

group_norm = register(
    OpDef(
        "group_norm",
        _GROUP_PARAMS,
        lambda node: _ranked(node, 2),
        _group_norm_evaluate,
        _group_norm_relate,
        lambda node: _second_axis(node)[1:],
        family="normalisation",
        summary="layer_norm over each of `groups` groups of channels (axis 1) and all that follows, * gain[c] + bias[c]",
        attributes={"groups": 1, "eps": 1e-5},
    )
)

instance_norm = register(
    OpDef(
        "instance_norm",
        (Param("x"), Param("gain"), Param("bias")),
        lambda node: _ranked(node, 2),
        _group_norm_evaluate,
        _group_norm_relate,
        lambda node: _second_axis(node)[1:],
        family="normalisation",
        summary="layer_norm over all that follows axis 1, * gain[c] + bias[c]",
        attributes={"eps": 1e-5},
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
    sites = _sites(node, (), None)
    if sites is None:
        return UNKNOWN_RANK
    axis = normal_axis(integer(node, "axis"), len(sites[0].dims))
    norm = _Norm(node, sites, port, axes, (axis,))
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
            lambda node: _ranked(node, 1),
            _softmax_evaluate,
            _softmax_relate,
            family="normalisation",
            summary=summary,
            attributes={"axis": -1},
        )
    )


softmax = _softmax("softmax", "exp(x) / sum(exp(x)) over `axis`")
log_softmax = _softmax("log_softmax", "x - log(sum(exp(x))) over `axis`")
