"""Collect statistics of activations in one streaming pass over calibration data.

Each batch is evaluated in float32 and forgotten; what stays per value is its extremes and second
moment per channel, and a sample of rows. A row is kept by the hash of its number in the data, so the
sample depends neither on how the data was cut into batches nor on padding, and values with the same
rows (what q, k and v read) are sampled at the same places.

Padded tokens are no data: `row_mask` names the input, 1 where a row counts, that says which are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from planish.ir.errors import PlanishError, nearest
from planish.ir.evaluator import Evaluator
from planish.ir.graph import Graph, Node, Value
from planish.ir.row_mask import RowMask, rows_of
from planish.ir.stats import ChannelStats, Stats
from planish.ir.types import WIDE_FLOATS, TensorType

if TYPE_CHECKING:
    import torch

    Batch = Mapping[str, np.ndarray | torch.Tensor]

# the operands whose numbers a quantiser replaces; their channel axis is the op table's (`OpDef.channels`)
QUANTISABLE: dict[str, tuple[int, ...]] = {
    "linear": (0,),
    "gemm": (0, 1),
    "matmul": (0, 1),
    "conv": (0,),
    "conv_transpose": (0,),
    "attention": (0, 1, 2),
}
NORMS = frozenset({"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"})
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def sites(graph: Graph, values: Iterable[str] | None = None) -> dict[Value, int]:
    """The values to collect, each with its channel axis (negative).

    By default: every activation that a linear, gemm, matmul, convolution or attention reads, their results
    and those of norms. The channel axis is the one on which the op's weights could take a transform up;
    it must be static, else it is the last axis that is.

    Raises:
        PlanishError: a name in `values` is not in the graph, or not a float tensor with a static axis.
    """
    found: dict[Value, int] = {}
    for node in graph.nodes:
        if node.op.name not in QUANTISABLE and node.op.name not in NORMS:
            continue
        wanted = [*QUANTISABLE.get(node.op.name, ()), ~0]
        for port in wanted:
            value = node.port(port)
            if value is None or value.constant is not None or value in found:
                continue
            axis = _channel_axis(value, _table_axis(node, port))
            if axis is not None:
                found[value] = axis
    if values is None:
        return found
    chosen: dict[Value, int] = {}
    for name in values:
        value = graph.values.get(name)
        if value is None:
            raise PlanishError(f"value '{name}': not in the graph", hint=nearest(name, graph.values))
        axis = found.get(value, _channel_axis(value, None))
        if axis is None:
            raise PlanishError(f"value '{name}': expected a float tensor with a static axis; got {value.type}")
        chosen[value] = axis
    return chosen


def _table_axis(node: Node, port: int) -> int | None:
    """The channel axis that the op's row names for a port, negative."""
    value = node.port(port)
    if value is None or value.rank is None:
        return None
    for owner, axes in node.op.channels(node):
        if owner == port and len(axes) == 1:
            return axes[0] - value.rank
    return None


def _channel_axis(value: Value, preferred: int | None) -> int | None:
    if not isinstance(value.type, TensorType) or not value.type.shape or value.dtype not in WIDE_FLOATS:
        return None
    shape = value.type.shape
    for axis in (preferred, *range(-1, -len(shape) - 1, -1)):
        if axis is not None and isinstance(shape[axis], int):
            return axis
    return None


def check_weights(graph: Graph) -> None:
    """Refuse weights that are not finite.

    Raises:
        PlanishError: a weight of a linear, convolution, norm or embedding holds NaN or infinity.
    """
    seen: set[Value] = set()
    for node in graph.nodes:
        if node.op.name not in QUANTISABLE and node.op.name not in NORMS and node.op.name != "embedding":
            continue
        for value in node.operands[:3]:
            if value is None or value.constant is None or value in seen or value.dtype not in WIDE_FLOATS:
                continue
            if node.op.name in ("attention", "matmul", "gemm") and value.constant.size == 1:
                continue
            seen.add(value)
            data = np.asarray(value.constant.array())
            bad = _not_finite(data if data.dtype.kind == "f" else data.astype(np.float32))
            if bad:
                raise PlanishError(f"weight '{value.name}': {bad}; expected finite numbers", where=str(node))


def _not_finite(data: np.ndarray) -> str:
    """What is not finite and where; empty if all is."""
    finite = np.isfinite(data)
    if finite.all():
        return ""
    position = [int(i) for i in np.argwhere(~finite)[0]]
    what = "NaN" if np.isnan(data[tuple(position)]) else "infinity"
    return f"holds {what} at {position} ({int((~finite).sum())} of {data.size} elements)"


class Accumulator:
    """The statistics of one value so far."""

    def __init__(self, axis: int, rows: int, seed: int) -> None:
        self.axis = axis
        self.rows = rows
        self.seed = np.uint64(seed & 0xFFFFFFFF)
        self.count = 0
        self.minimum = self.maximum = self.total = np.empty(0)
        self.keys = np.empty(0, np.uint64)
        self.numbers = np.empty(0, np.int64)
        self.samples = np.empty((0, 0), np.float32)

    def add(self, data: torch.Tensor) -> None:
        """Take in rows [N, C], float32."""
        import torch

        if len(data) == 0:
            return
        low, high = data.amin(0).double().numpy(), data.amax(0).double().numpy()
        total = data.square().sum(0, dtype=torch.float64).numpy()
        if self.count == 0:
            self.minimum, self.maximum, self.total = low, high, total
            self.samples = np.empty((0, data.shape[1]), np.float32)
        else:
            self.minimum, self.maximum = np.minimum(self.minimum, low), np.maximum(self.maximum, high)
            self.total = self.total + total
        numbers = np.arange(self.count, self.count + len(data), dtype=np.int64)
        self.count += len(data)
        keys = _hash(numbers, self.seed)
        if len(self.keys) >= self.rows:
            chosen = np.flatnonzero(keys < self.keys.max())
        elif len(keys) > self.rows:
            chosen = np.sort(np.argpartition(keys, self.rows)[: self.rows])
        else:
            chosen = np.arange(len(keys))
        if len(chosen) == 0:
            return
        self.keys = np.concatenate([self.keys, keys[chosen]])
        self.numbers = np.concatenate([self.numbers, numbers[chosen]])
        self.samples = np.concatenate([self.samples, data[chosen].numpy()])
        if len(self.keys) > self.rows:
            kept = np.sort(np.argpartition(self.keys, self.rows)[: self.rows])
            self.keys, self.numbers, self.samples = self.keys[kept], self.numbers[kept], self.samples[kept]

    def finish(self) -> ChannelStats:
        order = np.argsort(self.numbers, kind="stable")
        mean_square = self.total / max(self.count, 1)
        return ChannelStats(self.axis, self.minimum, self.maximum, mean_square, self.samples[order], self.count)


def _hash(numbers: np.ndarray, seed: np.uint64) -> np.ndarray:
    """splitmix64 of row numbers: uint64 [N], the same in every run."""
    with np.errstate(over="ignore"):
        state = (numbers.astype(np.uint64) + seed * np.uint64(0x632BE5AB) + np.uint64(1)) * _MULTIPLIER
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def collect(
    graph: Graph,
    batches: Iterable[Batch],
    *,
    values: Iterable[str] | None = None,
    rows: int = 2048,
    row_mask: str | None = None,
    seed: int = 0,
    source: str = "",
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, label: items,
) -> Stats:
    """Evaluate a graph on calibration data and keep statistics of its activations.

    Args:
        graph: the graph; not changed. Passes find the statistics by its value names.
        batches: mappings from input names to arrays; read once.
        values: names of the values to collect; by default those of `sites`.
        rows: sampled rows per value.
        row_mask: the input that is non-zero where a row (a token) counts; other rows are left out.
        seed: of the sampling of rows.
        source: a description of the data, kept in the statistics.
        progress: wraps the loop over the batches in a progress bar.

    Raises:
        PlanishError: no data, inputs that do not fit, or an activation or weight that is not finite.
    """
    import torch

    if rows < 1:
        raise PlanishError(f"calibration: rows is {rows}; expected at least 1")
    if isinstance(batches, Mapping | torch.Tensor):
        raise PlanishError(
            f"calibration: expected batches, each a dict of name to tensor, got one {type(batches).__name__}",
            hint="collect(graph, [batch])",
        )
    check_weights(graph)
    wanted = sites(graph, values)
    mask = None if row_mask is None else RowMask(graph, row_mask)
    found = {value: Accumulator(axis, rows, seed) for value, axis in wanted.items()}
    evaluator = Evaluator(graph, torch.float32)

    def observe(value: Value, tensor: Any) -> None:
        data = rows_of(value, tensor, found[value].axis, mask).float()
        if not bool(torch.isfinite(data).all()):
            bad = _not_finite(data.numpy()).replace(" at ", " at row, channel ")
            raise PlanishError(
                f"activation %{value.name}: {bad} on the calibration data",
                where=str(value.producer) if value.producer is not None else None,
                hint="the model overflows on this input, or the input itself is not finite",
            )
        found[value].add(data)

    count = 0
    for batch in progress(batches, "collecting statistics"):
        if mask is not None and isinstance(batch, Mapping):
            mask.start(batch)
        evaluator.run(batch, observe=observe, observed=list(found))
        count += 1
    if count == 0:
        raise PlanishError("calibration: no data; expected at least one batch")
    unseen = [v.name for v, a in found.items() if a.count == 0]
    if unseen and mask is not None:
        raise PlanishError(f"calibration: no row of %{unseen[0]} counts", hint=f"'{mask.name}' is zero everywhere")
    about = {"graph": graph.name, "data": source, "batches": str(count), "rows": str(rows), "seed": str(seed)}
    return Stats({v.name: a.finish() for v, a in found.items() if a.count}, about)
