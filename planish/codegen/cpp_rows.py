"""Row programs as C++ functions: prologues whole, and what follows the products of a gemm on each row.

    prologue(kernel, dtype)           a prologue's `run`: its row function and the loop over rows
    tile_plan(kernel, dtype)          what of a gemm's row program runs on a tile of its results, while they are near
    tile_function(kernel, plan, ..)   that part, on some columns of a row
    rest_function(kernel, plan, ..)   the other part, on a whole row or on some of its columns
    row_function(kernel, steps, ..)   some steps, on a whole row or on some of its columns
    border(kernel, dtype)             the struct with a pointer to each border tensor

Functions of planish/kernels/cpp do the arithmetic; the formulas are those of the eager references, operation by
operation, but for the order of sums over a row (norms, low-rank downs), which is that of the vector instructions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from planish.codegen.cpp_rows_writer import Block, Loop, Writer, number, type_of
from planish.codegen.kernel_spec import Kernel, Step, padded
from planish.codegen.row_writer import far_first
from planish.ir.errors import PlanishError
from planish.kernels.table import ROWS

ALONE = 16384  # numbers that one thread takes by itself: to start others costs as much
EXTREMES = {  # of a row and 0: how a number counts in the order of sizes, and the extreme of the largest size
    "both": ("row::order({0})", "row::size_of({0})"),
    "above": ("row::order(row::above({0}))", "row::size_of({0})"),
    "below": ("row::order(row::below({0}))", "-row::size_of({0})"),
}
ON_COLUMNS = ("quantize_static", "quantize_group")  # programs that need no whole rows


@dataclass(frozen=True)
class Text:
    """A piece of C++.

    Attributes:
        text: a function, or several.
        headers: names of the headers of planish/kernels/cpp that it needs.
        scratch: floats of scratch memory that a thread needs for it.
        group: the most rows that it takes at once.
    """

    text: str
    headers: tuple[str, ...]
    scratch: int = 0
    group: int = 1


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


@dataclass(frozen=True)
class TilePlan:
    """The two parts of the row program of a gemm.

    Attributes:
        near: how many of the kernel's steps run on a tile: elementwise ones, and codes under scales that are known.
        kept: values that the rest reads of each row, as float32.
        extremes: names of the largest or least numbers of a row that come with the tiles: (name, value, side).
        direct: there is nothing to be done on a tile: its results are what is kept.
    """

    near: int
    kept: tuple[str, ...]
    extremes: tuple[tuple[str, str, str], ...]
    direct: bool


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
        elif padded(columns) > columns and self.tile:
            to = self.row_of(name)
            self.block([f"if (first + count == {columns})",
                        f"    for (int j = count; j < {padded(columns)} - first; ++j) {to}[j] = 0;"])  # fmt: skip
        elif padded(columns) > columns:
            fill = f"for (int j = {columns}; j < {padded(columns)}; ++j) {self.row_of(name)}[j] = 0;"
            self.block([fill if self.whole else f"if (last == {columns}) {fill}"])

    def _extremes(self, step: Step, source: str) -> tuple[int, list[str]]:
        """The extremes of a row and 0 that a scale follows from, reduced where the row is made, or from partial ones.

        Returns:
            The first item that can read them, and a list: what is added to it stands behind them.
        """
        names = scale_extremes(step, source)
        if names[0][0] in self.carried:
            lines = []
            for name, _, side in names:
                lines += [
                    f"int32_t {name}_size = 0;",
                    f"#pragma omp simd reduction(max : {name}_size)",
                    f"for (int64_t j = 0; j < lanes; ++j) {name}_size = row::larger({name}_lanes[j], {name}_size);",
                    f"const float {name} = {EXTREMES[side][1].format(f'{name}_size')};",
                ]
            self.items.insert(0, Block(lines))
            self._shift()
            return 1, lines
        at, loop = self.place(self.size(source), self.ready(source))
        x = self.value(source, at)
        for name, _, side in names:
            size, made = EXTREMES[side]
            grown = f"row::larger({size.format(x)}, {name}_size)"
            loop.reduce("max", f"{name}_size", f"{name}_size = {grown};", "0", "int32_t")
            loop.after.append(f"const float {name} = {made.format(f'{name}_size')};")
        return at + 1, loop.after

    def _token(self, step: Step, source: str) -> None:
        self.headers["quantize.h"] = None
        options, (_, scale, zero) = dict(step.options), (*step.writes, "", "")[:3]
        levels, low, high = number(options["levels"]), int(options["low"]), int(options["high"])
        top, bottom, shift = f"{scale}_top", f"{scale}_bottom", zero or f"{scale}_zero"
        after, lines = self._extremes(step, source)
        if options["mode"] == "symmetric":
            lines.append(f"const float {scale} = row::scale_of({top}, {levels});")
        elif options["mode"] == "floor":
            floor, product = f"{options['floor']}[0]", f"{options['floor']}[1]"
            if not isinstance(options["floor"], str):
                floor = number(options["floor"])
                product = number(float(options["levels"]) * float(options["floor"]))
            lines += [
                f"const float {shift} = row::floor_zero({top}, {floor}, {product}, {number(low)});",
                f"const float {scale} = 1.0f / ({shift} - {number(low)}) * {floor};",
            ]
        else:
            lines += [
                f"const float {scale} = row::scale_of({top} - {bottom}, {levels});",
                f"const float {shift} = row::token_zero({bottom}, {scale}, {levels}, {number(low)});",
            ]
        lines.append(f"const float {scale}_inverse = 1.0f / {scale};")
        lines += [f"b.{scale}[row] = {scale};"] * self.is_output(scale)
        lines += [f"b.{zero}[row] = (int8_t){zero};"] * (bool(zero) and self.is_output(zero))
        to, middle = self._codes_to(step), "0" if options["mode"] == "symmetric" else f"(int32_t){shift}"
        if self.whole and (source in self.accumulators or self._made.get(source, after) < after):
            place = f"{self.array(source)}, {self.size(source)}, {scale}_inverse, {middle}, {to}"
            self.block([f"row::codes_of<{low}, {high}>({place});"])
        else:
            at, loop = self.place(self.size(source), max(after, self.ready(source)))
            ratio = f"{self.value(source, at)} * {scale}_inverse"
            if options["mode"] == "symmetric":
                loop.body.append(f"{to}[j] = row::code_of({ratio}, {low}, {high});")
            else:
                loop.body.append(f"{to}[j] = row::shifted_code({ratio}, {middle}, {low}, {high});")
        self._stored(step, source)

    def _shift(self) -> None:
        """An item was put in front of the others."""
        self._made = {name: at + 1 for name, at in self._made.items()}
        self._ready = {name: at + 1 for name, at in self._ready.items()}

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
    places, ending = ["int64_t start", "int64_t rows"], "rows"
    if not program.whole:
        places, ending = ["int64_t row", "int64_t first", "int64_t last"], "row"
    given = [f"const float *{result}_{ending}" for result in program.accumulators]
    given += ["int64_t lanes"] * bool(program.carried) + [f"const int32_t *{name}_all" for name in program.carried]
    arguments = ", ".join(["const Border &b", *places, *given, "float *scratch"])
    lines = program.lines_together() if program.whole else program.lines()
    body = [line if line.startswith("#") else f"    {line}" for line in lines]
    text = "\n".join([f"static void {name}({arguments}) {{", *body, "}"])
    group = program.group() if program.whole else 1
    return Text(text, tuple(program.headers), program.scratch * group, group)


def row_function(
    kernel: Kernel,
    steps: Sequence[Step],
    dtype: str,
    *,
    name: str = "finish",
    accumulators: Sequence[str] = (),
    whole: bool = True,
) -> Text:
    """A function that runs steps on rows, or on some columns of one.

        static void name(const Border &b, int64_t start, int64_t rows, const float *acc_rows.., float *scratch)
        static void name(const Border &b, int64_t row, int64_t first, int64_t last, const float *acc_row..,
                         float *scratch)

    Rows of `acc_rows` are WIDTH apart.

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


def with_constants(kernel: Kernel) -> tuple[Kernel, tuple[float, ...]]:
    """A kernel without the numbers that calibration chooses for its steps, and these numbers, two for each.

    Kernels that differ in nothing else have one text, in which they are `constants[i][0]` and `constants[i][1]`.
    """
    found: list[float] = []

    def named(step: Step) -> Step:
        options = dict(step.options)
        if step.row != "quantize_token" or options["mode"] != "floor":
            return step
        floor = float(options["floor"])
        options["floor"] = f"constants[{len(found) // 2}]"
        found.extend((floor, float(options["levels"]) * floor))
        return replace(step, options=tuple(options.items()))

    steps, closing = (tuple(named(step) for step in held) for held in (kernel.steps, kernel.closing))
    return (replace(kernel, steps=steps, closing=closing) if found else kernel), tuple(found)


def scale_extremes(step: Step, source: str) -> list[tuple[str, str, str]]:
    """What the scale of a row follows from: (name, value, side) of each extreme."""
    scale, mode = step.writes[1], step.option("mode")
    top = (f"{scale}_top", source, "both" if mode == "symmetric" else "above")
    return [top, (f"{scale}_bottom", source, "below")] if mode == "range" else [top]


def tile_plan(kernel: Kernel, dtype: str) -> TilePlan:
    """What of a gemm's row program runs on tiles.

    Args:
        dtype: the kernel's float.
    """
    results = [product.result for product in kernel.products]
    tensors = {t.name: t for t in kernel.tensors}
    outputs = {t.name for t in kernel.tensors if t.role == "output"}
    made, near = set(results), 0
    for step in kernel.steps:
        wide = [tensors[n].shape for n in step.reads if n not in made]
        if any(shape and shape[-1] != kernel.outputs for shape in wide):
            break
        if not ROWS[step.row].cpp and (step.row != "quantize_static" or int(step.option("bits")) != 8):
            break
        made |= set(step.writes)
        near += 1
    rest = (*kernel.steps[near:], *kernel.closing)
    kept = tuple(dict.fromkeys(n for step in rest for n in step.reads if n in made))
    extremes: list[tuple[str, str, str]] = []
    if near == len(kernel.steps):
        for step in kernel.closing:
            if step.row == "quantize_token" and step.reads[0] in kept:
                extremes += scale_extremes(step, step.reads[0])
    direct = not near and set(kept) == set(results) and not outputs & set(results)
    return TilePlan(near, kept, () if direct else tuple(extremes), direct)


def tile_function(kernel: Kernel, plan: TilePlan, dtype: str) -> Text:
    """A function that runs the near part of a gemm's row program on some columns of a row.

        template <int COLUMNS>
        static void near_row(const Border &b, int64_t row, int64_t first, int64_t columns, const float *acc_row..,
                             float *whole_kept.., int32_t *scale_top_lanes..)

    COLUMNS of them, or `columns` where that is 0. All arrays are given from the column `first` on.

    Args:
        plan: of `tile_plan`, not a direct one.
        dtype: the kernel's float.

    Raises:
        PlanishError: no C++ is written for one of the steps.
    """
    results = [product.result for product in kernel.products]
    program = Program(kernel, dtype, results, whole=False, tile=True)
    program.results(results)
    program.run(kernel.steps[: plan.near])
    rounded = _rounded(kernel)
    at, loop = program.place(kernel.outputs, program.ready(*plan.kept))
    for name in plan.kept:
        loop.body.append(f"{name}_kept[j] = {program.value(name, at)};")
    for name, source, side in plan.extremes:
        held = program.value(source, at)
        held = program.rounding(held) if source in rounded and dtype != "f32" else held
        grown = f"row::larger({EXTREMES[side][0].format(held)}, {name}_lanes[j])"
        loop.body.append(f"{name}_lanes[j] = {grown};")
    arguments = [f"const float *{name}_row" for name in results]
    arguments += [f"float *{name}_kept" for name in plan.kept]
    arguments += [f"int32_t *{name}_lanes" for name, _, _ in plan.extremes]
    body = [line if line.startswith("#") else f"    {line}" for line in program.lines()]
    head = [
        "template <int COLUMNS>",
        "static inline __attribute__((always_inline)) void near_row(const Border &b, int64_t row, int64_t first,",
        f"        int64_t columns, {', '.join(arguments)}) {{",
        "    const int count = COLUMNS ? COLUMNS : (int)columns;",
    ]
    return Text("\n".join([*head, *body, "}"]), tuple(program.headers), program.scratch)


def _rounded(kernel: Kernel) -> set[str]:
    """What closing steps read as it is in the border: rounded to the kernel's float dtype."""
    made = {*(product.result for product in kernel.products), *(n for step in kernel.steps for n in step.writes)}
    stored = {t.name for t in kernel.tensors if t.dtype == "float"} & made
    return stored & {n for step in kernel.closing for n in step.reads}


def rest_function(kernel: Kernel, plan: TilePlan, dtype: str, name: str = "finish") -> Text:
    """A function that runs the other part of a gemm's row program, on rows of what is kept.

        static void name(const Border &b, int64_t start, int64_t rows, const float *whole_rows..,
                         [int64_t lanes, const int32_t *scale_top_all..,] float *scratch)

    On whole rows where there are closing steps, else as `row_function` on some columns of one. What these read of the
    border is rounded to the kernel's float dtype first, as it would be in memory.

    Args:
        plan: of `tile_plan`.
        dtype: the kernel's float.
        name: of the function.

    Raises:
        PlanishError: no C++ is written for one of the steps, or one needs whole rows and is not given them.
    """
    program = Program(kernel, dtype, plan.kept, whole=bool(kernel.closing))
    program.carried = [extreme for extreme, _, _ in plan.extremes]
    program.run(kernel.steps[plan.near :], far=far_first(kernel.steps))
    renamed = {n: program.rounded(n) for n in sorted(_rounded(kernel))}
    program.run(kernel.closing, renamed, far=far_first(kernel.closing))
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
        const int64_t group = M >= {made.group} * 4 * threads ? {made.group} : 1;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < M; row += group) program(b, row, M - row < group ? M - row : group, scratch);
    }}
}}"""
    return Text(f"{made.text}\n\n{run}", made.headers, made.scratch)


__all__ = [
    "Loop", "Text", "TilePlan", "border", "prologue", "rest_function", "row_function", "tile_function", "tile_plan",
    "with_constants",
]  # fmt: skip
