"""A call of a torch op that has no row, kept so that it can be made again.

The node is `torch::namespace.op.overload`. Arguments that hold no tensor are attributes by name; the operands
are the tensors and the symbolic sizes in the order in which the schema names them. Where an argument is a list
that holds some, the attribute `slots` says for each operand where it goes: `indices.1` is element 1 of the
argument `indices`, whose other elements the attribute of that name gives.

    dtype         its IR name             memory_format, layout     torch's name
    device        not kept: an evaluation is on one device
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from planish.capture.fx_builder import Builder, Size
from planish.ir.errors import PlanishError
from planish.ir.graph import Attribute, Value
from planish.ir.types import from_torch_dtype

_DROPPED = frozenset({"device", "pin_memory"})


def append(b: Builder, target: torch._ops.OpOverload, bound: Mapping[str, Any]) -> tuple[Value, ...]:
    """Append the opaque node of a call and give its results."""
    operands: list[Value | None] = []
    slots: list[str] = []
    attributes: dict[str, Attribute] = {}
    listed = False
    for argument in target._schema.arguments:
        name = argument.name
        if name not in bound or name in _DROPPED:
            continue
        given = bound[name]
        if isinstance(given, Value | Size):
            operands.append(given if isinstance(given, Value) else b.item(given))
            slots.append(name)
            continue
        if isinstance(given, list | tuple):
            held = [index for index, item in enumerate(given) if isinstance(item, Value | Size)]
            for index in held:
                item = given[index]
                operands.append(item if isinstance(item, Value) else b.item(item))
                slots.append(f"{name}.{index}")
            listed = listed or bool(held)
            attributes[name] = tuple(_plain(b, target, None if isinstance(i, Value | Size) else i) for i in given)
            continue
        if argument.has_default_value() and given == argument.default_value and type(given) in _SIMPLE:
            continue
        attributes[name] = _plain(b, target, given)
    in_order = [a.name for a in target._schema.arguments if a.name in slots]
    if listed or slots != in_order or _gap(target, slots, attributes):
        attributes["slots"] = tuple(slots)
    return b.results(f"torch::{target}", operands, attributes, b.types)


_SIMPLE = (bool, int, float, str, type(None))


def _gap(target: torch._ops.OpOverload, slots: list[str], attributes: Mapping[str, Any]) -> bool:
    """True if an argument before the last operand is neither an operand nor an attribute."""
    names = [a.name for a in target._schema.arguments]
    last = max((names.index(s) for s in slots if s in names), default=-1)
    return any(name not in slots and name not in attributes for name in names[:last])


def _plain(b: Builder, target: torch._ops.OpOverload, given: Any) -> Attribute:
    if given is None or isinstance(given, bool | int | float | str):
        return given
    if isinstance(given, complex):
        return (given.real, given.imag)
    if isinstance(given, torch.dtype):
        return from_torch_dtype(given)
    if isinstance(given, torch.memory_format | torch.layout | torch.device):
        return str(given).removeprefix("torch.")
    if isinstance(given, list | tuple):
        return tuple(_plain(b, target, item) for item in given)
    raise PlanishError(
        f"op '{target}': an argument of type {type(given).__name__} cannot be kept", where=b.source or None
    )
