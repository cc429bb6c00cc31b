"""Converters of torch ops that look positions up or write to some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planish.capture.fx_builder import WHOLE, Builder, Size
from planish.capture.fx_table import Made, aten
from planish.ir.graph import Value


@aten("embedding.default")
def _embedding(b: Builder, weight: Value, indices: Value) -> Made:
    return b.op("embedding", weight, indices)


@aten("index_select.default")
def _index_select(b: Builder, x: Value, dim: int, index: Value) -> Made:
    return b.op("gather", x, index, axis=b.axis(dim, b.rank(x))) if b.rank(index) == 1 and b.rank(x) else None


@aten("index.Tensor", "_unsafe_index.Tensor")
def _index(b: Builder, x: Value, indices: Sequence[Value | None]) -> Made:
    """One tensor of positions is a gather; several on neighbouring axes a gather_nd; masks stay opaque."""
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if not given or any(i.dtype in ("bool", "u8") for _, i in given):
        return None
    first = given[0][0]
    if len(given) == 1:
        return b.op("gather", x, given[0][1], axis=first)
    if [axis for axis, _ in given] != list(range(first, first + len(given))):
        return None
    return b.op("gather_nd", x, *(i for _, i in given), axis=first)


@aten("gather.default")
def _gather(b: Builder, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> Made:
    axis = b.axis(dim, b.rank(x))
    return b.op("gather_elements", x, index, axis=axis) if b.rank(x) and b.rank(x) == b.rank(index) else None


@aten("scatter.src", "scatter.value")
def _scatter(b: Builder, x: Value, dim: int, index: Value, src: Value | None = None, value: Any = None) -> Made:
    if not b.rank(x) or b.rank(index) != b.rank(x) or b.dtype(x) in ("c64", "c128"):
        return None
    if src is None:
        src = b.expand(b.like(value, b.dtype(x)), b.sizes(index))
    elif b.shape(src) != b.shape(index) or None in b.shape(src):
        return None  # the part of src that index covers
    return b.op("scatter_elements", x, index, src, axis=b.axis(dim, b.rank(x)))


@aten("index_add.default")
def _index_add(b: Builder, x: Value, dim: int, index: Value, source: Value, alpha: Any = 1) -> Made:
    if not b.rank(x) or b.rank(index) != 1 or b.dtype(x) == "bool":
        return None
    return b.op("index_add", x, index, b.scaled(b.cast(source, b.dtype(x)), alpha), axis=b.axis(dim, b.rank(x)))


@aten("index_put.default")
def _index_put(b: Builder, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False) -> Made:
    """One vector of positions: added to is an index_add, written to a vector a scatter."""
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if len(given) != 1 or given[0][1].dtype in ("bool", "u8") or b.rank(given[0][1]) != 1:
        return None
    axis, index = given[0]
    sizes = b.sizes(x)
    sizes[axis] = b.sizes(index)[0]
    updates = b.expand(b.cast(values, b.dtype(x)), sizes)
    if accumulate and b.dtype(x) != "bool":
        return b.op("index_add", x, index, updates, axis=axis)
    return None if accumulate or b.rank(x) != 1 else b.op("scatter_elements", x, index, updates, axis=0)


@aten("topk.default")
def _topk(b: Builder, x: Value, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> Made:
    if not isinstance(k, int) or not b.rank(x):
        return None
    attributes: dict[str, Any] = {"k": k, "axis": b.axis(dim, b.rank(x))}
    attributes |= {name: flag for name, flag in (("largest", largest), ("sorted", sorted)) if not flag}
    return b.results("topk", (x,), attributes)


@aten("cumsum.default")
def _cumsum(b: Builder, x: Value, dim: int, dtype: Any = None) -> Made:
    return b.op("cumsum", b.cast(x, b.out.dtype), axis=b.axis(dim, b.rank(x))) if b.rank(x) else None


@aten("one_hot.default")
def _one_hot(b: Builder, x: Value, num_classes: int = -1) -> Made:
    if num_classes < 1:
        return None
    numbers = b.op("range", *(b.like(n, "i64") for n in (0, num_classes, 1)))
    return b.cast(b.op("equal", b.unsqueeze(x, b.rank(x)), numbers), "i64")


@aten("slice_scatter.default")
def _slice_scatter(
    b: Builder, x: Value, src: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Made:
    axis = b.axis(dim, b.rank(x))
    size = b.shape(x)[axis]
    start, end = 0 if start is None else start, WHOLE if end is None else end
    if step != 1 or isinstance(start, Size) or isinstance(end, Size):
        return None
    if not isinstance(size, int):
        return b.cast(src, b.dtype(x)) if start == 0 and end == WHOLE else None
    start, end, _ = slice(start, end).indices(size)
    return _written(b, x, src, axis, start, max(end, start))


def _written(b: Builder, x: Value, src: Value, axis: int, start: int, end: int) -> Value:
    """x with the positions from start to end along the axis replaced."""
    size = b.shape(x)[axis]
    assert isinstance(size, int)
    src = b.cast(src, b.dtype(x))
    around = [b.slice(x, axis, 0, start)] if start else []
    after = [b.slice(x, axis, end, size)] if end < size else []
    parts = [*around, src, *after]
    return src if len(parts) == 1 else b.op("concat", *parts, axis=axis)


@aten("select_scatter.default")
def _select_scatter(b: Builder, x: Value, src: Value, dim: int, index: Any) -> Made:
    axis = b.axis(dim, b.rank(x))
    size = b.shape(x)[axis]
    if isinstance(index, Size) or not isinstance(size, int):
        return None
    index = index + size if index < 0 else index
    return _written(b, x, b.unsqueeze(src, axis), axis, index, index + 1)


@aten("diff.default")
def _diff(
    b: Builder, x: Value, n: int = 1, dim: int = -1, prepend: Value | None = None, append: Value | None = None
) -> Made:
    if b.dtype(x) == "bool":
        return None
    axis = b.axis(dim, b.rank(x))
    parts = [p for p in (prepend, x, append) if p is not None]
    x = x if len(parts) == 1 else b.op("concat", *parts, axis=axis)
    for _ in range(n):
        x = b.op("sub", b.slice(x, axis, 1, WHOLE), b.slice(x, axis, 0, -1))
    return x
