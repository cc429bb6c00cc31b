"""The table of converters of torch ops, and how one is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from planish.capture.fx_builder import Builder, Size
from planish.ir.graph import Value

Made = Value | Size | tuple[Value | None, ...] | None
Converter = Callable[..., Made]

# arguments without a bearing on the function, or on an evaluation
IGNORED = frozenset(
    {"memory_format", "layout", "device", "pin_memory", "implicit", "cudnn_enable", "cudnn_enabled", "momentum",
     "scale_grad_by_freq", "sparse", "padding_idx", "non_blocking", "copy", "generator"}
)  # fmt: skip
_RENAMED = {"self": "x", "input": "x", "from": "source"}


@dataclass(frozen=True)
class Row:
    """A converter and the arguments that it reads."""

    convert: Converter
    reads: frozenset[str]


_table: dict[str, Row] = {}


def register(*names: str) -> Callable[[Converter], Converter]:
    """Register a converter for `namespace.op.overload`; it answers None where the op must stay opaque."""

    def decorate(converter: Converter) -> Converter:
        reads = frozenset(list(inspect.signature(converter).parameters)[1:])
        for name in names:
            _table[name] = Row(converter, reads)
        return converter

    return decorate


def aten(*names: str) -> Callable[[Converter], Converter]:
    """`register` for ops of the namespace `aten`."""
    return register(*(f"aten.{name}" for name in names))


def table() -> Mapping[str, Row]:
    """All converters by the name of their op."""
    from planish.capture import (  # noqa: F401
        fx_einsum,
        fx_elementwise,
        fx_indexing,
        fx_neural,
        fx_reductions,
        fx_shapes,
    )

    return _table


def bind(target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name, defaults filled in."""
    bound: dict[str, Any] = {}
    for index, argument in enumerate(target._schema.arguments):
        if index < len(args) and not argument.kwarg_only:
            bound[argument.name] = args[index]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def convert(builder: Builder, target: torch._ops.OpOverload, bound: Mapping[str, Any]) -> Made:
    """The canonical form of a call, None if there is none."""
    row = table().get(str(target))
    if row is None:
        return None
    arguments = {}
    for argument in target._schema.arguments:
        name = _RENAMED.get(argument.name, argument.name)
        if argument.name not in bound:
            continue
        if name in row.reads:
            arguments[name] = bound[argument.name]
        elif name not in IGNORED:
            given = bound[argument.name]
            if isinstance(given, Value | Size | list) or given != argument.default_value:
                return None
    return row.convert(builder, **arguments)
