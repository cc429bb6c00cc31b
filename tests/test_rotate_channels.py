"""Rotations of the residual stream, of values per head and of chains of linears, absorbed by weights."""

from __future__ import annotations

from dataclasses import replace

import decoder_blocks
import numpy as np
import pytest
import torch
from encoder_blocks import post_norm, pre_norm
from helpers import check_text, random_inputs, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import Build, golden

from planish.calibrate.collect import collect
from planish.ir.errors import PlanishError, ValidationError
from planish.ir.evaluator import Evaluator
from planish.ir.graph import Graph
from planish.ir.hadamard import Rotation
from planish.ir.stats import Stats
from planish.passes import rotate_channels
from planish.passes.base import PassReport
from planish.passes.manager import Pipeline, Report

TOLERANCE = 1e-12  # relative, in float64
FOLD = "fold-norm-gain{untie=true}"
NO_BLOCKS = "center-layer-norm{untie=true},fold-norm-gain{untie=true}"


def transformed(graph: Graph, pipeline: str, stats: Stats | None = None) -> tuple[Graph, Report]:
    """Run a pipeline; the function stays the same to 1e-12 on inputs of two seeds."""
    after, report = Pipeline(pipeline).run(graph, stats=stats)
    check_text(after)
    assert report.validated, report.unchecked
    for seed in (5, 6):
        inputs = random_inputs(graph, seed, {"batch": 2})
        want, got = (Evaluator(g, torch.float64).run(inputs) for g in (graph, after))
        for name in want:
            assert relative_error(got[name], want[name]) <= TOLERANCE
    return after, report


def rotated(graph: Graph, options: str = "", before: str = NO_BLOCKS, stats: Stats | None = None) -> PassReport:
    return transformed(graph, f"{before},rotate-channels{{{options}}}", stats)[1].passes[-1]


def kinds(report: PassReport) -> list[str]:
    """`residual 32`, `value 4 x 4`: the roles and blocks of what was rotated."""
    lines = [line.split(": ")[1] for line in report.applied]
    return sorted(line.replace(",", "").replace(" channels", "").replace(" blocks of", " x") for line in lines)


def calibrated(graph: Graph) -> Stats:
    rng = np.random.default_rng(1)
    samples = []
    for _ in range(12):
        one = {}
        for value in graph.inputs:
            dims = [d if isinstance(d, int) else 3 for d in value.shape or ()]
            whole = value.dtype == "i64"
            one[value.name] = rng.integers(0, 40, dims) if whole else rng.normal(size=dims).astype(np.float32)
        samples.append(one)
    return collect(graph, samples)


# -- where -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_decoder(offset):
    """The stream over both layers is one space; each kv head has a block of its own, shared by two query heads."""
    graph = decoder_blocks.decoder(offset=offset)
    report = rotated(graph)
    assert kinds(report) == ["residual 32", "value 4 x 4", "value 4 x 4"]
    assert report.applied[0] == "%embedding: residual, 32 channels: hadamard 32"
    rope = report.declined["it turns each pair of channels by an angle of its own"]
    assert all(place.startswith("rope") for place in rope)


def test_router_and_experts_are_readers_and_writers():
    graph = decoder_blocks.decoder(moe=True)
    after, report = transformed(graph, f"{NO_BLOCKS},rotate-channels{{space=residual}}")
    assert kinds(report.passes[-1]) == ["residual 32"]
    for name in ("layers.0.router.weight", "layers.1.shared.gate.weight", "layers.0.expert2.down.weight"):
        assert not np.allclose(after.values[name].constant.wide(), graph.values[name].constant.wide())


@pytest.mark.parametrize("tied", [False, True])
def test_layer_norm_decoder(tied):
    graph = decoder_blocks.layer_norm_decoder(tied=tied)
    after, report = transformed(graph, f"{NO_BLOCKS},rotate-channels")
    assert kinds(report.passes[-1]) == ["key 8 x 4", "key 8 x 4", "residual 32", "value 8 x 4", "value 8 x 4"]
    assert ("table.untied" in after.values) == tied
    assert not any(n.op.name == "layer_norm" for n in after.nodes)


def test_vision():
    assert kinds(rotated(decoder_blocks.vision())) == ["key 8 x 4", "residual 32", "value 8 x 4"]


def test_chains_of_linears():
    report = rotated(decoder_blocks.latent())
    assert kinds(report) == ["hidden 12", "hidden 24"]
    assert report.applied[1].endswith("hadamard 12 x 2")


def test_a_tied_table_stays_tied_where_no_gain_is_in_between():
    b = Build()
    table = b.random(20, 12, name="table")
    x = b("embedding", table, b.input("ids", "i64[b, s]"))
    x = b("add", x, b("linear", b("relu", b("linear", b("rms_norm", x), b.random(9, 12))), b.random(12, 9)))
    graph = b.output(b("linear", b("rms_norm", x), table))
    after, report = transformed(graph, "rotate-channels{untie=true}")
    assert not report.passes[0].notes
    assert report.passes[0].applied == ["%embedding: residual, 12 channels: hadamard 12; stays tied: %table"]
    assert (
        len({n.operands[i] for n in after.nodes for i, v in enumerate(n.operands) if v is after.values["table"]}) == 1
    )


@pytest.mark.parametrize(("space", "expected"), [("residual", ["residual 32"]), ("value", ["value 4 x 4"])])
def test_one_role_only(space, expected):
    assert kinds(rotated(decoder_blocks.decoder(layers=1), f"space={space}")) == expected


def test_roles_do_not_depend_on_names():
    graph = decoder_blocks.decoder(layers=1)
    for index, value in enumerate(list(graph.values.values())):
        if not value.is_input:
            del graph.values[value.name]
            value.name = f"t{index}"
            graph.values[value.name] = value
    assert kinds(rotated(graph, "space=residual")) == ["residual 32"]


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "reason", "place"),
    [
        (lambda: decoder_blocks.decoder(layers=1), "its gain differs between channels: fold it first", "rms_norm"),
        (lambda: pre_norm(), "it subtracts the mean over the channels: centre it first", "layer_norm"),
        (lambda: post_norm(), "it subtracts the mean over the channels: centre it first", "layer_norm"),
        (lambda: pre_norm(), "it bends each channel by itself", "gelu"),
        (lambda: pre_norm(), "graph output", "linear"),
        (lambda: pre_norm(), "graph input", "%x"),
    ],
)
def test_what_is_in_the_way(graph, reason, place):
    report = rotated(graph(), before="fold-constants")
    assert any(p.startswith(place) for p in report.declined[reason])


def test_nothing_of_the_kind():
    b = Build()
    graph = b.output(b("relu", b.input("x", "f32[b, 4]")))
    _, report = Pipeline("rotate-channels{space=value}").run(graph)
    assert report.passes[0].misses == ["no value space: 0 spaces, none of which can be mixed and is of that kind"]
    with pytest.raises(PlanishError, match="expected one of hadamard, random, klt, klt-hadamard; got 'klt-x'"):
        Pipeline("rotate-channels{kind=klt-x}")
    with pytest.raises(PlanishError, match="pass 'rotate-channels': needs calibration statistics"):
        Pipeline("rotate-channels{kind=klt}").run(graph)


# -- what --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hadamard", "random", "klt", "klt-hadamard"])
def test_kinds(kind):
    graph = decoder_blocks.decoder()
    report = rotated(graph, f"kind={kind}", stats=calibrated(graph))
    assert kinds(report) == ["residual 32", "value 4 x 4", "value 4 x 4"]
    assert report.applied[0].startswith(f"%embedding: residual, 32 channels: {kind}")


@pytest.mark.parametrize("kind", ["klt", "klt-hadamard"])
def test_energy_of_the_channels(kind):
    """klt-hadamard: tr(C) / n in every channel that a linear reads; klt: falling, the same in total."""
    b = Build()
    x = b("linear", b.input("x", "f32[n, 9]"), b.random(12, 9))
    graph = b.output(b("linear", x, b.random(5, 12)))
    stats = calibrated(graph)
    name = x.name
    before = stats.of(name).samples.astype(np.float64)
    after, report = Pipeline(f"rotate-channels{{kind={kind}}}").run(graph, stats=stats)
    assert report.passes[0].applied
    found = {}

    def measure(g, who):
        rows = [Evaluator(g, torch.float64).run({"x": s["x"]}, keep={name})[name] for s in inputs]
        found[who] = torch.cat([r.reshape(-1, 12) for r in rows]).numpy()

    rng = np.random.default_rng(1)
    inputs = [{"x": torch.from_numpy(rng.normal(size=(3, 9)).astype(np.float32))} for _ in range(12)]
    measure(after, "after")
    energy = (found["after"] ** 2).mean(0)
    total = (before**2).mean(0).sum()
    assert energy.sum() == pytest.approx(total, rel=1e-5)
    if kind == "klt-hadamard":
        assert np.allclose(energy, total / 12, rtol=1e-4)
    else:
        assert (np.diff(energy) <= 1e-5 * total).all()
        assert energy.max() > 1.5 * total / 12


def test_statistics_follow():
    graph = decoder_blocks.decoder(layers=1)
    stats = calibrated(graph)
    pipeline = Pipeline(f"{FOLD},rotate-channels{{kind=klt}},rotate-channels{{kind=klt-hadamard}}")
    _, report = pipeline.run(graph, stats=stats)
    assert kinds(report.passes[-1]) == ["residual 32", "value 4 x 4"]
    plain = decoder_blocks.layer_norm_decoder(layers=1)
    declined = rotated(plain, "kind=klt", stats=calibrated(plain))
    assert declined.declined["no linear that reads it has statistics"]


def test_blocks_and_orders_without_a_matrix():
    b = Build()
    graph = b.output(b("linear", b("linear", b.input("x", "f32[n, 3]"), b.random(92, 3)), b.random(2, 92)))
    said = {}
    for options in ("fallback=dct", "fallback=block", "block=4", "kind=random block=23"):
        _, report = transformed(graph, f"rotate-channels{{{options}}}")
        said[options] = report.passes[0].applied[0].removeprefix("%linear: hidden, ")
    assert said == {
        "fallback=dct": "92 channels: dct 23 x hadamard 4 (there is none of order 92)",
        "fallback=block": "92 channels: 23 blocks of hadamard 4 (there is none of order 92)",
        "block=4": "23 blocks of 4: hadamard 4",
        "kind=random block=23": "4 blocks of 23: random",
    }


def test_seeds():
    graph = decoder_blocks.latent()
    texts = []
    for pipeline, seed in (("seed=1", 0), ("seed=1", 9), ("seed=2", 0), ("", 0), ("", 9)):
        after, _ = Pipeline(f"rotate-channels{{{pipeline}}}").run(graph, seed=seed)
        texts.append(after.values["up.weight"].constant.wide().tobytes())
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4


def test_golden(update_golden):
    b = Build()
    h = b(
        "linear",
        b.input("x", "f32[b, 2]"),
        b.constant([[1.0, 2], [3, 4]], name="one"),
        b.constant([8.0, 0], name="bias"),
    )
    before = b.output(b("linear", h, b.constant([[1.0, 0], [0, 1], [1, 1]], name="two")))
    after, _ = transformed(before, "rotate-channels")
    golden("rotate-channels", before, after, update_golden)
    h2 = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    got = after.values["one"].constant.wide()
    signs = np.random.default_rng(0).choice([-1.0, 1.0], 2)
    assert np.allclose(got, (h2 * signs) @ np.array([[1.0, 2], [3, 4]]), rtol=1e-14)


@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(2, 40),
    hidden=st.integers(2, 40),
    seed=st.integers(0, 50),
    kind=st.sampled_from(["hadamard", "random"]),
)
def test_random_streams(n, hidden, seed, kind):
    b = Build(seed)
    x = b("linear", b.input("x", "f32[b, 3]"), b.random(n, 3), b.random(n))
    for _ in range(2):
        normed = b("rms_norm", x, eps=1e-6)
        x = b(
            "add", x, b("linear", b("tanh", b("linear", normed, b.random(hidden, n))), b.random(n, hidden), b.random(n))
        )
    graph = b.output(b("linear", x, b.random(2, n)))
    assert kinds(rotated(graph, f"kind={kind}", before="fold-constants")) == [f"residual {n}"]


# -- teeth -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["not orthogonal", "two matrices", "a reader left out"])
def test_the_validator_rejects_a_wrong_rotation(monkeypatch, what):
    true_choose, true_absorb = rotate_channels.choose_rotation, rotate_channels.absorb

    def choose(*args, **kwargs):
        transform = true_choose(*args, **kwargs)
        index, matrix = transform.blocks[0]
        return replace(transform, blocks=[(index, np.asarray(matrix) * 1.001), *transform.blocks[1:]])

    def absorb(rewriter, space, transform):
        if what == "a reader left out":
            space = replace(space, constants=space.constants[:-1])
            return true_absorb(rewriter, space, transform)
        half = replace(space, constants=space.producers), replace(space, constants=space.consumers, folds=[])
        other = true_choose(space.size, space.blocks, "random", np.random.default_rng(8))
        return true_absorb(rewriter, half[0], transform) + true_absorb(rewriter, half[1], other)

    if what == "not orthogonal":
        monkeypatch.setattr(rotate_channels, "choose_rotation", choose)
    else:
        monkeypatch.setattr(rotate_channels, "absorb", absorb)
    with pytest.raises(ValidationError, match="pass 'rotate-channels': changed the function"):
        Pipeline("rotate-channels").run(decoder_blocks.latent())


def test_the_matrix_is_not_built(monkeypatch):
    def built(self, dtype=None, copy=None):
        raise AssertionError("the dense matrix was asked for")

    monkeypatch.setattr(Rotation, "__array__", built)
    assert kinds(rotated(decoder_blocks.decoder(layers=1))) == ["residual 32", "value 4 x 4"]


# -- ties that are in the way ------------------------------------------------------------------------


def two_streams() -> Graph:
    """Two embeddings of one table; the first stream is given out, the second is not."""
    b = Build()
    table = b.random(20, 12, name="table")
    one, two = (b("embedding", table, b.input(name, "i64[b, s]")) for name in ("first", "second"))
    outer = b("add", one, b("linear", b("relu", b("linear", one, b.random(5, 12))), b.random(12, 5)))
    inner = b("add", two, b("linear", b("relu", b("linear", two, b.random(5, 12))), b.random(12, 5)))
    return b.output(outer, b("linear", b("rms_norm", inner), b.random(3, 12)))


def test_a_table_of_two_streams():
    graph = two_streams()
    _, report = transformed(graph, "rotate-channels")
    assert not report.passes[0].applied
    assert report.passes[0].declined["graph output"]
    after, report = transformed(graph, "rotate-channels{untie=true}")
    assert kinds(report.passes[0]) == ["residual 12"]
    assert report.passes[0].notes == ["%table untied for %embedding_1: a copy of 960 bytes"]
    assert (after.values["table"].constant.wide() == graph.values["table"].constant.wide()).all()


def test_nothing_is_untied_in_vain():
    b = Build()
    table = b.random(20, 12, name="table")
    streams = [b("embedding", table, b.input(name, "i64[b, s]")) for name in ("first", "second")]
    graph = b.output(*(b("tanh", x) for x in streams))
    after, report = Pipeline("rotate-channels{untie=true}").run(graph)
    assert after == graph
    assert not report.passes[0].notes
