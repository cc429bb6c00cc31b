"""Open an ONNX model: the file, its external data, local functions, and the types onnx infers."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx.inliner
import onnx.shape_inference
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError, EncodeError, Message  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from planish.capture.onnx_proto import constant_of, no_file, subgraphs, type_of
from planish.ir.constant import Constant, FileRange
from planish.ir.errors import InvalidModelError
from planish.ir.graph import Blob, Graph
from planish.ir.onnx_attributes import tensor_of
from planish.ir.types import UNKNOWN, Type, bits, from_onnx_enum

LIMIT = 2**31 - 1  # bytes that one protobuf message can hold
_SMALL = 4096  # bytes up to which a weight is shown to shape inference

META_IR_VERSION = "onnx.ir_version"
META_OPSETS = "onnx.opsets"  # ((domain, version), ...)
META_REST = "onnx.rest"  # everything else, a compressed ModelProto without nodes and weights
REST_KIND = "zlib:onnx.ModelProto"


def read(path: Path) -> ModelProto:
    """Parse a model file, without its external data.

    Raises:
        InvalidModelError: it cannot be read, or is not an ONNX model.
    """
    try:
        if path.is_dir():
            raise InvalidModelError(f"{path}: is a directory; expected an ONNX file")
        size = path.stat().st_size
        if size > LIMIT:
            raise InvalidModelError(
                f"{path}: {size} bytes, more than the 2 GB that protobuf can hold; expected external data",
                hint="save the model with its weights in external data",
            )
        data = path.read_bytes()
    except OSError as error:
        raise InvalidModelError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InvalidModelError(f"{path!s}: not a path: {error}") from None
    if not data:
        raise InvalidModelError(f"{path}: empty file; expected an ONNX model")
    try:
        model = ModelProto.FromString(data)
    except DecodeError:
        raise InvalidModelError(
            f"{path}: not an ONNX model, or cut off; protobuf cannot parse its {size} bytes"
        ) from None
    if not model.HasField("graph"):
        raise InvalidModelError(f"{path}: not an ONNX model: it holds no graph")
    return model


def check_text(message: Message) -> None:
    """Check that names and other texts are text: protobuf hands out what is not UTF-8 as bytes.

    Raises:
        InvalidModelError: one is not.
    """
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_STRING:
            for text in value if field.is_repeated else (value,):
                if not isinstance(text, str):
                    name = f"{message.DESCRIPTOR.name}.{field.name}"
                    raise InvalidModelError(f"{name}: not UTF-8 text: {text[:40]!r}")
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if field.is_repeated else (value,):
                check_text(inner)


class ExternalData:
    """Finds the files of external tensors, and refuses to leave the model's folder.

    Args:
        folder: the model's folder; None if the model came without one.
        real_folder: the folder of the file that the model's path links to (a hub's cache keeps models and
            data as links into one folder of blobs).
    """

    def __init__(self, folder: Path | None, real_folder: Path | None = None) -> None:
        self.folder = folder
        self._homes = tuple(f.resolve() for f in (folder, real_folder) if f is not None)
        self._sizes: dict[Path, int] = {}

    def __call__(self, tensor: TensorProto) -> FileRange:
        """Where the bytes of an external tensor lie.

        Raises:
            InvalidModelError: no such file, outside the folder, or too short.
        """
        what = f"tensor '{tensor.name}'"
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if not location:
            raise InvalidModelError(f"{what}: its external data has no location")
        path = self._file(what, location)
        offset = _number(what, "offset", entries.get("offset", "0"))
        expected = _packed_bytes(tensor)
        length = _number(what, "length", entries.get("length") or str(expected))
        if length != expected:
            raise InvalidModelError(
                f"{what}: wrong length of external data; expected {expected} bytes "
                f"for shape {list(tensor.dims)}, got {length}"
            )
        if offset + length > self._sizes[path]:
            raise InvalidModelError(
                f"{what}: external data ends early; expected {offset + length} bytes in {path}, got {self._sizes[path]}"
            )
        return FileRange(path, offset, length)

    def _file(self, what: str, location: str) -> Path:
        if self.folder is None:
            raise InvalidModelError(
                f"{what}: external data '{location}' of a model in memory",
                hint="pass the model's path, or base_dir",
            )
        pure, windows = PurePosixPath(location), PureWindowsPath(location)
        leaves = pure.is_absolute() or windows.drive or windows.root or ".." in (*pure.parts, *windows.parts)
        path = self.folder / location
        if not leaves:
            try:
                real = path.resolve()
                leaves = not any(real.is_relative_to(home) for home in self._homes)
            except (OSError, ValueError, RuntimeError) as error:
                raise InvalidModelError(f"{what}: external data '{location}' is not a path: {error}") from None
        if leaves:
            raise InvalidModelError(
                f"{what}: external data '{location}' leads outside the model's folder",
                hint="move the data into the model's folder and store a relative path",
            )
        if path not in self._sizes:
            if not path.is_file():
                raise InvalidModelError(f"{what}: missing external data: {path}: no such file")
            self._sizes[path] = path.stat().st_size
        return path


def _number(what: str, key: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise InvalidModelError(f"{what}: {key} of its external data is '{text[:40]}'; expected a number >= 0")
    return number


def _packed_bytes(tensor: TensorProto) -> int:
    size = 1
    for dim in tensor.dims:
        size *= dim
    return (size * bits(from_onnx_enum(tensor.data_type)) + 7) // 8


def embed_external(graph: GraphProto, resolve: ExternalData) -> None:
    """Bring external tensors inside a subgraph (or a function body) into it, in place."""
    for tensor in _tensors(graph.node, list(graph.initializer)):
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.CopyFrom(tensor_of(constant_of(tensor, resolve), tensor.name))


def _tensors(nodes: object, own: list[TensorProto]) -> Iterator[TensorProto]:
    yield from own
    for node in nodes:  # type: ignore[attr-defined]
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
        for inner in subgraphs(node):
            yield from _tensors(inner.node, list(inner.initializer))


def detach_weights(model: ModelProto, resolve: ExternalData) -> tuple[ModelProto, dict[str, Constant]]:
    """A copy of the model in which weights are placeholders, and the weights by name.

    Constant nodes that hold a tensor become weights too. Small weights stay in the copy as well, for shape
    inference. The model given is not changed.
    """
    source = model.graph
    copy = ModelProto()
    for field, value in model.ListFields():
        if field.name == "graph":
            continue
        if field.is_repeated:
            getattr(copy, field.name).extend(value)
        elif field.message_type is not None:
            getattr(copy, field.name).CopyFrom(value)
        else:
            setattr(copy, field.name, value)
    graph = copy.graph
    graph.name, graph.doc_string = source.name, source.doc_string
    for name in ("input", "output", "value_info", "quantization_annotation", "metadata_props"):
        getattr(graph, name).extend(getattr(source, name))
    graph.sparse_initializer.extend(source.sparse_initializer)
    weights: dict[str, Constant] = {}

    def keep(name: str, tensor: TensorProto) -> None:
        if not name:
            raise InvalidModelError("an initialiser has no name")
        if name in weights:
            raise InvalidModelError(f"value '{name}': defined twice")
        weights[name] = constant_of(tensor, resolve)
        stub = graph.initializer.add()
        if weights[name].loaded and weights[name].nbytes <= _SMALL and tensor.data_type != TensorProto.STRING:
            stub.CopyFrom(tensor)
        else:
            stub.data_type = tensor.data_type
            stub.dims.extend(tensor.dims)
            stub.data_location = TensorProto.EXTERNAL
            stub.external_data.add(key="location", value="elsewhere")
            stub.doc_string = tensor.doc_string
            stub.metadata_props.extend(tensor.metadata_props)
        stub.name = name

    for tensor in source.initializer:
        keep(tensor.name, tensor)
    for node in source.node:
        held = constant_node(node)
        if held is None or not node.output[0]:
            graph.node.add().CopyFrom(node)
        else:
            keep(node.output[0], held)
    for node in graph.node:
        for inner in subgraphs(node):
            embed_external(inner, resolve)
    for function in copy.functions:
        for tensor in _tensors(function.node, []):
            if tensor.data_location == TensorProto.EXTERNAL:
                no_file(tensor)
    return copy, weights


def constant_node(node: NodeProto) -> TensorProto | None:
    """The tensor of a Constant node; None for another node, or one that holds no dense tensor."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    if len(node.attribute) != 1 or len(node.output) != 1 or node.input:
        return None
    attribute = node.attribute[0]
    name, kind = attribute.name, attribute.type
    if attribute.ref_attr_name:
        return None
    if name == "value" and kind == AttributeProto.TENSOR:
        return attribute.t
    if name == "value_float" and kind == AttributeProto.FLOAT:
        return TensorProto(data_type=TensorProto.FLOAT, float_data=[attribute.f])
    if name == "value_floats" and kind == AttributeProto.FLOATS:
        return TensorProto(data_type=TensorProto.FLOAT, dims=[len(attribute.floats)], float_data=attribute.floats)
    if name == "value_int" and kind == AttributeProto.INT:
        return TensorProto(data_type=TensorProto.INT64, int64_data=[attribute.i])
    if name == "value_ints" and kind == AttributeProto.INTS:
        return TensorProto(data_type=TensorProto.INT64, dims=[len(attribute.ints)], int64_data=attribute.ints)
    if name == "value_string" and kind == AttributeProto.STRING:
        return TensorProto(data_type=TensorProto.STRING, string_data=[attribute.s])
    if name == "value_strings" and kind == AttributeProto.STRINGS:
        return TensorProto(data_type=TensorProto.STRING, dims=[len(attribute.strings)], string_data=attribute.strings)
    return None


def inline_functions(model: ModelProto) -> ModelProto:
    """Replace calls of model-local functions by their bodies, where onnx's inliner can."""
    try:
        return onnx.inliner.inline_local_functions(model)
    except (ValueError, RuntimeError, EncodeError, onnx.checker.ValidationError):
        return model  # the calls stay, opaque, with their functions


def inferred_types(model: ModelProto) -> dict[str, Type]:
    """The types of values by name: those that the model declares, refined by onnx's shape inference.

    A model on which shape inference fails keeps its declared types.
    """
    graph = model.graph
    probe = ModelProto()
    probe.CopyFrom(model)
    probe.ir_version = max(model.ir_version, 8)  # where weights need not be listed as inputs
    try:
        graph = onnx.shape_inference.infer_shapes(probe, strict_mode=False, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError, EncodeError, DecodeError):
        graph = model.graph
    types = {v.name: type_of(v.type) for v in graph.value_info}
    types |= {v.name: type_of(v.type) for v in graph.output}
    return {name: t for name, t in types.items() if t != UNKNOWN}


# -- what has no place in the IR -----------------------------------------------------------------


def pack_rest(model: ModelProto) -> Blob:
    """Everything of a model but its nodes, weights and versions, as a compressed blob."""
    rest = ModelProto()
    rest.CopyFrom(model)
    rest.ClearField("ir_version")
    rest.ClearField("opset_import")
    for field in ("node", "initializer", "sparse_initializer", "name"):
        rest.graph.ClearField(field)
    for node in model.graph.node:
        if (node.doc_string or node.metadata_props or node.device_configurations) and any(node.output):
            stub = rest.graph.node.add(output=[next(o for o in node.output if o)], doc_string=node.doc_string)
            stub.metadata_props.extend(node.metadata_props)
            stub.device_configurations.extend(node.device_configurations)
    for tensor in model.graph.initializer:
        if tensor.doc_string or tensor.metadata_props:
            stub_tensor = rest.graph.initializer.add(name=tensor.name, doc_string=tensor.doc_string)
            stub_tensor.metadata_props.extend(tensor.metadata_props)
    return Blob(REST_KIND, zlib.compress(rest.SerializeToString(deterministic=True), 9))


def unpack_rest(graph: Graph) -> ModelProto:
    """The inverse of `pack_rest`; an empty model for a graph that did not come from ONNX."""
    blob = graph.meta.get(META_REST)
    if not isinstance(blob, Blob):
        return ModelProto()
    return ModelProto.FromString(zlib.decompress(blob.data))


def opsets_of(graph: Graph) -> dict[str, int]:
    """The opset version of each domain of the model that the graph came from; empty if from elsewhere."""
    found = graph.meta.get(META_OPSETS)
    pairs = found if isinstance(found, tuple) else ()
    return {str(pair[0]): int(pair[1]) for pair in pairs if isinstance(pair, tuple)}  # type: ignore[arg-type]
