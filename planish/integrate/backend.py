"""The backend of torch.compile: quantise what Dynamo captured, hand the rest to Inductor.

    torch.compile(model, backend="planish")
    torch.compile(model, backend="planish", options={"recipe": "w4a16", "calibration": "statistics.safetensors"})

Options (all others are Inductor's own, as is `mode=`):

    recipe       a name, a YAML file or the text of a pipeline; w8a8-token by default
    calibration  statistics or the file that they were saved to (`planish.calibrating`)
    target       auto: kernels of the device the weights are on (the default); aten: ATen ops only
    validate     check every exact pass in float64 (default False: the tests of planish do)
    strict       raise where the backend would fall back to float
    seed         of every random choice
    cache        keep on disk what the passes make, where they took long (default True)
    inner        what compiles the rewritten graph: a backend of torch.compile; inductor by default

A graph is captured, rewritten by the recipe's passes and emitted with its constants as inputs
(`planish.integrate.backend_code`). The constants are kept by the identity and version of the weights that they were
made of (`planish.integrate.backend_folds`) and made anew when those change: by the same passes, and run by the same
code if it comes out the same. A graph in which nothing can be quantised is compiled by Inductor as if planish were not
there, with one warning that says why. That is so too where an output takes a gradient: planish trains nothing.
"""

from __future__ import annotations

import subprocess
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis, SkipFrame

from planish.capture.from_dynamo import Captured, DynamoGraph
from planish.codegen.torch import to_torch
from planish.integrate import backend_ahead
from planish.integrate.backend_code import Code, Lifted, compiled, compiled_later, lift, results
from planish.integrate.backend_folds import Fold, Folds, counts_versions
from planish.integrate.backend_options import BackendOptions, read_options
from planish.integrate.backend_passes import Float, Uncalibrated, quantised
from planish.ir.errors import FOREIGN, PlanishError
from planish.passes.threads import each_by_one, team

__all__ = ["backend"]

FAILURES = (PlanishError, *FOREIGN, OSError, MemoryError, subprocess.SubprocessError)
# Dynamo guards the inputs, `Folds` the constants, a kernel checks what it is given: Inductor need not at each call.
UNCHECKED = {"size_asserts": False, "alignment_asserts": False}
SMALL = 1 << 25  # elements of weights for which torch's threads cost the passes more than they bring
RESTLESS = 3  # calls in a row that find a buffer changed, after which it is an input

_warned: set[str] = set()
_live: weakref.WeakSet[Rewritten] = weakref.WeakSet()


def backend(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph of Dynamo's.

    Args:
        module: the graph.
        inputs: one for each placeholder.
        mode, options: of torch.compile; see the module's docstring.

    Raises:
        PlanishError: a bad option; with `strict`, a graph that would stay in float.
    """
    chosen = read_options(options, mode)
    rewritten: Rewritten | None = None
    try:
        rewritten = Rewritten(module, inputs, chosen, _inner(chosen, UNCHECKED))
        rewritten.start(inputs)
        return rewritten
    except (RestartAnalysis, SkipFrame):
        raise  # Dynamo's own
    except Uncalibrated as error:
        _give_up(chosen, error)
        assert rewritten is not None
        rewritten.wait(inputs)
        return rewritten
    except (Float, *FAILURES) as error:
        _give_up(chosen, error)
    return _inner(chosen)(module, inputs)


def recalibrated(weights: Sequence[torch.Tensor]) -> None:
    """Forget what was folded of these weights: there are new statistics of them."""
    known = {id(weight) for weight in weights}
    for rewritten in list(_live):
        rewritten.folds.drop(known)


def _inner(options: BackendOptions, more: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """What compiles graphs: Inductor as torch.compile sets it up, or another backend.

    Args:
        more: options of Inductor that are not the user's; his own come first.
    """
    if options.inner == "inductor":
        return torch._TorchCompileInductorWrapper(options.mode, {**(more or {}), **options.inductor}, None)
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(options.inner)


def _give_up(options: BackendOptions, error: BaseException) -> None:
    """Say once why a graph stays in float.

    Raises:
        PlanishError: with `strict`.
    """
    reason = str(error) if isinstance(error, Float | PlanishError) else f"{type(error).__name__}: {error}"
    if not reason:
        return
    if options.strict:
        if isinstance(error, PlanishError):
            raise error
        raise PlanishError(f"backend planish: {reason}") from (None if isinstance(error, Float) else error)
    warn(f"backend planish: a graph stays in float: {reason}")


def warn(text: str) -> None:
    """Warn, once in a process."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=2)


class Rewritten:
    """A quantised graph that Dynamo calls with its placeholders' values.

    Args:
        module: Dynamo's graph; not changed.
        inputs: one for each placeholder.
        options: what was asked for.
        compiler: of the emitted graph.

    Attributes:
        folds: the constants, by the weights that they were made of.
        codes: the compiled code, by the structure of the emitted module.
    """

    def __init__(
        self, module: fx.GraphModule, inputs: Sequence[Any], options: BackendOptions, compiler: Callable[..., Any]
    ) -> None:
        _check(module)
        self.module = module
        self.options = options
        self.compiler = compiler
        self.dynamo = DynamoGraph(module, inputs)
        self.folds = Folds()
        self.codes: dict[Any, Code] = {}
        self.captured: Captured | None = None  # without weights
        self.unfolded: Callable[..., Any] = module.forward  # what runs where the weights cannot be folded
        _live.add(self)

    def start(self, inputs: Sequence[Any]) -> None:
        """Compile for the weights that Dynamo has seen.

        Raises:
            Float, PlanishError: nothing can be quantised.
        """
        if self.options.inner == "inductor" and any(inputs[i].device.type == "cpu" for i in self.dynamo.held):
            backend_ahead.begin(self.options.inductor)
        lifted, held = self._rewritten(inputs, guard=True)
        code = self.codes[lifted.key] = compiled(lifted, self.compiler, self.dynamo.fakes)
        self.folds.add(inputs, held, lifted.own, code)

    def wait(self, inputs: Sequence[Any]) -> None:
        """Run in float until there are statistics."""
        copied = fx.Graph()
        copied.output(copied.graph_copy(self.module.graph, {}))
        self.unfolded = self.compiler(fx.GraphModule(self.module, copied), inputs)
        self.folds.add(inputs, self.dynamo.held, (), None)

    def __call__(self, *inputs: Any) -> Any:
        fold = self.folds.find(inputs, self.dynamo.held)
        if fold is None:
            with self.folds.lock:
                fold = self.folds.find(inputs, self.dynamo.held) or self._fold(inputs)
        if fold.code is None:
            return self.unfolded(*inputs)
        return fold.code(fold.own, inputs)

    def _fold(self, inputs: Sequence[Any]) -> Fold:
        """Make the constants for weights that are new, or have changed."""
        changes = self._loosen(inputs)
        try:
            lifted, held = self._rewritten(inputs, guard=False)
            if lifted.key not in self.codes:
                self.codes[lifted.key] = compiled_later(lifted, self.compiler)
            return self.folds.add(inputs, held, lifted.own, self.codes[lifted.key], changes)
        except (Float, *FAILURES) as error:
            _give_up(self.options, error)
        return self.folds.add(inputs, self.dynamo.held, (), None, changes)

    def _loosen(self, inputs: Sequence[Any]) -> dict[int, int]:
        """Stop folding a buffer that is written to before every call: for how many calls in a row others were."""
        changes = self.folds.changes(inputs, self.dynamo.held)
        loose = [i for i, n in changes.items() if n >= RESTLESS and not isinstance(inputs[i], torch.nn.Parameter)]
        if not loose:
            return changes
        names = ", ".join(self.dynamo.names[i] for i in loose)
        warn(f"backend planish: {names}: changes at every call; it is not folded any longer")
        self.dynamo.release(loose)
        self.captured = None
        self.folds.clear()
        return {}

    def _rewritten(self, inputs: Sequence[Any], *, guard: bool) -> tuple[Lifted, tuple[int, ...]]:
        """The emitted module for these weights, and the placeholders whose tensors it was made of.

        Raises:
            Float, PlanishError: nothing can be quantised.
        """
        with torch.no_grad():
            _check_weights({self.dynamo.names[i]: inputs[i] for i in self.dynamo.held})
            captured = self._captured(inputs, guard)
            held = [inputs[i] for i in self.dynamo.held]

            def make(options: BackendOptions) -> fx.GraphModule:
                return self._emitted(quantised(captured, options, held, warn, keep=guard), inputs)

            small = team() > 1 and sum(t.numel() for t in held) <= SMALL and all(t.device.type == "cpu" for t in held)
            emitted = each_by_one(make, [self.options], 1)[0] if small else make(self.options)
            numbers = results(self.module.graph.output_node().args[0])  # type: ignore[arg-type]
            return lift(emitted, captured, inputs, numbers), self.dynamo.held

    def _captured(self, inputs: Sequence[Any], guard: bool) -> Captured:
        """The graph; what a module holds and the graph writes to is an input."""
        captured = None if self.captured is None else self.dynamo.again(self.captured, inputs)
        if captured is not None:
            return captured
        captured = self.dynamo.capture(inputs, guard=guard)
        written = self.dynamo.written(captured)
        if written:
            self.dynamo.release(written)
            captured = self.dynamo.capture(inputs, guard=guard)
        self.captured = self.dynamo.blank(captured)
        return captured

    def _emitted(self, graph: Any, inputs: Sequence[Any]) -> fx.GraphModule:
        if self.options.target == "aten":
            return to_torch(graph)
        from planish.codegen.select import select
        from planish.codegen.torch_chains import chained
        from planish.codegen.torch_regions import emit, options_for

        device = next((inputs[i].device for i in self.dynamo.held), torch.device("cpu"))
        return chained(emit(select(graph, options_for(device)), device=device))


def _check_weights(weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights whose changes go unseen, or that no constant can hold.

    Raises:
        Float: there are some.
    """
    for name, tensor in weights.items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise Float(f"{name} is a {type(tensor).__name__}")
        if not counts_versions(tensor):
            raise Float(f"{name} was made in inference mode and does not say when it changes")
    devices = sorted({str(t.device) for t in weights.values() if t.dim()})
    if len(devices) > 1:
        raise Float(f"its weights are on {' and '.join(devices)}")


def _check(module: fx.GraphModule) -> None:
    """Refuse a graph that takes part in training, or holds nothing to quantise.

    Raises:
        Float: it does.
    """
    outputs: Any = module.graph.output_node().args[0]
    values = [n.meta.get("example_value") for n in outputs if isinstance(n, fx.Node)]
    if any(isinstance(v, torch.Tensor) and v.requires_grad for v in values):
        raise Float("an output takes a gradient (run the model under torch.no_grad() or torch.inference_mode())")
    fakes = [n.meta.get("example_value") for n in module.graph.nodes if n.op == "placeholder"]
    if not any(isinstance(v, torch.Tensor) and v.dim() > 1 and v.is_floating_point() for v in fakes):
        raise Float("")
