"""Reading attention around its softmax: scale, soft-cap, masks and sinks before it, the values behind it.

    softmax(m + c tanh(s q k^T / c)) v        sinks: softmax(concat(scores, sink))[.., :-1] v

For `raise_attention`. Scores may change between [B, H, T, S] and [B H, T, S] on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planish.ir.graph import Node, Value
from planish.ir.shapes import static_ints
from planish.passes.guards import rows_guarded
from planish.passes.match import (
    Trail,
    attribute,
    both,
    factor_of,
    nan_guarded,
    only_reader,
    origin,
    same,
    scalar,
    widens,
)

ABSORBS = -1e30  # a score that is added to this is lost in it, in float64 too


@dataclass(frozen=True)
class Mask:
    """What is put on the scores `at`: "add", or "keep" / "drop" where they become `fill` elsewhere / there.

    "floor": what is below `fill` becomes it. `factor`: of what is added.
    """

    kind: str
    value: Value
    at: Value
    fill: float = -np.inf
    factor: float = 1.0

    def scaled(self, factor: float) -> Mask:
        """The mask of scores that a factor behind it scales too."""
        return replace(self, fill=self.fill * factor, factor=self.factor * factor)


@dataclass(frozen=True)
class Scores:
    """What stands between the product of q and k and the softmax; masks from the product on."""

    product: Node
    scale: float = 1.0
    cap: float | None = None  # cap tanh(scale q k^T)
    masks: tuple[Mask, ...] = ()
    sinks: Value | None = None  # [.., H, .., 1], the column beside the scores
    lead: Value | None = None  # scores of four axes or more on the way, if there are any
    rows: tuple[Value, ...] = ()  # factors [.., H, T or 1, 1]


@dataclass(frozen=True)
class Ahead:
    """What stands behind the softmax: the product with the values."""

    product: Node
    values: Value
    guarded: bool = False
    dropped: bool = False  # the last column goes


def _drops_last(node: Node, value: Value) -> bool:
    """True for x[.., :-1]."""
    if node.op.name != "slice" or node.operand(0) is not value or value.rank is None:
        return False
    starts, ends, axes, steps = (static_ints(node.operand(i)) for i in range(1, 5))
    size = value.shape[-1] if value.shape else None
    if starts != (0,):
        return False
    if ends is None or len(ends) != 1 or (ends[0] != -1 and not (isinstance(size, int) and ends[0] == size - 1)):
        return False
    return axes is not None and axes[0] in (-1, value.rank - 1) and (steps is None or steps[0] == 1)


def regroups(value: Value, inner: Value | None) -> bool:
    """True if a value is the other one reshaped in its axes before the last two."""
    one, two = value.shape, inner.shape if inner is not None else None
    if one is None or two is None or len(one) < 3 or len(two) < 3:
        return False
    if one[-2:] == two[-2:] and None not in one[-2:]:
        return True
    leading = (one[:-2], two[:-2])  # one of the last two dims is not known: all the others tell
    numbers = [[d for d in dims if isinstance(d, int)] for dims in leading]
    whole = all(len(n) == len(dims) for n, dims in zip(numbers, leading, strict=True))
    alike = [a == b and a is not None for a, b in zip(one[-2:], two[-2:], strict=True)]
    return whole and int(np.prod(numbers[0])) == int(np.prod(numbers[1])) and any(alike)


def ahead_of(node: Node, trail: Trail) -> Ahead | None:
    """The product with the values behind a softmax."""
    value, guarded, dropped = node.result, False, False
    for _ in range(6):
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
            return Ahead(reader, v, guarded, dropped)
        if _drops_last(reader, value) and not dropped:
            dropped = True
        elif reader.op.name == "where" and rows_guarded(reader, node):
            guarded = True
        elif not (
            same(reader.result, value)
            or nan_guarded(reader.result) is value
            or (reader.op.name == "reshape" and reader.operand(0) is value and regroups(reader.result, value))
        ):
            break
        value = reader.result
    trail.miss(1, "expected a product with the values", value)
    return None


def scores_behind(value: Value, trail: Trail) -> Scores | None:
    """Walk from the operand of a softmax to the product of q and k."""
    value = origin(value)
    node = value.producer
    if node is not None and node.op.name == "sub":  # softmax does not see what all scores of a row have in common
        x, most = node.operand(0), node.operand(1)
        if x is not None and most is not None and _maximum_of(most, x):
            value = origin(x)
            node = value.producer
    if node is None or node.op.name != "concat" or len(node.operands) != 2:
        return _behind(value, trail)
    scores, column = node.operand(0), node.operand(1)
    if scores is None or column is None or attribute(node, "axis") not in (-1, (value.rank or 0) - 1):
        return None
    if column.shape is None or len(column.shape) != 4 or column.shape[-1] != 1:
        trail.miss(2, "the scores are set beside something else than one column per head", node)
        return None
    found = _behind(origin(scores), trail)
    return replace(found, sinks=column) if found is not None else None


def _maximum_of(most: Value, x: Value) -> bool:
    """True for the largest of x along the last axis, which stays as an axis of one."""
    node = origin(most).producer
    if node is None or node.op.name not in ("reduce_max", "torch::aten.max.dim", "torch::aten.amax.default"):
        return False
    return same(node.operand(0), x) and most.rank == x.rank and most.shape is not None and most.shape[-1] == 1


def _behind(value: Value, trail: Trail, depth: int = 12) -> Scores | None:
    value = origin(value)
    if (node := value.producer) is None or depth == 0:
        return None
    if node.op.name == "matmul" and value.rank is not None and value.rank >= 3:
        return Scores(node, lead=value if value.rank >= 4 else None)
    if node.op.name == "reshape" and regroups(value, node.operand(0)):
        inner = node.operand(0)
        below = _behind(inner, trail, depth - 1) if inner is not None else None
        if below is not None and below.lead is None and value.rank is not None and value.rank >= 4:
            below = replace(below, lead=value)
        return below
    if node.op.name == "tanh":
        inner = node.operand(0)
        below = _behind(inner, trail, depth - 1) if inner is not None else None
        if below is not None and (below.cap is not None or below.masks):
            trail.miss(3, "the soft-cap stands behind the mask", node)
            return None
        return replace(below, cap=1.0) if below is not None else None
    for inner, step in _unmasked(node, trail):
        below = _behind(inner, trail, depth - 1)
        if below is None:
            continue
        if isinstance(step, Mask):
            return replace(below, masks=(*below.masks, step))
        if isinstance(step, Value):
            if below.masks or below.cap is not None or value.rank != 4:
                trail.miss(3, "a factor for each head or row stands behind a mask or a soft-cap", node)
                continue
            return replace(below, rows=(*below.rows, step))
        masks = tuple(mask.scaled(step) for mask in below.masks)
        if step > 0.0 and all(mask.fill <= ABSORBS for mask in masks):
            if below.cap is None:
                return replace(below, scale=below.scale * step, masks=masks)
            return replace(below, cap=below.cap * step, masks=masks)
        if below.cap is None and not masks:
            return replace(below, scale=below.scale * step)
        trail.miss(3, "the factor behind a mask or a soft-cap is not positive", node)
    trail.miss(2, "expected a scale, a mask or the product of queries and keys", node)
    return None


def _unmasked(node: Node, trail: Trail) -> Iterator[tuple[Value, Any]]:
    """The operand that may be scores, and the factor or mask that the node puts on them."""
    factor = factor_of(node)
    if factor is not None:
        yield factor
    elif node.op.name == "mul":
        for scores, rows in both(node):
            if rows.shape is not None and rows.shape[-1:] == (1,) and not widens(rows, scores):
                yield scores, rows
    elif node.op.name == "add":
        for scores, mask in both(node):
            yield scores, Mask("add", mask, scores)
    elif node.op.name == "sub":
        minuend, subtrahend = node.operand(0), node.operand(1)
        if minuend is not None and subtrahend is not None:
            yield minuend, Mask("add", subtrahend, minuend, factor=-1.0)
    elif node.op.name in ("max", "clip"):  # no score falls below the lowest float
        for index in (0, 1):
            floored, number = node.operand(index), scalar(node.operand(1 - index))
            if floored is not None and number is not None and number <= ABSORBS and node.operand(2) is None:
                yield floored, Mask("floor", floored, floored, number)
    elif node.op.name == "where":
        condition, one, two = node.operands
        for inner, fill, kind in ((one, two, "keep"), (two, one, "drop")):
            number = scalar(fill)
            if inner is not None and condition is not None and number is not None and number <= ABSORBS:
                yield inner, Mask(kind, condition, inner, number)
            elif number is not None:
                trail.miss(3, f"masked scores become {number:g}; expected -inf or the lowest float", node)


def unscaled(value: Value, reader: Node) -> tuple[Value, float]:
    """(x, s) of a value s x that only `reader` reads."""
    total = 1.0
    while (node := value.producer) is not None and only_reader(value) is reader:
        found = factor_of(node)
        if found is None:
            break
        value, reader, total = found[0], node, total * found[1]
    return value, total
