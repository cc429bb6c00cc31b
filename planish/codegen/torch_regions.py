"""Emit torch with kernels: a plan becomes a torch.fx.GraphModule whose kernel regions are calls of custom ops.

    module = emit(select(graph, options_for("cpu")))    for the CPU: planish_cpu:: ops (`planish.codegen.cpp`)
    module = emit(select(graph), device="cuda")         planish:: ops, the emitted Triton files

What no kernel takes is ATen, as `to_torch` writes it; the module is called in the same way and holds its constants
under the same names. The weights of kernels, in the layout of the device, are buffers outside of the state dict, named
by region and border tensor (`gemm_3.weight`).

Between two kernels nothing is unpacked: codes, scales and rows [M, C] go from one op to the next as they lie in memory.
A value is put into the shape and dtype of the graph where an ATen op or the caller reads it, and only then. Sizes stay
symbolic: one module serves every batch and length.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.fx

from planish.codegen import torch_calls
from planish.codegen.cpp_attention import AttentionForm, form_of
from planish.codegen.cpp_attention import kernel as attention_kernel
from planish.codegen.regions import Bound, Plan, Region, pack_codes, unpack_codes
from planish.codegen.select_fuse import LINEARS, Options
from planish.codegen.torch import emit as emit_node
from planish.codegen.torch import finished, wide_dtype
from planish.codegen.torch_emission import Emission
from planish.codegen.torch_regions_merge import merged, siblings
from planish.codegen.torch_regions_ops import Operator, operator_of
from planish.ir.constant import Constant
from planish.ir.ops.base import HELD_AS
from planish.ir.types import WIDE_FLOATS, bits, is_float, torch_dtype

if TYPE_CHECKING:
    from planish.ir.graph import Graph, Node, Value

__all__ = ["emit", "float_of", "options_for"]

aten = torch.ops.aten
NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}
KERNEL_FLOATS = ("f32", "bf16", "f16")  # wider first
NORMS = 2048  # columns: rows of a block of a gemm lie in the second cache until they are finished


def options_for(device: str | torch.device) -> Options:
    """What `select` may fuse for a device."""
    return Options(norms=NORMS) if torch.device(device).type == "cpu" else Options()


def emit(
    plan: Plan,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    half: bool | None = None,
) -> torch.fx.GraphModule:
    """A plan as a torch module.

    Args:
        plan: the regions of a quantised graph.
        device: where the module runs: its kind picks the ops, and its tensors are there.
        dtype: hold every float of the graph in this dtype, or the dtype of this name; kernels compute in float32
            whatever it is. None: each in its own. In float64 nothing is a kernel, and the module computes what
            `planish.evaluate(graph, dtype=torch.float64)` does.
        half: on the CPU, let attention in float32 round what it multiplies to bf16 (a relative error of 2^-9 for each
            of q, k, v and the weights of v). None: where a linear's activations are quantised anyway.

    Returns:
        A GraphModule in evaluation mode, called as `planish.to_torch(plan.graph)` is. Its kernels hold for this device
        and these dtypes: a module for others is emitted anew. `meta["constants"]`: the names in the graph of the
        constants that are tensors of the module -> their names in the module.

    Raises:
        PlanishError: an op that torch does not have, a `dtype` that is none of a float, or no Triton for CUDA.
    """
    where = torch.device(device)
    wide = wide_dtype(dtype)
    if half is None:
        half = any(
            k.activation is not None and k.activation.kind == "codes" for k in (r.kernel for r in plan.kernels) if k
        )
    emission = _Emission(plan.graph, wide, attention=half if where.type == "cpu" else None)
    torch_calls.inputs(emission)
    emission.note_inputs()
    groups = {group[0].name: group for group in siblings(plan)}
    later = {region.name for group in groups.values() for region in group[1:]}
    regions = [merged(groups[r.name]) if r.name in groups else r for r in plan.regions if r.name not in later]
    kernels = emission.operators(regions, where, groups)  # all of them first: compilers run meanwhile
    for region in regions:
        found = kernels.get(region.name)
        if found is None or not emission.fits(region):
            for node in region.nodes:
                emission.node(node)
        else:
            emission.kernel(region, found, groups.get(region.name, ()))
    module = finished(emission).to(where)
    module.meta["constants"] = {name: place for name, place in emission.where.items() if _has(module, place)}
    return module


def _has(module: torch.fx.GraphModule, place: str) -> bool:
    """True if a tensor is in the module: GraphModule leaves out what its code does not read."""
    path, _, leaf = place.rpartition(".")
    owner: torch.nn.Module | None = module
    for part in path.split(".") if path else ():
        owner = getattr(owner, part, None)
    return isinstance(getattr(owner, leaf, None), torch.Tensor)


def float_of(region: Region, wide: torch.dtype | None = None) -> str | None:
    """The float dtype of a region's kernel: the widest of the rows at its border, else of its products.

    None for float64, which no kernel holds.

    Args:
        wide: the dtype in which every float is held; None: each in its own.
    """
    if wide is not None:
        found = {NAMES.get(wide, "f64")}
    else:
        rows = [b.value for b in region.bound.values() if b.form == "rows" and b.value is not None]
        products = [n.result for n in region.nodes if n.op.name in LINEARS]
        found = {str(_known_in(v)) for v in rows or products if v.dtype in WIDE_FLOATS}
    if "f64" in found:
        return None
    return "f32" if len(found) != 1 else next(iter(found))


def _known_in(value: Value) -> str | None:
    """The float dtype that holds a value: that of what it was cast from, if that is narrower."""
    made = value.producer
    source = made.operand(0) if made is not None and made.op.name == "cast" else None
    if source is None or source.dtype not in WIDE_FLOATS or value.dtype not in WIDE_FLOATS:
        return value.dtype
    return source.dtype if bits(source.dtype) < bits(value.dtype) else value.dtype


@dataclass(frozen=True)
class _Home:
    """A value as a kernel holds it: the tensor, what it is, the float dtype of that kernel.

    Attributes:
        cut: whether its rows are columns of wider ones.
    """

    tensor: torch.fx.Node
    bound: Bound
    dtype: str
    cut: bool = False


class _Emission(Emission):
    """The FX graph of a plan in the making.

    Attributes:
        homes: values that lie in a kernel's layout.
        pending: values that are not in the graph's form yet -> what puts them into it.
        symbols: the name of a size -> a value that has it, and the axis.
        attention: whether attention of float32 may round to bf16; None: no kernel for it.
        where: the constants of the graph that were registered -> their names in the module.
    """

    def __init__(self, graph: Graph, wide: torch.dtype | None, *, attention: bool | None = None) -> None:
        super().__init__(graph, wide)
        self.attention = attention
        self.homes: dict[Value, _Home] = {}
        self.pending: dict[Value, Callable[[], torch.fx.Node]] = {}
        self.symbols: dict[str, tuple[Value, int]] = {}
        self.where: dict[str, str] = {}
        self._sizes: dict[str, torch.fx.Node] = {}

    # -- values ------------------------------------------------------------------------------------------

    def tensor(self, value: Value | None) -> torch.fx.Node:
        """The FX node of a value in the graph's form."""
        if value is not None and value in self.pending:
            made = self.pending.pop(value)()
            if made.op != "placeholder" and made not in self.named:
                self.named.add(made)
                made._rename(value.name)
            self.tensors[value] = made
        return super().tensor(value)

    def registered(self, name: str, constant: Constant) -> str:
        """A constant as a parameter or buffer of the module: its qualified name."""
        self.where[name] = super().registered(name, constant)
        return self.where[name]

    def note_inputs(self) -> None:
        """Remember the sizes of what is there from the start."""
        for value in self.graph.inputs:
            self._note(value)

    def _note(self, value: Value) -> None:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, str) and value in self.tensors:
                self.symbols.setdefault(dim, (value, axis))

    def kept(self, value: Value) -> str:
        """The dtype of a value in the emitted module."""
        own = value.dtype or "f32"
        if is_float(own) and self.wide is not None:
            return NAMES.get(self.wide, own)
        return HELD_AS.get(own, own)

    def dims(self, value: Value) -> list[Any] | None:
        """The sizes of a value: ints, FX nodes of sizes, one -1; None if they are not known without its tensor."""
        if value.shape is None:
            return None
        found: list[Any] = [dim if isinstance(dim, int) else self._size(dim) for dim in value.shape]
        if found.count(None) > 1:
            return None
        return [-1 if dim is None else dim for dim in found]

    def _size(self, name: str | None) -> torch.fx.Node | None:
        if name is None or name not in self.symbols:
            return None
        if name not in self._sizes:
            value, axis = self.symbols[name]
            self._sizes[name] = self.method("size", self.tensors[value], axis)
        return self._sizes[name]

    # -- regions -----------------------------------------------------------------------------------------

    def operators(
        self, regions: Sequence[Region], device: torch.device, groups: Mapping[str, Sequence[Region]]
    ) -> dict[str, Operator]:
        """The op of each region that becomes a kernel.

        Args:
            groups: what merged regions were merged of, by their names.
        """
        found: dict[str, Operator] = {}
        for region in regions:
            if region.kernel is None:
                continue
            dtype = float_of(groups.get(region.name, (region,))[0], self.wide)
            if dtype is not None:
                found[region.name] = operator_of(region.kernel, dtype, device)
        return found

    def fits(self, region: Region) -> bool:
        """True if the sizes of what a kernel makes are known before it runs."""
        made = [*region.outputs, *region.known, *region.views]
        return all(value.shape is not None and self._unknown(value) <= 1 for value in made)

    def _unknown(self, value: Value) -> int:
        return sum(not isinstance(dim, int) and dim not in self.symbols for dim in value.shape or ())

    def node(self, node: Node) -> None:
        """A node that no kernel takes; attention on the CPU is one by itself."""
        made = self._attention(node) if node.op.name == "attention" else None
        if made is None:
            emit_node(self, node)
        else:
            made._rename(node.result.name)
            self.tensors[node.result] = made
        for value in node.results:
            self._note(value)

    def _attention(self, node: Node) -> torch.fx.Node | None:
        """The call of the CPU's attention, where it holds the form."""
        form = None if self.attention is None else form_of(node, half=self.attention)
        if not isinstance(form, AttentionForm):
            return None
        if self.wide is not None:
            dtype = NAMES[self.wide]
            if dtype not in KERNEL_FLOATS:
                return None
            mask = dtype if form.mask not in ("", "bool") else form.mask
            form = replace(form, dtype=dtype, mask=mask, half=form.half or dtype == "bf16")
        given = [_slim(v) if index == 3 else v for index, v in enumerate(node.operands) if v is not None]
        return self.call(attention_kernel(form).op, *(self.tensor(v) for v in given))

    def kernel(self, region: Region, found: Operator, parts: Sequence[Region] = ()) -> None:
        """The call of a region's kernel.

        Args:
            parts: the regions that it was merged of (`torch_regions_merge`), if it was.
        """
        spec = region.kernel
        assert spec is not None
        inputs = [self.enter(region.bound[name], found.dtype) for name in found.inputs]
        weights = found.prepare(region.bind(found.dtype))
        for name in found.weights:
            place = self.register(f"{region.name}.{name}", weights[name], buffer=True, persistent=False)
            inputs.append(self.fx.get_attr(place))
        made = self.call(found.op, *inputs)
        made._rename(f"{region.name}_merged" if parts else region.name)
        outputs = [t.name for t in spec.tensors if t.role == "output"]
        if parts:
            self._part(made, parts, found.dtype)
            return
        for index, name in enumerate(outputs):
            bound = region.bound[name]
            assert bound.value is not None
            held = made if len(outputs) == 1 else self.call(operator.getitem, made, index)
            self._settle(bound.value, _Home(held, bound, found.dtype))
        for value, number in region.known.items():
            self.pending[value] = lambda value=value, number=number: self._full(value, number)  # type: ignore[misc]
        for value, source in region.views.items():
            self._show(value, source)

    def _part(self, made: torch.fx.Node, parts: Sequence[Region], dtype: str) -> None:
        """The columns of a merged gemm's result as the results of its parts."""
        specs = [(part, part.kernel) for part in parts if part.kernel is not None]
        cut = self.call(aten.split_with_sizes.default, made, [spec.outputs for _, spec in specs], 1)
        for index, (part, spec) in enumerate(specs):
            held = self.call(operator.getitem, cut, index)
            held._rename(part.name)
            bound = next(part.bound[t.name] for t in spec.tensors if t.role == "output")
            assert bound.value is not None
            self._settle(bound.value, _Home(held, bound, dtype, cut=True))

    def _settle(self, value: Value, home: _Home) -> None:
        self.homes[value] = home
        self.named.add(home.tensor)  # by its region
        self.pending[value] = lambda: self.leave(value, home)

    def _show(self, value: Value, source: Value) -> None:
        """A value that is another shape of one that a kernel holds, or reads."""
        home = self.homes.get(source)
        if home is not None:
            self._settle(value, home)
        else:
            self.pending[value] = lambda: self.call(aten.reshape.default, self.tensor(source), self.dims(value))

    def _full(self, value: Value, number: int) -> torch.fx.Node:
        return self.call(aten.full.default, self.dims(value), number, dtype=self._dtype(value), device=self.device())

    # -- borders -----------------------------------------------------------------------------------------

    def enter(self, bound: Bound, dtype: str) -> torch.fx.Node:
        """What a kernel reads: as another kernel left it, or made from the graph's tensor (`Bound.enter`)."""
        value = bound.value
        assert value is not None
        home = self.homes.get(value)
        if home is not None and _alike(home, bound, dtype):
            return self.method("contiguous", home.tensor) if home.cut else home.tensor
        made = self.tensor(value)
        columns = value.shape[-1] if value.shape else 1
        if bound.form == "rows":
            made = self._cast(made, self.kept(value), dtype)
            made = made if value.rank == 2 else self.call(aten.reshape.default, made, [-1, columns])
            made = self.method("contiguous", made)
        elif bound.form == "codes":
            flat = made if value.rank == 2 else self.call(aten.reshape.default, made, [-1, columns])
            made = self.call(pack_codes, flat, bound.bits, bound.shift)
        else:
            made = self._scales(made, value, bound, columns)
        if bound.form != "scales" or not bound.shift:
            self.homes.setdefault(value, _Home(made, bound, dtype))
        return made

    def _scales(self, made: torch.fx.Node, value: Value, bound: Bound, columns: Any) -> torch.fx.Node:
        if is_float(value.dtype):
            made = self._cast(made, self.kept(value), "f32")
        else:
            made = self._cast(made, self.kept(value), "i16")
            made = self._cast(self.call(aten.sub.Scalar, made, bound.shift), "i16", "i8")
        if not value.rank:
            return made
        shape = [-1, columns] if bound.grouped else [-1]
        return self.method("contiguous", self.call(aten.reshape.default, made, shape))

    def leave(self, value: Value, home: _Home) -> torch.fx.Node:
        """The graph's tensor of what a kernel holds (`Bound.leave`)."""
        made, bound = home.tensor, home.bound
        if bound.form == "rows":
            made = self._cast(made, home.dtype, self.kept(value))
        elif bound.form == "codes":
            columns = value.shape[-1] if value.shape else 1
            made = self.call(unpack_codes, made, bound.bits, columns, signed=bound.signed)
            made = self._cast(self.call(aten.add.Scalar, made, bound.shift), "i16", self.kept(value))
        elif is_float(value.dtype):
            made = self._cast(made, "f32", self.kept(value))
        else:
            made = self.call(aten.add.Scalar, self._cast(made, "i8", "i16"), bound.shift)
            made = self._cast(made, "i16", self.kept(value))
        if bound.form == "rows" and value.rank == 2:
            return made
        return self.call(aten.reshape.default, made, self.dims(value))

    def _cast(self, made: torch.fx.Node, own: str, wanted: str) -> torch.fx.Node:
        return made if own == wanted else self.method("to", made, torch_dtype(wanted))

    def _dtype(self, value: Value) -> torch.dtype:
        return torch_dtype(self.kept(value))


def _alike(home: _Home, bound: Bound, dtype: str) -> bool:
    """True if a kernel reads a value as it is held."""
    own = home.bound
    if own.form != bound.form:
        return False
    if own.form == "rows":
        return home.dtype == dtype
    return (own.bits, own.shift, own.grouped) == (bound.bits, bound.shift, bound.grouped)


def _slim(mask: Value) -> Value:
    """A mask without what only repeats it along axes: the kernel of attention does that by itself."""
    made = mask.producer
    inner: Value | None = None
    if made is not None and made.op.name == "expand":
        inner = made.operand(0)
    elif made is not None and made.op.name == "logical_and":
        one, two = made.operands
        for value, other in ((one, two), (two, one)):
            held = None if other is None else other.constant
            if value is not None and held is not None and not value.is_constant and bool(held.array().all()):
                inner = value
    if inner is None or inner.rank != mask.rank or inner.dtype != mask.dtype:
        return mask
    return _slim(inner)
