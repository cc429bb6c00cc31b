"""Raising on real models: every norm, activation, linear, attention and embedding is found in each export."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from planish.capture.from_onnx import from_onnx
from planish.passes.manager import Pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import assets

pytestmark = pytest.mark.slow

MINILM = {"layer_norm": 13, "gelu": 6, "linear": 36, "attention": 6, "embedding": 3}


def raised(path: Path) -> Counter[str]:
    after, report = Pipeline("raise").run(from_onnx(path))
    assert report.validated, report.unchecked
    assert all((p.error or 0.0) <= 1e-10 for p in report.passes)
    _, again = Pipeline("raise").run(after, validate=False)
    assert not any(p.applied for p in again.passes)
    return Counter(n.op.name for n in after.nodes)


@pytest.mark.parametrize("opset", [18, 20])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("exporter", ["dynamo", "legacy"])
def test_minilm(exporter, attention, opset):
    found = raised(assets.minilm_onnx(exporter, attention, opset))
    assert {op: found[op] for op in MINILM} == MINILM
    for op in ("matmul", "softmax", "erf", "is_nan", "gather"):
        assert found[op] == (16 if (op, exporter) == ("gather", "legacy") else 0)  # those of shapes


def test_minilm_merges_queries_keys_and_values():
    graph = from_onnx(assets.minilm_onnx("dynamo", "sdpa"))
    after, report = Pipeline("raise,merge-linears").run(graph)
    found = Counter(n.op.name for n in after.nodes)
    assert (found["linear"], found["split"]) == (24, 6)
    assert report["merge-linears"].error <= 1e-10


def test_typeseg():
    found = raised(assets.typeseg_unet())
    assert (found["layer_norm"], found["gelu"], found["tanh"], found["sqrt"]) == (30, 30, 0, 0)


def test_ppocr():
    found = raised(assets.ppocr_rec())
    expected = {"layer_norm": 5, "hard_swish": 28, "silu": 7, "attention": 2, "linear": 9, "batch_norm": 6}
    assert {op: found[op] for op in expected} == expected
    after, report = Pipeline("raise,fold-batch-norm").run(from_onnx(assets.ppocr_rec()))
    assert len(report["fold-batch-norm"].applied) == 6
    assert not any(n.op.name == "batch_norm" for n in after.nodes)
