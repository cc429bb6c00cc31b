"""Which formats `quantize` takes where, and which kind of channels a linear reads."""

from __future__ import annotations

from planish.ir.errors import PlanishError
from planish.ir.formats import Format
from planish.ir.graph import Graph, Value
from planish.ir.ops.base import Act
from planish.ir.spaces import analyse
from planish.passes.base import Pass
from planish.passes.channels import Kind, kind_of, positions
from planish.passes.named import check_format


def check_form(instance: Pass, name: str) -> None:
    """Check the option `weights`, `activations` or `embeddings` of a pass: a format that makes sense there, or none.

    Raises:
        PlanishError: it does not.
    """
    check_format(instance, name, "none")
    text = getattr(instance, name)
    if text == "none":
        return
    if name == "embeddings" and Format.parse(text).clusters > 1:
        raise PlanishError(f"pass '{instance.name}': option '{name}': {text}: a table is not split into clusters")


def kinds_read(graph: Graph) -> dict[Value, Kind]:
    """For each activation, what the channels on its last axis are for."""
    place = positions(graph)
    found: dict[Value, Kind] = {}
    for space in analyse(graph).of(Act.PERMUTE):
        kind = kind_of(space, place)
        for member in space.activations:
            value = member.value
            if value is not None and value.rank is not None and member.axes == (value.rank - 1,):
                found.setdefault(value, kind)
    return found
