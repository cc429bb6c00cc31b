"""Models before and after every exact pass, run by torch-mlir's linalg on the CPU: an oracle without torch's kernels.

    python bench/oracle.py [--only MODEL ...] [--quick] [--json FILE]

Errors are relative, in float64, the largest over two sets of random inputs and all outputs: the graph after the passes
against the graph before them, both by the oracle; and planish's evaluator (torch) against the oracle on each. MiniLM
on 2 x 8 tokens, with the statistics of real sentences; the others are tiny random models of the zoo.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import assets
import zoo_measure
import zoo_models
from common import Outcome, Target, arguments, note, table

if TYPE_CHECKING:
    from planish import Graph

ZOO = ("llama", "gemma2", "bert", "t5", "qwen3-moe", "mamba", "swin", "resnet")
QUICK = ("llama", "mamba", "resnet")
MINILM = "minilm"
SENTENCES = 16


def before_and_after(name: str, seed: int = 0) -> tuple[Graph, Graph]:
    """The graph of a model as it was captured, and after every exact pass."""
    import planish

    if name == MINILM:
        graph = planish.capture(assets.minilm_onnx())
        batches: list[Any] = [assets.encode(assets.sentences("calibration", SENTENCES), 32)]
    else:
        module, inputs = zoo_models.build(name, seed)
        graph = planish.capture(module, inputs)
        batches = [zoo_measure.graph_inputs(graph, more) for more in zoo_models.more_inputs(name, seed, 2)]
    raised, _ = planish.Pipeline("raise").run(graph, validate=False)
    stats = planish.collect(raised, batches)
    after, _ = planish.Pipeline(zoo_measure.pipeline()).run(raised, stats=stats, validate=False, seed=seed)
    return graph, after


def measure(name: str, seed: int = 0) -> dict[str, Any]:
    """The figures of one model."""
    import planish

    before, after = before_and_after(name, seed)
    start = time.perf_counter()
    found = planish.verify(before, after, oracle="mlir", seed=seed)
    of = {which: max(a.error for a in found.agreement if a.name.startswith(which)) for which in ("first", "second")}
    return {
        "name": name,
        "nodes": [len(before), len(after)],
        "error": found.error,
        "before": of["first"],
        "after": of["second"],
        "seconds": time.perf_counter() - start,
    }


def main() -> int:
    options = arguments(
        "exact passes, judged by torch-mlir",
        only={"nargs": "+", "metavar": "MODEL", "help": f"of {MINILM} and the models of the zoo"},
    )
    rows = []
    for name in options.only or (QUICK if options.quick else (MINILM, *ZOO)):
        note(name)
        rows.append(measure(name))
    table(
        "relative error in float64, by torch-mlir's linalg on the CPU",
        ("model", "nodes", "after", "after vs before", "torch vs oracle, before", "after ", "seconds"),
        [
            (r["name"], *r["nodes"], *(f"{r[key]:.1e}" for key in ("error", "before", "after")), f"{r['seconds']:.1f}")
            for r in rows
        ],
    )
    worst = Target("after against before", max(r["error"] for r in rows), 1e-10)
    torch = Target("torch against the oracle", max(max(r["before"], r["after"]) for r in rows), 1e-12)
    return Outcome("oracle", {"models": rows}, [worst, torch]).finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
