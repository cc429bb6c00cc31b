"""Activations quantised per row: flattened, one run-time scale each (see `dynamic_quantize`)."""

from __future__ import annotations

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.rewriter import Declined, Rewriter

ROW_FLOOR = 1e-30  # the least row maximum: a row of zeros keeps a positive scale


class Rows:
    """A value quantised per row: flattened codes, row scales [T, 1], the leading dims to go back to.

    The codes stand for x - `offset`, and `zero` is their constant zero point.
    """

    def __init__(self, codes: Value, scale: Value, dims: Value, zero: int, offset: float) -> None:
        self.codes, self.scale, self.dims, self.zero, self.offset = codes, scale, dims, zero, offset


def quantise_rows(x: Value, dynamic: Node, rewriter: Rewriter) -> Rows:
    """QuantizeLinear of the flattened rows, each with its own scale (see `dynamic_quantize`).

    Raises:
        Declined: the width is not static, or each row has a zero point.
    """
    assert x.shape is not None
    width = x.shape[-1]
    source = dynamic.source

    def insert(
        op: str, operands: list[Value | None], attributes: dict[str, object] | None = None, **more: object
    ) -> Value:
        return rewriter.insert(op, operands, attributes, before=dynamic, source=source, **more).result  # type: ignore[arg-type]

    def constant(data: np.ndarray, hint: str) -> Value:
        return rewriter.constant(Constant.of(data), hint)

    def scalar(value: float) -> Value:
        return constant(np.array(value, np.float32), "scalar")

    if not isinstance(width, int):
        raise Declined("its width is not static", dynamic)
    if not dynamic.attributes.get("symmetric", False) and not isinstance(dynamic.attributes.get("floor"), float):
        raise Declined("its rows have zero points of their own: no fast kernel", dynamic)
    flat = insert("reshape", [x, constant(np.array([-1, width], np.int64), "rows")])
    high = insert("reduce_max", [flat], {"axes": (-1,), "keepdims": False})
    floor = dynamic.attributes.get("floor")
    if isinstance(floor, float):
        room = insert("add", [insert("max", [high, scalar(0.0)]), scalar(floor)])
        zero = insert("max", [insert("floor", [insert("div", [scalar(255.0 * floor), room])]), scalar(1.0)])
        scale = insert("div", [scalar(floor), zero])
        zeros = insert("cast", [zero], {"to": "u8"})
        constant_zero, offset = 0, -floor
    else:
        low = insert("reduce_min", [flat], {"axes": (-1,), "keepdims": False})
        largest = insert("max", [insert("max", [high, insert("neg", [low])]), scalar(ROW_FLOOR)])
        scale = insert("mul", [largest, scalar(1.0 / 127.0)])
        zeros = insert("expand", [constant(np.array([128], np.uint8), "half"), insert("shape", [scale])])
        constant_zero, offset = 128, 0.0
    codes = insert("quantize", [flat, scale, zeros], {"dtype": "u8", "axis": 0})
    column = insert("unsqueeze", [scale], {"axes": (-1,)})
    dims = insert("shape", [x], {"start": 0, "end": -1})
    return Rows(codes, column, dims, constant_zero, offset)
