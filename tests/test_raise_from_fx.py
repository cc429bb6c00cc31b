"""The raise group on captured torch modules: the same canonical ops whatever the spelling.

One model for each way in which norms, rotary embeddings and attention are written; `run` validates every pass in
float64 and checks that a second run finds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check_text
from torch import nn

from planish.capture.from_fx import from_module
from planish.ir.graph import Graph, Node
from planish.passes.manager import Pipeline
from planish.passes.pipeline import parse_pipeline

GROUP = "raise"
IDS = torch.arange(1, 13).reshape(2, 6)
DECODER = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
GROUPED = {**DECODER, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 8}
OLD = {"vocab_size": 40, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
LATENT = {
    **DECODER, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip

# config, model, its arguments, attention, (norm, its number), rotary embeddings, attentions
Row = tuple[str, str, Mapping[str, Any], str, tuple[str, int], int, int]
MODELS: dict[str, Row] = {
    "repeated keys, sdpa": ("LlamaConfig", "LlamaForCausalLM", GROUPED, "sdpa", ("rms_norm", 3), 2, 1),
    "repeated keys, eager": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED, "eager", ("rms_norm", 3), 2, 1),
    "norms of q and k by head": ("Qwen3Config", "Qwen3ForCausalLM", WIDE, "sdpa", ("rms_norm", 5), 2, 1),
    "norms of q and k in full": ("Olmo2Config", "Olmo2ForCausalLM", GROUPED, "eager", ("rms_norm", 5), 2, 1),
    "sliding window": ("MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": 4}, "eager",
                       ("rms_norm", 3), 2, 1),
    "1 + w": ("GemmaConfig", "GemmaForCausalLM", WIDE, "sdpa", ("rms_norm", 3), 2, 1),
    "soft-cap": ("Gemma2Config", "Gemma2ForCausalLM", {**WIDE, "sliding_window": 4}, "eager", ("rms_norm", 5), 2, 1),
    "sinks": ("GptOssConfig", "GptOssForCausalLM", {**WIDE, "num_local_experts": 2, "num_experts_per_tok": 1}, "eager",
              ("rms_norm", 3), 2, 1),
    "partial": ("PhiConfig", "PhiForCausalLM", DECODER, "eager", ("layer_norm", 2), 2, 1),
    "pairs": ("CohereConfig", "CohereForCausalLM", GROUPED, "eager", ("layer_norm", 2), 2, 1),
    "partial pairs": ("Glm4Config", "Glm4ForCausalLM", {**WIDE, "pad_token_id": 0}, "sdpa", ("rms_norm", 5), 2, 1),
    "pairs, tokens first": ("GPTJConfig", "GPTJForCausalLM", {**OLD, "rotary_dim": 4}, "eager",
                            ("layer_norm", 2), 2, 1),
    "pairs to halves": ("DeepseekV3Config", "DeepseekV3ForCausalLM", LATENT, "eager", ("rms_norm", 5), 2, 1),
    "complex numbers": ("DeepseekV2Config", "DeepseekV2ForCausalLM", LATENT, "eager", ("rms_norm", 5), 2, 1),
    "turned before they are repeated": (
        "FalconConfig", "FalconForCausalLM",
        {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
         "new_decoder_architecture": True, "num_kv_heads": 2}, "sdpa", ("layer_norm", 3), 2, 1),
    "slopes, scaled after": (
        "FalconConfig", "FalconForCausalLM",
        {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "alibi": True},
        "eager", ("layer_norm", 2), 0, 1),
    "slopes by baddbmm": ("BloomConfig", "BloomForCausalLM", {"vocab_size": 40, "hidden_size": 32, "n_layer": 1,
                          "n_head": 4}, "eager", ("layer_norm", 4), 0, 1),
    "filled with the lowest float": ("MptConfig", "MptForCausalLM", {"vocab_size": 40, "d_model": 32, "n_layers": 1,
                                     "n_heads": 4, "max_seq_len": 32}, "eager", ("layer_norm", 3), 0, 1),
    "weights stored [in, out]": ("GPT2Config", "GPT2LMHeadModel", OLD, "eager", ("layer_norm", 3), 0, 1),
    "scores of three axes": ("DebertaV2Config", "DebertaV2Model", {**DECODER, "relative_attention": True,
                             "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}, "eager", ("layer_norm", 3), 0, 1),
    "clamped scores": ("XGLMConfig", "XGLMForCausalLM", {"vocab_size": 40, "d_model": 32, "ffn_dim": 40,
                       "num_layers": 1, "attention_heads": 4, "max_position_embeddings": 32}, "eager",
                       ("layer_norm", 3), 0, 1),
    "bidirectional": ("BertConfig", "BertModel", DECODER, "sdpa", ("layer_norm", 3), 0, 1),
}  # fmt: skip


def language_model(row: Row) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny random model whose norms and biases are not trivial."""
    import transformers

    config, model, arguments, attention, *_ = row
    settings = getattr(transformers, config)(**arguments)
    settings._attn_implementation = attention
    settings.use_cache = False
    module = getattr(transformers, model)(settings).eval()
    plant(module)
    return module, {"input_ids": IDS}


def plant(module: nn.Module) -> None:
    """Random weights; gains around 1, biases around 0.3."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + (0.0 if parameter.dim() > 1 else 0.3 if name.endswith("bias") else 1.0))


def raised(module: nn.Module, inputs: Any, **options: Any) -> Graph:
    """The captured module after the raise group, validated; a second run changes nothing."""
    graph = from_module(module, inputs, **options)
    after, report = Pipeline(GROUP).run(graph, validate=True)
    assert report.validated, report.unchecked
    assert [p.name for p in report.passes] == [p.name for p in parse_pipeline(GROUP)]
    assert max(p.error or 0.0 for p in report.passes) <= 1e-10
    check_text(after)
    _, second = Pipeline(GROUP).run(after, validate=False)
    later = [p.applied for p in second.passes if p.name != "fold-constants"]  # a mask of constants, say
    assert not any(later)
    return after


def found(graph: Graph, op: str) -> list[Node]:
    return [n for n in graph.nodes if n.op.name == op]


@pytest.mark.parametrize("name", MODELS)
def test_a_model(name: str) -> None:
    row = MODELS[name]
    (norm, norms), ropes, attentions = row[4:]
    graph = raised(*language_model(row))
    got = {op: len(found(graph, op)) for op in (norm, "rope", "attention", "rsqrt")}
    assert got == {norm: norms, "rope": ropes, "attention": attentions, "rsqrt": 0}
    (node,) = found(graph, "attention")
    shapes = [v.shape[1] for v in node.operands[:3]]
    assert shapes == [4, *[row[2].get("num_key_value_heads", row[2].get("num_kv_heads", shapes[1]))] * 2]
    assert [k for k in ("softcap",) if k in node.attributes] == ["softcap"] * (name == "soft-cap")
    assert (node.operand(4) is not None) == (name == "sinks")
    if norm == "rms_norm":
        offsets = {n.attributes.get("gain_offset", 0.0) for n in found(graph, norm)}
        assert offsets == {1.0 if name in ("1 + w", "soft-cap") else 0.0}
        assert all(n.operand(1) is not None and n.operand(1).name.endswith("weight") for n in found(graph, norm))
    interleaved = {bool(n.attributes.get("interleaved")) for n in found(graph, "rope")}
    if ropes:
        assert interleaved == {name == "complex numbers" or ("pairs" in name and "halves" not in name)}


def test_encoder_and_decoder() -> None:
    """Relative position biases are masks; cross attention has keys of another length."""
    import transformers

    settings = transformers.T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4)
    settings._attn_implementation, settings.use_cache = "eager", False
    module = transformers.T5ForConditionalGeneration(settings).eval()
    plant(module)
    graph = raised(module, {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]})
    assert (len(found(graph, "rms_norm")), len(found(graph, "attention"))) == (7, 3)
    assert not found(graph, "softmax")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_windows(attention: str) -> None:
    import transformers

    settings = transformers.SwinConfig(
        image_size=16, patch_size=4, embed_dim=8, depths=[2], num_heads=[2], window_size=2, num_channels=3
    )
    settings._attn_implementation = attention
    module = transformers.SwinModel(settings).eval()
    plant(module)
    graph = raised(module, {"pixel_values": torch.randn(2, 3, 16, 16)})
    assert len(found(graph, "attention")) == 2
    assert all(n.operand(3) is not None for n in found(graph, "attention"))
    assert (len(found(graph, "layer_norm")), len(found(graph, "conv"))) == (6, 1)


@pytest.mark.parametrize("name", ["repeated keys, eager", "slopes by baddbmm", "scores of three axes"])
def test_symbolic_sizes(name: str) -> None:
    b, s = torch.export.Dim("b", min=2, max=64), torch.export.Dim("s", min=2, max=32)
    module, inputs = language_model(MODELS[name])
    graph = raised(module, inputs, dynamic_shapes={"input_ids": {0: b, 1: s}})
    (norm, norms), ropes, attentions = MODELS[name][4:]
    assert [len(found(graph, op)) for op in (norm, "rope", "attention", "softmax")] == [norms, ropes, attentions, 0]
    heads = MODELS[name][2].get("num_key_value_heads", 4)
    assert found(graph, "attention")[0].operand(1).shape == ("b", heads, "s", 8)


# -- spellings, by hand ------------------------------------------------------------------------------


class Lambda(nn.Module):
    """A function of x and of parameters `w` [8] and `g` [1]."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(8, generator=generator))
        self.g = nn.Parameter(torch.randn(1, generator=generator))
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.function(self, *tensors)


def mean_square(x: torch.Tensor) -> torch.Tensor:
    return x.pow(2).mean(-1, keepdim=True) + 0.1


NORMS: dict[str, tuple[Callable[..., torch.Tensor], str, dict[str, Any]]] = {
    "rsqrt": (lambda m, x: m.w * (x * torch.rsqrt(mean_square(x))), "rms_norm", {}),
    "1 / sqrt": (lambda m, x: x * (1 / torch.sqrt(mean_square(x))) * m.w, "rms_norm", {}),
    "power -1/2": (lambda m, x: x * mean_square(x).pow(-0.5) * m.w, "rms_norm", {}),
    "power -1/2 of x x": (lambda m, x: m.w * (x * ((x * x).mean(-1, True) + 0.1) ** -0.5), "rms_norm", {}),
    "over a square root": (lambda m, x: x / mean_square(x).sqrt(), "rms_norm", {}),
    "1 + w": (lambda m, x: x * torch.rsqrt(mean_square(x)) * (1 + m.w), "rms_norm", {"gain_offset": 1.0}),
    "w + 1": (lambda m, x: (m.w + 1.0) * (x * torch.rsqrt(mean_square(x))), "rms_norm", {"gain_offset": 1.0}),
    "one gain": (lambda m, x: m.g * (x * torch.rsqrt(mean_square(x))), "rms_norm", {}),
    "bias": (lambda m, x: x * torch.rsqrt(mean_square(x)) * m.w + m.w, "rms_norm", {}),
    "function": (lambda m, x: F.rms_norm(x, (8,), m.w, 0.1), "rms_norm", {}),
    "heads": (lambda m, x: (y := x.reshape(2, 3, 2, 4)) * torch.rsqrt(mean_square(y)) * m.w[:4], "rms_norm", {}),
    "heads, turned": (
        lambda m, x: (y := x.reshape(2, 3, 2, 4).transpose(1, 2)) * torch.rsqrt(mean_square(y)), "rms_norm", {}),
    "layer norm": (lambda m, x: (c := x - x.mean(-1, True)) * torch.rsqrt(mean_square(c)) * m.w, "layer_norm", {}),
    "layer norm with var": (
        lambda m, x: (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 0.1) * m.w,
        "layer_norm", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_a_norm(name: str) -> None:
    function, op, attributes = NORMS[name]
    graph = raised(Lambda(function), (torch.randn(2, 3, 8),))
    (node,) = found(graph, op)
    assert node.attributes["eps"] == pytest.approx(0.1)
    assert node.attributes.get("gain_offset", 0.0) == attributes.get("gain_offset", 0.0)
    assert {n.op.name for n in graph.nodes} <= {op, "reshape", "transpose", "slice"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("where", ["before the gain", "behind the gain"])
def test_a_norm_in_float32_between_halves(dtype: torch.dtype, where: str) -> None:
    def norm(m: Lambda, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(mean_square(y))
        return m.w * y.to(x.dtype) if where == "before the gain" else (y * m.w.float()).to(x.dtype)

    graph = raised(Lambda(norm).to(dtype), (torch.randn(2, 3, 8).to(dtype),))
    (node,) = found(graph, "rms_norm")
    assert len(found(graph, "cast")) == (0 if where == "before the gain" else 2)  # the gain counts in float32
    assert node.result.dtype == {"before the gain": str(node.operand(0).dtype), "behind the gain": "f32"}[where]


NO_NORMS: dict[str, Callable[..., torch.Tensor]] = {
    "by the length": lambda m, x: x / x.norm(dim=-1, keepdim=True),
    "sum of squares": lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 0.1),
    "another axis": lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 0.1),
    "another tensor": lambda m, x: (x + 1) * torch.rsqrt(mean_square(x)),
    "cubes": lambda m, x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 4.0),
    "unbiased": lambda m, x: (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, keepdim=True) + 0.1),
}


@pytest.mark.parametrize("name", NO_NORMS)
def test_no_norm(name: str) -> None:
    graph = raised(Lambda(NO_NORMS[name]), (torch.rand(2, 3, 8) + 0.5,))
    assert not found(graph, "rms_norm")
    assert not found(graph, "layer_norm")


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-1, -2)


ATTENTIONS: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any]]] = {
    "enable_gqa": (lambda m, q, k, v: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True), {}),
    "repeat_interleave": (
        lambda m, q, k, v: F.scaled_dot_product_attention(
            q, k[:, :2].repeat_interleave(2, 1), v[:, :2].repeat_interleave(2, 1)), {"heads": 2}),
    "a root on each": (
        lambda m, q, k, v: scores(q * 8**-0.25, k * 8**-0.25).softmax(-1) @ v, {"scale": 8**-0.5}),
    "over a root": (lambda m, q, k, v: (scores(q, k) / math.sqrt(8)).softmax(-1) @ v, {"scale": 8**-0.5}),
    "scale of a tensor": (
        lambda m, q, k, v: (scores(q, k) * torch.tensor(0.25)).softmax(-1) @ v, {"scale": 0.25}),
    "einsum": (
        lambda m, q, k, v: torch.einsum("bhts,bhse->bhte", torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1), v),
        {"scale": 1.0}),
    "bmm": (
        lambda m, q, k, v: torch.bmm(
            torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).softmax(-1), v.flatten(0, 1)
        ).reshape(2, 4, 5, 8), {"scale": 1.0}),
    "baddbmm": (
        lambda m, q, k, v: torch.baddbmm(
            m.w[:5].expand(8, 1, 5), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), beta=0.5, alpha=0.25
        ).view(2, 4, 5, 5).softmax(-1) @ v, {"scale": 0.25, "mask": True}),
    "masked fill": (
        lambda m, q, k, v: scores(q, k).masked_fill(
            torch.ones(5, 5, dtype=torch.bool).triu(1), torch.finfo(q.dtype).min).softmax(-1) @ v, {"mask": True}),
    "soft-cap": (
        lambda m, q, k, v: (torch.tanh(scores(q, k) / 2) * 2).softmax(-1) @ v, {"softcap": 2.0, "scale": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTIONS)
def test_an_attention(name: str) -> None:
    function, expected = ATTENTIONS[name]
    graph = raised(Lambda(function), tuple(torch.randn(2, 4, 5, 8) for _ in range(3)))
    (node,) = found(graph, "attention")
    assert not found(graph, "softmax")
    assert node.operand(1).shape[1] == expected.get("heads", node.operand(2).shape[1])
    assert (node.operand(3) is not None) == expected.get("mask", False)
    for key in ("scale", "softcap"):
        if key in expected:
            assert node.attributes[key] == pytest.approx(expected[key], rel=1e-6)


NO_ATTENTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "softmax of the rows": lambda m, q, k, v: scores(q, k).softmax(-2) @ v,
    "sigmoid": lambda m, q, k, v: scores(q, k).sigmoid() @ v,
    "softmax twice": lambda m, q, k, v: scores(q, k).softmax(-1).softmax(-1) @ v,
    "weights given out": lambda m, q, k, v: (p := scores(q, k).softmax(-1)) @ v + p.sum(),
    "a mask of small numbers": lambda m, q, k, v: scores(q, k).masked_fill(
        torch.ones(5, 5, dtype=torch.bool).triu(1), -100.0).softmax(-1) @ v,
    "cap of the masked": lambda m, q, k, v: torch.tanh(scores(q, k) + m.w[:5]).softmax(-1) @ v,
}  # fmt: skip


@pytest.mark.parametrize("name", NO_ATTENTIONS)
def test_no_attention(name: str) -> None:
    graph = raised(Lambda(NO_ATTENTIONS[name]), tuple(torch.randn(2, 4, 5, 8) for _ in range(3)))
    assert not found(graph, "attention")


def pairs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    one, two = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return one, two


ROPES: dict[str, Callable[..., torch.Tensor]] = {
    "chunks": lambda m, x, c, s: x * c + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * s,
    "stacked": lambda m, x, c, s: x * c + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * s,
    "unbound": lambda m, x, c, s: x * c + torch.stack((-pairs(x)[1], pairs(x)[0]), -1).flatten(-2) * s,
    "parts": lambda m, x, c, s: torch.cat(
        (x[..., :4] * c[..., :4] - x[..., 4:] * s[..., :4], x[..., 4:] * c[..., :4] + x[..., :4] * s[..., :4]), -1),
    "complex": lambda m, x, c, s: torch.view_as_real(
        torch.view_as_complex(x.reshape(2, 4, 5, 4, 2)) * torch.polar(c[..., :4].abs(), s[..., :4])).flatten(3),
    "rolled": lambda m, x, c, s: torch.cat((x[..., :4] * c[..., :4], x[..., 4:] * c[..., 4:]), -1)
    + torch.cat((-x[..., 4:], x[..., :4]), -1) * s,
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_a_rotary_embedding(name: str) -> None:
    graph = raised(Lambda(ROPES[name]), (torch.randn(2, 4, 5, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)))
    if name == "rolled":  # x cos in two parts: not a spelling that anyone uses
        assert not found(graph, "rope")
        return
    (node,) = found(graph, "rope")
    assert bool(node.attributes.get("interleaved")) == (name in ("stacked", "unbound", "complex"))
    assert not found(graph, "neg")


ACTIVATIONS: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "tanh of a cube": (
        lambda m, x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))), "gelu"),
    "tanh of a square": (
        lambda m, x: x * 0.5 * (1.0 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))), "gelu"),
    "erf": (lambda m, x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "gelu"),
    "sigmoid": (lambda m, x: torch.sigmoid(x) * x, "silu"),
    "gate": (lambda m, x: (g := x[..., :4]) * g.sigmoid() * x[..., 4:], "silu"),
    "clamp": (lambda m, x: x * (x + 3).clamp(0, 6) / 6, "hard_swish"),
    "sigmoid of 1.702 x": (lambda m, x: x * torch.sigmoid(1.702 * x), "sigmoid"),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation(name: str) -> None:
    function, op = ACTIVATIONS[name]
    graph = raised(Lambda(function), (torch.randn(2, 3, 8),))
    assert len(found(graph, op)) == 1
    assert not {"tanh", "erf", "clip"} & {n.op.name for n in graph.nodes}
    assert len(found(graph, "sigmoid")) == (op == "sigmoid")


class Weights(nn.Module):
    """Products with weights of all layouts."""

    def __init__(self, product: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.square = nn.Parameter(torch.randn(8, 8, generator=generator))
        self.experts = nn.Parameter(torch.randn(2, 8, 8, generator=generator))
        self.bias = nn.Parameter(torch.randn(8, generator=generator))
        self.product = product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(self, x)


PRODUCTS: dict[str, tuple[Callable[..., torch.Tensor], str, bool]] = {
    "linear": (lambda m, x: F.linear(x, m.square, m.bias), "linear", False),
    "x W": (lambda m, x: x @ m.square + m.bias, "linear", True),
    "x W^T": (lambda m, x: x @ m.square.T, "linear", False),
    "mm": (lambda m, x: torch.mm(x[0], m.square), "linear", True),
    "addmm": (lambda m, x: torch.addmm(m.bias, x[0], m.square), "linear", True),
    "addmm, transposed": (lambda m, x: torch.addmm(m.bias, x[0], m.square.t()), "linear", False),
    "einsum": (lambda m, x: torch.einsum("bti,oi->bto", x, m.square), "linear", False),
    "bmm of experts": (lambda m, x: torch.bmm(x, m.experts), "matmul", False),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product(name: str) -> None:
    function, op, transposed = PRODUCTS[name]
    graph = raised(Weights(function), (torch.randn(2, 3, 8),))
    (node,) = found(graph, op)
    assert bool(node.attributes.get("transposed")) == transposed
    assert node.operand(1).name == ("experts" if op == "matmul" else "square")
    assert {n.op.name for n in graph.nodes} <= {op, "gather", "reshape"}


def test_convolutions_stay() -> None:
    """Patch embedding, depthwise and pointwise convolution."""
    module = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)).eval()
    graph = raised(module, (torch.randn(2, 3, 16, 16),))
    assert [n.op.name for n in graph.nodes] == ["conv"] * 3


def test_modulation_stays() -> None:
    """A norm without gain, scaled and shifted by what a linear gives."""

    def modulated(m: Lambda, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = (F.silu(c) @ m.w.diag().repeat(1, 2)).chunk(2, -1)
        return F.layer_norm(x, (8,)) * (1 + scale[:, None]) + shift[:, None]

    graph = raised(Lambda(modulated), (torch.randn(2, 3, 8), torch.randn(2, 8)))
    (norm,) = found(graph, "layer_norm")
    assert len(norm.operands) == 1
    assert (len(found(graph, "mul")), len(found(graph, "silu"))) == (1, 1)
