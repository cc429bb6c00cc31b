"""The only way to change a graph.

It keeps use lists, never edits a constant in place (a fold makes a new constant), and removes what
an edit made dead. Tied parameters and fan-out are the business of `planish.ir.spaces`, which sees
every use; the rewriter guards that nobody else's constant changes by accident: `set_constant` on a
constant with several readers needs `readers="all"`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from planish.ir.constant import Constant
from planish.ir.graph import Attribute, Graph, Node, Value
from planish.ir.ops import get
from planish.ir.ops.base import OpDef
from planish.ir.types import Type


class Declined(Exception):
    """A rewrite that is this pass's business but unsafe: the reason, and the node that breaks it."""

    def __init__(self, reason: str, node: Node | Value | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


class Rewriter:
    """Edits one graph. Call `sweep` (or leave the `with` block) to drop what became dead.

    Attributes:
        heirs: for `planish.ir.absorb`: the private copies of a constant; what a graph output gives out instead
            of a value, the newest last.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.edits = 0
        self.heirs: dict[Value, list[Value]] = {}
        # a value whose producer could not carry a transform: the value behind the explicit op that stands there
        self.behind: dict[Value, Value] = {}

    def __enter__(self) -> Rewriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.sweep()

    # -- making ----------------------------------------------------------------------------------

    def constant(self, constant: Constant, hint: str = "const") -> Value:
        """A new constant value."""
        self.edits += 1
        return self.graph.add_constant(self.graph.fresh_name(hint), constant)

    def insert(
        self,
        op: str | OpDef,
        operands: Sequence[Value | None],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        before: Node | None,
        names: Sequence[str] | None = None,
        types: Sequence[Type] | None = None,
        source: str = "",
    ) -> Node:
        """A new node before `before` (None: at the end of the graph)."""
        self.edits += 1
        definition = get(op) if isinstance(op, str) else op
        fresh = None if names is None else [self.graph.fresh_name(n) if n else "" for n in names]
        return self.graph.append(
            definition, operands, attributes, names=fresh, types=types, source=source, before=before
        )

    # -- changing --------------------------------------------------------------------------------

    def set_operand(self, node: Node, index: int, value: Value | None) -> None:
        """Make `node` read `value` as operand `index`; absent operands before it become None."""
        operands = list(node.operands)
        while len(operands) <= index:
            operands.append(None)
        old = operands[index]
        if old is value:
            return
        operands[index] = value
        while operands and operands[-1] is None:
            operands.pop()
        if old is not None:
            old.users.remove(node)
        if value is not None:
            value.users.append(node)
        node.operands = tuple(operands)
        self.edits += 1

    def set_attributes(self, node: Node, attributes: Mapping[str, Attribute]) -> None:
        """Replace some attributes; a None value deletes one."""
        merged = {**node.attributes, **attributes}
        node.attributes = {k: v for k, v in merged.items() if v is not None}
        self.edits += 1

    def set_constant(self, value: Value, constant: Constant, *, readers: Literal["one", "all"] = "one") -> None:
        """Give a constant value other data, for all of its readers.

        Raises:
            Declined: it has several readers (or is a graph output) and `readers` is "one".
        """
        given_out = any(v is value for _, v in self.graph.outputs)
        if given_out or (readers == "one" and len(value.users) > 1):
            raise Declined("other readers would see the change", value)
        value.constant = constant
        value.type = constant.type
        self.edits += 1

    def retype(self, value: Value, type: Type) -> None:
        """Give a value another type (after an edit upstream of it)."""
        value.type = type

    def replace(self, old: Value, new: Value, *, users: Iterable[Node] | None = None) -> None:
        """Make the readers of `old` (or only `users`) read `new`; graph outputs too if `users` is None."""
        readers = list(old.users) if users is None else list(users)
        for node in dict.fromkeys(readers):
            if new.producer is node:
                continue
            for index, operand in enumerate(node.operands):
                if operand is old:
                    self.set_operand(node, index, new)
        if users is None:
            self.graph.outputs = [(name, new if v is old else v) for name, v in self.graph.outputs]
        self.edits += 1

    def rename(self, value: Value, name: str) -> None:
        """Give a value another name; ValueError if it is taken."""
        if name == value.name:
            return
        if name in self.graph.values:
            raise ValueError(f"value name '{name}' is taken")
        values = self.graph.values
        del values[value.name]
        value.name = name
        values[name] = value

    def erase(self, node: Node) -> None:
        """Erase a node whose results nobody reads."""
        outputs = set(map(id, self.graph.output_values()))
        for result in node.results:
            if result.users or id(result) in outputs:
                raise Declined("its result is still read", node)
        self._drop(node)

    def _drop(self, node: Node) -> None:
        for operand in node.operands:
            if operand is not None:
                operand.users.remove(node)
        for result in node.results:
            del self.graph.values[result.name]
        self.graph._unlink(node)
        self.edits += 1

    def replace_node(self, node: Node, *values: Value) -> None:
        """Make the readers of `node`'s results read `values`, then erase it."""
        for result, value in zip(node.results, values, strict=True):
            self.replace(result, value)
        self.erase(node)

    def sweep(self) -> int:
        """Erase nodes and constants that reach no output. Returns the number of nodes erased.

        Nodes with side effects (`op.pure` is False) stay.
        """
        live: set[Value] = set(self.graph.output_values())
        erased = 0
        node = self.graph._last
        while node is not None:
            previous = node._prev
            if node.op.pure and not any(r.users or r in live for r in node.results):
                self._drop(node)
                erased += 1
            node = previous
        for value in self.graph.constants:
            if not value.users and value not in live:
                del self.graph.values[value.name]
        return erased
