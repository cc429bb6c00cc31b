"""Two processes, one cache of Inductor's, other weights of the same shapes: nothing of a weight may be in the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from torch._dynamo.utils import counters
from backend_cases import Block, filled, numbers, reference
from planish.ir.probe import relative_error

options = json.loads(sys.argv[3])
text = options.pop("text")
model, x = filled(Block(64), int(sys.argv[2])), numbers(4, 64)
if options.pop("bfloat16", False):
    model, x = model.bfloat16(), x.bfloat16()
with torch.no_grad():
    found = torch.compile(model, backend="planish", options={"strict": True, **options})(x)
    expected = reference(model, x, pipeline=text)
    float_error = relative_error(found.float(), model(x).float())
hits = {k: v for k, v in counters["inductor"].items() if k.startswith("fxgraph_cache")}
print(json.dumps({"error": relative_error(found.float(), expected.float()), "float": float_error, "hits": hits}))
"""


def run(folder: Path, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """One process that compiles a model of that seed; the folder is Inductor's cache."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(seed), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(folder: Path, options: dict[str, Any], tolerance: float) -> None:
    first, second = run(folder, 1, options), run(folder, 2, options)
    assert first["error"] <= tolerance and second["error"] <= tolerance, (first, second)
    assert 0 < first["float"] < 0.2 and 0 < second["float"] < 0.2
    assert second["hits"].get("fxgraph_cache_hit", 0) > 0, second  # else the test shows nothing


def test_another_process_with_other_weights(tmp_path: Path) -> None:
    check(tmp_path, {"text": "raise,quantize{activations=int8:token}"}, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["auto", "aten"])
@pytest.mark.parametrize("recipe", ["raise,quantize{weights=uint4:g32}", "raise,quantize{activations=int8:token}"])
def test_freezing_and_autotuning(recipe: str, target: str, tmp_path: Path) -> None:
    """The options under which Inductor bakes weights into what it caches."""
    options = {"text": recipe, "recipe": recipe, "target": target, "freezing": True, "max_autotune": True}
    check(tmp_path, options, 1e-4)


@pytest.mark.slow
def test_two_processes_in_bfloat16(tmp_path: Path) -> None:
    check(tmp_path, {"text": "raise,quantize{activations=int8:token}", "bfloat16": True}, 2e-2)
