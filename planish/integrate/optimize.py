"""Optimise a torch module by a recipe: a torch module in, a torch module out.

    q = planish.optimize(model, example_inputs, recipe="w8a8-token", calibration=batches)

The model is captured on its example inputs with every size left open that it leaves open, rewritten and quantised by
the recipe's passes, and emitted with kernels (`planish.codegen.torch_regions`). The module that comes out is called as
the model was, runs by itself, and goes through torch.compile and torch.export.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import nn

from planish.capture.from_fx import arguments
from planish.codegen.lower import Lower
from planish.integrate.api import capture
from planish.integrate.backend_options import DEFAULT, pipeline_of, uncalibrated
from planish.integrate.convert import CalibrationOptions, Progress, _plain, run_pipeline
from planish.integrate.optimized import QUANTISED, Optimization, OptimizedModule
from planish.integrate.recipes import Recipe
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.graph import Graph
from planish.ir.rewriter import Rewriter
from planish.ir.stats import Stats
from planish.passes.manager import Instrument, Pipeline, Report

if TYPE_CHECKING:
    Batches = Iterable[Any]

__all__ = ["calibration_of", "check_quantised", "optimize", "passes_of"]


def optimize(
    model: nn.Module,
    example_inputs: Any,
    recipe: str | Path | Recipe | Pipeline = DEFAULT,
    calibration: str | Path | Batches | Stats | CalibrationOptions | None = None,
    *,
    dynamic_shapes: Any = "auto",
    seed: int = 0,
    validate: bool = True,
    instruments: Iterable[Instrument] = (),
    progress: Progress = _plain,
) -> OptimizedModule:
    """Quantise a torch module by a recipe.

    Args:
        model: the module; it is not changed, and what comes out shares no memory with it.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a pair of both.
        recipe: the name of a recipe, a YAML file, or the text of a pipeline.
        calibration: batches, each in the form of `example_inputs` or a dict by the names of the inputs; a path to
            data; statistics; or one of these with options. None: passes that read statistics are left out.
        dynamic_shapes: as for `torch.export.export`; "auto": every size that the model leaves open is.
        seed: of every random choice.
        validate: check every exact pass in float64.
        instruments: called around every pass.
        progress: wraps long loops in a progress bar.

    Returns:
        A module in evaluation mode, on the model's device, called as the model is. `module.planish` holds its graph
        and the report of the passes.

    Raises:
        PlanishError: it is no module, it cannot be captured on these inputs, a bad recipe or calibration, a recipe
            that needs calibration to round at all, or nothing in the model could be quantised.
    """
    given: Any = model
    if not isinstance(given, nn.Module):
        hint = "planish.convert takes ONNX files" if isinstance(given, str | Path) else None
        raise PlanishError(f"model: expected a torch.nn.Module, got {type(given).__name__}", hint=hint)
    name, passes, left_out = passes_of(recipe, calibrated=calibration is not None)
    graph, notes = _captured(model, example_inputs, dynamic_shapes)
    result, report, _ = run_pipeline(
        graph,
        passes,
        calibration=calibration_of(calibration, graph),
        seed=seed,
        validate=validate,
        instruments=instruments,
        progress=progress,
    )
    check_quantised(result, report, name, type(model).__name__)
    _part(result, graph)
    if left_out:
        notes.append(f"without calibration did not run as written: {', '.join(left_out)}")
    device = graph.meta.get("torch.device")
    where = torch.device(device if isinstance(device, str) else "cpu")
    return OptimizedModule(Optimization(result, name, where, None, report, tuple(notes)))


def passes_of(recipe: Recipe | Pipeline | str | Path, *, calibrated: bool) -> tuple[str, Pipeline, list[str]]:
    """The passes of a recipe that torch code is made by: all but the lowering for ONNX.

    Args:
        recipe: by its name, from a file, or the text of a pipeline.
        calibrated: whether there are statistics; without them `backend_options.uncalibrated` says what is left.

    Returns:
        The name, the pipeline, and the passes that were left out or changed for want of calibration.

    Raises:
        PlanishError: no such recipe, or activations with calibrated ranges and no statistics.
    """
    name, held = pipeline_of(recipe)
    pipeline = Pipeline([p for p in held.passes if not isinstance(p, Lower)])
    if calibrated:
        return name, pipeline, []
    try:
        return (name, *uncalibrated(pipeline))
    except PlanishError as error:
        hint = f"give some (calibration=), or take a recipe that does without: {DEFAULT}"
        raise PlanishError(f"recipe '{name}': needs calibration data", where=error.where, hint=hint) from error


def check_quantised(graph: Graph, report: Report, recipe: str, model: str) -> None:
    """Refuse a graph in which nothing was quantised.

    Raises:
        PlanishError: with what the passes that round said.
    """
    if any(node.op.name in QUANTISED for node in graph.nodes):
        return
    reasons: list[str] = []
    for done in report.passes:
        if done.name == "quantize":
            counted = sorted(done.reasons().items(), key=lambda pair: -pair[1])
            reasons += [f"{count} x {reason}" for reason, count in counted[:3]] or done.misses
    raise PlanishError(
        f"{model}: nothing was quantised by recipe '{recipe}'",
        where="; ".join(reasons) or None,
        hint="planish.inspect(planish.capture(model, example_inputs)) shows what is in the model",
    )


# -- capture ---------------------------------------------------------------------------------------------


def _captured(model: nn.Module, inputs: Any, dynamic: Any) -> tuple[Graph, list[str]]:
    """The graph, and what the user should know of it."""
    if not (isinstance(dynamic, str) and dynamic == "auto"):
        return capture(model, inputs, dynamic_shapes=dynamic), []
    args, kwargs = arguments(inputs)
    shapes = _open(model, args, kwargs)
    if shapes is None:
        return capture(model, inputs), ["its sizes are those of the example inputs: its arguments have no names"]
    ones = any(isinstance(t, torch.Tensor) and 1 in t.shape for t in pytree.tree_leaves((args, kwargs)))
    try:
        with torch.fx.experimental._config.patch(backed_size_oblivious=ones):  # type: ignore[attr-defined]
            return capture(model, inputs, dynamic_shapes=shapes), []
    except PlanishError as error:
        graph = capture(model, inputs)
        return graph, [f"its sizes are those of the example inputs: {error.what}"]


def _open(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """`dynamic_shapes` that leave every size of every tensor open; None if the arguments cannot be named."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return None
    auto = torch.export.Dim.AUTO

    def shapes(leaf: Any) -> Any:
        return dict.fromkeys(range(leaf.dim()), auto) if isinstance(leaf, torch.Tensor) else None

    return {name: pytree.tree_map(shapes, value) for name, value in bound.arguments.items()}


def _part(result: Graph, captured: Graph) -> None:
    """Copy the constants that a result shares with the model's parameters."""
    shared = {id(v.constant) for v in captured.values.values() if v.constant is not None}
    with Rewriter(result) as rewriter:
        for value in result.constants:
            held = value.constant
            if held is not None and id(held) in shared and value not in result.output_values():
                copied = Constant(np.array(held._raw()), held.dtype, held.shape)
                rewriter.set_constant(value, copied, readers="all")


# -- calibration -----------------------------------------------------------------------------------------


def calibration_of(data: Any, graph: Graph) -> Any:
    """Calibration data as `run_pipeline` takes it: batches by the names of the graph's inputs.

    Args:
        data: as for `optimize`.
    """
    if data is None or isinstance(data, Stats | str | Path):
        return data
    if isinstance(data, CalibrationOptions):
        held = data.data
        return data if isinstance(held, str | Path) else replace(data, data=calibration_of(held, graph))
    if isinstance(data, torch.Tensor | np.ndarray | Mapping) or not isinstance(data, Iterable):
        raise PlanishError(
            f"calibration: expected batches, got one {type(data).__name__}", hint="calibration=[batch, batch, ...]"
        )
    return _Batches(data, graph)


class _Batches:
    """Batches in the form of the model's arguments, as dicts of its inputs."""

    def __init__(self, batches: Iterable[Any], graph: Graph) -> None:
        self.batches = batches
        self.graph = graph
        self.names = [v.name for v in graph.inputs if v.constant is None]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.batches:
            yield self._named(batch)

    def __len__(self) -> int:
        return len(self.batches) if isinstance(self.batches, Sized) else 0

    def _named(self, batch: Any) -> dict[str, Any]:
        if isinstance(batch, Mapping) and set(self.names) <= {*batch}:
            return {name: batch[name] for name in self.names}
        args, kwargs = arguments(batch)
        spec = pytree.treespec_loads(str(self.graph.meta["torch.in_spec"]))
        order = spec.children()[1].context or []
        named = {key: kwargs[key] for key in order if key in kwargs}
        leaves, found = pytree.tree_flatten((args, named))
        if found != spec or len(named) != len(kwargs):
            raise PlanishError(
                f"calibration: a batch does not have the form of the example inputs; the inputs are "
                f"{', '.join(self.names)}",
                hint="give each batch as a dict by these names",
            )
        kept: Any = self.graph.meta["torch.inputs"]
        return {str(what): leaf for (kind, what), leaf in zip(kept, leaves, strict=True) if kind == "input"}
