"""Statistics and results of a row program: what is reduced over whole rows, what is stored.

Rows that are held whole are written straight through, in the order of the steps. Longer ones are read in parts: a loop
for each statistic, one for the results. The low-rank down of many rows is such a loop in either case.
"""

from __future__ import annotations

from collections.abc import Sequence

from planish.codegen.kernel_spec import Step, half_of, padded
from planish.codegen.row_writer import CODES, STATISTICS, Rows, RowWriter, Tile, power

MOST_INNER = 512  # the largest block that is transformed within one step of a low-rank down


class RowSteps(RowWriter):
    """A row program: its statistics, its results."""

    # -- statistics ------------------------------------------------------------------------------

    def part_tile(self, rows: Rows, size: int) -> Tile:
        """The columns of one turn of a loop over `start`."""
        self.kept("offs_k", rows.tag, f"start + tl.arange(0, {rows.part})")
        self.kept("mask_k", rows.tag, f"offs_k{rows.tag} < {size}")
        return Tile(rows, rows.tag, f"offs_k{rows.tag}", rows.part, f"mask_k{rows.tag}", False)

    def prepare(self, name: str, rows: Rows) -> None:
        """Write the statistics that a value needs, before a loop over its columns."""
        for step in self.behind(name):
            if step.row in STATISTICS and name not in step.writes[1:]:
                self.statistic(step, rows)

    def _reduced(self, rows: Rows, source: str, sums: Sequence[tuple[str, str, str, str]]) -> None:
        """Reductions of a value over whole rows.

        Args:
            sums: of each: its name, its value for no columns, how it is taken of a tile {0}, how two ({0}, {1}) join.
        """
        size = self.size(source)
        if not rows.part:
            x = self.zeroed(source, self.tile(rows, size))
            for name, _, taken, _ in sums:
                self.kept(name, rows.tag, taken.format(x))
            return
        self.prepare(source, rows)
        for name, empty, _, _ in sums:
            self.kept(name, rows.tag, f"tl.full(({rows.height},), {empty}, tl.float32)")
        with self.loop(f"for start in range(0, {size}, {rows.part}):"):
            x = self.zeroed(source, self.part_tile(rows, size))
            for name, _, taken, joined in sums:
                self.line(f"{name}{rows.tag} = {joined.format(f'{name}{rows.tag}', taken.format(x))}")

    def statistic(self, step: Step, rows: Rows) -> str:
        name, source, tag = step.writes[0], step.reads[0], rows.tag
        size = self.size(source)
        if step.row == "quantize_token":
            return self._range(step, rows)
        if (f"{name}_factor", tag) in self.held:
            return self.held[f"{name}_factor", tag]
        self.call("rms_factor")
        squares = "tl.sum({0} * {0}, 1)"
        if step.row == "layer_norm":
            self._reduced(rows, source, [(f"{name}_sum", "0.0", "tl.sum({0}, 1)", "{0} + {1}")])
            mean = self.kept(f"{name}_mean", tag, f"{name}_sum{tag} * {1.0 / size!r}")
            self._centred(name, source, mean, rows, squares)
        else:
            self._reduced(rows, source, [(f"{name}_squares", "0.0", squares, "{0} + {1}")])
        text = f"rms_factor({name}_squares{tag}, {float(size)}, {float(step.option('eps'))!r})"
        return self.kept(f"{name}_factor", tag, text)

    def _centred(self, name: str, source: str, mean: str, rows: Rows, squares: str) -> None:
        """The sum of squares of a row less its mean."""
        size = self.size(source)

        def centred(tile: Tile) -> str:
            text = f"{self.value(source, tile)} - {mean}[:, None]"
            text = f"tl.where({tile.within}[None, :], {text}, 0.0)" if tile.within else text
            return self.kept(f"{name}_centred", tile.tag, text, clean=True)

        if not rows.part:
            self.kept(f"{name}_squares", rows.tag, squares.format(centred(self.tile(rows, size))))
            return
        total = self.kept(f"{name}_squares", rows.tag, f"tl.full(({rows.height},), 0.0, tl.float32)")
        with self.loop(f"for start in range(0, {size}, {rows.part}):"):
            self.line(f"{total} += {squares.format(centred(self.part_tile(rows, size)))}")

    def _range(self, step: Step, rows: Rows) -> str:
        """The scale of each row, and its zero point where it has one."""
        options, tag = dict(step.options), rows.tag
        _, scale, zero = (*step.writes, "")[:3]
        if (scale, tag) in self.held:
            return self.held[scale, tag]
        source, levels, low = step.reads[0], float(options["levels"]), float(options["low"])
        top = (f"{scale}_top", "0.0", "tl.max({0}, 1)", "tl.maximum({0}, {1})")
        bottom = (f"{scale}_bottom", "0.0", "tl.min({0}, 1)", "tl.minimum({0}, {1})")
        if options["mode"] == "symmetric":
            self._reduced(rows, source, [(f"{scale}_top", "0.0", "tl.max(tl.abs({0}), 1)", top[3])])
            self.call("token_scale")
            return self.kept(scale, tag, f"token_scale({scale}_top{tag}, {levels})")
        zero = zero or f"{scale}_zero"
        if options["mode"] == "floor":
            floor = float(options["floor"])
            self._reduced(rows, source, [top])
            self.call("floor_zero")
            text = f"floor_zero({scale}_top{tag}, {floor!r}, {levels}, {low})"
            made = self.kept(zero, tag, text)
            return self.kept(scale, tag, f"1.0 / ({made} + {-low}) * {floor!r}")
        self._reduced(rows, source, [bottom, top])
        self.call("token_scale", "token_zero")
        self.line(f"{scale}_bottom{tag} = tl.minimum({scale}_bottom{tag}, 0.0)")
        wide = f"tl.maximum({scale}_top{tag}, 0.0) - {scale}_bottom{tag}"
        made = self.kept(scale, tag, f"token_scale({wide}, {levels})")
        self.kept(zero, tag, f"token_zero({scale}_bottom{tag}, {made}, {levels}, {low})")
        return made

    # -- results ---------------------------------------------------------------------------------

    def is_output(self, name: str) -> bool:
        return name in self.tensors and self.tensors[name].role in ("output", "scratch")

    def _store(self, name: str, value: str, tile: Tile) -> None:
        at = f"{name}_ptr + {tile.rows.numbers}[:, None] * {self.size(name)} + {tile.columns}[None, :]"
        self.line(f"tl.store({at}, {value}.to({name}_ptr.dtype.element_ty), mask={self.mask(tile)})")

    def _store_row(self, name: str, value: str, rows: Rows, dtype: str) -> None:
        self.line(f"tl.store({name}_ptr + {rows.numbers}, {value}{dtype}, mask={rows.inside})")

    def _codes(self, step: Step, tile: Tile) -> None:
        """Write the codes of a step on a tile and store them, with the scales of groups."""
        options, name, rows = dict(step.options), step.writes[0], tile.rows
        low, high = float(options["low"]), float(options["high"])
        size = self.size(step.reads[0])
        x = self.zeroed(step.reads[0], tile)
        if step.row == "quantize_token":
            scale = self._range(step, rows)
            if options["mode"] == "symmetric":
                self.call("token_codes")
                text, clean = f"token_codes({x}, {scale}, {low}, {high})", True
            else:
                self.call("shifted_codes")
                zero = (*step.writes, "")[2] or f"{step.writes[1]}_zero"
                text, clean = f"shifted_codes({x}, {scale}, {zero}{rows.tag}, {low}, {high})", False
            codes = self.kept(name, tile.tag, text, clean)
        elif step.row == "quantize_group":
            codes = self._group_codes(step, x, tile)
        else:
            self.call("static_codes")
            scale = self.value(step.reads[1], tile)
            zero = (*step.reads, "")[2]
            text = f"static_codes({x}, {scale}, {self.value(zero, tile) if zero else '0.0'}, {low}, {high})"
            codes = self.kept(name, tile.tag, text, not zero)
        if tile.within and codes not in self.clean:
            codes = self.kept(f"{name}_only", tile.tag, f"tl.where({tile.within}[None, :], {codes}, 0)")
        self._store_codes(name, codes, size, int(options["bits"]), tile)

    def _group_codes(self, step: Step, x: str, tile: Tile) -> str:
        options, (name, scale, *_) = dict(step.options), step.writes
        size = self.size(step.reads[0])
        self.call("group_codes")
        group, count = int(options["group"]), -(-size // int(options["group"]))
        if tile.whole:
            group = min(group, int(tile.width))
        low, high, levels = float(options["low"]), float(options["high"]), float(options["levels"])
        codes, made = f"{name}{tile.tag}", f"{scale}{tile.tag}"
        arguments = f"{x}, {tile.rows.height}, {tile.width}, {group}, {levels}, {low}, {high}"
        self.line(f"{codes}, {made} = group_codes({arguments})")
        self.clean.add(codes)
        first = "start // " + str(group) + " + " if not tile.whole else ""
        groups = f"{first}tl.arange(0, {tile.width} // {group})"
        at = self.kept(f"{scale}_groups", tile.tag, groups)
        mask = f"{tile.rows.inside}[:, None] & ({at} < {count})[None, :]"
        self.line(
            f"tl.store({scale}_ptr + {tile.rows.numbers}[:, None] * {count} + {at}[None, :], {made}, mask={mask})"
        )
        return codes

    def _store_codes(self, name: str, codes: str, size: int, bits: int, tile: Tile) -> None:
        stored, rows, width = padded(size) * bits // 8, tile.rows, tile.width
        at = tile.columns
        if bits == 4:
            half = half_of(4)
            self.call("pack_halves")
            codes = self.kept(f"{name}_bytes", tile.tag, f"pack_halves({codes}, {rows.height}, {width}, {half})")
            first = "start // 2 + " if not tile.whole else ""
            at = self.kept(f"{name}_places", tile.tag, f"{first}tl.arange(0, {width} // 2)")
        whole = tile.whole and int(width) * bits // 8 == stored
        mask = f"{rows.inside}[:, None]" + ("" if whole else f" & ({at} < {stored})[None, :]")
        pointer = f"{name}_ptr + {rows.numbers}[:, None] * {stored} + {at}[None, :]"
        self.line(f"tl.store({pointer}, {codes}.to(tl.int8), mask={mask})")

    def _row_results(self, step: Step, rows: Rows) -> None:
        """Store the scale and zero point of each row."""
        _, scale, zero = (*step.writes, "")[:3]
        made = self._range(step, rows)
        if self.is_output(scale):
            self._store_row(scale, made, rows, "")
        if zero and self.is_output(zero):
            self._store_row(zero, f"{zero}{rows.tag}", rows, ".to(tl.int8)")

    # -- the low-rank down -----------------------------------------------------------------------

    def early_downs(self) -> list[Step]:
        """The low-rank downs that are computed some columns at a time, before the rest."""
        return [s for s in self.steps if s.row == "down" and self.in_parts(s.reads[0], MOST_INNER)]

    def inner_block(self) -> int:
        """What the columns of one turn of the early downs must be a multiple of."""
        steps = [t for s in self.early_downs() for t in self.behind(s.reads[0]) if t.row == "hadamard"]
        return max((int(t.option("block")) for t in steps), default=1)

    def block(self, downs: Sequence[Step], part: str) -> None:
        """Write the low-rank downs of the rows `first` to `first + BLOCK_M`, `part` columns at a time."""
        rows = Rows("_block", "offs_m_block", "mask_m_block", "BLOCK_M", part)
        self.line("offs_m_block = first + tl.arange(0, BLOCK_M)")
        self.line("mask_m_block = offs_m_block < M")
        for step in downs:
            self._down(step, rows)

    def _down(self, step: Step, rows: Rows) -> None:
        (source, weight), name = step.reads, step.writes[0]
        rank, size = int(step.option("rank")), self.size(source)
        self.prepare(source, rows)
        self.call("down_part")
        wide = max(16, power(rank))
        ranks = f"{name}_offs_r"
        self.line(f"{ranks} = tl.arange(0, {wide})")
        self.line(f"{name}_total = tl.zeros((BLOCK_M, {wide}), tl.float32)")
        with self.loop(f"for start in range(0, {size}, {rows.part}):"):
            tile = self.part_tile(rows, size)
            x = self.zeroed(source, tile)
            at = f"{weight}_ptr + {ranks}[None, :] * {size} + {tile.columns}[:, None]"
            mask = f"{tile.within}[:, None]" + (f" & ({ranks} < {rank})[None, :]" if wide > rank else "")
            self.line(f"{weight} = tl.load({at}, mask={mask}, other=0.0)")
            self.line(f"{name}_total = down_part({name}_total, {x}, {weight}, BLOCK_M)")
        mask = f"{rows.inside}[:, None]" + (f" & ({ranks} < {rank})[None, :]" if wide > rank else "")
        at = f"{name}_ptr + {rows.numbers}[:, None] * {rank} + {ranks}[None, :]"
        self.line(f"tl.store({at}, {name}_total.to({name}_ptr.dtype.element_ty), mask={mask})")

    def _late_down(self, step: Step, tile: Tile) -> None:
        """A low-rank down of rows that are held whole: a sum for each rank."""
        (source, weight), name = step.reads, step.writes[0]
        rank, size = int(step.option("rank")), self.size(source)
        x = self.zeroed(source, tile)
        masked = f", mask={tile.within}, other=0.0" if tile.within else ""
        with self.loop(f"for r in range({rank}):"):
            self.line(f"{weight} = tl.load({weight}_ptr + r * {size} + {tile.columns}{masked})")
            text = f"tl.sum({x}.to({weight}.dtype).to(tl.float32) * {weight}.to(tl.float32)[None, :], 1)"
            at = f"{name}_ptr + {tile.rows.numbers} * {rank} + r"
            self.line(f"tl.store({at}, {text}.to({name}_ptr.dtype.element_ty), mask={tile.rows.inside})")

    # -- the program -----------------------------------------------------------------------------

    def tiles(self) -> None:
        """Write the program for the rows `first` to `first + BLOCK_M`, ROWS of them at a time."""
        with self.loop("for start_row in range(first, tl.minimum(first + BLOCK_M, M), ROWS):"):
            self.line("offs_m = start_row + tl.arange(0, ROWS)")
            self.line("mask_m = offs_m < M")
            self.rows(Rows("", "offs_m", "mask_m", "ROWS"))

    def rows(self, rows: Rows) -> None:
        """Write the program for these rows; low-rank downs that come early are left out."""
        rest = [step for step in self.steps if step not in self.early_downs()]
        if not self.part:
            for step in rest:
                self._results(step, rows)
            return
        rows = Rows(rows.tag, rows.numbers, rows.inside, rows.height, str(self.part))
        wanted: dict[int, list[Step]] = {}
        for step in rest:
            outputs = [name for name in step.writes if name and self.is_output(name)]
            if outputs:
                self.prepare(outputs[0], rows)
                wanted.setdefault(self.size(step.reads[0]) if step.row in CODES else self.size(outputs[0]), []).append(
                    step
                )
            if step.row == "quantize_token":
                self._row_results(step, rows)
        for size, steps in wanted.items():
            with self.loop(f"for start in range(0, {padded(size)}, {rows.part}):"):
                tile = self.part_tile(rows, size)
                for step in steps:
                    self._on_tile(step, tile)

    def _results(self, step: Step, rows: Rows) -> None:
        """Write a step's results on whole rows."""
        if step.row in CODES:
            tile = self.tile(rows, self.size(step.reads[0]))
            if step.row == "quantize_token":
                self._row_results(step, rows)
            self._codes(step, tile)
        elif step.row == "down":
            self._late_down(step, self.tile(rows, self.size(step.reads[0])))
        else:
            self._on_tile(step, self.tile(rows, self.size(step.writes[0])))

    def _on_tile(self, step: Step, tile: Tile) -> None:
        if step.row in CODES:
            self._codes(step, tile)
        elif self.is_output(step.writes[0]):
            self._store(step.writes[0], self.value(step.writes[0], tile), tile)
