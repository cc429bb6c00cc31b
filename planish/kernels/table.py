"""The rows of the kernel library: one for each step that a kernel can be composed of, as data.

Emission reads this table and the source text of the files that it names; neither Triton nor torch is imported here.
Two kinds of steps:

    an expression   elementwise on float32 tiles of any shape: `text` in the kernel, `eager` in the reference, both with
                    {0}, {1} .. for the operands and {name} for options. Row programs and epilogues write them alike.
    a program       reads whole rows, or makes codes: `text` is "", and a writer of `planish.codegen.triton_rows` (or
                    of `triton_gemm`) spells it; `device` and `eager` name the functions that it calls.

Adding a step: one file with the device function and its eager reference, one row here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Option = int | float | str | bool


@dataclass(frozen=True)
class Row:
    """A kind of step.

    Attributes:
        name: as in `kernel_spec.Step.row`.
        file: of planish/kernels, without ".py"; "" for what needs no function.
        device: the device functions that `text` or the writer calls.
        reference: the eager functions that `eager` or the writer calls.
        text: the expression in a kernel; "" for a program.
        eager: the expression in plain torch.
        flops: operations for each element that it reads; a factor for what is counted by the writer.
        keeps_zero: True if its result is 0 wherever its (first) operand is: padding stays 0.
        variants: (option, its value) -> the expressions (text, eager, cpp) that hold for it.
        cpp: the expression in C++, on one float32; "" for a program. Functions of namespace `row` are those of
            planish/kernels/cpp/functions.h.
    """

    name: str
    file: str = ""
    device: tuple[str, ...] = ()
    reference: tuple[str, ...] = ()
    text: str = ""
    eager: str = ""
    flops: float = 1.0
    keeps_zero: bool = False
    variants: Mapping[tuple[str, Option], Row] | None = None
    cpp: str = ""

    def chosen(self, options: Mapping[str, Option]) -> Row:
        """The row itself, or the variant that the options ask for."""
        for (name, value), row in (self.variants or {}).items():
            if options.get(name) == value:
                return row
        return self

    def expression(self, operands: Sequence[str], options: Mapping[str, Option], *, eager: bool = False) -> str:
        """The text of an elementwise step on these operands (names, or expressions that need no brackets)."""
        row = self.chosen(options)
        return (row.eager if eager else row.text).format(*operands, **options)


def _binary(name: str, sign: str, keeps_zero: bool = False) -> Row:
    text = f"{{0}} {sign} {{1}}"
    return Row(name, text=text, eager=text, keeps_zero=keeps_zero, cpp=text)


def _call(name: str, function: str, flops: float, *, keeps_zero: bool = False, options: str = "") -> Row:
    """A row whose device function is `function` and whose reference is `function`_reference, in activations.py."""
    arguments = "{0}" + "".join(f", {{{option}}}" for option in options.split())
    text, eager = f"{function}({arguments})", f"{function}_reference({arguments})"
    reference = (f"{function}_reference",)
    return Row(name, "activations", (function,), reference, text, eager, flops, keeps_zero, cpp=f"row::{text}")


_TANH_GELU = _call("gelu", "gelu_tanh", 14, keeps_zero=True)
_GELU = Row("gelu", "activations", ("gelu",), ("gelu_reference",), "gelu({0})", "gelu_reference({0})", 14, True,
            variants={("approximate", "tanh"): _TANH_GELU}, cpp="row::gelu({0})")  # fmt: skip

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        # elementwise, two operands
        _binary("add", "+"),
        _binary("sub", "-"),
        _binary("mul", "*", keeps_zero=True),
        _binary("div", "/"),
        Row("max", text="tl.maximum({0}, {1})", eager="torch.maximum({0}, {1})", cpp="row::largest({0}, {1})"),
        Row("min", text="tl.minimum({0}, {1})", eager="torch.minimum({0}, {1})", cpp="row::least({0}, {1})"),
        # elementwise, one operand
        # between floats: rows are float32 inside of a kernel and take the kernel's dtype where they are stored
        Row("cast", text="{0}", eager="{0}", flops=0, keeps_zero=True, cpp="{0}"),
        Row("neg", text="-{0}", eager="-{0}", keeps_zero=True, cpp="-{0}"),
        Row("abs", text="tl.abs({0})", eager="{0}.abs()", keeps_zero=True, cpp="row::absolute({0})"),
        Row(
            "relu",
            text="tl.maximum({0}, 0.0)",
            eager="{0}.clamp(min=0.0)",
            keeps_zero=True,
            cpp="row::above({0})",
        ),
        Row("exp", text="tl.exp({0})", eager="torch.exp({0})", flops=4, cpp="row::exp({0})"),
        Row("log", text="tl.log({0})", eager="torch.log({0})", flops=4, cpp="row::log({0})"),
        Row("sqrt", text="tl.sqrt({0})", eager="torch.sqrt({0})", flops=4, keeps_zero=True, cpp="__builtin_sqrtf({0})"),
        Row("rsqrt", text="tl.rsqrt({0})", eager="torch.rsqrt({0})", flops=4, cpp="row::reciprocal_root({0})"),
        Row("reciprocal", text="1.0 / {0}", eager="1.0 / {0}", cpp="1.0f / {0}"),
        Row("sin", text="tl.sin({0})", eager="torch.sin({0})", flops=8, keeps_zero=True, cpp="__builtin_sinf({0})"),
        Row("cos", text="tl.cos({0})", eager="torch.cos({0})", flops=8, cpp="__builtin_cosf({0})"),
        Row("floor", text="tl.floor({0})", eager="torch.floor({0})", keeps_zero=True, cpp="__builtin_floorf({0})"),
        Row("ceil", text="tl.ceil({0})", eager="torch.ceil({0})", keeps_zero=True, cpp="__builtin_ceilf({0})"),
        Row("erf", text="tl.erf({0})", eager="torch.erf({0})", flops=10, keeps_zero=True, cpp="row::erf({0})"),
        _call("sigmoid", "sigmoid", 4),
        _call("silu", "silu", 5, keeps_zero=True),
        _GELU,
        _call("tanh", "tanh", 6, keeps_zero=True),
        _call("softplus", "softplus", 8),
        _call("hard_sigmoid", "hard_sigmoid", 4, options="alpha beta"),
        _call("hard_swish", "hard_swish", 4, keeps_zero=True),
        _call("leaky_relu", "leaky_relu", 2, keeps_zero=True, options="alpha"),
        _call("elu", "elu", 5, keeps_zero=True, options="alpha"),
        # programs on whole rows
        Row("rms_norm", "norms", ("rms_factor",), ("rms_norm_reference",), flops=4),
        Row("layer_norm", "norms", ("rms_factor",), ("layer_norm_reference",), flops=7),
        Row("hadamard", "hadamard", ("walsh", "walsh_dense"), ("hadamard_reference",)),
        Row("gather", "gather", (), ("gather_reference",)),
        Row("reassemble", "segment_mean", (), ("reassemble_reference",), flops=2),
        Row("down", "low_rank_down", ("down_part",), ("down_reference",), flops=2),
        # codes
        Row("quantize_static", "quantize_static", ("static_codes",), ("static_codes_reference",), flops=5),
        Row(
            "quantize_token",
            "quantize_rows",
            ("token_scale", "token_codes", "token_zero", "floor_zero", "shifted_codes"),
            ("token_codes_reference",),
            flops=8,
        ),
        Row("quantize_group", "quantize_groups", ("group_codes",), ("group_codes_reference",), flops=8),
    )
}
