"""Converters of torch ops that reduce axes: sums, means, extremes, norms, softmax, pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planish.capture.fx_builder import Builder
from planish.capture.fx_table import Converter, Made, aten
from planish.ir.graph import Value


def _axes(b: Builder, x: Value, dim: Any) -> tuple[int, ...] | None:
    rank = b.rank(x)
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return None
    return tuple(sorted(b.axis(d, rank) for d in ([dim] if isinstance(dim, int) else dim)))


def _reduced(b: Builder, op: str, x: Value, dim: Any, keepdim: bool) -> Value:
    return b.op(op, x, axes=_axes(b, x, dim), keepdims=keepdim) if b.rank(x) else x


def _total(op: str) -> Converter:
    def converter(b: Builder, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Made:
        return _reduced(b, op, b.cast(x, b.out.dtype), dim, keepdim) if b.out.dtype not in ("c64", "c128") else None

    return converter


aten("sum.default", "sum.dim_IntList")(_total("reduce_sum"))
aten("mean.default", "mean.dim")(_total("reduce_mean"))
aten("prod.default", "prod.dim_int")(_total("reduce_prod"))


def _extreme(op: str) -> Converter:
    def converter(b: Builder, x: Value, dim: Any = None, keepdim: bool = False) -> Made:
        return None if b.dtype(x) == "bool" else _reduced(b, op, x, dim, keepdim)

    return converter


aten("amax.default", "max.default")(_extreme("reduce_max"))
aten("amin.default", "min.default")(_extreme("reduce_min"))


def _extreme_dim(op: str) -> Converter:
    def converter(b: Builder, x: Value, dim: int, keepdim: bool = False) -> Made:
        return None if b.dtype(x) == "bool" else (_reduced(b, op, x, dim, keepdim), None)

    return converter


aten("max.dim")(_extreme_dim("reduce_max"))
aten("min.dim")(_extreme_dim("reduce_min"))


def _truth(op: str) -> Converter:
    def converter(b: Builder, x: Value, dim: Any = None, keepdim: bool = False) -> Made:
        if not b.rank(x):
            return b.cast(x, "bool")
        return b.cast(_reduced(b, op, b.cast(b.cast(x, "bool"), "i64"), dim, keepdim), "bool")

    return converter


aten("any.default", "any.dim", "any.dims")(_truth("reduce_max"))
aten("all.default", "all.dim", "all.dims")(_truth("reduce_min"))


@aten("linalg_vector_norm.default")
def _vector_norm(b: Builder, x: Value, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Made:
    return _reduced(b, "reduce_l2", b.cast(x, b.out.dtype), dim, keepdim) if ord == 2 and b.rank(x) else None


@aten("norm.ScalarOpt_dim", "norm.Scalar")
def _norm(b: Builder, x: Value, p: Any = 2, dim: Any = None, keepdim: bool = False) -> Made:
    return _reduced(b, "reduce_l2", x, dim, keepdim) if p in (2, None) and b.rank(x) else None


@aten("softmax.int", "_softmax.default")
def _softmax(b: Builder, x: Value, dim: int, dtype: Any = None, half_to_float: bool = False) -> Made:
    return b.op("softmax", b.cast(x, b.out.dtype), axis=b.axis(dim, b.rank(x))) if b.rank(x) else None


@aten("log_softmax.int", "_log_softmax.default")
def _log_softmax(b: Builder, x: Value, dim: int, dtype: Any = None, half_to_float: bool = False) -> Made:
    return b.op("log_softmax", b.cast(x, b.out.dtype), axis=b.axis(dim, b.rank(x))) if b.rank(x) else None


# -- pools -----------------------------------------------------------------------------------------


def spread(numbers: Any, count: int) -> tuple[int, ...]:
    """One number for each spatial axis; a single one stands for all."""
    listed = [numbers] if isinstance(numbers, int) else list(numbers)
    return tuple(int(n) for n in (listed * count if len(listed) == 1 else listed))


def _pooled(b: Builder, op: str, x: Value, rank: int, attributes: dict[str, Any]) -> Value:
    bare = b.rank(x) == rank + 1
    y = b.op(op, b.unsqueeze(x, 0) if bare else x, **attributes)
    return b.squeeze(y, 0) if bare else y


def _window(rank: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> dict[str, Any]:
    kernel = spread(kernel_size, rank)
    pads = spread(padding, rank)
    window: dict[str, Any] = {"kernel": kernel, "strides": spread(stride, rank) if stride else kernel}
    if any(pads):
        window["pads"] = pads + pads
    if any(d != 1 for d in spread(dilation, rank)):
        window["dilations"] = spread(dilation, rank)
    if ceil_mode:
        window["ceil_mode"] = True
    return window


def _max_pool(rank: int, *, indices: bool) -> Converter:
    def converter(
        b: Builder, x: Value, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> Made:  # fmt: skip
        window = _window(rank, kernel_size, stride, padding, dilation, ceil_mode)
        y = _pooled(b, "max_pool", x, rank, window)
        return (y, None) if indices else y

    return converter


def _average_pool(rank: int) -> Converter:
    def converter(
        b: Builder, x: Value, kernel_size: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> Made:  # fmt: skip
        window = _window(rank, kernel_size, stride, padding, 1, ceil_mode)
        if count_include_pad and "pads" in window:
            window["count_include_pad"] = True
        return _pooled(b, "average_pool", x, rank, window)

    return converter


def _adaptive(rank: int, op: str, *, indices: bool = False) -> Converter:
    def converter(b: Builder, x: Value, output_size: Any) -> Made:
        sizes, shape = spread(output_size, rank), b.shape(x)[-rank:]
        if all(size == 1 for size in sizes):
            y = _pooled(b, f"global_{op}", x, rank, {})
        elif all(isinstance(d, int) and d % s == 0 for d, s in zip(shape, sizes, strict=True)):
            kernel = tuple(int(d) // s for d, s in zip(shape, sizes, strict=True) if isinstance(d, int))
            y = x if set(kernel) == {1} else _pooled(b, op, x, rank, {"kernel": kernel, "strides": kernel})
        else:
            return None
        return (y, None) if indices else y

    return converter


for _rank in (1, 2, 3):
    aten(f"max_pool{_rank}d.default")(_max_pool(_rank, indices=False))
    aten(f"max_pool{_rank}d_with_indices.default")(_max_pool(_rank, indices=True))
    aten(f"avg_pool{_rank}d.default")(_average_pool(_rank))
    aten(f"adaptive_avg_pool{_rank}d.default", f"_adaptive_avg_pool{_rank}d.default")(_adaptive(_rank, "average_pool"))
    aten(f"adaptive_max_pool{_rank}d.default")(_adaptive(_rank, "max_pool", indices=True))
