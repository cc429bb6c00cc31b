"""The kernels that bench/kernels.py speaks of: what `select` makes of a decoder block under each recipe, at real sizes.

The block is quantised at a width of 256, where that takes a second; its kernels are then `resized` to the widths of a
model of 7 billion parameters. A spec holds no weights, so nothing else changes: the same steps, the same text.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from planish.codegen.kernel_spec import Kernel, Size, Step, Tensor, padded

if TYPE_CHECKING:
    from planish.codegen.regions import Plan

WIDTH = 256
# of the small block -> of a block of 7 billion parameters: width, keys and values, MLP, q + k + v, gate + up, words.
# The MLP's width is 44 * 256 where that of the small block is 44 * 16: so that its Hadamard matrices have one base.
SIZES = {256: 4096, 64: 1024, 704: 11264, 384: 6144, 1408: 22528, 512: 32000}
RECIPES = ("w8a8-token", "w8a8-static", "w4a16", "w4a8", "w4a4", "svdquant", "w2a16", "llm-int8")


def plan(recipe: str, width: int = WIDTH) -> Plan:
    """The plan of a decoder block under a recipe."""
    import blocks

    import planish
    from planish.codegen.select import select
    from planish.integrate.recipes import load_recipe

    graph = blocks.decoder(width, 1)
    rng = np.random.default_rng(0)
    batches = [{"ids": rng.integers(0, blocks.VOCABULARY, (2, 64))} for _ in range(2)]
    passes = load_recipe(recipe).passes()
    stats = planish.collect(graph, batches) if any(p.needs_stats for p in passes.passes) else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised, _ = passes.run(graph, stats=stats, data=batches, validate=False)
    return select(quantised)


def kernels(recipe: str) -> Counter[Kernel]:
    """The kernels of a decoder block at real sizes, with the number of launches of each."""
    return Counter(resized(r.kernel) for r in plan(recipe).kernels if r.kernel is not None)


def resized(kernel: Kernel, sizes: dict[int, int] | None = None) -> Kernel:
    """The same kernel on other widths.

    Args:
        sizes: old width -> new width, for K and N.

    Raises:
        KeyError: a width that `sizes` does not name.
    """
    sizes = SIZES if sizes is None else sizes
    columns, outputs = sizes[kernel.columns], sizes[kernel.outputs] if kernel.outputs else 0
    groups = _groups(kernel)

    def dim(size: Size, tensor: Tensor, last: bool) -> Size:
        if size == "M" or size not in _forms(kernel, tensor, groups):
            return size
        if last and size * tensor.packed in (padded(kernel.columns), padded(kernel.outputs)):
            whole = kernel.columns if size * tensor.packed == padded(kernel.columns) else kernel.outputs
            return padded(sizes[whole]) // tensor.packed if tensor.packed > 1 or size != whole else sizes[whole]
        if size in sizes and size in (kernel.columns, kernel.outputs):
            return sizes[size]
        group = groups[tensor.name]
        whole = kernel.columns if -(-kernel.columns // group) == size else kernel.outputs
        return -(-sizes[whole] // group)

    def tensor(held: Tensor) -> Tensor:
        end = len(held.shape) - 1
        return replace(held, shape=tuple(dim(s, held, i == end) for i, s in enumerate(held.shape)))

    def step(held: Step) -> Step:
        whole = {kernel.columns: columns, kernel.outputs: outputs}
        options = tuple((k, whole.get(int(v), v) if k == "block" else v) for k, v in held.options)
        return replace(held, options=options)

    return replace(
        kernel, columns=columns, outputs=outputs, tensors=tuple(tensor(t) for t in kernel.tensors),
        steps=tuple(step(s) for s in kernel.steps), closing=tuple(step(s) for s in kernel.closing),
    )  # fmt: skip


def _groups(kernel: Kernel) -> dict[str, int]:
    """Codes per scale of the tensors that hold group scales."""
    found: dict[str, int] = {}
    a = kernel.activation
    if a is not None and a.group:
        found[a.scale] = a.group
    for product in kernel.products:
        if product.weight.group:
            found |= {n: product.weight.group for n in (product.weight.scale, product.weight.zero) if n}
    for s in (*kernel.steps, *kernel.closing):
        if s.row == "quantize_group":
            found |= {n: int(s.option("group")) for n in s.writes if n}
    return found


def _forms(kernel: Kernel, tensor: Tensor, groups: dict[str, int]) -> set[int]:
    """The sizes of an axis that follow from K or N."""
    found = set()
    for whole in (kernel.columns, kernel.outputs):
        found |= {whole, padded(whole), padded(whole) // tensor.packed} if whole else set()
        if whole and tensor.name in groups:
            found.add(-(-whole // groups[tensor.name]))
    return found
