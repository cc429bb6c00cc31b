"""Run a plan: kernel regions through their emitted files, the rest in the evaluator.

    run(plan, inputs)                    on the CPU the kernels run in Triton's interpreter, if it is switched on
    Runner(plan, "f16", "cuda").run(x)   weights are packed and moved once

Between regions values are held as the evaluator holds them, floats in the kernel's own dtype or wider: a kernel reads
[M, K] of it, its results go back to the shape of the graph. The evaluator computes in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

import torch

from planish.codegen import triton
from planish.codegen.gemm_parts import launched
from planish.codegen.kernel_spec import Kernel
from planish.codegen.regions import Plan, Region
from planish.ir.errors import PlanishError
from planish.ir.evaluator import bind_inputs, evaluate_nodes
from planish.ir.graph import Value
from planish.ir.ops.base import Wide


def run(
    plan: Plan,
    inputs: Mapping[str, Any],
    dtype: str = "f16",
    device: str | torch.device = "cpu",
    *,
    keep: Collection[str] = (),
) -> dict[str, Any]:
    """The outputs of a plan's graph by name, and the values named in `keep`.

    Args:
        plan: the regions.
        inputs: a tensor for each input of the graph.
        dtype: of floats between kernels: "f16", "bf16" or "f32".
        device: "cpu" needs TRITON_INTERPRET=1 in the environment before Triton is imported.
        keep: names of further values that leave a region.

    Raises:
        PlanishError: inputs that do not fit, or a plan whose regions do not connect.
    """
    return Runner(plan, dtype, device).run(inputs, keep=keep)


class Runner:
    """A plan with its weights in the kernels' layout.

    Attributes:
        launched: how many kernels the last run launched.
    """

    def __init__(self, plan: Plan, dtype: str = "f16", device: str | torch.device = "cpu") -> None:
        self.plan = plan
        self.dtype = dtype
        self.device = torch.device(device)
        self.launched = 0
        self._modules: dict[Kernel, ModuleType] = {}
        for region in plan.kernels:
            if region.kernel is not None:
                self._module(region.kernel)
        self._weights = {
            region.name: {name: held.to(self.device) for name, held in region.bind(dtype).items()}
            for region in plan.kernels
        }

    def run(self, inputs: Mapping[str, Any], *, keep: Collection[str] = ()) -> dict[str, Any]:
        """See `run`."""
        wide = Wide(torch.float32)
        graph = self.plan.graph
        environment = {v: _moved(held, self.device) for v, held in bind_inputs(graph, inputs, wide).items()}
        self.launched = 0
        for region in self.plan.regions:
            if region.kernel is None:
                given = {v: environment[v] for v in region.inputs if v in environment}
                environment |= evaluate_nodes(region.nodes, given, region.outputs, wide)
            else:
                environment |= self._kernel(region, environment, wide)
        values = graph.values
        for name in keep:
            if name not in values or values[name] not in environment:
                raise PlanishError(f"value '{name}': leaves no region of the plan")
        found = evaluate_nodes((), environment, graph.output_values(), wide)
        results = {name: found[value] for name, value in graph.outputs}
        return results | {name: environment[values[name]] for name in keep}

    def _kernel(self, region: Region, environment: Mapping[Value, Any], wide: Wide) -> dict[Value, Any]:
        """The results of a kernel region, in the shapes of the graph."""
        kernel = region.kernel
        assert kernel is not None
        float_ = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[self.dtype]
        arguments = dict(self._weights[region.name])
        given = {v: environment[v] for v in region.inputs if v in environment}
        leads = region.leads(given)
        for tensor in kernel.tensors:
            bound = region.bound[tensor.name]
            if tensor.role == "input":
                assert bound.value is not None
                held = environment[bound.value]
                arguments[tensor.name] = bound.enter(held, float_).to(self.device)
        for part in launched(kernel, _rows(kernel, arguments)):
            self._launch(part, arguments)
        found: dict[Value, Any] = {}
        for tensor in (t for t in kernel.tensors if t.role == "output"):
            held, bound = arguments[tensor.name], region.bound[tensor.name]
            value = bound.value
            assert value is not None
            found[value] = bound.leave(held, (*leads[value], *_columns(value)), _held(value, wide))
        for value, number in region.known.items():
            shape = (*leads[value], *_columns(value))
            found[value] = torch.full(shape, number, dtype=_held(value, wide), device=self.device)
        for value, shown in region.views.items():
            held = found[shown] if shown in found else environment[shown]
            found[value] = held.reshape(*leads[value], *_columns(value))
        return found

    def _module(self, kernel: Kernel) -> ModuleType:
        """The imported file of a kernel."""
        if kernel not in self._modules:
            self._modules[kernel] = triton.load(triton.emit_kernel(kernel, self.dtype))
        return self._modules[kernel]

    def _launch(self, kernel: Kernel, held: dict[str, torch.Tensor]) -> None:
        """Run a kernel on the tensors of its border, and put its results beside them."""
        made = self._module(kernel).op(
            **{t.name: held[t.name] for t in kernel.tensors if t.role in ("input", "weight")}
        )
        names = [t.name for t in kernel.tensors if t.role == "output"]
        held |= dict(zip(names, made if isinstance(made, tuple) else (made,), strict=True))
        self.launched += 1


def _rows(kernel: Kernel, held: Mapping[str, torch.Tensor]) -> int:
    """M: the rows of a kernel's inputs."""
    sizes = (held[t.name].shape[t.shape.index("M")] for t in kernel.tensors if t.role == "input" and "M" in t.shape)
    return next(sizes, 1)


def _held(value: Value, wide: Wide) -> torch.dtype:
    """How the evaluator holds a value that kernels read or write."""
    assert value.dtype is not None
    return wide.of(value.dtype)


def _columns(value: Value) -> tuple[int, ...]:
    """The last dim of a value; () of a scalar."""
    if not value.shape:
        return ()
    last = value.shape[-1]
    if not isinstance(last, int):
        raise PlanishError(f"value '{value.name}': its last dim is no number", where=str(value))
    return (last,)


def _moved(held: Any, device: torch.device) -> Any:
    return held.to(device) if isinstance(held, torch.Tensor) else held
