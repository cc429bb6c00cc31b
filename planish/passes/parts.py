"""Reading halves and pairs: which channels of a tensor another one holds, for `raise_rope`."""

from __future__ import annotations

from dataclasses import dataclass

from planish.ir.graph import Node, Value
from planish.ir.shapes import static_ints
from planish.passes.match import attribute, both, is_op, origin, same, scalar

VIEWS = frozenset({"slice", "unsqueeze", "squeeze", "reshape", "transpose"})


@dataclass(frozen=True)
class Part:
    """Channels `start`, `start + step`, .. (`count` of them) of the last axis of `whole`.

    `paired`: `whole` holds them as [.., d/2, 2].
    """

    whole: Value
    start: int
    step: int
    count: int
    paired: bool = False


def alike(one: Value, two: Value, depth: int = 3) -> bool:
    """True for one value, or for two that are the same slices or views of one."""
    if same(one, two) or depth == 0:
        return depth > 0
    first, second = origin(one).producer, origin(two).producer
    if first is None or second is None or first.op is not second.op or first.op.name not in VIEWS:
        return False
    if first.attributes != second.attributes or len(first.operands) != len(second.operands):
        return False
    whole, other = first.operand(0), second.operand(0)
    numbers = zip(first.operands[1:], second.operands[1:], strict=True)
    if any(a is not b and (static_ints(a) is None or static_ints(a) != static_ints(b)) for a, b in numbers):
        return False
    return whole is not None and other is not None and alike(whole, other, depth - 1)


def last_dim(value: Value) -> int | None:
    dim = value.shape[-1] if value.shape else None
    return dim if isinstance(dim, int) else None


def part_of(value: Value) -> Part | None:
    """The channels that a slice, a piece of a split or a look-up along the last axis takes."""
    value = origin(value)
    node = value.producer
    if node is None:
        return None
    whole = node.operand(0)
    size = last_dim(whole) if whole is not None else None
    if whole is None or size is None or whole.rank is None:
        return None
    match node.op.name:
        case "slice":
            return _sliced(node, whole, size)
        case "split":
            if attribute(node, "axis") not in (-1, whole.rank - 1):
                return None
            sizes = [last_dim(r) for r in node.results]
            index = node.results.index(value)
            if any(s is None for s in sizes):
                return None
            return Part(whole, sum(s or 0 for s in sizes[:index]), 1, sizes[index] or 0)
        case "reshape" | "squeeze":  # a piece [.., d/2, 1] or [.., 1, d/2] of pairs that lost its axis of one
            return _of_pairs(whole, value)
        case "gather":
            return _of_pairs(value, value)
    return None


def _sliced(node: Node, whole: Value, size: int) -> Part | None:
    bounds = [static_ints(node.operand(i)) if node.operand(i) is not None else None for i in range(1, 5)]
    starts, ends, axes, steps = bounds
    assert whole.rank is not None
    if starts is None or ends is None or len(starts) != 1 or (node.operand(3) is not None and axes is None):
        return None
    if node.operand(4) is not None and steps is None:
        return None
    axis, step = (axes or [0])[0], (steps or [1])[0]
    if axis not in (-1, whole.rank - 1) or step < 1:
        return None
    chosen = range(*slice(starts[0], min(ends[0], size), step).indices(size))
    return Part(whole, chosen.start, step, len(chosen))


def _of_pairs(value: Value, result: Value) -> Part | None:
    """x[.., i::2] as element i of the pairs reshape(x, [.., d/2, 2])."""
    node = origin(value).producer
    if node is None:
        return None
    pairs = node.operand(0)
    index: int | None = None
    if node.op.name == "gather" and pairs is not None and pairs.rank is not None:
        found = static_ints(node.operand(1))
        if attribute(node, "axis") in (-1, pairs.rank - 1) and found is not None and len(found) == 1:
            index = found[0] % 2
    elif node.op.name in ("slice", "split"):
        part = part_of(value)
        if part is not None and part.count == 1:
            index = part.start
    if index is None or pairs is None or last_dim(pairs) != 2 or not is_op(origin(pairs), "reshape"):
        return None
    split = origin(pairs)
    if split.shape is None or result.shape != split.shape[:-1]:
        return None
    count = last_dim(result)
    inner = unpaired(split)
    if count is None:
        return None
    return Part(split if inner is None else inner, index, 2, count, paired=inner is None)


def unpaired(pairs: Value) -> Value | None:
    """x [.., d] of pairs reshape(x, [.., d/2, 2])."""
    inner = pairs.producer.operand(0) if pairs.producer is not None else None
    size = last_dim(inner) if inner is not None else None
    if inner is None or inner.shape is None or size is None:
        return None
    return inner if pairs.shape == (*inner.shape[:-1], size // 2, 2) else None


def negated(value: Value) -> Value | None:
    node = origin(value).producer
    if node is None:
        return None
    if node.op.name == "neg":
        return node.operand(0)
    if node.op.name == "mul":
        for x, number in both(node):
            if scalar(number) == -1.0:
                return x
    return None


def joined_of(value: Value) -> tuple[Value, Value, bool] | None:
    """(a, b, interleaved): two tensors set one behind the other along the last axis, or channel by channel."""
    node = origin(value).producer
    if node is None:
        return None
    interleaved = node.op.name in ("reshape", "flatten")
    if interleaved:
        inner = node.operand(0)
        stacked = origin(inner) if inner is not None else None
        if stacked is None or not is_op(stacked, "concat") or stacked.shape is None or value.shape is None:
            return None
        if stacked.shape[-1] != 2 or value.shape[:-1] != stacked.shape[:-2]:
            return None
        node = stacked.producer
    if node is None or node.op.name != "concat" or len(node.operands) != 2 or node.result.rank is None:
        return None
    if attribute(node, "axis") not in (-1, node.result.rank - 1):
        return None
    one, two = node.operands
    if one is None or two is None or last_dim(one) is None or last_dim(one) != last_dim(two):
        return None
    if interleaved:
        one, two = _without_last(one), _without_last(two)
    return (one, two, interleaved) if one is not None and two is not None else None


def _without_last(value: Value) -> Value | None:
    """x of x[.., None]."""
    node = origin(value).producer
    inner = node.operand(0) if node is not None else None
    if node is None or inner is None or value.shape is None or inner.shape is None:
        return None
    if node.op.name not in ("unsqueeze", "reshape") or value.shape != (*inner.shape, 1):
        return None
    return inner


def whole_of(one: Value, two: Value, interleaved: bool) -> tuple[Value, bool, bool] | None:
    """(x, in order, as pairs): the tensor whose halves (even and odd channels) the two are."""
    first, second = part_of(one), part_of(two)
    if first is None or second is None or not same(first.whole, second.whole) or first.count != second.count:
        return None
    if not first.paired and 2 * first.count != last_dim(first.whole):
        return None
    places = [(p.start, p.step) for p in (first, second)]
    if places == [(0, 1), (first.count, 1)]:
        return first.whole, not interleaved, False
    return (first.whole, interleaved, first.paired) if places == [(0, 2), (1, 2)] else None
