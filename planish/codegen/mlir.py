"""Emit MLIR through torch-mlir: a graph becomes a module of the linalg, torch, tosa or stablehlo dialect.

    graph -> torch code on a flat signature -> torch.export -> the torch dialect -> the target's dialect

Every size is concrete: a symbol of the inputs takes the size that was asked for, or the one that random inputs get
(`sized`). An operation of the MLIR module bears the name of the IR value that it computes as its location, so that
what torch-mlir refuses is named by its node.

Nothing of torch-mlir is imported before a function is called; it is the extra `planish[mlir]`.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from planish import __version__
from planish.codegen.mlir_flat import Flat, exported, first_line, flatten, sized
from planish.codegen.onnx_emission import Emission as OnnxEmission
from planish.ir.errors import FOREIGN, PlanishError, nearest
from planish.ir.files import atomic

if TYPE_CHECKING:
    from planish.ir.graph import Graph, Node

__all__ = ["TARGETS", "Lowering", "check_mlir_target", "require", "write"]

# target: (the pipeline from the torch dialect to it, the targets to look at where it cannot hold an op)
TARGETS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "linalg": ("torch-backend-to-linalg-on-tensors-backend-pipeline{allow-non-finites=true}", ("torch",)),
    "torch": (None, ()),
    "tosa": ("torch-backend-to-tosa-backend-pipeline", ("linalg", "stablehlo", "torch")),
    "stablehlo": ("torch-backend-to-stablehlo-backend-pipeline{allow-non-finites=true}", ("linalg", "tosa", "torch")),
}
_TO_TORCH = "func.func(torch-match-quantized-custom-ops),torchdynamo-export-to-torch-backend-pipeline"
_INSTALL = "pip install 'planish[mlir]'"
_REFUSED = re.compile(r"'(?:torch\.)?((?:torch|tm_tensor|torch_c|aten|prims|quantized_decomposed)[\w.:]*)'")
_OPERATOR = re.compile(r'name = "torch\.([\w.]+)"')  # of one that torch-mlir does not know
_LOCATION = re.compile(r'"planish:(\d+)"')


def require() -> None:
    """Refuse to go on without torch-mlir.

    Raises:
        PlanishError: it is not installed.
    """
    if importlib.util.find_spec("torch_mlir") is None:
        raise PlanishError(f"torch-mlir: is not installed; {_INSTALL}")


def check_mlir_target(target: str) -> None:
    """Refuse a target that is none of MLIR's.

    Raises:
        PlanishError: it is not.
    """
    if target not in TARGETS:
        raise PlanishError(
            f"target '{target}': has no MLIR; expected {', '.join(TARGETS)}", hint=nearest(target, TARGETS)
        )


# -- lowering --------------------------------------------------------------------------------------------


class Lowering:
    """A graph on its way to MLIR, as the torch dialect.

    Attributes:
        flat: the torch code.
        results: (shape, dtype) of every output.

    Args:
        flat: the torch code.
        inputs: example inputs by name: their sizes are those of the MLIR.

    Raises:
        PlanishError: torch-mlir is not installed, torch.export or torch-mlir does not take the graph.
    """

    def __init__(self, flat: Flat, inputs: Mapping[str, torch.Tensor]) -> None:
        require()
        self.flat = flat
        try:
            program, self.results = exported(flat, [*(inputs[name] for name in flat.inputs), *flat.constants])
        except PlanishError as error:
            raise PlanishError(error.what, where=error.where, hint=self._portable()) from error
        importer, ir = (importlib.import_module(f"torch_mlir.{n}") for n in ("extras.fx_importer", "ir"))
        self._failures = (*FOREIGN, ir.MLIRError)
        self.passes = importlib.import_module("torch_mlir.passmanager").PassManager
        self.context = ir.Context()
        self.context.emit_error_diagnostics = True  # to the handler of `run`
        importlib.import_module("torch_mlir.dialects.torch").register_dialect(self.context)
        made = importer.FxImporter(context=self.context)
        try:
            made.import_frozen_program(program, func_name="main")
        except self._failures as error:
            raise PlanishError(
                f"graph '{flat.graph.name}': torch-mlir cannot read it: {first_line(error)}", hint=self._portable()
            ) from error
        self.module: Any = made.module
        found = self.run(self.module, _TO_TORCH)
        if found is not None:
            raise self.refusal(None, found, self.module)

    def to(self, target: str) -> Any:
        """The module in the dialect of a target.

        Raises:
            PlanishError: it cannot hold an op; the error names the op, its node and the nearest target that can.
        """
        check_mlir_target(target)
        pipeline, _ = TARGETS[target]
        module = self._copy()
        found = self.run(module, pipeline) if pipeline is not None else None
        if found is not None:
            raise self.refusal(target, found, module)
        return module

    def _copy(self) -> Any:
        with self.context:
            return self.module.operation.clone()

    def run(self, module: Any, pipeline: str) -> list[tuple[str, str]] | None:
        """Run a pipeline on a module; (message, location) of what it complains of if it fails."""
        target = getattr(module, "operation", module)
        return self.attempt(lambda: self.passes.parse(f"builtin.module({pipeline})").run(target))

    def attempt(self, work: Callable[[], Any]) -> list[tuple[str, str]] | None:
        """Work in the context; (message, location) of what it complains of if it fails."""
        complaints: list[tuple[str, str]] = []

        def note(found: Any) -> bool:
            complaints.append((str(found.message), str(found.location)))
            return True

        handler = self.context.attach_diagnostic_handler(note)
        try:
            with self.context:
                work()
        except self._failures as error:
            return complaints or [(first_line(error), "")]
        finally:
            handler.detach()
        return None

    def refusal(self, target: str | None, complaints: Sequence[tuple[str, str]], module: Any) -> PlanishError:
        """The error for what a pipeline complained of; `module` is what it left. None: on the way to torch."""
        lacking = f"the target {target} cannot hold it" if target is not None else "torch-mlir has no form of it"
        named = _located(complaints) or _left(module, complaints) or list(complaints)
        what, where = self._named(lacking, named)
        return PlanishError(what, where=where, hint=self._able(target))

    def cannot_run(self, complaints: Sequence[tuple[str, str]]) -> PlanishError:
        """The error for a module of linalg that does not become machine code."""
        what, where = self._named("linalg cannot be run on the CPU with it", _located(complaints) or list(complaints))
        return PlanishError(what, where=where, hint="without --oracle, the models are evaluated by torch")

    def _named(self, lacking: str, complaints: Sequence[tuple[str, str]]) -> tuple[str, str | None]:
        """The text of an error, and the node."""
        message, location = next((c for c in complaints if _REFUSED.search(c[0])), complaints[0])
        place, refused = _LOCATION.search(location), _OPERATOR.search(message) or _REFUSED.search(message)
        node: Node | None = list(self.flat.graph.nodes)[int(place[1])] if place is not None else None
        what = refused[1] if refused is not None else message.splitlines()[0]
        which = f"op '{node.op.name}'" if node is not None else f"graph '{self.flat.graph.name}'"
        return f"{which}: {lacking} ({what})", str(node) if node is not None else None

    def _able(self, target: str | None) -> str | None:
        """The nearest target that can hold the graph."""
        for other in TARGETS[target][1] if target is not None else ():
            pipeline, _ = TARGETS[other]
            if pipeline is None or self.run(self._copy(), pipeline) is None:
                return f"the target {other} can hold this model"
        return self._portable()

    def _portable(self) -> str | None:
        """ONNX, where the graph can be written so."""
        try:
            OnnxEmission(self.flat.graph).model()
        except PlanishError:
            return None
        return "no target of MLIR holds this model, ONNX does: write an .onnx file"


def _located(complaints: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [entry for entry in complaints if _LOCATION.search(entry[1])]


def _left(module: Any, complaints: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """(name, location) of the operations that no pattern took, where the complaint names only a constant they read."""
    if not any("failed to legalize" in message for message, _ in complaints):
        return []
    found: list[tuple[str, str]] = []

    def look(operation: Any) -> Any:
        if operation.name.startswith(("torch.aten", "torch.prims", "torch.operator", "torch.quant")):
            found.append((f"'{operation.name}'", str(operation.location)))
        return advance

    walk = importlib.import_module("torch_mlir.ir")
    advance = walk.WalkResult.ADVANCE
    getattr(module, "operation", module).walk(look)
    return _located(found)


# -- files -----------------------------------------------------------------------------------------------


def write(
    graph: Graph, path: str | Path, *, target: str = "linalg", sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Write the graph as MLIR text, weights included, whole or not at all.

    Args:
        target: a key of `TARGETS`.
        sizes: sizes of symbols of the inputs, as for `sized`.

    Returns:
        The size of every symbol.

    Raises:
        PlanishError: torch-mlir is not installed, an op that the target cannot hold, or the file cannot be written.
    """
    check_mlir_target(target)
    require()
    inputs, chosen = sized(graph, sizes)
    lowering = Lowering(flatten(graph), inputs)
    module = lowering.to(target)
    with atomic(path) as handle:
        handle.write(_header(lowering, inputs, target, chosen).encode("ascii", "backslashreplace"))
        module.print(file=handle, binary=True)
        handle.write(b"\n")
    return chosen


def _header(lowering: Lowering, inputs: Mapping[str, torch.Tensor], target: str, sizes: Mapping[str, int]) -> str:
    """Comments in front of the module: what made it, and the names of arguments and results."""
    taken = [f"{name} {_type(tuple(t.shape), t.dtype)}" for name, t in inputs.items()]
    names = [name for name, _ in lowering.flat.graph.outputs]
    given = [f"{name} {_type(*result)}" for name, result in zip(names, lowering.results, strict=True)]
    lines = [
        f"planish {__version__}, torch-mlir {version('torch-mlir')}, target {target}",
        f"arguments: {', '.join(taken)}",
        f"results: {', '.join(given)}",
    ]
    if sizes:
        lines.append(f"sizes: {', '.join(f'{name}={size}' for name, size in sizes.items())}")
    return "".join(f"// {' '.join(line.split())}\n" for line in lines)


def _type(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"
