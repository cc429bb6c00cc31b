"""A node as a converter to a canonical op sees it, and what the converter answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from onnx import AttributeProto, NodeProto

from planish.ir.constant import Constant
from planish.ir.graph import Attribute, Value
from planish.ir.types import TensorType, Type

if TYPE_CHECKING:
    from planish.ir.types import Dim


class Scope(Protocol):
    """What a converter may ask about names."""

    def peek(self, name: str) -> Constant | None: ...
    def type(self, name: str) -> Type: ...
    def value(self, name: str) -> Value | None: ...
    def constant(self, constant: Constant, hint: str) -> Value: ...


@dataclass(frozen=True)
class Fresh:
    """An operand that used to be an attribute."""

    data: Constant
    hint: str


Operand = str | Fresh | None


@dataclass
class Made:
    """A canonical op: operands by name, attributes, how many of the node's outputs it gives (None: all)."""

    op: str
    operands: Sequence[Operand]
    attributes: dict[str, Attribute] = field(default_factory=dict)
    results: int | None = 1


class View:
    """A node as its converter sees it.

    Attributes:
        since: the opset version in which the node's operator got its present form.
        only_first: nobody reads the node's results but the first.
    """

    def __init__(self, proto: NodeProto, since: int, scope: Scope, *, only_first: bool) -> None:
        self.proto = proto
        self.since = since
        self.scope = scope
        self.only_first = only_first
        self.given = {a.name: a for a in proto.attribute}
        self.unread = set(self.given)

    # -- attributes ------------------------------------------------------------------------------

    def attribute(self, name: str) -> AttributeProto | None:
        self.unread.discard(name)
        return self.given.get(name)

    def get_int(self, name: str, default: int = 0) -> int:
        found = self.attribute(name)
        return default if found is None else int(found.i)

    def get_float(self, name: str, default: float) -> float:
        """A float32, held exactly."""
        found = self.attribute(name)
        return float(np.float32(default)) if found is None else float(found.f)

    def get_ints(self, name: str) -> tuple[int, ...] | None:
        found = self.attribute(name)
        return None if found is None else tuple(int(i) for i in found.ints)

    def get_str(self, name: str, default: str) -> str:
        found = self.attribute(name)
        return default if found is None else found.s.decode("utf-8", "replace")

    def skip(self, *names: str) -> None:
        """These attributes do not change what the node computes."""
        self.unread.difference_update(names)

    # -- operands --------------------------------------------------------------------------------

    def input(self, index: int) -> str:
        """The name of operand `index`, empty if it is absent."""
        return self.proto.input[index] if index < len(self.proto.input) else ""

    def inputs(self, count: int) -> list[Operand]:
        """The first `count` operands."""
        return [self.input(i) or None for i in range(count)]

    def shape(self, index: int) -> tuple[Dim, ...] | None:
        type_ = self.scope.type(self.input(index))
        return type_.shape if isinstance(type_, TensorType) else None

    def rank(self, index: int) -> int | None:
        shape = self.shape(index)
        return None if shape is None else len(shape)

    def dtype(self, index: int) -> str | None:
        type_ = self.scope.type(self.input(index))
        return type_.dtype if isinstance(type_, TensorType) else None

    def constant(self, index: int) -> Constant | None:
        name = self.input(index)
        return self.scope.peek(name) if name else None

    def constant_ints(self, index: int) -> tuple[int, ...] | None:
        """The elements of a constant integer operand."""
        constant = self.constant(index)
        if constant is None or constant.dtype not in ("i64", "i32") or len(constant.shape) > 1:
            return None
        return tuple(int(i) for i in constant.array().reshape(-1))

    def resolve(self, operand: Operand) -> Value | None:
        if isinstance(operand, Fresh):
            return self.scope.constant(operand.data, f"{self.proto.output[0]}_{operand.hint}")
        return self.scope.value(operand) if operand else None
