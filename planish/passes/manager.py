"""Running passes in order, with every promise checked.

A graph is never changed in place: the manager works on a clone. After each pass the verifier runs,
and an exact pass is validated end to end in float64 on random inputs and on calibration samples
(`planish.passes.validation`). Facts (`needs`, `gives`, `breaks`) guard the order: a pass that needs
what an earlier one broke is refused with the names of both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from planish.ir.errors import PlanishError
from planish.ir.graph import Graph
from planish.ir.ops.base import Act, Axes
from planish.ir.stats import Stats
from planish.ir.text import print_graph
from planish.ir.verifier import verify
from planish.passes.base import Context, Exactness, Pass, PassReport
from planish.passes.pipeline import REGISTRY, parse_pipeline, pass_class, print_pipeline
from planish.passes.validation import Probe, check, make_probe

if TYPE_CHECKING:
    import torch


class Plain(Protocol):
    """What can be written as JSON."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""


@dataclass
class Report:
    """What a pipeline did.

    Attributes:
        passes: one report per pass, in order.
        seed: the seed of every random choice and probe.
        validated: the number of inputs on which exact passes were compared; 0: not validated.
        unchecked: why validation was not possible, if it was asked for and was not.
        used: for each act the axes of values that a pass transformed (`Context.used`).
        freedoms: what no pass used, as plain data, if somebody looked (`planish.report.freedoms`).
        results: errors, outliers and sizes, if somebody looked (`planish.report.results`).
    """

    passes: list[PassReport] = field(default_factory=list)
    seed: int = 0
    validated: int = 0
    unchecked: str = ""
    used: dict[Act, set[tuple[str, Axes]]] = field(default_factory=dict, repr=False)
    freedoms: list[dict[str, Any]] = field(default_factory=list)
    results: Plain | None = field(default=None, repr=False)

    def __getitem__(self, name: str) -> PassReport:
        """The report of the first pass of that name."""
        for report in self.passes:
            if report.name == name:
                return report
        raise KeyError(name)

    def as_dict(self) -> dict[str, Any]:
        return {
            "passes": [p.as_dict() for p in self.passes],
            "seed": self.seed,
            "validated": self.validated,
            "unchecked": self.unchecked,
            "freedoms": self.freedoms,
            "results": None if self.results is None else self.results.as_dict(),
        }


class Instrument:
    """Called around every pass; subclass what you need."""

    def before(self, instance: Pass, graph: Graph) -> None:
        """Before a pass runs."""

    def statistics(self, instance: Pass | None, graph: Graph, stats: Stats) -> None:
        """Before a pass runs, with the statistics as the passes before it left them; None: after the last pass."""

    def after(self, instance: Pass, graph: Graph, report: PassReport) -> None:
        """After a pass ran and was checked."""


class DumpInstrument(Instrument):
    """Writes the IR after each pass to `folder`, and the difference to the text before it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.count = 0
        self.text = ""

    def before(self, instance: Pass, graph: Graph) -> None:
        if self.count == 0:
            self.text = print_graph(graph)
            (self.folder / "00-input.ir").write_text(self.text)

    def after(self, instance: Pass, graph: Graph, report: PassReport) -> None:
        import difflib

        self.count += 1
        text = print_graph(graph)
        stem = f"{self.count:02}-{instance.name}"
        (self.folder / f"{stem}.ir").write_text(text)
        changes = difflib.unified_diff(self.text.splitlines(), text.splitlines(), "before", "after", lineterm="", n=1)
        (self.folder / f"{stem}.diff").write_text("\n".join(changes) + "\n")
        self.text = text


class Pipeline:
    """A sequence of passes.

    Args:
        passes: a pipeline text or the passes.

    Raises:
        PlanishError: unknown pass or option, or an order that breaks what a pass needs.
    """

    def __init__(self, passes: str | Sequence[Pass]) -> None:
        self.passes = parse_pipeline(passes) if isinstance(passes, str) else list(passes)
        self._check_order()

    def __str__(self) -> str:
        return print_pipeline(self.passes)

    def _check_order(self) -> None:
        broken: dict[str, str] = {}
        given: set[str] = set()
        last: Pass | None = None
        for instance in self.passes:
            if last is not None and not instance.final:
                what = f"pass '{instance.name}': comes after '{last.name}', which writes the forms of a target"
                raise PlanishError(what, where=str(self), hint=f"put '{last.name}' at the end")
            last = instance if instance.final else None
            for fact in sorted(instance.needs - given):
                givers = [name for name in REGISTRY if fact in pass_class(name).gives]
                hint = f"run {' or '.join(givers)} before it" if givers else None
                culprit = f", which '{broken[fact]}' before it breaks" if fact in broken else ""
                raise PlanishError(f"pass '{instance.name}': needs '{fact}'{culprit}", where=str(self), hint=hint)
            given |= instance.gives
            given -= instance.breaks
            broken.update(dict.fromkeys(instance.breaks, instance.name))

    def run(
        self,
        graph: Graph,
        *,
        stats: Stats | None = None,
        samples: Sequence[Mapping[str, torch.Tensor]] = (),
        data: Sequence[Mapping[str, Any]] | None = None,
        row_mask: str | None = None,
        validate: bool = True,
        seed: int = 0,
        instruments: Iterable[Instrument] = (),
        progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, label: items,
    ) -> tuple[Graph, Report]:
        """Run the passes on a copy of a graph.

        Args:
            graph: not changed.
            stats: calibration statistics of `graph`; not changed.
            samples: real inputs on which exact passes are validated besides random ones.
            data: calibration batches, for passes that evaluate the graph on them; read several times.
            row_mask: the input that is non-zero where a row of `data` counts.
            validate: compare before and after every exact pass in float64.
            seed: of every random choice.
            instruments: called around every pass.
            progress: wraps long loops in a progress bar.

        Returns:
            The new graph and the report.

        Raises:
            PlanishError: a pass needs statistics and there are none, or they are of another graph; the seed is
                negative.
            VerificationError: a pass left a graph that is not well formed.
            ValidationError: an exact pass changed the function.
        """
        if seed < 0:
            raise PlanishError(f"seed: expected an integer of at least 0; got {seed}")
        for instance in self.passes:
            if instance.needs_stats and stats is None:
                raise PlanishError(
                    f"pass '{instance.name}': needs calibration statistics",
                    where=text if (text := str(instance)) != instance.name else None,
                    hint="give calibration data (--calibrate, or planish.collect)",
                )
        if stats is not None:
            _check_stats(stats, graph)
        instruments = list(instruments)
        report = Report(seed=seed)
        context = Context(stats.copy() if stats is not None else None, seed, progress, report.used, data, row_mask)
        probe = Probe()
        if validate and any(p.exactness in (Exactness.EXACT, Exactness.IDENTITY) for p in self.passes):
            probe = make_probe(graph, seed, samples)
            report.unchecked = "" if probe.inputs else f"the graph could not be evaluated: {probe.reason}"
            report.validated = len(probe.inputs)
        graph = graph.clone()
        for instance in progress(self.passes, "passes"):
            for instrument in instruments:
                instrument.before(instance, graph)
                if context.stats is not None:
                    instrument.statistics(instance, graph, context.stats)
            exact = instance.exactness in (Exactness.EXACT, Exactness.IDENTITY)
            before = graph.clone() if exact and probe.inputs else None
            start = time.perf_counter()
            done = instance.run(graph, context)
            verify(graph)
            if context.stats is not None:  # a later value may get the name of one that is gone
                for name in [name for name in context.stats if name not in graph.values]:
                    del context.stats.channels[name]
            if before is not None and (done.applied or done.inserted):
                verdict = check(before, graph, probe, instance.name)
                done.error, done.checked_narrow = verdict.error, verdict.narrow
            done.seconds = time.perf_counter() - start
            report.passes.append(done)
            for instrument in instruments:
                instrument.after(instance, graph, done)
        if context.stats is not None:
            for instrument in instruments:
                instrument.statistics(None, graph, context.stats)
        return graph, report


def _check_stats(stats: Stats, graph: Graph) -> None:
    """Refuse statistics whose channels are not those of the graph's values.

    Raises:
        PlanishError: with the first value that differs.
    """
    hint = "they are of another model: collect them on this one"
    for name in stats:
        value, record = graph.values.get(name), stats.of(name)
        shape = None if value is None or value.is_constant else value.shape
        if value is None or shape is None:
            continue
        size = shape[record.axis] if -len(shape) <= record.axis else None
        if size is None or (isinstance(size, int) and size != len(record.minimum)):
            what = f"statistics: value '{name}': {len(record.minimum)} channels on axis {record.axis}; got {value.type}"
            raise PlanishError(what, hint=hint)
    if len(stats) and not any(name in graph.values for name in stats):
        raise PlanishError(f"statistics: none of their {len(stats)} values is in the graph", hint=hint)
