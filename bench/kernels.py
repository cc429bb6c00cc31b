"""The kernel sheet of every recipe on six chips, the opponents' kernels beside ours, the fused low-rank branch.

    python bench/kernels.py [--quick] [--json FILE] [--targets sm_90 ...] [--recipes w4a16 ...] [--workers 2]

Compiled ahead of time and counted; no kernel is run. Not timed on a GPU: times are those of the roofline.

1. A decoder block's kernels at the sizes of 7 billion parameters, as `select` cuts them under each recipe, with 1, 16
   and 512 rows, in the launch parameters of configs.json; a gemm with closing steps on 512 rows is the two kernels that
   are launched. With 2048 rows as well, where bytes are shown, not judged: neither operand of the widest linears fits
   into the cache of most chips then (docs/targets.md).
2. W4A16 (int4, groups of 128) and W8A8 (int8 by token and channel), float16 scales, 4096 x 4096: instructions of the
   main loop for 1000 useful operations, spills, bytes; gemlite and torchao in their best configuration.
3. W4A4 with a low-rank branch of 32: launches and bytes of the fused pair of kernels and of a kernel for each step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import kernel_anchors
import kernel_cases
from common import Outcome, Target, arguments, note, table

from planish.codegen import configs
from planish.codegen.chips import TARGETS, chip
from planish.codegen.cost import Cost, cost, least, total
from planish.codegen.gemm_parts import launched
from planish.codegen.kernel_spec import Activation, Branch, Kernel, Product, Step, Tensor, Weight, half_of
from planish.codegen.sheet import Line, record, sheet, text

WIDTH, GROUP, RANK = 4096, 128, 32
QUICK_RECIPES, QUICK_TARGETS = ("w8a8-token", "w4a16", "svdquant"), ("sm_90", "gfx942")


# -- 1. the sheet --------------------------------------------------------------------------------


def kernels_of(recipe: str, quick: bool) -> list[Kernel]:
    """A recipe's kernels, as often as they are launched; with `quick` one of each class, the largest."""
    counted = kernel_cases.kernels(recipe)
    if not quick:
        return [k for k, n in counted.items() for _ in range(n)]
    largest: dict[str, Kernel] = {}
    for kernel in counted:
        name = configs.class_of(kernel)
        held = largest.get(name)
        if held is None or kernel.columns * max(kernel.outputs, 1) > held.columns * max(held.outputs, 1):
            largest[name] = kernel
    return list(largest.values())


def sheets(
    recipes: Iterable[str], targets: Sequence[str], rows: Sequence[int], quick: bool, workers: int
) -> list[Line]:
    """The lines of all recipes and targets."""
    found: list[Line] = []
    for recipe in recipes:
        kernels = kernels_of(recipe, quick)
        for target in targets:
            lines = sheet(kernels, target, rows, workers=workers)
            print(f"\n{recipe}, {target} ({chip(target).name})\n{text(lines)}", flush=True)
            found += [(recipe, line) for line in lines]
    return found


def summary(lines: Sequence[tuple[str, Line]], targets: Sequence[str]) -> list[list[Any]]:
    """A row for each recipe and target: the worst of its kernels, the times of the block."""
    rows = []
    for recipe in dict.fromkeys(r for r, _ in lines):
        for target in targets:
            held = [line for r, line in lines if r == recipe and line.target == target]
            made = [line.machine for line in held if line.machine is not None]
            tensor = sorted({op.split(".")[0] for m in made for op in m.tensor})
            times = []
            for m in (1, 512):
                at = [line for line in held if line.rows == m]
                times.append(sum(line.count * max(line.seconds, line.issue_seconds) for line in at) * 1e6)
            kernels = len({line.kernel for line in held})
            rows.append(
                [recipe, target, kernels, max((m.registers for m in made), default=0), sum(m.spills for m in made),
                 max((m.shared for m in made), default=0) // 1024, min((line.occupancy for line in held), default=0.0),
                 " ".join(tensor), max(line.cost.ratio for line in held if line.rows <= 512), *times]
            )  # fmt: skip
    return rows


SUMMARY = ("recipe", "target", "kernels", "most registers", "spills", "most shared, KiB", "least occupancy",
           "tensor cores", "bytes of the least, worst", "us at M = 1, modelled", "us at M = 512, modelled")  # fmt: skip


def judged(lines: Sequence[Line], rows: Sequence[int]) -> list[Target]:
    """The targets of the sheet."""
    made = [line for line in lines if line.machine is not None]
    return [
        Target("kernels that do not compile", len(lines) - len(made), 0),
        Target("kernels with spills", sum(line.machine.spills > 0 for line in made if line.machine), 0),
        Target("kernels that do not fit", sum(not line.resident for line in made), 0),
        Target(
            "gemms without tensor cores",
            sum(line.kernel.kind == "gemm" and not line.machine.tensor for line in made if line.machine),
            0,
        ),
        Target("kernels without 16-byte loads", sum(not line.machine.wide for line in made if line.machine), 0),
        # with many rows a gemm with closing steps is two launches (gemm_parts): each is held to its own least
        Target("bytes over the least possible", max(line.cost.ratio for line in lines if line.rows in rows), 1.05),
    ]


def parted(lines: Sequence[tuple[str, Line]]) -> list[list[Any]]:
    """Of gemms with closing steps on many rows: the bytes of their two launches over the least of one.

    That one would keep its rows on the chip, which no kernel here does: shown, not judged.
    """
    at = {(recipe, line.target, line.rows, line.kernel): line.cost for recipe, line in lines}
    found = []
    for recipe, target, rows in dict.fromkeys((recipe, line.target, line.rows) for recipe, line in lines):
        for kernel in kernel_cases.kernels(recipe):
            both = [at.get((recipe, target, rows, part)) for part in launched(kernel, rows)]
            costs = [c for c in both if c is not None]
            if len(costs) == 2:
                ratio = sum(c.moved for c in costs) / least(kernel, rows)
                found.append([recipe, chip(target).name, rows, max(c.ratio for c in costs), ratio])
    return found


# -- 2. the opponents ----------------------------------------------------------------------------


def linear(kind: str, n: int = WIDTH, k: int = WIDTH) -> Kernel:
    """Our kernel for W4A16 or W8A8: a plain linear."""
    x = Tensor("a", "float" if kind == "w4a16" else "i8", ("M", k), "input")
    out = Tensor("out", "float", ("M", n), "output")
    if kind == "w4a16":
        packed = Tensor("weight", "i8", (n, k // 2), "weight", packed=2)
        scale = Tensor("weight_scale", "f16", (k // GROUP, n), "weight")
        weight = Weight("int4", "weight", "weight_scale", group=GROUP, half=half_of(4))
        return Kernel("gemm", k, n, (x, packed, scale, out), activation=Activation("float", "a"),
                      products=(Product(weight, "out"),))  # fmt: skip
    codes = Tensor("weight", "i8", (n, k), "weight")
    scales = (Tensor("a_scale", "f32", ("M",), "input"), Tensor("weight_scale", "f16", (n,), "weight"))
    return Kernel("gemm", k, n, (x, scales[0], codes, scales[1], out),
                  activation=Activation("codes", "a", 8, "token", scale="a_scale"),
                  products=(Product(Weight("int8", "weight", "weight_scale"), "out"),))  # fmt: skip


def contest(targets: Sequence[str], workers: int) -> tuple[list[dict[str, Any]], list[Target]]:
    """Ours beside the opponents'; targets: theirs over ours must be 1 or more, spills and bytes no worse."""
    found: list[dict[str, Any]] = []
    worst, spills, more = float("inf"), 0, float("inf")
    for target in targets:
        for kind in ("w4a16", "w8a8"):
            for rows in (16, 2048):
                [ours] = sheet([linear(kind)], target, [rows], workers=workers)
                if ours.machine is None:
                    found.append({"target": target, "kind": kind, "rows": rows, "whose": "planish", "why": ours.reason})
                    worst = 0.0
                    continue
                tile = tuple(ours.launch[k] for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
                best = kernel_anchors.per_kflop((tile[0], tile[1], tile[2]), ours.machine, rows)
                amount = least(linear(kind), rows)
                found.append(_row(target, kind, rows, "planish", ours.launch, ours.machine, best, amount))
                spills += ours.machine.spills
                theirs = kernel_anchors.gemlite(kind, target, rows, WIDTH, WIDTH)
                theirs += kernel_anchors.torchao(kind, target, rows, WIDTH, WIDTH)
                for name, (anchor, machine) in kernel_anchors.best(theirs, rows, workers).items():
                    tile_ = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), anchor.tile, strict=True))
                    launch = {**tile_, "num_warps": anchor.job.warps, "num_stages": anchor.job.stages}
                    each = kernel_anchors.per_kflop(anchor.tile, machine, rows)
                    x = rows * WIDTH * (2 if kind == "w4a16" else 1) + (0 if kind == "w4a16" else 4 * rows)
                    bytes_ = round(anchor.weight_bytes + x + 2 * rows * WIDTH + anchor.extra)
                    found.append(_row(target, kind, rows, name, launch, machine, each, bytes_))
                    worst = min(worst, each / best)
                    more = min(more, bytes_ / amount)
                note(f"{target} {kind} {rows} rows done")
    return found, [
        Target("instructions, theirs over ours", worst, 1.0, at_most=False),
        Target("our spills", spills, 0),
        Target("bytes, theirs over ours", more, 0.9999, at_most=False),
    ]


def _row(
    target: str, kind: str, rows: int, whose: str, launch: Any, machine: Any, each: float, amount: int
) -> dict[str, Any]:
    tile = "x".join(str(launch[k]) for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return {
        "target": target, "kind": kind, "rows": rows, "whose": whose, "tile": tile, "warps": machine.warps,
        "stages": launch["num_stages"], "registers": machine.registers, "spills": machine.spills,
        "loop": machine.loop_length, "permutes": machine.loop.get("permute", 0), "instructions": each, "bytes": amount,
    }  # fmt: skip


# -- 3. the low-rank branch ----------------------------------------------------------------------


def branch_pair(rank: int = RANK, n: int = WIDTH, k: int = WIDTH) -> tuple[Kernel, Kernel]:
    """Prologue and gemm of W4A4 with a low-rank branch; without it where rank is 0."""
    group = 64
    options = (("bits", 4), ("signed", True), ("mode", "symmetric"), ("levels", 7.0), ("low", -8), ("high", 7))
    steps = [
        Step("mul", ("x", "by"), ("v",)),
        Step("quantize_group", ("v",), ("codes", "scale"), (*options, ("group", group))),
    ]
    made = [
        Tensor("codes", "i8", ("M", k // 2), "output", packed=2),
        Tensor("scale", "f32", ("M", k // group), "output"),
    ]
    read = [Tensor("x", "float", ("M", k), "input"), Tensor("by", "f32", (k,), "weight")]
    left: list[Tensor] = []
    if rank:
        steps.append(Step("down", ("x", "down"), ("left",), (("rank", rank),)))
        read.append(Tensor("down", "float", (rank, k), "weight"))
        made.append(Tensor("left", "float", ("M", rank), "output"))
        left = [Tensor("left", "float", ("M", rank), "input"), Tensor("up", "float", (n, rank), "weight")]
    first = Kernel("prologue", k, 0, (*read, *made), tuple(steps), row="x")
    tensors = (
        Tensor("a", "i8", ("M", k // 2), "input", packed=2), Tensor("a_scale", "f32", ("M", k // group), "input"),
        Tensor("weight", "i8", (n, k // 2), "weight", packed=2),
        Tensor("weight_scale", "f32", (k // group, n), "weight"), *left, Tensor("out", "float", ("M", n), "output"),
    )  # fmt: skip
    weight = Weight("int4", "weight", "weight_scale", group=group, half=half_of(4))
    branches = (Branch("left", "up", rank),) if rank else ()
    second = Kernel("gemm", k, n, tensors, activation=Activation("codes", "a", 4, "group", group, "a_scale"),
                    products=(Product(weight, "out", branches),))  # fmt: skip
    return first, second


def apart(n: int = WIDTH, k: int = WIDTH, rank: int = RANK) -> list[Kernel]:
    """A kernel for each step: scale and quantise, residual linear, down, up, add."""
    first, second = branch_pair(0, n, k)

    def float_linear(inputs: int, outputs: int) -> Kernel:
        tensors = (Tensor("a", "float", ("M", inputs), "input"), Tensor("weight", "float", (outputs, inputs), "weight"),
                   Tensor("out", "float", ("M", outputs), "output"))  # fmt: skip
        return Kernel("gemm", inputs, outputs, tensors, activation=Activation("float", "a"),
                      products=(Product(Weight("float", "weight"), "out"),))  # fmt: skip

    sum_ = Kernel(
        "prologue", n, 0,
        (Tensor("x", "float", ("M", n), "input"), Tensor("other", "float", ("M", n), "input"),
         Tensor("out", "float", ("M", n), "output")),
        (Step("add", ("x", "other"), ("out",)),), row="x",
    )  # fmt: skip
    return [first, second, float_linear(k, rank), float_linear(rank, n), sum_]


def branch_costs(target: str, rows: int) -> dict[str, tuple[int, Cost, float]]:
    """(launches, cost, roofline seconds) without a branch, with it fused, and apart."""
    of = chip(target)

    def priced(kernels: Iterable[Kernel]) -> tuple[int, Cost, float]:
        found = [cost(k, rows, _tile(k, target, rows), of, 1) for k in kernels]
        return len(found), total(found), sum(c.seconds(of) for c in found)

    return {"no branch": priced(branch_pair(0)), "fused": priced(branch_pair()), "apart": priced(apart())}


def _tile(kernel: Kernel, target: str, rows: int) -> dict[str, int]:
    few = {"BLOCK_M": 16, "BLOCK_N": 64} if rows <= 16 else {"BLOCK_M": 128, "BLOCK_N": 128, "GROUP_M": 16}
    return {**few, **configs.launch(kernel, target, rows)}


def main() -> int:
    options = arguments(
        __doc__.splitlines()[0],
        targets={"nargs": "+", "default": [], "metavar": "TARGET"},
        recipes={"nargs": "+", "default": [], "metavar": "RECIPE"},
        workers={"type": int, "default": 1, "help": "processes that compile"},
    )
    targets = options.targets or (QUICK_TARGETS if options.quick else TARGETS)
    recipes = options.recipes or (QUICK_RECIPES if options.quick else kernel_cases.RECIPES)
    held_to = (1, 512) if options.quick else (1, 16, 512)
    lines = sheets(recipes, targets, held_to if options.quick else (*held_to, 2048), options.quick, options.workers)
    table("the kernels of a decoder block (modelled, not timed)", SUMMARY, summary(lines, targets))
    figures: dict[str, Any] = {"sheet": [{"recipe": recipe, **record(line)} for recipe, line in lines]}
    figures["summary"] = [dict(zip(SUMMARY, row, strict=True)) for row in summary(lines, targets)]
    apart_ = parted(lines)
    table(
        "gemms with closing steps as two launches, bytes over the least",
        ["recipe", "chip", "rows", "each over its own", "both over that of one kernel"], apart_,
    )  # fmt: skip
    figures["parted"] = apart_
    found = judged([line for _, line in lines], held_to)
    if not options.quick:
        rows, more = contest(targets, options.workers)
        figures["contest"] = rows
        found += more
        head = list(rows[0])
        table(
            "main loops: instructions for 1000 useful operations", head, [[r.get(h, "-") for h in head] for r in rows]
        )
    shown = []
    for target in targets:
        for rows_ in (1, 512):
            costs = branch_costs(target, rows_)
            base = costs["no branch"][2]
            for name, (launches, held, seconds) in costs.items():
                shown.append(
                    [chip(target).name, rows_, name, launches, held.moved / 1e6, seconds * 1e6, seconds / base - 1]
                )
    table(
        f"W4A4 {WIDTH} x {WIDTH}, rank {RANK}: modelled, not timed",
        ["chip", "rows", "branch", "launches", "MB", "roofline us", "over no branch"], shown,
    )  # fmt: skip
    figures["branch"] = shown
    fused = max(row[6] for row in shown if row[2] == "fused")
    found.append(Target("fused branch over none, modelled", fused, 0.10))
    figures["apart"] = max(row[6] for row in shown if row[2] == "apart")
    print(f"over no branch, modelled, not timed: apart up to {figures['apart']:.0%}, fused up to {fused:.1%}")
    return Outcome("kernels", figures, found).finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
