"""Compile Triton kernels ahead of time, for chips that are not here, and read their machine code.

    job = Job(source, "gemm_kernel", {"a_ptr": "*i8", "M": "i32"}, {"N": 4096, "BLOCK_M": 128}, "sm_90", warps=8)
    [machine] = compile_all([job])     # a `machine.Machine`, or a `Failure`

The compiler runs in a process of its own, without `TRITON_INTERPRET` (a process that interprets cannot also compile),
so a crash of it is an answer as well. Answers are kept under the cache folder (`PLANISH_CACHE`, or ~/.cache/planish) by
the hash of the job, its source and Triton's version. Nothing here runs a kernel: not timed on a GPU.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from planish.codegen.machine import Machine, read_amd, read_nvidia

Constant = int | float | bool | str | None
WORKER = Path(__file__).with_name("aot_worker.py")
LIMIT = 300  # seconds for one job
_FORMAT, _FORMAT_AMD = 3, 4  # of a cache entry; 4: with `repeats`, which is not 1 for small tiles on AMD's chips


@dataclass(frozen=True)
class Job:
    """A kernel to compile.

    Attributes:
        source: the text of a Python file that imports what it needs; it is executed.
        kernel: the name of the `triton.jit` function in it (`triton.autotune` around it is taken off).
        signature: Triton's type of each run-time argument: "*i8", "*fp16", "*fp32", "i32", "tensordesc<...>".
        constants: values of the `constexpr` arguments; any other argument may be made constant too. "tl.float16" and
            the like stand for Triton's dtypes. An argument that has a default and is named nowhere is constant.
        target: "sm_80", "sm_89", "sm_90", "sm_100", "sm_120" or "gfx942".
        divisible: integer arguments that are multiples of 16 at run time. All pointers are taken to be aligned.
        options: more compiler options, such as {"maxnreg": 168}.
    """

    source: str
    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, Constant]
    target: str
    warps: int = 4
    stages: int = 3
    divisible: tuple[str, ...] = ()
    options: Mapping[str, Constant] = field(default_factory=dict)

    def request(self, file: str) -> dict[str, Any]:
        """What the worker is told; `file` holds the source."""
        return {
            "file": file, "kernel": self.kernel, "signature": dict(self.signature), "constants": dict(self.constants),
            "target": self.target, "divisible": list(self.divisible),
            "options": {"num_warps": self.warps, "num_stages": self.stages, **self.options},
        }  # fmt: skip

    def key(self) -> str:
        """The name of its entry in the cache."""
        held = _FORMAT_AMD if self.target.startswith("gfx") else _FORMAT
        parts = [held, version("triton"), self.source, self.request("")]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


@dataclass(frozen=True)
class Failure:
    """A kernel that did not compile, and why."""

    target: str
    reason: str


def compile_all(
    jobs: Sequence[Job], workers: int = 1, limit: float = LIMIT, cache: Path | None = None, python: str = sys.executable
) -> list[Machine | Failure]:
    """Compile jobs, those that are not cached, in `workers` processes; answers in the order of the jobs.

    Args:
        limit: seconds for one job; one that takes longer is a `Failure`.
        cache: a folder for the answers; None: `aot` in planish's cache folder.
        python: the interpreter of the environment that holds what the sources import.
    """
    folder = cache or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    keys = [job.key() for job in jobs]
    answers: dict[str, dict[str, Any]] = {}
    missing: dict[str, Job] = {}
    for key, job in zip(keys, jobs, strict=True):
        kept = _read(folder / f"{key}.json.gz")
        if kept is None:
            missing[key] = job
        else:
            answers[key] = kept
    if missing:
        with tempfile.TemporaryDirectory() as sources:
            queue = list(missing.items())
            shares = [queue[i::workers] for i in range(max(1, min(workers, len(queue))))]
            threads = [
                threading.Thread(target=_serve, args=(share, Path(sources), folder, answers, limit, python))
                for share in shares
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    return [_parsed(job, answers[key]) for key, job in zip(keys, jobs, strict=True)]


def cache_folder() -> Path:
    """Where answers are kept."""
    return Path(os.environ.get("PLANISH_CACHE") or Path.home() / ".cache" / "planish") / "aot"


def listing(job: Job, cache: Path | None = None) -> str:
    """The assembly of a job that was compiled.

    Raises:
        FileNotFoundError: it is not in the cache.
    """
    path = (cache or cache_folder()) / f"{job.key()}.json.gz"
    kept = _read(path)
    if kept is None:
        raise FileNotFoundError(f"{path}: not compiled yet")
    return str(kept.get("listing", ""))


def _parsed(job: Job, answer: Mapping[str, Any]) -> Machine | Failure:
    if "error" in answer:
        return Failure(job.target, str(answer["error"]))
    if job.target.startswith("gfx"):
        machine = read_amd(job.target, answer["listing"], answer["shared"], answer["warps"])
    else:
        machine = read_nvidia(
            job.target,
            answer["listing"],
            answer["usage"],
            answer["shared"],
            answer["warps"],
            answer["ptx"],
            answer["columns"],
        )
    return replace(machine, loop_flops=machine.loop_flops / answer.get("repeats", 1.0))


def _serve(
    share: Sequence[tuple[str, Job]],
    sources: Path,
    folder: Path,
    answers: dict[str, dict[str, Any]],
    limit: float,
    python: str,
) -> None:
    """Feed one worker after the other: a new one where the last died."""
    pending = list(share)
    while pending:
        with tempfile.TemporaryFile() as errors:
            worker = subprocess.Popen(
                [python, "-P", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env=_environment(), text=True,
            )  # fmt: skip
            try:
                while pending:
                    key, job = pending.pop(0)
                    answer = _ask(worker, job, sources, limit)
                    if answer is None:
                        worker.wait()
                        errors.seek(0)
                        last = errors.read().decode(errors="replace").strip().splitlines()[-3:]
                        answer = {"error": f"the compiler died: {' / '.join(last)[:1000] or 'no message'}"}
                        answers[key] = answer
                        break
                    answers[key] = answer
                    if "error" not in answer:
                        _write(folder / f"{key}.json.gz", answer)
            finally:
                if worker.stdin is not None:
                    worker.stdin.close()
                if worker.stdout is not None:
                    worker.stdout.close()
                worker.wait()


def _ask(worker: subprocess.Popen[str], job: Job, sources: Path, limit: float) -> dict[str, Any] | None:
    """The worker's answer; None where it died."""
    file = sources / f"kernel_{hashlib.sha256(job.source.encode()).hexdigest()[:24]}.py"
    if not file.exists():
        partial = file.with_suffix(f".{threading.get_ident()}")
        partial.write_text(job.source)
        partial.replace(file)
    assert worker.stdin is not None and worker.stdout is not None
    killer = threading.Timer(limit, worker.kill)
    killer.start()
    try:
        worker.stdin.write(json.dumps(job.request(str(file))) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        return None
    finally:
        killer.cancel()
    answer: dict[str, Any] | None = json.loads(line) if line else None
    return answer


def _environment() -> dict[str, str]:
    """The worker's: no interpreter, one thread, contraction of a * b + c as Triton 3.9 has it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    ours = {"TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache_folder() / "triton")}
    return {**kept, **ours}


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    kept: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return kept


def _write(path: Path, answer: Mapping[str, Any]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    partial.write_bytes(gzip.compress(json.dumps(answer).encode()))
    partial.replace(path)
