"""What a row of the op table says.

A row says what an op *is* (`infer`, `evaluate`) and what it does with a transform on an axis of one
of its ports (`relate`). A *port* is an operand (0, 1, ...) or a result (-1 is result 0, -2 result 1:
`~index`). `relate(node, act, port, axes)` answers:

    the value at `port` carries a transform T of kind `act` on `axes` (several axes are read as one,
    flattened in C order). What must hold for the node to compute the same function?

with one of

    Carry(links)     exactly these other ports carry T too (or its inverse transpose, `variance=-1`);
                     every other port is unchanged.
    OneOf(options)   one of several `Carry`s: a product may let a scale ride on either factor.
    Fold(...)        the node's constants take the transform up by a formula of their own
                     (`OpDef.fold`); nothing else carries it.
    Block(reason)    the op does not commute with T. The default: unknown is safe.

Whether a linked port is a constant (and so absorbs the transform at no cost) or an activation (and
so passes it on) is the business of `planish.ir.spaces`, not of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    from planish.ir.constant import Constant
    from planish.ir.graph import Node, Value
    from planish.ir.types import Type


class Act(Enum):
    """The kinds of transform. SCALE, PERMUTE and ROTATE are kinds of LINEAR."""

    PERMUTE = "permute"  # x -> P x
    SCALE = "scale"  # x -> diag(s) x, s > 0; of any sign where every row on the way says so
    SHIFT = "shift"  # x -> x + t
    ROTATE = "rotate"  # x -> Q x, Q orthogonal
    LINEAR = "linear"  # x -> M x, M invertible
    SPLIT = "split"  # x_j -> T_j channels x_j (sizes change); what contracts them takes 1 / T_j


ACTS = tuple(Act)
MIXING = frozenset({Act.PERMUTE, Act.ROTATE, Act.LINEAR})  # acts that move one channel into another

Axes = tuple[int, ...]
Port = int


@dataclass(frozen=True, slots=True)
class Link:
    """Another port that must carry the transform.

    Attributes:
        port: the port.
        axes: its axes (non-negative, ascending), flattened in C order.
        variance: +1 the same T; -1 its inverse transpose (SHIFT: -t).
        pairs: (asker's atoms, port's atoms), two equally long int arrays of the atoms (positions on the
            flattened axes) that are one channel; None: atom i is atom i.
        grow: for a constant that is broadcast along the axes: the shape it must be expanded to first.
            It then becomes private to the node. `axes` are axes of the grown shape.
        view: for a constant: the shape it is reshaped to before `axes` apply, and back after
            (kernels of a grouped convolution).
        neutral: what an absent optional operand stands for (0 for a bias, 1 for a gain), so that one can
            be made; `grow` is then its shape.
        offset: the constant c acts as c + offset (a norm that multiplies by 1 + w).
        apart: the constant takes this transform besides what other ports of the node ask of it (a factor between
            two spaces takes the scales of both); the two have nothing to do with each other.
    """

    port: Port
    axes: Axes
    variance: int = 1
    pairs: tuple[np.ndarray, np.ndarray] | None = None
    grow: tuple[int, ...] | None = None
    view: tuple[int, ...] | None = None
    neutral: float | None = None
    offset: float = 0.0
    apart: bool = False


@dataclass(frozen=True, slots=True)
class Carry:
    """Exactly the linked ports carry the transform as well.

    Attributes:
        links: the other ports; empty: the op does not see the transform at all.
        block_axes: axes of the asker within which a MIXING act must stay: T is block diagonal, one
            block for each index of these axes (a subset of the asker's axes).
        positive: SCALE only: the factors must be positive.
    """

    links: tuple[Link, ...] = ()
    block_axes: Axes = ()
    positive: bool = False


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of these, the first that works out; `reason` is what a port is told that lost."""

    options: tuple[Carry, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Fold:
    """The node's own constants take the transform up: see `OpDef.fold`. `operands` are those changed."""

    operands: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """The op does not commute with the transform."""

    reason: str


Relation = Carry | OneOf | Fold | Block
INVISIBLE = Carry()


@dataclass(frozen=True, slots=True)
class Param:
    """An operand of an op: its name, whether it may be absent, and what absence stands for."""

    name: str
    optional: bool = False
    variadic: bool = False


HELD_AS = {"u1": "u8", "u2": "u8", "u3": "u8", "u4": "u8", "i2": "i8", "i3": "i8", "i4": "i8"}  # what torch lacks
HELD_AS |= dict.fromkeys(("f4e2m1", "f6e2m3", "f6e3m2", "f8e8m0"), "f32")


class Wide:
    """How an evaluation treats floats: `dtype` replaces every float dtype, None keeps each value's own.

    `narrowed` collects the nodes that could be run only in a narrower dtype than that.
    """

    __slots__ = ("dtype", "narrowed")

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.narrowed: list[Node] = []

    def of(self, dtype: str) -> torch.dtype:
        """The torch dtype in which a value of IR dtype `dtype` is held (KeyError for strings)."""
        from planish.ir.types import is_float, torch_dtype

        if self.dtype is not None and is_float(dtype):
            return self.dtype
        return torch_dtype(HELD_AS.get(dtype, dtype))

    def hold(self, constant: Constant) -> Any:
        """A constant as the evaluation holds it: a tensor; strings are a numpy array of objects."""
        from planish.ir.types import is_float

        if constant.dtype == "str":
            return constant.array()
        if is_float(constant.dtype) and (self.dtype is not None or constant.dtype in HELD_AS):
            return constant.tensor(self.of(constant.dtype))
        return constant.tensor()


def repeats_by_channel(node: Node, port: Port, axes: Axes) -> str | None:
    """`OpDef.repeats` of an op that takes each channel by itself, or adds channels up with a factor for each."""
    return None


def _blocks(node: Node, act: Act, port: Port, axes: Axes) -> Relation:
    return Block(f"{node.op.name} has no rule for {act.value}")


def _no_channels(node: Node) -> Sequence[tuple[Port, Axes]]:
    return ()


@dataclass(frozen=True, eq=False)
class OpDef:
    """A row of the op table.

    Attributes:
        name: the canonical name; a name with `::` is an opaque op of another dialect.
        params: the operands.
        infer: result types from the operands' types and the attributes.
        evaluate: `(node, operands, wide) -> results`, torch tensors; an absent operand is None.
        relate: see the module docstring.
        channels: the (port, axes) at which constants of this node could take a transform up: where the
            search for channel spaces starts.
        fold: for each `Fold`: `(node, act, port, axes, t) -> {operand: array}`: the new constants (float64)
            for the shift t, an array of the shape of the flattened axes.
        pure: False for ops with side effects or randomness.
        family: the file of the row, for the documentation.
        summary: the equation, for the documentation.
        conservative: the absent (act, port role) moves for which the algebra would allow more, with why.
        attributes: attribute names and defaults.
        repeats: `(node, port, axes) -> why not`: where it says None, what the row says of a permutation holds for any
            choice of channels, one taken several times included; its SPLIT follows from that
            (`planish.ir.ops.splitting`). Absent: the op blocks SPLIT.
        beyond: the acts for which `relate` looks at more than the types of the ports, the attributes, the data
            of integer constants and of constants of at most 16 elements, and which operands are one value.
    """

    name: str
    params: tuple[Param, ...]
    infer: Callable[[Node], Sequence[Type]]
    evaluate: Callable[[Node, Sequence[Any], Wide], Sequence[Any]]
    relate: Callable[[Node, Act, Port, Axes], Relation] = _blocks
    channels: Callable[[Node], Sequence[tuple[Port, Axes]]] = _no_channels
    fold: Callable[[Node, Act, Port, Axes, np.ndarray], Mapping[int, np.ndarray]] | None = None
    pure: bool = True
    family: str = ""
    summary: str = ""
    conservative: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    beyond: frozenset[Act] = frozenset()
    repeats: Callable[[Node, Port, Axes], str | None] | None = None

    @property
    def short(self) -> str:
        """The name without its dialect: a hint for value names."""
        return self.name.rsplit("::", 1)[-1].lower()

    @property
    def opaque(self) -> bool:
        """True for an op of another dialect, about which nothing is known."""
        return "::" in self.name

    def __repr__(self) -> str:
        return f"OpDef({self.name})"


def normal_axis(axis: int, rank: int) -> int:
    """A non-negative axis."""
    return axis + rank if axis < 0 else axis


def static_size(value: Value, axes: Axes) -> int | None:
    """The number of atoms on `axes`, None if a dim is not static."""
    shape = value.shape
    if shape is None:
        return None
    n = 1
    for axis in axes:
        dim = shape[axis]
        if not isinstance(dim, int):
            return None
        n *= dim
    return n
