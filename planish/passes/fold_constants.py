"""Compute what does not depend on the inputs, and drop what does nothing.

    f(c1, c2, ..)                  ->  constant    floats in float64 from unrounded data, integers exactly
    shape(x) and its arithmetic    ->  constant    where the dims are static
    x * 1, x + 0, x / 1, ..        ->  x           also casts to the same dtype, reshapes to the same shape
    x * expand(y, shape of x)      ->  x * y       where the op broadcasts y itself
    transpose(transpose(x, p), q)  ->  transpose(x, p o q);  reshape(reshape(x)) -> reshape(x)
    where(is_nan(p), 0, p)         ->  p           with `nan_guards` only; attention{safe} likewise

Exact over the reals. A result is rounded to its dtype once, when the model is written. Random ops, ops with
side effects and opaque ops never fold; a transpose of a weight that only products read stays for
`raise-linear`, which takes it up without moving data, and 1 + w that scales a norm for `raise-norms`. The
guard around a softmax is no identity: a row of scores that are all -inf gives 0 with it and NaN without.
Only a graph whose masks are finite may drop it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.evaluator import evaluate_nodes
from planish.ir.graph import Node, Value
from planish.ir.ops.base import Wide
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.shapes import static_ints
from planish.ir.types import WIDE_FLOATS, is_float, numpy_dtype
from planish.passes.base import Context, Exactness, RewritePass
from planish.passes.identities import drop_expansions, merged, neutral, unchanged
from planish.passes.match import attribute, erase_dead, is_op, is_output, nan_guarded, scalar
from planish.passes.options import Range, option

if TYPE_CHECKING:
    import torch

MEGABYTE = 1 << 20
# ops whose value jumps: a rounding of an operand may show at full size
JUMPING = frozenset({"floor", "ceil", "round", "sign", "mod", "is_nan"})


@dataclass(frozen=True)
class FoldConstants(RewritePass):
    """Constant folding and the removal of identities.

    Args:
        max_growth: MB by which one fold may grow the model (an expanded mask, a range).
        nan_guards: drop the NaN guards of softmaxes; not exact on rows that are masked throughout.
    """

    max_growth: float = option(1.0, Range(0))  # MB
    nan_guards: bool = False

    name = "fold-constants"
    exactness = Exactness.EXACT

    def rewrite(self, node: Node, rewriter: Rewriter, context: Context) -> bool:
        if node.op.opaque or not node.op.pure or not node.results:
            return False
        if self.nan_guards and node.op.name == "attention" and attribute(node, "safe"):
            rewriter.set_attributes(node, {"safe": None})
            return True
        if drop_expansions(node, rewriter):
            return True
        for simplify in (self._unguarded, neutral, unchanged, merged):
            value = simplify(node, rewriter)
            if value is not None:
                _replace(rewriter, node, value)
                return True
        constants = _static(node)
        if constants is None and all(v is None or v.is_constant for v in node.operands):
            constants = self._folded(node)
        if constants is None:
            return False
        values = [rewriter.constant(c, r.name) for c, r in zip(constants, node.results, strict=True)]
        names = [r.name for r in node.results]
        rewriter.replace_node(node, *values)
        for value, name in zip(values, names, strict=True):
            rewriter.rename(value, name)
        return True

    def _unguarded(self, node: Node, rewriter: Rewriter) -> Value | None:
        if not self.nan_guards or node.op.name != "where":
            return None
        kept = nan_guarded(node.result)
        return kept if kept is not None and is_op(kept, "softmax", "attention") else None

    def _folded(self, node: Node) -> list[Constant] | None:
        types = [v.dtype for v in (*node.operands, *node.results) if v is not None]
        if any(t is None or t == "str" or (is_float(t) and t not in WIDE_FLOATS) for t in types):
            return None
        if _for_linear(node) or _for_norm(node) or node.op.name in ("dequantize", "dequantize_split"):
            return None
        grown = sum(_size(r) or 0 for r in node.results) - sum(
            v.constant.nbytes for v in set(node.operands) if v is not None and v.constant and len(v.users) == 1
        )
        if grown > self.max_growth * MEGABYTE or any(_size(r) is None for r in node.results):
            if node.op.name != "constant_of_shape" and any(_size(r) is None for r in node.results):
                return None  # its shape follows from data: a range, for example
            raise Declined(f"the constant would grow the model by more than {self.max_growth:g} MB", node)
        return evaluated(node)


def evaluated(node: Node) -> list[Constant] | None:
    """The results of a node of constants; None where they hinge on how an operand was rounded."""
    import torch

    if (results := _run(node, torch.float64)) is None:
        return None
    floats = any(v is not None and is_float(v.dtype) for v in node.operands)
    jumps = node.op.name in JUMPING or any(not is_float(r.dtype) for r in node.results)
    if floats and jumps:
        own = _run(node, None)
        if own is None or not all(torch.equal(a.double(), b.double()) for a, b in zip(results, own, strict=True)):
            return None
    constants = []
    for tensor, result in zip(results, node.results, strict=True):
        assert result.dtype is not None
        array = tensor.numpy()
        if not is_float(result.dtype):
            array = array.astype(numpy_dtype(result.dtype))
        constants.append(Constant(np.ascontiguousarray(array).reshape(array.shape), result.dtype, array.shape))
    return constants


def _run(node: Node, dtype: torch.dtype | None) -> list[Any] | None:
    try:
        found = evaluate_nodes([node], {}, node.results, Wide(dtype))
    except PlanishError:
        return None  # it cannot be computed: it stays, and fails where the model is run
    return [found[r] for r in node.results]


def _size(value: Value) -> int | None:
    """Bytes of a value of static shape."""
    shape = value.shape
    if shape is None or value.dtype is None or not all(isinstance(d, int) for d in shape):
        return None
    return Constant(None, value.dtype, tuple(d for d in shape if isinstance(d, int))).nbytes


def _for_linear(node: Node) -> bool:
    """True for the transpose of a matrix that only products read."""
    if node.op.name != "transpose" or node.result.rank != 2 or is_output(node.result):
        return False
    readers = node.result.users
    return bool(readers) and all(
        r.op.name in ("matmul", "gemm", "linear") and r.operand(1) is node.result and r.operand(0) is not node.result
        for r in readers
    )


def _for_norm(node: Node) -> bool:
    """True for 1 + w where only products with what may be a norm read it: `raise-norms` takes up w itself."""
    if node.op.name != "add" or is_output(node.result) or not any(scalar(v) == 1.0 for v in node.operands):
        return False
    readers = node.result.users
    return bool(readers) and all(
        r.op.name == "mul" and any(is_op(v, "mul", "div", "rms_norm", "cast") for v in r.operands) for r in readers
    )


def _static(node: Node) -> list[Constant] | None:
    """Integers that follow from static dims."""
    if len(node.results) != 1 or node.result.dtype not in ("i64", "i32") or node.result.rank not in (0, 1):
        return None
    elements = static_ints(node.result)
    if elements is None:
        return None
    shape = () if node.result.rank == 0 else (len(elements),)
    return [Constant(np.array(elements, numpy_dtype(node.result.dtype)).reshape(shape), node.result.dtype, shape)]


def _replace(rewriter: Rewriter, node: Node, value: Value) -> None:
    """Make the readers of a node read `value`; a new value takes over the node's name."""
    fresh = value.producer is not None and not value.users and not is_output(value)
    if is_output(node.result) and not fresh and (value.producer is None or is_output(value)):
        raise Declined("it gives a graph input, or another output, out once more", node)
    name = node.result.name
    before = [v.producer for v in node.operands if v is not None and v.producer is not None]
    rewriter.replace_node(node, value)
    if fresh:
        rewriter.rename(value, name)
    erase_dead(rewriter, before)
