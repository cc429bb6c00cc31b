"""How the module of a graph is called, and what it returns: as `planish.capture.from_fx` keeps it in the meta.

Every argument of the captured call is a parameter of `forward`, by its own name; the tensors in a nested one are
taken out of it. An argument that was no tensor has what it was as its default and must be that. Outputs are put
into the captured structure: tuples, dicts and classes by their constructor, others by their pytree.

A graph of another front end has its inputs as parameters, in order and by name, and gives its only output as it
is, several as a dict by name.
"""

from __future__ import annotations

import itertools
import keyword
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree

from planish.codegen import torch_functions
from planish.codegen.torch_emission import Emission
from planish.ir.errors import PlanishError
from planish.ir.ops.base import HELD_AS
from planish.ir.types import is_float, torch_dtype

if TYPE_CHECKING:
    import torch.fx

    from planish.ir.graph import Value

Leaf = tuple[str, Any]  # ("input" or "output", name) or ("constant", value)
# what may give its operand's own memory on
_VIEWS = frozenset({"identity", "cast", "reshape", "flatten", "transpose", "unsqueeze", "squeeze", "expand", "split",
                    "slice", "gather", "clip"})  # fmt: skip


def argument_name(name: str, taken: set[str]) -> str:
    """The name as a Python identifier that is not taken."""
    clean = re.sub(r"[^A-Za-z0-9_]", "_", name) or "_"
    clean = f"_{clean}" if clean[0].isdigit() or keyword.iskeyword(clean) or clean == "self" else clean
    found, serial = clean, 0
    while found in taken:
        serial += 1
        found = f"{clean}_{serial}"
    taken.add(found)
    return found


def _spec(emission: Emission, key: str) -> pytree.TreeSpec | None:
    text = emission.graph.meta.get(key)
    if not isinstance(text, str):
        return None
    try:
        return pytree.treespec_loads(text)
    except (NotImplementedError, ValueError, KeyError) as error:
        what = str(error).splitlines()[0]
        raise PlanishError(
            f"graph '{emission.graph.name}': the structure of its inputs or outputs cannot be made: {what}",
            hint="import the package that defines the class",
        ) from error


def _leaves(emission: Emission, key: str) -> list[Leaf]:
    kept: Any = emission.graph.meta.get(key)
    return [(str(kind), value) for kind, value in kept] if isinstance(kept, tuple) else []


# -- inputs ----------------------------------------------------------------------------------------------


def inputs(emission: Emission) -> None:
    """The parameters of `forward`, and the buffers that the module writes to."""
    spec = _spec(emission, "torch.in_spec")
    values = {value.name: value for value in emission.graph.inputs}
    if spec is None:
        _by_name(emission)
        return
    leaves = _leaves(emission, "torch.inputs")
    for kind, name in leaves:
        if kind == "input":
            values.pop(str(name), None)
    args, kwargs = pytree.tree_unflatten([_Held(*leaf) for leaf in leaves], spec)
    _arguments(emission, args, kwargs)
    for value in values.values():
        assert value.constant is not None  # a buffer
        emission.tensors[value] = emission.fx.get_attr(emission.registered(value.name, value.constant))
    for name, _ in _mutations(emission):
        value = next(v for v in emission.graph.inputs if v.name == name)
        emission.places[value] = emission.tensors[value]
        if _leaves_as_output(emission, value):
            emission.tensors[value] = emission.method("clone", emission.tensors[value])


def _mutations(emission: Emission) -> list[tuple[str, str]]:
    """(input, output) for what the module writes to: its old and its new value."""
    kept: Any = emission.graph.meta.get("torch.mutations")
    return [(str(a), str(b)) for a, b in kept] if isinstance(kept, tuple) else []


class _Held:
    """A leaf of the arguments: what it was."""

    def __init__(self, kind: str, value: Any) -> None:
        self.constant = kind != "input"
        self.value = value


def _arguments(emission: Emission, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    taken: set[str] = set()
    named = [(argument_name(_name(argument, index), taken), argument) for index, argument in enumerate(args)]
    rest = [(argument_name(name, taken), argument) for name, argument in kwargs.items()]
    parameters = [*named, *sorted(rest, key=lambda pair: _is_constant(pair[1]))]
    last = max((i for i, (_, a) in enumerate(parameters) if not _is_constant(a)), default=-1)
    required, optional = parameters[: last + 1], parameters[last + 1 :]  # no default stands before one without
    made = [(n, a, emission.fx.placeholder(n)) for n, a in required]
    made += [(n, a, emission.fx.placeholder(n, None, a.value)) for n, a in optional]
    for name, argument, node in made:
        _take(emission, name, argument, node)


def _is_constant(argument: Any) -> bool:
    return isinstance(argument, _Held) and argument.constant


def _name(argument: Any, index: int) -> str:
    """The name of a positional argument: that of its leaf, or what its leaves have in common."""
    if isinstance(argument, _Held):
        return f"arg_{index}" if argument.constant else str(argument.value)
    names = [leaf.value for leaf in pytree.tree_leaves(argument) if not leaf.constant]
    return str(names[0]).partition(".")[0] if names else f"arg_{index}"


def _take(emission: Emission, name: str, argument: Any, node: torch.fx.Node) -> None:
    """Bind the graph's inputs in an argument to the nodes that read them."""
    if isinstance(argument, _Held):
        if argument.constant:
            emission.call(torch_functions.check_argument, node, name, argument.value)
            return
        value = next(v for v in emission.graph.inputs if v.name == argument.value)
        if value.name in emission.sizes:
            emission.integers[value] = [node]
            return
        emission.tensors[value] = node
        _check(emission, value)
        return
    if type(argument) in (tuple, list, dict):
        items = argument.items() if isinstance(argument, dict) else enumerate(argument)
        for key, inner in items:
            _take(emission, f"{name}.{key}", inner, emission.call(operator.getitem, node, key))
        return
    parts = pytree.tree_leaves(argument)
    taken = emission.call(torch_functions.leaves, node, name, len(parts))
    for index, part in enumerate(parts):
        _take(emission, f"{name}.{index}", part, emission.call(operator.getitem, taken, index))


def _by_name(emission: Emission) -> None:
    """Placeholders for the inputs, in order; one with a default may be left out."""
    taken: set[str] = set()
    required = [v for v in emission.graph.inputs if v.constant is None]
    given = [v for v in emission.graph.inputs if v.constant is not None]
    for value in [*required, *given]:
        default = () if value.constant is None else (None,)
        emission.tensors[value] = emission.fx.placeholder(argument_name(value.name, taken), None, *default)
    for value in required:
        _check(emission, value)
    for value in given:
        assert value.constant is not None
        own = emission.fx.get_attr(emission.registered(value.name, value.constant))
        emission.tensors[value] = emission.call(torch_functions.given_or, emission.tensors[value], own)


def _check(emission: Emission, value: Value) -> None:
    """Refuse tensors of sizes and dtypes that the graph does not hold for."""
    if value.shape is not None:
        dims = tuple(d if isinstance(d, int) else None for d in value.shape)
        held = HELD_AS.get(value.dtype or "", value.dtype or "")
        dtype = emission.like_dtype(held) if is_float(held) else torch_dtype(held)
        emission.call(torch_functions.check_input, emission.tensors[value], value.name, dims, dtype)


# -- outputs ---------------------------------------------------------------------------------------------


def outputs(emission: Emission) -> None:
    """The result in its structure, after what the module writes to has been written."""
    named = dict(emission.graph.outputs)
    pairs = _mutations(emission)
    states = {output for _, output in pairs}
    made = {name: emission.tensor(value) for name, value in named.items()}
    for target, output in pairs:
        place = next(v for v in emission.graph.inputs if v.name == target)
        new = made[output]
        if emission.trained:  # what a buffer holds is no part of the next call's gradient
            new = emission.call(torch.ops.aten.detach.default, new)
        emission.call(torch.ops.aten.copy_.default, emission.places[place], new)
    spec = _spec(emission, "torch.out_spec")
    if spec is None:
        kept = {name: node for name, node in made.items() if name not in states}
        emission.fx.output(next(iter(kept.values())) if len(kept) == 1 else kept)
        return
    leaves = [made[str(value)] if kind == "output" else value for kind, value in _leaves(emission, "torch.outputs")]
    emission.fx.output(_structure(emission, spec, leaves, _classes(emission), itertools.count()))


def _classes(emission: Emission) -> dict[int, str]:
    """The classes of `torch.return_types` in the structure of outputs, by the place of their node."""
    kept: Any = emission.graph.meta.get("torch.out_classes")
    return {int(place): str(name) for place, name in kept} if isinstance(kept, tuple) else {}


def _structure(
    emission: Emission, spec: pytree.TreeSpec, leaves: list[Any], classes: Mapping[int, str], places: Iterator[int]
) -> Any:
    """The leaves (taken from the front of the list) in the structure, whose nodes are counted from the root."""
    place = next(places)
    if spec.is_leaf():
        return leaves.pop(0)
    kind, context = spec.type, spec.context
    if kind in (tuple, list):
        parts = [_structure(emission, child, leaves, classes, places) for child in spec.children()]
        if place in classes:
            return emission.call(torch_functions.return_type, classes[place], parts)
        return tuple(parts) if kind is tuple else parts
    if kind is dict:
        return {
            key: _structure(emission, child, leaves, classes, places)
            for key, child in zip(context, spec.children(), strict=True)
        }
    names = isinstance(context, list | tuple) and all(isinstance(key, str) and key.isidentifier() for key in context)
    if names and isinstance(kind, type) and issubclass(kind, dict) and len(context) == spec.num_children:
        fields = {
            key: _structure(emission, child, leaves, classes, places)
            for key, child in zip(context, spec.children(), strict=True)
        }
        return emission.call(kind, **fields)
    for _ in range(_nodes(spec) - 1):
        next(places)
    taken, leaves[:] = leaves[: spec.num_leaves], leaves[spec.num_leaves :]
    return emission.call(torch_functions.structure, pytree.treespec_dumps(spec), taken)


def _nodes(spec: pytree.TreeSpec) -> int:
    return 1 + sum(_nodes(child) for child in spec.children())


def _leaves_as_output(emission: Emission, place: Value) -> bool:
    """True if the memory of a buffer that is written to may be given out with its old value."""
    for _, value in emission.graph.outputs:
        while value.producer is not None and value.producer.op.name in _VIEWS and value.producer.operands[0]:
            value = value.producer.operands[0]
        if value is place:
            return True
    return False


def tie(emission: Emission, module: torch.fx.GraphModule) -> None:
    """Tied parameters under their other names."""
    kept: Any = emission.graph.meta.get("torch.tied")
    for other, name in kept if isinstance(kept, tuple) else ():
        path, _, leaf = str(name).rpartition(".")
        try:
            parameter = module.get_submodule(path).get_parameter(leaf)
        except AttributeError:
            continue  # a pass made another constant of it
        *parts, last = str(other).split(".")
        owner: torch.nn.Module = module
        for part in parts:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        if not hasattr(owner, last):
            owner.register_parameter(last, parameter)
