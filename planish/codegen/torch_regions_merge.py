"""One gemm for linears that read the same activation: queries, keys and values, say.

    x Wq^T, x Wk^T, x Wv^T  ->  x [Wq Wk Wv]^T, cut into columns

The columns of a product do not see each other, so every number stays as it is; the activation is read once and one op
is called instead of three. Linears with branches, another weight format or an epilogue (but for a rounding to the
model's float) stay by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from planish.codegen.kernel_spec import Tensor
from planish.codegen.regions import Bound, Packs, Plan, Region


def siblings(plan: Plan) -> list[list[Region]]:
    """The groups of regions, each of two or more in the order of the plan, that can be one gemm."""
    found: dict[object, list[Region]] = {}
    for region in plan.kernels:
        key = _key(region)
        if key is not None:
            found.setdefault(key, []).append(region)
    return [group for group in found.values() if len(group) > 1]


def merged(regions: Sequence[Region]) -> Region:
    """The region of several that `siblings` gives: one product, whose result is bound to no value.

    Its columns are those of the regions' results, one after the other.
    """
    first = regions[0]
    kernels = [region.kernel for region in regions]
    spec = kernels[0]
    assert spec is not None
    total = sum(kernel.outputs for kernel in kernels if kernel is not None)
    tensors, bound = [], {}
    for tensor in spec.tensors:
        axis = _axis(tensor, spec.outputs, spec.products[0].weight.codes, spec.products[0].weight.ids)
        if axis is None:
            tensors.append(tensor)
            bound[tensor.name] = first.bound[tensor.name]
            continue
        shape = (*tensor.shape[:axis], total, *tensor.shape[axis + 1 :])
        tensors.append(replace(tensor, shape=shape))
        makes = [region.bound[tensor.name].make for region in regions]
        how = f"{first.bound[tensor.name].how}, and of its {len(regions) - 1} siblings"
        own = first.bound[tensor.name]
        made = None if tensor.role == "output" else _joined([m for m in makes if m is not None], axis)
        bound[tensor.name] = Bound(own.form, None, own.bits, own.shift, own.signed, own.grouped, made, how)
    kernel = replace(spec, outputs=total, tensors=tuple(tensors))
    nodes = tuple(dict.fromkeys(node for region in regions for node in region.nodes))
    outputs = tuple(value for region in regions for value in region.outputs)
    return Region(first.name, first.kind, nodes, first.inputs, outputs, kernel, bound)


def _key(region: Region) -> object | None:
    """What siblings have in common; None for a region that has none."""
    kernel = region.kernel
    if kernel is None or kernel.kind != "gemm" or kernel.closing or len(kernel.products) != 1:
        return None
    if any(step.row != "cast" for step in kernel.steps):
        return None
    product, outputs = kernel.products[0], [t for t in kernel.tensors if t.role in ("output", "scratch")]
    if product.branches or region.known or region.views or len(outputs) != 1:
        return None
    if product.bias and kernel.tensor(product.bias).shape != (kernel.outputs,):
        return None
    read = tuple(region.bound[t.name].value for t in kernel.tensors if t.role == "input")
    result = region.bound[outputs[0].name].value
    weight, kinds = product.weight, tuple((t.name, t.dtype, t.role, t.packed) for t in kernel.tensors)
    dtype = result.dtype if result is not None else None
    return read, region.inputs, dtype, kernel.steps, kernel.activation, weight, kinds


def _axis(tensor: Tensor, outputs: int, codes: str, ids: str) -> int | None:
    """The axis of a border tensor that counts the outputs; None where there is none."""
    if tensor.role == "input" or (tensor.role == "weight" and outputs not in tensor.shape):
        return None
    return 0 if tensor.name in (codes, ids) else len(tensor.shape) - 1


def _joined(makes: Sequence[Callable[[Packs], np.ndarray]], axis: int) -> Callable[[Packs], np.ndarray]:
    return lambda packs: np.concatenate([make(packs) for make in makes], axis)
