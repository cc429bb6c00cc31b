"""Invertible maps on the spaces that admit them: given, chosen from statistics, or random and well conditioned."""

from __future__ import annotations

import decoder_blocks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import Build
from safetensors.numpy import save_file
from test_rotate_channels import calibrated, kinds, transformed

from planish.ir.errors import PlanishError, ValidationError
from planish.ir.graph import Graph
from planish.passes import channel_transforms as choose
from planish.passes import transform_channels
from planish.passes.hadamard import random_orthogonal
from planish.passes.manager import Pipeline


def moment(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * n, n)) @ rng.normal(size=(n, n)) * np.exp(rng.normal(0, 2, n))
    return x.T @ x / len(x)


# -- choosing ----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 5000))
def test_sizes_near_the_root(n):
    """It ends for every n, those that are 2 mod 4 included."""
    a, b = choose.kronecker_sizes(n)
    assert a * b == n
    assert a <= b
    assert not any(n % d == 0 for d in range(a + 1, int(np.sqrt(n)) + 1))


def test_sizes_of_models():
    assert [choose.kronecker_sizes(n) for n in (4096, 11008, 18944, 14, 13)] == [
        (64, 64),
        (86, 128),
        (128, 148),
        (2, 7),
        (1, 13),
    ]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 40),
    strength=st.floats(0, 1),
    condition=st.floats(1, 1000),
    seed=st.integers(0, 50),
    known=st.booleans(),
)
@pytest.mark.parametrize("function", [choose.kronecker, choose.invertible])
def test_the_condition_number_is_bounded(function, n, strength, condition, seed, known):
    made = function(n, moment(n, seed) if known else None, strength, condition, np.random.default_rng(seed))
    assert made.shape == (n, n)
    assert np.linalg.cond(made) <= condition * (1 + 1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_equal_energy(strength):
    x = np.random.default_rng(0).normal(size=(99, 16)) * np.linspace(0.1, 10, 16)
    c = x.T @ x
    made = choose.equalising(c, strength, 1e6, np.random.default_rng(0))
    energy = np.diag(made @ c @ made.T)
    assert np.allclose(energy, energy.mean(), rtol=1e-8)
    whitened = made @ c @ made.T / energy.mean()
    assert np.allclose(whitened, np.eye(16), atol=1e-6) == (strength == 1.0)


def test_a_kronecker_product_evens_out():
    c = np.diag(np.kron([1.0, 100.0], [1.0, 5.0, 25.0, 625.0]))
    made = choose.kronecker(8, c, 1.0, 1e6, np.random.default_rng(0))
    energy = np.diag(made @ c @ made.T)
    assert energy.max() / energy.min() < 1 + 1e-9


def test_zigzag():
    order = choose.zigzag(np.array([8.0, 7, 6, 5, 4, 3, 2, 1]), 2)
    assert [sorted(part.tolist()) for part in np.split(order, 2)] == [[0, 3, 4, 7], [1, 2, 5, 6]]
    rng = np.random.default_rng(0)
    size = np.exp(rng.normal(0, 2, 128))
    order = choose.zigzag(size, 8)
    assert sorted(order.tolist()) == list(range(128))
    before, after = (np.array([s.max() for s in np.split(x, 8)]) for x in (np.sort(size), size[order]))
    assert after.max() / np.median(after) < before.max() / np.median(before)


@pytest.mark.parametrize("known", [False, True])
def test_block_rotations(known):
    c = np.diag(np.where(np.arange(64) < 4, 1e4, 1.0))
    made = choose.block_rotations(64, 8, c if known else None, np.random.default_rng(0))
    assert np.allclose(made @ made.T, np.eye(64), atol=1e-13)
    energy = np.diag(made @ c @ made.T)
    assert (energy.max() / energy.mean() < 1.1) == known  # blocks alone leave the outliers in their block


# -- applying ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kronecker", "block", "invertible"])
@pytest.mark.parametrize("measured", [False, True])
def test_decoder(kind, measured):
    graph = decoder_blocks.decoder(layers=1)
    stats = calibrated(graph) if measured else None
    pipeline = f"fold-norm-gain,transform-channels{{kind={kind} block=8}}"
    report = transformed(graph, pipeline, stats)[1].passes[-1]
    assert kinds(report) == (["residual 32"] if kind == "block" else []) + ["value 4 x 4"]
    source = "from statistics" if measured else "without statistics: no permutation" if kind == "block" else "random"
    assert all(f", {source}, condition " in line for line in report.applied)
    if kind != "block":
        assert "rms_norm %rms_norm" in report.declined["only rotations keep the root mean square"]


def test_queries_against_keys_and_values():
    report = transformed(decoder_blocks.layer_norm_decoder(layers=1), "transform-channels{kind=invertible}")[1].passes[
        0
    ]
    assert kinds(report) == ["key 8 x 4", "value 8 x 4"]


def test_one_role_only():
    graph = decoder_blocks.layer_norm_decoder(layers=1)
    assert kinds(transformed(graph, "transform-channels{space=value}")[1].passes[0]) == ["value 8 x 4"]
    report = transformed(graph, "transform-channels{space=residual}")[1].passes[0]
    assert report.misses == ["no space of kind residual that a linear map could act on"]


def chain(n: int = 6) -> Graph:
    b = Build()
    h = b("linear", b.input("x", "f32[b, 3]"), b.random(n, 3), b.random(n))
    return b.output(b("linear", h, b.random(2, n)))


def test_given(tmp_path):
    path = tmp_path / "m.safetensors"
    m = random_orthogonal(6, np.random.default_rng(0)) * np.linspace(1, 3, 6)
    save_file({"linear": m}, path)
    graph = chain()
    after, report = transformed(graph, f"transform-channels{{kind=invertible matrices={path}}}")
    assert report.passes[0].applied == ["%linear: hidden, 6 channels: invertible, given, condition 3"]
    assert np.allclose(after.values["w"].constant.wide(), m @ graph.values["w"].constant.wide(), rtol=1e-12)


def test_given_factors(tmp_path):
    path = tmp_path / "m.safetensors"
    left, right = np.array([[2.0, 0], [1, 1]]), np.diag([1.0, 2, 3]) + 0.1
    save_file({"linear.left": left, "linear.right": right}, path)
    graph = chain()
    after, _ = transformed(graph, f"transform-channels{{matrices={path}}}")
    expected = np.kron(left, right) @ graph.values["w"].constant.wide()
    assert np.allclose(after.values["w"].constant.wide(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        ({"other": np.eye(6)}, "invertible", "the file has no matrix for it"),
        ({"linear": np.eye(5)}, "invertible", r"%linear: its matrices have shape [5, 5], its blocks (6, 6)"),
        ({"linear": np.diag([1.0, 1, 1, 1, 1, 0])}, "invertible", "the condition number of its matrix is inf"),
        (
            {"linear": np.diag([1.0, 1, 1, 1, 1, 200])},
            "invertible",
            "the condition number of its matrix is 200; expected at most 100",
        ),
        ({"linear": np.full((6, 6), np.nan)}, "invertible", "its matrix is not finite"),
        ({"linear": np.diag([1.0, 1, 1, 1, 1, 2])}, "block", "%linear: its matrix is not orthogonal to 1e-12"),
    ],
)
def test_what_is_given_is_checked(tmp_path, data, kind, reason):
    path = tmp_path / "m.safetensors"
    save_file(data, path)
    graph = chain()
    after, report = Pipeline(f"transform-channels{{kind={kind} matrices={path}}}").run(graph)
    assert after == graph
    assert any(r.startswith(reason) for r in report.passes[0].declined)


def test_files(tmp_path):
    with pytest.raises(PlanishError, match="no such file of matrices"):
        Pipeline(f"transform-channels{{matrices={tmp_path}/none}}").run(chain())
    (tmp_path / "bad").write_text("no tensors")
    with pytest.raises(PlanishError, match="not a file of matrices"):
        Pipeline(f"transform-channels{{matrices={tmp_path}/bad}}").run(chain())


def test_the_validator_rejects_a_wrong_map(monkeypatch):
    """Maps that are no rotations and are said to be: the inverse is not the transpose."""
    true = transform_channels.Mix
    monkeypatch.setattr(transform_channels, "Mix", lambda blocks, size, orthogonal: true(blocks, size, orthogonal=True))
    with pytest.raises(ValidationError, match="pass 'transform-channels': changed the function"):
        Pipeline("transform-channels{kind=invertible}").run(chain())
