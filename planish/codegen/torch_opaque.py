"""Torch code for ops of other dialects: a torch op is called with its original arguments.

`planish.capture.fx_opaque` says how a call is kept: attributes by the names of the schema's arguments, operands
in its order, or where the attribute `slots` sends them (`indices.1` is element 1 of the argument `indices`).
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from planish.ir.errors import PlanishError
from planish.ir.ops.opaque import torch_overload
from planish.ir.types import DTYPES, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch.fx

    from planish.codegen.torch_emission import Emission
    from planish.ir.graph import Node, Value

_NOT_ARGUMENTS = frozenset({"slots"})


def emit(emission: Emission, node: Node) -> torch.fx.Node | Sequence[torch.fx.Node]:
    """The call of a torch overload.

    Raises:
        PlanishError: the op is of another dialect, or this torch has no such op.
    """
    dialect, _, name = node.op.name.partition("::")
    if dialect != "torch":
        raise PlanishError(
            f"op '{node.op.name}': has no torch form",
            where=str(node),
            hint="write the graph with planish.to_onnx, or export the model without this op",
        )
    target = torch_overload(name)
    if target is None:
        raise PlanishError(f"op '{node.op.name}': this torch ({torch.__version__}) has no such op", where=str(node))
    named = arguments(emission, node, target)
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    for argument in target._schema.arguments:
        if argument.name not in named:
            continue
        given = named[argument.name]
        if argument.kwarg_only or keywords or len(positional) < _place(target, argument.name):
            keywords[argument.name] = given
        else:
            positional.append(given)
    made = emission.call(target, *positional, **keywords)
    returns = target._schema.returns
    if len(returns) == 1 and "[]" not in str(returns[0].type) and "List" not in str(returns[0].type):
        return made
    return [emission.call(operator.getitem, made, index) for index in range(len(node.results))]


def _place(target: torch._ops.OpOverload, name: str) -> int:
    return [argument.name for argument in target._schema.arguments].index(name)


def arguments(emission: Emission, node: Node, target: torch._ops.OpOverload) -> dict[str, Any]:
    """The arguments of a kept call, by name."""
    schema = {argument.name: argument for argument in target._schema.arguments}
    named = {
        name: _decoded(emission, value, str(schema[name].type))
        for name, value in node.attributes.items()
        if name in schema and name not in _NOT_ARGUMENTS
    }
    slots = node.attributes.get("slots")
    operands = list(node.operands)
    if isinstance(slots, tuple):
        for slot, operand in zip(slots, operands, strict=True):
            name, _, index = str(slot).partition(".")
            held = _operand(emission, operand, str(schema[name].type))
            if index:
                named[name][int(index)] = held
            else:
                named[name] = held
    else:
        for name, argument in schema.items():
            if name in named or not operands:
                continue
            kind = str(argument.type)
            if kind.startswith("List[") or "[]" in kind:
                named[name], operands = [_operand(emission, operand, kind) for operand in operands], []
            else:
                named[name] = _operand(emission, operands.pop(0), kind)
    if "device" in schema and not any(v is not None and v.dtype is not None for v in node.operands):
        named["device"] = emission.device()
    return named


def _operand(emission: Emission, value: Value | None, kind: str) -> Any:
    """A tensor, or a symbolic number where the schema wants numbers."""
    if value is None:
        return None
    if "Tensor" not in kind:
        number = emission.number(value)
        if number is not None:
            return number
        return emission.method("item", emission.tensor(value))
    return emission.tensor(value)


def _decoded(emission: Emission, value: Any, kind: str) -> Any:
    if isinstance(value, tuple):
        return [_decoded(emission, item, kind) for item in value]
    if isinstance(value, str) and "str" not in kind:  # a dtype, a layout or a memory format: ints to the schema
        if value in DTYPES:
            return emission.dtype(value) if torch_dtype(value).is_floating_point else torch_dtype(value)
        return getattr(torch, value, value)
    return value
