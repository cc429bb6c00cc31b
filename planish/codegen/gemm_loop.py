"""The text of a gemm's main loop: loads, decoders, multiplications, scales of groups.

The weight is the left operand and the sums are [BLOCK_N, BLOCK_M]: each warp decodes rows of the weight of its own
(as right operand they are decoded by every warp anew), and tensor cores that read one operand from registers read the
left one (wgmma). Rows and columns beyond the matrices repeat the last, so that the loop has no masks for them.
"""

from __future__ import annotations

from collections.abc import Mapping

from planish.codegen.containers.triton import id_bits
from planish.codegen.gemm_plan import FLOATS, Cut, Run, bits_of, cut_of, decoder_of, factor_of
from planish.codegen.kernel_spec import SPAN, Activation, Kernel, Product, Weight, padded
from planish.kernels.decoders import functions_of


class Lines:
    """Lines of text with an indent, and the device functions that they call."""

    def __init__(self, indent: int = 1) -> None:
        self.lines: list[str] = []
        self.functions: dict[str, None] = {}
        self.indent = indent

    def line(self, text: str) -> None:
        self.lines.append("    " * self.indent + text if text else "")

    def call(self, name: str) -> str:
        """The name of a device function, noted."""
        self.functions[name] = None
        return name


class Loop:
    """The main loop of a kernel.

    Attributes:
        cut: see `gemm_plan.Cut`.
        out: where the text goes.
    """

    def __init__(self, kernel: Kernel, dtype: str, out: Lines) -> None:
        assert kernel.activation is not None
        self.kernel, self.dtype, self.out = kernel, dtype, out
        self.activation: Activation = kernel.activation
        self.cut: Cut = cut_of(kernel, dtype)
        self.float = FLOATS[dtype]
        self.columns, self.stored = kernel.columns, padded(kernel.columns)
        self.ragged = self.columns != self.stored
        self._tiles: dict[tuple[str, int], str] = {}
        self._places: dict[str, str] = {}
        self._known_group = ""
        self._left: dict[int, str] = {}

    # -- places ------------------------------------------------------------------------------------

    def sums(self, product: Product) -> str:
        """The accumulators of a product."""
        return f"{product.weight.codes}_sum"

    def _place(self, bits: int, plane: int) -> str:
        """Where the operand of a plane lies in a row of a tile that has `bits` a code: the name of a local."""
        cut = self.cut
        planes = 8 // bits if bits < 8 else 1
        if planes == cut.planes:
            return "k"
        half = SPAN // planes
        start = plane * cut.half % half
        text = f"k // {cut.half} * {half} + k % {min(cut.half, half)}" + (f" + {start}" if start else "")
        if text not in self._places:
            self._places[text] = f"k{len(self._places) + 1}"
            self.out.line(f"{self._places[text]} = {text}")
        return self._places[text]

    def setup(self) -> None:
        """Pointers and accumulators before the loop."""
        out, cut, a = self.out, self.cut, self.activation
        share = f" // {cut.planes}" if cut.planes > 1 else ""
        out.line(f"k = tl.arange(0, BLOCK_K{share})" + "  # the columns of a plane" * bool(share))
        widths = {w for p in self.kernel.products for w in (bits_of(self.kernel, p.weight), id_bits(p.weight.clusters))}
        for bits in sorted({min(a.bits, 8), *(min(w, 8) for w in widths)}, reverse=True):
            if bits > 1 or any(p.weight.ids for p in self.kernel.products):
                for plane in range(cut.planes):
                    self._place(bits, plane)
        row = self.columns if a.kind == "float" else self.stored * a.bits // 8
        out.line(f"{a.codes}_at = {a.codes}_ptr + first.to(tl.int64) * {row} + m[:, None] * {row}")
        out.line(f"{a.codes}_at += {_begin(a.bits)}")
        for product in self.kernel.products:
            w = product.weight
            bits = bits_of(self.kernel, w)
            row = self.columns if bits == 16 else self.stored * bits // 8
            out.line(f"{w.codes}_at = {w.codes}_ptr + across.to(tl.int64) * {row} + n[:, None] * {row}")
            out.line(f"{w.codes}_at += {_begin(bits)}")
            if w.ids:
                row = self.stored * id_bits(w.clusters) // 8
                out.line(f"{w.ids}_at = {w.ids}_ptr + across.to(tl.int64) * {row} + n[:, None] * {row}")
                out.line(f"{w.ids}_at += {_begin(id_bits(w.clusters))}")
            if not w.group:
                self._constants(product)
            out.line(f"{self.sums(product)} = tl.zeros((BLOCK_N, BLOCK_M), {cut.sums})")

    def _constants(self, product: Product) -> None:
        """Zero points and clusters' scales of rows without groups, loaded once."""
        w = product.weight
        if w.clusters:
            self._clusters(w, "across + n", 1)
        elif w.zero:
            self._zero(w, f"{w.zero}_ptr + across + n")

    # -- the loop ----------------------------------------------------------------------------------

    def loop(self) -> None:
        """The loop over the steps `begin` to `end` - 1."""
        out, cut, a = self.out, self.cut, self.activation
        out.line("for step in range(begin, end):")
        out.indent += 1
        for product in self.kernel.products:
            self._load_weight(product.weight)
        self._left = {}
        if not cut.late:
            self._load(a.codes, a.bits, f"{a.codes}_", a.kind == "float")
            for plane in range(cut.planes):
                self._load_left(plane)
        for run in cut.runs:
            if a.group:
                count = self._group(run, a.group)
                out.line(f"{a.scale} = tl.load({a.scale}_ptr + (first.to(tl.int64) * {count} + m * {count} + group))")
            for product in self.kernel.products:
                self._run(product, run)
        out.line(f"{a.codes}_at += BLOCK_K{_share(a.bits)}")
        for product in self.kernel.products:
            w = product.weight
            out.line(f"{w.codes}_at += BLOCK_K{_share(bits_of(self.kernel, w))}")
            if w.ids:
                out.line(f"{w.ids}_at += BLOCK_K{_share(id_bits(w.clusters))}")
        out.indent -= 1

    def _group(self, run: Run, size: int) -> int:
        """Write the group of a run; the groups there are. Columns of the padding have none and take the last."""
        count = -(-self.columns // size)
        text = f"(step * BLOCK_K + {run.offset}) // {size}" if run.offset else f"step * BLOCK_K // {size}"
        line = f"group = tl.minimum({text}, {count - 1})" if count * size < self.stored else f"group = {text}"
        if line != self._known_group:
            self.out.line(line)
        self._known_group = line
        return count

    def _mask(self, plane: int) -> str:
        if not self.ragged:
            return ""
        return f", mask=({self._place(8, plane)} < {self.columns} - step * BLOCK_K)[None, :], other=0.0"

    def _load(self, name: str, bits: int, prefix: str, floats: bool) -> None:
        """The tiles of an operand: each place that planes share is loaded once."""
        for plane in range(self.cut.planes):
            self._load_plane(name, bits, prefix, floats, plane)

    def _load_plane(self, name: str, bits: int, prefix: str, floats: bool, plane: int) -> None:
        """The tile of a plane: that of an earlier one in the same place, or loaded."""
        places = [self._place(bits if bits < 8 else 8, p) for p in range(plane + 1)]
        first = places.index(places[plane])
        self._tiles[name, plane] = f"{prefix}{first}"
        if first == plane:
            mask = self._mask(plane) if floats else ""
            self.out.line(f"{prefix}{plane} = tl.load({name}_at + {places[plane]}[None, :]{mask})")

    def _load_weight(self, w: Weight) -> None:
        bits = bits_of(self.kernel, w)
        self._load(w.codes, bits, f"{w.codes}_", bits == 16)
        if w.ids:
            self._load(w.ids, id_bits(w.clusters), f"{w.ids}_", False)

    def _load_left(self, plane: int) -> str:
        """The name of the activation's operand of a plane, loaded and decoded where it is asked for first."""
        if plane not in self._left:
            a = self.activation
            if self.cut.late:
                self._load_plane(a.codes, a.bits, f"{a.codes}_", a.kind == "float", plane)
            tile = self._tiles[a.codes, plane]
            decoded = self._decoded_left(plane, tile)
            if decoded != tile:
                self.out.line(f"left{plane} = {decoded}")
            self._left[plane] = tile if decoded == tile else f"left{plane}"
        return self._left[plane]

    def _decoded_left(self, plane: int, tile: str) -> str:
        """The activation's operand of a plane [BLOCK_M, columns]."""
        a, cut, out = self.activation, self.cut, self.out
        if a.kind == "float":
            return tile
        text = tile
        if a.bits < 8:
            place = plane * cut.half // (SPAN * a.bits // 8)
            function = "signed_plane" if a.signed else "unsigned_plane"
            text = f"{out.call(function)}({tile}, {a.bits}, {place})"
            if a.signed and not cut.integer:
                text = f"({text} >> {8 - a.bits})"
        return text if cut.integer else f"{text}.to({self.float})"

    def _run(self, product: Product, run: Run) -> None:
        """Multiply the planes of a run and add what they give."""
        out, cut, w = self.out, self.cut, product.weight
        sums, factor = self.sums(product), factor_of(self.kernel, cut, w)
        if w.group:
            count = self._group(run, w.group)
            at = f"group * {self.kernel.outputs} + across + n"
            if w.clusters:
                self._clusters(w, at, count)
            else:
                out.line(f"{w.scale} = tl.load({w.scale}_ptr + {at}).to(tl.float32)")
                if w.zero:
                    self._zero(w, f"{w.zero}_ptr + {at}")
        target = "part" if cut.in_loop else sums
        precision = ', input_precision="ieee"' if self.dtype == "f32" and not cut.integer else ""
        for plane in range(run.first, run.last):
            right = self._decoded(w, plane)
            start = "" if cut.in_loop and plane == run.first else f", {target}"
            kind = ", out_dtype=tl.int32" if cut.integer else ""
            if right != self._tiles[w.codes, plane]:
                out.line(f"w = {right}")
                right = "w"
            left = self._load_left(plane)
            out.line(f"{target} = tl.dot({right}, tl.trans({left}){start}{kind}{precision})")
        if not cut.in_loop:
            return
        part = "part.to(tl.float32)" if cut.integer else "part"
        factors = []
        if w.group and not cut.on_weight:
            name = f"{w.scale}_top" if w.clusters else w.scale
            factors.append(f"({name} * {factor**-1!r})[:, None]" if factor != 1.0 else f"{name}[:, None]")
        if self.activation.group:
            own = "" if factors or factor == 1.0 else f" * {factor**-1!r}"
            name = self.activation.scale
            factors.append(f"({name}{own})[None, :]" if own else f"{name}[None, :]")
        both = " * ".join(factors)
        out.line(f"{sums} += {part} * {f'({both})' if len(factors) > 1 else both}")

    # -- decoders ----------------------------------------------------------------------------------

    def _zero(self, w: Weight, at: str) -> None:
        kind = self.float if self.kernel.tensor(w.zero).dtype == "i8" else "tl.float32"
        kind = "" if self.cut.integer else f".to({kind})"
        self.out.line(f"{w.zero} = tl.load({at}){kind}[:, None]")

    def _clusters(self, w: Weight, at: str, groups: int) -> None:
        """Scales and zero points of clusters, `groups` rows of them each, in the kernel's float."""
        out, own = self.out, self.cut.on_weight
        for k in range(w.clusters):
            place = f"{k * groups * self.kernel.outputs} + {at}" if k else at
            out.line(f"{w.scale}_{k} = tl.load({w.scale}_ptr + {place})" + ("[:, None]" if own else ".to(tl.float32)"))
            if w.zero:
                out.line(f"{w.zero}_{k} = tl.load({w.zero}_ptr + {place}).to({self.float})[:, None]")
        if own:
            return
        out.line(f"{w.scale}_top = {out.call('largest')}({w.scale}_0, {w.scale}_1)")
        for k in range(2, w.clusters):
            out.line(f"{w.scale}_top = {out.call('largest')}({w.scale}_top, {w.scale}_{k})")
        for k in range(w.clusters):
            out.line(f"{w.scale}_{k} = ({w.scale}_{k} / {w.scale}_top).to({self.float})[:, None]")

    def _decoded(self, w: Weight, plane: int) -> str:
        """The weight's operand of a plane [BLOCK_N, columns]."""
        cut, decoder = self.cut, decoder_of(self.kernel, w)
        place = plane * cut.half // (SPAN * decoder.bits // 8) if decoder.bits < 8 else 0
        values = {"codes": self._tiles[w.codes, plane], "plane": place, "zero": w.zero, "dtype": self.float}
        zero = bool(w.zero) and not w.clusters
        if cut.integer:
            return self._written(decoder.less_zero if zero else decoder.integer, values)
        floats = bool(w.zero) and self.kernel.tensor(w.zero).dtype != "i8"
        if floats:
            values["zero"] = f"-{decoder.middle}.0"  # float zero points are those of unsigned codes
        elif not zero:
            values["zero"] = "0.0"
        text = self._written(decoder.half if self.dtype == "f16" else decoder.wide, values)
        if w.clusters:
            return self._split(w, plane, text)
        if floats:
            text = f"({text}.to(tl.float32) - {w.zero}).to({self.float})"
        return f"{text} * {w.scale}.to({self.float})[:, None]" if cut.on_weight else text

    def _written(self, expression: str, values: Mapping[str, object]) -> str:
        """An expression of a decoder on these values; its functions are noted."""
        for name in functions_of(expression):
            self.out.call(name)
        return expression.format(**values)

    def _split(self, w: Weight, plane: int, codes: str) -> str:
        """The decoded weight of clusters: an id chooses scale and zero point."""
        out, cut, bits = self.out, self.cut, id_bits(w.clusters)
        half = SPAN * bits // 8
        start = bits * (plane * cut.half // half)
        shift = f"{start}"
        if half < cut.half:
            times = f" * {bits}" if bits > 1 else ""
            shift = f"({f'{start} + ' if start else ''}k % {cut.half} // {half}{times})[None, :]"
        out.line(f"{w.ids} = ({self._tiles[w.ids, plane]}.to(tl.int32) >> {shift}) & {(1 << bits) - 1}")
        function = out.call(f"choose{w.clusters}")

        def chosen(name: str) -> str:
            return f"{function}({w.ids}, {', '.join(f'{name}_{k}' for k in range(w.clusters))})"

        if w.zero:
            out.line(f"w = {codes} - {chosen(w.zero)}")
        return f"{'w' if w.zero else codes} * {chosen(w.scale)}"


def _share(bits: int) -> str:
    """The elements of BLOCK_K codes: "" for a code an element, else a division."""
    return f" // {8 // bits}" if bits < 8 else ""


def _begin(bits: int) -> str:
    return f"begin * (BLOCK_K{_share(bits)})" if bits < 8 else "begin * BLOCK_K"
