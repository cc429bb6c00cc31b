"""Sizes in torch code: Python ints and symbolic ints in the place of small integer tensors.

A graph computes shapes with tensors (`shape`, `gather`, `concat`, `mul`, ...). In torch these are Python
integers: `x.size(0)`, `size * 4`. They cost nothing, and torch.export follows them symbolically, which it
cannot once they have been through a tensor and `.item()`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.fx

from planish.codegen import torch_functions
from planish.ir.ops.base import normal_axis
from planish.ir.shapes import known_ints

if TYPE_CHECKING:
    from planish.codegen.torch_emission import Emission
    from planish.ir.graph import Node, Value

LONGEST = 64  # elements; a longer integer tensor is data
INTEGERS = frozenset({"i64", "i32", "u8", "i8", "i16", "u16", "u32", "bool"})
FLOAT = "f64"  # a quotient of sizes, as of an interpolation's scale factor

Ints = list[Any]  # of int, bool and FX nodes


def sizes(emission: Emission, value: Value | None) -> list[Any] | torch.fx.Node:
    """The elements of a vector (or scalar) of integers; read from the tensor where nothing else is known."""
    found = integers(emission, value)
    if found is not None:
        return found
    return emission.call(torch_functions.elements, emission.tensor(value))


def size(emission: Emission, value: Value | None) -> Any:
    """One integer."""
    found = sizes(emission, value)
    return found[0] if isinstance(found, list) else emission.call(operator.getitem, found, 0)


def dim(emission: Emission, value: Value, axis: int) -> Any:
    """One dim of a tensor: a literal where it is static."""
    shape = value.shape
    own = None if shape is None else shape[axis]
    return own if isinstance(own, int) else emission.method("size", emission.tensor(value), axis)


def integers(emission: Emission, value: Value | None) -> Ints | None:
    """The elements of an integer scalar or vector that is computed from constants and sizes; else None."""
    if value is None or value.dtype not in (*INTEGERS, FLOAT) or value.rank is None or value.rank > 1:
        return None
    if value.is_constant and value.constant is not None:
        if value.constant.size > LONGEST:
            return None
        return [element.item() for element in value.constant.array().reshape(-1)]
    if value in emission.integers or value in emission.tensors:  # an input, or what only the data tell
        return emission.integers.get(value)
    found: Ints | None = None
    if value.producer is not None and value.producer.op.name in _HANDLERS:
        found = _HANDLERS[value.producer.op.name](emission, value.producer, value)
    if found is not None and (len(found) > LONGEST or (value.dtype == FLOAT and _literal(found))):
        found = None
    if found is not None and value.dtype == "i64":
        known = known_ints(value)
        if known is not None and len(known) == len(found):
            found = [own if isinstance(own, int) else made for own, made in zip(known, found, strict=True)]
    emission.integers[value] = found
    return found


# -- one function per op --------------------------------------------------------------------------------

_Handler = Callable[["Emission", "Node", "Value"], "Ints | None"]


def _same(emission: Emission, node: Node, value: Value) -> Ints | None:
    found = integers(emission, node.operand(0))
    return found if found is None or value.rank == 1 or len(found) == 1 else None


def _cast(emission: Emission, node: Node, value: Value) -> Ints | None:
    found, source = integers(emission, node.operand(0)), node.operand(0)
    if found is None or source is None or source.dtype == "bool" or value.dtype not in ("i64", "i32", FLOAT):
        return None
    if value.dtype == FLOAT:
        return [emission.call(torch.sym_float, one) if not isinstance(one, int) else float(one) for one in found]
    if source.dtype == FLOAT:
        return [emission.call(math.trunc, one) for one in found]
    return found


def _shape(emission: Emission, node: Node, value: Value) -> Ints | None:
    source = node.operand(0)
    if source is None or source.rank is None:
        return None
    bounds: Any = (node.attributes.get("start", 0), node.attributes.get("end"))
    axes = range(source.rank)[slice(*bounds)]
    return [dim(emission, source, axis) for axis in axes]


def _gather(emission: Emission, node: Node, value: Value) -> Ints | None:
    data, places = integers(emission, node.operand(0)), integers(emission, node.operand(1))
    source = node.operand(0)
    if data is None or places is None or source is None or source.rank != 1:
        return None
    if not all(isinstance(place, int) and -len(data) <= place < len(data) for place in places):
        return None
    return [data[place] for place in places]


def _concat(emission: Emission, node: Node, value: Value) -> Ints | None:
    parts = [integers(emission, operand) for operand in node.operands]
    if any(part is None for part in parts):
        return None
    return [one for part in parts if part for one in part]


def _slice(emission: Emission, node: Node, value: Value) -> Ints | None:
    data = integers(emission, node.operand(0))
    bounds = [integers(emission, node.operand(index)) for index in (1, 2)]
    step = [1] if node.operand(4) is None else integers(emission, node.operand(4))
    flat = [b[0] for b in (*bounds, step) if b is not None and len(b) == 1 and isinstance(b[0], int)]
    return None if data is None or len(flat) != 3 or flat[2] == 0 else data[slice(*flat)]


def _split(emission: Emission, node: Node, value: Value) -> Ints | None:
    data, lengths = integers(emission, node.operand(0)), node.attributes.get("sizes")
    if data is None or not isinstance(lengths, tuple):
        return None
    start = 0
    for result, length in zip(node.results, lengths, strict=True):
        assert isinstance(length, int)
        if result is value:
            return data[start : start + length]
        start += length
    return None


def _elementwise(function: Callable[..., Any]) -> _Handler:
    def handler(emission: Emission, node: Node, value: Value) -> Ints | None:
        columns = [integers(emission, operand) for operand in node.operands]
        if any(column is None for column in columns):
            return None
        given = [column for column in columns if column is not None]
        length = max(len(column) for column in given)
        if any(len(column) not in (1, length) for column in given):
            return None
        rows = zip(*(column * length if len(column) == 1 else column for column in given), strict=True)
        return [compute(emission, function, *row) for row in rows]

    return handler


def compute(emission: Emission, function: Callable[..., Any], *arguments: Any) -> Any:
    """The function of ints, at once where all are literals."""
    if _literal(arguments):
        return function(*arguments)
    if function is operator.mul and 1 in arguments:
        return next(a for a in arguments if not isinstance(a, int) or a != 1)
    if function in (operator.add, operator.sub) and arguments[1] == 0:
        return arguments[0]
    return emission.call(function, *arguments)


def _literal(numbers: Sequence[Any]) -> bool:
    return all(isinstance(number, int | float) for number in numbers)


def _divide(emission: Emission, node: Node, value: Value) -> Ints | None:
    quotient = operator.truediv if value.dtype == FLOAT else torch_functions.truncated_quotient
    return _elementwise(quotient)(emission, node, value)


def _extremum(function: Callable[..., Any]) -> _Handler:
    def handler(emission: Emission, node: Node, value: Value) -> Ints | None:
        columns = [integers(emission, operand) for operand in node.operands]
        if any(column is None or len(column) != len(columns[0] or ()) for column in columns):
            return None
        result = list(columns[0] or ())
        for column in columns[1:]:
            result = [compute(emission, function, a, b) for a, b in zip(result, column or (), strict=True)]
        return result

    return handler


def _fold(function: Callable[..., Any], start: int) -> _Handler:
    def handler(emission: Emission, node: Node, value: Value) -> Ints | None:
        data = integers(emission, node.operand(0))
        return None if data is None else [product(emission, data, function, start)]

    return handler


def product(
    emission: Emission, data: Sequence[Any], function: Callable[..., Any] = operator.mul, start: int = 1
) -> Any:
    """All of the ints multiplied (or folded by another function), the literals first."""
    total: Any = start
    for one in sorted(data, key=lambda d: not isinstance(d, int)):
        total = compute(emission, function, total, one)
    return total


def _filled(emission: Emission, node: Node, value: Value) -> Ints | None:
    known = known_ints(value)
    return None if known is None or not all(isinstance(d, int) for d in known) else list(known)


def _expand(emission: Emission, node: Node, value: Value) -> Ints | None:
    data, shape = integers(emission, node.operand(0)), integers(emission, node.operand(1))
    if data is None or shape is None or not all(isinstance(d, int) for d in shape) or len(shape) > 1:
        return None
    return data * shape[0] if len(data) == 1 and shape else data


_HANDLERS: dict[str, _Handler] = {
    **dict.fromkeys(("identity", "reshape", "flatten", "squeeze", "unsqueeze"), _same),
    "cast": _cast,
    "shape": _shape,
    "gather": _gather,
    "concat": _concat,
    "slice": _slice,
    "split": _split,
    "add": _elementwise(operator.add),
    "sub": _elementwise(operator.sub),
    "mul": _elementwise(operator.mul),
    "div": _divide,
    "floor": _elementwise(math.floor),
    "ceil": _elementwise(math.ceil),
    "round": _elementwise(round),
    "pow": _elementwise(operator.pow),
    "logical_not": _elementwise(operator.not_),
    "mod": _elementwise(operator.mod),
    "neg": _elementwise(operator.neg),
    "min": _extremum(torch.sym_min),
    "max": _extremum(torch.sym_max),
    "equal": _elementwise(operator.eq),
    "less": _elementwise(operator.lt),
    "less_equal": _elementwise(operator.le),
    "greater": _elementwise(operator.gt),
    "greater_equal": _elementwise(operator.ge),
    "where": _elementwise(torch_functions.choose),
    "constant_of_shape": _filled,
    "range": _filled,
    "expand": _expand,
    "reduce_prod": _fold(operator.mul, 1),
    "reduce_sum": _fold(operator.add, 0),
}

__all__ = ["compute", "dim", "integers", "normal_axis", "product", "size", "sizes"]
