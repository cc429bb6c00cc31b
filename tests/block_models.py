"""Small named models for the tests of the command, the inspection and the linting of mappings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH = 8


class Builder:
    """An ONNX model in the making: nodes in order, weights drawn from one generator."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}

    def weight(self, name: str, *shape: int, offset: float = 0.0) -> str:
        self.weights[name] = (self.rng.normal(0.0, 0.4, shape) + offset).astype(np.float32)
        return name

    def node(self, op: str, inputs: Sequence[str], output: str, name: str = "", **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name or output, **attributes))
        return output

    def norm(self, x: str, module: str, width: int = WIDTH) -> str:
        gain, bias = (
            self.weight(f"{module}.weight", width, offset=1.0),
            self.weight(f"{module}.bias", width),
        )
        path = "/" + module.replace(".", "/")
        return self.node("LayerNormalization", [x, gain, bias], f"{module}.out", path + "/Norm", axis=-1)

    def linear(self, x: str, module: str, inputs: int = WIDTH, outputs: int = WIDTH) -> str:
        weight, bias = self.weight(f"{module}.weight", inputs, outputs), self.weight(f"{module}.bias", outputs)
        path = "/" + module.replace(".", "/")
        product = self.node("MatMul", [x, weight], f"{module}.product", path + "/MatMul")
        return self.node("Add", [product, bias], f"{module}.out", path + "/Add")

    def model(self, output: str, width: int = WIDTH, rank: int = 3) -> onnx.ModelProto:
        dims = ["batch", "tokens"][: rank - 1]
        graph = helper.make_graph(
            self.nodes,
            "block",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*dims, WIDTH])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, [*dims, width])],
            [numpy_helper.from_array(a, n) for n, a in self.weights.items()],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(made, full_check=True)
        return made


def block(layers: int = 1, *, readers: str = "qkv", residual: str = "pre", seed: int = 0) -> onnx.ModelProto:
    """norm -> linears that are summed -> relu -> up -> down, with a residual.

    Args:
        layers: how many, named layers.0, layers.1, ...
        readers: a letter for each linear that reads the norm.
        residual: "pre" adds what the norm reads, "post" what it writes.
    """
    make = Builder(seed)
    x = "x"
    for number in range(layers):
        at = f"layers.{number}"
        normed = make.norm(x, f"{at}.norm")
        parts = [make.linear(normed, f"{at}.{letter}") for letter in readers]
        total = parts[0]
        for index, part in enumerate(parts[1:]):
            total = make.node("Add", [total, part], f"{at}.sum{index}")
        active = make.node("Relu", [total], f"{at}.relu")
        down = make.linear(active, f"{at}.down")
        x = make.node("Add", [down, x if residual == "pre" else normed], f"{at}.residual")
    final = make.linear(make.norm(x, "norm"), "head")
    return make.model(final)


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path
