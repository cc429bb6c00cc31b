"""Sizes that change, caches, whole models of transformers: few compiles, the numbers of the quantised graph."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import backend_cases as cases
import pytest
import torch
from backend_cases import Block, close, compiled, filled, numbers, reference
from torch import nn
from torch._dynamo.utils import counters

TOLERANCE = 2e-6
EXAMPLE = str(Path(__file__).parents[1] / "examples" / "generate_text.py")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with cases.fresh(), torch.no_grad():
        yield


def compiles() -> int:
    return int(counters["stats"]["unique_graphs"])


class Encoder(nn.Module):
    """An encoder layer with attention over a mask of padding."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.block = Block(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in self.qkv)
        seen = mask[:, None, None, :].bool()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.block(self.norm(x + self.out(mixed.transpose(1, 2).flatten(-2))))


def batch(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, (length + 1) // 2 :] = 0
    return numbers(rows, length, 32, seed=length), mask


def test_lengths_from_1_to_512_take_two_compiles() -> None:
    model = filled(Encoder(), 1)
    run = compiled(model)
    run = torch.compile(model, backend="planish", options=cases.EAGER, fullgraph=True)
    for length in (1, 2, 3, 17, 64, 128, 511, 512):
        given = batch(2, length)
        close(run(*given), reference(model, *given), TOLERANCE)
    assert compiles() == 2


def test_batches_and_lengths_at_once_take_two_compiles() -> None:
    model = filled(Encoder(), 1)
    run = torch.compile(model, backend="planish", options=cases.EAGER, fullgraph=True)
    for rows, length in ((1, 1), (2, 3), (8, 128), (3, 512), (512, 2)):
        given = batch(rows, length)
        close(run(*given), reference(model, *given), TOLERANCE)
    assert compiles() == 2


def test_dynamic_from_the_start_takes_one_compile() -> None:
    model = filled(Encoder(), 1)
    run = torch.compile(model, backend="planish", options=cases.EAGER, dynamic=True, fullgraph=True)
    for rows, length in ((3, 5), (2, 64), (8, 17)):
        given = batch(rows, length)
        close(run(*given), reference(model, *given), TOLERANCE)
    assert compiles() == 1


def test_marked_dims() -> None:
    model, x = filled(Block(), 1), numbers(6, 32)
    torch._dynamo.mark_dynamic(x, 0)
    run = compiled(model)
    close(run(x), reference(model, x), TOLERANCE)
    close(run(numbers(40, 32)), reference(model, numbers(40, 32)), TOLERANCE)
    assert compiles() == 1


class Halves(nn.Module):
    """A graph that holds for even lengths and, by another path, for odd ones."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(x)
        if x.shape[0] % 2 == 0:
            return x.reshape(2, -1, 32).sum(0)
        return x[: x.shape[0] // 2] * 3


def test_a_path_that_sizes_choose() -> None:
    model = filled(Halves(), 1)
    run = torch.compile(model, backend="planish", options=cases.EAGER, dynamic=True)
    for rows in (4, 5, 10, 11, 6, 9):
        x = numbers(rows, 32)
        close(run(x), reference(model, x), TOLERANCE)
    assert compiles() == 2


def test_two_sizes_that_are_equal_by_chance() -> None:
    """The trace must not take for one size what Dynamo keeps apart."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.block(x) @ self.block(y).transpose(-1, -2)

    model = filled(Outer(), 1)
    run = torch.compile(model, backend="planish", options=cases.EAGER, dynamic=True)
    for rows, columns in ((6, 6), (6, 9), (3, 12), (12, 3)):
        x, y = numbers(rows, 32), numbers(columns, 32, seed=1)
        close(run(x, y), reference(model, x, y), TOLERANCE)


def test_a_float_of_a_module_is_a_number() -> None:
    """Under dynamic=True Dynamo hands a norm's eps on as a tensor."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(32, eps=1e-3), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.norm(x)) * self.norm.eps

    model, x = filled(Norm(), 1), numbers(6, 32) * 0.01
    run = torch.compile(model, backend="planish", options=cases.EAGER, dynamic=True)
    close(run(x), reference(model, x), TOLERANCE)
    model.norm.eps = 0.5
    close(run(x), reference(model, x), TOLERANCE)


# -- caches ------------------------------------------------------------------------------------------------------


def language_model(kind: str = "llama", **changes: Any) -> Any:
    import transformers

    config = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    made = transformers.AutoConfig.for_model(kind, **{**config, **changes})
    model = filled(transformers.AutoModelForCausalLM.from_config(made), 1)
    model.generation_config.eos_token_id = None
    return model


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(length))


def whole(model: Any, text: torch.Tensor) -> torch.Tensor:
    """The logits of the quantised graph over the whole text at once."""
    found: torch.Tensor = reference(model, input_ids=text, use_cache=False).logits
    return found


def test_a_decoder_is_one_graph() -> None:
    model = language_model()
    run = torch.compile(model, backend="planish", options=cases.EAGER, fullgraph=True)
    for length in (3, 9, 33):
        text = tokens(2, length)
        close(run(text, use_cache=False).logits, whole(model, text), TOLERANCE)
    assert compiles() == 2


def test_a_cache_that_grows() -> None:
    import transformers

    model, text = language_model(), tokens(2, 10)
    run, cache = compiled(model), transformers.DynamicCache(config=model.config)
    found = [run(text[:, :5], past_key_values=cache).logits]
    found += [run(text[:, t : t + 1], past_key_values=cache).logits for t in range(5, 10)]
    close(torch.cat(found, 1), whole(model, text), TOLERANCE)
    assert compiles() == 3  # the prompt, a step, a step at any length


def test_a_static_cache() -> None:
    import transformers

    model, text = language_model(), tokens(2, 10)
    run, cache = compiled(model), transformers.StaticCache(config=model.config, max_cache_len=16)
    found = [run(text[:, :5], past_key_values=cache, cache_position=torch.arange(5)).logits]
    for t in range(5, 10):
        found.append(run(text[:, t : t + 1], past_key_values=cache, cache_position=torch.tensor([t])).logits)
    close(torch.cat(found, 1), whole(model, text), TOLERANCE)
    assert compiles() == 2


def test_the_example_compiles_twice() -> None:
    """A prompt and a token; the second text, of another length, finds both."""
    import transformers

    model, text = language_model("gemma3_text", head_dim=8), tokens(1, 5)
    write = runpy.run_path(EXAMPLE)["write"]
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    expected = text
    for _ in range(6):
        expected = torch.cat([expected, whole(model, expected)[:, -1:].argmax(-1)], 1)
    write(model, cache, text, 2)  # in float, as the example does
    run = compiled(model)
    before = compiles()
    write(run, cache, text, 2)
    made, speed = write(run, cache, text, 6)
    assert made == expected[0, 5:].tolist() and speed > 0
    assert compiles() - before == 2


def test_a_sliding_window() -> None:
    model, text = language_model("mistral", sliding_window=4), tokens(2, 12)
    import transformers

    run, cache = compiled(model), transformers.DynamicCache(config=model.config)
    found = [run(text[:, :5], past_key_values=cache).logits]
    found += [run(text[:, t : t + 1], past_key_values=cache).logits for t in range(5, 12)]
    close(torch.cat(found, 1), whole(model, text), TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "qwen2"])
def test_generation(kind: str, cache: str | None) -> None:
    model = language_model(kind, **({"head_dim": 8} if kind == "gemma3_text" else {}))
    text = tokens(2, 5)
    expected = text
    for _ in range(8):
        expected = torch.cat([expected, whole(model, expected)[:, -1].argmax(-1, keepdim=True)], 1)
    model.forward = torch.compile(model.forward, backend="planish", options=cases.EAGER)
    found = model.generate(
        text, max_new_tokens=8, do_sample=False, cache_implementation=cache, disable_compile=True, use_cache=True
    )
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["aten", "auto"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("recipe", ["w8a8-token", "w4a16", "w4a8", "w8a8-dynamic"])
def test_recipes_at_several_sizes(recipe: str, inner: str, target: str) -> None:
    model = filled(Encoder(64), 1)
    options = {"recipe": recipe, "inner": inner, "target": target}
    run = torch.compile(model, backend="planish", options=options, fullgraph=True)
    text = cases.text_of(recipe)
    for rows, length in ((1, 5), (2, 64), (3, 17)):
        x, mask = numbers(rows, length, 64), batch(rows, length)[1]
        with cases.fresh_warnings([]):
            found = run(x, mask)
        exact = (inner, target) == ("eager", "aten")  # kernels of attention beside int8 round to bf16
        close(found, reference(model, x, mask, pipeline=text), 1e-5 if exact else 2e-2)
    assert compiles() == 2
