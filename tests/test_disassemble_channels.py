"""disassemble-channels: exact, no op is added, and it happens only where constants on both sides take it."""

from __future__ import annotations

import numpy as np
import pytest
from decoder_blocks import TOKENS, VOCABULARY, decoder
from helpers import check_text
from hypothesis import given
from hypothesis import strategies as st
from patterns import Build, counts, golden

from planish.calibrate.collect import collect
from planish.ir.errors import PlanishError, ValidationError
from planish.ir.graph import Graph
from planish.ir.rewriter import Declined
from planish.ir.stats import Stats
from planish.ir.verifier import verify
from planish.passes import splits
from planish.passes.base import Context, PassReport
from planish.passes.disassemble_channels import DisassembleChannels, choose_split
from planish.passes.manager import Pipeline
from planish.passes.splits import choose_counts, choose_threshold


def gated(act: str = "silu", loud: float = 40.0) -> Graph:
    """A gated block with a norm before it; two channels of `up` are loud."""
    b = Build()
    x = b("rms_norm", b.input("x", "f32[n, 4]"), b.constant(np.array([1.0, 2, 1, 1]), name="gain"))
    up = b.rng.normal(size=(8, 4))
    up[[2, 5]] *= loud
    gate = b(act, b("linear", x, b.random(8, 4, name="gate"), b.random(8, name="gate.bias")))
    product = b("mul", gate, b("linear", x, b.constant(up, name="up"), b.random(8, name="up.bias")))
    return b.output(b("linear", product, b.random(4, 8, name="down")))


def stats_of(graph: Graph, seed: int = 0) -> Stats:
    rng = np.random.default_rng(seed)
    return collect(graph, [{"x": rng.normal(size=(16, 4)).astype(np.float32)} for _ in range(4)])


def run(graph: Graph, text: str, stats: Stats | None = None) -> tuple[Graph, PassReport]:
    after, report = Pipeline(text).run(graph, stats=stats_of(graph) if stats is None else stats, validate=True)
    verify(after)
    check_text(after)
    done = report.passes[-1]
    assert not done.applied or (done.error is not None and done.error <= 1e-12)
    return after, done


# -- the choice --------------------------------------------------------------------------------------


def test_choose_counts() -> None:
    assert choose_counts(np.array([0.0, 1, 2, 2.1, 9]), 2.0).tolist() == [1, 1, 1, 2, 5]


@given(st.integers(0, 500), st.integers(0, 40))
def test_the_threshold_is_the_smallest_that_adds_no_more(seed: int, added: int) -> None:
    largest = np.abs(np.random.default_rng(seed).normal(size=16)) + 1e-3
    theta, found = choose_threshold(largest, added)
    assert found.sum() == len(largest) + added
    assert (largest / found).max() == theta
    assert choose_counts(largest, theta * 0.999).sum() > len(largest) + added or added == 0
    assert choose_counts(largest, theta * (1 + 1e-12)).tolist() == found.tolist() or added == 0


def test_choose_split() -> None:
    assert choose_split(np.array([8.0, 1, 1, 1]), 2.0, 1.0)[1].tolist() == [4, 1, 1, 1]
    assert choose_split(np.array([8.0, 1, 1, 1]), None, 0.5)[1].tolist() == [3, 1, 1, 1]
    assert choose_split(np.zeros(4), None, 0.5)[1].tolist() == [1, 1, 1, 1]
    with pytest.raises(Declined, match="the threshold would add 7 channels to 4: more than ratio allows"):
        choose_split(np.array([8.0, 1, 1, 1]), 1.0, 1.0)


# -- the pass ----------------------------------------------------------------------------------------


def test_no_op_is_added_and_no_channel_is_larger_than_the_threshold() -> None:
    graph = gated()
    stats = stats_of(graph)
    largest = stats.of("mul").largest
    theta = float(largest.max()) / 4
    after, report = run(graph, f"disassemble-channels{{threshold={theta!r} ratio=4}}", stats)
    assert counts(after) == counts(graph)
    wanted = choose_counts(largest, theta)
    assert after.values["up"].shape == after.values["gate"].shape == (int(wanted.sum()), 4)
    assert after.values["down"].shape == (4, int(wanted.sum()))
    now = collect(after, [{"x": np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)}])
    assert now.of("mul").largest.max() <= theta * (1 + 1e-6)
    assert report.figures["mul"]["channels_after"] == wanted.sum()
    assert report.figures["mul"]["range_after"] <= theta


def test_the_division_is_on_one_factor_only() -> None:
    """Both factors repeat; the gate, behind silu, keeps its size."""
    graph = gated()
    after, _ = run(graph, "disassemble-channels{ratio=0.25}")
    found = choose_threshold(stats_of(graph).of("mul").largest, 2)[1]
    old, new = (g.values["gate"].constant.wide() for g in (graph, after))
    assert np.array_equal(new, np.repeat(old, found, axis=0))
    old, new = (g.values["up"].constant.wide() for g in (graph, after))
    assert new == pytest.approx(np.repeat(old / found[:, None], found, axis=0), rel=1e-15)
    old, new = (g.values["down"].constant.wide() for g in (graph, after))
    assert new == pytest.approx(np.repeat(old, found, axis=1), rel=1e-15)
    assert sorted(found.tolist())[-2:] != [1, 1]


def test_statistics_follow() -> None:
    graph = gated()
    batches = [{"x": np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)}]
    context = Context(stats=collect(graph, batches))
    DisassembleChannels(ratio=0.5).run(graph, context)
    now = collect(graph, batches)
    assert context.stats is not None
    assert "mul" in now
    for name in now:
        assert context.stats.of(name).maximum == pytest.approx(now.of(name).maximum, rel=1e-5)
        assert context.stats.of(name).samples == pytest.approx(now.of(name).samples, rel=1e-4, abs=1e-4)


def test_second_run_finds_nothing_left() -> None:
    graph = gated()
    _, report = run(graph, "disassemble-channels{ratio=0.5},disassemble-channels{ratio=0.5}")
    assert report.applied == []
    assert report.declined["its channels were split before"] == ["mul %mul"]


def test_refusals() -> None:
    graph = gated("gelu")
    _, report = run(graph, "disassemble-channels{threshold=1e9}")
    assert report.declined["no channel exceeds the threshold, or ratio allows no more channels"] == ["mul %mul"]
    assert report.declined["rms_norm counts its channels or names their places"] == ["rms_norm %rms_norm"]
    _, report = run(graph, "disassemble-channels{threshold=0.01 ratio=1}")
    assert any("more than ratio allows" in reason for reason in report.declined)
    b = Build()
    h = b("gelu", b("linear", b.input("x", "f32[n, 4]"), b.random(8, 4)))
    graph = b.output(b("linear", h, b.random(4, 8)))
    _, report = run(graph, "disassemble-channels{ratio=0.5}")
    assert report.applied == []
    assert report.declined["its result is not proportional to its operand"] == ["gelu %gelu"]
    _, report = run(graph, "disassemble-channels", Stats())
    assert report.misses == ["no linear with statistics reads channels that constants write"]
    with pytest.raises(PlanishError, match="option 'threshold': expected a number above 0, or none"):
        Pipeline("disassemble-channels{threshold=0}")


def test_a_gate_of_relu_lets_the_division_through() -> None:
    b = Build()
    h = b("relu", b("linear", b.input("x", "f32[n, 4]"), b.random(8, 4, name="up")))
    graph = b.output(b("linear", h, b.random(4, 8, name="down")))
    after, report = run(graph, "disassemble-channels{ratio=0.5}")
    assert len(report.applied) == 1
    assert after.values["up"].shape == (12, 4)


def test_two_sites_on_one_tensor_are_analysed_again() -> None:
    """Parts of a concatenation are spaces of their own, and the first split moves the places of the second."""
    b = Build()
    x = b.input("x", "f32[n, 4]")
    parts = []
    for name in ("one", "two"):
        h = b("relu", b("linear", x, b.random(6, 4, name=name)))
        b.graph.add_output(f"{name}.y", b("linear", h, b.random(3, 6, name=f"{name}.down")))
        parts.append(h)
    graph = b.output(b("linear", b("concat", *parts, axis=1), b.random(2, 12, name="joint")))
    after, report = run(graph, "disassemble-channels{ratio=0.5}")
    assert len(report.applied) == 2
    assert after.values["joint"].shape == (2, 18)


def test_a_decoder() -> None:
    graph = decoder()
    rng = np.random.default_rng(0)
    stats = collect(graph, [{"ids": rng.integers(0, VOCABULARY, (3, TOKENS))} for _ in range(3)])
    after, report = run(graph, "disassemble-channels{ratio=0.2}", stats)
    assert len(report.applied) == 2
    assert after.values["layers.0.gate.weight"].shape == (192 + 38, 32)
    assert counts(after) == counts(graph)


def test_a_wrong_split_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded: the readers are not divided."""
    apply = splits.absorb

    def wrong(rewriter, space, transform):  # type: ignore[no-untyped-def]
        for member in space.constants:
            if transform.act.value == "split" and member.variance < 0:
                held = member.value.constant
                rewriter.set_constant(member.value, type(held)(held.wide() * 1.001, held.dtype, held.shape))
        return apply(rewriter, space, transform)

    monkeypatch.setattr(splits, "absorb", wrong)
    graph = gated()
    with pytest.raises(ValidationError, match="changed the function"):
        Pipeline("disassemble-channels{ratio=0.5}").run(graph, stats=stats_of(graph))


def test_golden(update_golden: bool) -> None:
    b = Build()
    up = b.constant(np.array([[1.0, 0.0], [0.0, 8.0], [2.0, 0.0]]), name="up")
    h = b("relu", b("linear", b.input("x", "f32[n, 2]"), up, b.constant([1.0, 2.0, 3.0], name="bias")))
    before = b.output(b("linear", h, b.constant(np.array([[1.0, 2.0, 3.0]]), name="down")))
    stats = collect(before, [{"x": np.array([[1.0, 1.0], [-1.0, 1.0]], np.float32)}])
    after, report = run(before, "disassemble-channels{threshold=5}", stats)
    assert report.applied == []
    after, report = run(before, "disassemble-channels{threshold=5 ratio=1}", stats)
    assert report.applied == ["relu %relu: 3 -> 4 channels, range 10 -> 5"]
    assert after.values["up"].constant.wide().tolist() == [[1, 0], [0, 4], [0, 4], [2, 0]]
    assert after.values["bias"].constant.wide().tolist() == [1, 1, 1, 3]
    assert after.values["down"].constant.wide().tolist() == [[1, 2, 2, 3]]
    golden("disassemble-channels", before, after, update_golden)
