"""Emit torch: a graph becomes a torch.fx.GraphModule of ATen ops.

With no pass applied, a captured module comes back bit for bit: the same ATen ops on the same numbers, the
parameters under their module paths, the same signature, the same structure of outputs. A graph of another
front end takes its inputs by position or by name and gives its output, or a dict of outputs by name.

The module runs, prints readable code, and goes through torch.export (sizes are Python and symbolic ints, never
tensors), torch.compile, copy.deepcopy and pickle. `module.double()` makes every float of it float64, those that
casts and constants ask for included: then it computes what `planish.evaluate(graph, dtype=torch.float64)` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.fx

import planish.codegen.torch_layers
import planish.codegen.torch_lookup
import planish.codegen.torch_opaque
import planish.codegen.torch_ops
import planish.codegen.torch_structural
from planish.codegen import torch_calls
from planish.codegen.torch_emission import EMITTERS, Emission
from planish.codegen.torch_sizes import integers
from planish.ir.errors import PlanishError
from planish.ir.types import WIDE_FLOATS, torch_dtype

if TYPE_CHECKING:
    from planish.ir.graph import Graph, Node

__all__ = ["to_torch"]


def to_torch(graph: Graph, *, dtype: torch.dtype | str | None = None) -> torch.fx.GraphModule:
    """The graph as a torch module.

    Args:
        dtype: hold every float of the graph in this dtype, or the dtype of this name ("float64").
            In float64, constants that a pass folded are not rounded. None: each in its own.

    Returns:
        A GraphModule in evaluation mode. Floats are parameters (which take a gradient where the captured
        module's did) or, where they were buffers, buffers, all under the names of the graph's constants; a float64
        master of a narrower dtype is rounded once. Called as the captured module: with its arguments by position or
        by name, giving its structure of outputs. Tensors must have the dtypes and static sizes of the capture (floats
        follow `.to()` of the module); an argument that was no tensor must be what it was.

    Raises:
        PlanishError: an op of another dialect than torch's, strings, a rank that is not known, or a `dtype` that
            is none of a float.
    """
    emission = Emission(graph, wide_dtype(dtype))
    torch_calls.inputs(emission)
    for node in graph.nodes:
        emit(emission, node)
    module = finished(emission)
    device = graph.meta.get("torch.device")
    return module.to(device) if isinstance(device, str) else module


def finished(emission: Emission) -> torch.fx.GraphModule:
    """The module of an emission whose nodes have all been emitted, in evaluation mode."""
    torch_calls.outputs(emission)
    module = torch.fx.GraphModule(emission.root, emission.fx, class_name="GraphModule")
    for name in emission.transient:
        path, _, leaf = name.rpartition(".")
        module.get_submodule(path)._non_persistent_buffers_set.add(leaf)  # which GraphModule forgets
    torch_calls.tie(emission, module)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    module.eval()
    return module


def wide_dtype(dtype: Any) -> torch.dtype | None:
    """The dtype of every float, by itself or by its name."""
    if dtype is None:
        return None
    found = torch_dtype(dtype) if dtype in WIDE_FLOATS else None
    if isinstance(dtype, str) and found is None:
        found = getattr(torch, dtype.removeprefix("torch."), None)
    found = dtype if isinstance(dtype, torch.dtype) else found
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise PlanishError(
            f"dtype: expected a float dtype of torch, got {dtype!r}",
            hint='torch.float64, or its name "float64"',
        )
    return found


def emit(emission: Emission, node: Node) -> None:
    """The code of one node: none where its results are sizes."""
    if all(integers(emission, result) is not None for result in node.results):
        return
    function, row = EMITTERS.get(node.op.name), node
    if function is None and not node.op.opaque:
        raise PlanishError(f"op '{node.op.name}': has no torch form", where=str(node))
    kept = emission.calls.get(node.results[0])
    if function is None or kept is not None:
        function, row = planish.codegen.torch_opaque.emit, kept or node
    made = function(emission, row)
    results = [made] if isinstance(made, torch.fx.Node) else list(made)
    for value, result in zip(node.results, results, strict=True):
        if value.name in emission.contiguous and any(user.op.name not in _COPIES for user in value.users):
            result = emission.method("contiguous", result)
        if result.op != "placeholder" and result not in emission.named:
            emission.named.add(result)
            result._rename(value.name)
        emission.tensors[value] = result


_COPIES = frozenset({"reshape", "flatten"})  # what reads a tensor that is not contiguous copies it itself
