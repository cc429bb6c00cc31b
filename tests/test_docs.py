"""README, docs and examples do what they say: every block is run, every shown output is compared.

In a page, in order, in one namespace and one empty folder that holds `model.onnx` and `data.npz`:

- a ```python block is executed; a ```text block right behind it is what it prints;
- a ```yaml block that starts with `# NAME.yaml` is written to that file;
- in a ```console block, `$ planish ...` is run and the lines below it are what it prints. Commands on
  `minilm.onnx`, the real model, run in the slow tests. `$ make ...` must be a target, `$ python FILE` a file.

In an expected output, `...` stands for anything within a line, and on a line of its own for any lines.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from block_models import WIDTH, block, save

from planish import cli
from planish.passes.pipeline import REGISTRY, pass_class
from planish.report import catalogue

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
REAL = "minilm"
COLUMNS = "130"  # of the tables in the pages

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line on which the text starts, and the output behind it."""

    language: str
    text: str
    line: int
    expected: str | None = None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = list(_FENCE.finditer(text))
    made = []
    for index, match in enumerate(found):
        behind = found[index + 1] if index + 1 < len(found) else None
        expected = None
        if behind is not None and behind[1] == "text" and not text[match.end() : behind.start()].strip():
            expected = behind[2]
        made.append(Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1, expected))
    return made


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """(command, what it prints) of a console block."""
    command, printed = "", ""
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            if command:
                yield command, printed
            command, printed = line[2:], ""
        else:
            printed += line + "\n"
    if command:
        yield command, printed


def check_output(expected: str, got: str) -> None:
    wanted, lines = ([line.rstrip() for line in t.strip("\n").splitlines()] for t in (expected, got))
    assert _same(wanted, lines), f"expected:\n{expected}\ngot:\n{got}"


def _same(expected: list[str], got: list[str]) -> bool:
    if not expected:
        return not got
    if expected[0].strip() == "...":
        return any(_same(expected[1:], got[i:]) for i in range(len(got) + 1))
    if not got:
        return False
    pattern = ".*".join(map(re.escape, expected[0].split("...")))
    return re.fullmatch(pattern, got[0]) is not None and _same(expected[1:], got[1:])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a page runs."""
    save(block(1), tmp_path / "model.onnx")
    x = np.random.default_rng(0).normal(size=(24, 5, WIDTH)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", COLUMNS)
    before = dict(REGISTRY)
    yield tmp_path
    REGISTRY.clear()  # a page may have registered a pass of its own
    REGISTRY.update(before)


def run_command(command: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {w for w in words[1:] if "=" not in w} <= set(targets), command
        return
    if words[0].endswith("python") and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), command
        return
    if words[0] != "planish":
        return
    capsys.readouterr()
    code = cli.main(words[1:])
    captured = capsys.readouterr()
    allowed = {0, 1} if words[1] in ("lint", "verify") else {2} if "error:" in expected else {0}
    assert code in allowed, f"{command}: exit code {code}\n{captured.err}"
    if expected.strip():
        check_output(expected, captured.out + captured.err)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_page(page: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for part in blocks(page):
        if part.language == "python":
            code = compile("\n" * (part.line - 1) + part.text, str(page), "exec", dont_inherit=True)
            capsys.readouterr()
            exec(code, module.__dict__)
            printed = capsys.readouterr().out
            if part.expected is not None:
                check_output(part.expected, printed)
        elif part.language == "yaml" and (name := re.match(r"# (\S+\.yaml)\n", part.text)):
            (folder / name[1]).write_text(part.text)
        elif part.language == "console":
            for command, expected in commands(part):
                if REAL not in command:
                    run_command(command, expected, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if REAL in "".join(b.text for b in blocks(p) if b.language == "console")],
    ids=lambda p: p.name,
)
def test_page_on_the_real_model(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assets = real_assets()
    (folder / "minilm.onnx").symlink_to(assets.minilm_onnx())
    (folder / "minilm").symlink_to(assets.minilm_dir())
    (folder / "sentences.txt").write_text("\n".join(assets.sentences("calibration", 64)))
    for part in blocks(page):
        for command, expected in commands(part) if part.language == "console" else ():
            if REAL in command:
                run_command(command, expected, capsys)


def real_assets() -> types.ModuleType:
    folder = str(ROOT / "bench")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import assets

    return assets


def test_expected_output_has_teeth() -> None:
    check_output("a\n...\nd 1 ... 3\n", "a\nb\nc\nd 1 2 3\n")
    check_output("...\n", "")
    for wrong in ("a\nd 1 2 4\n", "a\nd 1 2 3\ne\n", "b\nd 1 2 3\n"):
        with pytest.raises(AssertionError):
            check_output("a\n...\nd 1 ... 3\n", wrong)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in _LINK.findall(text):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


# -- pages made from the code ------------------------------------------------------------------------


def render_passes() -> str:
    lines = [
        "# Passes",
        "",
        "This page is made from the code; `python -m pytest tests/test_docs.py --update-golden` writes it again.",
        "",
        "A pipeline is a list of passes, each with options in braces: `raise,scale-channels{method=os-plus}`.",
        "What the second column promises, and how it is checked:",
        "",
        "- *identity*, *exact*: equal over the reals; compared in float64, relative error at most 1e-10.",
        "- *bounded*: differs by no more than what the pass states. *lossy*: changes numbers on purpose.",
        "",
    ]
    found = catalogue.passes()
    lines += ["| pass | promise | what it does |", "|---|---|---|"]
    for entry in found:
        link = entry["name"] if entry["exactness"] == "group" else f"[{entry['name']}](#{entry['name']})"
        lines.append(f"| {link} | {entry['exactness']} | {entry['summary']} |")
    for entry in found:
        if entry["exactness"] == "group":
            continue
        facts = [f"{key} `{', '.join(entry[key])}`" for key in ("needs", "gives", "breaks") if entry[key]]
        facts += ["needs calibration statistics"] if entry["needs_stats"] else []
        document = sys.modules[pass_class(entry["name"]).__module__].__doc__ or ""
        lines += ["", f"## {entry['name']}", "", "```text", document.strip(), "```"]
        if facts:
            lines += ["", f"Facts: {'; '.join(facts)}."]
        if entry["options"]:
            lines += ["", "| option | default | type |", "|---|---|---|"]
            for option in entry["options"]:
                kind = option["type"].replace("|", "\\|")
                lines.append(f"| `{option['name']}` | `{option['default']}` | `{kind}` |")
    return "\n".join(lines) + "\n"


RECIPES = """\
# Recipes

The list below is made from the code; `python -m pytest tests/test_docs.py --update-golden` writes it again.

A recipe is a named pipeline in a YAML file. `planish optimize MODEL -o OUT --recipe NAME` runs one, and so does
`planish.convert(model, out, recipe)`; `NAME` may also be the path of a file of your own:

```yaml
# mine.yaml
name: mine
summary: scale by SmoothQuant, then int8 with ranges taken at run time
pipeline: raise,scale-channels{method=smoothquant alpha=0.6},quantize{activations=uint8:tensor}
target: ort
needs: {calibration: true, targets: [onnx, ort]}
```

```console
$ planish optimize model.onnx -o mine.onnx --recipe mine.yaml --calibrate data.npz
...
```

`name`, `summary` and `pipeline` are required; `target` is `onnx` (the default) or `ort` (see [targets](targets.md));
`needs.calibration` says whether calibration data must be given, `needs.targets` which targets can express what the
recipe makes (all of them, if left out); `source` is a citation. An unknown field, pass or option is an error that names
the line. The lowering to the target is added at the end. `planish recipes` lists what there is, with `--json` as data.

Which method does what, and when to use it: [methods](methods/index.md).

What is printed after a run: the passes, the sites with the worst signal-to-noise ratios with the outliers of what they
read before and after the exact passes, and the bytes by kind. `--all` prints every site and every place that a pass
declined, `--report FILE` writes all of it as JSON, `--plots DIR` draws histograms (the extra `plots`).

Calibration data (`--calibrate`) is an .npz with one array per input, a folder of those, a text file with a sample a
line (with `--tokenizer FOLDER`, the extra `hf`), or statistics saved by `planish opt --stats`. `planish.convert` also
takes any iterable of batches. Statistics are collected in one pass, on the graph as the passes before the first one
that reads them leave it.
"""


def render_recipes() -> str:
    lines = [RECIPES]
    for entry in catalogue.recipes():
        needs = "yes" if entry["needs"]["calibration"] else "no"
        lines += [f"## {entry['name']}", "", f"{entry['summary'][0].upper()}{entry['summary'][1:]}.", ""]
        lines += ["```text", ",\n".join(_items(entry["pipeline"])), "```", ""]
        others = [f"`{t}`" for t in entry["needs"]["targets"] if t != entry["target"]]
        targets = f"Target: `{entry['target']}`" + (f" (or {', '.join(others)})" if others else " only")
        lines += [f"{targets}. Needs calibration data: {needs}. Source: {entry['source']}.", ""]
    return "\n".join(lines)


def _items(pipeline: str) -> list[str]:
    return [item.strip() for item in re.split(r",(?![^{]*})", pipeline)]


@pytest.mark.parametrize(("name", "render"), [("passes.md", render_passes), ("recipes.md", render_recipes)])
def test_generated_page(name: str, render: types.FunctionType, update_golden: bool) -> None:
    page = ROOT / "docs" / name
    if update_golden:
        page.write_text(render())
    assert page.read_text() == render(), "run `python -m pytest tests/test_docs.py --update-golden`"


# -- examples ----------------------------------------------------------------------------------------


def example(name: str, *arguments: object) -> None:
    file = str(ROOT / "examples" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [file, *map(str, arguments)])
        code: object = 0
        try:
            runpy.run_path(file, run_name="__main__")
        except SystemExit as done:
            code = done.code
        assert not code


def test_script_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("script_a_pipeline.py", tmp_path)
    printed = capsys.readouterr().out
    errors = [float(e) for e in re.findall(r"relative error (\S+) in ONNX Runtime", printed)]
    assert len(errors) == 2
    assert errors[1] < errors[0] / 5, printed  # what the example is there to show
    assert (tmp_path / "shift-and-scale-first.onnx").is_file()


def test_inspect_a_torch_model(capsys: pytest.CaptureFixture[str]) -> None:
    example("inspect_a_torch_model.py")
    printed = capsys.readouterr().out
    assert ", 0 of them opaque" in printed
    assert float(re.findall(r"largest difference: (\S+)", printed)[0]) < 1e-5
    assert "raised: add attention embedding" in printed
    assert re.search(r"spaces of 32 channels: .*rotate", printed)


def test_emit_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    example("emit_kernels.py", tmp_path / "kernels")
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(".py: equal to the reference, in the interpreter") for line in lines) == 5
    assert lines[-1].endswith("relative error below 1e-2: True")


def test_svdquant_with_lora(capsys: pytest.CaptureFixture[str]) -> None:
    example("svdquant_with_lora.py")
    printed = capsys.readouterr().out
    alone, svdquant = (float(e) for e in re.findall(r"^(?:int4 alone|SVDQuant): relative error (\S+)$", printed, re.M))
    assert svdquant < alone / 3, printed
    without, with_it = (float(e) for e in re.findall(r"quantised, with(?:out)? it: +(\S+)$", printed, re.M))
    assert with_it < without / 2, printed


def test_torch_compile(capsys: pytest.CaptureFixture[str]) -> None:
    example("torch_compile.py")
    printed = capsys.readouterr().out
    plain, calibrated, changed, small = (float(e) for e in re.findall(r": +relative error (\S+)$", printed, re.M))
    assert calibrated < plain / 3, printed  # what the statistics are for
    assert changed < 1.5 * calibrated, printed  # stale codes would be off by twice the output of that linear
    assert plain < small < 0.3, printed


@pytest.mark.slow
def test_generate_text(capsys: pytest.CaptureFixture[str]) -> None:
    example("generate_text.py", "--tokens", 24)
    printed = capsys.readouterr().out
    found = re.findall(r"^(float|planish), (\S+) tokens per second:\n  (.+)$", printed, re.M)
    assert [name for name, _, _ in found] == ["float", "planish"], printed
    assert all(float(speed) > 0 and len(text.split()) > 8 for _, speed, text in found), printed


def test_onnx_to_onnx_on_a_model_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("onnx_to_onnx.py", "model.onnx", "--calibrate", "data.npz", "-o", "q.onnx")
    printed = capsys.readouterr().out
    assert 0 < float(re.findall(r"output 0: relative error (\S+)", printed)[0]) < 0.1
    assert (folder / "q.onnx").is_file()


@pytest.mark.slow
def test_onnx_to_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "q.onnx"
    example("onnx_to_onnx.py", "-o", out)
    mean, worst = map(float, re.findall(r"mean (\S+), worst (\S+)", capsys.readouterr().out)[0])
    assert mean > 0.99
    assert worst > 0.98
    assert out.stat().st_size < 30e6


def test_compare_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    example("compare_recipes.py", "--recipes", "w8a8-token", "w8a8-static", "smoothquant")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["recipe", "KB", "bits", "cosine", "error", "worst", "dB", "seconds"]
    rows = {line.split()[0]: [float(v) for v in line.split()[1:]] for line in lines[1:]}
    assert list(rows) == ["(float)", "w8a8-token", "w8a8-static", "smoothquant"]
    size = rows.pop("(float)")[0]
    for kilobytes, bits, cosine, error, worst, _ in rows.values():
        assert kilobytes < size / 2
        assert 8 < bits < 9
        assert cosine > 0.999
        assert 0 < error < 0.05
        assert worst > 30


def test_compare_recipes_on_a_model_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = folder / "mine.yaml"
    mine.write_text("name: mine\nsummary: int8 weights\npipeline: raise,quantize\n")
    example("compare_recipes.py", "model.onnx", "--calibrate", "data.npz", "--recipes", mine, "w8a8-dynamic")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["mine", "w8a8-dynamic"]
    np.savez(folder / "one.npz", x=np.load(folder / "data.npz")["x"][:2])
    with pytest.raises(AssertionError):
        example("compare_recipes.py", "model.onnx", "--calibrate", "one.npz")
    expected = "error: data: one batch; expected two or more, to calibrate on and to compare on\n"
    assert capsys.readouterr().err == expected
