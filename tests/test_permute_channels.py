"""permute-channels: orders, their measures, exactness on every kind of space, refusals, teeth."""

from __future__ import annotations

import numpy as np
import pytest
from channel_blocks import BLOCKS, calibration, rotary
from encoder_blocks import BLOCKS as ENCODERS
from encoder_blocks import linear, pre_norm, statistics
from helpers import check_text
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import TOLERANCE, Build, counts, golden

from planish.calibrate.collect import collect
from planish.ir import absorb
from planish.ir.errors import PlanishError, ValidationError
from planish.ir.graph import Graph
from planish.ir.ops.base import Act
from planish.ir.spaces import analyse
from planish.ir.transform import Permute
from planish.passes.base import PassReport
from planish.passes.channels import kind_of, positions
from planish.passes.manager import Pipeline
from planish.passes.orders import (
    choose_order,
    group_by_range,
    group_widths,
    imbalance,
    mean_group_range,
    zigzag,
)

METHODS = ("sort", "zigzag", "k-sort", "group-by-range")
ALL = {**ENCODERS, **BLOCKS}


def run(graph: Graph, pipeline: str, stats=None) -> tuple[Graph, PassReport]:
    after, report = Pipeline(pipeline).run(graph, stats=stats)
    assert report.validated
    check_text(after)
    return after, report.passes[-1]


# -- orders ----------------------------------------------------------------------------------------

seeds = st.integers(0, 10_000)


def extremes(seed: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.normal(0, 3, (2, channels)) * rng.lognormal(0, 1, channels), axis=0)
    return ends[0], ends[1]


@given(seeds, st.integers(1, 40), st.integers(1, 9), st.sampled_from(METHODS), st.integers(1, 4))
def test_an_order_is_a_permutation_within_blocks(seed: int, channels: int, group: int, method: str, parts: int) -> None:
    labels = np.random.default_rng(seed).integers(0, parts, channels)
    blocks = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    order = choose_order(*extremes(seed, channels), blocks, group, method)
    assert (np.sort(order) == np.arange(channels)).all()
    assert (labels[order] == labels).all()


@given(seeds, st.integers(2, 40), st.integers(1, 9))
def test_sorting_is_best_for_symmetric_ranges(seed: int, channels: int, group: int) -> None:
    """Of all orders, one by magnitude has the least sum of group ranges."""
    rng = np.random.default_rng(seed)
    size = rng.lognormal(0, 1, channels)
    whole = [np.arange(channels)]
    order = choose_order(-size, size, whole, group, "sort")
    least = mean_group_range(-size[order], size[order], whole, group)
    for _ in range(8):
        other = rng.permutation(channels)
        assert least <= mean_group_range(-size[other], size[other], whole, group) * (1 + 1e-12)
    assert (np.diff(size[order]) <= 0).all()


@given(seeds, st.integers(2, 40), st.integers(1, 9))
def test_group_by_range_is_never_worse(seed: int, channels: int, group: int) -> None:
    low, high = extremes(seed, channels)
    order = group_by_range(low, high, group)
    for other in (np.arange(channels), np.argsort(low), np.argsort(high)):
        cost = group_widths(low[order], high[order], group).sum()
        assert cost <= group_widths(low[other], high[other], group).sum() * (1 + 1e-12)


def test_group_by_range_finds_planted_groups() -> None:
    """Two kinds of channels, [-1, 0] and [9, 10], interleaved: two groups of width 1."""
    low = np.array([-1.0, 9.0] * 4)
    order = group_by_range(low, low + 1.0, 4)
    assert group_widths(low[order], low[order] + 1.0, 4).tolist() == [1.0, 1.0]


def test_zigzag_deals_there_and_back() -> None:
    size = np.array([1.0, 5.0, 3.0, 8.0, 2.0, 7.0, 4.0, 6.0])
    order = zigzag(-size, size, 4)
    assert size[order].tolist() == [8.0, 5.0, 4.0, 1.0, 7.0, 6.0, 3.0, 2.0]


@given(seeds, st.integers(2, 6), st.integers(2, 8))
def test_zigzag_puts_the_largest_apart(seed: int, blocks: int, group: int) -> None:
    """The largest `blocks` channels lie in a block each, and no sum differs by more than the range of magnitudes."""
    size = np.random.default_rng(seed).lognormal(0, 1, blocks * group)
    dealt = size[zigzag(-size, size, group)].reshape(blocks, group)
    assert sorted(dealt.max(1)) == sorted(np.sort(size)[-blocks:])
    assert np.ptp(dealt.sum(1)) <= np.ptp(size) * (1 + 1e-12)


def test_measures() -> None:
    low, high = np.array([-1.0, -2.0, 0.0, -4.0]), np.array([1.0, 2.0, 3.0, 4.0])
    whole = [np.arange(4)]
    assert mean_group_range(low, high, whole, 2) == (4.0 + 8.0) / 2
    assert mean_group_range(low, high, whole, 3) == (5.0 + 8.0) / 2
    assert mean_group_range(low, high, [np.array([0, 1, 2]), np.array([3])], 3) == (5.0 + 8.0) / 2
    assert imbalance(low, high, whole, 2) == 3.5 / 2.5
    assert imbalance(np.zeros(4), np.zeros(4), whole, 2) == 1.0


# -- the pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ALL)
def test_exact(kind: str, method: str, calibrated: bool) -> None:
    graph = ALL[kind]()
    stats = collect(graph, calibration(graph)) if calibrated else None
    after, report = run(graph, f"permute-channels{{method={method} group=2}}", stats)
    assert counts(after) == counts(graph)
    assert report.inserted == 0
    assert len(report.applied) == len(report.figures)
    assert report.error is None or report.error <= TOLERANCE
    measure = "imbalance" if method == "zigzag" else "group_range"
    for figures in report.figures.values():
        assert figures[f"{measure}_after"] < figures[f"{measure}_before"]
    if method != "k-sort":
        assert report.applied


@settings(max_examples=10)
@given(seeds, st.sampled_from(sorted(ALL)), st.sampled_from(METHODS), st.integers(2, 5))
def test_exact_for_any_block(seed: int, kind: str, method: str, group: int) -> None:
    _, report = run(ALL[kind](seed), f"permute-channels{{method={method} group={group}}}")
    assert report.error is None or report.error <= TOLERANCE


@pytest.mark.parametrize("method", METHODS)
def test_a_second_run_finds_nothing_better(method: str) -> None:
    text = f"permute-channels{{method={method} group=2}}"
    once, _ = run(rotary(), text)
    again, report = run(once, text)
    assert again == once
    assert report.applied == []
    assert "no better order was found" in report.declined


def test_the_measure_is_what_calibration_finds() -> None:
    """Calibrated anew, the hidden channels are sorted by range."""
    graph = pre_norm()
    after, report = run(graph, "permute-channels{space=hidden group=2}", statistics(graph))
    (name,) = report.figures
    largest = statistics(after).of("gelu").largest
    assert (np.diff(largest) <= 1e-6).all()
    assert report.figures[name]["kind"] == "hidden"


def kinds(graph: Graph) -> list[str]:
    place = positions(graph)
    return sorted({kind_of(s, place) for s in analyse(graph).admitted(Act.PERMUTE)})


def test_kinds_follow_from_structure() -> None:
    assert kinds(pre_norm()) == ["hidden", "key", "residual", "value"]
    assert kinds(rotary()) == ["hidden", "key", "residual", "value"]
    assert kinds(BLOCKS["convolutions"]()) == ["hidden"]
    b = Build()
    x = linear(b, b.input("x", "f32[n, 8]"), 8, "first")
    two = b("add", linear(b, x, 8, "a"), linear(b, x, 8, "b"))  # a sum, and no residual stream
    assert kinds(b.output(linear(b, two, 8, "last"))) == ["hidden"]


def test_kinds_of_attention_that_is_spelled_out() -> None:
    b = Build()
    x = linear(b, b.input("x", "f32[n, 5, 8]"), 8, "first")
    q, k, v = (linear(b, x, 8, name) for name in "qkv")
    weights = b("softmax", b("matmul", q, b("transpose", k, perm=(0, 2, 1))), axis=2)
    graph = b.output(linear(b, b("matmul", weights, v), 8, "o"))
    assert kinds(graph) == ["hidden", "key", "value"]


@pytest.mark.parametrize("space", ["residual", "hidden", "key", "value"])
def test_one_kind_of_space(space: str) -> None:
    graph = rotary()
    _, report = run(graph, f"permute-channels{{method=zigzag space={space} group=2}}")
    assert {f["kind"] for f in report.figures.values()} == {space}


@pytest.mark.parametrize("interleaved", [False, True])
def test_k_sort_orders_pairs_by_the_norms_of_key_rows(interleaved: bool) -> None:
    """After K-sort the pair norms r_j^2 + r_partner^2 fall, over all heads that share a table of angles."""
    graph = rotary(3, queries=2, keys=1, interleaved=interleaved)
    after, report = run(graph, f"permute-channels{{method=k-sort group={4 if interleaved else 2}}}")

    def pairs(g: Graph) -> np.ndarray:
        rows = np.square(g.values["layers.0.k.weight"].constant.wide()).sum(1)
        return rows.reshape(4, 2).sum(1) if interleaved else rows.reshape(2, 4).sum(0)

    assert len(report.applied) == 1
    assert not (np.diff(pairs(graph)) <= 0).all()
    assert (np.diff(pairs(after)) <= 0).all()
    rope = next(n for n in after.nodes if n.op.name == "rope")
    assert not np.array_equal(rope.operands[1].constant.wide(), graph.values["cos"].constant.wide())


@pytest.mark.parametrize("interleaved", [False, True])
def test_k_sort_with_tables_per_head(interleaved: bool) -> None:
    """Each key head gets an order of its own, the query heads of its group follow, and the tables grow."""
    graph = rotary(0, queries=4, keys=2, interleaved=interleaved)
    group = 4 if interleaved else 2
    after, report = run(graph, f"permute-channels{{method=k-sort tables=head group={group}}}")

    def pairs(g: Graph) -> np.ndarray:
        rows = np.square(g.values["layers.0.k.weight"].constant.wide()).sum(1).reshape(2, 8)
        return rows.reshape(2, 4, 2).sum(2) if interleaved else rows.reshape(2, 2, 4).sum(1)

    assert not (np.diff(pairs(graph)) <= 0).all()
    assert (np.diff(pairs(after)) <= 0).all()
    shapes = [n.operands[1].shape for n in after.nodes if n.op.name == "rope"]
    assert sorted(s[-3] for s in shapes) == [2, 4]
    old = graph.values["cos"].constant.nbytes
    assert report.notes[0] == f"2 rotary embeddings got tables per head: {2 * (2 + 4 - 2) * old} bytes more"
    _, second = run(after, f"permute-channels{{method=k-sort tables=head group={group}}}")
    assert second.applied == []
    assert second.notes == ["0 rotary embeddings got tables per head: 0 bytes more"]


def test_k_sort_by_the_gain_of_a_norm_on_the_keys() -> None:
    graph = rotary(1, gains=True)
    after, _ = run(graph, "permute-channels{method=k-sort group=2}")
    gain = np.square(after.values["layers.0.k.gain"].constant.wide()).reshape(2, 4).sum(0)
    assert (np.diff(gain) <= 0).all()


def test_heads_never_mix() -> None:
    graph = pre_norm()
    after, report = run(graph, "permute-channels{space=value group=2}", statistics(graph))
    assert report.applied
    before, now = (g.values["o.weight"].constant.wide() for g in (graph, after))
    for head in (slice(0, 4), slice(4, 8)):
        rows = {tuple(column) for column in before[:, head].T.tolist()}
        assert rows == {tuple(column) for column in now[:, head].T.tolist()}


def test_embeddings_take_part() -> None:
    b = Build()
    e = b("embedding", b.constant(np.array([[1.0, 9.0, 2.0, 8.0]], np.float32), name="table"), b.input("i", "i64[n]"))
    graph = b.output(b("linear", e, b.random(3, 4)))
    after, report = run(graph, "permute-channels{group=2}")
    assert after.values["table"].constant.wide().tolist() == [[9.0, 8.0, 2.0, 1.0]]
    assert report.applied == ["%embedding: 4 hidden channels, mean group range 17 -> 11"]


def test_golden(update_golden: bool) -> None:
    b = Build()
    up = b.constant(np.array([[1.0, 0.0], [0.0, 8.0], [2.0, 0.0], [0.0, -4.0]], np.float32), name="up")
    h = b("relu", b("linear", b.input("x", "f32[n, 2]"), up, b.constant([1.0, 2.0, 3.0, 4.0], name="bias")))
    before = b.output(b("linear", h, b.constant(np.array([[1.0, 2.0, 3.0, 4.0]], np.float32), name="down")))
    after, report = run(before, "permute-channels{group=2}")
    assert report.applied == ["%linear: 4 hidden channels, mean group range 12 -> 10"]
    golden("permute-channels", before, after, update_golden)


def test_same_seed_same_bytes() -> None:
    texts = [str(run(rotary(), "permute-channels{method=group-by-range group=2}")[0]) for _ in range(2)]
    assert texts[0] == texts[1]


# -- refusals --------------------------------------------------------------------------------------


def test_refusals() -> None:
    graph = rotary()
    _, report = run(graph, "permute-channels")
    assert report.applied == []
    assert report.declined["its channels are one group: no order changes it"]
    assert report.declined["graph input"] == ["x"]
    assert report.declined["graph output"] == ["linear_20"]


def test_nothing_to_permute() -> None:
    b = Build()
    graph = b.output(b("relu", b.input("x", "f32[n, 4]")))
    assert run(graph, "permute-channels")[1].misses == ["no space of channels that constants write or read"]
    text = "permute-channels{method=k-sort}"
    assert run(graph, text)[1].misses == ["no space of key channels that constants write or read"]
    text = "permute-channels{space=value}"
    assert run(graph, text)[1].misses == ["no space of value channels that constants write or read"]


def test_weights_of_zeros() -> None:
    b = Build()
    h = b("linear", b("linear", b.input("x", "f32[n, 2]"), np.zeros((4, 2), "f4")), np.zeros((2, 4), "f4"))
    _, report = run(b.output(h), "permute-channels{group=2}")
    assert "no statistics and no weights say which channels are alike" in report.declined


def test_a_group_of_nothing() -> None:
    wanted = r"^pass 'permute-channels': option 'group': expected an integer of at least 1; got 0$"
    with pytest.raises(PlanishError, match=wanted):
        Pipeline("permute-channels{group=0}").run(rotary())


# -- teeth -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["forgotten bias", "readers stay", "inverse"])
def test_the_validator_rejects_a_wrong_order(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    true = absorb._applied

    def applied(member, data, transform):
        if wrong == "forgotten bias" and data.ndim == 1:
            return data
        if wrong == "readers stay" and member.variance < 0:
            return data
        if wrong == "inverse" and member.variance < 0:
            transform = Permute(np.argsort(transform.order))
        return true(member, data, transform)

    monkeypatch.setattr(absorb, "_applied", applied)
    with pytest.raises(ValidationError, match=r"^pass 'permute-channels': changed the function"):
        Pipeline("permute-channels{group=2}").run(pre_norm())
