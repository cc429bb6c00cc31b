"""The op table: one row per op, grouped by family.

`get(name)` gives a row. A name with `::` is an op of another dialect (`onnx::NonZero`,
`com.microsoft::MatMulNBits`, `torch::aten.foo.default`): an opaque row, made on demand.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from planish.ir.errors import PlanishError, nearest
from planish.ir.ops.base import OpDef
from planish.ir.ops.splitting import with_splits

FAMILIES = (
    "elementwise",
    "arithmetic",
    "structural",
    "sizes",
    "selection",
    "indexing",
    "lookup",
    "resize",
    "contraction",
    "grouped",
    "convolution",
    "normalisation",
    "reduction",
    "attention",
    "rotation",
    "reassembly",
    "scan",
    "quantization",
)

_table: dict[str, OpDef] = {}
_opaque: dict[str, OpDef] = {}
_complete: list[bool] = []


def register(row: OpDef) -> OpDef:
    """Add a row to the table; ValueError if the name is taken."""
    if row.name in _table:
        raise ValueError(f"op '{row.name}' is registered twice")
    row = with_splits(row)
    _table[row.name] = row
    return row


def table() -> Mapping[str, OpDef]:
    """All rows by name, in the order of the families."""
    if not _complete:  # a family imported on its own leaves the table incomplete
        for family in FAMILIES:
            import_module(f"planish.ir.ops.{family}")
        place = {family: index for index, family in enumerate(FAMILIES)}
        rows = sorted(_table.values(), key=lambda row: place[row.family])  # one imported before the others comes first
        _table.clear()
        _table.update((row.name, row) for row in rows)
        _complete.append(True)
    return _table


def get(name: str) -> OpDef:
    """The row of an op.

    Raises:
        PlanishError: no such op.
    """
    row = table().get(name)
    if row is not None:
        return row
    if "::" in name:
        row = _opaque.get(name)
        if row is None:
            from planish.ir.ops.opaque import make

            row = _opaque[name] = make(name)
        return row
    raise PlanishError(f"op '{name}': unknown", hint=nearest(name, table()))


def __getattr__(name: str) -> Any:
    try:
        return table()[name]
    except KeyError:
        raise AttributeError(name) from None
