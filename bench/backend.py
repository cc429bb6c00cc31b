"""Speed of `torch.compile(model, backend="planish")` on the CPU, beside the other engines and the machine's limits.

    python bench/backend.py [--quick] [--json FILE] [--keep DIR] [--threads 1 2] [--cases NAME ...] [--engines NAME ...]
                            [--recipe TEXT] [--processor] [--no-compile-times] [--no-accuracy]

MiniLM-L6 on 1 and 8 real texts of 128 tokens, and a decoder like LLaMA (16 layers, width 1024, random weights;
`backend_models.py`) on a prompt of 128 tokens and on one token behind a cache of 256. Each engine runs in a process of
its own with the same inputs and as many threads as are allowed to all; in every round each runs in turn, untimed (once,
and for 30 ms) to warm the caches that the others filled, then timed (for 50 ms at least), while the others sleep.
Medians; the ratios are of one run.

cosine  of pooled embeddings to float's on sentences of Brown (MiniLM), of the logits to float's (decoder: that all
        compute the same thing; its weights are random, quantised to 4 bits nothing is expected of it)
TOPS    operations of the model (linears and attention, a multiply-add is two) per second; `% int8`, `% L2`: of the
        peak of int8 products on registers and fed from L2; GB/s: weights read per second, `% memory` of the bandwidth:
        all measured in this run by a small C++ program

With `--quick` the decoder has 3 layers, rounds are few; targets still hold.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import assets
import backend_engines as engines
import backend_files as files
import backend_models as models
import numpy as np
from backend_processes import Field, median
from common import Outcome, Target, arguments, environment, note, table

PEERS = ("torchao==0.18.0", "llama-cpp-python==0.3.36", "gguf==0.19.0", "diskcache==5.6.3")
LLAMA = "-DGGML_NATIVE=ON -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_COMMON=OFF"
ROUNDS, RUNS, QUICK_ROUNDS, QUICK_RUNS = 30, 3, 5, 2
BASE = "Inductor bf16"  # what ratios are to
COPIES, MEMORY = 2, 0.7  # of its float32 weights that an engine holds, about; of the machine's memory that all may take
SENTENCES, QUICK_SENTENCES = 496, 96  # whole batches of 8
PROFILED = ("Inductor bf16", "planish W8A8 fp32", "planish W8A8 bf16", "planish W4A16 fp32", "planish W4A16 bf16")
GEMM_WORDS = ("gemm", "chain_of", "linear", "addmm", "_mm", "matmul", "packed")
Figures = dict[str, Any]


def peers() -> Path:
    """The Python that has torchao and llama.cpp, which is compiled for this machine (a quarter of an hour, once)."""
    os.environ.setdefault("CMAKE_ARGS", LLAMA)
    return environment("venv-backend", PEERS, borrow=True)


def limits(folder: Path, threads: int) -> dict[str, float | None]:
    """What the machine can do at most: operations and bytes per second."""
    source, program = Path(__file__).with_name("backend_limits.cpp"), folder / "limits"
    subprocess.run(["g++", "-O3", "-march=native", "-fopenmp", str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program), str(threads)], check=True, capture_output=True, text=True)
    found: dict[str, float | None] = json.loads(done.stdout)
    for kind in ("int8", "bf16"):
        for place in ("registers", "l2"):
            held = (found[f"amx_{kind}_{place}"], found[("vnni_" if kind == "int8" else "avx512_") + f"{kind}_{place}"])
            found[f"{kind}_{place}"] = max((v for v in held if v is not None), default=None)
    return found


# -- one case ---------------------------------------------------------------------------------------------


def wanted_engines(case: models.Case, options: Any) -> list[engines.Engine]:
    """The rows of a case."""
    found = [e for e in engines.ENGINES if case.model in e.models and (e.quick or not options.quick)]
    if options.engines:
        found = [e for e in found if any(part.lower() in e.name.lower() for part in options.engines)]
    return found


def measure(case: models.Case, threads: int, options: Any, folder: Path, python: Path | None) -> Figures:
    """Times of all engines, what their outputs are worth, and profiles."""
    layers = models.QUICK_LAYERS if options.quick else models.LAYERS
    figures: Figures = {}
    reference: np.ndarray | None = None
    for group in groups(wanted_engines(case, options), case, layers):
        reference = measure_group(group, figures, reference, case, threads, options, folder, python)
    return figures


def groups(wanted: Sequence[engines.Engine], case: models.Case, layers: int) -> list[list[engines.Engine]]:
    """Engines that are up at once: all, or, where memory does not hold them, floats and then low bits beside BASE."""
    each = 4 * models.operations(case, layers)[2] * COPIES
    if each * len(wanted) < MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        return [list(wanted)]
    base = [e for e in wanted if e.name == BASE]
    floats = [e for e in wanted if e.bits == "float" and e.name != BASE]
    return [group for group in (floats, base + [e for e in wanted if e.bits != "float"]) if group]


def measure_group(
    group: Sequence[engines.Engine],
    figures: Figures,
    reference: np.ndarray | None,
    case: models.Case,
    threads: int,
    options: Any,
    folder: Path,
    python: Path | None,
) -> np.ndarray | None:
    """Times of engines that are up at once, what their outputs are worth, and profiles, into the figures.

    Args:
        reference: the float outputs, if they are known.

    Returns:
        The float outputs, if they are known now.
    """
    layers = models.QUICK_LAYERS if options.quick else models.LAYERS
    rounds, runs = (QUICK_ROUNDS, QUICK_RUNS) if options.quick else (ROUNDS, RUNS)
    with Field() as field:
        for engine in group:
            job = {
                "engine": engine.name, "case": case.name, "threads": threads, "layers": layers, "folder": str(folder),
                "recipe": options.recipe if case.model == "minilm" else "",
            }  # fmt: skip
            if engine.environment == "peers" and python is None:
                field.failed[engine.name] = "its environment could not be made"
                continue
            field.start(engine.name, python if engine.environment == "peers" else sys.executable, job, folder)
        for name, times in field.times(rounds, runs, "processor" if options.processor else "times").items():
            figures[name] = {"ms": median(times) * 1e3, "best_ms": min(times) * 1e3, "ready": field.ready[name]}
        vectors = outputs(field, case, folder, QUICK_SENTENCES if options.quick else SENTENCES)
        reference = vectors.get("eager fp32", vectors.get("onnxruntime fp32", reference))
        for name, rows in vectors.items():
            if reference is not None:
                cosine = (rows * reference).sum(-1) / np.linalg.norm(rows, axis=-1) / np.linalg.norm(reference, axis=-1)
                figures[name].update(cosine=float(cosine.mean()), worst=float(cosine.min()))
        for name in (n for n in PROFILED if n in field.workers):
            answer = field.ask(name, profile=5 if options.quick else 20)
            if answer:
                figures[name]["profile"] = answer["rows"]
        for name, why in field.failed.items():
            figures[name] = {"failed": why}
    return reference


def outputs(field: Field, case: models.Case, folder: Path, count: int) -> dict[str, np.ndarray]:
    """What each engine makes: embeddings of sentences of Brown (8 x 128), logits [1, 1, 32000] (decoder)."""
    if case.name == "minilm 1x128":  # the same models as at 8 x 128
        return {}
    texts = folder / "judge.txt"
    texts.write_text("\n".join(assets.sentences("judge", count)))
    found = {}
    for name in list(field.workers):
        path = folder / "output.npy"
        given = {"texts": str(texts)} if case.model == "minilm" else {}
        if field.ask(name, **given, output=str(path)) is not None:
            found[name] = np.load(path)
    return found


# -- tables -----------------------------------------------------------------------------------------------


def weight_bytes(engine: engines.Engine) -> float:
    """Bytes for each weight of a linear."""
    if engine.bits == "float":
        return 2.0 if "bf16" in engine.name else 4.0
    return {"8": 1.0, "4": 0.5 + 2 / files.GROUP}[engine.bits]


def fractions(case: models.Case, figures: Figures, held: dict[str, float | None], layers: int) -> None:
    """How far each row is from the machine's limits, into its figures."""
    linears, attention, weights = models.operations(case, layers)
    for name, row in figures.items():
        if "ms" not in row:
            continue
        seconds = row["ms"] / 1e3
        row["tops"] = (linears + attention) / seconds / 1e12
        row["gb"] = weights * weight_bytes(engines.engine_of(name)) / seconds / 1e9
        for key, limit in (("int8_registers", "int8_registers"), ("int8_l2", "int8_l2"), ("bf16", "bf16_registers")):
            if held.get(limit):
                row[f"of_{key}"] = row["tops"] * 1e12 / held[limit]  # type: ignore[operator]
        row["of_memory"] = row["gb"] * 1e9 / held["memory"]  # type: ignore[operator]
        if "profile" in row:
            spent = sum(t for n, _, t in row["profile"] if is_gemm(n))
            row["gemm_share"] = spent / sum(t for _, _, t in row["profile"])
            if spent and held.get("int8_registers"):
                row["gemms_of_int8"] = linears / spent / held["int8_registers"]  # type: ignore[operator]
                row["gemms_of_memory"] = weights * weight_bytes(engines.engine_of(name)) / spent / held["memory"]  # type: ignore[operator]


def is_gemm(name: str) -> bool:
    return any(word in name for word in GEMM_WORDS)


def show(case: models.Case, threads: int, figures: Figures) -> None:
    """The table of a case, and where the time of planish goes."""
    base = figures.get(BASE, {}).get("ms")
    rows = []
    for name, row in figures.items():
        if "failed" in row:
            rows.append([name, "not run", row["failed"][:60], *[""] * 6])
            continue
        percent = [f"{100 * row[k]:.0f}" if k in row else "" for k in ("of_int8_registers", "of_int8_l2", "of_memory")]
        rows.append(
            [
                name, f"{row['ms']:.2f}", f"{base / row['ms']:.2f}x" if base else "",
                f"{row['cosine']:.5f}" if "cosine" in row else "", f"{row['tops']:.3f}", *percent[:2],
                f"{row['gb']:.1f}", percent[2],
            ]
        )  # fmt: skip
    columns = ["engine", "ms", "to Inductor bf16", "cosine", "TOPS", "% int8", "% L2", "GB/s", "% memory"]
    table(f"{case.name}, {threads} thread{'s' * (threads > 1)}", columns, rows)
    lines = []
    for name, row in figures.items():
        whole = sum(t for _, _, t in row.get("profile", ()))
        for operator, calls, seconds in row.get("profile", ())[:12]:
            if seconds > 0.01 * whole:
                lines.append(
                    [name, operator[:70], f"{calls:.0f}", f"{seconds * 1e3:.3f}", f"{100 * seconds / whole:.0f}"]
                )
        if "gemms_of_int8" in row:
            reached = f"{100 * row['gemms_of_int8']:.0f} % of int8, {100 * row['gemms_of_memory']:.0f} % of memory"
            lines.append([name, f"(all products: {reached})", "", "", f"{100 * row['gemm_share']:.0f}"])
    if lines:
        table(f"where the time goes: {case.name}, {threads}", ["engine", "operator", "calls", "ms", "%"], lines)


# -- targets ----------------------------------------------------------------------------------------------


def fastest(figures: Figures, words: Sequence[str], bits: str | None = None) -> float | None:
    """The least median of the rows whose name starts with one of the words."""
    found = [
        row["ms"]
        for name, row in figures.items()
        if "ms" in row and name.startswith(tuple(words)) and (bits is None or engines.engine_of(name).bits == bits)
    ]
    return min(found, default=None)


def speed_targets(case: models.Case, threads: int, figures: Figures) -> list[Target]:
    """Demand 7: how many times as fast as the best form of each opponent."""
    found = []

    def faster(label: str, ours: float | None, theirs: float | None, bound: float) -> None:
        if theirs is not None:  # ours that did not run is a target missed
            value = 0.0 if ours is None else theirs / ours
            found.append(Target(f"{case.name} {threads}t {label}", value, bound, at_most=False))

    bf16 = fastest(figures, [BASE])
    w8a8 = fastest(figures, ["planish W8A8"])
    if case.model == "minilm":
        faster("W8A8 / OpenVINO int8", w8a8, fastest(figures, ["OpenVINO int8"]), 1.1)
        faster("W8A8 / Inductor bf16", w8a8, bf16, 1.2)
        cosines = [
            row["cosine"] for name, row in figures.items() if name.startswith("planish W8A8") and "cosine" in row
        ]
        if cosines:
            found.append(Target(f"{case.name} {threads}t cosine", min(cosines), 0.999, at_most=False))
    else:
        faster("planish / Inductor bf16", fastest(figures, ["planish"]), bf16, 1.0)
    if case.past:
        peers = fastest(figures, ["onnxruntime", "OpenVINO", "llama.cpp"], "4")
        faster("W4A16 / best 4-bit", fastest(figures, ["planish W4A16"]), peers, 1.15)
    return found


def files_of(case: models.Case, chosen: Sequence[engines.Engine]) -> list[str]:
    """The files that rows of a case read, after those that they are made from."""
    found = ["cache.npz"] if case.model == "decoder" else []
    one = "minilm" if case.model == "minilm" else case.key
    for engine in chosen:
        ending = engine.options.get("file", "")
        if engine.tool == "onnxruntime":
            found += [f"{one}.onnx", f"{one}{ending}.onnx"]
        elif engine.tool == "openvino":
            found += [f"{case.key}.xml", f"{case.key}{ending}.xml"]
        elif engine.tool == "llama":
            found.append(f"decoder-{ending}.gguf")
        elif engine.tool == "planish" and case.model == "minilm":
            found.append("planish.stats")
    return found


def main() -> int:
    options = arguments(
        __doc__.splitlines()[0],
        keep={
            "type": Path,
            "metavar": "DIR",
            "help": "keep the models and compiled code in DIR, and use what is there",
        },
        threads={"type": int, "nargs": "+", "default": [1, 2]},
        cases={"nargs": "+", "metavar": "NAME", "help": "only the cases whose name holds one of these"},
        engines={"nargs": "+", "metavar": "NAME", "help": "only the engines whose name holds one of these"},
        recipe={"default": engines.MINILM_RECIPE, "help": "of planish on MiniLM: a name or a pipeline"},
        processor={"action": "store_true", "help": "the processes' own time: one thread on a machine that is shared"},
        no_compile_times={"action": "store_true"},
        no_accuracy={"action": "store_true"},
    )
    folder = Path(tempfile.mkdtemp(prefix="planish-backend-")) if options.keep is None else options.keep
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return compare(options, folder.resolve())
    except assets.AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def compare(options: Any, folder: Path) -> int:
    layers = models.QUICK_LAYERS if options.quick else models.LAYERS
    cases = [c for c in models.CASES if not options.cases or any(part in c.name for part in options.cases)]
    chosen = {case.name: wanted_engines(case, options) for case in cases}
    python = None
    if any(e.environment == "peers" for rows in chosen.values() for e in rows):
        try:
            python = peers()
        except subprocess.CalledProcessError as error:
            note(f"peers: {error}")
    needed = [f for case in cases for f in files_of(case, chosen[case.name])]
    pythons = {"gguf": python} if python is not None else {}
    outcome = Outcome("backend")
    outcome.figures["files_failed"] = files.make(folder, layers, options.quick, needed, pythons, options.recipe)
    for threads in options.threads:
        held = limits(folder, threads)
        outcome.figures[f"limits {threads}"] = held
        shown = {k: v / 1e12 for k, v in held.items() if v and k != "memory" and not k.startswith(("int8", "bf16"))}
        text = ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in shown.items())
        print(f"limits, {threads} threads, TOPS: {text}; memory {held['memory'] / 1e9:.1f} GB/s")  # type: ignore[operator]
        for case in cases:
            figures = measure(case, threads, options, folder, python)
            fractions(case, figures, held, layers)
            show(case, threads, figures)
            outcome.figures[f"{case.name} {threads}"] = figures
            outcome.targets += speed_targets(case, threads, figures)
            if options.json is not None:  # a run that is cut off leaves what it has
                options.json.write_text(json.dumps({"figures": outcome.figures}, indent=1, default=float) + "\n")
    if not options.no_compile_times:
        import backend_compile

        found = backend_compile.measure(options.recipe, folder, options.quick)
        outcome.figures["compile"] = found
        outcome.targets += backend_compile.targets(found)
    if not options.no_accuracy:
        import backend_accuracy

        accuracy = backend_accuracy.measure(options.quick)
        outcome.figures["accuracy"] = accuracy
        outcome.targets += backend_accuracy.targets(accuracy)
    return outcome.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
