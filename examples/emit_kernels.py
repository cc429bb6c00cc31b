"""Triton kernels of a quantised model, as files that stand alone.

    python examples/emit_kernels.py [FOLDER]

The model is made here: a decoder block with a gated MLP, quantised to 4-bit weights in groups of 32 and int8
activations with one range for each row. It is cut into regions; each region that is a kernel becomes one Python file,
which needs torch and triton only. Then the files are run in Triton's interpreter, on the CPU: each compares itself with
its eager reference, and the whole model with its graph in the evaluator. Nothing here is timed on a GPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import planish

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

WIDTH, HIDDEN, TOKENS = 128, 320, 8
W4A8 = "raise,quantize{weights=uint4:g32 activations=int8:token}"


class Mlp(nn.Module):
    """x + down(silu(gate(norm x)) * up(norm x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


def main(folder: Path) -> None:
    from planish.codegen.select import select
    from planish.codegen.triton import emit_plan, load_file
    from planish.codegen.triton_run import run

    generator = torch.Generator().manual_seed(0)
    model = Mlp().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
    x = torch.randn(2, TOKENS, WIDTH, generator=generator)
    graph, _ = planish.Pipeline(W4A8).run(planish.capture(model, (x,)))

    plan = select(graph)
    files = emit_plan(plan, folder)
    print((folder / "plan.txt").read_text(), end="")
    for file in files:
        print(f"{file.name}.py:", end=" ")
        load_file(folder / f"{file.name}.py").main()  # as `python FILE` does

    (name,) = (value.name for value in graph.inputs)
    inputs = {name: x}
    ((output, expected),) = planish.evaluate(graph, inputs).items()
    made = run(plan, inputs, "f32")[output]
    error = float((made - expected).abs().max() / expected.abs().max())
    # 1e-6 by itself; a value on a border between two codes may be rounded to the other one, which is a step of it
    print(f"the kernels in float32 against the graph: relative error below 1e-2: {error < 1e-2}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
