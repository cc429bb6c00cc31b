"""What `planish.optimize` returns: a torch module whose quantised linears are kernels.

    module(...)                        as the model that it was made of
    module.state_dict()                codes, scales and floats under the model's paths: `layer.weight.codes`, ...
    module.to("cuda"), module.half()   emitted anew, for that device or dtype
    copy.deepcopy, pickle              of the quantised graph; the copy is emitted anew
    save_module, load_module            a text of the IR beside a safetensors file; nothing is unpickled

The module holds its graph (`module.planish.graph`). What the kernels read is made of the graph's constants when the
module is emitted, in the layout of the device; the state dict shows the constants themselves. Floats that no kernel
reads (embeddings, the norms between) are parameters, and may be written to in place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.fx
import torch.utils._pytree as pytree

from planish.codegen.select import select
from planish.codegen.torch import wide_dtype
from planish.codegen.torch_chains import chained
from planish.codegen.torch_emission import python_name
from planish.codegen.torch_regions import NAMES, emit, options_for
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.graph import Graph, Value
from planish.ir.rewriter import Rewriter
from planish.ir.text import parse, render
from planish.ir.types import is_float

if TYPE_CHECKING:
    from planish.passes.manager import Report

RECIPE, DTYPE = "optimize.recipe", "optimize.dtype"  # in the meta of a graph that is saved
QUANTISED = frozenset({"quantize", "dequantize", "dequantize_split"})
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Optimization:
    """What stands behind an optimised module.

    Attributes:
        graph: the quantised graph.
        recipe: its name; "" if it is not known.
        device: where the module is.
        dtype: in which all of its floats are held; None: each in its own.
        report: of the passes; None in a copy that was unpickled or loaded.
        notes: what the user should know.
    """

    graph: Graph
    recipe: str = ""
    device: torch.device = field(default=torch.device("cpu"))
    dtype: torch.dtype | None = None
    report: Report | None = None
    notes: tuple[str, ...] = ()


class OptimizedModule(torch.fx.GraphModule):
    """A quantised model whose linears are kernels; for inference.

    Attributes:
        planish: what stands behind it.
    """

    planish: Optimization

    def __init__(self, made: Optimization) -> None:
        super().__init__(torch.nn.Module(), torch.fx.Graph(), class_name="OptimizedModule")
        self.register_load_state_dict_post_hook(_loaded)
        self.training = False
        self._refresh(made)

    # -- emission ----------------------------------------------------------------------------------------

    def _refresh(self, made: Optimization, live: Mapping[str, torch.Tensor] | None = None) -> None:
        """Become the module of a graph.

        Args:
            live: tensors that stay as they are, by their names in the module.
        """
        plan = select(made.graph, options_for(made.device))
        emitted = chained(emit(plan, device=made.device, dtype=made.dtype))
        emitted.requires_grad_(False)
        names: dict[str, str] = emitted.meta["constants"]
        for name in {*names.values()} & {*(live or {})}:
            _put(emitted, name, (live or {})[name])
        if made.dtype is None and made.device.type == "cpu":
            _share(made.graph, emitted, names)
        training = self.training
        for kind in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[kind] = emitted.__dict__[kind]
        self.meta = emitted.meta
        self.planish = made
        self.graph = emitted.graph
        self.train(training)

    def _live(self, without: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """What the module holds of the graph's constants, by its own names.

        Args:
            without: names in the graph.
        """
        held: dict[str, str] = self.meta["constants"]
        return {place: _get(self, place) for name, place in held.items() if name not in without}

    def _settled(self, given: Mapping[str, torch.Tensor] | None = None) -> Graph:
        """The graph, with what was written to the module since.

        Args:
            given: other data for constants, by their names in the graph.
        """
        graph = self.planish.graph.clone() if given else self.planish.graph
        now = {name: _get(self, place) for name, place in self.meta["constants"].items()} | dict(given or {})
        for name, held in now.items():
            value, data = graph.values[name], held.detach().cpu()
            assert value.constant is not None and value.dtype is not None
            before = value.constant.tensor(data.dtype if is_float(value.dtype) else None)
            if not torch.equal(before.nan_to_num(), data.to(before.dtype).nan_to_num()):
                _set(graph, value, Constant.of(data.clone(), value.dtype))
        return graph

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedModule:
        """Move or convert; kernels are emitted anew for another device or float dtype."""
        made = self.planish
        own = _floats(made)
        probes = {dtype: fn(torch.empty(0, dtype=dtype, device=made.device)) for dtype in own}
        device = next(iter(probes.values())).device
        changed = {dtype: probe.dtype for dtype, probe in probes.items()}
        if device == made.device and all(a == b for a, b in changed.items()):
            super()._apply(fn, recurse)
            return self
        found = set(changed.values())
        dtype = (
            made.dtype if all(a == b for a, b in changed.items()) else found.pop() if len(found) == 1 else made.dtype
        )
        graph = self._settled()
        kept = {*self.meta["constants"].values()}
        for name in [n for n, _ in self.named_buffers(remove_duplicate=False) if n not in kept]:
            owner, _, leaf = name.rpartition(".")
            del self.get_submodule(owner)._buffers[leaf]  # of kernels: not worth moving
        super()._apply(fn, recurse)
        self._refresh(replace(made, graph=graph, device=device, dtype=dtype), self._live())
        return self

    # -- state -------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self._folded().items():
            assert value.constant is not None
            destination[prefix + name] = value.constant.tensor(self.planish.dtype)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        error_msgs: list[str] = rest[1]
        given: dict[str, torch.Tensor] = {}
        for name, value in self._folded().items():
            assert value.constant is not None
            held = state_dict.get(prefix + name)
            if held is None:
                missing_keys.extend([prefix + name] * strict)
            elif tuple(held.shape) != value.constant.shape:
                error_msgs.append(f"'{prefix}{name}': expected shape {value.constant.shape}, got {tuple(held.shape)}")
            else:
                given[value.name] = held
        self.__dict__["_given"] = prefix, given

    def _folded(self) -> dict[str, Value]:
        """The constants that stand in the state dict and are not tensors of the module, by their names in it."""
        own = {n for n, _ in self.named_parameters(remove_duplicate=False)}
        for path, part in self.named_modules(remove_duplicate=False):
            saved = [n for n in part._buffers if n not in part._non_persistent_buffers_set]
            own |= {f"{path}.{n}" if path else n for n in saved}
        found = {python_name(value.name): value for value in _state(self.planish.graph)}
        return {name: value for name, value in found.items() if name not in own}

    # -- copies ------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        made = OptimizedModule(replace(self.planish, graph=self._settled().clone()))
        made.train(self.training)
        memo[id(self)] = made
        return made

    def __copy__(self) -> OptimizedModule:
        return self.__deepcopy__({})

    def __reduce__(self) -> tuple[Any, ...]:
        text, constants = render(self._settled())
        held = {key: (np.array(c._raw()), c.dtype) for key, c in constants.items()}
        made = self.planish
        classes = _classes(made.graph)  # which are imported when this is read
        return _restored, (text, held, made.recipe, str(made.device), made.dtype, made.notes, self.training, classes)


def _restored(
    text: str,
    held: Mapping[str, tuple[np.ndarray, str]],
    recipe: str,
    device: str,
    dtype: torch.dtype | None,
    notes: tuple[str, ...],
    training: bool,
    classes: tuple[type, ...],
) -> OptimizedModule:
    """A module that was pickled; on the CPU where its device is not there.

    Args:
        classes: of its arguments and outputs: their packages tell torch of them when they are imported.
    """
    constants = {key: Constant(array, kind, array.shape) for key, (array, kind) in held.items()}
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        where = torch.device("cpu")
    made = OptimizedModule(Optimization(parse(text, constants), recipe, where, dtype, None, notes))
    made.train(training)
    return made


def _loaded(module: OptimizedModule, keys: Any) -> None:
    """After a state dict was read: emit the kernels of what stood in it."""
    prefix, given = module.__dict__.pop("_given")
    known = {prefix + name for name in module._folded()}
    keys.unexpected_keys[:] = [key for key in keys.unexpected_keys if key not in known]
    graph = module._settled(given)
    module._refresh(replace(module.planish, graph=graph), module._live(given))


def _classes(graph: Graph) -> tuple[type, ...]:
    """The classes in the structures of a graph's inputs and outputs."""
    found: dict[type, None] = {}
    for key in ("torch.in_spec", "torch.out_spec"):
        text = graph.meta.get(key)
        waiting = [pytree.treespec_loads(text)] if isinstance(text, str) else []
        while waiting:
            spec = waiting.pop()
            waiting += spec.children()
            if isinstance(spec.type, type) and spec.type.__module__ != "builtins":
                found[spec.type] = None
    return tuple(found)


# -- files -----------------------------------------------------------------------------------------------


def save_module(module: OptimizedModule, path: str | Path) -> None:
    """Write an optimised module: a text of the IR, its large constants in a safetensors file beside it.

    Both are written whole or not at all; what was there before stays until then.

    Args:
        path: of the text, `.ir`.

    Raises:
        PlanishError: it is no optimised module, another kind of file, or it cannot be written.
    """
    from planish.ir.store import save as save_graph

    if not isinstance(module, OptimizedModule):
        raise PlanishError(
            f"module: a {type(module).__name__} cannot be saved; expected what planish.optimize returns",
            hint="torch.nn.Module has a state_dict",
        )
    if Path(path).suffix != ".ir":
        raise PlanishError(f"{path}: unknown kind of file; expected .ir")
    graph = module._settled().clone()
    graph.meta[RECIPE] = module.planish.recipe
    if module.planish.dtype is not None:
        graph.meta[DTYPE] = str(module.planish.dtype).removeprefix("torch.")
    save_graph(graph, path)


def load_module(path: str | Path, *, device: str | torch.device = "cpu") -> OptimizedModule:
    """Read what `save_module` wrote, or any quantised graph; nothing is unpickled.

    Raises:
        PlanishError: a file is missing or damaged, or holds no quantised graph.
    """
    from planish.ir.store import load as load_graph

    graph = load_graph(path)
    if not any(node.op.name in QUANTISED for node in graph.nodes):
        raise PlanishError(f"{path}: nothing in this graph is quantised", hint="planish.to_torch makes a module of it")
    recipe, name = graph.meta.pop(RECIPE, ""), graph.meta.pop(DTYPE, None)
    return OptimizedModule(
        Optimization(graph, str(recipe), torch.device(device), None if name is None else wide_dtype(name))
    )


# -- tensors by name -------------------------------------------------------------------------------------


def _state(graph: Graph) -> Iterator[Value]:
    """The constants that a state dict shows: floats of modules, and whatever quantised tensors are made of."""
    read = {v for n in graph.nodes if n.op.name in QUANTISED for v in n.operands if v is not None}
    for value in graph.constants:
        assert value.constant is not None
        data = value.constant.size > 1 and value.dtype not in ("i64", "i32", "bool", "str")
        if value in read or data:
            yield value


def _get(module: torch.nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    held = getattr(module.get_submodule(path), leaf)
    assert isinstance(held, torch.Tensor)
    return held


def _put(module: torch.nn.Module, name: str, held: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = held if isinstance(held, torch.nn.Parameter) else torch.nn.Parameter(held, False)
    else:
        owner._buffers[leaf] = held


def _set(graph: Graph, value: Value, constant: Constant) -> None:
    """Other data for a constant, or for the default of an input."""
    if value.is_input:
        value.constant = constant
        return
    with Rewriter(graph) as rewriter:
        rewriter.set_constant(value, constant, readers="all")


def _share(graph: Graph, module: torch.nn.Module, names: Mapping[str, str]) -> None:
    """Let the graph's floats be those of the module: one memory, and what is written to one is in the other."""
    given = set(graph.output_values())
    for name, place in names.items():
        value, held = graph.values[name], _get(module, place)
        assert value.constant is not None
        own = held.dtype in FLOATS and not value.constant.is_wide and value not in given
        if own and held.is_contiguous():
            _set(graph, value, Constant.of(held, value.dtype))


def _floats(made: Optimization) -> list[torch.dtype]:
    """The float dtypes of a module's tensors."""
    if made.dtype is not None:
        return [made.dtype]
    kinds = {v.dtype for v in made.graph.values.values()}
    return [dtype for dtype in FLOATS if NAMES[dtype] in kinds] or [torch.float32]
