"""The verifier: the rules that every graph keeps, checked after every pass.

Each value is defined once, before it is read; use lists match operands; operands and attributes fit the
row of the op; stored types agree with what the row infers; constants are immutable and of the type of their
data.
"""

from __future__ import annotations

from collections import Counter

from planish.ir.errors import InvalidModelError, VerificationError
from planish.ir.graph import Graph, Node, Value
from planish.ir.ops.base import OpDef
from planish.ir.types import TensorType, Type, is_float, numpy_dtype


def verify(graph: Graph) -> None:
    """Check a graph.

    Raises:
        VerificationError: the first rule that is broken, with the node or value.
    """
    defined: set[Value] = set()
    for value in graph.inputs:
        if not value.is_input or value.producer is not None:
            raise VerificationError(f"%{value.name}: is listed as an input but is none", where=repr(value))
        _define(graph, value, defined)
    for name, value in graph.values.items():
        if value.name != name:
            raise VerificationError(f"%{value.name}: is registered under the name '{name}'", where=repr(value))
        if value.is_constant:
            if value.producer is not None:
                raise VerificationError(f"%{name}: has data and a producer", where=repr(value))
            defined.add(value)
        if value.constant is not None:
            _check_constant(value)
    readers: dict[Value, list[Node]] = {}
    count = 0
    previous: Node | None = None
    limits: dict[OpDef, tuple[int, int | None]] = {}
    for node in graph.nodes:
        count += 1
        if node.graph is not graph or node._prev is not previous:
            raise VerificationError(f"{node.op.name}: the list of nodes is broken", where=str(node))
        previous = node
        for operand in node.operands:
            if operand is not None:
                if operand not in defined:
                    raise VerificationError(_undefined(graph, operand), where=str(node))
                readers.setdefault(operand, []).append(node)
        _check_shape_of_node(node, limits)
        for result in node.results:
            if result.producer is not node:
                raise VerificationError(f"%{result.name}: has another producer", where=str(node))
            _define(graph, result, defined)
        _check_types(node)
    if count != len(graph):
        raise VerificationError(f"graph: number of nodes; expected {len(graph)}, got {count}")
    for value in graph.values.values():
        if value not in defined:
            raise VerificationError(f"%{value.name}: is defined nowhere", where=repr(value))
        _check_users(value, readers.get(value, []))
    _check_outputs(graph, defined)


def _define(graph: Graph, value: Value, defined: set[Value]) -> None:
    if value in defined:
        raise VerificationError(f"%{value.name}: is defined twice", where=repr(value.producer or value))
    if graph.values.get(value.name) is not value:
        raise VerificationError(f"%{value.name}: the name is another value's", where=repr(value.producer or value))
    defined.add(value)


def _undefined(graph: Graph, value: Value) -> str:
    if graph.values.get(value.name) is not value:
        return f"%{value.name}: is read but is not in the graph"
    return f"%{value.name}: is read before it is defined"


def _check_constant(value: Value) -> None:
    constant = value.constant
    assert constant is not None
    if value.is_constant and value.type != constant.type:
        raise VerificationError(
            f"%{value.name}: wrong type; expected {constant.type} as its data, got {value.type}",
            where=repr(value),
        )
    if value.is_input and not compatible(value.type, constant.type):
        raise VerificationError(
            f"%{value.name}: the default has another type; expected {value.type}, got {constant.type}",
            where=repr(value),
        )
    if constant.loaded:
        raw = constant._raw()
        wide = is_float(constant.dtype) and raw.dtype.name == "float64"
        strings = constant.dtype == "str" and raw.dtype.kind in "OUST"
        if raw.shape != constant.shape or not (wide or strings or raw.dtype == numpy_dtype(constant.dtype)):
            raise VerificationError(
                f"%{value.name}: the data are {raw.dtype}{list(raw.shape)}; expected {constant.type}",
                where=repr(value),
            )
        if raw.flags.writeable:
            raise VerificationError(f"%{value.name}: the data can be written to", where=repr(value))


def _check_shape_of_node(node: Node, limits: dict[OpDef, tuple[int, int | None]]) -> None:
    """Operand count, absent operands, attribute names."""
    row = node.op
    if row.opaque:
        return
    bounds = limits.get(row)
    if bounds is None:
        variadic = any(p.variadic for p in row.params)
        least = max((i + 1 for i, p in enumerate(row.params) if not p.optional and not p.variadic), default=0)
        bounds = limits[row] = (least, None if variadic else len(row.params))
    least, most = bounds
    if len(node.operands) < least or (most is not None and len(node.operands) > most):
        expected = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
        raise VerificationError(
            f"{row.name}: wrong number of operands; expected {expected}, got {len(node.operands)}",
            where=str(node),
        )
    if None in node.operands:
        for index, operand in enumerate(node.operands):
            parameter = row.params[min(index, len(row.params) - 1)]
            if operand is None and not parameter.optional:
                raise VerificationError(f"{row.name}: operand '{parameter.name}' is absent", where=str(node))
    if node.attributes.keys() - row.attributes.keys():
        unknown = sorted(node.attributes.keys() - row.attributes.keys())[0]
        raise VerificationError(f"{row.name}: attribute '{unknown}': unknown", where=str(node))


def _check_types(node: Node) -> None:
    if node.op.opaque:
        return
    try:
        inferred = node.op.infer(node)
    except InvalidModelError as error:
        raise VerificationError(error.what, where=str(node), hint=error.hint) from error
    if len(inferred) != len(node.results):
        raise VerificationError(
            f"{node.op.name}: wrong number of results; expected {len(inferred)}, got {len(node.results)}",
            where=str(node),
        )
    for result, type_ in zip(node.results, inferred, strict=True):
        if result.type is not type_ and not compatible(result.type, type_):
            raise VerificationError(f"%{result.name}: wrong type; expected {type_}, got {result.type}", where=str(node))


def compatible(a: Type, b: Type) -> bool:
    """False if no tensor can have both types: another dtype, rank or static dim. Unknown fits everything."""
    if isinstance(a, TensorType) and isinstance(b, TensorType):
        if a.dtype != b.dtype:
            return False
        if a.shape is None or b.shape is None or a.shape == b.shape:
            return True
        return len(a.shape) == len(b.shape) and not any(
            isinstance(x, int) and isinstance(y, int) and x != y for x, y in zip(a.shape, b.shape, strict=True)
        )
    if isinstance(a, TensorType) or isinstance(b, TensorType):
        other = b if isinstance(a, TensorType) else a
        return not isinstance(other, TensorType) and not other.text
    return a == b or not a.text or not b.text


def _check_users(value: Value, readers: list[Node]) -> None:
    users = value.users
    if len(users) == len(readers) and all(a is b for a, b in zip(users, readers, strict=True)):
        return
    if Counter(map(id, users)) != Counter(map(id, readers)):
        raise VerificationError(
            f"%{value.name}: the list of users is wrong; expected {len(readers)} uses, got {len(users)}",
            where=repr(value.producer or value),
        )


def _check_outputs(graph: Graph, defined: set[Value]) -> None:
    given: dict[str, Value] = {}
    for name, value in graph.outputs:
        if value not in defined:
            raise VerificationError(f"output '{name}': %{value.name} is not in the graph", where=repr(value))
        if given.setdefault(name, value) is not value:
            raise VerificationError(f"output '{name}': is given twice", where=repr(value))
