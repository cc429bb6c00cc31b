"""Each op of a compiled graph beside the evaluator, both on what the ops before it gave.

Where activations are quantised, what two sums in another order differ by (1e-7) decides a few of thousands of roundings
the other way, and each of those moves a value by a whole step: behind some layers two right programs are as far from
each other as from float. So ops are compared one by one, and the evaluator takes over what each of them made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import fx

    from planish.codegen.regions import Plan, Region
    from planish.ir.graph import Node, Value


@dataclass
class Ops:
    """What the ops of some graphs differ by from the evaluator.

    Attributes:
        kernels, attentions: how many were compared.
        floats: the largest difference of a kernel's floats, relative to the largest of its row.
        attention: the largest difference of attention's results, over the bound of `attention_bound`.
        codes, differing: codes of activations, and how many of them differ.
        far: the largest difference of two codes.
    """

    kernels: int = 0
    attentions: int = 0
    floats: float = 0.0
    attention: float = 0.0
    codes: int = 0
    differing: int = 0
    far: int = 0

    @property
    def share(self) -> float:
        """Of codes that differ."""
        return self.differing / max(self.codes, 1)

    def add(self, plan: Plan, module: fx.GraphModule, given: Mapping[str, Any]) -> None:
        """Compare every kernel of an emitted module.

        Args:
            plan: what the module was emitted from.
            given: the inputs by name.
        """
        import torch

        from planish.ir.evaluator import bind_inputs, evaluate_nodes
        from planish.ir.ops.base import Wide

        found = _recorded(module, [given[v.name] for v in plan.graph.inputs])
        wide = Wide(torch.float32)
        environment: dict[Value, Any] = bind_inputs(plan.graph, given, wide)
        for region in plan.regions:
            held = found.get(region.name) if region.kernel is not None else None
            for nodes in [region.nodes] if held is not None else [[node] for node in region.nodes]:
                before = {v: environment[v] for n in nodes for v in n.operands if v in environment}
                wanted = region.outputs if held is not None else nodes[0].results
                environment |= evaluate_nodes(nodes, before, wanted, wide)
                if held is None and nodes[0].op.name == "attention":
                    self._attention(nodes[0], environment, found, plan)
            if held is not None:
                self._kernel(region, held, environment)

    def _kernel(self, region: Region, held: Any, environment: dict[Value, Any]) -> None:
        self.kernels += 1
        assert region.kernel is not None
        names = [t.name for t in region.kernel.tensors if t.role == "output"]
        for name, result in zip(names, held if isinstance(held, tuple) else (held,), strict=True):
            value = region.bound[name].value
            assert value is not None
            if value not in environment:
                continue
            expected = environment[value]
            left = environment[value] = region.bound[name].leave(result, tuple(expected.shape), expected.dtype)
            if expected.is_floating_point():
                self.floats = max(self.floats, _difference(left, expected))
            else:
                apart = (left.int() - expected.int()).abs()
                self.codes += apart.numel()
                self.differing += int((apart > 0).sum())
                self.far = max(self.far, int(apart.max()))

    def _attention(self, node: Node, environment: dict[Value, Any], found: Mapping[str, Any], plan: Plan) -> None:
        value = node.result
        made, expected = found.get(value.name), environment[value]
        if not isinstance(made, type(expected)) or made.shape != expected.shape:
            return
        settled = [k.activation is not None and k.activation.kind == "codes" for r in plan.kernels if (k := r.kernel)]
        q, k, v = (environment[operand] for operand in node.operands[:3] if operand is not None)
        bound = attention_bound(q, k, v, node.attributes.get("scale"), half=any(settled))
        self.attentions += 1
        self.attention = max(self.attention, float(((made.double() - expected.double()).abs() / bound).max()))
        environment[value] = made


def attention_bound(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: Any, *, half: bool) -> torch.Tensor:
    """How far attention may be from its value, for each result, as tests/test_cpp_attention.py derives it.

    u = 2^-24 (half: what rounding to bf16 adds, h = 2^-9 each time), D the depth, S the keys:

        score     d = (D + 8) u scale sum |q k|, half: 2 h scale sum |q k|; and 8 u of its size
        weight    relative: w = 2 max d of the row + 32 u, half: 1e-4 + h
        result    max |v| (2 w + S u), half: h more
    """
    u, h = 2.0**-24, 2.0**-9 if half else 0.0
    share = q.shape[1] // k.shape[1]
    k, v = (t.double().abs().repeat_interleave(share, 1) for t in (k, v))
    size = (q.double().abs() @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else float(scale))
    score = ((q.shape[-1] + 16) * u + 2 * h) * size + 64 * u
    weight = 2 * score.amax(-1, keepdim=True) + 32 * u + (1e-4 + h if half else 0.0)
    bound: torch.Tensor = v.amax(-2, keepdim=True) * (2 * weight + k.shape[-2] * u + h)
    return bound


def _difference(made: torch.Tensor, expected: torch.Tensor) -> float:
    size = expected.double().abs().amax(-1, keepdim=True) if expected.ndim else expected.double().abs()
    return float(((made.double() - expected.double()).abs() / (size + 1e-30)).max())


def _recorded(module: fx.GraphModule, given: Sequence[Any]) -> dict[str, Any]:
    """What each node of a module gives, by its name."""
    import torch

    found: dict[str, Any] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n.name] = super().run_node(n)
            return found[n.name]

    with torch.no_grad():
        Recorder(module).run(*given)
    return found


class Evaluated:
    """A backend of torch.compile that evaluates each graph as the passes of the backend `planish` leave it.

    Args:
        options: of the backend.
        compared: whether the first call of each graph compares every op (`ops`).

    Attributes:
        graphs: how many were quantised.
    """

    def __init__(self, options: Mapping[str, Any], compared: bool = False) -> None:
        from planish.integrate.backend_options import read_options

        self.options = read_options(options)
        self.compared = compared
        self.ops = Ops()
        self.graphs = 0
        self.__name__ = "evaluated"

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The graph in the evaluator; as it is, where nothing can be quantised."""
        import torch

        from planish.capture.from_dynamo import DynamoGraph
        from planish.codegen.select import select
        from planish.codegen.torch_regions import emit, options_for
        from planish.integrate.backend_passes import Float, quantised
        from planish.ir.evaluator import Evaluator

        dynamo = DynamoGraph(module, inputs)
        captured = dynamo.capture(inputs, guard=False)
        try:
            with torch.no_grad():
                graph = quantised(captured, self.options, [inputs[i] for i in dynamo.held], print, keep=True)
        except Float:
            return module.forward
        self.graphs += 1
        evaluator = Evaluator(graph, torch.float32)
        plans = [select(graph, options_for("cpu"))] if self.compared else []

        def run(*given: Any) -> Any:
            named = {n: torch.as_tensor(given[i]) for n, i in zip(captured.inputs, captured.given, strict=True)}
            if plans:
                plan = plans.pop()
                self.ops.add(plan, emit(plan), {n: t.clone() for n, t in named.items()})
            with torch.no_grad():
                made = evaluator.run(named)
            return tuple(made[name] for name, _ in graph.outputs)

        return run
