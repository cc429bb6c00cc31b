"""Torch code of a graph as torch-mlir takes it: concrete sizes, tensors in a row, ops that it has right.

sized     example inputs with a concrete size for every symbol
flatten   the graph as a module from a list of tensors to a tuple of tensors
exported  its program of torch.export, every node with the place of the IR node that it comes from
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch.fx import traceback

from planish.codegen.torch import emit
from planish.codegen.torch_calls import argument_name
from planish.codegen.torch_emission import Emission
from planish.ir.errors import FOREIGN, PlanishError, nearest
from planish.ir.evaluator import Evaluator
from planish.ir.probe import random_inputs, undrawn
from planish.ir.types import TensorType
from planish.passes.validation import SIZES

if TYPE_CHECKING:
    from planish.ir.graph import Graph, Value

__all__ = ["Flat", "Results", "exported", "flatten", "sized"]

Results = tuple[tuple[tuple[int, ...], torch.dtype], ...]
_MARK = "planish"


# -- sizes -----------------------------------------------------------------------------------------------


def symbols(graph: Graph) -> list[str]:
    """The named sizes of the inputs, in their order."""
    found: dict[str, None] = {}
    for value in graph.inputs:
        if value.constant is None and isinstance(value.type, TensorType):
            found.update(dict.fromkeys(dim for dim in value.type.shape or () if isinstance(dim, str)))
    return list(found)


def sized(graph: Graph, sizes: Mapping[str, int] | None = None) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Example inputs with concrete sizes, and the size of every symbol.

    A size that is not given is chosen as for random inputs: 2 for the first dim of an input, for the others the
    first of 8, 16, .. 256 on which the graph can be evaluated.

    Args:
        sizes: sizes of some symbols.

    Raises:
        PlanishError: no input has a symbol of that name, a size is not positive, an input is no tensor of known
            rank, or the graph runs on none of the sizes.
    """
    given, known = dict(sizes or {}), symbols(graph)
    for name, size in given.items():
        if name not in known:
            listed = f"they are {', '.join(known)}" if known else "there are none"
            raise PlanishError(f"size '{name}': no input has a size of this name; {listed}", hint=nearest(name, known))
        if size < 1:
            raise PlanishError(f"size '{name}': expected at least 1, got {size}")
    missing = undrawn(graph)
    if missing is not None:
        raise PlanishError(f"input '{missing.name}': MLIR takes tensors of numbers of known rank, not {missing.type}")
    free = any(value.constant is None and _is_open(value, given) for value in graph.inputs)
    failure: Exception | None = None
    for size in SIZES:
        inputs = random_inputs(graph, 0, size=size, sizes=given)
        try:
            if free:
                Evaluator(graph, torch.float64).run(inputs)
        except (PlanishError, RuntimeError, ValueError, IndexError) as error:
            failure = failure or error
            continue
        return inputs, bound(graph, inputs)
    what = str(failure).splitlines()[0]
    raise PlanishError(
        f"sizes: the graph runs on none of those that were tried: {what}", hint="give them: --size NAME=N"
    )


def _is_open(value: Value, given: Mapping[str, int]) -> bool:
    shape = value.shape
    return shape is None or any(dim is None or (isinstance(dim, str) and dim not in given) for dim in shape)


def bound(graph: Graph, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The size of every symbol on these inputs."""
    found: dict[str, int] = {}
    for value in graph.inputs:
        if value.name in inputs and value.shape is not None:
            for dim, size in zip(value.shape, inputs[value.name].shape, strict=False):
                if isinstance(dim, str):
                    found.setdefault(dim, int(size))
    return found


# -- torch code on a flat signature ----------------------------------------------------------------------


@dataclass(frozen=True)
class Flat:
    """A graph as torch code from a list of tensors to a tuple of tensors.

    Attributes:
        graph: what it was made of.
        module: its arguments are the inputs without a default, in order, and then `constants`.
        constants: what stands outside of the module.
        inputs: the names of the inputs.
        dtype, lift: as for `flatten`.
    """

    graph: Graph
    module: torch.fx.GraphModule
    constants: tuple[torch.Tensor, ...]
    inputs: tuple[str, ...]
    dtype: torch.dtype | None = None
    lift: int | None = None

    def first(self, count: int) -> Flat:
        """The code of the first nodes of the graph alone, whose outputs are what none of them reads.

        Raises:
            PlanishError: none of their results is a tensor.
        """
        graph = self.graph.clone()
        kept = set(list(graph.nodes)[:count])
        made = [value for node in graph.nodes if node in kept for value in node.results]
        graph.outputs = [
            (value.name, value) for value in made if isinstance(value.type, TensorType) and kept.isdisjoint(value.users)
        ]
        if not graph.outputs:
            raise PlanishError(f"graph '{graph.name}': no tensor is made by its first {count} nodes")
        return flatten(graph, dtype=self.dtype, lift=self.lift)


def flatten(graph: Graph, *, dtype: torch.dtype | None = None, lift: int | None = None) -> Flat:
    """Torch code of a graph, its inputs and outputs in a row.

    Args:
        dtype: of every float; None: each in its own.
        lift: floats, and integers of at least so many elements, become arguments: what is neither printed nor parsed
            nor folded by torch-mlir, whose folder crashes on some in float64. None: all stand in the module.

    Raises:
        PlanishError: an op has no torch form.
    """
    emission = Emission(graph, dtype)
    taken: set[str] = set()
    names = tuple(v.name for v in graph.inputs if v.constant is None)
    for value in graph.inputs:
        if value.constant is None:
            emission.tensors[value] = emission.fx.placeholder(argument_name(value.name, taken))
    for place, node in enumerate(graph.nodes):
        emit(emission, node)
        for made in reversed(emission.fx.nodes):
            if made.op == "placeholder" or "custom" in made.meta:
                break
            made.meta["custom"] = {_MARK: place}  # which torch.export keeps
    emission.fx.output(_outputs(emission))
    module = torch.fx.GraphModule(emission.root, emission.fx)
    module.graph.eliminate_dead_code()
    constants = _lifted(module, lift) if lift is not None else ()
    module.graph.lint()
    module.recompile()
    return Flat(graph, module.eval(), constants, names, dtype, lift)


def _outputs(emission: Emission) -> tuple[torch.fx.Node, ...]:
    """The outputs; those that are an input, a constant or another output are copied."""
    made: list[torch.fx.Node] = []
    for _, value in emission.graph.outputs:
        node = emission.tensor(value)
        if node.op not in ("call_function", "call_method") or node in made:
            node = emission.call(torch.ops.aten.clone.default, node)
        made.append(node)
    return tuple(made)


def _lifted(module: torch.fx.GraphModule, least: int) -> tuple[torch.Tensor, ...]:
    """Make arguments of the floats and of the large integers."""
    found: list[torch.Tensor] = []
    replaced: list[torch.fx.Node] = []
    nodes = list(module.graph.nodes)
    first = next(node for node in nodes if node.op != "placeholder")
    for node in nodes:
        if node.op != "get_attr":
            continue
        path, _, leaf = str(node.target).rpartition(".")
        tensor = getattr(module.get_submodule(path), leaf)
        if tensor.numel() and (tensor.is_floating_point() or tensor.numel() >= least):
            with module.graph.inserting_before(first):
                argument = module.graph.placeholder(f"constant_{len(found)}")
            node.replace_all_uses_with(argument)
            replaced.append(node)
            found.append(tensor.detach())
    for node in replaced:
        module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    return tuple(found)


class _Interpreted(torch.nn.Module):
    """Runs the module node by node: only so does torch.export hand on what the nodes are marked with."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: torch.Tensor) -> Any:
        return torch.fx.Interpreter(self.module).run(*arguments)


def _copy_listed_constants(program: torch.export.ExportedProgram) -> None:
    """Copy the constants that stand beside computed tensors in a list: torch-mlir's importer takes no such list."""
    signature = program.graph_signature
    held = {
        *signature.inputs_to_parameters,
        *signature.inputs_to_buffers,
        *signature.inputs_to_lifted_tensor_constants,
    }
    for node in list(program.graph.nodes):
        for argument in node.args if node.op == "call_function" else ():
            listed = argument if isinstance(argument, list | tuple) else ()
            for constant in [c for c in listed if isinstance(c, torch.fx.Node) and c.name in held]:
                with program.graph.inserting_before(node):
                    made = program.graph.call_function(torch.ops.aten.clone.default, (constant,))
                made.meta = {"val": constant.meta["val"], "custom": node.meta.get("custom")}
                node.replace_input_with(constant, made)


# -- the program -----------------------------------------------------------------------------------------


def _gelu(x: torch.Tensor, *, approximate: str = "none") -> Any:
    """x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2: torch-mlir's own has .79772 where sqrt(2/pi) is .79788."""
    if approximate != "tanh":
        return NotImplemented
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def _topk(x: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """In order: linalg has no other, and one of any order may be in order."""
    return NotImplemented if sorted else torch.ops.aten.topk.default(x, k, dim, largest, True)


def _frexp(x: torch.Tensor) -> Any:
    """x = m 2^e, 1/2 <= |m| < 1, of finite numbers; subnormal ones get the exponent of the least normal one."""
    size = x.abs()
    one = torch.where(size > 0, size, torch.ones_like(x)).clamp(min=torch.finfo(x.dtype).tiny)
    exponent = torch.floor(torch.log2(one))  # which may round up to the next integer, or down
    exponent = torch.where(torch.exp2(-exponent) * one >= 2, exponent + 1, exponent)
    exponent = torch.where(torch.exp2(-exponent) * one < 1, exponent - 1, exponent)
    exponent = torch.where(size > 0, exponent + 1, torch.zeros_like(x))
    return x * torch.exp2(-exponent), exponent.to(torch.int32)


# what torch-mlir has wrong, in another way than torch, or not at all
DECOMPOSED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.gelu.default: _gelu,
    torch.ops.aten.topk.default: _topk,
    torch.ops.aten.frexp.Tensor: _frexp,
}


def exported(flat: Flat, arguments: Sequence[torch.Tensor]) -> tuple[Any, Results]:
    """The program of torch.export in torch-mlir's ops, and (shape, dtype) of every output.

    A node's stack trace names `planish:N`, N the place of its IR node: torch-mlir makes locations of it.

    Raises:
        PlanishError: torch.export does not take the graph, or the size of an output depends on the data.
    """
    table = dict(importlib.import_module("torch_mlir.extras.fx_decomp_util").get_decomposition_table())
    table.update(DECOMPOSED)
    try:
        with warnings.catch_warnings(), traceback.preserve_node_meta(), torch.no_grad():
            warnings.simplefilter("ignore")
            program: Any = torch.export.export(_Interpreted(flat.module), tuple(arguments), strict=False)
            program = program.run_decompositions(table)
    except FOREIGN as error:
        raise PlanishError(f"graph '{flat.graph.name}': torch.export cannot take it: {first_line(error)}") from error
    outputs: Any = next(n for n in program.graph.nodes if n.op == "output").args[0]
    values = [out.meta["val"] for out in outputs]
    for (name, made), value in zip(flat.graph.outputs, values, strict=True):
        if not all(isinstance(size, int) for size in value.shape):
            raise PlanishError(
                f"output '{name}': its size depends on the data; expected a concrete one",
                where=str(made.producer) if made.producer is not None else None,
            )
    _copy_listed_constants(program)
    for node in program.graph.nodes:
        place = (node.meta.get("custom") or {}).get(_MARK)
        node.meta["stack_trace"] = f'File "planish:{place}", line 1,' if place is not None else None
    return program, tuple((tuple(value.shape), value.dtype) for value in values)


def first_line(error: BaseException) -> str:
    """What an error says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
