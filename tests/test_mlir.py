"""MLIR: files for each target, and torch-mlir's linalg on the CPU as an oracle that shares no kernel with torch."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from block_models import WIDTH, block, save
from helpers import check_text, random_inputs, relative_error

import planish
from planish import PlanishError, cli
from planish.codegen import mlir, mlir_flat, mlir_process
from planish.codegen.mlir_run import Oracle
from planish.integrate.emit import form_of
from planish.ir.evaluator import Evaluator
from planish.ir.text import parse, render

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import oracle as bench

EXACT = 1e-13  # relative, in float64: what two orders of summation and two libraries' exp make of tiny graphs
DIALECTS = {"linalg": "linalg.generic", "torch": "torch.aten.mm", "tosa": "tosa.matmul", "stablehlo": "stablehlo."}


class Called(torch.nn.Module):
    """A function with parameters as a module."""

    def __init__(self, function: Callable[..., Any], *parameters: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        self.held = torch.nn.ParameterList([torch.nn.Parameter(p, requires_grad=False) for p in parameters])

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, *self.held)


def captured(function: Callable[..., Any], *parameters: torch.Tensor, shape: tuple[int, ...] = (4, 8)) -> planish.Graph:
    graph = planish.capture(Called(function, *parameters), torch.zeros(shape))
    check_text(graph)
    return graph


def differs(graph: planish.Graph) -> float:
    """How far planish's evaluator is from the oracle."""
    inputs = random_inputs(graph, 0)
    found, expected = Oracle(graph).run(inputs), Evaluator(graph, torch.float64).run(inputs)
    assert found.keys() == expected.keys()
    return max(relative_error(found[name], expected[name]) for name in expected)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save(block(1), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


# -- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", mlir.TARGETS)
def test_a_file_of_each_target(target: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.mlir"
    command = ["convert", str(model), "-o", str(out), "--target", target]
    assert cli.main([*command, "--size", "batch=3", "--size", "tokens=4"]) == 0
    assert capsys.readouterr().out == (f"{out}: {target}, {out.stat().st_size} bytes\nsizes: batch=3, tokens=4\n")
    text = out.read_text()
    header, _, body = text.partition("module {")
    assert header.splitlines()[1:4] == [
        f"// arguments: x float32[3, 4, {WIDTH}]",
        f"// results: head.out float32[3, 4, {WIDTH}]",
        "// sizes: batch=3, tokens=4",
    ]
    assert DIALECTS[target] in body
    assert "dense_resource" in body and "{-#" in body  # the weights are in the file
    first = out.read_bytes()
    assert cli.main([*command, "--size", "batch=3,tokens=4", "-q"]) == 0
    assert out.read_bytes() == first
    _parses(text)


def _parses(text: str) -> None:
    """The text is valid MLIR."""
    from torch_mlir import ir
    from torch_mlir._mlir_libs import _stablehlo
    from torch_mlir.dialects import torch as dialect

    with ir.Context() as context:
        dialect.register_dialect(context)
        _stablehlo.register_dialect(context)
        assert ir.Module.parse(text).operation.verify()


def test_sizes_that_are_not_given_are_chosen(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(model), "-o", str(tmp_path / "m.mlir"), "--size", "tokens=3"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "sizes: batch=2, tokens=3; --size NAME=N takes others"
    assert planish.to_mlir(planish.capture(model), tmp_path / "n.mlir") == {"batch": 2, "tokens": 8}


def test_a_graph_behind_passes(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.mlir"
    assert cli.main(["opt", str(model), "-p", "raise,fold-norm-gain", "-o", str(out), "--target", "torch", "-q"]) == 0
    assert "torch.aten.mm" in out.read_text()


@pytest.mark.parametrize("suffix", [".onnx", ".ir"])
def test_other_forms(suffix: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / f"m{suffix}"
    assert cli.main(["convert", str(model), "-o", str(out)]) == 0
    assert planish.verify(model, out).error == 0


# -- the oracle ------------------------------------------------------------------------------------------

GRAPHS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "linear": (lambda x, w, b: torch.nn.functional.linear(x, w, b), (torch.randn(16, 8), torch.randn(16))),
    "softmax": (lambda x: x.softmax(-1), ()),
    "norm": (lambda x, w: torch.nn.functional.layer_norm(x, (8,), w), (torch.randn(8),)),
    "gelu": (torch.nn.functional.gelu, ()),
    "gelu-tanh": (lambda x: torch.nn.functional.gelu(x, approximate="tanh"), ()),
    "softplus of a parameter": (lambda x, a: x * torch.nn.functional.softplus(a), (torch.tensor([0.3]),)),
    "convolution": (
        lambda x, w: torch.nn.functional.conv2d(x[None, None], w, padding=1), (torch.randn(3, 1, 3, 3),)
    ),
    "a constant in a list": (
        lambda x, i: x[torch.arange(4)[:, None], i], (torch.tensor([[1.0], [3], [0], [2]]),)
    ),
    "largest in any order": (lambda x: x.topk(3, sorted=False)[0].sum(-1), ()),
    "sums along an axis": (lambda x: x.cumsum(1), ()),
    "outputs that are one": (lambda x: (y := x.exp(), y, x), ()),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_the_evaluator_agrees_with_the_oracle(name: str) -> None:
    function, parameters = GRAPHS[name]
    if name == "a constant in a list":
        index = parameters[0].to(torch.int64)
        graph = captured(lambda x: x[torch.arange(4)[:, None], index])
    else:
        graph = captured(function, *parameters)
    assert differs(graph) <= EXACT


def test_torch_mlirs_own_gelu_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its constant for sqrt(2/pi) is off by 2e-4: why `mlir_flat` writes the function out."""
    monkeypatch.delitem(mlir_flat.DECOMPOSED, torch.ops.aten.gelu.default)
    assert 1e-6 < differs(captured(GRAPHS["gelu-tanh"][0])) < 1e-3


@pytest.mark.parametrize(
    "form",
    [
        "activations=uint8:tensor", "activations=int8:token", "activations=uint8:tensor:static",
        "weights=int4:g4 activations=int8:token", "weights=uint2:g8:split3 activations=none",
        "weights=mxfp4 activations=none",
    ],
)  # fmt: skip
def test_quantised_graphs(form: str) -> None:
    raised, _ = planish.Pipeline("raise").run(planish.capture(block(1)), validate=False)
    x = np.random.default_rng(0).normal(size=(4, 5, WIDTH)).astype(np.float32)
    stats = planish.collect(raised, [{"x": x}])
    graph, _ = planish.Pipeline(f"quantize{{{form}}}").run(raised, stats=stats)
    assert differs(graph) <= EXACT


def test_a_product_of_codes_is_exact() -> None:
    """Integers in, integers out: 0.0 difference."""
    weight = torch.randint(-127, 128, (16, 8), dtype=torch.int8)

    def product(x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-9, 9).mul(10).round().to(torch.int8).to(torch.int32) @ weight.t().to(torch.int32)

    assert differs(captured(product)) == 0


def test_verify_by_the_oracle(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "folded.onnx"
    assert cli.main(["opt", str(model), "-p", "raise,fold-norm-gain", "-o", str(out), "-q"]) == 0
    assert cli.main(["verify", str(model), str(out), "--oracle", "mlir", "--tolerance", "1e-6"]) == 0
    text = capsys.readouterr().out
    assert "the evaluator against the oracle" in text and "second model: head.out" in text
    assert text.splitlines()[-1].endswith("tolerance 1e-06, 2 sets of inputs, computed by mlir")
    found = planish.verify(model, out, oracle="mlir")
    assert found.equal and 0 < found.error < 1e-6
    assert [a.name for a in found.agreement] == ["first model: head.out", "second model: head.out"]
    assert max(a.error for a in found.agreement) <= EXACT


def test_a_model_with_itself(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(model), "--oracle", "mlir"]) == 0
    assert "equal" in capsys.readouterr().out
    found = planish.verify(model, oracle="mlir", seed=3)
    assert 0 < found.error <= EXACT and not found.agreement


def test_a_wrong_rewrite_is_rejected(model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One term forgotten, one factor of 1.001: the oracle says so."""
    right = planish.capture(model)
    text, constants = render(right)

    def scaled(key: str, factor: float) -> planish.Graph:
        kept = constants[key]
        return parse(text, {**constants, key: type(kept).of(kept.array() * np.float32(factor))})

    found = planish.verify(right, scaled("layers.0.down.weight", 1.001), oracle="mlir", count=1)
    assert not found.equal and found.error > 1e-5
    assert all(a.error <= EXACT for a in found.agreement)
    from planish.ir.store import save as save_text

    save_text(scaled("layers.0.k.weight", 0.0), tmp_path / "wrong.ir")
    assert cli.main(["verify", str(model), str(tmp_path / "wrong.ir"), "--oracle", "mlir"]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_a_wrong_kernel_is_rejected_by_the_oracle_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What both sides of a comparison compute by the same kernel, a wrong one cannot tell apart; the oracle can."""
    graph = captured(lambda x: x.softmax(-1))
    softmax = next(node for node in graph.nodes if node.op.name == "softmax")
    right = softmax.op
    wrong = dataclasses.replace(right, evaluate=lambda *a: tuple(1.001 * y for y in right.evaluate(*a)))
    monkeypatch.setattr(softmax, "op", wrong)
    assert planish.verify(graph, graph).equal
    found = planish.verify(graph, oracle="mlir")
    assert not found.equal
    assert found.error == pytest.approx(1e-3, rel=1e-3)


# -- refusals --------------------------------------------------------------------------------------------


def _refusal(graph: planish.Graph, target: str, tmp_path: Path) -> PlanishError:
    out = tmp_path / "m.mlir"
    out.write_text("old")
    with pytest.raises(PlanishError) as caught:
        planish.to_mlir(graph, out, target=target)
    assert out.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.mlir"]
    return caught.value


def test_an_op_that_a_target_cannot_hold(tmp_path: Path) -> None:
    error = _refusal(captured(lambda x: torch.linalg.slogdet(x[:, :4])[1]), "tosa", tmp_path)
    assert error.what == ("op 'torch::aten.linalg_slogdet.default': the target tosa cannot hold it (aten.linalg_det)")
    assert error.where is not None and error.where.startswith("%linalg_slogdet.0")
    assert error.hint == "the target linalg can hold this model"


def test_an_op_that_torch_mlir_has_not(tmp_path: Path) -> None:
    error = _refusal(captured(lambda x: torch.lgamma(x * x + 1)), "linalg", tmp_path)
    assert error.what == "op 'torch::aten.lgamma.default': torch-mlir has no form of it (aten.lgamma)"
    assert error.where is not None and "%lgamma" in error.where
    assert error.hint is None  # ONNX has it not either


def test_a_size_that_the_data_tell(tmp_path: Path) -> None:
    error = _refusal(captured(lambda x: (x > 0).nonzero()), "linalg", tmp_path)
    assert error.what == "output 'output_0': its size depends on the data; expected a concrete one"


def test_what_cannot_be_run() -> None:
    raised, _ = planish.Pipeline("raise").run(planish.capture(block(1)), validate=False)
    graph, _ = planish.Pipeline("quantize{weights=e4m3:channel activations=e4m3:token}").run(raised)
    with pytest.raises(PlanishError, match="op 'dynamic_quantize': linalg cannot be run on the CPU with it"):
        planish.verify(graph, oracle="mlir")


# -- crashes of torch-mlir ------------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, empty."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_crash_of_the_folder(tmp_path: Path, scratch: Path) -> None:
    """torch-mlir dies of a softplus of a constant of float64: what the oracle's arguments avoid. The op is found."""
    scale = torch.tensor([0.3], dtype=torch.float64)
    module = Called(lambda x, a: (x.exp() + 1) * torch.nn.functional.softplus(a), scale)
    graph = planish.capture(module, torch.zeros(4, 8, dtype=torch.float64))
    error = _refusal(graph, "linalg", tmp_path)
    assert error.what == "op 'softplus': torch-mlir died on the way to the torch dialect (SIGSEGV)"
    assert error.where is not None and "= softplus(" in error.where
    assert error.hint == "no target of MLIR holds this model, ONNX does: write an .onnx file"
    assert not list(scratch.glob("planish-*"))


@pytest.mark.parametrize(
    ("death", "how", "hint"),
    [
        ("os.abort()", "(SIGABRT: LLVM ERROR: seeded)",
         "no target of MLIR holds this model, ONNX does: write an .onnx file"),
        ("os.kill(os.getpid(), 9)", "(SIGKILL: LLVM ERROR: seeded)",
         "the memory may have run out: smaller sizes take less"),
        ("os._exit(3)", "(exit status 3: LLVM ERROR: seeded)",
         "no target of MLIR holds this model, ONNX does: write an .onnx file"),
    ],
)  # fmt: skip
def test_a_crash_of_the_command(
    death: str,
    how: str,
    hint: str,
    tmp_path: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The process dies of whatever it is asked: no op is to blame."""
    worker, models = tmp_path / "worker.py", tmp_path / "models"
    models.mkdir()
    save(block(1), models / "model.onnx")
    worker.write_text(f"import os, sys\ninput()\nos.write(2, b'LLVM ERROR: seeded\\n')\n{death}\n")
    monkeypatch.setattr(mlir_process, "WORKER", worker)
    sizes = ["--size", "batch=1,tokens=2"]
    assert cli.main(["convert", str(models / "model.onnx"), "-o", str(models / "m.mlir"), *sizes]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        f"error: graph 'block': torch-mlir died on the way to the torch dialect {how}\n  hint: {hint}\n"
    )
    assert [path.name for path in models.iterdir()] == ["model.onnx"]
    assert not list(scratch.glob("planish-*"))


def test_a_crash_of_the_machine_code(scratch: Path) -> None:
    """The oracle says so, and the next run compiles again."""
    graph = captured(lambda x: x.softmax(-1))
    inputs = random_inputs(graph, 0)
    oracle = Oracle(graph)
    expected = oracle.run(inputs)["output_0"]
    (compiled,) = oracle._compiled.values()
    assert list(scratch.glob("planish-*")) == [compiled.worker.folder]
    assert compiled.worker._process is not None
    compiled.worker._process.send_signal(signal.SIGSEGV)
    with pytest.raises(PlanishError) as caught:
        oracle.run(inputs)
    assert caught.value.what == "graph 'Called': the machine code of torch-mlir died (SIGSEGV)"
    assert caught.value.hint == "without --oracle, the models are evaluated by torch"
    assert torch.equal(oracle.run(inputs)["output_0"], expected)
    del compiled, oracle, caught
    gc.collect()
    assert not list(scratch.glob("planish-*"))


@pytest.mark.parametrize("command", [["convert", "MODEL", "-o", "OUT"], ["verify", "MODEL", "--oracle", "mlir"]])
def test_without_the_extra(
    command: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch_mlir" else find(name, *rest)
    )
    out = tmp_path / "m.mlir"
    words = [{"MODEL": str(model), "OUT": str(out)}.get(word, word) for word in command]
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "error: torch-mlir: is not installed; pip install 'planish[mlir]'\n")
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["-o", "m.mlir", "--target", "linalgg"],
         "target 'linalgg': has no MLIR; expected linalg, torch, tosa, stablehlo\n  hint: did you mean 'linalg'?"),
        (["-o", "m.onnx", "--target", "tosa"], "target 'tosa': is for .mlir, not for m.onnx"),
        (["-o", "m.ir", "--target", "ort"],
         "option --target: is for .onnx and .mlir\n  hint: a text of the IR has none"),
        (["-o", "m.txt"], "m.txt: unknown kind of output; expected .onnx, .ir, .mlir"),
        (["-o", "m.mlir", "--opset", "20"], "option --opset: is for .onnx\n  hint: m.mlir is written without one"),
        (["-o", "m.ir", "--size", "batch=2"], "option --size: is for .mlir\n  hint: m.ir keeps its symbols"),
        (["-o", "m.mlir", "--size", "batch"],
         "size 'batch': expected NAME=N\n  hint: --size batch=1 --size sequence=16"),
        (["-o", "m.mlir", "--size", "batch=1,batch=2"], "size 'batch': is given twice\n  hint: did you mean 'batch'?"),
        (["-o", "m.mlir", "--size", "bach=1"],
         "size 'bach': no input has a size of this name; they are batch, tokens\n  hint: did you mean 'batch'?"),
        (["-o", "m.mlir", "--size", "batch=0"], "size 'batch': expected at least 1, got 0"),
    ],
)  # fmt: skip
def test_errors_of_convert(
    words: list[str], error: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model.parent)
    assert cli.main(["convert", "model.onnx", *words]) == 2
    assert capsys.readouterr().err == f"error: {error}\n"
    assert [p.name for p in model.parent.iterdir()] == ["model.onnx"]


def test_errors_of_verify(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(model)]) == 2
    assert cli.main(["verify", str(model), "--oracle", "mlri"]) == 2
    assert capsys.readouterr().err == (
        "error: verify: the second model is missing\n  hint: --oracle mlir compares a model with itself\n"
        "error: oracle 'mlri': unknown; expected mlir\n  hint: did you mean 'mlir'?\n"
    )


def test_forms() -> None:
    assert form_of("a.onnx").target == "onnx"
    assert form_of("a.mlir").target == "linalg"
    assert form_of("a.mlir", "tosa", sizes=["a=1,b=2", "c=3"]).sizes == {"a": 1, "b": 2, "c": 3}


# -- real models -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [bench.MINILM, "llama", "mamba", "resnet"])
def test_models_before_and_after_every_exact_pass(name: str) -> None:
    found = bench.measure(name)
    assert found["error"] <= 1e-12
    assert max(found["before"], found["after"]) <= 1e-12
    assert found["nodes"][1] < found["nodes"][0]
