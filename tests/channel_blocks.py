"""Blocks with the channel spaces that the channel passes meet: rotary heads, convolutions, scans, gates."""

from __future__ import annotations

import numpy as np
from encoder_blocks import heads, linear, merged, norm
from patterns import Build

from planish.ir import ops
from planish.ir.constant import Constant
from planish.ir.graph import Graph, Value

TOKENS = 5


def angles(b: Build, size: int, *, interleaved: bool = False) -> tuple[Value, Value]:
    """cos and sin [1, 1, tokens, size] of rotary embeddings, constants that every layer reads."""
    frequency = 10.0 ** (-2.0 * np.arange(size // 2) / size)
    angle = np.outer(np.arange(TOKENS), frequency)
    full = np.repeat(angle, 2, -1) if interleaved else np.concatenate([angle, angle], -1)
    return b.constant(np.cos(full)[None, None], name="cos"), b.constant(np.sin(full)[None, None], name="sin")


def rotary(
    seed: int = 0,
    *,
    queries: int = 4,
    keys: int = 2,
    size: int = 8,
    interleaved: bool = False,
    layers: int = 1,
    gains: bool = False,
) -> Graph:
    """Pre-norm layers of grouped-query attention under rotary embeddings and a gated MLP, between two linears.

    Args:
        gains: an RMS norm on each head of queries and keys.
    """
    b = Build(seed)
    x = linear(b, b.input("x", f"f32[batch, {TOKENS}, 8]"), 8, "first", bias=False)
    cos, sin = angles(b, size, interleaved=interleaved)
    for number in range(layers):
        at = f"layers.{number}"
        normed = norm(b, x, f"{at}.norm1", "rms_norm")
        q = heads(b, linear(b, normed, queries * size, f"{at}.q"), queries, size)
        k = heads(b, linear(b, normed, keys * size, f"{at}.k"), keys, size)
        v = heads(b, linear(b, normed, keys * size, f"{at}.v"), keys, size)
        if gains:
            q = b("rms_norm", q, b.random(size, name=f"{at}.q.gain"))
            k = b("rms_norm", k, b.random(size, name=f"{at}.k.gain"))
        q, k = (b("rope", value, cos, sin, interleaved=interleaved) for value in (q, k))
        x = b("add", x, linear(b, merged(b, b("attention", q, k, v, causal=True), queries * size), 8, f"{at}.o"))
        normed = norm(b, x, f"{at}.norm2", "rms_norm")
        gate = b("silu", linear(b, normed, 12, f"{at}.gate"))
        x = b("add", x, linear(b, b("mul", gate, linear(b, normed, 12, f"{at}.up")), 8, f"{at}.down"))
    return b.output(linear(b, norm(b, x, "norm", "rms_norm"), 8, "last"))


def fused(seed: int = 0) -> Graph:
    """Attention whose queries, keys and values come from one linear, between two linears."""
    b = Build(seed)
    x = linear(b, b.input("x", f"f32[batch, {TOKENS}, 8]"), 8, "first")
    made = linear(b, norm(b, x, "norm"), 24, "qkv")
    node = b.graph.append(ops.get("split"), [made], {"axis": 2, "sizes": (8, 8, 8)}, names=["q", "k", "v"])
    q, k, v = (heads(b, part) for part in node.results)
    return b.output(linear(b, b("add", x, linear(b, merged(b, b("attention", q, k, v)), 8, "o")), 8, "last"))


def conv(b: Build, x: Value, outputs: int, name: str, *, size: int = 1, groups: int = 1) -> Value:
    assert x.shape is not None
    weight = b.random(outputs, int(x.shape[1]) // groups, size, size, name=f"{name}.weight")  # type: ignore[arg-type]
    pads = (size // 2,) * 4
    return b("conv", x, weight, b.random(outputs, name=f"{name}.bias"), groups=groups, pads=pads)


def convolutions(seed: int = 0) -> Graph:
    """An inverted bottleneck: 1x1, relu, depthwise 3x3, relu, 1x1."""
    b = Build(seed)
    x = conv(b, b.input("x", "f32[batch, 3, 6, 6]"), 4, "first")
    x = b("relu", conv(b, b("relu", x), 12, "expand"))
    x = b("relu", conv(b, x, 12, "depthwise", size=3, groups=12))
    return b.output(conv(b, x, 3, "project"))


def scan(seed: int = 0) -> Graph:
    """norm, in projection, depthwise convolution over time, selective scan, gate, out projection."""
    b = Build(seed)
    width, inner, rank, states = 8, 12, 3, 4
    x = linear(b, b.input("x", f"f32[batch, {TOKENS}, 8]"), width, "first")
    normed = norm(b, x, "norm", "rms_norm")
    states_in = b("transpose", linear(b, normed, inner, "in", bias=False), perm=(0, 2, 1))
    kernel = b.random(inner, 1, 3, name="conv.weight")
    u = b("conv", states_in, kernel, b.random(inner, name="conv.bias"), groups=inner, pads=(1, 1))
    u = b("silu", u)
    read = linear(b, b("transpose", u, perm=(0, 2, 1)), rank + 2 * states, "x_proj", bias=False)
    cut = {"axis": 2, "sizes": (rank, states, states)}
    step, left, right = b.graph.append(ops.get("split"), [read], cut, names=["dt", "B", "C"]).results
    delta = b("softplus", b("transpose", linear(b, step, inner, "dt_proj"), perm=(0, 2, 1)))
    decay = b.graph.add_constant("a", Constant.of(-np.exp(b.rng.normal(size=(inner, states))).astype(np.float32)))
    turned = [b("transpose", value, perm=(0, 2, 1)) for value in (left, right)]
    y = b("selective_scan", u, delta, decay, *turned, b.random(inner, name="skip"))
    gate = b("silu", linear(b, normed, inner, "gate", bias=False))
    out = linear(b, b("mul", b("transpose", y, perm=(0, 2, 1)), gate), width, "out", bias=False)
    return b.output(linear(b, b("add", x, out), width, "last"))


BLOCKS = {
    "rotary": rotary,
    "interleaved": lambda seed=0: rotary(seed, interleaved=True),
    "two layers": lambda seed=0: rotary(seed, layers=2),
    "norms on heads": lambda seed=0: rotary(seed, gains=True),
    "fused": fused,
    "convolutions": convolutions,
    "scan": scan,
}


def calibration(graph: Graph, seed: int = 0, batches: int = 4) -> list[dict[str, np.ndarray]]:
    """Random batches of two for a graph with one input."""
    rng = np.random.default_rng(seed)
    (value,) = graph.inputs
    assert value.shape is not None
    shape = [d if isinstance(d, int) else 2 for d in value.shape]
    return [{value.name: rng.normal(size=shape).astype(np.float32)} for _ in range(batches)]
