"""Symbolic numbers: what a traced program computes with the sizes of its inputs.

A size is read by the `shape` row and computed with in i64 vectors of one element, so that `known_ints` follows
it; a quotient of sizes (a scale factor of an interpolation) is an f64 one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from planish.capture.fx_builder import Builder, Size
from planish.ir.graph import Value
from planish.ir.types import Dim

Number = int | float | Size

_FUNCTIONS: dict[Any, str] = {
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.neg: "neg", operator.floordiv: "floordiv",
    operator.truediv: "truediv", operator.mod: "mod", operator.pow: "pow", math.ceil: "ceil", math.floor: "floor",
    math.trunc: "trunc", round: "round", torch.sym_max: "max", torch.sym_min: "min", torch.sym_float: "float",
    torch.sym_int: "trunc", operator.eq: "equal", operator.ne: "differ", operator.lt: "less",
    operator.le: "less_equal", operator.gt: "greater", operator.ge: "greater_equal", torch.sym_not: "logical_not",
    operator.and_: "logical_and", operator.or_: "logical_or",
}  # fmt: skip


def is_size_function(target: Any) -> bool:
    """True for the Python functions that a graph calls on symbolic numbers."""
    return target in _FUNCTIONS or getattr(target, "__name__", "") in ("_sym_sqrt", "sym_sum")


def compute(b: Builder, target: Any, args: tuple[Any, ...], meta: Any) -> Size | int | float | None:
    """The result of a Python function of symbolic numbers; None for one that is not known."""
    if not any(isinstance(a, Size) for a in args):
        return target(*args)
    name = _FUNCTIONS.get(target, "")
    handler = _HANDLERS.get(name)
    if handler is None:
        return None
    return Size(handler(b, *args), _dim(b, meta))


def _dim(b: Builder, meta: Any) -> Dim:
    return b.dim(meta) if isinstance(meta, torch.SymInt) else None


def _kind(numbers: tuple[Any, ...]) -> str:
    kinds = {("f64" if isinstance(n, float) else n.vector.dtype if isinstance(n, Size) else "i64") for n in numbers}
    return "f64" if "f64" in kinds else "i64"


def _vector(b: Builder, number: Any, dtype: str) -> Value:
    if isinstance(number, Size):
        return b.cast(number.vector, dtype)
    return b.constant(np.array([number], np.float64 if dtype == "f64" else np.int64), dtype, "number")


def _plain(op: str) -> Callable[..., Value]:
    def handler(b: Builder, *numbers: Any) -> Value:
        dtype = _kind(numbers)
        return b.op(op, *(_vector(b, n, dtype) for n in numbers))

    return handler


def _true_divide(b: Builder, one: Any, two: Any) -> Value:
    return b.op("div", _vector(b, one, "f64"), _vector(b, two, "f64"))


def _floor_divide(b: Builder, one: Any, two: Any) -> Value:
    """Sizes are not negative: dividing towards zero is the floor; else x - mod(x, y) is divided."""
    dtype = _kind((one, two))
    left, right = _vector(b, one, dtype), _vector(b, two, dtype)
    if dtype == "f64":
        return b.op("floor", b.op("div", left, right))
    known = isinstance(one, Size) and one.dim is not None and not str(one.dim).startswith("-")
    if known and " - " not in str(one.dim) and (not isinstance(two, int) or two > 0):
        return b.op("div", left, right)
    return b.op("div", b.op("sub", left, b.op("mod", left, right)), right)


def _rounded(op: str) -> Callable[..., Value]:
    def handler(b: Builder, number: Any) -> Value:
        value = _vector(b, number, "f64")
        return b.cast(value if op == "trunc" else b.op(op, value), "i64")

    return handler


def _differ(b: Builder, one: Any, two: Any) -> Value:
    return b.op("logical_not", _plain("equal")(b, one, two))


def _logic(op: str) -> Callable[..., Value]:
    def handler(b: Builder, *numbers: Size) -> Value:
        return b.op(op, *(n.vector for n in numbers))

    return handler


_HANDLERS: dict[str, Callable[..., Value]] = {
    **{op: _plain(op) for op in ("add", "sub", "mul", "neg", "mod", "pow", "max", "min", "equal", "less",
                                 "less_equal", "greater", "greater_equal")},
    **{op: _rounded(op) for op in ("ceil", "floor", "round", "trunc")},
    **{op: _logic(op) for op in ("logical_not", "logical_and", "logical_or")},
    "truediv": _true_divide, "floordiv": _floor_divide, "differ": _differ,
    "float": lambda b, number: _vector(b, number, "f64"),
}  # fmt: skip
