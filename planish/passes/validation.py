"""Checking a rewrite on the instance: the graph before and after on the same inputs, in float64.

This is validation, not a proof: it holds for the weights at hand on the inputs tried. The algebra of
each op's row is tested once for all (`planish.ir.audit`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from planish.ir.errors import PlanishError, ValidationError
from planish.ir.evaluator import Evaluator
from planish.ir.graph import Graph
from planish.ir.probe import random_inputs, relative_error, undrawn, worst_element

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-10  # relative, in float64
NARROW_TOLERANCE = 1e-4  # relative, where an op could be run in float32 only
SIZES = (8, 16, 32, 64, 128, 256)  # tried in turn for symbolic dims


@dataclass
class Probe:
    """Inputs on which a graph can be evaluated, and its float64 outputs on them.

    Attributes:
        inputs: one mapping per probe, name to tensor.
        reason: why there are none, if there are none.
    """

    inputs: list[Mapping[str, torch.Tensor]] = field(default_factory=list)
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """The outcome of one comparison.

    Attributes:
        error: the largest relative error over all outputs and probes.
        worst: the output and element where it occurs.
        narrow: the number of nodes that were evaluated in float32 only.
    """

    error: float
    worst: str
    narrow: int

    @property
    def tolerance(self) -> float:
        return NARROW_TOLERANCE if self.narrow else TOLERANCE

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance


def make_probe(graph: Graph, seed: int, samples: Sequence[Mapping[str, torch.Tensor]] = (), count: int = 1) -> Probe:
    """Random inputs (with the smallest sizes on which the graph runs) and up to two calibration samples."""
    import torch

    failure: Exception | None = None
    missing = undrawn(graph)
    if missing is not None:
        failure = PlanishError(f"input '{missing.name}': there are no random values of type {missing.type}")
    for size in SIZES if missing is None else ():
        inputs = [random_inputs(graph, seed + i, size=size) for i in range(count)]
        try:
            for one in inputs:
                Evaluator(graph, torch.float64).run(one)
        except (PlanishError, RuntimeError, ValueError, IndexError) as error:
            failure = failure or error
            continue
        return Probe([*inputs, *samples[:2]])
    if samples:
        return Probe(list(samples[:2]))
    return Probe([], str(failure).splitlines()[0] if failure else "no inputs")


def compare(before: Graph, after: Graph, probe: Probe) -> Verdict:
    """Evaluate both graphs in float64 on the probe's inputs and compare all outputs."""
    import torch

    worst, where, narrow = 0.0, "", 0
    for inputs in probe.inputs:
        first, second = Evaluator(before, torch.float64), Evaluator(after, torch.float64)
        expected, got = first.run(inputs), second.run(inputs)
        narrow = max(narrow, len(first.narrowed), len(second.narrowed))
        for name, tensor in expected.items():
            if not isinstance(tensor, torch.Tensor):
                continue
            error = relative_error(got[name], tensor)
            if error > worst or not where:
                worst, where = error, f"output '{name}' {worst_element(got[name], tensor)}"
    return Verdict(worst, where, narrow)


def check(before: Graph, after: Graph, probe: Probe, who: str) -> Verdict:
    """`compare`, and an error if the function moved.

    Raises:
        ValidationError: the relative error exceeds the tolerance.
    """
    verdict = compare(before, after, probe)
    if not verdict.holds:
        raise ValidationError(
            f"pass '{who}': changed the function: relative error {verdict.error:.3g}; "
            f"expected <= {verdict.tolerance:g}",
            where=verdict.worst + first_difference(before, after, probe),
            hint="this is a bug of the pass or of an op's row: please report it with the model",
        )
    return verdict


def first_difference(before: Graph, after: Graph, probe: Probe) -> str:
    """The first value of both graphs' (by name) that differs: where to look. Empty if none."""
    import torch

    shared = {v.name for n in before.nodes for v in n.results} & {v.name for n in after.nodes for v in n.results}
    if not probe.inputs or not shared:
        return ""
    kept = [Evaluator(g, torch.float64).run(probe.inputs[0], keep=shared) for g in (before, after)]
    for node in after.nodes:
        for value in node.results:
            if value.name in shared and isinstance(kept[0].get(value.name), torch.Tensor):
                error = relative_error(kept[1][value.name], kept[0][value.name])
                if error > TOLERANCE:
                    return f"; the first value that differs is %{value.name} ({node.op.name}), by {error:.3g}"
    return ""
