"""The closure: which elements (a value with some of its axes) must carry a transform together.

Step 1 of `planish.ir.spaces`. Rows are asked once per distinct question: two nodes with the same op,
attributes and operand types get the same answer (but for acts in `OpDef.beyond`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.ir.graph import Graph, Node, Value
from planish.ir.ops.base import Act, Axes, Block, Carry, Fold, Link, OneOf, Port, Relation, static_size

SIZE_LIMIT = 1 << 26  # atoms of one element; larger ones are not searched
SMALL = 16  # elements of a constant whose data a row may look at

Pairs = tuple[np.ndarray, np.ndarray] | None
LinkRecord = tuple[int, int, Pairs, int]  # element, element, atoms, variance


@dataclass(frozen=True, eq=False, slots=True)
class Member:
    """A tensor that carries a space's transform on some of its axes.

    Attributes:
        value: the tensor; None for a constant that has yet to be made (an absent bias).
        axes: the axes, flattened in C order (axes of `grow` or `view` where those are set).
        variance: +1 it carries T, -1 the inverse transpose.
        atoms: int [product of the axes]: the channel of each position, -1 if it is in another space.
            None: position i is channel i.
        node, port: for a constant: the reader through which it was reached.
        grow, view, neutral, offset, apart: see `planish.ir.ops.base.Link`.
    """

    value: Value | None
    axes: Axes
    variance: int = 1
    atoms: np.ndarray | None = None
    node: Node | None = None
    port: Port = 0
    grow: tuple[int, ...] | None = None
    view: tuple[int, ...] | None = None
    neutral: float | None = None
    offset: float = 0.0
    apart: bool = False

    @property
    def is_constant(self) -> bool:
        return self.value is None or self.value.is_constant

    @property
    def private(self) -> bool:
        """The constant is made anew for its node; other readers keep the old one."""
        return self.value is None or self.grow is not None

    @property
    def current(self) -> Value | None:
        """The constant as it stands: a private one is read from its node, where another space may have remade it."""
        return self.node.operand(self.port) if self.private and self.node is not None else self.value

    def seen(self, data: np.ndarray) -> tuple[np.ndarray, Axes]:
        """Data of the constant in the shape that `axes` are of (grown to the left where it was), and the axes there."""
        shape = self.grow or self.view or (self.value.shape if self.value is not None else None)
        assert shape is not None
        if self.view is not None:
            data = data.reshape(self.view)
        return data, tuple(a + data.ndim - len(shape) for a in self.axes)


class Questions:
    """Asks rows, and remembers the answers by the signature of the node."""

    def __init__(self) -> None:
        self._signatures: dict[Node, object] = {}
        self._numbers: dict[object, int] = {}
        self._answers: dict[Act, dict[tuple[object, Port, Axes], Relation]] = defaultdict(dict)

    def _signature(self, node: Node) -> object:
        operands = node.operands
        parts: list[object] = [node.op.name, *node.attributes.items(), None]
        for index, value in enumerate(operands):
            if value is None:
                parts.append(None)
                continue
            parts += (value.type, value.is_constant, operands.index(value) if len(operands) > 1 else index)
            constant = value.constant
            if constant is not None and not value.is_input:
                if constant.size <= SMALL:
                    parts.append(constant.array().tobytes())
                elif constant.dtype not in ("f32", "f16", "bf16", "f64"):
                    parts.append(id(constant))
        parts += [value.type for value in node.results]
        key = tuple(parts)
        try:
            return self._numbers.setdefault(key, len(self._numbers))
        except TypeError:  # an attribute that cannot be hashed (a tensor)
            return node

    def of(self, act: Act) -> dict[tuple[object, Port, Axes], Relation]:
        """The answers for one act, to be handed to `ask`."""
        return self._answers[act]

    def ask(
        self, answers: dict[tuple[object, Port, Axes], Relation], node: Node, act: Act, port: Port, axes: Axes
    ) -> Relation:
        """The row's answer."""
        if act in node.op.beyond or node.op.opaque:
            return node.op.relate(node, act, port, axes)
        signature = self._signatures.get(node)
        if signature is None:
            signature = self._signatures[node] = self._signature(node)
        key = (signature, port, axes)
        answer = answers.get(key)
        if answer is None:
            answer = answers[key] = node.op.relate(node, act, port, axes)
        return answer


@dataclass(eq=False, slots=True)
class Option:
    """One way out of a choice, with the elements that it draws in."""

    carry: Carry
    targets: list[tuple[Link, int]]


@dataclass(eq=False, slots=True)
class Choice:
    """A `OneOf` that an element met: settled after the closure."""

    node: Node
    port: Port
    element: int
    options: list[Option]
    reason: str


class Search:
    """The closure for one act. Elements are numbered; everything is kept in parallel lists."""

    def __init__(self, graph: Graph, act: Act, questions: Questions) -> None:
        self.graph = graph
        self.act = act
        self.questions = questions
        self.answers = questions.of(act)
        self.ids: dict[tuple[Any, ...], int] = {}
        self.members: list[Member] = []  # without atoms and with the variance left open
        self.sizes: list[int] = []
        self.links: list[LinkRecord] = []
        self.blocked: dict[int, list[tuple[Node | None, Port, str]]] = defaultdict(list)
        self.folded: dict[int, list[tuple[Node, Port]]] = defaultdict(list)
        self.walls: list[tuple[int, Axes]] = []  # (element, block axes)
        self.positive: set[int] = set()
        self.choices: list[Choice] = []
        self.by_value: dict[Value, list[int]] = {}
        self.asked: set[tuple[Node, Port, Axes]] = set()
        self.queue: list[int] = []
        self.ties: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[np.ndarray, np.ndarray]] = {}
        self.outputs = {id(v) for v in graph.output_values()}

    # -- elements --------------------------------------------------------------------------------

    def element(self, value: Value, axes: Axes) -> int | None:
        """The number of (value, axes); None if a dim is not static."""
        key = (value, axes)
        number = self.ids.get(key)
        if number is not None:
            return number
        size = static_size(value, axes)
        if size is None or size > SIZE_LIMIT or size == 0:
            return None
        number = self._new(key, Member(value, axes), size)
        others = self.by_value.setdefault(value, [])
        for other in others:
            self._overlap(number, other)
        others.append(number)
        self.queue.append(number)
        return number

    def _new(self, key: tuple[Any, ...], member: Member, size: int) -> int:
        number = self.ids[key] = len(self.members)
        self.members.append(member)
        self.sizes.append(size)
        return number

    def _overlap(self, one: int, two: int) -> None:
        """Two elements of one value on axes that meet: a transform on one shows on the other."""
        a, b = self.members[one], self.members[two]
        if not set(a.axes) & set(b.axes) or a.view is not None or b.view is not None:
            return
        assert a.value is not None
        union = tuple(sorted({*a.axes, *b.axes}))
        if union in (a.axes, b.axes):
            wide, narrow = (one, two) if union == a.axes else (two, one)
            self._tie(wide, narrow)
            return
        joint = self.element(a.value, union)
        if joint is None:
            self.blocked[one].append((None, 0, "its axes meet another element's on a dynamic axis"))

    def _tie(self, wide: int, narrow: int) -> None:
        member = self.members[wide]
        assert member.value is not None
        assert member.value.shape is not None
        dims = tuple(int(member.value.shape[a]) for a in member.axes)  # type: ignore[arg-type]
        places = tuple(member.axes.index(a) for a in self.members[narrow].axes)
        pairs = self.ties.get((dims, places))
        if pairs is None:
            grid = np.indices(dims).reshape(len(dims), -1)
            target = np.ravel_multi_index([grid[p] for p in places], [dims[p] for p in places])
            pairs = self.ties[dims, places] = (np.arange(self.sizes[wide]), target)
        self.links.append((wide, narrow, pairs, 1))

    def constant_element(self, node: Node, link: Link) -> int | str | None:
        """The element of a constant (or absent) operand; None: none is needed; a string: why there can be none."""
        value = node.port(link.port)
        if value is None and link.neutral is None:
            return None
        if value is None and self.act is not Act.SHIFT and link.neutral == 0.0:
            return None  # a linear map leaves the zeros of an absent bias alone
        if link.apart and (value is None or len(value.users) > 1):
            return "a constant that would take two scales has several readers"
        if value is None or link.grow is not None:
            shape = link.grow
            if shape is None:
                return "an absent operand would be needed"
            key: tuple[Any, ...] = (node, link.port, link.axes, shape, link.apart)
            size = int(np.prod([shape[a] for a in link.axes]))
        elif link.view is not None:
            key = (value, link.axes, link.view)
            size = int(np.prod([link.view[a] for a in link.axes]))
            if len(value.users) > 1:
                return "its kernel has other readers"
        else:
            key = (value, link.axes, link.apart) if link.apart else (value, link.axes)
            size = static_size(value, link.axes) or 0
        number = self.ids.get(key)
        if number is not None:
            if self.members[number].offset != link.offset:
                return "its gain is read in two ways"
            return number
        member = Member(
            value, link.axes, 1, None, node, link.port, link.grow, link.view, link.neutral, link.offset, link.apart
        )
        number = self._new(key, member, size)
        if value is not None and link.grow is None and id(value) in self.outputs:
            self.blocked[number].append((None, 0, "the constant is a graph output"))
        if value is not None and link.grow is None and not link.apart:
            others = self.by_value.setdefault(value, [])
            if any(self.members[o].view != link.view for o in others):
                self.blocked[number].append((node, link.port, "its kernel is read in two shapes"))
            for other in others:
                self._overlap(number, other)
            others.append(number)
            if len(value.users) > 1:
                self.queue.append(number)
        return number

    # -- closure ---------------------------------------------------------------------------------

    def run(self, seeds: Iterable[tuple[Value, Axes]]) -> None:
        for value, axes in seeds:
            self.element(value, axes)
        position = 0
        while position < len(self.queue):
            self.visit(self.queue[position])
            position += 1

    def visit(self, number: int) -> None:
        member = self.members[number]
        value = member.value
        assert value is not None
        if value.producer is not None:
            self.ask(value.producer, ~value.producer.results.index(value), number)
        elif not value.is_constant:
            self.blocked[number].append((None, 0, "graph input"))
        users = value.users if len(value.users) < 2 else dict.fromkeys(value.users)
        for node in users:
            for index, operand in enumerate(node.operands):
                if operand is value:
                    self.ask(node, index, number)
        if id(value) in self.outputs:
            self.blocked[number].append((None, 0, "graph output"))

    def ask(self, node: Node, port: Port, number: int) -> None:
        axes = self.members[number].axes
        if (node, port, axes) in self.asked:
            return
        if self.members[number].is_constant and self.members[number].offset:
            self.blocked[number].append((node, port, "its gain has several readers"))
            return
        relation = self.questions.ask(self.answers, node, self.act, port, axes)
        if type(relation) is Carry:
            self.carry(node, port, number, relation)
        elif type(relation) is Block:
            self.blocked[number].append((node, port, relation.reason))
        elif type(relation) is Fold:
            self.folded[number].append((node, port))
        else:
            assert isinstance(relation, OneOf)
            options = []
            for option in relation.options:
                found = [(link, self.target(node, link)) for link in option.links]
                if not any(isinstance(target, str) for _, target in found):
                    options.append(Option(option, [(k, t) for k, t in found if isinstance(t, int)]))
            self.choices.append(Choice(node, port, number, options, relation.reason))

    def target(self, node: Node, link: Link) -> int | str | None:
        value = node.port(link.port)
        if value is None or value.is_constant:
            return self.constant_element(node, link)
        if link.grow is not None or link.view is not None:
            return "it would need a constant here"
        if link.offset or link.apart:
            return "its gain or kernel is an activation"
        number = self.element(value, link.axes)
        return "it meets a dynamic axis" if number is None else number

    def carry(self, node: Node, port: Port, number: int, relation: Carry) -> None:
        found = [(link, self.target(node, link)) for link in relation.links]
        refusals = [target for _, target in found if isinstance(target, str)]
        if refusals:  # nothing else at the node takes part: an explicit op may stand on this edge
            self.blocked[number].append((node, port, refusals[0]))
            return
        if relation.block_axes:
            self.walls.append((number, relation.block_axes))
        if relation.positive:
            self.positive.add(number)
        for link, target in found:
            if not isinstance(target, int):
                continue
            self.links.append((number, target, link.pairs, link.variance))
            if link.pairs is None and link.port != port and link.grow is None and link.view is None and not link.apart:
                self.asked.add((node, link.port, link.axes))
