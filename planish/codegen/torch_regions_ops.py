"""The torch op of a kernel on a device: C++ on the CPU, Triton elsewhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from planish.codegen import cpp, triton
from planish.codegen.gemm_parts import launched, parts
from planish.codegen.kernel_spec import Kernel
from planish.codegen.triton_file import given, results
from planish.ir.errors import PlanishError

NAMESPACE = "planish"


@dataclass(frozen=True, eq=False)
class Operator:
    """The op of a kernel.

    Attributes:
        op: the overload; takes `inputs`, then `weights`; returns a tensor, or a tuple of several.
        inputs, weights: names of border tensors, in the op's order.
        dtype: the kernel's float.
        prepare: the weights as the op reads them, from those of `Region.bind`.
    """

    op: Any
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    dtype: str
    prepare: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


def operator_of(kernel: Kernel, dtype: str, device: torch.device) -> Operator:
    """The op that computes a kernel on a device.

    Args:
        dtype: what "float" stands for: "f32", "bf16" or "f16".

    Raises:
        PlanishError: Triton is needed and not installed.
    """
    if device.type == "cpu":
        made = cpp.kernel(kernel, dtype)
        return Operator(made.op, made.inputs, made.weights, dtype, made.prepare)
    names = {role: tuple(t.name for t in given(kernel) if t.role == role) for role in ("input", "weight")}
    return Operator(_triton(kernel, dtype), names["input"], names["weight"], dtype, dict)


@lru_cache(maxsize=4096)
def _triton(kernel: Kernel, dtype: str) -> Any:
    """The emitted file's op; of a gemm with closing steps one that launches its parts where there are many rows."""
    if importlib.util.find_spec("triton") is None:
        raise PlanishError("kernels: need triton", hint="pip install 'planish[triton]'")
    emitted = triton.emit_kernel(kernel, dtype)
    module = triton.load(emitted)
    if not kernel.closing:
        return getattr(torch.ops.planish, emitted.name).default
    modules = {part: triton.load(triton.emit_kernel(part, dtype)) for part in (kernel, *parts(kernel))}
    order, made = [t.name for t in given(kernel)], [t.name for t in results(kernel)]
    first = next(i for i, t in enumerate(given(kernel)) if "M" in t.shape)

    def run(*tensors: torch.Tensor) -> Any:
        held = dict(zip(order, tensors, strict=True))
        for part in launched(kernel, tensors[first].shape[0]):
            found = modules[part].run(**{t.name: held[t.name] for t in given(part)})
            names = [t.name for t in results(part)]
            held |= dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))
        found = tuple(held[name] for name in made)
        return found if len(found) > 1 else found[0]

    name = f"{emitted.name}_by_rows"
    back = f"({', '.join(['Tensor'] * len(made))})" if len(made) > 1 else "Tensor"
    library: Any = _library()
    library.define(f"{name}({', '.join(f'Tensor {n}' for n in order)}) -> {back}", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, run, "CompositeExplicitAutograd")
    whole = getattr(torch.ops.planish, emitted.name).default
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *tensors: whole(*tensors), lib=library)
    assert module is modules[kernel]
    return getattr(torch.ops.planish, name).default


@lru_cache(maxsize=1)
def _library() -> Any:
    make: Any = torch.library.Library  # which has no types
    return make(NAMESPACE, "FRAGMENT")
