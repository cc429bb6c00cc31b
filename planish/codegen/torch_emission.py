"""What the emitters of torch code share: the FX graph in the making, tensors, scalars, constants.

Every row of the op table has an emitter, `(emission, node) -> FX nodes of the results`, registered by
`emitter`. A value is handed on in up to three forms:

    tensor(value)    the FX node of a tensor
    operand(value)   for elementwise ops: a Python number for a 0-dim constant, so that 16-bit arithmetic is
                     that of `x * 0.1` in Python, where the number is not rounded to 16 bits first
    sizes(value)     integers that feed a shape, an index bound or a count: Python ints and symbolic ints

Float dtypes and the device that the code needs are read from empty buffers (`float32`, ...), so that
`module.double()` and `module.to(device)` reach them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.fx

from planish.capture import fx_calls
from planish.codegen import torch_functions
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.ops.base import HELD_AS
from planish.ir.types import WIDE_FLOATS, TensorType, is_float, torch_dtype

if TYPE_CHECKING:
    from planish.ir.graph import Graph, Node, Value

Emitter = Callable[["Emission", "Node"], "torch.fx.Node | Sequence[torch.fx.Node]"]
Number = bool | int | float
UNSIGNED = frozenset({"u16", "u32", "u64"})  # torch stores them and computes little with them

EMITTERS: dict[str, Emitter] = {}
READS: dict[str, frozenset[str]] = {}  # the attributes that each emitter knows of


def emitter(*names: str, reads: str = "") -> Callable[[Emitter], Emitter]:
    """Register a function as the emitter of rows; `reads` names the attributes that it turns into code."""

    def add(function: Emitter) -> Emitter:
        for name in names:
            EMITTERS[name] = function
            READS[name] = frozenset(reads.split())
        return function

    return add


def python_name(name: str) -> str:
    """The name with what an attribute of a module cannot hold replaced; dots part submodules."""
    parts = [re.sub(r"[^A-Za-z0-9_-]", "_", part) for part in name.split(".")]
    return ".".join(part + "_" if hasattr(torch.fx.GraphModule, part) else part or "_" for part in parts)


class Tracer(torch.fx.Tracer):
    """What FX reads the code of a pickled module with: buffers stay reads of the module."""

    proxy_buffer_attributes = True


class Emission:
    """The FX graph of an IR graph in the making.

    Attributes:
        fx: the FX graph.
        root: the module that holds parameters and buffers.
    """

    def __init__(self, graph: Graph, wide: torch.dtype | None = None) -> None:
        self.graph = graph
        self.wide = wide  # in which every float of the graph is held, None: each in its own dtype
        self.fx = torch.fx.Graph(tracer_cls=Tracer)
        self.root = torch.nn.Module()
        self.tensors: dict[Value, torch.fx.Node] = {}
        self.transient: list[str] = []  # buffers that do not stand in the state dict
        self.integers: dict[Value, list[Any] | None] = {}
        self.places: dict[Value, torch.fx.Node] = {}  # what the module writes to, by the input of its old value
        self.from_torch = graph.meta.get("front_end") == "torch"
        self.buffers = _names(graph, "torch.buffers")  # constants that are buffers though they hold floats
        self.calls = fx_calls.calls(graph)  # what the rows of a value were captured from, where that still holds
        self.contiguous = fx_calls.noted(graph, "contiguous")
        self.shared_heads = fx_calls.noted(graph, "shared-heads")
        self.unsaved = _names(graph, "torch.unsaved")  # buffers outside of the state dict
        self.trained = _names(graph, "torch.requires_grad")  # parameters that take a gradient
        self.sizes = _names(graph, "torch.sizes")  # inputs that are ints
        self.named: set[torch.fx.Node] = set()  # nodes that bear the name of a value
        self._likes: dict[str, torch.fx.Node] = {}
        self._shared: dict[str, torch.fx.Node] = {}
        self._read: dict[tuple[str, str], torch.fx.Node] = {}

    # -- nodes -------------------------------------------------------------------------------------------

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.fx.Node:
        """A call of an ATen overload, a torch function, or a function of `torch_functions`."""
        made = self.fx.call_function(target, args, kwargs)
        module = getattr(target, "__module__", "") or ""
        if module.startswith("planish.") or isinstance(target, type):
            made.meta["is_wrapped"] = True  # FX calls it, rather than looking into it, when a pickle is loaded
        return made

    def method(self, name: str, *args: Any, **kwargs: Any) -> torch.fx.Node:
        """A call of a tensor's method."""
        return self.fx.call_method(name, args, kwargs)

    def register(
        self, name: str, data: torch.Tensor, *, buffer: bool, persistent: bool = True, requires_grad: bool = False
    ) -> str:
        """Put a tensor into the module, in submodules by its dotted name.

        Args:
            requires_grad: of a parameter.

        Returns:
            The name under which it stands: another one where this one is taken.
        """
        wanted = python_name(name)
        owner, leaf = self._place(wanted)
        if owner is None:
            flat, serial = wanted.replace(".", "_"), 0
            while hasattr(self.root, leaf := f"{flat}_{serial}" if serial else flat):
                serial += 1
            owner, wanted = self.root, leaf
        if buffer:
            owner.register_buffer(leaf, data, persistent=persistent)
            if not persistent:
                self.transient.append(wanted)
        else:
            owner.register_parameter(leaf, torch.nn.Parameter(data, requires_grad=requires_grad))
        return wanted

    def _place(self, name: str) -> tuple[torch.nn.Module | None, str]:
        """The submodule for a dotted name, made on the way; None if something else stands there."""
        *path, leaf = name.split(".")
        module = self.root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            child = getattr(module, part)
            if not isinstance(child, torch.nn.Module):
                return None, leaf
            module = child
        return (None if hasattr(module, leaf) else module), leaf

    # -- values ------------------------------------------------------------------------------------------

    def tensor(self, value: Value | None) -> torch.fx.Node:
        """The FX node of a value."""
        if value is None:
            raise PlanishError("operand: is missing")
        made = self.tensors.get(value)
        if made is None:
            if value.constant is not None:
                made = self._constant(value.name, value.constant)
            elif self.integers.get(value) is not None:
                made = self._size_tensor(value)
            else:
                raise PlanishError(f"%{value.name}: is not computed before it is read")
            self.tensors[value] = made
        return made

    def optional(self, value: Value | None) -> torch.fx.Node | None:
        return None if value is None else self.tensor(value)

    def computed(self, value: Value | None) -> torch.fx.Node:
        """The tensor in a dtype that torch computes with."""
        made = self.tensor(value)
        return self.method("to", made, torch.int64) if value is not None and value.dtype in UNSIGNED else made

    def operand(self, value: Value | None) -> Any:
        """An operand of an elementwise op: a number or a symbolic int for a scalar that has one, else a tensor."""
        if value is not None and value.rank == 0:
            number = self.number(value)
            if number is not None:
                return number
        return self.computed(value)

    def number(self, value: Value | None) -> Any:
        """A constant of one element as a Python number, a size as an int; None for anything else."""
        from planish.codegen.torch_sizes import integers

        if value is None:
            return None
        if value.is_constant and value.constant is not None and value.constant.size == 1:
            return None if self._is_state(value.name, value.constant) else scalar(value.constant)
        if value.producer is not None and value.producer.op.name == "cast" and value.rank == 0:
            source = value.producer.operand(0)
            if is_float(value.dtype) and source is not None and not source.is_constant and source.dtype == "i64":
                value = source  # a size as a float: beside a tensor, the int itself
        found = integers(self, value) if not value.is_constant else None
        return found[0] if found is not None and len(found) == 1 else None

    def _is_state(self, name: str, constant: Constant) -> bool:
        """True for a scalar that a captured module holds as a parameter or buffer, not one from its code."""
        if not self.from_torch or not is_float(constant.dtype):
            return name in self.buffers
        return not constant.is_wide and not (constant.dtype == "f64" and name.startswith("scalar"))

    def _constant(self, name: str, constant: Constant) -> torch.fx.Node:
        """A constant in the module; a float32 master in float64 is rounded here, once."""
        if constant.dtype == "str":
            raise PlanishError(f"constant '{name}': torch has no strings")
        return self.fx.get_attr(self.registered(name, constant))

    def registered(self, name: str, constant: Constant) -> str:
        """A constant as a parameter or buffer of the module: its qualified name."""
        buffer = name in self.buffers or name in self.unsaved or constant.dtype not in WIDE_FLOATS
        of_code = (
            self.from_torch
            and name not in self.buffers
            and (buffer or not (constant.shape or self._is_state(name, constant)))
        )
        trained = name in self.trained and is_float(constant.dtype)
        return self.register(
            name, self.held(constant), buffer=buffer or of_code, persistent=not of_code, requires_grad=trained
        )

    def held(self, constant: Constant) -> torch.Tensor:
        """The data of a constant as the module holds it."""
        if self.wide is not None and is_float(constant.dtype):
            return constant.tensor(self.wide)
        if constant.dtype in HELD_AS and is_float(constant.dtype):
            return constant.tensor(torch_dtype(HELD_AS[constant.dtype]))
        return constant.tensor()

    def shared(self, name: str, constant: Constant) -> torch.fx.Node:
        """A constant that is no value of the graph (a matrix of the code's own), once for each name."""
        made = self._shared.get(name)
        if made is None:
            made = self._shared[name] = self.fx.get_attr(self.register(name, self.held(constant), buffer=True))
        return made

    def _size_tensor(self, value: Value) -> torch.fx.Node:
        dims = self.integers[value]
        assert dims is not None
        dtype = torch_dtype(value.dtype or "i64")
        return self.call(
            torch_functions.tensor_of_sizes, *dims, scalar=value.rank == 0, dtype=dtype, device=self.device()
        )

    # -- dtypes and the device ---------------------------------------------------------------------------

    def like(self, dtype: str) -> torch.fx.Node:
        """An empty buffer of a float dtype."""
        made = self._likes.get(dtype)
        if made is None:
            own = torch_dtype(dtype)
            empty = torch.empty(0, dtype=self.wide or own)
            name = self.register(str(own).removeprefix("torch."), empty, buffer=True, persistent=False)
            made = self._likes[dtype] = self._first(lambda: self.fx.get_attr(name))
        return made

    def dtype(self, dtype: str) -> Any:
        """A dtype as an argument: what `.double()` makes of it for a float that is computed in."""
        if dtype in ("f32", "f16", "bf16"):
            return self._attribute(dtype, "dtype")
        return torch_dtype(HELD_AS.get(dtype, dtype))

    def like_dtype(self, dtype: str) -> torch.fx.Node:
        """The dtype that `.to()` makes of any float dtype, float64 included."""
        return self._attribute(dtype, "dtype")

    def device(self) -> torch.fx.Node:
        """The device of the module."""
        return self._attribute("f32", "device")

    def _attribute(self, dtype: str, name: str) -> torch.fx.Node:
        made = self._read.get((dtype, name))
        if made is None:
            like = self.like(dtype)
            made = self._read[dtype, name] = self._first(lambda: self.call(getattr, like, name))
        return made

    def _first(self, make: Callable[[], torch.fx.Node]) -> torch.fx.Node:
        """Made before everything but the inputs and what was made so before."""
        place = next((n for n in self.fx.nodes if n.op != "placeholder" and n not in self._early()), None)
        if place is None:
            return make()
        with self.fx.inserting_before(place):
            return make()

    def _early(self) -> set[torch.fx.Node]:
        return {*self._likes.values(), *self._read.values()}


def _names(graph: Graph, key: str) -> frozenset[str]:
    kept = graph.meta.get(key)
    return frozenset(str(name) for name in kept) if isinstance(kept, tuple) else frozenset()


def scalar(constant: Constant) -> Number:
    """The one element as a Python number, unrounded where the constant holds it in float64."""
    if is_float(constant.dtype):
        return float(constant.wide().reshape(-1)[0])
    element = constant.array().reshape(-1)[0]
    return bool(element) if constant.dtype == "bool" else int(element)


def shape_of(value: Value | None) -> tuple[Any, ...]:
    """The dims of a value.

    Raises:
        PlanishError: its rank is not known.
    """
    shape = None if value is None else value.shape
    if shape is None:
        raise PlanishError(f"%{value.name if value is not None else '_'}: its rank must be known to write torch code")
    return shape


def is_floating(value: Value | None) -> bool:
    return value is not None and isinstance(value.type, TensorType) and is_float(value.type.dtype)


def attributes_of(node: Node) -> Mapping[str, Any]:
    """The attributes, with the row's defaults."""
    return {**node.op.attributes, **node.attributes}
