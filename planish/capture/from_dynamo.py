"""Capture the FX graph that a torch.compile backend is given.

Dynamo lifts every tensor to a placeholder and notes where it came from (`L['self']._modules['fc'].weight`). What
came from a module becomes a constant named by its module path, what came from an argument an input, and a size that
was lifted is read from the input that it is a size of. The graph itself is run node by node while torch.export
traces it: it is not changed.

What holds for the sizes of the example need not hold for all sizes that Dynamo's guards let through. Whatever the
trace assumed of an open size is therefore asked of Dynamo's own symbols too, which makes it a guard of Dynamo's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx import traceback as fx_traceback

from planish.capture.dynamo_values import Scalar, distinct, example_of, holds_of, is_number, like, number_of, value_of
from planish.capture.from_fx import ProgramCapture, constant_of, tied_names
from planish.capture.fx_builder import is_symbol
from planish.capture.fx_export import functional, refusal
from planish.capture.fx_signature import module_path
from planish.capture.fx_walk import source_of
from planish.ir.constant import Constant
from planish.ir.errors import FOREIGN, PlanishError
from planish.ir.graph import Graph
from planish.ir.types import numpy_dtype

_OF_MODULE = re.compile(r"\b_(modules|parameters|buffers)\[")
_ROOT = re.compile(r"[LG]\[['\"](\w+)['\"]\]")
_MODES = frozenset({"_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"})


def is_dynamo(module: fx.GraphModule) -> bool:
    """True for a graph that Dynamo made: its placeholders say what they come from."""
    return any(n.op == "placeholder" and "grapharg" in n.meta for n in module.graph.nodes)


def from_dynamo(module: fx.GraphModule, inputs: Sequence[Any]) -> Graph:
    """Capture a Dynamo graph.

    Args:
        module: the graph as a backend receives it.
        inputs: what the backend received with it, one for each placeholder.

    Raises:
        PlanishError: the inputs do not fit, hold no data, or the graph cannot be made functional.
    """
    return DynamoGraph(module, inputs).capture(inputs).graph


@dataclass(frozen=True)
class Captured:
    """A graph and what its inputs and constants are among the placeholders of Dynamo's graph.

    Attributes:
        graph: the graph.
        given: the index of the placeholder of each argument, in the order in which the graph is called.
        held: the index of the placeholder of each constant that came from a module, by its name in the graph.
        inputs: the name of each argument in the graph.
        tied: for each of `held` the first that is the same memory in the same shape.
    """

    graph: Graph
    given: tuple[int, ...]
    held: Mapping[str, int]
    inputs: tuple[str, ...]
    tied: Mapping[str, str]


class DynamoGraph:
    """A graph of Dynamo's that can be captured again, with other weights.

    Args:
        module: the graph as a backend receives it; not changed.
        inputs: what the backend received with it, one for each placeholder.

    Attributes:
        sources: where each placeholder's value comes from, as a Python expression; empty if Dynamo does not say.
        held: the placeholders whose tensors are constants.

    Raises:
        PlanishError: the inputs do not fit.
    """

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self.module = module
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        if not isinstance(inputs, list | tuple) or len(inputs) != len(placeholders):
            got = len(inputs) if isinstance(inputs, list | tuple) else type(inputs).__name__
            raise PlanishError(
                f"inputs: a Dynamo graph is captured on the {len(placeholders)} inputs that its backend receives; "
                f"got {got}"
            )
        self.names = [node.name for node in placeholders]
        self.sources = [_source(node) for node in placeholders]
        self.fakes = [node.meta.get("example_value") for node in placeholders]
        held = {m[1] for s, i in zip(self.sources, inputs, strict=True) if _is_held(s, i) and (m := _ROOT.match(s))}
        self.roots = held
        floats = {i: n for i, n in enumerate(placeholders) if is_number(n, inputs[i])}
        self.numbers = {i: number_of(n) for i, n in floats.items() if self._of_module(i)}
        self.floats = {i: n for i, n in floats.items() if i not in self.numbers}
        self.held = tuple(i for i, value in enumerate(inputs) if self._holds(i, value))
        self.examples = [like(value) for value in inputs]

    def _of_module(self, index: int) -> bool:
        root = _ROOT.match(self.sources[index])
        return root is not None and root[1] in self.roots and self.sources[index] != root[0]

    def _holds(self, index: int, value: Any) -> bool:
        if not isinstance(value, torch.Tensor) or index in self.numbers or index in self.floats:
            return False
        return self._of_module(index) or _is_held(self.sources[index], value)

    def capture(self, inputs: Sequence[Any], *, guard: bool = True) -> Captured:
        """Capture the graph with these weights.

        Args:
            inputs: one for each placeholder; only the tensors of modules are read.
            guard: ask of Dynamo's symbols what the trace assumed of sizes: while Dynamo compiles.

        Raises:
            PlanishError: a weight has no data, or the graph cannot be made functional.
        """
        lifted = _Lifted(self, inputs)
        try:
            with torch._guards.tracing(None):  # outside of the backend's own tracing context
                program = functional(lifted, tuple(lifted.given), {}, lifted.dynamic())
        except FOREIGN as error:
            if self.floats and guard:  # one of them stands where torch takes no tensor: it is a number from now on
                self.numbers.update({i: number_of(node) for i, node in self.floats.items()})
                self.floats = {}
                return self.capture(inputs)
            raise refusal("the Dynamo graph cannot be made functional", error) from error
        if guard:
            lifted.guard(program)
        names = {f"arguments_{i}": name for i, name in enumerate(lifted.input_names)}
        graph = ProgramCapture(program, None, lifted.symbols(program), {**lifted.paths, **names}).run()
        held = {lifted.paths[name]: index for name, index in lifted.indices.items()}
        tied = tied_names({name: inputs[index] for name, index in held.items()})
        return Captured(graph, tuple(lifted.places), held, tuple(lifted.input_names), tied)

    def again(self, captured: Captured, inputs: Sequence[Any]) -> Captured | None:
        """A captured graph with other weights; None if it must be captured anew: other tensors are tied.

        Args:
            captured: what `blank` left of an earlier capture.
        """
        held = {name: inputs[index] for name, index in captured.held.items()}
        if tied_names(held) != captured.tied:
            return None
        data = {name: constant_of(tensor, name) for name, tensor in held.items() if name in captured.graph.values}
        return replace(captured, graph=captured.graph.clone(data))

    def blank(self, captured: Captured) -> Captured:
        """A capture that holds none of the weights' memory."""
        values = [captured.graph.values.get(name) for name in captured.held]
        held = {v.name: v.constant for v in values if v is not None and v.constant is not None}
        zero = {n: np.broadcast_to(np.zeros((), numpy_dtype(c.dtype)), c.shape) for n, c in held.items()}
        data = {name: Constant(zero[name], old.dtype, old.shape) for name, old in held.items()}
        return replace(captured, graph=captured.graph.clone(data))

    def release(self, places: Iterable[int]) -> None:
        """Take these placeholders for inputs from now on."""
        self.held = tuple(i for i in self.held if i not in set(places))

    def written(self, captured: Captured) -> set[int]:
        """The placeholders of what a module holds and the graph writes to."""
        mutations: Any = captured.graph.meta.get("torch.mutations", ())
        names = {str(name) for name, _ in mutations}
        return {index for name, index in captured.held.items() if name in names}


class _Lifted(nn.Module):
    """The graph with what Dynamo lifted put back: a module of the true inputs.

    Attributes:
        paths: the module path of each parameter and buffer of this module.
        indices: the placeholder of each of them.
        given: the true inputs.
        places: the placeholder of each.
        input_names: their names.
    """

    def __init__(self, dynamo: DynamoGraph, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.module = dynamo.module
        self.paths: dict[str, str] = {}
        self.indices: dict[str, int] = {}
        self.given: list[Any] = []
        self.places: list[int] = []
        self.input_names: list[str] = []
        self.fakes: list[Any] = []
        self.slots: list[tuple[str, Any]] = []  # for each placeholder: held by name, given by index, size of a given
        roots = dynamo.roots
        self.root = f"L.{next(iter(roots))}" if len(roots) == 1 else ""
        sizes: list[int] = []
        for index, source in enumerate(dynamo.sources):
            fake, example = dynamo.fakes[index], dynamo.examples[index]
            if index in dynamo.held:
                self._hold(index, _path(source, roots), inputs[index])
            elif index in dynamo.numbers:
                self.slots.append(("number", Scalar(dynamo.numbers[index])))
            elif isinstance(example, torch.SymInt | int) and not isinstance(example, bool):
                sizes.append(index)
                self.slots.append(("size", example if fake is None else fake))
            else:
                self.slots.append(("float" if index in dynamo.floats else "given", len(self.given)))
                self._give(index, example, fake, _argument(source) or dynamo.names[index])
        for index in sizes:
            self.slots[index] = self._size(index, self.slots[index][1], dynamo)
        self.input_names = distinct(self.input_names)

    def _give(self, index: int, value: Any, fake: Any, name: str) -> None:
        self.given.append(example_of(value))
        self.places.append(index)
        self.fakes.append(fake)
        self.input_names.append(name)

    def _hold(self, index: int, path: str, value: torch.Tensor) -> None:
        name = f"held_{index}"
        if isinstance(value, torch._subclasses.FakeTensor):
            raise PlanishError(f"constant '{path}': has no data; expected the tensors that the backend received")
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        else:
            self.register_buffer(name, value)
        self.paths[name] = path
        self.indices[name] = index
        self.slots.append(("held", name))

    def _size(self, place: int, fake: Any, dynamo: DynamoGraph) -> tuple[str, Any]:
        """Where a lifted size is read from; one that is no size of an input becomes an input itself."""
        if isinstance(fake, int) or not fake.node.expr.free_symbols:
            return "number", int(fake)
        for index, other in enumerate(self.fakes):
            if isinstance(other, torch.Tensor):
                for axis, dim in enumerate[Any](other.shape):
                    if isinstance(dim, torch.SymInt) and dim.node.expr == fake.node.expr:
                        return "size", (index, axis)
        self._give(place, int(dynamo.examples[place]), fake, _argument(dynamo.sources[place]) or str(fake))
        return "given", len(self.given) - 1

    def dynamic(self) -> Any:
        """The `dynamic_shapes` of the inputs: what Dynamo left open."""
        auto = torch.export.Dim.AUTO
        shapes: list[Any] = []
        for fake in self.fakes:
            if isinstance(fake, torch.Tensor):
                shapes.append({a: auto for a, d in enumerate[Any](fake.shape) if isinstance(d, torch.SymInt)})
            else:
                shapes.append(auto if isinstance(fake, torch.SymInt) else None)
        return {"arguments": tuple(shapes)}

    def _sizes(self, program: torch.export.ExportedProgram) -> list[tuple[Any, Any]]:
        """(Dynamo's, the program's) of every size of the inputs that Dynamo left open."""
        fakes = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"][-len(self.fakes) :]
        found: list[tuple[Any, Any]] = []
        for mine, theirs in zip(self.fakes, fakes if self.fakes else [], strict=True):
            if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
                pairs: Any = zip(mine.shape, theirs.shape, strict=True)
                found += [(old, new) for old, new in pairs if isinstance(old, torch.SymInt)]
            elif isinstance(mine, torch.SymInt) and isinstance(theirs, torch.SymInt | int):
                found.append((mine, theirs))
        return found

    def symbols(self, program: torch.export.ExportedProgram) -> Mapping[str, str]:
        """The names of the program's symbols: Dynamo's."""
        found: dict[str, str] = {}
        for old, new in self._sizes(program):
            if is_symbol(new):
                found.setdefault(str(new.node.expr), str(old.node.expr))
        return found

    def guard(self, program: torch.export.ExportedProgram) -> None:
        """Make what the trace assumed of open sizes guards of Dynamo's.

        Raises:
            PlanishError: it does not hold of the sizes that Dynamo has seen.
        """
        pairs = self._sizes(program)
        known: dict[Any, Any] = {}
        for old, new in pairs:
            if is_symbol(new):
                known.setdefault(new.node.expr, old)
        assumed: list[Any] = []
        environments = {id(new.node.shape_env): new.node.shape_env for _, new in pairs if isinstance(new, torch.SymInt)}
        for environment in environments.values():
            assumed += [guard.expr for guard in environment.guards if guard.expr.free_symbols <= known.keys()]
        held = all(holds_of(expression, known) for expression in assumed)
        for old, new in pairs:  # specialised to a number, or tied to other sizes
            number = new if isinstance(new, int) else value_of(new.node.expr, known)
            held = held and (number is None or number is old or bool(old == number))
        if not held:
            raise PlanishError("the Dynamo graph: its trace holds for sizes that are not those of the inputs")

    def forward(self, *arguments: Any) -> Any:
        values = []
        for kind, what in self.slots:
            if kind == "held":
                values.append(getattr(self, what))
            elif kind == "float":
                values.append(Scalar(arguments[what]))
            elif kind == "size":
                values.append(arguments[what[0]].shape[what[1]])
            else:
                values.append(arguments[what] if kind == "given" else what)
        with fx_traceback.preserve_node_meta():
            return _Annotated(self.module, self.root).run(*values)


class _Annotated(fx.Interpreter):
    """Runs a graph and notes on what is traced which module it came from, without the name `root` of the whole."""

    def __init__(self, module: fx.GraphModule, root: str) -> None:
        super().__init__(module)
        self.root = root
        self.origin = ""

    def run_node(self, n: fx.Node) -> Any:
        path = source_of(n)
        self.origin = "" if path == self.root else path.removeprefix(f"{self.root}.")
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "__name__", "") in _MODES:  # what only says whether gradients are kept
            return None
        with fx_traceback.annotate({"source": self.origin}):
            return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        with fx_traceback.annotate({"source": self.origin}):
            return super().call_method(target, args, kwargs)


def _source(node: fx.Node) -> str:
    """Where a placeholder's value came from, as a Python expression; empty if Dynamo does not say."""
    held = node.meta.get("grapharg")
    name = getattr(getattr(held, "source", None), "name", "")
    return str(name() if callable(name) else name)


def _argument(source: str) -> str:
    """The name of the argument that a source is (a part of), as the caller gave it."""
    return module_path(re.sub(_ROOT, r"\1", source)).removeprefix("kwargs.")


def _is_held(source: str, value: Any) -> bool:
    return isinstance(value, nn.Parameter) or _OF_MODULE.search(source) is not None or source.startswith("G[")


def _path(source: str, roots: set[str]) -> str:
    """The module path of a source; the name of the module stands first where there are several."""
    root = _ROOT.match(source)
    if root is None or len(roots) > 1:
        return module_path(re.sub(_ROOT, r"\1", source))
    return module_path(source[len(root[0]) :]) or root[1]
