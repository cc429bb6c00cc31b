"""Attention and rotary embeddings.

    attention       o[b, h, t] = sum_s softmax_s(scale q[b, h, t] . k[b, h', s] + mask) v[b, h', s]
                    with h' = h // (H / Hk): several query heads share a key and value head
                    softcap c: the scaled scores u become c tanh(u / c) before the mask is added
                    sinks [H]: one more score per head in each softmax, whose weight is dropped
    rope            y = x * cos + rotate(x) * sin: pairs of channels (j, j + d/2) turn by an angle each

Queries and keys are dual on d, each key head by itself. The rows of the softmax sum to 1, so whatever
linear map or shift v carries on e shows unchanged on the result. With `safe`, a row whose scores are all
-inf gives 0 rather than NaN (torch's scaled_dot_product_attention), and a shift does not pass. With sinks the
rows sum to less than 1: a shift of v does not pass, and adding the same to all scores of a row shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node
from planish.ir.ops import register
from planish.ir.ops.affine import UNKNOWN_RANK, carry, check_inner
from planish.ir.ops.align import attribute, numeric
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
)
from planish.ir.ops.labels import Site, broadcast_dim, flag, like, link_between, permute_all, tensor_type
from planish.ir.types import UNKNOWN, Dim, Type

HEADS = frozenset({"h"})


# -- attention ---------------------------------------------------------------------------------------


def _attention_infer(node: Node) -> Sequence[Type]:
    types = [tensor_type(node.operand(i)) for i in range(3)]
    if any(t is None for t in types):
        return (UNKNOWN,)
    shapes: list[tuple[Dim, ...]] = []
    for t in types:
        assert t is not None
        shape = (None,) * 4 if t.shape is None else t.shape
        if len(shape) != 4:
            text = ", ".join(str(t) for t in types)
            raise InvalidModelError("attention: expected q, k, v of rank 4", where=f"attention of {text}")
        shapes.append(shape)
    q, k, v = shapes
    check_inner(node, q[3], k[3])
    if isinstance(q[1], int) and isinstance(k[1], int) and q[1] % k[1]:
        raise InvalidModelError(f"attention: {q[1]} query heads cannot share {k[1]} key heads", where="attention")
    sinks = tensor_type(node.operand(4))
    numbers = () if sinks is None or sinks.shape is None else sinks.shape
    if len(numbers) > 1 or any(isinstance(n, int) and isinstance(q[1], int) and n not in (1, q[1]) for n in numbers):
        raise InvalidModelError(f"attention: expected a sink for each of {q[1]} heads", where=f"sinks {sinks}")
    batch = broadcast_dim(q[0], broadcast_dim(k[0], v[0]))
    return (like(node.operand(0), (batch, q[1], q[2], v[3])),)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None, causal: bool,
    safe: bool, softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """softmax(cap(scale q k^T) + mask) v for q [B, H, T, d], k [B, Hk, S, d], v [B, Hk, S, e].

    Args:
        softcap: cap(u) = softcap tanh(u / softcap); None: cap(u) = u.
        sinks: [heads], one more score of each head, which takes weight and gives nothing.
    """
    share = q.shape[1] // k.shape[1]
    if share > 1:
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~keep, -torch.inf)
    if sinks is None:
        weights = torch.softmax(scores, -1)
    else:
        column = sinks.reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]
    if safe:
        weights = weights.masked_fill(weights.isnan(), 0.0)
    return weights @ v


def _attention_evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    q, k, v, mask, sinks = (*operands, None, None)[:5]
    own = {name: attribute(node, name) for name in ("scale", "causal", "safe", "softcap")}
    return (attend(q, k, v, mask, **own, sinks=sinks),)


_LABELS = {0: "bhtd", 1: "bhsd", 2: "bhse", -1: "bhte", 3: "bhts", 4: "h"}


def _attention_sites(node: Node) -> dict[Port, Site] | None:
    sites = {}
    for port, labels in _LABELS.items():
        value = node.port(port)
        if value is None:
            continue
        rank = len(labels)
        if value.shape is None or len(value.shape) > rank or (port != 3 and len(value.shape) != rank):
            return None
        sites[port] = Site(port, tuple(labels[rank - len(value.shape) :]), value.shape)
    return sites


_PARTNER = {(0, "d"): (1, -1), (1, "d"): (0, -1), (2, "e"): (-1, 1), (-1, "e"): (2, 1)}


def _capped(node: Node) -> bool:
    return attribute(node, "softcap") is not None


def _attention_relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    refused = numeric(node, act, port)
    if refused is not None:
        return refused
    sites = _attention_sites(node)
    if sites is None:
        return UNKNOWN_RANK
    asker = sites[port]
    labels = [asker.labels[a] for a in axes]
    channel = "d" if "d" in labels else "e" if "e" in labels else ""
    if act is Act.SHIFT:
        if port in (1, 3) and "s" not in labels and 4 not in sites and (port == 3 or not _capped(node)):
            return INVISIBLE  # it adds the same to all scores of a row
        if port in (0, 1, 3, 4):
            return Block("a shift changes the scores")
        if 4 in sites:
            return Block("with sinks, its rows do not sum to one")
        if port == -1 and "t" in labels and not channel:
            return Block("its rows are weighted sums of the same values")
        if flag(node, "safe") and 3 in sites:
            return Block("a row that is masked throughout is zero")
    elif not channel and act is Act.PERMUTE:
        return _attention_permute(node, sites, asker, axes)
    elif not channel and act is not Act.SCALE:
        return Block("it treats heads, rows and batches by themselves")
    elif port in (3, 4):
        return Block("a scale changes the scores")
    # contraction on d or e, or a factor (or shift) for whole heads or batches
    partner, variance = _PARTNER[port, channel or asker.labels[3]]
    if not set(labels) & set(sites[partner].labels):
        return Block("it is a sum over these rows" if port in (1, 2) else "these rows meet no other operand")
    return _attention_partner(sites, act, asker, axes, partner, variance)


def _attention_partner(
    sites: dict[Port, Site], act: Act, asker: Site, axes: Axes, partner: Port, variance: int
) -> Relation:
    link = link_between(asker, axes, sites[partner], variance, HEADS)
    if isinstance(link, Block):
        return link
    if link is None:
        return Block("these axes meet no other operand")
    walls: Axes = ()
    if act in MIXING:
        walls = tuple(a for a in axes if asker.labels[a] not in "de" and asker.dims[a] != 1)
    return Carry((link,), walls)


def _attention_permute(node: Node, sites: dict[Port, Site], asker: Site, axes: Axes) -> Relation:
    """Heads, batches or rows change places."""
    labels = {asker.labels[a] for a in axes}
    if flag(node, "causal") and labels & {"t", "s"}:
        return Block("a causal mask fixes the order of the rows")
    if "h" in labels and sites[1].dim("h") not in (sites[0].dim("h"), 1):
        return Block("query heads share key heads")
    return permute_all(sites, asker, axes)


def _attention_channels(node: Node) -> Sequence[tuple[Port, Axes]]:
    return [(0, (1, 3)), (2, (1, 3))]


attention = register(
    OpDef(
        "attention",
        (Param("q"), Param("k"), Param("v"), Param("mask", optional=True), Param("sinks", optional=True)),
        _attention_infer,
        _attention_evaluate,
        _attention_relate,
        _attention_channels,
        family="attention",
        summary="o[b, h, t] = sum_s softmax_s(scale q[b, h, t] . k[b, h', s] + mask) v[b, h', s], h' = h // (H / Hk)",
        attributes={"scale": None, "causal": False, "safe": False, "softcap": None},
    )
)


# -- rope --------------------------------------------------------------------------------------------


def _rope_infer(node: Node) -> Sequence[Type]:
    own = tensor_type(node.operand(0))
    if own is not None and own.shape:
        size = own.shape[-1]
        if isinstance(size, int) and size % 2:
            raise InvalidModelError("rope: expected an even number of channels", where=f"rope of {own}")
    return (UNKNOWN if own is None else own,)


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x cos + rotate(x) sin; rotate takes halves of the last axis, or neighbours where interleaved."""
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    else:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + turned * sin


def _rope_evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, cos, sin = operands
    return (turn(x, cos, sin, flag(node, "interleaved")),)


def _partners(size: int, interleaved: bool) -> np.ndarray:
    """For each channel, the other one of its rotary pair."""
    channel = np.arange(size)
    return channel ^ 1 if interleaved else (channel + size // 2) % size


def _rope_relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    refused = numeric(node, act, port)
    if refused is not None:
        return refused
    x = node.operand(0)
    if x is None or x.shape is None:
        return UNKNOWN_RANK
    rank = len(x.shape)
    names = tuple(f"a{i}" for i in range(rank))
    sites = {0: Site(0, names, x.shape), -1: Site(-1, names, x.shape)}
    for operand in (1, 2):
        value = node.operand(operand)
        if value is None or value.shape is None or len(value.shape) > rank:
            return UNKNOWN_RANK
        sites[operand] = Site(operand, names[rank - len(value.shape) :], value.shape)
    asker = sites[port]
    last = names[-1] in {asker.labels[a] for a in axes}
    if act is Act.SHIFT:
        return Block("it turns a shift")
    if last:
        if act is Act.PERMUTE:
            return _rope_permute(node, sites, asker, axes)
        if act is not Act.SCALE:
            return Block("it turns each pair of channels by an angle of its own")
        if port not in (0, -1):
            return Block("its angles are no factors")
        return _rope_scale(node, x.shape, port, axes)
    angles = [link_between(asker, axes, sites[p]) for p in (1, 2)]
    if act is Act.PERMUTE:
        others = [link_between(asker, axes, site) for site in sites.values() if site.port != port]
        if any(isinstance(link, Link) and link.pairs is not None for link in others):
            return Block("its angles have only some of these axes")
        return carry(*others)
    if port not in (0, -1):
        return Block("its angles are no factors")
    if act is not Act.SCALE and any(link is not None for link in angles):
        return Block("it turns each row by angles of its own")
    return Carry((Link(~port, axes),))


def _tie(node: Node, shape: tuple[Dim, ...], port: Port, axes: Axes) -> Link:
    """The link of a port to itself that makes both channels of a pair one."""
    dims = [d for a in axes if isinstance(d := shape[a], int)]
    atoms = np.arange(int(np.prod(dims))).reshape(dims)
    partner = np.take(atoms, _partners(dims[-1], flag(node, "interleaved")), axis=-1)
    return Link(port, axes, pairs=(atoms.reshape(-1), partner.reshape(-1)))


def _rope_scale(node: Node, shape: tuple[Dim, ...], port: Port, axes: Axes) -> Relation:
    """Both channels of a pair carry one factor."""
    return Carry((Link(~port, axes), _tie(node, shape, port, axes)))


def _rope_permute(node: Node, sites: dict[Port, Site], asker: Site, axes: Axes) -> Relation:
    """Pairs change places as wholes, and their angles with them; a constant table becomes the node's own."""
    if any(site.dims[-1] != sites[0].dims[-1] for site in sites.values()):
        return Block("its pairs turn by one angle")
    links = [_tie(node, asker.dims, asker.port, axes)]
    for site in sites.values():
        if site.port == asker.port:
            continue
        link = link_between(asker, axes, site)
        if isinstance(link, Block):
            return link
        value = node.port(site.port)
        if link is None:
            return Block("its pairs turn by one angle")
        if value is not None and value.is_constant:
            link = replace(link, grow=tuple(d for d in site.dims if isinstance(d, int)))
        links.append(link)
    return Carry(tuple(links))


rope = register(
    OpDef(
        "rope",
        (Param("x"), Param("cos"), Param("sin")),
        _rope_infer,
        _rope_evaluate,
        _rope_relate,
        family="attention",
        summary="x * cos + rotate(x) * sin; rotate(x) = (-x2, x1): halves of the last axis, or pairs in it",
        attributes={"interleaved": False},
    )
)
