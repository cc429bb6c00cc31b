"""From a captured graph to a quantised one, as the options of the torch.compile backend ask for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from planish.calibrate.collect import check_weights
from planish.capture.from_dynamo import Captured
from planish.integrate.backend_cache import cached
from planish.integrate.backend_options import BackendOptions, uncalibrated
from planish.integrate.calibrating import calibration_of, head_of, translated
from planish.integrate.convert import Rest
from planish.ir.errors import PlanishError
from planish.ir.graph import Graph
from planish.ir.stats import Stats
from planish.ir.types import is_float
from planish.passes.base import Pass
from planish.passes.manager import Pipeline, Report
from planish.passes.quantize import Quantize

WEIGHTED = ("linear", "gemm", "conv")


class Float(Exception):
    """The reason why a graph stays in float; empty: there is nothing to say."""


class Uncalibrated(Float):
    """The recipe needs statistics, and there are none yet."""


def quantised(
    captured: Captured,
    options: BackendOptions,
    weights: Sequence[torch.Tensor],
    say: Callable[[str], None],
    *,
    keep: bool = False,
) -> Graph:
    """Run the passes of the recipe.

    Args:
        captured: the graph; not changed.
        weights: the tensors that it was captured with, to find what was calibrated.
        say: warns.
        keep: on disk, where the options say so too.

    Raises:
        Float: nothing was quantised.
        PlanishError: a pass failed, or a weight is not finite.
    """
    graph, pipeline = captured.graph, options.pipeline
    check_weights(graph)
    stats: Stats | None = None
    data: list[Mapping[str, torch.Tensor]] | None = None
    head = 0
    if any(p.needs_stats for p in pipeline.passes):
        calibration = calibration_of(weights, options.calibration)
        if calibration is None:
            pipeline = _without(options, say)
        else:
            head = head_of(pipeline.passes)
            if head:
                opening = Pipeline(pipeline.passes[:head])
                graph, _ = opening.run(graph, validate=options.validate, seed=options.seed)
            stats = translated(calibration, graph, pipeline.passes[:head])
            names = {v.name for v in captured.graph.inputs}
            data = [batch for batch in calibration.data if set(batch) == names] or None
            if data is None:
                pipeline = _by_statistics(pipeline)

    def make() -> Graph:
        rest = Rest(pipeline.passes, head)
        made = rest.run(graph, stats=stats, data=data, validate=options.validate, seed=options.seed)
        return _checked(*made)

    if not (keep and options.cache):
        return make()
    return cached(graph, [str(pipeline), str(head), str(options.seed)], stats, data, make)


def _by_statistics(pipeline: Pipeline) -> Pipeline:
    """A recipe where there are statistics but no data: GPTQ takes what linears read in the float graph."""
    found: list[Pass] = []
    for item in pipeline.passes:
        solved = isinstance(item, Quantize) and item.inputs == "quantised"
        found.append(replace(item, inputs="float") if solved else item)  # type: ignore[call-arg]
    return Pipeline(found)


def _without(options: BackendOptions, say: Callable[[str], None]) -> Pipeline:
    """What is left of the recipe where there are no statistics."""
    hint = "run a few batches inside `with planish.calibrating(model):`"
    if options.named and options.strict:
        raise PlanishError(f"recipe '{options.recipe}': needs calibration", hint=hint)
    try:
        pipeline, without = uncalibrated(options.pipeline)
    except PlanishError as error:
        raise Uncalibrated(f"recipe '{options.recipe}' needs calibration; {hint}") from error
    if options.named:
        say(f"recipe '{options.recipe}' without calibration: left out {', '.join(without)}; {hint}")
    return pipeline


def _checked(graph: Graph, report: Report) -> Graph:
    """The graph, if a pass has quantised anything of it.

    Raises:
        Float: with the reasons that the passes give.
    """
    if any("quantize" in n.op.name for n in graph.nodes):
        return graph
    reasons = [f"{reason} ({places[0]})" for p in report.passes for reason, places in p.declined.items()]
    last = report.passes[-1] if report.passes else None
    if last is not None and last.declined:
        reasons = [f"{reason} ({places[0]})" for reason, places in last.declined.items()]
        raise Float(f"nothing can be quantised: {'; '.join(reasons[:3])}")
    raise Float(_unread(graph))


def _unread(graph: Graph) -> str:
    """Why nothing of a graph can be quantised that has what one would expect to be; else ""."""
    for node in graph.nodes:
        given = [v for v in node.operands if v is not None]
        held = [v for v in given if v.is_constant and v.rank is not None and v.rank >= 2 and is_float(v.dtype)]
        if node.op.opaque and held:
            return f"nothing can be quantised: planish does not know what {node.op.name} makes of {held[0].name}"
        if node.op.name in WEIGHTED and not given[1].is_constant:
            return f"nothing can be quantised: the weight of {node.result.name} is no parameter or buffer of the model"
    return ""
