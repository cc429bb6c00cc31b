"""The text of a gemm for the CPU: tiles of products in registers, then its row program on finished rows.

    Y [M, N] = A [M, K] W^T

Many rows: a thread takes a block of rows and all columns. Sums of a tile of 8 rows and 32 columns stay in registers;
their float32 results go to a buffer of the block, which lies in the second cache, and the row program (epilogue,
closing steps) runs over each row of it. Few rows: threads share the columns, and where the row program needs whole
rows, they wait for each other before it. What a result is does not depend on the threads.
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
    """The writer of one kernel."""

    # -- all of it ---------------------------------------------------------------------------------

    def write(self) -> tuple[str, ...]:
        """All lines; the headers that they need."""
        kernel = self.kernel
        if kernel.closing:
            made = cpp_rows.finish_function(kernel, self.dtype)
        else:
            made = cpp_rows.row_function(
                kernel, kernel.steps, self.dtype, name="finish", accumulators=tuple(self.results), whole=False
            )
        values = self._values(made.scratch)
        self._fill(CONSTANTS, values)
        self._left()
        for product in kernel.products:
            self._tile(product)
            if self.panel:
                self._decode(product)
                self._tile(product, "panel")
        self.line(made.text)
        self.line()
        self._fill(MULTIPLY, values)
        self._fill(WHOLE_ROWS if kernel.closing else BY_COLUMNS, values)
        return (*HEADERS, *made.headers)

    def _share(self) -> int:
        """What ranges of columns are multiples of."""
        groups = [int(dict(s.options).get("group", 1)) for s in self.kernel.steps if s.row == "quantize_group"]
        return math.lcm(BLOCK, *groups)

    def _fill(self, text: str, values: Mapping[str, object]) -> None:
        """Write a text with the values of its <names>."""
        self.lines.append(re.sub(r"<(\w+)>", lambda found: str(values[found[1]]), text))

    def _values(self, scratch: int) -> dict[str, object]:
        """What the texts of the driver have for their names.

        Args:
            scratch: floats that `finish` needs.
        """
        kernel, count = self.kernel, len(self.results)
        whole, share = bool(kernel.closing), self._share()
        width = self.outputs if whole else min(-(-self.outputs // share) * share, -(-CHUNK // share) * share)
        rows = max(8, min(MOST_ROWS, BUFFER // (4 * width * count) // 8 * 8))
        call = "{0}_{1}<R(), C()>(b, left, first, row, column, {0} + row * width + column - begin, width);"
        calls = "\n        ".join(call.format(name, "tile") for name in self.results)
        panels = [PANEL.format(name=name, call=call.format(name, "panel")) for name in self.results]
        panel = "".join(["    if (rows >= PANEL_ROWS) {\n", *panels, "        return;\n    }\n"]) if self.panel else ""
        return {
            "outputs": kernel.outputs,
            "stored": self.outputs,
            "width": width,
            "rows": rows,
            "few": min(FEW_ROWS, rows),
            "share": share,
            "left": self._row_bytes(),
            "panel_rows": PANEL_ROWS,
            "panel_floats": self.columns * 16 if self.panel else 0,
            "panel": panel,
            "scratch": -(-scratch // 16) * 16,
            "count": count,
            "calls": calls,
            "floats": ", ".join(f"float *{name}" for name in self.results),
            "names": ", ".join(self.results),
            "pointers": "; ".join(
                f"float *{name} = memory + {i} * size" if i else f"float *{name} = memory"
                for i, name in enumerate(self.results)
            ),
            "from_begin": ", ".join(f"{name} + begin" for name in self.results),
            "row": ", ".join(f"{name} + i * WIDTH" for name in self.results),
            "row_from": ", ".join(f"{name} + i * WIDTH - from" for name in self.results),
        }


CONSTANTS = """\
constexpr int64_t N = <outputs>, OUTPUTS = <stored>, WIDTH = <width>, RESULTS = <count>;
constexpr int64_t ROWS = <rows>, FEW = <few>, SHARE = <share>;
constexpr int64_t LEFT = <left>, SCRATCH = <scratch>, PANEL = <panel_floats>, PANEL_ROWS = <panel_rows>;
"""

PANEL = """\
        gemm::tiles_of<gemm::TALL, gemm::NARROW>(
            rows, begin, end, [&](auto R, auto C, int64_t row, int64_t column) {{
                if (row == 0) {name}_decode<C()>(b, column, left.panel);
                {call}
            }});
"""

MULTIPLY = """\
// Results of the columns from `begin` to `end` of a block of rows, [rows, width] of each product.
static void multiply(const Border &b, const Left &left, int64_t first, int64_t rows, int64_t begin, int64_t end,
                     int64_t width, <floats>) {
<panel>    gemm::tiles(rows, begin, end, [&](auto R, auto C, int64_t row, int64_t column) {
        <calls>
    });
}
"""

WHOLE_ROWS = """\
// Few rows: threads share the columns, then the rows.
static void run_few(const Border &b, int64_t M, int threads) {
    int64_t size = M * WIDTH, own = M * LEFT / 4 + SCRATCH + PANEL;
    float *memory = row::scratch(RESULTS * size + threads * own);
    <pointers>;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
        float *more = memory + RESULTS * size + thread * own;
        Left left = left_of(b, 0, M, (char *)more);
        int64_t begin = OUTPUTS / 64 * thread / count * 64, end = OUTPUTS / 64 * (thread + 1) / count * 64;
        multiply(b, left, 0, M, begin, end, WIDTH, <from_begin>);
#pragma omp barrier
        for (int64_t i = thread; i < M; i += count) finish(b, i, <row>, more + M * LEFT / 4);
    }
}

static void run(const Border &b, int64_t M, int threads) {
    if (M <= FEW) return run_few(b, M, threads);
    int64_t step = gemm::block_rows(M, ROWS, threads), size = step * WIDTH;
    int64_t own = RESULTS * size + step * LEFT / 4 + SCRATCH + PANEL;
    float *all = row::scratch(threads * own);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t first = 0; first < M; first += step) {
        int64_t rows = M - first < step ? M - first : step;
        float *memory = all + omp_get_thread_num() * own, *more = memory + RESULTS * size;
        <pointers>;
        Left left = left_of(b, first, rows, (char *)more);
        multiply(b, left, first, rows, 0, OUTPUTS, WIDTH, <names>);
        for (int64_t i = 0; i < rows; ++i) finish(b, first + i, <row>, more + step * LEFT / 4);
    }
}"""

BY_COLUMNS = """\
// The columns from `begin` to `end` of a block of rows, WIDTH at a time.
static void columns(const Border &b, int64_t first, int64_t rows, int64_t begin, int64_t end, int64_t size,
                    float *memory) {
    <pointers>;
    float *more = memory + RESULTS * size;
    Left left = left_of(b, first, rows, (char *)more);
    for (int64_t from = begin; from < end; from += WIDTH) {
        int64_t to = from + WIDTH < end ? from + WIDTH : end, last = to < N ? to : N;
        multiply(b, left, first, rows, from, to, WIDTH, <names>);
        for (int64_t i = 0; i < rows; ++i) finish(b, first + i, from, last, <row_from>, more + rows * LEFT / 4);
    }
}

// Few rows: threads share the columns.
static void run_few(const Border &b, int64_t M, int threads) {
    int64_t size = M * WIDTH, own = RESULTS * size + M * LEFT / 4 + SCRATCH + PANEL;
    int64_t shares = (OUTPUTS + SHARE - 1) / SHARE;
    float *memory = row::scratch(threads * own);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
        int64_t begin = shares * thread / count * SHARE, end = shares * (thread + 1) / count * SHARE;
        columns(b, 0, M, begin, end < OUTPUTS ? end : OUTPUTS, size, memory + thread * own);
    }
}

static void run(const Border &b, int64_t M, int threads) {
    if (M <= FEW) return run_few(b, M, threads);
    int64_t step = gemm::block_rows(M, ROWS, threads), size = step * WIDTH;
    int64_t own = RESULTS * size + step * LEFT / 4 + SCRATCH + PANEL;
    float *all = row::scratch(threads * own);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t first = 0; first < M; first += step) {
        int64_t rows = M - first < step ? M - first : step;
        columns(b, first, rows, 0, OUTPUTS, size, all + omp_get_thread_num() * own);
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
