"""Ops of kernels for the CPU without Python between torch's dispatcher and a kernel.

A call through Python takes longer than a small kernel. `kernels/cpp/dispatch.h`, compiled once, has boxed functions of
torch's stable C interface; `register` gives one of them to an op, with what the kernel's border looks like. Where torch
has no such interface, `register` says so and the op stays in Python.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planish.codegen import cpp_build, cpp_headers
from planish.ir.errors import PlanishError

FUNCTIONS = (
    "get_dim", "get_sizes", "get_dtype", "is_contiguous", "get_data_ptr", "empty_strided", "delete_tensor_object",
    "call_dispatcher",
)  # fmt: skip
MOST_TENSORS = 64
MOST_AXES = 4


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * MOST_AXES),
    )


_WAIT = ctypes.CFUNCTYPE(None, ctypes.c_int64)


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("wait", _WAIT),
        ("problem", ctypes.c_char_p),
        ("tensors", ctypes.POINTER(_Tensor)),
        ("place", ctypes.POINTER(ctypes.c_int32)),
        ("inputs", ctypes.c_int32),
        ("given", ctypes.c_int32),
        ("made", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("axis", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Slot:
    """A tensor of an op.

    Attributes:
        dtype: of torch, in words: "int8", "float32" ...
        shape: -1 for M.
        place: in the order of the kernel's own border.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    place: int


@dataclass
class _Dispatch:
    """The library of boxed functions and the ops that are registered with it, which live as long as the process."""

    torch: ctypes.CDLL
    library: ctypes.CDLL
    handle: ctypes.c_void_p
    kept: list[Any] = field(default_factory=list)


@functools.cache
def _dispatch(namespace: str) -> _Dispatch | None:
    """The boxed functions; None where torch has no stable interface that they can use."""
    import torch

    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not path.is_file():
        return None
    held = ctypes.CDLL(str(path))
    names = [f"aoti_torch_{name}" for name in FUNCTIONS]
    if not all(hasattr(held, name) for name in (*names, "aoti_torch_library_init_impl", "aoti_torch_library_impl")):
        return None
    library = cpp_build.start(cpp_headers.text(("dispatch.h",)), "dispatch").library()
    pointers = (ctypes.c_void_p * len(names))(*(ctypes.cast(getattr(held, n), ctypes.c_void_p).value for n in names))
    library.attach(pointers)
    library.place.restype = ctypes.c_void_p
    handle = ctypes.c_void_p()
    made = held.aoti_torch_library_init_impl(
        namespace.encode(), b"CPU", b"planish", ctypes.c_uint32(0), ctypes.byref(handle)
    )
    return None if made else _Dispatch(held, library, handle)


def register(
    namespace: str,
    name: str,
    given: Sequence[Slot],
    made: Sequence[Slot],
    inputs: int,
    rows: tuple[int, int] | None,
    pending: cpp_build.Pending,
) -> bool:
    """Give a boxed function to an op whose schema is defined; False where that cannot be done.

    Args:
        namespace, name: of the op.
        given, made: its arguments and its results.
        inputs: how many of its arguments are checked: the weights after them are not.
        rows: which of the arguments has M, and on which axis.
        pending: the kernel's library.
    """
    found = _dispatch(namespace)
    slots = (*given, *made)
    if found is None or len(slots) > MOST_TENSORS or any(len(s.shape) > MOST_AXES for s in slots):
        return False
    index = len(found.kept)
    if index >= found.library.places():
        return False
    tensors = (_Tensor * len(slots))()
    for tensor, slot in zip(tensors, slots, strict=True):
        tensor.name, tensor.dim = slot.name.encode(), len(slot.shape)
        tensor.dtype = int(getattr(found.torch, f"aoti_torch_dtype_{slot.dtype}")())
        tensor.sizes[: len(slot.shape)] = slot.shape
    place = (ctypes.c_int32 * len(slots))(*(slot.place for slot in slots))
    kernel = _Kernel(None, _WAIT(), None, tensors, place, inputs, len(given), len(made), *(rows or (-1, 0)))

    def wait(_: int) -> None:
        try:
            kernel.entry = ctypes.cast(pending.library().entry, ctypes.c_void_p).value
        except (PlanishError, OSError) as error:
            kernel.problem = str(error).encode()

    kernel.wait = _WAIT(wait)
    found.kept.append((kernel, tensors, place))
    function = ctypes.c_void_p(found.library.place(ctypes.c_int32(index), ctypes.byref(kernel)))
    return not found.torch.aoti_torch_library_impl(found.handle, name.encode(), function)
