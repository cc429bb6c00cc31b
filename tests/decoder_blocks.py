"""Decoder, encoder and vision blocks written in IR: what rotations must pass through or stop at."""

from __future__ import annotations

import numpy as np
from encoder_blocks import heads, linear, merged
from patterns import Build

from planish.ir.graph import Graph, Value

WIDTH, HEADS, KEYS, SIZE, HIDDEN, VOCABULARY, TOKENS = 32, 8, 4, 4, 192, 40, 6


def vector(b: Build, size: int, name: str, low: float = 0.3) -> Value:
    """A gain with no uniform value, away from zero."""
    return b.constant(b.rng.uniform(low, 2.0, size), name=name)


def rms(b: Build, x: Value, name: str, size: int = WIDTH, offset: float = 0.0) -> Value:
    return b("rms_norm", x, vector(b, size, name), eps=1e-5, gain_offset=offset)


def layer(b: Build, x: Value, name: str, size: int = WIDTH) -> Value:
    return b("layer_norm", x, vector(b, size, f"{name}.gain"), b.random(size, name=f"{name}.bias"), eps=1e-5)


def grouped_attention(b: Build, x: Value, *, rope: bool = True, keys: int = KEYS, at: str = "") -> Value:
    """HEADS query heads that share `keys` key and value heads, with biases."""
    q = heads(b, linear(b, x, HEADS * SIZE, f"{at}q"), HEADS, SIZE)
    k = heads(b, linear(b, x, keys * SIZE, f"{at}k"), keys, SIZE)
    v = heads(b, linear(b, x, keys * SIZE, f"{at}v"), keys, SIZE)
    if rope:
        angles = np.arange(TOKENS)[:, None] * 10.0 ** -np.arange(SIZE // 2) % (2 * np.pi)
        angles = np.concatenate([angles, angles], 1)
        cos, sin = b.constant(np.cos(angles), name="cos"), b.constant(np.sin(angles), name="sin")
        q, k = b("rope", q, cos, sin), b("rope", k, cos, sin)
    mixed = b("attention", q, k, v, causal=True)
    return linear(b, merged(b, mixed, HEADS * SIZE), WIDTH, f"{at}o")


def gated(b: Build, x: Value, hidden: int = HIDDEN, at: str = "") -> Value:
    gate = b("silu", linear(b, x, hidden, f"{at}gate"))
    return linear(b, b("mul", gate, linear(b, x, hidden, f"{at}up")), WIDTH, f"{at}down")


def experts(b: Build, x: Value, count: int = 3, at: str = "") -> Value:
    """A router, routed experts and a shared one: all read the norm, all write the stream."""
    weights = b("softmax", linear(b, x, count, f"{at}router", bias=False), axis=-1)
    total = gated(b, x, 24, f"{at}shared.")
    for index in range(count):
        share = b("slice", weights, np.array([index]), np.array([index + 1]), np.array([-1]))
        total = b("add", total, b("mul", gated(b, x, 24, f"{at}expert{index}."), share))
    return total


def decoder(seed: int = 0, *, layers: int = 2, tied: bool = False, moe: bool = False, offset: float = 0.0) -> Graph:
    """Embedding, RMS norms, grouped heads with rotary positions and biases, a gated MLP of 192 = 12 x 16 channels."""
    b = Build(seed)
    table = b.random(VOCABULARY, WIDTH, name="table")
    x = b("embedding", table, b.input("ids", f"i64[batch, {TOKENS}]"))
    for index in range(layers):
        at = f"layers.{index}."
        x = b("add", x, grouped_attention(b, rms(b, x, f"{at}norm1", offset=offset), at=at))
        normed = rms(b, x, f"{at}norm2", offset=offset)
        x = b("add", x, experts(b, normed, at=at) if moe else gated(b, normed, at=at))
    final = rms(b, x, "norm", offset=offset)
    head = table if tied else b.random(VOCABULARY, WIDTH, name="head")
    return b.output(b("linear", final, head))


def layer_norm_decoder(seed: int = 0, *, layers: int = 2, tied: bool = False) -> Graph:
    """Token and position embeddings, pre-layer-norm blocks with plain heads and a gelu MLP."""
    b = Build(seed)
    table = b.random(VOCABULARY, WIDTH, name="table")
    x = b("embedding", table, b.input("ids", f"i64[batch, {TOKENS}]"))
    x = b("add", x, b.random(TOKENS, WIDTH, name="positions"))
    for index in range(layers):
        at = f"layers.{index}."
        attended = grouped_attention(b, layer(b, x, f"{at}norm1"), rope=False, keys=HEADS, at=at)
        x = b("add", x, attended)
        up = b("gelu", linear(b, layer(b, x, f"{at}norm2"), HIDDEN, f"{at}up"))
        x = b("add", x, linear(b, up, WIDTH, f"{at}down"))
    head = table if tied else b.random(VOCABULARY, WIDTH, name="head")
    return b.output(b("linear", layer(b, x, "norm"), head))


def vision(seed: int = 0) -> Graph:
    """Patches by a convolution, a class token, positions, one pre-layer-norm block, a head on the class token."""
    b = Build(seed)
    patches = b(
        "conv", b.input("x", "f32[2, 3, 8, 8]"), b.random(WIDTH, 3, 4, 4, name="patch"), b.random(WIDTH), strides=(4, 4)
    )
    x = b("transpose", b("reshape", patches, np.array([2, WIDTH, 4])), perm=(0, 2, 1))
    x = b("concat", b.random(2, 1, WIDTH, name="class"), x, axis=1)
    x = b("add", x, b.random(5, WIDTH, name="positions"))
    x = b("add", x, grouped_attention(b, layer(b, x, "norm1"), rope=False, keys=HEADS))
    x = b("add", x, linear(b, b("gelu", linear(b, layer(b, x, "norm2"), 24, "up")), WIDTH, "down"))
    first = b("gather", layer(b, x, "norm"), np.array(0), axis=1)
    return b.output(linear(b, first, 7, "head"))


def latent(seed: int = 0) -> Graph:
    """Low-rank paths: linear, linear; and linear, RMS norm, linear."""
    b = Build(seed)
    x = linear(b, b.input("x", f"f32[batch, {WIDTH}]"), 12, "down", bias=True)
    plain = linear(b, x, 20, "up")
    compressed = rms(b, linear(b, b.graph.values["x"], 24, "compress", bias=False), "norm", 24)
    return b.output(b("add", plain, linear(b, compressed, 20, "expand")))
