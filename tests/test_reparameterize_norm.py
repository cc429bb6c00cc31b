"""reparameterize-norm: one scale and zero point for all channels behind a norm."""

from __future__ import annotations

import numpy as np
import pytest
from channel_blocks import BLOCKS as CHANNELS
from channel_blocks import calibration
from encoder_blocks import BLOCKS, WIDTH, linear, norm, pre_norm, record, statistics
from helpers import check_text
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import TOLERANCE, Build, counts, golden

from planish.calibrate.collect import collect
from planish.ir import absorb
from planish.ir.errors import PlanishError, ValidationError
from planish.ir.graph import Graph
from planish.ir.stats import Stats
from planish.ir.transform import Scale, Shift
from planish.passes.base import PassReport
from planish.passes.manager import Pipeline
from planish.passes.reparameterize_norm import ReparameterizeNorm, choose_center, used_share

ALL = {**BLOCKS, **{name: CHANNELS[name] for name in ("rotary", "norms on heads", "fused", "scan")}}
seeds = st.integers(0, 10_000)


def run(graph: Graph, stats: Stats, pipeline: str = "reparameterize-norm") -> tuple[Graph, PassReport]:
    after, report = Pipeline(pipeline).run(graph, stats=stats)
    assert report.validated
    check_text(after)
    return after, report.passes[-1]


# -- the choice --------------------------------------------------------------------------------------


def extremes(seed: int, channels: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    middle = rng.normal(0, 5, channels)
    width = rng.lognormal(0, 1, channels)
    return middle - width, middle + width


@given(seeds, st.sampled_from(["median", "mean"]), st.integers(2, 8))
def test_all_channels_get_one_range(seed: int, center: str, bits: int) -> None:
    """x' spans [-z s, (2^b - 1 - z) s] in every channel, with an integer z."""
    low, high = extremes(seed)
    factors, offsets = choose_center(low, high, center, bits, symmetric=False)
    low, high = low * factors + offsets, high * factors + offsets
    assert np.allclose(low, low[0], rtol=1e-9)
    assert np.allclose(high, high[0], rtol=1e-9)
    scale = (high[0] - low[0]) / (2**bits - 1)
    assert abs(-low[0] / scale - round(-low[0] / scale)) < 1e-6
    assert abs(used_share(low, high) - 1.0) < 1e-9


@given(seeds, st.sampled_from(["median", "mean"]))
def test_symmetric(seed: int, center: str) -> None:
    low, high = extremes(seed)
    factors, offsets = choose_center(low, high, center, 8, symmetric=True)
    largest = np.maximum(np.abs(low), np.abs(high))
    assert (offsets == 0).all()
    assert np.allclose(largest * factors, (np.median if center == "median" else np.mean)(largest))


@given(seeds)
def test_the_median_minimises_the_mean_absolute_deviation(seed: int) -> None:
    """MOSF: sum_c |s_c - s| is least at the median."""
    low, high = extremes(seed)
    own = (high - low) / 255.0
    factors, _ = choose_center(low, high, "median", 8, symmetric=False)
    scale = factors[0] * own[0]
    others = np.append(own, own.mean())
    assert all(np.abs(own - scale).sum() <= np.abs(own - other).sum() * (1 + 1e-9) for other in others)


def test_a_channel_without_a_range_stays() -> None:
    low, high = np.array([-1.0, 3.0, 0.0]), np.array([1.0, 3.0, 0.0])
    for symmetric in (False, True):
        factors, offsets = choose_center(low, high, "mean", 8, symmetric=symmetric)
        assert np.isfinite(factors).all()
        assert (factors > 0).all()
        assert factors[2] == 1.0
        assert offsets[2] == 0.0
    factors, offsets = choose_center(np.zeros(3), np.zeros(3), "mean", 8, symmetric=False)
    assert factors.tolist() == [1.0] * 3
    assert offsets.tolist() == [0.0] * 3


# -- the pass ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grow", ["false", "true"])
@pytest.mark.parametrize("center", ["median", "mean"])
@pytest.mark.parametrize("kind", ALL)
def test_exact(kind: str, center: str, grow: str) -> None:
    graph = ALL[kind]()
    stats = collect(graph, calibration(graph))
    after, report = run(graph, stats, f"reparameterize-norm{{center={center} grow-bias={grow}}}")
    assert report.error is not None
    assert report.error <= TOLERANCE
    assert counts(after) == counts(graph)
    assert len(report.applied) == len(report.figures) > 0
    for figures in report.figures.values():
        assert figures["used_before"] < figures["used_after"] <= 1 + 1e-9
        if not figures["symmetric"]:
            assert figures["used_after"] > 1 - 1e-9


@settings(max_examples=10)
@given(seeds, st.sampled_from(sorted(ALL)), st.booleans())
def test_exact_for_any_block(seed: int, kind: str, grow: bool) -> None:
    graph = ALL[kind](seed)
    stats = collect(graph, calibration(graph, seed))
    _, report = run(graph, stats, f"reparameterize-norm{{grow-bias={str(grow).lower()}}}")
    assert report.error is None or report.error <= TOLERANCE


def test_calibrated_anew_all_channels_have_one_range() -> None:
    graph = pre_norm()
    after, report = run(graph, statistics(graph))
    again = statistics(after)
    assert set(report.figures) == {"layer_norm", "layer_norm_13"}
    for name in report.figures:
        record = again.of(name)
        assert np.allclose(record.minimum, record.minimum[0], rtol=1e-3)
        assert np.allclose(record.maximum, record.maximum[0], rtol=1e-3)


def test_a_second_run_has_nothing_to_do() -> None:
    graph = pre_norm()
    _, report = run(graph, statistics(graph), "reparameterize-norm,reparameterize-norm")
    assert report.applied == []
    assert report.declined == {
        "one scale fits its channels already": ["layer_norm %layer_norm", "layer_norm %layer_norm_13"]
    }


def test_a_norm_without_a_bias() -> None:
    """Symmetric, and says why; with grow-bias it gets one."""
    graph = pre_norm(op="rms_norm")
    _, report = run(graph, statistics(graph))
    assert report.notes == ["2 norms treated symmetrically: it has no bias (first: %rms_norm)"]
    assert all(f["symmetric"] for f in report.figures.values())
    after, report = run(graph, statistics(graph), "reparameterize-norm{grow-bias=true}")
    assert report.notes == []
    assert not any(f["symmetric"] for f in report.figures.values())
    assert len(next(n for n in after.nodes if n.op.name == "rms_norm").operands) == 3


def test_a_shift_that_is_blocked() -> None:
    graph = CHANNELS["norms on heads"]()
    _, report = run(graph, collect(graph, calibration(graph)), "reparameterize-norm{grow-bias=true}")
    assert report.notes == ["1 norms treated symmetrically: it turns a shift (first: %rms_norm_10)"]


def test_golden(update_golden: bool) -> None:
    b = Build()
    gain, bias = b.constant([1.0, 8.0], name="gain"), b.constant([0.0, 4.0], name="bias")
    normed = b("layer_norm", b.input("x", "f32[n, 2]"), gain, bias)
    before = b.output(b("linear", normed, b.constant([[1.0, 2.0]], name="weight"), b.constant([3.0], name="b")))
    stats = Stats({"layer_norm": record([[-1.0, -4.0], [1.0, 12.0]])})
    after, report = run(before, stats, "reparameterize-norm{center=mean}")
    assert report.applied == ["%layer_norm: scale and shift, a channel uses 56% -> 100% of the range"]
    golden("reparameterize-norm", before, after, update_golden)


# -- refusals --------------------------------------------------------------------------------------


def test_a_residual_that_reads_the_norm() -> None:
    graph = BLOCKS["post-norm"]()
    _, report = run(graph, statistics(graph))
    assert report.declined["it divides by the scale of its input"] == [
        "layer_norm %layer_norm_13",
        "layer_norm %layer_norm_17",
    ]


def test_without_statistics_of_the_norm() -> None:
    graph = pre_norm()
    _, report = run(graph, Stats())
    assert report.applied == []
    assert report.declined == {"no statistics of its result": ["layer_norm %layer_norm", "layer_norm %layer_norm_13"]}
    b = Build()
    _, report = run(b.output(linear(b, b.input("x", "f32[n, 8]"), 8, "a")), Stats())
    assert report.misses == ["no norm with statistics of its result"]


def test_a_norm_that_is_given_out() -> None:
    b = Build()
    normed = norm(b, b.input("x", f"f32[batch, tokens, {WIDTH}]"), "norm")
    graph = b.output(linear(b, normed, 8, "a"), normed)
    _, report = run(graph, statistics(graph))
    assert report.declined == {"graph output": ["layer_norm"]}


def test_options() -> None:
    with pytest.raises(PlanishError, match=r"^pass 'reparameterize-norm': needs calibration statistics"):
        Pipeline("reparameterize-norm").run(pre_norm())
    wanted = r"^pass 'reparameterize-norm': option 'bits': expected an integer from 2 to 16; got 1$"
    with pytest.raises(PlanishError, match=wanted):
        Pipeline("reparameterize-norm{bits=1}").run(pre_norm(), stats=Stats())
    assert ReparameterizeNorm.breaks == {"norm-gain-free", "norm-bias-free"}


# -- teeth -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["1.001", "forgotten shift", "the wrong way round"])
def test_the_validator_rejects_a_wrong_fold(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    graph = pre_norm()
    true = absorb._applied

    def applied(member, data, transform):
        if isinstance(transform, Scale) and member.variance < 0:
            if wrong == "1.001":
                transform = Scale(transform.factors * 1.001)
            if wrong == "the wrong way round":
                transform = transform.inverse()
        if isinstance(transform, Shift) and wrong == "forgotten shift":
            return data
        return true(member, data, transform)

    monkeypatch.setattr(absorb, "_applied", applied)
    with pytest.raises(ValidationError, match=r"^pass 'reparameterize-norm': changed the function"):
        Pipeline("reparameterize-norm").run(graph, stats=statistics(graph))
