"""Where a channel space meets weights that will be quantised: what the choosing passes look at.

A *site* is a channel space with the linears (and convolutions) that read it, the statistics of what
they read, and their weights as matrices [N, n] over the space's channels. Where a product of two activations
reads it (queries with keys), the samples of the other side stand for the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planish.ir.graph import Node, Value
from planish.ir.qnodes import by_columns
from planish.ir.spaces import Member, Space
from planish.ir.stats import Stats
from planish.ir.transform import copies
from planish.passes.channels import channel_ranges, key_side, title

READERS = frozenset({"linear", "gemm", "conv"})
DENSE_LIMIT = 1 << 24  # elements of a grouped kernel written out as one matrix


@dataclass(frozen=True, eq=False)
class Site:
    """A channel space and what the linears in it read.

    Attributes:
        space: the space, n channels.
        member: the activation that the linears read.
        readers: the nodes.
        low, high: float64 [n], the extremes of the channels over the calibration data.
        samples: float32 [N, n].
        partner: float32 [M, n], the samples of what is contracted with it, if no weight reads it.
    """

    space: Space
    member: Member
    readers: list[Node]
    low: np.ndarray
    high: np.ndarray
    samples: np.ndarray
    partner: np.ndarray | None = None

    @property
    def name(self) -> str:
        """The value that is read; for a dual site what names its space."""
        if self.partner is not None:
            return title(self.space)
        assert self.member.value is not None
        return self.member.value.name

    @property
    def largest(self) -> np.ndarray:
        """max |x| of each channel, float64 [n]."""
        largest: np.ndarray = np.maximum(np.abs(self.low), np.abs(self.high))
        return largest

    def weights(self) -> list[np.ndarray]:
        """The weight of each reader as [outputs, n], float64."""
        if self.partner is not None:
            return [self.partner.astype(np.float64)]
        found = []
        for node in self.readers:
            matrix = weight_matrix(node) if node.attributes.get("groups", 1) == 1 else grouped_matrix(node)
            if self.member.atoms is not None:
                columns = np.full(self.space.size, -1)
                covered = np.flatnonzero(self.member.atoms >= 0)
                columns[self.member.atoms[covered]] = covered
                matrix = matrix[:, columns]
            found.append(matrix)
        return found


def weight_matrix(node: Node) -> np.ndarray:
    """The weight of a linear, gemm or convolution as [outputs, inputs] (kernels: [outputs * taps, inputs]), float64."""
    weight = node.operands[1]
    assert weight is not None and weight.constant is not None
    data = weight.constant.wide()
    if node.op.name == "conv":
        return np.moveaxis(data, 1, -1).reshape(-1, data.shape[1])
    return data.T if by_columns(node) else data


def grouped_matrix(node: Node) -> np.ndarray:
    """The kernel of a grouped convolution as [outputs * taps, inputs], float64, zero outside of the groups."""
    weight = node.operands[1]
    assert weight is not None and weight.constant is not None
    groups = int(node.attributes.get("groups", 1))  # type: ignore[arg-type]
    data = weight.constant.wide()  # [outputs, inputs / groups, *taps]
    blocks = np.moveaxis(data, 1, -1).reshape(groups, -1, data.shape[1])
    dense = np.zeros((groups, blocks.shape[1], groups, data.shape[1]))
    dense[np.arange(groups), :, np.arange(groups)] = blocks
    return dense.reshape(groups * blocks.shape[1], groups * data.shape[1])


def reads_by_group(node: Node, value: Value) -> bool:
    """True for a grouped convolution of `value` with a constant kernel that `grouped_matrix` can write out."""
    if node.op.name != "conv" or node.operands[0] is not value or node.attributes.get("groups", 1) == 1:
        return False
    weight = node.operand(1)
    if weight is None or weight.constant is None:
        return False
    return weight.constant.size * int(node.attributes["groups"]) <= DENSE_LIMIT  # type: ignore[arg-type]


def reads_by_weight(node: Node, value: Value) -> bool:
    """True for a linear, gemm or (ungrouped) convolution that multiplies `value` with a constant, not empty weight."""
    if node.op.name not in READERS or node.operands[0] is not value:
        return False
    weight = node.operand(1)
    if weight is None or not weight.is_constant or node.attributes.get("groups", 1) != 1:
        return False
    if weight.constant is None or not weight.constant.size:
        return False
    return not (node.op.name == "gemm" and node.attributes.get("trans_a", False))


def channel_axis(node: Node) -> int:
    """The axis of operand 0 that a reader contracts, negative."""
    value = node.operands[0]
    assert value is not None and value.rank is not None
    return 1 - value.rank if node.op.name == "conv" else -1


def site_of(space: Space, stats: Stats, *, grouped: bool = False) -> Site | None:
    """The site of a space: its activation that most linears read; None if none reads it or statistics are missing.

    Args:
        grouped: count grouped convolutions among the readers.
    """
    best: Site | None = None
    for member in space.activations:
        value = member.value
        assert value is not None and value.rank is not None
        if value.name not in stats or len(member.axes) != 1:
            continue
        users = dict.fromkeys(value.users)
        readers = [u for u in users if reads_by_weight(u, value) or (grouped and reads_by_group(u, value))]
        record = stats.of(value.name)
        readers = [r for r in readers if channel_axis(r) == record.axis == member.axes[0] - value.rank]
        if not readers or (best is not None and len(readers) <= len(best.readers)):
            continue
        if member.atoms is None:
            columns = np.arange(space.size)
        else:
            columns = np.full(space.size, -1)
            covered = np.flatnonzero(member.atoms >= 0)
            columns[member.atoms[covered]] = covered
            if (columns < 0).any() or len(covered) != space.size:
                continue
        best = Site(
            space, member, readers, record.minimum[columns], record.maximum[columns], record.samples[:, columns]
        )
    return best


def dual_site_of(space: Space, stats: Stats) -> Site | None:
    """The site of queries and keys: what carries the transform, and as its partner what carries the inverse.

    None where no product contracts two sides of the space, or statistics of one are missing.
    """
    key = key_side(space)
    if key is None:
        return None
    sides: dict[int, Member] = {}
    for member in space.activations:
        if channel_ranges(member, space.size, stats) is not None:
            sides[member.variance] = member  # the last: closest to the product
    if len(sides) < 2:
        return None
    own, other = (_by_channel(sides[variance], space.size, stats) for variance in (1, -1))
    extremes = channel_ranges(sides[1], space.size, stats)
    if own is None or other is None or extremes is None:
        return None
    readers = [node for node in key.users if node.operand(1) is key]
    return Site(space, sides[1], readers, *extremes, own, other)


def _by_channel(member: Member, size: int, stats: Stats) -> np.ndarray | None:
    """The samples of an activation by channel, float32 [N * copies, n]; None if channels have unlike many copies."""
    assert member.value is not None
    samples = stats.of(member.value.name).samples
    atoms = np.arange(samples.shape[1]) if member.atoms is None else member.atoms
    try:
        table = copies(atoms, size)
    except ValueError:
        return None
    return np.concatenate([samples[:, table[:, k]] for k in range(table.shape[1])])


def row_floor(low: float, high: float) -> float | None:
    """c for codes of [-c, max] where values reach at most a quarter as far below zero as above; else None.

    At least max / 64, however little lies below zero: the scale is c / zero with an integer zero >= 1, so that
    255 c is the most that a row can hold.
    """
    return max(-low, high / 64) if high > 0 and -low <= high / 4 else None
