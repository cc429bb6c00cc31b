"""A row program as C++: its steps in loops over the columns of one row.

A step is put into the first loop over columns in which all that it reads is known: what a loop makes is a number of one
column there, and an array in the thread's scratch memory for the loops behind it. What is reduced over the row (sums,
extremes) is reduced in the loop that makes its source. Steps that read other columns stand between the loops, as calls.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from planish.codegen.kernel_spec import Kernel, Step, Tensor
from planish.ir.errors import PlanishError
from planish.kernels.table import ROWS

MOST_COLUMNS = 64  # of a tile
TOGETHER = 4096  # numbers of rows that are worked on together
_DECLARED = re.compile(r"(?:const )?float (\w+) = ")
ARRAYS = {"row::gelu({0})": "gelus", "row::gelu_tanh({0})": "gelus_tanh"}  # functions that are faster on many numbers
TYPES = {"i8": "int8_t", "u8": "uint8_t", "i32": "int32_t", "f32": "float", "bf16": "bf16_t", "f16": "f16_t"}


def number(value: object) -> str:
    """A float32 literal."""
    return f"{float(str(value))!r}f"


def type_of(tensor: Tensor, dtype: str) -> str:
    """The C++ type of a tensor's elements.

    Args:
        dtype: the kernel's float.
    """
    return TYPES[dtype if tensor.dtype == "float" else tensor.dtype]


@dataclass
class Loop:
    """A loop over the columns of a row.

    Attributes:
        width: how many columns.
        body: statements of one column.
        reductions: (operator, name) of the numbers that are reduced over the row, declared in front of the loop.
        before, after: statements around it.
        known: the names that the body has.
        kept: values that are stored to scratch memory, in the end of the body.
    """

    width: int
    body: list[str] = field(default_factory=list)
    reductions: list[tuple[str, str]] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    kept: list[str] = field(default_factory=list)

    def reduce(self, operator: str, name: str, statement: str, empty: str = "0.0f", kind: str = "float") -> None:
        """A number that is reduced over the row."""
        self.reductions.append((operator, name))
        self.before.append(f"{kind} {name} = {empty};")
        self.body.append(statement)


@dataclass
class Block:
    """Statements between loops."""

    lines: list[str]


class Writer:
    """Puts steps into loops.

    Attributes:
        items: loops and blocks in order.
        headers: that the text needs.
        scratch: floats of scratch memory, for a row.
        carried: names of extremes whose partial ones are given.
    """

    carried: Collection[str] = ()

    def __init__(
        self, kernel: Kernel, dtype: str, accumulators: Sequence[str], *, whole: bool, tile: bool = False
    ) -> None:
        """A program without steps.

        Args:
            whole: on all columns of a row.
            tile: on `count` columns from `first` on, accumulators given as these columns alone.
        """
        self.kernel, self.dtype, self.whole, self.tile = kernel, dtype, whole, tile
        self.tensors = {t.name: t for t in kernel.tensors if t.name not in accumulators}
        self.borders = {t.name: t for t in kernel.tensors}
        self.accumulators = tuple(accumulators)
        self.float_ = TYPES[dtype]
        self.items: list[Loop | Block] = []
        self.headers: dict[str, None] = {"base.h": None}
        self.scratch = 0
        self._made: dict[str, int] = {}  # what a loop makes -> its place
        self._ready: dict[str, int] = {}  # the first item that can read a value
        self._widths: dict[str, int] = {}
        self._arrays: dict[str, str] = {}  # values in scratch memory -> its declaration
        self._pointers: dict[str, str] = {}
        self._scalars: dict[str, str] = {}

    # -- what there is -------------------------------------------------------------------------------

    def size(self, name: str) -> int:
        """The columns of a value."""
        if name in self._widths:
            return self._widths[name]
        if name in self.accumulators:
            return self.kernel.outputs
        return int(self.tensors[name].shape[-1])

    def is_rows(self, name: str) -> bool:
        """True if each row has its own."""
        return name in self._widths or name in self.accumulators or "M" in self.tensors[name].shape

    def is_given(self, name: str) -> bool:
        """True for rows of the border that are there before the program."""
        return name in self.tensors and self.tensors[name].role == "input" and "M" in self.tensors[name].shape

    def is_output(self, name: str) -> bool:
        """True for what is stored to the border."""
        return name in self.borders and self.borders[name].role == "output"

    def ready(self, *names: str) -> int:
        """The first item in which all of them can be read."""
        return max((self._ready.get(name, 0) for name in names if name), default=0)

    # -- pointers ------------------------------------------------------------------------------------

    def row_of(self, name: str) -> str:
        """A pointer to a border tensor: its row, where it has rows."""
        tensor = self.borders[name]
        made = f"{name}_to" if tensor.role == "output" else f"{name}_row"
        if made not in self._pointers:
            const = "" if tensor.role == "output" else "const "
            width = int(tensor.shape[-1]) if tensor.shape[-1:] != ("M",) else 1
            offset = f" + row * {width}" if "M" in tensor.shape else ""
            offset += " + first" if self.tile else ""
            self._pointers[made] = f"{const}{type_of(tensor, self.dtype)} *{made} = b.{name}{offset};"
        return made

    def scalar(self, name: str) -> str:
        """The local of a border tensor of one number."""
        self._scalars[name] = f"const float {name} = row::wide(*b.{name});"
        return name

    def local(self, name: str, text: str) -> str:
        """A float that is known before all loops."""
        self._scalars[name] = f"const float {name} = {text};"
        return name

    def allocate(self, name: str, floats: int, kind: str = "float") -> str:
        """An array in scratch memory; `floats` of four bytes each."""
        if name not in self._arrays and self.tile:
            self._arrays[name] = f"alignas(64) {kind} {name}[{MOST_COLUMNS}];"
        if name not in self._arrays:
            cast = f"({kind} *)" if kind != "float" else ""
            place = f"scratch + {self.scratch}"
            self._arrays[name] = f"{kind} *{name} = {f'{cast}({place})' if cast else place};"
            self.scratch += -(-floats // 16) * 16
        return name

    def array(self, name: str) -> str:
        """A value as an array of float: it is kept in scratch memory if it lies nowhere as such."""
        if name in self.accumulators:
            return f"{name}_row"
        if name not in self._made:
            if name in self._widths:  # made by a block
                return f"{name}_row"
            if self.is_given(name) and type_of(self.tensors[name], self.dtype) == "float":
                return self.row_of(name)
            return self.array(self.step_text(f"{name}_wide", "{0}", [name]))
        if self.is_output(name) and self.dtype == "f32":
            return self.row_of(name)
        loop = self.items[self._made[name]]
        assert isinstance(loop, Loop)
        if name not in loop.kept:
            loop.kept.append(name)
        return self.allocate(f"{name}_row", loop.width)

    def array_ready(self, name: str) -> int:
        """The first item in which the array of a value can be read."""
        return self._made[name] + 1 if name in self._made else self.ready(name)

    # -- loops ---------------------------------------------------------------------------------------

    def place(self, width: int, after: int) -> tuple[int, Loop]:
        """The first loop over so many columns from an item on; a new one at the end if there is none."""
        for at in range(after, len(self.items)):
            item = self.items[at]
            if isinstance(item, Loop) and item.width == width:
                return at, item
        self.items.append(Loop(width))
        made = self.items[-1]
        assert isinstance(made, Loop)
        return len(self.items) - 1, made

    def block(self, lines: Iterable[str], *makes: str, width: int = 0) -> int:
        """Statements at the end of what there is; `makes`: values that they leave in arrays of their own."""
        self.items.append(Block(list(lines)))
        for name in makes:
            self._ready[name] = len(self.items)
            self._widths[name] = width
        return len(self.items) - 1

    def value(self, name: str, at: int) -> str:
        """The local of a value in a loop, loaded there if it is not made there."""
        loop = self.items[at]
        assert isinstance(loop, Loop)
        if self._made.get(name) == at or name in loop.known:
            return name
        if name in self._made or name in self.accumulators:
            text = f"{self.array(name)}[j]"
        elif name in self._widths:  # made by a block
            text = f"{name}_row[j]"
        elif not self.tensors[name].shape:
            return self.scalar(name)
        else:
            text = f"row::wide({self.row_of(name)}[j])"
        loop.known.add(name)
        loop.body.append(f"const float {name} = {text};")
        return name

    def define(self, name: str, text: str, at: int) -> str:
        """A value that a loop makes, stored if it is an output."""
        loop = self.items[at]
        assert isinstance(loop, Loop)
        loop.body.append(f"const float {name} = {text};")
        self._made[name], self._ready[name], self._widths[name] = at, at, loop.width
        if self.is_output(name):
            self.store(name, at)
        return name

    def store(self, name: str, at: int) -> None:
        """Store a value to the border tensor of its name."""
        loop = self.items[at]
        assert isinstance(loop, Loop)
        value = name if self.dtype == "f32" else f"row::narrow<{self.float_}>({name})"
        loop.body.append(f"{self.row_of(name)}[j] = {value};")

    def step_text(self, name: str, text: str, reads: Sequence[str], *, after: int = 0) -> str:
        """A value from others of its column; `text` with {0}, {1} .. for them."""
        width = max((self.size(read) for read in reads if self.is_rows(read)), default=0)
        at, _ = self.place(width, max(after, self.ready(*reads)))
        return self.define(name, text.format(*(self.value(read, at) for read in reads)), at)

    def rounded(self, name: str) -> str:
        """A value after it was stored in the kernel's float dtype."""
        if self.dtype == "f32":
            return name
        made = f"{name}_held"
        return made if made in self._made else self.step_text(made, self.rounding("{0}"), [name])

    def rounding(self, value: str) -> str:
        """The expression of a value that is rounded to the kernel's float dtype."""
        return f"row::wide(row::narrow<{self.float_}>({value}))"

    def expression(self, step: Step, renamed: Mapping[str, str]) -> None:
        """An elementwise step."""
        options = dict(step.options)
        row = ROWS[step.row].chosen(options)
        if not row.cpp:
            raise PlanishError(f"step '{step.row}': no C++ is written for it")
        reads = [renamed.get(name, name) for name in step.reads]
        if row.cpp in ARRAYS and (self.tile or self.whole):
            self._on_array(ARRAYS[row.cpp], step.writes[0], reads[0])
            return
        if "row::" in row.cpp:
            self.headers["functions.h"] = None
        literals = {k: v if isinstance(v, str | bool) else number(v) for k, v in options.items()}
        count = range(len(reads))
        self.step_text(step.writes[0], row.cpp.format(*(f"{{{i}}}" for i in count), **literals), reads)

    def _on_array(self, function: str, name: str, source: str) -> None:
        """A function of many numbers at once, which lie in an array and leave others in one."""
        self.headers["gelus.h"] = None
        array, width = self.array(source), self.size(source)
        made = self.allocate(f"{name}_row", width)
        self.block([f"row::{function}({array}, {'count' if self.tile else width}, {made});"], name, width=width)
        if self.is_output(name):
            at, _ = self.place(width, self.ready(name))
            self.value(name, at)
            self.store(name, at)

    # -- text ----------------------------------------------------------------------------------------

    def lines(self) -> list[str]:
        """The statements of the program."""
        found = [*self._pointers.values(), *self._arrays.values(), *self._scalars.values()]
        for item in self.items:
            found += item.lines if isinstance(item, Block) else self._loop(item)
        return found

    def group(self) -> int:
        """How many rows are worked on together: several short ones, which do not all wait for the sum of one."""
        widest = max((item.width for item in self.items if isinstance(item, Loop)), default=0)
        return next((rows for rows in (4, 2) if rows * widest <= TOGETHER), 1)

    def lines_together(self) -> list[str]:
        """The statements of the program on `rows` rows from `start` on, at most `group`: item by item on all of them.

        What an item leaves to later ones as a number is held for each row.
        """
        texts = [item.lines if isinstance(item, Block) else self._loop(item) for item in self.items]
        made = [[found[1] for line in text if (found := _DECLARED.match(line))] for text in texts]
        size = self.group()
        own = {f"{name}_row": f"const float *{name}_row = {name}_rows + r * WIDTH;" for name in self.accumulators}
        own |= self._pointers
        for name, line in self._arrays.items():
            own[name] = line.replace("scratch + ", f"scratch + r * {self.scratch} + ")
        own |= {f"{name}_lanes": f"const int32_t *{name}_lanes = {name}_all + r * lanes;" for name in self.carried}
        lines, later = [*self._scalars.values()], list[str]()
        for i, text in enumerate(texts):
            words = set(re.findall(r"\w+", " ".join(text)))
            after = {word for more in texts[i + 1 :] for line in more for word in re.findall(r"\w+", line)}
            body = [line for name, line in own.items() if name in words]
            body += [f"const float {name} = {name}_of[r];" for name in later if name in words and name not in made[i]]
            body += text
            kept = [name for name in made[i] if name in after]
            lines += [f"float {name}_of[{size}];" for name in kept]
            body += [f"{name}_of[r] = {name};" for name in kept]
            later += kept
            lines += ["for (int64_t r = 0; r < rows; ++r) {", "    const int64_t row = start + r;"]
            lines += [line if line.startswith("#") else f"    {line}" for line in body] + ["}"]
        return lines

    def _loop(self, loop: Loop) -> list[str]:
        clauses = ""
        for operator in dict.fromkeys(operator for operator, _ in loop.reductions):
            names = ", ".join(name for own, name in loop.reductions if own == operator)
            clauses += f" reduction({operator} : {names})"
        head = f"for (int j = 0; j < {loop.width}; ++j) {{"
        if self.tile:
            head = "for (int j = 0; j < count; ++j) {"
        elif not self.whole:
            head = "for (int64_t j = first; j < last; ++j) {"
        body = [*loop.body, *(f"{name}_row[j] = {name};" for name in loop.kept)]
        return [
            *loop.before, f"#pragma omp simd{clauses}", head, *(f"    {line}" for line in body), "}", *loop.after
        ]  # fmt: skip
