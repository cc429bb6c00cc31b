"""Raise attention that is written as two products around a softmax.

    softmax(m + c tanh(s q k^T / c)) v  =  attention(q, k, v, m; scale = s, softcap = c)
    softmax(concat(scores, sink))[.., :-1] v  =  attention(.., sinks)          q [B, H, T, d], k, v [B, Hk, S, .]

The scale may multiply or divide q, k, the scores or the masked scores, in parts too; a factor for each head or
row goes to q. Masks are added, or chosen by `where` with -inf, or with the lowest float, in which a score is lost
as it is when both are added. k may be transposed from [B, H, S, d], from [B, S, H, d], or between two reshapes.
Products over three axes, or over five and more, are lifted. Casts to a wider float around the softmax are looked
through. Exact over the reals.

    attention(q, repeat(k), repeat(v))  =  attention(q, k, v)                  each key head Hk repeated H / Hk times

A guard `where(is_nan(p), 0, p)` behind the softmax (torch's scaled_dot_product_attention) is kept as
`safe`: a row whose scores are all -inf gives 0, where a softmax alone gives NaN. `nan_guards` drops
it: that is right only where every row has a finite score (a finite mask, or none).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from planish.ir.constant import Constant
from planish.ir.graph import Attribute, Node, Value
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.types import Dim
from planish.passes.base import Context, Exactness
from planish.passes.heads import Lead, as_before, lead_of, lifted, per_head, repeated
from planish.passes.masks import one_mask
from planish.passes.match import PatternPass, Rule, Site, Trail, attribute, is_op, only_reader, widens
from planish.passes.scores import Ahead, Scores, ahead_of, scores_behind, unscaled

STEPS = 6


def _untransposed(value: Value, reader: Node) -> tuple[Value, tuple[int, ...], Node]:
    """(x, perm, the node that reads x): k = transpose(x, perm), from k^T as `reader` reads it."""
    node = value.producer
    if node is not None and node.op.name == "transpose":
        perm, inner = tuple(attribute(node, "perm")), node.operand(0)
        if inner is not None and (len(perm) == 4 or _swapped(len(perm)) == perm):
            return inner, tuple(perm[a] for a in _swapped(len(perm))), node
    found = _between_reshapes(value)
    if found is not None:
        return found[0], (0, 1, 2, 3), found[1]
    return value, _swapped(value.rank or 4), reader


def _swapped(rank: int) -> tuple[int, ...]:
    """The permutation that exchanges the last two axes."""
    return (*range(rank - 2), rank - 1, rank - 2)


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
    ahead = ahead_of(node, trail)
    if ahead is None:
        return None
    if rank < 3:
        return trail.miss(2, f"the scores have {rank} axes; expected 3 or more", node)
    scores = scores_behind(operand, trail)
    if scores is None:
        return None
    if (scores.sinks is not None) != ahead.dropped:
        return trail.miss(4, "a column is set beside the scores or dropped behind them, but not both", node)
    if scores.lead is None and rank >= 4:
        scores = replace(scores, lead=node.result)
    q, kt = scores.product.operands[:2]
    v = ahead.values
    if q is None or kt is None or {q.rank, kt.rank} != {scores.product.result.rank} or (v.rank or 0) < 3:
        return trail.miss(4, "q, k and v have not as many axes as the scores", scores.product)
    if _broadcast(q, kt, v, scores, ahead):
        return trail.miss(4, "q, k and v are broadcast against each other", scores.product)
    if any(widens(mask.value, mask.at) for mask in scores.masks):
        return trail.miss(5, "the scores are broadcast against the mask", scores.product)
    masks = [mask.value for mask in scores.masks if mask.kind != "floor"]
    return Site(
        ahead.product,
        (q, kt, v, *masks, scores.sinks, *scores.rows),
        {"scores": scores, "ahead": ahead, "q": q, "kt": kt},
    )


def _broadcast(q: Value, kt: Value, v: Value, scores: Scores, ahead: Ahead) -> bool:
    """True if the products are broadcast in another way than query heads that share one key head."""
    one, weights = kt.shape, ahead.product.operand(0)
    if q.shape is None or one is None or v.shape is None or weights is None or weights.shape is None:
        return True
    shared = len(one) == len(v.shape) == 4 and one[1] == v.shape[1] == 1  # the row groups heads itself
    pairs = [(q.shape[:-2], one[:-2]), (weights.shape[:-2], v.shape[:-2])]
    return any(
        a != b and 1 in (a, b) and not (shared and axis == 1)
        for first, second in pairs
        for axis, (a, b) in enumerate(zip(first, second, strict=False))
    )


def _raise(site: Site, rewriter: Rewriter, drop_guards: bool) -> None:
    scores: Scores = site.parts["scores"]
    ahead: Ahead = site.parts["ahead"]
    root, v = site.root, ahead.values
    site.check()
    q, q_scale = unscaled(site.parts["q"], scores.product)
    kt, outer = unscaled(site.parts["kt"], scores.product)
    inner, perm, reader = _untransposed(kt, scores.product)
    source, k_scale = unscaled(inner, reader)
    if q.dtype != source.dtype or q.dtype != v.dtype or q.dtype is None:
        raise Declined("q, k and v differ in dtype", root)
    lead = lead_of(scores.lead, q)
    scale = scores.scale * q_scale * outer * k_scale
    attributes: dict[str, Attribute] = {"scale": scale * (scores.cap or 1.0)}
    if scores.cap is not None:
        attributes["softcap"] = scores.cap
    if ahead.guarded and not drop_guards:
        attributes["safe"] = True
    k = source
    if perm != tuple(range(len(perm))):
        k = rewriter.insert("transpose", [source], {"perm": perm}, before=root, source=root.source).result
    mask = one_mask(rewriter, scores.masks, lead, q.dtype, root)
    four = [lifted(rewriter, x, lead, root) for x in (q, k, v)]
    for rows in scores.rows:
        rows = rewriter.insert("cast", [rows], {"to": q.dtype}, before=root).result if rows.dtype != q.dtype else rows
        four[0] = rewriter.insert("mul", [four[0], rows], before=root, source=root.source).result
    operands: list[Value | None] = [*four, mask]
    if scores.sinks is not None:
        operands.append(_sinks(rewriter, scores.sinks, lead, q.dtype, root))
    while operands[-1] is None:
        operands.pop()
    made = rewriter.insert("attention", operands, attributes, before=root, source=root.source)
    masks = [m.value for m in scores.masks if m.kind != "floor"]
    end = _end(root, lead, made.result.shape)
    result = made.result if end.result.rank == 4 else as_before(rewriter, made.result, lead, end)
    Site(end, (q, source, v, *masks, scores.sinks, *scores.rows)).supersede(rewriter, result)


def _end(root: Node, lead: Lead, shape: tuple[Dim, ...] | None) -> Node:
    """The product with the values, or the reshape behind it that gives [B, H, T, e] back."""
    reader = only_reader(root.result)
    if root.result.rank == 3 and reader is not None and reader.op.name == "reshape" and lead.heads is not None:
        if reader.result.shape == shape and reader.operand(0) is root.result:
            return reader
    return root


def _sinks(rewriter: Rewriter, column: Value, lead: Lead, dtype: str, root: Node) -> Value:
    """The sinks as a vector [H]."""
    found = per_head(column, lead.heads)
    if found is None:
        raise Declined("the sinks are not one number for each head", column)
    value = rewriter.constant(found, f"{column.name}_sinks") if isinstance(found, Constant) else found
    if value.dtype != dtype:
        value = rewriter.insert("cast", [value], {"to": dtype}, before=root).result
    return value


def _match_repeated(node: Node, trail: Trail) -> Site | None:
    k, v = node.operand(1), node.operand(2)
    keys = repeated(k) if k is not None else None
    values = repeated(v) if v is not None else None
    if keys is None or values is None:
        return None
    if (keys.heads, keys.times) != (values.heads, values.times):
        return trail.miss(2, "keys and values are not repeated alike", node)
    return Site(node, (keys.source, values.source), {"keys": keys, "values": values})


def _apply_repeated(site: Site, rewriter: Rewriter) -> None:
    node = site.root
    operands = list(node.operands)
    for index, name in ((1, "keys"), (2, "values")):
        found = site.parts[name]
        value = found.source
        for step in found.redo:
            value = step(rewriter, node, value)
        operands[index] = value
    made = rewriter.insert(node.op, operands, node.attributes, before=node, source=node.source)
    site.supersede(rewriter, made.result)


@dataclass(frozen=True)
class RaiseAttention(PatternPass):
    """Attention from two products around a softmax, and its key heads before they are repeated.

    Args:
        nan_guards: drop the guard against rows that are masked throughout; not exact on such rows.
    """

    nan_guards: bool = False

    name = "raise-attention"
    exactness = Exactness.EXACT
    rules = (
        Rule("attention", frozenset({"softmax"}), STEPS, _match, lambda s, r: _raise(s, r, False)),
        Rule("repeated heads", frozenset({"attention"}), 3, _match_repeated, _apply_repeated),
    )

    def rewrite(self, node: Node, rewriter: Rewriter, context: Context) -> bool:
        if node.op.name != "softmax":
            return super().rewrite(node, rewriter, context)
        site = _match(node, Trail("attention", STEPS, node))
        if site is None:
            return False
        _raise(site, rewriter, self.nan_guards)
        return True
