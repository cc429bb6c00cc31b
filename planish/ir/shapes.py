"""Shapes with symbols: arithmetic of dims, broadcasting, and integer tensors that hold shapes.

A symbolic dim is a string that reads as an integer expression of names: `batch`, `2*seq + 1`,
`(seq//4)`. Results are printed in one normal form, so that equal sums of products are equal strings.
A name that does not read as an expression (`seq len`, `batch-size`) equals itself, and what is computed
from it is unknown.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from planish.ir.errors import InvalidModelError
from planish.ir.graph import Node, Value
from planish.ir.types import Dim, Shape

# A sum of products: {sorted names: coefficient}; the empty product is the constant term.
_Polynomial = dict[tuple[str, ...], int]
_EXPRESSION = re.compile(r"[A-Za-z0-9_ +*/()-]{1,400}")
_HYPHEN = re.compile(r"[^ ]-|-[^ ]")
_LONGEST = 200  # characters of a symbolic dim; a longer one is unknown


def _combine(one: _Polynomial, two: _Polynomial, sign: int) -> _Polynomial:
    total = dict(one)
    for names, coefficient in two.items():
        total[names] = total.get(names, 0) + sign * coefficient
    return {names: c for names, c in total.items() if c}


def _times(one: _Polynomial, two: _Polynomial) -> _Polynomial:
    total: _Polynomial = {}
    for left, c in one.items():
        for right, d in two.items():
            names = tuple(sorted(left + right))
            total[names] = total.get(names, 0) + c * d
    return {names: c for names, c in total.items() if c}


def _quotient(one: _Polynomial, two: _Polynomial) -> _Polynomial | None:
    """one / two where that is a polynomial with integer coefficients and `two` is one product."""
    if len(two) != 1:
        return {(): 1} if one == two and two else None
    ((divisor, d),) = two.items()
    result: _Polynomial = {}
    for names, c in one.items():
        rest = list(names)
        for name in divisor:
            if name not in rest:
                return None
            rest.remove(name)
        if c % d:
            return None
        result[tuple(rest)] = c // d
    return result


def _walk(tree: ast.expr) -> _Polynomial:
    match tree:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return {(): number} if number else {}
        case ast.Name(id=name):
            return {(name,): 1}
        case ast.BinOp(left=left, op=op, right=right):
            one, two = _walk(left), _walk(right)
            match op:
                case ast.Add():
                    return _combine(one, two, 1)
                case ast.Sub():
                    return _combine(one, two, -1)
                case ast.Mult():
                    return _times(one, two)
                case ast.FloorDiv():
                    exact = _quotient(one, two)
                    return exact if exact is not None else {(_floor(one, two),): 1}
    raise SyntaxError("not an expression of dims")


def _floor(one: _Polynomial, two: _Polynomial) -> str:
    parts = [text if re.fullmatch(r"\w+", text) else f"({text})" for text in (_text(one), _text(two))]
    return f"({parts[0]}//{parts[1]})"


def _read(text: str) -> _Polynomial | None:
    """The polynomial that a text reads as, None if it is no expression."""
    if _EXPRESSION.fullmatch(text) and not _HYPHEN.search(text):
        try:
            return _walk(ast.parse(text, mode="eval").body)
        except (SyntaxError, ValueError, RecursionError):
            return None
    return None


@lru_cache(maxsize=4096)
def _parsed(text: str) -> tuple[tuple[tuple[str, ...], int], ...]:
    polynomial = _read(text)
    return tuple(polynomial.items()) if polynomial is not None else (((text,), 1),)


@lru_cache(maxsize=4096)
def _reads_back(name: str) -> bool:
    return _read(name) == {(name,): 1}


def _polynomial(dim: int | str) -> _Polynomial:
    if isinstance(dim, int):
        return {(): dim} if dim else {}
    return dict(_parsed(dim))


def _text(polynomial: _Polynomial) -> str:
    terms = []
    for names, c in sorted(polynomial.items(), key=lambda item: (-len(item[0]), item[0])):
        product = "*".join(names)
        size = abs(c)
        body = str(size) if not names else product if size == 1 else f"{size}*{product}"
        terms.append(("- " if c < 0 else "+ ") + body)
    if not terms:
        return "0"
    first = terms[0]
    terms[0] = first[2:] if first[0] == "+" else "0 - " + first[2:]
    return " ".join(terms)


def _dim(polynomial: _Polynomial) -> Dim:
    if not polynomial:
        return 0
    if set(polynomial) == {()}:
        return polynomial[()]
    text = _text(polynomial)
    names = {name for factors in polynomial for name in factors}
    if names != {text} and not all(_reads_back(name) for name in names):
        return None  # printed, it would read as something else
    return text if len(text) <= _LONGEST or names == {text} else None


def add(one: Dim, two: Dim) -> Dim:
    """The sum of two dims; None if one is unknown."""
    if isinstance(one, int) and isinstance(two, int):
        return one + two
    if one is None or two is None:
        return None
    return _dim(_combine(_polynomial(one), _polynomial(two), 1))


def subtract(one: Dim, two: Dim) -> Dim:
    """The difference of two dims; None if one is unknown."""
    if isinstance(one, int) and isinstance(two, int):
        return one - two
    if one is None or two is None:
        return None
    return _dim(_combine(_polynomial(one), _polynomial(two), -1))


def multiply(one: Dim, two: Dim) -> Dim:
    """The product of two dims; 0 times an unknown dim is 0."""
    if isinstance(one, int) and isinstance(two, int):
        return one * two
    if one == 0 or two == 0:
        return 0
    if one is None or two is None:
        return None
    return _dim(_times(_polynomial(one), _polynomial(two)))


def product(dims: Sequence[Dim]) -> Dim:
    """The product of dims; 1 for none."""
    total: Dim = 1
    for dim in dims:
        total = multiply(total, dim)
    return total


def exact_quotient(one: Dim, two: Dim) -> Dim:
    """one / two where it is known to leave no rest (for every value of the symbols); else None."""
    if one is None or two is None or two == 0:
        return None
    result = _quotient(_polynomial(one), _polynomial(two))
    return None if result is None else _dim(result)


def floor_divide(one: Dim, two: Dim) -> Dim:
    """one // two; a quotient that does not work out is kept as the symbol `(one//two)`."""
    if isinstance(one, int) and isinstance(two, int):
        return one // two if two else None
    if one is None or two is None or two == 0:
        return None
    left, right = _polynomial(one), _polynomial(two)
    exact = _quotient(left, right)
    return _dim(exact if exact is not None else {(_floor(left, right),): 1})


def broadcast_dims(one: Dim, two: Dim) -> Dim:
    """The dim of two dims broadcast against each other; None where that depends on the symbols.

    Raises:
        ValueError: they are static and do not broadcast.
    """
    if one == two or two == 1:
        return one
    if one == 1:
        return two
    if isinstance(one, int) and isinstance(two, int):
        raise ValueError(f"dims {one} and {two} do not broadcast")
    if isinstance(one, int):
        return one
    return two if isinstance(two, int) else None


def broadcast_shapes(*shapes: Shape, node: Node | None = None) -> Shape:
    """The shape of tensors broadcast from the right; None if the rank of one is unknown.

    Raises:
        InvalidModelError: static dims do not broadcast; `node` is shown as the place.
    """
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return None
    result: tuple[Dim, ...] = ()
    for shape in known:
        rank = max(len(result), len(shape))
        left: tuple[Dim, ...] = (1,) * (rank - len(result)) + result
        right: tuple[Dim, ...] = (1,) * (rank - len(shape)) + shape
        try:
            result = tuple(broadcast_dims(a, b) for a, b in zip(left, right, strict=True))
        except ValueError as error:
            where = None if node is None else str(node)
            raise InvalidModelError(f"operand shapes: {error}", where=where) from None
    return result


# -- integer tensors that hold shapes -------------------------------------------------------------

Dims = tuple[Dim, ...]
_MOST = 64  # elements of an integer tensor that is followed
_BUDGET = 400  # values looked at in one call
_INTEGERS = frozenset({"i64", "i32", "i16", "i8", "u8", "u16", "u32", "u64", "bool"})


def known_ints(value: Value | None) -> Dims | None:
    """What is known of the elements of an integer tensor of rank 0 or 1 (a scalar is a 1-tuple).

    Follows the producers: `shape` of a tensor gives its dims, symbols included, and integer arithmetic,
    slicing, gathering and concatenation of them are carried out. An element of None is unknown; booleans
    are 0 and 1. Returns None where not even the number of elements is known.
    """
    return _Reader().read(value) if value is not None else None


def static_ints(value: Value | None) -> tuple[int, ...] | None:
    """`known_ints` where every element is static; else None."""
    elements = known_ints(value)
    if elements is None:
        return None
    static = tuple(e for e in elements if isinstance(e, int))
    return static if len(static) == len(elements) else None


class _Reader:
    """One call of `known_ints`: counts the values that it looks at."""

    def __init__(self) -> None:
        self.budget = _BUDGET

    def read(self, value: Value | None) -> Dims | None:
        if value is None or value.dtype not in _INTEGERS or value.rank is None or value.rank > 1:
            return None
        self.budget -= 1
        if self.budget < 0:
            return None
        if value.is_constant:
            constant = value.constant
            if constant is None or constant.size > _MOST:
                return None
            return tuple(int(e) for e in constant.array().reshape(-1))
        node = value.producer
        if node is None:
            return None
        handler = _HANDLERS.get(node.op.name)
        elements = handler(self, node, value) if handler is not None else None
        return elements if elements is not None and len(elements) <= _MOST else None

    def operand(self, node: Node, index: int) -> Dims | None:
        return self.read(node.operand(index))

    def statics(self, node: Node, index: int) -> tuple[int, ...] | None:
        elements = self.operand(node, index)
        if elements is None or not all(isinstance(e, int) for e in elements):
            return None
        return tuple(e for e in elements if isinstance(e, int))


_Handler = Callable[[_Reader, Node, Value], Dims | None]


def _same(reader: _Reader, node: Node, value: Value) -> Dims | None:
    return reader.operand(node, 0)


def _shape(reader: _Reader, node: Node, value: Value) -> Dims | None:
    operand = node.operand(0)
    if operand is None or operand.shape is None:
        return None
    end = node.attributes.get("end")
    start = node.attributes.get("start", 0)
    if not isinstance(start, int) or not (end is None or isinstance(end, int)):
        return None
    return operand.shape[start:end]


def _gather(reader: _Reader, node: Node, value: Value) -> Dims | None:
    data, indices = reader.operand(node, 0), reader.statics(node, 1)
    if data is None or indices is None or not all(-len(data) <= i < len(data) for i in indices):
        return None
    return tuple(data[i] for i in indices)


def _concat(reader: _Reader, node: Node, value: Value) -> Dims | None:
    total: Dims = ()
    for index in range(len(node.operands)):
        part = reader.operand(node, index)
        if part is None:
            return None
        total += part
    return total


def _slice(reader: _Reader, node: Node, value: Value) -> Dims | None:
    data, starts, ends = reader.operand(node, 0), reader.statics(node, 1), reader.statics(node, 2)
    steps: tuple[int, ...] | None = (1,)
    if node.operand(4) is not None:
        steps = reader.statics(node, 4)
    if data is None or starts is None or ends is None or steps is None:
        return None
    if not len(starts) == len(ends) == len(steps) == 1 or steps[0] == 0:
        return None
    indices = range(*slice(starts[0], ends[0], steps[0]).indices(len(data)))
    return tuple(data[i] for i in indices)


def _split(reader: _Reader, node: Node, value: Value) -> Dims | None:
    data, sizes = reader.operand(node, 0), node.attributes.get("sizes")
    if data is None or not isinstance(sizes, tuple):
        return None
    begin = 0
    for result, size in zip(node.results, sizes, strict=False):
        if not isinstance(size, int):
            return None
        if result is value:
            return data[begin : begin + size]
        begin += size
    return None


def _elementwise(function: Callable[..., Dim]) -> _Handler:
    def handler(reader: _Reader, node: Node, value: Value) -> Dims | None:
        operands = [reader.operand(node, index) for index in range(len(node.operands))]
        known = [o for o in operands if o is not None]
        if len(known) < len(operands) or not known:
            return None
        lengths = {len(o) for o in known if len(o) != 1} or {1}
        if len(lengths) != 1:
            return None
        (length,) = lengths
        spread = [o * length if len(o) == 1 else o for o in known]
        return tuple(function(*elements) for elements in zip(*spread, strict=True))

    return handler


def _divide(one: Dim, two: Dim) -> Dim:
    if isinstance(one, int) and isinstance(two, int) and two != 0:
        quotient = abs(one) // abs(two)  # integers divide towards zero
        return quotient if (one < 0) == (two < 0) else -quotient
    return floor_divide(one, two)


def _modulo(one: Dim, two: Dim) -> Dim:
    return one % two if isinstance(one, int) and isinstance(two, int) and one >= 0 and two > 0 else None


def _extremum(choose: Callable[[int, int], int]) -> Callable[..., Dim]:
    def function(*dims: Dim) -> Dim:
        result = dims[0]
        for dim in dims[1:]:
            if isinstance(result, int) and isinstance(dim, int):
                result = choose(result, dim)
            elif result != dim:
                return None
        return result

    return function


def _equal(one: Dim, two: Dim) -> Dim:
    if one is None or two is None:
        return None
    if isinstance(one, int) and isinstance(two, int):
        return int(one == two)
    if one == two:
        return 1
    negative = min((d for d in (one, two) if isinstance(d, int)), default=0) < 0
    return 0 if negative else None  # a dim is never negative


def _where(condition: Dim, one: Dim, two: Dim) -> Dim:
    if one == two:
        return one
    return None if not isinstance(condition, int) else one if condition else two


def _not(one: Dim) -> Dim:
    return int(not one) if isinstance(one, int) else None


def _both(one: Dim, two: Dim) -> Dim:
    if one == 0 or two == 0:
        return 0
    return 1 if isinstance(one, int) and isinstance(two, int) else None


def _filled(reader: _Reader, node: Node, value: Value) -> Dims | None:
    from planish.ir.constant import Constant

    shape, fill = reader.statics(node, 0), node.attributes.get("value")
    if shape is None or len(shape) > 1 or not isinstance(fill, Constant):
        return None
    length = shape[0] if shape else 1
    return (int(fill.array().reshape(-1)[0]),) * length if length <= _MOST else None


def _expand(reader: _Reader, node: Node, value: Value) -> Dims | None:
    data, shape = reader.operand(node, 0), reader.statics(node, 1)
    if data is None or shape is None or len(shape) > 1 or (shape and shape[0] > _MOST):
        return None
    return data * shape[0] if len(data) == 1 and shape else data


def _range(reader: _Reader, node: Node, value: Value) -> Dims | None:
    bounds = [reader.statics(node, index) for index in range(3)]
    flat = [b[0] for b in bounds if b is not None and len(b) == 1]
    if len(flat) < 3 or flat[2] == 0 or len(range(*flat)) > _MOST:
        return None
    return tuple(range(*flat))


def _fold(function: Callable[[Dim, Dim], Dim]) -> _Handler:
    def handler(reader: _Reader, node: Node, value: Value) -> Dims | None:
        data = reader.operand(node, 0)
        if data is None or not data:
            return None
        total = data[0]
        for dim in data[1:]:
            total = function(total, dim)
        return (total,)

    return handler


_HANDLERS: dict[str, _Handler] = {
    **dict.fromkeys(("identity", "cast", "reshape", "flatten", "squeeze", "unsqueeze"), _same),
    "shape": _shape,
    "gather": _gather,
    "concat": _concat,
    "slice": _slice,
    "split": _split,
    "add": _elementwise(add),
    "sub": _elementwise(subtract),
    "mul": _elementwise(multiply),
    "div": _elementwise(_divide),
    "mod": _elementwise(_modulo),
    "neg": _elementwise(lambda one: subtract(0, one)),
    "min": _elementwise(_extremum(min)),
    "max": _elementwise(_extremum(max)),
    "equal": _elementwise(_equal),
    "where": _elementwise(_where),
    "logical_not": _elementwise(_not),
    "logical_and": _elementwise(_both),
    "constant_of_shape": _filled,
    "expand": _expand,
    "range": _range,
    "reduce_prod": _fold(multiply),
    "reduce_sum": _fold(add),
    "reduce_max": _fold(_extremum(max)),
    "reduce_min": _fold(_extremum(min)),
}
