"""Capture of torch models: the same function, parameters by their paths, and what is refused."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import check_text
from torch import nn
from torch.export import Dim

import planish
from planish.capture.from_fx import arguments, from_module, from_program
from planish.capture.fx_signature import leaf_paths, module_path
from planish.codegen.onnx import to_model
from planish.ir.errors import PlanishError
from planish.ir.evaluator import Evaluator, evaluate
from planish.ir.graph import Graph
from planish.ir.types import TensorType
from planish.ir.verifier import verify

Inputs = Any


class Of(nn.Module):
    """A module of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *xs: torch.Tensor) -> Any:
        return self.function(*xs)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def integers(high: int, *shape: int, low: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(high))


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with drawn parameters and running statistics, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)
    return module.eval()


def leaves(outputs: Any) -> list[torch.Tensor]:
    found = torch.utils._pytree.tree_leaves(outputs)
    return [leaf for leaf in found if isinstance(leaf, torch.Tensor)]


def feed(graph: Graph, inputs: Inputs) -> dict[str, torch.Tensor]:
    args, kwargs = arguments(inputs)
    given = [v.name for v in graph.inputs if v.constant is None]
    named = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
    rest = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    return {**dict(zip([n for n in given if n not in named], rest, strict=True)), **named}


def check(module: nn.Module, inputs: Inputs, *, tolerance: float = 2e-6, opaque: int = 0, **options: Any) -> Graph:
    """Captured, and evaluated alike: in float32 and in float64."""
    graph = from_module(module, inputs, **options)
    verify(graph)
    check_text(graph)
    found = [n.op.name for n in graph.nodes if n.op.opaque]
    assert len(found) == opaque, found
    same_outputs(graph, module, inputs, tolerance)
    return graph


def same_outputs(graph: Graph, module: nn.Module, inputs: Inputs, tolerance: float = 2e-6) -> None:
    args, kwargs = arguments(inputs)
    with torch.no_grad():
        expected = leaves(module(*args, **kwargs))
    given = feed(graph, inputs)
    outputs = evaluate(graph, given)
    wide = Evaluator(graph, torch.float64)
    wider = wide.run(given)
    assert not wide.narrowed
    names = [name for name, _ in graph.outputs][: len(expected)]
    for name, want in zip(names, expected, strict=True):
        got = outputs[name]
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        if want.is_floating_point():
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
            torch.testing.assert_close(wider[name].to(want.dtype), want, rtol=1e-4, atol=1e-4, equal_nan=True)
        else:
            assert torch.equal(got, want)


# -- the table of ATen ops -----------------------------------------------------------------------------

X, Y, Z = rand(2, 3, 4), rand(2, 3, 4, seed=1), rand(3, 1, seed=2)
POSITIVE = X.abs() + 0.5
INTS, MASK = integers(5, 2, 3, low=-5), X > 0
IDS = torch.tensor([[2, 0, 1], [1, 1, 2]])
IMAGE = rand(2, 4, 8, 9)

CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "arithmetic": (lambda x, y, z: x * y - 2 * z + x / z, (X, Y, Z)),
    "scalars": (lambda x: 0.1 - x + 3 * x / 7 - 1.0, (X,)),
    "alpha": (lambda x, y: torch.add(x, y, alpha=2) - torch.sub(x, y, alpha=0.5), (X, Y)),
    "promotion": (lambda x, i: (x * i, i / 2, i * 2.5, i + True, x + i), (rand(2, 3), INTS)),
    "zero-dim": (lambda x: x * torch.tensor(2.0, dtype=torch.float64), (X,)),
    "division": (lambda i: (i // 2, i % 3, torch.div(i, 2, rounding_mode="trunc"), torch.fmod(i, 3)), (INTS,)),
    "remainder": (lambda x, y: (torch.remainder(x, 0.7), torch.fmod(x, y)), (X, Y)),
    "powers": (lambda x: (x**2, x**-0.5, 2**x, x.sqrt(), x.rsqrt(), x.square(), x.reciprocal()), (POSITIVE,)),
    "functions": (lambda x: (x.exp(), x.sin(), x.cos(), x.tanh(), x.erf(), x.abs(), x.neg(), x.sign()), (X,)),
    "rounding": (lambda x: (x.floor(), x.ceil(), x.round()), (X * 3,)),
    "activations": (lambda x: (F.relu(x), F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x), F.elu(x)), (X,)),
    "more-activations": (
        lambda x: (
            F.hardswish(x),
            F.hardsigmoid(x),
            F.hardtanh(x),
            F.relu6(x),
            F.mish(x),
            F.glu(x),
            F.leaky_relu(x, 0.2),
        ),
        (X,),
    ),
    "softplus": (lambda x: (F.softplus(x), F.softplus(x, beta=2.0), F.logsigmoid(x)), (X,)),
    "extremes": (lambda x, y: (torch.maximum(x, y), torch.minimum(x, y), x.clamp(-0.5, 0.5), x.clamp(min=y)), (X, Y)),
    "int-clamp": (lambda i: (i.clamp(min=-1), i.clamp(max=1.5)), (INTS,)),
    "comparisons": (lambda x, y: (x == y, x != y, x < 0, x <= y, x > 0, x >= y), (X, Y)),
    "mixed-comparison": (lambda i: (i < 0.5, i == 1, i > -2), (INTS,)),
    "logic": (lambda m, n: (m & n, m | n, m ^ n, ~m, m.logical_not(), m == n, m != n), (MASK, Y > 0)),
    "choices": (lambda m, x: (torch.where(m, x, 0.0), x.masked_fill(m, -torch.inf), torch.where(m, 1, x)), (MASK, X)),
    "addcmul": (lambda x, y: (torch.addcmul(x, y, y, value=0.5), torch.addcdiv(x, y, y + 3)), (X, Y)),
    "casts": (
        lambda x, i: (x.to(torch.float64), i.float(), x.double().float(), x.to(torch.int64), i.bool()),
        (X, INTS),
    ),
    "sums": (lambda x: (x.sum(), x.sum(1), x.mean((0, 2), keepdim=True), x.mean(), x.prod(1), (x > 0).sum(-1)), (X,)),
    "reduced": (lambda x: (x.amax(1), x.amin((0, 1)), x.max(), x.max(dim=1).values, x.norm(dim=-1)), (X,)),
    "truth": (lambda m: (m.any(), m.all(1), m.any(-1, keepdim=True)), (MASK,)),
    "softmax": (lambda x: (x.softmax(1), x.log_softmax(-1), F.softmax(x, -1, dtype=torch.float64)), (X,)),
    "views": (lambda x: (x.view(6, -1), x.flatten(1), x.unflatten(2, (2, 2)), x.reshape(4, 6), x.unsqueeze(1)), (X,)),
    "axes": (lambda x: (x.transpose(0, 2), x.permute(2, 0, 1), x.mT, x.movedim(0, -1), x.swapaxes(-1, 1)), (X,)),
    "squeeze": (lambda z: (z.squeeze(), z.squeeze(0), z[None].squeeze((0, 2)), z.t()), (Z,)),
    "expand": (lambda z: (z.expand(2, 3, 4), z.expand(-1, 4), z.expand_as(torch.zeros(3, 5))), (Z,)),
    "slices": (lambda x: (x[:, 1:], x[..., ::2], x[0], x[:, -1], x[:, :-1], x.narrow(2, 1, 2), x[-1, ..., 1]), (X,)),
    "cuts": (lambda x: (*x.split(2, 2), *x.chunk(2, 1), *x.unbind(1), *x.split([1, 3], 2)), (X,)),
    "joins": (lambda x, y: (torch.cat((x, y), -1), torch.stack((x, y), 1), torch.cat((x, y.double()))), (X, Y)),
    "repeats": (lambda x: (x.repeat(1, 2, 1), x.repeat(2, 1, 1, 1), x.repeat_interleave(3, 1)), (X,)),
    "roll": (lambda x: (x.roll(1, 1), x.roll((1, -2), (1, 2)), x.flip(1), x.flip((0, 2))), (X,)),
    "pad": (
        lambda x: (
            F.pad(x, (1, 2)),
            F.pad(x, (0, 1, 2, 0), value=1.5),
            F.pad(x, (1, 1), mode="reflect"),
            F.pad(x, (-1, 0)),
        ),
        (X,),
    ),
    "replicate": (
        lambda x: (F.pad(x, (1, 2, 0, 1), mode="replicate"), F.pad(x, (1, 1, 2, 2), mode="circular")),
        (IMAGE,),
    ),
    "triangles": (lambda x: (x.tril(), x.triu(1), x.tril(-1)), (X,)),
    "shuffles": (
        lambda x: (F.pixel_shuffle(x, 2), F.channel_shuffle(x, 2), F.pixel_unshuffle(x[..., :8], 2)),
        (IMAGE,),
    ),
    "factories": (
        lambda x: (
            x.new_ones(2, 3),
            torch.zeros_like(x),
            torch.full((2,), 3.5),
            torch.ones(2, dtype=torch.int64),
            x.new_zeros(()),
        ),
        (X,),
    ),
    "ranges": (lambda x: (torch.arange(5), torch.arange(1, 9, 2), torch.arange(3.0), x + torch.arange(4)), (X,)),
    "meshgrid": (
        lambda x, y: torch.meshgrid(x, y, indexing="ij") + torch.meshgrid(x, y, indexing="xy"),
        (X[0, 0], Y[0, :, 0]),
    ),
    "lookups": (lambda t, i: (F.embedding(i, t), t[i], t.index_select(0, i[0]), t[:, i[0]]), (rand(3, 4), IDS)),
    "several-indices": (lambda x, i: (x[i, i], x[:, i[0], i[1]], x[i[:, :1], i[:1]]), (rand(3, 3, 4), IDS)),
    "gather": (lambda x, i: (x.gather(1, i), x.gather(0, i % 2), x.gather(1, i[:, :2])), (rand(2, 3), IDS)),
    "scatter": (
        lambda x, i: (x.scatter(1, i % 2 + torch.arange(3) % 2, 0.5), x.scatter(0, i[:1] % 2, x[:1])),
        (rand(2, 4)[:, :3], IDS),
    ),
    "index-add": (lambda x, i: (x.index_add(0, i[1], x), x.index_add(1, i[0], x[:, :3], alpha=2)), (rand(3, 4), IDS)),
    "index-put": (
        lambda x, i: (_put(x[0, 0], i[0]), x.index_put((i[0],), x[:1], accumulate=True)),
        (rand(3, 3, 4), IDS),
    ),
    "ordered": (lambda x: (*x.topk(2), *x.topk(1, dim=1, largest=False), x.cumsum(1), (x > 0).cumsum(-1)), (X,)),
    "one-hot": (lambda i: (F.one_hot(i, 4), i.diff(), i.diff(prepend=i[:, :1])), (IDS,)),
    "written": (lambda x: _written(x), (X,)),
    "products": (lambda x, y: (x @ y.mT, torch.bmm(x, y.mT), x[0] @ y[0].T, x @ y[0, 0]), (X, Y)),
    "addmm": (
        lambda x, y, b: (torch.addmm(b, x, y), torch.addmm(b, x, y, beta=0.5, alpha=2)),
        (rand(2, 3), rand(3, 4), rand(4)),
    ),
    "baddbmm": (lambda x, y, b: (torch.baddbmm(b, x, y, beta=0, alpha=0.3), b.baddbmm(x, y)), (X, Y.mT, rand(2, 3, 3))),
    "einsum": (
        lambda x, y: (
            torch.einsum("bij,bkj->bik", x, y),
            torch.einsum("...ij,...jk", x, y.mT),
            torch.einsum("bij,j->bi", x, y[0, 0]),
            torch.einsum("bij,bij->b", x, y),
            torch.einsum("i,j->ij", x[0, 0], y[0, 0]),
            torch.einsum("bij,bkj,bk->i", x, y, y[..., 0]),
        ),
        (X, Y),
    ),
    "conv1d": (
        lambda x, w, b: (F.conv1d(x, w, b, 2, 1), F.conv1d(x, w, padding="same", dilation=3)),
        (rand(2, 4, 9), rand(6, 4, 3), rand(6)),
    ),
    "same-even": (lambda x, w: F.conv2d(x, w, padding="same"), (IMAGE, rand(3, 4, 2, 4))),
    "conv2d": (
        lambda x, w: (F.conv2d(x, w, stride=(1, 2), padding=(0, 1), dilation=2), F.conv2d(x[0], w)),
        (IMAGE, rand(6, 4, 3, 2)),
    ),
    "grouped": (lambda x, w: F.conv2d(x, w, groups=4, padding=1), (IMAGE, rand(8, 1, 3, 3))),
    "transposed": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1, groups=2),
        (IMAGE, rand(4, 3, 3, 3)),
    ),
    "conv3d": (lambda x, w: F.conv3d(x, w, stride=2), (rand(1, 2, 4, 5, 6), rand(3, 2, 2, 2, 2))),
    "pools": (
        lambda x: (
            F.max_pool2d(x, 3, 2, 1),
            F.avg_pool2d(x, 2),
            F.avg_pool2d(x, 3, 2, 1),
            F.max_pool2d(x, 2, ceil_mode=True),
        ),
        (IMAGE,),
    ),
    "more-pools": (
        lambda x: (
            F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
            F.avg_pool2d(x, 2, ceil_mode=True),
            F.max_pool1d(x[0], 2),
        ),
        (IMAGE,),
    ),
    "adaptive": (
        lambda x: (F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, (4, 3)), F.adaptive_max_pool2d(x, 1)),
        (IMAGE,),
    ),
    "resized": (
        lambda x: (
            F.interpolate(x, scale_factor=2.0),
            F.interpolate(x, size=(5, 6), mode="bilinear"),
            F.interpolate(x, size=(5, 6), mode="bilinear", align_corners=True),
            F.interpolate(x, scale_factor=1.5, mode="bicubic"),
            F.interpolate(x, size=(5, 6), mode="nearest-exact"),
        ),
        (IMAGE,),
    ),
    "norms": (
        lambda x, g: (
            F.layer_norm(x, (4,), g, g),
            F.layer_norm(x, (3, 4)),
            F.rms_norm(x, (4,), g, 1e-5),
            F.rms_norm(x, (4,)),
        ),
        (X, rand(4)),
    ),
    "group-norms": (lambda x, g: (F.group_norm(x, 2, g, g), F.instance_norm(x), F.group_norm(x, 4)), (IMAGE, rand(4))),
    "attention": (
        lambda q, k, m: (
            F.scaled_dot_product_attention(q, k, k),
            F.scaled_dot_product_attention(q, k, k, m, scale=0.3),
            F.scaled_dot_product_attention(q, k, k, m > 0),
            F.scaled_dot_product_attention(q, q, q, is_causal=True),
            F.scaled_dot_product_attention(q[0], k[0], k[0]),
        ),
        (rand(2, 3, 4, 5), rand(2, 3, 6, 5), rand(4, 6)),
    ),
    "shared-heads": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        (rand(2, 4, 3, 5), rand(2, 2, 6, 5)),
    ),
}


def _written(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In-place writes through views."""
    x = x.clone()
    x[:, 1:] = 2.0
    x[0, 0] += x[1, 0]
    x.mul_(0.5).add_(1)
    y = x.view(-1)
    y[3] = -1.0
    return x, y


def _put(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[i] = torch.arange(3.0)
    return x


@pytest.mark.parametrize("name", sorted(CASES))
def test_ops(name: str) -> None:
    function, inputs = CASES[name]
    check(Of(function), inputs)


OPAQUE: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], int]] = {
    "elementwise": (lambda x: (torch.expm1(x), torch.atan2(x, x + 1)), (X,), 2),
    "several-results": (lambda x: torch.sort(x, dim=1), (X,), 1),
    "one-of-several": (lambda x: torch.sort(x, dim=1)[1], (X,), 1),
    "list-with-none": (lambda x, m: x[:, m], (X, torch.tensor([True, False, True])), 1),
    "dtype": (lambda x: torch.logspace(0, 1, 4, dtype=torch.float32) * x, (X,), 1),
    "list": (lambda x, y: torch.block_diag(x[0], y[0]), (X, Y), 1),
    "complex": (lambda x: torch.view_as_real(torch.fft.fft(x)), (X,), 2),
    "diagonal": (lambda x: torch.einsum("ii->i", x), (rand(3, 3),), 1),
}


@pytest.mark.parametrize("name", sorted(OPAQUE))
def test_opaque_ops_run(name: str) -> None:
    """An op without a row is called as it was, in float64 too, whatever its arguments."""
    function, inputs, count = OPAQUE[name]
    graph = from_module(Of(function), inputs)
    check_text(graph)
    assert sum(n.op.opaque for n in graph.nodes) >= count
    same_outputs(graph, Of(function), inputs)


def test_an_opaque_op_follows_the_dtype_of_the_evaluation() -> None:
    graph = from_module(Of(lambda x: torch.logspace(0, 1, 4, dtype=torch.float32) + x), X)
    (node,) = [n for n in graph.nodes if n.op.opaque]
    assert node.attributes["dtype"] == "f32"
    (output,) = evaluate(graph, feed(graph, X), torch.float64).values()
    expected = torch.logspace(0, 1, 4, dtype=torch.float64) + X.double()
    torch.testing.assert_close(output, expected, rtol=1e-14, atol=1e-14)


def test_an_op_of_some_dtypes_only_is_run_in_them() -> None:
    """Nothing is lost but precision, and the evaluation says so."""
    function = Of(lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127).float())
    graph = from_module(function, X)
    same = evaluate(graph, feed(graph, X))["output_0"]
    assert torch.equal(same, function(X))


def test_slots_say_where_operands_go() -> None:
    graph = from_module(Of(lambda x, m: x[:, m]), (X, torch.tensor([True, False, True])))
    (node,) = [n for n in graph.nodes if n.op.opaque]
    assert node.attributes["slots"] == ("self", "indices.1")
    assert node.attributes["indices"] == (None, None)


# -- rows that capture brought along ---------------------------------------------------------------------


def test_grouped_products() -> None:
    """Rows sorted by expert, with offsets: each group meets its own weight."""
    import transformers.integrations.moe  # noqa: F401  registers the op

    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, w, offsets)

    x, w = rand(6, 16), rand(3, 16, 8)
    graph = check(Of(function), (x, w))
    assert [n.op.name for n in graph.nodes if n.op.name == "grouped_matmul"]
    want = torch.cat([x[:2] @ w[0], x[2:6] @ w[2]])
    torch.testing.assert_close(evaluate(graph, feed(graph, (x, w)))["output_0"], want)


ONNX = [
    "lookups",
    "several-indices",
    "gather",
    "scatter",
    "index-add",
    "ordered",
    "one-hot",
    "resized",
    "einsum",
    "pools",
]


@pytest.mark.parametrize("name", ONNX)
def test_onnx(name: str) -> None:
    """What was captured can be written as ONNX, and ONNX Runtime computes the same."""
    function, inputs = CASES[name]
    graph = from_module(Of(function), inputs)
    onnx_agrees(graph, feed(graph, inputs))


def onnx_agrees(graph: Graph, given: dict[str, torch.Tensor]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(to_model(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = session.run([n for n, _ in graph.outputs], {k: v.numpy() for k, v in given.items()})
    for (name, want), got in zip(evaluate(graph, given).items(), outputs, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_grouped_products_as_onnx() -> None:
    import transformers.integrations.moe  # noqa: F401  registers the op

    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    inputs = rand(6, 16), rand(3, 16, 8)
    graph = from_module(Of(lambda x, w: torch.ops.transformers.grouped_mm_fallback(x, w, offsets)), inputs)
    onnx_agrees(graph, feed(graph, inputs))


PLACES: dict[str, tuple[Callable[..., Any], torch.dtype]] = {
    "argmax": (lambda x: (x.argmax(1), x.argmax(-1, keepdim=True), x.argmax()), torch.float32),
    "argmin": (lambda x: (x.argmin(0), x.argmin()), torch.float16),
    "max": (lambda x: (*x.max(1), *x.max(-1, keepdim=True)), torch.float32),
    "min": (lambda x: (*x.min(1), *x.min(-1, keepdim=True)), torch.bfloat16),
    "max of bool": (lambda x: x.max(1), torch.bool),
    "topk": (lambda x: x.topk(2, -1), torch.bfloat16),
}


@pytest.mark.parametrize("name", list(PLACES))
def test_places_as_onnx(name: str) -> None:
    function, dtype = PLACES[name]
    x = torch.randperm(24, generator=torch.Generator().manual_seed(0)).reshape(2, 3, 4)
    x = x > 12 if dtype is torch.bool else x.to(dtype)

    def whole(x: torch.Tensor) -> Any:  # numpy has no bfloat16
        made = function(x.to(dtype))
        made = made if isinstance(made, tuple) else (made,)
        return tuple(one.float() if one.is_floating_point() else one for one in made)

    given = x if dtype is torch.bool else x.float()
    graph = from_module(Of(whole), given)
    onnx_agrees(graph, feed(graph, given))


def test_an_op_of_torch_without_an_onnx_form() -> None:
    graph = from_module(Of(lambda x: x.argmax(keepdim=True)), X)
    with pytest.raises(PlanishError, match="dims kept over the whole tensor are not possible"):
        to_model(graph)
    graph = from_module(Of(lambda x: torch.fft.fft(x).real), X)
    with pytest.raises(PlanishError, match=r"op 'torch::aten\..*': has no ONNX form"):
        to_model(graph)


def test_attention_layers_as_onnx() -> None:
    """ONNX Runtime refuses the file where the axes of a squeeze are called as it calls its own."""
    layer = filled(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    graph = from_module(layer, rand(2, 3, 8))
    onnx_agrees(graph, feed(graph, rand(2, 3, 8)))
    names = [weight.name for weight in to_model(graph).graph.initializer]
    assert not [name for name in names if name.endswith(("_axes", "_sizes"))]


# -- modules ---------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.layers[1].weight = self.layers[0].weight
        self.register_buffer("shift", torch.ones(4))
        self.register_buffer("table", torch.ones(4), persistent=False)
        self.plain = torch.full((4,), 0.5)
        self.drop = nn.Dropout(0.5)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, gain: torch.Tensor | None = None, deep: bool = True) -> dict[str, Any]:
        for layer in self.layers:
            x = self.drop(torch.relu(layer(x)))
        x = x + self.shift * self.table - self.plain
        return {"y": x if gain is None else x * gain, "rest": (x.sum(), None, 3, deep)}


def test_names_and_ties() -> None:
    module = filled(Mlp())
    inputs = ((rand(2, 4),), {"gain": rand(4), "deep": False})
    graph = check(module, inputs)
    assert [v.name for v in graph.inputs] == ["x", "gain"]
    assert [n for n, _ in graph.outputs] == ["y", "rest.0"]
    names = {v.name for v in graph.constants}
    assert {"layers.0.weight", "layers.0.bias", "layers.1.bias", "shift", "table"} <= names
    assert not {"layers.1.weight", "unused.weight"} & names  # tied; not read
    linears = [n for n in graph.nodes if n.op.name == "linear"]
    assert linears[0].operands[1] is linears[1].operands[1]
    assert [n.source for n in linears] == ["layers.0", "layers.1"]
    meta = graph.meta
    assert meta["front_end"] == "torch"
    assert meta["torch.inputs"] == (("input", "x"), ("input", "gain"), ("constant", False))
    assert meta["torch.outputs"] == (
        ("output", "y"),
        ("output", "rest.0"),
        ("constant", None),
        ("constant", 3),
        ("constant", False),
    )
    assert meta["torch.buffers"] == ("shift",)
    assert "table" in meta["torch.unsaved"]
    assert meta["torch.tied"] == (("layers.1.weight", "layers.0.weight"),)


def test_the_mode_of_a_module_is_put_back() -> None:
    module = Mlp().train()
    module.layers[1].eval()
    graph = from_module(module, rand(2, 4))
    assert module.training
    assert module.drop.training
    assert not module.layers[1].training
    assert not [n for n in graph.nodes if "dropout" in n.op.name]


def test_float64_modules_are_exact() -> None:
    module = filled(Mlp()).double()
    inputs = rand(3, 4).double()
    graph = from_module(module, inputs)
    with torch.no_grad():
        want = module(inputs)["y"]
    assert (evaluate(graph, {"x": inputs})["y"] - want).abs().max() <= 1e-12


def test_a_scalar_keeps_its_bits() -> None:
    graph = from_module(Of(lambda x: x * 0.1), X)
    (node,) = graph.nodes
    constant = node.operands[1].constant  # type: ignore[union-attr]
    assert constant is not None
    assert constant.dtype == "f32"
    assert constant.wide() == 0.1


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(2))
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(x.sum(0))
        self.scale.div_(1.0)  # changes nothing
        x.mul_(2)
        return x * self.count * self.scale


def test_mutation() -> None:
    """A buffer that is written to is an input with a default, and an output more."""
    module = Counting().requires_grad_(False)
    graph = from_module(module, torch.ones(3, 2))
    verify(graph)
    check_text(graph)
    assert [n for n, _ in graph.outputs] == ["output_0", "count.updated", "x.updated"]
    assert graph.meta["torch.mutations"] == (("count", "count.updated"), ("x", "x.updated"))
    assert torch.equal(module.count, torch.zeros(2))
    first = evaluate(graph, {"x": torch.ones(3, 2)})
    assert first["count.updated"].tolist() == [3, 3]
    again = evaluate(graph, {"x": torch.ones(3, 2), "count": first["count.updated"]})
    assert again["count.updated"].tolist() == [6, 6]
    assert again["output_0"].tolist() == [[12, 12]] * 3
    assert graph.values["scale"].is_constant


def test_convolutional_net() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same", bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=8, stride=2, padding=1), nn.GroupNorm(2, 8), nn.PReLU(8), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    graph = check(filled(net), rand(2, 3, 12, 12))
    assert [n.op.name for n in graph.nodes][:3] == ["conv", "batch_norm", "relu"]


def decoder(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, **options,
    )  # fmt: skip
    return filled(LlamaForCausalLM(config))


def test_decoder() -> None:
    inputs = {"input_ids": integers(64, 2, 7), "use_cache": False}
    graph = check(decoder(tie_word_embeddings=True), inputs, tolerance=2e-5)
    assert [v.name for v in graph.inputs] == ["input_ids"]
    assert [n for n, _ in graph.outputs] == ["logits"]
    assert "model.layers.1.mlp.down_proj.weight" in graph.values
    assert "lm_head.weight" not in graph.values  # tied to the embedding
    assert "model.layers.0.self_attn.q_proj" in {n.source for n in graph.nodes}


def test_decoder_with_dynamic_shapes() -> None:
    batch, length = Dim("batch"), Dim("length", max=60)
    shapes = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}, "use_cache": None}
    ids = integers(64, 2, 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    module = decoder()
    graph = check(module, inputs, tolerance=2e-5, dynamic_shapes=shapes)
    assert graph.inputs[0].type == TensorType("i64", ("batch", "length"))
    assert graph.outputs[0][1].type == TensorType("f32", ("batch", "length", 64))
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[0, 8:] = 0
    same_outputs(graph, module, {"input_ids": integers(63, 3, 11), "attention_mask": mask, "use_cache": False}, 2e-5)


def test_experts() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0,
    )  # fmt: skip
    inputs = {"input_ids": integers(64, 2, 7), "use_cache": False}
    names = [n.op.name for n in from_module(MixtralForCausalLM(config), inputs).nodes]
    assert {"grouped_matmul", "topk"} <= set(names)
    assert not [n for n in names if "::" in n and "sort" not in n and "histc" not in n]


# -- dynamic shapes -----------------------------------------------------------------------------------


def test_sizes_follow_the_inputs() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        n, c, h, w = x.shape
        half = h // 2
        y = x.reshape(n * c, h * w)[:, : w - 1]
        return y, torch.zeros(n, half), x[:, :, :half], torch.arange(h) * n, F.interpolate(x, size=(h * 2, w))

    shapes = ({0: Dim("n"), 2: Dim.AUTO, 3: Dim("w", min=4)},)
    graph = from_module(Of(function), rand(2, 3, 6, 5), dynamic_shapes={"xs": shapes})
    verify(graph)
    check_text(graph)
    types = [str(value.type) for _, value in graph.outputs]
    assert types[0].startswith('f32["3*n", ')
    assert types[4].startswith('f32[n, 3, "2*s')
    assert types[4].endswith('", w]')
    for shape in ((2, 3, 6, 5), (4, 3, 9, 7)):
        same_outputs(graph, Of(function), rand(*shape))


def test_a_size_that_depends_on_data_is_a_symbol() -> None:
    graph = from_module(Of(lambda x: x.nonzero()), torch.tensor([1.0, 0.0, 2.0]))
    assert evaluate(graph, {graph.inputs[0].name: torch.tensor([0.0, 0.0, 5.0])})["output_0"].tolist() == [[2]]


# -- exported programs and Dynamo graphs -----------------------------------------------------------------


def test_an_exported_program() -> None:
    module, x = filled(Mlp()), rand(2, 4)
    program = torch.export.export(module, (x,), {"gain": rand(4)})
    graph = from_program(program)
    assert [v.name for v in graph.inputs] == ["x", "gain"]
    same_outputs(graph, module, ((x,), {"gain": rand(4)}))
    assert planish.capture(program) == graph


def captured_by_dynamo(module: nn.Module, *inputs: torch.Tensor, dynamic: bool = False) -> Graph:
    found: list[Graph] = []

    def backend(graph: torch.fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        before = graph.code
        found.append(planish.capture(graph, given))
        assert graph.code == before
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, dynamic=dynamic)(*inputs)
    (graph,) = found
    verify(graph)
    check_text(graph)
    return graph


def test_a_dynamo_graph() -> None:
    module, x = filled(Mlp()), rand(2, 4)
    graph = captured_by_dynamo(module, x)
    assert [v.name for v in graph.inputs] == ["x"]
    names = {v.name for v in graph.constants}
    assert {"layers.0.weight", "layers.0.bias", "layers.1.bias", "shift", "table", "plain"} <= names
    assert [n.source for n in graph.nodes if n.op.name == "linear"] == ["layers.0", "layers.1"]
    with torch.no_grad():
        want = module(x)["y"]
    torch.testing.assert_close(next(iter(evaluate(graph, {"x": x}).values())), want)


def test_a_dynamo_graph_with_symbols() -> None:
    module = filled(nn.Sequential(nn.Linear(4, 4), nn.Flatten(0)))
    graph = captured_by_dynamo(module, rand(3, 4), dynamic=True)
    (symbol,) = (d for d in graph.inputs[0].shape or () if isinstance(d, str))
    assert [str(v.type) for _, v in graph.outputs] == [f'f32["4*{symbol}"]']
    same_outputs(graph, module, rand(5, 4))


def test_a_dynamo_graph_needs_its_inputs() -> None:
    def backend(graph: torch.fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        with pytest.raises(PlanishError, match="captured on the 3 inputs that its backend receives; got NoneType"):
            planish.capture(graph)
        with pytest.raises(PlanishError, match="captured on the 3 inputs that its backend receives; got 2"):
            planish.capture(graph, given[1:])
        return graph.forward

    torch._dynamo.reset()
    torch.compile(nn.Linear(2, 2), backend=backend)(rand(1, 2))


# -- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("L['self'].model.layers[0].weight", "model.layers.0.weight"),
        ("L['self']._modules['model']._modules['0']._parameters['weight']", "model.0.weight"),
        ("model.layers.0", "model.layers.0"),
        ("L__self__", ""),
        ("self.fc", "fc"),
        ("", ""),
    ],
)
def test_module_path(text: str, path: str) -> None:
    assert module_path(text) == path


class Pair(NamedTuple):
    left: int
    right: int


def test_leaf_paths() -> None:
    spec = torch.utils._pytree.tree_structure(((1, [2, 3]), {"a": Pair(4, 5), "b": (6,)}))
    assert [".".join(p) for p in leaf_paths(spec)] == ["0.0", "0.1.0", "0.1.1", "1.a.left", "1.a.right", "1.b.0"]


def test_inputs_with_structure() -> None:
    class Nested(nn.Module):
        def forward(self, pair: tuple[torch.Tensor, torch.Tensor], more: dict[str, torch.Tensor]) -> torch.Tensor:
            return pair[0] + pair[1] * more["z"]

    graph = from_module(Nested(), (((X, Y), {"z": Z[None]}), {}))
    assert [v.name for v in graph.inputs] == ["pair.0", "pair.1", "more.z"]


# -- refusals ----------------------------------------------------------------------------------------------


def refused(module: nn.Module, inputs: Inputs) -> PlanishError:
    with pytest.raises(PlanishError) as caught:
        planish.capture(module, inputs)
    return caught.value


def test_a_path_chosen_by_data(capfd: pytest.CaptureFixture[str]) -> None:
    error = refused(Of(lambda x: x * 2 if x.sum() > 0 else x - 1), X)
    assert capfd.readouterr() == ("", "")  # torch prints the graph so far
    assert error.what.startswith("Of: torch.export refuses the model: ")
    assert error.where is not None
    assert error.where.startswith(__file__)
    assert (
        error.hint == "capture runs the model once without data: it must not choose its path by the values of tensors"
    )


def test_modules_that_cannot_be_exported() -> None:
    with pytest.warns(DeprecationWarning, match="is deprecated"):
        traced = torch.jit.trace(nn.Linear(4, 2), torch.ones(1, 4))
    error = refused(traced, torch.ones(1, 4))
    assert "Exporting a ScriptModule is not supported" in error.what
    assert error.hint == "capture the module that it was scripted or traced from"
    lazy = nn.Sequential(nn.LazyLinear(2))
    error = refused(lazy, torch.ones(1, 4))
    assert "Attempted to use an uninitialized parameter" in error.what
    assert error.hint == "run the module once on the inputs first: a lazy layer takes its sizes from them"
    assert nn.parameter.is_lazy(lazy[0].weight)  # the module is as it was
    lazy(torch.ones(1, 4))
    check(lazy, torch.ones(1, 4))


class Cache:
    """What torch cannot take apart."""


def test_outputs_that_torch_does_not_know() -> None:
    error = refused(Of(lambda x: (x, Cache())), X)
    assert error.what.startswith("Of: torch.export refuses the model: Found <class 'test_from_fx.Cache'> in output")
    assert error.hint is not None
    assert error.hint.startswith("leave it out of the outputs by the model's own options (use_cache=False, say)")


def test_dynamic_shapes_that_do_not_hold() -> None:
    with pytest.raises(PlanishError) as caught:
        from_module(Of(lambda x: x.view(2, -1, 4)), rand(6, 4), dynamic_shapes={"xs": ({0: Dim("rows")},)})
    assert caught.value.what.startswith("Of: torch.export refuses the model: Not all values of rows")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("torch suggests the dynamic shapes ")
    assert "rows = 2*_rows" in caught.value.hint


def test_inputs_that_do_not_fit() -> None:
    error = refused(nn.Linear(3, 2), X)
    assert error.what.startswith("inputs: Linear does not run on them: mat1 and mat2 shapes cannot be multiplied")
    for make in (nn.Linear(3, 2), nn.Sequential(nn.ReLU(), nn.Linear(3, 2))):
        error = refused(make, torch.ones(2, 3, dtype=torch.int64))  # torch.export takes them
        kind = type(make).__name__
        assert error.what.startswith(f"inputs: {kind} does not run on them: mat1 and mat2 must have the same dtype")
        assert error.hint is None
    missing = refused(Mlp(), {"gain": Z})
    assert "missing 1 required positional argument: 'x'" in missing.what


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (None, "inputs: a torch module is captured on example inputs; got none"),
        (3, "inputs: expected a tensor, a tuple of arguments or a dict of keyword arguments, got int"),
        ({1: X}, "inputs: a keyword argument has the name 1; expected a string"),
    ],
)
def test_kinds_of_inputs(inputs: Any, text: str) -> None:
    assert refused(Mlp(), inputs).what == text


def test_a_kind_of_model_that_is_not_known() -> None:
    error = refused(types.SimpleNamespace(), X)  # type: ignore[arg-type]
    assert error.what == (
        "model: a types.SimpleNamespace cannot be captured; expected a path to an .onnx file, an onnx.ModelProto, "
        "a torch.nn.Module or a torch.export.ExportedProgram"
    )


def test_control_flow_inside_the_graph() -> None:
    def function(x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

    error = refused(Of(function), X)
    assert error.what == "higher-order op 'cond': control flow inside the graph cannot be captured"
    assert error.hint == "export the model with inputs or options for which it takes one path"


# -- python targets ------------------------------------------------------------------------------------------

FORM = "expected a function that returns (model, example inputs)"
TARGET = """
import torch

def build():
    return torch.nn.Linear(3, 2), torch.ones(1, 3)

def alone():
    return torch.nn.Linear(3, 2)

def nothing():
    pass

def broken():
    raise ValueError("no weights")

class Factory:
    @staticmethod
    def make():
        return torch.nn.ReLU(), {"input": torch.ones(2)}

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "some_models.py").write_text(TARGET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "some_models", raising=False)
    return tmp_path


@pytest.mark.parametrize("target", ["some_models.py:build", "some_models:build", "some_models:Factory.make"])
def test_a_python_target(folder: Path, target: str) -> None:
    assert [n.op.name for n in planish.capture(target).nodes] == ["relu" if "Factory" in target else "linear"]


@pytest.mark.parametrize(
    ("target", "text", "hint"),
    [
        (
            "some_models:buidl",
            "target 'some_models:buidl': module 'some_models' has no 'buidl'",
            "did you mean 'build'?",
        ),
        ("some_model:build", "module 'some_model': not found", "did you mean 'some_models'?"),
        ("some_model.py:build", "some_model.py: no such file", "did you mean 'some_models.py'?"),
        ("some_models:number", "target 'some_models:number': 'number' is a int; " + FORM, None),
        ("some_models:nothing", "target 'some_models:nothing': returns a NoneType; " + FORM, None),
        ("some_models:broken", "target 'some_models:broken': fails: ValueError: no weights", None),
        (
            "some_models:alone",
            "target 'some_models:alone': returns a torch module without inputs; " + FORM,
            "return model, inputs: a tensor, a tuple of arguments, or a dict of keyword arguments",
        ),
        (
            "some_models.py",
            "some_models.py: a Python file is no model",
            "name a function in it that returns one: some_models.py:function",
        ),
    ],
)
def test_bad_targets(folder: Path, target: str, text: str, hint: str | None) -> None:
    with pytest.raises(PlanishError) as caught:
        planish.capture(target)
    assert caught.value.what == text
    assert caught.value.hint == hint


def test_a_target_that_fails_says_where(folder: Path) -> None:
    with pytest.raises(PlanishError) as caught:
        planish.capture("some_models.py:broken")
    assert caught.value.where is not None
    assert caught.value.where.endswith("some_models.py:14")


def test_the_commands_take_targets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from planish.cli import main

    assert main(["inspect", "some_models.py:build", "--json"]) == 0
    assert '"rows"' in capsys.readouterr().out
    assert main(["opt", "some_models:build", "-p", "raise"]) == 0
    assert "linear(%input" in capsys.readouterr().out
    assert main(["inspect", "some_models:biuld"]) == 2
    assert "did you mean 'build'?" in capsys.readouterr().err
