"""Emit MLIR through torch-mlir: a graph becomes a module of the linalg, torch, tosa or stablehlo dialect.

    graph -> torch code on a flat signature -> torch.export -> the torch dialect -> the target's dialect

Every size is concrete: a symbol of the inputs takes the size that was asked for, or the one that random inputs get
(`sized`). An operation of the MLIR module bears the name of the IR value that it computes as its location, so that
what torch-mlir refuses is named by its node. Its pipelines run in another process: they are native code that crashes
on some graphs (`mlir_process`).

Nothing of torch-mlir is imported before a function is called; it is the extra `planish[mlir]`.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from planish import __version__
from planish.codegen.mlir_flat import Flat, exported, first_line, flatten, sized
from planish.codegen.mlir_process import Died, Worker
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
WITHOUT = "without --oracle, the models are evaluated by torch"
KILLED = "the memory may have run out: smaller sizes take less"
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
    """A graph on its way to MLIR: its program as torch-mlir reads it, and the process that lowers it.

    Attributes:
        flat: the torch code.
        results: (shape, dtype) of every output.
        worker: the process, and the folder for its files; to be closed.

    Args:
        flat: the torch code.
        inputs: example inputs by name: their sizes are those of the MLIR.

    Raises:
        PlanishError: torch-mlir is not installed, torch.export or torch-mlir does not take the graph.
    """

    def __init__(self, flat: Flat, inputs: Mapping[str, torch.Tensor]) -> None:
        require()
        self.flat = flat
        self._inputs = inputs
        self.worker = Worker()  # which starts while the program is made
        try:
            self._program = self._read(inputs)
        except BaseException:
            self.worker.close()
            raise

    def _read(self, inputs: Mapping[str, torch.Tensor]) -> Path:
        """The file of the program in torch-mlir's bytecode."""
        flat = self.flat
        try:
            program, self.results = exported(flat, [*(inputs[name] for name in flat.inputs), *flat.constants])
        except PlanishError as error:
            raise PlanishError(error.what, where=error.where, hint=self._portable()) from error
        importer, ir = (importlib.import_module(f"torch_mlir.{n}") for n in ("extras.fx_importer", "ir"))
        context = ir.Context()
        importlib.import_module("torch_mlir.dialects.torch").register_dialect(context)
        made = importer.FxImporter(context=context)
        try:
            made.import_frozen_program(program, func_name="main")
        except (*FOREIGN, ir.MLIRError) as error:
            raise PlanishError(
                f"graph '{flat.graph.name}': torch-mlir cannot read it: {first_line(error)}", hint=self._portable()
            ) from error
        path = self.worker.folder / "program.mlirbc"
        with self.worker.writing(), path.open("wb") as file:
            made.module.operation.write_bytecode(file)
        return path

    def write(self, target: str, path: Path) -> None:
        """Append the text in the dialect of a target to a file.

        Raises:
            PlanishError: it cannot hold an op; the error names the op, its node and the nearest target that can.
                Or torch-mlir crashes.
        """
        check_mlir_target(target)
        self._lower(target, self._job(target, text=path))

    def compile(self, pipeline: str, constants: Sequence[Path]) -> None:
        """Have the process make machine code, by way of linalg and a pipeline from there to LLVM's dialect.

        Args:
            constants: .npy files of the arguments behind the inputs.

        Raises:
            PlanishError: an op cannot be run, or torch-mlir crashes.
        """
        job = self._job("linalg")
        job |= {"pipelines": [*job["pipelines"], pipeline], "constants": [str(path) for path in constants]}
        self._lower("linalg", job)

    def _job(self, target: str | None, text: Path | None = None) -> dict[str, Any]:
        """What the process is told; target None: as far as the torch dialect."""
        pipeline = TARGETS[target][0] if target is not None else None
        pipelines = [_TO_TORCH, pipeline] if pipeline is not None else [_TO_TORCH]
        return {
            "do": "lower",
            "module": str(self._program),
            "pipelines": pipelines,
            "text": str(text) if text is not None else None,
            "constants": None,
        }

    def _lower(self, target: str, job: Mapping[str, Any]) -> None:
        try:
            answer = self.worker.ask(job)
        except Died as death:
            raise self._crash(target, death, job) from death
        if not answer:
            return
        complaints, left = ([(text, place) for text, place in answer[key]] for key in ("complaints", "left"))
        if answer["failed"] == 2:
            raise self.cannot_run(complaints)
        raise self.refusal(target if answer["failed"] else None, complaints, left)

    def _crash(self, target: str, death: Died, job: Mapping[str, Any]) -> PlanishError:
        """The error for a process that died of a job."""
        way = {0: "the torch dialect", 1: f"the target {target}"}.get(death.at or 0, "machine code")
        what = f"torch-mlir died on the way to {way} ({death})"
        node: Node | None = None
        hint: str | None = KILLED
        if death.how != "SIGKILL":
            node = self._deadly(job)
            hint = WITHOUT if job["constants"] is not None else self._able(target, fresh=True)
        which = f"op '{node.op.name}'" if node is not None else f"graph '{self.flat.graph.name}'"
        return PlanishError(f"{which}: {what}", where=str(node) if node is not None else None, hint=hint)

    def _deadly(self, job: Mapping[str, Any]) -> Node | None:
        """The node of which the process dies: the last of the fewest first ones that kill it. None: not one alone."""
        nodes = list(self.flat.graph.nodes)
        if not nodes or self._dies({**job, "pipelines": [], "text": None, "constants": None}):
            return None
        lives, dies = 0, len(nodes)
        while dies - lives > 1:
            middle = (lives + dies) // 2
            if self._part_dies(middle, job):
                dies = middle
            else:
                lives = middle
        return nodes[dies - 1] if self._part_dies(dies, job) else None

    def _part_dies(self, count: int, job: Mapping[str, Any]) -> bool:
        """Whether a process dies of the first nodes."""
        try:
            part = Lowering(self.flat.first(count), self._inputs)
        except PlanishError:
            return False
        try:
            constants: list[str] | None = [] if job["constants"] is not None else None
            return part._dies({**job, "module": str(part._program), "text": None, "constants": constants})
        finally:
            part.worker.close()

    def _dies(self, job: Mapping[str, Any]) -> bool:
        try:
            self.worker.ask(job)
        except Died:
            return True
        return False

    def refusal(
        self, target: str | None, complaints: Sequence[tuple[str, str]], left: Sequence[tuple[str, str]]
    ) -> PlanishError:
        """The error for what a pipeline complained of; `left`: the ops that it left. None: on the way to torch."""
        lacking = f"the target {target} cannot hold it" if target is not None else "torch-mlir has no form of it"
        stuck = any("failed to legalize" in message for message, _ in complaints)  # names but a constant they read
        named = _located(complaints) or (_located(left) if stuck else []) or list(complaints)
        what, where = self._named(lacking, named)
        return PlanishError(what, where=where, hint=self._able(target))

    def cannot_run(self, complaints: Sequence[tuple[str, str]]) -> PlanishError:
        """The error for a module of linalg that does not become machine code."""
        what, where = self._named("linalg cannot be run on the CPU with it", _located(complaints) or list(complaints))
        return PlanishError(what, where=where, hint=WITHOUT)

    def _named(self, lacking: str, complaints: Sequence[tuple[str, str]]) -> tuple[str, str | None]:
        """The text of an error, and the node."""
        message, location = next((c for c in complaints if _REFUSED.search(c[0])), complaints[0])
        place, refused = _LOCATION.search(location), _OPERATOR.search(message) or _REFUSED.search(message)
        node: Node | None = list(self.flat.graph.nodes)[int(place[1])] if place is not None else None
        what = refused[1] if refused is not None else message.splitlines()[0]
        which = f"op '{node.op.name}'" if node is not None else f"graph '{self.flat.graph.name}'"
        return f"{which}: {lacking} ({what})", str(node) if node is not None else None

    def _able(self, target: str | None, fresh: bool = False) -> str | None:
        """The nearest target that can hold the graph; `fresh`: it may be that not even the torch dialect can."""
        for other in TARGETS[target][1] if target is not None else ():
            with suppress(Died):
                if (other == "torch" and not fresh) or not self.worker.ask(self._job(other)):
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
        PlanishError: torch-mlir is not installed or crashes, an op that the target cannot hold, or the file cannot be
            written.
    """
    check_mlir_target(target)
    require()
    inputs, chosen = sized(graph, sizes)
    lowering = Lowering(flatten(graph), inputs)
    try:
        text = lowering.worker.folder / "text.mlir"
        with lowering.worker.writing():
            text.write_bytes(_header(lowering, inputs, target, chosen).encode("ascii", "backslashreplace"))
        lowering.write(target, text)
        with atomic(path) as handle, text.open("rb") as made:
            shutil.copyfileobj(made, handle, 1 << 20)
            handle.write(b"\n")
    finally:
        lowering.worker.close()
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
