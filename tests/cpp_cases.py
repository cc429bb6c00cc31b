"""Row programs compiled into one library, for tests: each kernel in a namespace of its own, called through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch

from planish.codegen import cpp_build, cpp_headers, cpp_rows
from planish.codegen.kernel_spec import Kernel, Tensor

KINDS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i8": torch.int8, "i32": torch.int32}


def kind_of(tensor: Tensor, dtype: str) -> torch.dtype:
    return KINDS[dtype if tensor.dtype == "float" else tensor.dtype]


class Library:
    """Kernels of one compilation.

    Attributes:
        text: the C++ file.
    """

    def __init__(self, named: Mapping[str, tuple[Kernel, str]], *, wrong: tuple[str, str] | None = None) -> None:
        """Write the file.

        Args:
            named: label -> a kernel and its float dtype.
            wrong: a piece of the text, and what takes its place.
        """
        self.named = dict(named)
        headers: dict[str, None] = {}
        parts = []
        for label, (kernel, dtype) in named.items():
            made = cpp_rows.prologue(kernel, dtype)
            headers |= dict.fromkeys(made.headers)
            fields = [t for t in kernel.tensors if t.role != "scratch"]
            casts = ", ".join(f"(decltype(Border::{t.name}))tensors[{i}]" for i, t in enumerate(fields))
            entry = (
                f"void entry(void *const *tensors, int64_t M, int threads) {{ run(Border{{{casts}}}, M, threads); }}"
            )
            parts.append(f"namespace {label} {{\n{cpp_rows.border(kernel, dtype)}\n\n{made.text}\n\n{entry}\n}}\n")
            parts.append(f'extern "C" void {label}_entry(void *const *tensors, int64_t M, int threads) ' +
                         f"{{ {label}::entry(tensors, M, threads); }}\n")  # fmt: skip
        self.text = "\n".join([cpp_headers.text(headers), *parts])
        if wrong is not None:
            assert wrong[0] in self.text, wrong
            self.text = self.text.replace(*wrong)
        self._library: ctypes.CDLL | None = None

    def built(self) -> Library:
        """Compiled and loaded."""
        self._library = ctypes.CDLL(str(cpp_build.build(self.text, "tested")))
        return self

    def run(self, label: str, given: Mapping[str, torch.Tensor], threads: int = 1) -> dict[str, torch.Tensor]:
        """The outputs of a kernel by name; each stands between guards that must stay as they were."""
        assert self._library is not None
        kernel, dtype = self.named[label]
        rows = next(given[t.name].shape[0] for t in kernel.tensors if t.role == "input")
        made, guarded = {}, {}
        for t in kernel.tensors:
            if t.role == "output":
                shape = [rows if d == "M" else d for d in t.shape]
                size = torch.Size(shape).numel()
                whole = torch.full((size + 128,), 77, dtype=kind_of(t, dtype))
                guarded[t.name], made[t.name] = whole, whole[64 : 64 + size].view(shape)
        held = [(given | made)[t.name] for t in kernel.tensors if t.role != "scratch"]
        assert all(one.is_contiguous() for one in held)
        pointers = (ctypes.c_void_p * len(held))(*(one.data_ptr() for one in held))
        getattr(self._library, f"{label}_entry")(pointers, ctypes.c_int64(rows), ctypes.c_int(threads))
        for name, whole in guarded.items():
            assert bool((whole[:64] == 77).all() and (whole[-64:] == 77).all()), f"{label}: {name} was overrun"
        return made
