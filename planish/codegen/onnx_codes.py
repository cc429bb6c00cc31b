"""How codes and scales of narrow dtypes lie in an ONNX model, and what is computed with them there.

A dtype that DequantizeLinear reads at the model's opset is written as it is (`NATIVE`). Otherwise, and for FLOAT4E2M1
and FLOAT8E8M0 scales, which ONNX Runtime's DequantizeLinear does not take, a constant is written as bytes that look
their numbers up in a table of 256 rows (two numbers a row for 4 bits); a 3-bit integer is held in 4 bits, a 6-bit
float in FLOAT8E4M3FN, which has all its values. Codes that are computed are held in the next wider dtype that
the opset has (`held`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from planish.codegen.onnx_emission import Emission
from planish.ir.constant import Constant, pack_bits, unpack_bits
from planish.ir.errors import PlanishError
from planish.ir.formats import FLOATS
from planish.ir.ops.codes import RANGES
from planish.ir.types import WIDE_FLOATS, Dim, TensorType, bits, is_float, numpy_dtype, onnx_enum

if TYPE_CHECKING:
    from planish.ir.graph import Node, Value

BLOCK_OPSET = 21  # of a scale per block
NATIVE = {"i8": 10, "u8": 10, "i32": 10, "u4": 21, "i4": 21, "u16": 21, "i16": 21, "u2": 25, "i2": 25}
NATIVE |= dict.fromkeys(("f8e4m3fn", "f8e5m2", "f8e4m3fnuz", "f8e5m2fnuz"), 19)
POWER_OPSET = 24  # of a Cast from FLOAT8E8M0
_STORED = {"i3": "i4", "u3": "u4", "f6e2m3": "f8e4m3fn", "f6e3m2": "f8e4m3fn"}  # what holds a constant
_MANY = 7  # binades up to which a step is picked by comparisons


def native(e: Emission, dtype: str | None) -> bool:
    """True if DequantizeLinear reads codes of this dtype at the opset."""
    return dtype is not None and e.opset >= NATIVE.get(dtype, math.inf)


def held(e: Emission, dtype: str) -> str:
    """The dtype in which codes or scales that are computed are held."""
    if dtype in WIDE_FLOATS or native(e, dtype):
        return dtype
    return "f32" if is_float(dtype) else f"{dtype[0]}8"


def widened(e: Emission, data: Constant) -> Constant:
    """A constant in the dtype in which such codes are computed: itself where that is its own."""
    numbers = data.dtype in RANGES or is_float(data.dtype)
    return as_dtype(data, held(e, data.dtype)) if numbers and bits(data.dtype) <= 8 else data


def check_public(node: Node, e: Emission) -> None:
    """An error if a result that is an output of the model is not of its own dtype in it."""
    public = set(e.graph.output_values())
    for result in node.results:
        if result in public and result.dtype is not None and held(e, result.dtype) != result.dtype:
            since = NATIVE.get(result.dtype)
            needs = f"needs ONNX opset {since}; got {e.opset}" if since else "has no form that ONNX Runtime computes"
            raise PlanishError(f"op '{node.op.name}': an output of dtype {result.dtype} {needs}", where=str(node))


def _data(value: Value) -> Constant | None:
    return None if value.is_input else value.constant


def codes_of(node: Node, e: Emission, value: Value) -> tuple[str, str]:
    """Codes as the model has them: their name, and their dtype there; f32 if they are the numbers themselves.

    Raises:
        PlanishError: an input of a dtype that the opset lacks.
    """
    dtype, data = value.dtype or "f32", _data(value)
    if dtype in WIDE_FLOATS or native(e, dtype):
        return e.name(value), dtype
    if data is None:
        if value.is_input:
            since = NATIVE.get(dtype)
            needs = f"ONNX opset {since}; got {e.opset}" if since else "a form that ONNX Runtime lacks"
            raise PlanishError(f"op '{node.op.name}': an input of dtype {dtype} needs {needs}", where=str(node))
        return e.name(value), held(e, dtype)
    stored = _STORED.get(dtype, dtype)
    if native(e, stored):
        return e.weight(as_dtype(data, stored), f"{e.name(value)}_{stored}", key=(value, stored)), stored
    return look_up(e, as_dtype(data, stored), e.name(value), (value, "numbers")), "f32"


def gathered_as(e: Emission, table: Value | None) -> str | None:
    """The dtype in which a constant table lies in the model, where ONNX's Gather does not take its own; else None."""
    if table is None or table.constant is None or table.is_input or not native(e, table.dtype):
        return None
    dtype = str(table.dtype)
    return "f16" if is_float(dtype) else f"{dtype[0]}8" if bits(dtype) < 8 else None


def dim_of(value: Value, axis: int) -> Dim:
    """A dim of a value; None if it is unknown."""
    return value.type.dim(axis) if isinstance(value.type, TensorType) else None


def as_dtype(data: Constant, dtype: str) -> Constant:
    """The numbers of a constant in another dtype."""
    array = data.array()
    wide = array.astype(np.float32) if is_float(dtype) else array.astype(np.int32)
    return data if dtype == data.dtype else Constant(wide.astype(numpy_dtype(dtype)), dtype, data.shape)


def look_up(e: Emission, data: Constant, name: str, key: object) -> str:
    """The numbers of a constant of at most 8 bits, float32: its bytes look them up in a table."""
    shape, width = data.shape, bits(data.dtype)
    per = 8 // width
    raw = data.array()
    packed = pack_bits(raw, data.dtype) if width < 8 else np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    whole = bool(shape) and shape[-1] % per == 0
    rows = (*shape[:-1], shape[-1] // per) if whole else packed.shape
    every = np.arange(256, dtype=np.uint8)
    numbers = unpack_bits(every, data.dtype, 256 * per) if width < 8 else every.view(numpy_dtype(data.dtype))
    with np.errstate(invalid="ignore"):
        table = numbers.astype(np.float32).reshape((256, per) if per > 1 else (256,))
    held_bytes = e.weight(Constant.of(packed.reshape(rows)), f"{name}_bytes", key=(key, "bytes"))
    index = e.add("Cast", [held_bytes], to=onnx_enum("i32"))
    found = e.add("Gather", [e.weight(Constant.of(table), "table", key=(data.dtype, "table")), index])
    if per == 1:
        return found
    if not whole:
        flat = e.add("Reshape", [found, e.ints([-1])])
        found = e.add("Slice", [flat, e.ints([0]), e.ints([data.size])])
    return e.add("Reshape", [found, e.ints(shape)])


def scale_of(e: Emission, value: Value, dtype: str) -> str:
    """Scales in a wide dtype."""
    own, data = value.dtype or "f32", _data(value)
    if own == dtype:
        return e.name(value)
    if own == "f8e8m0":
        if data is None:
            wide = e.name(value)  # held in float32
        elif e.opset >= POWER_OPSET:
            wide = e.add("Cast", [e.name(value)], to=onnx_enum("f32"))
        else:
            wide = look_up(e, data, e.name(value), (value, "numbers"))
        return wide if dtype == "f32" else e.add("Cast", [wide], to=onnx_enum(dtype))
    return e.add("Cast", [e.name(value)], to=onnx_enum(dtype))


def spread(
    node: Node, e: Emission, name: str, value: Value, codes: Value, axis: int | None, block: int | None, lead: int = 0
) -> str:
    """A scale or zero point so that it broadcasts against the codes; `lead` of the value's axes are gone already."""
    rank = codes.rank
    if axis is None or value.rank == lead:
        return name
    if rank is None:
        raise e.fail(node, "codes of an unknown rank are not possible")
    axis %= rank
    if block is not None:
        dim = dim_of(codes, axis)
        if not isinstance(dim, int):
            raise e.fail(node, "blocks on an axis without a static size are not possible")
        index = e.weight(Constant.of((np.arange(dim) // block).astype(np.int64)), "blocks", key=("blocks", dim, block))
        return e.add("Gather", [name, index], axis=axis)
    return name if axis == rank - 1 else e.add("Reshape", [name, e.ints([-1] + [1] * (rank - 1 - axis))])


# -- arithmetic of float32 values --------------------------------------------------------------------


def number(e: Emission, value: float) -> str:
    """A scalar of float32."""
    return e.weight(Constant(np.array(value, np.float64), "f32", ()), "scalar")


def floor_log2(e: Emission, x: str) -> str:
    """floor(log2 x) of magnitudes, exact: a guess, one more or less where its power of two says so; of 0 about -150."""
    guess = e.add("Floor", [e.add("Mul", [e.add("Log", [x]), number(e, 1.0 / math.log(2.0))])])
    guess = e.add("Clip", [guess, number(e, -149.0), number(e, 127.0)])
    over = e.add("Cast", [e.add("Greater", [power_of_two(e, guess), x])], to=onnx_enum("f32"))
    guess = e.add("Sub", [guess, over])
    under = e.add("Greater", [number(e, 2.0), e.add("Div", [x, power_of_two(e, guess)])])
    return e.add("Where", [under, guess, e.add("Add", [guess, number(e, 1.0)])])


def power_of_two(e: Emission, exponent: str) -> str:
    """2^exponent of integers."""
    return e.add("Pow", [number(e, 2.0), exponent])


def flag(e: Emission, condition: str) -> str:
    """A condition as 0 or 1."""
    return e.add("Cast", [condition], to=onnx_enum("f32"))


def round_float(e: Emission, x: str, dtype: str, outputs: list[str] | None = None) -> str:
    """The nearest elements of a float dtype to float32 values, saturated, in the dtype that holds them (`held`)."""
    most, mantissa, least, top = FLOATS[dtype]
    clipped = e.add("Clip", [x, number(e, -most), number(e, most)])
    if native(e, dtype):
        return e.add("Cast", [clipped], outputs, to=onnx_enum(dtype))
    size = e.add("Abs", [clipped])
    if top - least < _MANY:
        step = number(e, 2.0 ** (least - mantissa))
        for exponent in range(least + 1, top + 1):
            below = e.add("Less", [size, number(e, 2.0**exponent)])
            step = e.add("Where", [below, step, number(e, 2.0 ** (exponent - mantissa))])
    else:
        exponent_of = e.add("Clip", [floor_log2(e, size), number(e, float(least)), number(e, float(top))])
        step = power_of_two(e, e.add("Sub", [exponent_of, number(e, float(mantissa))]))
    return e.add("Mul", [e.add("Round", [e.add("Div", [clipped, step])]), step], outputs)
