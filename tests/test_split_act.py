"""SPLIT: channels that become several, derived from PERMUTE, absorbed by constants, or done by explicit gathers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from decoder_blocks import TOKENS, VOCABULARY, decoder
from helpers import check_text
from hypothesis import given
from hypothesis import strategies as st
from patterns import Build

from planish.ir import ops
from planish.ir.absorb import absorb
from planish.ir.audit import audit
from planish.ir.audit_instances import instances
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph
from planish.ir.ops.base import Act, Block, Carry, Link
from planish.ir.ops.splitting import with_splits
from planish.ir.probe import relative_error
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import Space, analyse
from planish.ir.transform import Split, apply, random_transform
from planish.ir.verifier import verify
from planish.report.inspection import inspect


def mlp(op: str = "relu") -> Graph:
    b = Build()
    h = b("linear", b.input("x", "f32[n, 4]"), b.random(6, 4, name="up"), b.random(6, name="bias"))
    return b.output(b("linear", b(op, h), b.random(3, 6, name="down")))


def gated() -> Graph:
    b = Build()
    x = b.input("x", "f32[n, 4]")
    gate = b("silu", b("linear", x, b.random(6, 4, name="gate")))
    product = b("mul", gate, b("linear", x, b.random(6, 4, name="up")))
    return b.output(b("linear", product, b.random(3, 6, name="down")))


def space_of(graph: Graph, tensor: str) -> Space:
    value = graph.values[tensor]
    assert value.rank is not None
    (space,) = analyse(graph).at(value, (value.rank - 1,), Act.SPLIT)
    return space


def changed(graph: Graph, tensor: str, counts: list[int], *, insert: bool = False) -> Graph:
    after = graph.clone()
    with Rewriter(after) as rewriter:
        absorb(rewriter, space_of(after, tensor), Split(np.array(counts)), insert=insert)
    verify(after)
    check_text(after)
    assert same(graph, after)
    return after


def same(before: Graph, after: Graph) -> bool:
    inputs = {v.name: torch.randn(3, *[int(d) for d in v.shape[1:]], dtype=torch.float64) for v in before.inputs}  # type: ignore[arg-type, index]
    one, two = (evaluate(g, inputs, torch.float64) for g in (before, after))
    return all(float((one[k] - two[k]).abs().max()) <= 1e-12 * float(one[k].abs().max()) for k in one)


# -- the transform -----------------------------------------------------------------------------------


def test_writers_are_repeated_and_readers_repeated_and_divided() -> None:
    w = np.arange(6.0).reshape(2, 3)
    split = Split(np.array([1, 3, 2]))
    assert apply(w, (1,), split)[0].tolist() == [0, 1, 1, 1, 2, 2]
    assert apply(w, (1,), split, variance=-1)[0] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 1, 1])
    assert apply(w, (0,), Split(np.array([2, 1]))).tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
    of_others = apply(w, (1,), Split(np.array([2])), np.array([-1, 0, -1]))
    assert of_others[0].tolist() == [0, 1, 1, 2]
    with pytest.raises(ValueError, match="joint axes"):
        apply(w, (0, 1), Split(np.ones(6, np.int64)))


@given(st.integers(0, 200))
def test_both_sides_of_a_contraction_cancel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(3, 5)), rng.normal(size=(4, 5))
    split = random_transform(Act.SPLIT, 5, rng)
    assert apply(x, (1,), split) @ apply(w, (1,), split, variance=-1).T == pytest.approx(x @ w.T, abs=1e-12)


@given(st.integers(0, 200))
def test_parts_sum_to_what_was_split(seed: int) -> None:
    """Of a power of two of parts the sum is the same bit by bit, of others to the last bit or two."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(4, 1))
    parts = apply(w, (1,), Split(np.array([8])), variance=-1)
    while parts.shape[1] > 1:
        parts = parts[:, ::2] + parts[:, 1::2]
    assert (parts == w).all()
    for count in (3, 5, 7):
        parts = apply(w, (1,), Split(np.array([count])), variance=-1)
        assert parts.sum(1, keepdims=True) == pytest.approx(w, rel=1e-15)


# -- rows --------------------------------------------------------------------------------------------


def test_every_row_answers() -> None:
    """Which rows let a split pass somewhere; all others block it. The audit tries each claim on numbers."""
    passing = {name for name, row in ops.table().items() if row.repeats is not None}
    assert {"linear", "matmul", "gemm", "conv", "add", "mul", "gelu", "cast", "concat", "embedding"} <= passing
    assert not passing & {"softmax", "layer_norm", "rms_norm", "reshape", "slice", "reduce_sum", "attention", "rope"}


def test_a_refusal_says_why() -> None:
    graph = decoder()
    reasons = {str(b) for s in analyse(graph).of(Act.SPLIT) for b in s.blockers}
    assert any("rms_norm counts its channels or names their places" in r for r in reasons)
    b = Build()
    x = b("linear", b.input("x", "f32[n, 4]"), b.random(4, 4))
    y = b("linear", b.input("z", "f32[n, 4]"), b.random(4, 4))
    graph = b.output(b("matmul", x, b("transpose", y, perm=(1, 0))))
    (space,) = (s for s in analyse(graph).of(Act.SPLIT) if any(m.value is x for m in s.activations))
    assert "what it is multiplied with is no constant that could take the division up" in str(space.blockers[0])


def test_a_norm_that_passed_a_split_would_be_found() -> None:
    """Seeded: a reduction over the channels is claimed not to count them."""
    row = ops.get("rms_norm")
    wrong = with_splits(replace(row, repeats=lambda node, port, axes: None))
    found = [str(f) for f in audit(wrong, instances()["rms_norm"], seed=3)]
    assert any("split at port" in f and "does not hold" in f for f in found)


@pytest.mark.parametrize("name", ["softmax", "layer_norm", "reshape", "slice", "split"])
def test_rows_that_count_channels_must_not_opt_in(name: str) -> None:
    wrong = with_splits(replace(ops.get(name), repeats=lambda node, port, axes: None))
    assert any("split" in str(f) and "does not hold" in str(f) for f in audit(wrong, instances()[name], seed=3))


@pytest.mark.parametrize("name", ["linear", "add", "gelu", "transpose"])
def test_a_row_that_refused_would_be_found(name: str) -> None:
    """Seeded: the row answers nothing, and does not say that it is conservative."""
    row = ops.get(name)

    def relate(node, act, port, axes):  # type: ignore[no-untyped-def]
        return Block("no rule") if act is Act.SPLIT else row.relate(node, act, port, axes)

    found = [str(f) for f in audit(replace(row, relate=relate), instances()[name], seed=3)]
    assert any("split at port" in f and "is refused (no rule), but goes with" in f for f in found)


def test_a_reader_that_was_not_divided_would_be_found() -> None:
    row = ops.get("linear")

    def relate(node, act, port, axes):  # type: ignore[no-untyped-def]
        answer = row.relate(node, act, port, axes)
        if act is not Act.SPLIT or not isinstance(answer, Carry):
            return answer
        return Carry(tuple(replace(link, variance=1) for link in answer.links))

    found = [str(f) for f in audit(replace(row, relate=relate), instances()["linear"], seed=3)]
    assert any("split at port 0" in f and "does not hold" in f for f in found)


def test_linear() -> None:
    node = mlp().values["linear_1"].producer if "linear_1" in mlp().values else None
    assert node is not None
    assert node.op.relate(node, Act.SPLIT, 0, (1,)) == Carry((Link(1, (1,), -1),))
    assert node.op.relate(node, Act.SPLIT, -1, (1,)) == Carry((Link(1, (0,)),))


# -- spaces ------------------------------------------------------------------------------------------


def test_constants_on_both_sides_take_a_split() -> None:
    after = changed(mlp(), "relu", [1, 2, 1, 3, 1, 1])
    assert after.values["up"].shape == (9, 4)
    assert after.values["bias"].shape == (9,)
    assert after.values["down"].shape == (3, 9)
    assert str(after.values["relu"].type) == "f32[n, 9]"
    assert len(after) == len(mlp())


@pytest.mark.parametrize("op", ["gelu", "silu", "tanh", "exp"])
def test_any_channelwise_op_passes_a_split(op: str) -> None:
    changed(mlp(op), op, [2, 2, 1, 3, 1, 1])


def test_both_factors_of_a_product_repeat() -> None:
    after = changed(gated(), "mul", [2, 1, 1, 1, 4, 1])
    assert [after.values[n].shape for n in ("gate", "up", "down")] == [(10, 4), (10, 4), (3, 10)]


def test_a_part_of_a_concatenation() -> None:
    b = Build()
    x = b.input("x", "f32[n, 4]")
    one = b("tanh", b("linear", x, b.random(2, 4, name="one")))
    two = b("linear", x, b.random(3, 4, name="two"))
    graph = b.output(b("linear", b("concat", one, two, axis=1), b.random(3, 5, name="read")))
    after = changed(graph, "tanh", [3, 1])
    assert str(after.values["concat"].type) == "f32[n, 7]"
    first, second = (space_of(graph, name) for name in ("tanh", "linear_1"))
    with Rewriter(graph) as rewriter:
        absorb(rewriter, first, Split(np.array([2, 1])))
        with pytest.raises(Declined, match="another split has changed a tensor of the space: analyse again"):
            absorb(rewriter, second, Split(np.array([2, 1, 1])))


def test_tied_embeddings_meet_their_own_inverse() -> None:
    b = Build()
    table = b.random(7, 4, name="table")
    e = b("relu", b("embedding", table, b.input("i", "i64[n]")))
    graph = b.output(b("linear", e, table))
    space = space_of(graph, "relu")
    with Rewriter(graph) as rewriter, pytest.raises(Declined):
        absorb(rewriter, space, Split(np.array([2, 1, 1, 1])))


def test_a_blocked_edge_takes_a_gather() -> None:
    b = Build()
    h = b("layer_norm", b.input("x", "f32[n, 4]"), b.random(4, name="gain"))
    graph = b.output(b("linear", h, b.random(3, 4, name="w")))
    space = space_of(graph, "layer_norm")
    with Rewriter(graph.clone()) as rewriter, pytest.raises(Declined, match="layer_norm counts its channels"):
        absorb(rewriter, space, Split(np.array([2, 1, 1, 1])))
    after = changed(graph, "layer_norm", [2, 1, 3, 1], insert=True)
    assert [n.op.name for n in after.nodes] == ["layer_norm", "gather", "linear"]
    assert after.values["w"].shape == (3, 7)
    back = changed(mlp("softplus"), "softplus", [1, 1, 1, 2, 1, 1])
    assert len(back) == 3
    b = Build()
    y = b("linear", b.input("x", "f32[n, 4]"), b.random(4, 4, name="w"))
    b.output(b("softmax", y, axis=-1))
    undone = changed(b.graph, "linear", [1, 2, 1, 1], insert=True)
    assert [n.op.name for n in undone.nodes] == ["linear", "gather", "softmax"]
    assert undone.values["softmax"].shape is not None
    assert undone.values["softmax"].shape[-1] == 4


@pytest.mark.parametrize("seed", range(3))
def test_every_admitted_space_is_exact(seed: int) -> None:
    graph = decoder(seed)
    rng = np.random.default_rng(seed)
    after = graph.clone()
    with Rewriter(after) as rewriter:
        for space in analyse(after).admitted(Act.SPLIT):
            absorb(rewriter, space, random_transform(Act.SPLIT, space.size, rng))
    verify(after)
    ids = {"ids": torch.from_numpy(rng.integers(0, VOCABULARY, (2, TOKENS)))}
    one, two = (evaluate(g, ids, torch.float64) for g in (graph, after))
    assert all(relative_error(two[k], one[k]) <= 1e-12 for k in one)
    assert rewriter.edits


def test_a_channel_cannot_be_dropped() -> None:
    graph = mlp()
    with Rewriter(graph) as rewriter, pytest.raises(Declined, match="a channel would be dropped"):
        absorb(rewriter, space_of(graph, "relu"), Split(np.array([0, 1, 1, 1, 1, 1])))


def test_inspect_counts_splits() -> None:
    found = inspect(gated())
    assert found.by_act["split"].admitted == 1
    row = next(r for r in found.rows if r.acts.get("split"))
    assert row.tensors == ("linear", "silu", "linear_1", "mul")
    assert found.linears_with["split"] == 1
