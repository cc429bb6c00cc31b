"""Values of a row program on tiles of its rows: loads, elementwise steps, norms, gathers, transforms.

A value is written where it is first wanted on a tile, with what it depends on before it. `RowSteps` says which are
wanted: the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from planish.codegen.kernel_spec import Step, Tensor, padded
from planish.kernels.table import ROWS

LARGEST = 16384  # columns of a row that is held in registers
PART = 4096  # columns at a time of a longer one
CODES = ("quantize_static", "quantize_token", "quantize_group")
STATISTICS = ("rms_norm", "layer_norm", "quantize_token")


def power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def far_first(steps: Sequence[Step]) -> bool:
    """The order of a Hadamard transform's sums: far pairs first where groups are quantised."""
    return any(step.row == "quantize_group" for step in steps)


def parts(steps: Sequence[Step], columns: int) -> int:
    """How many columns of a row are worked on at a time; 0: all of them.

    A gather needs registers for the addresses of its columns, a transform for two tiles: rows of half the length.
    """
    gathered = max((int(s.option("columns")) for s in steps if s.row in ("gather", "reassemble")), default=0)
    blocks = [int(s.option("block")) for s in steps if s.row == "hadamard"]
    heavy = gathered > PART or (blocks and columns > LARGEST // 2)
    if columns <= LARGEST and (not heavy or any(PART % block for block in blocks)):
        return 0
    return PART


@dataclass(frozen=True)
class Rows:
    """Rows that are worked on together: their numbers, which of them exist, how many they are, as names of the text.

    Attributes:
        tag: suffix of the names of what is computed for them.
        part: columns at a time, as text; "": all of them.
    """

    tag: str
    numbers: str
    inside: str
    height: str
    part: str = ""


@dataclass(frozen=True)
class Tile:
    """Columns of rows, as names and numbers of the text.

    Attributes:
        tag: suffix of the names of values on it.
        columns, width: the column numbers and how many they are.
        within: a name: which columns exist; "" if all do.
        whole: True if it holds whole rows.
    """

    rows: Rows
    tag: str
    columns: str
    width: str
    within: str
    whole: bool


@dataclass
class RowWriter:
    """Writes values of one row program.

    Attributes:
        tensors: the border of the kernel, by name.
        steps: the program.
        columns: of the rows that it reads.
        fresh: rows were written by other programs of this launch: they are read past the L1 cache.
        part: columns at a time; 0: whole rows are held.
        held: (value, tag of a tile) -> its name in the text, while that is in scope.
        clean: the names of tiles that are zero beyond the columns and rows that exist.
    """

    tensors: dict[str, Tensor]
    steps: Sequence[Step]
    columns: int
    fresh: bool = False
    part: int = 0
    lines: list[str] = field(default_factory=list)
    indent: int = 1
    functions: dict[str, None] = field(default_factory=dict)
    held: dict[tuple[str, str], str] = field(default_factory=dict)
    clean: set[str] = field(default_factory=set)
    by: dict[str, Step] = field(init=False)
    coded: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.by = {name: step for step in self.steps for name in step.writes if name}
        self.coded = {self.size(step.reads[0]) for step in self.steps if step.row in CODES}

    # -- text ------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    def call(self, *names: str) -> None:
        self.functions.update(dict.fromkeys(names))

    def kept(self, name: str, tag: str, text: str, clean: bool = False) -> str:
        """A new name for a value on a tile, assigned."""
        made = f"{name}{tag}"
        self.line(f"{made} = {text}")
        self.held[name, tag] = made
        if clean:
            self.clean.add(made)
        return made

    @contextmanager
    def loop(self, head: str) -> Iterator[None]:
        """Lines within a loop: what is written there is not known behind it."""
        self.line(head)
        held, self.held = self.held, dict(self.held)
        self.indent += 1
        yield
        self.indent -= 1
        self.held = held

    # -- what values are -------------------------------------------------------------------------

    def is_rows(self, name: str) -> bool:
        """True for a value [M, columns]."""
        return name in self.by or (len(self.tensors[name].shape) == 2 and self.tensors[name].shape[0] == "M")

    def size(self, name: str) -> int:
        """The columns of a local or of a border tensor of rows."""
        step = self.by.get(name)
        if step is None:
            return int(self.tensors[name].shape[-1])
        if step.row in ("gather", "reassemble"):
            return int(step.option("columns"))
        return max(self.size(read) for read in step.reads if read and self.is_rows(read))

    def behind(self, name: str) -> list[Step]:
        """The steps that a value depends on, its own included, in order."""
        wanted, found = {name}, []
        for step in reversed(self.steps):
            if wanted & set(step.writes):
                wanted |= {read for read in step.reads if read}
                found.append(step)
        return found[::-1]

    def in_parts(self, name: str, most: int) -> bool:
        """True if the value can be computed some columns at a time, a power of two from `most` on."""
        blocks = [dict(step.options) for step in self.behind(name) if step.row == "hadamard"]
        return all(int(own["block"]) <= most and own.get("base", 1) == 1 for own in blocks)

    # -- tiles -----------------------------------------------------------------------------------

    def tile(self, rows: Rows, size: int) -> Tile:
        """Whole rows of so many columns."""
        tag = rows.tag if size == self.columns else f"{rows.tag}_{size}"
        suffix = tag.removeprefix(rows.tag)
        columns, within, width = (
            f"offs_k{suffix}",
            f"mask_k{suffix}",
            power(padded(size) if size in self.coded else size),
        )
        if ("offs_k", suffix) not in self.held:
            self.kept("offs_k", suffix, f"tl.arange(0, {width})")
        if width > size and ("mask_k", suffix) not in self.held:
            self.kept("mask_k", suffix, f"{columns} < {size}")
        return Tile(rows, tag, columns, str(width), within if width > size else "", True)

    def mask(self, tile: Tile) -> str:
        """The condition that an element of a tile exists."""
        if not tile.within:
            return f"{tile.rows.inside}[:, None]"
        held = self.held.get(("mask", tile.tag))
        return held or self.kept("mask", tile.tag, f"{tile.rows.inside}[:, None] & {tile.within}[None, :]")

    # -- values ----------------------------------------------------------------------------------

    def value(self, name: str, tile: Tile) -> str:
        """The name, in the text, of a value on a tile; written if it is not there yet."""
        step = self.by.get(name)
        if step is None:
            return self._loaded(name, tile)
        if (name, tile.tag) in self.held:
            return self.held[name, tile.tag]
        row = ROWS[step.row]
        if row.text:
            return self._expression(name, step, tile)
        return {
            "rms_norm": self._norm,
            "layer_norm": self._norm,
            "hadamard": self._hadamard,
            "gather": self._gather,
            "reassemble": self._reassemble,
        }[step.row](name, step, tile)

    def zeroed(self, name: str, tile: Tile) -> str:
        """The value with zeros beyond the columns that exist."""
        made = self.value(name, tile)
        if not tile.within or made in self.clean:
            return made
        if (f"{name}_only", tile.tag) in self.held:
            return self.held[f"{name}_only", tile.tag]
        return self.kept(f"{name}_only", tile.tag, f"tl.where({tile.within}[None, :], {made}, 0.0)", clean=True)

    def _loaded(self, name: str, tile: Tile) -> str:
        tensor = self.tensors[name]
        if not tensor.shape:
            scalar = self.held.get((name, ""))
            return scalar or self.kept(name, "", f"tl.load({name}_ptr).to(tl.float32)")
        rows = self.is_rows(name)
        if (name, tile.tag) in self.held:
            return self.held[name, tile.tag]
        if rows:
            fresh = ', cache_modifier=".cg"' if self.fresh and tensor.role != "weight" else ""
            at = f"{name}_ptr + {tile.rows.numbers}[:, None] * {self.size(name)} + {tile.columns}[None, :]"
            return self.kept(
                name, tile.tag, f"tl.load({at}, mask={self.mask(tile)}, other=0.0{fresh}).to(tl.float32)", clean=True
            )
        masked = f", mask={tile.within}, other=0.0" if tile.within else ""
        return self.kept(
            name, tile.tag, f"tl.load({name}_ptr + {tile.columns}{masked}).to(tl.float32)[None, :]", clean=True
        )

    def _expression(self, name: str, step: Step, tile: Tile) -> str:
        operands = [self.value(read, tile) for read in step.reads]
        row, options = ROWS[step.row].chosen(dict(step.options)), dict(step.options)
        self.call(*row.device)
        zeros = [operand in self.clean for operand in operands]
        clean = (
            any(zeros)
            if step.row == "mul"
            else all(zeros) and (row.keeps_zero or step.row in ("add", "sub", "max", "min"))
        )
        return self.kept(name, tile.tag, ROWS[step.row].expression(operands, options), clean)

    def _norm(self, name: str, step: Step, tile: Tile) -> str:
        factor = self.statistic(step, tile.rows)
        x = self.value(step.reads[0], tile)
        clean = x in self.clean
        if step.row == "layer_norm":
            centred = self.held.get((f"{name}_centred", tile.tag))
            mean = self.held[f"{name}_mean", tile.rows.tag]
            x, clean = centred or f"({x} - {mean}[:, None])", centred is not None
        text = f"{x} * {factor}[:, None]"
        gain, bias = (*step.reads[1:], "", "")[:2]
        if gain:
            vector = self.value(gain, tile)
            text, clean = f"{text} * {vector}", clean or vector in self.clean
        if bias:
            vector = self.value(bias, tile)
            text, clean = f"{text} + {vector}", clean and vector in self.clean
        return self.kept(name, tile.tag, text, clean)

    def _gather(self, name: str, step: Step, tile: Tile) -> str:
        text = self._taken(step, tile, "", f"{name}_index")
        if tile.within:
            text = f"tl.where({tile.within}[None, :], {text}, 0.0)"
        return self.kept(name, tile.tag, text, clean=True)

    def _taken(self, step: Step, tile: Tile, offset: str, index: str) -> str:
        """The source's columns that an index names, on a tile of the result: computed again from what is loaded."""
        masked = f", mask={tile.within}, other=0" if tile.within else ""
        at = self.kept(index, tile.tag, f"tl.load({step.reads[1]}_ptr + {offset}{tile.columns}{masked})")
        return self.value(step.reads[0], Tile(tile.rows, f"{tile.tag}_{index}", at, tile.width, "", False))

    def _reassemble(self, name: str, step: Step, tile: Tile) -> str:
        columns, total = int(step.option("columns")), ""
        masked = f", mask={tile.within}, other=0.0" if tile.within else ""
        for t in range(int(step.option("terms"))):
            offset = f"{t * columns} + " if t else ""
            part = self._taken(step, tile, offset, f"{name}_index{t}")
            weight = f"tl.load({step.reads[2]}_ptr + {offset}{tile.columns}{masked})[None, :]"
            total = self.kept(
                f"{name}_sum{t}", tile.tag, f"{total} + {part} * {weight}" if total else f"{part} * {weight}"
            )
        self.held[name, tile.tag] = total
        if tile.within:
            self.clean.add(total)
        return total

    def _hadamard(self, name: str, step: Step, tile: Tile) -> str:
        options = dict(step.options)
        block, base = int(options["block"]), int(options.get("base", 1))
        signs, matrix = (*step.reads[1:], "", "")[:2]
        inner, height = block // base, tile.rows.height
        x = self.zeroed(step.reads[0], tile)
        if signs and not options["transpose"]:
            x = self.kept(f"{name}_signed", tile.tag, f"{x} * {self.value(signs, tile)}", clean=True)
        if inner > 1:
            self.call("walsh")
            x = self.kept(
                f"{name}_walsh",
                tile.tag,
                f"walsh({x}, {height}, {tile.width}, {inner.bit_length() - 1}, {far_first(self.steps)})",
            )
        if base > 1:
            self.call("walsh_dense")
            text = f"walsh_dense({x}, {matrix}_ptr, {height}, {tile.width}, {base}, {power(base)}, {inner})"
            x = self.kept(f"{name}_dense", tile.tag, text)
        text = f"{x} * {1.0 / block**0.5!r}"
        if signs and options["transpose"]:
            text += f" * {self.value(signs, tile)}"
        return self.kept(name, tile.tag, text, clean=True)

    # -- what the steps add ----------------------------------------------------------------------

    def statistic(self, step: Step, rows: Rows) -> str:
        """The name of the factor of a norm; written if it is not there yet."""
        raise NotImplementedError
