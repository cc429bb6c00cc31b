"""Quantised graphs whose kernels are emitted: an encoder layer as small sentence encoders have it, a decoder block."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np
from patterns import Build

from planish.calibrate.collect import collect
from planish.codegen.regions import Plan
from planish.codegen.select import select
from planish.integrate.api import capture
from planish.ir.graph import Graph, Value
from planish.passes.manager import Pipeline

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import blocks

WIDTH, HEADS, HIDDEN = 384, 12, 1536
DECODER = 256
EPS = float(np.float32(1e-12))

# name -> pipeline; groups of 128 columns where they divide the rows, else of 32
RECIPES = {
    "w8a8": "raise,quantize{weights=int8:channel activations=int8:token}",
    "w4a16": "raise,quantize{weights=uint4:g%d}",
    "w4a8": "raise,quantize{weights=uint4:g%d activations=int8:token}",
    "w4a4-rank32": (
        "raise,insert-hadamard{sites=all block=128},"
        "extract-low-rank{rank=32 weights=int4:g64 activations=int4:g64 smooth=false},"
        "quantize{weights=int4:g64 activations=int4:g64}"
    ),
    "split-int2": "raise,split-layers{clusters=2 form=packed},quantize{weights=uint2:g64:f16:split2}",
    "llm-int8": (
        "raise,extract-outliers{mode=static threshold=6.0},quantize{weights=int8:channel activations=int8:token}"
    ),
}


def encoder(seed: int = 0, *, width: int = WIDTH, heads: int = HEADS, hidden: int = HIDDEN) -> Graph:
    """A norm, attention, norm, gelu MLP, norm: x f32[batch, tokens, width] stands for the embeddings.

    Four channels of each norm are loud on one side.
    """
    b = Build(seed)
    size = width // heads

    def linear(x: Value, inputs: int, outputs: int, name: str) -> Value:
        weight = b.rng.normal(size=(outputs, inputs)) / inputs**0.5
        return b(
            "linear",
            x,
            b.constant(weight, name=f"{name}.weight"),
            b.constant(b.rng.normal(size=outputs), name=f"{name}.bias"),
        )

    def norm(x: Value, name: str) -> Value:
        gain, bias = b.rng.normal(1.0, 0.1, width), b.rng.normal(0.0, 0.1, width)
        bias[[3, 50, 77, 101]] = 12.0
        return b(
            "layer_norm", x, b.constant(gain, name=f"{name}.weight"), b.constant(bias, name=f"{name}.bias"), eps=EPS
        )

    def split(x: Value) -> Value:
        shape = b.constant(np.array([0, 0, heads, size]), name="heads")
        return b("transpose", b("reshape", x, shape), perm=(0, 2, 1, 3))

    h = norm(b.input("x", f"f32[batch, tokens, {width}]"), "norm0")
    q, k, v = (split(linear(h, width, width, letter)) for letter in "qkv")
    mixed = b("transpose", b("attention", q, k, v), perm=(0, 2, 1, 3))
    merged = b("reshape", mixed, b.constant(np.array([0, 0, width]), name="merge"))
    h = norm(b("add", linear(merged, width, width, "o"), h), "norm1")
    down = linear(b("gelu", linear(h, width, hidden, "up")), hidden, width, "down")
    return b.output(norm(b("add", down, h), "norm2"))


def encoder_inputs(seed: int, batch: int = 2, tokens: int = 16, width: int = WIDTH) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(batch, tokens, width)).astype(np.float32)}


def decoder_inputs(seed: int, batch: int = 1, tokens: int = 16) -> dict[str, np.ndarray]:
    return {"ids": np.random.default_rng(seed).integers(0, blocks.VOCABULARY, (batch, tokens))}


def quantised(graph: Graph, recipe: str, batches: list[dict[str, np.ndarray]], group: int) -> Graph:
    """The graph by one of RECIPES."""
    text = RECIPES[recipe]
    passes = Pipeline(text % group if "%d" in text else text)
    stats = collect(graph, batches) if any(p.needs_stats for p in passes.passes) else None
    return passes.run(graph, stats=stats, data=batches, validate=False)[0]


@cache
def real_encoder() -> Graph:
    """MiniLM, as its ONNX file has it: what `encoder` is a layer of. For slow tests."""
    import assets

    return capture(assets.minilm_onnx())


def real_inputs(seed: int, batch: int = 2, tokens: int = 12) -> dict[str, np.ndarray]:
    """Random tokens; the last row is three shorter than the rest."""
    mask = np.ones((batch, tokens), np.int64)
    mask[-1, -3:] = 0
    ids = np.random.default_rng(seed).integers(1000, 30000, (batch, tokens))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


@cache
def graph_of(model: str, recipe: str) -> Graph:
    """A quantised model, "encoder" or "decoder", made once."""
    if model == "encoder":
        return quantised(encoder(), recipe, [encoder_inputs(i) for i in range(2)], 128)
    graph = blocks.decoder(DECODER, 1, tokens=16)
    return quantised(graph, recipe, [decoder_inputs(i, 2) for i in range(2)], 32)


@cache
def plan_of(model: str, recipe: str) -> Plan:
    """Its regions."""
    return select(graph_of(model, recipe))
