"""Gemma 3 270M, real weights: captured, inspected, every exact pass, back to torch, compared.

    python bench/gemma.py [--quick] [--json FILE] [--pipeline TEXT] [--no-validate]

The module is captured with a symbolic batch and sequence, all exact passes of this version run on it (those that
need statistics with statistics of two Wikipedia windows), each validated in float64, and the result is made a torch
module again. Judged: the float32 logits on 4 x 512 tokens (two windows of each source), relative to the largest, and
the perplexity on 512-token windows that start with BOS, on Wikipedia (articles 1 to 39) and on the Brown corpus.
"""

from __future__ import annotations

import math
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import assets
from common import Outcome, Target, arguments, note, table

if TYPE_CHECKING:
    import torch

    from planish import Graph

LENGTH, BOS = 512, 2
SOURCES = ("wikipedia", "brown")
Run = Callable[["torch.Tensor"], "torch.Tensor"]


def peak_gib() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Stages:
    """Seconds and peak memory of each stage."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        note(name)
        start = time.perf_counter()
        yield
        self.rows[name] = {"seconds": time.perf_counter() - start, "peak_gib": peak_gib()}


def windows(folder: Path, source: str, count: int) -> torch.Tensor:
    """`count` windows [count, 512] spread over a source, each BOS and then 511 tokens of running text."""
    import torch
    from tokenizers import Tokenizer

    text = assets.texts("wikipedia" if source == "wikipedia" else "brown")
    part, width = len(text) // count, 8 * LENGTH  # characters: more than 511 tokens of English
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = []
    for number in range(count):
        start = text.index(" ", number * part) + 1
        ids = tokenizer.encode(text[start : start + width], add_special_tokens=False).ids[: LENGTH - 1]
        rows.append([BOS, *ids])
    return torch.tensor(rows)


def perplexity(run: Run, tokens: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of the 511 tokens after each BOS."""
    import torch

    total = 0.0
    for row in tokens:
        logits = run(row[None])[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.float(), row[1:], reduction="sum"))
    return math.exp(total / (tokens.shape[0] * (tokens.shape[1] - 1)))


def logit_error(first: Run, second: Run, tokens: torch.Tensor) -> float:
    """The largest difference of float32 logits over all rows, relative to the largest logit."""
    worst = largest = 0.0
    for row in tokens:
        expected, got = first(row[None]), second(row[None])
        worst = max(worst, float((got - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    return worst / largest


def load(folder: Path) -> torch.nn.Module:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return model.requires_grad_(False)


def captured(model: torch.nn.Module, tokens: torch.Tensor) -> Graph:
    """The graph of the model, batch and sequence symbolic."""
    import torch

    from planish.capture.from_fx import from_module

    # AUTO: named dims would have to hold for every size, and the model asks whether its window is exceeded
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    inputs = {"input_ids": tokens, "use_cache": False}
    return from_module(model, inputs, dynamic_shapes={"input_ids": dims, "use_cache": None})


def rewritten(graph: Graph, options: Any, samples: torch.Tensor, stages: Stages, figures: dict[str, Any]) -> Graph:
    """The graph after the exact passes."""
    import planish
    from planish.passes.manager import Instrument, Pipeline
    from planish.report.inspection import inspect

    class Notes(Instrument):
        def after(self, instance: Any, graph: Graph, report: Any) -> None:
            note(f"    {instance}: {len(report.applied)} applied, {report.seconds:.1f} s, peak {peak_gib():.1f} GiB")

    with stages("raise"):
        graph, report = Pipeline("raise").run(graph, validate=not options.no_validate)
    with stages("inspect"):
        seen = inspect(graph)
    rows: list[list[Any]] = [
        [act, count.spaces, count.admitted, f"{seen.linears_with.get(act, 0)} of {seen.linears}"]
        for act, count in seen.by_act.items()
    ]
    table("channel spaces", ["act", "spaces", "admitted", "linears whose input admits it"], rows)
    figures["spaces"] = {act: vars(count) for act, count in seen.by_act.items()}
    figures["linears"], figures["linears_with"] = seen.linears, dict(seen.linears_with)
    passes = Pipeline(options.pipeline or exact_pipeline())
    figures["pipeline"] = str(passes)
    stats = None
    if any(p.needs_stats for p in passes.passes):
        with stages("statistics"):
            stats = planish.collect(graph, [{"input_ids": samples[:1].numpy()}, {"input_ids": samples[1:2].numpy()}])
    with stages("passes"):
        graph, done = passes.run(graph, stats=stats, validate=not options.no_validate, instruments=[Notes()])
    rows = [
        [p.name, len(p.applied), sum(len(v) for v in p.declined.values()), f"{p.seconds:.1f}", f"{p.error or 0:.2g}"]
        for p in (*report.passes, *done.passes)
    ]
    table("passes", ["pass", "applied", "declined", "seconds", "float64 error"], rows)
    figures["passes"] = {
        p.name: {"applied": len(p.applied), "declined": dict(p.reasons()), "seconds": p.seconds, "error": p.error}
        for p in (*report.passes, *done.passes)
    }
    return graph


def exact_pipeline() -> str:
    """The exact passes of this version, as `bench/zoo.py` runs them."""
    from zoo_measure import pipeline

    return pipeline()


def main() -> int:
    options = arguments(
        "Gemma 3 270M, real weights, through capture, all exact passes and back.",
        pipeline={"metavar": "TEXT", "help": "other passes than all exact ones"},
        no_validate={"action": "store_true", "help": "do not compare in float64 after each pass"},
    )
    warnings.simplefilter("ignore")
    try:
        return compare(options)
    except assets.AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def compare(options: Any) -> int:
    import torch

    import planish

    count = 4 if options.quick else 16
    stages, figures = Stages(), {}
    with stages("assets"):
        folder = assets.gemma_dir()
        tokens = {source: windows(folder, source, count) for source in SOURCES}
    with stages("load"):
        model = load(folder)
    with stages("capture"):
        graph = captured(model, tokens["wikipedia"][:2, :64].contiguous())
    ops = Counter("opaque" if node.op.opaque else node.op.name for node in graph.nodes)
    figures["nodes"], figures["opaque"] = sum(ops.values()), ops["opaque"]
    changed = rewritten(graph, options, tokens["wikipedia"][-2:], stages, figures)
    del graph
    with stages("to torch"):
        module = planish.to_torch(changed)
    del changed

    def original(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]

    def ours(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            made = module(input_ids=ids, use_cache=False)
            return made["logits"] if isinstance(made, dict) else made[0] if isinstance(made, tuple) else made.logits

    with stages("logits"):
        judged = torch.cat([tokens[source][:2] for source in SOURCES])
        figures["logit_error"] = logit_error(original, ours, judged)
    rows = []
    for source in SOURCES:
        with stages(f"perplexity {source}"):
            before, after = perplexity(original, tokens[source]), perplexity(ours, tokens[source])
        figures[f"perplexity_{source}"] = {"before": before, "after": after}
        rows.append([source, f"{before:.6f}", f"{after:.6f}", f"{abs(after / before - 1):.2g}"])
    table(f"perplexity, {count} windows of {LENGTH} tokens", ["text", "before", "after", "relative difference"], rows)
    shown = [[name, f"{row['seconds']:.1f}", f"{row['peak_gib']:.2f}"] for name, row in stages.rows.items()]
    table("time and memory", ["stage", "seconds", "peak GiB so far"], shown)
    figures["stages"] = stages.rows
    outcome = Outcome("gemma", figures)
    outcome.targets = [Target("relative logit error", figures["logit_error"], 2e-4)]
    for source in SOURCES:
        values = figures[f"perplexity_{source}"]
        apart = abs(values["after"] / values["before"] - 1)
        outcome.targets.append(Target(f"{source} perplexity, relative difference (4 digits)", apart, 5e-5))
    return outcome.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
