"""One mask operand from all that was put on the scores, for `raise_attention`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.rewriter import Rewriter
from planish.passes.heads import Lead, on_four_axes
from planish.passes.scores import Mask


def one_mask(rewriter: Rewriter, masks: Sequence[Mask], lead: Lead, dtype: str, root: Node) -> Value | None:
    """One mask of several, from the product on: sums of those that are added, conjunctions of those that choose."""

    def insert(op: str, *operands: Value) -> Value:
        return rewriter.insert(op, operands, before=root).result

    def number(value: float, hint: str) -> Value:
        return rewriter.constant(Constant(np.array(value), dtype, ()), hint)

    term = keep = None
    for mask in masks:
        if mask.kind == "floor":  # a finite score stays as it is
            term, keep = _chosen(rewriter, term, keep, dtype, root), None
            term = term if term is None else insert("max", term, number(mask.fill, "least"))
            continue
        value = on_four_axes(rewriter, mask, lead, root)
        if mask.kind != "add" and mask.fill == -np.inf:
            value = insert("logical_not", value) if mask.kind == "drop" else value
            keep = value if keep is None else insert("logical_and", keep, value)
            continue
        if mask.kind != "add":
            choices = (number(mask.fill, "least"), number(0.0, "zero"))
            value = insert("where", value, *(choices if mask.kind == "drop" else choices[::-1]))
        else:
            if value.dtype != dtype:
                value = rewriter.insert("cast", [value], {"to": dtype}, before=root).result
            value = value if mask.factor == 1.0 else insert("mul", value, number(mask.factor, "factor"))
        term = value if term is None else insert("add", term, value)
    return _chosen(rewriter, term, keep, dtype, root) if term is not None else keep


def _chosen(rewriter: Rewriter, term: Value | None, keep: Value | None, dtype: str, root: Node) -> Value | None:
    """What is added, and -inf where nothing is kept."""
    if keep is None:
        return term
    zero, never = (
        rewriter.constant(Constant(np.array(x), dtype, ()), h) for x, h in ((0.0, "zero"), (-np.inf, "never"))
    )
    return rewriter.insert("where", [keep, zero if term is None else term, never], before=root).result
