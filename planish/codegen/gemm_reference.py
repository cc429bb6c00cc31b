"""The eager reference of a gemm: plain torch on unpacked codes."""

from __future__ import annotations

from planish.codegen.gemm_plan import decoder_of, is_integer
from planish.codegen.kernel_spec import SPAN, Activation, Kernel, Product
from planish.codegen.triton_eager import eager_lines
from planish.kernels.decoders import functions_of


def reference(kernel: Kernel, dtype: str) -> tuple[list[str], tuple[str, ...]]:
    """The lines of the reference's body and the functions that they call.

    Args:
        dtype: the kernel's float.
    """
    a = kernel.activation
    assert a is not None
    calls: dict[str, None] = {}
    lines = [f"left_codes = {_left(kernel, a, calls)}"]
    for product in kernel.products:
        lines += _product(kernel, a, product, calls)
    made = [p.result for p in kernel.products]
    tensors = {t.name: t for t in kernel.tensors}
    steps, used = eager_lines(kernel.steps, tensors, wide=made)
    lines += steps
    calls.update(dict.fromkeys(used))
    rounded = [name for name in made if name in tensors and tensors[name].dtype == "float"]
    if kernel.closing:
        known = [*made, *(name for step in kernel.steps for name in step.writes)]
        for step in kernel.closing:
            for name in step.reads:
                if name in known and name in tensors and tensors[name].dtype == "float":
                    lines.append(f"{name} = {name}.to(dtype).float()")
                    known.remove(name)
        text, used = eager_lines(kernel.closing, tensors, wide=[*made, *(n for s in kernel.steps for n in s.writes)])
        lines += text
        calls.update(dict.fromkeys(used))
        rounded += [n for s in kernel.steps for n in s.writes if n in tensors and tensors[n].dtype == "float"]
    lines += [f"{name} = {name}.to(dtype)" for name in dict.fromkeys(rounded) if tensors[name].role == "output"]
    return lines, tuple(calls)


def _left(kernel: Kernel, a: Activation, calls: dict[str, None]) -> str:
    if a.kind == "float":
        return a.codes
    if a.bits == 8:
        calls["int8_reference"] = None
        return f"int8_reference({a.codes}, {kernel.columns})"
    calls["planes_reference"] = None
    text = f"planes_reference({a.codes}, {a.bits}, {SPAN}, {kernel.columns})"
    if not a.signed:
        return text
    calls["signed_reference"] = None
    return f"signed_reference({text}, {a.bits})"


def _product(kernel: Kernel, a: Activation, product: Product, calls: dict[str, None]) -> list[str]:
    w, result, columns = product.weight, product.result, kernel.columns
    decoder, held = decoder_of(kernel, w), f"{w.codes}_held"
    calls |= dict.fromkeys(functions_of(decoder.reference))
    lines = [f"{held} = {decoder.reference.format(codes=w.codes, span=SPAN, columns=columns)}"]
    if w.zero and kernel.tensor(w.zero).dtype != "i8":  # float zero points are those of unsigned codes
        lines.append(f"{held} = {held} + {decoder.middle}.0")
    if w.clusters:
        calls |= dict.fromkeys(("split_reference", "planes_reference"))
        ids = f"planes_reference({w.ids}.view(torch.int8), {1 if w.clusters <= 2 else 2}, {SPAN}, {columns})"
        lines.append(f"{held} = split_reference({held}, {ids}, {w.scale}, {w.zero or 'None'}, {w.group})")
    elif w.zero:
        calls["spread_reference"] = None
        lines.append(f"{held} = {held} - spread_reference({w.zero}, {w.group}, {columns})")
    grouped = a.granularity == "group"
    if is_integer(kernel, w):
        calls["integer_product_reference"] = None
        scale = f"{a.scale}, {a.group}" if grouped else "None, 0"
        lines.append(f"{result} = integer_product_reference(left_codes, {held}, {w.scale}, {w.group}, {scale})")
    else:
        calls["float_product_reference"] = None
        if w.scale and not w.clusters:
            calls["spread_reference"] = None
            lines.append(f"{held} = {held} * spread_reference({w.scale}, {w.group}, {columns})")
        left = "left_codes"
        if grouped:
            calls["spread_reference"] = None
            left = f"left_codes * spread_reference({a.scale}.T, {a.group}, {columns})"
        lines.append(f"{result} = float_product_reference({left}, {held})")
    if a.zero:
        zero = f"{a.zero}.float()" + ("[:, None]" if a.granularity == "token" else "")
        lines.append(f"{result} = {result} - {zero} * {w.sums}")
    if a.kind == "codes" and not grouped:
        lines.append(f"{result} = {result} * {a.scale}" + ("[:, None]" if a.granularity == "token" else ""))
    for branch in product.branches:
        calls["low_rank_up_reference"] = None
        lines.append(f"{result} = {result} + low_rank_up_reference({branch.left}, {branch.right})")
    if product.bias:
        lines.append(f"{result} = {result} + {product.bias}.float()")
    return lines
