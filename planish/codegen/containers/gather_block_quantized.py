"""onnxruntime's com.microsoft::GatherBlockQuantized: rows of a table [V, D] in blocks along D.

    data         uint8 [V, D * bits / 8]                      low bits first
    scales       [V, ceil(D / block)]
    zero_points  uint8 [V, ceil(blocks * bits / 8)]           absent: 2^(bits - 1)

Bits 2, 4 or 8; the block is a power of two of at least 16. One scale for a row is a block that is longer than the
row. (onnxruntime 1.31.1.)
"""

from __future__ import annotations

import dataclasses

import numpy as np

from planish.codegen.containers.base import (
    Container,
    Packed,
    is_signed,
    one_level,
    plain,
    register,
    rows_and_groups,
    width_of,
)
from planish.codegen.containers.bits import as_unsigned, pack_bytes, unpack_bytes
from planish.codegen.containers.matmul_nbits import ELEMENTS, LEAST_BLOCK, bad_block, zeros_of
from planish.ir.qtensor import QTensor
from planish.ir.types import from_numpy_dtype, numpy_dtype

NAME = "gather-block-quantized"
SCALES = ("f32", "f16")


def refuses(q: QTensor) -> str | None:
    """Why GatherBlockQuantized cannot hold a table [V, D]; None if it can."""
    why = plain(q, *ELEMENTS) or rows_and_groups(q) or bad_block(q.block) or one_level(q, SCALES)
    if why is not None:
        return why
    if q.zero_is_float:
        return "zero points that are floats"
    if q.group_index is not None:
        return "blocks that are not consecutive"
    if q.shape[1] * width_of(q) % 8:
        return f"rows of {q.shape[1]} elements of {width_of(q)} bits; expected whole bytes"
    return None


def _blocked(q: QTensor) -> QTensor:
    """The table with one block for each row that has one scale."""
    if q.block is not None:
        return q
    rows, columns = q.shape
    block = LEAST_BLOCK
    while block < columns:
        block *= 2

    def spread(held: np.ndarray) -> np.ndarray:
        return np.broadcast_to(held.reshape(-1, 1), (rows, 1)).copy()

    zero = None if q.zero is None else spread(q.zero)
    return dataclasses.replace(q, axis=1, block=block, scale=spread(q.scale), zero=zero)


def pack(q: QTensor) -> Packed:
    """The operands by the names of the schema, and its attributes."""
    q = _blocked(q)
    assert q.block is not None
    width = width_of(q)
    arrays = {
        "data": pack_bytes(as_unsigned(q.codes.astype(np.int16), width, is_signed(q)), width),
        "scales": q.scale.astype(numpy_dtype(q.scale_dtype)),
    }
    zeros = zeros_of(q)
    if zeros is not None:
        arrays["zero_points"] = zeros
    return Packed(NAME, arrays, {"bits": width, "block_size": q.block, "gather_axis": 0, "quantize_axis": 1})


def unpack(packed: Packed) -> QTensor:
    """The table [V, D]: signed codes without zero points, else unsigned ones."""
    width, block = packed.number("bits"), packed.number("block_size")
    data, scales = packed.array("data"), packed.array("scales")
    codes = unpack_bytes(data, width, data.shape[1] * 8 // width)
    zeros = packed.arrays.get("zero_points")
    zero = None if zeros is None else unpack_bytes(zeros, width, scales.shape[1]).astype(np.float64)
    return QTensor(
        (codes.astype(np.int16) - 2 ** (width - 1)).astype(np.int8) if zero is None else codes,
        f"{'i' if zero is None else 'u'}{width}",
        1,
        block,
        scales.astype(np.float64),
        from_numpy_dtype(scales.dtype),
        zero,
    )


register(Container(NAME, refuses, pack, unpack))
