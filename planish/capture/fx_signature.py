"""The names of a torch model's inputs, outputs, parameters and modules."""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from planish.ir.graph import Attribute

_ITEM = re.compile(r"\[(?:'([^']*)'|\"([^\"]*)\"|(-?\d+))\]")


def module_path(text: str) -> str:
    """`L['self'].model.layers[0]._modules['a'].weight` as `model.layers.0.a.weight`."""
    plain = _ITEM.sub(lambda m: "." + next(g for g in m.groups() if g is not None), text)
    plain = re.sub(r"\b(_modules|_parameters|_buffers)\.", "", plain)
    plain = re.sub(r"^L\.?(self|__self___?)(\.|$)", "", plain)
    plain = re.sub(r"^(self)(\.|$)", "", plain)
    return re.sub(r"\.{2,}", ".", plain).strip(".")


def leaf_paths(spec: pytree.TreeSpec) -> list[tuple[str, ...]]:
    """The keys that lead to each leaf, in order; a node whose type has no keys counts its children."""
    if spec.is_leaf():
        return [()]
    children = spec.children()
    return [(key, *rest) for key, child in zip(_keys(spec), children, strict=True) for rest in leaf_paths(child)]


def _keys(spec: pytree.TreeSpec) -> list[str]:
    count, context = spec.num_children, spec.context
    if spec.type not in (tuple, list):
        fields = getattr(context, "_fields", None)  # of a named tuple, whose class is the context
        listed = context[1] if isinstance(context, list | tuple) and len(context) == 2 and count != 2 else context
        for keys in (fields, listed, context):
            if isinstance(keys, list | tuple) and len(keys) == count and all(isinstance(k, str | int) for k in keys):
                return [str(key) for key in keys]
    return [str(index) for index in range(count)]


def input_names(spec: pytree.TreeSpec, forward: Callable[..., Any] | None, given: Sequence[str]) -> list[str]:
    """A name for each leaf of (args, kwargs): the argument's, with dots where it has structure.

    Args:
        spec: of (args, kwargs).
        forward: the module's, for the names of positional arguments.
        given: what the traced program calls the leaves, for positional arguments without a name.
    """
    args, _ = spec.children()
    positional = _parameter_names(forward, args.num_children) if forward is not None else None
    names = []
    for leaf, (side, *keys) in enumerate(leaf_paths(spec)):
        if side == "0" and positional is not None:
            keys[0] = positional[int(keys[0])]
        names.append(given[leaf] if side == "0" and positional is None else ".".join(keys))
    return names


def _parameter_names(forward: Callable[..., Any], count: int) -> list[str] | None:
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return None
    names: list[str] = []
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            names.extend(f"{parameter.name}.{i}" for i in range(max(count - len(names), 0)))
    return names if len(names) >= count else None


def output_names(spec: pytree.TreeSpec) -> list[str]:
    """A name for each leaf of the outputs: its keys with dots, `output_0` where it has none."""
    names = []
    for keys in leaf_paths(spec):
        plain = all(key.isdigit() for key in keys)
        names.append(f"output_{'_'.join(keys) or 0}" if plain else ".".join(keys))
    return names


def spec_text(spec: pytree.TreeSpec) -> str:
    """A tree spec as text that `pytree.treespec_loads` reads; a class without a serialised name as a dict or list."""
    try:
        return pytree.treespec_dumps(spec)
    except (NotImplementedError, TypeError, KeyError):
        return pytree.treespec_dumps(pytree.tree_structure(_plainer(spec)))


def return_types(spec: pytree.TreeSpec) -> tuple[tuple[int, str], ...]:
    """(place, name) of the classes of `torch.return_types`, which have no serialised name; from the root on."""
    found: list[tuple[int, str]] = []

    def visit(node: pytree.TreeSpec, place: int) -> int:
        name = getattr(node.type, "__name__", "")
        if not node.is_leaf() and getattr(torch.return_types, name, None) is node.type:
            found.append((place, name))
        place += 1
        for child in node.children():
            place = visit(child, place)
        return place

    visit(spec, 0)
    return tuple(found)


def _plainer(spec: pytree.TreeSpec) -> Any:
    """A tree of dicts and tuples of the same structure; what has a serialised name keeps its class and its keys."""
    if spec.is_leaf():
        return 0
    children = [_plainer(child) for child in spec.children()]
    if spec.type in (tuple, list, dict, OrderedDict):
        return pytree.SUPPORTED_NODES[spec.type].unflatten_fn(children, spec.context)
    keys = _keys(spec)
    return tuple(children) if all(key.isdigit() for key in keys) else dict(zip(keys, children, strict=True))


def constant_attribute(value: Any) -> Attribute:
    """An argument that is no tensor, as it is kept."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return tuple(constant_attribute(item) for item in value)
    return str(value)
