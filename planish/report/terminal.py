"""Reports on a terminal: tables by rich, progress bars, and plain text where the output is a pipe.

Results go to stdout, everything else to stderr. Colours obey NO_COLOR; progress bars appear on a
terminal only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

from rich.box import ASCII_DOUBLE_HEAD, SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from planish.integrate.api import Comparison
from planish.integrate.convert import Conversion
from planish.passes.base import PassReport
from planish.passes.manager import Report
from planish.report.freedoms import Freedom, summary
from planish.report.inspection import Inspection, Obstacle, SpaceRow
from planish.report.mapping import Lint
from planish.report.outliers import MASSIVE, Outliers
from planish.report.results import Results
from planish.report.sizes import KINDS

PIPE_WIDTH = 160  # columns of a table in a pipe, where COLUMNS does not say
WIDENS = "split"  # an act that is not free of cost: left out of sums unless it is asked for
WORST = 8  # sites that are shown, unless all are asked for


class Terminal:
    """Where a command prints.

    Args:
        quiet: print results and errors only.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if columns.isdigit() and int(columns) > 0 else PIPE_WIDTH
        self.out = Console(
            file=sys.stdout, width=None if sys.stdout.isatty() else width, highlight=False, soft_wrap=False
        )
        self.err = Console(file=sys.stderr, highlight=False)
        self._bars: Progress | None = None
        self._tasks = 0

    def show(self, *items: Any) -> None:
        """Print results."""
        for item in items:
            if isinstance(item, str):
                self.out.print(Text(item), soft_wrap=True)
            else:
                self.out.print(item)

    def note(self, text: str) -> None:
        """Tell what is being done, on stderr; nothing with `quiet`."""
        if not self.quiet:
            self.err.print(Text(text), soft_wrap=True)

    def progress(self, items: Iterable[Any], label: str) -> Iterator[Any]:
        """Go over `items` with a progress bar, on a terminal."""
        if self.quiet or not self.err.is_terminal:
            yield from items
            return
        if self._bars is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bars = Progress(*columns, console=self.err, transient=True)
            self._bars.start()
        bars = self._bars
        task = bars.add_task(label, total=len(items) if isinstance(items, Sized) else None)
        self._tasks += 1
        try:
            for item in items:
                yield item
                bars.advance(task)
        finally:
            bars.remove_task(task)
            self._tasks -= 1
            if self._tasks == 0:
                self.close()

    def close(self) -> None:
        """Take the progress bars away."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def table(self, *columns: str, right: Sequence[str] = (), title: str = "") -> Table:
        """An empty table in the style of the output: lines on a terminal, ASCII in a pipe."""
        box = SIMPLE_HEAD if self.out.is_terminal else ASCII_DOUBLE_HEAD
        made = Table(box=box, title=title or None, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
        for column in columns:
            made.add_column(column, justify="right" if column in right else "left", overflow="fold")
        return made


def _text(*cells: object) -> list[Text]:
    return [Text(str(cell)) for cell in cells]


# -- inspect -------------------------------------------------------------------------------------


def show_inspection(terminal: Terminal, found: Inspection, *, everything: bool, act: str | None) -> None:
    """The table of spaces and its sums.

    Args:
        everything: a row for each space, not one for each kind; no limit on blockers and tensors.
        act: show only spaces of this act, and its blockers.
    """
    rows = list(found.rows) if everything else found.grouped()
    root = _root(found)
    if act is not None:
        rows = [r for r in rows if act in r.acts]
    elif not everything:
        rows = [r for r in rows if [*r.acts] != [WIDENS]]
    table = terminal.table(
        "id",
        "times",
        "tensors",
        "size",
        "free transforms",
        "writers",
        "readers",
        "folds",
        "blocked by",
        right=("id", "times", "writers", "readers", "folds"),
    )
    for row in rows:
        table.add_row(
            *_text(
                row.id,
                f"x{row.repeats}" if row.repeats > 1 else "",
                _tensors(row, everything).replace(root, " "),
                row.structure,
                row.group,
                len(row.writers),
                len(row.readers),
                len(row.folds),
                _blocked(row, everything, act).replace(root, " "),
            )
        )
    terminal.show(table)
    _show_sums(terminal, found, act)


def _root(found: Inspection) -> str:
    """The path that all paths of the model start with (" /encoder/"), which a table need not repeat."""
    texts = [text.partition(" ")[2] for row in found.rows for text in (row.first, row.last)]
    paths = [text for text in texts if text.startswith("/")]
    shared = os.path.commonpath(paths) if paths else "/"
    return f" {shared.rstrip('/')}/"


def _tensors(row: SpaceRow, everything: bool) -> str:
    if everything:
        return "\n".join(row.tensors)
    if len(row.tensors) == 1:
        return row.first
    return f"{row.first}\n... {row.last}" + (f"\n({len(row.tensors)} tensors)" if len(row.tensors) > 2 else "")


def _blocked(row: SpaceRow, everything: bool, only: str | None) -> str:
    """A line for each act, acts with the same blockers on one line: the first blocker and how many more."""
    groups: dict[tuple[str, ...], tuple[list[str], tuple[Obstacle, ...]]] = {}
    for act, obstacles in row.blockers.items():
        if only == act or (only is None and (everything or act != WIDENS)):
            texts = tuple(str(o) for o in obstacles)
            key = texts if everything else (texts[0], str(len(texts)))
            groups.setdefault(key, ([], obstacles))[0].append(act)
    lines = []
    for acts, obstacles in groups.values():
        label = ", ".join(acts)
        if everything:
            lines += [f"{label}: {o}" for o in obstacles]
        else:
            more = f" (+{len(obstacles) - 1} more)" if len(obstacles) > 1 else ""
            lines.append(f"{label}: {obstacles[0]}{more}")
    return "\n".join(lines)


def _show_sums(terminal: Terminal, found: Inspection, only: str | None) -> None:
    opaque = sum(found.opaque.values())
    kinds = ", ".join(f"{op} {n}" for op, n in list(found.opaque.items())[:5])
    terminal.show(
        f"graph {found.graph}: {found.nodes} nodes" + (f", {opaque} of them opaque ({kinds})" if opaque else "")
    )
    for act, count in found.by_act.items():
        if only in (None, act):
            lift = found.lifts.get(act)
            explicit = _lift_text(found, act) if lift else ""
            terminal.show(f"{act}: {count.spaces} spaces, {count.admitted} free ({count.channels} channels){explicit}")
    for freedom in found.freedoms:
        if freedom.unused and only in (None, freedom.act):
            examples = "; ".join(freedom.examples)
            terminal.show(f"no pass has used {freedom.act} in {freedom.unused} spaces, the largest: {examples}")
    groups = ", ".join(f"{name} {n}" for name, n in found.by_group.items())
    terminal.show(f"sets of tensors by what is free: {groups or 'none'}")
    if found.linears:
        shares = ", ".join(f"{act} {n} of {found.linears}" for act, n in found.linears_with.items() if act != WIDENS)
        terminal.show(f"linears whose input takes the transform free of cost: {shares}")
    top = [o for o in found.obstacles if only == o[0] or (only is None and o[0] != WIDENS)][:10]
    if top:
        table = terminal.table("times", "act", "op", "blocks because", right=("times",))
        for act_, op, reason, times in top:
            table.add_row(*_text(times, act_, op, reason))
        terminal.show(table)


def _lift_text(found: Inspection, act: str) -> str:
    ops = {o.lift for r in found.rows for o in r.blockers.get(act, ()) if o.lift}
    return f"; {found.lifts[act]} explicit {' or '.join(sorted(filter(None, ops)))} would lift blockers"


# -- lint ----------------------------------------------------------------------------------------


def show_lint(terminal: Terminal, lint: Lint) -> None:
    """A line for each smooth layer, and under it what breaks it."""
    for verdict in lint.verdicts:
        balance = ", ".join(verdict.balance)
        word = "identity" if verdict.identity else "NOT an identity"
        error = "" if verdict.error is None else f" (relative error {verdict.error:.2e})"
        terminal.show(f"{verdict.smooth} -> {balance}: {word}{error}")
        for reason in verdict.reasons:
            terminal.show(f"  {reason}")
        if not verdict.agree:
            numbers = "the same outputs" if verdict.numerical else "different outputs"
            terminal.show(f"  the two judges disagree: by analysis {word.lower()}, on the inputs tried {numbers}")
    for where in lint.passed_over:
        terminal.show(f"{where}: matches no layer of the model; the tool passes over it")
    if lint.unchecked:
        terminal.show(f"not checked on numbers: {lint.unchecked}")
    good = sum(v.identity and v.agree for v in lint.verdicts)
    terminal.show(f"{good} of {len(lint.verdicts)} are identities")


# -- optimize, opt, verify -----------------------------------------------------------------------


def show_report(terminal: Terminal, report: Report, *, everything: bool = False) -> None:
    """What each pass did, and what became of the numbers.

    Args:
        everything: every site, and every reason for which a pass declined one with its places.
    """
    table = terminal.table(
        "pass", "applied", "declined", "error", "seconds", right=("applied", "declined", "error", "seconds")
    )
    for done in report.passes:
        error = "" if done.error is None else f"{done.error:.1e}"
        declined = sum(done.reasons().values())
        table.add_row(*_text(done.name, len(done.applied), declined or "", error, f"{done.seconds:.2f}"))
    terminal.show(table)
    for done in report.passes:
        for line in _remarks(done, everything):
            terminal.show(f"{done.name}: {line}")
    if isinstance(report.results, Results):
        show_results(terminal, report.results, everything=everything)
    if report.validated:
        terminal.show(f"exact passes were checked in float64 on {report.validated} sets of inputs")
    elif report.unchecked:
        terminal.show(f"NOT checked: {report.unchecked}")
    left = summary(Freedom(**found) for found in report.freedoms)
    if left:
        terminal.show(left)


def _remarks(done: PassReport, everything: bool = False) -> Iterator[str]:
    if done.inserted:
        yield f"{done.inserted} ops inserted"
    for reason, count in done.reasons().most_common(None if everything else 3):
        places = done.declined[reason]
        if everything:
            yield f"declined {count}: {reason}" + (f" ({', '.join(filter(None, places))})" if any(places) else "")
        else:
            yield f"declined {count}: {reason}" + (f" (first: {places[0]})" if places[0] else "")
    if not done.applied:
        yield from (f"nearest miss: {miss}" for miss in done.misses[: None if everything else 1])
    yield from done.notes


def show_results(terminal: Terminal, results: Results, *, everything: bool = False) -> None:
    """Signal-to-noise ratios and outliers by site, the worst first, and the bytes by kind.

    Args:
        everything: every site, in the order of the graph.
    """
    sites = list(results.sites) if everything else results.worst(WORST)
    known = [s for s in sites if (s.weight_db, s.activation_db, s.before, s.after) != (None,) * 4]
    if known:
        more = f", the worst {len(known)} of {len(results.sites)}" if len(known) < len(results.sites) else ""
        columns = ("weight dB", "activation dB", "max / median", "kurtosis", "largest row", "sinks")
        table = terminal.table("site", *columns, right=columns, title=f"signal to noise, and outliers{more}")
        for site in known:
            pair = site.before, site.after
            table.add_row(
                *_text(
                    site.where,
                    _number(site.weight_db),
                    _number(site.activation_db),
                    *(_change(pair, name) for name in ("ratio", "kurtosis", "row_ratio", "sinks")),
                )
            )
        if len(known) > 1:
            medians = results.medians()
            ratios = (_number(medians.get(name)) for name in ("weight dB", "activation dB"))
            changes = (_between(medians, name) for name in ("ratio", "kurtosis", "row_ratio"))
            table.add_row(*_text("median of all", *ratios, *changes, ""))
        terminal.show(table)
        if any(s.before or s.after for s in known):
            terminal.show(
                "max / median: of the channels' largest magnitudes; largest row: norm over the median norm; "
                f"sinks: rows above {MASSIVE:g} times the median"
            )
    before, after = results.before, results.after
    parts = [
        f"{kind} {_megabytes(getattr(before, kind))} -> {_megabytes(getattr(after, kind))}"
        for kind in KINDS
        if getattr(before, kind) or getattr(after, kind)
    ]
    bits = "" if results.bits_per_weight is None else f"; {results.bits_per_weight:.3g} bits per weight, scales counted"
    if parts:
        terminal.show(f"MB of constants: {', '.join(parts)}{bits}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if abs(value) < 1e5 else f"{value:.2g}"


def _change(pair: tuple[Outliers | None, Outliers | None], name: str) -> str:
    """`before -> after`, or the one that is known."""
    values = [getattr(seen, name) for seen in pair if seen is not None]
    return " -> ".join(str(v) if isinstance(v, int) else _number(v) for v in values)


def _between(medians: Mapping[str, float], name: str) -> str:
    known = [medians[key] for key in (f"{name} before", f"{name} after") if key in medians]
    return " -> ".join(map(_number, known))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g}"


def show_conversion(terminal: Terminal, done: Conversion, out: str, *, everything: bool = False) -> None:
    """The report of a conversion, and the sizes before and after."""
    show_report(terminal, done.report, everything=everything)
    if done.bytes_after is not None:
        before = f"{done.bytes_before / 1e6:.1f} MB -> " if done.bytes_before is not None else ""
        terminal.show(f"{out}: {before}{done.bytes_after / 1e6:.1f} MB, {done.seconds:.1f} s")


def show_comparison(terminal: Terminal, found: Comparison) -> None:
    """The largest error of each output, and the verdict."""
    table = terminal.table("output", "relative error", "worst element", right=("relative error",))
    for output in found.outputs:
        table.add_row(*_text(output.name, f"{output.error:.3e}", output.worst))
    terminal.show(table)
    if found.agreement:
        table = terminal.table(
            "the evaluator against the oracle", "relative error", "worst element", right=("relative error",)
        )
        for output in found.agreement:
            table.add_row(*_text(output.name, f"{output.error:.3e}", output.worst))
        terminal.show(table)
    for note in found.notes:
        terminal.show(note)
    if found.narrow:
        terminal.show(f"{found.narrow} nodes could only be evaluated in float32")
    word = "equal" if found.equal else "DIFFERENT"
    by = f", computed by {found.oracle}" if found.oracle is not None else ""
    terminal.show(
        f"{word}: relative error {found.error:.3e}, tolerance {found.tolerance:g}, {found.inputs} sets of inputs{by}"
    )
