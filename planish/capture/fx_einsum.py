"""einsum as transposes, products and sums, pair by pair from the left, as torch itself computes it.

With the labels of a pair split into batch (in both, kept), rows (only in the first), columns (only in the second)
and contracted ones (in both, not kept), a pair is one matmul of [batch, rows, contracted] and [batch, contracted,
columns]; without contracted labels it is a broadcast product.
"""

from __future__ import annotations

from collections.abc import Sequence

from planish.capture.fx_builder import Builder, Size
from planish.capture.fx_table import Made, aten
from planish.ir.graph import Value

Labelled = tuple[Value, str]
_SPARE = "".join(chr(c) for c in range(0x3B1, 0x3C9))  # stand for the axes of an ellipsis


@aten("einsum.default")
def _einsum(b: Builder, equation: str, tensors: Sequence[Value], path: Sequence[int] | None = None) -> Made:
    parsed = _labels(b, equation.replace(" ", ""), tensors)
    if parsed is None or b.out.dtype in ("c64", "c128", "bool"):
        return None
    terms, result = parsed
    if any(len(set(term)) != len(term) for term in terms):
        return None  # a diagonal
    sizes: dict[str, set[object]] = {}
    for tensor, term in zip(tensors, terms, strict=True):
        for label, dim in zip(term, b.shape(tensor), strict=True):
            sizes.setdefault(label, set()).add(dim)
    if any(len(found) > 1 for found in sizes.values()):
        return None  # axes of size 1 that are broadcast
    queue: list[Labelled] = [(b.cast(t, b.out.dtype), term) for t, term in zip(tensors, terms, strict=True)]
    while len(queue) > 1:
        one, two, *rest = queue
        kept = set(result).union(*(term for _, term in rest))
        queue = [_pair(b, one, two, kept), *rest]
    value, term = _without(b, queue[0], set(result))
    return b.transpose(value, [term.index(label) for label in result])


def _labels(b: Builder, equation: str, tensors: Sequence[Value]) -> tuple[list[str], str] | None:
    """The labels of each operand and of the result, with an ellipsis written out."""
    left, arrow, right = equation.partition("->")
    given = left.split(",")
    if len(given) != len(tensors):
        return None
    terms = []
    dots = ""
    for term, tensor in zip(given, tensors, strict=True):
        if "..." in term:
            count = b.rank(tensor) - (len(term) - 3)
            if count > len(_SPARE) or (dots and count != len(dots)):
                return None
            dots = _SPARE[:count]
            term = term.replace("...", dots)
        terms.append(term)
    if not arrow:
        letters = "".join(term for term in given).replace(".", "")
        right = "..." + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return terms, right.replace("...", dots)


def _without(b: Builder, labelled: Labelled, kept: set[str]) -> Labelled:
    """Summed over the labels that nothing needs."""
    value, term = labelled
    axes = tuple(axis for axis, label in enumerate(term) if label not in kept)
    if not axes:
        return labelled
    summed = b.op("reduce_sum", value, axes=axes, keepdims=False)
    return summed, "".join(label for label in term if label in kept)


def _pair(b: Builder, one: Labelled, two: Labelled, kept: set[str]) -> Labelled:
    one, two = _without(b, one, kept | set(two[1])), _without(b, two, kept | set(one[1]))
    (x, left), (y, right) = one, two
    contracted = [label for label in left if label in right and label not in kept]
    batch = [label for label in left if label in right and label in kept]
    rows, columns = [label for label in left if label not in right], [label for label in right if label not in left]
    if not contracted:
        order = [*batch, *rows, *columns]
        return b.op("mul", _spread(b, x, left, order), _spread(b, y, right, order)), "".join(order)
    sizes = dict(zip(left, b.sizes(x), strict=True)) | dict(zip(right, b.sizes(y), strict=True))
    groups = (batch, rows, contracted), (batch, contracted, columns)
    factors = []
    for value, term, parts in ((x, left, groups[0]), (y, right, groups[1])):
        value = b.transpose(value, [term.index(label) for part in parts for label in part])
        factors.append(_joined(b, value, parts[1:], len(batch), sizes))
    product = b.op("matmul", *factors)
    if len(rows) != 1 or len(columns) != 1:
        product = b.reshape(product, [sizes[label] for label in (*batch, *rows, *columns)])
    return product, "".join([*batch, *rows, *columns])


def _spread(b: Builder, value: Value, term: str, order: Sequence[str]) -> Value:
    """The axes in `order`, with axes of size 1 for the labels that it has not."""
    value = b.transpose(value, [term.index(label) for label in order if label in term])
    return b.unsqueeze(value, *(axis for axis, label in enumerate(order) if label not in term))


def _joined(
    b: Builder, value: Value, groups: Sequence[Sequence[str]], batch: int, sizes: dict[str, int | Size]
) -> Value:
    """Each group of axes after the batch as one axis: of size 1 for none."""
    if all(len(group) == 1 for group in groups):
        return value
    own = b.sizes(value)[:batch]
    dims: list[int | Size] = []
    for group in groups:
        numbers = [sizes[label] for label in group]
        total = 1
        for number in numbers:
            if isinstance(number, Size):
                return b.reshape(value, [*own, *_product(b, groups, sizes)])
            total *= number
        dims.append(total)
    return b.reshape(value, [*own, *dims])


def _product(b: Builder, groups: Sequence[Sequence[str]], sizes: dict[str, int | Size]) -> list[int | Size]:
    dims: list[int | Size] = []
    for group in groups:
        if len(group) == 1:
            dims.append(sizes[group[0]])
            continue
        whole = b.op("reduce_prod", b.ints([sizes[label] for label in group]), axes=(0,), keepdims=True)
        dims.append(Size(whole))
    return dims
