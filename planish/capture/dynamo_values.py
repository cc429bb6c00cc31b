"""What a Dynamo graph is captured with: stand-ins for its inputs, Python floats, sizes of Dynamo's own symbols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn


class Scalar:
    """A Python float that the graph reads by `.item()`: a number, or a tensor where it may change."""

    def __init__(self, value: float | torch.Tensor) -> None:
        self.value = value

    def item(self) -> float | torch.Tensor:
        return self.value


def value_of(expression: Any, known: Mapping[Any, Any]) -> Any:
    """An expression of the program's symbols as a size of Dynamo's; None if it holds a symbol that is not known."""
    symbols = sorted(expression.free_symbols, key=str)
    if not set(symbols) <= known.keys():
        return None
    if expression.is_Symbol:
        return known[expression]
    environment = next((known[s].node.shape_env for s in symbols), None)
    if environment is None:
        return int(expression)
    moved = expression.xreplace({s: known[s].node.expr for s in symbols})
    return environment.create_symintnode(moved, hint=None) if not moved.is_number else int(moved)


def holds_of(expression: Any, known: Mapping[Any, Any]) -> bool:
    """Ask Dynamo whether an assumption holds of its sizes: it becomes a guard."""
    symbols = list(expression.free_symbols)
    if not symbols:
        return bool(expression)
    environment = known[symbols[0]].node.shape_env
    return bool(environment.evaluate_expr(expression.xreplace({s: known[s].node.expr for s in symbols})))


def like(value: Any) -> Any:
    """What is kept of an input: sizes, strides, dtype and device of a tensor, not its data; an int of a size."""
    if isinstance(value, torch.SymInt):
        return int(value.node.hint) if value.node.has_hint() else int(value)  # without a guard on it
    if type(value) not in (torch.Tensor, nn.Parameter) or value.layout is not torch.strided:
        return value
    return Example(tuple(value.shape), value.stride(), value.dtype, value.device)


@dataclass(frozen=True)
class Example:
    """A tensor without its data."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def example_of(value: Any) -> Any:
    """An input to trace with: its data is not read."""
    if not isinstance(value, Example):
        return value
    return torch.empty_strided(value.size, value.stride, dtype=value.dtype, device=value.device)


def is_number(node: fx.Node, value: Any) -> bool:
    """True for a Python float that Dynamo passes as a tensor."""
    held = getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False)
    items = all(user.op == "call_method" and user.target == "item" for user in node.users)
    return bool(held) and items and isinstance(value, torch.Tensor) and value.dim() == 0


def number_of(node: fx.Node) -> float:
    """The value of a Python float, on which Dynamo guards from now on."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    fake = node.meta.get("example_value")
    memo = getattr(fake, "item_memo", None)
    if isinstance(memo, torch.SymFloat):
        return float(guard_scalar(memo))
    return float(node.meta["grapharg"].example)


def distinct(names: Sequence[str]) -> list[str]:
    """The names, a number behind those that stand there already."""
    found: list[str] = []
    for name in names:
        made, serial = name, 0
        while made in found:
            serial += 1
            made = f"{name}_{serial}"
        found.append(made)
    return found
