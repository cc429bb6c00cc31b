"""Ops of other dialects: nothing is known of them but how to run them.

`onnx::Op` and `<domain>::Op` are ONNX nodes (`planish.ir.ops.onnx_node` runs them); an ONNX node with
subgraphs lists the outer values that these read as its last operands, and the names under which they read
them in the attribute `captures`. `torch::<namespace>.<op>.<overload>` are torch ops: attributes are arguments by
name, and operands fill the schema's other arguments in order, or as the attribute `slots` says: `indices.1` is
element 1 of the argument `indices`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from planish.ir.errors import PlanishError
from planish.ir.graph import Node, Value
from planish.ir.ops.base import OpDef, Param, Wide
from planish.ir.types import UNKNOWN, Type, is_float, torch_dtype

RANDOM = frozenset(
    {
        "Bernoulli",
        "BiasDropout",
        "BitmaskBiasDropout",
        "BitmaskDropout",
        "Dropout",  # in training mode; capture turns the others into what they are
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Sampling",
    }
)


def make(name: str) -> OpDef:
    """The row of an op of another dialect; every transform is blocked."""
    dialect, _, op = name.partition("::")
    is_torch = dialect == "torch"
    return OpDef(
        name=name,
        params=(Param("operands", optional=True, variadic=True),),
        infer=_infer,
        evaluate=_evaluate_torch if is_torch else _evaluate_onnx,
        pure=_is_pure_torch(op) if is_torch else op not in RANDOM,
        family="opaque",
        summary="an op of another dialect; blocks every transform",
    )


def _infer(node: Node) -> Sequence[Type]:
    return [value.type for value in node.results] or [UNKNOWN]


def _evaluate_onnx(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    from planish.ir.ops.onnx_node import evaluate

    return evaluate(node, operands, wide)


def torch_overload(op: str) -> torch._ops.OpOverload | None:
    """The torch op `namespace.name.overload`, None if this torch has none of that name."""
    parts = op.split(".")
    if len(parts) not in (2, 3):
        return None
    namespace = getattr(torch.ops, parts[0], None)
    try:
        packet = getattr(namespace, parts[1], None)
        found = getattr(packet, parts[2] if len(parts) == 3 else "default", None)
    except RuntimeError:  # torch's answer for some names that do not exist
        return None
    return found if isinstance(found, torch._ops.OpOverload) else None


def _is_pure_torch(op: str) -> bool:
    found = torch_overload(op)
    return found is not None and not found._schema.is_mutable and torch.Tag.nondeterministic_seeded not in found.tags


def _evaluate_torch(node: Node, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    found = torch_overload(node.op.name.partition("::")[2])
    if found is None:
        raise PlanishError(f"op '{node.op.name}': this torch ({torch.__version__}) has no such op", where=str(node))
    try:
        return _called(node, found, operands, wide)
    except (RuntimeError, NotImplementedError):
        if wide.dtype is None:
            raise
        own = [_in_own_dtype(value, held) for value, held in zip(node.operands, operands, strict=True)]
        results = _called(node, found, own, Wide())  # an op that knows some dtypes only
        wide.narrowed.append(node)
        return [r.to(wide.dtype) if isinstance(r, torch.Tensor) and r.is_floating_point() else r for r in results]


def _called(node: Node, op: torch._ops.OpOverload, operands: Sequence[Any], wide: Wide) -> Sequence[Any]:
    positional, named = torch_call(node, op, operands, wide.of)
    results = op(*positional, **named)
    return results if isinstance(results, tuple | list) else [results]


def _in_own_dtype(value: Value | None, held: Any) -> Any:
    if value is None or value.dtype is None or not isinstance(held, torch.Tensor):
        return held
    return held.to(torch_dtype(value.dtype)) if is_float(value.dtype) else held


def torch_call(
    node: Node, op: torch._ops.OpOverload, operands: Sequence[Any], dtype_of: Callable[[str], torch.dtype]
) -> tuple[list[Any], dict[str, Any]]:
    """The positional and named arguments of the call that an opaque torch node stands for.

    Args:
        op: the torch op.
        operands: what stands for the node's operands.
        dtype_of: the torch dtype for an IR dtype that an attribute names.
    """
    slots = node.attributes.get("slots")
    arguments: dict[str, Any] = {}
    if isinstance(slots, tuple):
        arguments = _filled_slots(node, slots, operands)
    rest = list(operands) if slots is None else []
    positional: list[Any] = []
    named: dict[str, Any] = {}
    skipped = False
    for argument in op._schema.arguments:
        kind = str(argument.real_type)
        if argument.name in arguments:
            value: Any = _as_python(arguments[argument.name], kind, dtype_of)
        elif argument.name in node.attributes:
            value = _as_python(node.attributes[argument.name], kind, dtype_of)
        elif not rest:
            skipped = True
            continue
        elif "List[" in kind:
            value, rest = _as_python(rest, kind, dtype_of), []
        else:
            value = _as_python(rest.pop(0), kind, dtype_of)
        if argument.kwarg_only or skipped:
            named[argument.name] = value
        else:
            positional.append(value)
    return positional, named


def _filled_slots(node: Node, slots: Sequence[Any], operands: Sequence[Any]) -> dict[str, Any]:
    """The arguments that operands are part of."""
    arguments: dict[str, Any] = {}
    for slot, operand in zip(slots, operands, strict=True):
        name, _, index = str(slot).partition(".")
        if not index:
            arguments[name] = operand
            continue
        listed = node.attributes.get(name)
        items = arguments.setdefault(name, list(listed) if isinstance(listed, tuple) else [])
        items[int(index)] = operand
    return arguments


def _as_python(value: Any, kind: str, dtype_of: Callable[[str], torch.dtype]) -> Any:
    """An argument as torch wants it: `kind` is the type that the schema gives it."""
    if isinstance(value, list | tuple):
        inner = kind.removeprefix("Optional[").removeprefix("List[").removesuffix("]").removesuffix("]")
        return [_as_python(item, inner, dtype_of) for item in value]
    if "Tensor" in kind or value is None:
        return value
    if isinstance(value, torch.Tensor):  # a symbolic number
        number = value.reshape(()).item()
        return int(number) if "int" in kind.lower() else number
    if not isinstance(value, str):
        return value
    if "ScalarType" in kind:
        return dtype_of(value)
    if "MemoryFormat" in kind or "Layout" in kind:
        return getattr(torch, value)
    return value
