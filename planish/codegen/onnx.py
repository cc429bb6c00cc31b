"""Emit ONNX: a graph becomes a ModelProto, or a file with its weights beside it.

Canonical ops are written by the emitters of `onnx_ops` as standard operators of the model's opset,
decomposed where that opset has none; opaque nodes come back as they were captured. Results keep the
names of their values, and the public names of inputs and outputs never change.
"""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto, TensorProto

from planish.capture.onnx_file import LIMIT, META_REST
from planish.codegen.files import append_weight, free_space, refuse_overwriting
from planish.codegen.onnx_emission import Emission, emitter
from planish.ir.errors import PlanishError
from planish.ir.files import atomic, atomic_group
from planish.ir.graph import Graph
from planish.ir.onnx_attributes import tensor_of
from planish.ir.types import onnx_enum

__all__ = ["Emission", "emitter", "to_model", "write"]

INLINE = int(1.8e9)  # bytes of weights up to which a model is one file
_SMALL = 1024  # bytes; smaller weights stay in the model even with external data


def to_model(graph: Graph, *, opset: int | None = None, target: str = "onnx") -> ModelProto:
    """The graph as a model in memory, weights included.

    Args:
        opset: the version of ONNX's default domain; the graph's own by default (21 if it has none).
        target: "onnx" for standard operators only, "ort" to allow ONNX Runtime's own.

    Raises:
        PlanishError: an op has no ONNX form, or the model exceeds protobuf's 2 GB.
    """
    emission = Emission(graph, opset=opset, target=target)
    model = emission.model()
    total = sum(c.nbytes for c in emission.weights.values()) + model.ByteSize()
    if total > LIMIT:
        raise PlanishError(f"model: {total} bytes exceed the 2 GB that protobuf can hold", hint="write it to a file")
    for name, constant in emission.weights.items():
        model.graph.initializer.append(emission.documented(tensor_of(constant, name)))
    return model


def write(
    graph: Graph,
    path: str | Path,
    *,
    opset: int | None = None,
    target: str = "onnx",
    external: bool | None = None,
) -> None:
    """Write the graph as an ONNX file, whole or not at all.

    Args:
        external: put the weights into `<name>.data` beside the model; by default where the model came
            with external data or its weights exceed 1.8 GB.

    Raises:
        PlanishError: as `to_model`; or the file cannot be written.
    """
    path = Path(path)
    emission = Emission(graph, opset=opset, target=target)
    model = emission.model()
    weights = emission.weights
    total = sum(c.nbytes for c in weights.values())
    if external is None:
        captured = META_REST in graph.meta
        external = total > INLINE or (captured and any(c.file is not None for c in weights.values()))
    if not external:
        if total + model.ByteSize() > LIMIT:
            raise PlanishError(f"{path}: {total} bytes of weights exceed protobuf's 2 GB; expected external data")
        for name, constant in weights.items():
            model.graph.initializer.append(emission.documented(tensor_of(constant, name)))
        refuse_overwriting(path, weights)
        with atomic(path) as handle:
            handle.write(model.SerializeToString(deterministic=True))
        return
    data = path.with_name(path.name + ".data")
    for target_path in (path, data):
        refuse_overwriting(target_path, weights)
    free_space(path, total)
    with atomic_group([data, path]) as (data_handle, handle):
        for name, constant in weights.items():
            if constant.dtype == "str" or constant.nbytes < _SMALL:
                tensor = tensor_of(constant, name)
            else:
                tensor = TensorProto(name=name, data_type=onnx_enum(constant.dtype), dims=constant.shape)
                tensor.data_location = TensorProto.EXTERNAL
                offset, length = append_weight(data_handle, constant)
                for key, text in (("location", data.name), ("offset", str(offset)), ("length", str(length))):
                    tensor.external_data.add(key=key, value=text)
            model.graph.initializer.append(emission.documented(tensor))
        handle.write(model.SerializeToString(deterministic=True))
