"""Walk an ATen graph and append what its nodes are to a graph of the IR."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from planish.capture import fx_calls, fx_opaque, fx_sizes
from planish.capture.fx_builder import Builder, Size
from planish.capture.fx_signature import module_path
from planish.capture.fx_table import bind, convert
from planish.ir.errors import PlanishError
from planish.ir.graph import Value
from planish.ir.types import UNKNOWN, TensorType, Type

# statements about sizes and dtypes, which hold whenever the graph was traced
_CHECKS = frozenset(
    {"aten._assert_tensor_metadata.default", "aten._assert_scalar.default", "aten._assert_async.msg",
     "aten._assert_async.default", "aten.sym_constrain_range.default", "aten.sym_constrain_range_for_size.default",
     "aten._functional_assert_async.msg", "aten._functional_assert_scalar.default"}
)  # fmt: skip
# higher-order ops that run their graph as it is: the place of the graph among the arguments
_INLINED = {"wrap_with_set_grad_enabled": 1, "hints_wrapper": 0, "wrap": 0}


class Walk:
    """One graph module; `environment` holds what its nodes stand for.

    Args:
        builder: what is built with.
        module: the graph module.
        constant: gives the value of a tensor that the graph module holds, by its name.
        outer: the module path of the caller, for the source of nodes that have none.
    """

    def __init__(
        self, builder: Builder, module: fx.GraphModule, constant: Callable[[str], Value], outer: str = ""
    ) -> None:
        self.builder = builder
        self.module = module
        self.constant = constant
        self.outer = outer
        self.environment: dict[fx.Node, Any] = {}
        self.live = _live(module.graph)
        self.labelled: set[Value] = builder.labelled

    def run(self, placeholders: Sequence[Any]) -> Any:
        """The output, with tensors as values; one entry of `placeholders` for each, or a function that gives it."""
        given = iter(placeholders)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.environment[node] = next(given)
            elif node.op == "output":
                return self._read(node.args[0])
            elif node in self.live:
                self.environment[node] = self._node(node)
        return None

    def _read(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            found = self.environment[argument]
            if callable(found) and not isinstance(found, fx.GraphModule):
                found = self.environment[argument] = found()
            return found
        if isinstance(argument, list | tuple):
            return [self._read(item) for item in argument]
        if isinstance(argument, dict):
            return {key: self._read(item) for key, item in argument.items()}
        if isinstance(argument, slice):
            return slice(*(self._read(i) for i in (argument.start, argument.stop, argument.step)))
        return argument

    def _node(self, node: fx.Node) -> Any:
        b = self.builder
        b.source = source_of(node) or self.outer
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        if node.target is operator.getitem:
            return self._read(node.args[0])[self._read(node.args[1])]
        args, kwargs = tuple(self._read(list(node.args))), self._read(dict(node.kwargs))
        meta = node.meta.get("val")
        if str(node.target) in ("aten.sym_size.int", "aten.sym_size.default", "aten.sym_numel.default"):
            return self._size(args, meta)
        if isinstance(node.target, torch._ops.OpOverload):
            return self._call(node, node.target, args, kwargs)
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._inline(node, args)
        if fx_sizes.is_size_function(node.target):
            found = fx_sizes.compute(b, node.target, args, meta)
            if found is not None:
                return found
        raise PlanishError(f"{node.target}: a call that cannot be captured", where=b.source or str(node.format_node()))

    def _attribute(self, path: str) -> Any:
        found: Any = self.module
        for name in path.split("."):
            found = getattr(found, name)
        return found if isinstance(found, torch.nn.Module) else self.constant(path)

    def _size(self, args: tuple[Any, ...], meta: Any) -> Any:
        b, (value, *rest) = self.builder, args
        if rest:
            axis = b.axis(rest[0], b.rank(value))
            dim = b.shape(value)[axis]
            return dim if isinstance(dim, int) else b.size(value, axis)
        if isinstance(meta, torch.SymInt | int):
            whole = b.op("shape", value)
            return Size(b.op("reduce_prod", whole, axes=(0,), keepdims=True), b.dim(meta))
        return b.sizes(value)

    def _call(self, node: fx.Node, target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Any) -> Any:
        b = self.builder
        meta: Any = node.meta.get("val")
        several = isinstance(meta, list | tuple)
        metas = list(meta) if several else [meta]
        b.types = tuple(b.type_of(m) for m in metas)
        bound = bind(target, args, kwargs)
        used: set[Any] = {user.args[1] for user in node.users if user in self.live and user.target is operator.getitem}
        last = b.graph._last
        made = convert(b, target, bound) if any(isinstance(t, TensorType) for t in b.types) else None
        if isinstance(made, tuple) and any(i >= len(made) or made[i] is None for i in used):
            made = None
        if made is None:
            b.erase_after(last)
            made = fx_opaque.append(b, target, bound)
            if not several:
                made = Size(b.unsqueeze(made[0], 0)) if isinstance(meta, torch.SymInt) else made[0]
        else:
            fx_calls.note(b, target, bound, made, last)
        named = list(made) if isinstance(made, tuple) else [made]
        for index, (value, type_) in enumerate(zip(named, b.types, strict=False)):
            if isinstance(value, Value):
                self._label(value, f"{node.name}.{index}" if several else node.name, type_)
        return made

    def _label(self, value: Value, name: str, type_: Type) -> None:
        """Name a value that the node in hand made as the traced program does, and give it the traced type."""
        graph = self.builder.graph
        if value.producer is None or value in self.labelled:
            return
        self.labelled.add(value)
        if value.name != name:
            del graph.values[value.name]
            value.name = graph.fresh_name(name)
            graph.values[value.name] = value
        if type_ != UNKNOWN:
            value.type = type_

    def _inline(self, node: fx.Node, args: tuple[Any, ...]) -> Any:
        name = str(getattr(node.target, "_name", node.target))
        place = _INLINED.get(name)
        if name == "wrap_with_autocast" and args[2] is False:
            place = 4
        if place is None:
            raise PlanishError(
                f"higher-order op '{name}': control flow inside the graph cannot be captured",
                where=self.builder.source or None,
                hint="export the model with inputs or options for which it takes one path",
            )
        module = args[place]
        inner = Walk(self.builder, module, self.constant, self.builder.source)
        return inner.run(args[place + 1 :])


def source_of(node: fx.Node) -> str:
    """The path of the innermost module that a node comes from."""
    noted = (node.meta.get("custom") or {}).get("source")
    if noted is not None:
        return str(noted)
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = str(entry[0]) if isinstance(entry, tuple) else str(entry)
    return "" if path.startswith("_empty_nn_module_stack") else module_path(path)


def _live(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that an output depends on; checks are not followed."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live:
            live.update(node.all_input_nodes)
    return {node for node in live if str(node.target) not in _CHECKS}
