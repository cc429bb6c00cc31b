"""Layer norms become RMS norms where constants alone write what they read, or the pass says what is in the way."""

from __future__ import annotations

import decoder_blocks
import numpy as np
import pytest
from decoder_blocks import WIDTH
from encoder_blocks import post_norm, pre_norm, statistics
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import Build, counts, golden, reasons, run

from planish.ir.errors import ValidationError
from planish.ir.graph import Graph, Value
from planish.passes import center_layer_norm
from planish.passes.base import ROTATED
from planish.passes.manager import Pipeline

PIPELINE = "center-layer-norm"


def norms(graph: Graph) -> tuple[int, int]:
    """(layer norms, RMS norms)."""
    found = counts(graph)
    return found.get("layer_norm", 0), found.get("rms_norm", 0)


def centred(value: Value, axis: int) -> bool:
    data = value.constant.wide()
    return bool(np.abs(data.mean(axis)).max() < 1e-12 * np.abs(data).max())


def test_decoder_with_positions():
    graph = decoder_blocks.layer_norm_decoder()
    after, report = run(graph, PIPELINE)
    assert norms(after) == (0, 5)
    assert len(report.applied) == 5
    assert report.notes == ["%embedding: 10 constants centred"]
    for name, axis in (("table", 1), ("positions", 1), ("layers.0.o.weight", 0), ("layers.1.down.bias", 0)):
        assert centred(after.values[name], axis)
        assert not centred(graph.values[name], axis)
    assert (after.values["head"].constant.wide() == graph.values["head"].constant.wide()).all()
    assert [n.result.name for n in after.nodes] == [n.result.name for n in graph.nodes]


def test_vision():
    """The patch convolution, the class token and the positions are writers; a gather of the class token is none."""
    after, report = run(decoder_blocks.vision(), PIPELINE)
    assert norms(after) == (0, 3)
    assert report.notes == ["%conv: 8 constants centred"]
    for name, axis in (("patch", 0), ("class", 2), ("positions", 1)):
        assert centred(after.values[name], axis)


def test_attributes_and_names_stay():
    b = Build()
    x = b("linear", b.input("x", "f32[b, 5]"), b.random(6, 5))
    normed = b("layer_norm", x, b.random(6, name="gain"), b.random(6, name="bias"), eps=1e-3)
    after, _ = run(b.output(b("tanh", normed)), PIPELINE)
    (node,) = [n for n in after.nodes if n.op.name == "rms_norm"]
    assert node.attributes == {"axis": -1, "eps": 1e-3}
    assert [v.name for v in node.operands[1:]] == ["gain", "bias"]
    assert node.result.name == normed.name


def test_golden(update_golden):
    b = Build()
    x = b(
        "linear",
        b.input("x", "f32[b, 2]"),
        b.constant([[1.0, 2], [3, 4]], name="weight"),
        b.constant([5.0, 1], name="b"),
    )
    before = b.output(b("layer_norm", x, b.constant([2.0, 3], name="gain"), eps=1e-6))
    after, _ = run(before, PIPELINE)
    golden("center-layer-norm", before, after, update_golden)


# -- refusals ----------------------------------------------------------------------------------------


def test_post_norm():
    """Only the first norm, which reads weights alone, can be centred: the others read what a norm wrote."""
    after, report = run(post_norm(), PIPELINE)
    assert norms(after) == (2, 1)
    assert report.applied == ["layer_norm %layer_norm"]
    assert reasons(report) == ["a norm writes the stream, and its gain stands before the mean"]
    assert [p.split()[0] for p in report.declined[reasons(report)[0]]] == ["layer_norm", "layer_norm"]


def test_rms_norms_are_left_alone():
    graph = decoder_blocks.decoder()
    after, report = run(graph, PIPELINE)
    assert after == graph
    assert report.misses == ["no layer_norm: 5 RMS norms subtract no mean and are left alone"]
    assert not report.declined


def declined(graph: Graph) -> dict[str, list[str]]:
    after, report = run(graph, PIPELINE)
    assert after == graph
    return report.declined


def test_a_linear_straight_from_the_stream():
    reason = "it reads the stream without a norm that takes the mean off"
    assert set(declined(pre_norm())) == {reason}
    assert declined(pre_norm())[reason][0].startswith("linear")


def stream(b: Build) -> tuple[Value, Value]:
    """(the stream, a norm of it)."""
    x = b("linear", b.input("x", "f32[b, 5]"), b.random(6, 5), b.random(6))
    return x, b("layer_norm", x, b.random(6), b.random(6))


def test_a_graph_output():
    b = Build()
    x, y = stream(b)
    assert declined(b.output(y, x)) == {"graph output: its mean may be wanted there": [f"linear %{x.name}"]}


def test_a_graph_input():
    b = Build()
    x = b.input("x", "f32[b, 6]")
    y = b("layer_norm", x, b.random(6), b.random(6))
    more = b("layer_norm", b("add", x, b("linear", y, b.random(6, 6))), b.random(6))
    assert declined(b.output(more)) == {
        "its input is no result of the graph, whose mean could be taken off": ["layer_norm %layer_norm"],
        "graph input: its mean may be wanted there": ["%x"],
    }


def test_a_reader_that_bends():
    b = Build()
    x, y = stream(b)
    assert declined(b.output(y, b("tanh", x))) == {"it bends each channel by itself": ["tanh %tanh"]}


def test_a_root_mean_square_sees_the_mean():
    b = Build()
    x, y = stream(b)
    graph = b.output(b("tanh", y), b("tanh", b("rms_norm", x)))
    assert declined(graph) == {"only rotations keep the root mean square": ["rms_norm %rms_norm"]}


def test_a_product_of_two_streams():
    """Scores between rows of the stream: a rotation passes, taking the mean off does not."""
    b = Build()
    x, y = stream(b)
    scores = b("matmul", x, b("transpose", x, perm=(1, 0)))
    assert list(declined(b.output(y, scores))) == ["it reads the stream without a norm that takes the mean off"]


def test_several_axes():
    b = Build()
    x = b("linear", b.input("x", "f32[b, 3, 5]"), b.random(6, 5))
    graph = b.output(b("layer_norm", x, b.random(3, 6), axis=-2))
    assert declined(graph) == {"it normalises over several axes": ["layer_norm %layer_norm"]}


def test_part_of_a_norm():
    """The norm reads two spaces side by side."""
    b = Build()
    x = b.input("x", "f32[b, 5]")
    both = b("concat", b("linear", x, b.random(4, 5)), b("tanh", b("linear", x, b.random(3, 5))), axis=-1)
    assert len(declined(b.output(b("layer_norm", both)))) == 1


# -- tied heads --------------------------------------------------------------------------------------


def test_a_tied_head():
    graph = decoder_blocks.layer_norm_decoder(tied=True)
    reason = "the tied %table writes the stream and reads from it: untie=true copies it"
    assert set(declined(graph)) == {reason}
    after, report = Pipeline("center-layer-norm{untie=true}").run(graph)
    assert norms(after) == (0, 5)
    assert report.passes[0].error is not None
    assert report.passes[0].notes[0] == f"%table untied for %linear_42: a copy of {40 * WIDTH * 4} bytes"
    before = graph.values["table"].constant.wide()
    assert (after.values["table.untied"].constant.wide() == before).all()
    assert centred(after.values["table"], 1)


def test_nothing_is_untied_in_vain():
    b = Build()
    table = b.random(20, 6, name="table")
    x = b("embedding", table, b.input("ids", "i64[b, s]"))
    graph = b.output(b("linear", b("layer_norm", x), table), b("tanh", x))
    after, report = Pipeline("center-layer-norm{untie=true}").run(graph)
    assert after == graph
    assert not report.passes[0].notes


# -- statistics, teeth -------------------------------------------------------------------------------


def test_statistics_follow():
    b = Build()
    x = b("linear", b.input("x", "f32[b, t, 8]"), b.random(8, 8), b.constant(np.full(8, 100.0)))
    graph = b.output(b("linear", b("layer_norm", x), b.random(3, 8)))
    stats = statistics(graph)
    seen = {}

    class Look(center_layer_norm.CenterLayerNorm):
        def run(self, graph, context):
            report = super().run(graph, context)
            seen["mean"] = np.abs(context.stats.of(x.name).samples.mean(1)).max()
            seen["meta"] = dict(graph.meta)
            return report

    assert np.abs(stats.of(x.name).samples.mean(1)).min() > 90
    Pipeline([Look()]).run(graph, stats=stats)
    assert seen["mean"] < 1e-3
    assert ROTATED not in seen["meta"]  # no norm counts as rotated


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 12), layers=st.integers(1, 3), bias=st.booleans(), seed=st.integers(0, 99))
def test_random_streams(n, layers, bias, seed):
    b = Build(seed)
    x = b("linear", b.input("x", "f32[b, 3]"), b.random(n, 3), b.random(n) if bias else None)
    for _ in range(layers):
        hidden = b("tanh", b("linear", b("layer_norm", x, b.random(n), b.random(n)), b.random(5, n)))
        x = b("add", x, b("linear", hidden, b.random(n, 5), b.random(n) if bias else None))
    after, report = run(b.output(b("layer_norm", x)), PIPELINE)
    assert norms(after) == (0, layers + 1)
    assert len(report.applied) == layers + 1


@pytest.mark.parametrize("what", ["scaled", "one writer left out"])
def test_the_validator_rejects_a_wrong_centring(monkeypatch, what):
    if what == "scaled":
        true = center_layer_norm.centring

        def centring(size):
            made = true(size)
            index, matrix = made.blocks[0]
            return type(made)([(index, matrix + 0.001 / size)], size, orthogonal=False)

        monkeypatch.setattr(center_layer_norm, "centring", centring)
    else:
        absorb = center_layer_norm.absorb

        def partly(rewriter, space, transform):
            space.constants = space.constants[1:]
            return absorb(rewriter, space, transform)

        monkeypatch.setattr(center_layer_norm, "absorb", partly)
    with pytest.raises(ValidationError, match="pass 'center-layer-norm': changed the function"):
        Pipeline(PIPELINE).run(decoder_blocks.layer_norm_decoder(layers=1))
