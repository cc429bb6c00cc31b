"""The steps of a kernel in plain torch: lines of the eager reference of an emitted file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from planish.codegen.kernel_spec import SPAN, Step, Tensor
from planish.codegen.row_writer import far_first
from planish.kernels.table import ROWS


def eager_lines(
    steps: Sequence[Step], tensors: Mapping[str, Tensor], wide: Sequence[str] = ()
) -> tuple[list[str], tuple[str, ...]]:
    """Lines that compute the steps in float32 and cast what is an output, and the functions that they call.

    The border tensors that the steps read are locals by their names, and so is `dtype`, the kernel's float.

    Args:
        wide: locals that are float32 already.
    """
    lines: list[str] = []
    calls: dict[str, None] = {}
    made = set(wide)
    for step in steps:
        for name in step.reads:
            if name in tensors and name not in made and tensors[name].dtype == "float" and "M" in tensors[name].shape:
                made.add(name)
                lines.append(f"{name} = {name}.float()")
        text, used = _text(step, tensors, made, far_first(steps))
        lines += text
        calls.update(dict.fromkeys(used))
        made.update(step.writes)
    for step in steps:
        lines += [
            f"{name} = {name}.to(dtype)"
            for name in step.writes
            if name in tensors and tensors[name].dtype == "float" and tensors[name].role == "output"
        ]
    return lines, tuple(calls)


def _text(step: Step, tensors: Mapping[str, Tensor], made: set[str], far: bool) -> tuple[list[str], tuple[str, ...]]:
    options, row = dict(step.options), ROWS[step.row]
    given = [name or "None" for name in step.reads]
    wide = [f"{n}.float()" if n in tensors and n not in made and tensors[n].dtype != "f32" else n for n in given]
    name = step.writes[0]
    if row.text:
        row = row.chosen(options)
        return [f"{name} = {ROWS[step.row].expression(wide, options, eager=True)}"], row.reference
    if step.row in ("rms_norm", "layer_norm"):
        x, gain, bias = (*given, "None", "None")[:3]
        return [f"{name} = {step.row}_reference({x}, {gain}, {bias}, {float(options['eps'])!r})"], row.reference
    if step.row == "hadamard":
        x, signs, matrix = (*given, "None", "None")[:3]
        arguments = f"{options['block']}, {options.get('base', 1)}, {options['transpose']}, {far}"
        return [f"{name} = hadamard_reference({x}, {signs}, {matrix}, {arguments})"], row.reference
    if step.row in ("gather", "reassemble", "down"):
        return [f"{name} = {step.row}_reference({', '.join(given)})"], row.reference
    return _codes(step, given), (*row.reference, "stored_reference")


def _codes(step: Step, given: Sequence[str]) -> list[str]:
    options, (codes, scale, zero) = dict(step.options), (*step.writes, "", "")[:3]
    bits, low, high = int(options["bits"]), float(options["low"]), float(options["high"])
    if step.row == "quantize_static":
        x, given_scale, given_zero = (*given, "None")[:3]
        lines = [f"{codes} = static_codes_reference({x}, {given_scale}, {given_zero}, {low}, {high})"]
    elif step.row == "quantize_group":
        arguments = f"{options['group']}, {float(options['levels'])}, {low}, {high}"
        lines = [f"{codes}, {scale} = group_codes_reference({given[0]}, {arguments})"]
    else:
        floor = float(options.get("floor", 0.0))
        arguments = f'"{options["mode"]}", {float(options["levels"])}, {low}, {high}, {floor!r}'
        lines = [f"{codes}, {scale}, {zero or '_'} = token_codes_reference({given[0]}, {arguments})"]
        lines += [f"{zero} = {zero}.to(torch.int8)"] * bool(zero)
    return [*lines, f"{codes} = stored_reference({codes}, {bits}, {SPAN})"]
