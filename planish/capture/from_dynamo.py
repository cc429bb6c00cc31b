"""Capture the FX graph that a torch.compile backend is given.

Dynamo lifts every tensor to a placeholder and notes where it came from (`L['self']._modules['fc'].weight`). What
came from a module becomes a constant named by its module path, what came from an argument an input, and a size that
was lifted is read from the input that it is a size of. The graph itself is run node by node while torch.export
traces it: it is not changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx import traceback as fx_traceback

from planish.capture.from_fx import ProgramCapture
from planish.capture.fx_builder import is_symbol
from planish.capture.fx_export import functional, refusal
from planish.capture.fx_signature import module_path
from planish.capture.fx_walk import source_of
from planish.ir.errors import FOREIGN, PlanishError
from planish.ir.graph import Graph

_OF_MODULE = re.compile(r"\b_(modules|parameters|buffers)\[")
_ROOT = re.compile(r"[LG]\[['\"](\w+)['\"]\]")


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
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    if not isinstance(inputs, list | tuple) or len(inputs) != len(placeholders):
        got = len(inputs) if isinstance(inputs, list | tuple) else type(inputs).__name__
        raise PlanishError(
            f"inputs: a Dynamo graph is captured on the {len(placeholders)} inputs that its backend receives; got {got}"
        )
    lifted = _Lifted(module, placeholders, inputs)
    arguments = tuple(lifted.given)
    try:
        with torch._guards.tracing(None):  # outside of the backend's own tracing context
            program = functional(lifted, arguments, {}, lifted.dynamic())
    except FOREIGN as error:
        raise refusal("the Dynamo graph cannot be made functional", error) from error
    names = {f"arguments_{i}": name for i, name in enumerate(lifted.input_names)}
    return ProgramCapture(program, None, lifted.symbols(program), {**lifted.paths, **names}).run()


class _Lifted(nn.Module):
    """The graph with what Dynamo lifted put back: a module of the true inputs.

    Attributes:
        paths: the module path of each parameter and buffer of this module.
        given: the true inputs.
        input_names: their names.
    """

    def __init__(self, module: fx.GraphModule, placeholders: Sequence[fx.Node], inputs: Sequence[Any]) -> None:
        super().__init__()
        self.module = module
        self.paths: dict[str, str] = {}
        self.given: list[Any] = []
        self.input_names: list[str] = []
        self.fakes: list[Any] = []
        self.slots: list[tuple[str, Any]] = []  # for each placeholder: held by name, given by index, size of a given
        sources = [_source(node) for node in placeholders]
        roots = {m[1] for s, i in zip(sources, inputs, strict=True) if _is_held(s, i) and (m := _ROOT.match(s))}
        self.root = f"L.{next(iter(roots))}" if len(roots) == 1 else ""
        sizes: list[int] = []
        for index, (node, source, value) in enumerate(zip(placeholders, sources, inputs, strict=True)):
            root = _ROOT.match(source)
            of_module = root is not None and root[1] in roots and source != root[0]
            if isinstance(value, torch.Tensor) and (of_module or _is_held(source, value)):
                self._hold(f"held_{index}", _path(source, roots), value)
            elif isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
                sizes.append(index)
                self.slots.append(("size", node.meta.get("example_value", value)))
            else:
                self.slots.append(("given", len(self.given)))
                self.given.append(value)
                self.input_names.append(_argument(source) or node.name)
                self.fakes.append(node.meta.get("example_value"))
        for index in sizes:
            self.slots[index] = self._size(self.slots[index][1], inputs[index], sources[index])

    def _hold(self, name: str, path: str, value: torch.Tensor) -> None:
        if isinstance(value, torch._subclasses.FakeTensor):
            raise PlanishError(f"constant '{path}': has no data; expected the tensors that the backend received")
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        else:
            self.register_buffer(name, value)
        self.paths[name] = path
        self.slots.append(("held", name))

    def _size(self, fake: Any, value: Any, source: str) -> tuple[str, Any]:
        """Where a lifted size is read from; one that is no size of an input becomes an input itself."""
        if not is_symbol(fake):
            return "number", int(value)
        for index, other in enumerate(self.fakes):
            if isinstance(other, torch.Tensor):
                for axis, dim in enumerate[Any](other.shape):
                    if is_symbol(dim) and dim.node.expr == fake.node.expr:
                        return "size", (index, axis)
        self.given.append(int(value))
        self.fakes.append(fake)
        self.input_names.append(_argument(source) or str(fake))
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

    def symbols(self, program: torch.export.ExportedProgram) -> Mapping[str, str]:
        """The names of the program's symbols: Dynamo's."""
        fakes = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"][-len(self.fakes) :]
        found: dict[str, str] = {}
        for mine, theirs in zip(self.fakes, fakes if self.fakes else [], strict=True):
            if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
                pairs: Any = zip(mine.shape, theirs.shape, strict=True)
                for old, new in pairs:
                    if isinstance(old, torch.SymInt) and is_symbol(new):
                        found.setdefault(str(new.node.expr), str(old.node.expr))
        return found

    def forward(self, *arguments: Any) -> Any:
        values = []
        for kind, what in self.slots:
            if kind == "held":
                values.append(getattr(self, what))
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
