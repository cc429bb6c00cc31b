"""`planish kernels --plan`: the table of regions, what did not fuse, the same as data, and errors."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_select import quantised

from planish import cli
from planish.codegen.select import select
from planish.codegen.triton import emit_plan
from planish.ir.store import load, save
from planish.report.kernels import as_dict

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import blocks

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "600")

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "decoder.ir"
    save(quantised(blocks.decoder(128, tokens=16), "quantize{activations=int8:token}", []), path)
    return path


def test_the_plan_of_a_quantised_graph(run: Run, model: Path) -> None:
    code, printed, error = run("kernels", str(model), "--plan")
    assert (code, error) == (0, "")
    lines = [re.sub(r"\s*\|\s*", "|", line) for line in printed.splitlines()]
    table = {cells[1]: cells[2:6] for cells in (line.split("|") for line in lines) if len(cells) == 7}
    assert list(table)[:6] == ["region", "graph_0", "prologue_1", "gemm_2", "gemm_3", "gemm_4"]
    assert table["prologue_1"][1] == "embedding.weight.rows f32[batch, 16, 128]"
    assert table["prologue_1"][3] == "rms_norm > quantize_token"
    assert table["gemm_4"][3] == "int8 per token x int8 (the kernel of gemm_3)"
    assert "2 products: int8 per token x int8 > silu > mul > finished rows: quantize_token" in printed
    assert "|rms_norm %rms_norm_14|rms_norm|a norm starts a kernel of its own, whose rows are spread" in "\n".join(
        lines
    )
    assert "4 prologues and 7 gemms, 8 different kernels of 11" in printed


def test_a_norm_that_nothing_quantised_reads_says_so(run: Run, tmp_path: Path) -> None:
    from encoder_blocks import data, norm, post_norm
    from patterns import Build

    b = Build()
    x = b.input("x", "f32[batch, 8]")
    graph = b.output(norm(b, b("linear", x, b.random(8, 8)), "n"))
    path = tmp_path / "m.ir"
    save(quantised(graph, "quantize{activations=int8:token}", []), path)
    _, printed, _ = run("kernels", str(path))
    assert "no kernel reads what it makes" in printed
    save(quantised(post_norm(), "quantize{activations=uint8:tensor}", data(samples=1)), path)
    _, printed, _ = run("kernels", str(path))
    assert "its range is that of the whole tensor: no program sees all of it" in printed


def test_the_plan_as_data(run: Run, model: Path) -> None:
    from planish.integrate.api import capture

    code, printed, _ = run("kernels", str(model), "--json")
    assert code == 0
    found = json.loads(printed)
    assert found == json.loads(json.dumps(as_dict(select(capture(model)))))
    assert found["counts"] == {"prologue": 4, "gemm": 7, "graph": 2}
    assert found["different_kernels"] == 8
    by_name = {r["name"]: r for r in found["regions"]}
    assert by_name["gemm_4"]["kernel"] == "gemm_3"
    assert by_name["gemm_7"]["steps"] == ["acc = linear(a, weight)", "out = add(residual, acc)"]
    assert by_name["prologue_1"]["inputs"] == [{"name": "embedding.weight.rows", "type": "f32[batch, 16, 128]"}]


def test_a_float_model_is_quantised_first(run: Run, tmp_path: Path) -> None:
    graph = blocks.decoder(128, tokens=16)
    path, data = tmp_path / "float.ir", tmp_path / "data.npz"
    save(graph, path)
    np.savez(data, ids=np.concatenate([b["ids"] for b in blocks.batches(16, 2)]))
    for how in (["--pipeline", "raise,quantize{weights=uint4:g32}"], ["-r", "w4a8", "--calibrate", str(data)]):
        code, printed, error = run("kernels", str(path), "--plan", "-q", *how)
        assert (code, error) == (0, "")
        assert "7 gemms" in printed
    code, printed, _ = run("kernels", str(path), "-q", "-p", "quantize{activations=int8:token}", "--no-closing")
    assert code == 0
    assert "it needs whole rows, and closing steps are switched off" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing in it is quantised\n  hint: --recipe NAME quantises it first"),
        (["-r", "w4a8"], "recipe 'w4a8': needs calibration data"),
        (["-r", "w4a8", "-p", "raise"], "options --recipe and --pipeline: expected one of them"),
        (["--calibrate", "x.npz"], "option --calibrate: needs --recipe or --pipeline"),
        (["--row-mask", "m"], "option --row-mask: needs --calibrate"),
    ],
)
def test_errors(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    path = tmp_path / "float.ir"
    save(blocks.decoder(64, tokens=4), path)
    code, printed, error = run("kernels", str(path), *arguments)
    assert (code, printed) == (2, "")
    assert message in error


def test_a_model_that_is_lowered_already(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "lowered.ir"
    pipeline = "quantize{activations=int8:token embeddings=none},lower{target=ort}"
    save(quantised(blocks.decoder(64, tokens=4), pipeline, []), path)
    code, printed, error = run("kernels", str(path))
    assert (code, printed) == (2, "")
    assert "it is quantised in ONNX Runtime's own form, which kernels do not read" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_91"], "target 'sm_91': unknown"),
        (["--target", "sm_90", "--rows", "0"], "option --rows: expected positive numbers"),
        (["--dtype", "f64"], "kernel dtype 'f64': unknown"),
    ],
)
def test_what_is_asked_for_is_checked_before_files_are_written(
    run: Run, model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, _, error = run("kernels", str(model), "--emit", str(tmp_path / "made"), *arguments)
    assert code == 2
    assert message in error
    assert not (tmp_path / "made").exists()


def test_files_are_written_together_or_not_at_all(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "made"
    (folder / "plan.txt").mkdir(parents=True)
    code, _, error = run("kernels", str(model), "--emit", str(folder))
    assert (code, [path.name for path in folder.iterdir()]) == (2, ["plan.txt"])
    assert "plan.txt: cannot be written: is a directory" in error

    moved, replace = [], os.replace

    def interrupted(source: Path, target: Path) -> None:
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            emit_plan(select(load(model)), tmp_path / "new")
    assert len(moved) == 2
    assert not (tmp_path / "new").exists()
