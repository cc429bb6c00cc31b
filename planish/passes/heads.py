"""Laying out queries, keys and values by heads: from [B H, T, d] to [B, H, T, d], and keys that are repeated.

For `raise_attention`. Repeated heads: reshape(expand(x[:, :, None], [B, Hk, g, S, d]), [B, Hk g, S, d]), seen through
transposes and rotary embeddings between the repetition and its reader.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.shapes import static_ints
from planish.ir.types import Dim
from planish.passes.match import attribute, is_op
from planish.passes.scores import Mask, regroups


@dataclass(frozen=True)
class Lead:
    """The axes before the last two: batch and heads. With `heads` None there are B groups of one head."""

    batch: Dim
    heads: int | None


def grouped_as(lead: Lead, value: Value) -> Value | None:
    """x [B, H, ..] of a reshape of x to [B H, ..]."""
    node = value.producer
    inner = node.operand(0) if node is not None and is_op(value, "reshape") else None
    if inner is None or inner.shape is None or len(inner.shape) != 4 or not regroups(value, inner):
        return None
    return inner if inner.shape[1] == lead.heads and inner.shape[0] == lead.batch else None


def lifted(rewriter: Rewriter, value: Value, lead: Lead, before: Node) -> Value:
    """[B, H, ..] of a value [B H, ..] or [.., .., H, ..] (or of one that has four axes already)."""
    if value.rank == 4:
        return value
    if value.shape is not None and len(value.shape) > 4:
        return _reshaped(rewriter, value, (lead.batch, value.shape[-3]), before)
    if lead.heads is None:
        return rewriter.insert("unsqueeze", [value], {"axes": (1,)}, before=before, source=before.source).result
    inner = grouped_as(lead, value)
    if inner is not None:
        return inner
    return _reshaped(rewriter, value, (lead.batch, lead.heads), before)


def on_four_axes(rewriter: Rewriter, mask: Mask, lead: Lead, before: Node) -> Value:
    """A mask on scores [B H, T, S], or on scores [.., .., H, T, S] of B in several axes, as one on [B, H, T, S]."""
    value, at = mask.value, mask.at.shape
    if at is None or value.shape is None or len(at) == 4:
        return value
    if len(at) == 3:
        return value if len(value.shape) < 3 or value.shape[0] == 1 else lifted(rewriter, value, lead, before)
    outer = value.shape[: max(0, len(value.shape) - 3)]
    if all(d == 1 for d in outer) and at[-3] == lead.heads:
        return _reshaped(rewriter, value, (1, *value.shape[-3:-2]), before) if outer else value
    dims = (*at[:-3], *value.shape[-3:])
    if at[-3] != lead.heads or not all(isinstance(d, int) for d in dims):
        raise Declined("the mask has batches and heads in other axes than the scores", before)
    numbers = Constant.of(np.array(dims, np.int64), "i64")
    wide = rewriter.insert("expand", [value, rewriter.constant(numbers, "shape")], before=before).result
    return _reshaped(rewriter, wide, (int(np.prod(dims[:-3])), dims[-3]), before)  # type: ignore[arg-type]


def as_before(rewriter: Rewriter, value: Value, lead: Lead, before: Node) -> Value:
    """A value [B, H, ..] with the axes that the result of `before` has in their place."""
    if lead.heads is None:
        return rewriter.insert("squeeze", [value], {"axes": (1,)}, before=before, source=before.source).result
    leading = (before.result.shape or ())[:-2]
    if len([d for d in leading if not isinstance(d, int)]) > 1:
        raise Declined("several of the axes before the last two are not static", before)
    return _reshaped(rewriter, value, leading, before)


def _reshaped(rewriter: Rewriter, value: Value, leading: tuple[Dim, ...], before: Node) -> Value:
    """A value with other axes before its last two; a leading dim that is no number is what remains."""
    assert value.shape is not None
    first = [d if isinstance(d, int) else -1 for d in leading]
    last = value.shape[-2:]
    if all(isinstance(d, int) for d in last):
        shape = rewriter.constant(Constant.of(np.array([*first, *last], np.int64), "i64"), "shape")
    elif first.count(-1) == 0 and sum(not isinstance(d, int) for d in last) == 1:
        numbers = [*first, *(d if isinstance(d, int) else -1 for d in last)]
        shape = rewriter.constant(Constant.of(np.array(numbers, np.int64), "i64"), "shape")
    else:
        head = rewriter.constant(Constant.of(np.array(first, np.int64), "i64"), "heads")
        rank = len(value.shape)
        sizes = rewriter.insert("shape", [value], {"start": rank - 2, "end": rank}, before=before).result
        shape = rewriter.insert("concat", [head, sizes], {"axis": 0}, before=before).result
    return rewriter.insert("reshape", [value, shape], before=before, source=before.source).result


def lead_of(four: Value | None, q: Value) -> Lead:
    """Batch and heads: from scores of four axes or more, or from queries that a reshape made of [B, H, T, d]."""
    if four is not None and four.shape is not None:
        heads, batches = four.shape[-3], [d for d in four.shape[:-3] if isinstance(d, int)]
        if not isinstance(heads, int):
            raise Declined("the number of heads is not known", four)
        if len(four.shape) == 4:
            return Lead(four.shape[0], heads)
        return Lead(int(np.prod(batches)) if len(batches) == len(four.shape) - 3 else None, heads)
    node = q.producer
    inner = node.operand(0) if node is not None and is_op(q, "reshape") else None
    if inner is not None and inner.rank == 4 and inner.shape is not None and regroups(q, inner):
        if isinstance(inner.shape[1], int):
            return Lead(inner.shape[0], inner.shape[1])
    return Lead(None, None)


def per_head(column: Value, heads: int | str | None) -> Value | Constant | None:
    """The sinks [H] in a column [.., H, .., 1]: a value of one axis, a constant, or None."""
    value = column
    while is_op(value, "expand", "identity", "cast") and value.producer is not None:
        inner = value.producer.operand(0)
        if inner is None:
            break
        value = inner
    if value.is_constant and value.constant is not None:
        data = value.constant.wide()
        data = data.reshape((1,) * (4 - data.ndim) + data.shape) if data.ndim <= 4 else data
        first = data[:1, :, :1, :]
        if data.ndim != 4 or not (data == first).all() or data.shape[1] != heads:
            return None
        return Constant(np.ascontiguousarray(first.reshape(-1)), value.constant.dtype, (data.shape[1],))
    if value.shape != (1, heads, 1, 1):
        return None
    node = value.producer
    inner = node.operand(0) if node is not None and node.op.name in ("reshape", "unsqueeze") else None
    return inner if inner is not None and inner.shape == (heads,) else None


# -- repeated heads ----------------------------------------------------------------------------------

Redo = Callable[[Rewriter, Node, Value], Value]


@dataclass(frozen=True)
class Repeated:
    """A value whose heads are those of `source`, each `times` times; `redo` makes from the source what it is for."""

    source: Value
    heads: int
    times: int
    redo: tuple[Redo, ...] = ()


def repeated(value: Value, axis: int = 1, depth: int = 6) -> Repeated | None:
    """How the heads of a value [B, H, S, d] (on `axis`) are repeated, None if they are not."""
    node = value.producer
    inner = node.operand(0) if node is not None else None
    if node is None or inner is None or inner.shape is None or value.shape is None or depth == 0:
        return None
    found: Repeated | None = None
    match node.op.name:
        case "reshape":
            return _expanded_group(inner, value, axis)
        case "expand":
            changed = [a for a, (d, e) in enumerate(zip(inner.shape, value.shape, strict=False)) if d != e]
            heads = value.shape[axis]
            if inner.rank == value.rank and changed == [axis] and inner.shape[axis] == 1 and isinstance(heads, int):
                return Repeated(inner, 1, heads)
        case "gather":
            index = static_ints(node.operand(1))
            if attribute(node, "axis") % len(inner.shape) == axis and index and isinstance(inner.shape[axis], int):
                heads = int(inner.shape[axis])  # type: ignore[arg-type]
                if len(index) % heads == 0 and len(index) > heads:
                    times = len(index) // heads
                    if list(index) == [i // times for i in range(len(index))]:
                        return Repeated(inner, heads, times)
        case "transpose":
            perm = tuple(attribute(node, "perm"))
            found = repeated(inner, perm[axis], depth - 1)
        case "rope":
            tables = [node.operand(i) for i in (1, 2)]
            rank = len(value.shape)
            if axis == rank - 1 or any(not _broadcast_along(t, axis, rank) for t in tables):
                return None
            found = repeated(inner, axis, depth - 1)
    if found is None:
        return None

    def again(rewriter: Rewriter, before: Node, source: Value) -> Value:
        return rewriter.insert(
            node.op, [source, *node.operands[1:]], node.attributes, before=before, source=node.source
        ).result

    return Repeated(found.source, found.heads, found.times, (*found.redo, again))


def _broadcast_along(table: Value | None, axis: int, rank: int) -> bool:
    if table is None or table.shape is None:
        return False
    own = axis - (rank - len(table.shape))
    return own < 0 or table.shape[own] == 1


def _expanded_group(inner: Value, value: Value, axis: int) -> Repeated | None:
    """reshape(expand(x[:, :, None], ..)): dims [.., Hk, g, ..] that become [.., Hk g, ..]."""
    node = inner.producer
    single = node.operand(0) if node is not None and is_op(inner, "expand") else None
    if single is None or single.shape is None or inner.shape is None or value.shape is None:
        return None
    heads, times = inner.shape[axis], inner.shape[axis + 1] if axis + 1 < len(inner.shape) else None
    if not isinstance(heads, int) or not isinstance(times, int) or len(inner.shape) != len(value.shape) + 1:
        return None
    merged = (*inner.shape[:axis], heads * times, *inner.shape[axis + 2 :])
    alike = [a == b and a is not None for a, b in zip(merged, value.shape, strict=True)]
    if value.shape[axis] != heads * times or sum(not a for a in alike) > 1 or len(single.shape) != len(inner.shape):
        return None
    if single.shape[axis + 1] != 1 or any(
        d != e for a, (d, e) in enumerate(zip(single.shape, inner.shape, strict=True)) if a != axis + 1
    ):
        return None
    lone = single.producer
    source = lone.operand(0) if lone is not None and lone.op.name in ("unsqueeze", "reshape") else None
    if source is not None and source.shape == (*single.shape[: axis + 1], *single.shape[axis + 2 :]):
        return Repeated(source, heads, times)

    def squeezed(rewriter: Rewriter, before: Node, x: Value) -> Value:
        return rewriter.insert("squeeze", [x], {"axes": (axis + 1,)}, before=before, source=before.source).result

    return Repeated(single, heads, times, (squeezed,))
