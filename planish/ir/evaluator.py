"""Evaluate a graph with torch, in any float dtype, holding only the values that are still read.

    evaluate(graph, {"x": x})                          every value in its own dtype
    evaluate(graph, {"x": x}, torch.float64)           every float in float64, folds unrounded

A constant is read when a node first needs it and dropped after the last one that does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from planish.ir.errors import PlanishError, nearest
from planish.ir.graph import Graph, Node, Value
from planish.ir.ops.base import Wide
from planish.ir.types import TensorType, is_float

if TYPE_CHECKING:
    import numpy as np
    import torch

    Observer = Callable[[Value, Any], None]


def evaluate(
    graph: Graph,
    inputs: Mapping[str, torch.Tensor | np.ndarray],
    dtype: torch.dtype | None = None,
    *,
    keep: Collection[str] = (),
    observe: Observer | None = None,
    observed: Collection[Value] | None = None,
) -> dict[str, Any]:
    """The outputs by name, and the values named in `keep`.

    Args:
        graph: the graph.
        inputs: a tensor for each input without a default.
        dtype: of every float; None leaves each value its own.
        keep: names of further values to return.
        observe: called with each value of `observed` (None: every value that is computed) and its tensor, as
            soon as it is there.
        observed: see `observe`.

    Raises:
        PlanishError: inputs that do not fit, an unknown name, or an op that cannot be evaluated.
    """
    return Evaluator(graph, dtype).run(inputs, keep=keep, observe=observe, observed=observed)


class Evaluator:
    """Evaluates one graph in one dtype; keeps nothing between runs.

    Attributes:
        narrowed: the nodes that the last run could not do in `dtype`, only in a narrower one.
    """

    def __init__(self, graph: Graph, dtype: torch.dtype | None = None) -> None:
        self.graph = graph
        self.dtype = dtype
        self.narrowed: list[Node] = []

    def run(
        self,
        inputs: Mapping[str, torch.Tensor | np.ndarray],
        *,
        keep: Collection[str] = (),
        observe: Observer | None = None,
        observed: Collection[Value] | None = None,
    ) -> dict[str, Any]:
        """See `evaluate`."""
        graph = self.graph
        values = graph.values
        for name in keep:
            if name not in values:
                raise PlanishError(f"value '{name}': not in the graph", hint=nearest(name, values))
        wide = Wide(self.dtype)
        environment = bind_inputs(graph, inputs, wide)
        wanted = [*graph.output_values(), *(values[name] for name in keep)]
        if observe is not None:
            known = None if observed is None else set(observed)
            for value in graph.inputs:
                if known is None or value in known:
                    observe(value, environment[value])
            if known is None:
                needed: Collection[Value] = [v for node in graph.nodes for v in node.results]
            else:
                needed = [v for v in known if v.producer is not None]
        else:
            known, needed = set(), ()
        found = _evaluate(list(graph.nodes), environment, wanted, wide, observe, known, needed)
        self.narrowed = wide.narrowed
        results = {name: found[value] for name, value in graph.outputs}
        results.update((name, found[values[name]]) for name in keep)
        return results


def evaluate_nodes(
    nodes: Sequence[Node],
    environment: Mapping[Value, Any],
    wanted: Iterable[Value],
    wide: Wide | None = None,
) -> dict[Value, Any]:
    """Evaluate a window of a graph.

    Args:
        nodes: the window, in topological order.
        environment: tensors of the values that the window reads from outside, constants aside.
        wanted: the values to return.
        wide: the dtype; `wide.narrowed` is added to.

    Raises:
        PlanishError: the window reads a value that is not in the environment.
    """
    return _evaluate(nodes, dict(environment), list(wanted), wide or Wide(), None, set(), ())


def _evaluate(
    nodes: Sequence[Node],
    environment: dict[Value, Any],
    wanted: Collection[Value],
    wide: Wide,
    observe: Observer | None,
    observed: Collection[Value] | None,
    needed: Collection[Value],
) -> dict[Value, Any]:
    """Run the nodes that `wanted` and `needed` depend on. `environment` is this function's to empty."""
    import torch

    kept = set(wanted)
    live, last = _plan(nodes, kept, needed, environment)
    for value in [v for v in environment if v not in last and v not in kept]:
        del environment[value]
    with torch.no_grad():
        for index, node in enumerate(nodes):
            if not live[index]:
                continue
            for operand in node.operands:
                if operand is not None and operand not in environment:
                    if not operand.is_constant or operand.constant is None:
                        what = f"%{operand.name}: has no tensor in the environment"
                        raise PlanishError(what, where=str(node))
                    environment[operand] = wide.hold(operand.constant)
            operands = [None if v is None else environment[v] for v in node.operands]
            results = _call(node, operands, wide)
            del operands
            for value, tensor in zip(node.results, results, strict=True):
                if observe is not None and (observed is None or value in observed):
                    observe(value, tensor)
                if value in kept or value in last:
                    environment[value] = tensor
            results, tensor = (), None  # drop the references
            for operand in node.operands:
                if operand is not None and last.get(operand) == index and operand not in kept:
                    environment.pop(operand, None)
        for value in kept:
            if value not in environment:
                if value.constant is None:
                    raise PlanishError(f"%{value.name}: is not computed by the nodes evaluated")
                environment[value] = wide.hold(value.constant)
    return {value: environment[value] for value in kept}


def _plan(
    nodes: Sequence[Node], kept: set[Value], needed: Collection[Value], given: Mapping[Value, Any]
) -> tuple[list[bool], dict[Value, int]]:
    """Which nodes must run, and the index of the last one that reads each value."""
    live = [False] * len(nodes)
    alive = kept | set(needed)
    last: dict[Value, int] = {}
    for index in range(len(nodes) - 1, -1, -1):
        node = nodes[index]
        for result in node.results:
            if result in alive and result not in given:
                break
        else:
            continue
        live[index] = True
        for value in node.operands:
            if value is not None:
                alive.add(value)
                last.setdefault(value, index)
    return live, last


def _call(node: Node, operands: list[Any], wide: Wide) -> Sequence[Any]:
    try:
        results = node.op.evaluate(node, operands, wide)
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, NotImplementedError) as error:
        text = str(error).strip() or type(error).__name__
        shapes = ", ".join(_describe(operand) for operand in operands)
        raise PlanishError(
            f"{node.op.name}: cannot be evaluated: {text.splitlines()[0]}; operands are ({shapes})",
            where=str(node),
        ) from error
    if len(results) != len(node.results):
        raise PlanishError(
            f"{node.op.name}: wrong number of results; expected {len(node.results)}, got {len(results)}",
            where=str(node),
        )
    return results


def _describe(held: Any) -> str:
    if held is None:
        return "_"
    shape = getattr(held, "shape", None)
    if shape is None:
        return type(held).__name__
    return f"{str(held.dtype).removeprefix('torch.')}{list(shape)}"


# -- inputs --------------------------------------------------------------------------------------


def bind_inputs(
    graph: Graph, inputs: Mapping[str, torch.Tensor | np.ndarray], wide: Wide | None = None
) -> dict[Value, Any]:
    """Check the inputs against the graph, and hold them as an evaluation does.

    Raises:
        PlanishError: a name, dtype, rank or dim that does not fit, or a symbolic dim with two sizes.
    """
    if not isinstance(inputs, Mapping):
        raise PlanishError(
            f"inputs: expected a dict of name to tensor, got {type(inputs).__name__}",
            hint=f"the inputs of the graph: {', '.join(v.name for v in graph.inputs) or 'none'}",
        )
    wide = wide or Wide()
    known = {value.name: value for value in graph.inputs}
    for name in inputs:
        if name not in known:
            raise PlanishError(
                f"input '{name}': not an input of the graph; expected {', '.join(known) or 'none'}",
                hint=nearest(name, known),
            )
    environment: dict[Value, Any] = {}
    symbols: dict[str, tuple[int, str]] = {}
    for name, value in known.items():
        if name in inputs:
            environment[value] = _bind(value, inputs[name], wide, symbols)
        elif value.constant is not None:
            environment[value] = wide.hold(value.constant)
        else:
            raise PlanishError(f"input '{name}': is missing", where=str(value))
    return environment


def _bind(value: Value, given: Any, wide: Wide, symbols: dict[str, tuple[int, str]]) -> Any:
    import numpy as np
    import torch

    what = f"input '{value.name}'"
    type_ = value.type
    if not isinstance(type_, TensorType):
        return torch.from_numpy(given) if isinstance(given, np.ndarray) and given.dtype.kind in "biufc" else given
    if type_.dtype == "str":
        if not isinstance(given, np.ndarray) or given.dtype.kind not in "OUST":
            raise PlanishError(f"{what}: expected a numpy array of strings, got {_kind(given)}")
        _check_shape(what, type_, given.shape, symbols)
        return given.astype(object)
    if isinstance(given, np.ndarray):
        if given.dtype.kind in "OUSTMm":
            raise PlanishError(f"{what}: wrong dtype; expected {type_.dtype}, got {_kind(given)}")
        from planish.ir.constant import Constant

        got = _numpy_name(given)
        tensor: torch.Tensor = Wide().hold(Constant.of(given))
    elif isinstance(given, torch.Tensor):
        got, tensor = _torch_name(given), given.detach()
    else:
        raise PlanishError(f"{what}: expected a tensor, got {_kind(given)}")
    held = wide.of(type_.dtype)
    widened = wide.dtype is not None and is_float(type_.dtype) and is_float(got)
    if got != type_.dtype and tensor.dtype != held and not widened:
        raise PlanishError(f"{what}: wrong dtype; expected {type_.dtype}, got {got}")
    _check_shape(what, type_, tuple(tensor.shape), symbols)
    return tensor.to(held)


def _check_shape(what: str, type_: TensorType, shape: tuple[int, ...], symbols: dict[str, tuple[int, str]]) -> None:
    if type_.shape is None:
        return
    if len(shape) != len(type_.shape):
        raise PlanishError(f"{what}: wrong rank; expected {type_}, got shape {list(shape)}")
    for axis, (dim, size) in enumerate(zip(type_.shape, shape, strict=True)):
        if isinstance(dim, int) and dim != size:
            raise PlanishError(f"{what}: wrong size of dim {axis}; expected {type_}, got shape {list(shape)}")
        if isinstance(dim, str):
            first, where = symbols.setdefault(dim, (size, what))
            if first != size:
                other = "elsewhere in it" if where == what else f"in {where}"
                raise PlanishError(f"{what}: dim {axis} '{dim}' is {size}, but {first} {other}")


def _kind(given: Any) -> str:
    name = type(given).__name__
    return f"{name} of {given.dtype}" if hasattr(given, "dtype") else name


def _numpy_name(array: np.ndarray) -> str:
    from planish.ir.types import from_numpy_dtype

    try:
        return from_numpy_dtype(array.dtype)
    except KeyError:
        return str(array.dtype)


def _torch_name(tensor: torch.Tensor) -> str:
    from planish.ir.types import from_torch_dtype

    try:
        return from_torch_dtype(tensor.dtype)
    except KeyError:
        return str(tensor.dtype)
