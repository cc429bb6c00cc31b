"""Attention on the CPU: the graph's `attention` as a C++ kernel that reads q, k and v as they lie.

    made = attention(node, "f32")            None: the node is of another form, and stays as it is
    y = made.op(q, k, v[, mask][, sinks])    [B, H, T, E], a view of rows [B, T, H, E]

The kernel (planish/kernels/cpp/attention.h) needs no transposed or contiguous copies: it takes the strides of the
tensors, and writes its result so that the heads of a row lie together, which is what the linear behind it reads.
Scores are float32 in either of its forms; with `half` the products are those of numbers rounded to bf16, which takes
half the time where the machine has such instructions (and is the float32 form where it has not).

Without a compiler the op runs the eager reference.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from planish.codegen import cpp_build, cpp_headers
from planish.codegen.cpp_rows_writer import TYPES, number
from planish.codegen.triton_check import TORCH
from planish.ir.errors import PlanishError
from planish.ir.graph import Node, Value

if TYPE_CHECKING:
    import torch

LARGEST = 512  # columns of a head
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


def text_of(form: AttentionForm) -> str:
    """The C++ file of a form; its `entry` takes 21 sizes and strides, the pointers and the number of threads."""
    flags = (form.half, form.causal, form.safe, form.softcap > 0, form.sinks)
    arguments = [TYPES[form.dtype], MASKS[form.mask], str(form.depth), str(form.width)]
    arguments += [str(flag).lower() for flag in flags]
    kind = TYPES[form.dtype]
    return f"""// softmax(scale q k^T + mask) v, written by planish: {form}
#include <omp.h>

{cpp_headers.text(["attention.h"])}
using Form = attention::Form<{", ".join(arguments)}>;

extern "C" void entry(const int64_t *n, void *const *at, int threads) {{
    attention::Sizes s{{n[0], n[1], n[2], n[3], n[4],
                       {{n[5], n[6], n[7]}}, {{n[8], n[9], n[10]}}, {{n[11], n[12], n[13]}}, {{n[14], n[15], n[16]}},
                       {{n[17], n[18], n[19], n[20]}}, {number(form.scale)}, {number(form.softcap)}}};
    attention::run<Form>(s, (const {kind} *)at[0], (const {kind} *)at[1], (const {kind} *)at[2], at[3],
                         (const float *)at[4], ({kind} *)at[5], threads);
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
    """The op's function: it checks its operands, makes the result and calls the library."""
    import torch

    kind: torch.dtype = getattr(torch, TORCH[form.dtype])
    empty, threads, place = torch.empty, torch.get_num_threads, 4 if form.mask else 3
    sizes_type, pointers_type = ctypes.c_int64 * 21, ctypes.c_void_p * 6
    entry: Any = None

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        nonlocal entry
        if entry is None:
            entry = pending.library().entry
            entry.argtypes, entry.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int), None
        batch, heads, rows, depth = q.shape
        shared, keys = k.shape[1], k.shape[2]
        fits = k.shape == (batch, shared, keys, form.depth) and v.shape == (batch, shared, keys, form.width)
        if not fits or depth != form.depth or heads % shared or not (q.dtype == k.dtype == v.dtype == kind):
            shown = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (q, k, v))
            expected = f"{kind} [B, H, T, {form.depth}], [B, Hk, S, {form.depth}], [B, Hk, S, {form.width}]"
            raise PlanishError(f"attention: expected {expected}, got {shown}", where=pending.name)
        q, k, v = (t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous() for t in (q, k, v))
        mask: torch.Tensor | None = None
        across: tuple[int, ...] = (0, 0, 0, 0)
        if form.mask:
            mask = rest[0].expand(batch, heads, rows, keys)
            across = mask.stride()
        sinks = rest[place - 3].reshape(-1).expand(heads).to(torch.float32).contiguous() if form.sinks else None
        out = empty((batch, rows, heads, form.width), dtype=kind)
        sizes = sizes_type(
            batch, heads, shared, rows, keys, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            rows * heads * form.width, form.width, heads * form.width, *across,
        )  # fmt: skip
        pointers = pointers_type(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), None if mask is None else mask.data_ptr(),
            None if sinks is None else sinks.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        entry(sizes, pointers, threads())
        return out.transpose(1, 2)

    return run


@lru_cache(maxsize=1024)
def kernel(form: AttentionForm) -> CpuAttention:
    """The kernel of a form; one for equal forms of a process. Its file is compiled in the background."""
    import torch

    from planish.codegen.cpp import NAMESPACE, _library

    reference, text = reference_of(form), text_of(form)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    name = f"attention_{form.depth}_{form.dtype}_{digest}"
    compiled = bool(cpp_build.compiler())
    run = runner(form, cpp_build.start(text, name)) if compiled else reference
    given = ["q", "k", "v", *(["mask"] if form.mask else []), *(["sinks"] if form.sinks else [])]
    library = _library()
    library.define(
        f"{name}({', '.join(f'Tensor {one}' for one in given)}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
    )
    library.impl(name, run, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _fake, lib=library)
    return CpuAttention(
        name, form, getattr(getattr(torch.ops, NAMESPACE), name).default, reference, text if compiled else ""
    )
