"""Specs of gemms with random operands, and what they stand for in float64: an oracle that shares no code with kernels.

case = Case("int4:g32", left="i8:token", columns=96, ...)     what to build
made = build(case, rows, seed)                                the spec, its tensors, the exact result
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from planish.codegen import containers, regions, triton
from planish.codegen.kernel_spec import Activation, Branch, Kernel, Product, Step, Tensor, Weight, padded
from planish.ir.formats import Format
from planish.ir.qtensor import QTensor
from planish.ir.rounding import quantize_array

TORCH = {
    "i8": torch.int8, "u8": torch.uint8, "f16": torch.float16, "f32": torch.float32, "bf16": torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A gemm.

    Attributes:
        weight: a format; "uint2:channel:split3"; "float".
        left: "float", or codes: "i8:token" "u8:token" (with zero points) "i8:tensor" "i4:g32" "u4:g32" ...
        values: of the operands: "normal", "zero", "huge", "negative".
    """

    weight: str = "int8:channel"
    left: str = "i8:token"
    outputs: int = 40
    columns: int = 96
    products: int = 1
    ranks: tuple[int, ...] = ()
    bias: bool = False
    float_zero: bool = False
    values: str = "normal"
    dtype: str = "f16"
    steps: tuple[Step, ...] = ()
    closing: tuple[Step, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    stored: bool = True


@dataclass
class Made:
    """A spec with operands.

    Attributes:
        held: its given tensors by name.
        exact: results of the products by name, float64 [M, N].
        size: for each result the sum of the magnitudes that are added up, float64 [M, N].
    """

    kernel: Kernel
    held: dict[str, torch.Tensor]
    exact: dict[str, np.ndarray] = field(default_factory=dict)
    size: dict[str, np.ndarray] = field(default_factory=dict)


def torch_of(array: np.ndarray) -> torch.Tensor:
    """An array as a tensor; torch does not know the bfloat16 of ml_dtypes."""
    if array.dtype.kind == "V" or array.dtype.name == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))


def numbers(shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> np.ndarray:
    """Random numbers of a kind, float64, exact in float16."""
    made = rng.normal(size=shape)
    if kind == "zero":
        made[...] = 0.0
    if kind == "huge":
        made *= np.where(rng.random(shape) < 0.05, 500.0, 1.0)
    if kind == "negative":
        made = -np.abs(made) - 0.1
    return made.astype(np.float16).astype(np.float64)


def weight_of(case: Case, rng: np.random.Generator) -> QTensor:
    """A quantised weight [outputs, columns]."""
    values = rng.normal(size=(case.outputs, case.columns)) / case.columns**0.5
    text, _, split = case.weight.partition(":split")
    q = quantize_array(values, Format.parse(text))
    if split:
        clusters = int(split)
        apart = np.stack([q.scale * 2**k for k in range(clusters)])
        zero = None if q.zero is None else np.stack([np.clip(q.zero - k, 0, None) for k in range(clusters)])
        ids = rng.integers(0, clusters, q.shape).astype(np.uint8)
        q = dataclasses.replace(q, scale=apart, zero=zero, clusters=ids)
    if case.float_zero:
        zero = np.asarray(rng.integers(0, 4096, q.scale.shape) / 1024.0)  # exact, less or plus half a range as well
        q = dataclasses.replace(q, zero=zero, zero_is_float=True)
    return q


def _left(
    case: Case, rows: int, rng: np.random.Generator
) -> tuple[Activation, dict[str, Any], np.ndarray, list[Tensor]]:
    """The activation, its arrays, its numbers in float64, its border tensors."""
    columns = case.columns
    if case.left == "float":
        x = numbers((rows, columns), case.values, rng)
        return Activation("float", "a"), {"a": x}, x, [Tensor("a", "float", ("M", columns), "input")]
    kind, _, how = case.left.partition(":")
    bits, group = int(kind[1:]), int(how[1:]) if how.startswith("g") else 0
    granularity = "group" if group else how
    low, high = (0, 15) if kind == "u4" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    codes = rng.integers(low, high + 1, (rows, columns))
    if case.values == "zero":
        codes[...] = 0
    if case.values == "negative":
        codes = np.minimum(codes, -1) if low < 0 else codes * 0
    if case.values == "huge":
        codes = np.where(rng.random(codes.shape) < 0.5, low, high)
    groups = -(-columns // group) if group else 0
    shape = {"token": (rows,), "tensor": (), "group": (rows, groups)}[granularity]
    scale = (rng.random(shape) * 0.05 + 0.01).astype(np.float32).astype(np.float64)
    if case.values == "huge":
        scale = scale * 64
    stored = regions.pack_codes(torch.from_numpy(codes), bits, 0)
    spec_shape: dict[str, tuple[Any, ...]] = {"token": ("M",), "tensor": (), "group": ("M", groups)}
    tensors = [
        Tensor("a", "i8", ("M", padded(columns) * bits // 8), "input", 8 // bits),
        Tensor("a_scale", "f32", spec_shape[granularity], "input"),
    ]
    held = {"a": stored, "a_scale": scale}
    zero, number = "", codes.astype(np.float64)
    if kind == "u8":
        zero = "a_zero"
        held[zero] = rng.integers(-128, 128, shape)
        tensors.append(Tensor(zero, "i8", spec_shape[granularity], "input"))
        number = number - (held[zero][:, None] if shape else held[zero])
    spread = scale
    if granularity == "token":
        spread = scale[:, None]
    if group:
        spread = np.repeat(scale, group, 1)[:, :columns]
    activation = Activation("codes", "a", bits, granularity, group, "a_scale", zero, kind != "u4")  # type: ignore[arg-type]
    return activation, held, number * spread, tensors


def _weight(
    case: Case, i: int, zero: bool, rng: np.random.Generator
) -> tuple[Weight, dict[str, Any], np.ndarray, list[Tensor]]:
    name, rows = f"weight{i or ''}", case.outputs
    if case.weight == "float":
        w = numbers((rows, case.columns), "normal", rng)
        plain = [Tensor(name, "float", (rows, case.columns), "weight")]
        if not zero:
            return Weight("float", name), {name: w}, w, plain
        sums = f"{name}_sums"  # as of codes: what zero points of activations are multiplied with
        plain.append(Tensor(sums, "f32", (rows,), "weight"))
        kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[case.dtype]
        held = torch.from_numpy(w).to(kind).double().sum(1)  # of the weights as the kernel holds them
        return Weight("float", name, sums=sums), {name: w, sums: held.numpy()}, w, plain
    q = weight_of(case, rng)
    packed = containers.pack(q, "triton")
    bits, clusters = packed.number("bits"), packed.number("clusters")
    keys = {"codes": name, "scale": f"{name}_scale", "zero": f"{name}_zero", "ids": f"{name}_ids"}
    kinds = {"codes": "i8", "scale": q.scale_dtype, "zero": "f32" if q.zero_is_float else "i8", "ids": "u8"}
    packings = {"codes": 8 // bits, "ids": 8 if clusters <= 2 else 4}
    held, tensors = {}, []
    for key, array in packed.arrays.items():
        held[keys[key]] = torch_of(array)
        tensors.append(Tensor(keys[key], kinds[key], array.shape, "weight", packings.get(key, 1)))
    wide = q.dequantize()
    sums = ""
    if zero:
        sums = f"{name}_sums"
        held[sums] = wide.sum(1)
        tensors.append(Tensor(sums, "f32", (rows,), "weight"))
    given = {key: keys[key] if key in packed.arrays else "" for key in keys}
    weight = Weight(
        f"split{clusters}" if clusters else f"int{bits}", name, given["scale"], given["zero"], given["ids"], sums,
        q.block or 0, 0, clusters,
    )  # fmt: skip
    return weight, held, wide, tensors


def build(case: Case, rows: int, seed: int = 0) -> Made:
    """The spec of a case with operands of so many rows."""
    rng = np.random.default_rng(seed)
    activation, held, x, tensors = _left(case, rows, rng)
    made = Made(Kernel("gemm", case.columns, case.outputs, ()), {})
    products = []
    for i in range(case.products):
        weight, arrays, w, own = _weight(case, i, bool(activation.zero), rng)
        held |= arrays
        tensors += own
        exact, size = x @ w.T, np.abs(x) @ np.abs(w).T
        branches = []
        for j, rank in enumerate(case.ranks):
            left, right = f"left{j or ''}", f"up{i * len(case.ranks) + j or ''}"
            if not i:
                held[left] = numbers((rows, rank), case.values, rng)
                tensors.append(Tensor(left, "float", ("M", rank), "input"))
            held[right] = numbers((case.outputs, rank), "normal", rng)
            tensors.append(Tensor(right, "float", (case.outputs, rank), "weight"))
            branches.append(Branch(left, right, rank))
            exact, size = exact + held[left] @ held[right].T, size + np.abs(held[left]) @ np.abs(held[right]).T
        bias = ""
        if case.bias:
            bias = f"bias{i or ''}"
            held[bias] = rng.normal(size=case.outputs).astype(np.float32).astype(np.float64)
            tensors.append(Tensor(bias, "f32", (case.outputs,), "weight"))
            exact, size = exact + held[bias], size + np.abs(held[bias])
        result = f"out{i or ''}" if case.stored else f"acc{i or ''}"
        made.exact[result], made.size[result] = exact, size
        products.append(Product(weight, result, tuple(branches), bias))
        if case.stored:
            tensors.append(Tensor(result, "float", ("M", case.outputs), "output"))
    tensors += case.tensors
    order = ("input", "weight", "output", "scratch")
    tensors = sorted(tensors, key=lambda t: order.index(t.role))
    made.kernel = Kernel(
        "gemm", case.columns, case.outputs, tuple(tensors), case.steps, case.closing,
        activation=activation, products=tuple(products),
    )  # fmt: skip
    for tensor in tensors:
        if tensor.name in held:
            kind = TORCH[case.dtype if tensor.dtype == "float" else tensor.dtype]
            made.held[tensor.name] = torch.as_tensor(held[tensor.name]).to(kind).contiguous()
    return made


def run(made: Made, dtype: str, **launch: int) -> dict[str, torch.Tensor]:
    """What the emitted kernel makes of the operands, in Triton's interpreter."""
    module = triton.load(triton.emit_kernel(made.kernel, dtype))
    return _named(made, module.run(**made.held, launch=module.Launch(**launch)))


def eager(made: Made, dtype: str) -> dict[str, torch.Tensor]:
    """What the emitted reference makes of them."""
    return _named(made, triton.load(triton.emit_kernel(made.kernel, dtype)).reference(**made.held))


def _named(made: Made, results: Any) -> dict[str, torch.Tensor]:
    names = [t.name for t in made.kernel.tensors if t.role == "output"]
    return dict(zip(names, results if isinstance(results, tuple) else (results,), strict=True))
