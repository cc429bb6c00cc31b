"""Capture a PyTorch model.

    from_module(module, inputs)     torch.export (non-strict), which makes in-place ops, views and mutation
                                    functional, and keeps the ops that the IR has rows for (linear, layer_norm,
                                    attention, convolutions)
    from_program(program)           a program that was exported already
    from_dynamo(module, inputs)     what a torch.compile backend is given

Parameters and buffers are constants named by their module path; tied ones are one constant. They share memory with
the module. A buffer that the model writes to is an input whose default is its present value, and a further output.
Ops without a row become opaque nodes, which planish runs by calling torch.

`Graph.meta`:

    front_end           "torch"
    torch.in_spec       tree spec of (args, kwargs) as text
    torch.inputs        for each leaf of it ("input", name) or ("constant", value)
    torch.out_spec      tree spec of the result
    torch.out_classes   (place, name) of the results of `torch.return_types` in it, nodes counted from the root
    torch.outputs       for each leaf of it ("output", name) or ("constant", value)
    torch.forward       the names of the positional arguments
    torch.sizes         the names of the inputs that are ints, not tensors, if there are any
    torch.mutations     (name of the input, name of the output that holds its new value) pairs
    torch.buffers       names of the constants that are buffers and stand in the state dict
    torch.unsaved       names of the constants that are buffers outside of it, or plain tensors
    torch.tied          (other name, name of the constant) pairs
    torch.requires_grad names of the constants that are parameters which take a gradient; torch chooses kernels by it
    torch.device        of the parameters, where they are not on the CPU
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, SymIntArgument, TensorArgument

from planish.capture import fx_calls
from planish.capture.fx_builder import Builder, Size, is_symbol
from planish.capture.fx_export import exported, quiet, refusal
from planish.capture.fx_signature import constant_attribute, input_names, output_names, return_types, spec_text
from planish.capture.fx_walk import Walk
from planish.ir.constant import Constant
from planish.ir.errors import FOREIGN, PlanishError
from planish.ir.graph import Graph, Value
from planish.ir.types import TensorType


def from_module(module: nn.Module, inputs: Any, *, dynamic_shapes: Any = None) -> Graph:
    """Capture a module, in evaluation mode.

    Args:
        module: the module; its mode is put back.
        inputs: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or a pair of both.
        dynamic_shapes: as for `torch.export.export`; the dims keep the names of their `Dim`s.

    Raises:
        PlanishError: the inputs do not fit, or torch cannot export the model.
    """
    args, kwargs = arguments(inputs)
    modes = [m for m in module.modules() if m.training]
    for part in modes:
        part.training = False
    try:
        program = exported(module, args, kwargs, dynamic_shapes)
    finally:
        for part in modes:
            part.training = True
    names = _dim_names(program, module, dynamic_shapes, args, kwargs)
    return ProgramCapture(program, module, names).run()


def from_program(program: ExportedProgram) -> Graph:
    """Capture a program of torch.export.

    Raises:
        PlanishError: it holds what the IR cannot.
    """
    try:
        with quiet(), torch.no_grad():
            program = program.run_decompositions({})
    except FOREIGN as error:
        raise refusal("the exported program cannot be made functional", error) from error
    return ProgramCapture(program, None, {}).run()


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of example inputs.

    Raises:
        PlanishError: there are none, or they are of another kind.
    """
    if inputs is None:
        raise PlanishError(
            "inputs: a torch module is captured on example inputs; got none",
            hint="capture(model, inputs) with a tensor, a tuple of arguments, or a dict of keyword arguments",
        )
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        wrong = next((key for key in inputs if not isinstance(key, str)), None)
        if wrong is not None:
            raise PlanishError(f"inputs: a keyword argument has the name {wrong!r}; expected a string")
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        pair = len(inputs) == 2 and isinstance(inputs[0], tuple | list) and isinstance(inputs[1], Mapping)
        return (tuple(inputs[0]), dict(inputs[1])) if pair else (tuple(inputs), {})
    raise PlanishError(
        f"inputs: expected a tensor, a tuple of arguments or a dict of keyword arguments, got {type(inputs).__name__}"
    )


def _dim_names(
    program: ExportedProgram, module: nn.Module, dynamic: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, str]:
    """What torch's symbols are called: as the `Dim`s of `dynamic_shapes`."""
    if dynamic is None:
        return {}
    spec = program.call_spec.in_spec
    fakes = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    user = [fakes.get(s.arg.name) for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    if spec is None or spec.num_leaves != len(user):
        return {}
    held, named = pytree.tree_unflatten(user, spec)
    given = dict(named)
    names = input_names(pytree.tree_structure((tuple(0 for _ in held), {})), module.forward, [""] * len(held))
    given.update(zip(names, held, strict=True))
    if isinstance(dynamic, tuple | list):
        dynamic = dict(zip(given, dynamic, strict=False)) if not held else dict(zip(names, dynamic, strict=False))
    found: dict[str, str] = {}
    for name, shapes in dynamic.items():
        rest = [value for key, value in given.items() if key.startswith(f"{name}.")]  # of *name
        _match_dims(given.get(name, rest), shapes, found)
    return found


def _match_dims(value: Any, shapes: Any, found: dict[str, str]) -> None:
    if shapes is None:
        return
    if isinstance(value, torch.Tensor):
        pairs = shapes.items() if isinstance(shapes, Mapping) else enumerate(shapes)
        for axis, dim in pairs:
            size: Any = value.shape[axis]
            name = getattr(dim, "__name__", None)
            if name is not None and is_symbol(size):
                found[str(size.node.expr)] = str(name)
    elif isinstance(value, Mapping) and isinstance(shapes, Mapping):
        for key, inner in shapes.items():
            _match_dims(value.get(key), inner, found)
    elif isinstance(value, list | tuple) and isinstance(shapes, list | tuple):
        for item, inner in zip(value, shapes, strict=False):
            _match_dims(item, inner, found)


class ProgramCapture:
    """One exported program on its way into a graph.

    Args:
        program: the program, functional.
        module: the module that it was exported from.
        symbols: what torch's symbols are called.
        paths: what parameters, buffers and inputs are called where that differs from the program.
    """

    def __init__(
        self,
        program: ExportedProgram,
        module: nn.Module | None,
        symbols: Mapping[str, str],
        paths: Mapping[str, str] | None = None,
    ) -> None:
        self.program = program
        self.module = module
        self.paths = dict(paths or {})
        self.b = Builder(type(module).__name__ if module is not None else "program", symbols)
        self.state: dict[str, torch.Tensor] = {**program.state_dict, **_tensors(program.constants)}
        self.names = tied_names(self.state)
        self.mutated = {
            spec.target: spec.arg.name
            for spec in program.graph_signature.output_specs
            if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
        }
        self.read: dict[str, Value] = {}
        self.sizes: list[str] = []

    def run(self) -> Graph:
        b, signature = self.b, self.program.graph_signature
        spec = self.program.call_spec.in_spec
        fakes = {n.name: n.meta.get("val") for n in self.program.graph.nodes if n.op == "placeholder"}
        user = [s for s in signature.input_specs if s.kind is InputKind.USER_INPUT]
        given = [s.arg.name for s in user]
        forward = None if self.module is None else self.module.forward
        names = given if spec is None else input_names(spec, forward, given)
        names = [self.paths.get(n, n) for n in names]
        own = dict(zip(given, names, strict=True))
        leaves: list[tuple[str, Any]] = []
        placeholders: list[Any] = []
        written: dict[str, Value] = {}
        for entry in signature.input_specs:
            if entry.kind is InputKind.USER_INPUT:
                value, leaf = self._input(own[entry.arg.name], entry.arg, fakes.get(entry.arg.name))
                if isinstance(value, Value):
                    written[entry.arg.name] = value
                leaves.append(leaf)
                placeholders.append(value)
            elif entry.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                placeholders.append(self._held(str(entry.target)))
            else:
                raise PlanishError(f"input '{entry.arg.name}': a {entry.kind.name.lower()} cannot be captured")
        results = Walk(b, self.program.graph_module, self._constant).run(placeholders)
        self._outputs(results, written)
        self._rename()
        meta = b.graph.meta
        meta["front_end"] = "torch"
        if spec is not None:
            meta["torch.in_spec"] = spec_text(spec)
        meta["torch.inputs"] = tuple(leaves)
        meta["torch.forward"] = tuple(n for n, s in zip(names, user, strict=True) if n)
        if self.sizes:
            meta["torch.sizes"] = tuple(self.sizes)
        self._kinds()
        return b.graph

    # -- inputs and constants ----------------------------------------------------------------------

    def _input(self, name: str, argument: Any, fake: Any) -> tuple[Any, tuple[str, Any]]:
        b = self.b
        if isinstance(argument, TensorArgument):
            return b.graph.add_input(name, b.type_of(fake)), ("input", name)
        if isinstance(argument, SymIntArgument):
            value = b.graph.add_input(name, TensorType("i64", ()))
            self.sizes.append(name)
            return (lambda: Size(b.unsqueeze(value, 0), b.dim(fake))), ("input", name)
        if isinstance(argument, ConstantArgument):
            return argument.value, ("constant", constant_attribute(argument.value))
        raise PlanishError(f"input '{name}': a {type(argument).__name__} cannot be captured")

    def _held(self, target: str) -> Any:
        """What a placeholder of a parameter or buffer stands for; a constant enters the graph when it is read."""
        if target not in self.mutated:
            return lambda: self._constant(target)
        name = self.paths.get(target, target)
        held = constant_of(self.state[target].clone(), name)
        return self.read.setdefault(target, self.b.graph.add_input(name, held.type, held))

    def _constant(self, target: str) -> Value:
        name = self.names.get(target, target)
        found = self.read.get(name)
        if found is None:
            tensor = self.state.get(target)
            if tensor is None:
                raise PlanishError(f"constant '{target}': the program does not hold it")
            graph = self.b.graph
            path = self.paths.get(name, name)
            found = self.read[name] = graph.add_constant(graph.fresh_name(path), constant_of(tensor, path))
        return found

    def _rename(self) -> None:
        """Constants have their paths as names, whatever else came by them."""
        values = self.b.graph.values
        for name, value in self.read.items():
            path = self.paths.get(name, name)
            other = values.get(path)
            if value.name == path or (other is not None and (other.is_input or other.is_constant)):
                continue
            del values[value.name]
            if other is not None:
                del values[path]
                other.name = self.b.graph.fresh_name(f"{path}_1")
                values[other.name] = other
            value.name = path
            values[path] = value

    def _kinds(self) -> None:
        signature, meta = self.program.graph_signature, self.b.graph.meta
        unsaved = {*signature.non_persistent_buffers, *_tensors(self.program.constants)}
        buffers = set(signature.buffers) - unsaved
        meta["torch.buffers"] = tuple(v.name for n, v in self.read.items() if n in buffers)
        meta["torch.unsaved"] = tuple(v.name for n, v in self.read.items() if n in unsaved)
        meta["torch.requires_grad"] = tuple(v.name for n, v in self.read.items() if self._requires_grad(n))
        tied = ((n, first) for n, first in self.names.items() if n != first and first in self.read)
        meta["torch.tied"] = tuple((self.paths.get(n, n), self.read[first].name) for n, first in tied)
        meta.update(fx_calls.as_meta(self.b))
        device = next((str(t.device) for t in self.state.values() if t.device.type != "cpu"), None)
        if device is not None:
            meta["torch.device"] = device

    def _requires_grad(self, target: str) -> bool:
        """True for a parameter that takes a gradient, under whichever of its names."""
        tensor = self.state.get(target)
        return isinstance(tensor, nn.Parameter) and tensor.requires_grad

    # -- outputs -----------------------------------------------------------------------------------

    def _outputs(self, results: Sequence[Any], written: Mapping[str, Value]) -> None:
        b, signature = self.b, self.program.graph_signature
        user = [s for s in signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
        spec = self.program.call_spec.out_spec
        names = iter([f"output_{i}" for i in range(len(user))] if spec is None else output_names(spec))
        taken = {value.name for value in b.graph.inputs}
        leaves: list[tuple[str, Any]] = []
        mutations: list[tuple[str, str]] = []
        updated: list[tuple[str, Value]] = []
        for entry, result in zip(signature.output_specs, results, strict=True):
            value = b.item(result) if isinstance(result, Size) else result
            if entry.kind is OutputKind.USER_OUTPUT:
                name = next(names)
                while name in taken:  # in ONNX, an output is called otherwise than the inputs
                    name += ".out"
                if isinstance(value, Value):
                    b.graph.add_output(name, value)
                    leaves.append(("output", name))
                else:
                    leaves.append(("constant", constant_attribute(value)))
            elif entry.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
                updated.append((self.read[str(entry.target)].name, value))
            elif entry.kind is OutputKind.USER_INPUT_MUTATION:
                updated.append((written[str(entry.target)].name, value))
            else:
                raise PlanishError(f"output '{entry.arg.name}': a {entry.kind.name.lower()} cannot be captured")
        for name, value in updated:
            if value is not b.graph.values[name]:
                mutations.append((name, f"{name}.updated"))
                b.graph.add_output(f"{name}.updated", value)
            elif value.constant is not None:  # written to, but with what it held
                b.graph.inputs.remove(value)
                value.is_input = False
        meta = b.graph.meta
        if spec is not None:
            meta["torch.out_spec"] = spec_text(spec)
            classes = return_types(spec)
            if classes:
                meta["torch.out_classes"] = classes
        meta["torch.outputs"] = tuple(leaves)
        meta["torch.mutations"] = tuple(mutations)


def constant_of(tensor: torch.Tensor, name: str) -> Constant:
    """A tensor's data, shared where torch and numpy can.

    Raises:
        PlanishError: the tensor has no data (meta, sparse, a subclass).
    """
    plain = tensor.detach()
    if plain.device.type == "meta" or plain.layout is not torch.strided or plain.is_quantized:
        raise PlanishError(f"constant '{name}': a {plain.layout} tensor on {plain.device} cannot be captured")
    try:
        return Constant.of(plain.resolve_conj().resolve_neg())
    except (KeyError, TypeError, RuntimeError) as error:
        raise PlanishError(f"constant '{name}': its data of {plain.dtype} cannot be read: {error}") from error


def _tensors(constants: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in constants.items() if isinstance(value, torch.Tensor)}


def tied_names(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For each tensor the name of the first one that is the same data in the same shape."""
    first: dict[tuple[Any, ...], str] = {}
    names: dict[str, str] = {}
    for name, tensor in state.items():
        if tensor.numel() == 0 or tensor.device.type == "meta" or tensor.layout is not torch.strided:
            names[name] = name
            continue
        key = (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())
        names[name] = first.setdefault(key, name)
    return names
