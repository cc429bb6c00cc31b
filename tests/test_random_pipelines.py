"""Any order of exact passes that the manager accepts leaves the function unchanged."""

from __future__ import annotations

import random
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import check_text
from random_pipelines import EXACT, draw

from planish.calibrate.collect import collect
from planish.integrate.api import capture
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph
from planish.ir.probe import relative_error
from planish.ir.stats import Stats
from planish.passes.manager import Pipeline
from planish.passes.pipeline import parse_pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import zoo_models

MODELS = ("llama", "gemma3", "gpt-neox", "phi3", "mixtral", "bert", "t5", "vit", "convnext", "mamba")
PER_MODEL = 10


@cache
def captured(name: str) -> tuple[Graph, dict[str, torch.Tensor], Stats]:
    """The raised graph of a zoo model, inputs for it, and statistics of it on them."""
    module, arguments = zoo_models.build(name, seed=3)
    graph, _ = Pipeline("raise").run(capture(module, arguments))
    inputs = {k: v for k, v in arguments.items() if any(k == value.name for value in graph.inputs)}
    return graph, inputs, collect(graph, [inputs])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", MODELS)
def test_random_pipelines(name: str) -> None:
    """Ten pipelines for each of ten models; the outputs agree in float64 to 1e-10."""
    graph, inputs, stats = captured(name)
    expected = evaluate(graph, inputs, torch.float64)
    for number in range(PER_MODEL):
        text = draw(random.Random(f"{name}/{number}"))
        rewritten, _ = Pipeline(text).run(graph, stats=stats, seed=number)
        check_text(rewritten)
        got = evaluate(rewritten, inputs, torch.float64)
        for output, value in expected.items():
            error = relative_error(got[output], value)
            assert error <= 1e-10, f"{text}: output '{output}' of {name} moved by {error:.3g}"


def test_every_exact_pass_is_drawn() -> None:
    """A pass that joins the library joins the test: those that are not here change no numbers on purpose."""
    from planish.passes.base import Exactness
    from planish.passes.pipeline import REGISTRY, pass_class

    drawn = {p.name for text in EXACT for p in parse_pipeline(text)}
    exact = {name for name in REGISTRY if pass_class(name).exactness in (Exactness.EXACT, Exactness.IDENTITY)}
    raising = {p.name for p in parse_pipeline("raise")}
    assert exact - raising - drawn - {"lower"} == set()
