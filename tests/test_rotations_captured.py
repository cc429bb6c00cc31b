"""All rotations on models as torch.export gives them: norms centred, gains folded, R1 to R4, and back to torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from helpers import check_text, random_inputs, relative_error

import planish
from planish.ir.evaluator import Evaluator
from planish.ir.graph import Graph
from planish.passes.manager import Pipeline, Report

TOLERANCE = 1e-12  # relative, in float64
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SMALL, "intermediate_size": 192, "num_key_value_heads": 2, "max_position_embeddings": 64}
IDS = torch.arange(12).reshape(2, 6)
PIPELINE = (
    "raise,center-layer-norm{untie=true},fold-norm-gain{untie=true},rotate-channels,"
    "insert-hadamard{sites=down},insert-hadamard{sites=qk},merge-hadamards"
)

# name: (model class, configuration class, options)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, "attention_bias": True, "mlp_bias": True}),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, "tie_word_embeddings": True}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**SMALL, "ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "latent": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **DECODER,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 2,
        },
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "image_size": 16,
            "patch_size": 4,
        },
    ),
    "bert": ("BertModel", "BertConfig", {**SMALL, "intermediate_size": 64}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SMALL, "intermediate_size": 96, "rotary_pct": 0.5}),
}


def model(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model with biases and gains that are not trivial, and its inputs."""
    import transformers

    transformers.logging.set_verbosity_error()
    cls, config, options = MODELS[name]
    made = getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 1.5 + 0.3)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if name == "vit":
        return made, {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return made, {"input_ids": IDS} if name == "bert" else {"input_ids": IDS, "use_cache": False}


@cache
def rotated(name: str) -> tuple[Graph, Graph, Report]:
    graph = planish.capture(*model(name))
    after, report = Pipeline(PIPELINE).run(graph)
    check_text(after)
    return graph, after, report


def roles(report: Report) -> list[str]:
    return sorted(line.split(": ")[1].replace(",", "") for line in report["rotate-channels"].applied)


VALUES = ["value 2 blocks of 8"] * 2
HEADS = ["key 4 blocks of 8"] * 2 + ["residual 32 channels"] + ["value 4 blocks of 8"] * 2
EXPECTED: dict[str, tuple[list[str], int, Callable[[Report], bool]]] = {
    # name: what is rotated, the number of online transforms, anything else
    "llama": (["residual 32 channels", *VALUES], 6, lambda r: not r["fold-norm-gain"].declined),
    "llama tied": (
        ["residual 32 channels", *VALUES],
        6,
        lambda r: r["fold-norm-gain"].notes[0].startswith("%model.embed_tokens.weight untied for %"),
    ),
    "opt": (HEADS, 2, lambda r: len(r["center-layer-norm"].applied) == 5),
    "gpt2": (HEADS, 2, lambda r: "untied" in r["center-layer-norm"].notes[0]),
    "vit": (HEADS, 2, lambda r: len(r["center-layer-norm"].applied) == 5),
    "bert": (
        [role for role in HEADS if not role.startswith("residual")],
        2,
        lambda r: len(r["center-layer-norm"].applied) == 1,
    ),
    "gpt-neox": (
        ["key 4 blocks of 4"] * 2 + HEADS[2:],
        6,
        lambda r: len(r["center-layer-norm"].applied) == 5,
    ),
}
FAST = ("llama", "opt")


def check(name: str) -> None:
    graph, after, report = rotated(name)
    expected, online, more = EXPECTED[name]
    assert roles(report) == expected
    assert sum(n.op.name == "hadamard" for n in after.nodes) == online
    assert more(report)
    for seed in (5, 6):
        inputs = random_inputs(graph, seed)
        if "input_ids" in inputs:
            inputs["input_ids"] = torch.randint(0, 64, IDS.shape, generator=torch.Generator().manual_seed(seed))
        want, got = (Evaluator(g, torch.float64).run(inputs) for g in (graph, after))
        for output in want:
            assert relative_error(got[output], want[output]) <= TOLERANCE


@pytest.mark.parametrize("name", FAST)
def test_all_rotations(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in EXPECTED if n not in FAST])
def test_all_rotations_more(name):
    check(name)


def test_low_rank_paths():
    """Latent attention: linear, linear; linear, RMS norm, linear; a key that is shared by all heads."""
    _, after, report = rotated("latent")
    assert roles(report).count("hidden 24 channels") == 2  # queries
    assert roles(report).count("hidden 16 channels") == 2  # keys and values
    assert "residual 32 channels" in roles(report)
    assert sum(n.op.name == "hadamard" for n in after.nodes) == 6


def test_back_to_torch():
    """The rotated model as a torch module: the logits of the original in float32, and the call as it was."""
    original, inputs = model("llama")
    _, after, _ = rotated("llama")
    module = planish.to_torch(after)
    with torch.no_grad():
        want, got = (m(**inputs)["logits"] for m in (original, module))
    assert relative_error(got, want) < 1e-4
    text = module.print_readable(print_output=False)
    assert "hadamard" in text
