"""What the converters of torch ops build with: values, scalars, sizes, casts.

A converter is called with the arguments of one node of an ATen graph, in which a tensor is a `Value`, a
symbolic size a `Size`, and everything else is itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from planish.ir import ops
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.graph import Attribute, Graph, Node, Value
from planish.ir.shapes import add, exact_quotient, floor_divide, multiply
from planish.ir.types import UNKNOWN, Dim, TensorType, Type, from_torch_dtype, is_float, numpy_dtype

Number = bool | int | float


def is_symbol(size: Any) -> bool:
    """True for a size that torch left open and that is one symbol, not an expression."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.is_Symbol)


WHOLE = 2**63 - 1  # the end of a slice that reaches to the end of the axis


@dataclass(frozen=True)
class Size:
    """A symbolic number: an i64[1] (a size) or f64[1] value, and what is known of it."""

    vector: Value
    dim: Dim = None


class Builder:
    """A graph in the making.

    Attributes:
        graph: the graph.
        symbols: what torch's symbols are called.
        source: the module path of the node in hand.
        types: the types of its results.
        labelled: the values that have the name of a node of the traced program.
    """

    def __init__(self, name: str, symbols: Mapping[str, str] | None = None) -> None:
        self.graph = Graph(name)
        self.symbols = dict(symbols or {})
        self.source = ""
        self.types: tuple[Type, ...] = ()
        self.labelled: set[Value] = set()
        self.notes: list[tuple[Value, str]] = []  # see planish.capture.fx_calls
        self.calls: list[tuple[Value, str, list[Value], dict[str, Attribute], list[Node]]] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}

    # -- types -------------------------------------------------------------------------------------

    @property
    def out(self) -> TensorType:
        """The type of the (first) result of the node in hand."""
        type_ = self.types[0]
        if not isinstance(type_, TensorType):
            raise PlanishError(f"the result of '{self.source}' is no tensor")
        return type_

    def dim(self, size: Any) -> Dim:
        """A size of torch's as a dim: a number, an expression of named symbols, or None."""
        if isinstance(size, torch.SymInt):
            return self._expression(size.node.expr)
        return int(size)

    def _expression(self, tree: Any) -> Dim:
        if tree.is_Integer:
            return int(tree)
        if tree.is_Symbol:
            return self.symbols.get(str(tree), str(tree))
        parts = [self._expression(part) for part in tree.args]
        name = type(tree).__name__
        if name in ("Add", "Mul"):
            total = parts[0]
            for part in parts[1:]:
                total = add(total, part) if name == "Add" else multiply(total, part)
            return total
        if name == "Pow" and isinstance(parts[1], int) and parts[1] > 0:
            total = 1
            for _ in range(parts[1]):
                total = multiply(total, parts[0])
            return total
        if name in ("FloorDiv", "CleanDiv", "IntTrueDiv"):
            quotient = exact_quotient(*parts)
            return quotient if quotient is not None else floor_divide(*parts) if name == "FloorDiv" else None
        return None

    def type_of(self, meta: Any) -> Type:
        """The type of what a node of an FX graph is said to give."""
        if not isinstance(meta, torch.Tensor):
            return UNKNOWN
        try:
            dtype = from_torch_dtype(meta.dtype)
        except KeyError:
            raise PlanishError(f"dtype {meta.dtype}: has no place in the IR", where=self.source or None) from None
        return TensorType(dtype, tuple(self.dim(size) for size in meta.shape))

    def dtype(self, value: Any) -> str:
        """The dtype of a tensor."""
        dtype = value.dtype if isinstance(value, Value) else None
        if dtype is None:
            raise PlanishError(f"expected a tensor, got {value!r}", where=self.source or None)
        return str(dtype)

    def shape(self, value: Value) -> tuple[Dim, ...]:
        """The dims of a tensor; its rank is always known."""
        if value.shape is None:
            raise PlanishError(f"%{value.name}: its rank is unknown", where=self.source or None)
        return value.shape

    def rank(self, value: Value) -> int:
        return len(self.shape(value))

    def axis(self, axis: int, rank: int) -> int:
        """A non-negative axis."""
        return axis + rank if axis < 0 else axis

    # -- values ------------------------------------------------------------------------------------

    def op(
        self, name: str, *operands: Value | None, types: Sequence[Type] | None = None, **attributes: Attribute
    ) -> Value:
        """Append a node and give its first result."""
        return self.results(name, operands, attributes, types)[0]

    def results(
        self,
        name: str,
        operands: Sequence[Value | None],
        attributes: Mapping[str, Attribute],
        types: Sequence[Type] | None = None,
    ) -> tuple[Value, ...]:
        """Append a node and give its results."""
        trimmed = list(operands)
        while trimmed and trimmed[-1] is None:
            trimmed.pop()
        return self.graph.append(ops.get(name), trimmed, attributes, types=types, source=self.source).results

    def constant(self, data: np.ndarray, dtype: str, hint: str) -> Value:
        """A small constant; equal ones are one value."""
        held = Constant.of(data, dtype)
        key = dtype, held.shape, held._raw().tobytes()
        found = self._constants.get(key)
        if found is None:
            found = self._constants[key] = self.graph.add_constant(self.graph.fresh_name(hint), held)
        return found

    def scalar(self, number: Number, dtype: str) -> Value:
        """A tensor of rank 0; a float keeps every bit of the Python number, whatever its dtype."""
        if is_float(dtype):
            return self.constant(np.array(float(number), np.float64), dtype, "scalar")
        if dtype in ("c64", "c128"):
            return self.constant(np.array(number, numpy_dtype(dtype)), dtype, "scalar")
        return self.constant(np.array(number).astype(numpy_dtype(dtype)), dtype, "scalar")

    def like(self, operand: Any, dtype: str) -> Value:
        """An operand of an op whose operands have one dtype: a cast tensor, or a scalar."""
        if isinstance(operand, Value):
            return self.cast(operand, dtype)
        if isinstance(operand, Size):
            return self.cast(self.item(operand), dtype)
        return self.scalar(operand, dtype)

    def cast(self, value: Value, dtype: str) -> Value:
        return value if value.dtype == dtype else self.op("cast", value, to=dtype)

    def erase_after(self, last: Node | None) -> None:
        """Take back the nodes appended after `last`."""
        graph = self.graph
        while graph._last is not last:
            node = graph._last
            if node is None:
                return
            for operand in node.operands:
                if operand is not None:
                    operand.users.remove(node)
            for value in node.results:
                del graph.values[value.name]
            graph._unlink(node)

    # -- sizes -------------------------------------------------------------------------------------

    def size(self, value: Value, axis: int) -> Size:
        """The size of an axis, read when the graph runs."""
        found = self.op("shape", value, start=axis, end=axis + 1)
        return Size(found, self.shape(value)[axis])

    def item(self, size: int | Size) -> Value:
        """A size as a tensor of rank 0."""
        if isinstance(size, Size):
            return self.op("squeeze", size.vector, axes=(0,))
        return self.constant(np.array(size, np.int64), "i64", "number")

    def ints(self, numbers: Sequence[int | Size]) -> Value:
        """An i64 vector."""
        if not any(isinstance(n, Size) for n in numbers):
            return self.constant(np.array(numbers, np.int64).reshape(-1), "i64", "ints")
        parts: list[Value] = []
        run: list[int] = []
        for number in [*numbers, None]:
            if isinstance(number, int):
                run.append(number)
                continue
            if run:
                parts.append(self.constant(np.array(run, np.int64), "i64", "ints"))
                run = []
            if number is not None:
                parts.append(number.vector)
        return parts[0] if len(parts) == 1 else self.op("concat", *parts, axis=0)

    def sizes(self, value: Value) -> list[int | Size]:
        """The dims of a tensor, as numbers or as read when the graph runs."""
        return [d if isinstance(d, int) else self.size(value, axis) for axis, d in enumerate(self.shape(value))]

    # -- shapes ------------------------------------------------------------------------------------

    def reshape(self, value: Value, dims: Sequence[int | Size]) -> Value:
        """The elements in another shape; at most one dim may be -1."""
        known = tuple(d.dim if isinstance(d, Size) else d for d in dims)
        if known == self.shape(value) and None not in known:
            return value
        attributes: dict[str, Any] = {"allowzero": True} if 0 in known else {}
        return self.op("reshape", value, self.ints(dims), **attributes)

    def regroup(self, value: Value, shape: Sequence[Dim], given: Sequence[int | Size] | None = None) -> Value:
        """The elements in the shape `shape`, of which `given` holds the sizes where they are symbolic."""
        if tuple(shape) == self.shape(value) and None not in shape:
            return value
        unknown = [axis for axis, dim in enumerate(shape) if not isinstance(dim, int)]
        dims: list[int | Size] = [dim if isinstance(dim, int) else -1 for dim in shape]
        if len(unknown) > 1:
            for axis in unknown:
                place = next((a for a, d in enumerate(self.shape(value)) if d is not None and d == shape[axis]), None)
                if given is not None:
                    dims[axis] = given[axis]
                elif place is not None:
                    dims[axis] = self.size(value, place)
        return self.reshape(value, dims)

    def transpose(self, value: Value, perm: Sequence[int]) -> Value:
        return value if list(perm) == list(range(len(perm))) else self.op("transpose", value, perm=tuple(perm))

    def unsqueeze(self, value: Value, *axes: int) -> Value:
        return self.op("unsqueeze", value, axes=tuple(axes)) if axes else value

    def squeeze(self, value: Value, *axes: int) -> Value:
        return self.op("squeeze", value, axes=tuple(axes)) if axes else value

    def expand(self, value: Value, dims: Sequence[int | Size]) -> Value:
        """The tensor broadcast against `dims`; -1 keeps a dim."""
        known = tuple(d.dim if isinstance(d, Size) else d for d in dims)
        own = self.shape(value)
        if len(own) == len(known) and all(k in (-1, o) and o is not None for k, o in zip(known, own, strict=True)):
            return value
        return self.op("expand", value, self.ints([1 if d == -1 else d for d in dims]))

    def slice(self, value: Value, axis: int, start: int | Size, end: int | Size, step: int = 1) -> Value:
        """x[start:end:step] along an axis."""
        dim = self.shape(value)[axis]
        if isinstance(dim, int) and isinstance(start, int) and isinstance(end, int) and step > 0:
            start, end, _ = slice(start, end, step).indices(dim)
            if (start, end, step) == (0, dim, 1):
                return value
        ends = end.dim if isinstance(end, Size) else end
        if start == 0 and step == 1 and (ends == WHOLE or (ends is not None and ends == dim)):
            return value
        steps = [] if step == 1 else [self.ints([step])]
        return self.op("slice", value, self.ints([start]), self.ints([end]), self.ints([axis]), *steps)

    def pick(self, value: Value, axis: int, index: int | Size) -> Value:
        """x[.., index, ..]: one position of an axis, which goes."""
        dim = self.shape(value)[axis]
        if isinstance(index, int) and index < 0 and isinstance(dim, int):
            index += dim
        return self.op("gather", value, self.item(index), axis=axis)

    def filled(self, dims: Sequence[int | Size], number: Number, dtype: str) -> Value:
        """A tensor filled with a number."""
        data = np.array(float(number), np.float64) if is_float(dtype) else np.array(number).astype(numpy_dtype(dtype))
        return self.op("constant_of_shape", self.ints(dims), value=Constant.of(data, dtype))

    def scaled(self, value: Value, factor: Any) -> Value:
        """factor * x."""
        if not isinstance(factor, Value | Size) and factor == 1:
            return value
        return self.op("mul", value, self.like(factor, self.dtype(value)))
