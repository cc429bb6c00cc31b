"""Ops of other dialects: nothing is known of them but how to run them.

`onnx::Op` and `<domain>::Op` are ONNX nodes (`planish.ir.ops.onnx_node` runs them); an ONNX node with
subgraphs lists the outer values that these read as its last operands, and the names under which they read
them in the attribute `captures`. `torch::<namespace>.<op>.<overload>` are torch ops: operands fill the
schema's arguments in order, attributes are arguments by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from planish.ir.errors import PlanishError
from planish.ir.graph import Node
from planish.ir.ops.base import OpDef, Param, Wide
from planish.ir.types import UNKNOWN, Type

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
    rest = list(operands)
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for argument in found._schema.arguments:
        if argument.name in node.attributes:
            value: Any = node.attributes[argument.name]
            value = list(value) if isinstance(value, tuple) else value
        elif not rest:
            continue
        elif "List[" in str(argument.type):
            value, rest = rest, []
        else:
            value = rest.pop(0)
        if argument.kwarg_only or len(positional) < len(named):
            named[argument.name] = value
        else:
            positional.append(value)
    results = found(*positional, **named)
    return results if isinstance(results, tuple | list) else [results]
