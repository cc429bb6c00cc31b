"""Small ONNX models for tests, written out with onnx's own text syntax."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
from onnx import ModelProto, TensorProto, helper, numpy_helper

ENCODER = """
<ir_version: 8, opset_import: ["": 17], producer_name: "tests", metadata_props: ["author": "planish"]>
encoder (int64[batch, 6] ids, bool wide) => (float[batch, 6, 8] y, float[batch, 6, m] chosen)
<float eps = {1e-5}>
{
  half = Constant <value = float {0.5}> ()
  axes = Constant <value_ints = [2]> ()
  x = Gather (table, ids)
  scaled = Mul (x, half)
  normed = LayerNormalization <axis = -1, epsilon = 1e-6> (scaled, gain, shift)
  q, k, v = Split <axis = -1> (normed, sizes)
  keys = Transpose <perm = [0, 2, 1]> (k)
  scores = MatMul (q, keys)
  weights = Softmax <axis = -1> (scores)
  mixed = MatMul (weights, v)
  wide_axes = Unsqueeze (mixed, axes)
  again = Squeeze (wide_axes, axes)
  projected = MatMul (again, out)
  with_bias = Add (projected, bias)
  gate = Sigmoid (with_bias)
  swish = Mul (with_bias, gate)
  y = Add (swish, x)
  chosen = If (wide) <
    then_branch = wide_graph () => (float[b, 6, w] out_then) {
      doubled = Concat <axis = -1> (y, mixed)
      out_then = Add (doubled, eps)
    },
    else_branch = narrow_graph () => (float[b, 6, n] out_else) {
      out_else = Mul (mixed, half)
    }
  >
}
"""


def encoder(seed: int = 0) -> ModelProto:
    """A small encoder: embedding, norm, attention, an If whose branches read outer values."""
    model = onnx.parser.parse_model(ENCODER)
    rng = np.random.default_rng(seed)

    def add(name: str, array: np.ndarray) -> None:
        model.graph.initializer.append(numpy_helper.from_array(array, name))

    add("table", rng.standard_normal((10, 8)).astype(np.float32))
    add("gain", rng.standard_normal(8).astype(np.float32))
    add("shift", rng.standard_normal(8).astype(np.float32))
    add("sizes", np.array([3, 3, 2]))
    add("out", rng.standard_normal((2, 8)).astype(np.float32))
    add("bias", rng.standard_normal(8).astype(np.float32))
    add("unused", np.arange(3))
    return model


def encoder_feeds(seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Inputs for both branches."""
    ids = np.random.default_rng(seed).integers(0, 10, (3, 6))
    return [{"ids": ids, "wide": np.array(flag)} for flag in (True, False)]


def linear(name: str = "y") -> ModelProto:
    """y = x w + b with a float32 weight of 4 KB."""
    rng = np.random.default_rng(1)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["product"], name="proj"),
            helper.make_node("Add", ["product", "b"], [name]),
        ],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 32])],
        [
            numpy_helper.from_array(rng.standard_normal((32, 32)).astype(np.float32), "w"),
            numpy_helper.from_array(rng.standard_normal(32).astype(np.float32), "b"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def node_model(
    node: onnx.NodeProto, inputs: list[str], outputs: list[str], opset: int, ir_version: int = 8
) -> ModelProto:
    """One node with float inputs and outputs of unknown shape."""
    graph = helper.make_graph(
        [node],
        "node",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in inputs],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
