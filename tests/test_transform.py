"""Transforms on axes: every kind against a matrix, on any axis, with repeated and foreign atoms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.ir.ops.base import ACTS, MIXING, Act
from planish.ir.transform import Mix, Permute, Scale, Shift, Transform, apply, copies, random_transform

KEEP_SIZE = [a for a in ACTS if a is not Act.SPLIT]  # a split: tests/test_split_act.py

SIZE = 6
LABELS = np.array([0, 1, 0, 2, 1, 0])


def matrix(transform: Transform) -> np.ndarray:
    """The matrix of a linear transform, by its definition."""
    n = transform.size
    match transform:
        case Scale(factors):
            return np.diag(factors)
        case Permute(order):
            return np.eye(n)[order]
        case Mix():
            whole = np.eye(n)
            for index, block in transform.blocks:
                whole[np.ix_(index, index)] = block
            return whole
    raise AssertionError("a shift has no matrix")


@pytest.mark.parametrize("act", [a for a in KEEP_SIZE if a is not Act.SHIFT])
def test_the_last_axis_is_multiplied_by_the_matrix(act: Act, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4, SIZE))
    for labels in (None, LABELS):
        transform = random_transform(act, SIZE, rng, labels=labels, positive=False)
        m = matrix(transform)
        assert np.allclose(apply(x, (1,), transform), x @ m.T, rtol=1e-12, atol=1e-12)
        inverse_transpose = np.linalg.inv(m).T
        assert np.allclose(apply(x, (1,), transform, variance=-1), x @ inverse_transpose.T, rtol=1e-9, atol=1e-9)


def test_a_shift_is_added_or_taken_away() -> None:
    x, t = np.ones((2, 3)), np.array([1.0, 2.0, -3.0])
    assert (apply(x, (1,), Shift(t)) == 1.0 + t).all()
    assert (apply(x, (1,), Shift(t), variance=-1) == 1.0 - t).all()


@pytest.mark.parametrize("act", KEEP_SIZE)
def test_inverse(act: Act, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, SIZE, 2))
    transform = random_transform(act, SIZE, rng, labels=LABELS)
    assert transform.act is act
    assert transform.size == transform.inverse().size == SIZE
    assert transform.inverse().act is act
    there = apply(x, (1,), transform)
    stays = isinstance(transform, Permute) and bool((transform.order == np.arange(SIZE)).all())
    assert np.allclose(there, x) == stays  # a permutation within small blocks may be drawn as the identity
    assert np.allclose(apply(there, (1,), transform.inverse()), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("act", KEEP_SIZE)
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_any_axes(act: Act, axes: tuple[int, ...], seed: int) -> None:
    """Axes in the middle, and several read as one in C order."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 4, 3))
    size = int(np.prod([x.shape[a] for a in axes]))
    transform = random_transform(act, size, rng)
    before = x.copy()
    got = apply(x, axes, transform)
    assert got.shape == x.shape
    assert (x == before).all()  # the operand is not changed
    moved = np.moveaxis(x, axes, range(3 - len(axes), 3))
    expected = apply(moved.reshape(-1, size), (1,), transform).reshape(moved.shape)
    assert np.allclose(np.moveaxis(got, axes, range(3 - len(axes), 3)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variance", [1, -1])
@pytest.mark.parametrize("act", KEEP_SIZE)
def test_atoms_of_other_spaces_stay_and_copies_move_alike(act: Act, variance: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    atoms = np.array([2, -1, 0, 1, 2, 0, -1, 1])  # three channels, two copies each, two foreign positions
    x = rng.normal(size=(4, len(atoms)))
    transform = random_transform(act, 3, rng)
    got = apply(x, (1,), transform, atoms, variance)
    assert (got[:, atoms < 0] == x[:, atoms < 0]).all()
    for copy in range(2):
        where = copies(atoms, 3)[:, copy]
        expected = apply(x[:, where], (1,), transform, None, variance)
        assert np.allclose(got[:, where], expected, rtol=1e-12, atol=1e-12)


def test_copies() -> None:
    assert copies(np.array([1, 0, -1, 1, 0]), 2).tolist() == [[1, 4], [0, 3]]
    for atoms in ([0, 1, 1], [0, 0], [-1, -1, 0]):
        with pytest.raises(ValueError, match="channels with different numbers of atoms cannot be mixed"):
            copies(np.array(atoms), 2)


def test_scale_and_shift_need_no_equal_copies() -> None:
    """Only a mixing act asks that every channel is there as often as the others."""
    atoms = np.array([0, 1, 1, -1])
    x = np.ones((1, 4))
    assert apply(x, (1,), Scale(np.array([2.0, 3.0])), atoms).tolist() == [[2.0, 3.0, 3.0, 1.0]]
    assert apply(x, (1,), Shift(np.array([2.0, 3.0])), atoms, -1).tolist() == [[-1.0, -2.0, -2.0, 1.0]]
    with pytest.raises(ValueError, match="different numbers of atoms"):
        apply(x, (1,), Permute(np.array([1, 0])), atoms)


def test_a_permutation_keeps_the_dtype() -> None:
    index = np.array([3, 1, 2])
    got = apply(index, (0,), Permute(np.array([2, 0, 1])))
    assert got.dtype == index.dtype
    assert got.tolist() == [2, 3, 1]


@pytest.mark.parametrize("act", sorted(MIXING, key=lambda a: a.value))
def test_random_mixing_stays_within_its_labels(act: Act, seed: int) -> None:
    transform = random_transform(act, SIZE, np.random.default_rng(seed), labels=LABELS)
    m = matrix(transform)
    assert (m[LABELS[:, None] != LABELS[None, :]] == 0).all()
    if act is not Act.LINEAR:
        assert np.allclose(m @ m.T, np.eye(SIZE), atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_random_scales_have_the_sign_asked_for(seed: int, positive: bool) -> None:
    transform = random_transform(Act.SCALE, 64, np.random.default_rng(seed), positive=positive)
    assert isinstance(transform, Scale)
    assert (transform.factors != 0).all()
    assert bool((transform.factors > 0).all()) is positive


@given(st.integers(0, 1000), st.sampled_from([a for a in ACTS if a is not Act.SHIFT]))
def test_both_sides_of_a_contraction_cancel(seed: int, act: Act) -> None:
    """(x T') (w T^-1)' = x w': what makes a transform on a weight's axis undo the one on its operand."""
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(3, SIZE)), rng.normal(size=(4, SIZE))
    transform = random_transform(act, SIZE, rng, positive=False)
    got = apply(x, (1,), transform) @ apply(w, (1,), transform, variance=-1).T
    assert np.allclose(got, x @ w.T, rtol=1e-9, atol=1e-9)
