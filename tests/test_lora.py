"""Adapters: the sum is the merged weight; nothing that is quantised changes; what does not fit is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from encoder_blocks import pre_norm, statistics
from helpers import check_text, random_inputs, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import TOLERANCE, Build

import planish
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph, Node
from planish.ir.rewriter import Rewriter
from planish.passes.base import kept_float, moved_channels
from planish.passes.float_branches import branch_of, give_weight
from planish.passes.manager import Pipeline
from planish.passes.sites import weight_matrix

SVD = "extract-low-rank{rank=2 iterations=4 grid=4}"
Adapters = dict[str, tuple[Any, Any]]


def adapters(graph: Graph, names: list[str], rank: int = 3, seed: int = 0) -> Adapters:
    rng = np.random.default_rng(seed)
    found: Adapters = {}
    for name in names:
        outputs, inputs = weight_matrix(graph.values[name].producer).shape
        found[name] = (rng.normal(size=(rank, inputs)), rng.normal(size=(outputs, rank)))
    return found


def merged(graph: Graph, lora: Adapters, strength: float) -> Graph:
    """The graph with W + strength B A."""
    graph = graph.clone()
    with Rewriter(graph) as rewriter:
        for name, (a, b) in lora.items():
            node = graph.values[name].producer
            give_weight(rewriter, node, weight_matrix(node) + strength * b @ a)
    return graph


def agree(one: Graph, two: Graph, seed: int = 0) -> float:
    inputs = random_inputs(one, seed, {"batch": 2, "tokens": 5})
    first, second = (evaluate(g, inputs, torch.float64) for g in (one, two))
    return max(relative_error(second[name], first[name]) for name in first)


NAMES = ["linear_1", "linear_6", "linear_15"]  # queries and values, which share a branch with keys; down


@pytest.mark.parametrize("pipeline", [None, SVD])
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_equals_the_merged_weight(pipeline: str | None, strength: float) -> None:
    """With a branch that is there, behind a shift too, and with one that is made."""
    graph = pre_norm()
    lora = adapters(graph, NAMES)
    start = graph if pipeline is None else Pipeline(pipeline).run(graph, stats=statistics(graph))[0]
    after = planish.add_lora(start, lora, strength)
    check_text(after)
    expected = merged(graph, lora, strength)
    assert agree(expected, after) <= TOLERANCE
    assert agree(expected, start) > 1e-3
    if pipeline is None:
        assert len(kept_float(after)) == 2 * len(NAMES)
        return
    assert len(after) == len(start)  # concatenated: no op more
    down = branch_of(after.values["linear_1"]).down
    assert weight_matrix(down).shape == (2 + 3 + 3, 8)
    up = weight_matrix(branch_of(after.values["linear_2"]).up)  # keys have no adapter
    assert up.shape == (8, 8)
    assert not up[:, 2:].any()


@settings(max_examples=10)
@given(st.integers(0, 10_000), st.integers(1, 4), st.booleans())
def test_any_adapters(seed: int, rank: int, again: bool) -> None:
    """Twice is the sum."""
    graph = pre_norm(seed)
    rng = np.random.default_rng(seed)
    names = [n.result.name for n in graph.nodes if n.op.name == "linear" and rng.random() < 0.5]
    start, _ = Pipeline(SVD).run(graph, stats=statistics(graph, seed))
    lora = adapters(graph, names, rank, seed)
    after = planish.add_lora(start, lora, 0.25)
    expected = merged(graph, lora, 0.25)
    if again:
        after, expected = planish.add_lora(after, lora), merged(expected, lora, 1.0)
    assert agree(expected, after) <= TOLERANCE


def test_nothing_quantised_changes() -> None:
    """All other constants are the same, and one linear's output moves by x A^T B^T exactly."""
    b = Build()
    x = b.input("x", "f32[batch, 8]")
    graph = b.output(b("linear", x, b.random(6, 8, name="weight"), b.random(6, name="bias")))
    rng = np.random.default_rng(0)
    stats = planish.collect(graph, [{"x": rng.normal(size=(64, 8)).astype(np.float32)}])
    text = "extract-low-rank{rank=1},quantize{weights=int4:g4 activations=int4:g4}"
    quantised, report = Pipeline(text).run(graph, stats=stats)
    assert len(report["quantize"].applied) == 1
    lora = adapters(graph, ["linear"])
    after = planish.add_lora(quantised, lora, 2.0)
    check_text(after)
    changed = {v.name for v in after.constants if quantised.values[v.name].constant != v.constant}
    assert changed == {"x.down.weight", "linear.up.weight"}
    assert any(v.dtype == "i4" for v in after.constants)
    sample = torch.from_numpy(rng.normal(size=(5, 8)))
    first, second = (evaluate(g, {"x": sample}, torch.float64)["linear"] for g in (quantised, after))
    a, up = lora["linear"]
    assert np.allclose((second - first).numpy(), 2.0 * sample.numpy() @ a.T @ up.T, rtol=1e-9, atol=1e-12)


def test_a_linear_that_was_quantised_without_a_branch() -> None:
    """The branch that is made reads what was there before it was rounded."""
    b = Build()
    graph = b.output(b("linear", b.input("x", "f32[batch, 8]"), b.random(6, 8, name="weight")))
    quantised, _ = Pipeline("quantize{weights=int8:channel activations=int8:token}").run(graph)
    after = planish.add_lora(quantised, adapters(graph, ["linear"]))
    branch = branch_of(after.values["linear"])
    assert branch is not None
    assert branch.down.operand(0).name == "x"
    check_text(after)


OUTLIERS = ["extract-outliers{count=2}", "extract-outliers{mode=dynamic threshold=0.5}"]


@pytest.mark.parametrize("pipeline", [*OUTLIERS, *(f"{SVD},{o}" for o in OUTLIERS), *(f"{o},{SVD}" for o in OUTLIERS)])
@pytest.mark.parametrize("quantised", [False, True])
def test_beside_outlier_columns(pipeline: str, quantised: bool) -> None:
    """The adapter reads what the linear read, not the columns that are left to it."""
    graph = pre_norm()
    lora = adapters(graph, NAMES)
    after, _ = Pipeline(pipeline).run(graph, stats=statistics(graph))
    exact = planish.add_lora(after, lora, 0.5)
    check_text(exact)
    assert agree(merged(graph, lora, 0.5), exact) <= TOLERANCE
    if quantised:
        after, _ = Pipeline("quantize{activations=int8:token}").run(after)
        added = planish.add_lora(after, lora, 0.5)
        assert agree(merged(graph, lora, 0.5), added) < 0.2


def test_behind_a_reassembly() -> None:
    """The adapter reads the channels of the model; what is lossy is the weight alone."""
    graph = pre_norm(op="rms_norm")
    after, report = Pipeline("reassemble-channels{min-gain=0 ratio=0.5}").run(graph, stats=statistics(graph))
    name = next(n.result.name for n in after.nodes if n.op.name == "linear" and n.operands[0].name.endswith("bled"))
    lora = {name: (np.eye(8), 100.0 * np.eye(graph.values[name].shape[-1], 8))}
    error = agree(merged(graph, lora, 1.0), planish.add_lora(after, lora))
    assert error < agree(graph, after) + 0.05, report["reassemble-channels"].applied


def test_by_source_and_as_tensors() -> None:
    graph = pre_norm()
    for node in graph.nodes:
        if node.op.name == "linear":
            node.source = f"model.{node.result.name}"
    lora = adapters(graph, ["linear_1"])
    a, up = lora["linear_1"]
    tensors = (torch.from_numpy(a), torch.from_numpy(up))
    one, two = planish.add_lora(graph, lora), planish.add_lora(graph, {"model.linear_1": tensors})
    assert one == two
    start, _ = Pipeline(SVD).run(graph, stats=statistics(graph))
    assert planish.add_lora(start, lora) == planish.add_lora(start, {"model.linear_1": tensors})


def test_the_graph_that_went_in_stays() -> None:
    graph = pre_norm()
    text = str(graph)
    planish.add_lora(graph, adapters(graph, NAMES))
    assert str(graph) == text
    assert planish.add_lora(graph, {}) == graph


def message(graph: Graph, lora: Adapters, strength: float = 1.0) -> str:
    with pytest.raises(PlanishError) as caught:
        planish.add_lora(graph, lora, strength)
    return str(caught.value)


def test_refusals() -> None:
    graph = pre_norm()
    lora = adapters(graph, ["linear_1"])
    a, up = lora["linear_1"]
    assert message(graph, {"linear_x": (a, up)}).startswith(
        "add_lora: 'linear_x': no such linear\n  hint: did you mean "
    )
    assert message(graph, {"gelu": (a, np.ones((12, 3)))}).startswith(
        "add_lora: 'gelu': is no linear and has no branch"
    )
    assert message(graph, {"linear_1": (a.T, up)}) == (
        "add_lora: 'linear_1': expected A [rank, inputs] and B [outputs, rank]; got [8, 3] and [8, 3]"
    )
    assert message(graph, {"linear_1": (a, up[:5])}) == (
        "add_lora: 'linear_1': B has shape [5, 3]; expected 8 outputs on axis 0"
    )
    for start in (graph, Pipeline(SVD).run(graph, stats=statistics(graph))[0]):
        assert message(start, {"linear_1": (a[:, :7], up)}) == (
            "add_lora: 'linear_1': A has shape [3, 7]; expected 8 inputs on axis 1"
        )
    assert message(graph, {"linear_1": (a * np.nan, up)}) == "add_lora: 'linear_1': A holds NaN or infinity"
    assert message(graph, lora, float("inf")) == "add_lora: strength: expected a finite number; got inf"
    folded, _ = Pipeline("extract-low-rank{rank=2 fold=true grid=4}").run(graph, stats=statistics(graph))
    assert "add_lora: 'linear_1': a pass transformed the channels that it reads\n" in message(
        folded, {"linear_1": (a, up)}
    )
    for node in graph.nodes:
        node.source = "same"
    assert message(graph, {"same": (a, up)}).startswith("add_lora: 'same': 8 linears have this source")


@pytest.mark.parametrize(
    "passes",
    [
        "scale-channels{method=smoothquant}",
        "scale-channels{method=smoothquant insert=true}",
        "scale-channels{method=balance}",
        "shift-channels{min-gain=0}",
        "center-layer-norm,fold-norm-gain,rotate-channels",
        "insert-hadamard{sites=all block=4}",
        "insert-hadamard{sites=all block=4},extract-low-rank{rank=2 grid=4}",
        "extract-low-rank{rank=2 grid=4},scale-channels{method=smoothquant}",
        "permute-channels{space=hidden group=2}",
        "reassemble-channels{ratio=0.3 min-gain=0},extract-low-rank{rank=2 grid=4}",
    ],
)
def test_an_adapter_is_for_the_channels_of_the_model(passes: str) -> None:
    """Where a pass changed what a linear reads or gives, it is refused; elsewhere the sum is that of the model."""
    graph = pre_norm()
    after, _ = Pipeline(passes).run(graph, stats=statistics(graph))
    check_text(after)
    refused = 0
    for name in [n.result.name for n in graph.nodes if n.op.name == "linear"]:
        lora = adapters(graph, [name])
        reads = graph.values[name].producer.operands[0].name
        if {reads, name, after.values[name].producer.operands[0].name} & moved_channels(after):
            assert "a pass transformed the channels that it" in message(after, lora)
            refused += 1
            continue
        with_lora = planish.add_lora(after, lora)
        if "reassemble" in passes:  # lossy: the adapter reads what it was trained on
            down = next(n for n in with_lora.nodes if n.op.name == "linear" and is_adapter(n, lora[name][0]))
            assert down.operands[0].name == reads
        else:
            assert agree(merged(graph, lora, 1.0), with_lora) < 1e-10
    assert refused == 0 if passes.startswith(("insert", "reassemble")) else refused > 0


def is_adapter(node: Node, a: np.ndarray) -> bool:
    """True if the last rows of a linear's weight are an adapter's."""
    weight = weight_matrix(node) if node.operands[1].is_constant else np.zeros((0, 0))
    return weight.shape[1:] == a.shape[1:] and len(weight) >= len(a) and np.allclose(weight[-len(a) :], a)


def test_a_wrong_sum_is_seen() -> None:
    """Teeth: the strength forgotten."""
    graph = pre_norm()
    lora = adapters(graph, ["linear_6"])
    assert agree(merged(graph, lora, 0.5), planish.add_lora(graph, lora, 1.0)) > 1e-3


def test_constants_keep_the_dtype_of_the_branch() -> None:
    b = Build()
    weight = b.graph.add_constant("w", Constant.of(np.ones((4, 4)), "f16"))
    graph = b.output(b("linear", b.input("x", "f16[n, 4]"), weight))
    after = planish.add_lora(graph, {"linear": (np.ones((1, 4)), np.ones((4, 1)))})
    assert {v.dtype for v in after.constants} == {"f16"}
