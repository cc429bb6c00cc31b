"""One pass over a graph with all calibration data at once, for passes that rewrite it on the way.

    sweep = Sweep(graph, batches, targets=values that will be asked for)
    for node in sites:
        h = sweep.second_moment(node.operands[0])     # of what the graph, as it is now, gives the node
        ...                                           # rewrite the node
        # the next site sees what the rewritten node gives

A `Sweep` evaluates only what it is asked for, and each node once. The *frontier* is the set of values that were
computed and that nodes not yet run still read: one tensor a batch for each. A question is answered batch by
batch through the window of nodes between the frontier and the value, so besides the frontier only one batch's
intermediate values are in memory; a value leaves the frontier when its last reader has run. What depends on
constants alone (a weight that is dequantised) is computed for a window and dropped behind it.

Questions must follow the order of the graph; nodes inserted in front of a node that has not run yet are found
by themselves. What a node gave before it was rewritten is never computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from planish.ir.errors import PlanishError
from planish.ir.evaluator import Evaluator, bind_inputs, evaluate_nodes
from planish.ir.graph import Graph, Node, Value
from planish.ir.ops.base import Wide
from planish.ir.row_mask import RowMask, rows_of

if TYPE_CHECKING:
    import torch

    Batch = Mapping[str, Any]

CHUNK = 4096  # rows whose products are summed in the dtype of the evaluation, before they are added in float64


class Sweep:
    """See the module.

    Args:
        graph: the graph; it may be rewritten between two questions.
        batches: mappings from input names to arrays or tensors; at least one.
        targets: the values that will be asked for, of the graph as it is now: what nothing among them needs is
            never held. None: every value may be.
        dtype: of every float; None is float32.
        row_mask: the input that is non-zero where a row counts, for `rows` and what builds on it.

    Attributes:
        held: bytes of the frontier now.
        peak: the most that it was.

    Raises:
        PlanishError: no batch, or inputs that do not fit the graph.
    """

    def __init__(
        self,
        graph: Graph,
        batches: Sequence[Batch],
        *,
        targets: Collection[Value] | None = None,
        dtype: torch.dtype | None = None,
        row_mask: str | None = None,
    ) -> None:
        import torch

        self.graph = graph
        self.dtype = dtype or torch.float32
        self.row_mask = None if row_mask is None else RowMask(graph, row_mask)
        self.batches = list(batches)
        if not self.batches:
            raise PlanishError("calibration: no data; expected at least one batch")
        inputs = [bind_inputs(graph, batch, Wide(self.dtype)) for batch in self.batches]
        self._tensors: dict[Value, list[Any]] = {v: [bound[v] for bound in inputs] for v in graph.inputs}
        self._done: set[Node] = set() if targets is None else _beside(graph, targets)
        self._fixed: dict[Node, bool] = {}
        self._moments: dict[Value, torch.Tensor] = {}
        self._stand_for: dict[Value, Value] = {}
        self.held = self.peak = self._size()

    # -- questions -------------------------------------------------------------------------------

    def tensors(self, value: Value) -> list[Any]:
        """The value in each batch, in the dtype of the sweep.

        Raises:
            PlanishError: it lies behind what the sweep still holds.
        """
        if value not in self._tensors:
            self._advance(value)
        return self._tensors[value]

    def rows(self, value: Value, axis: int = -1) -> Iterator[torch.Tensor]:
        """The rows that count in each batch, [N, C]: `axis` (negative) last, the other axes flattened."""
        for batch, tensor in zip(self.batches, self.tensors(value), strict=True):
            if self.row_mask is not None:
                self.row_mask.start(batch)
            yield rows_of(value, tensor, axis, self.row_mask)

    def second_moment(self, value: Value, axis: int = -1, *, stands_for: Value | None = None) -> torch.Tensor:
        """(2 / T) X^T X over the T rows of all batches, float64 [C, C]: the Hessian of |X W^T|^2 / T.

        Products of up to 4096 rows are summed in float32, those sums in float64. It is kept while the value is.

        Args:
            stands_for: what the value (its rounding, say) takes the place of, reader by reader: kept while that has
                readers to come.
        """
        import torch

        if stands_for is not None and stands_for is not value:
            self._stand_for[value] = stands_for

        if value in self._moments:
            return self._moments[value]
        total: torch.Tensor | None = None
        count = 0
        with torch.no_grad():
            for rows in self.rows(value, axis):
                for start in range(0, len(rows), CHUNK):
                    part = rows[start : start + CHUNK]
                    product = (part.T @ part).double()
                    total = product if total is None else total.add_(product)
                count += len(rows)
        if total is None or count == 0:
            raise PlanishError(f"calibration: no row of %{value.name} counts")
        self._moments[value] = total.mul_(2.0 / count)
        return total

    # -- the frontier ----------------------------------------------------------------------------

    def _advance(self, value: Value) -> None:
        """Run the window between the frontier and a value over all batches."""
        window, shared = self._window(value)
        inside = {*window, *shared}
        wide = Wide(self.dtype)
        fixed_results = [v for node in shared for v in node.results if any(u not in shared for u in v.users)]
        fixed_results += [value] if value.producer in shared else []
        fixed: dict[Value, Any] = dict(evaluate_nodes(list(shared), {}, fixed_results, wide)) if shared else {}
        if not window:  # depends on constants alone
            self._tensors[value] = [fixed[value]] * len(self.batches)
            return
        for node in window:
            for operand in node.operands:
                if operand is not None and operand.is_constant and operand.constant is not None:
                    fixed.setdefault(operand, None)
        for constant in [v for v, held in fixed.items() if held is None]:
            assert constant.constant is not None
            fixed[constant] = wide.hold(constant.constant)
        done = self._done | inside
        wanted = [v for node in window for v in node.results if v is value or any(u not in done for u in v.users)]
        read = {v for node in window for v in node.operands if v is not None and v in self._tensors}
        made: dict[Value, list[Any]] = {v: [] for v in wanted}
        leaving = [v for v in read if self._is_left(v, done)]
        for index in range(len(self.batches)):
            environment = {**fixed, **{v: self._tensors[v][index] for v in read}}
            found = evaluate_nodes(window, environment, wanted, wide)
            del environment
            for result, tensors in made.items():
                tensors.append(found[result])
            for left in leaving:  # every reader has it: the next batch finds the memory free
                self._tensors[left][index] = None
        self._tensors.update(made)
        self._done |= set(window)
        for left in [v for v in self._tensors if v is not value and self._is_left(v, self._done)]:
            del self._tensors[left]
        for left in [v for v in self._moments if v not in self._tensors]:
            del self._moments[left]
        self.held = self._size()
        self.peak = max(self.peak, self.held)

    def _is_left(self, value: Value, done: Collection[Node]) -> bool:
        """True if every reader of a value is done, and every reader of what it stands for."""
        source = self._stand_for.get(value)
        return all(u in done for v in (value, source) if v is not None for u in v.users)

    def _window(self, value: Value) -> tuple[list[Node], dict[Node, None]]:
        """What to run for a value, in topological order; and those of its ancestors that read constants alone."""
        window: list[Node] = []
        shared: dict[Node, None] = {}
        seen: set[Node] = set()
        if value.producer is None:
            raise PlanishError(f"sweep: %{value.name} is no activation of this graph")
        stack: list[tuple[Node, bool]] = [(value.producer, False)]
        while stack:
            node, ready = stack.pop()
            if ready:
                if self._is_fixed(node):
                    shared[node] = None
                else:
                    window.append(node)
                continue
            if node in seen:
                continue
            seen.add(node)
            if node in self._done and not self._is_fixed(node):
                raise PlanishError(
                    f"sweep: %{node.result.name} is behind what is still held", where=str(node),
                    hint="ask in the order of the graph, and name what will be asked for as a target",
                )  # fmt: skip
            stack.append((node, True))
            for operand in node.operands:
                if operand is not None and operand.producer is not None and operand not in self._tensors:
                    stack.append((operand.producer, False))
        return window, shared

    def _is_fixed(self, node: Node) -> bool:
        """True if a node reads constants alone: it may be computed again at any time."""
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self._fixed:
                stack.pop()
                continue
            if not top.op.pure or any(v is not None and v.producer is None and v.is_input for v in top.operands):
                self._fixed[stack.pop()] = False
                continue
            above = [v.producer for v in top.operands if v is not None and v.producer is not None]
            waiting = [n for n in above if n not in self._fixed]
            if waiting:
                stack += waiting
                continue
            self._fixed[stack.pop()] = all(self._fixed[n] for n in above)
        return self._fixed[node]

    def _size(self) -> int:
        return sum(t.nbytes for tensors in self._tensors.values() for t in tensors if hasattr(t, "nbytes"))


def _beside(graph: Graph, targets: Collection[Value]) -> set[Node]:
    """The nodes that no target needs and that read none."""
    needed = set(targets)
    beside: set[Node] = set()
    for node in reversed(list(graph.nodes)):
        if any(v in needed for v in node.results):
            needed.update(v for v in node.operands if v is not None)
        else:
            beside.add(node)
    wanted = set(targets)
    return {n for n in beside if not any(v in wanted for v in n.operands)}


def evaluate_batches(
    graph: Graph,
    batches: Sequence[Batch],
    values: Mapping[Value, int],
    *,
    dtype: torch.dtype | None = None,
    row_mask: str | None = None,
) -> Iterator[dict[Value, torch.Tensor]]:
    """Evaluate the whole graph batch by batch: for each, the rows [N, C] that count of each of some values.

    Args:
        values: what to return, each with its channel axis (negative).
        dtype: of every float; None is float32.
        row_mask: the input that is non-zero where a row counts.
    """
    import torch

    mask = None if row_mask is None else RowMask(graph, row_mask)
    evaluator = Evaluator(graph, dtype or torch.float32)
    names = [v.name for v in values]
    for batch in batches:
        if mask is not None:
            mask.start(batch)
        found = evaluator.run(batch, keep=names)
        yield {v: rows_of(v, found[v.name], axis, mask) for v, axis in values.items()}
