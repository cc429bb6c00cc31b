"""Kernels for the CPU: a spec as C++ that is compiled at run time, behind a torch op.

    made = kernel(region.kernel, "f32")
    held = made.prepare(region.bind("f32"))          the weights as the CPU reads them, once
    y = made.op(*inputs, *(held[name] for name in made.weights))

What crosses the border of a kernel, weights aside, is what crosses the border of its Triton file: int8 codes less
their shift in rows of `padded(K)`, planes of 4-bit codes by halves of a span, float32 scales, floats in the kernel's
dtype. So kernels of both kinds can follow each other, and one eager reference judges both.

Without a compiler, and for kernels that no C++ is written for, the op runs the eager reference and `prepare` is the
identity.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from planish.codegen import cpp_build, cpp_gemm, cpp_headers, cpp_op, cpp_pack, cpp_rows, triton_source
from planish.codegen.gemm_reference import reference as gemm_reference
from planish.codegen.kernel_spec import Kernel, Tensor
from planish.codegen.triton import check_dtype
from planish.codegen.triton_check import TORCH
from planish.codegen.triton_eager import eager_lines
from planish.codegen.triton_file import cost_lines, ir_lines, results, stem
from planish.ir.errors import PlanishError

if TYPE_CHECKING:
    import torch

NAMESPACE = "planish_cpu"


@dataclass(frozen=True, eq=False)
class CpuKernel:
    """A kernel for the CPU.

    Attributes:
        name: a readable stem and a hash of the content.
        op: planish_cpu::`name`; takes `inputs`, then `weights`; returns the outputs of the spec in order, a tensor
            or a tuple of several.
        inputs, weights: names of border tensors, in the op's order; the weights as `prepare` returns them.
        reference: what the kernel computes, in plain torch; takes inputs and weights as `Region.bind` gives them, by
            keyword.
        text: the C++ file; "" where the op runs the reference.
        pending: its library; None where there is no file.
    """

    name: str
    kernel: Kernel
    dtype: str
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    op: Any
    reference: Callable[..., Any]
    text: str
    pending: cpp_build.Pending | None = None

    def prepare(self, bound: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights in the CPU's layout (`cpp_pack`), from those of `Region.bind`.

        Args:
            bound: the kernel's weights by name.
        """
        found = dict(bound)
        if self.text and self.kernel.kind == "gemm":
            found = cpp_pack.prepared(self.kernel, self.dtype, bound)
        return {name: found[name] for name in self.weights}


# -- the file ------------------------------------------------------------------------------------

CONSTANTS = """\
static float constants[{0}][2];

extern "C" void set_constants(const float *given) {{ std::memcpy(constants, given, sizeof constants); }}
"""


def constants_of(kernel: Kernel) -> tuple[float, ...]:
    """What the text of a kernel leaves open, for `cpp_build.start`."""
    return cpp_rows.with_constants(kernel)[1]


def text_of(kernel: Kernel, dtype: str) -> str:
    """The C++ file of a kernel; its function `entry` takes the border tensors in order, scratch aside, M, threads.

    Its function `set_constants`, if it has `constants_of` the kernel, takes these before that.

    Args:
        dtype: the kernel's float: "f32", "bf16" or "f16".

    Raises:
        PlanishError: a kernel that no C++ is written for.
    """
    kernel, constants = cpp_rows.with_constants(kernel)
    body = cpp_gemm.body(kernel, dtype) if kernel.kind == "gemm" else cpp_rows.prologue(kernel, dtype)
    size = f"[M, {kernel.columns}]" + (f" -> [M, {kernel.outputs}]" if kernel.outputs else "")
    lines = [f"{kernel.kind} on {size}, written by planish", ""]
    lines += [*ir_lines(kernel, dtype), "", *cost_lines(kernel, dtype)]
    count = sum(t.role != "scratch" for t in kernel.tensors)
    return "\n".join(
        [
            *(f"// {line}".rstrip() for line in lines),
            "#include <omp.h>",
            "",
            cpp_headers.text(("base.h", *body.headers)),
            *([CONSTANTS.format(len(constants) // 2)] if constants else []),
            cpp_rows.border(kernel, dtype),
            "",
            body.text,
            "",
            'extern "C" void entry(void *const *tensors, int64_t M, int threads) {',
            f'    static_assert(sizeof(Border) == {count} * sizeof(void *), "pointers only");',
            "    Border b;",
            "    std::memcpy((void *)&b, tensors, sizeof b);",
            "    run(b, M, threads);",
            "}",
            "",
        ]
    )


# -- the reference -------------------------------------------------------------------------------


def reference_text(kernel: Kernel, dtype: str) -> str:
    """A Python file with one function, `reference`: what a kernel computes, in plain torch."""
    if kernel.kind == "gemm":
        lines, names = gemm_reference(kernel, dtype)
    else:
        lines, names = eager_lines(kernel.steps, {t.name: t for t in kernel.tensors})
    pieces = [piece.text for piece in triton_source.gathered(names)]
    head = f"def reference({', '.join(t.name for t in _given(kernel))}):"
    body = [f"    dtype = torch.{TORCH[dtype]}", *(f"    {line}" for line in lines)]
    body += [f"    return {', '.join(t.name for t in results(kernel))}"]
    imports = "from __future__ import annotations\n\nimport math\n\nimport torch"
    return "\n\n\n".join([imports, *pieces, "\n".join([head, *body])]) + "\n"


def _reference(text: str) -> Callable[..., Any]:
    names: dict[str, Any] = {}
    exec(compile(text, "<planish reference>", "exec"), names)
    found: Callable[..., Any] = names["reference"]
    return found


# -- the op --------------------------------------------------------------------------------------


def _given(kernel: Kernel) -> list[Tensor]:
    """The tensors that an op takes, in order: inputs, then weights."""
    return [t for role in ("input", "weight") for t in kernel.tensors if t.role == role]


def _dtype(tensor: Tensor, dtype: str) -> torch.dtype:
    import torch

    kind: torch.dtype = getattr(torch, TORCH[dtype if tensor.dtype == "float" else tensor.dtype])
    return kind


def _slots(kernel: Kernel, dtype: str, tensors: list[Tensor]) -> list[cpp_op.Slot]:
    """Tensors of an op, as `cpp_op` takes them."""
    border = [t.name for t in kernel.tensors if t.role != "scratch"]
    found = []
    for t in tensors:
        shape = tuple(-1 if d == "M" else int(d) for d in t.shape)
        found.append(cpp_op.Slot(t.name, TORCH[dtype if t.dtype == "float" else t.dtype], shape, border.index(t.name)))
    return found


def _rows_at(kernel: Kernel) -> tuple[int, int] | None:
    """Which of the given tensors has an axis "M", and which of its axes; None if none has."""
    for i, tensor in enumerate(_given(kernel)):
        if "M" in tensor.shape:
            return i, tensor.shape.index("M")
    return None


@lru_cache(maxsize=1)
def _library() -> Any:
    import torch

    made: Any = torch.library.Library
    return made(NAMESPACE, "FRAGMENT")


def _register(name: str, kernel: Kernel, dtype: str, run: Callable[..., Any], pending: cpp_build.Pending | None) -> Any:
    """The op of a kernel: a boxed function of `pending`, or `run`, on the CPU; shapes alone elsewhere."""
    import torch

    place = _rows_at(kernel)
    made = [(t.shape, _dtype(t, dtype)) for t in results(kernel)]

    def fake(*tensors: torch.Tensor) -> Any:
        rows = tensors[place[0]].shape[place[1]] if place is not None else 1
        found = tuple(
            tensors[0].new_empty([rows if d == "M" else d for d in shape], dtype=kind) for shape, kind in made
        )
        return found if len(found) > 1 else found[0]

    back = ", ".join(["Tensor"] * len(made))
    back = f"({back})" if len(made) > 1 else back
    arguments = ", ".join(f"Tensor {t.name}" for t in _given(kernel))
    library = _library()
    library.define(f"{name}({arguments}) -> {back}", tags=(torch.Tag.pt2_compliant_tag,))
    if pending is None or not cpp_op.register(
        NAMESPACE,
        name,
        _slots(kernel, dtype, _given(kernel)),
        _slots(kernel, dtype, results(kernel)),
        sum(t.role == "input" for t in kernel.tensors),
        place,
        pending,
    ):
        library.impl(name, run, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def runner(kernel: Kernel, dtype: str, pending: cpp_build.Pending) -> Callable[..., Any]:
    """The op's function: it checks its inputs, makes its outputs and calls the library."""
    import torch

    place = _rows_at(kernel)
    wanted = [(t.name, t.shape, _dtype(t, dtype)) for t in _given(kernel) if t.role == "input"]
    order = {t.name: i for i, t in enumerate([*_given(kernel), *results(kernel)])}
    border = [order[t.name] for t in kernel.tensors if t.role != "scratch"]
    made = [(t.shape, _dtype(t, dtype)) for t in results(kernel)]
    pointers = ctypes.c_void_p * len(border)
    empty, threads = torch.empty, torch.get_num_threads
    straight = border == list(range(len(border)))
    entry: Any = None

    def run(*tensors: torch.Tensor) -> Any:
        nonlocal entry
        if entry is None:
            entry = pending.library().entry
            entry.argtypes, entry.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int), None
        rows = tensors[place[0]].shape[place[1]] if place is not None else 1
        for tensor, (name, shape, kind) in zip(tensors, wanted, strict=False):
            if tensor.dtype is not kind or tensor.shape != tuple(rows if d == "M" else d for d in shape):
                expected = [rows if d == "M" else d for d in shape]
                raise PlanishError(
                    f"{name}: expected {kind} {expected}, got {tensor.dtype} {list(tensor.shape)}", where=pending.name
                )
        held = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]
        found = [empty([rows if d == "M" else d for d in shape], dtype=kind) for shape, kind in made]
        if rows:
            places = [tensor.data_ptr() for tensor in (*held, *found)]
            entry(pointers(*(places if straight else [places[i] for i in border])), rows, threads())
        return tuple(found) if len(found) > 1 else found[0]

    return run


def _eager(kernel: Kernel, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The op's function where the reference stands for the kernel."""
    order = [t.name for t in _given(kernel)]

    def run(*tensors: torch.Tensor) -> Any:
        return reference(**dict(zip(order, tensors, strict=True)))

    return run


_known: dict[str, CpuKernel] = {}  # by name: specs that differ only in what no text says share an op


def known(name: str) -> CpuKernel | None:
    """The kernel of this process that has a name."""
    return _known.get(name)


def _named(spec: Kernel, dtype: str, text: str, constants: tuple[float, ...] = ()) -> str:
    """A readable stem and a hash of the content."""
    digest = hashlib.sha256(f"{text}{constants or ''}".encode()).hexdigest()[:10]
    return re.sub(r"\W", "_", f"{stem(spec, dtype)}_{digest}")


@lru_cache(maxsize=4096)
def kernel(spec: Kernel, dtype: str = "f32") -> CpuKernel:
    """The kernel of a spec; one for equal specs of a process. Its file is compiled in the background.

    Args:
        dtype: what "float" stands for: "f32", "bf16" or "f16".

    Raises:
        PlanishError: another dtype.
    """
    check_dtype(dtype)
    written = reference_text(spec, dtype)
    reference, text = _reference(written), ""
    if cpp_build.compiler():
        try:
            text = text_of(spec, dtype)
        except PlanishError:  # the reference stands for what no C++ is written for
            text = ""
    border = "\n".join(ir_lines(spec, dtype))  # the text of a C++ file has it; two references may be alike without it
    constants = constants_of(spec) if text else ()
    name, library = _named(spec, dtype, text or f"{border}\n{written}", constants), _named(spec, dtype, text)
    if name in _known:
        return _known[name]
    pending = cpp_build.start(text, library, constants) if text else None
    run = runner(spec, dtype, pending) if pending is not None else _eager(spec, reference)
    inputs = tuple(t.name for t in spec.tensors if t.role == "input")
    weights = tuple(t.name for t in spec.tensors if t.role == "weight")
    op = _register(name, spec, dtype, run, pending)
    _known[name] = CpuKernel(name, spec, dtype, inputs, weights, op, reference, text, pending)
    return _known[name]
