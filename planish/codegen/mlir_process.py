"""A process for torch-mlir's native code: what crashes there is an error here.

    worker = Worker()
    worker.ask({"do": "lower", ...})  ->  what `mlir_worker` answers; Died where it does not

Data pass through files of the worker's folder, which goes with it.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from planish.ir.errors import PlanishError

__all__ = ["Died", "Worker"]

WORKER = Path(__file__).with_name("mlir_worker.py")


class Died(Exception):
    """The process ended before it answered.

    Attributes:
        how: the signal that ended it, or its exit status.
        said: the last line that it wrote, if any.
        at: the pipeline that it was in; None: another place.
    """

    def __init__(self, status: int, said: str, at: int | None) -> None:
        self.how = f"exit status {status}"
        if status < 0:
            self.how = f"signal {-status}"
            with suppress(ValueError):
                self.how = signal.Signals(-status).name
        self.said = said
        self.at = at
        super().__init__(f"{self.how}: {said}" if said else self.how)


class Worker:
    """A process that serves jobs, started anew where it died, and a folder of files.

    Attributes:
        folder: for the files of jobs; removed with the worker.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="planish-mlir-"))
        self._remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._process: subprocess.Popen[str] | None = None
        self._end: Any = None
        self._start()

    def _start(self) -> subprocess.Popen[str]:
        with (self.folder / "errors").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="ascii",
            )  # fmt: skip
        self._process = process
        self._end = weakref.finalize(self, _stop, process)
        return process

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a job.

        Raises:
            Died: there is none.
        """
        process = self._process or self._start()
        at: int | None = None
        if process.stdin is not None:
            with suppress(BrokenPipeError):  # it is dead already
                process.stdin.write(json.dumps(dict(job)) + "\n")
                process.stdin.flush()
        while process.stdout is not None and (line := process.stdout.readline()).endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            if "at" not in answer:
                return answer
            at = answer["at"]
        status = process.wait()
        self.stop()
        lines = (self.folder / "errors").read_text(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        raise Died(status, said[-1][:300] if said else "", at)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write files of the folder.

        Raises:
            PlanishError: they cannot be written.
        """
        try:
            yield
        except OSError as error:
            raise PlanishError(f"{self.folder}: cannot be written: {error.strerror or error}") from error

    def stop(self) -> None:
        """End the process; the next job starts another."""
        self._process = None
        if self._end is not None:
            self._end()

    def close(self) -> None:
        """End the process and remove the folder."""
        self.stop()
        self._remove()


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    process.wait()
