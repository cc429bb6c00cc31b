"""The tables of a rotary embedding in the form that the row `rope` reads, for `raise_rope`.

Of half width they are doubled, for a turn the other way the sine is negated, of complex numbers the parts are taken.
What an earlier rotary embedding had made already is used again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Attribute, Node, Value
from planish.ir.ops.base import OpDef
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.types import TensorType
from planish.passes.parts import last_dim


def _precedes(node: Node, root: Node) -> bool:
    current: Node | None = node
    while current is not None and current is not root:
        current = current._next
    return current is root


def _alike(one: Value | None, two: Value | None) -> bool:
    """True if two operands are one value, or constants of integers with the same data."""
    if one is two or one is None or two is None or one.constant is None or two.constant is None:
        return one is two
    if not (one.is_constant and two.is_constant) or "i64" not in (one.dtype, two.dtype) or one.type != two.type:
        return False
    return bool(np.array_equal(one.constant.array(), two.constant.array()))


def derived(
    rewriter: Rewriter,
    op: str | OpDef,
    operands: Sequence[Value],
    attributes: Mapping[str, Attribute],
    root: Node,
    shape: tuple[int | str | None, ...] | None = None,
) -> Value:
    """A node before `root`, or the one before it that computes the same already. `shape`: of an opaque op's result."""
    name = op if isinstance(op, str) else op.name
    for user in dict.fromkeys(operands[0].users):
        same = user.op.name == name and user.attributes == dict(attributes) and len(user.operands) == len(operands)
        if same and all(map(_alike, user.operands, operands)) and _precedes(user, root):
            return user.result
    types = None if shape is None else [TensorType("f64" if operands[0].dtype == "c128" else "f32", shape)]
    return rewriter.insert(op, operands, attributes, before=root, types=types, source=root.source).result


def doubled(rewriter: Rewriter, table: Value, root: Node, interleaved: bool) -> Value:
    """[.., d] from a table [.., d/2]: each half the table, or each number twice."""
    size = last_dim(table)
    if size == 1 and last_dim(root.result) != 2:
        return table
    if size is None:
        raise Declined("a table of unknown width", root)
    if table.is_constant and table.constant is not None:
        data = table.constant.wide()
        data = np.repeat(data, 2, axis=-1) if interleaved else np.concatenate((data, data), axis=-1)
        return rewriter.constant(Constant(data, table.constant.dtype, data.shape), table.name)
    if interleaved:
        index = rewriter.constant(Constant.of(np.repeat(np.arange(size), 2), "i64"), "pairs")
        return derived(rewriter, "gather", [table, index], {"axis": -1}, root)
    return derived(rewriter, "concat", [table, table], {"axis": -1}, root)


def negative(rewriter: Rewriter, table: Value, root: Node) -> Value:
    """-sin: the angles the other way round."""
    if table.is_constant and table.constant is not None:
        return rewriter.constant(Constant(-table.constant.wide(), table.constant.dtype, table.shape), table.name)  # type: ignore[arg-type]
    return derived(rewriter, "neg", [table], {}, root)


def complex_parts(rewriter: Rewriter, angles: Value, view: Node, root: Node) -> tuple[Value, Value]:
    """(cos, sin) of complex numbers cos + i sin, by a node like `view`, which shows such numbers as pairs."""
    assert angles.shape is not None
    pairs = derived(rewriter, view.op, [angles], view.attributes, root, (*angles.shape, 2))
    made = []
    for part in (0, 1):
        index = rewriter.constant(Constant.of(np.array(part), "i64"), "part")
        made.append(derived(rewriter, "gather", [pairs, index], {"axis": -1}, root))
    return made[0], made[1]
