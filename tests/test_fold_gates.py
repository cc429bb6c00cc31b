"""fold-gates: constant factors of channels, heads and tensors."""

from __future__ import annotations

import numpy as np
import pytest
from channel_blocks import calibration, conv
from encoder_blocks import heads, linear, merged, norm
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import TOLERANCE, Build, counts, golden, run

from planish.calibrate.collect import collect
from planish.ir import absorb
from planish.ir.errors import ValidationError
from planish.ir.graph import Graph
from planish.ir.stats import Stats
from planish.passes.base import Context
from planish.passes.fold_gates import FoldGates
from planish.passes.manager import Pipeline


def layer_scale(seed: int = 0, *, gate: np.ndarray | None = None) -> Graph:
    """x + gamma * W norm(x), between two linears."""
    b = Build(seed)
    x = linear(b, b.input("x", "f32[batch, tokens, 8]"), 8, "first")
    gamma = b.random(8, name="gamma") if gate is None else b.constant(gate, name="gamma")
    x = b("add", x, b("mul", linear(b, norm(b, x, "norm1"), 8, "branch"), gamma))
    return b.output(linear(b, norm(b, x, "norm2"), 8, "last"))


def conv_scale(seed: int = 0) -> Graph:
    """The block of a convolutional net: depthwise, norm over channels last, two linears, gamma, sum."""
    b = Build(seed)
    x = conv(b, b.input("x", "f32[batch, 3, 6, 6]"), 8, "first")
    h = b("transpose", conv(b, x, 8, "depthwise", size=3, groups=8), perm=(0, 2, 3, 1))
    h = linear(b, b("gelu", linear(b, norm(b, h, "norm"), 12, "up")), 8, "down")
    h = b("transpose", b("mul", b.random(8, name="gamma"), h), perm=(0, 3, 1, 2))
    return b.output(conv(b, b("relu", b("add", x, h)), 2, "last"))


def multipliers(seed: int = 0, *, tied: bool = False) -> Graph:
    """Multipliers of the embedding, of a residual branch and of queries, and a divisor of the logits."""
    b = Build(seed)
    table = b.random(10, 8, name="table")
    x = b("mul", b("embedding", table, b.input("ids", "i64[batch, tokens]")), np.float32(12.0))
    normed = norm(b, x, "norm1", "rms_norm")
    q, k, v = (heads(b, linear(b, normed, 8, letter)) for letter in "qkv")
    q = b("mul", q, np.float32(0.5))
    x = b("add", x, b("mul", linear(b, merged(b, b("attention", q, k, v)), 8, "o"), np.float32(0.22)))
    normed = norm(b, x, "norm2", "rms_norm")
    return b.output(b("div", b("linear", normed, table if tied else b.random(10, 8, name="head")), np.float32(13.0)))


def head_gates(seed: int = 0) -> Graph:
    """An unconditional gate sigmoid(alpha_h) on each head."""
    b = Build(seed)
    x = linear(b, b.input("x", "f32[batch, tokens, 8]"), 8, "first")
    q, k, v = (heads(b, linear(b, x, 8, letter)) for letter in "qkv")
    gate = b("sigmoid", b.constant([[[-1.0]], [[2.0]]], name="alpha"))
    return b.output(linear(b, merged(b, b("mul", b("attention", q, k, v), gate)), 8, "o"))


GATED = {
    "layer scale": (layer_scale, 1),
    "conv scale": (conv_scale, 1),
    "multipliers": (multipliers, 4),
    "head gates": (head_gates, 1),
}


def remaining(graph: Graph) -> int:
    return sum(counts(graph).get(op, 0) for op in ("mul", "div"))


@pytest.mark.parametrize("kind", GATED)
def test_exact(kind: str) -> None:
    make, gates = GATED[kind]
    before, _ = Pipeline("fold-constants").run(make())
    after, report = run(before, "fold-gates")
    assert len(report.applied) == gates
    assert remaining(after) == remaining(before) - gates
    assert report.error is not None
    assert report.error <= TOLERANCE


@settings(max_examples=10)
@given(st.integers(0, 10_000), st.sampled_from(sorted(GATED)))
def test_exact_for_any_seed(seed: int, kind: str) -> None:
    make, _ = GATED[kind]
    _, report = Pipeline("fold-constants,fold-gates").run(make(seed))
    assert report.passes[1].error is not None
    assert report.passes[1].error <= TOLERANCE


def test_layer_scale_goes_into_the_branch() -> None:
    before = layer_scale()
    after, report = run(before, "fold-gates")
    assert report.applied == ["mul %mul: into branch.weight, branch.bias"]
    gamma, weight = (before.values[n].constant.wide() for n in ("gamma", "branch.weight"))
    assert np.allclose(after.values["branch.weight"].constant.wide(), gamma[:, None] * weight, rtol=1e-12)
    assert "gamma" not in after.values


def test_multipliers_find_their_places() -> None:
    before = multipliers()
    after, report = run(before, "fold-gates")
    assert report.applied == [
        "mul %mul: into table",
        "mul %mul_10: into k.weight, k.bias",
        "mul %mul_15: into o.weight, o.bias",
        "div %div: into head",
    ]
    for name, factor in (("table", 12.0), ("k.weight", 0.5), ("o.bias", float(np.float32(0.22))), ("head", 1 / 13)):
        now, then = (g.values[name].constant.wide() for g in (after, before))
        assert np.allclose(now, then * factor, rtol=1e-12)


def test_only_vectors() -> None:
    before = multipliers()
    after, report = run(before, "fold-gates{scalars=false}")
    assert report.applied == []
    assert counts(after) == counts(before)
    assert report.misses == ["no product or quotient of an activation and a constant"]


def test_gates_on_gates() -> None:
    b = Build()
    x = linear(b, b.input("x", "f32[n, 4]"), 4, "a")
    x = b("div", b("mul", b("mul", x, np.float32(3.0)), b.random(4)), np.float32(2.0))
    after, report = run(b.output(b("tanh", x)), "fold-gates")
    assert counts(after) == {"linear": 1, "tanh": 1}
    assert len(report.applied) == 3


def test_a_gate_behind_another_in_one_round() -> None:
    """Each has a space of its own: the second is folded when the first is gone already."""
    b = Build()
    h = linear(b, b.input("x", "f32[n, 3]"), 6, "up")
    after, report = run(b.output(linear(b, b("mul", b("mul", h, b.random(6)), b.random(6)), 4, "down")), "fold-gates")
    assert counts(after) == {"linear": 2}
    assert len(report.applied) == 2
    for seed in range(4):  # an explicit scale before a gate
        b = Build(seed)
        h = b("mul", linear(b, b.input("x", "f32[n, 3]"), 12, "b"), b.random(12, name="g"))
        graph = b.output(linear(b, h, 4, "c"))
        text = "scale-channels{insert=true min-gain=0},fold-gates"
        after, _ = Pipeline(text).run(graph, stats=collect(graph, calibration(graph)))
        assert counts(after) == {"linear": 2}


def test_two_gates_on_one_table() -> None:
    """A table that is read twice, with a multiplier each: what one folds the other sees."""
    for second, left in ((3.0, 0), (6.0, 1)):
        b = Build()
        table = b.random(10, 8, name="table")
        one = b("mul", b("embedding", table, b.input("a", "i64[n]")), np.float32(3.0))
        two = b("mul", b("embedding", table, b.input("b", "i64[n]")), np.float32(second))
        before = b.output(b("tanh", one), b("tanh", two))
        after, report = run(before, "fold-gates")
        assert remaining(after) == left
        assert np.allclose(after.values["table"].constant.wide(), 3.0 * before.values["table"].constant.wide())
        if left:
            (node,) = [n for n in after.nodes if n.op.name == "mul"]
            assert node.operands[1].constant.wide().tolist() == 2.0
            assert node.operands[1].shape == ()
        else:
            assert report.applied == ["mul %mul: into table", "mul %mul_3: it is one"]


def test_a_gate_that_is_one() -> None:
    before = layer_scale(gate=np.ones(8, np.float32))
    after, report = run(before, "fold-gates")
    assert report.applied == ["mul %mul: it is one"]
    assert after.values["branch.weight"].constant == before.values["branch.weight"].constant


def test_the_statistics_follow() -> None:
    graph = layer_scale()
    context = Context(collect(graph, calibration(graph)))
    FoldGates().run(graph, context)
    again = collect(graph, calibration(graph))
    assert context.stats is not None
    for name in again:
        assert np.allclose(context.stats.of(name).maximum, again.of(name).maximum, rtol=1e-3, atol=1e-4), name


def test_golden(update_golden: bool) -> None:
    b = Build()
    h = b("linear", b.input("x", "f32[n, 2]"), b.constant([[1.0, 2.0], [3.0, 4.0]], name="w"), b.constant([1.0, 1.0]))
    h = b("tanh", b("mul", h, b.constant([2.0, -0.5], name="gamma")))
    before = b.output(b("mul", h, np.float32(3.0)))
    after, report = run(before, "fold-gates")
    assert report.declined == {"nothing next to it can take it up": ["mul %mul_2"]}
    golden("fold-gates", before, after, update_golden)


# -- refusals --------------------------------------------------------------------------------------


def refused(graph: Graph) -> dict[str, list[str]]:
    after, report = run(graph, "fold-gates")
    assert after == graph
    assert report.applied == []
    return report.declined


def test_a_gate_that_depends_on_the_data() -> None:
    b = Build()
    x = linear(b, b.input("x", "f32[n, 4]"), 4, "first")
    gated = b("mul", linear(b, x, 4, "up"), b("sigmoid", linear(b, x, 4, "gate")))
    assert refused(b.output(linear(b, gated, 4, "last"))) == {"its gate depends on the data": ["mul %mul"]}


def test_a_gate_with_a_zero() -> None:
    graph = layer_scale(gate=np.array([1, 2, 3, 0, 5, 6, 7, 8], np.float32))
    assert refused(graph) == {"it is zero somewhere: the scale has no inverse": ["mul %mul"]}


def test_a_tied_table() -> None:
    """The table is the head, too, and what lies between them does not pass a scale on."""
    b = Build()
    table = b.random(10, 8, name="table")
    e = b("mul", b("embedding", table, b.input("ids", "i64[n]")), np.float32(12.0))
    graph = b.output(b("linear", b("tanh", e), table))
    assert refused(graph) == {"its result is not proportional to its operand": ["tanh %tanh"]}


def test_a_blocked_neighbour() -> None:
    b = Build()
    h = b("tanh", b("mul", b("tanh", b.input("x", "f32[n, 4]")), b.random(4)))
    assert refused(b.output(h)) == {"its result is not proportional to its operand": ["tanh %tanh_1"]}


def test_a_gate_that_widens() -> None:
    b = Build()
    x = linear(b, b.input("x", "f32[1, 4]"), 4, "a")
    declined = refused(b.output(b("tanh", b("mul", x, b.random(3, 4)))))
    assert declined == {"it changes the type of what it multiplies": ["mul %mul"]}


def test_a_gate_with_other_readers() -> None:
    b = Build()
    gamma = b.random(4, name="gamma")
    x = linear(b, b.input("x", "f32[n, 4]"), 4, "a")
    graph = b.output(b("tanh", b("mul", x, gamma)), b("tanh", b("max", x, gamma)))
    assert refused(graph) == {"other nodes read it": ["%gamma"]}


def test_a_gate_over_tokens() -> None:
    b = Build()
    x = linear(b, b.input("x", "f32[batch, 5, 4]"), 4, "a")
    graph = b.output(b("tanh", b("mul", x, b.random(5, 4))))
    assert list(refused(graph).values()) == [["mul %mul"]]


def test_nothing_to_fold() -> None:
    b = Build()
    _, report = run(b.output(b("tanh", b.input("x", "f32[n, 4]"))), "fold-gates")
    assert report.misses == ["no product or quotient of an activation and a constant"]


# -- teeth -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["forgotten bias", "1.001"])
def test_the_validator_rejects_a_wrong_fold(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    true = absorb._applied

    def applied(member, data, transform):
        if wrong == "forgotten bias" and member.value is not None and member.value.name == "branch.bias":
            return data
        out = true(member, data, transform)
        return out * 1.001 if wrong == "1.001" else out

    monkeypatch.setattr(absorb, "_applied", applied)
    with pytest.raises(ValidationError, match=r"^pass 'fold-gates': changed the function"):
        Pipeline("fold-gates").run(layer_scale(), stats=Stats())
