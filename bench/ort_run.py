"""Run a model in ONNX Runtime with its optimiser off, whatever its dtypes, and compare results bit for bit."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

os.environ.setdefault("ALLOW_RELEASED_ONNX_OPSET_ONLY", "0")  # let ONNX Runtime try the newest opsets
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from planish.ir.constant import pack_bits, unpack_bits
from planish.ir.types import bits, from_numpy_dtype, numpy_dtype, onnx_enum

ORT_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    RuntimeError,
    TypeError,
    ValueError,
)
Feeds = Mapping[str, Any]


def session(model: onnx.ModelProto | Path) -> onnxruntime.InferenceSession:
    """A session with the optimiser off, on one thread."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto | Path, feeds: Sequence[Feeds]) -> list[list[Any]]:
    """The outputs for each set of inputs."""
    made = session(model)
    declared = {i.name: i.type for i in made.get_inputs()}
    results = []
    for feed in feeds:
        prepared = {n: _prepare(v, declared.get(n, "")) for n, v in feed.items()}
        plain = all(isinstance(v, onnxruntime.OrtValue) for v in prepared.values())
        wide = all(_has_numpy(o.type) for o in made.get_outputs())
        if plain and not wide:
            outputs = made.run_with_ort_values(None, prepared)
            results.append([_unpack(o) for o in outputs])
        else:
            results.append(made.run(None, prepared))
    return results


def _has_numpy(type_: str) -> bool:
    return not any(part in type_ for part in ("bfloat16", "float8", "int4", "float4", "int2"))


def _prepare(value: Any, declared: str) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype.kind in "OUST" or not declared.startswith("tensor("):
        return value
    if value.dtype.kind in "biufc" and value.dtype.isbuiltin == 1:
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(value, order="C"))
    dtype = from_numpy_dtype(value.dtype)
    if bits(dtype) < 8:
        raw = np.zeros(value.shape, np.uint8)  # the packed elements lie in its first bytes
        packed = pack_bits(value, dtype)
        raw.reshape(-1)[: len(packed)] = packed
    else:
        raw = np.asarray(value, order="C").view({1: np.uint8, 2: np.uint16}[value.dtype.itemsize])
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, onnx_enum(dtype))


def _unpack(value: onnxruntime.OrtValue) -> Any:
    """A result as an array; of a dtype that the binding cannot hand over, its bytes."""
    if _has_numpy(value.data_type()):
        return value.numpy()
    size = value.tensor_size_in_bytes()
    data = np.frombuffer(ctypes.string_at(value.data_ptr(), size), np.uint8)
    return RawTensor(value.data_type(), tuple(value.shape()), data)


@dataclass(frozen=True)
class RawTensor:
    """A tensor of a dtype that ONNX Runtime's python binding does not hand over."""

    type: str
    shape: tuple[int, ...]
    data: np.ndarray

    def array(self) -> np.ndarray:
        dtype = _ORT_NAMES[self.type]
        size = int(np.prod(self.shape))
        if bits(dtype) < 8:
            return unpack_bits(self.data, dtype, size).reshape(self.shape)
        return self.data.view(numpy_dtype(dtype)).reshape(self.shape)


_ORT_NAMES = {
    "tensor(bfloat16)": "bf16", "tensor(float8e4m3fn)": "f8e4m3fn", "tensor(float8e4m3fnuz)": "f8e4m3fnuz",
    "tensor(float8e5m2)": "f8e5m2", "tensor(float8e5m2fnuz)": "f8e5m2fnuz", "tensor(uint4)": "u4",
    "tensor(int4)": "i4", "tensor(float4e2m1)": "f4e2m1", "tensor(uint2)": "u2", "tensor(int2)": "i2",
    "tensor(float8e8m0)": "f8e8m0",
}  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Equal to the bit; a NaN equals a NaN."""
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, RawTensor):
        return isinstance(b, RawTensor) and same(a.array(), b.array())
    if not isinstance(a, np.ndarray):
        return bool(a == b) or (a != a and b != b)
    if not isinstance(b, np.ndarray) or a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind == "O":
        return bool((a == b).all())
    if a.tobytes() == b.tobytes():
        return True
    if a.dtype.kind not in "fcV":
        return False
    number = ~np.isnan(a)  # a NaN has many spellings
    return bool((number == ~np.isnan(b)).all()) and a[number].tobytes() == b[number].tobytes()
