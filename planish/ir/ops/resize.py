"""Resizing of images: y[b, c, i, j] is a weighted mean of x[b, c, ..] whose weights do not depend on b and c.

The weights are torch's: `nearest` takes x[floor(i s)], `nearest_exact` x[floor((i + 1/2) s)], `linear` and `cubic`
(Keys, a = -3/4) interpolate between the centres of the pixels, or between their corners with `align_corners`, where
s = size of x / size of y, or 1 / scale where `scales` are given. Weights sum to 1: a shift passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node
from planish.ir.ops.align import attribute, numeric
from planish.ir.ops.base import Act, Axes, Block, Carry, Link, Param, Port, Relation, Wide
from planish.ir.ops.structural import NOT_DATA, operand_shape, structural_row, typed
from planish.ir.shapes import known_ints
from planish.ir.types import Dim, Type

TORCH = {
    ("nearest", 1): "upsample_nearest1d", ("nearest", 2): "upsample_nearest2d", ("nearest", 3): "upsample_nearest3d",
    ("nearest_exact", 1): "_upsample_nearest_exact1d", ("nearest_exact", 2): "_upsample_nearest_exact2d",
    ("nearest_exact", 3): "_upsample_nearest_exact3d", ("linear", 1): "upsample_linear1d",
    ("linear", 2): "upsample_bilinear2d", ("linear", 3): "upsample_trilinear3d", ("cubic", 2): "upsample_bicubic2d",
}  # fmt: skip


def torch_name(mode: str, spatial: int) -> str | None:
    """The name of the torch op (overload `vec`) that resizes `spatial` axes."""
    return TORCH.get((mode, spatial))


def _infer(node: Node) -> Sequence[Type]:
    shape, scales = operand_shape(node), attribute(node, "scales")
    if shape is None:
        return typed(node, None)
    spatial = len(shape) - 2
    if torch_name(str(attribute(node, "mode")), spatial) is None:
        raise InvalidModelError(f"resize: mode '{attribute(node, 'mode')}' of {spatial} axes", where=str(node))
    if (node.operand(1) is None) == (scales is None):
        raise InvalidModelError("resize: expected either sizes or scales", where=str(node))
    dims: Sequence[Dim]
    if scales is not None:
        dims = [math.floor(d * s) if isinstance(d, int) else None for d, s in zip(shape[2:], scales, strict=True)]
    else:
        dims = known_ints(node.operand(1)) or (None,) * spatial
    return typed(node, (*shape[:2], *dims))


def _evaluate(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    x, sizes = (*operands, None)[:2]
    mode, scales = str(attribute(node, "mode")), attribute(node, "scales")
    function = getattr(torch.ops.aten, str(torch_name(mode, x.dim() - 2))).vec
    given = None if sizes is None else [int(s) for s in sizes.reshape(-1).tolist()]
    corners = () if mode.startswith("nearest") else (bool(attribute(node, "align_corners")),)
    return (function(x, given, *corners, None if scales is None else [float(s) for s in scales]),)


def _relate(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    if port not in (0, -1):
        return NOT_DATA
    if any(axis > 1 for axis in axes):
        return Block("it interpolates along the axis")
    return numeric(node, act, port) or Carry((Link(-1 if port == 0 else 0, axes),))


structural_row(
    "resize",
    (Param("x"), Param("sizes", optional=True)),
    _infer,
    _evaluate,
    _relate,
    "x [batch, channel, ...] resampled to `sizes`, or by `scales`",
    {"mode": "nearest", "align_corners": False, "scales": None},
    family="resize",
)
