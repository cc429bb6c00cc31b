"""Kernels as files: what an emitted file holds, that it stands alone, that it is the same every time."""

from __future__ import annotations

import ast
import difflib
import math
import os
import subprocess
import sys
import types
from collections.abc import Iterable
from pathlib import Path

import kernel_models
import pytest
import torch

from planish import cli
from planish.codegen import configs, triton_source
from planish.codegen import triton as emission
from planish.codegen.gemm_parts import parts
from planish.codegen.kernel_spec import Kernel, Step, Tensor
from planish.codegen.select import select
from planish.codegen.triton_body import Body, Buffer, Parameter
from planish.codegen.triton_file import Emitted, render, stem
from planish.ir.errors import PlanishError
from planish.ir.store import save

GOLDEN = Path(__file__).parent / "golden" / "kernels"
STANDARD = {"math", "os", "sys", "contextlib", "dataclasses"}
CASES = [(model, recipe) for model in ("encoder", "decoder") for recipe in kernel_models.RECIPES]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def emitted_of(model: str, recipe: str, dtype: str = "f16") -> list[Emitted]:
    """The files of a plan, each once."""
    plan = kernel_models.plan_of(model, recipe)
    kernels = [k for r in plan.kernels if r.kernel for k in (r.kernel, *(parts(r.kernel) if r.kernel.closing else ()))]
    return list({e.name: e for e in (emission.emit_kernel(k, dtype) for k in kernels if k is not None)}.values())


def one(kind: str = "prologue") -> Emitted:
    return next(e for e in emitted_of("decoder", "w8a8") if e.kernel.kind == kind)


def run(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, check=False, env={**kept, **environment}, cwd="/"
    )


# -- goldens -------------------------------------------------------------------------------------


def golden_of(kernels: Iterable[Kernel | None], patch: pytest.MonkeyPatch) -> dict[str, str]:
    """Files by name, without the launch parameters of targets: those are data, which a search writes anew."""
    patch.setattr(configs, "TARGETS", ())
    made = (emission.emit_kernel.__wrapped__(kernel, "f16") for kernel in dict.fromkeys(kernels) if kernel is not None)
    return {f"{e.name}.py": e.text for e in made}


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_golden(model: str, recipe: str, update_golden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = GOLDEN / f"{model}-{recipe}"
    files = golden_of((r.kernel for r in kernel_models.plan_of(model, recipe).kernels), monkeypatch)
    if update_golden:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.py"):
            old.unlink()
        for name, text in files.items():
            (folder / name).write_text(text)
        return
    if not folder.is_dir():
        pytest.fail(f"{folder} is missing: run pytest with --update-golden")
    held = {path.name: path.read_text() for path in sorted(folder.glob("*.py"))}
    stems = {name.rpartition("_")[0]: name for name in held}  # without the hash, which any change changes
    lines: list[str] = []
    for name, text in files.items():
        old = stems.get(name.rpartition("_")[0], "")
        lines += difflib.unified_diff(
            held.get(name, held.get(old, "")).splitlines(), text.splitlines(), old or "missing", name, lineterm=""
        )
    assert not lines, "\n".join(lines[:200])
    assert sorted(files) == sorted(held)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [r for r in kernel_models.RECIPES if r != "llm-int8"])  # whose columns are data
def test_the_real_encoder_has_the_files_of_the_golden_layer(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [kernel_models.real_inputs(0)]
    plan = select(kernel_models.quantised(kernel_models.real_encoder(), recipe, batches, 128))
    files = golden_of((r.kernel for r in plan.kernels), monkeypatch)
    held = {path.name: path.read_text() for path in (GOLDEN / f"encoder-{recipe}").glob("*.py")}
    assert files == held
    assert len(plan.kernels) == 6 * len(kernel_models.plan_of("encoder", recipe).kernels)


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_files_are_readable_and_stand_alone(model: str, recipe: str) -> None:
    for emitted in emitted_of(model, recipe):
        tree = ast.parse(emitted.text)
        modules = [n for node in ast.walk(tree) for n in imported(node)]
        assert {m.partition(".")[0] for m in modules} - STANDARD == {"torch", "triton"}
        assert emitted.text.isascii()
        assert max(map(len, emitted.text.splitlines())) <= 120, emitted.name
        docstring = ast.get_docstring(tree)
        assert docstring is not None and docstring.startswith(emitted.name)
        assert "Not timed on a GPU." in docstring and "Bytes" in docstring
        names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
        assert len(set(names)) == len(names)
        assert [
            n for n in ("kernel", "run", "op", "reference", "example", "differences", "main") if n not in names
        ] == []
        unused = [
            n
            for n in names
            if n not in ("main", "op", "_", "tune") and emitted.text.count(f"{n}(") < 2 and n != "kernel"
        ]
        assert unused == [], emitted.name


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [str(node.module)] if isinstance(node, ast.ImportFrom) else []


# -- a file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prologue", "gemm"])
def test_a_file_checks_itself(tmp_path: Path, kind: str) -> None:
    emitted = one(kind)
    path = tmp_path / f"{emitted.name}.py"
    path.write_text(emitted.text)
    done = run(path, TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (0, "equal to the reference, in the interpreter\n"), done.stderr
    done = run(path)
    if not torch.cuda.is_available():
        assert done.returncode == 2
        assert done.stdout == "no GPU: set TRITON_INTERPRET=1 to compare in Triton's interpreter\n"


def test_the_self_check_finds_a_wrong_kernel(tmp_path: Path) -> None:
    emitted = one()
    path = tmp_path / f"{emitted.name}.py"
    wrong = emitted.text.replace("token_scale(scale_top, 127.0)", "token_scale(scale_top, 126.0)")
    assert wrong != emitted.text
    path.write_text(wrong)
    done = run(path, TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "M = 7: scale[0]: kernel " in done.stdout and ", reference " in done.stdout


@pytest.mark.parametrize(
    ("model", "recipe"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case != ("decoder", "w8a8"))) for case in CASES],
)
def test_ops_pass_opcheck(model: str, recipe: str) -> None:
    for emitted in emitted_of(model, recipe):
        module = emission.load(emitted)
        assert module.op._qualname == f"planish::{emitted.name}"
        torch.library.opcheck(module.op, tuple(module.example(3, 0, "cpu").values()))


def test_no_rows(cache: Path) -> None:
    for kind in ("prologue", "gemm"):
        module = emission.load(one(kind))
        made = module.op(**module.example(0, 0, "cpu"))
        assert all(held.shape[0] == 0 for held in (made if isinstance(made, tuple) else (made,)))


def test_a_launcher_checks_what_it_takes() -> None:
    module = emission.load(one())
    held = module.example(4, 0, "cpu")
    x = held.pop("x")
    expected = r"x: expected a contiguous torch.float16 tensor of shape \[4, 256\] on cpu, got "
    for wrong, what in (
        (x.float(), r"torch.float32 \[4, 256\]"),
        (x[:, :128], r"torch.float16 \[4, 128\]"),
        (x.T.contiguous().T, r"torch.float16 \[4, 256\] with strides \[1, 4\]"),
    ):
        with pytest.raises(ValueError, match=expected + what):
            module.run(wrong, **held)


def test_launch_parameters_are_checked() -> None:
    module = emission.load(one())
    assert module.Launch() == module.Launch(num_stages=3)
    with pytest.raises(ValueError, match=r"launch num_warps: expected num_warps in \(1, 2, 4, 8, 16\), got 3"):
        module.Launch(num_warps=3)
    with pytest.raises(ValueError, match=r"launch BLOCK_M: expected BLOCK_M in .*, got 24"):
        module.Launch(BLOCK_M=24)
    with pytest.raises(AttributeError):
        module.Launch().num_warps = 4


def test_a_file_has_the_launch_parameters_of_its_targets() -> None:
    emitted = one("gemm")
    module = emission.load(emitted)
    known = {target: configs.launches(emitted.kernel, target) for target in configs.TARGETS}
    assert set(module.CONFIGS) == {"interpreter", *(target for target, rows in known.items() if rows)}
    for target, rows in known.items():
        for (most, values), (limit, launch) in zip(rows, module.CONFIGS.get(target, ()), strict=True):
            assert limit == (math.inf if most is None else most)
            assert all(getattr(launch, k) == v for k, v in values.items() if k in ("BLOCK_M", "BLOCK_N", "num_warps"))


def test_tuning_takes_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    module = emission.load(one("gemm"))
    asked = []

    def do_bench(call: object) -> float:
        call()  # type: ignore[operator]
        asked.append(call)
        return [3.0, 1.0, 2.0][len(asked) % 3]

    monkeypatch.setattr(module.triton.testing, "do_bench", do_bench)
    best = module.tune(5, "cpu")
    assert asked and module.chosen(5, torch.device("cpu")) == best
    assert module.chosen(6, torch.device("cpu")) == module.CONFIGS["interpreter"][0][1]
    assert module.chosen(17, torch.device("cpu")) == module.CONFIGS["interpreter"][-1][1]


# -- the same every time -------------------------------------------------------------------------

PRINT_ALL = """
import sys
sys.path.insert(0, {tests!r})
import kernel_models
from planish.codegen import triton
names = [triton.emit_kernel(r.kernel, "f16") for r in kernel_models.plan_of("decoder", "w4a4-rank32").kernels]
assert "triton" not in sys.modules
print(*(e.name for e in names))
"""


def test_the_same_graph_gives_the_same_bytes_without_triton() -> None:
    """In other processes, with other hashes of strings, where Triton cannot be imported."""
    code = f"import sys; sys.modules['triton'] = None; del sys.modules['triton']\n{PRINT_ALL}"
    found = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(tests=str(Path(__file__).parent))],
            capture_output=True, text=True, check=False, env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    here = [emission.emit_kernel(r.kernel) for r in kernel_models.plan_of("decoder", "w4a4-rank32").kernels]  # type: ignore[arg-type]
    assert found == {" ".join(e.name for e in here) + "\n"}


def test_equal_layers_share_their_files(tmp_path: Path) -> None:
    graph = kernel_models.blocks.decoder(128, 2, tokens=8)
    plan = select(kernel_models.quantised(graph, "w8a8", [], 32))
    files = emission.emit_plan(plan, tmp_path / "made" / "kernels")
    single = select(kernel_models.quantised(kernel_models.blocks.decoder(128, 1, tokens=8), "w8a8", [], 32))
    assert len(plan.kernels) > len(single.kernels)
    closing = [r for r in single.kernels if r.kernel is not None and r.kernel.closing]
    assert len(closing) == 1 and len(files) <= len(single.kernels) + 2
    assert {e.name for e in files} == {e.name for e in emission.emit_plan(single, tmp_path / "single")}
    lines = (tmp_path / "made" / "kernels" / "plan.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines] == [r.name for r in plan.regions]
    for line, region in zip(lines, plan.regions, strict=True):
        file, _, more = line.partition(": ")[2].partition("; on more than 16 rows ")
        assert (file == "torch") == (region.kernel is None)
        named = [file, *more.split(" and ")] if more else [file]
        assert len(named) == (3 if region.kernel is not None and region.kernel.closing else 1)
        assert file == "torch" or all((tmp_path / "made" / "kernels" / name).is_file() for name in named)


def test_another_text_has_another_name() -> None:
    kernel = one().kernel
    names = {emission.emit_kernel(kernel, dtype).name for dtype in emission.DTYPES}
    assert len(names) == 3
    assert {n.rpartition("_")[0] for n in names} == {stem(kernel, dtype) for dtype in emission.DTYPES}


def test_the_cache_holds_what_the_name_says(cache: Path) -> None:
    emitted = one()
    path = emission.cached(emitted)
    assert path == cache / "kernels" / f"{emitted.name}.py" and path.read_text() == emitted.text
    before = path.stat().st_mtime_ns
    assert emission.cached(emitted) == path and path.stat().st_mtime_ns == before
    path.write_text("broken")
    assert emission.cached(emitted).read_text() == emitted.text
    module = emission.load(emitted)
    assert emission.load(emitted) is module and isinstance(module, types.ModuleType)


def test_the_command_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Quantised graph in, files and plan.txt out; what is printed are the files."""
    model = tmp_path / "decoder.ir"
    save(kernel_models.graph_of("decoder", "w8a8"), model)
    made = tmp_path / "made"
    assert cli.main(["kernels", str(model), "--emit", str(made), "--dtype", "f32"]) == 0
    files = emitted_of("decoder", "w8a8", "f32")
    assert capsys.readouterr().out.split() == [str(made / f"{e.name}.py") for e in files]
    assert {p.name: p.read_text() for p in made.glob("*.py")} == {f"{e.name}.py": e.text for e in files}
    assert (made / "plan.txt").is_file()
    assert cli.main(["kernels", str(model), "--emit", str(made), "--dtype", "f8"]) == 2
    assert "kernel dtype 'f8': unknown; expected f16, bf16, f32" in capsys.readouterr().err


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanishError, match=r"^kernel dtype 'f64': unknown; expected f16, bf16, f32$"):
        emission.emit_kernel(one().kernel, "f64")
    with pytest.raises(PlanishError, match=r"absent.py: not found"):
        emission.load_file(tmp_path / "absent.py")
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanishError, match=r"file/kernels: cannot be made: "):
        emission.emit_plan(kernel_models.plan_of("decoder", "w8a8"), tmp_path / "file" / "kernels")
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "file"))
    with pytest.raises(PlanishError, match=r"(?s)the cache cannot be made.*hint: set PLANISH_CACHE"):
        emission.cached(one())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PlanishError, match=r"(?s)kernels: need triton.*hint: pip install 'planish\[triton\]'"):
        emission.load_file(tmp_path / "absent.py")


# -- taking functions over -----------------------------------------------------------------------

SOURCE = '''
"""A kernel file."""
import triton
import triton.language as tl

from planish.kernels.other import helper

LIMIT = tl.constexpr(3)

__all__ = ["device"]


# why it is so
@triton.jit
def device(x):
    """A docstring."""
    return helper(x) + LIMIT


def eager(x, y=LIMIT):
    return device


class Other:
    pass
'''


def test_pieces_of_a_file() -> None:
    pieces = {p.name: p for p in triton_source.pieces_of(SOURCE, "a.py")}
    assert {name: p.kind for name, p in pieces.items()} == {"LIMIT": "constant", "device": "device", "eager": "eager"}
    assert pieces["device"].text == (
        '# why it is so\n@triton.jit\ndef device(x):\n    """A docstring."""\n    return helper(x) + LIMIT'
    )
    assert pieces["device"].reads == ("triton", "helper", "x", "LIMIT")
    helper = triton_source.Piece("helper", "b.py", "@triton.jit\ndef helper(x):\n    return x", ("x",), "device")
    known = pieces | {"helper": helper}
    assert [p.name for p in triton_source.gathered(["eager"], known)] == ["LIMIT", "helper", "device", "eager"]
    assert [p.name for p in triton_source.gathered(["LIMIT", "device"], known)] == ["LIMIT", "helper", "device"]
    with pytest.raises(PlanishError, match=r"(?s)^'devise': no function of planish/kernels.*device"):
        triton_source.gathered(["devise"], known)
    with pytest.raises(PlanishError, match=r"(?s)^a.py: not Python; .*a.py:1"):
        triton_source.pieces_of("def (", "a.py")


def test_a_name_stands_in_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f():\n    return 1\n")
    (tmp_path / "b.py").write_text("def f():\n    return 2\n")
    with pytest.raises(PlanishError, match=r"^'f': stands in a.py and in b.py, not alike$"):
        triton_source.library(tmp_path)


def test_every_device_function_of_the_library_can_be_taken_over() -> None:
    known = triton_source.library()
    for name in known:
        source = "\n".join(p.text for p in triton_source.gathered([name]))
        defined = {p.name for p in triton_source.gathered([name])}
        assert defined >= {name}
        for node in ast.walk(ast.parse(source)):
            assert not imported(node), f"{name}: an emitted file cannot import"


# -- buffers and constants, by a kernel made by hand ---------------------------------------------

COUNTED = '''\
@triton.jit
def kernel(x_ptr, out_ptr, counter_ptr, M, ROWS: tl.constexpr):
    """Rows times two; the program that is last adds how many there were."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, WIDTH)
    at = rows[:, None] * K + k[None, :]
    mask = (rows < M)[:, None] & (k < K)[None, :]
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask, 0.0) * 2, mask)
    tl.atomic_add(counter_ptr, 1)'''


def test_a_body_made_by_hand() -> None:
    kernel = Kernel(
        "prologue", 5, 0, (Tensor("x", "f32", ("M", 5), "input"), Tensor("out", "f32", ("M", 5), "output")),
        (Step("mul", ("x", "x"), ("out",)),), row="x",
    )  # fmt: skip
    body = Body(
        COUNTED, (), "out = x * 2.0", (), "(triton.cdiv(M, launch.ROWS),)",
        (Parameter("ROWS", 4, "ROWS in (1, 2, 4)", "rows of a program"),),
        (Buffer("counter", "int32", "triton.cdiv(M, launch.ROWS)"),), (("K", 5), ("WIDTH", 8)),
    )  # fmt: skip
    emitted = render(kernel, body, "f32", {"interpreter": ((1, {"ROWS": 1, "BLOCK_N": 3}), (None, {"ROWS": 2}))})
    module = emission.load(emitted)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module.op(x), x * 2)
    assert module.differences(7, 0, "cpu") == []
    assert module.chosen(1, x.device) == module.Launch(ROWS=1)
    assert module.chosen(9, x.device) == module.Launch(ROWS=2)
    assert module.SIGNATURE == {"x_ptr": "*fp32", "out_ptr": "*fp32", "counter_ptr": "*i32", "M": "i32"}
