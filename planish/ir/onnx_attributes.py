"""The ONNX form of attributes, constants and types: what emission writes and what a single node is run with."""

from __future__ import annotations

from typing import Any

import onnx
from google.protobuf import text_format  # type: ignore[import-untyped]
from onnx import AttributeProto, TensorProto, TypeProto

from planish.ir.constant import Constant, pack_bits
from planish.ir.errors import PlanishError
from planish.ir.graph import Attribute, Blob
from planish.ir.types import OtherType, TensorType, Type, bits, onnx_enum

ABSENT = OtherType("absent")
"""The type of a result that an ONNX node leaves out (an output with an empty name)."""

RESERVED = ("captures", "onnx_opset", "onnx_overload")  # attributes that planish adds to opaque nodes

MESSAGES = {
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    AttributeProto.TYPE_PROTO: "tp",
}
_LISTS = {
    "TensorProto": "TENSORS",
    "GraphProto": "GRAPHS",
    "SparseTensorProto": "SPARSE_TENSORS",
    "TypeProto": "TYPE_PROTOS",
}


def tensor_of(constant: Constant, name: str = "") -> TensorProto:
    """A tensor that holds the constant's data, rounded to its logical dtype."""
    tensor = TensorProto(name=name, data_type=onnx_enum(constant.dtype), dims=constant.shape)
    if constant.dtype == "str":
        tensor.string_data.extend(_bytes(s) for s in constant.array().reshape(-1))
    else:
        tensor.raw_data = data_bytes(constant)
    return tensor


def data_bytes(constant: Constant) -> bytes:
    """The raw little-endian bytes of a constant, narrow elements packed."""
    array = constant.array()
    if bits(constant.dtype) < 8:
        return pack_bits(array, constant.dtype).tobytes()
    return array.tobytes()


def _bytes(data: str | bytes) -> bytes:
    return data.encode("utf-8") if isinstance(data, str) else bytes(data)


def type_proto(type_: Type) -> TypeProto | None:
    """The ONNX type of an IR type; None for an unknown one."""
    proto = TypeProto()
    if isinstance(type_, TensorType):
        proto.tensor_type.elem_type = onnx_enum(type_.dtype)
        if type_.shape is not None:
            proto.tensor_type.shape.SetInParent()
            for dim in type_.shape:
                target = proto.tensor_type.shape.dim.add()
                if isinstance(dim, int):
                    target.dim_value = dim
                elif dim is not None:
                    target.dim_param = dim
        return proto
    if not type_.text or type_ == ABSENT:
        return None
    try:
        text_format.Parse(type_.text, proto)
    except text_format.ParseError as error:
        raise PlanishError(f"type {type_}: has no ONNX form: {error}") from None
    return proto


def attribute_proto(name: str, value: Attribute) -> AttributeProto:
    """The attribute of an IR value; the inverse of `planish.capture.onnx_proto.attribute_of`.

    Raises:
        PlanishError: ONNX has no such attribute.
    """
    proto = AttributeProto(name=name)
    if isinstance(value, bool | int):
        proto.type, proto.i = AttributeProto.INT, int(value)
    elif isinstance(value, float):
        proto.type, proto.f = AttributeProto.FLOAT, value
    elif isinstance(value, str | bytes):
        proto.type, proto.s = AttributeProto.STRING, _bytes(value)
    elif isinstance(value, Constant):
        proto.type = AttributeProto.TENSOR
        proto.t.CopyFrom(tensor_of(value))
    elif isinstance(value, Blob):
        _put_blob(proto, value)
    elif isinstance(value, TensorType):
        proto.type = AttributeProto.TYPE_PROTO
        made = type_proto(value)
        if made is not None:
            proto.tp.CopyFrom(made)
    elif isinstance(value, tuple) and value:
        _put_tuple(proto, value)
    else:
        raise PlanishError(f"attribute '{name}': no ONNX attribute can hold {value!r}")
    return proto


def _message(blob: Blob) -> Any:
    kind: Any = getattr(onnx, blob.kind.removeprefix("onnx."), None)
    if not hasattr(kind, "FromString"):
        raise PlanishError(f"attribute of kind '{blob.kind}': not an ONNX message")
    return kind.FromString(blob.data)


def _put_blob(proto: AttributeProto, blob: Blob) -> None:
    message = _message(blob)
    if isinstance(message, AttributeProto):
        proto.CopyFrom(message)
        return
    for kind, field in MESSAGES.items():
        if type(getattr(proto, field)) is type(message):
            proto.type = kind
            getattr(proto, field).CopyFrom(message)
            return
    raise PlanishError(f"attribute '{proto.name}': no ONNX attribute can hold a {blob.kind}")


def _put_tuple(proto: AttributeProto, items: tuple[Attribute, ...]) -> None:
    first = items[0]
    if all(isinstance(i, int) for i in items):
        proto.type = AttributeProto.INTS
        proto.ints.extend(int(i) for i in items if isinstance(i, int))
    elif all(isinstance(i, int | float) for i in items):
        proto.type = AttributeProto.FLOATS
        proto.floats.extend(float(i) for i in items if isinstance(i, int | float))
    elif all(isinstance(i, str | bytes) for i in items):
        proto.type = AttributeProto.STRINGS
        proto.strings.extend(_bytes(i) for i in items)  # type: ignore[arg-type]
    elif all(isinstance(i, Constant) for i in items):
        proto.type = AttributeProto.TENSORS
        proto.tensors.extend(tensor_of(i) for i in items if isinstance(i, Constant))
    elif isinstance(first, Blob):
        kind = _LISTS[first.kind.removeprefix("onnx.")]
        proto.type = AttributeProto.AttributeType.Value(kind)
        getattr(proto, kind.lower()).extend(_message(i) for i in items if isinstance(i, Blob))
    else:
        raise PlanishError(f"attribute '{proto.name}': no ONNX attribute can hold {items!r}")
