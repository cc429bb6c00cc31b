"""Ops of kernels for the CPU without Python between torch's dispatcher and a kernel.

A call through Python takes longer than a small kernel. `kernels/cpp/dispatch.h`, compiled once, has boxed functions of
torch's stable C interface; `register` gives one of them to an op, with what the kernel's border looks like. Where torch
has no such interface, `register` says so and the op stays in Python.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planish.codegen import cpp_build, cpp_headers
from planish.ir.errors import PlanishError

FUNCTIONS = (
    "get_dim", "get_sizes", "get_dtype", "is_contiguous", "get_data_ptr", "empty_strided", "delete_tensor_object",
    "call_dispatcher", "get_strides",
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


_WAIT = ctypes.CFUNCTYPE(None)


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


class _Strided(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("wait", _WAIT),
        ("problem", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("letters", ctypes.c_char_p),
        ("tensors", ctypes.POINTER(_Tensor)),
        ("broadcast", ctypes.POINTER(ctypes.c_int32)),
        ("given", ctypes.c_int32),
        ("order", ctypes.c_int32 * MOST_AXES),
    )


@dataclass(frozen=True)
class Slot:
    """A tensor of an op.

    Attributes:
        dtype: of torch, in words: "int8", "float32" ...
        shape: -1 for M; -1, -2 .. for the letters of `register_strided`.
        place: in the order of the kernel's own border.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    place: int


@dataclass
class _Dispatch:
    """Libraries of boxed functions and the ops that are registered with them, which live as long as the process.

    A library has so many places. The next one is the same text compiled once more, loaded when the first is full.
    """

    torch: ctypes.CDLL
    functions: Any
    library: ctypes.CDLL
    handle: ctypes.c_void_p
    used: int = 0
    libraries: int = 1
    kept: list[Any] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, kind: str, kernel: ctypes.Structure, *kept: Any) -> bool:
        """Give a boxed function to the op `name`; False if torch does not take it.

        Args:
            kind: the library's function that fills a place: "place", "place_strided" or "place_chain".
            kernel, kept: what the place points to, and what that points to.
        """
        with self.lock:
            if self.used == self.library.places():
                self.library, self.used = _loaded(self.functions, self.libraries), 0
                self.libraries += 1
            place = getattr(self.library, kind)
            place.restype = ctypes.c_void_p
            function = ctypes.c_void_p(place(ctypes.c_int32(self.used), ctypes.byref(kernel)))
            self.used += 1
            self.kept.append((kernel, *kept))
            return not self.torch.aoti_torch_library_impl(self.handle, name.encode(), function)


def begin(copy: int = 0) -> cpp_build.Pending:
    """A library of boxed functions, which is being compiled: of kernels and of chains."""
    return cpp_build.start(cpp_headers.text(("chain.h",)) + (f"// {copy}\n" if copy else ""), "dispatch")


def _loaded(functions: Any, copy: int = 0) -> ctypes.CDLL:
    library = begin(copy).library()
    library.attach(functions)
    return library


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
    functions = (ctypes.c_void_p * len(names))(*(ctypes.cast(getattr(held, n), ctypes.c_void_p).value for n in names))
    library = _loaded(functions)
    handle = ctypes.c_void_p()
    made = held.aoti_torch_library_init_impl(
        namespace.encode(), b"CPU", b"planish", ctypes.c_uint32(0), ctypes.byref(handle)
    )
    return None if made else _Dispatch(held, functions, library, handle)


def _tensors(found: _Dispatch, slots: Sequence[Slot]) -> Any:
    tensors = (_Tensor * len(slots))()
    for tensor, slot in zip(tensors, slots, strict=True):
        tensor.name, tensor.dim = slot.name.encode(), len(slot.shape)
        tensor.dtype = int(getattr(found.torch, f"aoti_torch_dtype_{slot.dtype}")())
        tensor.sizes[: len(slot.shape)] = slot.shape
    return tensors


def _waiting(kernel: _Kernel | _Strided, pending: cpp_build.Pending) -> Any:
    """What waits for a kernel's library and takes its `entry`, or says why there is none."""

    def wait() -> None:
        try:
            kernel.entry = ctypes.cast(pending.library().entry, ctypes.c_void_p).value
        except (PlanishError, OSError) as error:
            kernel.problem = str(error).encode()

    return _WAIT(wait)


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
    tensors = _tensors(found, slots)
    place = (ctypes.c_int32 * len(slots))(*(slot.place for slot in slots))
    kernel = _Kernel(None, _WAIT(), None, tensors, place, inputs, len(given), len(made), *(rows or (-1, 0)))
    kernel.wait = _waiting(kernel, pending)
    return found.add(name, "place", kernel, tensors, place)


def register_strided(
    namespace: str,
    name: str,
    given: Sequence[Slot],
    made: Slot,
    letters: str,
    broadcast: Sequence[str],
    order: Sequence[int],
    pending: cpp_build.Pending,
) -> bool:
    """Give a boxed function to an op whose kernel reads tensors where they lie; False where that cannot be done.

    The kernel is `entry(n, pointers, threads)` with 8 numbers, one for each letter, then 4 strides of each tensor; it
    returns a text if something is wrong.

    Args:
        given, made: its arguments and its result, all of them float, bool or integer tensors of 4 axes at most.
        letters: what the negative numbers of a shape stand for: their number is that of the first slot that has them.
        broadcast: names of arguments whose axes may be missing or 1 (stride 0), with any strides; the last axis of the
            others is made to lie together.
        order: the axes of the result as they lie in memory, the last one together.
    """
    found = _dispatch(namespace)
    slots = (*given, made)
    if found is None or len(slots) > MOST_TENSORS or any(len(s.shape) > MOST_AXES for s in slots) or len(letters) > 8:
        return False
    tensors, loose = _tensors(found, slots), (ctypes.c_int32 * len(given))(*(s.name in broadcast for s in given))
    kernel = _Strided(None, _WAIT(), None, name.encode(), letters.encode(), tensors, loose, len(given))
    kernel.order[: len(order)] = tuple(order)
    kernel.wait = _waiting(kernel, pending)
    return found.add(name, "place_strided", kernel, tensors, loose)
