"""What linear, gemm and conv share: a contraction of operands 0 and 1, plus a bias."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node, Value
from planish.ir.ops.base import Act, Axes, Block, Carry, Fold, Link, Port, Relation
from planish.ir.ops.labels import Site, contract, link_between, with_addend
from planish.ir.types import Dim

UNKNOWN_RANK = Block("the rank of an operand is not known")


def check_inner(node: Node, one: Dim, two: Dim) -> None:
    if isinstance(one, int) and isinstance(two, int) and one != two:
        names = " and ".join(str(v.type) for v in node.operands[:2] if v is not None)
        raise InvalidModelError(
            f"{node.op.name}: the contracted dims differ: {one} and {two}", where=f"{node.op.name} of {names}"
        )


def carry(*links: Link | Block | None) -> Carry | Block:
    """A `Carry` of the links there are; the first `Block` among them wins."""
    for link in links:
        if isinstance(link, Block):
            return link
    return Carry(tuple(link for link in links if isinstance(link, Link)))


def bias_site(node: Node, port: Port, size: Dim) -> Site | Block:
    """The bias, of shape [size], to be grown if it is absent or a constant of one element."""
    bias = node.operand(port)
    if bias is not None and bias.shape is None:
        return UNKNOWN_RANK
    if bias is not None and bias.shape == (size,):
        return Site(port, ("n",), (size,))
    if bias is not None and not bias.is_constant:
        return Block("its bias is no vector over the channels")
    if not isinstance(size, int) or (bias is not None and bias.shape not in ((), (1,))):
        return Block("its bias is no vector over the channels")
    return Site(port, ("n",), (size,), grow=(size,), neutral=0.0 if bias is None else None)


def affine(node: Node, sites: Mapping[Port, Site], bias_port: Port, act: Act, port: Port, axes: Axes) -> Relation:
    """A contraction of operands 0 and 1 plus a bias of label n, apart from shifts of the operands."""
    result = sites[-1]
    bias = bias_site(node, bias_port, result.dim("n"))
    if isinstance(bias, Block):
        return bias
    absent = node.operand(bias_port) is None
    if port == bias_port:
        if bias.grow is not None or bias.dims != (result.dim("n"),):
            return Block("its bias has one element for all channels")
        site = Site(bias_port, ("n",), bias.dims)
        own = link_between(site, axes, result)
        if isinstance(own, Block) or own is None:
            return own or UNKNOWN_RANK
        if act is Act.SHIFT:
            return Carry((own,))
        weight = link_between(site, axes, sites[1])
        return weight if isinstance(weight, Block) else Carry((own, weight) if weight else (own,))
    if act is Act.SHIFT:
        if port != -1 or "n" not in {result.labels[a] for a in axes}:
            return Block("a shift does not reach its result as a shift")
        link = link_between(result, axes, bias)
        if isinstance(link, Block) or link is None:
            return link or UNKNOWN_RANK
        return Carry((link,))
    relation = contract(act, sites, port, axes)
    reaches = port == -1 or (isinstance(relation, Carry) and any(k.port == -1 for k in relation.links))
    return with_addend(relation, act, sites[port], axes, bias, absent) if reaches else relation


def folds_shift(node: Node, axes: Axes, channel: int, weight: Port, bias: Port) -> Relation:
    """A shift of operand 0 on its contracted axis: into a constant bias, with a constant weight."""
    if axes != (channel,):
        return Block("its bias has no axis for a shift of several axes")
    constant_bias = node.operand(bias)
    if not is_constant(node.operand(weight)) or (constant_bias is not None and not constant_bias.is_constant):
        return Block("its weight or bias is no constant that could take the shift up")
    return Fold((bias,))


def is_constant(value: Value | None) -> bool:
    return value is not None and value.is_constant


def wide(value: Value | None) -> np.ndarray:
    """The data of a constant operand in float64."""
    assert value is not None
    assert value.constant is not None
    return value.constant.wide()
