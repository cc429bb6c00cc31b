"""Raise attention that is written as two products around a softmax.

    softmax(s q k^T + mask) v  =  attention(q, k, v, mask; scale = s)      q [B, H, T, d], k, v [B, H, S, .]

The scale may multiply or divide q, k or the scores, in parts too; masks are added, or chosen by `where`
with -inf. k may be transposed from [B, H, S, d], from [B, S, H, d], or between two reshapes, as torch's
exporter writes it. Casts to a wider float around the softmax are looked through. Exact over the reals.

A guard `where(is_nan(p), 0, p)` behind the softmax (torch's scaled_dot_product_attention) is kept as
`safe`: a row whose scores are all -inf gives 0, where a softmax alone gives NaN. `nan_guards` drops
it: that is right only where every row has a finite score (a finite mask, or none).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Attribute, Node, Value
from planish.ir.rewriter import Declined, Rewriter
from planish.passes.base import Context, Exactness
from planish.passes.match import (
    PatternPass,
    Rule,
    Site,
    Trail,
    attribute,
    both,
    factor_of,
    is_op,
    nan_guarded,
    only_reader,
    origin,
    same,
    scalar,
    widens,
)

SWAP = (0, 1, 3, 2)
STEPS = 6


@dataclass(frozen=True)
class _Scores:
    """What stands between the product of q and k and the softmax; masks from the product on."""

    product: Node
    scale: float = 1.0
    masks: tuple[tuple[str, Value], ...] = ()  # ("add" | "keep" | "drop", mask)


def _forward(node: Node, trail: Trail) -> tuple[Node, Value, bool] | None:
    """(the product with v, v, guarded) behind a softmax."""
    value, guarded = node.result, False
    for _ in range(4):
        reader = only_reader(value)
        readers = list(dict.fromkeys(value.users))
        if reader is None and len(readers) == 2:
            for chosen in readers:
                if nan_guarded(chosen.result) is value:
                    reader, guarded = chosen, True
        if reader is None:
            trail.miss(1, "the softmax is read by several nodes, or is an output", node)
            return None
        if reader.op.name == "matmul":
            p, v = reader.operand(0), reader.operand(1)
            if p is not value or v is None:
                trail.miss(1, "the softmax is not the first factor", reader)
                return None
            return reader, v, guarded
        if not (same(reader.result, value) or nan_guarded(reader.result) is value):
            break
        value = reader.result
    trail.miss(1, "expected a product with the values", value)
    return None


def _backward(value: Value, trail: Trail, depth: int = 8) -> _Scores | None:
    """Walk from the softmax to the product of q and k."""
    value = origin(value)
    if (node := value.producer) is None or depth == 0:
        return None
    if node.op.name == "matmul" and value.rank == 4:
        return _Scores(node)
    for inner, step in _unmasked(node, trail):
        below = _backward(inner, trail, depth - 1)
        if below is None:
            continue
        if not isinstance(step, float):
            return replace(below, masks=(*below.masks, step))
        if not below.masks:
            return replace(below, scale=below.scale * step)
        trail.miss(3, "the scale stands behind the mask", node)
    trail.miss(2, "expected a scale, a mask or the product of queries and keys", node)
    return None


def _unmasked(node: Node, trail: Trail) -> Iterator[tuple[Value, Any]]:
    """The operand that may be scores, and the factor or mask that the node puts on them."""
    factor = factor_of(node)
    if factor is not None:
        yield factor
    elif node.op.name == "add":
        for scores, mask in both(node):
            yield scores, ("add", mask)
    elif node.op.name == "where":
        condition, one, two = node.operands
        for inner, fill, kind in ((one, two, "keep"), (two, one, "drop")):
            number = scalar(fill)
            if inner is not None and number == -np.inf:
                yield inner, (kind, condition)
            elif number is not None:
                trail.miss(3, f"masked scores become {number:g}; expected -inf", node)


def _unscaled(value: Value, reader: Node) -> tuple[Value, float]:
    """(x, s) of a value s x that only `reader` reads."""
    total = 1.0
    while (node := value.producer) is not None and only_reader(value) is reader:
        found = factor_of(node)
        if found is None:
            break
        value, reader, total = found[0], node, total * found[1]
    return value, total


def _untransposed(value: Value, reader: Node) -> tuple[Value, tuple[int, ...], Node]:
    """(x, perm, the node that reads x): k = transpose(x, perm), from k^T as `reader` reads it."""
    node = value.producer
    if node is not None and node.op.name == "transpose":
        perm, inner = tuple(attribute(node, "perm")), node.operand(0)
        if inner is not None and len(perm) == 4:
            return inner, tuple(perm[a] for a in SWAP), node
    found = _between_reshapes(value)
    return (found[0], (0, 1, 2, 3), found[1]) if found is not None else (value, SWAP, reader)


def _between_reshapes(value: Value) -> tuple[Value, Node] | None:
    """x [B, H, S, d] and its reader: reshape(transpose(reshape(x, [B H, S, d]), (0, 2, 1)), [B, H, d, S])."""
    chain = []
    current, first = value, None
    for op in ("reshape", "transpose", "reshape"):
        node = current.producer
        inner = node.operand(0) if node is not None and is_op(current, op) else None
        if node is None or inner is None or (op == "transpose" and tuple(attribute(node, "perm")) != (0, 2, 1)):
            return None
        chain.append(current)
        current, first = inner, node
    after, flat, before = value.shape, chain[2].shape, current.shape
    if after is None or flat is None or before is None or (len(after), len(flat), len(before)) != (4, 3, 4):
        return None
    rows, columns = before[2], before[3]
    if rows is None or columns is None or flat[1:] != (rows, columns) or after[2:] != (columns, rows):
        return None
    agree = [a == b and a not in (None, 0) for a, b in zip(after[:2], before[:2], strict=True)]
    if first is None or not any(agree):
        return None
    return current, first  # the products B H are equal: where one factor is, so is the other


def _match(node: Node, trail: Trail) -> Site | None:
    rank, operand = node.result.rank, node.operand(0)
    if operand is None or rank is None or attribute(node, "axis") not in (-1, rank - 1):
        return None
    ahead = _forward(node, trail)
    if ahead is None:
        return None
    if rank != 4:
        return trail.miss(2, f"the scores have {rank} axes; expected 4", node)
    scores = _backward(operand, trail)
    if scores is None:
        return None
    root, v, guarded = ahead
    q, kt = scores.product.operands[:2]
    if q is None or kt is None or {q.rank, kt.rank, v.rank} != {4}:
        return trail.miss(4, "q, k and v have not four axes each", scores.product)
    if any(q.shape[a] != w.shape[a] and 1 in (q.shape[a], w.shape[a]) for w in (kt, v) for a in (0, 1)):  # type: ignore[index]
        return trail.miss(4, "q, k and v are broadcast against each other", scores.product)
    if any(widens(mask, scores.product.result) for _, mask in scores.masks):
        return trail.miss(5, "the scores are broadcast against the mask", scores.product)
    parts = {"scores": scores, "q": q, "kt": kt, "v": v, "safe": guarded}
    return Site(root, (q, kt, v, *(m for _, m in scores.masks)), parts)


def _mask(rewriter: Rewriter, masks: Sequence[tuple[str, Value]], dtype: str, root: Node) -> Value | None:
    """One mask of several: sums of those that are added, conjunctions of those that choose."""

    def insert(op: str, *operands: Value) -> Value:
        return rewriter.insert(op, operands, before=root).result

    term = keep = None
    for kind, mask in masks:
        if kind == "add":
            mask = rewriter.insert("cast", [mask], {"to": dtype}, before=root).result if mask.dtype != dtype else mask
            term = mask if term is None else insert("add", term, mask)
        else:
            mask = insert("logical_not", mask) if kind == "drop" else mask
            keep = mask if keep is None else insert("logical_and", keep, mask)
    if term is None or keep is None:
        return term or keep
    return insert("where", keep, term, rewriter.constant(Constant(np.array(-np.inf), dtype, ()), "never"))


def _raise(site: Site, rewriter: Rewriter, drop_guards: bool) -> None:
    parts, root = site.parts, site.root
    scores: _Scores = parts["scores"]
    site.check()
    q, q_scale = _unscaled(parts["q"], scores.product)
    kt, outer = _unscaled(parts["kt"], scores.product)
    inner, perm, reader = _untransposed(kt, scores.product)
    source, k_scale = _unscaled(inner, reader)
    if q.dtype != source.dtype or q.dtype != parts["v"].dtype or q.dtype is None:
        raise Declined("q, k and v differ in dtype", root)
    k = source
    if perm != (0, 1, 2, 3):
        k = rewriter.insert("transpose", [source], {"perm": perm}, before=root, source=root.source).result
    mask = _mask(rewriter, scores.masks, q.dtype, root)
    attributes: dict[str, Attribute] = {"scale": scores.scale * q_scale * outer * k_scale}
    if parts["safe"] and not drop_guards:
        attributes["safe"] = True
    operands = [q, k, parts["v"]] + ([mask] if mask is not None else [])
    made = rewriter.insert("attention", operands, attributes, before=root, source=root.source)
    Site(root, (q, source, parts["v"], *(m for _, m in scores.masks))).supersede(rewriter, made.result)


@dataclass(frozen=True)
class RaiseAttention(PatternPass):
    """Attention from two products around a softmax.

    Args:
        nan_guards: drop the guard against rows that are masked throughout; not exact on such rows.
    """

    nan_guards: bool = False

    name = "raise-attention"
    exactness = Exactness.EXACT
    rules = (Rule("attention", frozenset({"softmax"}), STEPS, _match, lambda s, r: _raise(s, r, False)),)

    def rewrite(self, node: Node, rewriter: Rewriter, context: Context) -> bool:
        if node.op.name != "softmax":
            return False
        site = _match(node, Trail("attention", STEPS, node))
        if site is None:
            return False
        _raise(site, rewriter, self.nan_guards)
        return True
