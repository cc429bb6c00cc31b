"""Pieces of an ONNX model as the IR has them: tensors, types, attributes, subgraphs.

The way back, from the IR to ONNX, stands in `planish.ir.onnx_attributes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import onnx
from google.protobuf import text_format  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, TypeProto

from planish.ir.constant import Constant, FileRange, unpack_bits
from planish.ir.errors import InvalidModelError
from planish.ir.graph import Attribute, Blob
from planish.ir.onnx_attributes import MESSAGES
from planish.ir.types import (
    UNKNOWN,
    OtherType,
    TensorType,
    Type,
    bits,
    from_onnx_enum,
    numpy_dtype,
)

if TYPE_CHECKING:
    from planish.ir.types import Dim

DEFAULT_DOMAIN = "onnx"  # how the IR spells ONNX's default domain, whose own name is empty

Resolver = Callable[[TensorProto], FileRange]


def dialect(domain: str) -> str:
    """The IR's name of an operator domain."""
    return DEFAULT_DOMAIN if domain in ("", "ai.onnx") else domain


def domain_of(dialect_name: str) -> str:
    """The operator domain of an IR name; the inverse of `dialect`."""
    return "" if dialect_name == DEFAULT_DOMAIN else dialect_name


# -- tensors -------------------------------------------------------------------------------------


def no_file(tensor: TensorProto) -> NoReturn:
    """The resolver where external data makes no sense: always an error."""
    raise InvalidModelError(f"tensor '{tensor.name}': external data is not possible here")


def constant_of(tensor: TensorProto, resolve: Resolver = no_file) -> Constant:
    """The constant of a tensor; `resolve` says where external data lies.

    Raises:
        InvalidModelError: the data does not fit the shape, or the element type is unknown.
    """
    dims = tuple(tensor.dims)
    what = f"tensor '{tensor.name}'"
    try:
        dtype = from_onnx_enum(tensor.data_type)
    except KeyError:
        raise InvalidModelError(f"{what}: unknown element type {tensor.data_type}") from None
    if any(d < 0 for d in dims):
        raise InvalidModelError(f"{what}: negative dim in shape {list(dims)}")
    if tensor.HasField("segment"):
        raise InvalidModelError(f"{what}: stored in segments, which no version of ONNX defines")
    if tensor.data_location == TensorProto.EXTERNAL:
        if dtype == "str":
            raise InvalidModelError(f"{what}: strings cannot lie in external data")
        return Constant(None, dtype, dims, resolve(tensor))
    size = 1
    for d in dims:
        size *= d
    array = _strings(tensor, size) if dtype == "str" else _numbers(tensor, dtype, size)
    try:
        return Constant(array.reshape(dims), dtype, dims)
    except ValueError as error:  # an empty shape with a dim beyond what an array can have
        raise InvalidModelError(f"{what}: impossible shape {list(dims)}: {error}") from None


def _strings(tensor: TensorProto, size: int) -> np.ndarray:
    if len(tensor.string_data) != size:
        raise _wrong_length(tensor, size, len(tensor.string_data), "strings")
    array = np.empty(size, object)
    array[:] = [_text(s) for s in tensor.string_data]
    return array


def _numbers(tensor: TensorProto, dtype: str, size: int) -> np.ndarray:
    logical = numpy_dtype(dtype)
    width = bits(dtype)
    if tensor.HasField("raw_data"):
        raw = tensor.raw_data
        expected = (size * width + 7) // 8
        if len(raw) != expected:
            raise _wrong_length(tensor, expected, len(raw), "bytes")
        if width < 8:
            return unpack_bits(np.frombuffer(raw, np.uint8), dtype, size)
        return np.frombuffer(raw, logical)
    values: np.ndarray
    if dtype == "f32":
        values = np.array(tensor.float_data, np.float32)
    elif dtype == "f64":
        values = np.array(tensor.double_data, np.float64)
    elif dtype == "i64":
        values = np.array(tensor.int64_data, np.int64)
    elif dtype in ("u32", "u64"):
        values = np.array(tensor.uint64_data, np.uint64).astype(logical)
    elif dtype in ("c64", "c128"):
        parts = tensor.float_data if dtype == "c64" else tensor.double_data
        values = np.array(parts, np.float32 if dtype == "c64" else np.float64)
        if len(values) == 2 * size:
            values = values.view(logical)
    else:
        held = np.array(tensor.int32_data, np.int32)
        if width < 8:
            per = 8 // width
            if len(held) == (size + per - 1) // per:
                values = unpack_bits(held.astype(np.uint8), dtype, size)
            else:
                values = held
        elif dtype in ("i32", "i16", "i8", "u8", "u16", "bool"):
            values = held.astype(logical)
        else:  # floats of 16 or 8 bits: the bits of each, in an int32
            values = held.astype(np.uint16 if width == 16 else np.uint8).view(logical)
    if len(values) != size:
        raise _wrong_length(tensor, size, len(values), "elements")
    return values


def _wrong_length(tensor: TensorProto, expected: int, got: int, unit: str) -> InvalidModelError:
    return InvalidModelError(
        f"tensor '{tensor.name}': wrong length of data; expected {expected} {unit} "
        f"for shape {list(tensor.dims)}, got {got}"
    )


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


# -- types ---------------------------------------------------------------------------------------


def type_of(proto: TypeProto | None) -> Type:
    """The IR type of an ONNX type; UNKNOWN for an empty one."""
    if proto is None:
        return UNKNOWN
    kind = proto.WhichOneof("value")
    if kind is None:
        return UNKNOWN
    if kind == "tensor_type":
        try:
            dtype = from_onnx_enum(proto.tensor_type.elem_type)
        except KeyError:
            return UNKNOWN
        if not proto.tensor_type.HasField("shape"):
            return TensorType(dtype)
        return TensorType(dtype, tuple(_dim(d) for d in proto.tensor_type.shape.dim))
    return OtherType(text_format.MessageToString(proto, as_one_line=True))


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value >= 0 else None
    return dim.dim_param or None


def refine(known: Type, other: Type) -> Type:
    """`known`, with what it leaves open filled in from `other`; `known` wins where they differ."""
    if not isinstance(known, TensorType):
        return known if known != UNKNOWN else other
    if not isinstance(other, TensorType) or other.dtype != known.dtype or other.shape is None:
        return known
    if known.shape is None:
        return other
    if len(known.shape) != len(other.shape):
        return known
    shape = tuple(b if a is None else a for a, b in zip(known.shape, other.shape, strict=True))
    return TensorType(known.dtype, shape)


# -- attributes ----------------------------------------------------------------------------------

_LISTS = {
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
    AttributeProto.TENSORS: "tensors",
    AttributeProto.GRAPHS: "graphs",
    AttributeProto.SPARSE_TENSORS: "sparse_tensors",
    AttributeProto.TYPE_PROTOS: "type_protos",
}


def _blob(message: Any) -> Blob:
    return Blob(f"onnx.{message.DESCRIPTOR.name}", message.SerializeToString(deterministic=True))


def attribute_of(proto: AttributeProto, resolve: Resolver = no_file) -> Attribute:
    """The IR's value of an attribute; a Blob of the whole attribute where python values cannot say it."""
    kind = proto.type
    if proto.doc_string or proto.ref_attr_name:
        return _blob(proto)
    if kind == AttributeProto.FLOAT:
        return float(proto.f)
    if kind == AttributeProto.INT:
        return int(proto.i)
    if kind == AttributeProto.STRING:
        return _text(proto.s)
    if kind == AttributeProto.TENSOR:
        if proto.t.doc_string or proto.t.metadata_props:
            return _blob(proto)
        return constant_of(proto.t, resolve)
    if kind in MESSAGES:
        return _blob(getattr(proto, MESSAGES[kind]))
    items = getattr(proto, _LISTS[kind]) if kind in _LISTS else ()
    if not items:
        return _blob(proto)
    if kind == AttributeProto.FLOATS:
        return tuple(float(f) for f in items)
    if kind == AttributeProto.INTS:
        return tuple(int(i) for i in items)
    if kind == AttributeProto.STRINGS:
        return tuple(_text(s) for s in items)
    if kind == AttributeProto.TENSORS:
        return tuple(constant_of(t, resolve) for t in items)
    return tuple(_blob(m) for m in items)


# -- subgraphs -----------------------------------------------------------------------------------


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs in a node's attributes."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def defined_names(graph: GraphProto, *, nested: bool) -> set[str]:
    """The names of values that a graph defines; those of its subgraphs too if `nested`."""
    names = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    names |= {t.values.name for t in graph.sparse_initializer}
    for node in graph.node:
        names.update(node.output)
        if nested:
            for inner in subgraphs(node):
                names |= defined_names(inner, nested=True)
    return names


def free_names(graph: GraphProto) -> dict[str, None]:
    """The names that a subgraph reads from outside, in the order of their first use."""
    defined = defined_names(graph, nested=False)
    free: dict[str, None] = {}
    for node in graph.node:
        read = [*node.input]
        for inner in subgraphs(node):
            read.extend(free_names(inner))
        free.update((name, None) for name in read if name and name not in defined)
    free.update((v.name, None) for v in graph.output if v.name and v.name not in defined)
    return free


def captured_names(node: NodeProto) -> tuple[str, ...]:
    """The outer names that a node's subgraphs read, in the order of their first use."""
    free: dict[str, None] = {}
    for graph in subgraphs(node):
        free.update(free_names(graph))
    return tuple(free)


def rename_free(graph: GraphProto, renamed: Mapping[str, str]) -> None:
    """Rename what a subgraph reads from outside, in place."""
    defined = defined_names(graph, nested=False)
    table = {old: new for old, new in renamed.items() if old not in defined}
    if not table:
        return
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in table:
                node.input[index] = table[name]
        for inner in subgraphs(node):
            rename_free(inner, table)
    for output in graph.output:
        if output.name in table:
            output.name = table[output.name]
