"""Quantise inside torch.compile: what the backend does by itself, with statistics, and when weights change.

    python examples/torch_compile.py

The model is written here, so nothing is downloaded: a layer of an encoder whose norms have a few channels that are far
larger than the rest, as trained ones have. Needs no GPU; on the CPU the quantised linears run in C++ that is compiled
for the machine (g++), without a compiler in the same arithmetic by torch.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

import planish

WIDTH, HEADS, TOKENS = 64, 4, 32
LOUD = [3, 17, 30]


class Layer(nn.Module):
    """x + attention(norm x), then + mlp(norm x)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def fill(self, generator: torch.Generator) -> Layer:
        """Weights as trained models have them: outliers in the norms, which the weights behind make up for."""
        for linear in (self.q, self.k, self.v, self.o, self.up, self.down):
            linear.weight.data = torch.randn(linear.weight.shape, generator=generator) / linear.in_features**0.5
        for norm in (self.norm1, self.norm2):
            norm.weight.data[LOUD] = 20.0
        for linear in (self.q, self.k, self.v, self.up):
            linear.weight.data[:, LOUD] /= 20.0
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        heads = [f(normed).view(*x.shape[:2], HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v)]
        mixed = functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(x.shape)
        x = x + self.o(mixed)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of what was expected."""
    return float((got - expected).norm() / expected.norm())


@torch.no_grad()
def main() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Layer().fill(generator).eval().requires_grad_(False)
    x = torch.randn(2, TOKENS, WIDTH, generator=generator)

    # The name is enough: int8 weights, int8 activations with a range for each row taken at run time.
    compiled = torch.compile(layer, backend="planish")
    print(f"without statistics:   relative error {error(compiled(x), layer(x)):.1e}")

    # A few batches in float, and the next call compiles with what was seen: outliers are scaled away first.
    with planish.calibrating(compiled):
        for _ in range(4):
            compiled(torch.randn(2, TOKENS, WIDTH, generator=generator))
    print(f"with statistics:      relative error {error(compiled(x), layer(x)):.1e}")

    # Weights were folded into codes and scales; when they change, they are folded again, and nothing is recompiled.
    layer.down.weight.mul_(-1.0)
    print(f"weights were changed: relative error {error(compiled(x), layer(x)):.1e}")

    # Another recipe, by name or as a pipeline. `strict` makes an error of what would stay in float.
    options = {"recipe": "raise,quantize{weights=int4:g32}", "strict": True}
    small = torch.compile(layer, backend="planish", options=options)
    print(f"4-bit weights:        relative error {error(small(x), layer(x)):.1e}")


if __name__ == "__main__":
    main()
