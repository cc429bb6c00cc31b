"""Convert an ONNX model to a better ONNX model by a recipe.

    planish.convert("model.onnx", "model.int8.onnx", recipe="w8a8-dynamic", calibration=batches)

Statistics are collected on the graph as the exact passes before the first one that reads them leave
it: what those raise or merge is then what the statistics describe.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planish.calibrate.collect import check_weights, collect
from planish.calibrate.data import Calibration, load_calibration
from planish.codegen.lower import Lower
from planish.codegen.onnx_emission import AXIS_OPSET, Emission, check_opset, check_target
from planish.integrate.api import capture, to_onnx
from planish.integrate.recipes import Recipe, load_recipe
from planish.ir.errors import PlanishError
from planish.ir.graph import Graph
from planish.ir.stats import Stats
from planish.ir.types import TensorType
from planish.passes.base import Exactness, Pass
from planish.passes.manager import Instrument, Pipeline, Report
from planish.report.freedoms import FreedomInstrument, freedoms
from planish.report.results import ResultInstrument

if TYPE_CHECKING:
    import numpy as np
    import torch
    from onnx import ModelProto

    Batches = Iterable[Mapping[str, np.ndarray | torch.Tensor]]

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def _plain(items: Iterable[Any], label: str) -> Iterable[Any]:
    return items


@dataclass(frozen=True)
class CalibrationOptions:
    """Where calibration data comes from and how it is read.

    Attributes:
        data: a path (see `planish.calibrate.data`), batches, or statistics that are already there.
        tokenizer: for text: the folder of the tokenizer.
        row_mask: the input that marks the rows that count; by default what the data itself says.
        samples: use only so many.
        batch: samples per batch.
        length: for text: tokens at which a sample is cut.
        rows: sampled rows per value.
    """

    data: str | Path | Batches | Stats
    tokenizer: str | Path | None = None
    row_mask: str | None = None
    samples: int | None = None
    batch: int = 8
    length: int = 128
    rows: int = 2048


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        recipe: its name, or the pipeline text where there was none.
        pipeline: the text of the pipeline.
        target: of the emission.
        seed: of every random choice.
        report: of the passes.
        calibration: what the statistics were collected on.
        bytes_before, bytes_after: sizes of the model files, external data included; None if not from a file.
        seconds: the whole conversion.
    """

    recipe: str
    pipeline: str
    target: str
    seed: int
    report: Report
    calibration: dict[str, str] = field(default_factory=dict)
    bytes_before: int | None = None
    bytes_after: int | None = None
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**vars(self), "report": self.report.as_dict()}


def convert(
    model: str | Path | ModelProto | Graph,
    out: str | Path,
    recipe: str | Path | Recipe,
    *,
    calibration: str | Path | Batches | Stats | CalibrationOptions | None = None,
    target: str | None = None,
    opset: int | None = None,
    seed: int = 0,
    validate: bool = True,
    instruments: Iterable[Instrument] = (),
    progress: Progress = _plain,
) -> Conversion:
    """Rewrite a model by a recipe and write it as ONNX.

    Args:
        model: as for `planish.capture`.
        out: the file to write.
        recipe: the name of a recipe, or a YAML file.
        calibration: data (a path or batches), statistics, or both with options.
        target: "onnx" or "ort"; the recipe's by default.
        opset: the version of ONNX's default domain; the model's own by default.
        seed: of every random choice.
        validate: check every exact pass in float64.
        instruments: called around every pass.
        progress: wraps long loops in a progress bar.

    Raises:
        PlanishError: a bad model, recipe, option or output; nothing is written then.
    """
    start, began = time.perf_counter(), time.time()
    out = Path(out)
    if out.suffix in (".ir", ".mlir"):
        raise PlanishError(f"{out}: a recipe writes ONNX", hint=f"planish opt -p PIPELINE writes {out.suffix}")
    chosen = load_recipe(recipe)
    if chosen.needs.calibration and calibration is None:
        raise PlanishError(
            f"recipe '{chosen.name}': needs calibration data", hint="give some: --calibrate, or calibration="
        )
    goal = target or chosen.target
    check_target(goal)
    chosen.check_target(goal)
    passes = for_opset(lowered(chosen.passes(), goal), opset)
    check_output(out)
    graph = capture(model)
    check_weights(graph)
    result, report, stats = run_pipeline(
        graph,
        passes,
        calibration=calibration,
        seed=seed,
        validate=validate,
        instruments=instruments,
        progress=progress,
        ready=lambda raised: check_emission(raised, goal, opset),
    )
    before = model_size(model, graph)
    to_onnx(result, out, target=goal, opset=opset)
    return Conversion(
        chosen.name,
        chosen.pipeline,
        goal,
        seed,
        report,
        dict(stats.source) if stats is not None else {},
        before,
        _written_size(out, began),
        time.perf_counter() - start,
    )


def lowered(pipeline: Pipeline, target: str) -> Pipeline:
    """The pipeline with the lowering to a target behind it, unless it has one of its own."""
    if any(isinstance(p, Lower) for p in pipeline.passes):
        return pipeline
    return Pipeline([*pipeline.passes, Lower(target=target)])  # type: ignore[arg-type]


def for_opset(pipeline: Pipeline, opset: int | None) -> Pipeline:
    """The pipeline with its lowering told at which opset the graph will be written, where that was asked for.

    Raises:
        PlanishError: there is no such opset, or it cannot say what the pipeline makes.
    """
    if opset is None:
        return pipeline
    check_opset(opset)
    passes = pipeline.passes
    if opset < AXIS_OPSET and any("quantised" in p.gives for p in passes):
        raise PlanishError(f"opset {opset}: has no scales per channel", hint=f"write at opset {AXIS_OPSET} or later")
    return Pipeline([replace(p, opset=p.opset or opset) if isinstance(p, Lower) else p for p in passes])


def check_emission(graph: Graph, target: str, opset: int | None) -> None:
    """An error if a graph could not be written at the opset that was asked for: before the long work, not after it.

    Raises:
        PlanishError: an op has no form there.
    """
    if opset is not None:
        Emission(graph, opset=opset, target=target).model()


def run_pipeline(
    graph: Graph,
    pipeline: Pipeline,
    *,
    calibration: str | Path | Batches | Stats | CalibrationOptions | None = None,
    seed: int = 0,
    validate: bool = True,
    instruments: Iterable[Instrument] = (),
    progress: Progress = _plain,
    ready: Callable[[Graph], None] = lambda graph: None,
) -> tuple[Graph, Report, Stats | None]:
    """Run a pipeline on a graph, collecting the statistics that it needs on the way.

    The passes before the first that reads statistics (or that changes numbers) run first; calibration
    data is evaluated on what they make; then the rest runs.

    Args:
        ready: called with the graph on which statistics will be collected; it may refuse it.

    Raises:
        PlanishError: as `Pipeline.run` and `collect`.
    """
    before_rounding, looking = FreedomInstrument(), ResultInstrument(graph)
    instruments = [*instruments, before_rounding, looking]

    def looked_at(result: Graph, report: Report) -> Report:
        left = freedoms(before_rounding.graph or result, report.used, progress=progress)
        report.freedoms = [found.as_dict() for found in left]
        report.results = looking.results(result, report.passes)
        return report

    if calibration is None or isinstance(calibration, Stats):
        stats = looking.stats = calibration
        result, report = pipeline.run(
            graph, stats=stats, validate=validate, seed=seed, instruments=instruments, progress=progress
        )
        return result, looked_at(result, report), stats
    options = calibration
    if not isinstance(options, CalibrationOptions):
        options = CalibrationOptions(options)
    batches, mask, source = _batches(options, graph)
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise PlanishError("calibration: no data; expected at least one batch")
    if not isinstance(first, Mapping):
        raise PlanishError(
            f"calibration: expected batches, each a dict of name to tensor, got a batch of {type(first).__name__}",
            hint=f"the inputs are {', '.join(v.name for v in graph.inputs if v.constant is None)}",
        )
    samples = _few(graph, first) if validate else []
    head = _head(pipeline.passes)
    raised, opening = graph, Report(seed=seed)
    if head:
        raised, opening = Pipeline(pipeline.passes[:head]).run(
            graph, samples=samples, validate=validate, seed=seed, instruments=instruments, progress=progress
        )
    ready(raised)
    rest = pipeline.passes[head:]
    kept = [first, *iterator] if any(p.reads_data for p in rest) else None
    stats = collect(
        raised,
        _sized(itertools.chain([first], iterator), batches) if kept is None else kept,
        rows=options.rows,
        row_mask=mask,
        seed=seed,
        source=source,
        progress=progress,
    )
    looking.stats = stats
    if head == len(pipeline.passes):
        return raised, looked_at(raised, opening), stats
    result, report = Rest(pipeline.passes, head).run(
        raised,
        stats=stats,
        samples=samples,
        data=kept,
        row_mask=mask,
        validate=validate,
        seed=seed,
        instruments=instruments,
        progress=progress,
    )
    report.passes[:0] = opening.passes
    for act, axes in opening.used.items():
        report.used.setdefault(act, set()).update(axes)
    return result, looked_at(result, report), stats


class Rest(Pipeline):
    """The passes after the first `head`, in an order that was checked together with those."""

    def __init__(self, passes: Sequence[Pass], head: int) -> None:
        super().__init__(passes)
        self.passes = list(passes[head:])


def _head(passes: Sequence[Pass]) -> int:
    """How many passes run before statistics are collected."""
    for index, instance in enumerate(passes):
        if instance.needs_stats or instance.exactness not in (Exactness.EXACT, Exactness.IDENTITY):
            return index
    return len(passes)


class _Sized:
    """An iterator with the length of what it goes over, for progress bars."""

    def __init__(self, items: Iterable[Any], length: int) -> None:
        self.items = items
        self.length = length

    def __iter__(self) -> Any:
        return iter(self.items)

    def __len__(self) -> int:
        return self.length


def _sized(items: Iterable[Any], like: Any) -> Iterable[Any]:
    return _Sized(items, len(like)) if hasattr(like, "__len__") else items


def _batches(options: CalibrationOptions, graph: Graph) -> tuple[Iterable[Any], str | None, str]:
    data = options.data
    if isinstance(data, str | Path):
        data = load_calibration(data, graph, options.tokenizer, options.batch, options.length, options.samples)
    if isinstance(data, Calibration):
        return data, options.row_mask or data.row_mask, data.source
    if isinstance(data, Stats):
        raise PlanishError("calibration: statistics take no options; give them themselves")
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise PlanishError(
            f"calibration: expected batches, each a dict of name to tensor, got one {type(data).__name__}",
            hint="calibration=[batch]",
        )
    if options.samples is not None:
        data = itertools.islice(data, max(1, options.samples // options.batch))
    return data, options.row_mask, "batches"


def _few(graph: Graph, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first two samples of a batch, to validate exact passes on; the whole batch if it is fixed."""
    import torch

    tensors = {n: torch.as_tensor(a) if _numeric(a) else a for n, a in batch.items()}
    inputs = {v.name: v.type for v in graph.inputs}
    free = all(
        isinstance(t := inputs.get(n), TensorType) and t.shape and not isinstance(t.shape[0], int) for n in tensors
    )
    if free:
        tensors = {n: t[:2] for n, t in tensors.items()}
    return [tensors]


def _numeric(array: Any) -> bool:
    return not hasattr(array, "dtype") or getattr(array.dtype, "kind", "f") in "biuf"


# -- files ---------------------------------------------------------------------------------------


def check_output(path: str | Path) -> None:
    """An error if a file could not be written there: asked before the long work, not after it.

    Raises:
        PlanishError: the folder is missing or takes no new file, or the path is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise PlanishError(f"{path}: cannot be written: is a directory")
    folder = path.parent
    if not folder.exists():
        raise PlanishError(f"{path}: cannot be written: the folder {folder} does not exist")
    try:
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=folder)
        os.close(number)
        os.unlink(name)
    except OSError as error:
        raise PlanishError(f"{path}: cannot be written: {error.strerror or error}") from error


def check_apart(path: str | Path, option: str, others: Mapping[str, str | Path | None]) -> None:
    """An error if what an option writes would replace a file that is read, or another that is written.

    Args:
        others: those files, by what an error calls them.

    Raises:
        PlanishError: it would.
    """
    for what, other in others.items():
        if other is not None and Path(other).resolve() == Path(path).resolve():
            raise PlanishError(f"option {option}: {path}: is {what}", hint="write to another name")


def model_size(model: Any, graph: Graph) -> int | None:
    """Bytes of a model's file and of the external data that its graph reads."""
    if not isinstance(model, str | Path) or not Path(model).is_file():
        return None
    path = Path(model)
    files = {c.file.path for v in graph.constants if (c := v.constant) is not None and c.file is not None}
    return sum(f.stat().st_size for f in {path, *files} if f.is_file())


def _written_size(path: Path, began: float) -> int:
    """Bytes of the file that was just written and of its data file, if one was written with it."""
    files = [path, path.with_name(path.name + ".data")]
    return sum(f.stat().st_size for f in files if f.is_file() and f.stat().st_mtime >= began - 2.0)
