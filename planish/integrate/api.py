"""The functions that users call: capture a model, collect statistics, write ONNX, compare two models."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from planish.calibrate.collect import collect
from planish.ir.errors import PlanishError, nearest
from planish.ir.graph import Graph
from planish.ir.types import TensorType

if TYPE_CHECKING:
    import numpy as np
    import torch
    from onnx import ModelProto
    from torch import nn
    from torch.export import ExportedProgram

    Model = str | Path | ModelProto | Graph | nn.Module | ExportedProgram
    Inputs = Mapping[str, np.ndarray | torch.Tensor]

__all__ = [
    "Comparison", "OutputDifference",
    "capture", "collect", "compare_graphs", "to_mlir", "to_onnx", "to_torch", "verify",
]  # fmt: skip

EQUAL = 1e-5  # relative: weights that were folded are rounded to float32 once more
ORACLES = ("mlir",)


def capture(model: Model, inputs: Any = None, *, dynamic_shapes: Any = None) -> Graph:
    """Capture a model as a graph.

    Args:
        model: a path to an .onnx file or to a text of the IR (.ir), a Python target (`module:callable` or
            `file.py:callable`, which returns a model and its inputs), an ONNX ModelProto, a torch module, a program of
            torch.export, an FX graph as a torch.compile backend receives it, or a graph (returned as it is).
        inputs: example inputs of a torch module: a tensor, a tuple of positional arguments, a dict of keyword
            arguments, or a pair of both; what a backend receives with an FX graph. Other models need none.
        dynamic_shapes: of a torch module: as for `torch.export.export`.

    Raises:
        PlanishError: the model cannot be read or is not valid, or is of another kind.
    """
    if isinstance(model, Graph):
        return model
    if isinstance(model, str | Path):
        if isinstance(model, str):
            from planish.integrate import python_target

            if python_target.is_target(model):
                made, given = python_target.load(model)
                python_target.check_inputs(model, made, given if inputs is None else inputs)
                return capture(made, given if inputs is None else inputs, dynamic_shapes=dynamic_shapes)
        path = Path(model)
        if path.suffix == ".py":
            raise PlanishError(
                f"{path}: a Python file is no model", hint=f"name a function in it that returns one: {path}:function"
            )
        if path.suffix == ".ir":
            from planish.ir.store import load

            return load(path)
        from planish.capture.from_onnx import from_onnx

        return from_onnx(path)
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if type(model).__name__ == "ModelProto":
        from planish.capture.from_onnx import from_onnx

        return from_onnx(cast("ModelProto", model))
    if "torch" in sys.modules:
        from torch import fx, nn
        from torch.export import ExportedProgram

        from planish.capture import from_dynamo, from_fx

        if isinstance(model, ExportedProgram):
            return from_fx.from_program(model)
        if isinstance(model, fx.GraphModule) and from_dynamo.is_dynamo(model):
            return from_dynamo.from_dynamo(model, inputs)
        if isinstance(model, nn.Module):
            return from_fx.from_module(model, inputs, dynamic_shapes=dynamic_shapes)
    raise PlanishError(
        f"model: a {kind} cannot be captured; expected a path to an .onnx file, an onnx.ModelProto, a torch.nn.Module "
        "or a torch.export.ExportedProgram"
    )


def to_onnx(graph: Graph, path: str | Path, *, target: str = "onnx", opset: int | None = None) -> None:
    """Write a graph as an ONNX file, whole or not at all.

    Args:
        target: "onnx" for standard operators only, "ort" to allow ONNX Runtime's own.
        opset: the version of ONNX's default domain; the graph's own by default.

    Raises:
        PlanishError: an op has no ONNX form, or the file cannot be written.
    """
    from planish.codegen.onnx import write

    write(graph, path, target=target, opset=opset)


def to_torch(graph: Graph, *, dtype: torch.dtype | str | None = None) -> torch.fx.GraphModule:
    """The graph as a torch module that is called as the captured one.

    With no pass applied, a captured torch module comes back bit for bit. Parameters stand at their module paths.
    A graph of ONNX takes its inputs by position or by name and returns its output, or a dict of its outputs.

    Args:
        dtype: hold every float in this dtype: torch.float64, or "float64", keeps what passes folded unrounded.

    Raises:
        PlanishError: an op that torch does not have, or a dtype that is none of a float.
    """
    from planish.codegen.torch import to_torch

    return to_torch(graph, dtype=dtype)


def to_mlir(
    graph: Graph, path: str | Path, *, target: str = "linalg", sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Write a graph as a text of MLIR, weights included, whole or not at all; needs `planish[mlir]`.

    Args:
        target: the dialect: "linalg", "torch", "tosa" or "stablehlo".
        sizes: the size of a symbol of the inputs, by its name. A size that is not given is 2 for the first dim of an
            input, for the others the first of 8, 16, .. 256 on which the graph can be evaluated.

    Returns:
        The size of every symbol.

    Raises:
        PlanishError: torch-mlir is not installed, or the target cannot hold an op: the error names its node.
    """
    from planish.codegen.mlir import write

    return write(graph, path, target=target, sizes=sizes)


@dataclass(frozen=True)
class OutputDifference:
    """How far one output of two models is apart.

    Attributes:
        name: of the output.
        error: max |a - b| / max |b|; infinite where shapes differ or one is not finite.
        worst: the worst element with both values.
    """

    name: str
    error: float
    worst: str


@dataclass(frozen=True)
class Comparison:
    """Two models on the same inputs, in float64.

    Attributes:
        outputs: one entry per output, the largest error over all inputs.
        tolerance: the error up to which they are called equal.
        inputs: the number of sets of inputs.
        narrow: nodes that could only be evaluated in float32.
        notes: what else the user should know.
        oracle: what computed the outputs that were compared; None: planish's own evaluator.
        agreement: with an oracle: how far the evaluator is from it, for every output of each model.
    """

    outputs: tuple[OutputDifference, ...]
    tolerance: float
    inputs: int
    narrow: int = 0
    notes: tuple[str, ...] = field(default=())
    oracle: str | None = None
    agreement: tuple[OutputDifference, ...] = field(default=())

    @property
    def error(self) -> float:
        return max((o.error for o in self.outputs), default=0.0)

    @property
    def equal(self) -> bool:
        """True if the models agree, and each with its oracle."""
        return all(o.error <= self.tolerance for o in (*self.outputs, *self.agreement))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "error": self.error, "equal": self.equal}


def verify(
    first: str | Path | ModelProto | Graph,
    second: str | Path | ModelProto | Graph | None = None,
    *,
    inputs: Inputs | Sequence[Inputs] | str | Path | None = None,
    tolerance: float = EQUAL,
    count: int = 2,
    seed: int = 0,
    oracle: str | None = None,
) -> Comparison:
    """Evaluate two models in float64 on random inputs, and on given ones, and compare their outputs.

    Args:
        first, second: as for `capture`; the errors are relative to the first. With an oracle there need not be a
            second: the first is then compared with itself as the oracle computes it.
        inputs: a set of inputs, a sequence of them, or an .npz file with one.
        tolerance: the relative error up to which they are equal.
        count: sets of random inputs.
        seed: of the random inputs.
        oracle: what computes the outputs: None for planish's evaluator, which calls torch; "mlir" for code that
            torch-mlir and LLVM make of the models, in float64 too. The evaluator is then compared with it as well.

    Raises:
        PlanishError: a model that cannot be read, inputs or outputs that do not correspond, no inputs on which the
            first model can be evaluated, or a model that the oracle cannot run.
    """
    if oracle is not None and oracle not in ORACLES:
        raise PlanishError(f"oracle '{oracle}': unknown; expected {', '.join(ORACLES)}", hint=nearest(oracle, ORACLES))
    if oracle is not None:
        from planish.codegen.mlir import require

        require()
    if second is None and oracle is None:
        raise PlanishError("verify: the second model is missing", hint="--oracle mlir compares a model with itself")
    one = capture(first)
    two = capture(second) if second is not None else one
    given: list[Any] = []
    if isinstance(inputs, str | Path):
        from planish.calibrate.data import load_inputs

        given = [load_inputs(inputs, one)]
    elif isinstance(inputs, Mapping):
        given = [inputs]
    elif inputs is not None:
        given = list(inputs)
    return compare_graphs(one, two, given, tolerance=tolerance, count=count, seed=seed, oracle=oracle)


def compare_graphs(
    one: Graph,
    two: Graph,
    given: Iterable[Inputs],
    *,
    tolerance: float,
    count: int,
    seed: int,
    oracle: str | None = None,
) -> Comparison:
    """`verify` for graphs."""
    import torch

    from planish.ir.evaluator import Evaluator
    from planish.passes.validation import make_probe

    pairs = _outputs(one, two)
    _same_inputs(one, two)
    probe = make_probe(one, seed, count=count) if count else None
    trials = [*(probe.inputs if probe is not None else []), *given]
    if not trials:
        reason = probe.reason if probe is not None else "none were given"
        raise PlanishError(
            f"no inputs to compare on: {reason}",
            hint="give inputs that the model accepts (--inputs data.npz)",
        )
    oracles: list[Any] = []
    alone = oracle is not None and one is two
    if oracle is not None:
        from planish.codegen.mlir_run import Oracle

        oracles = [Oracle(graph) for graph in ((one,) if alone else (one, two))]
    compared, checks = _Worst(), [_Worst() for _ in oracles]
    narrow = 0
    for trial in trials:
        left, right = Evaluator(one, torch.float64), Evaluator(two, torch.float64)
        results = [left.run(trial), {} if alone else right.run(trial)]
        narrow = max(narrow, len(left.narrowed), len(right.narrowed))
        if oracles:
            found = [made.run(trial) for made in oracles]
            for check, mine, theirs in zip(checks, found, results, strict=False):
                for name in mine:
                    check.add(name, mine[name], theirs[name])
            results = found
        for a, b in () if alone else pairs:
            compared.add(a, results[0][a], results[1][b])
    renamed = [f"output '{a}' is compared with '{b}'" for a, b in pairs if a != b]
    if alone:
        compared, checks = checks[0], []
    agreement = [
        OutputDifference(f"{which} model: {entry.name}", entry.error, entry.worst)
        for which, check in zip(("first", "second"), checks, strict=False)
        for entry in check.entries()
    ]
    return Comparison(
        tuple(compared.entries()), tolerance, len(trials), narrow, tuple(renamed), oracle, tuple(agreement)
    )


class _Worst:
    """The largest error of every output, and where it is."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, str]] = {}

    def add(self, name: str, expected: Any, got: Any) -> None:
        import torch

        from planish.ir.probe import relative_error, worst_element

        if isinstance(expected, torch.Tensor) and isinstance(got, torch.Tensor):
            error = relative_error(got, expected)
            element = worst_element(got, expected) if expected.numel() else "empty"
        else:
            same = type(expected) is type(got) and _same_objects(expected, got)
            error, element = (0.0, "not a tensor") if same else (float("inf"), "not a tensor")
        if name not in self.found or error > self.found[name][0]:
            self.found[name] = error, element

    def entries(self) -> list[OutputDifference]:
        return [OutputDifference(name, *found) for name, found in self.found.items()]


def _same_objects(a: Any, b: Any) -> bool:
    """Equality of what is not a tensor: strings, sequences, maps."""
    import numpy as np
    import torch

    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same_objects(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _outputs(one: Graph, two: Graph) -> list[tuple[str, str]]:
    """Which output corresponds to which: by name, or by position where no name is shared."""
    mine, theirs = [n for n, _ in one.outputs], [n for n, _ in two.outputs]
    if set(mine) == set(theirs):
        return [(n, n) for n in mine]
    if len(mine) == len(theirs) and not set(mine) & set(theirs):
        return list(zip(mine, theirs, strict=True))
    missing = next(n for n in [*mine, *theirs] if n not in mine or n not in theirs)
    other = theirs if missing in mine else mine
    raise PlanishError(
        f"output '{missing}': only one of the models has it; "
        f"the first has {', '.join(mine)}, the second {', '.join(theirs)}",
        hint=nearest(missing, other),
    )


def _same_inputs(one: Graph, two: Graph) -> None:
    mine = {v.name: v for v in one.inputs if v.constant is None}
    theirs = {v.name: v for v in two.inputs if v.constant is None}
    for name in [*mine, *theirs]:
        if name not in mine or name not in theirs:
            raise PlanishError(
                f"input '{name}': only one of the models has it; "
                f"the first has {', '.join(mine) or 'none'}, the second {', '.join(theirs) or 'none'}",
                hint=nearest(name, theirs if name in mine else mine),
            )
        a, b = mine[name].type, theirs[name].type
        if isinstance(a, TensorType) and isinstance(b, TensorType) and a.dtype != b.dtype:
            raise PlanishError(f"input '{name}': its dtypes differ; the first has {a}, the second {b}")
