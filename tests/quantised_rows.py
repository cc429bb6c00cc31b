"""Graphs of quantised rows, and what ONNX Runtime makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from helpers import check_text

from planish.codegen.onnx import to_model
from planish.ir import ops
from planish.ir.constant import Constant
from planish.ir.graph import Attribute, Graph, Value
from planish.ir.types import TensorType

LEVELS = (onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)


class Made:
    """A graph under construction."""

    def __init__(self) -> None:
        self.graph = Graph("rows")

    def input(self, name: str, *shape: int | str, dtype: str = "f32") -> Value:
        return self.graph.add_input(name, TensorType(dtype, shape))

    def constant(self, data: Any, dtype: str | None = None) -> Value:
        made = Constant.of(np.asarray(data), dtype)
        return self.graph.add_constant(f"c{len(self.graph.values)}", made)

    def __call__(self, op: str, *operands: Value | None, **attributes: Attribute) -> Any:
        node = self.graph.append(ops.get(op), list(operands), attributes)
        return node.results[0] if len(node.results) == 1 else node.results

    def done(self, *outputs: Value) -> Graph:
        for index, value in enumerate(outputs):
            self.graph.add_output(f"y{index}", value)
        check_text(self.graph)
        return self.graph


def onnxruntime_results(
    graph: Graph, feeds: Mapping[str, np.ndarray], opset: int | None = None, accuracy: str | None = None
) -> tuple[onnx.ModelProto, list[list[np.ndarray]]]:
    """The model, and its outputs with all optimisers off and on.

    Args:
        accuracy: how MatMulNBits computes, into which the optimiser fuses products; "1": in float32.
    """
    model = to_model(graph, opset=opset)
    onnx.checker.check_model(model)
    results = []
    for level in LEVELS:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level, options.log_severity_level = level, 4
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        if accuracy is not None:
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", accuracy)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        results.append(session.run(None, dict(feeds)))
    return model, results
