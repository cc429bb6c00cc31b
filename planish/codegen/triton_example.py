"""Random data for a kernel's self-check: an expression for each tensor that its launcher takes.

Scales are positive and small enough that float16 does not overflow, ids name clusters that are there, indices name
columns that are there.
"""

from __future__ import annotations

import math

from planish.codegen.kernel_spec import SPAN, Kernel, Tensor, padded

STORED = "stored_reference"  # of planish/kernels/pack_int4.py


def _size(tensor: Tensor) -> str:
    dims = [str(dim) for dim in tensor.shape]
    return f"({', '.join(dims)}{',' if len(dims) == 1 else ''})"


def kinds(kernel: Kernel) -> dict[str, str]:
    """What each given tensor holds: rows, codes, ids, scale, zero, sums, index, signs, matrix; others are vectors."""
    found: dict[str, str] = {}
    a = kernel.activation
    if a is not None:
        found[a.codes] = "rows" if a.kind == "float" else "codes"
        found |= {a.scale: "scale", a.zero: "zero"}
    for product in kernel.products:
        w = product.weight
        found |= {w.scale: "scale", w.zero: "zero", w.ids: "ids", w.sums: "sums"}
        found[w.codes] = "matrix" if w.decoder == "float" else "codes"
        for branch in product.branches:
            found |= {branch.left: "vector", branch.right: "matrix"}
    for step in (*kernel.steps, *kernel.closing):
        if step.row == "hadamard":
            found |= dict.fromkeys(step.reads[1:], "signs")
        for name in step.reads:
            if name and name not in found:
                if step.row.startswith("quantize"):
                    found[name] = "rows" if "M" in _shape_of(kernel, name) else "scale"
                elif "M" in _shape_of(kernel, name):
                    found[name] = "rows"
    return {name: kind for name, kind in found.items() if name}


def _shape_of(kernel: Kernel, name: str) -> tuple[int | str, ...]:
    return next((t.shape for t in kernel.tensors if t.name == name), ())


def _expression(tensor: Tensor, kind: str, kernel: Kernel) -> str:
    size = _size(tensor)
    if kind == "rows":
        return f"rows(g, {', '.join(map(str, tensor.shape))})"
    if tensor.dtype in ("i32", "i64", "i16") or kind == "index":
        return f"torch.randint(0, {kernel.columns}, {size}, generator=g)"
    if kind == "scale":
        return f"((torch.rand({size}, generator=g) + 0.5) * {_unit(tensor, kernel)!r})"
    if kind == "signs":
        return f"(torch.randint(0, 2, {size}, generator=g) * 2 - 1)"
    if kind == "zero":
        half = 1 << (_bits(tensor, kernel) - 2)
        return f"torch.randint({-half}, {half}, {size}, generator=g)"
    if kind == "sums":
        return f"torch.randn({size}, generator=g)"
    if kind == "ids":
        return _ids(tensor, kernel)
    if kind == "codes":
        low, high = (0, 256) if tensor.dtype == "u8" else (-127, 128)
        return f"torch.randint({low}, {high}, {size}, generator=g)"
    if kind == "matrix":
        return f"(torch.randn({size}, generator=g) / {round(kernel.columns**0.5)})"
    return f"torch.randn({size}, generator=g)"


def _bits(tensor: Tensor, kernel: Kernel) -> int:
    """The bits of the codes that a scale or a zero point belongs to; 8 where none are at the border."""
    a = kernel.activation
    for product in kernel.products:
        w = product.weight
        if tensor.name in (w.scale, w.zero):
            return int(kernel.tensor(w.codes).shape[-1]) * 8 // padded(kernel.columns)
    return a.bits if a is not None and a.kind == "codes" else 8


def _unit(tensor: Tensor, kernel: Kernel) -> float:
    """A middling scale: decoded numbers are of size 1 then, and so are sums of products with a weight."""
    of_weight = any(tensor.name == p.weight.scale for p in kernel.products)
    columns = round(math.log2(kernel.columns) / 2) if of_weight else 0
    return float(2.0 ** (2 - _bits(tensor, kernel) - columns))


def _ids(tensor: Tensor, kernel: Kernel) -> str:
    """Ids of clusters in bytes, of 1 bit for two clusters, else of 2."""
    clusters = max(p.weight.clusters for p in kernel.products)
    size = ", ".join(map(str, tensor.shape))
    if clusters <= 2:
        return f"torch.randint(0, 256, ({size}), generator=g)"
    return f"(torch.randint(0, {clusters}, ({size}, 4), generator=g) << torch.arange(0, 8, 2)).sum(-1)"


def _activation(kernel: Kernel) -> str:
    """Codes of the activation as they are stored: those of the padding are 0."""
    a = kernel.activation
    assert a is not None
    low, high = (-(1 << a.bits - 1), 1 << a.bits - 1) if a.signed else (0, 1 << a.bits)
    codes = f"torch.randint({low}, {high}, (M, {kernel.columns}), generator=g).float()"
    return f"{STORED}({codes}, {a.bits}, {SPAN})"


def filling(kernel: Kernel) -> tuple[list[tuple[Tensor, str]], tuple[str, ...]]:
    """The tensors that a launcher takes, each with an expression over `M` and a generator `g`.

    Also the eager functions of planish/kernels that the expressions call.
    """
    known, a = kinds(kernel), kernel.activation
    made = []
    for tensor in kernel.tensors:
        if tensor.role in ("input", "weight"):
            left = a is not None and a.kind == "codes" and tensor.name == a.codes
            kind = known.get(tensor.name, "vector")
            made.append((tensor, _activation(kernel) if left else _expression(tensor, kind, kernel)))
    return made, (STORED,) if any(STORED in text for _, text in made) else ()
