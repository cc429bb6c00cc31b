"""scale-channels for weights alone: AWQ site by site, SmoothQuant+ with one alpha for the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoder_blocks import BLOCKS, data, pre_norm, statistics
from helpers import check_text
from hypothesis import given
from hypothesis import strategies as st
from patterns import TOLERANCE, Build

from planish.calibrate.collect import collect
from planish.ir.errors import PlanishError
from planish.ir.formats import Format
from planish.ir.graph import Graph
from planish.ir.rounding import fake_quantize
from planish.passes.base import PassReport, keep_float
from planish.passes.manager import Pipeline
from planish.passes.scale_channels import ScaleChannels
from planish.passes.scales import FormatQuantiser, Judge, Pair, Quantiser, awq_scale, awq_weight
from planish.passes.sites import weight_matrix
from planish.passes.whole_model import WholeModel, round_weights

INT4 = Format.parse("uint4:g8")
seeds = st.integers(0, 10_000)


def run(graph: Graph, text: str, **more: object) -> tuple[Graph, PassReport]:
    after, report = Pipeline(text).run(graph, stats=statistics(graph), **more)  # type: ignore[arg-type]
    assert report.validated
    check_text(after)
    return after, report.passes[-1]


# -- the choice ------------------------------------------------------------------------------------------


@given(seeds, st.floats(0, 1))
def test_awq_scale_is_centred(seed: int, alpha: float) -> None:
    """max s times min s is 1; at alpha 0 without weights nothing is scaled."""
    rng = np.random.default_rng(seed)
    mean, weight = rng.lognormal(0, 2, 16), rng.uniform(0, 1, 16)
    for shares in (None, weight):
        s = awq_scale(mean, shares, alpha)
        assert np.isclose(s.max() * s.min(), 1.0)
    assert np.allclose(awq_scale(mean, None, 0.0), 1.0)
    assert np.allclose(np.diff(np.log(awq_scale(mean, None, 1.0))), np.diff(np.log(np.maximum(mean, 1e-4))))


def test_awq_weight_is_relative_to_its_block() -> None:
    weights = [np.array([[1.0, -2.0, 10.0, 5.0]]), np.array([[4.0, 4.0, 0.0, 0.0]])]
    assert np.allclose(awq_weight(weights, Format.parse("uint4:g2")), [0.75, 1.0, 0.5, 0.25])
    assert np.allclose(awq_weight(weights, Format.parse("int4:channel")), [0.55, 0.6, 0.5, 0.25])


def test_formats_round_as_quantize_will() -> None:
    """A weight in its blocks, an activation in its rows, a calibrated one in its range divided by s; none: as it is."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(6, 8, generator=generator), torch.randn(5, 8, generator=generator)
    low, high = np.full(8, -4.0), np.full(8, 12.0)
    s = np.full(8, 2.0)
    rows = FormatQuantiser(INT4, Format.parse("int8:token"), low, high)
    assert torch.equal(rows.weight(w), fake_quantize(w, INT4))
    assert torch.equal(rows.activations(x, s), fake_quantize(x, Format.parse("int8:token")))
    static = Format.parse("uint8:tensor:static")
    assert torch.equal(FormatQuantiser(None, static, low, high).activations(x, s), fake_quantize(x, static, -2.0, 6.0))
    nothing = FormatQuantiser(None, None, low, high)
    assert nothing.weight(w) is w
    assert nothing.activations(x, s) is x
    clipped = FormatQuantiser(INT4, None, low, high, "mse").weight(w)
    assert float((clipped - w).square().sum()) <= float((rows.weight(w) - w).square().sum())
    both = Pair(rows, Quantiser("token", low, high))
    assert torch.equal(both.weight(w), rows.weight(w))
    assert torch.equal(both.activations(x, s), Quantiser("token", low, high).activations(x, s))
    block = torch.tensor([[600.0] + [6.0] * 15 + [0.375] * 16])
    got = FormatQuantiser(None, Format.parse("nvfp4"), low, high).activations(block, np.ones(32))
    assert torch.equal(got[0, 16:], block[0, 16:])  # its scale, 1/16, is no multiple of one of the tensor


# -- awq --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("options", ["", " insert=true", " clip=mse steps=5", " weights=int3:g4"])
def test_awq_is_exact_and_never_worse(kind: str, options: str) -> None:
    _, report = run(BLOCKS[kind](), f"scale-channels{{method=awq weights=uint4:g8{options}}}".replace(
        "weights=uint4:g8 weights", "weights"))  # fmt: skip
    assert report.error is not None
    assert report.error <= TOLERANCE
    assert report.figures
    for figures in report.figures.values():
        assert figures["choice"].startswith("awq alpha=")
        assert figures["error_after"] < figures["error_before"]


def test_awq_protects_what_is_read_loudly() -> None:
    """One channel with inputs a hundred times as large: its weights are scaled up before they are rounded."""
    b = Build()
    x = b("rms_norm", b.input("x", "f32[batch, 64]"), b.constant(np.where(np.arange(64) == 5, 100.0, 1.0), name="gain"))
    graph = b.output(b("linear", x, b.random(32, 64, name="w")))
    rng = np.random.default_rng(0)
    batches = [{"x": rng.normal(size=(64, 64)).astype(np.float32)}]
    before = graph.values["w"].constant.wide()
    after, report = Pipeline("scale-channels{method=awq weights=int4:g32}").run(graph, stats=collect(graph, batches))
    ratio = np.abs(after.values["w"].constant.wide()).mean(0) / np.abs(before).mean(0)
    assert ratio[5] > 3 * np.median(ratio)
    (figures,) = report.passes[0].figures.values()
    assert figures["error_after"] < figures["error_before"] / 2


def test_formats_in_any_search() -> None:
    """What is judged changes with the formats; `auto` is as it was."""
    graph = pre_norm()
    errors = {}
    named = " weights=auto activations=auto"
    for options in ("", named, " weights=int4:g8", " weights=none", " activations=int8:token"):
        _, report = run(graph, f"scale-channels{{method=smoothquant{options}}}")
        errors[options] = report.figures["layer_norm"]["error_before"]
    assert errors[""] == errors[named]
    assert errors[" weights=int4:g8"] > 2 * errors[""]
    assert errors[" weights=none"] < errors[""]
    assert errors[" activations=int8:token"] != errors[""]


# -- smoothquant-plus --------------------------------------------------------------------------------------

PLUS = "scale-channels{method=smoothquant-plus weights=uint4:g8 steps=5}"


def test_one_alpha_for_the_model() -> None:
    """The least of the losses, each that of the model scaled by that alpha with rounded weights."""
    graph = pre_norm()
    batches = data()
    after, report = run(graph, PLUS, data=batches)
    assert report.error is not None
    assert report.error <= TOLERANCE
    losses = report.figures["losses"]
    assert list(losses) == ["none", 0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    alpha = min(losses, key=losses.get)
    assert alpha != "none"
    assert report.notes[0].startswith(f"alpha={alpha:g}: the model's outputs are off by ")
    assert all(line.split(": ")[1].startswith(f"smoothquant alpha={alpha:g}") for line in report.applied)
    assert losses[alpha] < max(losses.values())
    model = WholeModel(graph, batches, None, "test")
    assert np.isclose(model.loss(round_weights(after.clone(), INT4)), losses[alpha], rtol=1e-4)
    plain, _ = run(graph, f"scale-channels{{method=smoothquant alpha={alpha}}}")
    norms = [g.values["norm2.gain"].constant.wide() for g in (plain, after)]
    assert np.allclose(*norms)


def test_a_model_that_is_better_left_alone() -> None:
    """Four bits hold its weights exactly."""
    b = Build()
    normed = b("rms_norm", b.input("x", "f32[b, 4]"), b.constant([1.0, 1.0, 9.0, 1.0]))
    grid = np.array([[0.0, 15, 4, 2], [3, 0, 15, 7]], np.float32)
    graph = b.output(b("linear", normed, b.constant(grid, name="w")))
    batches = [{"x": np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)}]
    after, report = Pipeline("scale-channels{method=smoothquant-plus weights=uint4:channel}").run(
        graph, stats=collect(graph, batches), data=batches
    )
    assert after == graph
    assert list(report.passes[0].declined) == ["no alpha beats leaving the model alone"]
    assert report.passes[0].notes == ["none: the model's outputs are off by 0 of their energy, 0 as it was"]


def test_it_reads_data_and_no_more_than_it_is_told() -> None:
    graph = pre_norm()
    assert ScaleChannels(method="smoothquant-plus").reads_data
    assert not ScaleChannels().reads_data
    with pytest.raises(PlanishError) as caught:
        Pipeline(PLUS).run(graph, stats=statistics(graph))
    assert str(caught.value) == (
        "pass 'scale-channels': needs calibration data, not only its statistics: it runs the model\n"
        "  hint: give batches (--calibrate, or data= of Pipeline.run)"
    )
    first, all_of_them = (run(graph, PLUS.replace("}", f" batches={n}}}"), data=data())[1] for n in (1, 6))
    one, _ = run(graph, PLUS, data=data()[:1])
    assert first.figures["losses"] == run(graph, PLUS, data=data()[:1])[1].figures["losses"]
    assert first.figures["losses"] != all_of_them.figures["losses"]
    check_text(one)


def test_options_are_checked() -> None:
    for text, expected in {
        "scale-channels{weights=int5}": "option 'weights': format 'int5': 'int5' is unknown; expected one of ",
        "scale-channels{activations=int8:tokens}": "option 'activations': format 'int8:tokens': suffix 'tokens' is ",
        "scale-channels{method=smoothquant-plus weights=none}": "method 'smoothquant-plus' rounds weights; got "
        "weights=none",
    }.items():
        with pytest.raises(PlanishError) as caught:
            Pipeline(text)
        assert caught.value.what.startswith(f"pass 'scale-channels': {expected}")


# -- the model as a whole ----------------------------------------------------------------------------------


def test_losses_of_the_whole_model() -> None:
    """0 for the model itself; padded rows do not count; integers are no outputs to compare."""
    graph = pre_norm()
    batches = data()
    model = WholeModel(graph, batches, None, "test")
    assert model.loss(graph) == 0.0
    rounded = round_weights(graph.clone(), INT4)
    assert model.loss(rounded) > 1e-4
    b = Build()
    x, mask = b.input("x", "f32[batch, tokens, 4]"), b.input("mask", "i64[batch, tokens]")
    h = b("linear", x, b.random(4, 4))
    masked = b.output(h, mask)
    given = {"x": np.ones((1, 3, 4), np.float32), "mask": np.array([[1, 0, 1]])}
    other = masked.clone()
    (weight,) = [v for v in other.constants if v.rank == 2]
    weight.constant = type(weight.constant)(weight.constant.wide() * 1.5, "f32", (4, 4))
    for name in (None, "mask"):
        model = WholeModel(masked, [given], name, "test")
        assert len(model.exact[0]) == 1
        assert len(model.exact[0][0]) == (3 if name is None else 2)
        assert np.isclose(model.loss(other), 0.25)
    b = Build()
    flags = b.output(b("greater", b.input("x", "f32[n]"), 0.0))
    with pytest.raises(PlanishError, match=r"^pass 'test': the graph has no float output that could be compared$"):
        WholeModel(flags, [{"x": np.ones(3, np.float32)}], None, "test")


def test_rounding_leaves_float_branches_and_tables_alone() -> None:
    b = Build()
    table = b.random(8, 8, name="table")
    h = b("embedding", table, b.input("ids", "i64[n]"))
    kept = b("linear", h, b.random(8, 8, name="kept"))
    graph = b.output(b("linear", h, table), b("linear", kept, b.random(4, 8, name="w")))
    keep_float(graph, kept)
    before = graph.clone()
    round_weights(graph, INT4)
    check_text(graph)
    for name in ("table", "kept"):
        assert graph.values[name].constant == before.values[name].constant
    head = graph.values["linear_1"].producer
    assert np.allclose(
        weight_matrix(head), fake_quantize(torch.from_numpy(before.values["table"].constant.wide()), INT4)
    )


def test_the_judge_measures_outputs() -> None:
    x, w = torch.eye(4), torch.eye(4)
    judge = Judge(x, [w], FormatQuantiser(None, None, np.zeros(4), np.ones(4)))
    assert judge.error(np.ones(4)) < 1e-20
    assert np.isclose(judge.measure(1.5 * torch.eye(4)), 0.25)
