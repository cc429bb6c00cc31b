"""The selective scan: a linear recurrence over time with input-dependent steps.

    h[b, d, n, t] = exp(delta[b, d, t] a[d, n]) h[b, d, n, t - 1] + delta[b, d, t] b[b, n, t] u[b, d, t],  h[.., -1] = 0
    y[b, d, t]    = sum_n c[b, n, t] h[b, d, n, t] + skip[d] u[b, d, t]

The S6 layer of arXiv:2312.00752 (equations 2 and 4 with B discretised by Euler). What it commutes with:

    u, y       dual to nothing: a factor per channel d (or per sequence b) of u shows on y
    b, c       dual on n: the states of b / s are h / s, and c s reads them back
    channels   d changes places jointly on u, delta, a, skip and y; n jointly on a, b and c; batches alike
    blocked    mixing d or n (each channel, each state decays at a rate of its own), any shift, time, and any
               factor on delta or a, which stand in an exponential
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node
from planish.ir.ops import register
from planish.ir.ops.affine import UNKNOWN_RANK
from planish.ir.ops.align import numeric
from planish.ir.ops.base import Act, Axes, Block, Carry, OpDef, Param, Port, Relation, Wide
from planish.ir.ops.labels import Site, like, link_between, permute_all
from planish.ir.types import UNKNOWN, Dim, Type

LABELS = {0: "bdt", 1: "bdt", 2: "dn", 3: "bnt", 4: "bnt", 5: "d", -1: "bdt"}
NAMES = ("u", "delta", "a", "b", "c", "skip")
_DECAY = Block("each channel and each state decays at a rate of its own")


def _infer(node: Node) -> Sequence[Type]:
    sizes: dict[str, Dim] = {}
    for port, name in enumerate(NAMES):
        value = node.operand(port)
        shape = None if value is None else value.shape
        if shape is None:
            continue
        assert value is not None
        labels = LABELS[port]
        if len(shape) != len(labels):
            raise InvalidModelError(
                f"selective_scan: expected {name} of rank {len(labels)}, not {len(shape)}", where=str(value.type)
            )
        for label, dim in zip(labels, shape, strict=True):
            known = sizes.get(label)
            if isinstance(known, int) and isinstance(dim, int) and known != dim:
                raise InvalidModelError(
                    f"selective_scan: {name} has {dim} along {label}, another operand {known}", where=str(value.type)
                )
            sizes[label] = known if isinstance(known, int) or dim is None else dim
    own = node.operand(0)
    if own is None or own.type == UNKNOWN:
        return (UNKNOWN,)
    return (like(own, tuple(sizes.get(label) for label in "bdt")),)


def _evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    u, delta, a, b, c, skip = (*operands, None)[:6]
    batch, channels, length = u.shape
    state = u.new_zeros((batch, channels, a.shape[1]))
    rows = []
    for t in range(length):
        step = delta[:, :, t, None]
        state = torch.exp(step * a) * state + step * b[:, None, :, t] * u[:, :, t, None]
        rows.append((state * c[:, None, :, t]).sum(-1))
    y = torch.stack(rows, -1) if rows else torch.zeros_like(u)
    return (y if skip is None else y + skip[:, None] * u,)


def _sites(node: Node) -> dict[Port, Site] | None:
    sites = {}
    for port, labels in LABELS.items():
        value = node.port(port)
        if value is None:
            continue
        if value.shape is None or len(value.shape) != len(labels):
            return None
        sites[port] = Site(port, tuple(labels), value.shape)
    return sites


def _relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    refused = numeric(node, act, port)
    if refused is not None:
        return refused
    sites = _sites(node)
    if sites is None:
        return UNKNOWN_RANK
    asker = sites[port]
    labels = {asker.labels[a] for a in axes}
    match act:
        case Act.SHIFT:
            return Block("its recurrence multiplies what is added")
        case Act.PERMUTE:
            return _permute(sites, asker, axes, labels)
        case Act.SCALE:
            return _scale(sites, asker, axes, labels)
        case _:
            return _DECAY


def _permute(sites: dict[Port, Site], asker: Site, axes: Axes, labels: set[str]) -> Relation:
    """Channels, states or sequences change places on every operand that has them."""
    if "t" in labels:
        return Block("its recurrence goes through time in order")
    return permute_all(sites, asker, axes)


def _scale(sites: dict[Port, Site], asker: Site, axes: Axes, labels: set[str]) -> Relation:
    """u with y on channels and sequences; b against c on states and sequences; c with y on time."""
    port = asker.port
    if port in (0, -1) and "t" not in labels:
        return _linked(asker, axes, sites[~port], 1)
    if port in (3, 4) and "t" not in labels:
        return _linked(asker, axes, sites[7 - port], -1)
    if port in (4, -1) and not labels & {"n", "d"}:
        if 5 in sites:
            return Block("its result has a part that does not pass through the states")
        return _linked(asker, axes, sites[-1 if port == 4 else 4], 1)
    if port in (1, 2):
        return Block("it stands in an exponential")
    return Block("its states remember what came before" if "t" in labels else "its result is a sum of two parts")


def _linked(asker: Site, axes: Axes, other: Site, variance: int) -> Relation:
    link = link_between(asker, axes, other, variance)
    if isinstance(link, Block):
        return link
    return Block("these axes meet no other operand") if link is None else Carry((link,))


def _channels(node: Node) -> Sequence[tuple[Port, Axes]]:
    found: list[tuple[Port, Axes]] = []
    for port in (0, 3):
        value = node.operand(port)
        if value is not None and value.rank == 3:
            found.append((port, (1,)))
    return found


selective_scan = register(
    OpDef(
        "selective_scan",
        (Param("u"), Param("delta"), Param("a"), Param("b"), Param("c"), Param("skip", optional=True)),
        _infer,
        _evaluate,
        _relate,
        _channels,
        family="scan",
        summary="h_t = exp(delta_t a) h_(t-1) + delta_t b_t u_t; y_t = c_t h_t + skip u_t; over the last axis",
    )
)
