"""One engine on one case in a process of its own, which runs when it is asked to.

    python backend_worker.py '{"engine": ..., "case": ..., "threads": ..., "layers": ..., "folder": ..., "recipe": ...}'

It says on its output, a line of JSON each: `{"ready": seconds}` when the first run is done, or `{"error": text}`.
Then for each line of JSON on its input:

    {"runs": 3}                -> {"times": [seconds, ...], "processor": [...]}   at least so many, and for 50 ms, after
                                  runs that are not timed: one at least, and for 30 ms
    {"output": "FILE"}         -> {"saved": "FILE"}            the first output of the case's inputs, as .npy
    {"texts": "FILE", "output": "FILE"} -> the same            MiniLM's pooled embeddings of the lines of a file
    {"profile": 20}            -> {"rows": [[name, calls a run, seconds a run], ...]}   torch's operators, by own time

Between requests it sleeps in a read: no thread of it spins while another engine is timed.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import backend_engines as engines
import backend_models as models
import numpy as np

WARM, TIMED = 0.03, 0.05  # seconds of runs, for models that take less than that


def pooled(run: engines.Run, case: models.Case, texts: list[str]) -> np.ndarray:
    """Mean-pooled, normalised embeddings of texts, in batches of the case."""
    import assets

    parts = []
    for start in range(0, len(texts), case.batch):
        given = assets.encode(texts[start : start + case.batch], case.tokens)
        mask = given["attention_mask"][..., None]
        parts.append((run(given) * mask).sum(1) / mask.sum(1))
    rows = np.concatenate(parts)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def profiled(run: engines.Run, given: engines.Inputs, runs: int) -> list[list[Any]]:
    """Operators with the time that they spend in themselves."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(runs):
            run(given)
    rows = [[e.key, e.count / runs, e.self_cpu_time_total / runs / 1e6] for e in seen.key_averages()]
    return sorted(rows, key=lambda row: -row[2])


def main() -> int:
    # what tools print goes to the error output: the answers alone stand on the first
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # not bench/kernels.py

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    asked = json.loads(sys.argv[1])
    case, engine = models.case_of(asked["case"]), engines.engine_of(asked["engine"])
    folder = Path(asked["folder"])
    job = engines.Job(engine, case, asked["threads"], asked["layers"], folder, asked.get("recipe", ""))
    given = models.inputs(case, folder)
    start = time.perf_counter()
    run = engines.BUILDERS[engine.tool](job)
    run(given)
    say(ready=time.perf_counter() - start)
    for line in sys.stdin:
        request = json.loads(line)
        if "runs" in request:
            start = time.perf_counter()
            run(given)
            while time.perf_counter() - start < WARM:
                run(given)
            times: list[float] = []
            processor: list[float] = []
            while len(times) < request["runs"] or sum(times) < TIMED:
                start, begin = time.perf_counter(), time.process_time()
                run(given)
                times.append(time.perf_counter() - start)
                processor.append(time.process_time() - begin)
            say(times=times, processor=processor)
        elif "texts" in request:
            texts = Path(request["texts"]).read_text().splitlines()
            np.save(request["output"], pooled(run, case, texts))
            say(saved=request["output"])
        elif "output" in request:
            np.save(request["output"], run(given))
            say(saved=request["output"])
        elif "profile" in request:
            say(rows=profiled(run, given, request["profile"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
