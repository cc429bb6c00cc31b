"""Give rounded constants back the numbers that they stand for.

    1.41421354 (float32)  ->  sqrt 2, held in float64

A model file holds roundings of sqrt 2, sqrt(2 / pi), 0.044715 and 1 / 6 where an activation is written as
arithmetic (`planish.passes.raise_activations`). Held unrounded under their own dtype, they are written to the
same bits again if they were rounded correctly, and the raised activation then is the same function over the
reals, which is what the validation in float64 asks for. Constants outside of such a pattern are not touched.
Bounded: a constant moves by no more than the rounding of its dtype, 1e-6 in float32, relative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.rewriter import Rewriter
from planish.passes.base import Context, Exactness, RewritePass
from planish.passes.match import Trail, interior, near, scalar
from planish.passes.raise_activations import CUBIC, FORMS, LOOSE, SQRT_2_PI, SQRT_HALF, TIGHT, match_form

NUMBERS = (SQRT_HALF, math.sqrt(2.0), SQRT_2_PI, CUBIC, SQRT_2_PI * CUBIC, 3.0 * CUBIC, 1.0 / 6.0)


def named(value: float, tolerance: float) -> float | None:
    """The number that a constant is a rounding of; None if it is none of them, or the number itself."""
    for number in NUMBERS:
        if near(value, number, tolerance):
            return None if near(value, number, TIGHT) else number
    return None


@dataclass(frozen=True)
class NameConstants(RewritePass):
    """Rounded constants of activation patterns become the numbers that they stand for."""

    name = "name-constants"
    exactness = Exactness.BOUNDED

    def rewrite(self, node: Node, rewriter: Rewriter, context: Context) -> bool:
        for form, (anchor, *_) in FORMS.items():
            site = match_form(form, node, Trail(form, 5, node)) if node.op.name == anchor else None
            if site is None or site.parts["exact"]:
                continue
            done = False
            for inner in interior(site.root, site.sources):
                for index, operand in enumerate(inner.operands):
                    done |= operand is not None and _restore(rewriter, inner, index, operand)
            if form == "hard-swish":
                rewriter.set_attributes(node, {"alpha": 1.0 / 6.0})
                done = True
            return done
        return False


def _restore(rewriter: Rewriter, node: Node, index: int, operand: Value) -> bool:
    value, constant = scalar(operand), operand.constant
    if value is None or constant is None or not operand.is_constant:
        return False
    number = named(value, LOOSE.get(constant.dtype, 0.0))
    if number is None:
        return False
    restored = Constant(np.full(constant.shape, number), constant.dtype, constant.shape)
    rewriter.set_operand(node, index, rewriter.constant(restored, operand.name))
    return True
