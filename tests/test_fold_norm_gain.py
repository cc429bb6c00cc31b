"""Gains and biases of norms move into all readers, or the pass says which op is in the way."""

import numpy as np
import pytest
from patterns import Build, counts, golden, reasons, run

from planish.calibrate.collect import collect
from planish.ir.errors import PlanishError, ValidationError
from planish.ir.graph import Graph, Value
from planish.ir.stats import Stats
from planish.passes import fold_norm_gain
from planish.passes.base import PassReport
from planish.passes.manager import Pipeline
from planish.passes.residual_sinks import residual_sinks, warning

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
    assert reasons(report) == [
        "gain: the tied %table gives the norm's input the transform of its result: untie=true copies it"
    ]


def test_a_tied_head_is_untied_on_demand():
    b = Build()
    table = b.random(20, 6, name="table")
    x = b("embedding", table, b.input("ids", "i64[b, s]"))
    graph = b.output(b("linear", b("rms_norm", x, b.random(6, name="gain")), table))
    after, report = run(graph, "fold-norm-gain{untie=true}")
    assert report.applied == ["gain of rms_norm %rms_norm"]
    assert report.notes[0] == "%table untied for %linear: a copy of 480 bytes"
    old, gain = table.constant.wide(), graph.values["gain"].constant.wide()
    assert (after.values["table"].constant.wide() == old).all()
    assert np.allclose(after.values["table.untied"].constant.wide(), old * gain, rtol=1e-14)


def test_nothing_is_untied_in_vain():
    b = Build()
    table = b.random(20, 6, name="table")
    x = b("embedding", table, b.input("ids", "i64[b, s]"))
    normed = b("rms_norm", x, b.random(6, name="gain"))
    graph = b.output(b("linear", normed, table), b("tanh", normed))
    after, report = run(graph, "fold-norm-gain{untie=true}")
    assert after == graph
    assert not report.notes
    assert len(report.declined) == 1


# -- residual sinks: what a tiny gain hid (methods/b.md, 15.3) ---------------------------------------


def sink(gain: float, bias: float | None = None) -> Graph:
    """Channel 3 of the stream stays near 300, the others near 1; its gain is `gain`, theirs 1."""
    b = Build()
    x = b("linear", b.input("x", "f32[b, 8]"), b.random(16, 8), b.constant(300.0 * (np.arange(16) == 3)))
    gains = np.ones(16)
    gains[3] = gain
    vectors = [b.constant(gains, name="gain")] + ([] if bias is None else [b.constant(np.full(16, bias))])
    normed = b("layer_norm" if bias is not None else "rms_norm", x, *vectors)
    return b.output(b("linear", normed, b.random(5, 16)))


def folded(graph: Graph, stats: Stats | None, options: str = "") -> PassReport:
    _, report = Pipeline(f"fold-norm-gain{{{options}}}").run(graph, stats=stats)
    return report.passes[0]


def calibrated(graph: Graph) -> Stats:
    rng = np.random.default_rng(0)
    return collect(graph, [{"x": rng.normal(size=(16, 8)).astype(np.float32)} for _ in range(8)])


@pytest.mark.parametrize("bias", [None, 50.0])
def test_a_sink_is_measured(bias):
    graph = sink(0.004, bias)
    report = folded(graph, calibrated(graph), "bias=false")
    norm = next(n for n in graph.nodes if n.op.name in ("rms_norm", "layer_norm"))
    found = report.figures[norm.result.name]["sinks"]
    assert [(s["channel"], s["measured"]) for s in found] == [(3, True)]
    inputs = np.random.default_rng(0).normal(size=(128, 8))
    samples = inputs @ graph.values["w"].constant.wide().T + graph.values["c"].constant.wide()
    if bias is not None:
        samples -= samples.mean(1, keepdims=True)
    u = np.abs(samples / np.sqrt((samples**2).mean(1, keepdims=True))).max(0)
    assert found[0]["after"] == pytest.approx(u[3] / np.median(u), rel=1e-3)
    assert found[0]["before"] == pytest.approx(
        0.004 * u[3] / np.median(u * np.where(np.arange(16) == 3, 0.004, 1)), rel=1e-3
    )
    (note,) = report.notes
    assert note.startswith(
        f"folding the gain of {norm.op.name} %{norm.result.name} re-exposes what it hid: channel 3 (gain 0.004)"
    )


def test_a_sink_without_statistics():
    report = folded(sink(0.004), None)
    assert report.notes == [
        "folding the gain of rms_norm %rms_norm re-exposes what it hid (no statistics: from the gains alone): "
        "channel 3 (gain 0.004) grows 250 times against the median channel"
    ]


def test_no_sink():
    assert not folded(sink(0.5), None).notes
    assert not folded(sink(1.0), calibrated(sink(1.0))).notes  # large, and no gain hid it
    assert not folded(sink(0.004), None, "sink-factor=1000").notes


def test_a_small_gain_of_a_small_channel_hides_nothing():
    b = Build()
    weight, gains = b.rng.normal(size=(16, 8)), np.ones(16)
    weight[3] *= 0.004
    gains[3] = 0.004
    x = b("linear", b.input("x", "f32[b, 8]"), b.constant(weight))
    graph = b.output(b("linear", b("rms_norm", x, b.constant(gains)), b.random(5, 16)))
    assert not folded(graph, calibrated(graph)).notes
    assert len(folded(graph, None).notes) == 1  # which only statistics can tell


def test_many_sinks_are_counted():
    gains = np.ones(64)
    gains[:20] = 0.01
    found = residual_sinks(gains, None, 8.0)
    assert len(found) == 20
    assert warning("here", found).endswith("; and 12 more")
