"""Types of values: `dtype[dim, dim, ...]` with named symbolic dims.

A dim is an int (static), a str (a named symbol) or None (unknown). A shape is a tuple of dims, or
None where even the rank is unknown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from planish.ir.errors import PlanishError

if TYPE_CHECKING:
    import numpy as np
    import torch

Dim = int | str | None
Shape = tuple[Dim, ...] | None

# name: (ONNX TensorProto data type or None, numpy / ml_dtypes name, torch name or None, bits)
_DTYPES: dict[str, tuple[int | None, str, str | None, int]] = {
    "f32": (1, "float32", "float32", 32),
    "u8": (2, "uint8", "uint8", 8),
    "i8": (3, "int8", "int8", 8),
    "u16": (4, "uint16", "uint16", 16),
    "i16": (5, "int16", "int16", 16),
    "i32": (6, "int32", "int32", 32),
    "i64": (7, "int64", "int64", 64),
    "str": (8, "object", None, 0),
    "bool": (9, "bool", "bool", 8),
    "f16": (10, "float16", "float16", 16),
    "f64": (11, "float64", "float64", 64),
    "u32": (12, "uint32", "uint32", 32),
    "u64": (13, "uint64", "uint64", 64),
    "c64": (14, "complex64", "complex64", 64),
    "c128": (15, "complex128", "complex128", 128),
    "bf16": (16, "bfloat16", "bfloat16", 16),
    "f8e4m3fn": (17, "float8_e4m3fn", "float8_e4m3fn", 8),
    "f8e4m3fnuz": (18, "float8_e4m3fnuz", "float8_e4m3fnuz", 8),
    "f8e5m2": (19, "float8_e5m2", "float8_e5m2", 8),
    "f8e5m2fnuz": (20, "float8_e5m2fnuz", "float8_e5m2fnuz", 8),
    "u4": (21, "uint4", None, 4),
    "i4": (22, "int4", None, 4),
    "f4e2m1": (23, "float4_e2m1fn", None, 4),
    "f8e8m0": (24, "float8_e8m0fnu", None, 8),
    "u2": (25, "uint2", None, 2),
    "i2": (26, "int2", None, 2),
    "f6e2m3": (27, "float6_e2m3fn", None, 6),
    "f6e3m2": (28, "float6_e3m2fn", None, 6),
    "u1": (None, "uint8", None, 1),  # held one a byte, as ml_dtypes holds those that it has
    "u3": (None, "uint8", None, 3),
    "i3": (None, "int8", None, 3),
}
HOLDERS = {"u1": "u2", "u3": "u4", "i3": "i4"}  # where there is no ONNX number: the next wider dtype that has one
DTYPES = frozenset(_DTYPES)
_FLOATS = frozenset(n for n in _DTYPES if n.startswith(("f", "bf")))
WIDE_FLOATS = frozenset({"f16", "bf16", "f32", "f64"})  # the floats that arithmetic is done in


def is_float(dtype: str | None) -> bool:
    """True for every floating-point dtype, the 8- and 4-bit ones included."""
    return dtype in _FLOATS


def bits(dtype: str) -> int:
    """Bits per element; 0 for strings."""
    return _DTYPES[dtype][3]


def onnx_enum(dtype: str) -> int:
    """The `TensorProto.DataType` number.

    Raises:
        PlanishError: ONNX has no such dtype.
    """
    number = _DTYPES[dtype][0]
    if number is None:
        raise PlanishError(f"dtype {dtype}: ONNX has no number for it", hint=f"{HOLDERS[dtype]} holds its elements")
    return number


@cache
def _by_enum() -> dict[int, str]:
    return {row[0]: name for name, row in _DTYPES.items() if row[0] is not None}


def from_onnx_enum(number: int) -> str:
    """The dtype of a `TensorProto.DataType` number; KeyError if there is none."""
    return _by_enum()[number]


@cache
def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype: ml_dtypes' for narrow floats and integers of 2 and 4 bits (one a byte); for 3 bits int8."""
    import numpy as np

    name = _DTYPES[dtype][1]
    if name in ("object", "bool") or hasattr(np, name):
        return np.dtype(name)
    import ml_dtypes

    narrow: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return narrow


@cache
def _numpy_names() -> dict[str, str]:
    return {row[1]: name for name, row in _DTYPES.items() if name not in HOLDERS}


def from_numpy_dtype(dtype: np.dtype[Any]) -> str:
    """The dtype of a numpy dtype; KeyError if there is none."""
    return "str" if dtype.kind in "OUST" else _numpy_names()[dtype.name]


@cache
def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype; KeyError if torch has none."""
    import torch

    name = _DTYPES[dtype][2]
    if name is None:
        raise KeyError(dtype)
    return getattr(torch, name)  # type: ignore[no-any-return]


@cache
def _torch_names() -> dict[torch.dtype, str]:
    import torch

    return {getattr(torch, row[2]): name for name, row in _DTYPES.items() if row[2]}


def from_torch_dtype(dtype: torch.dtype) -> str:
    """The dtype of a torch dtype; KeyError if there is none."""
    return _torch_names()[dtype]


_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor's type: `f32[batch, 128]`; `f32[?, 128]` and `f32[*]` where dims or rank are unknown."""

    dtype: str
    shape: Shape = None

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    def dim(self, axis: int) -> Dim:
        """The dim of an axis (negative counts from the end); None if unknown."""
        if self.shape is None or not -len(self.shape) <= axis < len(self.shape):
            return None
        return self.shape[axis]

    def __str__(self) -> str:
        from planish.ir.text import quote

        if self.shape is None:
            return f"{self.dtype}[*]"
        dims = (
            "?" if d is None else str(d) if isinstance(d, int) or _SYMBOL.match(d) else quote(d) for d in self.shape
        )
        return f"{self.dtype}[{', '.join(dims)}]"


@dataclass(frozen=True, slots=True)
class OtherType:
    """A type that is not a tensor (ONNX sequence, optional, map, sparse tensor), or an unknown one.

    `text` is what the capturing front end needs to write the type again; empty if unknown.
    """

    text: str = ""

    def __str__(self) -> str:
        from planish.ir.text import quote

        return f"other({quote(self.text)})" if self.text else "unknown"


Type = TensorType | OtherType
UNKNOWN = OtherType()
