"""A gemm with closing steps as two kernels, for launches on many rows.

    [tiles, rows] = launched(kernel, 512)      [kernel] = launched(kernel, 1)

Closing steps read rows that the tiles of the same launch wrote. With few rows they lie in the cache, and a launch is
saved. With many they cost what they save: the weight, which streams through the cache meanwhile, pushes the rows out to
DRAM, so that as many bytes move as with a kernel of its own (`planish.codegen.cost`); and the last tile of a block of
rows works through all of them on one multiprocessor while the others run dry. So the rows are then left to a second
launch, a row program spread over the whole chip. Both forms compute the same: rows are rounded to the kernel's float
in between either way.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from planish.codegen.kernel_spec import Kernel, Tensor

MOST_ROWS = 16  # on which closing steps are part of the gemm's launch: what one block of rows of a decoding gemm holds


def launched(kernel: Kernel, rows: int) -> tuple[Kernel, ...]:
    """The kernels that are launched for so many rows: itself, or the two parts of a gemm with closing steps."""
    return parts(kernel) if kernel.closing and rows > MOST_ROWS else (kernel,)


@cache
def parts(kernel: Kernel) -> tuple[Kernel, Kernel]:
    """A gemm with closing steps as a gemm that stores its rows, and a prologue that reads them.

    Border tensors keep their names; what was scratch is an output of the first and an input of the second.

    Raises:
        ValueError: a kernel without closing steps.
    """
    if not kernel.closing:
        raise ValueError("kernel: expected one with closing steps")
    read = {name for step in kernel.closing for name in step.reads}
    made = {name for step in kernel.closing for name in step.writes}
    on_tiles = {name for step in kernel.steps for name in (*step.reads, *step.writes)}
    on_tiles |= {name for p in kernel.products for name in (p.result, p.bias, *vars(p.weight).values())}
    on_tiles |= {name for p in kernel.products for b in p.branches for name in (b.left, b.right)}
    a = kernel.activation
    on_tiles |= {a.codes, a.scale, a.zero} if a is not None else set()
    first = [_as(t, "output") for t in kernel.tensors if t.name in on_tiles and t.name not in made]
    second = [_as(t, "input") for t in kernel.tensors if t.name in read - made]
    second += [t for t in kernel.tensors if t.name in made]
    row = next(t.name for t in second if t.shape == ("M", kernel.outputs) and t.role == "input")
    tiles = replace(kernel, tensors=tuple(first), closing=())
    rows = Kernel("prologue", kernel.outputs, 0, tuple(second), kernel.closing, row=row, names=kernel.names)
    return tiles, rows


def _as(tensor: Tensor, role: str) -> Tensor:
    """A border tensor of a part: results that lie between the parts leave the first and enter the second."""
    if tensor.role not in ("output", "scratch"):
        return tensor
    return replace(tensor, role="output" if role == "output" else "input")
