"""What a kernel's spec means, in float64 beside a radius: how far float32 arithmetic may be from it.

Written from the spec and the docstrings of planish/codegen/kernel_spec.py alone: it shares no line with the kernels or
with their eager references, and judges both. Every value carries a bound on its error (u = 2^-24, one rounding of
float32; n additions in any order: n u sum |terms|; first-order terms, doubled):

    sum, product       the errors of the operands as they propagate, and one rounding
    f(x)               |f(x +- r) - f(x)|, and F_ROUNDINGS roundings of |x| + |f(x)| for how f is computed
    norm               s = sum x^2: (K + 2) u s, and 2 sum |x| r; x / sqrt(s / K + eps): half of the relative error
    Hadamard           log2(block) + base roundings of the block's sum |x|, divided by sqrt(block)
    quantise           the ratio's error; a code may be any whose interval meets ratio +- error: exact, save at ties
    dot                integers: exact; floats: K u sum |a w|, and what the operands lose when they are rounded
    store              one rounding to the result's dtype

So integers must be equal except where a value lies within its error of a border between two codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from planish.codegen.kernel_spec import Kernel, Product, Step, Tensor, padded
from planish.ir.hadamard import hadamard

U = 2.0**-24
# half a step, relative; of bf16 a whole one, since Triton's interpreter cuts bits off where a GPU rounds
ROUND = {"f16": 2.0**-11, "bf16": 2.0**-7, "f32": 2.0**-24}
LEAST = {"f16": 2.0**-25, "bf16": 2.0**-126, "f32": 2.0**-126}  # half a step of the least numbers
LARGEST = {"f16": 65504.0, "bf16": 3.38e38, "f32": 3.4028235e38}
F_ROUNDINGS = 16
SECOND_ORDER = 2.0


@dataclass
class Near:
    """Float64 values and the radius within which float32 arithmetic keeps them; of codes, the least and the largest."""

    value: torch.Tensor
    radius: torch.Tensor
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None

    @staticmethod
    def exact(value: torch.Tensor) -> Near:
        wide = value.double()
        return Near(wide, torch.zeros_like(wide))

    def rounded(self, dtype: str) -> Near:
        """After one rounding to a float dtype."""
        size = self.value.abs() + self.radius
        return Near(self.value, self.radius + ROUND[dtype] * size + LEAST[dtype])


def _near(value: torch.Tensor, radius: torch.Tensor, roundings: float = 1.0) -> Near:
    return Near(value, radius + roundings * U * (value.abs() + radius))


# -- steps ---------------------------------------------------------------------------------------


def _function(x: Near, f: object, lipschitz: float) -> Near:
    y = f(x.value)  # type: ignore[operator]
    return Near(y, lipschitz * x.radius + F_ROUNDINGS * U * (x.value.abs() + y.abs()) + 1e-37)


FUNCTIONS = {  # name: (function, Lipschitz constant)
    "gelu": (torch.nn.functional.gelu, 1.13),
    "silu": (torch.nn.functional.silu, 1.1),
    "relu": (torch.relu, 1.0),
    "sigmoid": (torch.sigmoid, 0.25),
    "tanh": (torch.tanh, 1.0),
    "neg": (torch.neg, 1.0),
    "abs": (torch.abs, 1.0),
    "erf": (torch.erf, 1.13),
    "softplus": (torch.nn.functional.softplus, 1.0),
    "hard_swish": (torch.nn.functional.hardswish, 1.5),
}


def _binary(row: str, a: Near, b: Near) -> Near:
    match row:
        case "add":
            return _near(a.value + b.value, a.radius + b.radius)
        case "sub":
            return _near(a.value - b.value, a.radius + b.radius)
        case "mul":
            error = a.value.abs() * b.radius + b.value.abs() * a.radius + a.radius * b.radius
            return _near(a.value * b.value, error)
        case "div":
            y = a.value / b.value
            return _near(y, SECOND_ORDER * (a.radius + y.abs() * b.radius) / b.value.abs())
        case "max":
            return Near(torch.maximum(a.value, b.value), torch.maximum(a.radius, b.radius).expand(a.value.shape))
        case "min":
            return Near(torch.minimum(a.value, b.value), torch.minimum(a.radius, b.radius).expand(a.value.shape))
    raise NotImplementedError(row)


def _scaled(x: Near, gain: Near | None, bias: Near | None) -> Near:
    y = x if gain is None else _binary("mul", x, gain)
    return y if bias is None else _binary("add", y, bias)


def _rms(x: Near, gain: Near | None, bias: Near | None, eps: float) -> Near:
    columns = x.value.shape[-1]
    squares = (x.value**2).sum(-1, keepdim=True)
    error = (columns + 2) * U * squares + 2 * (x.value.abs() * x.radius).sum(-1, keepdim=True)
    error = error + (x.radius**2).sum(-1, keepdim=True)
    mean = squares / columns + eps
    relative = 0.5 * SECOND_ORDER * error / columns / mean + 4 * U
    factor = mean**-0.5
    y = x.value * factor
    return _scaled(_near(y, factor * x.radius + y.abs() * relative), gain, bias)


def _layer_norm(x: Near, gain: Near | None, bias: Near | None, eps: float) -> Near:
    columns = x.value.shape[-1]
    mean = x.value.mean(-1, keepdim=True)
    error = (columns + 2) * U * x.value.abs().mean(-1, keepdim=True) + x.radius.mean(-1, keepdim=True)
    centred = _near(x.value - mean, x.radius + error)
    return _rms(centred, gain, bias, eps)


def _hadamard(x: Near, signs: Near | None, dense: Near | None, block: int, transpose: bool) -> Near:
    """The dense factor is what the kernel is given, turned already where the transform is the inverse."""
    base = 1 if dense is None else len(dense.value)
    factor = torch.ones(1, 1, dtype=torch.float64) if dense is None else dense.value
    factor = factor.T.contiguous() if transpose else factor
    matrix = torch.kron(factor, torch.from_numpy(hadamard(block // base).astype(np.float64))) / block**0.5
    signed = x if signs is None or transpose else Near(x.value * signs.value, x.radius)
    blocks = signed.value.reshape(len(x.value), -1, block)
    y = (blocks @ (matrix if transpose else matrix.T)).reshape(x.value.shape)
    size = (blocks.abs() * (block.bit_length() + 2 * base + 2) * U).sum(-1, keepdim=True) / block**0.5
    own = signed.radius.reshape(blocks.shape).sum(-1, keepdim=True) / block**0.5
    radius = (size + own).expand(blocks.shape).reshape(x.value.shape)
    if signs is not None and transpose:
        y = y * signs.value
    return _near(y, radius, 2)


def _down(x: Near, weight: Near, dtype: str) -> Near:
    held = x.rounded(dtype)
    size = held.value.abs() @ weight.value.abs().T
    return Near(held.value @ weight.value.T, held.radius @ weight.value.abs().T + x.value.shape[-1] * U * size)


def _codes(ratio: torch.Tensor, error: torch.Tensor, zero: torch.Tensor | float, low: float, high: float) -> Near:
    ends = [((ratio + sign * error).round() + zero).clamp(low, high) for sign in (-1.0, 0.0, 1.0)]
    return Near(ends[1], torch.zeros_like(ratio), ends[0], ends[2])


def _by_scale(x: Near, scale: Near, zero: torch.Tensor | float, low: float, high: float) -> Near:
    ratio = x.value / scale.value
    error = SECOND_ORDER * (x.radius + ratio.abs() * scale.radius) / scale.value + 2 * U * ratio.abs()
    return _codes(ratio, error, zero, low, high)


def _range_scale(extreme: Near, levels: float) -> Near:
    """extreme / levels, 1 where there is nothing."""
    scale = extreme.value / levels
    none = extreme.value == 0
    radius = extreme.radius / levels + 2 * U * scale + 2.0**-126
    return Near(torch.where(none, 1.0, scale), torch.where(none, extreme.radius, radius))


def _token(x: Near, step: Step) -> tuple[Near, Near, Near]:
    o = dict(step.options)
    levels, low, high = float(o["levels"]), float(o["low"]), float(o["high"])
    bottom, top = x.value.amin(-1, keepdim=True), x.value.amax(-1, keepdim=True)
    error = x.radius.amax(-1, keepdim=True)
    if o["mode"] == "symmetric":
        scale = _range_scale(Near(torch.maximum(-bottom, top), error), levels)
        return _by_scale(x, scale, 0.0, low, high), scale, Near.exact(torch.zeros_like(bottom))
    if o["mode"] == "floor":
        floor = float(o["floor"])
        ends = [
            torch.floor(levels * floor / ((top + s * error).clamp(min=0.0) + floor) * (1 - s * 4 * U)).clamp(min=1.0)
            for s in (1.0, 0.0, -1.0)
        ]
        zero = Near(ends[1], torch.zeros_like(top), ends[0], ends[2])
        scale = Near(floor / ends[1], 2 * U * floor / ends[1])
    else:
        bottom, top = bottom.clamp(max=0.0), top.clamp(min=0.0)
        scale = _range_scale(_near(top - bottom, 2 * error), levels)
        ratio = -bottom / scale.value
        zero = _codes(
            ratio, (error + ratio * scale.radius) / scale.value * SECOND_ORDER + 2 * U * ratio, 0.0, 0.0, levels
        )
    codes = _by_scale(x, scale, zero.value + low, low, high)
    assert codes.low is not None and codes.high is not None and zero.low is not None and zero.high is not None
    unsure = zero.low != zero.high  # a row whose zero point lies on a border: nothing else of it is checked
    codes.low, codes.high = torch.where(unsure, low, codes.low), torch.where(unsure, high, codes.high)
    scale.radius = torch.where(unsure, scale.value / zero.low.clamp(min=1.0), scale.radius)
    moved = Near(zero.value + low, zero.radius, zero.low + low, zero.high + low)
    return codes, scale, moved


def _group(x: Near, step: Step) -> tuple[Near, Near]:
    o = dict(step.options)
    size, columns = int(o["group"]), x.value.shape[-1]
    pad = -columns % size
    value, radius = (torch.nn.functional.pad(t, (0, pad)).reshape(len(t), -1, size) for t in (x.value, x.radius))
    extreme = Near(value.abs().amax(-1, keepdim=True), radius.amax(-1, keepdim=True))
    scale = _range_scale(extreme, float(o["levels"]))
    codes = _by_scale(Near(value, radius), scale, 0.0, float(o["low"]), float(o["high"]))
    assert codes.low is not None and codes.high is not None
    parts = [t.reshape(len(t), -1)[:, :columns] for t in (codes.value, codes.radius, codes.low, codes.high)]
    return Near(*parts), Near(scale.value.squeeze(-1), scale.radius.squeeze(-1))


def run_steps(steps: Sequence[Step], locals_: dict[str, Near], dtype: str) -> None:
    """Apply steps to the locals, adding what they write."""
    for step in steps:
        o = dict(step.options)
        reads = [locals_[name] if name else None for name in step.reads] + [None] * 3
        x, a, b = reads[:3]
        assert x is not None
        made: tuple[Near, ...]
        match step.row:
            case "add" | "sub" | "mul" | "div" | "max" | "min":
                assert a is not None
                made = (_binary(step.row, x, a),)
            case "rms_norm":
                made = (_rms(x, a, b, float(o["eps"])),)
            case "layer_norm":
                made = (_layer_norm(x, a, b, float(o["eps"])),)
            case "hadamard":
                made = (_hadamard(x, a, b, int(o["block"]), bool(o["transpose"])),)
            case "gather":
                assert a is not None
                index = a.value.long()
                made = (Near(x.value[:, index], x.radius[:, index]),)
            case "reassemble":
                assert a is not None and b is not None
                index = a.value.long()
                terms = x.value[:, index] * b.value
                radius = (x.radius[:, index] * b.value.abs()).sum(1) + (len(index) + 1) * U * terms.abs().sum(1)
                made = (Near(terms.sum(1), radius),)
            case "down":
                assert a is not None
                made = (_down(x, a, dtype),)
            case "quantize_static":
                assert a is not None
                zero = 0.0 if b is None else b.value
                made = (_by_scale(x, a, zero, float(o["low"]), float(o["high"])),)
            case "quantize_token":
                made = _token(x, step)
            case "quantize_group":
                made = _group(x, step)
            case "gelu" if o.get("approximate") == "tanh":
                made = (_function(x, lambda t: torch.nn.functional.gelu(t, approximate="tanh"), 1.13),)
            case _:
                made = (_function(x, *FUNCTIONS[step.row]),)
        locals_.update({name: near for name, near in zip(step.writes, made, strict=False) if name})


# -- codes in memory -----------------------------------------------------------------------------


def unpacked(stored: torch.Tensor, bits: int, half: int, *, signed: bool = True) -> torch.Tensor:
    """Codes [.., K_pad] of bytes [.., K_pad * bits / 8]: code k of a span lies in byte k % half, plane k // half."""
    if bits == 8:
        return stored.double()
    planes = 8 // bits
    spans = stored.view(torch.uint8).long().reshape(*stored.shape[:-1], -1, half)
    codes = torch.stack([(spans >> (bits * p)) & ((1 << bits) - 1) for p in range(planes)], -2)
    codes = codes.reshape(*stored.shape[:-1], -1).double()
    return torch.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes) if signed else codes


def _spread(scale: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    """Scales [.., K / group] of groups as one for each column."""
    return scale.repeat_interleave(group, -1)[..., :columns]


def decoded(product: Product, given: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
    """The weight of a product, float64 [N, columns], from planish's Triton layout (containers/triton.py)."""
    w = product.weight
    codes = given[w.codes]
    if w.decoder == "float":
        return codes.double()[:, :columns]
    bits = codes.shape[1] * 8 // padded(columns)
    held = codes.double() if bits == 8 else unpacked(codes, bits, 8 * bits, signed=False) - (1 << (bits - 1))
    held = held[:, :columns]
    if w.zero and given[w.zero].is_floating_point():  # those of unsigned codes
        held = held + (1 << (bits - 1))

    def spread(name: str, cluster: int | None) -> torch.Tensor:
        part = given[name].double() if cluster is None else given[name][cluster].double()
        return _spread(part.T, w.group, columns) if w.group else part.reshape(-1, 1)

    def value(cluster: int | None) -> torch.Tensor:
        return (held - (spread(w.zero, cluster) if w.zero else 0.0)) * spread(w.scale, cluster)

    if not w.ids:
        return value(None)
    ids = unpacked(given[w.ids], 1 if w.clusters <= 2 else 2, 8 if w.clusters <= 2 else 16, signed=False)[:, :columns]
    return sum((torch.where(ids == k, value(k), 0.0) for k in range(w.clusters)), start=torch.zeros(()))


# -- a kernel ------------------------------------------------------------------------------------


def judged(kernel: Kernel, given: Mapping[str, torch.Tensor], dtype: str) -> dict[str, Near]:
    """What each output should be.

    Args:
        kernel: the spec.
        given: its inputs and weights, as the launcher takes them.
        dtype: the kernel's float.
    """
    locals_ = {name: Near.exact(held) for name, held in given.items()}
    for t in kernel.tensors:  # scalars and vectors of rows broadcast against [M, K]
        if t.name in given and t.shape == ("M",):
            locals_[t.name] = Near.exact(given[t.name][:, None])
    if kernel.kind == "gemm":
        for product in kernel.products:
            locals_[product.result] = _product(kernel, product, given, dtype)
    run_steps(kernel.steps, locals_, dtype)
    if kernel.closing:
        stored = {t.name for t in kernel.tensors if t.role in ("output", "scratch") and t.dtype == "float"}
        for name in stored & locals_.keys():
            locals_[name] = locals_[name].rounded(dtype)
        run_steps(kernel.closing, locals_, dtype)
    return {t.name: locals_[t.name] for t in kernel.tensors if t.role == "output"}


def _product(kernel: Kernel, product: Product, given: Mapping[str, torch.Tensor], dtype: str) -> Near:
    a, w, columns = kernel.activation, product.weight, kernel.columns
    assert a is not None
    weight = decoded(product, given, columns)
    if a.kind == "float":
        x = given[a.codes].double()
        size = x.abs() @ weight.abs().T
        lost = 0.0 if w.decoder == "float" else 2 * ROUND[dtype]  # a decoded weight is rounded to the kernel's float
        y = Near(x @ weight.T, (columns + 8) * U * size + lost * size)
    else:
        codes = unpacked(given[a.codes], a.bits, 64 * a.bits // 8, signed=a.signed)[:, :columns]
        scale = given[a.scale].double()
        if a.granularity == "group":
            scale = _spread(scale, a.group, columns)
        elif a.granularity == "token":
            scale = scale.reshape(-1, 1)
        zero = given[a.zero].double().reshape(-1, 1) if a.zero else 0.0
        x = (codes - zero) * scale
        groups = 1 if not (a.group or w.group) else -(-columns // min(g for g in (a.group, w.group) if g))
        size = (codes.abs() * scale) @ weight.abs().T
        size = size + (zero * scale * torch.ones_like(codes) if a.zero else torch.zeros_like(x)).abs() @ weight.abs().T
        y = Near(x @ weight.T, (groups + 8) * U * size)
    for branch in product.branches:
        left, right = given[branch.left].double(), given[branch.right].double()
        size = left.abs() @ right.abs().T
        y = _near(y.value + left @ right.T, y.radius + branch.rank * U * size)
    return y if not product.bias else _binary("add", y, Near.exact(given[product.bias]))


# -- the comparison ------------------------------------------------------------------------------


def problems(kernel: Kernel, expected: Mapping[str, Near], made: Mapping[str, torch.Tensor], dtype: str) -> list[str]:
    """One line for each output that is not what it should be, with the worst element; [] if all are."""
    found = []
    for tensor in kernel.tensors:
        if tensor.role == "output":
            line = _problem(tensor, expected[tensor.name], made[tensor.name], dtype, kernel)
            found += [f"{tensor.name}: {line}"] if line else []
    return found


def _problem(tensor: Tensor, near: Near, made: torch.Tensor, dtype: str, kernel: Kernel) -> str:
    if near.low is not None and near.high is not None:
        return _codes_problem(tensor, near, made, kernel)
    kind = dtype if tensor.dtype == "float" else tensor.dtype
    near = near.rounded(kind)
    value, radius = near.value.reshape(made.shape), near.radius.reshape(made.shape)
    got = made.double()
    over = (got == value.sign() * float("inf")) & (value.abs() + radius >= LARGEST[kind])
    far = torch.where(over, 0.0, (got - value).abs() - radius)
    far = torch.where(got.isnan(), float("inf"), far)
    if not bool((far > 0).any()):
        return ""
    at = np.unravel_index(int((far / radius.clamp(min=1e-300)).argmax()), made.shape)
    return f"{[int(i) for i in at]}: {got[at].item()!r}, expected {value[at].item()!r} +- {radius[at].item():.3g}"


def _codes_problem(tensor: Tensor, near: Near, made: torch.Tensor, kernel: Kernel) -> str:
    assert near.low is not None and near.high is not None
    columns = near.value.shape[-1]
    if tensor.shape == ("M",):
        codes, padding = made.double()[:, None], made.new_zeros(())
    else:
        bits = 8 // tensor.packed
        by = next(step for step in (*kernel.steps, *kernel.closing) if tensor.name in step.writes)
        signed = bool(dict(by.options).get("signed", True))
        whole = unpacked(made, bits, 64 * bits // 8, signed=signed)
        codes, padding = whole[:, :columns], whole[:, columns:]
    if bool(padding.any()):
        return "padding is not zero"
    bad = (codes < near.low) | (codes > near.high)
    if not bool(bad.any()):
        return ""
    at = tuple(bad.nonzero()[0].tolist())
    expected = {int(near.low[at].item()), int(near.high[at].item())}
    return f"{list(at)}: {int(codes[at].item())}, expected {' or '.join(map(str, sorted(expected)))}"
