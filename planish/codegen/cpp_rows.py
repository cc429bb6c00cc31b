"""Row programs as C++ functions: prologues whole, and what follows the products of a gemm on each row.

    prologue(kernel, dtype)           a prologue's `run`: its row function and the loop over rows
    finish_function(kernel, dtype)    epilogue and closing steps of a gemm on a whole row
    row_function(kernel, steps, ..)   some steps, on a whole row or on some of its columns
    border(kernel, dtype)             the struct with a pointer to each border tensor

Functions of planish/kernels/cpp do the arithmetic; the formulas are those of the eager references, operation by
operation, but for the order of sums over a row (norms, low-rank downs), which is that of the vector instructions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from planish.codegen.cpp_rows_writer import Loop, Writer, number, type_of
from planish.codegen.kernel_spec import Kernel, Step, padded
from planish.codegen.row_writer import far_first
from planish.ir.errors import PlanishError
from planish.kernels.table import ROWS

ALONE = 16384  # numbers that one thread takes by itself: to start others costs as much
ON_COLUMNS = ("quantize_static", "quantize_group")  # programs that need no whole rows


@dataclass(frozen=True)
class Text:
    """A piece of C++.

    Attributes:
        text: a function, or several.
        headers: names of the headers of planish/kernels/cpp that it needs.
        scratch: floats of scratch memory that a thread needs for it.
    """

    text: str
    headers: tuple[str, ...]
    scratch: int = 0


def border(kernel: Kernel, dtype: str) -> str:
    """The struct of the pointers to a kernel's border tensors, scratch aside.

    Args:
        dtype: the kernel's float.
    """
    fields = [
        f"    {'' if t.role == 'output' else 'const '}{type_of(t, dtype)} *{t.name};"
        for t in kernel.tensors
        if t.role != "scratch"
    ]
    return "\n".join(["struct Border {", *fields, "};"])


class Program(Writer):
    """The steps that are more than an expression of one column."""

    def run(self, steps: Sequence[Step], renamed: Mapping[str, str] | None = None, *, far: bool = False) -> None:
        """Add steps.

        Args:
            renamed: of the names that they read: what stands for them.
            far: the order of sums in a Hadamard transform: far pairs first.
        """
        names = renamed or {}
        for step in steps:
            if not self.whole and step.row not in ON_COLUMNS and not ROWS[step.row].cpp:
                raise PlanishError(f"step '{step.row}': it needs whole rows")
            if ROWS[step.row].cpp:
                self.expression(step, names)
                continue
            reads = [names.get(name, name) for name in step.reads]
            match step.row:
                case "rms_norm" | "layer_norm":
                    self._norm(step, reads)
                case "hadamard":
                    self._hadamard(step, reads, far)
                case "gather":
                    self._gather(step, reads)
                case "reassemble":
                    self._reassemble(step, reads)
                case "down":
                    self._down(step, reads)
                case "quantize_token":
                    self._token(step, reads[0])
                case "quantize_group":
                    self._group(step, reads[0])
                case "quantize_static":
                    self._static(step, reads)
                case _:
                    raise PlanishError(f"step '{step.row}': no C++ is written for it")

    def results(self, names: Collection[str]) -> None:
        """Store accumulators that are outputs."""
        for name in names:
            if self.is_output(name):
                at, _ = self.place(self.size(name), 0)
                self.value(name, at)
                self.store(name, at)

    # -- norms and transforms ------------------------------------------------------------------------

    def _norm(self, step: Step, reads: Sequence[str]) -> None:
        self.headers["functions.h"] = None
        (source, gain, bias), name = (*reads, "", "")[:3], step.writes[0]
        width = self.size(source)
        at, loop = self.place(width, self.ready(source))
        x = self.value(source, at)
        if step.row == "layer_norm":
            loop.reduce("+", f"{name}_sum", f"{name}_sum += {x};")
            loop.after.append(f"const float {name}_mean = {name}_sum / {width}.0f;")
            at, loop = self.place(width, at + 1)
            x = self.define(f"{name}_centred", f"{self.value(source, at)} - {name}_mean", at)
        loop.reduce("+", f"{name}_squares", f"{name}_squares += {x} * {x};")
        eps = number(step.option("eps"))
        loop.after.append(
            f"const float {name}_factor = row::reciprocal_root({name}_squares / {width}.0f + {eps});"
        )  # fmt: skip
        at, _ = self.place(width, at + 1)
        text = f"{self.value(x, at)} * {name}_factor"
        if gain:
            text = f"{text} * {self.value(gain, at)}"
        if bias:
            text = f"{text} + {self.value(bias, at)}"
        self.define(name, text, at)

    def _hadamard(self, step: Step, reads: Sequence[str], far: bool) -> None:
        self.headers["hadamard.h"] = None
        (source, signs, matrix), name = (*reads, "", "")[:3], step.writes[0]
        block, base = int(step.option("block")), int(dict(step.options).get("base", 1))
        back, width = bool(step.option("transpose")), self.size(source)
        turned = f"{name}_turned"
        if signs and not back:
            self.step_text(turned, "{0} * {1}", [source, signs])
        else:
            self.step_text(turned, "{0}", [source])
        array, inner = self.array(turned), block // base
        lines = [f"row::walsh({array}, {width}, {inner}, {str(far).lower()});"] * (inner > 1)
        if base > 1:
            held = self.allocate(f"{name}_lines", block)
            lines.append(f"row::walsh_dense({array}, b.{matrix}, {width}, {base}, {inner}, {held});")
        after = self.block(lines) + 1
        at, _ = self.place(width, after)
        text = f"{self.value(turned, at)} * {number(1.0 / block**0.5)}"
        if signs and back:
            text += f" * {self.value(signs, at)}"
        self.define(name, text, at)

    # -- what reads other columns --------------------------------------------------------------------

    def _gather(self, step: Step, reads: Sequence[str]) -> None:
        source, index = reads
        given = self.is_given(source)
        array = self.row_of(source) if given else self.array(source)
        at, _ = self.place(int(step.option("columns")), 0 if given else self.array_ready(source))
        self.define(step.writes[0], f"row::wide({array}[{self.row_of(index)}[j]])", at)

    def _reassemble(self, step: Step, reads: Sequence[str]) -> None:
        self.headers["products.h"] = None
        (source, index, share), name = reads, step.writes[0]
        columns, terms = int(step.option("columns")), int(step.option("terms"))
        array = self.array(source)
        made = self.allocate(f"{name}_row", columns)
        self.block(
            [f"row::reassemble({array}, b.{index}, b.{share}, {terms}, {columns}, {made});"], name, width=columns
        )
        if self.is_output(name):
            at, _ = self.place(columns, self.ready(name))
            self.value(name, at)
            self.store(name, at)

    def _down(self, step: Step, reads: Sequence[str]) -> None:
        self.headers["products.h"] = None
        source, weight = reads
        array = self.array(self.rounded(source))
        rank, width = int(step.option("rank")), self.size(source)
        self.block([f"row::down({array}, b.{weight}, {rank}, {width}, {self.row_of(step.writes[0])});"])

    # -- codes ---------------------------------------------------------------------------------------

    def _codes_to(self, step: Step) -> str:
        """Where the codes of a step go one by one: the border, or scratch memory in front of their packing."""
        name = step.writes[0]
        if int(step.option("bits")) == 8:
            return self.row_of(name)
        return self.allocate(f"{name}_codes", padded(self.size(step.reads[0])) // 4, "int8_t")

    def _stored(self, step: Step, source: str) -> None:
        """Behind the codes of a row: those that fill it up, and the packing."""
        columns, name = self.size(source), step.writes[0]
        if int(step.option("bits")) == 4:
            first = "0" if self.whole else "first"
            end = str(columns) if self.whole else "last"
            self.block([f"row::pack_halves({self._codes_to(step)}, {first}, {end}, {self.row_of(name)});"])
        elif padded(columns) > columns:
            fill = f"for (int j = {columns}; j < {padded(columns)}; ++j) {self.row_of(name)}[j] = 0;"
            self.block([fill if self.whole else f"if (last == {columns}) {fill}"])

    def _token(self, step: Step, source: str) -> None:
        self.headers["quantize.h"] = None
        options, (_, scale, zero) = dict(step.options), (*step.writes, "", "")[:3]
        levels, low, high = number(options["levels"]), int(options["low"]), int(options["high"])
        at, loop = self.place(self.size(source), self.ready(source))
        x = self.value(source, at)
        top, bottom, shift = f"{scale}_top", f"{scale}_bottom", zero or f"{scale}_zero"
        if options["mode"] == "symmetric":
            loop.reduce("max", top, f"{top} = row::maximum(row::absolute({x}), {top});")
            loop.after.append(f"const float {scale} = row::scale_of({top}, {levels});")
        elif options["mode"] == "floor":
            floor, wide = float(options["floor"]), float(options["levels"])
            loop.reduce("max", top, f"{top} = row::maximum({x}, {top});")
            made = f"row::floor_zero({top}, {number(floor)}, {number(wide * floor)}, {number(low)})"
            loop.after += [
                f"const float {shift} = {made};",
                f"const float {scale} = 1.0f / ({shift} - {number(low)}) * {number(floor)};",
            ]
        else:
            loop.reduce("max", top, f"{top} = row::maximum({x}, {top});")
            loop.reduce("min", bottom, f"{bottom} = row::minimum({x}, {bottom});")
            loop.after += [
                f"const float {scale} = row::scale_of({top} - {bottom}, {levels});",
                f"const float {shift} = row::token_zero({bottom}, {scale}, {levels}, {number(low)});",
            ]
        loop.after.append(f"const float {scale}_inverse = 1.0f / {scale};")
        loop.after += [f"b.{scale}[row] = {scale};"] * self.is_output(scale)
        loop.after += [f"b.{zero}[row] = (int8_t){zero};"] * (bool(zero) and self.is_output(zero))
        at, loop = self.place(loop.width, at + 1)
        ratio, to = f"{self.value(source, at)} * {scale}_inverse", self._codes_to(step)
        if options["mode"] == "symmetric":
            loop.body.append(f"{to}[j] = row::code_of({ratio}, {low}, {high});")
        else:
            loop.body.append(f"{to}[j] = row::shifted_code({ratio}, (int32_t){shift}, {low}, {high});")
        self._stored(step, source)

    def _static(self, step: Step, reads: Sequence[str]) -> None:
        self.headers["quantize.h"] = None
        source, scale, zero = (*reads, "")[:3]
        low, high = (int(step.option(key)) for key in ("low", "high"))
        at, loop = self.place(self.size(source), self.ready(source))
        held = self.value(scale, at)
        inverse = f"(1.0f / {held})"
        if not self.tensors[scale].shape:
            inverse = self.local(f"{scale}_inverse", f"1.0f / {held}")
        ratio, to = f"{self.value(source, at)} * {inverse}", self._codes_to(step)
        made = f"row::code_of({ratio}, {low}, {high})"
        if zero:
            made = f"row::shifted_code({ratio}, (int32_t){self.value(zero, at)}, {low}, {high})"
        loop.body.append(f"{to}[j] = {made};")
        self._stored(step, source)

    def _group(self, step: Step, source: str) -> None:
        self.headers["quantize.h"] = None
        options, scales = dict(step.options), step.writes[1]
        levels = float(options["levels"])
        half, group = str(levels % 1 != 0).lower(), int(options["group"])
        bounds = f"0, {self.size(source)}" if self.whole else "first, last"
        numbers = f"{number(levels)}, {int(options['low'])}, {int(options['high'])}"
        array = self.array(source)
        made = f"{array}, {bounds}, {numbers}, {self._codes_to(step)}, {self.row_of(scales)}"
        self.block([f"row::group_codes<{group}, {half}>({made});"])
        self._stored(step, source)


# -- functions -----------------------------------------------------------------------------------


def _function(program: Program, name: str) -> Text:
    places = [] if program.whole else ["int64_t first", "int64_t last"]
    given = [f"const float *{result}_row" for result in program.accumulators]
    arguments = ", ".join(["const Border &b", "int64_t row", *places, *given, "float *scratch"])
    body = [line if line.startswith("#") else f"    {line}" for line in program.lines()]
    text = "\n".join([f"static void {name}({arguments}) {{", *body, "}"])
    return Text(text, tuple(program.headers), program.scratch)


def row_function(
    kernel: Kernel,
    steps: Sequence[Step],
    dtype: str,
    *,
    name: str = "finish",
    accumulators: Sequence[str] = (),
    whole: bool = True,
) -> Text:
    """A function that runs steps on a row, or on some of its columns.

        static void name(const Border &b, int64_t row, [int64_t first, int64_t last,]
                         const float *acc_row.., float *scratch)

    Args:
        steps: of the kernel.
        dtype: the kernel's float.
        accumulators: locals that are given as float32 of the row, indexed by the column; stored if they are outputs.
        whole: on all columns; else on `first` (a multiple of 64 and of the groups) to `last` (one too, or the end).

    Raises:
        PlanishError: a step needs whole rows and is not given them, or no C++ is written for it.
    """
    program = Program(kernel, dtype, accumulators, whole=whole)
    program.results(accumulators)
    program.run(steps, far=far_first(steps))
    return _function(program, name)


def finish_function(kernel: Kernel, dtype: str, name: str = "finish") -> Text:
    """A function that runs a gemm's epilogue and closing steps on a row of its products' results.

    What closing steps read of the border is rounded to the kernel's float dtype first, as it would be in memory.

    Args:
        dtype: the kernel's float.
        name: of the function; see `row_function` for its arguments.

    Raises:
        PlanishError: no C++ is written for one of the steps.
    """
    results = [product.result for product in kernel.products]
    program = Program(kernel, dtype, results, whole=True)
    program.results(results)
    program.run(kernel.steps, far=far_first(kernel.steps))
    made = {*results, *(n for step in kernel.steps for n in step.writes)}
    stored = {t.name for t in kernel.tensors if t.dtype == "float"} & made
    read = {n for step in kernel.closing for n in step.reads}
    program.run(kernel.closing, {n: program.rounded(n) for n in sorted(stored & read)}, far=far_first(kernel.closing))
    return _function(program, name)


def prologue(kernel: Kernel, dtype: str) -> Text:
    """The functions of a prologue: `program` on a row, and `run`.

        static void run(const Border &b, int64_t M, int threads)

    Args:
        dtype: the kernel's float.

    Raises:
        PlanishError: no C++ is written for one of the steps.
    """
    made = row_function(kernel, kernel.steps, dtype, name="program")
    run = f"""static void run(const Border &b, int64_t M, int threads) {{
#pragma omp parallel num_threads(threads) if (threads > 1 && M * {kernel.columns} >= {ALONE})
    {{
        float *scratch = row::scratch({made.scratch});
#pragma omp for schedule(static)
        for (int64_t row = 0; row < M; ++row) program(b, row, scratch);
    }}
}}"""
    return Text(f"{made.text}\n\n{run}", made.headers, made.scratch)


__all__ = ["Loop", "Text", "border", "finish_function", "prologue", "row_function"]
