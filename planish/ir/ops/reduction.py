"""Reductions along axes and over windows.

    y = sum_k x_k        commutes with every linear map of the other axes, the mean with shifts too
    y = max_k x_k        commutes with permutations, positive scales and shifts of the other axes

The order along a reduced axis does not show on the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node
from planish.ir.ops import register
from planish.ir.ops.align import attribute, conservative, numeric
from planish.ir.ops.base import Act, Axes, Block, Carry, Link, OpDef, Param, Port, Relation, Wide, normal_axis
from planish.ir.ops.elementwise import UNSIGNED, widened
from planish.ir.ops.structural import operand_shape, typed
from planish.ir.shapes import add, floor_divide
from planish.ir.types import Dim, Type

_SUM = frozenset({Act.PERMUTE, Act.SCALE, Act.ROTATE, Act.LINEAR})
_MEAN = _SUM | {Act.SHIFT}
_EXTREME = frozenset({Act.PERMUTE, Act.SCALE, Act.SHIFT})
_NORM = frozenset({Act.PERMUTE, Act.SCALE})
_PRODUCT = frozenset({Act.PERMUTE})

_REASONS = {
    Act.SCALE: "its result is not proportional to its operand",
    Act.SHIFT: "a shift of its operand is not one of its result",
    Act.ROTATE: "it takes each channel by itself and is not linear",
    Act.LINEAR: "it takes each channel by itself and is not linear",
}


def _passes(
    node: Node, act: Act, port: Port, axes: Axes, places: Axes, passing: frozenset[Act], positive: bool
) -> Relation:
    """The axes stay apart: they are `places` on the other side."""
    refusal = numeric(node, act, port)
    if refusal is not None:
        return refusal
    if act not in passing:
        return Block(_REASONS[act])
    link = Link(-1 if port >= 0 else 0, places)
    return Carry((link,), positive=positive and act is Act.SCALE)


# -- reductions along axes ------------------------------------------------------------------------


def _reduced(node: Node, rank: int) -> list[int]:
    axes = attribute(node, "axes")
    return list(range(rank)) if axes is None else sorted({normal_axis(a, rank) for a in axes})


def _infer_reduce(node: Node) -> Sequence[Type]:
    shape = operand_shape(node)
    if shape is None:
        everything = attribute(node, "axes") is None and not attribute(node, "keepdims")
        return typed(node, () if everything else None)
    reduced = _reduced(node, len(shape))
    if any(axis >= len(shape) for axis in reduced):
        raise InvalidModelError(f"{node.op.name}: axes {reduced} of a tensor of rank {len(shape)}", where=str(node))
    if attribute(node, "keepdims"):
        return typed(node, tuple(1 if axis in reduced else dim for axis, dim in enumerate(shape)))
    return typed(node, tuple(dim for axis, dim in enumerate(shape) if axis not in reduced))


def _reduce_relate(passing: frozenset[Act], *, positive: bool) -> Callable[[Node, Act, Port, Axes], Relation]:
    def relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
        shape = operand_shape(node)
        if shape is None:
            return Block("a rank is unknown")
        reduced = _reduced(node, len(shape))
        stay = [axis for axis in range(len(shape)) if axis not in reduced]
        if port >= 0:
            if all(axis in reduced for axis in axes):
                invariant = act is Act.PERMUTE or (act is Act.ROTATE and node.op.name == "reduce_l2")
                return Carry() if invariant else Block("it reduces the axis")
            if any(axis in reduced and shape[axis] != 1 for axis in axes):
                return Block("it reduces some of the axes")
            kept = tuple(axis for axis in axes if axis in stay)
            places = kept if attribute(node, "keepdims") else tuple(stay.index(axis) for axis in kept)
        else:
            own = [axis for axis in axes if axis in stay] if attribute(node, "keepdims") else [stay[a] for a in axes]
            places = tuple(own)
            if not places:
                return Carry() if act is Act.PERMUTE else Block("it reduces the axis")
        return _passes(node, act, port, axes, places, passing, positive)

    return relate


def _reduce_evaluator(function: Callable[..., torch.Tensor]) -> Callable[..., Sequence[Any]]:
    def evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
        (x,) = operands
        axes = _reduced(node, x.dim())
        keepdims = bool(attribute(node, "keepdims"))
        result = function(widened(x), axes, keepdims)
        return (result.to(x.dtype),)

    return evaluate


def _sum(x: torch.Tensor, axes: list[int], keepdims: bool) -> torch.Tensor:
    return torch.sum(x, dim=axes, keepdim=keepdims, dtype=x.dtype) if axes else x


def _mean(x: torch.Tensor, axes: list[int], keepdims: bool) -> torch.Tensor:
    if not axes:
        return x
    if x.is_floating_point():
        return torch.mean(x, dim=axes, keepdim=keepdims)
    count = math.prod(x.shape[axis] for axis in axes)
    return torch.div(torch.sum(x, dim=axes, keepdim=keepdims), count, rounding_mode="trunc")


def _extreme(x: torch.Tensor, axes: list[int], keepdims: bool, *, largest: bool) -> torch.Tensor:
    if not axes:
        return x
    if any(x.shape[axis] == 0 for axis in axes):
        if x.is_floating_point():
            empty: float = -math.inf if largest else math.inf
        elif x.dtype is torch.bool:
            empty = not largest
        else:
            empty = torch.iinfo(x.dtype).min if largest else torch.iinfo(x.dtype).max
        return torch.full_like(torch.sum(x, dim=axes, keepdim=keepdims), empty, dtype=x.dtype)
    return (torch.amax if largest else torch.amin)(x, dim=axes, keepdim=keepdims)


def _max(x: torch.Tensor, axes: list[int], keepdims: bool) -> torch.Tensor:
    return _extreme(x, axes, keepdims, largest=True)


def _min(x: torch.Tensor, axes: list[int], keepdims: bool) -> torch.Tensor:
    return _extreme(x, axes, keepdims, largest=False)


def _prod(x: torch.Tensor, axes: list[int], keepdims: bool) -> torch.Tensor:
    for axis in reversed(axes):
        x = torch.prod(x, dim=axis, keepdim=keepdims, dtype=x.dtype)
    return x


def _l2(x: torch.Tensor, axes: list[int], keepdims: bool) -> torch.Tensor:
    if not axes:
        return x.abs()
    if not x.is_floating_point():
        x = x.to(torch.float64)
    return torch.sqrt(torch.sum(x * x, dim=axes, keepdim=keepdims))


for _name, _function, _passing, _positive, _summary in (
    ("reduce_sum", _sum, _SUM, False, "y = sum of x over the axes"),
    ("reduce_mean", _mean, _MEAN, False, "y = mean of x over the axes"),
    ("reduce_max", _max, _EXTREME, True, "y = largest x over the axes"),
    ("reduce_min", _min, _EXTREME, True, "y = smallest x over the axes"),
    ("reduce_prod", _prod, _PRODUCT, False, "y = product of x over the axes"),
    ("reduce_l2", _l2, _NORM, True, "y = sqrt(sum of x^2 over the axes)"),
):
    register(
        OpDef(
            name=_name,
            params=(Param("x"),),
            infer=_infer_reduce,
            evaluate=_reduce_evaluator(_function),
            relate=_reduce_relate(_passing, positive=_positive),
            family="reduction",
            summary=_summary,
            attributes={"axes": None, "keepdims": True},
        )
    )


# -- pools ----------------------------------------------------------------------------------------


def _windows(node: Node, spatial: Sequence[Dim]) -> list[tuple[int, int, int, Dim, Dim, Dim]]:
    """For each spatial axis: kernel, stride, dilation, pad before, pad after, size of the result."""
    rank = len(spatial)
    kernel = tuple(int(k) for k in attribute(node, "kernel"))
    if len(kernel) != rank:
        raise InvalidModelError(f"{node.op.name}: kernel {kernel} for {rank} spatial axes", where=str(node))
    strides = attribute(node, "strides") or (1,) * rank
    dilations = attribute(node, "dilations") or (1,) * rank
    pads = attribute(node, "pads") or (0,) * (2 * rank)
    auto = str(attribute(node, "auto_pad"))
    result = []
    for axis, dim in enumerate(spatial):
        stride, dilation = int(strides[axis]), int(dilations[axis])
        reach = dilation * (kernel[axis] - 1) + 1
        before: Dim = 0
        after: Dim = 0
        if auto.startswith("same"):
            size = floor_divide(add(dim, stride - 1), stride)
            if isinstance(dim, int) and isinstance(size, int):
                total = max((size - 1) * stride + reach - dim, 0)
                small, large = total // 2, total - total // 2
                before, after = (small, large) if auto == "same_upper" else (large, small)
            else:
                before = after = None
        else:
            if auto == "notset":
                before, after = int(pads[axis]), int(pads[axis + rank])
            room = add(add(add(dim, before), after), -reach)
            if attribute(node, "ceil_mode") and stride > 1:
                size = None
                if isinstance(room, int) and isinstance(dim, int) and isinstance(before, int):
                    size = -(-room // stride) + 1
                    if (size - 1) * stride >= dim + before:
                        size -= 1  # a window that begins in the padding after the end is left out
            else:
                size = add(floor_divide(room, stride), 1)
        result.append((kernel[axis], stride, dilation, before, after, size))
    return result


def _infer_pool(node: Node) -> Sequence[Type]:
    shape = operand_shape(node)
    if shape is None:
        return typed(node, None)
    return typed(node, (*shape[:2], *(window[5] for window in _windows(node, shape[2:]))))


def _unfold(x: torch.Tensor, windows: Sequence[tuple[int, int, int, Dim, Dim, Dim]], fill: float) -> torch.Tensor:
    """The elements of each window on new last axes; outside of x they are `fill`."""
    for axis, (kernel, stride, dilation, before, _, size) in enumerate(windows):
        assert isinstance(before, int)
        assert isinstance(size, int)
        place = 2 + axis
        reach = dilation * (kernel - 1) + 1
        needed = (size - 1) * stride + reach - before - x.shape[place]
        amounts = [0, 0] * (x.dim() - 1 - place) + [before, max(needed, 0)]
        x = F.pad(x, amounts, value=fill) if before or needed > 0 else x
        x = x.unfold(place, reach, stride)[..., ::dilation]
        if x.shape[place] > size:
            x = x.narrow(place, 0, size)
    return x


def _evaluate_max_pool(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x = widened(operands[0])
    lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    windows = _windows(node, list(x.shape[2:]))
    result = torch.amax(_unfold(x, windows, lowest), dim=list(range(-len(windows), 0)))
    return (result.to(operands[0].dtype) if operands[0].dtype in UNSIGNED else result,)


def _evaluate_average_pool(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    (x,) = operands
    windows = _windows(node, list(x.shape[2:]))
    last = list(range(-len(windows), 0))
    total = torch.sum(_unfold(x, windows, 0.0), dim=last)
    inside = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype)
    if attribute(node, "count_include_pad"):
        for axis, (_, _, _, before, after, _) in enumerate(windows):
            assert isinstance(before, int)
            assert isinstance(after, int)
            amounts = [0, 0] * (len(windows) - 1 - axis) + [before, after]
            inside = F.pad(inside, amounts, value=1.0)
        windows = [(k, s, d, 0, 0, size) for k, s, d, _, _, size in windows]
    return (total / torch.sum(_unfold(inside, windows, 0.0), dim=last),)


def _counts_padding(node: Node) -> bool:
    """True if an average takes zeros of the padding in."""
    padded = any(attribute(node, "pads") or ()) or str(attribute(node, "auto_pad")).startswith("same")
    return bool(attribute(node, "count_include_pad")) and padded


def _relate_max_pool(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    if any(axis > 1 for axis in axes):
        return Block("it slides along the axis")
    return _passes(node, act, port, axes, axes, _EXTREME, True)


def _relate_average_pool(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    if any(axis > 1 for axis in axes):
        return Block("it slides along the axis")
    if act is Act.SHIFT and _counts_padding(node):
        return Block("the zeros that it pads with are not shifted")
    return _passes(node, act, port, axes, axes, _MEAN, False)


def _infer_global(node: Node) -> Sequence[Type]:
    shape = operand_shape(node)
    return typed(node, None if shape is None else (*shape[:2], *(1 for _ in shape[2:])))


def _global_evaluator(function: Callable[..., torch.Tensor]) -> Callable[..., Sequence[Any]]:
    def evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
        (x,) = operands
        return (function(x, list(range(2, x.dim())), True),)

    return evaluate


def _global_relate(passing: frozenset[Act], *, positive: bool) -> Callable[[Node, Act, Port, Axes], Relation]:
    def relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
        if all(axis > 1 for axis in axes):
            return Carry() if act is Act.PERMUTE else Block("it reduces the axis")
        if any(axis > 1 for axis in axes):
            return Block("it reduces some of the axes")
        return _passes(node, act, port, axes, axes, passing, positive)

    return relate


_POOL = {
    "kernel": (),
    "strides": (),
    "pads": (),
    "dilations": (),
    "ceil_mode": False,
    "count_include_pad": False,
    "auto_pad": "notset",
}
register(
    OpDef(
        name="max_pool",
        params=(Param("x"),),
        infer=_infer_pool,
        evaluate=_evaluate_max_pool,
        relate=_relate_max_pool,
        family="reduction",
        summary="y = largest x of each window; x is [batch, channel, ...]",
        attributes=_POOL,
    )
)
register(
    OpDef(
        name="average_pool",
        params=(Param("x"),),
        infer=_infer_pool,
        evaluate=_evaluate_average_pool,
        relate=_relate_average_pool,
        family="reduction",
        summary="y = mean of x over each window; x is [batch, channel, ...]",
        attributes=_POOL,
        conservative=conservative((Act.SHIFT,), (0, -1), "counted padding that no window reaches is not looked for"),
    )
)
register(
    OpDef(
        name="global_max_pool",
        params=(Param("x"),),
        infer=_infer_global,
        evaluate=_global_evaluator(_max),
        relate=_global_relate(_EXTREME, positive=True),
        family="reduction",
        summary="y = largest x of each channel; x is [batch, channel, ...]",
    )
)
register(
    OpDef(
        name="global_average_pool",
        params=(Param("x"),),
        infer=_infer_global,
        evaluate=_global_evaluator(_mean),
        relate=_global_relate(_MEAN, positive=False),
        family="reduction",
        summary="y = mean of x of each channel; x is [batch, channel, ...]",
    )
)
