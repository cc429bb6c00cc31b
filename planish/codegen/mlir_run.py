"""Run a graph through torch-mlir's linalg form on the CPU: an oracle that shares no kernel with torch or ONNX Runtime.

The graph is lowered to linalg in float64, bufferised, turned into loops, and compiled by LLVM, without its
optimiser, in torch-mlir's ExecutionEngine; erf, exp, tanh and the like are those of the C library. Results are written
to buffers that the caller gives. Constants are arguments: they stay where they are in memory. Both the compiler and
what it makes run in another process (`mlir_process`), with arrays passed as .npy files.

    Compiled(graph, inputs).run(inputs)  ->  {output: float64 tensor}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from planish.codegen.mlir import KILLED, WITHOUT, Lowering
from planish.codegen.mlir_flat import flatten
from planish.codegen.mlir_process import Died
from planish.ir.errors import PlanishError

if TYPE_CHECKING:
    from planish.ir.graph import Graph

__all__ = ["Compiled", "Oracle"]

LARGE = 64  # elements from which an integer constant is an argument
_PIPELINE = (
    "func.func(refback-generalize-tensor-pad,refback-generalize-tensor-concat)",
    "func.func(linalg-generalize-named-ops,linalg-fuse-elementwise-ops)",
    "convert-shape-to-std",
    "inline",
    "func.func(tm-tensor-bufferize)",  # scan, sort, scatter, attention
    "one-shot-bufferize{copy-before-write bufferize-function-boundaries "
    "function-boundary-type-conversion=identity-layout-map}",
    "refback-mlprogram-bufferize",
    # without modify-public-functions a public function keeps its results, and the caller's buffers stay untouched
    "buffer-results-to-out-params{modify-public-functions}",
    "buffer-deallocation-pipeline",
    "func.func(tm-tensor-to-loops,refback-munge-memref-copy,convert-linalg-to-loops,lower-affine)",
    "convert-scf-to-cf",
    "func.func(arith-expand,convert-math-to-llvm)",
    "convert-math-to-libm",  # not refback-expand-ops-for-llvm, whose erf is a polynomial for float32
    "expand-strided-metadata",
    "finalize-memref-to-llvm",
    "lower-affine",
    "convert-bufferization-to-memref",
    "finalize-memref-to-llvm",
    "func.func(convert-arith-to-llvm)",
    "convert-vector-to-llvm",
    "convert-func-to-llvm",
    "convert-cf-to-llvm",
    "convert-complex-to-llvm",
    "reconcile-unrealized-casts",
)


class Compiled:
    """A graph compiled for inputs of fixed sizes.

    Args:
        graph: what to run.
        inputs: by name; only their sizes matter.
        dtype: in which every float is held and computed.

    Raises:
        PlanishError: torch-mlir is not installed, or an op cannot be run; the error names the op and its node.
            Or torch-mlir crashes.
    """

    def __init__(self, graph: Graph, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.name = graph.name
        self.names = tuple(name for name, _ in graph.outputs)
        flat = flatten(graph, dtype=dtype, lift=LARGE)
        lowering = Lowering(flat, self._held(inputs))
        self.inputs, self.results, self.worker = flat.inputs, lowering.results, lowering.worker
        try:
            constants = [self._put(f"constant{i}", tensor) for i, tensor in enumerate(flat.constants)]
            lowering.compile(",".join(_PIPELINE), constants)
        except BaseException:
            self.worker.close()
            raise

    def _put(self, name: str, tensor: torch.Tensor) -> Path:
        """Write a file for the process."""
        path = self.worker.folder / f"{name}.npy"
        with self.worker.writing():
            np.save(path, tensor.contiguous().numpy(), allow_pickle=False)
        return path

    def _held(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        wide = {name: torch.as_tensor(value) for name, value in inputs.items()}
        return {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in wide.items()}

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs by name.

        Args:
            inputs: by name, of the sizes that were compiled for; indices in range, which nothing checks here.

        Raises:
            PlanishError: the machine code crashes.
        """
        held = self._held(inputs)
        given = [self._put(f"input{i}", held[name]) for i, name in enumerate(self.inputs)]
        made = [self.worker.folder / f"result{i}.npy" for i in range(len(self.results))]
        results = [
            (str(path), list(shape), torch.empty(0, dtype=dtype).numpy().dtype.str)
            for path, (shape, dtype) in zip(made, self.results, strict=True)
        ]
        try:
            self.worker.ask({"do": "run", "inputs": [str(path) for path in given], "results": results})
        except Died as death:
            self.worker.close()
            what = f"graph '{self.name}': the machine code of torch-mlir died ({death})"
            raise PlanishError(what, hint=KILLED if death.how == "SIGKILL" else WITHOUT) from death
        found = [torch.from_numpy(np.load(path, allow_pickle=False)) for path in made]
        return dict(zip(self.names, found, strict=True))


class Oracle:
    """Runs a graph on inputs of any sizes, compiling it once for each set of sizes."""

    def __init__(self, graph: Graph, dtype: torch.dtype = torch.float64) -> None:
        self.graph = graph
        self.dtype = dtype
        self._compiled: dict[tuple[Any, ...], Compiled] = {}

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs by name.

        Raises:
            PlanishError: as `Compiled`; or an input is given that has a default.
        """
        default = next((v.name for v in self.graph.inputs if v.constant is not None and v.name in inputs), None)
        if default is not None:
            raise PlanishError(f"input '{default}': has a default, which is compiled in; leave it out")
        needed = {v.name: inputs[v.name] for v in self.graph.inputs if v.constant is None}
        key = tuple((name, tuple(value.shape)) for name, value in needed.items())
        if key not in self._compiled:
            self._compiled[key] = Compiled(self.graph, needed, self.dtype)
        try:
            return self._compiled[key].run(needed)
        except PlanishError:  # its process is gone
            del self._compiled[key]
            raise
