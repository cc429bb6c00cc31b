"""What `bench/zoo.py` measures of one model, and the worker process that measures one after another.

Seconds are those of the process, with one thread: what an idle core takes, on a busy machine too.

The worker reads `{"name": ..., "seeds": [...]}` lines and writes one line of figures for each. The parent
ends it when a model takes too long, and starts another.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))
import zoo_models

if TYPE_CHECKING:
    import torch

    from planish.ir.graph import Graph
    from planish.ir.spaces import ChannelSpaces
    from planish.passes.manager import Report

TOLERANCE = 1e-10

# Every exact pass there is, in an order that the manager accepts; those that are not registered are left out.
EXACT = (
    "fold-batch-norm",
    "fold-gates",
    "shift-channels",
    "scale-channels",
    "scale-channels{method=balance}",
    "reparameterize-norm",
    "permute-channels{method=sort}",
    "center-layer-norm{untie=true}",
    "fold-norm-gain{untie=true}",
    "rotate-channels{kind=hadamard space=all untie=true}",
    "transform-channels{kind=kronecker}",
    "insert-hadamard{sites=all}",
    "merge-hadamards",
    "isolate-outliers",
    "merge-linears",
)


def pipeline() -> str:
    """The exact passes that this version has, after `raise`."""
    from planish.passes.pipeline import REGISTRY

    return ",".join(item for item in EXACT if item.partition("{")[0] in REGISTRY)


def graph_inputs(graph: Graph, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among a module's keyword arguments that the graph takes."""
    wanted = {v.name for v in graph.inputs}
    return {name: value for name, value in inputs.items() if name in wanted}


def torch_reference(module: torch.nn.Module, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that the module itself gives in float64, in order."""
    import torch
    from torch.utils._pytree import tree_leaves

    outputs = zoo_models.float64_outputs(module, inputs)
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def evaluated(graph: Graph, inputs: Mapping[str, Any]) -> tuple[list[torch.Tensor], int]:
    """The outputs of a graph in float64, in order, and the number of nodes that took a narrower dtype."""
    import torch

    from planish.ir.evaluator import Evaluator

    evaluator = Evaluator(graph, torch.float64)
    outputs = evaluator.run(graph_inputs(graph, inputs))
    kept = [name for name, _ in graph.outputs if not name.endswith(".updated")]  # buffers that the module mutates
    return [outputs[name] for name in kept], len(evaluator.narrowed)


def with_rotation(graph: Graph, spaces: ChannelSpaces) -> int:
    """Linears of whose input or output the channels (two or more together) may be rotated at no cost."""
    from planish.ir.ops.base import Act
    from planish.report.inspection import reads_weight

    count = 0
    for node in graph.nodes:
        read = reads_weight(node)
        if read is None:
            continue
        edges = [read]
        edges += [(node.port(port), axes) for port, axes in node.op.channels(node) if port < 0]
        count += any(
            found and all(s.admitted and max(map(len, s.blocks)) > 1 for s in found)
            for found in (spaces.at(value, axes, Act.ROTATE) for value, axes in edges if value is not None)
        )
    return count


def applied(report: Report) -> dict[str, int]:
    """The number of sites of each pass."""
    return {p.name: len(p.applied) for p in report.passes if p.applied}


def measure(name: str, seeds: list[int]) -> dict[str, Any]:
    """The figures of one model. A failure is a figure: `failed` says at which step, `reason` why."""
    found: dict[str, Any] = {"name": name, "captured": False, "errors": [], "failed": ""}
    step = "build"

    def at(what: str) -> None:
        nonlocal step
        step = what

    try:
        for seed in seeds:
            _measure_seed(name, seed, found, at)
    except Exception as error:  # noqa: BLE001  one model's failure is a row of the table
        found["failed"], found["reason"] = step, f"{type(error).__name__}: {error}"
        found["traceback"] = traceback.format_exc().splitlines()[-12:]
    return found


def _measure_seed(name: str, seed: int, found: dict[str, Any], at: Any) -> None:
    import planish
    from planish.passes.manager import Instrument, Pipeline
    from planish.report.inspection import inspect

    module, inputs = zoo_models.build(name, seed)
    start = time.process_time()
    at("capture")
    graph = planish.capture(module, inputs)
    captured = time.process_time() - start
    at("evaluate")
    expected, narrow = evaluated(graph, inputs)
    found["captured"] = True
    against_torch = zoo_models.largest_difference(expected, torch_reference(module, inputs))
    named, report = Pipeline("fold-constants,name-constants").run(graph, validate=False)
    if report["name-constants"].applied:  # not an exact pass: what follows is compared with its result
        expected = evaluated(named, inputs)[0]
    at("raise")
    start = time.process_time()
    raised, _ = Pipeline("raise").run(graph, validate=False)
    raising = time.process_time() - start
    if "nodes" not in found:
        at("analysis")
        start = time.process_time()
        spaces = planish.ir.spaces.analyse(raised)
        seen = inspect(raised, spaces=spaces)
        analysis = time.process_time() - start
        folds = "fold-batch-norm,fold-gates,center-layer-norm{untie=true},fold-norm-gain{untie=true}"
        folded, _ = Pipeline(folds).run(raised, validate=False)
        found |= {
            "seconds": {"capture": captured, "raise": raising, "analysis": analysis},
            "captured_nodes": len(graph),
            "nodes": seen.nodes,
            "opaque": dict(seen.opaque),
            "spaces": {act: [c.spaces, c.admitted] for act, c in seen.by_act.items()},
            "groups": seen.by_group,
            "linears": seen.linears,
            "linears_with_scale": seen.linears_with["scale"],
            "linears_with_rotation": with_rotation(raised, spaces),
            "linears_with_rotation_folded": with_rotation(folded, planish.ir.spaces.analyse(folded)),
            "blockers": Counter(op for _, op, _, n in seen.obstacles for _ in range(n)).most_common(8),
            "ops": Counter(n.op.name for n in raised.nodes).most_common(),
        }
    at("collect")
    batches = [graph_inputs(raised, more) for more in zoo_models.more_inputs(name, seed, 2)]
    stats = planish.collect(raised, batches)

    class Progress(Instrument):
        def before(self, instance: Any, graph: Any) -> None:
            at(instance.name)

    at("passes")
    start = time.process_time()
    after, report = Pipeline(pipeline()).run(raised, stats=stats, validate=False, seed=seed, instruments=[Progress()])
    found["seconds"].setdefault("passes", time.process_time() - start)
    found.setdefault("applied", applied(report))
    at("evaluate after the passes")
    got, narrow_after = evaluated(after, inputs)
    errors = {
        "torch": against_torch,
        "passes": zoo_models.largest_difference(got, expected),
        "narrow": max(narrow, narrow_after),
    }
    if not max(errors["torch"], errors["passes"]) <= TOLERANCE:
        errors["culprit"] = culprit(raised, stats, inputs, expected, seed)
    found["errors"].append(errors)


def culprit(raised: Graph, stats: Any, inputs: Any, expected: list[torch.Tensor], seed: int) -> str:
    """The first pass after which the outputs differ; empty if none does (the capture itself does then)."""
    from planish.passes.manager import Instrument, Pipeline

    if not zoo_models.largest_difference(evaluated(raised, inputs)[0], expected) <= TOLERANCE:
        return "raise"
    found: list[str] = []

    class Watch(Instrument):
        def after(self, instance: Any, graph: Graph, report: Any) -> None:
            if not found and report.applied:
                error = zoo_models.largest_difference(evaluated(graph, inputs)[0], expected)
                if not error <= TOLERANCE:
                    found.append(f"{instance.name} ({error:.1e})")

    Pipeline(pipeline()).run(raised, stats=stats, validate=False, seed=seed, instruments=[Watch()])
    return found[0] if found else ""


def main() -> int:
    """Serve requests from stdin."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a model prints goes to stderr
    warnings.simplefilter("ignore")
    import logging

    import torch

    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    import planish.ir.spaces
    import planish.passes.manager  # noqa: F401

    zoo_models.entries()
    answers.write('{"ready": true}\n')
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(measure(request["name"], request["seeds"]), default=float) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
