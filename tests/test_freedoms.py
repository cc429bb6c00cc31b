"""The freedoms that no pass has used: counts, examples, what a pass takes away, and where the command says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from block_models import WIDTH, block, save
from channel_blocks import rotary
from encoder_blocks import linear, norm, pre_norm, statistics
from patterns import Build

from planish import cli
from planish.integrate.convert import run_pipeline
from planish.ir.graph import Graph
from planish.ir.ops.base import Act
from planish.ir.spaces import analyse
from planish.passes.manager import Pipeline
from planish.report.freedoms import FREE, Freedom, FreedomInstrument, freedoms, summary
from planish.report.inspection import inspect


def by_act(found: tuple[Freedom, ...]) -> dict[str, Freedom]:
    assert [f.act for f in found] == [act.value for act in FREE]
    return {f.act: f for f in found}


@pytest.mark.parametrize("graph", [pre_norm(), rotary()], ids=["pre-norm", "rotary"])
def test_without_passes_everything_is_left(graph: Graph) -> None:
    found = by_act(freedoms(graph))
    for act in FREE:
        free = [s for s in analyse(graph).admitted(act) if s.size > 1 and (s.constants or s.folds)]
        left = found[act.value]
        assert (left.free, left.unused, left.channels) == (len(free), len(free), sum(s.size for s in free))
        assert len(left.examples) == min(3, len(free))


def test_what_a_pass_used_is_not_left() -> None:
    """Balance reaches every scale space, and leaves the other acts alone."""
    graph = rotary()
    after, report = Pipeline("scale-channels{method=balance}").run(graph)
    before, left = by_act(freedoms(graph)), by_act(freedoms(after, report.used))
    assert set(report.used) == {Act.SCALE}
    assert before["scale"].unused == len(report.passes[0].applied) == 6
    assert (left["scale"].unused, left["scale"].channels, left["scale"].examples) == (0, 0, ())
    assert left["scale"].free == before["scale"].free
    assert left["permute"] == before["permute"]


def test_a_pass_that_used_some() -> None:
    graph = rotary()
    after, report = Pipeline("permute-channels{group=2 space=residual}").run(graph)
    before, left = by_act(freedoms(graph)), by_act(freedoms(after, report.used))
    assert left["permute"].unused == before["permute"].unused - 1
    assert left["permute"].channels == before["permute"].channels - 8
    assert str(left["permute"]) == "permute: 3 of 4 free spaces unused (32 channels)"
    assert str(before["permute"]) == "permute: 4 free spaces unused (40 channels)"


def test_the_largest_are_the_examples() -> None:
    b = Build()
    x = b.input("x", "f32[n, 4]")
    for width in (2, 8, 4, 16):
        x = b("relu", linear(b, x, width, f"w{width}"))
    found = by_act(freedoms(b.output(linear(b, x, 4, "last"))))["permute"]
    assert found.examples == ("linear %linear_5", "linear %linear_1", "linear %linear_3")
    assert found.channels == 30


def test_the_line() -> None:
    two = Freedom("scale", 5, 2, 64, ("linear a",)), Freedom("shift", 1, 0, 0, ())
    assert summary(two) == "free and unused channel spaces: scale 2 of 5 (64 channels)"
    assert summary(two[1:]) == ""


def test_passes_that_fold_count() -> None:
    """A gain that was folded used the scale of its space."""
    graph = pre_norm()
    _, report = Pipeline("fold-norm-gain").run(graph)
    assert set(report.used) == {Act.SCALE, Act.SHIFT}


def test_before_rounding() -> None:
    """Quantised weights hide spaces: counted is what was there before."""
    graph = pre_norm()
    stats = statistics(graph)
    pipeline = Pipeline("scale-channels,quantize{activations=uint8:tensor:static}")
    result, report, _ = run_pipeline(graph, pipeline, calibration=stats)
    looked = {f["act"]: f["free"] for f in report.freedoms}
    assert looked["scale"] == by_act(freedoms(graph))["scale"].free
    assert by_act(freedoms(result))["scale"].free < looked["scale"]
    instrument = FreedomInstrument()
    Pipeline("scale-channels{method=balance}").run(graph, instruments=[instrument])
    assert instrument.graph is None


def test_inspection_says_so() -> None:
    graph = pre_norm()
    assert inspect(graph).freedoms == freedoms(graph)
    assert inspect(graph).as_dict()["freedoms"][0]["act"] == "permute"


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(block(2), tmp_path / "model.onnx")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = cli.main([str(a) for a in arguments])
    out = capsys.readouterr().out
    assert code == 0
    return out


def test_inspect(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "inspect", model)
    assert "no pass has used permute in 2 spaces, the largest: " in out
    (line,) = [row for row in run(capsys, "inspect", model, "--act", "scale").splitlines() if "no pass has used" in row]
    assert line.startswith("no pass has used scale in ")


def test_opt(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "opt", model, "-p", "raise,scale-channels{method=balance}", "-o", tmp_path / "out.onnx")
    (line,) = [row for row in out.splitlines() if row.startswith("free and unused channel spaces: ")]
    assert "permute 2 of 2" in line
    assert "scale" not in line
    plain = json.loads(run(capsys, "opt", model, "-p", "raise", "--json"))
    assert {f["act"]: f["unused"] for f in plain["freedoms"]}["permute"] == 2


def test_optimize(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, x=np.random.default_rng(seed).normal(size=(24, 5, WIDTH)).astype(np.float32))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: test\nsummary: scale and quantise\n"
        "pipeline: raise,scale-channels{method=smoothquant},quantize{activations=uint8:tensor:static},lower\n"
        "needs: {calibration: true}\n"
    )
    out = run(capsys, "optimize", model, "-o", tmp_path / "out.onnx", "--recipe", recipe, "--calibrate", data)
    assert "free and unused channel spaces: permute 2 of 2" in out


def test_names_of_modules(seed: int) -> None:
    """Examples name the place in the model where it is known."""
    b = Build(seed)
    x = linear(b, norm(b, b.input("x", "f32[n, 8]"), "norm"), 8, "a")
    assert x.producer is not None
    x.producer.source = "model.layers.0.up"
    graph = b.output(linear(b, x, 8, "last"))
    assert "linear model.layers.0.up" in by_act(freedoms(graph))["scale"].examples
