"""How `dynamic_quantize` is written in standard ONNX, for every number format (`planish.ir.rounding`, in float32).

tensor   extremes of x                     scale []
token    of each row, axes kept            scale [.., 1]
group    x as [.., blocks, block], a last block that is not full padded with zeros; scale [.., blocks]
"""

from __future__ import annotations

import numpy as np

from planish.codegen.onnx_codes import dim_of, flag, floor_log2, held, number, power_of_two, round_float
from planish.codegen.onnx_emission import Emission
from planish.ir.constant import Constant
from planish.ir.formats import FLOATS, Format
from planish.ir.graph import Node, Value
from planish.ir.ops.codes import format_of
from planish.ir.rounding import E4M3_TINY, SCALE_LIMITS
from planish.ir.types import bits, is_float, onnx_enum


def by_extremes(node: Node, e: Emission) -> None:
    """Codes, scales and zero points from the extremes of the tensor, of each row or of each block."""
    own, x = node.attributes, node.operands[0]
    assert x is not None
    dtype, granularity = str(own.get("dtype", "u8")), str(own.get("granularity", "tensor"))
    block, kept = own.get("block"), own.get("scale")
    block = block if isinstance(block, int) and granularity == "group" else None
    width = dim_of(x, -1)
    if block is not None and isinstance(width, int) and width:
        block = min(block, width)  # a block that is never full is no longer than the row
    rule, symmetric = own.get("rule"), bool(own.get("symmetric", False))
    form = format_of(
        dtype, granularity, block, None if kept is None else str(kept), None if rule is None else str(rule), symmetric
    )
    codes_name, scale_name, zero_name = e.outputs(node)
    wide = e.name(x) if x.dtype == "f32" else e.add("Cast", [e.name(x)], to=onnx_enum("f32"))
    blocks = _blocked(node, e, x, wide, block) if block else wide
    axes, keep = (None, False) if granularity == "tensor" else ((-1,), True)
    low, high = (e.reduce(f"Reduce{end}", blocks, axes, keep) for end in ("Min", "Max"))
    grid = _Grid(e, form, node.operand(1))
    grid.measure(low, high)
    ratio, shift = e.add("Div", [blocks, grid.scale]), float(1 << (bits(dtype) - 1)) if form.element != dtype else 0.0
    if is_float(dtype):
        round_float(e, _flat(e, x, ratio, block) if block else ratio, dtype, [codes_name])
    else:
        codes = e.add("Round", [ratio])
        if grid.zero or shift:
            codes = e.add("Add", [codes, grid.zero or number(e, shift)])
        least, most = (end + shift for end in form.range)
        codes = e.add("Clip", [codes, number(e, least), number(e, most)])
        e.add("Cast", [_flat(e, x, codes, block) if block else codes], codes_name, to=onnx_enum(held(e, dtype)))
    scale = held(e, x.dtype or "f32" if kept is None else str(kept))
    _give(e, node, grid.stored, scale_name, scale, granularity)
    if node.results[2].users or node.results[2] in set(e.graph.output_values()):
        zero = grid.zero
        if not zero:
            fill = e.weight(Constant(np.array([shift]), "f32", (1,)), "zero")
            zero = e.add("Expand", [fill, e.add("Shape", [grid.stored])])
        _give(e, node, zero, zero_name, held(e, dtype), granularity)


def _give(e: Emission, node: Node, name: str, output: str, dtype: str, granularity: str) -> None:
    """Scales or zero points of blocks as a result of the node."""
    if granularity == "group":
        if e.since("Squeeze") >= 13:
            name = e.add("Squeeze", [name, e.ints([-1])])
        else:
            name = e.add("Squeeze", [name], axes=(-1,))
    e.add("Cast", [name], output, to=onnx_enum(dtype))


def _blocked(node: Node, e: Emission, x: Value, name: str, block: int) -> str:
    """x as [.., blocks, block]."""
    width = dim_of(x, -1)
    if x.rank is None or not isinstance(width, int):
        raise e.fail(node, "blocks on an axis without a static size are not possible")
    short = -width % block
    if short:
        pads = [0] * (2 * x.rank - 1) + [short]
        name = e.add("Pad", [name, e.ints(pads)]) if e.since("Pad") >= 11 else e.add("Pad", [name], pads=tuple(pads))
    return e.add("Reshape", [name, e.ints([0] * (x.rank - 1) + [(width + short) // block, block])])


def _flat(e: Emission, x: Value, blocks: str, block: int) -> str:
    """What lies in blocks, with the shape of x."""
    width, rank = dim_of(x, -1), x.rank
    assert isinstance(width, int) and rank is not None
    flat = e.add("Reshape", [blocks, e.ints([0] * (rank - 1) + [width + -width % block])])
    return e.add("Slice", [flat, e.ints([0]), e.ints([width]), e.ints([rank - 1])]) if width % block else flat


class _Grid:
    """What the codes stand for (`planish.ir.rounding.grid_of_range`): names of scale, stored scale, zero point."""

    def __init__(self, e: Emission, form: Format, outer: Value | None) -> None:
        self.e, self.form, self.outer = e, form, outer
        self.scale = self.stored = self.zero = ""

    def measure(self, low: str, high: str) -> None:
        """Take the scale from the extremes."""
        e, form = self.e, self.form
        lowest, highest = form.range
        zero, one = number(e, 0.0), number(e, 1.0)
        if not form.symmetric:
            low, high = e.add("Min", [low, zero]), e.add("Max", [high, zero])
            scale = e.add("Div", [e.add("Sub", [high, low]), number(e, highest - lowest)])
            self.scale = self.stored = self._rounded(e.add("Where", [e.add("Equal", [scale, zero]), one, scale]))
            offset = e.add("Round", [e.add("Div", [e.add("Neg", [low]), self.scale])])
            self.zero = e.add("Clip", [offset, number(e, lowest), number(e, highest)])
            return
        negative = e.add("Neg", [low])
        largest = e.add("Max", [negative, high])
        empty = e.add("Equal", [largest, zero])
        if form.scale == "f8e8m0":
            self.scale = self.stored = e.add("Where", [empty, one, self._power(largest)])
            return
        if form.scale == "f8e4m3fn":
            self._two_levels(largest, empty)
            return
        if form.rule == "extreme":
            extreme = e.add("Where", [e.add("Greater", [high, negative]), high, low])
            scale = e.add("Div", [extreme, number(e, lowest)])
        else:
            scale = e.add("Div", [largest, number(e, highest + 0.5 * (form.rule == "half"))])
        size = self._rounded(e.add("Where", [empty, one, e.add("Abs", [scale])]))
        if form.rule == "extreme":
            size = e.add("Where", [e.add("Less", [scale, zero]), e.add("Neg", [size]), size])
        self.scale = self.stored = size

    def _rounded(self, scale: str) -> str:
        """Scales as their dtype holds them (`planish.ir.rounding.round_scale`)."""
        e = self.e
        least, most = SCALE_LIMITS[self.form.scale]
        scale = e.add("Clip", [scale, number(e, least), number(e, most)])
        if self.form.scale == "f32":
            return scale
        narrow = e.add("Cast", [scale], to=onnx_enum(self.form.scale))
        return e.add("Cast", [narrow], to=onnx_enum("f32"))

    def _two_levels(self, largest: str, empty: str) -> None:
        e, outer = self.e, "" if self.outer is None else self.e.name(self.outer)
        if self.outer is not None and self.outer.dtype != "f32":
            outer = e.add("Cast", [outer], to=onnx_enum("f32"))
        ratio = e.add("Div", [largest, number(e, self.form.range[1])])
        rounded = round_float(e, e.add("Div", [ratio, outer]) if outer else ratio, "f8e4m3fn")
        if held(e, "f8e4m3fn") != "f32":
            rounded = e.add("Cast", [rounded], to=onnx_enum("f32"))
        stored = e.add("Max", [rounded, number(e, E4M3_TINY)])
        self.stored = e.add("Where", [empty, number(e, 1.0), stored])
        self.scale = e.add("Mul", [self.stored, outer]) if outer else self.stored

    def _power(self, largest: str) -> str:
        """The power of two of a microscaling block."""
        e = self.e
        most, mantissa, _, top = FLOATS.get(self.form.element, (127.0, 6, 0, 6))
        base = e.add("Div", [largest, number(e, most)]) if self.form.rule == "rceil" else largest
        exponent = floor_log2(e, base)
        if self.form.rule in ("ceil", "rceil"):
            exponent = e.add("Add", [exponent, flag(e, e.add("Greater", [base, power_of_two(e, exponent)]))])
        if self.form.rule == "even":
            fraction = e.add("Div", [base, power_of_two(e, exponent)])
            small = e.add("Less", [fraction, number(e, 2.0 - 2.0 ** -(mantissa + 1))])
            exponent = e.add("Add", [exponent, flag(e, e.add("Not", [small]))])
        if self.form.rule != "rceil":
            exponent = e.add("Sub", [exponent, number(e, float(top))])
        return power_of_two(e, e.add("Clip", [exponent, number(e, -127.0), number(e, 127.0)]))
