"""Decoder blocks of any width and depth as graphs, with random weights and outlying channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from planish.ir.graph import Graph, Value

VOCABULARY, HEAD, LOUD = 512, 64, 4  # rows of the table, channels of a head, loud channels of each norm


def decoder(width: int, layers: int = 1, *, tokens: int = 64, seed: int = 0) -> Graph:
    """Embedding, `layers` blocks (RMS norm, grouped heads with rotary positions, a gated MLP), norm and head.

    Weights are float32 with a deviation of 1 / sqrt(fan-in); the MLP is 2.7 times as wide, as LLaMA's is. A few
    channels of each norm are thirty times as loud as the rest, and those who read the norm weigh them a tenth.
    """
    from planish.ir.constant import Constant
    from planish.ir.graph import Graph
    from planish.ir.ops import get
    from planish.ir.types import TensorType

    graph = Graph("decoder")
    rng = np.random.default_rng(seed)
    heads, keys, hidden = max(width // HEAD, 1), max(width // HEAD // 4, 1), -(-width * 8 // 3 // 64) * 64
    size = width // heads

    def held(name: str, data: np.ndarray) -> Value:
        return graph.add_constant(graph.fresh_name(name), Constant.of(data))

    def op(name: str, *operands: Value, **attributes: Any) -> Value:
        return graph.append(get(name), operands, attributes).result

    loud = rng.choice(width, LOUD, replace=False)

    def linear(x: Value, inputs: int, outputs: int, name: str) -> Value:
        weight = rng.standard_normal((outputs, inputs), np.float32) / np.float32(inputs**0.5)
        if x.producer is not None and x.producer.op.name == "rms_norm":
            weight[:, loud] /= 10
        return op("linear", x, held(f"{name}.weight", weight))

    def norm(x: Value, name: str) -> Value:
        gain = np.exp(0.3 * rng.standard_normal(width)).astype(np.float32)
        gain[loud] *= 30
        return op("rms_norm", x, held(f"{name}.weight", gain), eps=1e-6)

    def split(x: Value, count: int) -> Value:
        return op("transpose", op("reshape", x, held("shape", np.array([0, 0, count, size]))), perm=(0, 2, 1, 3))

    angles = np.arange(tokens)[:, None] * 10000.0 ** (-np.arange(size // 2) / (size // 2))
    angles = np.concatenate([angles, angles], 1)
    cos, sin = (held(name, f(angles).astype(np.float32)) for name, f in (("cos", np.cos), ("sin", np.sin)))
    ids = graph.add_input("ids", TensorType("i64", ("batch", tokens)))
    table = held("embedding.weight", rng.standard_normal((VOCABULARY, width), np.float32))
    x = op("embedding", table, ids)
    for number in range(layers):
        at = f"layers.{number}"
        h = norm(x, f"{at}.norm1")
        q = op("rope", split(linear(h, width, width, f"{at}.q"), heads), cos, sin)
        k = op("rope", split(linear(h, width, keys * size, f"{at}.k"), keys), cos, sin)
        v = split(linear(h, width, keys * size, f"{at}.v"), keys)
        mixed = op("transpose", op("attention", q, k, v, causal=True), perm=(0, 2, 1, 3))
        merged = op("reshape", mixed, held("shape", np.array([0, 0, width])))
        x = op("add", x, linear(merged, width, width, f"{at}.o"))
        h = norm(x, f"{at}.norm2")
        gated = op("mul", op("silu", linear(h, width, hidden, f"{at}.gate")), linear(h, width, hidden, f"{at}.up"))
        x = op("add", x, linear(gated, hidden, width, f"{at}.down"))
    graph.add_output("logits", linear(norm(x, "norm"), width, VOCABULARY, "head"))
    return graph


def batches(tokens: int, count: int, *, seed: int = 1, rows: int = 4) -> list[dict[str, np.ndarray]]:
    """Random tokens for `decoder`."""
    rng = np.random.default_rng(seed)
    return [{"ids": rng.integers(0, VOCABULARY, size=(rows, tokens))} for _ in range(count)]


def parameters(graph: Graph) -> int:
    """Elements of all constants."""
    return sum(v.constant.size for v in graph.constants if v.constant is not None)


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of values ~ sizes^p, by least squares on the logarithms."""
    x, y = np.log(np.asarray(sizes, float)), np.log(np.maximum(np.asarray(values, float), 1e-4))
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))
