"""Constant data: immutable, lazily loaded, shared between graphs.

A constant has a logical dtype and may hold its data wider than that: a fold computes in float64 and
is rounded once, when the model is written (`array`). In between, later folds and the validation
in float64 read the unrounded data (`wide`).
"""

from __future__ import annotations

import itertools
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planish.ir.errors import InvalidModelError
from planish.ir.types import TensorType, bits, from_numpy_dtype, is_float, numpy_dtype

if TYPE_CHECKING:
    import numpy as np
    import torch

_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class FileRange:
    """Where the raw little-endian bytes of a tensor lie in a file."""

    path: Path
    offset: int
    length: int


class Constant:
    """An immutable tensor.

    Args:
        data: the array, in the logical dtype or (floats only) in float64; or None with `file`.
        dtype: the logical dtype.
        shape: static dims.
        file: where the bytes lie, for data that is mapped when it is first read and not kept.
    """

    __slots__ = ("_data", "_digest", "dtype", "file", "serial", "shape")

    def __init__(
        self, data: np.ndarray | None, dtype: str, shape: tuple[int, ...], file: FileRange | None = None
    ) -> None:
        if data is not None:
            if tuple(data.shape) != tuple(shape):
                raise ValueError(f"constant data has shape {data.shape}, expected {shape}")
            import numpy as np

            data = np.asarray(data).view()  # arithmetic on 0-d arrays gives numpy scalars
            data.flags.writeable = False
        self._data = data
        self.dtype = dtype
        self.shape = tuple(int(d) for d in shape)
        self.file = file
        self.serial = next(_serial)
        self._digest: bytes | None = None

    @staticmethod
    def of(data: Any, dtype: str | None = None) -> Constant:
        """A constant from an array, a torch tensor or a nested list, of dtype `dtype` or the data's."""
        import numpy as np

        if hasattr(data, "detach"):
            import torch

            tensor = data.detach().cpu()
            if tensor.dtype == torch.bfloat16 or "float8" in str(tensor.dtype):
                from planish.ir.types import from_torch_dtype

                own = from_torch_dtype(tensor.dtype)
                view = {1: torch.uint8, 2: torch.uint16}[tensor.element_size()]
                data = tensor.contiguous().view(view).numpy().view(numpy_dtype(own))
            else:
                data = tensor.numpy()
        array = np.asarray(data)
        logical = dtype or from_numpy_dtype(array.dtype)
        if array.dtype != numpy_dtype(logical):  # held in the logical dtype, or unrounded
            array = array.astype(np.float64 if is_float(logical) else numpy_dtype(logical))
        return Constant(array, logical, array.shape)

    @property
    def type(self) -> TensorType:
        return TensorType(self.dtype, self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        n = 1
        for d in self.shape:
            n *= d
        return n

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its logical dtype, packed."""
        return (self.size * bits(self.dtype) + 7) // 8

    @property
    def loaded(self) -> bool:
        """True if the data is in memory rather than in a file."""
        return self._data is not None

    @property
    def is_wide(self) -> bool:
        """True if the data is held in float64 while the logical dtype is narrower."""
        return self._data is not None and self.dtype not in ("f64", "str") and self._data.dtype.name == "float64"

    def _raw(self) -> np.ndarray:
        import numpy as np

        if self._data is not None:
            return self._data
        assert self.file is not None
        if self.size == 0:
            return np.empty(self.shape, numpy_dtype(self.dtype))
        path, offset, length = self.file.path, self.file.offset, self.file.length
        if length != self.nbytes:
            raise InvalidModelError(
                f"{path}: wrong length of external data; expected {self.nbytes} bytes, got {length}"
            )
        try:
            with path.open("rb") as handle:
                size = handle.seek(0, 2)
                if offset + length > size:
                    raise InvalidModelError(
                        f"{path}: external data ends early; expected {offset + length} bytes, got {size}"
                    )
                page = offset - offset % mmap.ALLOCATIONGRANULARITY
                mapped = mmap.mmap(handle.fileno(), offset - page + length, access=mmap.ACCESS_READ, offset=page)
        except OSError as error:
            raise InvalidModelError(f"{path}: cannot read external data: {error.strerror}") from error
        buffer = memoryview(mapped)[offset - page :]
        if bits(self.dtype) >= 8:
            return np.frombuffer(buffer, numpy_dtype(self.dtype)).reshape(self.shape)
        unpacked = unpack_bits(np.frombuffer(buffer, np.uint8), self.dtype, self.size).reshape(self.shape)
        unpacked.flags.writeable = False
        return unpacked

    def array(self) -> np.ndarray:
        """The data in the logical dtype, read-only; a fold's float64 data is rounded here."""
        raw = self._raw()
        logical = numpy_dtype(self.dtype)
        if raw.dtype != logical:
            raw = raw.astype(logical)
            raw.flags.writeable = False
        return raw

    def wide(self) -> np.ndarray:
        """The data in float64, unrounded."""
        import numpy as np

        return self._raw().astype(np.float64)

    def tensor(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A torch tensor, in `dtype` if that is given and the constant is a float; do not write to it.

        Floats that torch lacks are held in float32.
        """
        import numpy as np
        import torch

        if dtype is None and self.dtype in ("f4e2m1", "f6e2m3", "f6e3m2", "f8e8m0"):
            dtype = torch.float32
        if dtype is not None and is_float(self.dtype):
            raw = self._raw()
            if raw.dtype.name not in ("float16", "float32", "float64"):  # ml_dtypes' own
                raw = raw.astype(np.float64 if bits(self.dtype) > 32 else np.float32)
            return torch.from_numpy(np.array(raw)).to(dtype)
        array = self.array()
        if self.dtype in ("bf16", "f8e4m3fn", "f8e4m3fnuz", "f8e5m2", "f8e5m2fnuz"):
            from planish.ir.types import torch_dtype

            unsigned = np.uint16 if self.dtype == "bf16" else np.uint8
            return torch.from_numpy(np.array(array).view(unsigned)).view(torch_dtype(self.dtype))
        if bits(self.dtype) < 8:
            array = array.astype(np.uint8 if self.dtype.startswith("u") else np.int8)
        return torch.from_numpy(np.array(array))

    def __eq__(self, other: object) -> bool:
        """Bit equality of dtype, shape and data (NaN equals the same NaN)."""
        if self is other:
            return True
        if not isinstance(other, Constant):
            return NotImplemented
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        if self.file is not None and self.file == other.file:
            return True
        mine, theirs = self._raw(), other._raw()
        if mine.dtype.kind == "O":
            return bool((mine == theirs).all())
        return mine.dtype == theirs.dtype and mine.tobytes() == theirs.tobytes()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Constant({self.type})"


def unpack_bits(packed: np.ndarray, dtype: str, size: int) -> np.ndarray:
    """Unpack elements of less than 8 bits from a bitstream, low bits first, to one element a byte, shape [size].

    The inverse of `pack_bits`.
    """
    import numpy as np

    width = bits(dtype)
    if 8 % width:  # 3 and 6 bits: an element may lie in two bytes
        stream = np.unpackbits(packed.view(np.uint8), count=size * width, bitorder="little").reshape(size, width)
        codes = np.packbits(stream, axis=1, bitorder="little").reshape(size)
    else:
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        codes = ((packed[:, None] >> shifts) & np.uint8((1 << width) - 1)).reshape(-1)[:size]
    if dtype.startswith("i"):
        half = 1 << (width - 1)
        return ((codes.astype(np.int8) ^ half) - half).astype(numpy_dtype(dtype))
    if dtype.startswith("u"):
        return codes.astype(numpy_dtype(dtype))
    return codes.view(numpy_dtype(dtype))


def pack_bits(array: np.ndarray, dtype: str) -> np.ndarray:
    """Elements of less than 8 bits as one bitstream, low bits first: uint8, the last byte padded with zeros.

    Elements of 2 and 4 bits fill bytes, one of 3 or 6 bits may lie in two: 8 or 4 elements in 3 bytes. (For 3 bits
    these are GPTQ's words, and for 6 bits ONNX's bytes.)
    """
    import numpy as np

    width = bits(dtype)
    flat = array.reshape(-1)
    codes = flat.astype(np.int8).view(np.uint8) if dtype[0] in "iu" else flat.view(np.uint8)
    codes = codes & np.uint8((1 << width) - 1)
    if 8 % width:
        return np.packbits(np.unpackbits(codes[:, None], axis=1, count=width, bitorder="little"), bitorder="little")
    per = 8 // width
    rows = np.pad(codes, (0, -len(codes) % per)).reshape(-1, per)
    out = np.zeros(len(rows), np.uint8)
    for i in range(per):
        out |= rows[:, i] << np.uint8(i * width)
    return out
