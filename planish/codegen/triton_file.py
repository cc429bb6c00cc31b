"""The text of an emitted file: what stands around a kernel's body.

A file imports torch and triton only. Its parts, in order: a docstring with the steps and their cost, constants, the
device functions, the kernel, `Launch` and the launcher, the op, the eager reference, the self-check. Nothing in it
depends on where or when it was written.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from planish.codegen import triton_source
from planish.codegen.configs import fitting
from planish.codegen.cost import dtype_of, least, useful
from planish.codegen.kernel_spec import Kernel, Tensor
from planish.codegen.triton_body import Body, Parameter
from planish.codegen.triton_check import MAIN, TORCH, example_text
from planish.codegen.triton_check import check_text as self_check

POINTER = {
    "i8": "i8", "u8": "u8", "i16": "i16", "i32": "i32", "i64": "i64", "bool": "i1",
    "f16": "fp16", "bf16": "bf16", "f32": "fp32",
}  # fmt: skip
WARPS = Parameter("num_warps", 8, "num_warps in (1, 2, 4, 8, 16)", "warps of a program")
STAGES = Parameter("num_stages", 3, "1 <= num_stages <= 8", "tiles in flight")
_NAME = "kernel_name_"  # replaced when the text is hashed
_CLOSING = "    on whole rows, by the last tile of a block of rows:"

Launches = Mapping[str, Sequence[tuple[int | None, Mapping[str, int]]]]


@dataclass(frozen=True)
class Emitted:
    """A kernel's file.

    Attributes:
        name: a readable stem and a hash of the content; the file is called `name`.py, the op planish::`name`.
        dtype: what "float" stands for: "f16", "bf16", "f32".
    """

    name: str
    text: str
    kernel: Kernel
    dtype: str


def stem(kernel: Kernel, dtype: str) -> str:
    """The readable part of a name: what the kernel does, its sizes, its float."""
    words: list[str] = []
    if kernel.kind == "gemm":
        assert kernel.activation is not None
        a, first = kernel.activation, kernel.products[0]
        words += ["gemm", f"a{a.bits}" if a.kind == "codes" else "float", first.weight.decoder]
        words += [f"g{first.weight.group}"] * bool(first.weight.group)
        words += [f"x{len(kernel.products)}"] * (len(kernel.products) > 1)
        words += [f"r{branch.rank}" for branch in first.branches]
    words += [step.row for step in (*kernel.steps, *kernel.closing)]
    words += [f"{kernel.columns}x{kernel.outputs}" if kernel.kind == "gemm" else str(kernel.columns), dtype]
    return re.sub(r"\W+", "_", "_".join(words))


# -- parts ---------------------------------------------------------------------------------------


def _shape_text(shape: Iterable[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _docstring(kernel: Kernel, dtype: str) -> str:
    kind = "whole rows" if kernel.kind == "prologue" else "tiles"
    size = f"[M, {kernel.columns}]" + (f" -> [M, {kernel.outputs}]" if kernel.outputs else "")
    lines = [_NAME, "", f"{kernel.kind} on {kind} of {size}, written by planish", ""]
    lines += [*ir_lines(kernel, dtype), ""]
    lines += [*cost_lines(kernel, dtype), "Not timed on a GPU."]
    lines += [
        "",
        "    TRITON_INTERPRET=1 python FILE    compares the kernel with its eager reference, in the interpreter",
        "    python FILE                       the same on a GPU",
    ]
    return '"""' + "\n".join(lines) + '\n"""'


def ir_lines(kernel: Kernel, dtype: str) -> list[str]:
    """The kernel as text: its border, then a line for each step."""
    lines = []
    for tensor in kernel.tensors:
        packed = f", {tensor.packed} codes a byte" if tensor.packed > 1 else ""
        kind = dtype_of(tensor, dtype)
        lines.append(f"    {tensor.role:7} %{tensor.name}: {kind}{_shape_text(tensor.shape)}{packed}")
    if kernel.activation is not None:
        a = kernel.activation
        for product in kernel.products:
            w = product.weight
            parts = [f"%{name}" for name in (w.codes, w.ids, w.scale, w.zero, w.sums) if name]
            decode = f"{w.decoder}({', '.join(parts)})" + (f" {{group = {w.group}}}" if w.group else "")
            left = [f"%{name}" for name in (a.codes, a.scale, a.zero) if name]
            granularity = f" {{{a.granularity}{f' = {a.group}' if a.group else ''}}}" if a.granularity else ""
            lines.append(f"    %{product.result} = linear({', '.join(left)}{granularity}, {decode}")
            lines[-1] += "".join(f" + %{b.left} @ %{b.right}^T" for b in product.branches)
            lines[-1] += f" + %{product.bias})" if product.bias else ")"
    for steps, title in (
        (kernel.steps, ""),
        (kernel.closing, _CLOSING),
    ):
        if title and steps:
            lines.append(title)
        for step in steps:
            writes, reads = (", ".join(f"%{n}" if n else "-" for n in names) for names in (step.writes, step.reads))
            options = ", ".join(f"{k} = {json.dumps(v)}" for k, v in step.options)
            lines.append(f"    {writes} = {step.row}({reads})" + (f" {{{options}}}" if options else ""))
    return [part for line in lines for part in textwrap.wrap(line, 118, subsequent_indent=" " * 8)]


def cost_lines(kernel: Kernel, dtype: str) -> list[str]:
    """The least bytes and the operations of a launch (`planish.codegen.cost`)."""
    fixed = least(kernel, 0, dtype)
    counts = ", ".join(f"{round(count)} M {kind}" for kind, count in sorted(useful(kernel, 1, dtype).items()) if count)
    moved = f"{least(kernel, 1, dtype) - fixed} M + {fixed}"
    return [
        f"Bytes, each input and weight read once, each output written once: {moved}.",
        f"Operations: {counts or 0}.",
    ]


def folded(text: str, width: int = 120) -> str:
    """Lines of code that are too long, opened at their largest bracket: its parts a line each."""
    found: list[str] = []
    for line in text.split("\n"):
        found += _opened(line, width) if len(line) > width and not line.lstrip().startswith("#") else [line]
    return "\n".join(found)


def _opened(line: str, width: int) -> list[str]:
    indent = line[: len(line) - len(line.lstrip())]
    starts: list[int] = []
    cuts: dict[int, list[int]] = {}
    best = (0, 0)
    for at, letter in enumerate(line):
        if letter in "([{":
            starts.append(at)
            cuts[at] = []
        elif letter in ")]}":
            first = starts.pop()
            best = max(best, (first, at), key=lambda pair: pair[1] - pair[0] if cuts.get(pair[0]) else 0)
        elif letter == "," and starts:
            cuts[starts[-1]].append(at)
    first, last = best
    if first == last:
        return [line]
    ends = [first, *cuts[first], last]
    parts = [line[a + 1 : b].strip() for a, b in pairwise(ends)]
    parts = [f"{indent}    {part}," for part in parts if part]
    parts = [inner for part in parts for inner in (_opened(part, width) if len(part) > width else [part])]
    return [line[: first + 1], *parts, indent + line[last:]]


def _constants(body: Body) -> str:
    return "\n".join(f"{name} = tl.constexpr({value})" for name, value in body.constants)


def _launch_class(body: Body) -> str:
    fields = [*body.parameters, WARPS, STAGES]
    own = re.compile(rf"\b({'|'.join(f.name for f in fields)})\b")
    rules = [(p, own.sub(r"self.\1", p.check)) for p in fields]
    checks = [f'            ({rule}, "{p.name}", "{p.check}"),' for p, rule in rules]
    return "\n".join(
        [
            "@dataclass(frozen=True)",
            "class Launch:",
            '    """Launch parameters.',
            "",
            "    Raises:",
            "        ValueError: one that the kernel cannot run with.",
            '    """',
            "",
            *(f"    {p.name}: int = {p.default}  # {p.says}" for p in fields),
            "",
            "    def __post_init__(self) -> None:",
            "        for holds, name, rule in (",
            *checks,
            "        ):",
            "            if not holds:",
            '                raise ValueError(f"launch {name}: expected {rule}, got {getattr(self, name)}")',
        ]
    )


def _configs(launches: Launches, body: Body) -> str:
    known = [p.name for p in (*body.parameters, WARPS, STAGES)]
    lines = ["# target -> (up to so many rows, Launch); the last holds for any number"]
    lines += ["CONFIGS: dict[str, tuple[tuple[float, Launch], ...]] = {"]
    for target, rows in launches.items():
        lines.append(f'    "{target}": (')
        for most, values in rows:
            fit = fitting(values, body.parameters)  # what the kernel cannot run with is left to its default
            fields = ", ".join(f"{k}={fit[k]}" for k in values if k in known)
            lines.append(f"        ({'math.inf' if most is None else most}, Launch({fields})),")
        lines.append("    ),")
    return "\n".join([*lines, "}"])


CHOOSE = '''\
TUNED: dict[tuple[str, int], Launch] = {}


def target_of(device: torch.device) -> str:
    """The name of a device in CONFIGS: sm_90, gfx942; "interpreter" for the CPU."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def chosen(M: int, device: torch.device) -> Launch:
    """The launch parameters for so many rows on a device: what `tune` found, else of CONFIGS, else the defaults."""
    target = target_of(device)
    if (target, M) in TUNED:
        return TUNED[target, M]
    return next((launch for most, launch in CONFIGS.get(target, ()) if most >= M), Launch())


def _check(name: str, held: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(held.shape) != shape or held.dtype != dtype or held.device != device or not held.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous {dtype} tensor of shape {list(shape)} on {device}, "
            f"got {held.dtype} {list(held.shape)} with strides {list(held.stride())} on {held.device}"
        )'''


def given(kernel: Kernel) -> list[Tensor]:
    """The tensors that a launcher takes, in order."""
    return [t for t in kernel.tensors if t.role in ("input", "weight")]


def results(kernel: Kernel) -> list[Tensor]:
    """The tensors that a launcher returns, in order."""
    return [t for t in kernel.tensors if t.role == "output"]


def _rows_from(kernel: Kernel) -> str:
    for tensor in given(kernel):
        if "M" in tensor.shape:
            return f"{tensor.name}.shape[{tensor.shape.index('M')}]"
    return "1"


def _made(tensor: Tensor, dtype: str, like: str, how: str) -> str:
    shape = ", ".join(map(str, tensor.shape))
    kind = TORCH[dtype_of(tensor, dtype)]
    return f"    {tensor.name} = {like}.{how}(({shape}{',' if len(tensor.shape) == 1 else ''}), dtype=torch.{kind})"


def _tuple(items: Sequence[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def _signature(name: str, kernel: Kernel, extra: str = "") -> str:
    """A `def` line over the given tensors; results in a tuple, also where there is one."""
    parameters = [f"{t.name}: torch.Tensor" for t in given(kernel)] + ([extra] if extra else [])
    back = ", ".join(["torch.Tensor"] * len(results(kernel)))
    back = f"tuple[{back}]" if len(results(kernel)) > 1 else "torch.Tensor"
    line = f"def {name}({', '.join(parameters)}) -> {back}:"
    if len(line) <= 120:
        return line
    return "\n".join([f"def {name}(", *(f"    {p}," for p in parameters), f") -> {back}:"])


def _returned(kernel: Kernel) -> str:
    return f"    return {', '.join(t.name for t in results(kernel))}"


def _offsets(kernel: Kernel) -> list[str]:
    """Lines that refuse more rows than the kernel's 32-bit offsets reach."""
    widths = [1]
    for tensor in kernel.tensors:
        if "M" in tensor.shape:
            widths.append(math.prod(int(d) for d in tensor.shape if d != "M"))
    most = (2**31 - 1) // max(widths)
    return [f"    if M > {most}:", f'        raise ValueError(f"M: expected at most {most} rows, got {{M}}")']


def _launcher(kernel: Kernel, body: Body, dtype: str) -> str:
    first = given(kernel)[0].name
    lines = [_signature("run", kernel, "launch: Launch | None = None"), '    """Run the kernel.', ""]
    lines += [
        "    Raises:",
        "        ValueError: a tensor of another shape, dtype or device, one that is not contiguous, or too many rows.",
        '    """',
        f"    M, device = {_rows_from(kernel)}, {first}.device",
        "    launch = launch or chosen(M, device)",
        *_offsets(kernel),
    ]
    for tensor in given(kernel):
        shape, kind = _tuple([str(d) for d in tensor.shape]), TORCH[dtype_of(tensor, dtype)]
        lines.append(f'    _check("{tensor.name}", {tensor.name}, torch.{kind}, {shape}, device)')
    lines += [_made(t, dtype, first, "new_empty") for t in kernel.tensors if t.role in ("output", "scratch")]
    for buffer in body.buffers:
        made = "zeros" if buffer.zeroed else "empty"
        lines.append(f"    {buffer.name} = {first}.new_{made}(({buffer.size},), dtype=torch.{buffer.dtype})")
    arguments = [t.name for t in kernel.tensors] + [b.name for b in body.buffers] + ["M"]
    arguments += [f"{p.name}=launch.{p.name}" for p in (*body.parameters, WARPS, STAGES)]
    lines += [
        "    if M:",
        f"        with torch.cuda.device(device) if {first}.is_cuda else nullcontext():",
        f"            kernel[{body.grid}](",
        *(f"                {a}," for a in arguments),
        "            )",
        _returned(kernel),
    ]
    return "\n".join(lines)


def _op(kernel: Kernel, dtype: str) -> str:
    first = given(kernel)[0].name
    names = ", ".join(t.name for t in given(kernel))
    whole = f'@torch.library.custom_op("planish::{_NAME}", mutates_args=())'
    long = len(whole) - len(_NAME) + len(stem(kernel, dtype)) + 11 > 120
    lines = [
        *(["@torch.library.custom_op(", f'    "planish::{_NAME}",', "    mutates_args=(),", ")"] if long else [whole]),
        _signature("op", kernel),
        f"    return run({names})",
        "",
        "",
        "@op.register_fake",
        _signature("_", kernel),
        *([f"    M = {_rows_from(kernel)}"] if any("M" in t.shape for t in results(kernel)) else []),
        *(_made(t, dtype, first, "new_empty") for t in results(kernel)),
        _returned(kernel),
    ]
    return "\n".join(lines)


def _reference(kernel: Kernel, body: Body, dtype: str) -> str:
    lines = [_signature("reference", kernel), '    """What the kernel computes, in plain torch."""']
    if re.search(r"\bdtype\b(?!=)", body.reference):
        lines.append(f"    dtype = torch.{TORCH[dtype]}")
    lines += [textwrap.indent(body.reference.strip("\n"), "    "), _returned(kernel)]
    return "\n".join(lines)


def _aot(kernel: Kernel, body: Body, dtype: str) -> str:
    kinds = [(f"{t.name}_ptr", f"*{POINTER[dtype_of(t, dtype)]}") for t in kernel.tensors]
    short = {v: k for k, v in TORCH.items()}
    kinds += [(f"{b.name}_ptr", f"*{POINTER[short[b.dtype]]}") for b in body.buffers] + [("M", "i32")]
    lines = ["# the types of the kernel's parameters, for ahead-of-time compilation; the others are those of Launch"]
    return "\n".join([*lines, "SIGNATURE = {", *(f'    "{name}": "{kind}",' for name, kind in kinds), "}"])


# -- the file ------------------------------------------------------------------------------------


def render(kernel: Kernel, body: Body, dtype: str, launches: Launches) -> Emitted:
    """A kernel's file.

    Args:
        kernel: the spec.
        body: what `triton_rows` or `triton_gemm` made of it.
        dtype: "f16", "bf16" or "f32": what "float" stands for.
        launches: target -> launch parameters up to a number of rows, the last for any.

    Raises:
        PlanishError: the body names a function that planish/kernels does not have.
    """
    example, also = example_text(kernel, dtype)
    device = triton_source.gathered(body.functions)
    shared = [p for p in triton_source.gathered((*body.references, *also)) if p not in device]
    parts = [
        _constants(body),
        *(p.text for p in device),
        body.kernel.strip("\n"),
        _aot(kernel, body, dtype),
        _launch_class(body),
        _configs(launches, body),
        CHOOSE,
        _launcher(kernel, body, dtype),
        _op(kernel, dtype),
        *(p.text for p in shared),
        _reference(kernel, body, dtype),
        example,
        self_check(kernel),
        MAIN,
    ]
    code = folded("\n\n\n".join(part for part in parts if part))
    modules = [name for name in ("math", "os", "sys") if re.search(rf"\b{name}\.", code)]
    imports = [f"import {name}" for name in modules]
    imports += ["from contextlib import nullcontext", "from dataclasses import dataclass", ""]
    imports += ["import torch", "import triton", "import triton.language as tl"]
    text = "\n\n".join([_docstring(kernel, dtype), "\n".join(imports), code]) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    name = f"{stem(kernel, dtype)}_{digest}"
    return Emitted(name, text.replace(_NAME, name), kernel, dtype)
