"""Launch parameters by target and kind of kernel: data, in configs.json beside this file.

`bench/kernel_search.py` writes the data by a search over tiles, warps and stages at static cost: nothing spilled, then
the least time by a model of what the machine code issues and moves. No chip was there: on one, `triton.autotune`
measures instead (docs/kernels.md).

    {target: {class: {most rows: {"BLOCK_M": 128, ..., "num_warps": 8, "num_stages": 3}}}}

A class says what decides the machine code: operands, decoder, number of products, branches, closing steps, tiles that
the epilogue reads; of a prologue its steps and the power of two that holds a row. Sizes are left out. What the data do
not say of a class they say of the longest leading part of its words that is there. "resident" is no launch parameter:
how many blocks of it a multiprocessor holds, which bounds SPLIT_K.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from planish.codegen.chips import CHIPS
from planish.codegen.chips import TARGETS as TARGETS
from planish.codegen.kernel_spec import Kernel
from planish.codegen.triton_body import Parameter

FILE = Path(__file__).with_name("configs.json")
LIMITS = (16, 64, None)  # the rows up to which an entry holds; None: any number
FULL = 3  # blocks of a decoding gemm that a multiprocessor holds, where the data do not say
LEAST_K = 128  # columns that a part of K has at least two times
Entry = Mapping[str, int]


def class_of(kernel: Kernel) -> str:
    """The class of a kernel: words, the most telling first."""
    if kernel.kind == "prologue":
        words = [step.row for step in kernel.steps if step.row in ("hadamard", "down", "gather", "reassemble")]
        return " ".join(["prologue", str(1 << max(kernel.columns - 1, 1).bit_length()), *words])
    a = kernel.activation
    left = "float" if a is None or a.kind == "float" else f"int{a.bits}"
    weight = kernel.products[0].weight
    words = ["gemm", left, weight.decoder, "group" if weight.group else "channel"]
    words += [f"x{len(kernel.products)}"] if len(kernel.products) > 1 else []
    words += ["branch"] if any(p.branches for p in kernel.products) else []
    words += ["long"] if len(kernel.steps) > len(kernel.products) else []  # a longer epilogue than a sum or a gate
    words += ["left-group"] if a is not None and a.granularity == "group" else []
    words += ["closing"] if kernel.closing else []
    words += ["hadamard"] if any(step.row == "hadamard" for step in kernel.closing) else []
    words += [f"g{weight.group}"] if weight.group else []
    steps = {name for step in kernel.steps for name in step.reads}
    tiles = [t for t in kernel.tensors if t.role == "input" and t.name in steps and t.shape == ("M", kernel.outputs)]
    words += ["residual"] if tiles else []
    return " ".join(words)


def launches(kernel: Kernel, target: str) -> tuple[tuple[int | None, Entry], ...]:
    """(most rows, launch parameters) of a kernel on a target, by rows; () where nothing is known."""
    known = _data().get(target, {})
    words = class_of(kernel).split()
    entries: dict[str, Entry] = {}
    for count in range(1, len(words) + 1):
        entries |= known.get(" ".join(words[:count]), {})
    return tuple((limit, fitted(kernel, target, entries[str(limit)])) for limit in LIMITS if str(limit) in entries)


def fitted(kernel: Kernel, target: str, entry: Entry) -> Entry:
    """The launch parameters of an entry for one of its kernels.

    SPLIT_K is no more than keeps all blocks of a launch on the chip at once (else partial sums leave the cache before
    they are added), and than K has steps.
    """
    found = {name: value for name, value in entry.items() if name != "resident"}
    split = found.get("SPLIT_K", 1)
    tiles = -(-kernel.outputs // found.get("BLOCK_N", 64))
    at_once = entry.get("resident", FULL) * CHIPS[target].units
    while split > 1 and (tiles * split > at_once or kernel.columns < 2 * split * LEAST_K):
        split //= 2
    return {**found, "SPLIT_K": split} if "SPLIT_K" in found else found


def launch(kernel: Kernel, target: str, rows: int) -> dict[str, int]:
    """The launch parameters of a kernel for so many rows on a target; {} where nothing is known."""
    for limit, entry in launches(kernel, target):
        if limit is None or rows <= limit:
            return dict(entry)
    return {}


def fitting(launch: Mapping[str, int], parameters: Sequence[Parameter]) -> dict[str, int]:
    """Launch parameters as a kernel takes them: what it does not have or cannot run with is left to its default."""
    values = {p.name: launch.get(p.name, p.default) for p in parameters}
    for p in parameters:
        if not eval(p.check, {"__builtins__": {}}, dict(values)):  # an expression on parameters, written by a `Body`
            values[p.name] = p.default
    return {**values, **{k: launch[k] for k in ("num_warps", "num_stages") if k in launch}}


def reread() -> None:
    """Read the data anew: a search wrote them."""
    _data.cache_clear()


@cache
def _data() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    found: dict[str, dict[str, dict[str, dict[str, int]]]] = json.loads(FILE.read_text(encoding="utf-8"))
    return found
