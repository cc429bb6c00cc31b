"""Capture a PyTorch model, and look at what may be transformed in it free of cost.

    python examples/inspect_a_torch_model.py
    planish inspect examples/inspect_a_torch_model.py:build

The model is written here in plain torch, so nothing is downloaded: two blocks of a decoder. Planish knows none
of its classes: it reads the operations that torch.export records.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn

import planish

ACTS = ("permute", "scale", "shift", "rotate", "linear")
VOCABULARY, WIDTH, HEADS, HIDDEN = 100, 32, 4, 64


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = Norm(), Norm()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))
        y = self.norm_2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = Norm()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(self.norm(x))}


def build() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model, and the inputs that it is captured on."""
    generator = torch.Generator().manual_seed(0)
    model = Decoder()
    for name, parameter in model.named_parameters():
        gain = "norm" in name
        nn.init.normal_(parameter, mean=float(gain), std=0.1 if gain else 0.2, generator=generator)
    return model, {"ids": torch.randint(VOCABULARY, (2, 12), generator=generator)}


def main() -> None:
    model, inputs = build()
    graph = planish.capture(model, inputs)
    opaque = sum(node.op.opaque for node in graph.nodes)
    print(f"captured {len(graph)} operations, {opaque} of them opaque")
    with torch.no_grad():
        expected = model(**inputs)["logits"]
    print(f"largest difference: {(planish.evaluate(graph, inputs)['logits'] - expected).abs().max():.1e}")

    # The raising passes find norms and attention; what may then be transformed stands in a table.
    graph, _ = planish.Pipeline("raise").run(graph)
    print(f"raised: {' '.join(sorted({node.op.name for node in graph.nodes}))}")
    rows = planish.inspect(graph).rows
    kinds = Counter((row.size, tuple(act for act in ACTS if act not in row.blockers)) for row in rows)
    for (size, acts), count in kinds.most_common():
        print(f"  {count} spaces of {size} channels: {', '.join(acts) or 'nothing'}")


if __name__ == "__main__":
    main()
