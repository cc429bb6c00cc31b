"""Transforms on an axis, and their application to arrays.

A transform acts on the n channels of a space. A tensor meets the space on some of its axes, read as
one (flattened in C order); each position there (an *atom*) belongs to one channel, or to none (-1).
A channel may have several atoms in one tensor (repeated key/value heads): each copy is transformed
alike. `variance` -1 stands for the inverse transpose, which is what the other side of a contraction
carries (for a shift, which is no linear map, it stands for -t).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planish.ir.ops.base import Act


@dataclass(frozen=True, eq=False)
class Scale:
    """x -> s * x; `factors` has shape [n], no zeros."""

    factors: np.ndarray
    act = Act.SCALE

    @property
    def size(self) -> int:
        return len(self.factors)

    def inverse(self) -> Scale:
        return Scale(1.0 / self.factors)


@dataclass(frozen=True, eq=False)
class Shift:
    """x -> x + t; `offsets` has shape [n]."""

    offsets: np.ndarray
    act = Act.SHIFT

    @property
    def size(self) -> int:
        return len(self.offsets)

    def inverse(self) -> Shift:
        return Shift(-self.offsets)


@dataclass(frozen=True, eq=False)
class Permute:
    """x -> x[order]; `order` is a permutation of range(n)."""

    order: np.ndarray
    act = Act.PERMUTE

    @property
    def size(self) -> int:
        return len(self.order)

    def inverse(self) -> Permute:
        return Permute(np.argsort(self.order))


@dataclass(frozen=True, eq=False)
class Mix:
    """x -> M x with a block-diagonal M: `blocks` holds (channel indices [b], matrix [b, b]).

    Channels in no block stay. `orthogonal` says that every block is (its inverse transpose is itself).
    """

    blocks: Sequence[tuple[np.ndarray, np.ndarray]]
    size: int
    orthogonal: bool

    @property
    def act(self) -> Act:
        return Act.ROTATE if self.orthogonal else Act.LINEAR

    def inverse(self) -> Mix:
        inverted = [(i, m.T if self.orthogonal else np.linalg.inv(m)) for i, m in self.blocks]
        return Mix(inverted, self.size, self.orthogonal)


@dataclass(frozen=True, eq=False)
class Split:
    """x_j -> counts[j] channels x_j, beside each other; `counts` is int [n], at least 1.

    With variance -1 each is divided by counts[j]: what contracts a split axis then sees the same sum.
    """

    counts: np.ndarray
    act = Act.SPLIT

    @property
    def size(self) -> int:
        return len(self.counts)

    def inverse(self) -> Unsplit:
        return Unsplit(self.counts)

    def copies(self, atoms: np.ndarray | None, count: int) -> np.ndarray:
        """How many channels each of `count` positions becomes, int [count]."""
        full = np.ones(count, np.int64)
        covered = np.arange(count) if atoms is None else atoms
        full[covered >= 0] = self.counts[covered[covered >= 0]]
        return full


@dataclass(frozen=True, eq=False)
class Unsplit:
    """The first of each channel's copies: undoes `Split`, as an explicit op only."""

    counts: np.ndarray
    act = Act.SPLIT

    @property
    def size(self) -> int:
        return len(self.counts)

    def inverse(self) -> Split:
        return Split(self.counts)


Transform = Scale | Shift | Permute | Mix | Split


def copies(atoms: np.ndarray, size: int) -> np.ndarray:
    """The atoms of each channel: int array [size, copies], ascending along the copies.

    Raises:
        ValueError: the channels do not all have the same number of atoms.
    """
    positions = np.flatnonzero(atoms >= 0)
    order = positions[np.argsort(atoms[positions], kind="stable")]
    if (
        size == 0
        or len(order) % size
        or not (np.bincount(atoms[positions], minlength=size) == len(order) // size).all()
    ):
        raise ValueError("channels with different numbers of atoms cannot be mixed")
    return order.reshape(size, -1)


def apply(
    array: np.ndarray, axes: Sequence[int], transform: Transform, atoms: np.ndarray | None = None, variance: int = 1
) -> np.ndarray:
    """Apply a transform to `axes` of an array.

    Args:
        array: float64 (any dtype for a permutation), any rank.
        axes: ascending non-negative axes, flattened in C order.
        transform: acts on n channels.
        atoms: int [product of the axes' dims], the channel of each atom or -1; None: atom i is channel i.
        variance: +1, or -1 for the inverse transpose.

    Returns:
        A new array, of the same shape but for a split (of one axis).
    """
    axes = tuple(axes)
    last = tuple(range(array.ndim - len(axes), array.ndim))
    moved = np.moveaxis(array, axes, last)
    count = math.prod(array.shape[axis] for axis in axes)
    flat = moved.reshape(*moved.shape[: array.ndim - len(axes)], count)
    if atoms is None:
        atoms = np.arange(count)
    covered = atoms >= 0
    match transform:
        case Scale(factors):
            full = np.ones(count)
            full[covered] = factors[atoms[covered]]
            out = flat * full if variance > 0 else flat / full
        case Shift(offsets):
            full = np.zeros(count)
            full[covered] = offsets[atoms[covered]]
            out = flat + variance * full
        case Permute(order):
            table = copies(atoms, transform.size)
            source = np.arange(count)
            source[table] = table[order]
            out = flat[..., source]
        case Mix():
            table = copies(atoms, transform.size)
            out = np.array(flat)
            for index, matrix in transform.blocks:
                right = matrix.T if variance > 0 or transform.orthogonal else np.linalg.inv(matrix)
                for copy in range(table.shape[1]):
                    where = table[index, copy]
                    if len(where) == count and (where == np.arange(count)).all():
                        out = flat @ right  # without two copies of a large weight
                    else:
                        out[..., where] = flat[..., where] @ right
        case Split():
            if len(axes) != 1:
                raise ValueError("channels on joint axes cannot be split")
            times = transform.copies(atoms, count)
            out = np.repeat(flat, times, axis=-1)
            out = out if variance > 0 else out / np.repeat(times, times)
            return np.moveaxis(out, -1, axes[0])
    return np.moveaxis(out.reshape(moved.shape), last, axes)


def random_transform(
    act: Act, size: int, rng: np.random.Generator, *, labels: np.ndarray | None = None, positive: bool = True
) -> Transform:
    """A random transform for tests and probes; MIXING acts stay within equal `labels` [size]."""
    groups = [np.arange(size)] if labels is None else [np.flatnonzero(labels == k) for k in np.unique(labels)]
    match act:
        case Act.SCALE:
            factors = np.exp(rng.normal(0.0, 0.7, size))
            return Scale(factors if positive else factors * rng.choice([-1.0, 1.0], size))
        case Act.SHIFT:
            return Shift(rng.normal(0.0, 1.0, size))
        case Act.PERMUTE:
            order = np.arange(size)
            for group in groups:
                order[group] = rng.permutation(group)
            return Permute(order)
        case Act.SPLIT:
            return Split(rng.integers(1, 4, size))
        case Act.ROTATE:
            blocks = [(g, np.linalg.qr(rng.normal(size=(len(g), len(g))))[0]) for g in groups]
            return Mix(blocks, size, orthogonal=True)
        case Act.LINEAR:
            blocks = []
            for group in groups:
                n = len(group)
                left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
                blocks.append((group, left @ np.diag(np.exp(rng.normal(0.0, 0.5, n))) @ right))
            return Mix(blocks, size, orthogonal=False)
