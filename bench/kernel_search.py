"""Search launch parameters by static cost, for chips that are not here, and write planish/codegen/configs.json.

    python bench/kernel_search.py [--targets sm_90 ...] [--classes "gemm int8" ...] [--mend] [--dry]

For every class of kernel (`configs.class_of`) the largest of its kernels in bench/kernel_cases.py is compiled with some
thirty tiles, warps and stages. Those that spill or do not fit are out; the rest are ordered by `modelled`, from what
the machine code says:

    DRAM       bytes moved / bandwidth, less where too few bytes are in flight to cover 0.8 us of latency (Little)
    L2         bytes that all tiles load / 3 times the bandwidth of DRAM
    issue      instructions / what the multiprocessors start
    tensor     operations as issued / the peak

The slowest sets the time; a fifth of the others is added, since nothing overlaps wholly. What runs on the chip is
stretched by the last, half-empty wave. The first in that order that has nothing wrong (`Line.problems`: spills, no
tensor core, no 16-byte load, more than 1.05 of the least bytes) with any kernel of its class is taken. `--mend` leaves
classes alone in which nothing is wrong, and takes the first tile near theirs that is well. A model, not a measurement:
not timed on a GPU.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import kernel_cases
import kernels
from common import arguments, note

from planish.codegen import configs, triton_gemm, triton_rows
from planish.codegen.aot import Failure, Job, compile_all
from planish.codegen.chips import TARGETS, Chip, chip
from planish.codegen.cost import cost, size
from planish.codegen.gemm_parts import launched
from planish.codegen.kernel_spec import Kernel
from planish.codegen.machine import Machine
from planish.codegen.sheet import Line, job, parameters
from planish.codegen.triton import emit_kernel

LATENCY = 0.8e-6  # seconds from a load to its data
CACHE_SPEED = 3.0  # L2 over DRAM
OVERLAP = 0.2
ROWS = {16: (1, 16), 64: (64,), None: (512, 2048)}  # the rows by which an entry is ordered
JUDGED = {16: (1, 16), 64: (64,), None: (512,)}  # the rows with which nothing may be wrong
Launch = dict[str, int]
# BLOCK_M, BLOCK_N, warps: for up to 16 rows, up to 64, more, more with two products (twice the accumulators)
FEW = ((16, 64, 4), (16, 128, 4), (16, 128, 8), (16, 64, 2))
SOME = ((64, 64, 4), (32, 128, 4), (64, 128, 4), (32, 64, 4))
MANY = ((128, 128, 8), (64, 128, 4), (128, 128, 4), (128, 64, 4), (128, 256, 8), (256, 128, 8), (64, 256, 8))
TWO = ((64, 128, 8), (64, 64, 4), (128, 64, 8), (64, 128, 4), (128, 64, 4), (128, 128, 8))
# fewer threads for weights of 2 bits: else each loads less than 16 bytes of a tile
FEWER = {16: ((16, 128, 2), (16, 64, 1)), 64: ((64, 64, 2), (64, 128, 2)), None: ((64, 128, 2), (128, 64, 2))}


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
    listed = FEW if limit == 16 else SOME if limit else TWO if several else MANY
    if kernel.tensor(kernel.products[0].weight.codes).packed == 4:
        listed = (*listed, *FEWER[limit], *(((128, 128, 4),) if several and not limit else ()))
    for m, n, warps in listed:
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
    for stages in (1, 3) if amd else (2, 4, 5) if limit == 16 else (2, 4):
        yield chosen | {"num_stages": stages}
    if "BLOCK_K" in chosen:
        yield chosen | {"BLOCK_K": 64}
        yield chosen | {"BLOCK_K": 256, "num_stages": 1 if amd else 2}


def spread(kernel: Kernel, launch: Launch, limit: int | None) -> Iterator[Launch]:
    """The same machine code with other SPLIT_K and GROUP_M."""
    if kernel.kind == "prologue":
        yield launch
        return
    for split, group in itertools.product((1, 2, 4, 8) if limit == 16 else (1,), (1,) if limit == 16 else (4, 8, 16)):
        yield launch | {"SPLIT_K": split, "GROUP_M": group}


# -- the search ----------------------------------------------------------------------------------


def jobs(kernel: Kernel, target: str, candidates: list[Launch]) -> list[Job]:
    """Compilations with these launch parameters."""
    text = emit_kernel(kernel).text
    body = (triton_gemm if kernel.kind == "gemm" else triton_rows).body(kernel, "f16")
    return [job(text, target, configs.fitting(c, body.parameters)) for c in candidates]


def wrong(held: Sequence[Kernel], target: str, limit: int | None, entry: Mapping[str, int] | None) -> list[str]:
    """What is wrong with an entry of the data, or with the data as they are, for any kernel of a class."""
    of, found = chip(target), []
    for kernel in held:
        for rows in JUDGED[limit]:
            launch = configs.launch(kernel, target, rows) if entry is None else configs.fitted(kernel, target, entry)
            [wanted] = jobs(kernel, target, [dict(launch)])
            [made] = compile_all([wanted], 1, limit=120)
            if isinstance(made, Failure):
                found.append(f"does not compile: {made.reason[:200]}")
            else:
                found += line(kernel, made, parameters(wanted), rows, of).problems
    return found


def search(
    held: Sequence[Kernel], target: str, limit: int | None, workers: int, quick: bool = False
) -> tuple[Launch, float] | None:
    """The launch parameters with the least modelled time, and that time; None where nothing works.

    Args:
        held: the kernels of a class, the largest first.
    """
    of, amd, kernel = chip(target), target.startswith("gfx"), held[0]
    split = {"SPLIT_K": 4 if limit == 16 else 1, "GROUP_M": 8}
    tried: dict[str, tuple[Launch, Machine]] = {}

    def compiled(candidates: list[Launch]) -> None:
        wanted = jobs(kernel, target, [c | split for c in candidates])
        for made, machine in zip(wanted, compile_all(wanted, workers, limit=120), strict=True):
            if not isinstance(machine, Failure):
                shown = parameters(made)
                tried[json.dumps(shown, sort_keys=True)] = (shown, machine)

    def ranked() -> list[tuple[float, Launch]]:
        found = []
        for shown, machine in tried.values():
            for launch in spread(kernel, shown, limit):
                lines = [line(kernel, machine, launch, rows, of) for rows in ROWS[limit]]
                time = sum(modelled(each) for each in lines)
                if time != float("inf") and not any(e.problems for e in lines if e.rows in JUDGED[limit]):
                    found.append((time, launch | {"resident": lines[0].resident} if limit == 16 else launch))
        return sorted(found, key=lambda f: (f[0], json.dumps(f[1], sort_keys=True)))

    compiled(list(tiles(kernel, limit, amd))[: 3 if quick else None])
    seen: set[tuple[int, ...]] = set()
    for deep in (True, False):
        if not quick and kernel.kind == "gemm" and (deep or not ranked()):
            best = ranked()[:1] if deep else [(0.0, launch) for launch, _ in list(tried.values())]
            for _, launch in best:
                key = tuple(launch.get(k, 0) for k in ("BLOCK_M", "BLOCK_N", "num_warps"))
                if key not in seen:
                    seen.add(key)
                    compiled(
                        list(deeper({k: v for k, v in launch.items() if k not in (*split, "resident")}, limit, amd))
                    )
    for time, launch in ranked()[:12]:
        if not wrong(held, target, limit, launch):
            return launch, time
    return None


def mended(held: Sequence[Kernel], target: str, limit: int | None) -> tuple[Launch, float] | None:
    """The first entry near the one that is there, then of the usual tiles, with which nothing is wrong."""
    of, amd, kernel = chip(target), target.startswith("gfx"), held[0]
    [now] = jobs(kernel, target, [configs.launch(kernel, target, ROWS[limit][0])])
    split = {"SPLIT_K": 8 if limit == 16 else 1, "GROUP_M": 1 if limit == 16 else 16}
    near = [parameters(now)]
    if kernel.kind == "gemm":
        near = [near[0] | split, near[0] | split | {"num_stages": 1 if amd else 2}]
    near += [launch | (split if kernel.kind == "gemm" else {}) for launch in tiles(kernel, limit, amd)]
    if kernel.kind == "gemm":
        near += [launch | {"BLOCK_K": 64} for launch in near] + [
            launch | {"num_stages": 1 if amd else 2} for launch in near
        ]
    seen = []
    for launch in near:
        [wanted] = jobs(kernel, target, [launch])
        launch = parameters(wanted)
        if launch in seen:
            continue
        seen.append(launch)
        [made] = compile_all([wanted], 1, limit=120)
        if isinstance(made, Failure):
            continue
        lines = [line(kernel, made, launch, rows, of) for rows in JUDGED[limit]]
        entry = launch | {"resident": lines[0].resident} if limit == 16 and kernel.kind == "gemm" else launch
        fit = dict(configs.fitted(kernel, target, entry))
        lines = [line(kernel, made, fit, rows, of) for rows in JUDGED[limit]]
        if any(each.problems for each in lines) or wrong(held, target, limit, entry):
            continue
        return entry, sum(modelled(each) for each in lines)
    return None


def classes(limit: int | None) -> dict[str, list[Kernel]]:
    """The kernels of each class that are launched for so many rows, the one with the most work first."""
    plain = [kernels.linear("w4a16"), kernels.linear("w8a8")]
    given = {k: None for recipe in kernel_cases.RECIPES for k in kernel_cases.kernels(recipe)}
    found: dict[str, list[Kernel]] = {}
    for kernel in dict.fromkeys([*plain, *(part for k in given for part in launched(k, ROWS[limit][0]))]):
        found.setdefault(configs.class_of(kernel), []).append(kernel)
    for name, held in found.items():
        first = [k for k in held if k in plain]  # those of the contest
        rest = sorted((k for k in held if k not in plain), key=lambda k: (k.outputs > 11264, -k.columns * k.outputs))
        found[name] = first + rest
    return found


def main() -> int:
    options = arguments(
        __doc__.splitlines()[0],
        targets={"nargs": "+", "default": list(TARGETS), "metavar": "TARGET"},
        classes={"nargs": "+", "default": [], "metavar": "WORDS", "help": "only classes that begin so"},
        limits={"nargs": "+", "default": ["16", "64", "None"], "metavar": "ROWS"},
        workers={"type": int, "default": 1},
        mend={"action": "store_true", "help": "only classes in which something is wrong"},
        dry={"action": "store_true", "help": "print, do not write"},
    )
    for limit in sorted((each for each in ROWS if str(each) in options.limits), key=lambda each: each == 64):
        held = classes(limit)
        for name, target in itertools.product(sorted(held), options.targets):
            if not options.classes or any(name.startswith(c) for c in options.classes):
                run(name, held[name], target, limit, options)
    return 0


def run(name: str, held: Sequence[Kernel], target: str, limit: int | None, options: Any) -> None:
    """Search for one class and write what is found."""
    if options.mend:
        problems = wrong(held, target, limit, None)
        if not problems:
            return
        note(f"{name} {target} {limit}: {', '.join(dict.fromkeys(problems))}")
    find = mended if options.mend else functools.partial(search, workers=options.workers, quick=options.quick)
    found = find(held, target, limit)
    if found is None:
        note(f"{name} {target} {limit}: NOTHING has nothing wrong")
        return
    note(f"{name} {target} {limit}: {found[0]} modelled {found[1] * 1e6:.1f} us (not timed)")
    if not options.dry:
        body = (triton_gemm if held[0].kind == "gemm" else triton_rows).body(held[0], "f16")
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
    configs.reread()


if __name__ == "__main__":
    sys.exit(main())
