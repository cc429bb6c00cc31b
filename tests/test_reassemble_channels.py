"""reassemble-channels: closed-form merge errors, C channels again, what is folded, and the row left at run time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decoder_blocks import TOKENS, VOCABULARY, decoder
from helpers import check_text
from hypothesis import given
from hypothesis import strategies as st
from patterns import Build, counts, golden
from scipy.stats import spearmanr

from planish.calibrate.collect import collect
from planish.ir.errors import PlanishError
from planish.ir.evaluator import evaluate
from planish.ir.formats import Format
from planish.ir.graph import Graph
from planish.ir.rounding import fake_quantize
from planish.ir.stats import Stats
from planish.ir.verifier import verify
from planish.passes.base import Context, PassReport, keep_float
from planish.passes.channels import positions
from planish.passes.manager import Pipeline
from planish.passes.reassemble_channels import ReassembleChannels
from planish.passes.reassembly import Matching, assembled, choose_reassembly, merge_errors
from planish.passes.row_blocks import BlockError, row_block

WIDTH = 32


def rows(seed: int = 0, loud: float = 25.0) -> np.ndarray:
    """Rows [128, 32]: neighbours are nearly alike, and three channels are loud."""
    rng = np.random.default_rng(seed)
    x = np.repeat(rng.normal(size=(128, WIDTH // 2)), 2, axis=1) + 0.1 * rng.normal(size=(128, WIDTH))
    x[:, [3, 10, 20]] *= loud
    return x.astype(np.float32)


def model(*, norm: bool = True, loud: float = 6.0) -> Graph:
    """A norm (or a linear) whose channels two linears read, one of them behind silu and a product."""
    b = Build()
    x = b.input("x", f"f32[n, {WIDTH}]")
    if norm:
        gain = np.ones(WIDTH)
        gain[[3, 10, 20]] = loud
        h = b("rms_norm", x, b.constant(gain, name="gain"))
    else:
        data = np.repeat(b.rng.normal(size=(WIDTH // 2, WIDTH)), 2, axis=0) + 0.1 * b.rng.normal(size=(WIDTH, WIDTH))
        data[[3, 10, 20]] *= loud
        h = b("linear", x, b.constant(data / 6, name="first"), b.random(WIDTH, name="first.bias"))
    read = b.rng.normal(size=(2, 24, WIDTH)) / 4
    read[..., [3, 10, 20]] /= loud
    gate = b("silu", b("linear", h, b.constant(read[0], name="gate"), b.random(24, name="gate.bias")))
    product = b("mul", gate, b("linear", h, b.constant(read[1], name="up")))
    return b.output(b("linear", product, b.random(8, 24, name="down")))


def stats_of(graph: Graph) -> Stats:
    return collect(graph, [{"x": rows(seed, 1.0)} for _ in range(1) for seed in range(2)])


def run(graph: Graph, text: str, stats: Stats | None = None) -> tuple[Graph, PassReport]:
    after, report = Pipeline(text).run(graph, stats=stats_of(graph) if stats is None else stats)
    verify(after)
    check_text(after)
    return after, report.passes[-1]


# -- the closed form ---------------------------------------------------------------------------------


@given(st.integers(0, 100))
def test_the_closed_form_is_the_true_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(9, 6)), rng.normal(size=(5, 6))
    found = merge_errors(x, w, np.array([0, 2, 4]), np.array([1, 3, 5]))
    for a, i in enumerate((0, 2, 4)):
        for b, j in enumerate((1, 3, 5)):
            exact = np.outer(x[:, i], w[:, i]) + np.outer(x[:, j], w[:, j])
            merged = np.outer((x[:, i] + x[:, j]) / 2, w[:, i] + w[:, j])
            assert found[a, b] == pytest.approx(((exact - merged) ** 2).sum(), rel=1e-9)


def test_the_published_code_scores_another_thing() -> None:
    """Weights summed before they are squared, with a plus: it says little of the error (methods/a.md, 5)."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(200, 64)) * np.exp(rng.normal(size=64)), rng.normal(size=(48, 64))
    even, odd = np.arange(0, 64, 2), np.arange(1, 64, 2)
    true = merge_errors(x, w, even, odd)
    distance = np.sqrt(((x[:, even, None] - x[:, None, odd]) ** 2).sum(0))
    published = ((w.sum(0)[even][:, None] + w.sum(0)[odd][None, :]) * distance) ** 2
    assert spearmanr(published.reshape(-1), true.reshape(-1)).statistic < 0.6
    chosen = Matching.of(x, w).pairs(np.ones(64, np.bool_), 8)
    assert chosen is not None
    ours = sum(true[i // 2, j // 2] for i, j in chosen.tolist())
    nearest = published.argmin(1)
    worst = np.argsort(published[np.arange(32), nearest])[:8]
    assert ours < 0.8 * sum(true[i, nearest[i]] for i in worst)


def test_a_correction_that_is_merged_is_worse_than_none() -> None:
    """Why there is no low-rank correction: rounding W + BA loses what rounding W and adding BA gains."""
    rng = np.random.default_rng(0)
    w, x = torch.from_numpy(rng.normal(size=(64, 64))), torch.from_numpy(rng.normal(size=(256, 64)))
    form = Format.parse("int4:channel")
    u, s, v = torch.linalg.svd(w - fake_quantize(w, form))
    branch = (u[:, :4] * s[:4]) @ v[:4]

    def error(held: torch.Tensor) -> float:
        return float((x @ (held - w).T).square().mean())

    assert error(fake_quantize(w, form) + branch) < error(fake_quantize(w, form))
    assert error(fake_quantize(w + branch, form)) > error(fake_quantize(w, form)) * 0.95


# -- the map -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [0, 1, 5])  # one pair: the published code squeezes its axis away
def test_as_many_channels_again(merged: int) -> None:
    x, w = rows(), np.random.default_rng(1).normal(size=(7, WIDTH))
    split = np.ones(WIDTH, np.int64)
    split[3] += merged
    pairs = Matching.of(x, w).pairs(split == 1, merged)
    assert pairs is not None
    assert pairs.shape == (merged, 2)
    change = assembled(split, pairs)
    assert len(change.sizes) == WIDTH
    assert change.sizes.sum() == len(change.index) == WIDTH + merged
    assert (np.diff(change.sizes) <= 0).all()
    assert np.bincount(change.index, minlength=WIDTH).tolist() == split.tolist()
    assert 3 not in pairs
    assert change.activations(x).shape == x.shape
    assert change.columns(w).shape == w.shape


def test_a_split_alone_is_exact() -> None:
    x, w = rows().astype(np.float64), np.random.default_rng(1).normal(size=(7, WIDTH))
    split = np.ones(WIDTH, np.int64)
    split[[3, 10]] = 4, 2
    change = assembled(split, np.zeros((0, 2), np.int64))
    assert change.activations(x) @ change.columns(w).T == pytest.approx(x @ w.T, rel=1e-12)


def test_groups_take_means_and_sums() -> None:
    change = assembled(np.array([1, 1, 3, 1, 1]), np.array([[0, 1], [4, 1]]))
    x, w = np.arange(5.0)[None] + 1, np.arange(5.0)[None] * 10 + 10
    assert change.sizes.tolist() == [3, 1, 1, 1, 1]
    assert change.index.tolist() == [1, 0, 4, 2, 2, 2, 3]
    assert change.activations(x)[0] == pytest.approx([(2 + 1 + 5) / 3, 1, 1, 1, 4])
    assert change.columns(w)[0].tolist() == [20 + 10 + 50, 30, 30, 30, 40]


def test_the_error_of_pairs_is_the_sum_of_theirs_where_they_are_apart() -> None:
    """Disjoint pairs with rows of orthogonal parts: no cross terms."""
    x = np.eye(6)
    w = np.random.default_rng(0).normal(size=(4, 6))
    change = assembled(np.ones(6, np.int64), np.array([[0, 1], [2, 3]]))
    error = ((change.activations(x) @ change.columns(w).T - x @ w.T) ** 2).sum()
    found = merge_errors(x, w, np.array([0, 2]), np.array([1, 3]))
    assert error == pytest.approx(found[0, 0] + found[1, 1])


def test_too_few_free_channels() -> None:
    matching = Matching.of(rows(), np.ones((2, WIDTH)))
    free = np.zeros(WIDTH, np.bool_)
    free[:4] = True
    assert matching.pairs(free, 3) is None
    assert matching.pairs(free, 2) is not None


def test_behind_a_split_it_is_the_same_map() -> None:
    x = rows().astype(np.float64)
    split = np.ones(WIDTH, np.int64)
    split[[3, 10]] = 3, 2
    pairs = Matching.of(x, np.random.default_rng(2).normal(size=(5, WIDTH))).pairs(split == 1, 3)
    assert pairs is not None
    change = assembled(split, pairs)
    wide = np.repeat(x / split, split, axis=1)
    assert change.behind_split().activations(wide) == pytest.approx(change.activations(x), rel=1e-12)
    assert change.behind_split().weights.tolist().count(0.5) == 6


# -- the choice --------------------------------------------------------------------------------------


def block_error(
    graph: Graph, weights: str | None = "int4:channel", activations: str | None = "int4:token"
) -> BlockError:
    value = graph.values["rms_norm"]
    readers = [n for n in value.users if n.op.name == "linear"]
    formats = [None if f is None else Format.parse(f, "token") for f in (weights, activations)]
    samples = torch.from_numpy(stats_of(graph).of("rms_norm").samples).float()
    return BlockError(row_block(readers, positions(graph)), samples, *formats)


def test_the_block_ends_where_rows_meet() -> None:
    error = block_error(model())
    assert [n.op.name for n in error.block.nodes] == ["silu", "mul"]
    assert [v.name for v in error.block.ends] == ["mul"]
    expected = evaluate(model(), {"x": torch.from_numpy(rows(0, 1.0))}, observe=None)["linear_2"]
    assert expected.shape == (128, 8)
    assert block_error(model(), None, None).of(None) == 0.0


def test_the_threshold_has_the_least_error_of_those_tried() -> None:
    graph = model()
    error = block_error(graph)
    record = stats_of(graph).of("rms_norm")
    weights = np.concatenate([w.numpy() for w in error.block.weights()])
    matching = Matching.of(record.samples, weights)
    found = choose_reassembly(record.largest, matching, error, 0.25, 12)
    assert found is not None
    change, theta, after = found
    assert after == error.of(change) < error.of(None)
    assert (record.largest / change.counts).max() == pytest.approx(theta)
    assert choose_reassembly(record.largest, matching, block_error(graph, None, None), 0.25, 12) is None
    assert choose_reassembly(record.largest, matching, error, 0.0, 12) is None


# -- the pass ----------------------------------------------------------------------------------------


def test_one_op_behind_a_norm() -> None:
    graph = model()
    after, report = run(graph, "reassemble-channels{activations=int4:tensor}")
    assert counts(after) == {**counts(graph), "reassemble": len(report.applied)}
    (node,) = (n for n in after.nodes if n.op.name == "reassemble" and n.operands[0].name == "rms_norm")  # type: ignore[union-attr]
    assert [u.op.name for u in node.result.users] == ["linear", "linear"]
    assert node.result.shape == graph.values["rms_norm"].shape
    assert after.values["gate"].shape == graph.values["gate"].shape
    figures = report.figures["rms_norm"]
    assert figures["error_after"] < 0.7 * figures["error_before"]
    assert figures["error_unrounded"] < figures["error_after"]
    assert report.inserted == len(report.applied)
    assert "error of the block" in report.applied[0]


def test_the_error_reported_is_that_of_the_graph() -> None:
    graph = model()
    stats = stats_of(graph)
    after, report = run(graph, "reassemble-channels{weights=none activations=int4:tensor rows=4096}", stats)
    inputs = {"x": torch.from_numpy(np.concatenate([rows(s, 1.0) for s in range(2)]))}
    before, now = (observed(g, inputs) for g in (graph, after))
    error = float((now["mul"] - before["mul"]).square().sum() / before["mul"].square().sum())
    assert report.figures["rms_norm"]["error_unrounded"] == pytest.approx(error, rel=0.02)


def observed(graph: Graph, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    evaluate(graph, inputs, observe=lambda value, data: seen.__setitem__(value.name, data))
    return seen


def test_folded_where_a_linear_alone_makes_the_channels() -> None:
    graph = model(norm=False)
    after, report = run(graph, "reassemble-channels{ratio=0.25}")
    assert counts(after)["linear"] == counts(graph)["linear"]
    assert report.figures["linear"]["form"] == "folded"
    made = [n for n in after.nodes if n.op.name == "reassemble"]
    assert all(n.operands[0] is not after.values["linear"] for n in made)
    there, _ = run(graph, "reassemble-channels{ratio=0.25 fold=none}")
    inputs = {"x": torch.from_numpy(rows(5, 1.0)).double()}
    one, two = (evaluate(g, inputs, torch.float64)["linear_3"] for g in (after, there))
    assert torch.allclose(one, two, rtol=1e-9)


def test_splits_in_rows_and_the_rest_at_run_time() -> None:
    b = Build()
    x = b.input("x", f"f32[n, {WIDTH}]")
    up = np.repeat(b.rng.normal(size=(WIDTH // 2, WIDTH)), 2, axis=0)
    up[[3, 10]] *= 30
    product = b(
        "mul",
        b("sigmoid", b("linear", x, b.random(WIDTH, WIDTH, name="gate"))),
        b("linear", x, b.constant(up, name="up")),
    )
    graph = b.output(b("linear", product, b.random(8, WIDTH, name="down")))
    rows_, report = run(graph, "reassemble-channels{fold=rows}")
    assert report.figures["mul"]["form"] == "splits in rows, run time"
    plain, _ = run(graph, "reassemble-channels")
    added = report.figures["mul"]["added"]
    assert rows_.values["up"].shape == rows_.values["gate"].shape == (WIDTH + added, WIDTH)
    assert plain.values["up"].shape == (WIDTH, WIDTH)
    inputs = {"x": torch.from_numpy(rows(5, 1.0)).double()}
    one, two = (evaluate(g, inputs, torch.float64) for g in (rows_, plain))
    assert all(torch.allclose(one[k], two[k], rtol=1e-9) for k in one)


def test_statistics_follow() -> None:
    graph = model()
    batches = [{"x": rows(seed, 1.0)} for seed in range(2)]
    context = Context(stats=collect(graph, batches))
    ReassembleChannels(activations="int4:tensor").run(graph, context)
    now = collect(graph, batches)
    assert context.stats is not None
    held, measured = context.stats.of("rms_norm.reassembled"), now.of("rms_norm.reassembled")
    assert held.samples.shape == measured.samples.shape
    assert (held.maximum >= measured.maximum - 1e-4).all()
    assert (held.minimum <= measured.minimum + 1e-4).all()
    assert held.mean_square == pytest.approx(measured.mean_square, rel=1e-3)


def test_second_run_finds_nothing_left() -> None:
    graph = model()
    _, report = run(graph, "reassemble-channels,reassemble-channels")
    assert report.applied == []
    assert len(report.declined["its channels were reassembled or split before"]) >= 1
    _, report = run(model(norm=False), "reassemble-channels{ratio=0.25},reassemble-channels{ratio=0.25}")
    assert report.applied == []


def test_refusals() -> None:
    graph = model(loud=1.0)
    _, report = run(graph, "reassemble-channels{ratio=0.01}")
    assert report.declined["ratio of its channels is less than one channel"] == ["rms_norm %rms_norm", "mul %mul"]
    _, report = run(graph, "reassemble-channels{weights=none activations=none}")
    assert report.declined["no threshold makes the error of its block smaller"] == ["rms_norm %rms_norm", "mul %mul"]
    _, report = run(graph, "reassemble-channels", Stats())
    assert report.misses == ["no linear with a constant weight reads a value that has statistics"]
    b = Build()
    h = b("rms_norm", b.input("x", f"f32[n, {WIDTH}]"), b.constant(np.linspace(1, 50, WIDTH), name="gain"))
    shared = b.random(WIDTH, WIDTH, name="w")
    graph = b.output(b("linear", b("rms_norm", b("linear", h, shared)), shared))
    _, report = run(graph, "reassemble-channels")
    assert report.declined["a weight has other readers: it would be copied"][0] == "rms_norm %rms_norm"
    for text, message in (
        ("weights=int4:spilt3", "^pass 'reassemble-channels': option 'weights': format 'int4:spilt3'"),
        ("weights=int4:token", "option 'weights': int4:token: a weight has no tokens"),
        ("weights=int4:spilt3", "suffix 'spilt3' is unknown"),
        ("weights=uint2:g64:split3", "option 'weights': expected a format without clusters"),
        ("ratio=0.6", "option 'ratio': expected a number from 0 to 0.5"),
    ):
        with pytest.raises(PlanishError, match=message):
            Pipeline(f"reassemble-channels{{{text}}}")


def test_linears_that_stay_in_float_read_what_they_read() -> None:
    graph = model()
    keep_float(graph, graph.values["linear"])
    after, report = run(graph, "reassemble-channels")
    assert "rms_norm" in report.figures
    assert after.values["linear"].producer.operands[0].name == "rms_norm"  # type: ignore[union-attr]
    assert after.values["linear_1"].producer.operands[0].name == "rms_norm.reassembled"  # type: ignore[union-attr]


def test_rounded_outputs_are_closer() -> None:
    """W4A4 by fake rounding of what linears read: the error falls with the pass."""
    graph = decoder()
    rng = np.random.default_rng(0)
    batches = [{"ids": rng.integers(0, VOCABULARY, (3, TOKENS))} for _ in range(4)]
    _, report = run(graph, "reassemble-channels{activations=int4:tensor}", collect(graph, batches))
    assert report.applied
    for figures in report.figures.values():
        assert figures["error_after"] < figures["error_before"]


def test_golden(update_golden: bool) -> None:
    b = Build()
    h = b("layer_norm", b.input("x", "f32[n, 6]"), b.constant([1.0, 1.0, 9.0, 1.0, 1.0, 1.0], name="gain"))
    weight = np.array([[1.0, 2.0, 0.1, 1.0, 1.0, 1.5], [0.5, -1.0, 0.1, 2.0, 2.0, 1.0]])
    before = b.output(b("linear", h, b.constant(weight, name="w")))
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(64, 3)), 2, axis=1).astype(np.float32)
    stats = collect(before, [{"x": x}])
    after, report = run(before, "reassemble-channels{ratio=0.34 weights=none activations=int4:tensor}", stats)
    assert len(report.applied) == 1
    golden("reassemble-channels", before, after, update_golden)
