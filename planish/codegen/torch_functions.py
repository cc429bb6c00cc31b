"""What generated torch code calls where ATen has no op for a row: plain functions of tensors.

They run eagerly, torch.export and torch.compile look into them, and a pickled module imports them again.
The equations are those of the rows of the op table (docs/ir.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F

from planish.ir.errors import PlanishError
from planish.ir.rounding import round_element

# -- the call --------------------------------------------------------------------------------------------


@torch.fx.node.has_side_effect
def check_input(x: Any, name: str, dims: Sequence[int | None], dtype: torch.dtype) -> None:
    """Refuse a tensor of another dtype, rank or size than the graph was captured with; None: any size.

    Args:
        dtype: what is expected: of a float, what `.to()` made of the module since. Under autocast any float is.
    """
    if not isinstance(x, torch.Tensor):
        raise PlanishError(f"input '{name}': expected a tensor, got {type(x).__name__}")
    if x.dim() != len(dims):
        raise PlanishError(f"input '{name}': wrong rank; expected {len(dims)}, got {x.dim()}")
    floats = x.is_floating_point() and dtype.is_floating_point
    if x.dtype != dtype and not (floats and torch.is_autocast_enabled(x.device.type)):
        raise PlanishError(
            f"input '{name}': wrong dtype; expected {dtype}, got {x.dtype}",
            hint=f"convert the input, or the whole module: module.to({x.dtype})"
            if floats
            else f"convert it to {dtype}",
        )
    for axis, size in enumerate(dims):
        if size is not None and x.shape[axis] != size:
            raise PlanishError(
                f"input '{name}': wrong size of dim {axis}; expected {size}, got {int(x.shape[axis])}",
                hint="capture the model with dynamic_shapes to leave the size open",
            )


@torch.fx.node.has_side_effect
def check_argument(given: Any, name: str, captured: Any) -> None:
    """Refuse an argument that is no tensor and differs from what the model was captured with."""
    plain = tuple(given) if isinstance(given, list) else given
    if plain is None or captured is None or isinstance(plain, bool) or isinstance(captured, bool):
        same = plain is captured
    else:
        same = plain == captured or str(plain) == captured
    if not same:
        raise PlanishError(
            f"argument '{name}': the model was captured with {captured!r}, got {given!r}",
            hint="capture the model with the other value",
        )


def given_or(x: torch.Tensor | None, default: torch.Tensor) -> torch.Tensor:
    """The argument, or its default."""
    return default if x is None else x


def leaves(structure: Any, name: str, count: int) -> list[Any]:
    """The leaves of a nested argument, in pytree order."""
    found = torch.utils._pytree.tree_leaves(structure)
    if len(found) != count:
        raise PlanishError(f"argument '{name}': expected {count} tensors in it, got {len(found)}")
    return found


def structure(spec: str, parts: Sequence[Any]) -> Any:
    """A nested result of its leaves; `spec` is the pytree's text."""
    return torch.utils._pytree.tree_unflatten(list(parts), torch.utils._pytree.treespec_loads(spec))


def return_type(name: str, parts: Sequence[Any]) -> Any:
    """A result that torch gives by the names of its parts: `torch.return_types.max`, say."""
    return getattr(torch.return_types, name)(list(parts))


# -- sizes -----------------------------------------------------------------------------------------------


def elements(x: torch.Tensor) -> list[int]:
    """The elements of an integer tensor whose values only the data tell."""
    return [int(x.reshape(-1)[index].item()) for index in range(x.numel())]


def tensor_of_sizes(*dims: Any, scalar: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Sizes as a tensor: a vector, or a scalar."""
    parts = [torch.scalar_tensor(size, dtype=dtype, device=device) for size in dims]
    if scalar:
        return parts[0]
    return torch.stack(parts) if parts else torch.empty(0, dtype=dtype, device=device)


def truncated_quotient(x: Any, y: Any) -> Any:
    """x / y towards zero."""
    return x // y if (x >= 0) == (y > 0) else -(-x // y)


def choose(condition: Any, x: Any, y: Any) -> Any:
    """x where the condition holds, else y; sizes."""
    return x if condition else y


def broadcast_to(x: torch.Tensor, sizes: Sequence[Any]) -> torch.Tensor:
    """x broadcast against a shape, where either may be 1 or have more axes."""
    rank = max(x.dim(), len(sizes))
    target = [1] * (rank - len(sizes)) + list(sizes)
    own = [1] * (rank - x.dim()) + list(x.shape)
    return x.expand([mine if wanted == 1 else wanted for mine, wanted in zip(own, target, strict=True)])


def reshape_by_copy(x: torch.Tensor, sizes: Sequence[Any], allowzero: bool) -> torch.Tensor:
    """A reshape to a computed shape, in which 0 copies a dim."""
    dims = [x.shape[axis] if size == 0 and not allowzero else size for axis, size in enumerate(sizes)]
    return x.reshape(dims)


# -- elementwise -----------------------------------------------------------------------------------------


def hard_sigmoid(x: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """clip(alpha x + beta, 0, 1)"""
    return (alpha * x + beta).clamp(0, 1)


def integer_pow(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """x ** exponent in the dtype of x, which is an integer; the exponent may be a float."""
    return torch.pow(x.to(torch.float64), exponent).to(x.dtype)


def prelu(x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """x for x >= 0, slope x below"""
    return torch.where(x < 0, slope * x, x)


def to_bits(x: torch.Tensor, bits: int, signed: bool) -> torch.Tensor:
    """The low bits of integers, one element a byte."""
    codes = x.to(torch.int64) & ((1 << bits) - 1)
    if not signed:
        return codes.to(torch.uint8)
    half = 1 << (bits - 1)
    return ((codes ^ half) - half).to(torch.int8)


def to_narrow(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """The nearest values of a float of 4 or 6 bits (ties to even), saturated, in float32."""
    return round_element(x.to(torch.float32), dtype)


def to_float8(x: torch.Tensor, dtype: torch.dtype, saturate: bool) -> torch.Tensor:
    """The nearest 8-bit floats; what is too large becomes the largest with `saturate`, else inf or NaN."""
    limit = torch.finfo(dtype).max
    if saturate:
        return x.clamp(-limit, limit).to(dtype)
    rounded = x.clamp(-limit, limit).to(dtype)
    over = x.abs() > limit * (1 + torch.finfo(dtype).eps / 4)
    lost = torch.where(over, torch.full_like(x, math.nan if dtype != torch.float8_e5m2 else math.inf), x)
    return torch.where(over, torch.copysign(lost, x).to(dtype), rounded)


# -- reductions -------------------------------------------------------------------------------


def integer_mean(x: torch.Tensor, axes: Sequence[int], keepdims: bool) -> torch.Tensor:
    """The mean of integers, towards zero."""
    count = math.prod(x.shape[axis] for axis in axes)
    return torch.div(x.sum(list(axes), keepdim=keepdims), count, rounding_mode="trunc").to(x.dtype)


def product_over(x: torch.Tensor, axes: Sequence[int], keepdims: bool) -> torch.Tensor:
    """The product over several axes."""
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, dim=axis, keepdim=keepdims, dtype=x.dtype)
    return x


# -- norms ------------------------------------------------------------------------------------------------


def rms_norm(
    x: torch.Tensor, gain: torch.Tensor | None, bias: torch.Tensor | None, axes: Sequence[int], eps: float,
    gain_offset: float,
) -> torch.Tensor:  # fmt: skip
    """x / sqrt(mean(x^2) + eps) * (gain + gain_offset) + bias; the mean over `axes`, in float32 at least."""
    own = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
    y = (own / torch.sqrt((own * own).mean(list(axes), keepdim=True) + eps)).to(x.dtype)
    if gain is not None:
        y = y * (gain + gain_offset) if gain_offset != 0.0 else y * gain
    elif gain_offset != 0.0:
        y = y * gain_offset
    return y if bias is None else y + bias


def layer_norm(
    x: torch.Tensor, gain: torch.Tensor | None, bias: torch.Tensor | None, axes: Sequence[int], eps: float
) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * gain + bias, gain and bias of any shape that broadcasts."""
    own = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
    centred = own - own.mean(list(axes), keepdim=True)
    y = (centred / torch.sqrt((centred * centred).mean(list(axes), keepdim=True) + eps)).to(x.dtype)
    y = y if gain is None else y * gain
    return y if bias is None else y + bias


# -- rotations --------------------------------------------------------------------------------------------


def hadamard(
    x: torch.Tensor, factors: Sequence[torch.Tensor], signs: torch.Tensor | None, axis: int, transpose: bool
) -> torch.Tensor:
    """(x * signs) H^T / sqrt(b) on blocks of b channels of an axis; transpose: (x H / sqrt(b)) * signs.

    Args:
        factors: matrices of +1 and -1 whose Kronecker product is H, [b, b].
    """
    x = x.movedim(axis, -1)
    if signs is not None and not transpose:
        x = x * signs
    orders = [factor.shape[0] for factor in factors]
    block = x.reshape(*x.shape[:-1], -1, *orders)
    for place, factor in enumerate(factors):
        turned = block.movedim(place - len(orders), -1) @ (factor if transpose else factor.t())
        block = turned.movedim(-1, place - len(orders))
    x = block.flatten(-1 - len(orders)) * math.prod(orders) ** -0.5
    if signs is not None and transpose:
        x = x * signs
    return x.movedim(-1, axis)


def reassemble(
    x: torch.Tensor, index: torch.Tensor, segment: torch.Tensor, weights: torch.Tensor, axis: int, count: int
) -> torch.Tensor:
    """y[.., c] = sum of weights[k] x[.., index[k]] over the k with segment[k] = c, along `axis`; c < count."""
    taken = x.index_select(axis, index) * weights.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1 - axis))
    shape = [*x.shape]
    shape[axis] = count
    return x.new_zeros(shape).index_add(axis, segment, taken)


def selective_scan(
    u: torch.Tensor, delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """h[t] = exp(delta a) h[t - 1] + delta b u,  y[t] = c . h[t] + skip u

    Args:
        u, delta: [batch, channel, time].
        a: [channel, state].
        b, c: [batch, state, time].
        skip: [channel].
    """
    state = u.new_zeros((u.shape[0], u.shape[1], a.shape[1]))
    rows = []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = torch.exp(step * a) * state + step * b[:, None, :, t] * u[:, :, t, None]
        rows.append((state * c[:, None, :, t]).sum(-1))
    y = torch.stack(rows, -1) if rows else torch.zeros_like(u)
    return y if skip is None else y + skip[:, None] * u


# -- positions --------------------------------------------------------------------------------------------


def count_from(start: torch.Tensor, limit: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """start, start + delta, ... up to and without limit; scalars whose values only the data tell."""
    count = max(math.ceil((limit.item() - start.item()) / delta.item()), 0)
    steps = torch.arange(count, device=start.device)
    return start.reshape(()) + steps.to(delta.dtype) * delta.reshape(())


def slice_backwards(x: torch.Tensor, axis: int, start: int, end: int, step: int) -> torch.Tensor:
    """x[start:end:step] along an axis for step < 0."""
    positions = range(*slice(start, end, step).indices(int(x.shape[axis])))
    index = torch.tensor(list(positions), dtype=torch.int64, device=x.device)
    return x.index_select(axis, index)


def slice_where(
    x: torch.Tensor, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] | None, steps: Sequence[int] | None
) -> torch.Tensor:
    """x[start:end:step] along several axes, bounds, axes and steps computed."""
    chosen = list(range(len(starts))) if axes is None else list(axes)
    for place, axis in enumerate(chosen):
        step = 1 if steps is None else steps[place]
        if step < 0:
            x = slice_backwards(x, axis, starts[place], ends[place], step)
        else:
            x = torch.ops.aten.slice.Tensor(x, axis, starts[place], ends[place], step)
    return x


def pad(x: torch.Tensor, pads: Sequence[Any], axes: Sequence[int], mode: str, value: Any = None) -> torch.Tensor:
    """Positions added at both ends of axes (cropped where a pad is negative).

    Args:
        pads: for each axis what comes before it, then for each axis what comes after.
        mode: constant, edge, reflect or wrap.
        value: of mode constant, 0 if absent.
    """
    for place, axis in enumerate(axes):
        before, after = pads[place], pads[place + len(axes)]
        size = x.shape[axis]
        if mode == "constant":
            amounts = [0, 0] * (x.dim() - 1 - axis) + [before, after]
            if isinstance(value, torch.Tensor):
                inside = F.pad(torch.ones_like(x, dtype=torch.bool), amounts, value=False)
                x = torch.where(inside, F.pad(x, amounts), value.reshape(()).to(x.dtype))
            else:
                x = F.pad(x, amounts, value=0 if value is None else value)
            continue
        index = torch.arange(-before, size + after, device=x.device)
        if mode == "edge":
            index = index.clamp(0, size - 1)
        elif mode == "wrap":
            index = index % size
        else:
            index = (size - 1) - ((index % max(2 * (size - 1), 1)) - (size - 1)).abs()
        x = x.index_select(axis, index)
    return x


def from_the_start(index: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    """Indices along an axis of x, those that count from its end counted from its start."""
    return torch.where(index < 0, index + x.shape[axis], index)


# -- experts ----------------------------------------------------------------------------------------------


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """x[t] @ weight[e] for the rows t of expert e, which end before offsets[e]; zero from the last offset on.

    Eagerly each expert is given its rows. In a traced graph, where their number is not known, every expert is
    given all rows.

    Args:
        x: [row, in].
        weight: [expert, in, out].
        offsets: [expert], ascending.
    """
    y = x.new_zeros((x.shape[0], weight.shape[2]))
    if not (torch.compiler.is_compiling() or torch.compiler.is_exporting()):
        start = 0
        for expert, end in enumerate(offsets.tolist()):
            y[start:end] = x[start:end] @ weight[expert]
            start = end
        return y
    row, before = torch.arange(x.shape[0], device=x.device), torch.zeros_like(offsets[0])
    for expert in range(weight.shape[0]):
        inside = (row >= before) & (row < offsets[expert])
        y = torch.where(inside[:, None], x @ weight[expert], y)
        before = offsets[expert]
    return y
