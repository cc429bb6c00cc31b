"""A plan: the nodes of a graph in regions, each of them one kernel or left to torch.

    plan = planish.codegen.select.select(graph)
    for region in plan.regions: ...

Regions stand in an order in which they can run. Every node is in exactly one, but for the decoders (`dequantize` of
a constant and its transpose, `dequantize` of the codes that a kernel reads): each kernel that reads a decoded tensor
decodes it by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from planish.codegen.containers.base import Packed
from planish.codegen.kernel_spec import Kernel, half_of, padded
from planish.ir.graph import Graph, Node, Value

if TYPE_CHECKING:
    import torch

Kind = Literal["prologue", "gemm", "graph"]
Form = Literal["rows", "codes", "scales", "constant", "scratch"]


class Packs:
    """The weights of linears in planish's Triton container, each packed once."""

    def __init__(self) -> None:
        self._known: dict[Node, Packed] = {}

    def of(self, node: Node) -> Packed:
        """The packed weight of a linear.

        Raises:
            PlanishError: the container cannot hold it.
        """
        if node not in self._known:
            from planish.codegen.containers import pack
            from planish.codegen.select_sites import weight_tensor

            self._known[node] = pack(weight_tensor(node), "triton")
        return self._known[node]


@dataclass(frozen=True, eq=False)
class Bound:
    """What a border tensor of a kernel holds.

    Attributes:
        form: how the kernel's tensor follows from a value [.., C] of the graph.
            "rows": [M, C] in the kernel's float dtype. "codes": i8 [M, padded(C) * bits / 8], less `shift`.
            "scales": [M], or [M, C] of groups, less `shift` for zero points; a scalar stays one.
            "constant": made once by `make`; "scratch": zeros.
        value: of the graph: what is read or written; of a constant: what it is made from, if one value.
        bits, shift, signed: of codes; `signed` as they are stored.
        grouped: of scales, one for each group of columns.
        make: of a constant: the array, float64 or integers, in the shape of the spec's tensor.
        how: in words.
    """

    form: Form
    value: Value | None = None
    bits: int = 8
    shift: int = 0
    signed: bool = True
    grouped: bool = False
    make: Callable[[Packs], np.ndarray] | None = None
    how: str = ""

    def enter(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The kernel's tensor from the graph's.

        Args:
            tensor: as the evaluator holds the value, [.., C].
            dtype: the kernel's float dtype.
        """
        import torch

        columns = tensor.shape[-1] if tensor.ndim else 1
        match self.form:
            case "rows":
                return tensor.reshape(-1, columns).to(dtype).contiguous()
            case "codes":
                return pack_codes(tensor.reshape(-1, columns), self.bits, self.shift)
            case _:
                held = tensor.to(torch.float32) if tensor.is_floating_point() else tensor.to(torch.int16) - self.shift
                held = held if tensor.is_floating_point() else held.to(torch.int8)
                if not tensor.ndim:
                    return held
                return held.reshape(-1, columns).contiguous() if self.grouped else held.reshape(-1)

    def leave(self, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The graph's tensor from the kernel's: the inverse of `enter`.

        Args:
            shape, dtype: of the value as the evaluator holds it.
        """
        import torch

        match self.form:
            case "rows":
                return tensor.reshape(shape).to(dtype)
            case "codes":
                return (
                    (unpack_codes(tensor, self.bits, shape[-1], signed=self.signed) + self.shift)
                    .to(dtype)
                    .reshape(shape)
                )
            case _:
                held = tensor if tensor.is_floating_point() else tensor.to(torch.int16) + self.shift
                return held.reshape(shape).to(dtype)


def pack_codes(codes: torch.Tensor, bits: int, shift: int) -> torch.Tensor:
    """Codes [M, C] less `shift` as kernels read them: i8 [M, padded(C) * bits / 8], planes by halves of a span.

    What `containers.triton.planes` does for weights in numpy, on the device where the codes are.
    """
    import torch

    held = torch.nn.functional.pad(codes.to(torch.int16) - shift, (0, padded(codes.shape[1]) - codes.shape[1]))
    if bits == 8:
        return held.to(torch.int8).contiguous()
    half, spans = half_of(bits), held.shape[1] * bits // (8 * half_of(bits))
    planes = (held & ((1 << bits) - 1)).reshape(len(held), spans, 8 // bits, half)
    packed = sum((planes[:, :, p] << (bits * p) for p in range(8 // bits)), start=torch.zeros((), dtype=torch.int16))
    return packed.to(torch.uint8).view(torch.int8).flatten(1).contiguous()


def unpack_codes(packed: torch.Tensor, bits: int, columns: int, *, signed: bool = True) -> torch.Tensor:
    """The inverse of `pack_codes`, without the shift: i16 [M, columns]."""
    import torch

    if bits == 8:
        return packed[:, :columns].to(torch.int16)
    half = half_of(bits)
    spans = packed.view(torch.uint8).to(torch.int16).reshape(len(packed), packed.shape[1] // half, 1, half)
    moved = torch.arange(0, 8, bits, dtype=torch.int16, device=packed.device).reshape(1, 1, -1, 1)
    codes = ((spans >> moved) & ((1 << bits) - 1)).flatten(1)[:, :columns]
    return codes - ((codes >> (bits - 1)) << bits) if signed else codes


@dataclass(frozen=True, eq=False)
class Region:
    """Nodes that run together.

    Attributes:
        name: unique in the plan.
        nodes: in the order of the graph, decoders included.
        inputs: the values read from outside, constants aside; outputs: those made here and read elsewhere.
        kernel: what it computes; None for "graph".
        bound: border tensor of the kernel -> what it holds.
        known: results that hold one number whatever the input; the kernel does not write them.
        views: results that are other shapes of what the kernel reads or writes.
        fused: what is fused, in words, in order.
    """

    name: str
    kind: Kind
    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    kernel: Kernel | None = None
    bound: Mapping[str, Bound] = field(default_factory=dict)
    known: Mapping[Value, int] = field(default_factory=dict)
    views: Mapping[Value, Value] = field(default_factory=dict)
    fused: tuple[str, ...] = ()

    def leads(self, held: Mapping[Value, torch.Tensor]) -> dict[Value, tuple[int, ...]]:
        """The leading axes of the kernel's values, from the tensors of its inputs: nodes may change them.

        Args:
            held: the tensor of each of `inputs`, as the evaluator holds it.
        """
        import torch

        from planish.codegen.select_sites import is_view, width
        from planish.ir.ops.base import Wide

        found = {v: tuple(t.shape[:-1]) for v, t in held.items() if isinstance(t, torch.Tensor) and t.ndim}
        for node in self.nodes:
            known = next((found[v] for v in node.operands if v is not None and v in found), None)
            if known is None:
                continue  # the decoder of a weight
            if is_view(node):
                x = torch.empty((*known, width(node.result) or 1), device="meta")
                others: list[torch.Tensor | None] = []
                for v in node.operands[1:]:
                    constant = None if v is None else v.constant
                    others.append(None if v is None else held[v] if constant is None else Wide().hold(constant))
                known = tuple(node.op.evaluate(node, [x, *others], Wide())[0].shape[:-1])
            found.update((value, known) for value in node.results)
        return found

    def bind(self, dtype: str) -> dict[str, torch.Tensor]:
        """The kernel's constant tensors by name.

        Args:
            dtype: the kernel's float dtype: "f16", "bf16" or "f32".
        """
        import torch

        from planish.ir.types import torch_dtype

        found: dict[str, torch.Tensor] = {}
        packs = Packs()
        for tensor in self.kernel.tensors if self.kernel is not None else ():
            bound = self.bound[tensor.name]
            if bound.make is None:
                continue
            array = bound.make(packs)  # a copy: constants are read-only, and torch has no bfloat16 of numpy
            held = torch.from_numpy(np.array(array, np.float32 if array.dtype.name == "bfloat16" else None))
            wanted = torch_dtype(dtype if tensor.dtype == "float" else tensor.dtype)
            found[tensor.name] = held.to(wanted).reshape([int(d) for d in tensor.shape]).contiguous()
        return found


@dataclass(frozen=True, eq=False)
class Miss:
    """A node that was not fused, or a fusion that was not done, and why."""

    node: Node
    reason: str


@dataclass(frozen=True, eq=False)
class Plan:
    """A graph in regions.

    Attributes:
        regions: in an order in which they can run.
        misses: what did not fuse.
    """

    graph: Graph
    regions: tuple[Region, ...]
    misses: tuple[Miss, ...] = ()

    @property
    def kernels(self) -> list[Region]:
        """The regions that become kernels."""
        return [r for r in self.regions if r.kernel is not None]

    def count(self, kind: Kind) -> int:
        """How many regions are of a kind."""
        return sum(r.kind == kind for r in self.regions)

    def evaluate(self, inputs: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The graph's outputs by running region after region in the evaluator: what a run of the kernels stands for.

        Args:
            inputs, dtype: see `planish.ir.evaluator.evaluate`.

        Raises:
            PlanishError: inputs that do not fit, or a region that reads what none before it makes.
        """
        from planish.ir.evaluator import bind_inputs, evaluate_nodes
        from planish.ir.ops.base import Wide

        wide = Wide(dtype)
        environment = bind_inputs(self.graph, inputs, wide)
        for region in self.regions:
            given = {v: environment[v] for v in region.inputs if v in environment}
            environment |= evaluate_nodes(region.nodes, given, region.outputs, wide)
        found = evaluate_nodes((), environment, self.graph.output_values(), wide)
        return {name: found[value] for name, value in self.graph.outputs}
