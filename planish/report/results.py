"""What a pipeline did to the numbers of a model: errors and outliers by site, sizes by kind.

A *site* is a linear or convolution with a constant weight, as it stands before its numbers change. Its
outliers are given as calibration found them and as the exact passes left them, its signal-to-noise ratios
as `quantize` reports them. Statistics follow a value by name; where a pass put ops in front of a site, the
value before is the one that these ops read.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from planish.ir.graph import Graph, Value
from planish.ir.stats import Stats
from planish.passes.base import Exactness, Pass, PassReport
from planish.passes.manager import Instrument
from planish.passes.sites import reads_by_weight
from planish.report.labels import label
from planish.report.outliers import Outliers, outliers
from planish.report.sizes import Sizes, sizes


@dataclass(frozen=True, eq=False)
class Site:
    """One linear, convolution or table.

    Attributes:
        where: its op and path.
        reads: the value it reads; empty for a table.
        weight: the name of its weight.
        weight_db, activation_db: signal-to-quantisation-noise ratios, dB; None: in float, or not known.
        before, after: outliers of what it reads, as calibrated and as the exact passes left them.
    """

    where: str
    reads: str
    weight: str
    weight_db: float | None = None
    activation_db: float | None = None
    before: Outliers | None = None
    after: Outliers | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        found = dict(vars(self))
        for key in ("before", "after"):
            found[key] = None if found[key] is None else found[key].as_dict()
        return found


@dataclass(frozen=True)
class Results:
    """The numbers of a model after a pipeline.

    Attributes:
        sites: in the order of the graph; tables and what passes quantised by themselves at the end.
        before, after: sizes of the constants by kind.
    """

    sites: tuple[Site, ...] = ()
    before: Sizes = field(default_factory=Sizes)
    after: Sizes = field(default_factory=Sizes)

    def worst(self, count: int) -> list[Site]:
        """The sites with the lowest signal-to-noise ratio, those with none last (the largest outliers first)."""
        return sorted(self.sites, key=_badness)[:count]

    def medians(self) -> dict[str, float]:
        """The median over the sites of each figure that there is."""
        figures: dict[str, list[float]] = {}
        for site in self.sites:
            row = {"weight dB": site.weight_db, "activation dB": site.activation_db}
            for time, seen in (("before", site.before), ("after", site.after)):
                row |= {f"{k} {time}": getattr(seen, k, None) for k in ("ratio", "kurtosis", "row_ratio")}
            for name, value in row.items():
                if value is not None:
                    figures.setdefault(name, []).append(value)
        return {name: statistics.median(values) for name, values in figures.items()}

    @property
    def bits_per_weight(self) -> float | None:
        """Bits that a weight takes in the end, scales and zero points counted; None without weights."""
        held = self.after.weights + self.after.scales
        return 8 * held / self.before.elements if self.before.elements else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "sites": [site.as_dict() for site in self.sites],
            "medians": self.medians(),
            "bytes_before": self.before.as_dict(),
            "bytes_after": self.after.as_dict(),
            "bits_per_weight": self.bits_per_weight,
        }


def _badness(site: Site) -> tuple[float, float]:
    known = [db for db in (site.weight_db, site.activation_db) if db is not None]
    return min(known, default=float("inf")), -(site.after.ratio if site.after is not None else 0.0)


class ResultInstrument(Instrument):
    """Looks at the sites before each pass that changes numbers on purpose.

    Args:
        graph: as it is before all passes.

    `stats` is set to what calibration gave, once it has.
    """

    def __init__(self, graph: Graph) -> None:
        self.first = sizes(graph)
        self.stats: Stats | None = None
        self.found: dict[str, Site] = {}  # by weight
        self.fresh = self.rounded = False
        self.seen: dict[str, Outliers] = {}

    def before(self, instance: Pass, graph: Graph) -> None:
        if self._due(instance):
            self._look(graph, None)

    def statistics(self, instance: Pass | None, graph: Graph, stats: Stats) -> None:
        if self._due(instance) if instance is not None else not self.found:
            self._look(graph, stats)

    def after(self, instance: Pass, graph: Graph, report: PassReport) -> None:
        self.rounded |= "quantised" in instance.gives

    def _due(self, instance: Pass) -> bool:
        """True before what changes numbers; what was seen before the first rounding to codes is seen anew then."""
        first = "quantised" in instance.gives and not self.rounded
        if first and not self.fresh:
            self.found.clear()
            self.fresh = True
        return first or instance.exactness is Exactness.LOSSY

    def _look(self, graph: Graph, stats: Stats | None) -> None:
        for node in graph.nodes:
            x, weight = node.operand(0), node.operand(1)
            if x is None or weight is None or not reads_by_weight(node, x):
                continue
            known = self.found.get(weight.name)
            after = outliers(stats.of(x.name)) if stats is not None and x.name in stats else None
            if known is not None and after is None:
                continue  # numbers were changed before: what was seen then counts
            self.found[weight.name] = Site(label(node), x.name, weight.name, before=self._origin(x), after=after)

    def _origin(self, value: Value | None) -> Outliers | None:
        """What calibration found of a value, or of the one that the ops in front of it read."""
        while value is not None and self.stats is not None:
            if value.name in self.stats:
                if value.name not in self.seen:
                    self.seen[value.name] = outliers(self.stats.of(value.name))
                return self.seen[value.name]
            made = value.producer
            operands = [v for v in made.operands if v is not None and not v.is_constant] if made is not None else []
            value = operands[0] if len(operands) == 1 and operands[0].shape == value.shape else None
        return None

    def results(self, graph: Graph, reports: Iterable[PassReport]) -> Results:
        """What is known at the end.

        Args:
            graph: the result.
            reports: of the passes.
        """
        weights: dict[str, float] = {}
        activations: dict[str, float] = {}
        for report in reports:
            weights |= _ratios(report.figures.get("weights"))
            activations |= _ratios(report.figures.get("activations"))
        sites = [
            Site(s.where, s.reads, s.weight, weights.pop(s.weight, None), activations.get(s.reads), s.before, s.after)
            for s in self.found.values()
        ]
        sites += [Site(f"table %{name}", "", name, db) for name, db in weights.items()]
        return Results(tuple(sites), self.first, sizes(graph))


def _ratios(figures: object) -> dict[str, float]:
    """name -> dB, of the entries that have a ratio."""
    if not isinstance(figures, Mapping):
        return {}
    return {
        str(name): float(entry["sqnr_db"])
        for name, entry in figures.items()
        if isinstance(entry, Mapping) and "sqnr_db" in entry
    }
