"""The graph: flat SSA in topological order.

Values are graph inputs, constants, or results of nodes. Nodes are kept in a linked list, so that
the rewriter inserts and erases in constant time. Everything outside `ir` changes a graph through
`planish.ir.rewriter.Rewriter` only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planish.ir.constant import Constant
from planish.ir.types import TensorType, Type

if TYPE_CHECKING:
    from planish.ir.ops.base import OpDef


@dataclass(frozen=True, slots=True)
class Blob:
    """An attribute that only its front end reads, kept byte for byte (an ONNX subgraph, for example)."""

    kind: str
    data: bytes


Attribute = None | bool | int | float | str | bytes | Constant | Blob | TensorType | tuple["Attribute", ...]


class Value:
    """A typed value. `name` is unique in its graph.

    Exactly one of these holds: `producer` is set (a node's result), `constant` is set and the value
    is not an input (a constant), or the value is a graph input (`constant` is then its default).
    """

    __slots__ = ("constant", "is_input", "name", "producer", "type", "users")

    def __init__(
        self,
        name: str,
        type: Type,
        *,
        producer: Node | None = None,
        constant: Constant | None = None,
        is_input: bool = False,
    ) -> None:
        self.name = name
        self.type = type
        self.producer = producer
        self.constant = constant
        self.is_input = is_input
        # a node stands once for each operand that reads the value; graph outputs are not counted
        self.users: list[Node] = []

    @property
    def is_constant(self) -> bool:
        """True for a constant; False for an input, even one with a default."""
        return self.constant is not None and not self.is_input

    @property
    def shape(self) -> tuple[int | str | None, ...] | None:
        return self.type.shape if isinstance(self.type, TensorType) else None

    @property
    def dtype(self) -> str | None:
        return self.type.dtype if isinstance(self.type, TensorType) else None

    @property
    def rank(self) -> int | None:
        shape = self.shape
        return None if shape is None else len(shape)

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"


class Node:
    """An operation: `results = op(operands) {attributes}`. An absent optional operand is None."""

    __slots__ = (
        "__weakref__",
        "_next",
        "_prev",
        "attributes",
        "graph",
        "op",
        "operands",
        "results",
        "source",
    )

    def __init__(
        self,
        op: OpDef,
        operands: Sequence[Value | None],
        attributes: Mapping[str, Attribute] | None = None,
        source: str = "",
    ) -> None:
        self.op = op
        self.operands: tuple[Value | None, ...] = tuple(operands)
        self.attributes: dict[str, Attribute] = dict(attributes or {})
        self.results: tuple[Value, ...] = ()
        self.source = source
        self.graph: Graph | None = None
        self._prev: Node | None = None
        self._next: Node | None = None

    @property
    def result(self) -> Value:
        """The first result."""
        return self.results[0]

    def operand(self, index: int) -> Value | None:
        """Operand `index`, None if it is absent."""
        return self.operands[index] if index < len(self.operands) else None

    def port(self, port: int) -> Value | None:
        """Operand `port` if it is >= 0, else result `~port`."""
        if port < 0:
            return self.results[~port] if ~port < len(self.results) else None
        return self.operands[port] if port < len(self.operands) else None

    def __repr__(self) -> str:
        from planish.ir.text import node_text

        return node_text(self)


class Graph:
    """A graph. `meta` holds what a front end needs to write the same model again.

    `outputs` pairs each output's public name with the value; a value may be given out twice.
    """

    def __init__(self, name: str = "graph") -> None:
        self.name = name
        self.inputs: list[Value] = []
        self.outputs: list[tuple[str, Value]] = []
        self.values: dict[str, Value] = {}
        self.meta: dict[str, Attribute] = {}
        self._first: Node | None = None
        self._last: Node | None = None
        self._count = 0
        self._serial = 0

    # -- reading ---------------------------------------------------------------------------------

    @property
    def nodes(self) -> Iterator[Node]:
        """The nodes in topological order. The node in hand may be erased while iterating."""
        node = self._first
        while node is not None:
            following = node._next
            yield node
            node = following if node.graph is None else node._next

    def __len__(self) -> int:
        return self._count

    @property
    def constants(self) -> list[Value]:
        """The constants in the order in which they were added."""
        return [v for v in self.values.values() if v.is_constant]

    def output_values(self) -> list[Value]:
        return [value for _, value in self.outputs]

    # -- building: for front ends, the parser and the rewriter ----------------------------------

    def fresh_name(self, hint: str = "v") -> str:
        """A name that no value of the graph has."""
        if hint and hint not in self.values:
            return hint
        while True:
            self._serial += 1
            name = f"{hint}_{self._serial}"
            if name not in self.values:
                return name

    def add_input(self, name: str, type: Type, default: Constant | None = None) -> Value:
        value = Value(name, type, constant=default, is_input=True)
        self._register(value)
        self.inputs.append(value)
        return value

    def add_constant(self, name: str, constant: Constant) -> Value:
        value = Value(name, constant.type, constant=constant)
        self._register(value)
        return value

    def add_output(self, name: str, value: Value) -> None:
        self.outputs.append((name, value))

    def append(
        self,
        op: OpDef,
        operands: Sequence[Value | None],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        names: Sequence[str] | None = None,
        types: Sequence[Type] | None = None,
        source: str = "",
        before: Node | None = None,
    ) -> Node:
        """Insert a node before `before`, or at the end.

        Args:
            names: names of the results (an empty name, or None, gets a fresh one).
            types: types of the results; inferred by the op's row where None.
        """
        node = Node(op, operands, attributes, source)
        if types is None:
            types = op.infer(node)
        hints = names or [""] * len(types)
        results = []
        for hint, type_ in zip(hints, types, strict=True):
            value = Value(hint or self.fresh_name(op.short), type_, producer=node)
            self._register(value)
            results.append(value)
        node.results = tuple(results)
        node.graph = self
        for operand in node.operands:
            if operand is not None:
                operand.users.append(node)
        self._link(node, before)
        return node

    def _register(self, value: Value) -> None:
        if value.name in self.values:
            raise ValueError(f"value name '{value.name}' is taken")
        self.values[value.name] = value

    def _link(self, node: Node, before: Node | None) -> None:
        node._next = before
        node._prev = before._prev if before is not None else self._last
        if node._prev is not None:
            node._prev._next = node
        else:
            self._first = node
        if before is not None:
            before._prev = node
        else:
            self._last = node
        self._count += 1

    def _unlink(self, node: Node) -> None:
        if node._prev is not None:
            node._prev._next = node._next
        else:
            self._first = node._next
        if node._next is not None:
            node._next._prev = node._prev
        else:
            self._last = node._prev
        node.graph = None
        self._count -= 1

    def clone(self, data: Mapping[str, Constant] | None = None) -> Graph:
        """A copy that shares constant data with this graph and nothing else.

        Args:
            data: what constants hold in the copy, by name, where that is not what they hold here.
        """
        other = Graph(self.name)
        other.meta = dict(self.meta)
        other._serial = self._serial
        table: dict[Value, Value] = {}
        for value in self.inputs:
            table[value] = other.add_input(value.name, value.type, value.constant)
        for value in self.values.values():
            if value.is_constant:
                assert value.constant is not None
                table[value] = other.add_constant(value.name, (data or {}).get(value.name, value.constant))
        for node in self.nodes:
            copy = other.append(
                node.op,
                [None if v is None else table[v] for v in node.operands],
                node.attributes,
                names=[v.name for v in node.results],
                types=[v.type for v in node.results],
                source=node.source,
            )
            table.update(zip(node.results, copy.results, strict=True))
        other.outputs = [(name, table[value]) for name, value in self.outputs]
        return other

    def __eq__(self, other: object) -> bool:
        """Structural equality: same names, types, nodes, attributes, constant bits, in the same order."""
        if self is other:
            return True
        if not isinstance(other, Graph):
            return NotImplemented
        from planish.ir.text import difference

        return difference(self, other) is None

    __hash__ = object.__hash__

    def __str__(self) -> str:
        from planish.ir.text import print_graph

        return print_graph(self)
