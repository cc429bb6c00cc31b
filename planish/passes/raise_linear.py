"""Raise products with constant matrices to linear layers, and row look-ups to embeddings.

    matmul(x, W)                      ->  linear(x, W; transposed)         W constant [K, N]: no data moves
    matmul(x, transpose(W))           ->  linear(x, W)                     W constant [N, K]
    linear(x, transpose(W))           ->  linear(x, W; transposed)
    gemm(A, B, C; alpha, beta)        ->  linear(A, alpha B, beta C)       A^T by a transpose of its own
    add(linear(x, W), b)              ->  linear(x, W, b)                  b constant along the last axis
    gather(T, ids; axis=0)            ->  embedding(T, ids)                T constant [rows, channels]

Exact over the reals; alpha and beta are multiplied in in float64. A constant on the left of a matmul (unless
its other factor is a transpose: `planish.passes.left_linear`), or with more than two axes, stays a matmul.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.types import WIDE_FLOATS
from planish.passes import left_linear
from planish.passes.base import Exactness
from planish.passes.match import (
    PatternPass,
    Rule,
    Site,
    Trail,
    attribute,
    both,
    is_op,
    last_axis_vector,
    only_reader,
)


def _matrix(value: Value | None) -> tuple[Value, bool] | None:
    """(constant matrix, whether it is read transposed) of a constant, or of a transpose of one."""
    if value is None:
        return None
    turned = is_op(value, "transpose")
    if turned and value.producer is not None:
        inner = value.producer.operand(0)
        if inner is None or tuple(attribute(value.producer, "perm") or (1, 0)) != (1, 0):
            return None
        value = inner
    if not value.is_constant or value.rank != 2 or value.dtype not in WIDE_FLOATS:
        return None
    return value, turned


def _match_matmul(node: Node, trail: Trail) -> Site | None:
    x, other = node.operand(0), node.operand(1)
    found = _matrix(other)
    if x is None or other is None or found is None:
        if x is not None and (x.is_constant or _matrix(x)):
            return trail.miss(1, "the constant stands on the left", node)
        if other is not None and other.is_constant:
            return trail.miss(1, f"the constant is no matrix: it has type {other.type}", node)
        return None
    if x.rank is None:
        return trail.miss(2, "the rank of its operand is not known", node)
    if x.dtype != found[0].dtype:
        return trail.miss(2, f"the dtypes differ: {x.dtype} and {found[0].dtype}", node)
    return Site(node, (x, other), {"x": x, "weight": found[0], "transposed": not found[1]})


def _apply_matmul(site: Site, rewriter: Rewriter) -> None:
    parts = site.parts
    attributes = {"transposed": True} if parts["transposed"] else {}
    operands = [parts["x"], parts["weight"]]
    made = rewriter.insert("linear", operands, attributes, before=site.root, source=site.root.source)
    site.supersede(rewriter, made.result)


def _match_gemm(node: Node, trail: Trail) -> Site | None:
    a, b = node.operand(0), node.operand(1)
    found = _matrix(b)
    if a is None or b is None:
        return None
    if found is None:
        left = a.is_constant or _matrix(a) is not None
        return trail.miss(1, "the constant stands on the left" if left else "no operand is constant", node)
    if a.dtype != found[0].dtype:
        return trail.miss(2, f"the dtypes differ: {a.dtype} and {found[0].dtype}", node)
    read_transposed = found[1] != bool(attribute(node, "trans_b"))  # B is the constant, transposed
    return Site(node, (a, b, node.operand(2)), {"weight": found[0], "transposed": not read_transposed})


def _scaled(rewriter: Rewriter, value: Value, factor: float) -> Value:
    """A constant times a factor; the constant itself for 1."""
    constant = value.constant
    assert constant is not None
    if factor == 1.0:
        return value
    return rewriter.constant(Constant(constant.wide() * factor, constant.dtype, constant.shape), value.name)


def _apply_gemm(site: Site, rewriter: Rewriter) -> None:
    node, weight, transposed = site.root, site.parts["weight"], site.parts["transposed"]
    x, _, c = site.sources
    assert x is not None
    alpha, beta = float(attribute(node, "alpha")), float(attribute(node, "beta"))
    size = weight.constant.shape[1 if transposed else 0]
    if attribute(node, "trans_a"):
        x = rewriter.insert("transpose", [x], {"perm": (1, 0)}, before=node, source=node.source).result
    operands = [x, _scaled(rewriter, weight, alpha)]
    vector = last_axis_vector(c.constant, size) if c is not None and c.is_constant and c.constant else None
    if c is not None and vector is not None:
        operands.append(_bias(rewriter, c, vector * beta, moved=beta != 1.0))
    attributes = {"transposed": True} if transposed else {}
    y = rewriter.insert("linear", operands, attributes, before=node, source=node.source).result
    if c is not None and vector is None:
        if c.is_constant:
            c = _scaled(rewriter, c, beta)
        elif beta != 1.0:
            assert c.dtype is not None
            number = rewriter.constant(Constant(np.array(beta), c.dtype, ()), "beta")
            c = rewriter.insert("mul", [c, number], before=node, source=node.source).result
        y = rewriter.insert("add", [y, c], before=node, source=node.source).result
    site.supersede(rewriter, y)


def _bias(rewriter: Rewriter, value: Value, data: np.ndarray, moved: bool = False) -> Value:
    """A bias vector with this data: the constant itself where it is one already."""
    assert value.constant is not None
    if value.shape == data.shape and not moved:
        return value
    return rewriter.constant(Constant(data, value.constant.dtype, data.shape), value.name)


def _match_turned(node: Node, trail: Trail) -> Site | None:
    x, other = node.operand(0), node.operand(1)
    found = _matrix(other)
    if x is None or found is None or not found[1]:
        return None
    return Site(node, (x, other, node.operand(2)), {"weight": found[0]})


def _apply_turned(site: Site, rewriter: Rewriter) -> None:
    node = site.root
    operands = [node.operand(0), site.parts["weight"], *node.operands[2:]]
    attributes = {**node.attributes, "transposed": True}
    if node.attributes.get("transposed"):
        del attributes["transposed"]
    made = rewriter.insert(node.op, operands, attributes, before=node, source=node.source)
    site.supersede(rewriter, made.result)


def _match_bias(node: Node, trail: Trail) -> Site | None:
    for product, value in both(node):
        linear = product.producer
        if linear is None or linear.op.name != "linear":
            continue
        if not value.is_constant or value.constant is None:
            continue  # a residual
        if linear.operand(2) is not None:
            trail.miss(1, "the linear has a bias already", linear)
            continue
        size = product.shape[-1] if product.shape else None
        if not isinstance(size, int) or value.rank is None or value.rank > len(product.shape or ()):
            trail.miss(1, "the constant does not broadcast along the last axis alone", node)
            continue
        vector = last_axis_vector(value.constant, size)
        if vector is None or value.dtype != product.dtype:
            trail.miss(1, "the constant does not broadcast along the last axis alone", node)
            continue
        return Site(node, (linear.operand(0), linear.operand(1), value), {"linear": linear, "vector": vector})
    return None


def _apply_bias(site: Site, rewriter: Rewriter) -> None:
    linear, (x, weight, value) = site.parts["linear"], site.sources
    if only_reader(linear.result) is not site.root:
        raise Declined("the linear is read elsewhere without the sum", linear)
    assert value is not None
    operands = [x, weight, _bias(rewriter, value, site.parts["vector"])]
    made = rewriter.insert("linear", operands, linear.attributes, before=site.root, source=linear.source)
    site.supersede(rewriter, made.result)


def _match_embedding(node: Node, trail: Trail) -> Site | None:
    table, ids = node.operand(0), node.operand(1)
    if table is None or ids is None or not table.is_constant or table.dtype not in WIDE_FLOATS:
        return None
    if table.rank != 2:
        return trail.miss(1, f"the table has type {table.type}; expected two axes", node)
    if attribute(node, "axis") not in (0, -2):
        return trail.miss(2, "it gathers along the channels", node)
    return Site(node, (table, ids))


def _apply_embedding(site: Site, rewriter: Rewriter) -> None:
    made = rewriter.insert("embedding", list(site.sources), before=site.root, source=site.root.source)
    site.supersede(rewriter, made.result)


@dataclass(frozen=True)
class RaiseLinear(PatternPass):
    """Linear layers and embeddings from matmul, gemm, add and gather."""

    name = "raise-linear"
    exactness = Exactness.EXACT
    rules = (
        Rule("linear", frozenset({"matmul"}), 3, _match_matmul, _apply_matmul),
        Rule("linear from gemm", frozenset({"gemm"}), 3, _match_gemm, _apply_gemm),
        Rule("linear of a transpose", frozenset({"linear"}), 2, _match_turned, _apply_turned),
        Rule("bias", frozenset({"add"}), 2, _match_bias, _apply_bias),
        Rule("embedding", frozenset({"gather"}), 3, _match_embedding, _apply_embedding),
        *left_linear.RULES,
    )
