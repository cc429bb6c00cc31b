"""PNG pictures of results: outliers before and after, one file for each activation that is read, and an overview.

    00-overview.png      max / median of the channels, and signal to noise, site by site
    NN-<site>.png        left: max |x| of the channels, largest first; right: how often values occur

Drawn without a display. The same results give the same bytes. Needs the extra `plots` (matplotlib).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from planish.ir.errors import PlanishError
from planish.ir.files import atomic
from planish.report.outliers import BINS, Outliers
from planish.report.results import Results, Site

BEFORE, AFTER = "#b2562d", "#2d6fb2"
DOTS = 100  # per inch


def check_plots(folder: str | Path) -> None:
    """An error if pictures could not be drawn there: asked before the long work, not after it.

    Raises:
        PlanishError: matplotlib is missing, or the folder cannot be made.
    """
    if find_spec("matplotlib") is None:
        raise PlanishError("plots: need matplotlib, which is not installed", hint="pip install 'planish[plots]'")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanishError(f"{folder}: cannot be written: {error.strerror or error}") from error


def draw(
    results: Results,
    folder: str | Path,
    *,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, label: items,
) -> list[Path]:
    """Write the pictures; their paths.

    Args:
        folder: made if it is not there.
        progress: wraps the loop over the sites in a progress bar.

    Raises:
        PlanishError: matplotlib is missing, or a file cannot be written.
    """
    check_plots(folder)
    import matplotlib as mpl

    once: dict[str, Site] = {}
    for site in results.sites:
        if site.before is not None or site.after is not None:
            once.setdefault(site.reads, site)
    width = len(str(len(once)))
    with mpl.rc_context():
        mpl.rcdefaults()
        written = [_save(_overview(results), Path(folder) / f"{'0' * max(width, 2)}-overview.png")]
        for number, site in enumerate(progress(list(once.values()), "drawing"), 1):
            name = re.sub(r"[^A-Za-z0-9.]+", "-", site.where).strip("-.")[-80:]
            written.append(_save(_site(site), Path(folder) / f"{number:0{max(width, 2)}}-{name}.png"))
    return written


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * columns, 3.2 * rows), dpi=DOTS, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    with atomic(path) as handle:
        handle.write(buffer.getvalue())
    return path


def _overview(results: Results) -> Any:
    figure, ((ratios,), (noise,)) = _figure(2, 1)
    sites = results.sites
    for axes in (ratios, noise):
        axes.grid(alpha=0.3)
        axes.set_xlim(-0.5, max(len(sites), 1) - 0.5)
    _points(ratios, [s.before.ratio if s.before else None for s in sites], BEFORE, "before")
    _points(ratios, [s.after.ratio if s.after else None for s in sites], AFTER, "after")
    ratios.set_yscale("log", base=2)
    ratios.set_ylabel("max / median channel")
    _points(noise, [s.weight_db for s in sites], BEFORE, "weights")
    _points(noise, [s.activation_db for s in sites], AFTER, "activations")
    noise.set_ylabel("signal to noise, dB")
    noise.set_xlabel("site, in the order of the graph")
    return figure


def _points(axes: Any, values: list[float | None], colour: str, name: str) -> None:
    known = [(i, v) for i, v in enumerate(values) if v is not None and np.isfinite(v)]
    if known:
        axes.plot(*zip(*known, strict=True), ".", color=colour, label=name)
        axes.legend(loc="best")


def _site(site: Site) -> Any:
    figure, ((channels, values),) = _figure(1, 2)
    figure.suptitle(site.where, fontsize="medium")
    for seen, colour, name in ((site.before, BEFORE, "before"), (site.after, AFTER, "after")):
        if seen is not None:
            ordered = np.sort(seen.channels)[::-1]
            label = f"{name}: max / median {seen.ratio:.3g}"
            channels.plot(np.arange(1, len(ordered) + 1), ordered, color=colour, label=label)
            _histogram(values, seen, colour, f"{name}: kurtosis {seen.kurtosis:.3g}, sinks {seen.sinks}")
    channels.set_ylim(bottom=0.0)
    channels.set_xlabel("channels, largest first")
    channels.set_ylabel("max |x|")
    values.set_yscale("log")
    values.set_xlabel("x / max |x|")
    values.set_ylabel("sampled elements")
    for axes in (channels, values):
        axes.grid(alpha=0.3)
        axes.legend(loc="best", fontsize="small")
    return figure


def _histogram(axes: Any, seen: Outliers, colour: str, name: str) -> None:
    edges = np.linspace(-1.0, 1.0, BINS + 1)
    axes.stairs(np.maximum(seen.counts, 0.5), edges, color=colour, label=name)  # half an element: below the axis
