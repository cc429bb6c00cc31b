"""Search launch parameters by static cost, for chips that are not here, and write planish/codegen/configs.json.

    python bench/kernel_search.py [--targets sm_90 ...] [--classes "gemm int8" ...] [--dry]

For every class of kernel (`configs.class_of`) a representative of real size is compiled with some thirty tiles, warps
and stages. Those that spill or do not fit are out; the rest are ordered by `modelled`, from what the machine code says:

    DRAM       bytes moved / bandwidth, less where too few bytes are in flight to cover 0.8 us of latency (Little)
    L2         bytes that all tiles load / 3 times the bandwidth of DRAM
    issue      instructions / what the multiprocessors start
    tensor     operations as issued / the peak

The slowest sets the time; a fifth of the others is added, since nothing overlaps wholly. What runs on the chip is
stretched by the last, half-empty wave. A model, not a measurement: not timed on a GPU.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import kernel_cases
import kernels
from common import arguments, note

from planish.codegen import configs, triton_gemm, triton_rows
from planish.codegen.aot import Failure, Job, compile_all
from planish.codegen.chips import TARGETS, Chip, chip
from planish.codegen.cost import cost, size
from planish.codegen.kernel_spec import Kernel
from planish.codegen.machine import Machine
from planish.codegen.sheet import Line, job, parameters
from planish.codegen.triton import emit_kernel

LATENCY = 0.8e-6  # seconds from a load to its data
CACHE_SPEED = 3.0  # L2 over DRAM
OVERLAP = 0.2
ROWS = {16: (1, 16), 64: (64,), None: (512, 2048)}  # the rows by which an entry is judged
Launch = dict[str, int]
# BLOCK_M, BLOCK_N, warps: for up to 16 rows, up to 64, more, more with two products (twice the accumulators)
FEW = ((16, 64, 4), (16, 128, 4), (16, 128, 8), (16, 64, 2))
SOME = ((64, 64, 4), (32, 128, 4), (64, 128, 4), (32, 64, 4))
MANY = ((128, 128, 8), (64, 128, 4), (128, 128, 4), (128, 64, 4), (128, 256, 8), (256, 128, 8), (64, 256, 8))
TWO = ((64, 128, 8), (64, 64, 4), (128, 64, 8), (64, 128, 4), (128, 64, 4), (128, 128, 8))


def line(kernel: Kernel, machine: Machine, launch: Mapping[str, int], rows: int, of: Chip) -> Line:
    """A line of the sheet for machine code that is at hand."""
    resident = of.resident_blocks(machine.registers, machine.warps, machine.shared, machine.columns)
    return Line("", kernel, 1, of.target, rows, launch, machine, "", cost(kernel, rows, launch, of, resident))


def modelled(held: Line) -> float:
    """Seconds of a launch by the model above; infinity where it cannot run."""
    m, of, c = held.machine, held.chip, held.cost
    if m is None or m.spills or not held.resident:
        return float("inf")
    each = held.blocks / of.units  # blocks of a multiprocessor
    at_once = min(held.resident, -(-held.blocks // of.units))
    stretch = -(-held.blocks // of.units) / each if each <= held.resident else 1.0
    stretch = stretch if each <= held.resident else -(-each // held.resident) * held.resident / each
    stages = held.launch["num_stages"]
    if m.loop.get("async_copy", 0) + m.loop.get("bulk_copy", 0):
        flight = m.shared * (stages - 1) / stages * at_once
    else:
        flight = (m.loop.get("load_16", 0) or m.wide or 1) * 16 * of.lanes * m.warps * at_once
    covered = min(1.0, flight * min(each, 1.0) * of.units / (of.bandwidth * LATENCY))
    warps = min(1.0, at_once * m.warps / 8)  # fewer do not keep four schedulers busy
    terms = [
        c.moved / of.bandwidth / covered,
        (loaded(held) + c.cached) / (CACHE_SPEED * of.bandwidth),
        held.issue_seconds * stretch / warps,
        sum(n / of.peak[kind] for kind, n in c.operations.items()) * stretch,
    ]
    return max(terms) + OVERLAP * (sum(terms) - max(terms))


def loaded(held: Line) -> float:
    """Bytes that all blocks of a launch load."""
    kernel, rows = held.kernel, held.rows
    if kernel.kind == "prologue":
        return float(held.cost.moved)
    a = kernel.activation
    left = {a.codes, a.scale, a.zero} if a is not None else set()
    down, across = -(-rows // held.launch["BLOCK_M"]), -(-kernel.outputs // held.launch["BLOCK_N"])
    total = 0.0
    for tensor in kernel.tensors:
        amount = size(tensor, rows, "f16")
        if tensor.name in left:
            total += amount * across
        elif tensor.role == "weight":
            total += amount * down
        else:
            total += amount
    return total


# -- candidates ----------------------------------------------------------------------------------


def tiles(kernel: Kernel, limit: int | None, amd: bool) -> Iterator[Launch]:
    """Launch parameters to try, without SPLIT_K and GROUP_M."""
    if kernel.kind == "prologue":
        yield from row_tiles(kernel, limit)
        return
    several = len(kernel.products) > 1
    for m, n, warps in FEW if limit == 16 else SOME if limit else TWO if several else MANY:
        yield {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 128, "num_warps": warps, "num_stages": 2 if amd else 3}


def row_tiles(kernel: Kernel, limit: int | None) -> Iterator[Launch]:
    """Launch parameters of a prologue to try."""
    width = 1 << max(kernel.columns - 1, 1).bit_length()
    downs = any(step.row == "down" for step in kernel.steps)
    for warps in (1, 2, 4, 8, 16):
        for rows in (1, 2, 4, 8, 16):
            each = rows * width / (32 * warps)
            if not 4 <= each <= 64 or (limit and rows > 1):
                continue
            if not downs:
                yield {"BLOCK_M": rows, "num_warps": warps, "num_stages": 3}
                continue
            for deep in (128, 256):
                yield {"BLOCK_M": 16, "ROWS": rows, "BLOCK_K": deep, "num_warps": warps, "num_stages": 3}


def deeper(chosen: Launch, limit: int | None, amd: bool) -> Iterator[Launch]:
    """The same tile with other stages, and half as deep."""
    for stages in (1, 3) if amd else (2, 5) if limit == 16 else (2, 4):
        yield chosen | {"num_stages": stages}
    if "BLOCK_K" in chosen:
        yield chosen | {"BLOCK_K": 64}
        yield chosen | {"BLOCK_K": 256, "num_stages": 2}


def spread(kernel: Kernel, launch: Launch, limit: int | None) -> Iterator[Launch]:
    """The same machine code with other SPLIT_K and GROUP_M."""
    if kernel.kind == "prologue":
        yield launch
        return
    for split, group in itertools.product((1, 2, 4, 8) if limit == 16 else (1,), (1,) if limit == 16 else (8, 16)):
        yield launch | {"SPLIT_K": split, "GROUP_M": group}


# -- the search ----------------------------------------------------------------------------------


def jobs(kernel: Kernel, target: str, candidates: list[Launch]) -> list[Job]:
    """Compilations with these launch parameters."""
    text = emit_kernel(kernel).text
    body = (triton_gemm if kernel.kind == "gemm" else triton_rows).body(kernel, "f16")
    return [job(text, target, configs.fitting(c, body.parameters)) for c in candidates]


def search(
    kernel: Kernel, target: str, limit: int | None, workers: int, quick: bool = False
) -> tuple[Launch, float] | None:
    """The launch parameters with the least modelled time, and that time; None where nothing works."""
    of, amd = chip(target), target.startswith("gfx")
    split = {"SPLIT_K": 4 if limit == 16 else 1, "GROUP_M": 8}
    tried: dict[str, tuple[Launch, Machine]] = {}

    def compiled(candidates: list[Launch]) -> None:
        wanted = jobs(kernel, target, [c | split for c in candidates])
        for made, machine in zip(wanted, compile_all(wanted, workers, limit=120), strict=True):
            if not isinstance(machine, Failure):
                held = parameters(made)
                tried[json.dumps(held, sort_keys=True)] = (held, machine)

    def ranked() -> list[tuple[float, Launch]]:
        found = []
        for held, machine in tried.values():
            for launch in spread(kernel, held, limit):
                times = [modelled(line(kernel, machine, launch, rows, of)) for rows in ROWS[limit]]
                found.append((sum(times), launch))
        return sorted(
            (f for f in found if f[0] != float("inf")), key=lambda f: (f[0], json.dumps(f[1], sort_keys=True))
        )

    compiled(list(tiles(kernel, limit, amd))[: 3 if quick else None])
    seen: set[tuple[int, ...]] = set()
    for _, launch in () if quick else ranked():
        key = tuple(launch.get(k, 0) for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "ROWS", "num_warps"))
        if key not in seen and len(seen) < 1 and kernel.kind == "gemm":
            seen.add(key)
            compiled(list(deeper({k: v for k, v in launch.items() if k not in split}, limit, amd)))
    for time, launch in ranked()[:12]:
        [made] = compile_all(jobs(kernel, target, [launch]), 1)
        if isinstance(made, Machine) and modelled(line(kernel, made, launch, ROWS[limit][0], of)) != float("inf"):
            return launch, time
    return None


def representatives() -> dict[str, Kernel]:
    """A kernel of each class whatever its groups, the one with the most work; and the plain linears of kernels.py."""
    found = {configs.class_of(k): k for k in map(kernels.linear, ("w4a16", "w8a8"))}
    for recipe in kernel_cases.RECIPES:
        for kernel in kernel_cases.kernels(recipe):
            name = re.sub(r" g\d+$", "", configs.class_of(kernel))
            held = found.get(name)
            if kernel.outputs <= 11264 and (
                held is None or kernel.columns * kernel.outputs > held.columns * held.outputs
            ):
                found[name] = kernel
    return found


def main() -> int:
    options = arguments(
        __doc__.splitlines()[0],
        targets={"nargs": "+", "default": list(TARGETS), "metavar": "TARGET"},
        classes={"nargs": "+", "default": [], "metavar": "WORDS", "help": "only classes that begin so"},
        limits={"nargs": "+", "default": ["16", "64", "None"], "metavar": "ROWS"},
        workers={"type": int, "default": 1},
        dry={"action": "store_true", "help": "print, do not write"},
    )
    limits = [limit for limit in ROWS if str(limit) in options.limits]
    found = representatives()
    for name in sorted(found):
        if not options.classes or any(name.startswith(c) for c in options.classes):
            run(name, found[name], options.targets, limits, options.workers, options.dry, options.quick)
    return 0


def run(
    name: str,
    kernel: Kernel,
    targets: Sequence[str],
    limits: Sequence[int | None],
    workers: int = 1,
    dry: bool = False,
    quick: bool = False,
) -> None:
    """Search for one class and write what is found."""
    for target, limit in itertools.product(targets, limits):
        found = search(kernel, target, limit, workers, quick)
        if found is None:
            note(f"{name} {target} {limit}: nothing fits without spills")
            continue
        note(f"{name} {target} {limit}: {found[0]} modelled {found[1] * 1e6:.1f} us (not timed)")
        if not dry:
            body = (triton_gemm if kernel.kind == "gemm" else triton_rows).body(kernel, "f16")
            usual = {p.name: p.default for p in body.parameters if p.name == "BLOCK_K"}  # differs within a class
            write(target, name, limit, {k: v for k, v in found[0].items() if usual.get(k) != v})


def write(target: str, name: str, limit: int | None, launch: Launch) -> None:
    """Put an entry into configs.json."""
    data = json.loads(configs.FILE.read_text())
    data.setdefault(target, {}).setdefault(name, {})[str(limit)] = launch
    lines = []
    for t in TARGETS:
        rows = [f'  "{c}": ' + json.dumps(data[t][c], sort_keys=True) for c in sorted(data.get(t, {}))]
        lines.append(f' "{t}": {{\n' + ",\n".join(rows) + "\n }")
    configs.FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
