"""The command: what each prints and returns, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from block_models import WIDTH, Builder, block, save
from helpers import check_text

import planish
from planish import cli
from planish.ir import store
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.graph import Graph
from planish.ir.ops import get
from planish.ir.types import TensorType
from planish.passes.base import Context, Exactness, Pass, PassReport
from planish.passes.manager import Instrument

RECIPE = """\
name: test
summary: scale and quantise
pipeline: raise,scale-channels{method=smoothquant},quantize{activations=uint8:tensor:static},lower
needs: {calibration: true}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(block(2), tmp_path / "model.onnx")


@pytest.fixture
def data(tmp_path: Path, seed: int) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.random.default_rng(seed).normal(size=(24, 5, WIDTH)).astype(np.float32))
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# -- optimize ------------------------------------------------------------------------------------


def test_optimize(run: Run, model: Path, data: Path, recipe: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "q.onnx", tmp_path / "r.json"
    code, printed, _ = run("optimize", model, "-o", out, "--recipe", recipe, "--calibrate", data, "--report", report)
    assert code == 0
    onnx.checker.check_model(str(out), full_check=True)
    assert re.search(r"scale-channels +\| +[1-9]", printed)
    assert re.search(rf"^{out}: 0\.0 MB -> 0\.0 MB, ", printed, re.MULTILINE)
    assert "exact passes were checked in float64 on " in printed
    found = json.loads(report.read_text())
    assert found["recipe"] == "test"
    assert found["target"] == "onnx"
    assert [p["name"] for p in found["report"]["passes"]][-3:] == ["scale-channels", "quantize", "lower"]
    assert found["calibration"]["data"] == str(data)
    assert found["bytes_before"] == model.stat().st_size
    assert found["bytes_after"] == out.stat().st_size
    verdict = planish.verify(model, out, tolerance=0.2)
    assert 1e-4 < verdict.error < 0.2


def test_optimize_is_reproducible(run: Run, model: Path, data: Path, recipe: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.onnx" for i in range(2)]
    for file in files:
        assert run("optimize", model, "-o", file, "-r", recipe, "--calibrate", data, "-q")[:2] == (0, "")
    assert files[0].read_bytes() == files[1].read_bytes()


def test_convert_takes_batches_and_statistics(model: Path, data: Path, recipe: Path, tmp_path: Path) -> None:
    x = np.load(data)["x"]
    batches = ({"x": x[i : i + 8]} for i in range(0, 24, 8))  # read once
    done = planish.convert(model, tmp_path / "a.onnx", recipe, calibration=batches)
    assert done.calibration["batches"] == "3"
    planish.convert(model, tmp_path / "b.onnx", recipe, calibration=data)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_optimize_wants_calibration_where_the_recipe_does(run: Run, model: Path, recipe: Path, tmp_path: Path) -> None:
    assert run("optimize", model, "-o", tmp_path / "q.onnx", "-r", recipe) == (
        2,
        "",
        "error: recipe 'test': needs calibration data\n  hint: give some: --calibrate, or calibration=\n",
    )
    code, _, error = run("optimize", model, "-o", tmp_path / "q.onnx", "-r", recipe, "--samples", 3)
    assert (code, error) == (2, "error: option --samples: needs --calibrate\n")


def test_optimize_refuses_unknown_targets_and_recipes(
    run: Run, model: Path, data: Path, recipe: Path, tmp_path: Path
) -> None:
    start = ("optimize", model, "-o", tmp_path / "q.onnx", "--calibrate", data)
    assert run(*start, "-r", recipe, "--target", "trt")[2] == ("error: target 'trt': unknown; expected onnx or ort\n")
    code, _, error = run(*start, "-r", "w8a8-dinamic")
    assert code == 2
    assert error.startswith("error: recipe 'w8a8-dinamic': unknown; expected a file (.yaml) or one of ")
    assert not (tmp_path / "q.onnx").exists()


# -- opt -----------------------------------------------------------------------------------------


def test_opt_prints_the_text(run: Run, model: Path) -> None:
    code, text, error = run("opt", model, "-p", "raise")
    assert (code, error) == (0, "")
    assert text.startswith("graph @block(%x: f32[batch, tokens, 8]) {\n")
    assert text.count(" = linear(") == 9


def test_opt_writes_onnx_and_ir(run: Run, model: Path, tmp_path: Path) -> None:
    for name in ("out.onnx", "out.ir"):
        assert run("opt", model, "-p", "raise", "-o", tmp_path / name, "--quiet") == (0, "", "")
    code, printed, _ = run("verify", tmp_path / "out.onnx", tmp_path / "out.ir", "--tolerance", 0)
    assert code == 0, printed
    graph = planish.capture(tmp_path / "out.ir")
    check_text(graph)
    assert sum(n.op.name == "linear" for n in graph.nodes) == 9


def test_opt_dumps_and_saves_statistics(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    stats, folder = tmp_path / "s.safetensors", tmp_path / "dump"
    options = ("--calibrate", data, "--stats", stats, "--dump", folder, "--json")
    code, printed, _ = run("opt", model, "-p", "raise,scale-channels{method=percentile}", *options)
    assert code == 0
    report = json.loads(printed)
    assert report["pipeline"].endswith("scale-channels{method=percentile}")
    assert len(report["passes"]) == len(list(folder.glob("*.diff")))
    assert planish.Stats.load(stats).source["batches"] == "3"
    again = run("opt", model, "-p", "raise,scale-channels{method=percentile}", "--calibrate", stats)
    assert again[0] == 0
    assert run("opt", model, "-p", "raise", "--stats", stats)[2] == "error: option --stats: needs --calibrate\n"


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("raize", "error: pass 'raize': unknown\n  hint: did you mean 'raise'?\n"),
        (
            "raise,scale-channels{methud=x}",
            "error: pass 'scale-channels': unknown option 'methud'; expected method, ",
        ),
        ("raise,,lower", "error: pipeline: expected a pass name at column 7\n"),
        ("scale-channels", "error: pass 'scale-channels': needs calibration statistics\n"),
    ],
)
def test_opt_and_bad_pipelines(run: Run, model: Path, pipeline: str, message: str) -> None:
    code, printed, error = run("opt", model, "-p", pipeline)
    assert (code, printed) == (2, "")
    assert error.startswith(message)


def test_opt_writes_for_the_target_of_its_lowering(run: Run, model: Path, tmp_path: Path) -> None:
    pipeline = "raise,quantize{activations=uint8:tensor},lower{target=ort}"
    start = ("opt", model, "-p", pipeline, "-o", tmp_path / "q.onnx")
    assert run(*start, "--quiet") == (0, "", "")
    (tmp_path / "q.onnx").unlink()
    code, _, error = run(*start, "--target", "onnx")
    assert code == 2
    assert error.startswith("error: op 'com.microsoft::MatMulIntegerToFloat': is not in target onnx\n")
    assert error.endswith("hint: write for --target ort\n")
    assert run(*start, "--target", "trt")[2] == "error: target 'trt': unknown; expected onnx or ort\n"
    assert run(*start, "--opset", 99)[2].startswith("error: opset 99: unknown; expected 7 to ")
    assert not (tmp_path / "q.onnx").exists()


def test_opt_says_what_is_not_lowered(run: Run, model: Path, tmp_path: Path) -> None:
    quantised = "raise,quantize{activations=uint8:tensor}"
    told = "not lowered: an engine's optimiser may compute other numbers; put lower{target=ort} behind it"
    for pipeline, output, notes in (
        (quantised, "q.onnx", [told]),
        (quantised, "q.ir", []),
        (f"{quantised},lower{{target=ort}}", "q.onnx", []),
    ):
        code, out, _ = run("opt", model, "-p", pipeline, "-o", tmp_path / output, "--target", "ort", "--json")
        assert code == 0
        assert [n for p in json.loads(out)["passes"] for n in p["notes"] if "lowered" in n] == notes


def test_an_option_is_suggested_as_it_is_spelled(run: Run, model: Path) -> None:
    for wrong in ("min_gian", "min-gian"):
        error = run("opt", model, "-p", f"raise,shift-channels{{{wrong}=1}}")[2]
        assert error.endswith("  hint: did you mean 'min-gain'?\n")


def test_statistics_that_an_option_needs_are_missed_at_once(model: Path) -> None:
    @dataclass(frozen=True)
    class Picky(Pass):
        name = "picky"
        exactness = Exactness.LOSSY
        wanted: bool = False

        @property
        def needs_stats(self) -> bool:
            return self.wanted

        def run(self, graph: Graph, context: Context) -> PassReport:
            return PassReport(self.name)

    class Watch(Instrument):
        def before(self, instance: Pass, graph: Graph) -> None:
            raise AssertionError("a pass ran")

    graph = planish.capture(model)
    planish.Pipeline([Picky()]).run(graph)
    with pytest.raises(PlanishError, match="pass 'picky': needs calibration statistics"):
        planish.Pipeline([Picky(), Picky(wanted=True)]).run(graph, instruments=[Watch()])


# -- verify --------------------------------------------------------------------------------------


def test_verify(run: Run, model: Path, tmp_path: Path) -> None:
    other = save(block(2, seed=5), tmp_path / "other.onnx")
    code, printed, _ = run("verify", model, model)
    assert code == 0
    assert "equal: relative error 0.000e+00, tolerance 1e-05, 2 sets of inputs\n" in printed
    code, printed, _ = run("verify", model, other)
    assert code == 1
    assert "DIFFERENT: relative error " in printed
    assert re.search(r"head\.out \| +\d\.\d{3}e[+-]\d\d \|at \[\d, \d, \d\]: \S+ against \S+", printed)
    found = json.loads(run("verify", model, other, "--json")[1])
    assert found["equal"] is False
    assert found["outputs"][0]["name"] == "head.out"


def test_verify_on_given_inputs(run: Run, model: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "x.npz"
    np.savez(inputs, x=np.ones((1, 3, WIDTH), np.float32))
    code, printed, _ = run("verify", model, model, "--inputs", inputs, "--random", 0)
    assert code == 0
    assert "1 sets of inputs" in printed
    np.savez(inputs, x=np.ones((3, WIDTH), np.float32))
    code, _, error = run("verify", model, model, "--inputs", inputs)
    assert (code, error) == (
        2,
        f"error: {inputs}: array 'x': wrong shape; expected f32[batch, tokens, 8], got [3, 8]\n",
    )
    assert run("verify", model, model, "--random", 0)[2].startswith("error: no inputs to compare on: none were given\n")


def test_verify_wants_the_same_inputs_and_outputs(run: Run, model: Path, tmp_path: Path) -> None:
    changed = block(2)
    changed.graph.output[0].name = "other"
    changed.graph.node[-1].output[0] = "other"
    code, printed, _ = run("verify", model, save(changed, tmp_path / "o.onnx"))
    assert code == 0
    assert "output 'head.out' is compared with 'other'\n" in printed
    renamed = block(2)
    renamed.graph.input[0].name = "xs"
    for node in renamed.graph.node:
        node.input[:] = ["xs" if name == "x" else name for name in node.input]
    assert run("verify", model, save(renamed, tmp_path / "i.onnx"))[2] == (
        "error: input 'x': only one of the models has it; the first has x, the second xs\n  hint: did you mean 'xs'?\n"
    )


# -- lists ---------------------------------------------------------------------------------------


def test_passes_and_recipes(run: Run) -> None:
    code, printed, _ = run("passes")
    assert code == 0
    assert "scale-channels  [exact]  (needs calibration)\n" in printed
    assert "    alpha=0.5  float\n" in printed
    listed = {entry["name"] for entry in json.loads(run("passes", "--json")[1])}
    from planish.passes.pipeline import GROUPS, REGISTRY

    assert listed == {*REGISTRY, *GROUPS}
    code, printed, _ = run("recipes", "--json")
    assert code == 0
    found = {entry["name"]: entry for entry in json.loads(printed)}
    assert list(found) == sorted(found)
    assert found["os-plus"]["needs"] == {"calibration": True, "targets": ["onnx", "ort"]}
    assert found["os-plus"]["source"] == "arXiv 2304.09145"
    code, printed, _ = run("recipes")
    assert code == 0
    assert re.search(r"^os-plus  \[onnx, ort\]  \(needs calibration\)\n    int8 weights", printed, re.MULTILINE)
    assert "\n    source: arXiv 2304.09145\n" in printed
    assert re.search(r"^quarot  \[.*\]( |$)", printed, re.MULTILINE)


def test_version_and_help(run: Run) -> None:
    assert run("--version") == (0, f"planish {planish.__version__}\n", "")
    assert run()[1] == run("--help")[1]
    for name in ("inspect", "lint", "optimize", "opt", "kernels", "verify", "passes", "recipes"):
        code, printed, _ = run(name, "--help")
        assert code == 0
        assert printed.startswith(f"Usage: planish {name} ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspct"], "No such command 'inspct'"),
        (["inspect"], "Missing argument 'model'"),
        (["verify", "a", "b", "--tolerance", "x"], "Invalid value for '--tolerance': "),
        (["inspect", "a", "--jsn"], "No such option: --jsn"),
    ],
)
def test_a_wrong_command_line(run: Run, arguments: list[str], message: str) -> None:
    code, printed, error = run(*arguments)
    assert (code, printed) == (2, "")
    assert error.startswith(f"error: {message}")
    assert re.search(r"\n  hint: planish.* --help\n$", error)


# -- models that are wrong -----------------------------------------------------------------------


def with_external_data(folder: Path, location: str | None = None) -> Path:
    path = folder / "external.onnx"
    onnx.save(block(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    if location is not None:
        proto = onnx.load(path, load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        onnx.save(proto, path)
    return path


def wrong_model(kind: str, folder: Path) -> Path:
    path = folder / "wrong.onnx"
    whole = block().SerializeToString()
    proto = block()
    match kind:
        case "missing":
            return folder / "none.onnx"
        case "directory":
            path.mkdir()
        case "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        case "not a protobuf":
            path.write_bytes(b"this is a text and not a model")
        case "empty file":
            path.write_bytes(b"")
        case "empty graph":
            del proto.graph.node[:]
            del proto.graph.output[:]
            save(proto, path)
        case "unknown op":
            proto.graph.node[0].op_type = "LayerNormalisation"
            save(proto, path)
        case "no external data":
            path = with_external_data(folder)
            (folder / "weights.bin").unlink()
        case "external data outside":
            return with_external_data(folder, "../secret.bin")
        case "NaN":
            make = Builder()
            out = make.linear(make.norm("x", "norm"), "out")
            make.weights["out.weight"][3, 1] = np.nan
            save(make.model(out), path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "{path}: cannot be read: No such file or directory"),
        ("directory", "{path}: is a directory; expected an ONNX file"),
        ("truncated", "{path}: not an ONNX model, or cut off; protobuf cannot parse its "),
        ("not a protobuf", "{path}: not an ONNX model, or cut off; protobuf cannot parse its 30 bytes"),
        ("empty file", "{path}: empty file; expected an ONNX model"),
        ("empty graph", "empty graph: no nodes and no outputs"),
        ("unknown op", "operator 'LayerNormalisation': unknown in opset 20\n  in node 0 '/layers/0/norm/Norm': "),
        (
            "no external data",
            "tensor 'layers.0.norm.weight': missing external data: {folder}/weights.bin: no such file",
        ),
        (
            "external data outside",
            "tensor 'layers.0.norm.weight': external data '../secret.bin' leads outside the model's folder",
        ),
        ("NaN", "weight 'out.weight': holds NaN at [3, 1] (1 of 64 elements); expected finite numbers\n  in "),
    ],
)
def test_models_that_are_wrong(run: Run, data: Path, recipe: Path, tmp_path: Path, kind: str, message: str) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    path, out = wrong_model(kind, folder), tmp_path / "out.onnx"
    before = set(tmp_path.iterdir())
    code, printed, error = run("optimize", path, "-o", out, "-r", recipe, "--calibrate", data)
    assert (code, printed) == (2, "")
    assert error.startswith("error: " + message.format(path=path, folder=folder))
    assert "Traceback" not in error
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.zeros((2, 3, 8), "f")}, "array 'y': not an input of the model; expected x"),
        ({"x": np.zeros((2, 3, 9), "f")}, "array 'x': wrong shape; expected f32[?, tokens, 8], got [2, 3, 9]"),
        ({"x": np.full((2, 3, 8), np.nan, "f")}, None),
    ],
)
def test_calibration_data_that_is_wrong(
    run: Run, model: Path, recipe: Path, tmp_path: Path, arrays: dict[str, np.ndarray], message: str | None
) -> None:
    path, out = tmp_path / "wrong.npz", tmp_path / "out.onnx"
    np.savez(path, **arrays)
    code, printed, error = run("optimize", model, "-o", out, "-r", recipe, "--calibrate", path)
    assert (code, printed) == (2, "")
    if message is not None:
        assert error == f"error: {path}: {message}\n"
    else:
        assert error.startswith("error: activation %layers.0.norm.out: holds NaN at row, channel [0, 0] ")
    assert not out.exists()


# -- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file/out.onnx", "cannot be written: Not a directory"),
        ("none/out.onnx", "cannot be written: the folder {folder}/none does not exist"),
        ("folder.onnx", "cannot be written: is a directory"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    run: Run,
    data: Path,
    recipe: Path,
    tmp_path: Path,
    place: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.onnx").mkdir()
    monkeypatch.setattr("planish.integrate.convert.capture", lambda model: pytest.fail("it was captured"))
    monkeypatch.setattr("planish.integrate.api.capture", lambda model: pytest.fail("it was captured"))
    expected = f"error: {tmp_path / place}: {message.format(folder=tmp_path)}\n"
    code, _, error = run("optimize", "m", "-o", tmp_path / place, "-r", recipe, "--calibrate", data)
    assert (code, error) == (2, expected)
    code, _, error = run("opt", "m", "-o", tmp_path / place, "-p", "raise")
    assert (code, error) == (2, expected)


@pytest.mark.parametrize("suffix", [".ir", ".mlir"])
def test_a_recipe_writes_onnx(run: Run, model: Path, data: Path, recipe: Path, suffix: str) -> None:
    out = model.parent / f"out{suffix}"
    code, _, error = run("optimize", model, "-o", out, "-r", recipe, "--calibrate", data)
    assert (code, error) == (
        2,
        f"error: {out}: a recipe writes ONNX\n  hint: planish opt -p PIPELINE writes {suffix}\n",
    )
    assert not out.exists()


def test_what_is_written_replaces_nothing_that_is_read(run: Run, model: Path, data: Path, recipe: Path) -> None:
    out = model.parent / "out.onnx"
    held = [path.read_bytes() for path in (model, data, recipe)]
    optimize = ("optimize", model, "-r", recipe, "--calibrate", data)
    for arguments, option, path, what in (
        ((*optimize, "-o", out, "--report", model), "--report", model, "the model"),
        ((*optimize, "-o", out, "--report", out), "--report", out, "the output"),
        ((*optimize, "-o", out, "--report", recipe), "--report", recipe, "the recipe"),
        ((*optimize, "-o", data), "--output", data, "the calibration data"),
        (("opt", model, "-p", "raise", "--calibrate", data, "--stats", model), "--stats", model, "the model"),
    ):
        code, _, error = run(*arguments)
        assert (code, error) == (2, f"error: option {option}: {path}: is {what}\n  hint: write to another name\n")
    assert [path.read_bytes() for path in (model, data, recipe)] == held
    assert not out.exists()


def test_a_full_disk(
    run: Run, model: Path, data: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.onnx"
    out.write_text("old")

    def full(name: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("planish.codegen.files.os.replace", full)
    code, _, error = run("optimize", model, "-o", out, "-r", recipe, "--calibrate", data)
    assert (code, error) == (2, f"error: {out}: cannot be written: No space left on device\n")
    assert out.read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test_unknown_kinds_of_output(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("opt", model, "-p", "raise", "-o", tmp_path / "a.txt")[2] == (
        f"error: {tmp_path}/a.txt: unknown kind of output; expected .onnx, .ir or .mlir\n"
    )


# -- bugs, memory, interruptions -----------------------------------------------------------------


def test_a_bug_is_called_a_bug(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("a hole\nin the floor")

    monkeypatch.setattr("planish.integrate.api.verify", broken)
    code, printed, error = run("verify", model, model)
    assert (code, printed) == (70, "")
    assert error == (
        "internal error: RuntimeError: a hole\n"
        "  hint: this is a bug of planish, please report it with the model; --debug shows where\n"
    )
    code, _, error = run("--debug", "verify", model, model)
    assert code == 70
    assert "Traceback (most recent call last):" in error
    assert "in broken" in error


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (MemoryError(), "out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            "out of memory: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes",
        ),
        (OSError(28, "No space left on device", "q.onnx"), "q.onnx: No space left on device"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_what_the_machine_lacks(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, message: str
) -> None:
    def lacking(*arguments: object, **options: object) -> None:
        raise raised

    monkeypatch.setattr("planish.integrate.api.verify", lacking)
    assert run("verify", model, model) == (2, "", f"error: {message}\n")


def test_warnings_are_one_line(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def warning(*arguments: object, **options: object) -> planish.Graph:
        warnings.showwarning("the model is old", UserWarning, "f.py", 3)
        raise PlanishError("model: too old")

    monkeypatch.setattr("planish.integrate.api.verify", warning)
    assert run("verify", model, model)[2] == "warning: the model is old\nerror: model: too old\n"


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "planish", *map(str, arguments)]
    options["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(model: Path, tmp_path: Path, seed: int, number: signal.Signals) -> None:
    data, out, dump = tmp_path / "long.npz", tmp_path / "out.onnx", tmp_path / "dump"
    x = np.random.default_rng(seed).normal(size=(200_000, 1, WIDTH)).astype(np.float32)
    np.savez(data, x=x)
    out.write_text("old")
    before = set(tmp_path.iterdir())
    process = start(
        *("opt", model, "-p", "raise,scale-channels", "-o", out, "--dump", dump),
        *("--calibrate", data, "--batch", 1),
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(dump.glob("01-*.ir")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error == "error: interrupted\n"
    assert out.read_text() == "old"
    assert set(tmp_path.iterdir()) == before | {dump}


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = start("passes", stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(120) == 141
    assert error == ""


def test_progress_bars_stay_out_of_a_pipe(model: Path, data: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "planish", "opt", model, "-p", "raise,scale-channels", "--calibrate", data],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.stderr == ""
    assert done.stdout.startswith("graph @block")


# -- the API behind it ---------------------------------------------------------------------------


def test_capture_takes_models_and_refuses_the_rest(model: Path) -> None:
    graph = planish.capture(model)
    assert planish.capture(graph) is graph
    assert planish.capture(onnx.load(model)) == graph
    assert planish.capture(str(model)) == graph
    with pytest.raises(PlanishError) as caught:
        planish.capture(np.zeros(3))
    assert caught.value.what == (
        "model: a numpy.ndarray cannot be captured; expected a path to an .onnx file, an onnx.ModelProto, "
        "a torch.nn.Module or a torch.export.ExportedProgram"
    )


def test_the_package_that_captures_is_the_function_too(model: Path) -> None:
    code = (
        "import planish; first = planish.capture(r'{0}'); import planish.capture.from_onnx as m\n"
        "assert planish.capture(r'{0}') == first == m.from_onnx(r'{0}')"
    )
    subprocess.run([sys.executable, "-c", code.format(model)], check=True)


def test_to_onnx(model: Path, tmp_path: Path) -> None:
    planish.to_onnx(planish.capture(model), tmp_path / "again.onnx")
    assert planish.verify(model, tmp_path / "again.onnx", tolerance=0.0).equal


def test_ir_files_hold_every_constant(tmp_path: Path) -> None:
    graph = Graph("g")
    x = graph.add_input("x", TensorType("f32", (4, 64)))
    wide = graph.add_constant("wide", Constant(np.random.default_rng(0).normal(size=(64,)), "f32", (64,)))
    text = graph.add_constant("text", Constant.of(np.array([f"w{i}" for i in range(20)], object)))
    total = graph.append(get("add"), [x, wide])
    graph.add_output("y", total.result)
    graph.add_output("t", text)
    store.save(graph, tmp_path / "g.ir")
    again = store.load(tmp_path / "g.ir")
    assert again == graph
    assert again.values["wide"].constant is not None
    assert again.values["wide"].constant.is_wide
    (beside,) = tmp_path.glob("g.ir.*.safetensors")
    beside.write_bytes(b"no")
    with pytest.raises(PlanishError, match=r"g\.ir\..*\.safetensors: "):
        store.load(tmp_path / "g.ir")
    (tmp_path / "g.ir").write_bytes(b"\xff")
    with pytest.raises(PlanishError, match=r"g\.ir: "):
        store.load(tmp_path / "g.ir")
