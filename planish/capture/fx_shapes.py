"""Converters of torch ops that move elements or make tensors: views, joins, cuts, factories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planish.capture.fx_builder import WHOLE, Builder, Size
from planish.capture.fx_table import Made, aten
from planish.ir.graph import Value
from planish.ir.types import is_float

# -- views -----------------------------------------------------------------------------------------


@aten("view.default", "_unsafe_view.default", "reshape.default", "view_copy.default", "_reshape_copy.default")
def _view(b: Builder, x: Value, size: Sequence[int | Size] | None = None, shape: Sequence[Any] | None = None) -> Made:
    return b.regroup(x, b.out.shape or (), list(size if size is not None else shape or ()))


@aten("unflatten.int", "flatten.using_ints")
def _unflatten(
    b: Builder, x: Value, dim: int = 0, sizes: Sequence[Any] = (), start_dim: int = 0, end_dim: int = -1
) -> Made:
    return b.regroup(x, b.out.shape or ())


@aten("unsqueeze.default", "unsqueeze_copy.default")
def _unsqueeze(b: Builder, x: Value, dim: int) -> Made:
    return b.unsqueeze(x, b.axis(dim, b.rank(x) + 1))


@aten("squeeze.default", "squeeze.dim", "squeeze.dims", "squeeze_copy.dims", "squeeze_copy.dim")
def _squeeze(b: Builder, x: Value, dim: int | Sequence[int] | None = None) -> Made:
    shape = b.shape(x)
    asked = range(len(shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    axes = sorted({b.axis(a, len(shape)) for a in asked}) if shape else []
    return b.squeeze(x, *(a for a in axes if shape[a] == 1))


@aten("transpose.int", "transpose_copy.int", "swapaxes.default", "swapdims.default")
def _transpose(b: Builder, x: Value, dim0: int = 0, dim1: int = 0, axis0: int = 0, axis1: int = 0) -> Made:
    rank = b.rank(x)
    if not rank:
        return x
    one, two = b.axis(dim0 or axis0, rank), b.axis(dim1 or axis1, rank)
    perm = list(range(rank))
    perm[one], perm[two] = two, one
    return b.transpose(x, perm)


@aten("t.default", "numpy_T.default", "mT.default", "t_copy.default", "adjoint.default")
def _t(b: Builder, x: Value) -> Made:
    rank = b.rank(x)
    return b.transpose(x, [*range(rank - 2), rank - 1, rank - 2]) if rank == 2 or b.out.rank != 2 else None


@aten("permute.default", "permute_copy.default")
def _permute(b: Builder, x: Value, dims: Sequence[int]) -> Made:
    return b.transpose(x, [b.axis(d, len(dims)) for d in dims])


@aten("movedim.int", "movedim.intlist", "moveaxis.int", "moveaxis.intlist")
def _movedim(b: Builder, x: Value, source: int | Sequence[int], destination: int | Sequence[int]) -> Made:
    rank = b.rank(x)
    taken = [b.axis(a, rank) for a in ([source] if isinstance(source, int) else source)]
    places = [b.axis(a, rank) for a in ([destination] if isinstance(destination, int) else destination)]
    perm: list[int | None] = [None] * rank
    for axis, place in zip(taken, places, strict=True):
        perm[place] = axis
    rest = iter(a for a in range(rank) if a not in taken)
    return b.transpose(x, [next(rest) if a is None else a for a in perm])


@aten("expand.default", "expand_copy.default", "broadcast_to.default")
def _expand(b: Builder, x: Value, size: Sequence[int | Size]) -> Made:
    shape = b.out.shape or ()
    return b.expand(x, [d if isinstance(d, int) else s for d, s in zip(shape, size, strict=True)])


@aten("select.int", "select_copy.int")
def _select(b: Builder, x: Value, dim: int, index: int | Size) -> Made:
    return b.pick(x, b.axis(dim, b.rank(x)), index)


@aten("slice.Tensor", "slice_copy.Tensor")
def _slice(b: Builder, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Made:
    axis = b.axis(dim, b.rank(x))
    return b.slice(x, axis, 0 if start is None else start, WHOLE if end is None else end, step)


@aten("narrow.default")
def _narrow(b: Builder, x: Value, dim: int, start: int | Size, length: int | Size) -> Made:
    if isinstance(start, Size) or isinstance(length, Size) or start < 0:
        return None
    return b.slice(x, b.axis(dim, b.rank(x)), start, start + length)


@aten(
    "split.Tensor", "split_with_sizes.default", "chunk.default", "tensor_split.sections", "split.sizes",
    "split_with_sizes_copy.default", "split_copy.Tensor", "tensor_split.indices", "unsafe_split.Tensor",
    "unsafe_chunk.default",
)  # fmt: skip
def _split(
    b: Builder, x: Value, split_size: Any = None, split_sizes: Any = None, chunks: Any = None, sections: Any = None,
    indices: Any = None, dim: int = 0,
) -> Made:  # fmt: skip
    axis = b.axis(dim, b.rank(x))
    sizes = tuple(t.shape[axis] for t in b.types)  # type: ignore[union-attr, index]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return (x,) if len(sizes) == 1 else b.results("split", (x,), {"axis": axis, "sizes": sizes})


@aten("unbind.int", "unbind_copy.int")
def _unbind(b: Builder, x: Value, dim: int = 0) -> Made:
    axis = b.axis(dim, b.rank(x))
    return tuple(b.pick(x, axis, index) for index in range(len(b.types)))


# -- joins -----------------------------------------------------------------------------------------


@aten("cat.default", "concat.default", "concatenate.default")
def _cat(b: Builder, tensors: Sequence[Value], dim: int = 0) -> Made:
    dtype, rank = b.out.dtype, b.out.rank
    parts = [b.cast(t, dtype) for t in tensors if b.rank(t) == rank]  # torch ignores empty vectors
    return parts[0] if len(parts) == 1 else b.op("concat", *parts, axis=b.axis(dim, rank or 0))


@aten("stack.default")
def _stack(b: Builder, tensors: Sequence[Value], dim: int = 0) -> Made:
    axis = b.axis(dim, b.out.rank or 0)
    parts = [b.unsqueeze(b.cast(t, b.out.dtype), axis) for t in tensors]
    return parts[0] if len(parts) == 1 else b.op("concat", *parts, axis=axis)


@aten("repeat.default", "tile.default")
def _repeat(b: Builder, x: Value, repeats: Any = None, dims: Any = None) -> Made:
    counts = list(repeats if repeats is not None else dims)
    rank = b.rank(x)
    counts = [1] * (rank - len(counts)) + counts
    x = b.unsqueeze(x, *range(len(counts) - rank))
    return x if counts == [1] * len(counts) else b.op("tile", x, b.ints(counts))


@aten("repeat_interleave.self_int")
def _repeat_interleave(b: Builder, x: Value, repeats: Any, dim: int | None = None, output_size: Any = None) -> Made:
    if not isinstance(repeats, int):
        return None
    if dim is None:
        x, dim = b.reshape(x, [-1]), 0
    axis = b.axis(dim, b.rank(x))
    if repeats == 1:
        return x
    wide: list[int | Size] = [-1] * (b.rank(x) + 1)
    wide[axis + 1] = repeats
    return b.regroup(b.expand(b.unsqueeze(x, axis + 1), wide), b.out.shape or ())


@aten("roll.default")
def _roll(b: Builder, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> Made:
    if len(dims) != len(shifts):
        return None
    for shift, dim in zip(shifts, dims, strict=True):
        axis = b.axis(dim, b.rank(x))
        size = b.shape(x)[axis]
        if not isinstance(size, int) or not isinstance(shift, int):
            return None
        cut = -shift % size if size else 0
        if cut:
            x = b.op("concat", b.slice(x, axis, cut, size), b.slice(x, axis, 0, cut), axis=axis)
    return x


@aten("flip.default")
def _flip(b: Builder, x: Value, dims: Sequence[int]) -> Made:
    axes = [b.axis(d, b.rank(x)) for d in dims]
    if not axes:
        return x
    many = [b.ints([number] * len(axes)) for number in (-1, -WHOLE)]
    return b.op("slice", x, *many, b.ints(axes), b.ints([-1] * len(axes)))


@aten("constant_pad_nd.default", "pad.default")
def _pad(b: Builder, x: Value, pad: Sequence[Any], value: Any = None, mode: str = "constant") -> Made:
    if any(isinstance(p, Size) for p in pad) or mode not in _PAD_MODES:
        return None
    rank, axes = b.rank(x), len(pad) // 2
    before, after = [0] * rank, [0] * rank
    for index in range(axes):
        before[rank - 1 - index], after[rank - 1 - index] = pad[2 * index], pad[2 * index + 1]
    if not any(pad):
        return x
    fill = None if _PAD_MODES[mode] != "constant" else b.like(value or 0, b.dtype(x))
    attributes: dict[str, Any] = {} if fill is not None else {"mode": _PAD_MODES[mode]}
    return b.op("pad", x, b.ints([*before, *after]), fill, **attributes)


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@aten("reflection_pad1d.default", "reflection_pad2d.default", "reflection_pad3d.default")
def _reflect(b: Builder, x: Value, padding: Sequence[Any]) -> Made:
    return _pad(b, x, padding, mode="reflect")


@aten("replication_pad1d.default", "replication_pad2d.default", "replication_pad3d.default")
def _replicate(b: Builder, x: Value, padding: Sequence[Any]) -> Made:
    return _pad(b, x, padding, mode="replicate")


@aten("pixel_shuffle.default")
def _pixel_shuffle(b: Builder, x: Value, upscale_factor: int) -> Made:
    shape, r = b.shape(x), upscale_factor
    if len(shape) != 4 or not all(isinstance(d, int) for d in shape):
        return None
    n, c, h, w = (int(d) for d in shape if isinstance(d, int))
    x = b.transpose(b.reshape(x, [n, c // r**2, r, r, h, w]), [0, 1, 4, 2, 5, 3])
    return b.reshape(x, [n, c // r**2, h * r, w * r])


@aten("pixel_unshuffle.default")
def _pixel_unshuffle(b: Builder, x: Value, downscale_factor: int) -> Made:
    shape, r = b.shape(x), downscale_factor
    if len(shape) != 4 or not all(isinstance(d, int) for d in shape):
        return None
    n, c, h, w = (int(d) for d in shape if isinstance(d, int))
    x = b.transpose(b.reshape(x, [n, c, h // r, r, w // r, r]), [0, 1, 3, 5, 2, 4])
    return b.reshape(x, [n, c * r**2, h // r, w // r])


@aten("channel_shuffle.default", "native_channel_shuffle.default")
def _channel_shuffle(b: Builder, x: Value, groups: int) -> Made:
    shape = b.shape(x)
    if not all(isinstance(d, int) for d in shape):
        return None
    n, c, *rest = (int(d) for d in shape if isinstance(d, int))
    perm = [0, 2, 1, *range(3, len(shape) + 1)]
    return b.reshape(b.transpose(b.reshape(x, [n, groups, c // groups, *rest]), perm), [n, c, *rest])


@aten("tril.default")
def _tril(b: Builder, x: Value, diagonal: int = 0) -> Made:
    return b.op("trilu", x, b.item(diagonal) if diagonal else None, upper=False)


@aten("triu.default")
def _triu(b: Builder, x: Value, diagonal: int = 0) -> Made:
    return b.op("trilu", x, b.item(diagonal) if diagonal else None)


@aten("meshgrid.indexing", "meshgrid.default")
def _meshgrid(b: Builder, tensors: Sequence[Value], indexing: str = "ij") -> Made:
    if any(b.rank(t) > 1 for t in tensors):
        return None
    count = len(tensors)
    places = [1, 0, *range(2, count)] if indexing == "xy" and count > 1 else list(range(count))
    sizes: list[int | Size] = [1] * count
    for tensor, place in zip(tensors, places, strict=True):
        sizes[place] = b.sizes(tensor)[0] if b.rank(tensor) else 1
    grids = []
    for tensor, place in zip(tensors, places, strict=True):
        grid = b.reshape(tensor, [-1 if axis == place else 1 for axis in range(count)])
        grids.append(b.expand(grid, sizes))
    return tuple(grids)


# -- factories -------------------------------------------------------------------------------------


@aten("arange.default", "arange.start", "arange.start_step")
def _arange(b: Builder, end: Any, start: Any = 0, step: Any = 1, dtype: Any = None) -> Made:
    if any(isinstance(n, float) for n in (start, end, step)) and not is_float(b.out.dtype):
        return None
    return b.op("range", *(b.like(n, b.out.dtype) for n in (start, end, step)))


def _filled(b: Builder, sizes: Sequence[int | Size] | None, x: Value | None, number: Any) -> Made:
    shape = b.out.shape or ()
    if sizes is None and x is not None and not all(isinstance(d, int) for d in shape):
        dims = b.sizes(x)
    else:
        dims = [d if isinstance(d, int) else s for d, s in zip(shape, sizes or shape, strict=True)]  # type: ignore[misc]
    if isinstance(number, Value | Size):
        filled = b.like(number, b.out.dtype)
        return b.op("expand", b.reshape(filled, []), b.ints(dims)) if dims else filled
    return b.filled(dims, number, b.out.dtype) if dims else b.scalar(number, b.out.dtype)


@aten("full.default", "full_like.default", "new_full.default")
def _full(b: Builder, fill_value: Any, size: Any = None, x: Any = None, dtype: Any = None) -> Made:
    return _filled(b, size, x, fill_value)


@aten("zeros.default", "zeros_like.default", "new_zeros.default", "empty.memory_format", "empty_like.default",
      "new_empty.default", "empty_permuted.default")  # fmt: skip
def _zeros(b: Builder, size: Any = None, x: Any = None, dtype: Any = None, physical_layout: Any = None) -> Made:
    return _filled(b, size, x, 0)


@aten("ones.default", "ones_like.default", "new_ones.default")
def _ones(b: Builder, size: Any = None, x: Any = None, dtype: Any = None) -> Made:
    return _filled(b, size, x, 1)


@aten("scalar_tensor.default")
def _scalar_tensor(b: Builder, s: Any, dtype: Any = None) -> Made:
    return b.like(s, b.out.dtype)


@aten("fill.Scalar", "fill.Tensor")
def _fill(b: Builder, x: Value, value: Any) -> Made:
    return _filled(b, None, x, value)


@aten("copy.default")
def _copy(b: Builder, x: Value, src: Value) -> Made:
    return b.expand(b.cast(src, b.dtype(x)), [d if isinstance(d, int) else -1 for d in b.shape(x)])
