"""Passes that compute with the numbers of constants leave those alone that hold NaN or infinity."""

from __future__ import annotations

import numpy as np

from planish.ir.graph import Node, Value
from planish.ir.rewriter import Declined
from planish.ir.spaces import Space
from planish.ir.types import WIDE_FLOATS


def require_finite(value: Value | None, node: Node | None = None) -> None:
    """Check the numbers of a float constant; other values pass.

    Args:
        node: the place to name; None: the constant itself.

    Raises:
        Declined: it holds NaN or infinity.
    """
    if value is None or value.constant is None or value.dtype not in WIDE_FLOATS:
        return
    data = value.constant.wide() if value.constant.is_wide else value.constant.array().astype(np.float32, copy=False)
    if not np.isfinite(data).all():
        what = "NaN" if np.isnan(data).any() else "infinity"
        raise Declined(f"the constant %{value.name} holds {what}", node if node is not None else value)


def require_finite_space(space: Space) -> None:
    """Check all constants that a transform of a space reads.

    Raises:
        Declined: one holds NaN or infinity; the reason names it.
    """
    values = dict.fromkeys(member.current for member in space.constants)
    for site in space.folds:
        values.update(dict.fromkeys(v for v in site.node.operands if v is not None and v.is_constant))
    for value in values:
        require_finite(value)
