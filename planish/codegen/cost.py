"""Bytes and operations of a kernel, counted from its spec: modelled, not timed on a GPU.

**Least possible bytes.** Every input and weight read from DRAM once, every output written once, no padding: what a
kernel that computes this, in this format, must move however it is written.

**Bytes moved.** What the kernel's own order of tiles brings in from DRAM. Tiles run in waves, as many as the chip holds
at once, in the order of the launch grid: groups of GROUP_M row blocks, along which the columns are swept. The blocks of
a wave walk K in step, so a panel (a block of rows of the activation, or of the weight's, over all K, or a SPLIT_K-th of
it) that several of them read comes from DRAM once. Between waves a panel stays while the panels used since then fit
into the last cache, nine tenths of it (the rest: outputs), and half of that where each half of the chip keeps a copy;
a wave that needs more leaves nothing behind. Panels are cut at the last row; the padding of rows of codes (to `SPAN`)
is read with them.

**Bytes through the cache.** Partial sums of SPLIT_K and rows that `closing` steps read again are written and read by
one launch. Where nothing that it streams in between can push them out, they are not counted as moved, but given apart:
partial sums where all blocks of the launch run at once, rows where everything fits into the cache.

**Operations.** 2 for a multiplication and its sum. Those of the tensor cores are counted as issued, padded tiles
included (16 rows where there is one); those of steps by the table of rows.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from planish.codegen.chips import Chip
from planish.codegen.kernel_spec import SPAN, Kernel, Step, Tensor, padded
from planish.ir.types import bits
from planish.kernels.table import ROWS

CACHE_PART = 0.9  # of the last cache, for what a launch uses again


@dataclass(frozen=True)
class Cost:
    """What a launch costs.

    Attributes:
        least: bytes that must be moved.
        moved: bytes moved between DRAM and the chip.
        cached: bytes written and read again within the launch that stay in the cache.
        operations: by kind: "int8", "f16", "bf16" of the tensor cores; "f32" of the others.
        useful: the same without the padding of tiles.
    """

    rows: int
    least: int
    moved: int
    cached: int = 0
    operations: Mapping[str, float] = field(default_factory=dict)
    useful: Mapping[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Bytes moved for each byte that must be."""
        return self.moved / self.least if self.least else 1.0

    def seconds(self, chip: Chip) -> float:
        """Roofline time: modelled, not timed. The slowest of DRAM, each kind of tensor core, the float units."""
        return max([self.moved / chip.bandwidth, *(n / chip.peak[kind] for kind, n in self.operations.items())])

    def bound(self, chip: Chip) -> str:
        """What sets the roofline time: "bytes" or a kind of operation."""
        times = {"bytes": self.moved / chip.bandwidth}
        times |= {kind: n / chip.peak[kind] for kind, n in self.operations.items()}
        return max(times, key=lambda kind: times[kind])


def dtype_of(tensor: Tensor, dtype: str) -> str:
    """The dtype of a border tensor in memory; `dtype` is the kernel's float."""
    return dtype if tensor.dtype == "float" else tensor.dtype


def size(tensor: Tensor, rows: int, dtype: str) -> int:
    """Bytes of a border tensor as it is stored."""
    return math.prod(rows if d == "M" else int(d) for d in tensor.shape) * bits(dtype_of(tensor, dtype)) // 8


def least_size(tensor: Tensor, rows: int, dtype: str, columns: int) -> int:
    """Bytes of a border tensor without the padding of its last axis; `columns`: the codes of a row."""
    stored = size(tensor, rows, dtype)
    last = tensor.shape[-1] if tensor.shape else 1
    if last in (padded(columns) // tensor.packed, padded(columns)) and padded(columns) != columns:
        return stored * columns // padded(columns)
    return stored


def least(kernel: Kernel, rows: int, dtype: str = "f16") -> int:
    """The least possible bytes of one launch on so many rows."""
    border = [t for t in kernel.tensors if t.role != "scratch"]
    return sum(least_size(t, rows, dtype, kernel.columns if _reads_rows(kernel, t) else _width(t)) for t in border)


def useful(kernel: Kernel, rows: int, dtype: str = "f16") -> dict[str, float]:
    """Operations of one launch by kind, without the padding of tiles."""
    if kernel.kind == "prologue":
        return _steps(kernel.steps, rows, 1, kernel.columns, dtype)[0]
    return _products(kernel, rows, {"BLOCK_M": 1, "BLOCK_N": 1}, dtype)[0]


def cost(
    kernel: Kernel, rows: int, launch: Mapping[str, int], chip: Chip, resident: int = 1, dtype: str = "f16"
) -> Cost:
    """What one launch costs on a chip.

    Args:
        rows: M, the rows of the activation.
        launch: its launch parameters; of a gemm BLOCK_M, BLOCK_N, and if there are SPLIT_K and GROUP_M.
        resident: blocks that a multiprocessor holds at once.
        dtype: the kernel's float.
    """
    fewest = least(kernel, rows, dtype)
    if kernel.kind == "prologue":
        moved = sum(size(t, rows, dtype) for t in kernel.tensors if t.role != "scratch")
        needed, operations = _steps(kernel.steps, rows, launch.get("BLOCK_M", 1), kernel.columns, dtype)
        return Cost(rows, fewest, moved, 0, operations, needed)
    needed, operations = _products(kernel, rows, launch, dtype)
    moved = _gemm_bytes(kernel, rows, launch, chip, resident, dtype)
    blocks = -(-rows // launch["BLOCK_M"]) * -(-kernel.outputs // launch["BLOCK_N"]) * launch.get("SPLIT_K", 1)
    once = blocks <= chip.units * max(1, resident)
    cached = 0
    for amount, stays in (
        (_partial(kernel, rows, launch), once or moved <= room(chip)),
        (_rows_again(kernel, rows, dtype), moved <= room(chip)),
    ):
        kept = stays and amount / 2 <= room(chip)  # written and read: half of it lies there
        cached, moved = (cached + amount, moved) if kept else (cached, moved + amount)
    return Cost(rows, fewest, moved, cached, operations, needed)


def room(chip: Chip) -> float:
    """Bytes of the last cache that can hold what a launch uses again."""
    return CACHE_PART * chip.cache / chip.copies


def total(costs: Iterable[Cost]) -> Cost:
    """The costs of launches one after the other."""
    found = list(costs)
    kinds = sorted({kind for c in found for kind in (*c.operations, *c.useful)})
    return Cost(
        max((c.rows for c in found), default=0), sum(c.least for c in found), sum(c.moved for c in found),
        sum(c.cached for c in found), {k: sum(c.operations.get(k, 0.0) for c in found) for k in kinds},
        {k: sum(c.useful.get(k, 0.0) for c in found) for k in kinds},
    )  # fmt: skip


# -- bytes ---------------------------------------------------------------------------------------


def _width(tensor: Tensor) -> int:
    """Codes in a row of a tensor that is not padded, or whose padding is not known here."""
    last = tensor.shape[-1] if tensor.shape else 1
    return last * tensor.packed if isinstance(last, int) else SPAN


def _reads_rows(kernel: Kernel, tensor: Tensor) -> bool:
    """Whether the rows of a tensor are rows of `kernel.columns` codes: activation, weights, codes of a prologue."""
    if kernel.kind == "prologue":
        return True
    a = kernel.activation
    names = {a.codes} if a is not None else set()
    return tensor.name in names | {n for p in kernel.products for n in (p.weight.codes, p.weight.ids)}


def _gemm_bytes(
    kernel: Kernel, rows: int, launch: Mapping[str, int], chip: Chip, resident: int, dtype: str
) -> int:  # fmt: skip
    """Bytes between DRAM and the chip for one launch of a gemm, by the model above."""
    a = kernel.activation
    left = {a.codes, a.scale, a.zero} if a is not None else set()
    left |= {b.left for p in kernel.products for b in p.branches}
    right = {n for p in kernel.products for n in vars(p.weight).values() if isinstance(n, str)}
    right |= {p.bias for p in kernel.products} | {b.right for p in kernel.products for b in p.branches}
    by_name = {t.name: size(t, rows, dtype) for t in kernel.tensors if t.role != "scratch"}
    once = sum(n for name, n in by_name.items() if name not in left | right)
    left_bytes = sum(n for name, n in by_name.items() if name in left)
    right_bytes = sum(n for name, n in by_name.items() if name in right)
    block_m, block_n = launch["BLOCK_M"], launch["BLOCK_N"]
    split = launch.get("SPLIT_K", 1)
    if left_bytes + right_bytes <= room(chip):
        return once + left_bytes + right_bytes
    tiles = tile_order(-(-rows // block_m), -(-kernel.outputs // block_n), launch.get("GROUP_M", 1), split)
    wave = chip.units * max(1, resident)

    def panel(kind: str, index: int) -> float:
        block, count, whole = (block_m, rows, left_bytes) if kind == "left" else (block_n, kernel.outputs, right_bytes)
        return whole * min(block, count - index * block) / count / split

    return round(once + _panels(tiles, wave, panel_size=panel, room=room(chip)))


def tile_order(row_blocks: int, column_blocks: int, group: int, split: int = 1) -> Iterator[tuple[int, int, int]]:
    """(row block, column block, part of K) of each block of a launch, in the order in which they start."""
    for part in range(split):
        for first in range(0, row_blocks, group):
            height = min(group, row_blocks - first)
            for tile in range(height * column_blocks):
                yield first + tile % height, tile // height, part


def _panels(
    tiles: Iterable[tuple[int, int, int]], wave: int, panel_size: Callable[[str, int], float], room: float
) -> float:  # fmt: skip
    """Bytes of the panels that come from DRAM."""
    kept: OrderedDict[tuple[str, int, int], float] = OrderedDict()  # by last use
    moved, held, running = 0.0, 0.0, iter(tiles)
    while True:
        needed: dict[tuple[str, int, int], float] = {}
        for count, (i, j, part) in enumerate(running, 1):
            needed.setdefault(("left", i, part), panel_size("left", i))
            needed.setdefault(("right", j, part), panel_size("right", j))
            if count == wave:
                break
        if not needed:
            return moved
        for key, amount in needed.items():
            if key in kept:
                kept.move_to_end(key)
            else:
                moved += amount
                kept[key] = amount
                held += amount
        if sum(needed.values()) > room:
            kept.clear()
            held = 0.0
        while held > room:
            held -= kept.popitem(last=False)[1]


def _partial(kernel: Kernel, rows: int, launch: Mapping[str, int]) -> int:
    """Bytes of partial sums, written and read."""
    split = launch.get("SPLIT_K", 1)
    return 2 * 4 * split * rows * kernel.outputs * len(kernel.products) if split > 1 else 0


def _rows_again(kernel: Kernel, rows: int, dtype: str) -> int:
    """Bytes of the rows that closing steps read again, with their writing where they are no output."""
    if not kernel.closing:
        return 0
    scratch = sum(2 * size(t, rows, dtype) for t in kernel.tensors if t.role == "scratch")
    return scratch or rows * kernel.outputs * bits(dtype) // 8


# -- operations ----------------------------------------------------------------------------------


def _products(
    kernel: Kernel, rows: int, launch: Mapping[str, int], dtype: str
) -> tuple[dict[str, float], dict[str, float]]:
    """(useful, issued) operations of a gemm by kind."""
    a = kernel.activation
    integer = a is not None and a.kind == "codes"
    block_m, block_n = launch["BLOCK_M"], launch["BLOCK_N"]
    tall, wide = -(-rows // block_m) * block_m, -(-kernel.outputs // block_n) * block_n
    needed: dict[str, float] = {}
    issued: dict[str, float] = {}
    for product in kernel.products:
        kind = "int8" if integer and product.weight.decoder != "float" else dtype
        needed[kind] = needed.get(kind, 0.0) + 2.0 * rows * kernel.outputs * kernel.columns
        issued[kind] = issued.get(kind, 0.0) + 2.0 * tall * wide * padded(kernel.columns)
        for branch in product.branches:
            needed[dtype] = needed.get(dtype, 0.0) + 2.0 * rows * kernel.outputs * branch.rank
            issued[dtype] = issued.get(dtype, 0.0) + 2.0 * tall * wide * (-(-branch.rank // 16) * 16)
    for into, more in zip(
        (needed, issued),
        _steps((*kernel.steps, *kernel.closing), rows, launch["BLOCK_M"], kernel.outputs, dtype),
        strict=True,
    ):
        for kind, number in more.items():
            into[kind] = into.get(kind, 0.0) + number
    return needed, issued


def _steps(
    steps: Iterable[Step], rows: int, block: int, width: int, dtype: str
) -> tuple[dict[str, float], dict[str, float]]:
    """(needed, issued) operations of steps; a low-rank down runs on the tensor cores, `block` rows at a time."""
    needed = {"f32": 0.0}
    issued = {"f32": 0.0}
    for step in steps:
        each = step_operations(step, width)
        if step.row == "down":
            needed[dtype] = needed.get(dtype, 0.0) + each * rows
            issued[dtype] = issued.get(dtype, 0.0) + each * -(-rows // block) * block
        else:
            needed["f32"] += each * rows
            issued["f32"] += each * rows
    return needed, issued


def step_operations(step: Step, width: int) -> float:
    """Float operations of one row of a step that is `width` elements wide, by `planish.kernels.table`."""
    options = dict(step.options)
    row = ROWS[step.row].chosen(options)
    match step.row:
        case "hadamard":  # a sum or difference for each level of the transform, one factor at the end
            return row.flops * width * (math.log2(int(options["block"])) + 1)
        case "down":
            return row.flops * width * int(options["rank"])
        case "reassemble":
            return row.flops * int(options["columns"]) * int(options["terms"])
    return row.flops * width
