"""Tiny random models of many architectures, built from config classes alone: nothing is downloaded.

    module, inputs = build("llama", seed=0)

Every model gets planted weights (`plant`): all-ones gains, zero biases and fresh running statistics hide
errors. The tables stand in `zoo_transformers` (decoders, encoders, vision, state-space), `zoo_vision`
(diffusers, torchvision) and `zoo_written` (plain torch, written by hand).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Inputs = dict[str, Any]
Build = Callable[[], "tuple[torch.nn.Module, Callable[[torch.Generator], Inputs]]"]


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        name: its name in the table.
        kind: decoder, encoder, encoder-decoder, vision, state-space, diffusion, conv, written.
        make: builds the module with its first weights, and the function that draws inputs from a generator.
        architecture: False for a second spelling of one that is counted already (another attention, say).
    """

    name: str
    kind: str
    make: Build
    architecture: bool = True


def entries() -> dict[str, Entry]:
    """Every model of the zoo, by name, in the order of the table."""
    import zoo_transformers
    import zoo_vision
    import zoo_written

    found = [*zoo_transformers.entries(), *zoo_vision.entries(), *zoo_written.entries()]
    assert len({e.name for e in found}) == len(found)
    return {e.name: e for e in found}


def build(name: str, seed: int = 0) -> tuple[torch.nn.Module, Inputs]:
    """A planted module in eval mode, and keyword arguments for its forward.

    Args:
        name: of an entry.
        seed: of the weights and of the inputs.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = torch.random.get_rng_state()
        torch.random.manual_seed(seed)  # the first weights; put back below
        try:
            module, draw = entries()[name].make()
        finally:
            torch.random.set_rng_state(state)
    module.eval().requires_grad_(False)
    plant(module, seed)
    return module, draw(torch.Generator().manual_seed(seed + 1))


def more_inputs(name: str, seed: int, count: int) -> list[Inputs]:
    """Further inputs of a model: for calibration."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, draw = entries()[name].make()
    return [draw(torch.Generator().manual_seed(seed + 100 + i)) for i in range(count)]


def plant(module: torch.nn.Module, seed: int) -> None:
    """Weights under which an error shows, in place.

    Whatever is constant (gains, biases, layer scales, running statistics) gets a spread: a gain of c becomes
    about 1 with factors exp(0.4 n), zeros become 0.3 n, so that `1 + w` gains spread too. Matrices are drawn
    anew with a deviation of 1/sqrt(fan-in), embeddings with 1.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    positions = {id(p) for m in module.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters(False)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            tail = name.rpartition(".")[2]
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.numel() == 0 or not parameter.is_floating_point() or tail == "A_log":
                continue
            if id(parameter) in positions:
                parameter.copy_(noise)
            elif bool((parameter == parameter.flatten()[0]).all()) or tail.endswith("bias") or parameter.ndim < 2:
                zero = tail.endswith("bias") or bool((parameter == 0).all())
                parameter.copy_(0.3 * noise if zero else torch.exp(0.4 * noise))
            else:
                parameter.copy_(
                    noise / math.sqrt(math.prod(parameter.shape[1:] if parameter.ndim != 3 else parameter.shape[-1:]))
                )
        for name, buffer in module.named_buffers():
            noise = torch.randn(buffer.shape, generator=generator)
            if name.endswith("running_mean") or (name.endswith("bias") and bool((buffer == 0).all())):
                buffer.copy_(0.3 * noise)
            elif name.endswith("running_var"):
                buffer.copy_(torch.exp(0.4 * noise))


def float64_outputs(module: torch.nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The outputs of a module run in float64 throughout: casts to narrower floats inside it are left out."""
    import copy

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map

    narrow = (torch.float32, torch.float16, torch.bfloat16)

    def wide(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.double() if value.dtype in narrow else value
        return value

    class Wide(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = {k: torch.float64 if k == "dtype" and v in narrow else v for k, v in (kwargs or {}).items()}
            if not func._schema.is_mutable:  # torch.tensor(2.0, dtype=...) does not pass here
                args, kwargs = tree_map(wide, (args, kwargs))
            if func in (torch.ops.aten._softmax.default, torch.ops.aten._log_softmax.default):
                args = (*args[:2], False)
            return func(*args, **kwargs)

    module = copy.deepcopy(module).double()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), Wide():
            return module(**{k: wide(v) for k, v in inputs.items()})
    finally:
        torch.set_default_dtype(before)


def largest_difference(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """max |a - b| / max |b| over pairs of outputs; infinite where their number or shapes differ."""
    import torch

    if len(got) < len(expected):
        return float("inf")
    worst = 0.0
    for a, b in zip(got, expected, strict=False):
        if a.shape != b.shape or not bool(torch.equal(torch.isfinite(a), torch.isfinite(b))):
            return float("inf")
        kept = torch.isfinite(b)
        if bool(kept.any()):
            difference = (a[kept].double() - b[kept].double()).abs().max()
            worst = max(worst, float(difference / (b[kept].double().abs().max() + 1e-300)))
    return worst
