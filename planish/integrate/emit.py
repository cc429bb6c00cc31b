"""Write a graph as a file of the kind that its name says: .onnx, .ir or .mlir."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planish.codegen.onnx_emission import check_target
from planish.integrate.api import to_mlir, to_onnx
from planish.ir.errors import PlanishError, nearest

if TYPE_CHECKING:
    from planish.ir.graph import Graph

__all__ = ["Form", "Written", "form_of", "parse_sizes"]

KINDS = (".onnx", ".ir", ".mlir")


@dataclass(frozen=True)
class Form:
    """What to write.

    Attributes:
        path: the file.
        target: onnx or ort for .onnx; linalg, torch, tosa or stablehlo for .mlir; "ir" for .ir.
        opset: for .onnx: the version of the default domain; None: the model's own.
        sizes: for .mlir: sizes of symbols of the inputs.
    """

    path: Path
    target: str
    opset: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    def write(self, graph: Graph) -> Written:
        """Write a graph, whole or not at all.

        Raises:
            PlanishError: it has no such form, or the file cannot be written.
        """
        sizes: dict[str, int] = {}
        if self.path.suffix == ".ir":
            from planish.ir.store import save

            save(graph, self.path)
        elif self.path.suffix == ".mlir":
            sizes = to_mlir(graph, self.path, target=self.target, sizes=self.sizes)
        else:
            to_onnx(graph, self.path, target=self.target, opset=self.opset)
        chosen = tuple(name for name in sizes if name not in self.sizes)
        return Written(str(self.path), self.target, self.path.stat().st_size, sizes, chosen)


@dataclass(frozen=True)
class Written:
    """A file that was written.

    Attributes:
        path, target: as asked for.
        bytes: its size, without what stands beside it.
        sizes: for .mlir: the size of every symbol.
        chosen: the symbols whose size nobody gave.
    """

    path: str
    target: str
    bytes: int
    sizes: dict[str, int] = field(default_factory=dict)
    chosen: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """What the user should know."""
        found = [f"{self.path}: {self.target}, {self.bytes} bytes"]
        if self.sizes:
            listed = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
            found.append(f"sizes: {listed}" + ("; --size NAME=N takes others" if self.chosen else ""))
        return found


def form_of(path: str | Path, target: str | None = None, opset: int | None = None, sizes: Sequence[str] = ()) -> Form:
    """The form that a file's name and the options ask for, checked before any long work.

    Args:
        target: by default onnx for .onnx and linalg for .mlir.
        sizes: texts NAME=N.

    Raises:
        PlanishError: an unknown kind of file, a target or an option that does not fit it, or no torch-mlir for .mlir.
    """
    path = Path(path)
    if path.suffix not in KINDS:
        raise PlanishError(f"{path}: unknown kind of output; expected {', '.join(KINDS)}")
    if opset is not None and path.suffix != ".onnx":
        raise PlanishError("option --opset: is for .onnx", hint=f"{path} is written without one")
    if sizes and path.suffix != ".mlir":
        raise PlanishError("option --size: is for .mlir", hint=f"{path} keeps its symbols")
    if path.suffix == ".ir":
        if target is not None:
            raise PlanishError("option --target: is for .onnx and .mlir", hint="a text of the IR has none")
        return Form(path, "ir")
    if path.suffix == ".onnx":
        from planish.codegen.mlir import TARGETS

        if target in TARGETS:
            raise PlanishError(f"target '{target}': is for .mlir, not for {path}")
        check_target(target or "onnx")
        return Form(path, target or "onnx", opset)
    from planish.codegen.mlir import check_mlir_target, require

    check_mlir_target(target or "linalg")
    require()
    return Form(path, target or "linalg", None, parse_sizes(sizes))


def parse_sizes(texts: Sequence[str]) -> dict[str, int]:
    """NAME=N, each.

    Raises:
        PlanishError: another form, or a name twice.
    """
    found: dict[str, int] = {}
    for text in texts:
        for part in text.split(","):
            name, _, number = part.partition("=")
            if not name.strip() or not number.strip().isdecimal():
                raise PlanishError(f"size '{part}': expected NAME=N", hint="--size batch=1 --size sequence=16")
            if name.strip() in found:
                raise PlanishError(f"size '{name.strip()}': is given twice", hint=nearest(name, found))
            found[name.strip()] = int(number)
    return found
