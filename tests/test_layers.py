"""Import borders: a file imports only from its own row of design.md's table or from a lower one.

    cli, integrate, report
    codegen, calibrate
    passes, capture, kernels
    ir

Also: no architecture has a name in the library, since one analysis must serve them all.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = (("cli", "integrate", "report"), ("codegen", "calibrate"), ("passes", "capture", "kernels"), ("ir",))
ROW_OF = {part: row for row, parts in enumerate(ROWS) for part in parts}
PUBLIC_API = 0  # planish/__init__.py, __main__.py and the names they offer stand in the top row
ARCHITECTURES = """
    albert baichuan bamba bart beit bert bloom chatglm codegen2 cohere convnext convnextv2 deberta deepseek deit
    dinov2 distilbert efficientnet electra falcon flux gemma glm4 gpt gptj gptneox granite granitemoe internlm jamba
    llama llava mamba mamba2 marian mbart minilm mistral mixtral mobilenet modernbert mpnet mpt nemotron neox olmo
    olmoe pegasus persimmon phi2 phi3 phi4 pixart qwen qwen2 qwen3 regnet resnet roberta segformer siglip smollm
    smollm3 stablelm starcoder starcoder2 swin t5 vicuna vit whisper xglm zamba
"""
_NAMES = re.compile(rf"(?<![a-z])({'|'.join(ARCHITECTURES.split())})(?![a-z])")


def part_of(path: Path, library: Path) -> str:
    """The part of the library that a file belongs to: its first folder, or its own name at the top."""
    return path.relative_to(library).with_suffix("").parts[0]


def row_of(part: str) -> int | None:
    return PUBLIC_API if part in ("__init__", "__main__") else ROW_OF.get(part)


def imported_parts(path: Path, library: Path) -> Iterator[tuple[int, str]]:
    """(line, part) of every import of the library in a file, wherever it stands and however it is written."""
    package = ("planish", *path.relative_to(library).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "planish" else [module]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                names = [str(node.args[0].value)]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "planish":
                yield node.lineno, rest.partition(".")[0] or "__init__"


def border_breaches(library: Path) -> list[str]:
    """One line for each import that reaches up, and for each file that stands in no row."""
    found = []
    for path in sorted(library.rglob("*.py")):
        part = part_of(path, library)
        own = row_of(part)
        where = path.relative_to(library.parent)
        if own is None:
            found.append(f"{where}: `{part}` stands in no row of design.md's layers")
            continue
        for line, imported in imported_parts(path, library):
            # A name that is no part of the library (`from planish import capture_model`) is the public API's.
            target = ROW_OF.get(imported, PUBLIC_API)
            if imported != "__version__" and target < own:
                found.append(f"{where}:{line}: {part} imports {imported}, which stands above it")
    return found


def architecture_names(path: Path) -> list[str]:
    """Architectures named in a file, comments and docstrings included; a citation may name its method, and so may a
    recipe."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if "arXiv" in line or (
            path.suffix == ".yaml" and line == f"name: {path.stem}"
        ):  # a recipe is named by its paper
            continue
        spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", line)  # GPTNeoX: GPT_Neo_X
        names = sorted({*_NAMES.findall(line.lower()), *_NAMES.findall(spaced.lower())})
        found += [f"{path.name}:{number}: {name}" for name in names]
    return found


def test_imports_respect_the_layers() -> None:
    assert (ROOT / "planish" / "__init__.py").is_file()
    assert border_breaches(ROOT / "planish") == []


def test_the_library_names_no_architecture() -> None:
    files = [p for suffix in ("py", "yaml") for p in sorted((ROOT / "planish").rglob(f"*.{suffix}"))]
    assert files
    assert [name for path in files for name in architecture_names(path)] == []


@pytest.mark.parametrize(
    ("file", "source", "breach"),
    [
        ("ir/graph.py", "import planish.passes", "planish/ir/graph.py:1: ir imports passes"),
        ("ir/graph.py", "from planish.passes.manager import Pipeline", "ir imports passes"),
        ("ir/ops/norm.py", "def f():\n    from ...capture import x", "norm.py:2: ir imports capture"),
        ("ir/graph.py", "from planish import codegen", "ir imports codegen"),
        ("ir/graph.py", "from .. import kernels", "ir imports kernels"),
        (
            "passes/scale.py",
            "import importlib\nimportlib.import_module('planish.calibrate')",
            "passes imports calibrate",
        ),
        (
            "kernels/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import planish.cli",
            "a.py:3",
        ),
        ("codegen/onnx.py", "from planish.integrate import convert", "codegen imports integrate"),
        ("capture/fx.py", "import planish", "capture imports __init__"),
        ("capture/fx.py", "from planish import optimize", "capture imports optimize"),
        ("helpers.py", "", "planish/helpers.py: `helpers` stands in no row"),
    ],
)
def test_a_bad_import_is_found(tmp_path: Path, file: str, source: str, breach: str) -> None:
    path = tmp_path / "planish" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (found,) = border_breaches(tmp_path / "planish")
    assert breach in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "ir/graph.py",
            "import torch\nfrom planish.ir.types import Type\nfrom . import text\nfrom .ops import norm",
        ),
        (
            "passes/scale.py",
            "from planish.ir import graph\nfrom planish.capture import from_fx\nimport planish.kernels",
        ),
        ("codegen/select.py", "from planish.calibrate import stats\nfrom planish import __version__"),
        ("cli.py", "import planish\nfrom planish import optimize\nfrom planish.ir import graph"),
        ("__init__.py", "import importlib\nimportlib.import_module('planish.integrate')"),
    ],
)
def test_a_good_import_is_not(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / "planish" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert border_breaches(tmp_path / "planish") == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("class LlamaMapping: pass", ["llama"]),
        ("if kind == 'gemma2': pass", ["gemma"]),
        ("def fold_bert_norm(): pass", ["bert"]),
        ("import transformers.models.qwen2 as m", ["qwen"]),
        ("x = model.GPTNeoX", ["gpt", "gptneox"]),
        ("TABLE = {'MixtralForCausalLM': 1}", ["mixtral"]),
        ('"""MambaQuant (arXiv 2501.13484), shown on LLaMA."""\n# as llama does\ngptq = vitality = 1', ["llama"]),
        ("bits = hilbert = cubit = yield_point = 1", []),
    ],
)
def test_an_architecture_name_is_found(tmp_path: Path, source: str, names: list[str]) -> None:
    path = tmp_path / "file.py"
    path.write_text(source)
    assert [found.rsplit(" ", 1)[1] for found in architecture_names(path)] == names
