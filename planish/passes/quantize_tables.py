"""Embedding tables: codes and scales are looked up, then multiplied.

    e[ids]  =  (c[ids] - z[ids]) d[ids]         one scale for a row, or one for each group of a row

The table stays in its codes: only the rows that are asked for become floats. A table that a linear multiplies with
too (a tied head) is quantised once; both read the same codes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.formats import Format
from planish.ir.graph import Attribute, Node, Value
from planish.ir.qnodes import by_columns, insert_dequantize
from planish.ir.qtensor import QTensor
from planish.ir.rewriter import Rewriter
from planish.ir.types import WIDE_FLOATS
from planish.passes.base import PassReport, place
from planish.passes.quantize_weights import check_reach, round_rows, weight_sqnr
from planish.passes.solvers import Clip


def reads_as_rows(node: Node, table: Value) -> bool:
    """True for a linear or gemm whose weight [outputs, inputs] is the table."""
    return node.op.name in ("linear", "gemm") and node.operand(1) is table and not by_columns(node)


def round_table(node: Node, table: Value, form: Format, clip: Clip, report: PassReport) -> QTensor:
    """The table of an embedding, [rows, width], rounded to nearest.

    Raises:
        Declined: its numbers are beyond the scales of the format.
        PlanishError: it holds NaN or infinity.
    """
    assert table.constant is not None
    data = table.constant.wide()
    if not np.isfinite(data).all():
        raise PlanishError(f"table '{table.name}': holds NaN or infinity", where=place(node))
    check_reach(node, data, form)
    q = round_rows(data, form, clip)
    report.figures.setdefault("weights", {})[table.name] = {
        "sqnr_db": weight_sqnr(data, q),
        "bits": round(q.bits, 4),
    }
    return q


def insert_table(rewriter: Rewriter, q: QTensor, table: Value, node: Node, *, tied: bool) -> Value:
    """Write a quantised table into the graph: the value of all of its rows, of which `look_up` takes some.

    Args:
        tied: a linear will read all of the rows.
    """
    if q.axis == 0 and q.block is None and not tied:  # as [rows, 1], so that rows of it can be taken
        q = replace(q, axis=None, scale=q.scale[:, None], zero=None if q.zero is None else q.zero[:, None])
    return insert_dequantize(rewriter, q, table.name, before=node, source=node.source)


def look_up(rewriter: Rewriter, dequantised: Value, node: Node, hint: str) -> Value:
    """The rows of a dequantised table that an embedding asks for, made from the codes and scales of those rows."""
    ids = node.operand(1)
    made = dequantised.producer
    assert made is not None and ids is not None and ids.rank is not None

    def rows(held: Value | None, name: str) -> Value | None:
        if held is None or held.rank == 0:
            return held
        if held.producer is not None:  # scales that are codes themselves
            return look_up(rewriter, held, node, name)
        if held.rank == 1:  # a vector along the rows
            assert held.constant is not None
            data = held.constant.wide() if held.dtype in WIDE_FLOATS else held.constant.array()
            column = Constant(data[:, None], held.constant.dtype, (held.constant.shape[0], 1))
            held = rewriter.constant(column, f"{held.name}.column")
        names = [name]
        return rewriter.insert("embedding", [held, ids], before=node, names=names, source=node.source).result

    operands = [rows(v, f"{hint}.{part}") for v, part in zip(made.operands, ("codes", "scale", "zero"), strict=False)]
    attributes: dict[str, Attribute] = {k: v for k, v in made.attributes.items() if k not in ("axis", "block")}
    if made.attributes.get("block") is not None:
        attributes |= {"axis": ids.rank, "block": made.attributes["block"]}
    names = [f"{hint}.rows"]
    return rewriter.insert("dequantize", operands, attributes, before=node, names=names, source=node.source).result
