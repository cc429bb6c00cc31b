"""Encoder blocks written in IR, with calibration data that has outlying channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from patterns import Build

from planish.calibrate.collect import collect
from planish.ir.graph import Graph, Value
from planish.ir.stats import ChannelStats, Stats

WIDTH, HEADS, HIDDEN = 8, 2, 12
SIZE = WIDTH // HEADS


def linear(b: Build, x: Value, outputs: int, name: str, *, bias: bool = True) -> Value:
    """A linear whose weight and bias are called `name`.weight and `name`.bias."""
    assert x.shape is not None
    weight = b.random(outputs, int(x.shape[-1]), name=f"{name}.weight")  # type: ignore[arg-type]
    return b("linear", x, weight, b.random(outputs, name=f"{name}.bias") if bias else None)


def norm(b: Build, x: Value, name: str, op: str = "layer_norm") -> Value:
    """A norm with a gain of 8 and a bias of 40 on one channel each, as real ones have."""
    gain, bias = b.rng.normal(1.0, 0.2, WIDTH), b.rng.normal(0.0, 0.5, WIDTH)
    gain[3], bias[5] = 8.0, 40.0
    vectors = [b.constant(gain, name=f"{name}.gain"), b.constant(bias, name=f"{name}.bias")]
    return b(op, x, *vectors[: 2 if op == "layer_norm" else 1], eps=1e-5)


def heads(b: Build, x: Value, count: int = HEADS, size: int = SIZE) -> Value:
    """[batch, tokens, count * size] -> [batch, count, tokens, size]."""
    split = b("reshape", x, b.constant(np.array([0, -1, count, size]), name="heads"))
    return b("transpose", split, perm=(0, 2, 1, 3))


def merged(b: Build, x: Value, width: int = WIDTH) -> Value:
    """[batch, heads, tokens, size] -> [batch, tokens, width]."""
    turned = b("transpose", x, perm=(0, 2, 1, 3))
    return b("reshape", turned, b.constant(np.array([0, -1, width]), name="merge"))


def self_attention(b: Build, x: Value, *, bias: bool = True) -> Value:
    q, k, v = (heads(b, linear(b, x, WIDTH, letter, bias=bias)) for letter in "qkv")
    return linear(b, merged(b, b("attention", q, k, v)), WIDTH, "o", bias=bias)


def pre_norm(seed: int = 0, *, op: str = "layer_norm", bias: bool = True, activation: str = "gelu") -> Graph:
    """x + attention(norm x), then h + down(act(up(norm h))), between an input and an output linear."""
    b = Build(seed)
    x = linear(b, b.input("x", f"f32[batch, tokens, {WIDTH}]"), WIDTH, "first")
    h = b("add", x, self_attention(b, norm(b, x, "norm1", op), bias=bias))
    up = linear(b, norm(b, h, "norm2", op), HIDDEN, "up", bias=bias)
    h = b("add", h, linear(b, b(activation, up), WIDTH, "down", bias=bias))
    return b.output(linear(b, h, WIDTH, "last"))


def post_norm(seed: int = 0) -> Graph:
    """norm(x + attention(x)), then norm(h + down(gelu(up h))), between an input and an output linear."""
    b = Build(seed)
    x = norm(b, linear(b, b.input("x", f"f32[batch, tokens, {WIDTH}]"), WIDTH, "first"), "norm0")
    h = norm(b, b("add", x, self_attention(b, x)), "norm1")
    down = linear(b, b("gelu", linear(b, h, HIDDEN, "up")), WIDTH, "down")
    return b.output(linear(b, norm(b, b("add", down, h), "norm2"), WIDTH, "last"))


BLOCKS = {"pre-norm": pre_norm, "post-norm": post_norm}


def data(seed: int = 0, samples: int = 6, tokens: int = 5) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(2, tokens, WIDTH)).astype(np.float32)} for _ in range(samples)]


def statistics(graph: Graph, seed: int = 0) -> Stats:
    return collect(graph, data(seed))


def record(samples: Any, axis: int = -1) -> ChannelStats:
    """The statistics of these rows [N, C]."""
    rows = np.asarray(samples, np.float32)
    wide = rows.astype(np.float64)
    return ChannelStats(axis, wide.min(0), wide.max(0), (wide**2).mean(0), rows, len(rows))


def outliers(rng: np.random.Generator, rows: int = 256, channels: int = 64) -> np.ndarray:
    """Rows with two channels far to one side and one that is wide (methods/a.md, 1: the toy)."""
    x = rng.normal(size=(rows, channels))
    x[:, 3] += 40.0
    x[:, 17] -= 25.0
    x[:, 40] *= 15.0
    return x.astype(np.float32)


def names(values: Sequence[Value | None]) -> set[str]:
    return {v.name for v in values if v is not None}
