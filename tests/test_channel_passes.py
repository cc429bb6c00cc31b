"""The channel passes together on captured torch models: exact, and at the sites that each model has."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import check_text
from patterns import TOLERANCE

import planish
from planish.calibrate.collect import collect
from planish.ir.graph import Graph
from planish.ir.stats import Stats
from planish.passes.manager import Pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import zoo_models

# grouped heads, one weight for queries, keys and values of which a part is rotary, multipliers, patches, a gain on each
# branch between convolutions, a state space
MODELS = ("llama", "gpt-neox", "granite", "vit", "convnext", "mamba")
PIPELINES = (
    "fold-gates,permute-channels{group=4},reparameterize-norm{grow-bias=true},scale-channels{method=balance}",
    "scale-channels,permute-channels{method=zigzag group=4},fold-gates",
    "permute-channels{method=k-sort group=2},scale-channels{method=smoothquant},reparameterize-norm",
    "scale-channels{method=balance},shift-channels,permute-channels{method=group-by-range group=4}",
)
_KEPT: dict[str, tuple[Graph, list[dict[str, torch.Tensor]], Stats]] = {}


def captured(name: str) -> tuple[Graph, list[dict[str, torch.Tensor]], Stats]:
    """The raised graph of a model with planted weights, its inputs, and its statistics; made once."""
    if name not in _KEPT:
        module, inputs = zoo_models.build(name, 0)
        graph = planish.capture(module, inputs)
        samples = [{v.name: inputs[v.name] for v in graph.inputs if v.name in inputs}]
        raised, _ = Pipeline("raise").run(graph, samples=samples)
        _KEPT[name] = raised, samples, collect(raised, samples)
    return _KEPT[name]


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", MODELS)
def test_exact(name: str, pipeline: str) -> None:
    graph, samples, stats = captured(name)
    after, report = Pipeline(pipeline).run(graph, stats=stats, samples=samples)
    assert report.validated
    assert all(done.error is None or done.error <= TOLERANCE for done in report.passes)
    assert sum(len(done.applied) for done in report.passes) >= 5
    check_text(after)


def applied(name: str, pipeline: str) -> dict[str, int]:
    """How many sites a pass found, by what they are for."""
    graph, _, stats = captured(name)
    _, report = Pipeline(pipeline).run(graph, stats=stats, validate=False)
    return dict(Counter(f["kind"] for f in report.passes[-1].figures.values()))


def test_sites() -> None:
    """Per layer: both norms, keys, values, up; the last norm; keys in part rotary are two spaces."""
    balance, order = "scale-channels{method=balance}", "permute-channels{method=zigzag group=2}"
    assert applied("llama", balance) == {"hidden": 7, "key": 2, "value": 2}
    assert applied("gpt-neox", balance) == {"hidden": 5, "key": 4, "value": 2}
    assert applied("vit", balance) == {"hidden": 5, "key": 2, "value": 2}
    assert applied("mamba", balance) == {"hidden": 8}
    for name in ("llama", "vit"):
        assert set(applied(name, order)) == {"residual", "hidden", "key", "value"}


@pytest.mark.parametrize(("name", "count"), [("granite", 6), ("convnext", 3), ("vit", 0)])
def test_gates(name: str, count: int) -> None:
    graph, _, _ = captured(name)
    after, report = Pipeline("fold-gates").run(graph, validate=False)
    assert len(report.passes[0].applied) == count
    assert len(after) == len(graph) - count
