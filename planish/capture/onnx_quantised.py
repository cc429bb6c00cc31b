"""Converters of ONNX's quantisation operators to the rows, where these compute the same to the bit."""

from __future__ import annotations

from planish.capture.onnx_view import Made, View
from planish.ir.graph import Attribute
from planish.ir.ops.codes import RANGES
from planish.ir.types import bits, from_onnx_enum, is_float

_FLOAT_CODES = ("f8e4m3fn", "f8e5m2", "f4e2m1", "f6e2m3", "f6e3m2")
_WIDER = {"f16": ("f16", "f32"), "bf16": ("bf16", "f32"), "f32": ("f32",), "f8e8m0": ("f32",)}  # scale: results


def _layout(view: View) -> dict[str, Attribute] | None:
    """Where the scales lie; None if the rows have no such form."""
    axis, block = view.get_int("axis", 1), view.get_int("block_size")
    rank, scale_rank, scales = view.rank(0), view.rank(1), view.shape(1)
    if scale_rank is None:
        return None
    if block:
        if rank is None or rank != scale_rank or not -rank <= axis < rank:
            return None
        return {"axis": axis % rank, "block": block}
    if scale_rank == 0 or (scales == (1,) and rank):  # one scale for the tensor
        return {}
    if scale_rank != 1 or rank is None or not -rank <= axis < rank:
        return None
    return {"axis": axis % rank}


def _zero(view: View, codes: str) -> str | None:
    """The zero point: its name, empty if there is none or it says nothing; None if the rows have no such form."""
    name = view.input(2)
    if not name:
        return ""
    if view.dtype(2) != codes:
        return None
    if is_float(codes) or codes == "i32":
        held = view.constant(2)
        return "" if held is not None and not held.wide().any() else None
    return name if view.shape(2) == view.shape(1) else None


def dequantize(view: View) -> Made | None:
    """DequantizeLinear."""
    codes, scale, own = view.dtype(0), view.dtype(1), _layout(view)
    if view.since < 10 or codes is None or scale is None or own is None or scale not in _WIDER:
        return None
    if (codes not in RANGES and codes not in _FLOAT_CODES) or (bits(codes) > 8 and scale != "f32"):
        return None
    said = view.get_int("output_dtype")
    result = _dtype(said) if said else scale
    zero = _zero(view, codes)
    if result not in _WIDER[scale] or zero is None:
        return None
    if result != scale:
        own["dtype"] = result
    return Made("dequantize", [view.input(0), view.input(1), zero or None], own)


def quantize(view: View) -> Made | None:
    """QuantizeLinear of float32."""
    own, said = _layout(view), view.get_int("output_dtype")
    saturates, precision = bool(view.get_int("saturate", 1)), view.get_int("precision")
    if view.since < 10 or own is None or view.dtype(0) != "f32" or view.dtype(1) != "f32" or not saturates:
        return None
    dtype = view.dtype(2) if view.input(2) else _dtype(said) if said else "u8"
    if dtype is None or dtype == "i32" or (dtype not in RANGES and dtype not in _FLOAT_CODES):
        return None
    zero = _zero(view, dtype)
    if zero is None or _dtype(precision or 1) != "f32":
        return None
    return Made("quantize", [view.input(0), view.input(1), zero or None], {**own, "dtype": dtype})


def dynamic_quantize(view: View) -> Made | None:
    """DynamicQuantizeLinear."""
    return Made("dynamic_quantize", [view.input(0)], {}, None) if view.dtype(0) == "f32" else None


def _dtype(number: int) -> str | None:
    try:
        return from_onnx_enum(number)
    except KeyError:
        return None


CONVERTERS = {
    "DequantizeLinear": dequantize,
    "QuantizeLinear": quantize,
    "DynamicQuantizeLinear": dynamic_quantize,
}
