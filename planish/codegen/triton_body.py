"""What the writers of kernel bodies hand to `triton`, which makes a file of it.

    triton_rows.body(kernel) -> Body        a prologue
    triton_gemm.body(kernel) -> Body        a gemm

The file is written around it: docstring, device functions (found by name in planish/kernels/*.py, with whatever they
call, in dependency order), the kernel, the launcher, the op, the eager reference, the self-check.

Parameters of the kernel stand in one order: `{tensor.name}_ptr` for every border tensor of the spec, then
`{buffer.name}_ptr` for every buffer, then `M`, then the launch parameters, `NAME: tl.constexpr`. Sizes that the spec
fixes (K, N, groups) are written into the text as numbers or as module constants (`constants`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parameter:
    """A launch parameter: a field of the file's frozen dataclass `Launch`, a constexpr of its kernel.

    `num_warps` and `num_stages` are fields of every `Launch` and not listed.

    Attributes:
        name: upper case, as the kernel calls it: BLOCK_M.
        default: where no configuration is known for the target.
        check: a Python expression on the field's own name that must be true (`BLOCK_M in (16, 32, 64, 128)`).
        says: what it is, in a few words; shown beside the field and in the error.
    """

    name: str
    default: int
    check: str
    says: str


@dataclass(frozen=True)
class Buffer:
    """Memory of a launch that is no border tensor: counters, partial sums.

    Attributes:
        dtype: of torch: "int32", "float32".
        size: a Python expression of the number of elements; it may use M, `launch.NAME`, the module's constants and
            `triton.cdiv`.
        zeroed: whether the kernel needs it to be zero.
    """

    name: str
    dtype: str
    size: str
    zeroed: bool = True


@dataclass(frozen=True)
class Body:
    """The text of one kernel and what must stand around it.

    Attributes:
        kernel: `@triton.jit` and the function, which is called `kernel`.
        functions: the device functions that it calls by name; what those call is found by reading them.
        references: the eager functions that `reference` calls by name; the same.
        reference: the lines of the reference's body. Its locals are the border tensors of the spec by name (inputs,
            weights) and `dtype`, the kernel's float; it must assign every output by name.
        grid: a Python expression (tuple) of the launch grid, in terms as `Buffer.size`.
        parameters, buffers: see there.
        constants: module-level names and numbers, written before the kernel as tl.constexpr (K, N, ...).
    """

    kernel: str
    functions: tuple[str, ...]
    reference: str
    references: tuple[str, ...]
    grid: str
    parameters: tuple[Parameter, ...]
    buffers: tuple[Buffer, ...] = ()
    constants: tuple[tuple[str, int], ...] = ()
