"""What the backend gives to Inductor: an emitted module whose constants are inputs.

Inductor keys its cache on disk by the code of a graph and the shapes of its inputs. A constant that stands in the graph
may be baked into what is cached, and another process with other weights of the same shapes then reads the wrong ones.
Here no number of a weight ever stands in the graph: constants come in as arguments. What no pass has changed (a bias,
the gain of a norm) is not copied either: it is the tensor of the user's module, as it comes in with each call.

Two sets of weights whose emitted modules have the same `key` run the same compiled code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx

from planish.capture.from_dynamo import Captured
from planish.codegen import torch_functions
from planish.ir.errors import PlanishError

_POOL: WeakValueDictionary[Any, torch.Tensor] = WeakValueDictionary()  # constants that several graphs hold, by content
_CHECKS = (torch_functions.check_input, torch_functions.check_argument)


@dataclass(frozen=True, eq=False)
class Lifted:
    """An emitted module with its constants as arguments: first `own`, then those at `read`, then those at `given`.

    Attributes:
        module: the graph.
        own: the tensors that passes made.
        read: the placeholders of Dynamo's graph that hold constants which no pass changed.
        given: the placeholders of the graph's inputs.
        numbers: the results that are sizes, which torch.compile expects as ints.
        key: equal for two modules that differ in the numbers of their constants only.
    """

    module: fx.GraphModule
    own: tuple[torch.Tensor, ...]
    read: tuple[int, ...]
    given: tuple[int, ...]
    numbers: tuple[int, ...]
    key: Any


@dataclass(frozen=True, eq=False)
class Code:
    """Compiled code and how it is called.

    Attributes:
        run: takes the constants and inputs in the order of `Lifted`.
        arguments: the placeholders of Dynamo's graph that are handed on.
        numbers: as in `Lifted`.
    """

    run: Callable[..., Any]
    arguments: tuple[int, ...]
    numbers: tuple[int, ...]

    def __call__(self, own: Sequence[torch.Tensor], inputs: Sequence[Any]) -> Any:
        if torch.is_grad_enabled():  # nothing here takes a gradient: see `backend`
            with torch.no_grad():
                made = self.run(*own, *[inputs[i] for i in self.arguments])
        else:
            made = self.run(*own, *[inputs[i] for i in self.arguments])
        if not self.numbers:
            return made
        return tuple(int(v) if i in self.numbers else v for i, v in enumerate(made))


def lift(emitted: fx.GraphModule, captured: Captured, inputs: Sequence[Any], numbers: Sequence[int] = ()) -> Lifted:
    """Make the constants of an emitted module its arguments.

    Args:
        emitted: as `to_torch` or `torch_regions.emit` make it; not used afterwards.
        captured: what was captured, for the places of inputs and constants.
        inputs: the tensors with which it was captured, one for each placeholder of Dynamo's graph.
        numbers: the results that are sizes.
    """
    held = [(index, inputs[index]) for index in captured.held.values()]
    graph, made = fx.Graph(), dict[fx.Node, Any]()
    places: dict[str, fx.Node] = {}
    own: dict[str, torch.Tensor] = {}
    read: dict[str, int] = {}
    for target in dict.fromkeys(str(n.target) for n in emitted.graph.nodes if n.op == "get_attr"):
        tensor = _attribute(emitted, target)
        if any(_is_like(n) for n in emitted.graph.nodes if n.op == "get_attr" and n.target == target):
            continue
        index = _same(tensor, held)
        if index is None:
            own[target] = _pooled(tensor)
        else:
            read[target] = index
    for number, target in enumerate(own):
        places[target] = graph.placeholder(f"own_{number}")
    for target in read:
        places.setdefault(target, graph.placeholder(f"read_{len(places)}"))
    placeholders = [n for n in emitted.graph.nodes if n.op == "placeholder"]
    if len(placeholders) != len(captured.given):
        raise PlanishError(f"emission: takes {len(placeholders)} inputs; expected {len(captured.given)}")
    for number, node in enumerate(placeholders):
        made[node] = graph.placeholder(f"input_{number}")
    for node in emitted.graph.nodes:
        if node.op == "placeholder" or node.target in _CHECKS:
            continue  # Dynamo's guards hold: the checks of `to_torch` say nothing new
        if node.op == "get_attr":
            tensor = _attribute(emitted, str(node.target))
            made[node] = places.get(str(node.target), tensor)
        elif node.op == "call_function" and node.target is getattr and isinstance(made[node.args[0]], torch.Tensor):
            made[node] = getattr(made[node.args[0]], node.args[1])
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda n: _given_out(graph, made[n])))
        else:
            made[node] = graph.node_copy(node, lambda n: made[n])
    graph.eliminate_dead_code()
    graph.lint()
    module = fx.GraphModule(torch.nn.Module(), graph)
    shapes = tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in own.values())
    arguments = (tuple(read.values()), captured.given, tuple(numbers))
    return Lifted(module, tuple(own.values()), *arguments, (module.code, shapes, arguments))


def compiled(lifted: Lifted, compiler: Callable[..., Any], fakes: Sequence[Any]) -> Code:
    """Compile a lifted module while Dynamo compiles, with the sizes that it left open.

    Args:
        compiler: takes a graph and example inputs.
        fakes: what stands for each placeholder of Dynamo's graph in its trace.
    """
    mode = torch._guards.detect_fake_mode()
    arguments = (*lifted.read, *lifted.given)
    own = [mode.from_tensor(t, static_shapes=True) if mode is not None else t for t in lifted.own]
    devices = {t.device.type for t in lifted.own}
    with torch.no_grad(), _without_autocast(devices):
        run = compiler(lifted.module, [*own, *[fakes[i] for i in arguments]])
    return Code(run, arguments, lifted.numbers)


def compiled_later(lifted: Lifted, backend: Any) -> Code:
    """Code for a lifted module that is compiled when it is first called, with guards of its own."""
    run = torch.compile(lifted.module, backend=backend)
    return Code(run, (*lifted.read, *lifted.given), lifted.numbers)


class _without_autocast:
    """Casts that autocast makes stand in the graph already."""

    def __init__(self, devices: set[str]) -> None:
        self.contexts = [torch.autocast(d, enabled=False) for d in sorted(devices) if torch.is_autocast_enabled(d)]

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)


def _attribute(module: fx.GraphModule, target: str) -> torch.Tensor:
    path, _, leaf = target.rpartition(".")
    found = getattr(module.get_submodule(path), leaf)
    if not isinstance(found, torch.Tensor):
        raise PlanishError(f"emission: '{target}' is a {type(found).__name__}; expected a tensor")
    return found.detach()


def _given_out(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A result; a copy of a constant, which the user may write to."""
    own = node.op == "placeholder" and str(node.target).startswith("own_")
    return graph.call_method("clone", (node,)) if own else node


def _is_like(node: fx.Node) -> bool:
    """True for a buffer of which only the dtype or the device is read."""
    return all(user.target is getattr for user in node.users)


def _same(tensor: torch.Tensor, held: Sequence[tuple[int, torch.Tensor]]) -> int | None:
    """The placeholder whose tensor is this one: nothing was changed."""
    for index, other in held:
        alike = other.dtype == tensor.dtype and other.shape == tensor.shape and other.device == tensor.device
        if alike and other.stride() == tensor.stride() and tensor.numel() and torch.equal(tensor, other.detach()):
            return index
    return None


def _pooled(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or one of the same content that another graph holds already."""
    flat = tensor.contiguous().reshape(-1)
    data = flat.view(torch.uint8).cpu().numpy().data if flat.numel() else b""
    digest = hashlib.blake2b(data, digest_size=20).digest()
    key = (digest, tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device))
    return _POOL.setdefault(key, tensor)


def results(outputs: Mapping[Any, Any] | Sequence[Any]) -> tuple[int, ...]:
    """Which of the results of Dynamo's graph are sizes."""
    values = [n.meta.get("example_value") if isinstance(n, fx.Node) else None for n in outputs]
    return tuple(i for i, value in enumerate(values) if isinstance(value, torch.SymInt | int))
