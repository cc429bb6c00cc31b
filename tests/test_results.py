"""What is said about the numbers of a model after a pipeline: outliers, errors, sizes, pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from decoder_blocks import VOCABULARY, decoder
from helpers import check_text

import planish
from planish import cli
from planish.integrate.convert import run_pipeline
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.graph import Graph
from planish.ir.stats import ChannelStats
from planish.ir.text import parse
from planish.passes.manager import Pipeline
from planish.report import plots
from planish.report.outliers import BINS, outliers
from planish.report.plain import dumps
from planish.report.results import Results
from planish.report.sizes import Sizes, sizes

TEXT = """
graph @block(%x: f32[n, 8]) {
  %gain = constant : f32[8] @"gain"
  %w1 = constant : f32[12, 8] @"w1"
  %b1 = constant : f32[12] @"b1"
  %w2 = constant : f32[8, 12] @"w2"
  %h: f32[n, 8] = rms_norm(%x, %gain) {eps=1e-05}
  %u: f32[n, 12] = linear(%h, %w1, %b1) from "mlp.up"
  %g: f32[n, 12] = gelu(%u)
  %y: f32[n, 8] = linear(%g, %w2) from "mlp.down"
  return %y as "y"
}
"""
OUTLIER = 3


def block(seed: int = 0) -> Graph:
    """A norm with one loud channel, and two linears."""
    rng = np.random.default_rng(seed)
    shapes = {"gain": (8,), "w1": (12, 8), "b1": (12,), "w2": (8, 12)}
    data = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    data["gain"] = np.ones(8, np.float32)
    data["gain"][OUTLIER] = 50.0
    return parse(TEXT, {name: Constant.of(array) for name, array in data.items()})


def batches(seed: int, rows: int = 64) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(rows, 8)).astype(np.float32)} for _ in range(2)]


def record(samples: np.ndarray) -> ChannelStats:
    x = samples.astype(np.float32)
    return ChannelStats(-1, x.min(0).astype(float), x.max(0).astype(float), (x**2).mean(0), x, len(x))


# -- outliers ------------------------------------------------------------------------------------


def test_outliers_of_a_normal_distribution(seed: int) -> None:
    seen = outliers(record(np.random.default_rng(seed).normal(size=(4096, 16))))
    assert seen.kurtosis == pytest.approx(3.0, abs=0.25)
    assert 1.0 <= seen.ratio < 1.6
    assert seen.row_ratio < 2.5
    assert (seen.sinks, seen.rows) == (0, 4096)
    assert seen.counts.shape == (BINS,)
    assert seen.counts.sum() == 4096 * 16
    assert seen.counts.argmax() in range(BINS // 2 - 8, BINS // 2 + 9)


def test_an_outlying_channel_and_a_massive_row_are_told_apart(seed: int) -> None:
    x = np.random.default_rng(seed).uniform(-1, 1, size=(500, 32))
    x[0] = 1.0  # the extremes of every channel are known
    channel, row = x.copy(), x.copy()
    channel[:, 7] *= 40
    row[[10, 20]] *= 30
    one, two = outliers(record(channel)), outliers(record(row))
    assert one.ratio == pytest.approx(40.0, rel=0.01)
    assert one.sinks == 0
    assert one.channels.argmax() == 7
    assert two.sinks == 2
    assert two.row_ratio > 10
    assert two.ratio < 2
    assert min(one.kurtosis, two.kurtosis) > 20


def test_outliers_of_nothing() -> None:
    zero = outliers(record(np.zeros((5, 3))))
    assert (zero.largest, zero.ratio, zero.kurtosis, zero.row_ratio, zero.sinks) == (0.0, 1.0, 0.0, 1.0, 0)
    json.loads(dumps(zero.as_dict()))
    dead = outliers(record(np.eye(8)[:1] * 5))  # one channel lives: the median is zero
    assert dead.ratio > 1e6
    json.loads(dumps(dead.as_dict()))


# -- sizes ---------------------------------------------------------------------------------------


def test_sizes_in_float() -> None:
    graph = decoder()
    found = sizes(graph)
    table = VOCABULARY * 32 * 4
    assert found.embeddings == table
    weights = [n.operands[1] for n in graph.nodes if n.op.name == "linear"]
    assert found.weights == sum(w.constant.nbytes for w in weights if w is not None and w.constant is not None)
    assert found.elements == found.weights // 4
    assert found.scales == 0
    assert found.total == sum(v.constant.nbytes for v in graph.constants if v.constant is not None and v.users)


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_sizes_of_codes_and_scales(target: str) -> None:
    graph = decoder()
    before = sizes(graph)
    after, _ = Pipeline(f"raise,quantize{{activations=int8:token min-rows=8}},lower{{target={target}}}").run(graph)
    check_text(after)
    found = sizes(after)
    rows = sum(n.operands[1].shape[0] for n in graph.nodes if n.op.name == "linear")
    assert found.elements == before.elements
    assert found.weights == before.weights // 4
    assert found.embeddings == before.embeddings // 4 + 4 * VOCABULARY
    assert 4 * rows <= found.scales < 4 * rows * 1.5  # and zero points
    assert 0 <= found.other - before.other <= 1024  # the shapes of a lowering


def test_sizes_below_a_byte_are_packed() -> None:
    text = """
graph @packed(%x: f32[n, 64]) {
  %codes = constant : i4[16, 64] @"codes"
  %scale = constant : f32[16] @"scale"
  %w: f32[16, 64] = dequantize(%codes, %scale) {axis=0}
  %y: f32[n, 16] = linear(%x, %w)
  return %y as "y"
}
"""
    import ml_dtypes

    data = {"codes": Constant.of(np.ones((16, 64), ml_dtypes.int4)), "scale": Constant.of(np.ones(16, np.float32))}
    assert sizes(parse(text, data)) == Sizes(weights=16 * 32, scales=64, elements=16 * 64)


# -- results -------------------------------------------------------------------------------------


def results(pipeline: str, seed: int = 0, **options: object) -> Results:
    graph = block()
    _, report, _ = run_pipeline(graph, Pipeline(pipeline), calibration=batches(seed), **options)
    assert isinstance(report.results, Results)
    json.loads(dumps(report.as_dict()))
    return report.results


def test_outliers_before_and_after() -> None:
    found = results("raise,scale-channels{method=smoothquant alpha=1.0},quantize{activations=uint8:tensor},lower")
    up, down = found.sites
    assert (up.where, up.reads, up.weight) == ("linear mlp.up", "h", "w1")
    assert down.where == "linear mlp.down"
    assert up.before is not None
    assert up.after is not None
    assert up.before.ratio > 30
    assert up.after.ratio < 1.5
    assert up.before.channels.argmax() == OUTLIER
    assert 20 < (up.weight_db or 0) < 60
    assert 20 < (up.activation_db or 0) < 60
    assert found.bits_per_weight == pytest.approx(8 + 32 * (12 + 8) / (12 * 8 * 2), rel=0.01)


def test_without_scaling_the_outlier_stays() -> None:
    plain = results("raise,quantize,lower").sites[0]
    assert plain.before is not None
    assert plain.after is not None
    assert plain.after.ratio == plain.before.ratio


def test_a_site_behind_an_inserted_op_remembers_what_it_read() -> None:
    found = results("raise,insert-hadamard{sites=all},quantize{activations=uint8:tensor}")
    down = next(s for s in found.sites if s.where == "linear mlp.down")
    assert down.reads != "g"
    assert down.before is not None
    assert down.after is not None
    assert down.before.as_dict() != down.after.as_dict()


def test_a_pipeline_of_exact_passes_has_outliers_and_no_noise() -> None:
    found = results("raise,scale-channels{method=smoothquant alpha=1.0}")
    assert [s.weight_db for s in found.sites] == [None, None]
    assert found.sites[0].after is not None
    assert found.sites[0].after.ratio < 1.5
    assert found.bits_per_weight == 32.0


def test_without_statistics_there_are_ratios_of_weights() -> None:
    _, report, _ = run_pipeline(block(), Pipeline("raise,quantize"))
    assert isinstance(report.results, Results)
    assert [s.weight for s in report.results.sites] == ["w1", "w2"]
    assert all(s.weight_db and s.before is None and s.after is None for s in report.results.sites)
    assert report.results.medians().keys() == {"weight dB"}


def test_sites_are_those_that_are_rounded() -> None:
    """A lossy pass before it may have made other weights."""
    found = results("raise,reassemble-channels,quantize{weights=int4:channel activations=int4:token}")
    assert all(s.weight_db is not None and s.activation_db is not None for s in found.sites)
    assert len(found.sites) == 2


def test_linears_that_a_second_pass_rounds_are_added() -> None:
    found = results("raise,quantize{weights=int4:channel only=[mlp.up]},quantize{weights=int8:channel only=[mlp.down]}")
    up, down = found.sites
    assert (up.weight, down.weight) == ("w1", "w2")
    assert up.weight_db is not None
    assert down.weight_db is not None
    assert up.weight_db + 10 < down.weight_db


def test_the_worst_come_first() -> None:
    found = results("raise,quantize{skip=[mlp.up]}")
    assert [s.weight for s in found.worst(5)] == ["w2", "w1"]  # w1 stays in float: nothing is known to be bad
    assert found.worst(1)[0].weight == "w2"


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    planish.to_onnx(block(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.concatenate([b["x"] for b in batches(1)]))
    return tmp_path


def optimize(files: Path, *more: str) -> int:
    start = ["optimize", files / "m.onnx", "-o", files / "q.onnx", "-r", "os-plus", "--calibrate", files / "d.npz"]
    return cli.main([str(a) for a in (*start, *more)])


def test_the_table(files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    assert optimize(files) == 0
    printed = capsys.readouterr().out
    assert "signal to noise, and outliers" in printed
    lines = [line for line in printed.splitlines() if line.startswith("|linear ")]
    assert len(lines) == 2
    assert any("5" in line.split("|")[4].split("->")[0] for line in lines)
    assert "MB of constants: weights " in printed
    assert " bits per weight, scales counted\n" in printed


def test_all_prints_every_place_of_a_refusal(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert optimize(files) == 0
    short = capsys.readouterr().out
    assert optimize(files, "--all") == 0
    everything = capsys.readouterr().out
    assert " (first: " in short
    assert " (first: " not in everything
    assert "declined 1: " in everything


def test_the_report_has_every_site(files: Path) -> None:
    assert optimize(files, "--report", str(files / "r.json"), "--quiet") == 0
    found = json.loads((files / "r.json").read_text())["report"]["results"]
    assert [s["weight_db"] > 0 for s in found["sites"]] == [True, True]
    assert {s["before"]["sinks"] for s in found["sites"]} == {0}
    assert found["bytes_after"]["weights"] * 4 == found["bytes_before"]["weights"]
    assert "ratio before" in found["medians"]


def test_pictures(files: Path) -> None:
    for folder in ("one", "two"):
        assert optimize(files, "--plots", str(files / folder), "--quiet") == 0
    names = sorted(p.name for p in (files / "one").iterdir())
    assert names[0] == "00-overview.png"
    assert len(names) == 3
    assert all(n.endswith(".png") and n.isascii() for n in names)
    for name in names:
        data = (files / "one" / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert data == (files / "two" / name).read_bytes()


def test_pictures_want_matplotlib(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert optimize(files, "--plots", str(files / "p")) == 2
    assert capsys.readouterr().err == (
        "error: plots: need matplotlib, which is not installed\n  hint: pip install 'planish[plots]'\n"
    )
    assert not (files / "q.onnx").exists()
    monkeypatch.undo()
    (files / "taken").write_text("a file")
    with pytest.raises(PlanishError, match="taken: cannot be written: File exists"):
        plots.check_plots(files / "taken")


def test_matplotlib_is_not_imported_for_a_report() -> None:
    code = "import planish.report.plots, planish.report.terminal, sys; sys.exit('matplotlib' in sys.modules)"
    import subprocess

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
