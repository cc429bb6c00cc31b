"""Several kernels for the CPU as one op: `planish_cpu::chain_<hash>` runs them one after the other.

What one kernel hands to the next is no tensor: it lies in memory that the call takes once, in which values that are not
needed at the same time share a piece. A call through torch takes as long as a small kernel; a chain is one call. Every
tensor of a chain that has an axis M has the same M (`kernels/cpp/chain.h`).
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from planish.codegen import cpp, cpp_build, cpp_op
from planish.codegen.triton_file import results
from planish.ir.errors import PlanishError

if TYPE_CHECKING:
    from planish.codegen.cpp import CpuKernel


@dataclass(frozen=True)
class Step:
    """A kernel of a chain.

    Attributes:
        given: the numbers of the values that it takes: inputs, then weights.
        made: the numbers of those that it makes.
    """

    kernel: CpuKernel
    given: tuple[int, ...]
    made: tuple[int, ...]


class _Step(ctypes.Structure):
    _fields_ = (("entry", ctypes.c_void_p), ("values", ctypes.POINTER(ctypes.c_int32)), ("count", ctypes.c_int32))


class _Piece(ctypes.Structure):
    _fields_ = (("row", ctypes.c_int64), ("least", ctypes.c_int64))


class _Chain(ctypes.Structure):
    _fields_ = (
        ("wait", cpp_op._WAIT),
        ("problem", ctypes.c_char_p),
        ("steps", ctypes.POINTER(_Step)),
        ("checked", ctypes.POINTER(ctypes.c_int32)),
        ("tensors", ctypes.POINTER(cpp_op._Tensor)),
        ("results", ctypes.POINTER(cpp_op._Tensor)),
        ("pieces", ctypes.POINTER(_Piece)),
        ("piece_of", ctypes.POINTER(ctypes.c_int32)),
        *((name, ctypes.c_int32) for name in ("ready", "step_count", "check_count", "given", "made", "piece_count")),
        *((name, ctypes.c_int32) for name in ("within", "rows", "axis", "byte")),
    )


def native() -> cpp_op._Dispatch | None:
    """The library of boxed functions; None where ops have none."""
    return cpp_op._dispatch(cpp.NAMESPACE) if cpp_build.compiler() else None


def links(kernel: CpuKernel) -> bool:
    """True if a kernel can be part of a chain: it is compiled, and its number of rows is that of its first rows."""
    return kernel.pending is not None and cpp._rows_at(kernel.kernel) is not None


PREFIX = "chain_of"
_known: dict[str, Any] = {}
_lock = threading.Lock()


def chain(steps: Sequence[Step], given: int, made: Sequence[int]) -> Any | None:
    """The op of a chain; None where there is no native one.

    Args:
        steps: in the order in which they run. Values are counted: first what the op is given, then the results of each
            step. The tensor that says M to the first step is given.
        given: how many tensors the op takes.
        made: the numbers of the values that it returns.
    """
    text = "\n".join(f"{s.kernel.name} {s.given} {s.made}" for s in steps) + f"\n{given} {tuple(made)}"
    name = f"{PREFIX}_{len(steps)}_{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    with _lock:
        if name not in _known:
            _known[name] = _made(name, steps, given, made)
        return _known[name]


def _made(name: str, steps: Sequence[Step], given: int, made: Sequence[int]) -> Any | None:
    import torch

    found, library = native(), cpp._library()
    if found is None:
        return None
    slots, rows = _slots_of(steps), _rows(steps[0])
    held, *kept = _held(found, steps, given, made, rows, slots)

    def fake(*tensors: torch.Tensor) -> Any:
        count = tensors[rows[0]].shape[rows[1]]
        shapes = [([count if d < 0 else d for d in slots[v].shape], getattr(torch, slots[v].dtype)) for v in made]
        results = tuple(tensors[rows[0]].new_empty(shape, dtype=dtype) for shape, dtype in shapes)
        return results if len(results) > 1 else results[0]

    back = ", ".join(["Tensor"] * len(made))
    arguments = ", ".join(f"Tensor t{i}" for i in range(given))
    library.define(
        f"{name}({arguments}) -> {f'({back})' if len(made) > 1 else back}", tags=(torch.Tag.pt2_compliant_tag,)
    )
    if not found.add(name, "place_chain", held, *kept):
        raise PlanishError(f"{name}: torch does not take the op")
    torch.library.register_fake(f"{cpp.NAMESPACE}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, cpp.NAMESPACE), name).default


def _rows(first: Step) -> tuple[int, int]:
    """Which argument has M, and on which axis."""
    place = cpp._rows_at(first.kernel.kernel)
    if place is None:
        raise PlanishError(f"{first.kernel.name}: has no rows; a chain needs them")
    return first.given[place[0]], place[1]


def _slots_of(steps: Sequence[Step]) -> dict[int, cpp_op.Slot]:
    """What each value that a step takes or makes looks like."""
    found: dict[int, cpp_op.Slot] = {}
    for step in steps:
        spec, dtype = step.kernel.kernel, step.kernel.dtype
        taken = cpp._slots(spec, dtype, cpp._given(spec))
        for number, slot in zip(step.given, taken, strict=True):
            found.setdefault(number, slot)
        for number, slot in zip(step.made, cpp._slots(spec, dtype, results(spec)), strict=True):
            found[number] = slot
    return found


def _bytes(slot: cpp_op.Slot) -> tuple[int, int]:
    """Bytes for each row of a value, and bytes of one that has none."""
    import torch

    size = math.prod(d for d in slot.shape if d >= 0) * getattr(torch, slot.dtype).itemsize
    return (size, 0) if -1 in slot.shape else (0, size)


def pieces(steps: Sequence[Step], within: Sequence[int]) -> tuple[list[tuple[int, int]], dict[int, int]]:
    """Where what lies within a chain is kept: pieces that values share which are not needed at the same time.

    Returns:
        Of each piece the bytes for each row and for any number of rows; the piece of each value.
    """
    slots = _slots_of(steps)
    last = {v: i for i, step in enumerate(steps) for v in (*step.made, *step.given)}
    sizes: list[tuple[int, int]] = []
    place: dict[int, int] = {}
    for index, step in enumerate(steps):
        for value in step.made:
            if value not in within:
                continue
            row, least = _bytes(slots[value])
            busy = {place[v] for v in place if last[v] >= index}
            free = [i for i in range(len(sizes)) if i not in busy]
            if free:
                best = min(free, key=lambda i: abs(sizes[i][0] - row))
                sizes[best] = (max(sizes[best][0], row), max(sizes[best][1], least))
            else:
                best = len(sizes)
                sizes.append((row, least))
            place[value] = best
    return sizes, place


def _held(
    dispatch: cpp_op._Dispatch,
    steps: Sequence[Step],
    given: int,
    made: Sequence[int],
    rows: tuple[int, int],
    slots: dict[int, cpp_op.Slot],
) -> tuple[Any, ...]:
    """A chain as its boxed function reads it, and what it points to."""
    within = [v for step in steps for v in step.made if v not in made]
    order = {v: i for i, v in enumerate([*range(given), *made, *within])}
    found, place = pieces(steps, within)
    runs = (_Step * len(steps))()
    kept: list[Any] = []
    checked: dict[int, cpp_op.Slot] = {}
    for run, step in zip(runs, steps, strict=True):
        spec = step.kernel.kernel
        tensors = [*cpp._given(spec), *results(spec)]
        numbers = dict(zip((t.name for t in tensors), (*step.given, *step.made), strict=True))
        border = [order[numbers[t.name]] for t in spec.tensors if t.role != "scratch"]
        values = (ctypes.c_int32 * len(border))(*border)
        run.values, run.count = values, len(border)
        kept.append(values)
        inputs = {numbers[t.name] for t in spec.tensors if t.role == "input"}
        checked |= {v: slots[v] for v in step.given if v in inputs and v < given}
    held = _Chain(
        wait=cpp_op._WAIT(),
        steps=runs,
        checked=(ctypes.c_int32 * len(checked))(*checked),
        tensors=cpp_op._tensors(dispatch, list(checked.values())),
        results=cpp_op._tensors(dispatch, [slots[v] for v in made]),
        pieces=(_Piece * len(found))(*(_Piece(*sizes) for sizes in found)),
        piece_of=(ctypes.c_int32 * len(within))(*(place[v] for v in within)),
        step_count=len(steps),
        check_count=len(checked),
        given=given,
        made=len(made),
        piece_count=len(found),
        within=len(within),
        rows=rows[0],
        axis=rows[1],
        byte=int(dispatch.torch.aoti_torch_dtype_uint8()),
    )

    def wait() -> None:
        try:
            for run, step in zip(runs, steps, strict=True):
                assert step.kernel.pending is not None
                run.entry = ctypes.cast(step.kernel.pending.library().entry, ctypes.c_void_p).value
            held.ready = 1
        except (PlanishError, OSError) as error:
            held.problem = str(error).encode()

    held.wait = cpp_op._WAIT(wait)
    return held, runs, kept
