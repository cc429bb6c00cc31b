"""Run a graph through torch-mlir's linalg form on the CPU: an oracle that shares no kernel with torch or ONNX Runtime.

The graph is lowered to linalg in float64, bufferised, turned into loops, and compiled by LLVM, without its
optimiser, in torch-mlir's ExecutionEngine; erf, exp, tanh and the like are those of the C library. Results are written
to buffers that the caller gives. Constants are arguments: they stay where they are in memory.

    Compiled(graph, inputs).run(inputs)  ->  {output: float64 tensor}
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from planish.codegen.mlir import Lowering
from planish.codegen.mlir_flat import flatten
from planish.ir.errors import PlanishError

if TYPE_CHECKING:
    import numpy as np

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
    """

    def __init__(self, graph: Graph, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.names = tuple(name for name, _ in graph.outputs)
        flat = flatten(graph, dtype=dtype, lift=LARGE)
        lowering = Lowering(flat, self._held(inputs))
        module = lowering.to("linalg")
        self.inputs, self.results = flat.inputs, lowering.results
        self.constants = [tensor.contiguous().numpy() for tensor in flat.constants]
        ir, engine = (importlib.import_module(f"torch_mlir.{name}") for name in ("ir", "execution_engine"))
        with lowering.context:
            function = next(op for op in module.regions[0].blocks[0].operations if op.operation.name == "func.func")
            function.attributes["llvm.emit_c_interface"] = ir.UnitAttr.get()
        found = lowering.run(module, ",".join(_PIPELINE))
        if found is None:
            text = module.get_asm(binary=True, enable_debug_info=True)

            def compile_() -> None:
                self._engine: Any = engine.ExecutionEngine(ir.Module.parse(text), opt_level=0)
                self._engine.lookup("main")

            found = lowering.attempt(compile_)
        if found is not None:
            raise lowering.cannot_run(found)

    def _held(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        wide = {name: torch.as_tensor(value) for name, value in inputs.items()}
        return {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in wide.items()}

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs by name.

        Args:
            inputs: by name, of the sizes that were compiled for; indices in range, which nothing checks here.
        """
        held = self._held(inputs)
        given = [held[name].contiguous().numpy() for name in self.inputs]
        made = [torch.zeros(shape, dtype=dtype) for shape, dtype in self.results]
        arguments = [_pointer(array) for array in (*given, *self.constants, *(t.numpy() for t in made))]
        self._engine.invoke("main", *arguments)
        return dict(zip(self.names, made, strict=True))


def _pointer(array: np.ndarray) -> Any:
    """A memref of an array, as the C interface of a function takes it."""
    runtime = importlib.import_module("torch_mlir.runtime")
    return ctypes.pointer(ctypes.pointer(runtime.get_ranked_memref_descriptor(array)))


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
        return self._compiled[key].run(needed)
