"""ONNX's DequantizeLinear: y = (x - x_zero_point) * x_scale, in standard ONNX.

    x             the bytes of the codes: 2 and 4 bits low bits first, the last byte padded
    x_scale       f32, f16, bf16, or f8e8m0 (the node then needs output_dtype)
    x_zero_point  the bytes of codes, shaped like x_scale; absent: 0
    scale_scale   f32: x_scale is f8e4m3fn and has a DequantizeLinear of its own with this one scale (NVFP4)

Attributes `axis` and `block_size` (0: a vector along the axis, or one scale) are those of the node; `type`, `dims`
and `zero_dims` describe the initialisers, `opset` is the first one that has the types.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from planish.codegen.containers.base import Container, Packed, register
from planish.codegen.containers.bits import pack_bytes, unpack_bytes
from planish.ir.errors import PlanishError
from planish.ir.qtensor import QTensor
from planish.ir.types import bits, from_numpy_dtype, is_float, numpy_dtype, onnx_enum

NAME = "dequantize-linear"
# the first opset whose DequantizeLinear takes such codes
ELEMENTS = {
    "u8": 10, "i8": 10, "f8e4m3fn": 19, "f8e5m2": 19, "u4": 21, "i4": 21, "f4e2m1": 23, "u2": 25, "i2": 25,
}  # fmt: skip
BLOCKS_SINCE, AXIS_SINCE, POWERS_SINCE = 21, 13, 24
SCALES = ("f32", "f16", "bf16", "f8e8m0", "f8e4m3fn")


def refuses(q: QTensor) -> str | None:
    """Why DequantizeLinear cannot hold a tensor of any rank; None if it can."""
    if q.clusters is not None:
        return f"a scale for each of {len(q.scale)} clusters"
    if q.element not in ELEMENTS:
        return f"elements {q.element}; expected {', '.join(ELEMENTS)}"
    if q.scale_dtype not in SCALES:
        return f"scales of {q.scale_dtype}; expected {', '.join(SCALES)}"
    if q.axis is None and q.scale.size != 1:
        return f"scales of shape {q.scale.shape} that broadcast"
    if q.group_index is not None:
        return "blocks that are not consecutive"
    if q.zero is not None and q.zero_is_float:
        return "zero points that are floats"
    if q.global_scale is not None and q.scale_dtype != "f8e4m3fn":
        return "a scale of the whole tensor beside those of the blocks"
    if q.zero is not None and q.is_float:
        return "zero points of float elements"
    return None


def _bytes(codes: np.ndarray, element: str) -> np.ndarray:
    """The raw data of a tensor of codes: uint8 [bytes]."""
    if is_float(element):
        codes = np.ascontiguousarray(codes.astype(numpy_dtype(element))).view(np.uint8)
    return pack_bytes(codes.reshape(-1).astype(np.int64), bits(element))


def _codes(raw: np.ndarray, element: str, dims: tuple[int, ...]) -> np.ndarray:
    """The codes of raw data, one a byte."""
    count = int(np.prod(dims, dtype=np.int64))
    width = bits(element)
    codes = unpack_bytes(raw, width, count).reshape(dims)
    if is_float(element):
        return codes.view(numpy_dtype(element))
    if element.startswith("i"):
        half = 1 << (width - 1)
        return ((codes.astype(np.int16) ^ half) - half).astype(np.int8)
    return codes


def pack(q: QTensor) -> Packed:
    """The initialisers and attributes of DequantizeLinear."""
    opset = ELEMENTS[q.element]
    if q.block is not None:
        opset = max(opset, BLOCKS_SINCE)
    elif q.axis is not None:
        opset = max(opset, AXIS_SINCE)
    if q.scale_dtype == "f8e8m0":
        opset = max(opset, POWERS_SINCE)
    scale = q.scale.reshape(()) if q.axis is None else q.scale
    arrays = {"x": _bytes(q.codes, q.element), "x_scale": scale.astype(numpy_dtype(q.scale_dtype))}
    if q.scale_dtype == "f8e4m3fn":
        arrays["scale_scale"] = np.array(1.0 if q.global_scale is None else q.global_scale, np.float32)
    if q.zero is not None:
        arrays["x_zero_point"] = _bytes(q.zero.reshape(scale.shape), q.element)
    attributes: dict[str, int | str | tuple[int, ...]] = {
        "type": q.element, "dims": q.shape, "zero_dims": tuple(scale.shape), "opset": opset, "block_size": q.block or 0,
    }  # fmt: skip
    if q.axis is not None:
        attributes["axis"] = q.axis
    return Packed(NAME, arrays, attributes)


def unpack(packed: Packed) -> QTensor:
    """The tensor, in the dtypes that it was packed in."""
    element, dims = packed.attributes.get("type"), packed.attributes.get("dims")
    zero_dims = packed.attributes.get("zero_dims", ())
    if not isinstance(element, str) or not isinstance(dims, tuple) or not isinstance(zero_dims, tuple):
        raise PlanishError(f"container '{NAME}': attribute 'type' or 'dims' is missing")
    scale = packed.array("x_scale")
    factor = packed.arrays.get("scale_scale")
    zero = packed.arrays.get("x_zero_point")
    return QTensor(
        _codes(packed.array("x"), element, dims),
        element,
        packed.number("axis") if "axis" in packed.attributes else None,
        packed.number("block_size") or None,
        scale.astype(np.float64),
        from_numpy_dtype(scale.dtype),
        None if zero is None else _codes(zero, element, zero_dims).astype(np.float64),
        global_scale=None if factor is None else float(factor),
    )


def initialisers(packed: Packed, prefix: str) -> dict[str, TensorProto]:
    """The tensors of a packed DequantizeLinear, called `prefix`, `prefix_scale`, ...; in the order of the operands.

    Args:
        packed: by this container.
        prefix: of the names.
    """
    element = str(packed.attributes["type"])
    dims, zero_dims = packed.attributes["dims"], packed.attributes["zero_dims"]
    assert isinstance(dims, tuple) and isinstance(zero_dims, tuple)
    scale = packed.array("x_scale")
    held = {
        "x": (prefix, element, dims, packed.array("x")),
        "x_scale": (f"{prefix}_scale", from_numpy_dtype(scale.dtype), scale.shape, scale),
    }
    if "x_zero_point" in packed.arrays:
        held["x_zero_point"] = (f"{prefix}_zero_point", element, zero_dims, packed.array("x_zero_point"))
    if "scale_scale" in packed.arrays:
        held["scale_scale"] = (f"{prefix}_scale_scale", "f32", (), packed.array("scale_scale"))
    return {
        key: TensorProto(
            name=name, data_type=onnx_enum(kind), dims=shape, raw_data=np.ascontiguousarray(data).tobytes()
        )
        for key, (name, kind, shape, data) in held.items()
    }


register(Container(NAME, refuses, pack, unpack))
