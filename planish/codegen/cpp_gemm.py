"""The text of a gemm for the CPU: tiles of products in registers, then its row program on their results.

    Y [M, N] = A [M, K] W^T

Many rows: a thread takes a block of rows and all columns. Sums of a tile of 8 rows and 32 columns stay in registers; on
their float32 results, which lie in the first cache, run the elementwise steps at once (`near`). What other steps read
goes to a buffer of the block, which lies in the second cache, and these steps run over each row of it (`finish`); the
extremes of a row that a scale follows from come with the tiles. Few rows: threads share the columns, and where steps
need whole rows, they wait for each other before them. What a result is does not depend on the threads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from planish.codegen import cpp_rows
from planish.codegen.cpp_gemm_tile import TileWriter
from planish.codegen.cpp_pack import BLOCK
from planish.codegen.gemm_plan import refusal
from planish.codegen.kernel_spec import Kernel
from planish.ir.errors import PlanishError

HEADERS = (
    "base.h",
    "vectors.h",
    "dot_integer.h",
    "dot_float.h",
    "dot_limbs.h",
    "dot_pairs.h",
    "dot_panel.h",
    "tiles.h",
)
BUFFER = 512 * 1024  # bytes of a block's results: they stay in the second cache with a panel of the weight
MOST_ROWS = 64  # of a block
PANEL_ROWS = 16  # from which on a panel of a weight is decoded once for all rows of a block
FEW_ROWS = 32  # that threads share by columns
CHUNK = 512  # columns of a buffer where a row program needs no whole rows


class Gemm(TileWriter):
    """The writer of one kernel.

    Attributes:
        plan: where the steps of its row program run.
    """

    def __init__(self, kernel: Kernel, dtype: str) -> None:
        super().__init__(kernel, dtype)
        self.plan = cpp_rows.tile_plan(kernel, dtype)

    # -- all of it ---------------------------------------------------------------------------------

    def write(self) -> tuple[str, ...]:
        """All lines; the headers that they need."""
        kernel, plan = self.kernel, self.plan
        near = None if plan.direct else cpp_rows.tile_function(kernel, plan, self.dtype)
        rest = cpp_rows.rest_function(kernel, plan, self.dtype) if plan.kept else None
        values = self._values(rest.scratch if rest else 0) | {"group": rest.group if rest else 1}
        self._fill(CONSTANTS, values)
        self._results()
        self._left()
        for product in kernel.products:
            self._tile(product)
            if self.panel:
                self._decode(product)
                self._tile(product, "panel")
        for made in (near, rest):
            if made is not None:
                self.line(made.text)
                self.line()
        if near is not None:
            self._fill(NEAR, values)
        self._fill(MULTIPLY, values)
        self._fill(WHOLE_ROWS if kernel.closing and rest else BY_COLUMNS, values)
        own = (*HEADERS, "dot_amx.h") if self.tiled else HEADERS
        return (*own, *(near.headers if near else ()), *(rest.headers if rest else ()))

    def _results(self) -> None:
        """Write the struct `Results` and the function that makes it."""
        arrays = [f"float *{name};" for name in self.plan.kept]
        arrays += [f"int32_t *{name};" for name, _, _ in self.plan.extremes]
        self.line("// What is kept of a block of rows: numbers of a row from a column on, and partial extremes.")
        self.line("struct Results {")
        self.line("int64_t first_column;", 1)
        for line in arrays:
            self.line(line, 1)
        self.line("};")
        self.line()
        self.line("static Results results_of(float *memory, int64_t rows, int64_t lanes, int64_t from) {")
        self.line("Results to;", 1)
        self.line("to.first_column = from;", 1)
        for i, name in enumerate(self.plan.kept):
            self.line(f"to.{name} = memory + {i} * rows * WIDTH;", 1)
        for i, (name, _, _) in enumerate(self.plan.extremes):
            place = f"memory + rows * ({len(self.plan.kept)} * WIDTH + {i} * lanes)"
            self.line(f"to.{name} = (int32_t *)({place});", 1)
        self.line("return to;", 1)
        self.line("}")
        self.line()
        if self.kernel.closing:
            self.line("// The same with the partial extremes of another thread.")
            self.line("static Results shifted(Results to, int64_t lanes) {")
            for name, _, _ in self.plan.extremes:
                self.line(f"to.{name} += lanes;", 1)
            self.line("return to;", 1)
            self.line("}")
            self.line()

    def _share(self) -> int:
        """What ranges of columns are multiples of."""
        groups = [int(dict(s.options).get("group", 1)) for s in self.kernel.steps if s.row == "quantize_group"]
        return math.lcm(BLOCK, *groups)

    def _fill(self, text: str, values: Mapping[str, object]) -> None:
        """Write a text with the values of its <names>."""
        self.lines.append(re.sub(r"<([a-z_]+)>", lambda found: str(values[found[1]]), text))

    def _calls(self, kind: str) -> list[str]:
        """What is done for a tile; "panel": with a weight that is decoded for all rows of a block."""
        decode = "if (row == 0) {0}_decode<C()>(b, column, {1});"
        lines = [decode.format(p.result, self._panel_of(p)) for p in self.kernel.products if kind == "panel"]
        place = "to.{0} + row * WIDTH + column - to.first_column, WIDTH"
        if not self.plan.direct:
            lines += [f"alignas(64) float {n}[R() * C() * 16];" for n in self.results]
            lines.append("near_soon<R(), C() * 16>(b, first + row, column);")
            place = "{0}, C() * 16"
        call = f"{{0}}_{kind}<R(), C()>(b, left, first, row, rows, column, {place});"
        lines += [call.format(name) for name in self.results]
        if not self.plan.direct:
            lines.append(f"near<C() * 16>(b, first, row, R(), column, {', '.join(self.results)}, to, lanes);")
        return lines

    def _soon(self) -> list[str]:
        """What asks for the rows of the border that a tile reads and writes behind its sums."""
        near = self.kernel.steps[: self.plan.near]
        names = [*self.results, *(n for s in near for n in (*s.reads, *s.writes))]
        found = []
        for t in self.kernel.tensors:
            if t.name in names and t.role in ("input", "output") and len(t.shape) == 2:
                place = f"b.{t.name} + row * {t.shape[1]} + column, {t.shape[1]}"
                found.append(f"gemm::ask<R, COLUMNS, {int(t.role == 'output')}>({place});")
        return found

    def _values(self, scratch: int) -> dict[str, object]:
        """What the texts of the driver have for their names.

        Args:
            scratch: floats that `finish` needs.
        """
        kernel, plan, share = self.kernel, self.plan, self._share()
        count, whole = len(plan.kept), bool(kernel.closing)
        width = self.outputs if whole else min(-(-self.outputs // share) * share, -(-CHUNK // share) * share)
        rows = MOST_ROWS
        if count:
            rows = max(8, min(MOST_ROWS, BUFFER // (4 * width * count) // 8 * 8))
        else:
            width = self.outputs
        tiles = [TILES.format(kind=kind) if self.tiled else "" for kind in ("panel", "tile")]
        panel = PANEL.format(calls="\n            ".join(self._calls("panel")), tiles=tiles[0]) if self.panel else ""
        extremes = [name for name, _, _ in plan.extremes]
        lanes = [f"{{lanes}}, {', '.join(f'to.{n} + i * {{lanes}}' for n in extremes)}"] * bool(extremes)
        row = ", ".join([*(f"to.{n} + i * WIDTH" for n in plan.kept), *lanes])
        row_from = ", ".join(f"to.{n} + i * WIDTH - from" for n in plan.kept)
        near = [*(f"{n} + i * COLUMNS" for n in self.results)]
        near += [f"to.{n} + (row + i) * WIDTH + first - to.first_column" for n in plan.kept]
        near += [f"to.{n} + (row + i) * lanes" for n in extremes]
        bounds = "first + i, from, last < N ? last : N"
        columns = "for (int64_t i = 0; i < rows; ++i)\n            "
        columns += f"finish(b, {bounds}, {row_from}, more + rows * LEFT / 4);"
        return {
            "outputs": kernel.outputs,
            "stored": self.outputs,
            "width": width,
            "rows": rows,
            "few": min(FEW_ROWS, rows),
            "share": share,
            "left": self._row_bytes(),
            "panel_rows": PANEL_ROWS,
            "panel_floats": self.columns * 16 * len(self.results) if self.panel else 0,
            "panel": panel,
            "use": USE if self.tiled else "",
            "tiles": tiles[1] if self.form.integer else "",
            "scratch": -(-scratch // 16) * 16,
            "count": count,
            "extremes": len(extremes),
            "calls": "\n        ".join(self._calls("tile")),
            "given": "".join(f", const float *{n}" for n in self.results),
            "near": ", ".join(near),
            "clear": "".join(
                f"    for (int64_t i = 0; i < rows; ++i) std::memset(to.{n} + i * lanes, 0, LANES * sizeof(int32_t));\n"
                for n in extremes
            ),
            "soon": "".join(f"        {line}\n" for line in self._soon()),
            "row": row.format(lanes="LANES"),
            "row_few": row.format(lanes="LANES * count"),
            "finish": "\n        " + columns if count else "",
        }


CONSTANTS = """\
constexpr int64_t N = <outputs>, OUTPUTS = <stored>, WIDTH = <width>, RESULTS = <count>, EXTREMES = <extremes>;
constexpr int64_t ROWS = <rows>, FEW = <few>, SHARE = <share>, LANES = 64;
constexpr int64_t LEFT = <left>, SCRATCH = <scratch>, PANEL = <panel_floats>, PANEL_ROWS = <panel_rows>;
"""

USE = """\
#ifdef HAS_TILES
    gemm::TileUse use(rows >= gemm::TILE_ROWS && gemm::tiles_ready());
#endif
"""

TILES = """\
#ifdef HAS_TILES
    if (use.held) return gemm::tiles_of<gemm::TILE_ROWS, 2>(rows, begin, end, {kind});
#endif
"""

PANEL = """\
    if (rows >= PANEL_ROWS) {{
        auto panel = [&](auto R, auto C, int64_t row, int64_t column) {{
            {calls}
        }};
{tiles}        return gemm::tiles_of<gemm::TALL, gemm::NARROW>(rows, begin, end, panel);
    }}
"""

NEAR = """\
// What a tile of COLUMNS columns reads and writes of the border, asked for while it is multiplied.
template <int R, int COLUMNS>
static inline void near_soon(const Border &b, int64_t row, int64_t column) {
    if constexpr (R >= gemm::TALL) {
<soon>    }
}

template <int COLUMNS>
static __attribute__((noinline)) void near(const Border &b, int64_t start, int64_t row, int64_t rows,
                                           int64_t first<given>,
                                           const Results &to, int64_t lanes) {
    if ((N % COLUMNS == 0 && OUTPUTS == N) || first + COLUMNS <= N) {  // columns from N on only fill the last panel
        for (int64_t i = 0; i < rows; ++i) near_row<COLUMNS>(b, start + row + i, first, COLUMNS, <near>);
        return;
    }
    if constexpr (N % COLUMNS != 0) {
        if (first >= N) return;
        for (int64_t i = 0; i < rows; ++i) near_row<0>(b, start + row + i, first, N - first, <near>);
    }
}
"""

MULTIPLY = """\
// The columns from `begin` to `end` of a block of rows.
static void multiply(const Border &b, const Left &left, int64_t first, int64_t rows, int64_t begin, int64_t end,
                     const Results &to, int64_t lanes) {
<clear><use><panel>    auto tile = [&](auto R, auto C, int64_t row, int64_t column) {
        <calls>
    };
<tiles>    gemm::tiles(rows, begin, end, tile);
}
"""

WHOLE_ROWS = """\
// Few rows: threads share the columns, then the rows.
static void run_few(const Border &b, int64_t M, int threads) {
    int64_t size = M * (RESULTS * WIDTH + EXTREMES * LANES * threads), own = M * LEFT / 4 + SCRATCH + PANEL;
    float *memory = row::scratch(size + threads * own);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
        float *more = memory + size + thread * own;
        Left left = left_of(b, 0, M, (char *)more);
        Results to = results_of(memory, M, LANES * count, 0);
        int64_t begin = OUTPUTS / 64 * thread / count * 64, end = OUTPUTS / 64 * (thread + 1) / count * 64;
        multiply(b, left, 0, M, begin, end, shifted(to, LANES * thread), LANES * count);
#pragma omp barrier
        for (int64_t i = thread; i < M; i += count) finish(b, i, 1, <row_few>, more + M * LEFT / 4);
    }
}

static void run(const Border &b, int64_t M, int threads) {
    if (M <= FEW) return run_few(b, M, threads);
    int64_t step = gemm::block_rows(M, ROWS, threads), size = step * (RESULTS * WIDTH + EXTREMES * LANES);
    int64_t own = size + step * LEFT / 4 + SCRATCH + PANEL;
    float *all = row::scratch(threads * own);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t first = 0; first < M; first += step) {
        int64_t rows = M - first < step ? M - first : step;
        float *memory = all + omp_get_thread_num() * own, *more = memory + size;
        Results to = results_of(memory, step, LANES, 0);
        Left left = left_of(b, first, rows, (char *)more);
        multiply(b, left, first, rows, 0, OUTPUTS, to, LANES);
        for (int64_t i = 0; i < rows; i += <group>) {
            finish(b, first + i, rows - i < <group> ? rows - i : <group>, <row>, more + step * LEFT / 4);
        }
    }
}"""

BY_COLUMNS = """\
// The columns from `begin` to `end` of a block of rows, WIDTH at a time.
static void columns(const Border &b, int64_t first, int64_t rows, int64_t begin, int64_t end, float *memory) {
    float *more = memory + rows * RESULTS * WIDTH;
    Left left = left_of(b, first, rows, (char *)more);
    for (int64_t from = begin; from < end; from += WIDTH) {
        int64_t last = from + WIDTH < end ? from + WIDTH : end;
        Results to = results_of(memory, rows, 0, from);
        multiply(b, left, first, rows, from, last, to, 0);<finish>
    }
}

// Few rows: threads share the columns.
static void run_few(const Border &b, int64_t M, int threads) {
    int64_t own = M * (RESULTS * WIDTH + LEFT / 4) + SCRATCH + PANEL, shares = (OUTPUTS + SHARE - 1) / SHARE;
    float *memory = row::scratch(threads * own);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
        int64_t begin = shares * thread / count * SHARE, end = shares * (thread + 1) / count * SHARE;
        columns(b, 0, M, begin, end < OUTPUTS ? end : OUTPUTS, memory + thread * own);
    }
}

static void run(const Border &b, int64_t M, int threads) {
    if (M <= FEW) return run_few(b, M, threads);
    int64_t step = gemm::block_rows(M, ROWS, threads), own = step * (RESULTS * WIDTH + LEFT / 4) + SCRATCH + PANEL;
    float *all = row::scratch(threads * own);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t first = 0; first < M; first += step) {
        int64_t rows = M - first < step ? M - first : step;
        columns(b, first, rows, 0, OUTPUTS, all + omp_get_thread_num() * own);
    }
}"""


def body(kernel: Kernel, dtype: str) -> cpp_rows.Text:
    """The functions of a gemm; `run(border, M, threads)` is the last of them.

    Args:
        dtype: the kernel's float.

    Raises:
        PlanishError: a kernel that `gemm_plan.refusal` refuses, or a step that no row program is written for.
    """
    why = refusal(kernel)
    if why:
        raise PlanishError(f"gemm: cannot be written: {why}")
    writer = Gemm(kernel, dtype)
    headers = writer.write()
    return cpp_rows.Text("\n".join(writer.lines), headers)
