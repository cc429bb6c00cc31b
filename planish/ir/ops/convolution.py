"""Convolutions over 1 to 3 spatial axes.

    conv            y[b, m, i] = sum_{c, j} x[b, c, i + j] weight[m, c, j] + bias[m]
    conv_transpose  y[b, m, i + j] += x[b, c, i] weight[c, m, j];  + bias[m]

With groups, output channel m reads only the input channels of its own group; then the channels of a
group must stay together, and only scales pass. A depthwise conv (one channel a group, one output each)
keeps channels apart: a permutation joins input, kernel, bias and result, and a scale may ride on the
kernel or pass to the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node, Value
from planish.ir.ops import register
from planish.ir.ops.affine import (
    UNKNOWN_RANK,
    affine,
    bias_site,
    carry,
    check_inner,
    folds_shift,
    is_constant,
    wide,
)
from planish.ir.ops.align import attribute, numeric
from planish.ir.ops.base import Act, Axes, Block, Carry, Link, OpDef, Param, Port, Relation, Wide
from planish.ir.ops.labels import Site, integer, integers, like, tensor_type
from planish.ir.types import Dim, Type

PADDING = Block("a shift does not reach the zeros of its padding")
GROUPS = Block("the channels of a group must stay together")


def _repeats(node: Node, port: Port, axes: Axes) -> str | None:
    if integer(node, "groups") != 1 and (port in (1, 2) or axes == (1,)):
        return "its groups would change their size"
    return None


class Window:
    """The attributes of a conv with the defaults filled in, for `spatial` axes."""

    def __init__(self, node: Node, spatial: int) -> None:
        self.spatial = spatial
        self.strides = integers(node, "strides") or (1,) * spatial
        self.dilations = integers(node, "dilations") or (1,) * spatial
        self.pads = integers(node, "pads") or (0,) * (2 * spatial)
        self.auto_pad = str(attribute(node, "auto_pad") or "notset").lower()
        self.groups = integer(node, "groups")

    def span(self, kernel: int, axis: int) -> int:
        """The extent of a dilated kernel."""
        return self.dilations[axis] * (kernel - 1) + 1

    def padding(self, size: int, kernel: int, axis: int) -> tuple[int, int]:
        """(begin, end) of a conv's padding along a spatial axis."""
        if self.auto_pad in ("same_upper", "same_lower"):
            stride = self.strides[axis]
            total = max(0, (math.ceil(size / stride) - 1) * stride + self.span(kernel, axis) - size)
            small, large = total // 2, total - total // 2
            return (small, large) if self.auto_pad == "same_upper" else (large, small)
        if self.auto_pad == "valid":
            return 0, 0
        return self.pads[axis], self.pads[axis + self.spatial]

    @property
    def unpadded(self) -> bool:
        return self.auto_pad == "valid" or (self.auto_pad == "notset" and not any(self.pads))


def _shapes(node: Node) -> tuple[tuple[Dim, ...], tuple[Dim, ...]] | None:
    x, weight = node.operand(0), node.operand(1)
    if x is None or weight is None or x.shape is None or weight.shape is None:
        return None
    return x.shape, weight.shape


def _checked(node: Node) -> tuple[tuple[Dim, ...], tuple[Dim, ...]] | None:
    shapes = _shapes(node)
    if shapes is not None and (len(shapes[0]) != len(shapes[1]) or len(shapes[0]) < 3):
        names = " and ".join(str(v.type) for v in node.operands[:2] if v is not None)
        raise InvalidModelError(
            f"{node.op.name}: expected x and a weight of one rank, 3 or more",
            where=f"{node.op.name} of {names}",
        )
    return shapes


def _of_unknown_dims(x: Value | None) -> Sequence[Type]:
    """The type of x with none of its dims known."""
    own = tensor_type(x)
    return (like(x, None if own is None or own.shape is None else (None,) * len(own.shape)),)


def _conv_infer(node: Node) -> Sequence[Type]:
    shapes = _checked(node)
    x = node.operand(0)
    if shapes is None:
        return _of_unknown_dims(x)
    (batch, channels, *sizes), (outer, inner, *kernels) = shapes
    window = Window(node, len(sizes))
    check_inner(node, channels, inner * window.groups if isinstance(inner, int) else None)
    dims: list[Dim] = []
    for axis, (size, kernel) in enumerate(zip(sizes, kernels, strict=True)):
        if not isinstance(size, int) or not isinstance(kernel, int):
            keeps = window.strides[axis] == 1 and (
                window.auto_pad.startswith("same")
                or (isinstance(kernel, int) and sum(window.padding(1, kernel, axis)) == window.span(kernel, axis) - 1)
            )
            dims.append(size if keeps else None)
            continue
        room = size + sum(window.padding(size, kernel, axis)) - window.span(kernel, axis)
        dims.append(room // window.strides[axis] + 1)
    return (like(x, (batch, outer, *dims)),)


def _conv_evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, weight, bias = (*operands, None)[:3]
    window = Window(node, x.dim() - 2)
    pads = [window.padding(x.shape[i + 2], weight.shape[i + 2], i) for i in range(window.spatial)]
    if any(a != b for a, b in pads):
        x = torch.nn.functional.pad(x, [p for pair in reversed(pads) for p in pair])
        pads = [(0, 0)] * window.spatial
    function = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[window.spatial - 1]
    y = function(x, weight, bias, window.strides, tuple(a for a, _ in pads), window.dilations, window.groups)
    return (y,)


def _pointwise(node: Node, kernels: Sequence[Dim]) -> bool:
    window = Window(node, len(kernels))
    return all(k == 1 for k in kernels) and all(s == 1 for s in window.strides) and not any(window.pads)


def _conv_sites(node: Node) -> dict[Port, Site] | None:
    """The sites without groups."""
    shapes = _shapes(node)
    if shapes is None or node.result.shape is None:
        return None
    x, weight = shapes
    spatial = range(len(x) - 2)
    inside = [f"s{i}" for i in spatial]
    outside = inside if _pointwise(node, weight[2:]) else [f"t{i}" for i in spatial]
    kernels = [f"j{i}" for i in spatial]
    order = ("n", "k") if node.op.name == "conv" else ("k", "n")
    return {
        0: Site(0, ("b", "k", *inside), x),
        1: Site(1, (*order, *kernels), weight),
        -1: Site(-1, ("b", "n", *outside), node.result.shape),
    }


def _relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    refused = numeric(node, act, port)
    if refused is not None:
        return refused
    sites = _conv_sites(node)
    if sites is None:
        return UNKNOWN_RANK
    if act is Act.SHIFT and port == 0 and 1 in axes:
        if node.op.name != "conv":
            return Block("fewer taps reach the border, so a shift is no bias")
        if not Window(node, len(sites[0].dims) - 2).unpadded:
            return PADDING
        return folds_shift(node, axes, 1, 1, 2)
    if integer(node, "groups") == 1:
        return affine(node, sites, 2, act, port, axes)
    channels = {0: (1,), -1: (1,), 1: (0,), 2: (0,)}
    if act is Act.SHIFT and (port in (-1, 2)):
        return affine(node, sites, 2, act, port, axes)
    if port in (0, -1) and 1 not in axes:
        return affine(node, sites, 2, act, port, axes)
    if act is Act.SCALE and axes == (0, 1) and port in (0, -1) and node.operand(2) is None:
        if sites[0].dims[1] == integer(node, "groups") == sites[-1].dims[1]:
            return Carry((Link(~port, axes),))
    if axes != channels[port] or act is Act.SHIFT:
        return Block("with groups, only the channel axis by itself may change")
    return _grouped(node, sites, act, port, axes)


def _grouped(node: Node, sites: Mapping[Port, Site], act: Act, port: Port, axes: Axes) -> Relation:
    groups = integer(node, "groups")
    weight, channels, outer = sites[1].dims, sites[0].dims[1], sites[-1].dims[1]
    if not isinstance(channels, int) or not isinstance(outer, int) or not all(isinstance(d, int) for d in weight):
        return Block("with groups, it needs static dims")
    shape = tuple(d for d in weight if isinstance(d, int))
    depthwise = channels == groups == outer
    bias = bias_site(node, 2, outer)
    if isinstance(bias, Block):
        return bias
    if act is not Act.SCALE:
        if act is not Act.PERMUTE or not depthwise:
            return GROUPS
        others = [Link(p, channels_of) for p, channels_of in ((0, (1,)), (1, (0,)), (-1, (1,))) if p != port]
        return carry(*others, None if port == 2 or node.operand(2) is None else _bias_link(bias))
    # the kernel's axes, in a view where groups stand apart, that are the channels of x and of the result
    view = (groups, shape[0] // groups, *shape[1:])
    if node.op.name == "conv":
        of_x, of_result = Link(1, (0, 2), -1, view=view, apart=True), Link(1, (0,))
    else:
        of_x, of_result = Link(1, (0,), -1, apart=True), Link(1, (0, 2), view=view)
    own_bias = None if node.operand(2) is None else _bias_link(bias)
    if port in (0, -1):
        if not is_constant(node.operand(1)):
            return Block("its kernel is an activation")
        # a kernel takes both scales, the one of its input and the one of its result
        return Carry((of_x,)) if port == 0 else carry(of_result, own_bias)
    if port == 2:
        return carry(Link(-1, (1,)), of_result) if bias.grow is None else Block("its bias is no vector")
    reads_x = node.op.name != "conv"
    if reads_x:
        return Carry((Link(0, (1,), -1),))
    return carry(Link(-1, (1,)), own_bias)


def _bias_link(bias: Site) -> Link:
    return Link(bias.port, (0,), grow=bias.grow, neutral=bias.neutral)


def _conv_fold(node: Node, act: Act, port: Port, axes: Axes, t: np.ndarray) -> Mapping[int, np.ndarray]:
    weight = wide(node.operand(1))
    groups = integer(node, "groups")
    taps = weight.sum(axis=tuple(range(2, weight.ndim)))
    grouped = taps.reshape(groups, -1, taps.shape[1])
    moved = np.einsum("gmc,gc->gm", grouped, t.reshape(groups, -1)).reshape(-1)
    bias = node.operand(2)
    return {2: (wide(bias) if bias is not None else 0.0) - moved}


def _channels(node: Node) -> Sequence[tuple[Port, Axes]]:
    return [(0, (1,)), (-1, (1,))] if _shapes(node) is not None and is_constant(node.operand(1)) else []


_WINDOW: dict[str, Any] = {
    "strides": (),
    "pads": (),
    "dilations": (),
    "groups": 1,
    "auto_pad": "notset",
}

conv = register(
    OpDef(
        "conv",
        (Param("x"), Param("weight"), Param("bias", optional=True)),
        _conv_infer,
        _conv_evaluate,
        _relate,
        _channels,
        _conv_fold,
        family="contraction",
        summary="y[b, m, i] = sum_{c, j} x[b, c, stride i + dilation j] weight[m, c, j] + bias[m]",
        attributes=_WINDOW,
        repeats=_repeats,
    )
)


# -- conv_transpose ----------------------------------------------------------------------------------


def _transpose_window(node: Node, sizes: Sequence[Dim], kernels: Sequence[Dim]) -> list[tuple[Dim, int, int]]:
    """For each spatial axis: the result's dim, and what is cut off at its begin and end."""
    spatial = len(sizes)
    window = Window(node, spatial)
    extra = integers(node, "output_padding") or (0,) * spatial
    wanted = integers(node, "output_shape")[-spatial:] if integers(node, "output_shape") else None
    found: list[tuple[Dim, int, int]] = []
    for axis, (size, kernel) in enumerate(zip(sizes, kernels, strict=True)):
        if not isinstance(size, int) or not isinstance(kernel, int):
            found.append((None if wanted is None else wanted[axis], 0, 0))
            continue
        stride = window.strides[axis]
        full = stride * (size - 1) + extra[axis] + window.span(kernel, axis)
        if wanted is None and not window.auto_pad.startswith("same"):
            begin, end = (0, 0) if window.auto_pad == "valid" else (window.pads[axis], window.pads[axis + spatial])
            found.append((full - begin - end, begin, end))
            continue
        target = size * stride if wanted is None else wanted[axis]
        total = max(0, full - target) if wanted is None else full - target
        begin, end = total // 2, total - total // 2
        if window.auto_pad != "same_upper":
            begin, end = end, begin
        found.append((target, begin, end))
    return found


def _transpose_infer(node: Node) -> Sequence[Type]:
    shapes = _checked(node)
    x = node.operand(0)
    if shapes is None:
        return _of_unknown_dims(x)
    (batch, channels, *sizes), (inner, outer, *kernels) = shapes
    check_inner(node, channels, inner)
    dims = [d for d, _, _ in _transpose_window(node, sizes, kernels)]
    return (like(x, (batch, outer * integer(node, "groups") if isinstance(outer, int) else None, *dims)),)


def _transpose_evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, weight, bias = (*operands, None)[:3]
    spatial = x.dim() - 2
    window = Window(node, spatial)
    functional = torch.nn.functional
    function = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[spatial - 1]
    y = function(x, weight, None, window.strides, 0, 0, window.groups, window.dilations)
    sizes = _transpose_window(node, tuple(x.shape[2:]), tuple(weight.shape[2:]))
    for axis, (size, begin, _) in enumerate(sizes):
        assert isinstance(size, int)
        have = y.shape[axis + 2]
        pad = [0, 0] * (spatial - 1 - axis) + [-begin, size - (have - begin)]
        y = functional.pad(y, pad)
    if bias is not None:
        y = y + bias.reshape(-1, *(1,) * spatial)
    return (y,)


conv_transpose = register(
    OpDef(
        "conv_transpose",
        (Param("x"), Param("weight"), Param("bias", optional=True)),
        _transpose_infer,
        _transpose_evaluate,
        _relate,
        _channels,
        family="contraction",
        summary="y[b, m, stride i + dilation j] += x[b, c, i] weight[c, m, j]; + bias[m]",
        conservative={"shift@x": "a kernel of one tap and stride 1 would take a shift up"},
        attributes={**_WINDOW, "output_padding": (), "output_shape": ()},
        repeats=_repeats,
    )
)
