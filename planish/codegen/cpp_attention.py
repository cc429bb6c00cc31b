"""Attention on the CPU: the graph's `attention` as a C++ kernel that reads q, k and v as they lie.

    made = attention(node, "f32")            None: the node is of another form, and stays as it is
    y = made.op(q, k, v[, mask][, sinks])    [B, H, T, E], a view of rows [B, T, H, E]

The kernel (planish/kernels/cpp/attention.h) needs no transposed or contiguous copies: it takes the strides of the
tensors, and writes its result so that the heads of a row lie together, which is what the linear behind it reads.
Scores are float32 in either of its forms; with `half` the products are those of numbers rounded to bf16, which takes
half the time where the machine has such instructions (and is the float32 form where it has not).

Torch's dispatcher calls it by way of `cpp_op.register_strided`, without Python; forms with sinks go by `runner`.
Without a compiler the op runs the eager reference.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from planish.codegen import cpp_build, cpp_headers, cpp_op
from planish.codegen.cpp_rows_writer import TYPES, number
from planish.codegen.triton_check import TORCH
from planish.ir.errors import PlanishError
from planish.ir.graph import Node, Value

if TYPE_CHECKING:
    import torch

LARGEST = 512  # columns of a head
LETTERS = "BHTGS"  # batch, heads, rows, key heads, keys
MASKS = {"": "attention::None", "bool": "uint8_t"} | {name: TYPES[name] for name in ("f32", "bf16", "f16")}


@dataclass(frozen=True)
class AttentionForm:
    """What an attention kernel is made for.

    Attributes:
        dtype: of q, k, v and the result: "f32", "bf16" or "f16".
        depth, width: columns of q and k, and of v.
        scale: of the scores.
        mask: its dtype: "bool", or that of a float that is added; "": there is none.
        sinks: True if each head has one more score.
        softcap: of the scaled scores; 0: none.
        half: products of numbers that are rounded to bf16.
    """

    dtype: str
    depth: int
    width: int
    scale: float
    mask: str = ""
    sinks: bool = False
    causal: bool = False
    safe: bool = False
    softcap: float = 0.0
    half: bool = False


@dataclass(frozen=True, eq=False)
class CpuAttention:
    """An attention kernel.

    Attributes:
        name: a readable stem and a hash of the text.
        op: planish_cpu::`name`, on q [B, H, T, d], k [B, Hk, S, d], v [B, Hk, S, e], then the mask (broadcast against
            [B, H, T, S]) and the sinks [H], where the form has them.
        reference: the same in plain torch.
        text: the C++ file; "" where there is no compiler.
    """

    name: str
    form: AttentionForm
    op: Any
    reference: Callable[..., Any]
    text: str


# -- from the graph ------------------------------------------------------------------------------


def suits() -> bool:
    """True where the kernel is faster than torch's own: it is written for AVX-512; elsewhere it is right, but slow."""
    if not cpp_build.compiler():
        return False
    if cpp_build.architecture() == "native":
        return "avx512f" in cpp_build._machine()
    return cpp_build.architecture() in ("x86-64-v4", "sapphirerapids", "znver4")


def form_of(node: Node, *, half: bool = False) -> AttentionForm | str:
    """The form of an attention node, or why no kernel takes its place.

    Args:
        half: allow products in bf16 where the node has float32.
    """
    if not suits():
        return "torch's own attention is faster here: there is no compiler, or no AVX-512"
    q, k, v, mask, sinks = (node.operand(index) for index in range(5))
    if q is None or k is None or v is None:
        return "it lacks an operand"
    shapes = [operand.shape or () for operand in (q, k, v)]
    if any(len(shape) != 4 for shape in shapes):
        return "its operands are not of rank 4"
    if q.dtype not in TORCH or q.dtype != k.dtype or q.dtype != v.dtype:
        return "its operands are no floats of one dtype that kernels have"
    (batch, heads, _, depth), (*_, other), (*_, width) = shapes
    if not isinstance(heads, int) or not isinstance(depth, int) or not isinstance(width, int) or other != depth:
        return "its heads or columns have no known number"
    if any(shape[0] != batch for shape in shapes) or shapes[1][1] != shapes[2][1]:
        return "its batches or key heads are broadcast"
    shared = shapes[1][1]
    if not isinstance(shared, int) or heads % shared or max(depth, width) > LARGEST:
        return f"its heads are not shared evenly, or have more than {LARGEST} columns"
    if mask is not None and (mask.dtype not in MASKS or mask.rank is None or mask.rank > 4):
        return "its mask is neither bool nor float"
    own = {name: node.attributes.get(name, node.op.attributes.get(name)) for name in node.op.attributes}
    scale, softcap = own["scale"], own["softcap"]
    return AttentionForm(
        q.dtype,
        depth,
        width,
        depth**-0.5 if scale is None else float(str(scale)),
        _dtype(mask),
        sinks is not None,
        bool(own["causal"]),
        bool(own["safe"]),
        0.0 if softcap is None else float(str(softcap)),
        half or q.dtype == "bf16",
    )


def _dtype(value: Value | None) -> str:
    return "" if value is None else str(value.dtype)


def attention(node: Node, *, half: bool = False) -> CpuAttention | None:
    """The kernel of an attention node; None if no kernel can hold it, or where torch's own is faster.

    Args:
        half: round the operands of products to bf16, also those of a float32 node.
    """
    form = form_of(node, half=half)
    return None if isinstance(form, str) else kernel(form)


# -- the file ------------------------------------------------------------------------------------


def slots_of(form: AttentionForm) -> tuple[list[cpp_op.Slot], cpp_op.Slot]:
    """The tensors of a kernel, as `cpp_op.register_strided` takes them: given ones and the result."""
    b, h, rows, shared, keys = (-1 - LETTERS.index(letter) for letter in "BHTGS")
    kind, d, e = TORCH[form.dtype], form.depth, form.width
    shapes = {"q": (b, h, rows, d), "k": (b, shared, keys, d), "v": (b, shared, keys, e)}
    given = [cpp_op.Slot(name, kind, shape, place) for place, (name, shape) in enumerate(shapes.items())]
    if form.mask:
        dtype = "bool" if form.mask == "bool" else TORCH[form.mask]
        given.append(cpp_op.Slot("mask", dtype, (b, h, rows, keys), len(given)))
    if form.sinks:
        given.append(cpp_op.Slot("sinks", "float32", (h,), len(given)))
    return given, cpp_op.Slot("made", kind, (b, h, rows, e), len(given))


def text_of(form: AttentionForm) -> str:
    """The C++ file of a form.

    Its `entry` takes B, H, T, Hk, S and 3 unused numbers, 4 strides of each of its tensors (`slots_of`), their pointers
    and the number of threads; it returns what is wrong, if anything.
    """
    flags = (form.half, form.causal, form.safe, form.softcap > 0, form.sinks)
    arguments = [TYPES[form.dtype], MASKS[form.mask], str(form.depth), str(form.width)]
    arguments += [str(flag).lower() for flag in flags]
    kind = TYPES[form.dtype]
    given, made = slots_of(form)
    place = {slot.name: slot.place for slot in (*given, made)}

    def steps(name: str, count: int) -> str:
        first = 8 + 4 * place[name] if name in place else None
        return f"{{{', '.join('0' if first is None else f'n[{first + i}]' for i in range(count))}}}"

    def at(name: str) -> str:
        return f"at[{place[name]}]" if name in place else "nullptr"

    return f"""// softmax(scale q k^T + mask) v, written by planish: {form}
#include <omp.h>

{cpp_headers.text(["attention.h"])}
using Form = attention::Form<{", ".join(arguments)}>;

extern "C" const char *entry(const int64_t *n, void *const *at, int threads) {{
    if (n[3] ? n[1] % n[3] : n[1]) return "heads are not shared evenly";
    attention::Sizes s{{n[0], n[1], n[3], n[2], n[4],
                       {steps("q", 3)}, {steps("k", 3)}, {steps("v", 3)}, {steps("made", 3)},
                       {steps("mask", 4)}, {number(form.scale)}, {number(form.softcap)}}};
    attention::run<Form>(s, (const {kind} *)at[0], (const {kind} *)at[1], (const {kind} *)at[2], {at("mask")},
                         (const float *){at("sinks")}, ({kind} *){at("made")}, threads);
    return nullptr;
}}
"""


# -- the op --------------------------------------------------------------------------------------


def reference_of(form: AttentionForm) -> Callable[..., Any]:
    """What a kernel computes, in plain torch and float32."""

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        from planish.ir.ops.attention import attend

        left = list(rest)
        mask = left.pop(0) if form.mask else None
        sinks = left.pop(0).float() if form.sinks else None
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        settings = (mask, form.scale, form.causal, form.safe, form.softcap or None, sinks)
        made = attend(q.float(), k.float(), v.float(), *settings)
        return _fake(q, k, v).copy_(made)

    return reference


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


def runner(form: AttentionForm, pending: cpp_build.Pending) -> Callable[..., Any]:
    """The op's function where torch has no stable interface: it checks its operands and calls the library."""
    import torch

    kind: torch.dtype = getattr(torch, TORCH[form.dtype])
    empty, threads = torch.empty, torch.get_num_threads
    tensors = len(slots_of(form)[0]) + 1
    sizes_type, pointers_type = ctypes.c_int64 * (8 + 4 * tensors), ctypes.c_void_p * tensors
    entry: Any = None

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        nonlocal entry
        if entry is None:
            entry = pending.library().entry
            entry.argtypes, entry.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int), ctypes.c_char_p
        batch, heads, rows, depth = q.shape
        shared, keys = k.shape[1], k.shape[2]
        fits = k.shape == (batch, shared, keys, form.depth) and v.shape == (batch, shared, keys, form.width)
        if not fits or depth != form.depth or not (q.dtype == k.dtype == v.dtype == kind):
            shown = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (q, k, v))
            expected = f"{kind} [B, H, T, {form.depth}], [B, Hk, S, {form.depth}], [B, Hk, S, {form.width}]"
            raise PlanishError(f"attention: expected {expected}, got {shown}", where=pending.name)
        held = [t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous() for t in (q, k, v)]
        if form.mask:
            held.append(rest[0].expand(batch, heads, rows, keys))
        if form.sinks:
            held.append(rest[-1].reshape(-1).expand(heads).to(torch.float32).contiguous())
        held.append(empty((batch, rows, heads, form.width), dtype=kind).transpose(1, 2))
        sizes = [batch, heads, rows, shared, keys, 0, 0, 0]
        for t in held:
            sizes += (*t.stride(), 0, 0, 0)[:4]
        problem = entry(sizes_type(*sizes), pointers_type(*(t.data_ptr() for t in held)), threads())
        if problem:
            raise PlanishError(f"attention: {problem.decode()}", where=pending.name)
        return held[-1]

    return run


def register(form: AttentionForm, name: str, pending: cpp_build.Pending) -> bool:
    """Give a boxed function to a form's op; False where that cannot be done, as of sinks, which may have any dtype."""
    from planish.codegen.cpp import NAMESPACE

    given, made = slots_of(form)
    if form.sinks:
        return False
    return cpp_op.register_strided(NAMESPACE, name, given, made, LETTERS, ("mask",), (0, 2, 1, 3), pending)


@lru_cache(maxsize=1024)
def kernel(form: AttentionForm) -> CpuAttention:
    """The kernel of a form; one for equal forms of a process. Its file is compiled in the background."""
    import torch

    from planish.codegen.cpp import NAMESPACE, _library

    reference, text = reference_of(form), text_of(form)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    name = f"attention_{form.depth}_{form.dtype}_{digest}"
    compiled = bool(cpp_build.compiler())
    pending = cpp_build.start(text, name) if compiled else None
    library = _library()
    arguments = ", ".join(f"Tensor {slot.name}" for slot in slots_of(form)[0])
    library.define(f"{name}({arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    if pending is None:
        library.impl(name, reference, "CPU")
    elif not register(form, name, pending):
        library.impl(name, runner(form, pending), "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _fake, lib=library)
    return CpuAttention(
        name, form, getattr(getattr(torch.ops, NAMESPACE), name).default, reference, text if compiled else ""
    )
