"""Runs torch-mlir's native code: a script, started by `mlir_process` in a process of its own, which may die of it.

One JSON line in, one out, files by their paths: `lower` a module, on to a file of text or to machine code, which `run`
runs. A line {"at": n} says that pipeline n begins. Nothing of planish or torch is imported.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torch_mlir import execution_engine, ir, passmanager, runtime  # noqa: TID253  a script that planish never imports
from torch_mlir.dialects import torch as dialect  # noqa: TID253

FAILURES = (ir.MLIRError, RuntimeError, ValueError, TypeError, AttributeError, LookupError)


class Session:
    """What a process holds: the machine code that was made last, and its constants."""

    def __init__(self, tell: Callable[[Any], None]) -> None:
        self.tell = tell
        self.engine: Any = None
        self.constants: list[Any] = []

    def lower(self, job: dict[str, Any]) -> dict[str, Any]:
        """Run pipelines on the module of a file.

        Args:
            job: `module`, a file of bytecode; `pipelines`; `text`, the file to append the result to, or None;
                `constants`, .npy files, where the result of the last pipeline is to be compiled, or None.

        Returns:
            {} or, of the pipeline that failed, `failed`: its place, `complaints` and `left`, each (text, location).
        """
        context = ir.Context()
        context.emit_error_diagnostics = True
        dialect.register_dialect(context)
        held: dict[str, Any] = {}

        def read() -> None:
            held["module"] = ir.Module.parseFile(job["module"])

        complaints = attempt(context, read)
        failed = 0
        for place, pipeline in enumerate(job["pipelines"]):
            if complaints is None:
                failed = place
                self.tell({"at": place})
                if place == 2:  # the C interface, by which `run` calls
                    interface(context, held["module"])
                complaints = attempt(context, partial(run_passes, held["module"], pipeline))
        if complaints is None and job["constants"] is not None:
            complaints = attempt(context, lambda: self.compile(held["module"], job["constants"]))
        if complaints is not None:
            return {"failed": failed, "complaints": complaints, "left": left(held["module"]) if held else []}
        if job["text"] is not None:
            with open(job["text"], "ab") as file:
                held["module"].operation.print(file=file, binary=True)
        return {}

    def compile(self, module: Any, constants: list[str]) -> None:
        """Machine code of a module of LLVM's dialect, without LLVM's optimiser."""
        self.engine = execution_engine.ExecutionEngine(module, opt_level=0)
        self.engine.lookup("main")
        self.constants = [np.load(name, allow_pickle=False) for name in constants]

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Run the machine code.

        Args:
            job: `inputs`, .npy files; `results`: (.npy file to write, shape, dtype) of each.
        """
        given = [np.load(name, allow_pickle=False) for name in job["inputs"]]
        made = [np.zeros(shape, dtype) for _, shape, dtype in job["results"]]
        arguments = [pointer(array) for array in (*given, *self.constants, *made)]
        self.engine.invoke("main", *arguments)
        for (name, _, _), array in zip(job["results"], made, strict=True):
            np.save(name, array, allow_pickle=False)
        return {}


def run_passes(module: Any, pipeline: str) -> None:
    """Run a pipeline on a module."""
    passmanager.PassManager.parse(f"builtin.module({pipeline})").run(module.operation)


def attempt(context: Any, work: Callable[[], None]) -> list[tuple[str, str]] | None:
    """Work in a context; (message, location) of what it complains of if it fails."""
    complaints: list[tuple[str, str]] = []

    def note(found: Any) -> bool:
        complaints.append((str(found.message), str(found.location)))
        return True

    handler = context.attach_diagnostic_handler(note)
    try:
        with context:
            work()
    except FAILURES as error:
        return complaints or [(str(error).strip() or type(error).__name__, "")]
    finally:
        handler.detach()
    return None


def interface(context: Any, module: Any) -> None:
    """Have the function called by pointers to memrefs."""
    with context:
        function = next(op for op in module.body.operations if op.operation.name == "func.func")
        function.attributes["llvm.emit_c_interface"] = ir.UnitAttr.get()


def left(module: Any) -> list[tuple[str, str]]:
    """(name, location) of the operations that no pattern took."""
    found: list[tuple[str, str]] = []

    def look(operation: Any) -> Any:
        if operation.name.startswith(("torch.aten", "torch.prims", "torch.operator", "torch.quant")):
            found.append((f"'{operation.name}'", str(operation.location)))
        return ir.WalkResult.ADVANCE

    module.operation.walk(look)
    return found


def pointer(array: Any) -> Any:
    """A memref of an array, as the C interface of a function takes it."""
    return ctypes.pointer(ctypes.pointer(runtime.get_ranked_memref_descriptor(array)))


def main() -> int:
    """Serve jobs until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's, who ends this process
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what native code prints must not end up between the answers

    def tell(answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")

    session = Session(tell)
    for line in sys.stdin:
        job = json.loads(line)
        tell(session.run(job) if job["do"] == "run" else session.lower(job))
    return 0


if __name__ == "__main__":
    sys.exit(main())
