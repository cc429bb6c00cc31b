"""Contractions, norms and attention: values against torch, types with symbolic dims, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from helpers import check_text
from torch.nn import functional

from planish.ir.errors import InvalidModelError
from planish.ir.graph import Attribute, Graph, Node
from planish.ir.ops import get
from planish.ir.ops.base import Wide
from planish.ir.types import TensorType

Shapes = Sequence[tuple[int | str | None, ...] | None]


def node_of(name: str, shapes: Shapes, attributes: Mapping[str, Attribute] | None = None) -> Node:
    graph = Graph()
    values = [
        None if shape is None else graph.add_input(f"x{i}", TensorType("f32", shape)) for i, shape in enumerate(shapes)
    ]
    node = graph.append(get(name), values, attributes)
    graph.add_output("y", node.result)
    check_text(graph)
    return node


def computed(name: str, operands: Sequence[Any], **attributes: Attribute) -> torch.Tensor:
    """The value in float64; its shape must be the inferred one."""
    node = node_of(name, [None if t is None else tuple(t.shape) for t in operands], attributes)
    (y,) = node.op.evaluate(node, operands, Wide(torch.float64))
    assert node.result.shape == tuple(y.shape)
    return y  # type: ignore[no-any-return]


def drawn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def same(one: torch.Tensor, two: torch.Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_linear_and_gemm() -> None:
    x, w, b = drawn((2, 3, 4), (5, 4), (5,))
    same(computed("linear", [x, w, b]), functional.linear(x, w, b))
    same(computed("linear", [x, w.T.contiguous()], transposed=True), functional.linear(x, w))
    same(computed("gemm", [x[0].T, w, b], alpha=0.5, beta=2.0, trans_a=True, trans_b=True), x[0] @ w.T / 2 + 2 * b)


@pytest.mark.parametrize(
    ("size", "stride", "dilation", "auto_pad"),
    [(3, 1, 1, "same_upper"), (4, 2, 1, "same_lower"), (2, 1, 2, "same_upper"), (3, 1, 1, "valid")],
)
def test_conv_pads_by_itself(size: int, stride: int, dilation: int, auto_pad: str) -> None:
    x, w = drawn((1, 2, 7), (3, 2, size))
    y = computed("conv", [x, w], strides=(stride,), dilations=(dilation,), auto_pad=auto_pad)
    total = max(0, (-(-7 // stride) - 1) * stride + dilation * (size - 1) + 1 - 7)
    begin = 0 if auto_pad == "valid" else total // 2 if auto_pad == "same_upper" else total - total // 2
    total = 0 if auto_pad == "valid" else total
    same(y, functional.conv1d(functional.pad(x, (begin, total - begin)), w, None, stride, 0, dilation))


def test_conv_transpose() -> None:
    x, w, b = drawn((2, 4, 5, 3), (4, 3, 3, 2), (6,))
    y = computed("conv_transpose", [x, w, b], strides=(2, 1), pads=(1, 0, 1, 0), output_padding=(1, 0), groups=2)
    same(y, functional.conv_transpose2d(x, w, b, (2, 1), (1, 0), (1, 0), 2))


def test_norms() -> None:
    x, gain, bias, mean, variance = drawn((2, 4, 3, 5), (4,), (4,), (4,), (4,))
    last_gain, last_bias = drawn((5,), (5,))
    variance = variance.abs()
    same(
        computed("layer_norm", [x, last_gain, last_bias]),
        functional.layer_norm(x, (5,), last_gain, last_bias, 1e-5),
    )
    same(computed("rms_norm", [x, last_gain], eps=1e-6), functional.rms_norm(x, (5,), last_gain, 1e-6))
    same(
        computed("rms_norm", [x, last_gain], gain_offset=1.0),
        functional.rms_norm(x, (5,), last_gain + 1, 1e-5),
    )
    same(
        computed("batch_norm", [x, gain, bias, mean, variance]),
        functional.batch_norm(x, mean, variance, gain, bias),
    )
    same(computed("group_norm", [x, gain, bias], groups=2), functional.group_norm(x, 2, gain, bias))
    same(computed("instance_norm", [x, gain, bias]), functional.instance_norm(x, None, None, gain, bias))
    same(computed("log_softmax", [x], axis=1), functional.log_softmax(x, 1))


def test_statistics_of_half_precision_are_taken_in_float32() -> None:
    x = torch.full((1, 64), 300.0, dtype=torch.float16)
    x[0, 0] = -300.0
    node = node_of("rms_norm", [(1, 64)])
    (y,) = node.op.evaluate(node, [x], Wide())
    assert y.dtype is torch.float16
    assert torch.isfinite(y).all()
    assert (y.abs() == 1).all()


@pytest.mark.parametrize("causal", [False, True])
def test_attention_shares_key_heads(causal: bool) -> None:
    q, k, v = drawn((2, 4, 3, 8), (2, 2, 3, 8), (2, 2, 3, 5))
    y = computed("attention", [q, k, v], causal=causal)
    same(y, functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True))


def test_attention_with_a_cap_and_sinks() -> None:
    q, k, v, mask, sinks = drawn((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6), (3, 5), (4,))
    wide_k, wide_v = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = 2.0 * torch.tanh(q @ wide_k.mT * 0.5 / 2.0) + mask
    same(computed("attention", [q, k, v, mask], scale=0.5, softcap=2.0), scores.softmax(-1) @ wide_v)
    weights = scores.exp() / (scores.exp().sum(-1, keepdim=True) + sinks.exp().reshape(4, 1, 1))
    same(computed("attention", [q, k, v, mask, sinks], scale=0.5, softcap=2.0), weights @ wide_v)


def test_rope() -> None:
    x, cos, sin = drawn((2, 3, 4), (3, 4), (3, 4))
    left, right = x.chunk(2, -1)
    same(computed("rope", [x, cos, sin]), x * cos + torch.cat((-right, left), -1) * sin)
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).reshape(x.shape)
    same(computed("rope", [x, cos, sin], interleaved=True), x * cos + turned * sin)


@pytest.mark.parametrize(
    ("name", "shapes", "attributes", "expected"),
    [
        ("matmul", [("b", "h", "t", 4), (4, 5)], {}, ("b", "h", "t", 5)),
        ("matmul", [("b", 1, "t", 4), (3, 4, "s")], {}, ("b", 3, "t", "s")),
        ("matmul", [("b", "t", None), ("c", None, 5)], {}, (None, "t", 5)),
        ("linear", [("b", "t", 4), (5, 4)], {}, ("b", "t", 5)),
        ("linear", [("b", "t", 4), (None, None)], {}, ("b", "t", None)),
        ("gemm", [(4, "n"), (5, 4)], {"trans_a": True, "trans_b": True}, ("n", 5)),
        ("conv", [("b", 3, "l"), (4, 3, 3)], {"pads": (1, 1)}, ("b", 4, "l")),
        ("conv", [("b", 3, "l"), (4, 3, 3)], {}, ("b", 4, None)),
        ("conv_transpose", [("b", 3, "l"), (3, 4, 3)], {"groups": 1}, ("b", 4, None)),
        ("layer_norm", [("b", "t", 4)], {}, ("b", "t", 4)),
        ("attention", [("b", 4, "t", 8), ("b", 2, "s", 8), ("b", 2, "s", 5)], {}, ("b", 4, "t", 5)),
        ("rope", [("b", "t", 4), ("t", 4), ("t", 4)], {}, ("b", "t", 4)),
    ],
)
def test_types_keep_symbolic_dims(
    name: str, shapes: Shapes, attributes: Mapping[str, Attribute], expected: tuple[int | str | None, ...]
) -> None:
    assert node_of(name, shapes, attributes).result.shape == expected


@pytest.mark.parametrize(
    ("name", "shapes", "text"),
    [
        ("matmul", [(2, 3), (4, 5)], "matmul: the contracted dims differ: 3 and 4"),
        ("matmul", [(), (4, 5)], "matmul: an operand is a scalar"),
        ("linear", [(2, 3), (4, 5)], "linear: the contracted dims differ: 3 and 5"),
        ("linear", [(2, 3), (3,)], "linear: expected x of rank 1 or more and a weight of rank 2"),
        ("gemm", [(2, 3, 4), (4, 5)], "gemm: expected two matrices"),
        ("conv", [(2, 3, 4), (5, 2, 3)], "conv: the contracted dims differ: 3 and 2"),
        ("conv", [(2, 3), (5, 3)], "conv: expected x and a weight of one rank, 3 or more"),
        ("layer_norm", [()], "layer_norm: expected a tensor of rank 1 or more"),
        ("instance_norm", [(4,), (4,), (4,)], "instance_norm: expected a tensor of rank 2 or more"),
        ("attention", [(2, 3, 4)] * 3, "attention: expected q, k, v of rank 4"),
        (
            "attention",
            [(1, 3, 4, 5), (1, 2, 4, 5), (1, 2, 4, 5)],
            "attention: 3 query heads cannot share 2 key heads",
        ),
        (
            "attention",
            [(2, 4, 3, 8), (2, 2, 3, 8), (2, 2, 3, 8), None, (3,)],
            "attention: expected a sink for each of 4 heads",
        ),
        ("rope", [(2, 3), (3,), (3,)], "rope: expected an even number of channels"),
    ],
)
def test_impossible_operands(name: str, shapes: Shapes, text: str) -> None:
    with pytest.raises(InvalidModelError) as caught:
        node_of(name, shapes)
    assert caught.value.what == text
    assert caught.value.where
