"""`import planish` and `planish --help` load nothing heavy.

Tests assert no wall-clock time; which modules get loaded is what decides it, and is the same on every
machine. `bench/startup.py` measures the seconds.
"""

import json
import subprocess
import sys

HEAVY = {
    "networkx",
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "pydantic",
    "rich",
    "scipy",
    "torch",
    "transformers",
    "triton",
}
REPORT = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded once it ran `code`."""
    done = subprocess.run([sys.executable, "-c", f"{code}\n{REPORT}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def run_command(*arguments: str) -> str:
    return (
        f"import sys; sys.argv = ['planish', *{arguments!r}]\n"
        "from planish.cli import main\n"
        "try:\n    code = main()\nexcept SystemExit as exit:\n    code = exit.code\n"
        "assert not code, code"
    )


def test_import_is_light() -> None:
    loaded = loaded_after("import planish")
    assert "planish" in loaded
    assert loaded & HEAVY == set()


def test_help_is_light() -> None:
    loaded = loaded_after(run_command("--help"))
    assert "planish" in loaded
    assert loaded & HEAVY == set()


def test_the_probe_sees_a_heavy_import() -> None:
    assert "numpy" in loaded_after("import numpy")


def test_help_names_the_commands() -> None:
    code = run_command("--help")
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    listed = {words[0] for line in text.partition("Commands:")[2].splitlines() if (words := line.split())}
    assert {"inspect", "lint", "optimize", "opt", "verify"} <= listed
