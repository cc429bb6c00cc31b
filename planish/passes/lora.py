"""Add low-rank adapters to a graph whose weights may be quantised: they stay as they are.

    y = f(x) + (x down^T) up^T              a branch that is there already, shared by all linears that read x
    down' = [down; A]    up' = [up, strength B]    (zero columns for the other linears)      LoRA: W + strength B A

Exact: the sum equals the model with the merged weight. It holds because a branch of `extract-low-rank` reads x as the
model made it (SVDQuant, arXiv 2411.05007), and does not where a pass has changed the channels that an adapter was
trained on (they scale, shift, permute or rotate what the linear reads or gives, or `extract-low-rank{fold=true}`): that
is refused. Merge the adapters into the float model before those.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from planish.ir.constant import Constant
from planish.ir.errors import PlanishError, nearest
from planish.ir.graph import Graph, Node, Value
from planish.ir.rewriter import Rewriter
from planish.ir.types import TensorType
from planish.ir.verifier import verify
from planish.passes.base import keep_float, kept_float, moved_channels
from planish.passes.float_branches import branch_of, columns_of, give_weight, sums_of
from planish.passes.sites import reads_by_weight, weight_matrix


def add_lora(graph: Graph, adapters: Mapping[str, tuple[Any, Any]], strength: float = 1.0) -> Graph:
    """A graph with adapters added, in its float branches; no other constant changes.

    Args:
        graph: not changed.
        adapters: for each linear, by the name of its result or by its source (the module path), A [rank, inputs] and
            B [outputs, rank]: arrays or tensors. Its weight is to become W + strength B A.
        strength: the factor (what peft calls alpha / rank).

    Raises:
        PlanishError: no such linear, factors that do not fit it, or one whose channels a pass transformed.
    """
    if not np.isfinite(strength):
        raise PlanishError(f"add_lora: strength: expected a finite number; got {strength}")
    graph = graph.clone()
    moved = moved_channels(graph)
    added: dict[Node, list[tuple[Node, np.ndarray, np.ndarray]]] = defaultdict(list)
    with Rewriter(graph) as rewriter:
        for name, factors in adapters.items():
            sums = sums_of(_result(graph, name))
            total = sums[-1]
            a, b = _factors(name, factors, total)
            x = _read(sums)
            branch = next((found for v in sums if (found := branch_of(v)) is not None), None)
            _check_channels(name, moved, [x], "reads")
            _check_channels(name, moved, sums, "gives")
            if branch is None or (x is not None and branch.down.operand(0) is not x):
                _make(rewriter, name, total, x if x is not None else sums[0], a, strength * b)
                continue
            _fits(name, a, branch.down.operand(0), "A", 1)
            added[branch.down].append((branch.up, a, strength * b))
        for down, parts in added.items():
            _extend(rewriter, down, parts)
    verify(graph)
    return graph


def _check_channels(name: str, moved: set[str], values: Sequence[Value | None], verb: str) -> None:
    """Raise where a pass transformed the channels of one of the values: an adapter is for those of the model."""
    for value in values:
        if value is not None and value.name in moved:
            raise PlanishError(
                f"add_lora: '{name}': a pass transformed the channels that it {verb}",
                where=str(value.producer) if value.producer is not None else None,
                hint="merge the adapter into the float model before passes that scale, shift or rotate, or fold",
            )


def _result(graph: Graph, name: str) -> Value:
    """What a linear gives, its branch included."""
    value = graph.values.get(name)
    if value is None or value.producer is None:
        kept = kept_float(graph)
        nodes = [n for n in graph.nodes if n.source == name and n.op.name == "linear" and n.result.name not in kept]
        if not nodes:  # lowered: only the branch is a linear
            nodes = [n for n in graph.nodes if n.source == name and branch_of(n.result) is not None]
        if len(nodes) != 1:
            sources = {n.source for n in graph.nodes if n.op.name == "linear" and n.source}
            what = f"'{name}': {len(nodes)} linears have this source" if nodes else f"'{name}': no such linear"
            raise PlanishError(f"add_lora: {what}", hint=nearest(name, [*graph.values, *sources]))
        value = nodes[0].result
    if branch_of(value) is not None or branch_of(sums_of(value)[-1]) is not None:
        return value
    node = value.producer
    if node is None or node.op.name != "linear" or node.operand(1) is None:
        raise PlanishError(
            f"add_lora: '{name}': is no linear and has no branch", where=str(node) if node is not None else None,
            hint="add adapters before the graph is lowered",
        )  # fmt: skip
    return value


def _read(sums: list[Value]) -> Value | None:
    """What a linear read in the model, by the sums that it has become; None: nothing says so."""
    branch = next((found for v in sums if (found := branch_of(v)) is not None), None)
    narrow = None if branch is None else branch.down.operand(0)
    columns = next((gather for v in sums if (gather := columns_of(v)) is not None), None)
    node = sums[0].producer
    assert node is not None
    if columns is not None:
        value = columns.operand(0)
        if narrow is not None and value is not None and _is_smoothed(value, narrow):
            value = narrow  # the columns are of x / s
    elif node.op.name == "linear":
        value = _unquantised(node.operand(0))
        if narrow is not None and not _is_put_in(value):
            value = narrow  # it may read x / s
    else:
        value = narrow
    while value is not None and value.producer is not None and _is_put_in(value):
        value = value.producer.operand(0)
    return value


def _is_smoothed(value: Value, x: Value) -> bool:
    """True if a value is x, scaled or shifted."""
    while value is not x and value.producer is not None and value.producer.op.name in ("mul", "add"):
        read = [v for v in value.producer.operands if v is not None and not v.is_constant]
        if len(read) != 1:
            return False
        value = read[0]
    return value is x


def _is_put_in(value: Value | None) -> bool:
    """True for what stands in front of a linear at run time and was not in the model."""
    return value is not None and value.producer is not None and value.producer.op.name in ("reassemble", "hadamard")


def _factors(name: str, factors: tuple[Any, Any], total: Value) -> tuple[np.ndarray, np.ndarray]:
    """A and B in float64, checked against each other and the linear's outputs."""
    a, b = (Constant.of(f).wide() for f in factors)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise PlanishError(
            f"add_lora: '{name}': expected A [rank, inputs] and B [outputs, rank]; "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    for factor, letter in ((a, "A"), (b, "B")):
        if not np.isfinite(factor).all():
            raise PlanishError(f"add_lora: '{name}': {letter} holds NaN or infinity")
    _fits(name, b, total, "B", 0)
    return a, b


def _fits(name: str, factor: np.ndarray, value: Value | None, letter: str, axis: int) -> None:
    size = value.shape[-1] if value is not None and value.shape else None
    if isinstance(size, int) and factor.shape[axis] != size:
        side = ("outputs", "inputs")[axis]
        raise PlanishError(
            f"add_lora: '{name}': {letter} has shape {list(factor.shape)}; expected {size} {side} on axis {axis}"
        )


def _unquantised(value: Value | None) -> Value | None:
    """The value before it was quantised."""
    while value is not None and (made := value.producer) is not None and made.op.name == "dequantize":
        codes = made.operand(0)
        rounded = codes.producer if codes is not None else None
        if rounded is None or rounded.op.name not in ("quantize", "dynamic_quantize"):
            break
        value = rounded.operand(0)
    return value


def _make(rewriter: Rewriter, name: str, total: Value, x: Value, a: np.ndarray, b: np.ndarray) -> None:
    """A branch of its own that reads x, for a linear that has none."""
    node = total.producer
    assert node is not None
    _fits(name, a, x, "A", 1)
    hint, dtype = total.name, total.dtype or "f32"
    made: Value | None = x
    for factor, word in ((a, "down"), (b, "up")):
        held = rewriter.constant(Constant(factor, dtype, factor.shape), f"{hint}.{word}.weight")
        names = [f"{hint}.{word}"]
        made = rewriter.insert("linear", [made, held], before=node._next, names=names, source=node.source).result
        if word == "down":
            behind = made.producer
            assert behind is not None
            node = behind
        keep_float(rewriter.graph, made)
    assert made is not None and made.producer is not None
    summed = rewriter.insert("add", [total, made], before=made.producer._next, source=node.source)
    rewriter.replace(total, summed.result)
    rewriter.rename(total, rewriter.graph.fresh_name(f"{hint}.residual"))
    rewriter.rename(summed.result, hint)


def _extend(rewriter: Rewriter, down: Node, parts: list[tuple[Node, np.ndarray, np.ndarray]]) -> None:
    """More rows for `down`, and for each linear that reads it as many columns."""
    old = weight_matrix(down)
    give_weight(rewriter, down, np.concatenate([old, *(a for _, a, _ in parts)]))
    narrow = down.result
    assert narrow.shape is not None and narrow.dtype is not None
    total = len(old) + sum(len(a) for _, a, _ in parts)
    rewriter.retype(narrow, TensorType(narrow.dtype, (*narrow.shape[:-1], total)))
    for up in dict.fromkeys(narrow.users):
        if not reads_by_weight(up, narrow):
            raise PlanishError("add_lora: something else than a linear reads a branch", where=str(up))
        columns = [b if owner is up else np.zeros((len(weight_matrix(up)), b.shape[1])) for owner, _, b in parts]
        give_weight(rewriter, up, np.concatenate([weight_matrix(up), *columns], 1))
