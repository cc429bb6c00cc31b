"""The row `reassemble`: a gather and sums in segments, in ONNX Runtime, in torch, and in the analysis."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from patterns import Build

import planish
from planish.codegen.onnx import to_model
from planish.ir.errors import InvalidModelError, PlanishError
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph
from planish.ir.ops.base import Act
from planish.ir.spaces import analyse
from planish.passes.reassembly import Reassembly, assembled


def reassembled(change: Reassembly | None = None, axis: int = -1, shape: str = "f32[n, 3, 8]") -> Graph:
    b = Build()
    change = change or assembled(np.array([1, 1, 2, 1, 1, 3, 1, 1]), np.array([[0, 1], [4, 3], [6, 3]]))
    data = (change.index, change.sizes, change.weights)
    return b.output(b("reassemble", b.input("x", shape), *(b.constant(d) for d in data), axis=axis))


def run_ort(made: onnx.ModelProto, x: torch.Tensor, *, optimise: bool = False) -> np.ndarray:
    """By ONNX Runtime, with its optimiser or without."""
    onnx.checker.check_model(made, full_check=True)
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    made.ir_version = min(made.ir_version, 10)
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x.numpy()})[0]
    return found


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("optimised", [True, False])
def test_onnx_runtime_computes_the_row(opset: int, optimised: bool) -> None:
    graph = reassembled()
    inputs = {"x": torch.randn(5, 3, 8)}
    wanted = evaluate(graph, inputs)["reassemble"]
    made = to_model(graph, opset=opset)
    assert {n.op_type for n in made.graph.node} <= {"Gather", "Mul", "Add", "Concat", "Identity"}
    got = run_ort(made, inputs["x"], optimise=optimised)
    assert np.abs(got - wanted.numpy()).max() <= 1e-6


def test_segments_in_any_order() -> None:
    change = Reassembly(
        np.ones(4, np.int64),
        np.array([3, 0, 1, 2, 2, 0]),
        np.array([1, 3, 2]),
        np.array([1.0, 0.5, 2.0, -1.0, 1.0, 1.0]),
    )
    graph = reassembled(change, axis=1, shape="f32[n, 4, 5]")
    x = torch.randn(2, 4, 5)
    wanted = evaluate(graph, {"x": x})["reassemble"]
    expected = torch.stack([x[:, 3], 0.5 * x[:, 0] + 2 * x[:, 1] - x[:, 2], x[:, 2] + x[:, 0]], 1)
    assert torch.allclose(wanted, expected, atol=1e-6)
    got = run_ort(to_model(graph), x)
    assert np.abs(got - expected.numpy()).max() <= 1e-6


def test_torch_exports_the_row() -> None:
    graph = reassembled()
    module = planish.to_torch(graph)
    x = torch.randn(5, 3, 8)
    wanted = evaluate(graph, {"x": x})["reassemble"]
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    for made in (module(x), program.module()(x)):
        found = made["reassemble"] if isinstance(made, dict) else made[0] if isinstance(made, tuple) else made
        assert torch.allclose(found, wanted, atol=1e-6)


def test_other_axes_pass_and_its_own_takes_scales() -> None:
    b = Build()
    x = b("linear", b.input("x", "f32[n, 4]"), b.random(8, 4, name="w"))
    change = assembled(np.array([1, 1, 2, 1, 1, 1, 1, 1]), np.array([[0, 1]]))
    y = b("reassemble", x, *(b.constant(d) for d in (change.index, change.sizes, change.weights)))
    graph = b.output(b("linear", y, b.random(3, 8, name="read")))
    scale = analyse(graph).admitted(Act.SCALE)
    assert {m.value.name for s in scale for m in s.activations} == {"linear", "reassemble"}  # type: ignore[union-attr]
    assert all(len(s.activations) == 1 and s.producers and s.consumers for s in scale)
    blocked = analyse(graph).at(y, (1,), Act.PERMUTE)[0]
    assert "its index names the places of channels" in str(blocked.blockers[0])


def test_a_wrong_row_is_refused() -> None:
    b = Build()
    x = b.input("x", "f32[n, 4]")
    for index, sizes, weights, message in (
        ([0, 1], [1], [1.0, 1.0], "sizes must be at least 1 and sum to the length of index"),
        ([0, 1], [2, 0], [1.0, 1.0], "sizes must be at least 1"),
        ([0, 1], [1, 1], [1.0], "index and weights differ in length"),
        ([[0, 1]], [1, 1], [1.0, 1.0], "index is no vector"),
    ):
        with pytest.raises(InvalidModelError, match=message):
            b("reassemble", x, np.array(index), np.array(sizes), np.array(weights))
    with pytest.raises(InvalidModelError, match="axis 5 of a tensor of rank 2"):
        b("reassemble", x, np.array([0]), np.array([1]), np.array([1.0]), axis=5)


def test_sizes_that_are_computed_have_no_onnx_form() -> None:
    b = Build()
    operands = (b.input("x", "f32[n, 4]"), np.array([0, 1]), b.input("sizes", "i64[2]"), np.array([1.0, 1.0]))
    graph = b.output(b("reassemble", *operands))
    with pytest.raises(PlanishError, match="an index, sizes or weights that are computed are not possible"):
        to_model(graph)
    with pytest.raises(PlanishError, match="its sizes must be constant to write torch code"):
        planish.to_torch(graph)
