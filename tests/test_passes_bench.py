"""`bench/passes.py`: the growth that it fits, and what it measures of a pass in a child process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import check_text
from test_docs import ROOT

sys.path.append(str(ROOT / "bench"))
import blocks
import passes

from planish.passes.pipeline import parse_pipeline


def test_slope() -> None:
    sizes = [128, 256, 1024]
    assert blocks.slope(sizes, [3e-6 * n**2.5 for n in sizes]) == pytest.approx(2.5)
    assert blocks.slope(sizes, [7.0, 7.0, 7.0]) == pytest.approx(0.0)


def test_the_generated_decoder() -> None:
    graph = blocks.decoder(128, 3, tokens=8)
    check_text(graph)
    assert sum(n.op.name == "linear" for n in graph.nodes) == 3 * 7 + 1
    assert blocks.parameters(graph) > 3 * (2 * 128 * 128 + 3 * 128 * 320)


def test_every_pass_that_is_measured_is_there() -> None:
    for before, item in passes.MEASURED.values():
        parse_pipeline(before + item)
    assert len(passes.known(None)) == len(passes.MEASURED)
    assert passes.known("^quantize gptq$") == ["quantize gptq"]


@pytest.mark.slow
def test_measuring_a_few_passes(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, "bench/passes.py", "--quick", "--part", "growth", "--json", str(out)]
    done = subprocess.run(
        [*command, "--only", "^(fold-norm-gain|quantize rtn)$"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["figures"]
    assert set(found["slopes"]["depth"]) == {"fold-norm-gain", "quantize rtn"}
    figures = found["runs"]["512 wide"]["quantize rtn"]
    assert figures["applied"] == 9
    assert figures["seconds"] > 0
    assert 0 < figures["gib"] < 1
    assert done.stdout.splitlines()[-1].startswith("passes: ")


def test_a_pass_that_refuses_is_a_row() -> None:
    assert passes.shown({"refused": "needs more"}) == ["refused", ""]
    assert passes.shown({"failed": "ValueError"}) == ["FAILED", ""]
    assert passes.shown({"seconds": 1.234, "gib": 0.5, "applied": 3}) == ["1.23", "0.50"]
