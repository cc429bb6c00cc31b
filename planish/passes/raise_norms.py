"""Raise norms that are written as arithmetic.

    layer_norm(x; g, b)  =  (x - m) / sqrt(v + eps) * g + b,  m = mean x,  v = mean (x - m)^2 = mean x^2 - m^2
    rms_norm(x; g)       =  x / sqrt(mean x^2 + eps) * g

over the last axes. The root may be a square root or a power, under a division, a reciprocal or a power -1/2, or
`rsqrt`; squares may be powers or products; means may be sums divided by their count, v torch's biased variance; gain
and bias may stand on either side, and a gain may be 1 + g, or one number for all channels. Exact over the reals;
mean x^2 - m^2 cancels in floats, so there the raised form is the more accurate one. A cast to a wider float before the
norm and back behind it goes: the norms compute their statistics in float32 (`stash`). It stays where the gain
is multiplied in the wider float.
LayerNorm: arXiv:1607.06450. RMSNorm: arXiv:1910.07467.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Node
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.types import WIDE_FLOATS
from planish.passes.base import Exactness
from planish.passes.match import (
    PatternPass,
    Rule,
    Site,
    Trail,
    attribute,
    both,
    is_op,
    only_reader,
    origin,
    same,
    scalar,
    with_constant,
)
from planish.passes.moments import centred_on, difference_of_moments, mean_of, square, under_root, variance_of

NORMS = ("layer_norm", "rms_norm")


def _match_core(node: Node, trail: Trail) -> Site | None:
    parts = under_root(node)
    if parts is None:
        return None
    number, under = parts
    total = origin(under).producer
    if total is None or total.op.name != "add":
        return trail.miss(1, "expected an add of eps under the root", total or under)
    found = with_constant(total)
    if found is None:
        return trail.miss(1, "eps is no constant", total)
    variance, eps = found[0], scalar(found[1])
    centred = centred_on(number)
    mean = mean_of(variance)
    if mean is not None:
        base = square(mean[0])
        if base is None:
            return trail.miss(3, "expected the mean of a square", mean[0])
        if centred is not None and (same(base, number) or centred_on(base) == centred):
            if centred[1] != mean[1]:
                return trail.miss(4, "mean and variance are over different axes", mean[0])
            kind, x, axes = "layer_norm", centred[0], mean[1]
        elif same(base, number):
            kind, x, axes = "rms_norm", origin(number), mean[1]
        else:
            return trail.miss(4, "the squares are of another tensor than the one that is divided", mean[0])
    else:
        difference = origin(variance).producer
        moments = None
        if difference is not None and difference.op.name == "sub" and centred is not None:
            moments = difference_of_moments(difference)
        elif centred is not None:
            moments = variance_of(variance)
        if moments is None:
            return trail.miss(2, "expected a mean of squares", difference or variance)
        if moments != centred:
            return trail.miss(4, "mean and variance are of different tensors or axes", difference)
        kind, x, axes = "layer_norm", moments[0], moments[1]
    rank = x.rank
    if rank is None or axes != tuple(range(rank - len(axes), rank)):
        return trail.miss(5, f"the axes {list(axes)} are not the last ones", node)
    return Site(node, (x,), {"kind": kind, "x": x, "axis": -len(axes), "eps": eps, "eps at": total})


def _apply_core(site: Site, rewriter: Rewriter) -> None:
    parts = site.parts
    if parts["eps"] is None:
        raise Declined("its eps is not a scalar", parts["eps at"])
    site.check()
    attributes = {"axis": parts["axis"], "eps": parts["eps"]}
    x = site.as_read(parts["x"])
    norm = rewriter.insert(parts["kind"], [x], attributes, before=site.root, source=site.root.source)
    site.supersede(rewriter, norm.result)


def _spread(constant: Constant, shape: tuple[int | str | None, ...]) -> np.ndarray | None:
    """A constant that varies over the normalised axes only, expanded to them; None for any other."""
    dims = tuple(d for d in shape if isinstance(d, int))
    leading = constant.shape[: max(0, len(constant.shape) - len(shape))]
    if len(dims) < len(shape) or any(d != 1 for d in leading):
        return None
    try:
        return np.array(np.broadcast_to(constant.wide().reshape(constant.shape[len(leading) :]), dims))
    except ValueError:
        return None


def _match_vector(node: Node, trail: Trail) -> Site | None:
    """A norm without gain times one, or without bias plus one."""
    port = 1 if node.op.name == "mul" else 2
    for normed, other in both(node):
        norm = normed.producer
        if norm is None or norm.op.name not in NORMS:
            continue
        offset, value = 0.0, other
        if port == 1 and norm.op.name == "rms_norm" and other.producer is not None and is_op(other, "add"):
            for one, two in both(other.producer):
                if scalar(two) == 1.0 and one.is_constant:
                    offset, value = 1.0, one
        if not value.is_constant or value.constant is None or normed.shape is None:
            continue  # a gate or a residual
        if norm.operand(port) is not None or (port == 1 and norm.operand(2) is not None):
            trail.miss(1, "the norm has its own already", norm)
            continue
        data = _spread(value.constant, normed.shape[len(normed.shape) + attribute(norm, "axis") :])
        if data is None or (port == 2 and value.constant.size == 1 != data.size):
            trail.miss(2, "the constant does not vary over the normalised axes alone", node)
            continue
        parts = {"norm": norm, "port": port, "value": value, "data": data, "offset": offset}
        return Site(node, (normed,), parts)
    return None


def _apply_vector(site: Site, rewriter: Rewriter) -> None:
    norm, value, data = site.parts["norm"], site.parts["value"], site.parts["data"]
    if only_reader(norm.result) is not site.root:
        raise Declined("the norm is read elsewhere without it", norm)
    if value.constant.shape != data.shape:
        value = rewriter.constant(Constant(data, value.constant.dtype, data.shape), value.name)
    operands = list(norm.operands) + [None] * (3 - len(norm.operands))
    operands[site.parts["port"]] = value
    while operands[-1] is None:
        operands.pop()
    attributes = dict(norm.attributes)
    if site.parts["offset"]:
        attributes["gain_offset"] = site.parts["offset"]
    made = rewriter.insert(norm.op, operands, attributes, before=site.root, source=norm.source)
    Site(site.root, (norm.operand(0), value)).supersede(rewriter, made.result)


def _match_cast(node: Node, trail: Trail) -> Site | None:
    """cast(norm(cast(x))) that ends in the dtype of x."""
    normed = node.operand(0)
    norm = normed.producer if normed is not None else None
    if norm is None or norm.op.name not in NORMS:
        return None
    inner = norm.operand(0)
    x = inner.producer.operand(0) if inner is not None and is_op(inner, "cast") and inner.producer else None
    if x is None or x.dtype != node.result.dtype or x.dtype not in WIDE_FLOATS or len(norm.operands) > 1:
        return trail.miss(1, "expected a norm without gain of a cast from the dtype that it is cast to", norm)
    return Site(node, (x,), {"norm": norm, "x": x})


def _apply_cast(site: Site, rewriter: Rewriter) -> None:
    norm = site.parts["norm"]
    site.check()
    made = rewriter.insert(norm.op, [site.parts["x"]], norm.attributes, before=site.root, source=norm.source)
    site.supersede(rewriter, made.result)


@dataclass(frozen=True)
class RaiseNorms(PatternPass):
    """Layer norm and RMS norm from arithmetic."""

    name = "raise-norms"
    exactness = Exactness.EXACT
    rules = (
        Rule("norm", frozenset({"div", "mul"}), 6, _match_core, _apply_core),
        Rule("norm gain and bias", frozenset({"mul", "add"}), 3, _match_vector, _apply_vector),
        Rule("norm between casts", frozenset({"cast"}), 2, _match_cast, _apply_cast),
    )
