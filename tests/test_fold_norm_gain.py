"""Gains and biases of norms move into all readers, or the pass says which op is in the way."""

import numpy as np
import pytest
from patterns import Build, counts, golden, reasons, run

from planish.ir.errors import PlanishError, ValidationError
from planish.ir.graph import Graph, Value
from planish.passes import fold_norm_gain
from planish.passes.manager import Pipeline

PIPELINE = "fold-norm-gain"


def block(b: Build, norm: str = "layer_norm", gain: Value | None = None, **attributes) -> tuple[Value, Value]:
    """(the norm's result, the sum of two linears that read it): a pre-norm block."""
    x = b.input("x", "f32[b, s, 6]")
    normed = b(norm, x, gain or b.random(6, name="gain"), b.random(6, name="bias"), **attributes)
    one = b("linear", normed, b.random(4, 6), b.random(4))
    two = b("linear", normed, b.random(6, 4), transposed=True)
    return normed, b("mul", b("relu", one), two)


def operands(graph: Graph, op: str) -> list[np.ndarray]:
    (node,) = [n for n in graph.nodes if n.op.name == op]
    return [v.constant.wide() for v in node.operands[1:]]


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_into_all_linears(norm):
    b = Build()
    graph = b.output(block(b, norm)[1])
    after, report = run(graph, PIPELINE)
    gain, bias = operands(after, norm)
    assert (gain == 1.0).all()
    assert (bias == 0.0).all()
    assert len(report.applied) == 2
    assert counts(after) == counts(graph)
    weights = [n.operands[1].constant.wide() for n in after.nodes if n.op.name == "linear"]
    before = [n.operands[1].constant.wide() for n in graph.nodes if n.op.name == "linear"]
    g = graph.values["gain"].constant.wide()
    assert np.allclose(weights[0], before[0] * g, rtol=1e-14)
    assert np.allclose(weights[1], before[1] * g[:, None], rtol=1e-14)


def test_golden(update_golden):
    b = Build()
    normed = b("rms_norm", b.input("x", "f32[b, 3]"), b.constant([2.0, -4.0, 0.5], name="gain"), eps=1e-6)
    before = b.output(b("linear", normed, b.constant(np.ones((2, 3)), name="weight")))
    after, _ = run(before, PIPELINE)
    golden("fold-norm-gain", before, after, update_golden)


def test_a_gain_that_counts_from_one():
    b = Build()
    after, _ = run(b.output(block(b, "rms_norm", gain_offset=1.0)[1]), PIPELINE)
    assert (operands(after, "rms_norm")[0] == 0.0).all()


def test_bias_stays_on_demand():
    b = Build()
    graph = b.output(block(b)[1])
    after, report = run(graph, "fold-norm-gain{bias=false}")
    assert (operands(after, "layer_norm")[0] == 1.0).all()
    assert (operands(after, "layer_norm")[1] != 0.0).all()
    assert len(report.applied) == 1


def test_a_shared_norm_gain_is_folded_once():
    b = Build()
    gain = b.random(6, name="gain")
    ys = []
    for _ in range(2):
        normed = b("rms_norm", b.input(f"x{len(ys)}", "f32[b, 6]"), gain)
        ys.append(b("linear", normed, b.random(4, 6)))
    after, report = run(b.output(*ys), PIPELINE)
    assert (after.values["gain"].constant.wide() == 1.0).all()
    assert len(report.applied) == 1


def test_a_zero_gain_is_declined():
    b = Build()
    gain = b.constant([1.0, 2.0, 0.0, 1.0, 1.0, 1.0], name="gain")
    after, report = run(b.output(block(b, gain=gain)[1]), PIPELINE)
    assert reasons(report) == ["gain: it is zero at channel 2"]
    assert np.array_equal(operands(after, "layer_norm")[0], gain.constant.wide())
    assert (operands(after, "layer_norm")[1] == 0.0).all()


def test_a_reader_that_blocks():
    b = Build()
    normed, y = block(b)
    graph = b.output(y, b("tanh", normed))
    after, report = run(graph, PIPELINE)
    assert after == graph
    assert len(report.declined) == 2
    places = [p for ps in report.declined.values() for p in ps]
    assert all(p.startswith("tanh") for p in places)


def test_a_norm_that_is_an_output():
    b = Build()
    normed, y = block(b)
    graph = b.output(y, normed)
    after, report = run(graph, PIPELINE)
    assert after == graph
    assert sorted(reasons(report)) == ["bias: graph output", "gain: graph output"]


def test_a_residual_behind_the_norm():
    b = Build()
    normed, y = block(b)
    out = b("linear", y, b.random(6, 4), b.random(6))
    second = b("layer_norm", b("add", out, normed), b.random(6), b.random(6))
    graph = b.output(b("linear", second, b.random(4, 6)))
    after, report = run(graph, PIPELINE)
    assert "gain: it divides by the scale of its input" in reasons(report)
    gains = [n.operands[1].constant.wide() for n in after.nodes if n.op.name == "layer_norm"]
    assert not (gains[0] == 1.0).all()
    assert (gains[1] == 1.0).all()


def test_a_computed_gain():
    b = Build()
    normed = b("layer_norm", b.input("x", "f32[b, 6]"), b.input("gain", "f32[6]"))
    _, report = run(b.output(b("linear", normed, b.random(4, 6))), PIPELINE)
    assert reasons(report) == ["gain: it is no constant"]


def test_facts():
    assert "norm-gain-free" in fold_norm_gain.FoldNormGain.gives
    with pytest.raises(PlanishError, match="unknown option 'biass'"):
        Pipeline("fold-norm-gain{biass=true}")


@pytest.mark.parametrize("what", ["gain", "bias"])
def test_the_validator_rejects_a_wrong_fold(monkeypatch, what):
    true = fold_norm_gain._transforms

    def transforms(norm, port, spaces):
        made = true(norm, port, spaces)
        if port == 1 and what == "gain":
            return [type(t)(t.factors * 1.001) for t in made]
        if port == 2 and what == "bias":
            return [type(t)(t.offsets * 0.999) for t in made]
        return made

    monkeypatch.setattr(fold_norm_gain, "_transforms", transforms)
    b = Build()
    with pytest.raises(ValidationError, match="pass 'fold-norm-gain': changed the function"):
        Pipeline(PIPELINE).run(b.output(block(b)[1]))


def test_a_tied_embedding_and_head():
    b = Build()
    table = b.random(20, 6, name="table")
    x = b("embedding", table, b.input("ids", "i64[b, s]"))
    graph = b.output(b("linear", b("rms_norm", x, b.random(6, name="gain")), table))
    after, report = run(graph, PIPELINE)
    assert after == graph
    assert reasons(report) == ["gain: the tied %table gives the norm's input the transform of its result"]
