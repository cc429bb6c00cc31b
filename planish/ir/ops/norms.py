"""What the norms share: which ports carry what becomes of the result, or of x.

Gain and bias take up what happens to the result. What happens to x must leave the statistics alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node
from planish.ir.ops.align import static
from planish.ir.ops.base import (
    INVISIBLE,
    MIXING,
    Act,
    Axes,
    Block,
    Carry,
    Link,
    Port,
    Relation,
    Wide,
)
from planish.ir.ops.labels import Site, link_between, tensor_type
from planish.ir.types import UNKNOWN, Type


def same(node: Node) -> Sequence[Type]:
    own = tensor_type(node.operand(0))
    return (UNKNOWN if own is None else own,)


def ranked(node: Node, least: int) -> Sequence[Type]:
    own = tensor_type(node.operand(0))
    if own is not None and own.shape is not None and len(own.shape) < least:
        raise InvalidModelError(
            f"{node.op.name}: expected a tensor of rank {least} or more", where=f"{node.op.name} of {own}"
        )
    return same(node)


def norm_sites(node: Node, vectors: Sequence[Port], channel: int | None) -> dict[Port, Site] | None:
    """The sites of x, of the result and of the vectors that are present.

    Labels count the axes of x. Vectors are broadcast from the right; with `channel` they lie along that
    axis of x.
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


class Norm:
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
        """A `Carry` to (port, neutral, variance); with neutral None an absent operand may stay absent."""
        links: list[Link] = []
        walls: set[int] = set()
        for port, neutral, variance in ports:
            if port == self.port:
                continue
            site: Site | Block | None = self.sites.get(port)
            if site is None:
                if neutral is None or port < 0:
                    continue
                site = self._grown(port, neutral)
            elif isinstance(site, Site):
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
            if not isinstance(site, Site):
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
        return Link(link.port, link.axes, link.variance, link.pairs, link.grow, link.view, link.neutral, self.offset)

    def _grown(self, port: Port, neutral: float | None) -> Site | Block:
        """A vector that has to be made, or expanded along the normalised axes (or the channel axis)."""
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


JOIN = ((0, None, 1), (-1, None, 1), (1, None, 1), (2, None, 1))


def affine_norm(norm: Norm, act: Act, *, invisible_shift: bool) -> Relation:
    """What gain (port 1), bias (port 2), result and, under a permutation, x have in common."""
    port = norm.port
    if act is Act.PERMUTE:
        return norm.links(act, JOIN)
    if act is Act.SCALE:
        if port == 0:
            return Block("it divides by the scale of its input")
        gain = norm.node.operand(1)
        if norm.offset != 0.0 and (port == 1 or gain is None or not gain.is_constant):
            return Block("its gain counts from an offset")
        return norm.links(act, ((-1, None, 1), (1, 1.0, 1), (2, None, 1)))
    if act is Act.SHIFT:
        if port == 0:
            if invisible_shift and norm.outside == norm.axes:
                return INVISIBLE
            return Block("it is not invariant to a shift of its input")
        if port == 1:
            return Block("its gain is a factor")
        return norm.links(act, ((-1, None, 1), (2, 0.0, 1)))
    return Block("it treats each channel by itself")


def stashed(node: Node, x: Any, wide: Wide) -> Any:
    """x in the dtype of the statistics: float32 for half precision."""
    if wide.dtype is None and x.dtype in (torch.float16, torch.bfloat16):
        return x.to(torch.float32)
    return x


def scaled(y: Any, gain: Any, bias: Any) -> Any:
    if gain is not None:
        y = y * gain
    return y if bias is None else y + bias
