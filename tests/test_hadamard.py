"""Hadamard matrices of every order that Sylvester and Paley reach, the fast transform, and the `hadamard` row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import Build, counts, reasons, run

from planish.ir import hadamard
from planish.ir.constant import Constant
from planish.ir.errors import InvalidModelError
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph
from planish.ir.transform import Mix, apply
from planish.passes.hadamard import (
    block_rotation,
    choose_rotation,
    cut,
    describe,
    hadamard_blocks,
    karhunen_loeve,
    largest_order,
    mixed,
    random_orthogonal,
)
from planish.passes.manager import Pipeline

WITHOUT = [92, 116, 156, 172, 184, 188, 232, 236]  # of the multiples of 4 up to 256 (methods/a.md, 8.2)
ORDERS = [n for n in range(1, 257) if hadamard.known(n)]
MODELS = {768: (12, 64), 4864: (76, 64), 5632: (44, 64, 2), 11008: (344, 32), 14336: (28, 64, 8), 18944: (148, 64, 2)}


def test_which_orders_are_reached():
    assert [n for n in range(4, 257, 4) if not hadamard.known(n)] == WITHOUT
    assert not any(hadamard.known(n) for n in range(-1, 257) if n % 4 and n not in (1, 2))


@pytest.mark.parametrize("n", ORDERS)
def test_rows_are_orthogonal_in_integers(n):
    h = hadamard.hadamard(n)
    assert h.dtype == np.int8
    assert h.shape == (n, n)
    assert set(np.unique(h)) <= {-1, 1}
    assert (h.astype(np.int64) @ h.astype(np.int64).T == n * np.eye(n, dtype=np.int64)).all()


@pytest.mark.parametrize("order", [344, 250 * 2 + 4, 1332])  # over GF(7^3), GF(503), GF(11^3)
def test_large_paley_orders(order):
    h = hadamard.dense(order).astype(np.int64)
    assert (h @ h.T == order * np.eye(order, dtype=np.int64)).all()


@pytest.mark.parametrize(("n", "found"), MODELS.items())
def test_sizes_of_models(n, found):
    assert hadamard.factors(n) == found
    x = np.random.default_rng(n).normal(size=(2, n))
    y = hadamard.apply(x, n)
    assert np.allclose(np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1), rtol=1e-13)
    assert np.abs(hadamard.apply(y, n, transpose=True) - x).max() < 1e-13


def test_prime_powers_have_as_many_squares_as_others():
    for q in (9, 25, 27, 49, 81, 121, 125, 343):
        chi = hadamard.character(q)
        assert (np.diag(chi) == 0).all()
        assert (chi.sum(1) == 0).all()
        assert ((chi if q % 4 == 1 else -chi) == chi.T).all()


def test_what_is_not_reached_is_an_error():
    with pytest.raises(ValueError, match="order 92: no Hadamard matrix by Sylvester's and Paley's constructions"):
        hadamard.factors(92)
    with pytest.raises(ValueError, match=r"GF\(6\): expected an odd prime power"):
        hadamard.character(6)
    assert hadamard.prime_power(1) is None


def test_symmetric_orders():
    assert hadamard.symmetric(64)
    assert not hadamard.symmetric(12)
    assert all((hadamard.hadamard(n) == hadamard.hadamard(n).T).all() for n in (2, 8, 28) if hadamard.symmetric(n))


@pytest.mark.parametrize("n", [1, 2, 12, 24, 128, 144, 344])
@pytest.mark.parametrize("transpose", [False, True])
def test_the_fast_transform_is_the_matrix(n, transpose):
    x = np.random.default_rng(0).normal(size=(3, 2, 2 * n))
    h = hadamard.hadamard(n) / np.sqrt(n)
    expected = np.einsum("abkn,nm->abkm", x.reshape(3, 2, 2, n), h if transpose else h.T).reshape(x.shape)
    assert np.allclose(hadamard.apply(x, n, transpose=transpose), expected, atol=1e-13)
    tensor = hadamard.apply(torch.from_numpy(x), n, transpose=transpose)
    assert np.allclose(tensor.numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("n", [4, 12, 64])
def test_a_rotation_stands_for_its_matrix(n):
    rng = np.random.default_rng(n)
    signs = rng.choice([-1.0, 1.0], n)
    rotation = hadamard.Rotation(n, signs)
    matrix = hadamard.hadamard(n) * signs / np.sqrt(n)
    x = rng.normal(size=(5, n))
    assert rotation.shape == (n, n)
    assert np.allclose(x @ rotation, x @ matrix, atol=1e-13)
    assert np.allclose(x @ rotation.T, x @ matrix.T, atol=1e-13)
    assert np.allclose(np.asarray(rotation), matrix, atol=1e-13)
    with pytest.raises(TypeError):
        rotation @ x  # numpy multiplies with it from the right only


# -- choosing ----------------------------------------------------------------------------------------


def dense(transform: Mix) -> np.ndarray:
    return mixed(np.eye(transform.size), transform)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 60), kind=st.sampled_from(["hadamard", "random", "klt", "klt-hadamard"]), seed=st.integers(0, 99)
)
@pytest.mark.parametrize("fallback", ["dct", "block"])
def test_every_choice_is_orthogonal(n, kind, seed, fallback):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3 * n, n)) * rng.uniform(0.1, 10, n)
    blocks = [np.arange(n)[::2], np.arange(n)[1::2]]
    transform = choose_rotation(n, blocks, kind, rng, fallback=fallback, moment=x.T @ x / len(x))
    q = dense(transform)
    assert np.abs(q @ q.T - np.eye(n)).max() < 1e-12
    assert (q[::2, 1::2] == 0).all()
    assert np.allclose(apply(np.eye(n), (1,), transform), q.T, atol=1e-13)


@pytest.mark.parametrize("n", [8, 12, 46, 92])
def test_klt_hadamard_gives_every_channel_the_same_energy(n):
    """diag(T C T') = tr(C) / n: the property of arXiv:2501.13484; dct-mixed orders only come near."""
    rng = np.random.default_rng(n)
    x = rng.normal(size=(500, n)) @ rng.normal(size=(n, n)) * rng.uniform(0.1, 30, n)
    c = x.T @ x / len(x)
    transform = choose_rotation(n, [np.arange(n)], "klt-hadamard", rng, moment=c)
    t = dense(transform)
    energy = np.diag(t @ c @ t.T)
    if hadamard.known(n):
        assert np.allclose(energy, np.trace(c) / n, rtol=1e-10)
    assert energy.max() / energy.mean() < np.diag(c).max() / np.diag(c).mean()
    basis = karhunen_loeve(c)
    uncorrelated = basis @ c @ basis.T
    assert np.abs(uncorrelated - np.diag(np.diag(uncorrelated))).max() < 1e-10 * np.trace(c)
    assert (np.diff(np.diag(uncorrelated)) <= 1e-9 * np.trace(c)).all()


def test_what_was_taken_is_said():
    assert describe(192, "dct") == "hadamard 12 x 16"
    assert describe(92, "dct") == "dct 23 x hadamard 4 (there is none of order 92)"
    assert describe(92, "block") == "23 blocks of hadamard 4 (there is none of order 92)"
    assert largest_order(92) == 4
    assert largest_order(2 * 116) == 8
    assert [len(i) for i, _ in hadamard_blocks(np.arange(92), np.random.default_rng(0), "block")] == [4] * 23


def test_cutting_blocks():
    assert [len(i) for i in cut([np.arange(12), np.arange(12, 18)], 4)] == [4, 4, 4, 6]
    assert [len(i) for i in cut([np.arange(12)], None)] == [12]


def test_random_matrices_are_haar_and_seeded():
    one, two = (random_orthogonal(6, np.random.default_rng(3)) for _ in range(2))
    assert (one == two).all()
    assert abs(np.mean([random_orthogonal(3, np.random.default_rng(s))[0, 0] for s in range(400)])) < 0.1


# -- the row -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("axis", "block"), [(-1, None), (1, 4), (0, None)])
def test_the_row_is_the_matrix(axis, block, transpose):
    b = Build()
    shape = [8, 8, 12] if axis != -1 else [2, 3, 12]
    n = shape[axis]
    signs = np.where(np.arange(n) % 3 == 0, -1.0, 1.0).astype(np.float32)
    y = b(
        "hadamard", b.input("x", f"f32{shape}"), axis=axis, block=block, transpose=transpose, signs=Constant.of(signs)
    )
    graph = b.output(y)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    got = evaluate(graph, {"x": x})[y.name].double().numpy()
    transform = block_rotation(n, block or n, signs.astype(np.float64), transpose=transpose)
    expected = apply(x.astype(np.float64), (axis % 3,), transform)
    assert np.abs(got - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("shape", "attributes", "message"),
    [
        ("f32[2, 92]", {}, "hadamard: there is no matrix of order 92"),
        ("f32[2, 12]", {"block": 8}, "hadamard: blocks of 8 do not divide 12 channels"),
        ("f32[2, 12]", {"axis": 2}, "hadamard: axis 2 of a tensor of rank 2"),
        ("f32[2, 12]", {"signs": Constant.of(np.ones(4, np.float32))}, "expected 12 signs, got shape"),
    ],
)
def test_what_the_row_refuses(shape, attributes, message):
    b = Build()
    with pytest.raises(InvalidModelError, match=message):
        b("hadamard", b.input("x", shape), **attributes)


# -- merging -----------------------------------------------------------------------------------------


def signs(b: Build, n: int) -> Constant:
    return Constant.of(b.rng.choice([-1.0, 1.0], n).astype(np.float32))


def pair(first: dict, second: dict, n: int = 12) -> Graph:
    """tanh(x) H H' with readers that bend, so that nothing but the pair can be folded."""
    b = Build()
    x = b("tanh", b.input("x", f"f32[b, {n}]"))
    return b.output(b("tanh", b("hadamard", b("hadamard", x, **first), **second)))


S = Constant.of(np.where(np.arange(12) % 5 < 2, -1.0, 1.0).astype(np.float32))


@pytest.mark.parametrize(
    ("first", "second", "n", "left"),
    [
        ({}, {"transpose": True}, 12, {}),
        ({"transpose": True}, {}, 12, {}),
        ({}, {}, 16, {}),  # Sylvester's are symmetric
        ({"transpose": True}, {"transpose": True}, 16, {}),
        ({"block": 4}, {"block": 4, "transpose": True}, 12, {}),
        ({"signs": S}, {"transpose": True, "signs": S}, 12, {}),
        ({"transpose": True, "signs": S}, {"signs": S}, 12, {}),
        ({"signs": S}, {"transpose": True}, 12, {"mul": 1}),
        ({"transpose": True, "signs": S}, {}, 12, {"hadamard": 2}),
        ({}, {}, 12, {"hadamard": 2}),
        ({"block": 4}, {"block": 12}, 12, {"hadamard": 2}),
    ],
)
def test_pairs(first, second, n, left):
    after, report = run(pair(first, second, n), "merge-hadamards")
    assert {k: v for k, v in counts(after).items() if k != "tanh"} == left
    assert bool(report.applied) == ("hadamard" not in left)


def test_a_transform_behind_weights_is_folded_into_them():
    b = Build()
    h = b("linear", b.input("x", "f32[b, 5]"), b.random(12, 5), b.random(12))
    graph = b.output(b("tanh", b("hadamard", h)))
    after, report = run(graph, "merge-hadamards")
    assert counts(after) == {"linear": 1, "tanh": 1}
    assert report.applied == ["hadamard %hadamard: folded into what writes it"]


def test_the_second_of_two_is_folded_into_its_readers():
    b = Build()
    x = b("tanh", b.input("x", "f32[b, 12]"))
    one = b("hadamard", x)
    two = b("hadamard", one, signs=signs(b, 12))
    graph = b.output(b("linear", two, b.random(4, 12)), b("linear", two, b.random(3, 12)))
    after, report = run(graph, "merge-hadamards")
    assert counts(after) == {"tanh": 1, "hadamard": 1, "linear": 2}
    assert report.applied == ["hadamard %hadamard_1: folded into what reads it"]


def test_a_transform_that_was_asked_for_stays():
    b = Build()
    x = b("hadamard", b("tanh", b.input("x", "f32[b, 12]")))
    graph = b.output(b("linear", x, b.random(4, 12)))
    after, report = run(graph, "merge-hadamards")
    assert after == graph
    assert not report.applied
    bare = Build()
    _, nothing = run(bare.output(bare("tanh", bare.input("x", "f32[b, 4]"))), "merge-hadamards")
    assert nothing.misses == ["no hadamard op"]
    assert reasons(nothing) == []
    assert str(Pipeline("merge-hadamards")) == "merge-hadamards"
