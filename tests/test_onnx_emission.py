"""Canonical ops written at every opset: the evaluator and ONNX Runtime must agree on the emitted model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import check_text

from planish.codegen.onnx import to_model
from planish.ir import ops
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.evaluator import evaluate
from planish.ir.graph import Attribute, Graph, Value
from planish.ir.types import TensorType

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from ort_run import run

OPSETS = (8, 11, 13, 17, 18, 21, 23, 24)


def array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def build(
    op: str, operands: list[Any], attributes: dict[str, Attribute] | None = None
) -> tuple[Graph, dict[str, np.ndarray]]:
    """A graph of one node. Arrays become inputs, Constants constants, None absent operands."""
    graph = Graph("one")
    feeds: dict[str, np.ndarray] = {}
    values: list[Value | None] = []
    for index, operand in enumerate(operands):
        name = f"v{index}"
        if operand is None:
            values.append(None)
        elif isinstance(operand, Constant):
            values.append(graph.add_constant(name, operand))
        else:
            feeds[name] = operand
            values.append(graph.add_input(name, Constant.of(operand).type))
    node = graph.append(ops.get(op), values, attributes or {})
    for index, result in enumerate(node.results):
        graph.add_output(f"y{index}", result)
    check_text(graph)
    return graph, feeds


def agree(graph: Graph, feeds: dict[str, np.ndarray], opset: int, tolerance: float = 2e-6) -> onnx.ModelProto:
    model = to_model(graph, opset=opset)
    onnx.checker.check_model(model)
    model.ir_version = min(model.ir_version, 10)
    got = run(model, [feeds])[0]
    expected = evaluate(graph, feeds)
    for value, (name, _) in zip(got, graph.outputs, strict=True):
        want = expected[name].double().numpy()
        assert value.shape == want.shape
        if value.dtype == np.bool_ or value.dtype.kind in "iu":
            np.testing.assert_array_equal(value, want)
        else:
            np.testing.assert_allclose(value, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))
    return model


def of(data: np.ndarray) -> Constant:
    return Constant.of(data)


MASK = np.where(array(1, 1, 3, 5) > 1, np.float32(-1e9), np.float32(0))
KEEP = np.array([[True, False, True, True, True]] * 3)

CASES: dict[str, tuple[str, list[Any], dict[str, Attribute], int]] = {
    # name: op, operands, attributes, lowest opset
    "gelu": ("gelu", [array(3, 4)], {"approximate": "none"}, 11),
    "gelu tanh": ("gelu", [array(3, 4)], {"approximate": "tanh"}, 8),
    "silu": ("silu", [array(3, 4)], {}, 8),
    "hard_swish": ("hard_swish", [array(3, 4)], {}, 8),
    "softmax last": ("softmax", [array(2, 3, 4)], {"axis": -1}, 8),
    "softmax middle": ("softmax", [array(2, 3, 4)], {"axis": 1}, 8),
    "log_softmax middle": ("log_softmax", [array(2, 3, 4)], {"axis": 1}, 8),
    "softmax of ones behind": ("softmax", [array(2, 3, 1)], {"axis": 1}, 8),
    "layer_norm": ("layer_norm", [array(2, 3, 4), array(4), array(4, seed=1)], {"axis": -1, "eps": 1e-6}, 8),
    "layer_norm bare": ("layer_norm", [array(2, 3, 4)], {"axis": 1, "eps": 1e-6}, 8),
    "layer_norm no bias": ("layer_norm", [array(2, 3, 4), array(3, 4)], {"axis": -2, "eps": 1e-6}, 8),
    "layer_norm no gain": ("layer_norm", [array(2, 4), None, array(4)], {"axis": -1, "eps": 1e-6}, 8),
    "rms_norm": ("rms_norm", [array(2, 4), array(4)], {"axis": -1, "eps": 1e-6, "gain_offset": 0.0}, 8),
    "rms_norm gemma": ("rms_norm", [array(2, 4), of(array(4))], {"axis": -1, "eps": 1e-6, "gain_offset": 1.0}, 8),
    "rms_norm offset": ("rms_norm", [array(2, 4), array(4)], {"axis": -1, "eps": 1e-6, "gain_offset": 1.0}, 8),
    "rms_norm bias": ("rms_norm", [array(2, 4), array(4), array(4)], {"axis": -1, "eps": 1e-6, "gain_offset": 0.0}, 8),
    "group_norm": ("group_norm", [array(2, 6, 5), array(6), array(6, seed=1)], {"groups": 3, "eps": 1e-5}, 8),
    "group_norm bare": ("group_norm", [array(2, 6, 4, 5)], {"groups": 2, "eps": 1e-5}, 8),
    "instance_norm": ("instance_norm", [array(2, 3, 5), array(3), array(3, seed=1)], {"eps": 1e-5}, 8),
    "batch_norm": (
        "batch_norm",
        [array(2, 3, 5), array(3), array(3, seed=1), array(3, seed=2), np.abs(array(3, seed=3))],
        {"eps": 1e-5},
        8,
    ),
    "linear matrix": ("linear", [array(2, 4), of(array(3, 4)), of(array(3))], {"transposed": False}, 8),
    "linear": ("linear", [array(2, 5, 4), of(array(3, 4)), of(array(3))], {"transposed": False}, 8),
    "linear no bias": ("linear", [array(2, 4), of(array(3, 4))], {"transposed": False}, 8),
    "linear transposed": ("linear", [array(2, 5, 4), of(array(4, 3)), of(array(3))], {"transposed": True}, 8),
    "linear transposed matrix": ("linear", [array(2, 4), of(array(4, 3)), of(array(3))], {"transposed": True}, 8),
    "linear of a vector": ("linear", [array(4), of(array(3, 4))], {"transposed": False}, 8),
    "linear computed weight": ("linear", [array(2, 5, 4), array(3, 4)], {"transposed": False}, 8),
    "embedding": ("embedding", [of(array(7, 4)), np.array([[1, 6], [0, 1]])], {}, 8),
    "gemm": (
        "gemm",
        [array(4, 2), array(3, 4), array(3)],
        {"alpha": 0.5, "beta": 2.0, "trans_a": True, "trans_b": True},
        8,
    ),
    "attention": (
        "attention",
        [array(2, 4, 3, 8), array(2, 4, 5, 8, seed=1), array(2, 4, 5, 6, seed=2)],
        {"scale": None, "causal": False},
        8,
    ),
    "attention grouped": (
        "attention",
        [array(2, 4, 3, 8), array(2, 2, 5, 8, seed=1), array(2, 2, 5, 8, seed=2), MASK],
        {"scale": 0.2, "causal": False},
        8,
    ),
    "attention bool mask": (
        "attention",
        [array(1, 2, 3, 8), array(1, 2, 5, 8, seed=1), array(1, 2, 5, 8, seed=2), KEEP],
        {"scale": None, "causal": False},
        9,
    ),
    "attention causal": (
        "attention",
        [array(1, 2, 5, 8), array(1, 1, 5, 8, seed=1), array(1, 1, 5, 8, seed=2)],
        {"scale": None, "causal": True},
        9,
    ),
    "attention capped": (
        "attention",
        [array(2, 4, 3, 8), array(2, 2, 5, 8, seed=1), array(2, 2, 5, 8, seed=2), MASK],
        {"scale": 0.5, "softcap": 1.5},
        8,
    ),
    "attention with sinks": (
        "attention",
        [array(2, 4, 3, 8), array(2, 2, 5, 8, seed=1), array(2, 2, 5, 8, seed=2), MASK, array(4, seed=3)],
        {},
        10,
    ),
    "rsqrt": ("rsqrt", [np.abs(array(3, 4)) + np.float32(0.5)], {}, 8),
    "rope": ("rope", [array(2, 4, 5, 6), array(5, 6, seed=1), array(5, 6, seed=2)], {"interleaved": False}, 8),
    "hadamard": ("hadamard", [array(2, 3, 12)], {}, 8),
    "hadamard of three factors": ("hadamard", [array(2, 8192)], {"transpose": True}, 8),
    "hadamard signs": (
        "hadamard",
        [array(2, 3, 8)],
        {"block": 4, "signs": of(np.array([1, -1, -1, 1, 1, 1, -1, 1], np.float32))},
        8,
    ),
    "hadamard inverse": (
        "hadamard",
        [array(2, 24, 3)],
        {"axis": 1, "transpose": True, "signs": of(np.where(array(24) > 0, 1, -1).astype(np.float32))},
        8,
    ),
    "rope pairs": ("rope", [array(2, 4, 5, 6), array(5, 6, seed=1), array(5, 6, seed=2)], {"interleaved": True}, 8),
    "selective_scan": (
        "selective_scan",
        [array(2, 3, 5), np.abs(array(2, 3, 5, seed=1)), of(-np.abs(array(3, 4))), array(2, 4, 5),
         array(2, 4, 5, seed=1), of(array(3))],
        {},
        13,
    ),
    "selective_scan bare": (
        "selective_scan",
        [array(1, 3, 5), np.abs(array(1, 3, 5, seed=1)), -np.abs(array(3, 2)), array(1, 2, 5), array(1, 2, 5, seed=1)],
        {},
        13,
    ),
    "split": ("split", [array(2, 6)], {"axis": 1, "sizes": (1, 2, 3)}, 8),
    "unsqueeze": ("unsqueeze", [array(2, 3)], {"axes": (0, 3)}, 8),
    "squeeze": ("squeeze", [array(1, 3, 1)], {"axes": (0, 2)}, 8),
    "squeeze nothing": ("squeeze", [array(2, 3)], {"axes": ()}, 8),
    "clip": ("clip", [array(2, 3), of(np.float32(-0.5)), of(np.float32(0.5))], {}, 8),
    "clip above": ("clip", [array(2, 3), None, of(np.float32(0.5))], {}, 8),
    "slice": ("slice", [array(4, 6), of(np.array([1])), of(np.array([5])), of(np.array([1]))], {}, 8),
    "slice by steps": (
        "slice",
        [array(4, 6), of(np.array([5])), of(np.array([0])), of(np.array([1])), of(np.array([-2]))],
        {},
        11,
    ),
    "pad": ("pad", [array(2, 3), of(np.array([0, 1, 1, 0])), of(np.float32(7))], {"mode": "constant"}, 8),
    "pad by axis": (
        "pad",
        [array(2, 3), of(np.array([1, 2])), None, of(np.array([1]))],
        {"mode": "constant"},
        18,
    ),
    "reduce_sum": ("reduce_sum", [array(2, 3, 4)], {"axes": (0, 2), "keepdims": False}, 8),
    "reduce_mean": ("reduce_mean", [array(2, 3, 4)], {"axes": None, "keepdims": True}, 8),
    "reduce_max": ("reduce_max", [array(2, 3, 4)], {"axes": (1,), "keepdims": True}, 8),
    "reduce_l2": ("reduce_l2", [array(2, 3, 4)], {"axes": (1,), "keepdims": False}, 8),
    "conv": (
        "conv",
        [array(1, 4, 9), of(array(6, 2, 3)), of(array(6))],
        {"strides": (2,), "pads": (1, 0), "dilations": (1,), "groups": 2, "auto_pad": "notset"},
        8,
    ),
    "conv_transpose": (
        "conv_transpose",
        [array(1, 4, 5, 5), of(array(4, 2, 3, 3))],
        {"strides": (2, 2), "pads": (1, 1, 1, 1), "dilations": (1, 1), "groups": 1, "auto_pad": "notset",
         "output_padding": (1, 0), "output_shape": ()},
        8,
    ),
    "average_pool": (
        "average_pool",
        [array(1, 2, 7)],
        {"kernel": (3,), "strides": (2,), "pads": (1, 1), "dilations": (1,), "ceil_mode": False,
         "count_include_pad": True, "auto_pad": "notset"},
        8,
    ),
    "shape": ("shape", [array(2, 3, 4)], {"start": 0, "end": None}, 8),
    "shape part": ("shape", [array(2, 3, 4)], {"start": 1, "end": -1}, 15),
    "trilu": ("trilu", [array(4, 4), of(np.array(1))], {"upper": False}, 14),
    "cast": ("cast", [array(2, 3)], {"to": "i32", "saturate": True}, 8),
    "mod": ("mod", [array(2, 3), array(3, seed=1)], {"fmod": True}, 11),
    "constant_of_shape": ("constant_of_shape", [of(np.array([2, 3]))], {"value": of(np.array([2], np.int64))}, 9),
    "range": ("range", [of(np.array(1)), of(np.array(9)), of(np.array(3))], {}, 11),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_opset(name: str) -> None:
    op, operands, attributes, lowest = CASES[name]
    graph, feeds = build(op, operands, attributes)
    for opset in OPSETS:
        if opset >= lowest:
            agree(graph, feeds, opset)


def op_types(name: str, opset: int) -> list[str]:
    op, operands, attributes, _ = CASES[name]
    return [n.op_type for n in to_model(build(op, operands, attributes)[0], opset=opset).graph.node]


def test_operators_of_their_own_are_used() -> None:
    assert op_types("layer_norm", 17) == ["LayerNormalization"]
    assert op_types("layer_norm bare", 17) == ["LayerNormalization"]
    assert "ReduceMean" in op_types("layer_norm", 13)
    assert op_types("gelu", 20) == ["Gelu"]
    assert op_types("rms_norm", 23) == op_types("rms_norm gemma", 23) == ["RMSNormalization"]
    assert op_types("attention", 23) == ["Attention"]
    assert op_types("silu", 24) == ["Swish"]
    assert op_types("silu", 21) == ["Sigmoid", "Mul"]
    assert op_types("group_norm", 21) == ["GroupNormalization"]
    assert op_types("linear matrix", 17) == ["Gemm"]
    assert op_types("linear", 17) == ["MatMul", "Add"]
    assert op_types("linear no bias", 17) == ["MatMul"]
    assert op_types("softmax of ones behind", 8) == ["Softmax"]


def test_a_plain_attention_has_no_guards() -> None:
    """What ONNX Runtime fuses best: scale, MatMul, mask, Softmax, MatMul."""
    assert op_types("attention", 17) == ["Transpose", "Mul", "MatMul", "Softmax", "MatMul"]


@pytest.mark.parametrize(
    ("name", "opset", "message"),
    [
        ("slice by steps", 8, "op 'slice': steps are not possible in ONNX opset 8"),
        ("pad by axis", 13, "op 'pad': axes of a pad are not possible in ONNX opset 13"),
        ("selective_scan", 11, "op 'selective_scan': a scan over time is not possible in ONNX opset 11"),
        ("trilu", 13, "operator 'Trilu': unknown in opset 13"),
    ],
)
def test_what_an_opset_cannot_say(name: str, opset: int, message: str) -> None:
    op, operands, attributes, _ = CASES[name]
    with pytest.raises(PlanishError, match=message):
        to_model(build(op, operands, attributes)[0], opset=opset)


def test_a_computed_limit_at_an_old_opset() -> None:
    graph, _ = build("clip", [array(2, 3), np.array(-0.5, np.float32)])
    with pytest.raises(PlanishError, match="op 'clip': a computed 'min' is not possible in ONNX opset 8"):
        to_model(graph, opset=8)


def test_shared_weights_are_transposed_once() -> None:
    graph = Graph("shared")
    x = graph.add_input("x", TensorType("f32", (2, 3, 4)))
    weight = graph.add_constant("w", of(array(4, 4)))
    first = graph.append(ops.get("linear"), [x, weight], {"transposed": False})
    second = graph.append(ops.get("linear"), [first.result, weight], {"transposed": False})
    graph.add_output("y", second.result)
    model = agree(graph, {"x": array(2, 3, 4)}, 17)
    assert [t.name for t in model.graph.initializer] == ["w_t"]
    assert model.opset_import[0].version == 17
    assert to_model(graph).opset_import[0].version == 21  # the default for a graph that is not from ONNX
    assert to_model(graph).producer_name == "planish"
