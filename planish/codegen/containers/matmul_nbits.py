"""onnxruntime's com.microsoft::MatMulNBits: y = x W^T + bias, W [N, K] in blocks along K.

    B            uint8 [N, ceil(K / block), block * bits / 8]    element j of a block at bit j * bits
    scales       [N, ceil(K / block)]                            f32, f16 or bf16
    zero_points  uint8 [N, ceil(blocks * bits / 8)]              rows padded to bytes by 2^(bits - 1), the default
                 or like scales: W = (q - z) * s
    g_idx        int32 [K]                                       the block of each k

Bits 2, 4 or 8; the block is a power of two of at least 16. The codes are unsigned. A scale for each row, or one for
the matrix, is repeated over blocks of 128. (onnxruntime 1.31.1, docs/ContribOperators.md, and its CPU kernel.)

What the CPU kernel of 1.31.1 does with it, found by running it: g_idx is right for 4 bits without zero points or with
float ones, wrong (no error) for 4 bits with packed zero points and for 2 bits; 8 bits have neither g_idx nor float
zero points (an error). `kernel_refuses` says so.
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
from planish.ir.qtensor import QTensor
from planish.ir.types import from_numpy_dtype, numpy_dtype

NAME = "matmul-nbits"
ELEMENTS = ("i2", "u2", "i4", "u4", "i8", "u8")
SCALES = ("f32", "f16", "bf16")
LEAST_BLOCK = 16
SPREAD = 128  # the block over which one scale of a row is repeated


def refuses(q: QTensor) -> str | None:
    """Why MatMulNBits cannot hold a matrix [N, K]; None if it can."""
    return plain(q, *ELEMENTS) or rows_and_groups(q) or one_level(q, SCALES) or bad_block(q.block)


def kernel_refuses(q: QTensor) -> str | None:
    """Why onnxruntime's CPU kernel does not multiply by a matrix that the container holds; None if it does."""
    width = width_of(q)
    if q.group_index is not None and width != 4:
        return f"blocks that are not consecutive, of {width} bits"
    if q.group_index is not None and q.zero is not None and not q.zero_is_float:
        return "blocks that are not consecutive, with packed zero points"
    if width == 8 and q.zero is not None and q.zero_is_float:
        return "zero points of 8 bits that are floats"
    return None


def bad_block(block: int | None) -> str | None:
    """Why onnxruntime's kernels have no blocks of that size; None if they have."""
    if block is None or (block >= LEAST_BLOCK and block & (block - 1) == 0):
        return None
    return f"blocks of {block}; expected a power of two of at least {LEAST_BLOCK}"


def blocked(q: QTensor) -> QTensor:
    """The same matrix with its scales in blocks along the rows."""
    if q.block is not None:
        return q
    rows, columns = q.shape
    block = SPREAD
    while block > LEAST_BLOCK and block // 2 >= columns:
        block //= 2
    shape = (rows, -(-columns // block))

    def spread(held: np.ndarray | None) -> np.ndarray | None:
        return None if held is None else np.broadcast_to(held.reshape(-1, 1), shape).copy()

    scale = spread(q.scale)
    assert scale is not None
    return dataclasses.replace(q, axis=1, block=block, scale=scale, zero=spread(q.zero))


def zeros_of(q: QTensor) -> np.ndarray | None:
    """The zero points of a blocked matrix as they are stored: packed per row, or floats; None: 2^(bits - 1)."""
    width = width_of(q)
    if q.zero is None:
        if is_signed(q):
            return None
        held = np.zeros(q.scale.shape)
    else:
        held = as_unsigned(q.zero.astype(np.float64), width, is_signed(q))
    if q.zero is not None and q.zero_is_float:
        return held.astype(numpy_dtype(q.scale_dtype))
    if (held == 2 ** (width - 1)).all():
        return None
    short = -q.scale.shape[-1] % (8 // width)  # onnxruntime pads with the default, not with 0
    padded = np.pad(held, ((0, 0), (0, short)), constant_values=2 ** (width - 1))
    return pack_bytes(padded.astype(np.int64), width)


def pack(q: QTensor) -> Packed:
    """The operands of MatMulNBits by the names of its schema, and its attributes K, N, bits, block_size."""
    q = blocked(q)
    assert q.block is not None
    (rows, columns), width = q.shape, width_of(q)
    blocks = q.scale.shape[1]
    codes = np.pad(
        as_unsigned(q.codes.astype(np.int16), width, is_signed(q)), ((0, 0), (0, blocks * q.block - columns))
    )
    arrays = {
        "B": pack_bytes(codes.reshape(rows, blocks, q.block), width),
        "scales": q.scale.astype(numpy_dtype(q.scale_dtype)),
    }
    zeros = zeros_of(q)
    if zeros is not None:
        arrays["zero_points"] = zeros
    if q.group_index is not None:
        arrays["g_idx"] = q.group_index.astype(np.int32)
    return Packed(NAME, arrays, {"K": columns, "N": rows, "bits": width, "block_size": q.block})


def unpack(packed: Packed) -> QTensor:
    """The matrix [N, K]: signed codes without zero points, else unsigned ones."""
    rows, columns = packed.number("N"), packed.number("K")
    width, block = packed.number("bits"), packed.number("block_size")
    data, scales = packed.array("B"), packed.array("scales").reshape(rows, -1)
    codes = unpack_bytes(data, width, block).reshape(rows, -1)[:, :columns]
    zeros = packed.arrays.get("zero_points")
    signed = zeros is None
    floats = zeros is not None and zeros.dtype != np.uint8
    zero = None
    if zeros is not None:
        zero = zeros.reshape(scales.shape) if floats else unpack_bytes(zeros.reshape(rows, -1), width, scales.shape[1])
        zero = zero.astype(np.float64)
    index = packed.arrays.get("g_idx")
    return QTensor(
        (codes.astype(np.int16) - 2 ** (width - 1)).astype(np.int8) if signed else codes,
        f"{'i' if signed else 'u'}{width}",
        1,
        block,
        scales.astype(np.float64),
        from_numpy_dtype(scales.dtype),
        zero,
        zero_is_float=floats,
        group_index=None if index is None else index.astype(np.int64),
    )


register(Container(NAME, refuses, pack, unpack))
