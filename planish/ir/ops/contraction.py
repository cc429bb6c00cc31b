"""Contractions: matmul, linear, gemm; `convolution` holds conv and conv_transpose.

    matmul          y[.., m, n] = sum_k a[.., m, k] b[.., k, n]
    linear          y[.., n] = sum_k x[.., k] weight[n, k] + bias[n]
    gemm            y[m, n] = alpha sum_k A[m, k] B[k, n] + beta C[m, n],  A, B transposed on demand

They take up every linear act on both sides (`planish.ir.ops.labels`), and a shift t of x in the bias:
W (x + t) + (bias - W t) = W x + bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import planish.ir.ops.convolution  # noqa: F401 (registers its rows)
from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node, Value
from planish.ir.ops import register
from planish.ir.ops.affine import (
    UNKNOWN_RANK,
    affine,
    carry,
    check_inner,
    folds_shift,
    is_constant,
    wide,
)
from planish.ir.ops.align import attribute, numeric, static
from planish.ir.ops.base import (
    INVISIBLE,
    Act,
    Axes,
    Block,
    Carry,
    Fold,
    OpDef,
    Param,
    Port,
    Relation,
    Wide,
    repeats_by_channel,
)
from planish.ir.ops.labels import (
    Site,
    broadcast_dims,
    contract,
    flag,
    like,
    link_between,
    number,
    tensor_type,
    with_addend,
)
from planish.ir.ops.stacks import from_constant
from planish.ir.types import UNKNOWN, Dim, Type, is_float

NO_BIAS = "has no bias that could take a shift up"


# -- matmul ------------------------------------------------------------------------------------------


def _matmul_infer(node: Node) -> Sequence[Type]:
    a, b = tensor_type(node.operand(0)), tensor_type(node.operand(1))
    if a is None or b is None:
        return (UNKNOWN,)
    if a.shape is None or b.shape is None:
        return (like(node.operand(0), None),)
    if not a.shape or not b.shape:
        raise InvalidModelError("matmul: an operand is a scalar", where=f"matmul of {a} and {b}")
    check_inner(node, a.shape[-1], b.shape[-2] if len(b.shape) > 1 else b.shape[0])
    batch = broadcast_dims(a.shape[:-2], b.shape[:-2])
    rows, columns = a.shape[-2:-1], b.shape[-1:] if len(b.shape) > 1 else ()
    return (like(node.operand(0), (*batch, *rows, *columns)),)


def _matmul_evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    a, b = operands
    return (torch.matmul(a, b.to(a.dtype)),)


def _matmul_sites(node: Node) -> dict[Port, Site] | None:
    a, b, result = node.operand(0), node.operand(1), node.result
    if a is None or b is None or a.shape is None or b.shape is None or result.shape is None:
        return None
    batch = [f"b{i}" for i in range(max(len(a.shape) - 2, len(b.shape) - 2, 0))]
    of_a = (*batch[len(batch) - max(len(a.shape) - 2, 0) :], *("m",) * (len(a.shape) > 1), "k")
    of_b = (*batch[len(batch) - max(len(b.shape) - 2, 0) :], "k", *("n",) * (len(b.shape) > 1))
    of_result = (*batch, *("m",) * (len(a.shape) > 1), *("n",) * (len(b.shape) > 1))
    return {0: Site(0, of_a, a.shape), 1: Site(1, of_b, b.shape), -1: Site(-1, of_result, result.shape)}


def rows_sum_to_one(value: Value | None) -> bool:
    """True for a softmax over the last axis, seen through casts between floats."""
    while value is not None and value.producer is not None:
        producer = value.producer
        if producer.op.name == "softmax":
            axis = attribute(producer, "axis")
            return axis == -1 or (value.rank is not None and axis == value.rank - 1)
        if producer.op.name not in ("identity", "cast") or not is_float(value.dtype):
            return False
        value = producer.operand(0)
    return False


def _matmul_relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    sites = _matmul_sites(node)
    refused = numeric(node, act, port)
    if sites is None or refused is not None:
        return refused or UNKNOWN_RANK
    if act is not Act.SHIFT:
        return contract(act, sites, port, axes)
    asker = sites[port]
    labels = {asker.labels[a] for a in axes}
    if "k" in labels or port == 0:
        return Block(NO_BIAS)
    if not rows_sum_to_one(node.operand(0)):
        return Block("the rows of its first operand do not sum to 1")
    link = link_between(asker, axes, sites[-1 if port == 1 else 1])
    return carry(link) if link is not None else Block("its other operand has no such axis")


def _matmul_channels(node: Node) -> Sequence[tuple[Port, Axes]]:
    sites = _matmul_sites(node)
    if sites is None or not any(from_constant(v) for v in node.operands):
        return ()  # between two activations there is nothing to take a transform up
    found = [(p, (s.labels.index("k"),)) for p, s in sites.items() if "k" in s.labels]
    return [*found, *((-1, (sites[-1].labels.index(k),)) for k in ("m", "n") if k in sites[-1].labels)]


matmul = register(
    OpDef(
        "matmul",
        (Param("a"), Param("b")),
        _matmul_infer,
        _matmul_evaluate,
        _matmul_relate,
        _matmul_channels,
        beyond=frozenset({Act.SHIFT}),  # rows that sum to one, by their producer
        family="contraction",
        summary="y[.., m, n] = sum_k a[.., m, k] b[.., k, n]",
        conservative={
            "shift@a": "a shift of a whose rows meet columns of b that sum to 1 would pass",
        },
        repeats=repeats_by_channel,
    )
)


# -- linear ------------------------------------------------------------------------------------------


def _linear_infer(node: Node) -> Sequence[Type]:
    x, weight = tensor_type(node.operand(0)), tensor_type(node.operand(1))
    if x is None or x.shape is None:
        return (like(node.operand(0), None),)
    if weight is None or weight.shape is None:
        return (like(node.operand(0), (*x.shape[:-1], None)),)
    if not x.shape or len(weight.shape) != 2:
        raise InvalidModelError(
            "linear: expected x of rank 1 or more and a weight of rank 2", where=f"linear of {x} and {weight}"
        )
    outer, inner = reversed(weight.shape) if flag(node, "transposed") else weight.shape
    check_inner(node, x.shape[-1], inner)
    return (like(node.operand(0), (*x.shape[:-1], outer)),)


def _linear_evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, weight, bias = (*operands, None)[:3]
    y = x @ (weight if flag(node, "transposed") else weight.T)
    return (y if bias is None else y + bias,)


def _linear_sites(node: Node) -> dict[Port, Site] | None:
    x, weight = node.operand(0), node.operand(1)
    result = node.result
    if x is None or weight is None or x.shape is None or weight.shape is None or result.shape is None:
        return None
    outer = tuple(f"b{i}" for i in range(len(x.shape) - 1))
    inside = ("k", "n") if flag(node, "transposed") else ("n", "k")
    return {
        0: Site(0, (*outer, "k"), x.shape),
        1: Site(1, inside, weight.shape),
        -1: Site(-1, (*outer, "n"), result.shape),
    }


def _linear_relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    sites = _linear_sites(node)
    refused = numeric(node, act, port)
    if sites is None or refused is not None:
        return refused or UNKNOWN_RANK
    if act is Act.SHIFT and port == 0 and len(sites[0].dims) - 1 in axes:
        return folds_shift(node, axes, len(sites[0].dims) - 1, 1, 2)
    return affine(node, sites, 2, act, port, axes)


def _linear_fold(node: Node, act: Act, port: Port, axes: Axes, t: np.ndarray) -> Mapping[int, np.ndarray]:
    weight = wide(node.operand(1))
    moved = t.reshape(-1) @ (weight if flag(node, "transposed") else weight.T)
    bias = node.operand(2)
    return {2: (wide(bias) if bias is not None else 0.0) - moved}


def _last_axes(node: Node) -> Sequence[tuple[Port, Axes]]:
    x, result = node.operand(0), node.result
    if x is None or x.rank is None or result.rank is None:
        return ()
    return [(0, (x.rank - 1,)), (-1, (result.rank - 1,))]


linear = register(
    OpDef(
        "linear",
        (Param("x"), Param("weight"), Param("bias", optional=True)),
        _linear_infer,
        _linear_evaluate,
        _linear_relate,
        _last_axes,
        _linear_fold,
        family="contraction",
        summary="y[.., n] = sum_k x[.., k] weight[n, k] + bias[n]; transposed: weight[k, n]",
        attributes={"transposed": False},
        repeats=repeats_by_channel,
    )
)


# -- gemm --------------------------------------------------------------------------------------------


def _gemm_infer(node: Node) -> Sequence[Type]:
    a, b = tensor_type(node.operand(0)), tensor_type(node.operand(1))
    if a is None:
        return (UNKNOWN,)
    if (a.shape is not None and len(a.shape) != 2) or (b is not None and b.shape is not None and len(b.shape) != 2):
        raise InvalidModelError("gemm: expected two matrices", where=f"gemm of {a} and {b}")
    rows, inner = (None, None) if a.shape is None else a.shape
    other, columns = (None, None) if b is None or b.shape is None else b.shape
    if flag(node, "trans_a"):
        rows, inner = inner, rows
    if flag(node, "trans_b"):
        other, columns = columns, other
    check_inner(node, inner, other)
    return (like(node.operand(0), (rows, columns)),)


def _gemm_evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    a, b, c = (*operands, None)[:3]
    y = (a.T if flag(node, "trans_a") else a) @ (b.T if flag(node, "trans_b") else b)
    alpha, beta = number(node, "alpha"), number(node, "beta")
    if alpha != 1.0:
        y = (y * alpha).to(a.dtype)
    if c is not None:
        y = y + (c if beta == 1.0 else (c * beta).to(a.dtype))
    return (y,)


def _gemm_sites(node: Node) -> dict[Port, Site] | None:
    a, b, result = node.operand(0), node.operand(1), node.result
    if a is None or b is None or a.shape is None or b.shape is None or result.shape is None:
        return None
    of_a = ("k", "m") if flag(node, "trans_a") else ("m", "k")
    of_b = ("n", "k") if flag(node, "trans_b") else ("k", "n")
    return {0: Site(0, of_a, a.shape), 1: Site(1, of_b, b.shape), -1: Site(-1, ("m", "n"), result.shape)}


def _gemm_addend(node: Node, dims: tuple[Dim, ...]) -> Site | Block:
    """Operand c, with labels (m, n) from the right."""
    c = node.operand(2)
    if c is None:
        return Site(2, ("n",), dims[1:], grow=static(dims[1:]), neutral=0.0)
    if c.shape is None:
        return UNKNOWN_RANK
    return Site(2, ("m", "n")[2 - len(c.shape) :], c.shape)


def _gemm_grown(node: Node, addend: Site, label: str, dims: tuple[Dim, ...]) -> Site | Block:
    """The addend, grown along `label` if it is a constant that is broadcast there."""
    if label in addend.labels and addend.dim(label) == dims[("m", "n").index(label)]:
        return addend
    shape = static(dims if label == "m" or len(addend.labels) > 1 else dims[1:])
    if shape is None or not is_constant(node.operand(2)):
        return Block("its addend is broadcast there")
    if addend.labels == ("m", "n") and label == "n" and addend.dims[0] == 1:
        shape = (1, shape[1])
    return replace(addend, labels=("m", "n")[2 - len(shape) :], dims=shape, grow=shape)


def _gemm_relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    sites = _gemm_sites(node)
    refused = numeric(node, act, port)
    if sites is None or refused is not None:
        return refused or UNKNOWN_RANK
    result = sites[-1]
    addend = _gemm_addend(node, result.dims)
    if isinstance(addend, Block):
        return addend
    if port == 2:
        return _gemm_addend_relate(node, act, sites, addend, axes)
    asker = sites[port]
    labels = {asker.labels[a] for a in axes}
    c = node.operand(2)
    if act is Act.SHIFT:
        if number(node, "beta") == 0.0:
            return Block("its bias counts for nothing (beta is 0)")
        if port == 0 and "k" in labels:
            return folds_shift(node, axes, asker.labels.index("k"), 1, 2)
        if port != -1:
            return Block("a shift does not reach its result as a shift")
        if c is None or c.is_constant:
            return Fold((2,))
        if number(node, "beta") != 1.0 or any(addend.dim(k) != result.dim(k) for k in labels):
            return Block("its addend is an activation that is scaled or broadcast")
        return carry(link_between(result, axes, addend))
    relation = contract(act, sites, port, axes)
    if c is None or not isinstance(relation, Carry):
        return relation
    if port != -1 and all(link.port != -1 for link in relation.links):
        return relation
    effective = [k for k in ("m", "n") if k in labels and any(k in sites[s.port].labels for s in relation.links)]
    for label in effective:
        if act is Act.PERMUTE and not addend.spans(label):
            continue
        grown = _gemm_grown(node, addend, label, result.dims)
        if isinstance(grown, Block):
            return grown
        addend = grown
    return with_addend(relation, act, asker, axes, addend, absent=False)


def _gemm_addend_relate(node: Node, act: Act, sites: Mapping[Port, Site], addend: Site, axes: Axes) -> Relation:
    result = sites[-1]
    labels = {addend.labels[a] for a in axes}
    if number(node, "beta") == 0.0:
        return INVISIBLE
    if any(addend.dim(k) != result.dim(k) for k in labels):
        return Block("its addend is broadcast there")
    if act is Act.SHIFT:
        if number(node, "beta") != 1.0:
            return Block("its addend is scaled by beta")
        return carry(link_between(addend, axes, result))
    if len(labels) > 1:
        return Block("its rows and columns come from different operands")
    factor = sites[1] if labels == {"n"} else sites[0]
    return carry(link_between(addend, axes, result), link_between(addend, axes, factor))


def _gemm_fold(node: Node, act: Act, port: Port, axes: Axes, t: np.ndarray) -> Mapping[int, np.ndarray]:
    c = node.operand(2)
    old = wide(c) if c is not None else np.zeros(())
    beta = number(node, "beta")
    if port == -1:
        shape = [t.shape[axes.index(a)] if a in axes else 1 for a in (0, 1)]
        return {2: old + t.reshape(shape[min(axes) :]) / beta}
    b = wide(node.operand(1))
    moved = t.reshape(-1) @ (b.T if flag(node, "trans_b") else b)
    return {2: old - moved * (number(node, "alpha") / beta)}


def _gemm_channels(node: Node) -> Sequence[tuple[Port, Axes]]:
    return [(0, (0 if flag(node, "trans_a") else 1,)), (-1, (1,))]


gemm = register(
    OpDef(
        "gemm",
        (Param("a"), Param("b"), Param("c", optional=True)),
        _gemm_infer,
        _gemm_evaluate,
        _gemm_relate,
        _gemm_channels,
        _gemm_fold,
        family="contraction",
        summary="y = alpha A B + beta C, A and B transposed on demand",
        attributes={"alpha": 1.0, "beta": 1.0, "trans_a": False, "trans_b": False},
        repeats=repeats_by_channel,
    )
)
