"""Scaling channels: every method, the invariants of its choice, exactness, refusals, and the oracle's teeth."""

from __future__ import annotations

import numpy as np
import pytest
from channel_blocks import BLOCKS as CHANNELS
from channel_blocks import calibration
from encoder_blocks import BLOCKS, linear, norm, outliers, pre_norm, record, statistics
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
from planish.ir.stats import Stats
from planish.ir.transform import Scale
from planish.passes.base import PassReport
from planish.passes.channels import key_side
from planish.passes.manager import Pipeline
from planish.passes.scale_channels import ScaleChannels
from planish.passes.scales import balance_scale, percentile_scale, smoothquant_scale, threshold_scale
from planish.passes.shift_channels import choose_shift
from planish.passes.sites import dual_site_of, grouped_matrix

METHODS = ("search", "smoothquant", "os-plus", "percentile", "outliertune")


def run(graph: Graph, stats: Stats, pipeline: str = "scale-channels") -> tuple[Graph, PassReport]:
    after, report = Pipeline(pipeline).run(graph, stats=stats)
    assert report.validated
    check_text(after)
    return after, report.passes[-1]


# -- the choice (methods/a.md, 1 to 3) -------------------------------------------------------------

seeds = st.integers(0, 10_000)


def ranges(seed: int, channels: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """(max |x|, max |w|) of each channel."""
    rng = np.random.default_rng(seed)
    return rng.lognormal(0, 2, channels), rng.lognormal(-1, 1, channels)


@given(seeds)
def test_smoothquant_at_both_ends(seed: int) -> None:
    """alpha 0: s = 1 / max |w|. alpha 1: every channel of the activation has the range 1."""
    largest, weight = ranges(seed)
    assert np.allclose(smoothquant_scale(largest, weight, 0.0), 1.0 / weight, rtol=1e-12)
    assert np.allclose(largest / smoothquant_scale(largest, weight, 1.0), 1.0, rtol=1e-12)


@given(seeds)
def test_smoothquant_in_the_middle(seed: int) -> None:
    """alpha 1/2 shares alike: afterwards both sides of a channel have the same range."""
    largest, weight = ranges(seed)
    s = smoothquant_scale(largest, weight, 0.5)
    assert np.allclose(largest / s, weight * s, rtol=1e-12)


def test_smoothquant_of_nothing() -> None:
    """Channels of zeros, on either side, have a finite positive factor."""
    for alpha in (0.0, 0.5, 1.0):
        s = smoothquant_scale(np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0]), alpha)
        assert (s > 0).all() and np.isfinite(s).all()


@given(seeds, st.floats(0.01, 1.0))
def test_threshold(seed: int, fraction: float) -> None:
    """After OS+ max |x| <= t; channels within the threshold stay as they are, and no channel grows."""
    largest, _ = ranges(seed)
    t = float(largest.max()) * fraction
    s = threshold_scale(largest, t)
    assert (largest / s <= t * (1 + 1e-12)).all()
    assert (s[largest <= t] == 1.0).all()
    assert (s >= 1.0).all()


@given(seeds, st.integers(1, 400))
def test_percentile(seed: int, channels: int) -> None:
    """k = int(.005 n + 1.5): the channels above the k-th largest come down to it."""
    largest, _ = ranges(seed, channels)
    s = percentile_scale(largest)
    k = int(0.005 * channels + 1.5)
    base = np.sort(largest)[-k]
    assert np.allclose((largest / s).max(), base, rtol=1e-12)
    assert (s > 1).sum() == k - 1
    assert (s >= 1).all()


# -- the toy comparison (methods/a.md, 1) ------------------------------------------------------------


def error(x: np.ndarray, w: np.ndarray, s: np.ndarray | float = 1.0) -> float:
    """The squared error of x W^T with x / s in uint8 (one range) and W s in int8 (one scale per row)."""
    low, high = min(float((x / s).min()), 0.0), max(float((x / s).max()), 0.0)
    step = (high - low) / 255.0
    zero = np.round(-low / step)
    codes = np.clip(np.round(x / s / step) + zero, 0, 255) - zero
    scale = np.abs(w * s).max(1, keepdims=True) / 127.0
    got = (codes * step) @ (np.round(w * s / scale) * scale).T
    return float(((got - x @ w.T) ** 2).sum())


def test_the_direction_of_the_methods() -> None:
    """Asymmetric outliers, W8A8: nothing > a shift > smoothquant; OS+ (shift and threshold) beats them all."""
    rng = np.random.default_rng(0)
    x, w = outliers(rng).astype(np.float64), rng.normal(size=(32, 64))
    shifted = x + choose_shift(x.min(0), x.max(0))
    weight = np.abs(w).max(0)

    def smooth(samples: np.ndarray) -> float:
        return error(samples, w, smoothquant_scale(np.abs(samples).max(0), weight, 0.5))

    nothing, shift = error(x, w), error(shifted, w)
    largest = np.abs(shifted).max(0)
    os_plus = min(error(shifted, w, threshold_scale(largest, t)) for t in np.linspace(largest.max(), 1.0, 100))
    assert nothing > shift > os_plus
    assert nothing > smooth(x) > smooth(shifted) > os_plus
    assert os_plus < nothing / 10


# -- the pass ------------------------------------------------------------------------------------


@pytest.mark.parametrize("insert", ["false", "true"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_exact(kind: str, method: str, insert: str) -> None:
    graph = BLOCKS[kind]()
    after, report = run(graph, statistics(graph), f"scale-channels{{method={method} insert={insert}}}")
    assert report.error is not None and report.error <= TOLERANCE
    assert report.applied and len(report.applied) == len(report.figures)
    extra = counts(after).get("mul", 0)
    assert extra == report.inserted == sum(f["inserted"] for f in report.figures.values())
    assert {n: c for n, c in counts(after).items() if n != "mul"} == counts(graph)
    assert extra == 0 or insert == "true"
    if method in ("search", "smoothquant") and insert == "true":
        assert extra > 0


@settings(max_examples=10)
@given(seeds, st.sampled_from(sorted(BLOCKS)), st.sampled_from(METHODS), st.booleans())
def test_exact_for_any_block(seed: int, kind: str, method: str, insert: bool) -> None:
    graph = BLOCKS[kind](seed)
    stats = statistics(graph, seed)
    _, report = run(graph, stats, f"shift-channels,scale-channels{{method={method} insert={str(insert).lower()}}}")
    assert report.error is None or report.error <= TOLERANCE


@pytest.mark.parametrize("method", ["search", "os-plus"])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_a_search_never_makes_it_worse(method: str, granularity: str) -> None:
    graph = pre_norm()
    pipeline = f"scale-channels{{method={method} granularity={granularity} insert=true}}"
    _, report = run(graph, statistics(graph), pipeline)
    assert report.figures
    for figures in report.figures.values():
        assert figures["error_after"] < figures["error_before"]


def test_the_search_is_at_least_as_good_as_each_method() -> None:
    graph = pre_norm()
    stats = statistics(graph)
    errors = {m: run(graph, stats, f"scale-channels{{method={m}}}")[1].figures for m in METHODS}
    for name, found in errors["search"].items():
        for method in ("smoothquant", "os-plus"):
            if name in errors[method] and errors[method][name]["error_before"] == found["error_before"]:
                assert found["error_after"] <= errors[method][name]["error_after"] * (1 + 1e-6)


@pytest.mark.parametrize("method", ["smoothquant", "percentile", "outliertune"])
def test_what_is_read_has_the_promised_range(method: str) -> None:
    """Calibrated anew, the norms' results have the ranges of the method's formula."""
    graph = pre_norm()
    stats = statistics(graph)
    after, report = run(graph, stats, f"scale-channels{{method={method}}}")
    again = statistics(after)
    for name in report.figures:
        largest = again.of(name).largest
        if method == "outliertune":
            assert np.allclose(largest, 1.0, rtol=1e-3)
        elif method == "percentile":
            assert np.allclose(largest.max(), np.sort(stats.of(name).largest)[-1], rtol=1e-3)
        else:
            weights = [n.operands[1] for n in after.values[name].users if n.op.name == "linear"]
            if not weights:  # queries
                continue
            (weight, *others) = weights
            if not others:  # the rows of v.weight have taken up the scale of another site since
                assert np.allclose(largest, np.abs(weight.constant.wide()).max(0), rtol=1e-3)


def test_the_statistics_follow() -> None:
    from planish.passes.base import Context

    graph = pre_norm()
    context = Context(statistics(graph))
    ScaleChannels(method="smoothquant").run(graph, context)
    again = statistics(graph)
    assert context.stats is not None
    for name in context.stats:
        for part in ("minimum", "maximum", "mean_square", "samples"):
            got, expected = getattr(context.stats.of(name), part), getattr(again.of(name), part)
            assert np.allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()), (name, part)


def test_a_second_smoothquant_changes_nothing() -> None:
    """The factors of an evened-out site are 1."""
    graph = pre_norm()
    text = "scale-channels{method=smoothquant}"
    once, _ = run(graph, statistics(graph), text)
    twice, _ = run(graph, statistics(graph), f"{text},{text}")
    one, two = (g.values["norm2.gain"].constant.wide() for g in (once, twice))
    assert np.allclose(one, two, rtol=1e-5)  # norm1's readers have taken up the scale of the values since


def test_a_second_search_improves_or_says_why_not() -> None:
    graph = pre_norm()
    _, report = Pipeline(",".join(["scale-channels"] * 4)).run(graph, stats=statistics(graph))
    for done in report.passes[1:]:
        assert all(f["error_after"] < f["error_before"] for f in done.figures.values())
        refused = done.declined.get("no candidate beats leaving it alone", [])
        assert len(done.applied) + len(refused) == len(report.passes[0].applied)


def test_same_seed_same_bytes() -> None:
    graph = pre_norm()
    stats = statistics(graph)
    texts = [str(run(graph, stats, "scale-channels{insert=true}")[0]) for _ in range(2)]
    assert texts[0] == texts[1]


def small() -> Graph:
    b = Build()
    x = b.input("x", "f32[b, 2]")
    normed = b("rms_norm", x, b.constant([8.0, 2.0], name="gain"))
    return b.output(b("linear", normed, b.constant([[1.0, 2.0], [3.0, -4.0]], name="weight")))


def test_golden(update_golden: bool) -> None:
    before = small()
    stats = Stats({"rms_norm": record([[8.0, -1.0], [-4.0, 2.0]])})
    after, report = run(before, stats, "scale-channels{method=outliertune}")
    assert report.figures["rms_norm"]["choice"] == "outliertune"
    golden("scale-channels", before, after, update_golden)


# -- refusals ------------------------------------------------------------------------------------


def test_blocked_spaces_name_what_blocks() -> None:
    graph = pre_norm()
    _, report = run(graph, statistics(graph))
    assert report.declined["graph input"] == ["x"]
    assert report.declined["its result is not proportional to its operand"] == ["gelu %gelu"]
    assert report.declined["it divides by the scale of its input"] == ["layer_norm %layer_norm"]


def test_no_candidate_helps() -> None:
    """Powers of two in one range: 8 bits hold them exactly."""
    b = Build()
    normed = b("rms_norm", b.input("x", "f32[b, 2]"), b.constant([1.0, 1.0]))
    before = b.output(b("linear", normed, b.constant([[127.0, 127.0]], name="weight")))
    stats = Stats({"rms_norm": record([[0.0, 0.0], [255.0, 255.0]])})
    for method in ("os-plus", "search"):
        after, report = run(before, stats, f"scale-channels{{method={method}}}")
        assert after == before
        assert dict(report.declined) == {"no candidate beats leaving it alone": ["linear %linear"]}


def test_an_op_must_be_worth_it() -> None:
    graph = pre_norm()
    _, report = run(graph, statistics(graph), "scale-channels{insert=true min-gain=1}")
    assert report.inserted == 0
    assert "an explicit op would not be worth it" in report.declined


def test_a_channel_of_zeros() -> None:
    """A site that is never used: no division by zero, no NaN, with any method."""
    before = small()
    stats = Stats({"rms_norm": record([[0.0, 0.0], [0.0, 0.0]])})
    for method in METHODS:
        after, _ = run(before, stats, f"scale-channels{{method={method}}}")
        weights = [v.constant.wide() for v in after.constants if v.constant is not None]
        assert all(np.isfinite(w).all() for w in weights)


def test_nothing_to_scale() -> None:
    _, report = run(pre_norm(), Stats())
    assert report.misses == ["no linear with a constant weight reads a scale space with statistics"]


def test_needs_statistics_and_a_known_method() -> None:
    with pytest.raises(PlanishError, match=r"^pass 'scale-channels': needs calibration statistics"):
        Pipeline("scale-channels").run(pre_norm())
    with pytest.raises(PlanishError) as caught:
        Pipeline("scale-channels{method=smoothquand}")
    assert str(caught.value) == (
        "pass 'scale-channels': option 'method': expected one of search, smoothquant, os-plus, percentile, "
        "outliertune, balance, awq, smoothquant-plus; got 'smoothquand'\n  hint: did you mean 'smoothquant'?"
    )
    assert ScaleChannels.breaks == {"norm-gain-free"}


def test_a_norm_that_is_also_given_out() -> None:
    """Explicitly: the linear reads the scaled norm, the output an op that undoes it."""
    b = Build()
    normed = norm(b, b.input("x", "f32[batch, tokens, 8]"), "norm")
    graph = b.output(linear(b, normed, 8, "a"), normed)
    stats = statistics(graph)
    _, report = run(graph, stats)
    assert dict(report.declined) == {"graph output": ["layer_norm"]}
    after, report = run(graph, stats, "scale-channels{insert=true}")
    assert report.inserted == 1
    assert [name for name, _ in after.outputs] == ["linear", "layer_norm"]
    assert after.outputs[1][1].producer.op.name == "mul"


# -- teeth ---------------------------------------------------------------------------------------


def applied_wrongly(wrong: str):
    true = absorb._applied

    def applied(member, data, transform):
        if wrong == "forgotten bias" and member.value.name.endswith("bias") and data.ndim == 1:
            return data
        if wrong == "1.001" and member.variance < 0:
            transform = Scale(transform.factors * 1.001)
        if wrong == "the wrong way round" and member.variance < 0:
            transform = transform.inverse()
        return true(member, data, transform)

    return applied


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("wrong", ["forgotten bias", "1.001", "the wrong way round"])
def test_the_validator_rejects_a_wrong_scale(monkeypatch: pytest.MonkeyPatch, wrong: str, kind: str) -> None:
    graph = BLOCKS[kind]()
    stats = statistics(graph)
    monkeypatch.setattr(absorb, "_applied", applied_wrongly(wrong))
    with pytest.raises(ValidationError) as caught:
        Pipeline("scale-channels{method=smoothquant}").run(graph, stats=stats)
    assert caught.value.what.startswith("pass 'scale-channels': changed the function: relative error ")
    assert caught.value.where is not None and "the first value that differs is %" in caught.value.where
    Pipeline("scale-channels{method=smoothquant}").run(graph, stats=stats, validate=False)


# -- balance: no statistics --------------------------------------------------------------------------


@given(seeds)
def test_balance_makes_both_sides_equal(seed: int) -> None:
    written, read = ranges(seed)
    s = balance_scale(written, read)
    assert np.allclose(written / s, read * s, rtol=1e-12)


def test_balance_of_nothing() -> None:
    """A channel that nothing writes or reads stays, and no factor is out of bounds."""
    assert balance_scale(np.array([0.0, 1.0, 4.0]), np.array([1.0, 0.0, 1.0])).tolist() == [1.0, 1.0, 2.0]
    assert balance_scale(np.array([1e30]), np.array([1e-30])).tolist() == [1e4]


BALANCE = "scale-channels{method=balance}"


def balanced(graph: Graph, pipeline: str = BALANCE) -> tuple[Graph, PassReport]:
    after, report = Pipeline(pipeline).run(graph)
    assert report.validated
    check_text(after)
    return after, report.passes[-1]


@pytest.mark.parametrize("kind", CHANNELS)
def test_balance_is_exact(kind: str) -> None:
    graph = CHANNELS[kind]()
    after, report = balanced(graph)
    assert report.error is not None
    assert report.error <= TOLERANCE
    assert counts(after) == counts(graph)
    assert len(report.applied) == len(report.figures) > 0
    for figures in report.figures.values():
        assert figures["after"] < 1.05
        assert figures["before"] >= figures["after"]


@settings(max_examples=10)
@given(seeds, st.sampled_from(sorted(CHANNELS)), st.sampled_from(["balance", "smoothquant", "search"]))
def test_exact_on_every_kind_of_space(seed: int, kind: str, method: str) -> None:
    graph = CHANNELS[kind](seed)
    stats = collect(graph, calibration(graph, seed))
    _, report = run(graph, stats, f"scale-channels{{method={method}}}")
    assert report.error is None or report.error <= TOLERANCE


def places(kind: str) -> dict[str, tuple[str, int]]:
    _, report = balanced(CHANNELS[kind]())
    return {name: (f["kind"], f["channels"]) for name, f in report.figures.items()}


def test_balance_reaches_every_site() -> None:
    """Dual queries and keys with pairs tied, values, up and down, norms; convolutions; a scan's step and states."""
    assert places("rotary") == {
        "rms_norm": ("hidden", 8),
        "linear_1": ("key", 8),  # 2 key heads of 4 pairs
        "linear_6": ("value", 16),
        "rms_norm_14": ("hidden", 8),
        "linear_16": ("hidden", 12),
        "rms_norm_19": ("hidden", 8),
    }
    assert places("fused") == {"layer_norm": ("hidden", 8), "transpose": ("key", 8), "transpose_7": ("value", 8)}
    assert places("convolutions") == {"conv": ("hidden", 4), "conv_1": ("hidden", 12), "conv_3": ("hidden", 12)}
    assert places("scan") == {
        "rms_norm": ("hidden", 8),
        "linear_1": ("hidden", 12),  # in projection and convolution
        "dt": ("hidden", 3),
        "transpose_6": ("hidden", 4),  # B and C
    }


def test_balance_ties_rotary_pairs() -> None:
    """One factor for rows j and j + d/2 of both sides."""
    before = CHANNELS["rotary"]()
    after, _ = balanced(before)
    columns = after.values["layers.0.norm1.gain"].constant.wide() / before.values["layers.0.norm1.gain"].constant.wide()
    for name in ("q", "k"):
        then, now = (g.values[f"layers.0.{name}.weight"].constant.wide() for g in (before, after))
        factors = (now * columns / then)[:, 0].reshape(-1, 2, 4)
        assert np.allclose(factors[:, 0], factors[:, 1], rtol=1e-9)
        assert not np.allclose(factors, 1.0)


def test_what_balance_leaves_alone() -> None:
    _, report = balanced(CHANNELS["scan"]())
    assert "silu %silu" in report.declined["its result is not proportional to its operand"]
    assert report.declined["graph output"] == ["linear_12"]
    assert report.notes == ["1 gains of norms took scales up (first: %rms_norm)"]


def test_one_side_only() -> None:
    """Nothing that is constant reads the space: the other side is the graph's own."""
    b = Build()
    x = b("linear", b.input("x", "f32[n, 4]"), np.zeros((4, 4), "f4"))
    _, report = balanced(b.output(b("linear", x, b.random(4, 4))))
    assert report.declined["constants stand on one side of it only"] == ["linear %linear"]


def test_a_second_balance_changes_nothing() -> None:
    once, _ = balanced(CHANNELS["rotary"]())
    twice, report = balanced(once)
    assert twice == once
    assert report.applied == []
    assert len(report.declined["its weights are balanced already"]) == 6


def test_grouped_kernels_as_matrices() -> None:
    """A grouped convolution on one pixel is a product with the matrix."""
    graph = CHANNELS["convolutions"]()
    node = next(n for n in graph.nodes if n.attributes.get("groups", 1) == 12)
    matrix = grouped_matrix(node).reshape(12, 9, 12)
    kernel = node.operands[1].constant.wide()
    for channel in range(12):
        assert np.array_equal(matrix[channel, :, channel], kernel[channel, 0].reshape(-1))
    assert np.count_nonzero(matrix) == kernel.size


def test_depthwise_convolutions_are_sites() -> None:
    graph = CHANNELS["convolutions"]()
    stats = collect(graph, calibration(graph))
    _, report = run(graph, stats, "scale-channels{method=smoothquant}")
    assert set(report.figures) == {"relu", "relu_2", "relu_4"}
    again = collect(run(graph, stats, "scale-channels{method=smoothquant}")[0], calibration(graph))
    assert not np.allclose(again.of("relu_2").largest, stats.of("relu_2").largest)


@pytest.mark.parametrize("kind", ["rotary", "norms on heads", "fused"])
def test_queries_against_keys(kind: str) -> None:
    """smoothquant at 1/2 on a dual site: both sides have the same calibrated ranges afterwards."""
    graph = CHANNELS[kind]()
    stats = collect(graph, calibration(graph))
    after, _ = run(graph, stats, "scale-channels{method=smoothquant}")
    again = collect(after, calibration(graph))
    (space,) = [s for s in analyse(after).admitted(Act.SCALE) if key_side(s) is not None]
    site = dual_site_of(space, again)
    assert site is not None
    assert site.partner is not None
    assert np.allclose(np.abs(site.samples).max(0), np.abs(site.partner).max(0), rtol=1e-2)


def test_methods_of_one_side_leave_keys_alone() -> None:
    graph = CHANNELS["rotary"]()
    stats = collect(graph, calibration(graph))
    for method in ("percentile", "outliertune"):
        assert "linear_1" not in run(graph, stats, f"scale-channels{{method={method}}}")[1].figures
