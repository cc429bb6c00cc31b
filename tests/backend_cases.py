"""Small models for the tests of the torch.compile backend, and the reference that they are compared with."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import planish
from planish.integrate import backend as backend_module
from planish.integrate.backend_options import read_options, uncalibrated
from planish.ir.probe import relative_error

EAGER = {"inner": "eager", "target": "aten", "strict": True, "cache": False}
W8A8 = "raise,quantize{activations=int8:token}"


def filled(module: nn.Module, seed: int) -> nn.Module:
    """The module in evaluation mode, with numbers of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return module.eval()


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """A feed-forward part with a norm and a residual."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Several blocks."""

    def __init__(self, depth: int = 3, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def reference(
    module: nn.Module, *args: Any, pipeline: str = W8A8, stats: planish.Stats | None = None, **kwargs: Any
) -> Any:
    """What the quantised graph of the module computes, uncompiled."""
    with torch.no_grad():
        graph = planish.capture(module, (args, kwargs))
        after, _ = planish.Pipeline(pipeline).run(graph, stats=stats, validate=False)
        assert any("dequantize" in n.op.name for n in after.nodes)
        return planish.to_torch(after)(*args, **kwargs)


def close(found: Any, expected: Any, tolerance: float) -> None:
    assert isinstance(found, torch.Tensor) and found.shape == expected.shape and found.dtype == expected.dtype
    assert (error := relative_error(found.detach(), expected.detach())) <= tolerance, error


def compiled(module: Any, **options: Any) -> Any:
    return torch.compile(module, backend="planish", options={**EAGER, **options})


def text_of(recipe: str) -> str:
    """The pipeline of a recipe without calibration."""
    return str(uncalibrated(read_options({"recipe": recipe}).pipeline)[0])


def live() -> list[Any]:
    """The graphs that the backend rewrote and that still exist."""
    return list(backend_module._live)


@contextmanager
def fresh() -> Iterator[None]:
    """Nothing compiled, nothing said."""
    torch._dynamo.reset()
    gc.collect()
    backend_module._live.clear()
    torch._dynamo.utils.counters.clear()
    backend_module._warned.clear()
    try:
        yield
    finally:
        torch._dynamo.reset()


@contextmanager
def fresh_warnings(caught: list[Any]) -> Iterator[None]:
    """Collect the warnings of the block."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    caught.extend(found)
