"""Dividing what linears read by s: in the constants that write it, or by an explicit op before them."""

from __future__ import annotations

import numpy as np

from planish.ir.absorb import absorb
from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.ops.base import Act
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import ChannelSpaces
from planish.ir.stats import Stats
from planish.ir.transform import Scale, Shift
from planish.passes.base import Context
from planish.passes.finite import require_finite_space


def fold_smoothing(rewriter: Rewriter, value: Value, s: np.ndarray, spaces: ChannelSpaces, context: Context) -> bool:
    """Divide what writes a value by s [n], and multiply what reads it; False where its space does not take that up.

    Args:
        spaces: of the graph; it may have changed since in its constants only.
    """
    assert value.rank is not None
    found = spaces.at(value, (value.rank - 1,), Act.SCALE)
    if len(found) != 1 or found[0].size != len(s):
        return False
    space = context.guarded(rewriter.graph, found[0])
    member = next(m for m in space.activations if m.value is value and m.axes == (value.rank - 1,))
    if member.atoms is not None:
        return False
    transform = Scale(s**-member.variance)
    try:
        require_finite_space(space)
        absorb(rewriter, space, transform)
    except Declined:
        return False
    context.transformed(rewriter, space, transform)
    return True


def smoothed(
    rewriter: Rewriter, value: Value, s: np.ndarray, shift: float, before: Node | None, stats: Stats | None, source: str
) -> tuple[Value, int]:
    """(x + shift) / s with its statistics, before a node, and how many ops that took.

    Args:
        s: float64 [n]; ones take no op, nor does a shift of 0.
    """
    assert value.rank is not None and value.dtype is not None
    axis, made = value.rank - 1, value
    steps: list[tuple[str, np.ndarray, Shift | Scale]] = []
    if shift:
        steps.append(("shifted", np.full((), shift), Shift(np.full(len(s), shift))))
    if (s != 1).any():
        steps.append(("smoothed", 1.0 / s, Scale(1.0 / s)))
    for word, data, transform in steps:
        name = f"{value.name}.{word}"
        by = rewriter.constant(Constant(data, value.dtype, data.shape), f"{name}.by")
        op = "add" if isinstance(transform, Shift) else "mul"
        old, made = made, rewriter.insert(op, [made, by], before=before, names=[name], source=source).result
        if stats is not None:
            stats.copy_record(old.name, made.name)
            stats.transform(made.name, value.rank, (axis,), transform, None, 1)
    return made, len(steps)
