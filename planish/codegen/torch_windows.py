"""What generated torch code calls for windows that slide over images with pads that ATen's own ops do not take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F


def windows(
    x: torch.Tensor, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[Any], dilations: Sequence[int],
    counts: Sequence[Any], fill: float,
) -> torch.Tensor:  # fmt: skip
    """The elements of each window on new last axes; `counts` windows an axis, `fill` outside of x.

    Args:
        x: [batch, channel, ...].
        pads: what stands before the first element of each axis.
    """
    spatial = len(kernel)
    for axis in range(spatial):
        place, reach = 2 + axis, dilations[axis] * (kernel[axis] - 1) + 1
        needed = (counts[axis] - 1) * strides[axis] + reach - pads[axis] - x.shape[place]
        amounts = [0, 0] * (x.dim() - 1 - place) + [pads[axis], max(needed, 0)]
        x = F.pad(x, amounts, value=fill).unfold(place, reach, strides[axis])[..., :: dilations[axis]]
        x = x.narrow(place, 0, counts[axis])
    return x


def _counts(
    sizes: Sequence[Any], kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int],
    dilations: Sequence[int], ceil_mode: bool, auto_pad: str,
) -> tuple[list[Any], list[Any], list[Any]]:  # fmt: skip
    """For each axis: the pads before and after it, the number of windows."""
    spatial = len(kernel)
    before, after, counts = [], [], []
    for axis, size in enumerate(sizes):
        reach = dilations[axis] * (kernel[axis] - 1) + 1
        if auto_pad.startswith("same"):
            count = -(-size // strides[axis])
            total = max((count - 1) * strides[axis] + reach - size, 0)
            first, last = total // 2, total - total // 2
            begin, end = (first, last) if auto_pad == "same_upper" else (last, first)
        else:
            begin, end = (pads[axis], pads[axis + spatial]) if auto_pad == "notset" else (0, 0)
            room = size + begin + end - reach
            count = room // strides[axis] + 1
            if ceil_mode and strides[axis] > 1:
                count = -(-room // strides[axis]) + 1
                if (count - 1) * strides[axis] >= size + begin:
                    count -= 1
        before.append(begin)
        after.append(end)
        counts.append(count)
    return before, after, counts


def max_pool(
    x: torch.Tensor, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int],
    ceil_mode: bool, auto_pad: str,
) -> torch.Tensor:  # fmt: skip
    """The largest element of each window, with pads of any kind."""
    lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    before, _, counts = _counts(x.shape[2:], kernel, strides, pads, dilations, ceil_mode, auto_pad)
    return windows(x, kernel, strides, before, dilations, counts, lowest).amax(list(range(-len(kernel), 0)))


def average_pool(
    x: torch.Tensor, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int],
    ceil_mode: bool, auto_pad: str, count_include_pad: bool,
) -> torch.Tensor:  # fmt: skip
    """The mean of each window, with pads of any kind; pads count with `count_include_pad`."""
    before, after, counts = _counts(x.shape[2:], kernel, strides, pads, dilations, ceil_mode, auto_pad)
    last = list(range(-len(kernel), 0))
    total = windows(x, kernel, strides, before, dilations, counts, 0.0).sum(last)
    inside = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if count_include_pad:
        pairs = [pad for pair in zip(reversed(before), reversed(after), strict=True) for pad in pair]
        inside, before = F.pad(inside, pairs, value=1.0), [0] * len(kernel)
    return total / windows(inside, kernel, strides, before, dilations, counts, 0.0).sum(last)


def conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, strides: Sequence[int],
    dilations: Sequence[int], groups: int, auto_pad: str,
) -> torch.Tensor:  # fmt: skip
    """A convolution that pads to keep the size: `auto_pad` same_upper or same_lower."""
    kernel, spatial = list(weight.shape[2:]), x.dim() - 2
    before, after, _ = _counts(x.shape[2:], kernel, strides, [0] * 2 * spatial, dilations, False, auto_pad)
    x = F.pad(x, [pad for pair in zip(reversed(before), reversed(after), strict=True) for pad in pair])
    function = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    return function(x, weight, bias, list(strides), [0] * spatial, list(dilations), groups)


def conv_transpose(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, strides: Sequence[int], groups: int,
    dilations: Sequence[int], cuts: Sequence[tuple[int, int]],
) -> torch.Tensor:  # fmt: skip
    """A transposed convolution of which, on each axis, (begin, size) is kept; zeros where it ends early."""
    spatial = x.dim() - 2
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
    y = function(x, weight, None, list(strides), 0, 0, groups, list(dilations))
    for axis, (begin, size) in enumerate(cuts):
        amounts = [0, 0] * (spatial - 1 - axis) + [-begin, size - (y.shape[axis + 2] - begin)]
        y = F.pad(y, amounts)
    return y if bias is None else y + bias.reshape(-1, *(1,) * spatial)
