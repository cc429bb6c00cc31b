"""The models that `bench/backend.py` times: MiniLM, and a decoder like LLaMA with random weights.

The decoder has the shape of Llama 3.2 1B at half the width: 16 layers, width 1024, 16 heads of 64 on 4 heads of keys,
hidden 4096, 32,000 tokens, its own head (276 million weights). One module serves both cases: a prompt of 128 tokens
without a cache, and one token behind a cache of 256, which gives the token's logits and its keys and values (whoever
holds the cache puts them into it: no engine copies the whole of it). Queries that share a head of keys are rows of one
product in the token step, so that no engine repeats keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import assets
import numpy as np

if TYPE_CHECKING:
    import torch

VOCABULARY, WIDTH, HIDDEN, HEADS, KEYS, SIZE, LAYERS, QUICK_LAYERS = 32000, 1024, 4096, 16, 4, 64, 16, 3
EPSILON, THETA = 1e-5, 10000.0
LENGTH, PROMPT, PAST = 128, 128, 256


@dataclass(frozen=True)
class Case:
    """A model on inputs of one shape.

    Attributes:
        name: in tables.
        model: "minilm" or "decoder".
        batch: rows of the inputs.
        tokens: of each.
        past: tokens in the cache.
    """

    name: str
    model: str
    batch: int
    tokens: int
    past: int = 0

    @property
    def key(self) -> str:
        """For names of files."""
        return self.name.replace(" ", "-")


CASES = (
    Case("minilm 1x128", "minilm", 1, LENGTH),
    Case("minilm 8x128", "minilm", 8, LENGTH),
    Case("decoder prefill", "decoder", 1, PROMPT),
    Case("decoder token", "decoder", 1, 1, PAST),
)


def case_of(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def minilm() -> torch.nn.Module:
    """The encoder: ids, mask and token types in, the last hidden state out."""
    import torch
    from transformers import AutoModel

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(assets.minilm_dir(), attn_implementation="sdpa")

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
        ) -> torch.Tensor:
            masks = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
            return self.encoder(input_ids=input_ids, **masks).last_hidden_state  # type: ignore[no-any-return]

    return LastHiddenState().eval()


def decoder(layers: int) -> torch.nn.Module:
    """The decoder in float32, the same weights in every process.

    Its arguments are ids [1, T], cosines and sines [T, 64] of their positions, and, behind a cache, one tensor
    [2, 4, past, 64] of keys and values for each layer. It gives the logits [1, 1, 32000] of the last token and for each
    layer the new keys and values [2, 4, T, 64].
    """
    import torch
    from torch import nn
    from torch.nn import functional

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.rms_norm(x, (WIDTH,), self.weight, EPSILON)

    def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before_attention, self.before_mlp = Norm(), Norm()
            self.query = nn.Linear(WIDTH, HEADS * SIZE, bias=False)
            self.key = nn.Linear(WIDTH, KEYS * SIZE, bias=False)
            self.value = nn.Linear(WIDTH, KEYS * SIZE, bias=False)
            self.out = nn.Linear(HEADS * SIZE, WIDTH, bias=False)
            self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
            self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
            self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

        def forward(
            self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            tokens = x.shape[1]
            h = self.before_attention(x)
            q = turned(self.query(h).view(1, tokens, HEADS, SIZE).transpose(1, 2), cos, sin)
            k = turned(self.key(h).view(1, tokens, KEYS, SIZE).transpose(1, 2), cos, sin)
            v = self.value(h).view(1, tokens, KEYS, SIZE).transpose(1, 2)
            new = torch.cat((k, v))
            if cache is None:
                k, v = (t.repeat_interleave(HEADS // KEYS, 1) for t in (k, v))
                made = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:  # one token: the queries of a head of keys are rows of one product
                k, v = (torch.cat((cache[i : i + 1], t), 2) for i, t in enumerate((k, v)))
                made = functional.scaled_dot_product_attention(q.view(1, KEYS, HEADS // KEYS, SIZE), k, v)
                made = made.view(1, HEADS, 1, SIZE)
            x = x + self.out(made.transpose(1, 2).reshape(1, tokens, HEADS * SIZE))
            h = self.before_mlp(x)
            return x + self.down(functional.silu(self.gate(h)) * self.up(h)), new

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.layers = nn.ModuleList(Layer() for _ in range(layers))
            self.norm = Norm()
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

        def forward(
            self, ids: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *caches: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            x = self.embedding(ids)
            new = []
            for number, layer in enumerate(self.layers):
                x, held = layer(x, cos, sin, caches[number] if caches else None)
                new.append(held)
            return self.head(self.norm(x[:, -1:])), *new  # of three dims: what ONNX Runtime packs is MatMul, not Gemm

    with torch.device("meta"):
        model = Decoder()
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, module.in_features**-0.5, generator=generator)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(generator=generator)
        elif isinstance(module, Norm):
            module.weight.fill_(1)
    return model


def angles(positions: range) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [len(positions), 64] of rotary positions, float32."""
    turns = np.arange(positions.start, positions.stop)[:, None] * THETA ** (-np.arange(SIZE // 2) / (SIZE // 2))
    both = np.concatenate((turns, turns), 1)
    return np.cos(both).astype(np.float32), np.sin(both).astype(np.float32)


def tokens(count: int, seed: int = 1) -> np.ndarray:
    """Random ids [1, count]."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (1, count))


def names_of(case: Case, layers: int) -> tuple[str, ...]:
    """Names of a case's inputs, in the order of the arguments."""
    if case.model == "minilm":
        return assets.INPUT_NAMES
    return ("ids", "cos", "sin", *(f"cache_{i}" for i in range(layers if case.past else 0)))


def inputs(case: Case, folder: Path) -> dict[str, np.ndarray]:
    """A case's inputs by name; the cache is what the float decoder makes of 256 tokens (`write_cache`)."""
    if case.model == "minilm":
        texts = assets.sentences("calibration", case.batch)
        return assets.encode(texts, case.tokens)
    cos, sin = angles(range(case.past, case.past + case.tokens))
    given = {"ids": tokens(case.past + case.tokens)[:, case.past :], "cos": cos, "sin": sin}
    if case.past:
        held = np.load(folder / "cache.npz")
        given.update({f"cache_{i}": held[f"cache_{i}"] for i in range(len(held.files))})
    return given


def write_cache(model: torch.nn.Module, folder: Path) -> None:
    """The keys and values of 256 tokens."""
    import torch

    cos, sin = (torch.from_numpy(a) for a in angles(range(PAST)))
    with torch.no_grad():
        _, *made = model(torch.from_numpy(tokens(PAST + 1)[:, :PAST]), cos, sin)
    np.savez(folder / "cache.npz", **{f"cache_{i}": t.numpy() for i, t in enumerate(made)})


def arguments(case: Case, given: dict[str, np.ndarray], dtype: Any = None) -> tuple[torch.Tensor, ...]:
    """Inputs as arguments of the torch module; floats in `dtype`."""
    import torch

    made = (torch.from_numpy(given[name]) for name in given)
    return tuple(t.to(dtype) if dtype is not None and t.is_floating_point() else t for t in made)


def operations(case: Case, layers: int) -> tuple[float, float, int]:
    """Of one call: operations of the linears, of the attention products, and the number of weights of linears.

    A multiplication and an addition are two operations.
    """
    rows = case.batch * case.tokens
    if case.model == "minilm":
        width, hidden, depth = 384, 1536, 6
        weights = depth * (4 * width * width + 2 * width * hidden)
        attention = depth * 4.0 * case.batch * case.tokens**2 * width
        return 2.0 * rows * weights, attention, weights
    block = WIDTH * (2 * HEADS + 2 * KEYS) * SIZE + 3 * WIDTH * HIDDEN
    head = WIDTH * VOCABULARY
    attention = layers * 4.0 * case.tokens * (case.tokens + case.past) * HEADS * SIZE
    return 2.0 * (rows * layers * block + head), attention, layers * block + head
