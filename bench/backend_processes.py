"""Workers of `bench/backend.py`: a process for each engine, asked in turn."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).parent))
from common import note

READY, ANSWER = 1500, 600  # seconds


class Dead(RuntimeError):
    """A worker that ended, or said an error."""


class Worker:
    """One process of `backend_worker.py`.

    Args:
        python: the interpreter of its environment.
        job: what it runs, as the worker reads it.
        folder: for its log and its compiled code.
    """

    def __init__(self, python: Path | str, job: dict[str, Any], folder: Path) -> None:
        self.name = f"{job['engine']} {job['case']} {job['threads']}".replace(" ", "-").replace("'", "").lower()
        threads = str(job["threads"])
        surroundings = {
            **os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor" / self.name),
        }  # fmt: skip
        self.log = folder / f"{self.name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(python), str(Path(__file__).with_name("backend_worker.py")), json.dumps(job)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=surroundings, text=True,
            )  # fmt: skip

    def answer(self, limit: float) -> dict[str, Any]:
        """The next line that it says.

        Raises:
            Dead: it ended, or said nothing in time.
        """
        assert self.process.stdout is not None
        line = ""
        if select.select([self.process.stdout], [], [], limit)[0]:
            line = self.process.stdout.readline()
        if line:
            return json.loads(line)  # type: ignore[no-any-return]
        late = self.process.poll() is None and not select.select([self.process.stdout], [], [], 0)[0]
        self.close()
        code = self.process.returncode
        lines = [x for x in self.log.read_text(errors="replace").splitlines() if x.strip()]
        lines = [x for x in lines if "Error: " in x] or lines  # behind it torch says what to set to learn more
        if late:
            raise Dead(f"no answer in {limit:.0f} s")
        raise Dead(
            signal.Signals(-code).name if code < 0 and code != -signal.SIGKILL else (lines or ["ended"])[-1][:160]
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` says why
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self.answer(ANSWER)

    def close(self) -> None:
        """End it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None and not stream.closed:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


class Field:
    """The workers of all engines on one case; those that cannot run it are left out with a reason."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.ready: dict[str, float] = {}
        self.failed: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def start(self, name: str, python: Path | str, job: dict[str, Any], folder: Path) -> None:
        """Start a worker and wait until it has run once."""
        start = time.perf_counter()
        worker = Worker(python, job, folder)
        try:
            self.ready[name] = worker.answer(READY)["ready"]
            self.workers[name] = worker
        except Dead as why:
            self.failed[name] = str(why)
        state = self.failed.get(name) or f"ready in {self.ready[name]:.1f} s"
        note(f"{name}, {job['case']}, {job['threads']} threads: {state} ({time.perf_counter() - start:.0f} s)")

    def ask(self, name: str, **request: Any) -> dict[str, Any] | None:
        """An answer of one of them; None if it ended, which is noted."""
        try:
            return self.workers[name].ask(**request)
        except Dead as why:
            self.failed[name] = str(why)
            self.workers.pop(name)
            return None

    def times(self, rounds: int, runs: int, key: str = "times") -> dict[str, list[float]]:
        """Seconds of each engine: in every round each runs to warm its caches, then at least `runs` times.

        Args:
            key: "times", or "processor": of the processes' own time, which a machine's other work does not add to.
        """
        found: dict[str, list[float]] = {name: [] for name in self.workers}
        for turn in range(rounds):
            names = list(self.workers)
            begin = turn % max(1, len(names))
            for name in names[begin:] + names[:begin]:
                answer = self.ask(name, runs=runs)
                found[name] += answer[key] if answer else []
        return {name: times for name, times in found.items() if name in self.workers}


def median(times: list[float]) -> float:
    return statistics.median(times)
