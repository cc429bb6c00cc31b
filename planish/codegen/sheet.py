"""The kernel sheet: what the machine code of a plan's kernels says, for a chip that need not be here.

    lines = sheet(plan, "sm_90", rows=(1, 2048))
    print(text(lines))

Each kernel is emitted, compiled ahead of time with the launch parameters of its target (`configs`), and read: tensor
cores used, registers, spills, shared memory, resident warps, 16-byte loads, asynchronous copies. Beside it stand the
bytes and operations counted by `cost`, the roofline time, and the least time to start the instructions that were
counted: modelled, not timed. Nothing here needs a GPU.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from planish.codegen.aot import Failure, Job, compile_all
from planish.codegen.chips import Chip, chip
from planish.codegen.configs import fitting
from planish.codegen.configs import launch as known_launch
from planish.codegen.cost import Cost, cost
from planish.codegen.gemm_parts import launched
from planish.codegen.kernel_spec import Kernel
from planish.codegen.machine import Machine

if TYPE_CHECKING:
    from planish.codegen.regions import Plan

ROWS = (1, 512)  # of the activation: a token, a prompt
MOST_BYTES = 1.05  # of the least possible


@dataclass(frozen=True)
class Line:
    """A kernel on a target with so many rows.

    Attributes:
        name: of the emitted file.
        count: launches of it in the plan.
        launch: the launch parameters.
        machine: its machine code; None where it did not compile.
        reason: why it did not.
        cost: bytes and operations of one launch.
    """

    name: str
    kernel: Kernel
    count: int
    target: str
    rows: int
    launch: Mapping[str, int]
    machine: Machine | None
    reason: str
    cost: Cost

    @property
    def chip(self) -> Chip:
        """The chip of the target."""
        return chip(self.target)

    @property
    def resident(self) -> int:
        """Blocks on a multiprocessor at once; 0 where one does not fit."""
        m = self.machine
        return self.chip.resident_blocks(m.registers, m.warps, m.shared, m.columns) if m is not None else 0

    @property
    def occupancy(self) -> float:
        """Resident warps as a part of the most that a multiprocessor holds."""
        return self.resident * self.machine.warps / self.chip.warps if self.machine is not None else 0.0

    @property
    def seconds(self) -> float:
        """Roofline time of a launch: modelled, not timed."""
        return self.cost.seconds(self.chip)

    @property
    def blocks(self) -> int:
        """Blocks of a launch."""
        down = -(-self.rows // self.launch.get("BLOCK_M", 1))
        across = -(-self.kernel.outputs // self.launch["BLOCK_N"]) if self.kernel.kind == "gemm" else 1
        return down * across * self.launch.get("SPLIT_K", 1)

    @property
    def instructions(self) -> float:
        """Warp instructions of a launch: the main loop as often as its tensor-core operations say, the rest once."""
        m = self.machine
        if m is None:
            return 0.0
        tensor = sum(n for kind, n in self.cost.operations.items() if kind != "f32")
        turns = tensor / m.loop_flops / self.blocks if m.loop_flops else 1.0
        return self.blocks * m.warps * (m.instructions + m.loop_length * max(turns - 1.0, 0.0))

    @property
    def issue_seconds(self) -> float:
        """The least time to start the instructions of a launch: modelled, not timed."""
        return self.instructions / (self.chip.units * self.chip.issue * self.chip.clock)

    @property
    def problems(self) -> tuple[str, ...]:
        """What a shipped configuration must not have; () where all is well."""
        if self.machine is None:
            return (f"does not compile: {self.reason}",)
        m, found = self.machine, []
        if m.spills:
            found.append(f"{m.spills} spills")
        if not self.resident:
            found.append(f"does not fit: {m.registers} registers, {m.shared} bytes of shared memory")
        if self.kernel.kind == "gemm" and not m.tensor:
            found.append("no tensor-core instruction")
        if not m.wide:
            found.append("no 16-byte load")
        if self.cost.ratio > MOST_BYTES:
            found.append(f"{self.cost.ratio:.3f} of the least possible bytes")
        return tuple(found)


def job(text: str, target: str, launch: Mapping[str, int]) -> Job:
    """The compilation of an emitted file with launch parameters; those not given keep the file's default.

    Args:
        text: of the file.

    Raises:
        ValueError: the file has no `SIGNATURE`, `Launch` or `kernel`.
    """
    tree = ast.parse(text)
    signature: dict[str, str] = {}
    defaults: dict[str, int] = {}
    names: set[str] | None = None
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "SIGNATURE":
            signature = ast.literal_eval(node.value)
        elif isinstance(node, ast.ClassDef) and node.name == "Launch":
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and n.value is not None]
            defaults = {
                n.target.id: ast.literal_eval(n.value) for n in fields if isinstance(n.target, ast.Name) and n.value
            }
        elif isinstance(node, ast.FunctionDef) and node.name == "kernel":
            names = {a.arg for a in node.args.args} - set(signature)
    if not signature or not defaults or names is None:
        raise ValueError("emitted file: expected SIGNATURE, Launch and kernel")
    values = {**defaults, **{k: v for k, v in launch.items() if k in defaults}}
    constants = {name: values[name] for name in defaults if name not in ("num_warps", "num_stages")}
    code = device_source(text)
    return Job(code, "kernel", signature, constants, target, values["num_warps"], values["num_stages"])


def device_source(text: str) -> str:
    """What of an emitted file the compiler needs: Triton's imports, constants, jitted functions.

    So an answer in the cache of `aot` holds as long as these stay, and torch is not imported to compile.
    """
    lines = text.splitlines()
    kept = []
    for node in ast.parse(text).body:
        start = node.lineno
        if isinstance(node, ast.Import):
            wanted = any(alias.name.split(".")[0] in ("triton", "math") for alias in node.names)
        elif isinstance(node, ast.Assign):
            wanted = "tl.constexpr" in ast.unparse(node.value) or isinstance(node.value, ast.Constant)
        elif isinstance(node, ast.FunctionDef):
            wanted = any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)
            start = min([start, *(d.lineno for d in node.decorator_list)])
        else:
            wanted = False
        if wanted:
            kept.append("\n".join(lines[start - 1 : node.end_lineno]))
    return "\n".join(kept) + "\n"


def parameters(job: Job) -> dict[str, int]:
    """All launch parameters of a job of `job`."""
    held = {k: int(v) for k, v in job.constants.items() if isinstance(v, int)}
    return {**held, "num_warps": job.warps, "num_stages": job.stages}


def sheet(
    kernels: Plan | Iterable[Kernel],
    target: str,
    rows: Sequence[int] = ROWS,
    dtype: str = "f16",
    workers: int = 1,
    launches: Mapping[int, Mapping[str, int]] | None = None,
) -> list[Line]:
    """The sheet of a plan's kernels, or of some kernels, each once, in their order.

    A gemm with closing steps is the one or two kernels that are launched for the rows (`gemm_parts`).

    Args:
        target: "sm_80", "sm_89", "sm_90", "sm_100", "sm_120" or "gfx942".
        rows: M, the rows of the activation; each gets the launch parameters that the configurations have for it.
        dtype: of the kernels' floats.
        workers: processes that compile.
        launches: launch parameters by rows, instead of the configurations'.

    Raises:
        PlanishError: an unknown target, or a kernel that cannot be emitted.
    """
    from planish.codegen import triton_gemm, triton_rows
    from planish.codegen.triton import emit_kernel

    of = chip(target)
    given = [r.kernel for r in kernels.kernels] if hasattr(kernels, "kernels") else list(kernels)
    of_rows = {m: Counter(part for k in given if k is not None for part in launched(k, m)) for m in rows}
    kernels_ = dict.fromkeys(part for k in given if k is not None for m in rows for part in launched(k, m))
    wanted = [(k, m) for k in kernels_ for m in rows if k in of_rows[m]]
    jobs = []
    for kernel, m in wanted:
        chosen = launches[m] if launches is not None else known_launch(kernel, target, m)
        body = (triton_gemm if kernel.kind == "gemm" else triton_rows).body(kernel, dtype)
        jobs.append(job(emit_kernel(kernel, dtype).text, target, fitting(chosen, body.parameters)))
    made = compile_all(jobs, workers)
    return [
        _line(kernel, of_rows[m][kernel], of, m, parameters(j), answer, dtype)
        for (kernel, m), j, answer in zip(wanted, jobs, made, strict=True)
    ]


def _line(
    kernel: Kernel, count: int, of: Chip, rows: int, launch: Mapping[str, int], made: Machine | Failure, dtype: str
) -> Line:
    from planish.codegen.triton import emit_kernel

    machine = made if isinstance(made, Machine) else None
    resident = 1
    if machine is not None:
        resident = of.resident_blocks(machine.registers, machine.warps, machine.shared, machine.columns)
    counted = cost(kernel, rows, launch, of, resident, dtype)
    reason = made.reason if isinstance(made, Failure) else ""
    return Line(emit_kernel(kernel, dtype).name, kernel, count, of.target, rows, launch, machine, reason, counted)


# -- as text -------------------------------------------------------------------------------------

HEAD = (
    "kernel", "n", "M", "tile", "warps", "registers", "spills", "shared", "occupancy", "tensor cores", "16-byte loads",
    "asynchronous", "bytes", "of the least", "roofline us", "set by", "issue us",
)  # fmt: skip


def cells(line: Line) -> tuple[str, ...]:
    """A line of the sheet, a text for each of `HEAD`."""
    m = line.machine
    tile = "x".join(str(line.launch[k]) for k in ("BLOCK_M", "BLOCK_N") if k in line.launch)
    tile += f" split {line.launch['SPLIT_K']}" if line.launch.get("SPLIT_K", 1) > 1 else ""
    start = (line.name.rpartition("_")[0] or line.name, str(line.count), str(line.rows), tile)
    end = (
        f"{line.cost.moved / 1e6:.2f} MB",
        f"{line.cost.ratio:.3f}",
        f"{line.seconds * 1e6:.1f}",
        line.cost.bound(line.chip),
        f"{line.issue_seconds * 1e6:.1f}",
    )
    if m is None:
        return (*start, *["-"] * 8, *end)
    copies = m.counts.get("async_copy", 0) + m.counts.get("bulk_copy", 0)
    return (
        *start, str(m.warps), str(m.registers), str(m.spills), f"{m.shared / 1024:.0f} KiB", f"{line.occupancy:.0%}",
        _opcodes(m) or "-", f"{m.wide} of {m.wide + m.narrow}", str(copies), *end,
    )  # fmt: skip


def _opcodes(machine: Machine) -> str:
    """Tensor-core instructions without their modifiers, with their number."""
    short: Counter[str] = Counter()
    for opcode, number in machine.tensor.items():
        short[opcode.split(".")[0] if opcode[0].isupper() else opcode] += number
    return ", ".join(f"{number} {name}" for name, number in sorted(short.items()))


def text(lines: Sequence[Line]) -> str:
    """The sheet as a table of plain text, then what is wrong, then sums of the plan by rows."""
    if not lines:
        return "no kernels"
    table = [HEAD, *(cells(line) for line in lines)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEAD))]
    shown = []
    for row in table:
        padded = [c.ljust(w) if i in (0, 9) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        shown.append("  ".join(padded))
    for line in lines:
        shown += [f"{line.name} at M = {line.rows}: {problem}" for problem in line.problems]
    of = lines[0].chip
    for rows in dict.fromkeys(line.rows for line in lines):
        held = [line for line in lines if line.rows == rows]
        moved = sum(line.count * line.cost.moved for line in held)
        least = sum(line.count * line.cost.least for line in held)
        seconds = sum(line.count * line.seconds for line in held)
        launches = sum(line.count for line in held)
        shown.append(
            f"M = {rows}: {launches} launches, {moved / 1e6:.2f} MB ({moved / least:.3f} of the least), "
            f"{seconds * 1e6:.1f} us on {of.name} by the roofline (modelled, not timed)"
        )
    return "\n".join(line.rstrip() for line in shown)


def record(line: Line) -> dict[str, Any]:
    """A line as data for JSON."""
    m = line.machine
    return {
        "kernel": line.name, "count": line.count, "target": line.target, "rows": line.rows, "launch": dict(line.launch),
        "machine": vars(m) if m is not None else None, "reason": line.reason, "occupancy": line.occupancy,
        "least": line.cost.least, "moved": line.cost.moved, "cached": line.cost.cached, "ratio": line.cost.ratio,
        "operations": dict(line.cost.operations), "modelled_seconds": line.seconds,
        "modelled_issue_seconds": line.issue_seconds, "problems": list(line.problems),
    }  # fmt: skip
