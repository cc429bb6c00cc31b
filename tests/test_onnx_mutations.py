"""Damaged models: a clean error, or a model that comes back computing the same; never a crash, never a hang."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import onnx.backend.test
import pytest
from onnx_models import encoder

SCRIPT = Path(__file__).with_name("onnx_mutation.py")
LIGHT = Path(onnx.backend.test.__file__).parent / "data" / "light"


def judge(path: Path, first: int, copies: int) -> Counter[str]:
    """The verdicts on some copies, from a process that dies when one takes 60 s."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(path), str(first), str(copies)], capture_output=True, text=True, check=False
    )
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"copy {first + len(verdicts)}: exit code {done.returncode}\n{done.stderr[-3000:]}"
    assert len(verdicts) == copies
    assert [v for v in verdicts if v["verdict"] == "wrong"] == []
    return Counter(v["verdict"] for v in verdicts)


def test_thirty_damaged_copies(tmp_path: Path) -> None:
    path = tmp_path / "encoder.onnx"
    path.write_bytes(encoder().SerializeToString())
    verdicts = judge(path, 0, 30)
    assert verdicts["error"] >= 15


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("first", [0, 100, 200])
def test_three_hundred_damaged_copies_of_a_real_model(first: int) -> None:
    verdicts = judge(LIGHT / "light_inception_v2.onnx", first, 100)
    assert verdicts["error"] >= 50
    assert verdicts["same"] >= 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_three_hundred_damaged_copies_of_an_encoder(tmp_path: Path) -> None:
    path = tmp_path / "encoder.onnx"
    path.write_bytes(encoder().SerializeToString())
    verdicts = judge(path, 1000, 300)
    assert verdicts["error"] >= 150
    assert verdicts["same"] >= 12
