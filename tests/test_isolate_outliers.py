"""isolate-outliers: the split is exact, happens where channels stick out, and refuses what it must."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import check_text

from planish.calibrate.collect import collect
from planish.ir.constant import Constant
from planish.ir.errors import ValidationError
from planish.ir.graph import Graph, Value
from planish.ir.ops import get
from planish.ir.probe import random_inputs
from planish.ir.stats import Stats
from planish.ir.types import TensorType
from planish.passes import isolate_outliers
from planish.passes.isolate_outliers import IsolateOutliers, choose_outliers
from planish.passes.manager import Pipeline

WIDTH, HIDDEN, LOUD = 6, 20, (3, 11)


def mlp(act: str = "gelu", *, loud: float = 30.0, transposed: bool = False) -> Graph:
    """x -> linear -> act -> linear, with some hidden channels far larger than the others."""
    rng = np.random.default_rng(0)
    graph = Graph("mlp")
    x = graph.add_input("x", TensorType("f32", (2, 5, WIDTH)))

    def linear(name: str, x: Value, weight: np.ndarray) -> Value:
        data = weight.T if transposed else weight
        held = graph.add_constant(f"{name}.weight", Constant.of(np.ascontiguousarray(data).astype(np.float32)))
        bias = graph.add_constant(f"{name}.bias", Constant.of(rng.normal(size=len(weight)).astype(np.float32)))
        attributes = {"transposed": True} if transposed else {}
        return graph.append(get("linear"), [x, held, bias], attributes, names=[name]).result

    first = rng.normal(size=(HIDDEN, WIDTH))
    first[list(LOUD)] *= loud
    hidden = linear("first", x, first)
    made = graph.append(get(act), [hidden], {"axis": -1} if act == "softmax" else {}, names=["hidden"]).result
    graph.add_output("y", linear("second", made, rng.normal(size=(WIDTH, HIDDEN))))
    check_text(graph)
    return graph


def stats_of(graph: Graph) -> Stats:
    batches = [{k: v.float() for k, v in random_inputs(graph, seed).items()} for seed in range(4)]
    return collect(graph, batches)


def test_choose_outliers() -> None:
    largest = np.array([1.0, 9.0, 1.5, 8.0, 1.2])
    assert choose_outliers(largest, 2, 2.0).tolist() == [1, 3]
    assert choose_outliers(largest, 2, 7.0).tolist() == []
    assert choose_outliers(np.ones(4), 2, 1.0).tolist() == []
    assert choose_outliers(np.ones(1), 8, 2.0).tolist() == []


@pytest.mark.parametrize("act", ["gelu", "relu", "silu", "tanh"])
@pytest.mark.parametrize("transposed", [False, True])
def test_exact(act: str, transposed: bool) -> None:
    graph = mlp(act, transposed=transposed)
    stats = stats_of(graph)
    if act == "tanh":  # its results are of like size
        _, report = Pipeline([IsolateOutliers(count=2)]).run(graph, stats=stats)
        assert report["isolate-outliers"].declined == {"its channels are of like size": ["linear %second"]}
        return
    after, report = Pipeline([IsolateOutliers(count=2)]).run(graph, stats=stats)
    check_text(after)
    done = report["isolate-outliers"]
    assert len(done.applied) == 1
    assert done.error is not None
    assert done.error <= 1e-10
    parts = [v.shape[-1] for v in after.values.values() if v.name.startswith("hidden.") and v.shape]
    assert sorted(parts) == [2, HIDDEN - 2]


def test_second_run_finds_nothing_left() -> None:
    graph = mlp()
    first, _ = Pipeline([IsolateOutliers(count=2)]).run(graph, stats=stats_of(graph))
    _, report = Pipeline([IsolateOutliers(count=2)]).run(first, stats=stats_of(first))
    assert report["isolate-outliers"].applied == []
    assert set(report["isolate-outliers"].declined) == {"its channels are of like size"}


def test_statistics_follow() -> None:
    graph = mlp()
    stats = stats_of(graph)
    _, report = Pipeline(
        "isolate-outliers{count=2},scale-channels{insert=true},quantize{activations=uint8:tensor:static}"
    ).run(graph, stats=stats)
    assert len(report["quantize"].applied) == 4
    assert not report["quantize"].declined


def test_refusals() -> None:
    graph = mlp()
    graph.add_output("h", graph.values["hidden"])
    _, report = Pipeline([IsolateOutliers(count=2)]).run(graph, stats=stats_of(graph))
    assert set(report["isolate-outliers"].declined) == {"others read what would be split"}
    graph = mlp()
    _, report = Pipeline([IsolateOutliers(count=2)]).run(graph, stats=Stats())
    assert set(report["isolate-outliers"].declined) == {"no statistics of what it reads"}
    softmax = mlp("softmax")
    _, report = Pipeline([IsolateOutliers(count=2)]).run(softmax, stats=stats_of(softmax))
    assert report["isolate-outliers"].applied == []
    assert not report["isolate-outliers"].declined


def test_a_wrong_split_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded: one channel is lost."""
    graph = mlp()
    stats = stats_of(graph)
    monkeypatch.setattr(isolate_outliers.np, "setdiff1d", lambda a, b: np.array([i for i in a if i not in b])[1:])
    with pytest.raises(ValidationError, match="changed the function"):
        Pipeline([IsolateOutliers(count=2)]).run(graph, stats=stats)


def test_quantised_error_falls() -> None:
    """With one range per tensor, isolating the loud channels lets the quiet ones keep their bits."""
    from planish.ir.evaluator import evaluate

    graph = mlp("relu", loud=100.0)
    inputs = random_inputs(graph, 9)
    exact = evaluate(graph, inputs, torch.float64)["y"]
    errors = {}
    for text in ("quantize{activations=uint8:tensor}", "isolate-outliers{count=2},quantize{activations=uint8:tensor}"):
        after, _ = Pipeline(text).run(graph, stats=stats_of(graph))
        errors[text] = float((evaluate(after, inputs)["y"] - exact).norm())
    plain, split = errors.values()
    assert split < plain
