"""Four bits for weights and activations with SVDQuant, and a LoRA that needs no requantising.

    python examples/svdquant_with_lora.py

The model is made here: two transformer layers whose norms have a few channels that are far larger than the rest, as
trained ones have. Rounded to int4 as it is, it is hardly the same model. With a float branch of rank 8 beside each
linear, which takes the directions that round worst, it is. A user's LoRA then goes into that branch: the integer
weights stay as they are, byte for byte.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import planish

WIDTH, HEADS, TOKENS, RANK = 64, 4, 16, 8
LOUD = [3, 17, 30]
INT4 = "quantize{weights=int4:g32 activations=int4:g32 solver=gptq}"
SVDQUANT = f"extract-low-rank{{rank={RANK} weights=int4:g32 activations=int4:g32}},{INT4}"


class Layer(nn.Module):
    """x + attention(norm x), then + mlp(norm x)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def fill(self, generator: torch.Generator) -> Layer:
        """Weights as trained models have them: outliers in the norms, which the weights behind make up for."""
        for linear in (self.q, self.k, self.v, self.o, self.up, self.down):
            linear.weight.data = torch.randn(linear.weight.shape, generator=generator) / 2 / linear.in_features**0.5
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


def make_lora(model: nn.Module, generator: torch.Generator) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A [4, inputs] and B [outputs, 4] for queries and values of every layer, by module path."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith((".q", ".v")) and isinstance(module, nn.Linear):
            a, b = (torch.randn(shape, generator=generator) for shape in ((4, WIDTH), (WIDTH, 4)))
            found[name] = (a / WIDTH**0.5, b / 2)
    return found


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(Layer().fill(generator), Layer().fill(generator)).eval()
    batches = [torch.randn(8, TOKENS, WIDTH, generator=generator) for _ in range(5)]
    graph, _ = planish.Pipeline("raise").run(planish.capture(model, (batches[0],)))
    name, output = graph.inputs[0].name, graph.outputs[0][0]
    stats = planish.collect(graph, [{name: batch} for batch in batches[:4]])
    inputs = {name: batches[4]}  # held out

    # Without and with the branch.
    expected = model(batches[4]).detach()
    made = {}
    for label, pipeline in {"int4 alone": INT4, "SVDQuant": SVDQUANT}.items():
        made[label], report = planish.Pipeline(pipeline).run(graph, stats=stats)
        error = relative_error(planish.evaluate(made[label], inputs)[output], expected)
        print(f"{label}: relative error {error:.4f}")
    for line in report["extract-low-rank"].applied:
        print(f"  {line}")

    # A LoRA, by module path. No weight is touched, nothing is calibrated again.
    lora = make_lora(model, generator)
    adapted = planish.add_lora(made["SVDQuant"], lora, strength=0.1)
    codes = {v.name: v.constant.array() for v in made["SVDQuant"].constants if v.dtype == "i4"}
    assert codes and all(np.array_equal(adapted.values[n].constant.array(), data) for n, data in codes.items())
    with torch.no_grad():  # the same in float: merged into the weights
        for path, (a, b) in lora.items():
            model.get_submodule(path).weight += 0.1 * b @ a
        merged = model(batches[4])
    print(f"with the LoRA: the float model moves by {relative_error(merged, expected):.4f}")
    print(f"  quantised, without it: {relative_error(planish.evaluate(made['SVDQuant'], inputs)[output], merged):.4f}")
    print(f"  quantised, with it:    {relative_error(planish.evaluate(adapted, inputs)[output], merged):.4f}")
    print(f"  {len(codes)} weights of int4 are the same bytes; the branches have rank {RANK} + 4 a linear")


if __name__ == "__main__":
    main()
