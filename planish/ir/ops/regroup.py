"""Which axes of a tensor are which axes of the same elements in another shape.

A reshape is cut into the smallest groups of axes that hold the same elements on both sides: `[B, T, 768]`
to `[B, T, 12, 64]` has the groups (0)-(0), (1)-(1), (2)-(2, 3). Groups are found from the left and from
the right, where products of dims, symbols included, are equal; what stays between is one group that
nothing is known of. Within a group of static dims the axes are cut into common factors: an axis is
carried to the axes that hold its factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from planish.ir.ops.align import Pairs, tie_pairs
from planish.ir.ops.base import Axes, Block
from planish.ir.shapes import exact_quotient, multiply
from planish.ir.types import Dim

DYNAMIC = Block("it mixes the axis with a dynamic one")
SHIFTS = Block("its new shape cuts across the channels")
UNIT = Block("the axis has size 1 and no place of its own")


@dataclass(frozen=True, slots=True)
class Group:
    """Axes of both sides that hold the same elements; not `known`: the rest that is not understood."""

    left: Axes
    right: Axes
    known: bool = True


def find_groups(left: Sequence[Dim], right: Sequence[Dim]) -> list[Group]:
    """The groups of two shapes of the same elements. Axes of size 1 are in no group."""
    ours = [axis for axis, dim in enumerate(left) if dim != 1]
    theirs = [axis for axis, dim in enumerate(right) if dim != 1]
    front = _scan(left, right, ours, theirs)
    for group in front:
        ours, theirs = ours[len(group.left) :], theirs[len(group.right) :]
    back = _scan(left, right, ours[::-1], theirs[::-1])
    for group in back:
        ours, theirs = ours[: len(ours) - len(group.left)], theirs[: len(theirs) - len(group.right)]
    rest = [Group(tuple(ours), tuple(theirs), known=False)] if ours or theirs else []
    return front + rest + back[::-1]


def _scan(left: Sequence[Dim], right: Sequence[Dim], ours: Sequence[int], theirs: Sequence[int]) -> list[Group]:
    """Groups from the start of two lists of axes, as far as they are understood."""
    groups: list[Group] = []
    i = j = 0
    while i < len(ours) and j < len(theirs):
        one, two = left[ours[i]], right[theirs[j]]
        begin_i, begin_j = i, j
        i, j = i + 1, j + 1
        while one is None or one != two:
            side = _shorter(one, two)
            if side < 0 and i < len(ours):
                one, i = multiply(one, left[ours[i]]), i + 1
            elif side > 0 and j < len(theirs):
                two, j = multiply(two, right[theirs[j]]), j + 1
            else:
                return groups
        groups.append(Group(tuple(sorted(ours[begin_i:i])), tuple(sorted(theirs[begin_j:j]))))
    return groups


def _shorter(one: Dim, two: Dim) -> int:
    """-1 if `one` has to grow to reach `two`, +1 if `two` has to, 0 if neither is known to."""
    if isinstance(one, int) and isinstance(two, int):
        return 0 if one == two else -1 if one < two else 1
    if exact_quotient(two, one) is not None:
        return -1
    return 1 if exact_quotient(one, two) is not None else 0


def carry_axes(
    groups: Sequence[Group], left: Sequence[Dim], right: Sequence[Dim], axes: Axes
) -> tuple[Axes, Pairs | None] | Block:
    """Where `axes` of the left shape lie in the right one.

    Returns:
        the axes of the right shape and the pairs (left atoms, right atoms), None for the identity. An
        axis that lies in a larger one is tied along the rest of it.
    """
    asked = [axis for axis in axes if left[axis] != 1]
    if not asked:
        return UNIT
    places: list[int] = []
    asked_dims: list[int] = []
    other_dims: list[int] = []
    for group in groups:
        mine = [axis for axis in group.left if axis in asked]
        if not mine:
            continue
        if not group.known:
            return DYNAMIC
        if len(group.left) == len(group.right) == 1:
            dim = left[mine[0]]
            assert isinstance(dim, int)
            places.append(group.right[0])
            asked_dims.append(dim)
            other_dims.append(dim)
            continue
        ours, theirs = [left[axis] for axis in group.left], [right[axis] for axis in group.right]
        factors = _factors(ours, theirs)
        if isinstance(factors, Block):
            return factors
        sizes, of_left, of_right = factors
        wanted = {f for axis, fs in zip(group.left, of_left, strict=True) if axis in mine for f in fs}
        for axis, fs in zip(group.right, of_right, strict=True):
            if wanted.intersection(fs):
                places.append(axis)
                asked_dims += [sizes[f] if f in wanted else 1 for f in fs]
                other_dims += [sizes[f] for f in fs]
    return tuple(places), tie_pairs(asked_dims, other_dims)


def _factors(ours: Sequence[Dim], theirs: Sequence[Dim]) -> tuple[list[int], list[list[int]], list[list[int]]] | Block:
    """The common factors of two lists of dims with one product: their sizes, and those of each dim."""
    left, right = [d for d in ours if isinstance(d, int)], [d for d in theirs if isinstance(d, int)]
    if len(left) < len(ours) or len(right) < len(theirs):
        return DYNAMIC
    left_cuts, right_cuts = _cuts(left), _cuts(right)
    cuts = sorted({*left_cuts, *right_cuts}, reverse=True)
    if any(big % small for big, small in pairwise(cuts)):
        return SHIFTS
    sizes = [big // small for big, small in pairwise(cuts)]

    def members(own: list[int]) -> list[list[int]]:
        return [[f for f, cut in enumerate(cuts[:-1]) if big >= cut > small] for big, small in pairwise(own)]

    return sizes, members(left_cuts), members(right_cuts)


def _cuts(dims: Sequence[int]) -> list[int]:
    """The number of elements from each axis on: `[6, 4]` gives 24, 4, 1."""
    cuts = [1]
    for dim in reversed(dims):
        cuts.append(cuts[-1] * dim)
    return cuts[::-1]
