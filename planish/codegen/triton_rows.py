"""The text of row programs: whole rows of a value through norm, affine, gather, Hadamard, low-rank down, quantise.

A program owns BLOCK_M rows. A row lies in registers as a tile [BLOCK_M, W], W the next power of two, as float32;
columns beyond it are zero. Rows of more than `LARGEST` columns are read in parts, once for each of their statistics and
once for the results: what a part needs is computed again, the second reading comes from the L2 cache.

A low-rank down wants many rows at once for tensor cores and few columns at a time. Where there is one, a program
multiplies its BLOCK_M rows first, BLOCK_K columns at a time, and then takes ROWS of them at a time through the rest.

Names in the text are those of the spec; a value on another tile than that of whole rows has a suffix.
"""

from __future__ import annotations

from collections.abc import Sequence

from planish.codegen.kernel_spec import Kernel, Step, Tensor
from planish.codegen.row_steps import MOST_INNER, RowSteps
from planish.codegen.row_weights import LARGEST_BASE
from planish.codegen.row_writer import PART, Rows, parts, power
from planish.codegen.triton_body import Body, Parameter
from planish.codegen.triton_eager import eager_lines
from planish.kernels.table import ROWS


def refusal(steps: Sequence[Step], columns: int) -> str:
    """Why these steps cannot be written as a row program on rows of so many columns; "" if they can."""
    turned: dict[str, int] = {}  # what lies behind a Hadamard transform: the largest block
    for step in steps:
        options = dict(step.options)
        block = max(turned.get(name, 0) for name in step.reads)
        if step.row in ("gather", "reassemble") and block:
            return "columns are gathered behind a Hadamard transform: they cannot be computed one by one"
        if step.row == "down" and block > MOST_INNER and parts(steps, columns):
            return (
                f"a low-rank down behind blocks of {block} columns, of a row that is read in parts: fold the transform"
            )
        block = max(block, int(options["block"]) if step.row == "hadamard" else 0)
        turned |= dict.fromkeys(step.writes, block)
        if step.row not in ROWS:
            return f"there is no row '{step.row}' in planish.kernels.table"
        if step.row == "hadamard":
            block, base = int(options["block"]), int(options.get("base", 1))
            if base > LARGEST_BASE:
                return f"the Hadamard matrix of order {block} has a dense factor of {base}, more than {LARGEST_BASE}"
            if base > 1 and columns > block:
                return f"several blocks of {block} columns, each with a dense factor of {base}, do not lie on a tile"
            if parts(steps, columns) and (base > 1 or PART % block):
                return f"a row of {columns} columns is read in parts, which blocks of {block} do not divide"
        if step.row == "quantize_group" and int(options["group"]) & (int(options["group"]) - 1):
            return f"groups of {options['group']} columns are no power of two"
    return ""


def _parameters(program: RowSteps, columns: int, downs: bool) -> tuple[Parameter, ...]:
    width = power(program.part or columns)
    fits = max(1, min(16, 4096 // width))
    sizes = "(1, 2, 4, 8, 16, 32, 64, 128)"
    if not downs:
        return (Parameter("BLOCK_M", fits, f"BLOCK_M in {sizes}", "rows of a program"),)
    inner = program.inner_block()
    return (
        Parameter("BLOCK_M", 16, f"BLOCK_M in {sizes} and BLOCK_M % ROWS == 0", "rows of a program"),
        Parameter("ROWS", min(fits, 16), f"ROWS in {sizes}", "rows at a time, after the low-rank down"),
        Parameter(
            "BLOCK_K",
            max(128, inner),
            f"BLOCK_K in (32, 64, 128, 256, 512) and BLOCK_K % {inner} == 0",
            "columns at a time of the low-rank down",
        ),
    )


def body(kernel: Kernel, dtype: str) -> Body:
    """The body of a prologue kernel.

    Args:
        dtype: the kernel's float: "f16", "bf16" or "f32".
    """
    program = RowSteps(
        {t.name: t for t in kernel.tensors}, kernel.steps, kernel.columns, part=parts(kernel.steps, kernel.columns)
    )
    downs = program.early_downs()
    parameters = _parameters(program, kernel.columns, bool(downs))
    names = [f"{t.name}_ptr" for t in kernel.tensors] + ["M"] + [f"{p.name}: tl.constexpr" for p in parameters]
    head = f"def kernel({', '.join(names)}):"
    if len(head) > 118:
        head = "\n".join(["def kernel(", *(f"    {name}," for name in names), "):"])
    if downs:
        program.line("first = tl.program_id(0) * BLOCK_M")
        program.block(downs, "BLOCK_K")
        program.tiles()
    else:
        program.line("offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)")
        program.line("mask_m = offs_m < M")
        program.rows(Rows("", "offs_m", "mask_m", "BLOCK_M"))
    eager, references = eager_lines(kernel.steps, {t.name: t for t in kernel.tensors})
    return Body(
        kernel="\n".join(["@triton.jit", head, *program.lines]),
        functions=tuple(program.functions),
        reference="\n".join(eager),
        references=references,
        grid="(triton.cdiv(M, launch.BLOCK_M),)",
        parameters=parameters,
    )


def closing(
    steps: Sequence[Step], tensors: Sequence[Tensor], columns: int, indent: int
) -> tuple[list[str], tuple[str, ...]]:
    """The lines that run a row program within another kernel, and the device functions that they call.

    The rows are `first` to `first + BLOCK_M` of M, ROWS (a constexpr) at a time. What the steps read and do not make
    is loaded from border tensors, past the L1 cache: other programs of the launch wrote it.

    Args:
        columns: of the rows.
        indent: of the lines, in steps of four blanks.
    """
    program = RowSteps({t.name: t for t in tensors}, steps, columns, fresh=True, part=parts(steps, columns))
    program.indent = indent
    downs = program.early_downs()
    if downs:
        program.block(downs, str(max(64, program.inner_block())))
    program.tiles()
    return program.lines, tuple(program.functions)
