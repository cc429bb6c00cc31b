"""Models of the zoo written by hand in plain torch: spellings that no library uses any more, or not yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from zoo_models import Entry, Inputs

WIDTH, HIDDEN, EXPERTS, VOCABULARY = 32, 24, 4, 96


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, HIDDEN)
        self.up_proj = nn.Linear(WIDTH, HIDDEN)
        self.down_proj = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class ExpertLoop(nn.Module):
    """Each token goes to its two best experts; a loop over the experts, a mask, and `index_add`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        best, chosen = self.gate(tokens).softmax(-1).topk(2, dim=-1)
        best = best / best.sum(-1, keepdim=True)
        total = torch.zeros_like(tokens)
        every = torch.arange(tokens.shape[0])
        for number, expert in enumerate(self.experts):
            weight = torch.where(chosen == number, best, torch.zeros_like(best)).sum(-1, keepdim=True)
            total = total.index_add(0, every, expert(tokens) * weight)
        return total.reshape(x.shape)


class Attention(nn.Module):
    """Causal attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = (p(x).view(batch, length, 4, 8).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = heads
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(later, float("-inf"))
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, WIDTH))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.self_attn, self.mlp = Attention(), ExpertLoop()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class LoopDecoder(nn.Module):
    """Pre-norm blocks with RMSNorm, attention written out, and the expert loop; one linear for each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class InPlace(nn.Module):
    """In-place arithmetic, views that are written to, and one layer applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).clone()
        h.relu_().mul_(1.5)
        h[:, 0].add_(x[:, 1])
        h[..., : WIDTH // 2] = self.shared(h)[..., WIDTH // 2 :]
        h += self.shared(self.norm(h))
        left, right = self.last(h).unflatten(-1, (2, WIDTH)).unbind(-2)
        return torch.einsum("btc,bsc->bts", left, right)


def _ids(g: torch.Generator) -> Inputs:
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 12), generator=g)}


def _loop() -> tuple[nn.Module, Callable[[torch.Generator], Inputs]]:
    return LoopDecoder(), _ids


def _in_place() -> tuple[nn.Module, Callable[[torch.Generator], Inputs]]:
    return InPlace(), lambda g: {"x": torch.randn(2, 6, WIDTH, generator=g)}


def entries() -> Iterator[Entry]:
    """The models of this file."""
    yield Entry("moe-loop", "written", _loop)
    yield Entry("in-place", "written", _in_place)
