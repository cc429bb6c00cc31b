"""What each pass costs: seconds and memory on real and generated models, and how both grow.

    python bench/passes.py [--quick] [--json FILE] [--part growth block gemma gptq] [--only PATTERN]

Each pass runs alone, in a child process forked from one that holds the raised model and its statistics, without
validation. Seconds are those of the process in `Pipeline.run` (the clone and the verifier included), with one thread:
what an idle core takes, on a busy machine too. Memory is how far the resident set rose above where it stood when the
pass began (the kernel's high-water mark, reset there).

Models: Gemma 3 270M with its weights, and a generated decoder of one block, 4096 wide (`bench/blocks.py`). Growth:
the same decoder at several widths and at several depths; the slope is the exponent p of seconds ~ size^p, fitted on
logarithms. GPTQ on a 4096 x 4096 layer stands beside a published implementation, in the same run
(`bench/passes_gptq.py`: llm-compressor's); the exit code is 1 if ours is slower. `--quick`: small widths, no Gemma,
GPTQ on 1024 x 1024.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when numpy and torch are imported
from common import Outcome, Target, arguments, note, table

if TYPE_CHECKING:
    from planish import Graph, Stats

PARTS = ("growth", "block", "gemma", "gptq")
TOKENS, BLOCK_TOKENS = 64, 16
LIMIT_S = 900.0  # of one pass

# name: (what runs untimed before it, the pass as it is measured)
NORMS = "fold-norm-gain{untie=true},"
MEASURED: dict[str, tuple[str, str]] = {
    "raise": ("", "raise"),
    "fold-gates": ("", "fold-gates"),
    "center-layer-norm": ("", "center-layer-norm{untie=true}"),
    "fold-norm-gain": ("", "fold-norm-gain{untie=true}"),
    "merge-linears": ("", "merge-linears"),
    "shift-channels": ("", "shift-channels"),
    "scale-channels search": ("", "scale-channels"),
    "scale-channels balance": ("", "scale-channels{method=balance}"),
    "scale-channels awq": ("", "scale-channels{method=awq}"),
    "scale-channels smoothquant-plus": ("", "scale-channels{method=smoothquant-plus}"),
    "permute-channels": ("", "permute-channels{method=sort}"),
    "reparameterize-norm": ("", "reparameterize-norm"),
    "rotate-channels hadamard": (NORMS, "rotate-channels{kind=hadamard untie=true}"),
    "rotate-channels klt": (NORMS, "rotate-channels{kind=klt untie=true}"),
    "transform-channels": ("", "transform-channels{kind=kronecker}"),
    "insert-hadamard": ("", "insert-hadamard{sites=all}"),
    "merge-hadamards": ("insert-hadamard{sites=all},", "merge-hadamards"),
    "isolate-outliers": ("", "isolate-outliers"),
    "disassemble-channels": ("", "disassemble-channels"),
    "reassemble-channels": ("", "reassemble-channels"),
    "split-layers": ("", "split-layers"),
    "extract-outliers": ("", "extract-outliers"),
    "extract-low-rank": ("", "extract-low-rank"),
    "quantize rtn": ("", "quantize{weights=int4:g64}"),
    "quantize rtn mse": ("", "quantize{weights=int4:g64 clip=mse}"),
    "quantize gptq": ("", "quantize{weights=int4:g64 solver=gptq}"),
    "lower ort": ("quantize,", "lower{target=ort}"),
}


@dataclass
class Model:
    """A model that passes are measured on: as captured, raised, and its statistics and data."""

    captured: Graph
    raised: Graph
    stats: Stats
    data: list[Any]


def prepared(graph: Graph, data: list[Any]) -> Model:
    import planish

    raised, _ = planish.Pipeline("raise").run(graph, validate=False)
    return Model(graph, raised, planish.collect(raised, data), data)


def generated(width: int, layers: int) -> Model:
    import blocks

    tokens = BLOCK_TOKENS if width * layers >= 2048 else TOKENS
    return prepared(blocks.decoder(width, layers, tokens=tokens), blocks.batches(tokens, 2))


def gemma() -> Model:
    import assets
    import gemma as real

    folder = assets.gemma_dir()
    tokens = real.windows(folder, "wikipedia", 2)[:, :128].contiguous()
    graph = real.captured(real.load(folder), tokens[:, :64].contiguous())
    return prepared(graph, [{"input_ids": row[None].numpy()} for row in tokens])


# -- one pass in a child -----------------------------------------------------------------------------


def resident(field: str) -> float:
    """GiB of this process: VmRSS (now) or VmHWM (the most since the mark was reset)."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[1]) / 2**20  # type: ignore[index]


def child(model: Model, before: str, item: str, pipe: Any) -> None:
    """Run one pass and send its figures."""
    import gc

    import torch

    from planish.ir.errors import PlanishError
    from planish.passes.manager import Pipeline

    torch.set_num_threads(1)
    try:
        graph, stats = (model.captured, None) if item == "raise" else (model.raised, model.stats)
        if before:
            graph, _ = Pipeline(before.rstrip(",")).run(graph, stats=stats, validate=False)
        passes = Pipeline(item).passes
        pipeline = Pipeline("raise-linear")
        pipeline.passes = passes  # what it needs stands in `before`
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        base, start = resident("VmRSS"), time.process_time()
        _, report = pipeline.run(graph, stats=stats, data=model.data, validate=False)
        seconds = time.process_time() - start
        applied = sum(len(p.applied) for p in report.passes)
        pipe.send({"seconds": seconds, "gib": resident("VmHWM") - base, "applied": applied})
    except PlanishError as error:
        pipe.send({"refused": str(error).splitlines()[0]})
    except Exception as error:  # noqa: BLE001  one pass's failure is a row of the table
        pipe.send({"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})
    finally:
        pipe.close()
        os._exit(0)


def measure(model: Model, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The figures of each pass on a model."""
    context = multiprocessing.get_context("fork")
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(model, *MEASURED[name], send))
        process.start()
        send.close()
        figures = {"failed": f"no result in {LIMIT_S:g} s"}
        if receive.poll(LIMIT_S):
            try:
                figures = receive.recv()
            except EOFError:
                figures = {"failed": "the process ended: out of memory?"}
        else:
            process.kill()
        process.join()
        found[name] = figures
        note(f"    {name}: {figures.get('refused') or figures.get('failed') or _short(figures)}")
    return found


def _short(figures: dict[str, Any]) -> str:
    return f"{figures['applied']} applied, {figures['seconds']:.2f} s, {figures['gib']:.2f} GiB"


def known(pattern: str | None) -> list[str]:
    """The passes that this version has and that the pattern matches."""
    from planish.ir.errors import PlanishError
    from planish.passes.pipeline import parse_pipeline

    names = []
    for name, (before, item) in MEASURED.items():
        if pattern and not re.search(pattern, name):
            continue
        try:
            parse_pipeline(before.rstrip(",") + "," + item if before else item)
        except PlanishError as error:
            note(f"left out: {name}: {str(error).splitlines()[0]}")
            continue
        names.append(name)
    return names


# -- tables ------------------------------------------------------------------------------------------


def shown(figures: dict[str, Any]) -> list[str]:
    if "seconds" not in figures:
        return ["refused" if "refused" in figures else "FAILED", ""]
    return [f"{figures['seconds']:.2f}", f"{figures['gib']:.2f}"]


def growth(names: Sequence[str], sizes: Sequence[int], runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The slope of seconds for each pass that ran at every size."""
    import blocks

    slopes = {}
    for name in names:
        seconds = [run[name].get("seconds") for run in runs]
        if all(seconds):
            slopes[name] = blocks.slope(sizes, seconds)
    return slopes


def main() -> int:
    options = arguments(
        (__doc__ or "").splitlines()[0],
        part={"nargs": "+", "choices": PARTS, "default": PARTS, "help": "only some of the measurements"},
        only={"metavar": "PATTERN", "help": "only passes whose name matches"},
    )
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    widths = (128, 256, 512) if options.quick else (256, 512, 1024)
    depths, wide = (1, 2, 4), 512 if options.quick else 4096
    parts = [p for p in options.part if not (options.quick and p == "gemma")]
    names = known(options.only)
    outcome = Outcome("passes")
    runs: dict[str, dict[str, dict[str, Any]]] = {}

    def run(label: str, make: Callable[[], Model]) -> dict[str, dict[str, Any]]:
        if label not in runs:
            note(label)
            start = time.perf_counter()
            model = make()
            note(f"    prepared in {time.perf_counter() - start:.1f} s, {resident('VmRSS'):.1f} GiB")
            runs[label] = measure(model, names)
        return runs[label]

    columns, slopes = {}, {"width": {}, "depth": {}}
    if "growth" in parts:
        across = [run(f"{width} wide", partial(generated, width, 1)) for width in widths]
        label = "{} wide" + ", {} deep"
        deep = [
            run(label.format(widths[0], d) if d > 1 else f"{widths[0]} wide", partial(generated, widths[0], d))
            for d in depths
        ]
        slopes = {"width": growth(names, widths, across), "depth": growth(names, depths, deep)}
    if "block" in parts:
        columns[f"block of {wide}"] = run(f"{wide} wide", partial(generated, wide, 1))
    if "gemma" in parts:
        columns["Gemma 3 270M"] = run("Gemma 3 270M", gemma)
    show(names, columns, slopes, {"width": widths, "depth": depths})
    outcome.figures |= {"runs": runs, "slopes": slopes, "widths": widths, "depths": depths}
    failed = [(label, name) for label, found in runs.items() for name, f in found.items() if "failed" in f]
    for label, name in failed:
        note(f"FAILED {name}, {label}: {runs[label][name]['failed']}")
    outcome.targets.append(Target("passes that failed", len(failed), 0))
    for kind, bound in (("depth", 1.5), ("width", 3.5)):
        if slopes[kind]:
            worst = max(slopes[kind], key=slopes[kind].__getitem__)
            outcome.targets.append(Target(f"growth with {kind} ({worst})", slopes[kind][worst], bound))
    if "gptq" in parts:
        compare_gptq(outcome, 1024 if options.quick else 4096)
    return outcome.finish(options.json)


def show(
    names: Sequence[str],
    columns: Mapping[str, dict[str, dict[str, Any]]],
    slopes: Mapping[str, dict[str, float]],
    sizes: Mapping[str, Sequence[int]],
) -> None:
    """The table: a row for each pass."""
    rows = []
    for name in names:
        cells = [cell for figures in columns.values() for cell in shown(figures[name])]
        powers = [f"{slopes[kind][name]:.2f}" if name in slopes[kind] else "" for kind in sizes]
        rows.append([name, *cells, *powers])
    heads = [f"{label}{part}" for label in columns for part in (", s", ", GiB")]
    spans = [f"slope, {kind} {found[0]} to {found[-1]}" for kind, found in sizes.items()]
    table("passes, one at a time", ["pass", *heads, *spans], rows)


def compare_gptq(outcome: Outcome, size: int) -> None:
    """GPTQ beside a published implementation on one layer."""
    import passes_gptq

    found = passes_gptq.measure(size, size)
    outcome.figures["gptq"] = found
    rows = [[name, seconds, found["loss"][name]] for name, seconds in found["seconds"].items()]
    table(f"GPTQ of {size} x {size}, {found['threads']} thread", ["implementation", "seconds", "loss"], rows)
    outcome.targets.append(Target("GPTQ time over published", found["ratio"], 1.0))


if __name__ == "__main__":
    sys.exit(main())
