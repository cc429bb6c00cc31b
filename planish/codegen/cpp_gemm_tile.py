"""The text of a gemm's tiles for the CPU: what is made of the activation, sums in registers, results in float32.

Integers are multiplied as unsigned codes of the weight times signed codes of the activation, what one instruction adds
up four at a time (AVX-512 VNNI); sums of a row of the activation take back what makes the codes unsigned. Beside floats
codes are decoded in registers: to float32, or, where the activation is bfloat16, to bfloat16 two at a time.
"""

from __future__ import annotations

from planish.codegen.cpp_pack import BLOCK, Form, form_of, id_width
from planish.codegen.kernel_spec import Activation, Kernel, Product, padded

FLOAT = {"f32": "float", "bf16": "bf16_t", "f16": "f16_t"}


class TileWriter:
    """The writer of one kernel.

    Attributes:
        lines: what is written so far.
    """

    def __init__(self, kernel: Kernel, dtype: str) -> None:
        assert kernel.activation is not None
        self.kernel, self.dtype = kernel, dtype
        self.activation: Activation = kernel.activation
        self.form: Form = form_of(kernel, dtype)
        self.columns = padded(kernel.columns)
        self.outputs = -(-kernel.outputs // BLOCK) * BLOCK
        self.width = self.columns + 16  # of float rows: rows 4096 bytes apart would share a set of the first cache
        # many rows of bfloat16: a panel of the weight is decoded once for all of them
        self.panel = dtype == "bf16" and self.activation.kind == "float" and not self.form.pairs
        # one row of floats beside signed 4-bit codes: by integers
        form, w = self.form, kernel.products[0].weight
        signed = not w.zero and not w.clusters and form.bits == 4 and form.step == 8 and form.unit % 16 == 0
        self.limbs = dtype in ("f32", "bf16") and self.activation.kind == "float" and signed
        # 32 rows at once in tile registers, 64 bytes of a row of codes or of pairs at a time (dot_amx.h)
        whole = form.groups == 1 or form.unit % (64 if form.integer else 32) == 0
        self.tiled = whole and (form.integer or self.panel)
        self.lines: list[str] = []
        self.results = [p.result for p in kernel.products]

    def line(self, text: str = "", indent: int = 0) -> None:
        self.lines.append("    " * indent + text if text else "")

    # -- the left side -----------------------------------------------------------------------------

    def _places(self) -> tuple[list[tuple[str, str, int]], list[str]]:
        """What is made of a block's rows before it is multiplied.

        Returns:
            (name, C++ type, elements a row) of each buffer, and the statements that fill the struct `Left`.
        """
        kernel, a, form = self.kernel, self.activation, self.form
        buffers: list[tuple[str, str, int]] = []
        lines: list[str] = []
        source = ""
        if a.kind == "codes":
            source = f"b.{a.codes} + first * {self.columns * a.bits // 8}"
            if a.bits == 4:
                buffers.append(("codes", "int8_t", self.columns))
                lines.append(f"gemm::unpack_rows<{str(a.signed).lower()}>({source}, rows, {self.columns}, codes);")
                source = "codes"
        if form.integer:
            lines.append(f"left.codes = {source};")
            buffers.append(("sums", "int32_t", form.groups))
            lines.append(f"gemm::row_sums(left.codes, rows, {self.columns}, {form.unit}, {form.groups}, sums);")
            lines.append("left.sums = sums;")
        elif form.pairs:
            source, half = f"b.{a.codes} + first * {kernel.columns}", self.columns // 2 + 16
            buffers.append(("pairs", "uint32_t", half))
            sizes = f"{kernel.columns}, {self.columns}, {half}"
            lines.append(f"gemm::pair_rows<{form.step}>({source}, rows, {sizes}, pairs);")
            lines.append("left.pairs = pairs;")
            if self.limbs:
                buffers.append(("wide", "float", self.width))
                sizes = f"{kernel.columns}, {kernel.columns}, {self.width}"
                lines.append(f"if (gemm::LIMBS && rows == 1) gemm::widen_rows({source}, rows, {sizes}, wide);")
                self._limbs(buffers, lines)
            if kernel.products[0].weight.zero:
                buffers.append(("totals", "float", form.groups))
                sizes = f"{kernel.columns}, {form.unit}, {form.groups}"
                lines.append(f"gemm::row_totals({source}, rows, {sizes}, totals);")
                lines.append("left.totals = totals;")
        else:
            buffers.append(("wide", "float", self.width))
            step = self.columns if a.kind == "codes" else kernel.columns
            source = source or f"b.{a.codes} + first * {step}"
            lines.append(f"gemm::widen_rows({source}, rows, {step}, {kernel.columns}, {self.width}, wide);")
            if form.spread:
                groups = -(-kernel.columns // a.group)
                lines.append(f"gemm::scale_groups(wide, rows, {kernel.columns}, {self.width}, {a.group},")
                lines.append(f"                   b.{a.scale} + first * {groups});")
            lines.append("left.rows = wide;")
            if self.limbs:
                self._limbs(buffers, lines)
            if self.panel:
                half = self.columns // 2 + 16
                buffers.append(("pairs", "uint32_t", half))
                wide = lines.pop(-2)
                sizes = f"{kernel.columns}, {self.columns}, {half}"
                lines.append(f"if (rows < PANEL_ROWS) {wide}")
                lines.append(f"else gemm::copy_rows({source}, rows, {sizes}, pairs);")
                lines.append("left.pairs = pairs;")
                lines.append("left.panel = (uint32_t *)(memory + rows * LEFT) + SCRATCH;")
        for branch in kernel.products[0].branches:
            name = f"{branch.left}_rows"
            if self.dtype == "f32":
                lines.append(f"left.{name} = b.{branch.left} + first * {branch.rank};")
                continue
            buffers.append((name, "float", branch.rank))
            source = f"b.{branch.left} + first * {branch.rank}"
            lines.append(f"gemm::widen_rows({source}, rows, {branch.rank}, {branch.rank}, {branch.rank}, {name});")
            lines.append(f"left.{name} = {name};")
        return buffers, lines

    def _limbs(self, buffers: list[tuple[str, str, int]], lines: list[str]) -> None:
        """What is made of one row in `wide` (dot_limbs.h)."""
        form = self.form
        buffers += [("limbs", "int8_t", 3 * self.columns), ("heads", "int32_t", 4 * form.groups)]
        lines += ["left.limbs = limbs;", "left.heads = (const gemm::LimbHead *)heads;"]
        lines.append("if (gemm::LIMBS && rows == 1)")
        sizes = f"{self.columns}, {self.columns}, {form.unit}, {form.groups}"
        lines.append(f"    gemm::limb_row(wide, {sizes}, limbs, (gemm::LimbHead *)heads);")

    def _row_bytes(self) -> int:
        """Bytes of what is made of a row of the activation."""
        return sum(-(-count * {"int8_t": 1}.get(kind, 4) // 64) * 64 for _, kind, count in self._places()[0])

    def _left(self) -> None:
        """Write the struct `Left` and the function that fills it."""
        buffers, statements = self._places()
        self.line("// Rows of the activation as they are multiplied.")
        self.line("struct Left {")
        if self.form.integer:
            self.line("const int8_t *codes;", 1)
            self.line("const int32_t *sums;", 1)
        elif self.form.pairs:
            self.line("const uint32_t *pairs;", 1)
            self.line("const float *totals;", 1)
        else:
            self.line("const float *rows;", 1)
            if self.panel:
                self.line("const uint32_t *pairs;", 1)
                self.line("uint32_t *panel;", 1)
        if self.limbs:
            self.line("const int8_t *limbs;", 1)
            self.line("const gemm::LimbHead *heads;", 1)
        for branch in self.kernel.products[0].branches:
            self.line(f"const float *{branch.left}_rows;", 1)
        self.line("};")
        self.line()
        self.line("static Left left_of(const Border &b, int64_t first, int64_t rows, char *memory) {")
        self.line("Left left;", 1)
        total = 0
        for name, kind, count in buffers:
            size = -(-count * {"int8_t": 1}.get(kind, 4) // 64) * 64
            self.line(f"{kind} *{name} = ({kind} *)(memory + rows * {total});" if total else
                      f"{kind} *{name} = ({kind} *)memory;", 1)  # fmt: skip
            total += size
        for statement in statements:
            self.line(statement, 1)
        self.line("return left;", 1)
        self.line("}")
        self.line()

    # -- a tile ------------------------------------------------------------------------------------

    def _decode(self, product: Product) -> None:
        """Write the function that decodes a panel of a product's weight."""
        form = self.form
        self.line("template <int C>")
        self.line(f"static __attribute__((noinline)) void {product.result}_decode(const Border &b, int64_t column,")
        self.line("        uint32_t *out) {")
        self.line("using namespace gemm;", 1)
        self.line("constexpr int64_t PANELS = 4;", 1)
        self.line("int64_t block = column / 64, panel = column % 64 / 16;", 1)
        indent = 1
        if form.groups > 1:
            self.line(f"for (int64_t group = 0; group < {form.groups}; ++group) {{", 1)
            indent = 2
        self._decoder(product, indent)
        count = self._units() + (f" * {form.step}" if form.step > 1 else "")
        place = f"out + group * {form.unit // 2 * 16} * C" if form.groups > 1 else "out"
        self.line(f"decode_panel<decltype(w), C>(w, {count}, {place});", indent)
        if form.groups > 1:
            self.line("}", 1)
        self.line("}")
        self.line()

    def _tile(self, product: Product, name: str = "tile") -> None:
        """Write the function that computes a tile of a product; "panel": of a weight that is decoded already."""
        form, decoded = self.form, name == "panel"
        self.line("template <int R, int C>")
        self.line(f"static __attribute__((noinline)) void {product.result}_{name}(const Border &b, const Left &left,")
        self.line("        int64_t first, int64_t row, int64_t rows, int64_t column, float *out, int64_t width) {")
        self.line("using namespace gemm;", 1)
        self.line("constexpr int64_t PANELS = 4;", 1)
        self.line("int64_t block = column / 64, panel = column % 64 / 16;", 1)
        apart = form.groups > 1 and not (decoded and product.weight.clusters)
        indent = 1
        if apart:
            self.line(f"for (int64_t group = 0; group < {form.groups}; ++group) {{", 1)
            indent = 2
        if decoded:
            self._panel_sums(product, indent, apart)
        else:
            self._sums(product, indent)
        self._scaled(product, indent, apart)
        if apart:
            self.line("}", 1)
        last = self._after(product)
        if apart and last and not product.branches:
            self._each(["Floats y = load<Floats>(out + i * width + j * 16);", *last], 1)
        for i, branch in enumerate(product.branches):
            self.line("{", 1)
            self.line("Floats sum[R][C];", 2)
            self.line("clear(sum);", 2)
            self.line("Numbers<float, false, C> w;", 2)
            place = f"(block * {branch.rank} * PANELS + panel) * 64"
            self.line(f"w.weight = (const uint8_t *)b.{branch.right} + {place};", 2)
            self.line(
                f"add_floats(sum, left.{branch.left}_rows + row * {branch.rank}, {branch.rank}, {branch.rank}, w);", 2
            )
            end = i == len(product.branches) - 1
            lines = ["Floats y = load<Floats>(out + i * width + j * 16);"]
            lines += self._scales(product) if not i and apart else []
            self._each([*lines, "y = y + sum[i][j];", *(self._bias(product) if end else [])], 2)
            self.line("}", 1)
        self.line("}")
        self.line()

    def _units(self) -> str:
        """Columns of a group, the last of which may be short, in steps."""
        form = self.form
        whole, rest = form.unit // form.step, (self.columns - (form.groups - 1) * form.unit) // form.step
        if form.groups == 1:
            return str(self.columns // form.step)
        return str(whole) if whole == rest else f"(group < {form.groups - 1} ? {whole} : {rest})"

    def _panel_of(self, product: Product) -> str:
        """Where the decoded panel of a product's weight lies."""
        at = self.results.index(product.result)
        return f"left.panel + {at * self.columns * 16}" if at else "left.panel"

    def _panel_sums(self, product: Product, indent: int, apart: bool) -> None:
        """The sums over the pairs of a decoded panel, or of a group of them."""
        form, half = self.form, self.columns // 2 + 16
        self.line("Floats sum[R][C];", indent)
        self.line("clear(sum);", indent)
        pairs, panel, count = f"left.pairs + row * {half}", self._panel_of(product), str(self.columns // 2)
        if apart:
            pairs += f" + group * {form.unit // 2}"
            panel += f" + group * {form.unit // 2 * 16} * C"
            count = self._units() + (f" * {form.step // 2}" if form.step > 1 else " / 2")
        if self.tiled:
            self.line(f"if constexpr (R == TILE_ROWS) tile_pairs(sum, {pairs}, {half}, {panel}, {count});", indent)
            self.line("else", indent)
        self.line(f"add_panel(sum, {pairs}, {half}, {panel}, {count});", indent + int(self.tiled))

    def _sums(self, product: Product, indent: int) -> None:
        form, w = self.form, product.weight
        steps = self.columns // form.step
        group = form.groups > 1
        self.line(f"{'Ints' if form.integer else 'Floats'} sum[R][C];", indent)
        self.line("clear(sum);", indent)
        at = f"(block * {steps} + group * {form.unit // form.step})" if group else f"block * {steps}"
        left = f" + group * {form.unit}" if group else ""
        if form.integer:
            self.line(f"const uint8_t *weight = (const uint8_t *)b.{w.codes} + ({at} * PANELS + panel) * 64;", indent)
            self.line(f"const int8_t *codes = left.codes + row * {self.columns}{left};", indent)
            given = f"(sum, codes, {self.columns}, weight, {self._units()}"
            if self.tiled:
                self.line(f"if constexpr (R == TILE_ROWS) tile_products<{form.bits}>{given});", indent)
                self.line("else {", indent)
            inner = indent + int(self.tiled)
            self.line(f"Ahead ahead = ahead_of<R>(weight, panel, {steps}, {self._units()}, row, rows);", inner)
            self.line(f"add_products<{form.bits}>{given}, ahead);", inner)
            if self.tiled:
                self.line("}", indent)
            return
        if self.limbs:
            weight = f"(const uint8_t *)b.{w.codes} + ({at} * PANELS + panel) * 64"
            head = "left.heads[group]" if group else "left.heads[0]"
            self.line("if constexpr (LIMBS && R == 1) {", indent)
            self.line(
                f"add_limbs(sum, left.limbs{left}, {self.columns}, {head}, {weight}, {self._units()});", indent + 1
            )
            self.line("} else {", indent)
        inner = indent + 1 if self.limbs else indent
        if form.pairs:
            half, signed = self.columns // 2 + 16, str(not w.zero).lower()
            self.line(f"const uint8_t *weight = (const uint8_t *)b.{w.codes} + ({at} * PANELS + panel) * 64;", inner)
            pairs = f"left.pairs + row * {half}" + (f" + group * {form.unit // 2}" if group else "")
            self.line(f"add_pairs<{form.bits}, {signed}>(sum, {pairs}, {half}, weight, {self._units()});", inner)
        else:
            self._decoder(product, inner)
            rows = f"left.rows + row * {self.width}{left}"
            self.line(f"add_floats(sum, {rows}, {self.width}, {self._units()}, w);", inner)
        if self.limbs:
            self.line("}", indent)

    def _decoder(self, product: Product, indent: int) -> None:
        """The decoder `w` of a group of the weight."""
        form, w = self.form, product.weight
        steps = self.columns // form.step
        at = f"block * {steps}"
        if form.groups > 1:
            at = f"(block * {steps} + group * {form.unit // form.step})"
        zero = str(bool(w.zero)).lower()
        size = 64
        if w.clusters:
            kind = {8: "uint8_t", 16: "uint16_t", 32: "uint32_t"}[id_width(w, form)]
            self.line(f"Split<{form.bits}, {w.clusters}, {kind}, {zero}, C> w;", indent)
            self.line(f"w.ids = (const {kind} *)b.{w.ids} + ({at} * PANELS + panel) * 16;", indent)
        elif form.step > 1:
            self.line(f"Codes<{form.bits}, {zero}, C> w;", indent)
        else:
            kind = FLOAT[self.dtype] if form.bits == 16 else "uint8_t" if w.zero else "int8_t"
            size = 16 * {"float": 4, "bf16_t": 2, "f16_t": 2}.get(kind, 1)
            self.line(f"Numbers<{kind}, {zero}, C> w;", indent)
        self.line(f"w.weight = (const uint8_t *)b.{w.codes} + ({at} * PANELS + panel) * {size};", indent)
        table, zeros = self._table(product), self._zeros(product)
        for k in range(w.clusters):
            whole = -(-self.kernel.columns // w.group) if w.group else 1
            place = f"{k * whole * self.outputs} + {table}" if k else table
            self.line(f"load_each(w.scale[{k}], (const float *)b.{w.scale} + {place});", indent)
            if w.zero:
                self.line(f"load_each(w.zero[{k}], (const {zeros} *)b.{w.zero} + {place});", indent)
        if w.zero and not w.clusters:
            self.line(f"load_each(w.zero, (const {zeros} *)b.{w.zero} + {table});", indent)

    def _zeros(self, product: Product) -> str:
        """How zero points of a weight are stored."""
        zero = product.weight.zero
        return "uint8_t" if zero and self.kernel.tensor(zero).dtype == "i8" else "float"

    def _table(self, product: Product) -> str:
        """Where the scales of a group of this tile lie."""
        size, unit = product.weight.group, self.form.unit
        if not size or self.form.groups == 1:
            return "column"
        group = "group" if size == unit else f"group / {size // unit}"
        return f"(block * {-(-self.kernel.columns // size)} + {group}) * 64 + panel * 16"

    def _each(self, lines: list[str], indent: int, before: tuple[str, ...] = ()) -> None:
        """Statements for each vector of the tile, whose value is `y`."""
        self.line("#pragma GCC unroll 4")
        self.line("for (int j = 0; j < C; ++j) {", indent)
        for text in before:
            self.line(text, indent + 1)
        self.line("#pragma GCC unroll 8")
        self.line("for (int i = 0; i < R; ++i) {", indent + 1)
        for text in lines:
            self.line(text, indent + 2)
        self.line("store(out + i * width + j * 16, y);", indent + 2)
        self.line("}", indent + 1)
        self.line("}", indent)

    def _scaled(self, product: Product, indent: int, apart: bool) -> None:
        """From the sums of a group to results."""
        form, w, a = self.form, product.weight, self.activation
        before: list[str] = []
        lines: list[str] = []
        if form.integer:
            middle = str(1 << (form.bits - 1))
            if w.zero:
                before.append(
                    f"Ints middle = (Ints)words16((const uint8_t *)b.{w.zero} + {self._table(product)} + j * 16);"
                )
                middle = "middle"
            sums = f"left.sums[(row + i) * {form.groups} + group]" if apart else "left.sums[row + i]"
            lines.append(f"Floats y = floats(sum[i][j] - {middle} * {sums});")
        elif form.pairs and w.zero:
            totals = f"left.totals[(row + i) * {form.groups} + group]" if apart else "left.totals[row + i]"
            before.append(f"Floats zero = wide16((const uint8_t *)b.{w.zero} + {self._table(product)} + j * 16);")
            lines.append(f"Floats y = sum[i][j] - zero * {totals};")
        else:
            lines.append("Floats y = sum[i][j];")
        if apart:
            factors = []
            if w.group and not w.clusters:
                before.append(
                    f"Floats scale = load<Floats>((const float *)b.{w.scale} + {self._table(product)} + j * 16);"
                )
                factors.append("scale")
            if form.integer and a.group:
                count = -(-self.kernel.columns // a.group)
                share = "" if a.group == form.unit else f" / {a.group // form.unit}"
                factors.append(f"b.{a.scale}[(first + row + i) * {count} + group{share}]")
            if factors:
                lines.append(f"y = y * {'(' + ' * '.join(factors) + ')' if len(factors) > 1 else factors[0]};")
            lines.append("if (group) y = load<Floats>(out + i * width + j * 16) + y;")
        else:
            last = self._scales(product, whole=True) if product.branches else self._after(product, whole=True)
            lines += last
        self._each(lines, indent, tuple(before))

    def _scales(self, product: Product, *, whole: bool = False) -> list[str]:
        """Scales and zero points that come after the sums over all groups."""
        w, a, form = product.weight, self.activation, self.form
        lines = []
        if w.scale and not w.clusters and (whole or not w.group):
            lines.append(f"y = y * load<Floats>((const float *)b.{w.scale} + column + j * 16);")
        if whole and form.integer and a.group:
            lines.insert(0, f"y = y * b.{a.scale}[first + row + i];")
        if a.zero:
            zero = f"b.{a.zero}[first + row + i]" if a.granularity == "token" else f"b.{a.zero}[0]"
            lines.append(f"y = y - (float){zero} * load<Floats>((const float *)b.{w.sums} + column + j * 16);")
        if a.kind == "codes" and not a.group:
            lines.append(f"y = y * b.{a.scale}[{'first + row + i' if a.granularity == 'token' else '0'}];")
        return lines

    def _bias(self, product: Product) -> list[str]:
        if not product.bias:
            return []
        return [f"y = y + load<Floats>((const float *)b.{product.bias} + column + j * 16);"]

    def _after(self, product: Product, *, whole: bool = False) -> list[str]:
        """Everything that comes after the sums, where there are no branches."""
        return [*self._scales(product, whole=whole), *self._bias(product)]
