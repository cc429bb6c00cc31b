"""What a smoothing tool does to the layers of a model, and whether that is an identity.

A tool divides the output of a smooth layer by s, by dividing its gain or its rows and its bias, and
multiplies the columns of its balance layers' weights by s. `touched` says which constants that
changes, `judge` whether some scale of the channel spaces does just that, `apply_mapping` does it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Graph, Node, Value
from planish.ir.ops.base import Act
from planish.ir.rewriter import Rewriter
from planish.ir.spaces import ChannelSpaces, Member, Space
from planish.report.labels import label

NORMS = frozenset({"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"})
LINEARS = frozenset({"linear", "gemm", "matmul", "conv"})
_PARAMETERS = frozenset({"weight", "bias", "gain", "gamma", "beta", "kernel"})


# -- layers --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Layer:
    """A module of the model that the graph came from: the nodes that bear its name."""

    name: str
    nodes: list[Node]

    @property
    def main(self) -> Node:
        """The norm or linear of the layer; else its first node."""
        for node in self.nodes:
            if node.op.name in NORMS or node.op.name in LINEARS:
                return node
        return self.nodes[0]


def layers(graph: Graph) -> dict[str, Layer]:
    """The layers with constants of their own, by module path, in the order of the graph.

    The path comes from the names of a node's constants (`a.b.query.weight`), else from its own name
    (`/a/b/query/MatMul`).
    """
    found: dict[str, Layer] = {}
    for node in graph.nodes:
        weights = [v for v in node.operands[1:] if v is not None and v.is_constant]
        if not (weights and node.op.name in NORMS | LINEARS | {"add", "mul"}):
            continue
        if node.op.name in ("add", "mul") and not any(len(v.shape or ()) == 1 for v in weights):
            continue
        for name in _module_names(node):
            layer = found.setdefault(name, Layer(name, []))
            layer.nodes.append(node)
    return {
        name: layer for name, layer in found.items() if layer.main.op.name in NORMS or layer.main.op.name in LINEARS
    }


def _module_names(node: Node) -> list[str]:
    names = []
    for value in node.operands[1:]:
        if value is not None and value.is_constant:
            stem, dot, last = value.name.rpartition(".")
            if dot and last.lower() in _PARAMETERS:
                names.append(stem)
    if not names and node.source:
        parts = [p for p in node.source.split("/") if p]
        names.append(".".join(parts[:-1]) if len(parts) > 1 else node.source)
    return list(dict.fromkeys(n for n in names if n))


# -- what the tool does --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Touched:
    """A constant that the tool changes: on `axis`, position i is multiplied by s[i - first] ** exponent.

    With an `offset` c it is not w that is multiplied but w + c: w becomes (w + c) s - c.
    """

    value: Value
    axis: int
    exponent: int
    layer: str
    first: int = 0
    offset: float = 0.0


def _outputs_of(layer: Layer) -> list[tuple[Value, int]]:
    """The constants of a smooth layer and the axis of each that runs along its output."""
    found = []
    for node in layer.nodes:
        for index, value in enumerate(node.operands):
            if index and value is not None and value.is_constant and value.rank:
                axis = _output_axis(node, index, value)
                if axis is not None:
                    found.append((value, axis))
    return found


def _output_axis(node: Node, index: int, value: Value) -> int | None:
    rank = value.rank or 0
    match node.op.name:
        case "linear":
            return 0 if index == 2 or not node.attributes.get("transposed", False) else 1
        case "gemm":
            return rank - 1 if index == 2 or not node.attributes.get("trans_b", False) else 0
        case "matmul":
            return rank - 1
        case "conv":
            return 0
        case "batch_norm":
            return 0 if index in (1, 2) else None
        case name if name in NORMS:
            return rank - 1
        case "add" | "mul":
            return rank - 1
    return None


def _input_of(layer: Layer) -> tuple[Value, int] | None:
    """The weight of a balance layer and the axis of it that its input meets."""
    node = layer.main
    weight = node.operand(1)
    if node.op.name not in LINEARS or weight is None or not weight.is_constant or weight.rank is None:
        return None
    match node.op.name:
        case "linear":
            return weight, 0 if node.attributes.get("transposed", False) else 1
        case "gemm":
            return weight, 1 if node.attributes.get("trans_b", False) else 0
        case "matmul":
            return (weight, weight.rank - 2) if weight.rank > 1 else None
    return weight, 1


def _gain_offset(layer: Layer, value: Value) -> float:
    """c where the norm multiplies by value + c."""
    node = layer.main
    offset = node.attributes.get("gain_offset", 0.0) if node.op.name in NORMS and node.operand(1) is value else 0.0
    return float(offset) if isinstance(offset, int | float) else 0.0


def touched(smooth: Layer, balance: Iterable[Layer], converted: bool = False) -> tuple[list[Touched], int, str]:
    """What the tool changes, the number of factors s, and why it could not do so (empty if it could).

    Args:
        smooth: its output is divided.
        balance: their weights are multiplied.
        converted: the tool scales the gain w + c of a norm, not the weight w.
    """
    changes: list[Touched] = []
    size = 0
    for layer in balance:
        read = _input_of(layer)
        if read is None:
            return [], 0, f"{layer.name} is a {layer.main.op.name}: it has no weight to balance"
        value, axis = read
        width = value.constant.shape[axis] if value.constant is not None else 0
        if size and width != size:
            return [], 0, f"the balance layers read {size} and {width} channels"
        size = width
        changes.append(Touched(value, axis, 1, layer.name))
    outputs = _outputs_of(smooth)
    if not outputs:
        return [], 0, f"{smooth.name} has neither a gain nor a weight to divide"
    for value, axis in outputs:
        assert value.constant is not None
        width = value.constant.shape[axis]
        if width < size:
            return [], 0, f"{smooth.name} writes {width} channels and the balance layers read {size}"
        offset = _gain_offset(smooth, value) if converted else 0.0
        changes.append(Touched(value, axis, -1, smooth.name, width - size, offset))  # the last rows of a fused layer
    return changes, size, ""


# -- the analysis --------------------------------------------------------------------------------


class _Plan:
    """What the tool does to each constant: for every position of an axis, which s and to which power.

    s is taken as independent numbers, so that two changes are equal iff index and power are.
    """

    def __init__(self, changes: Sequence[Touched], size: int, smooth: str, known: Mapping[str, Layer]) -> None:
        self.smooth = smooth
        self.module = {node: layer.name for layer in known.values() for node in layer.nodes}
        self.owner: dict[Value, str] = {}
        self.tables: dict[Value, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
        self.covered: dict[tuple[Value, int], np.ndarray] = {}
        self.twice: list[str] = []
        self.converted = {change.value for change in changes if change.offset}
        for change in changes:
            assert change.value.constant is not None
            width = change.value.constant.shape[change.axis]
            by_axis = self.tables.setdefault(change.value, {})
            if by_axis:
                self.twice.append(f"{change.value.name} is changed twice: its readers share it")
            index = np.full(width, -1)
            index[change.first : change.first + size] = np.arange(size)
            by_axis[change.axis] = index, np.where(index >= 0, change.exponent, 0)
            self.owner[change.value] = change.layer
            self.covered[change.value, change.axis] = index < 0

    def at(self, member: Member) -> tuple[np.ndarray, np.ndarray]:
        """(index, power) at each atom of a constant of a space; marks what it covers."""
        dims = [_shape(member)[a] for a in member.axes]
        count = math.prod(dims)
        none = np.full(count, -1), np.zeros(count, np.int64)
        if member.value is None or member.view is not None or member.grow is not None:
            return none
        for axis, (index, power) in self.tables.get(member.value, {}).items():
            if axis in member.axes:
                own = np.indices(dims).reshape(len(dims), -1)[member.axes.index(axis)]
                self.covered[member.value, axis][own if member.atoms is None else own[member.atoms >= 0]] = True
                return index[own], power[own]
        return none

    def name(self, member: Member) -> str:
        if member.value is not None and member.value in self.owner:
            return self.owner[member.value]
        if member.node is not None:
            return self.module.get(member.node) or label(member.node)
        return "a constant" if member.value is None else f"%{member.value.name}"


def judge(
    spaces: ChannelSpaces,
    changes: Sequence[Touched],
    size: int,
    smooth: str,
    known: Mapping[str, Layer],
) -> list[str]:
    """Why the changes are no identity; empty if they are one. `known` are the layers, for their names.

    They are one if each admitted SCALE space has a scale that does to every position of every constant in
    it just what the tool does, and if every position that the tool changes lies in such a space.
    """
    plan = _Plan(changes, size, smooth, known)
    first: dict[str, None] = dict.fromkeys(plan.twice)
    later: dict[str, None] = {}
    for space in spaces.of(Act.SCALE):
        touched_here = [m for m in space.constants if m.value in plan.tables]
        if touched_here:
            writes = any(plan.name(m) == smooth for m in touched_here)
            (first if writes else later).update(dict.fromkeys(_judge_space(space, plan, writes)))
    reasons = list(dict.fromkeys([*first, *later]))
    for (value, _), done in plan.covered.items():
        if not done.all():
            reasons.append(f"a scale of its channels alone cannot be told apart at {plan.owner[value]}")
    return list(dict.fromkeys(reasons))


def _judge_space(space: Space, plan: _Plan, writes: bool) -> Iterator[str]:
    """Compare what the tool does to the constants of a space with what one scale of the space would do."""
    index = np.full(space.size, -1)
    power = np.zeros(space.size, np.int64)
    found = []
    for member in sorted(space.constants, key=lambda m: m.variance < 0):
        own_index, own_power = plan.at(member)
        channels = np.arange(len(own_index)) if member.atoms is None else member.atoms
        fresh = (channels >= 0) & (own_power != 0)
        fresh[fresh] &= power[channels[fresh]] == 0
        index[channels[fresh]] = own_index[fresh]
        power[channels[fresh]] = own_power[fresh] * member.variance
        found.append((member, channels, own_index, own_power))
    if not power.any():
        return
    if not writes:
        readers = list(dict.fromkeys(plan.name(m) for m, _, _, p in found if p.any()))
        writers = list(dict.fromkeys(plan.name(m) for m in space.producers))
        writers = writers or list(dict.fromkeys(_maker(m) for m in space.activations))[:1]
        source = f"what {' and '.join(writers)} write{'s' * (len(writers) == 1)}"
        yield f"{', '.join(readers)} read{'s' * (len(readers) == 1)} {source}, not what {plan.smooth} writes"
        return
    for blocker in space.blockers:
        if blocker.atoms is None or power[blocker.atoms[blocker.atoms >= 0]].any():
            where = f"the {blocker.reason}" if blocker.node is None else label(blocker.node)
            why = f": {blocker.reason}" if blocker.node is not None else f" %{blocker.value.name}"
            yield f"a scale cannot pass {where}{why}"
    for member, channels, own_index, own_power in found:
        inside = channels >= 0
        expected_power = np.where(inside, power[channels] * member.variance, 0)
        expected_index = np.where(expected_power != 0, index[channels], -1)
        given_index = np.where(inside & (own_power != 0), own_index, -1)
        given_power = np.where(inside, own_power, 0)
        name = plan.name(member)
        if (expected_power == given_power).all() and (expected_index == given_index).all():
            if member.offset and expected_power.any() and member.value not in plan.converted:
                yield (
                    f"{name}: its gain acts as weight + {member.offset:g}, "
                    "so that scaling the weight does not scale the gain"
                )
        elif not given_power.any():
            does = "reads" if member.variance < 0 else "writes"
            yield f"{name} {does} it too, and the mapping leaves it out"
        else:
            yield f"{name} carries other channels of it than the mapping scales"


def _maker(member: Member) -> str:
    assert member.value is not None
    producer = member.value.producer
    return label(producer) if producer is not None else f"input %{member.value.name}"


def _shape(member: Member) -> tuple[int, ...]:
    shape = member.grow or member.view
    if shape is not None:
        return shape
    assert member.value is not None
    assert member.value.constant is not None
    return member.value.constant.shape


# -- the numbers ---------------------------------------------------------------------------------


def apply_mapping(graph: Graph, changes: Sequence[Touched], factors: np.ndarray) -> Graph:
    """A copy of the graph with the constants changed as the tool changes them, and nothing else."""
    copy = graph.clone()
    with Rewriter(copy) as rewriter:
        for change in changes:
            value = copy.values[change.value.name]
            assert value.constant is not None
            data = value.constant.wide()
            full = np.ones(data.shape[change.axis])
            full[change.first : change.first + len(factors)] = factors**change.exponent
            shape = [1] * data.ndim
            shape[change.axis] = -1
            data = (data + change.offset) * full.reshape(shape) - change.offset
            rewriter.set_constant(value, Constant(data, value.constant.dtype, data.shape), readers="all")
    return copy
