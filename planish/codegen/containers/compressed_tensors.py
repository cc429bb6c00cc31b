"""The formats of compressed-tensors checkpoints, one container each; W [N, K].

    int-quantized         weight int8 [N, K]; weight_scale, weight_zero_point int8: [1], [N, 1] or [N, K / G]
    pack-quantized        weight_packed int32 [N, words] along K, code + 2^(b - 1); weight_scale; weight_shape int64;
                          weight_zero_point int32 [words, K / G] along N, the same offset; weight_g_idx int32 [K]
    float-quantized       weight f8e4m3fn [N, K]; weight_scale
    nvfp4-pack-quantized  weight_packed uint8 [N, K / 2], low nibble first; weight_scale f8e4m3fn [N, K / 16];
                          weight_global_scale f32 [1], which *divides* the scales
    mxfp4-pack-quantized  weight_packed as above; weight_scale uint8 [N, K / 32]: exponent + 127

Codes and zero points are signed there. Today's releases (0.19, 0.20) lay codes across words, 32 of b bits in b words;
older ones put 32 // b codes into each word, which differs where b does not divide 32. `words="whole"` writes the
latter; in a `Packed`, the attribute `words` says which. (compressed-tensors 0.20.0, `compressors/`.)
"""

from __future__ import annotations

from typing import Literal

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
from planish.codegen.containers.bits import pack_bytes, pack_words, unpack_bytes, unpack_words
from planish.ir.errors import PlanishError
from planish.ir.qtensor import QTensor
from planish.ir.types import from_numpy_dtype, numpy_dtype

SCALES = ("f32", "f16", "bf16")
INTEGERS = ("i2", "u2", "i3", "u3", "i4", "u4", "i8", "u8")


def _scaled(q: QTensor, *elements: str) -> str | None:
    """Why a matrix has not such elements under scales of the tensor, its rows or whole groups; None if it has."""
    why = plain(q, *elements) or rows_and_groups(q)
    if why is not None:
        return why
    if q.block is not None and q.shape[1] % q.block:
        return f"rows of {q.shape[1]} elements in blocks of {q.block}; expected whole blocks"
    if q.zero is not None and q.zero_is_float:
        return "zero points that are floats"
    return None


def _laid_out(held: np.ndarray, q: QTensor) -> np.ndarray:
    """Scales or zero points as they stand in a checkpoint: [1], [N, 1] or [N, K / G]."""
    if q.axis is None:
        return held.reshape(1)
    return held.reshape(-1, 1) if q.block is None else held


def _scheme(scale: np.ndarray, shape: tuple[int, ...]) -> tuple[int | None, int | None, tuple[int, ...]]:
    """Axis, block, and the shape that scales of a checkpoint have in a QTensor."""
    if scale.ndim < 2:
        return None, None, ()
    if scale.shape[1] == 1:
        return 0, None, (scale.shape[0],)
    return 1, shape[1] // scale.shape[1], scale.shape


def _signed(codes: np.ndarray, q: QTensor) -> np.ndarray:
    """Codes or zero points as signed numbers, int8."""
    wide = codes.astype(np.int16)
    return (wide if is_signed(q) else wide - 2 ** (width_of(q) - 1)).astype(np.int8)


def _zero(q: QTensor) -> np.ndarray | None:
    """The signed zero points; None if they are 0 throughout."""
    if q.zero is None and is_signed(q):
        return None
    held = _signed(np.zeros(q.scale.shape) if q.zero is None else q.zero, q)
    return None if not held.any() else held


def _integers(
    codes: np.ndarray, width: int, scale: np.ndarray, zero: np.ndarray | None, group_index: np.ndarray | None = None
) -> QTensor:
    """The matrix of signed codes: unsigned where there are zero points."""
    axis, block, dims = _scheme(scale, codes.shape)
    offset = 2 ** (width - 1)
    return QTensor(
        codes.astype(np.int8) if zero is None else (codes.astype(np.int16) + offset).astype(np.uint8),
        f"{'i' if zero is None else 'u'}{width}",
        axis,
        block,
        scale.reshape(dims).astype(np.float64),
        from_numpy_dtype(scale.dtype),
        None if zero is None else (zero.astype(np.int16) + offset).reshape(dims).astype(np.float64),
        group_index=None if group_index is None else group_index.astype(np.int64),
    )


# -- int-quantized ---------------------------------------------------------------------------------


def _int_refuses(q: QTensor) -> str | None:
    why = _scaled(q, *INTEGERS) or one_level(q, SCALES)
    return why or ("blocks that are not consecutive" if q.group_index is not None else None)


def _int_pack(q: QTensor) -> Packed:
    arrays = {
        "weight": _signed(q.codes, q),
        "weight_scale": _laid_out(q.scale, q).astype(numpy_dtype(q.scale_dtype)),
    }
    zero = _zero(q)
    if zero is not None:
        arrays["weight_zero_point"] = _laid_out(zero, q)
    return Packed("int-quantized", arrays, {"num_bits": width_of(q)})


def _int_unpack(packed: Packed) -> QTensor:
    zero = packed.arrays.get("weight_zero_point")
    return _integers(packed.array("weight"), packed.number("num_bits"), packed.array("weight_scale"), zero)


# -- pack-quantized --------------------------------------------------------------------------------


def _pack_refuses(q: QTensor) -> str | None:
    return _scaled(q, *INTEGERS) or one_level(q, SCALES)


def _pack_pack(q: QTensor, *, words: Literal["dense", "whole"] = "dense") -> Packed:
    width, dense = width_of(q), words == "dense"
    if words not in ("dense", "whole"):
        raise PlanishError(f"container 'pack-quantized': option 'words': expected dense or whole; got '{words}'")
    offset = 2 ** (width - 1)
    arrays = {
        "weight_packed": pack_words(_signed(q.codes, q).astype(np.int16) + offset, width, dense=dense),
        "weight_scale": _laid_out(q.scale, q).astype(numpy_dtype(q.scale_dtype)),
        "weight_shape": np.array(q.shape, np.int64),
    }
    zero = _zero(q)
    if zero is not None and q.axis is None:
        arrays["weight_zero_point"] = zero.reshape(1)  # of the tensor: not packed
    elif zero is not None:
        shifted = _laid_out(zero, q).astype(np.int16) + offset
        arrays["weight_zero_point"] = np.ascontiguousarray(pack_words(shifted.T, width, dense=dense).T)
    if q.group_index is not None:
        arrays["weight_g_idx"] = q.group_index.astype(np.int32)
    return Packed("pack-quantized", arrays, {"num_bits": width, "words": words})


def _pack_unpack(packed: Packed) -> QTensor:
    width = packed.number("num_bits")
    dense, offset = packed.attributes.get("words", "dense") == "dense", 2 ** (width - 1)
    rows, columns = (int(n) for n in packed.array("weight_shape"))
    scale = packed.array("weight_scale")
    codes = unpack_words(packed.array("weight_packed"), width, columns, dense=dense).astype(np.int16) - offset
    zero = packed.arrays.get("weight_zero_point")
    if zero is not None and zero.ndim == 2:
        zero = unpack_words(zero.T, width, rows, dense=dense).T.astype(np.int16) - offset
    return _integers(codes, width, scale, zero, packed.arrays.get("weight_g_idx"))


# -- floats ----------------------------------------------------------------------------------------


def _float_refuses(q: QTensor) -> str | None:
    why = _scaled(q, "f8e4m3fn") or one_level(q, SCALES)
    return why or ("blocks that are not consecutive" if q.group_index is not None else None)


def _float_pack(q: QTensor) -> Packed:
    scale = _laid_out(q.scale, q).astype(numpy_dtype(q.scale_dtype))
    return Packed("float-quantized", {"weight": q.codes, "weight_scale": scale})


def _float_unpack(packed: Packed) -> QTensor:
    codes, scale = packed.array("weight"), packed.array("weight_scale")
    axis, block, dims = _scheme(scale, codes.shape)
    held = scale.reshape(dims).astype(np.float64)
    return QTensor(codes, "f8e4m3fn", axis, block, held, from_numpy_dtype(scale.dtype))


def _fp4_refuses(q: QTensor, block: int, scale: str) -> str | None:
    why = _scaled(q, "f4e2m1")
    if why is None and (q.block, q.scale_dtype) != (block, scale):
        have = f"blocks of {q.block}" if q.block is not None else "no blocks"
        why = f"{have} with scales of {q.scale_dtype}; expected blocks of {block} with scales of {scale}"
    return why or ("blocks that are not consecutive" if q.group_index is not None else None)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    return pack_bytes(np.ascontiguousarray(codes).view(np.uint8), 4)


def _from_nibbles(packed: np.ndarray) -> np.ndarray:
    return unpack_bytes(packed, 4, packed.shape[1] * 2).view(numpy_dtype("f4e2m1"))


def _nvfp4_refuses(q: QTensor) -> str | None:
    return _fp4_refuses(q, 16, "f8e4m3fn")


def _nvfp4_pack(q: QTensor) -> Packed:
    divisor = np.array([1.0 / (1.0 if q.global_scale is None else q.global_scale)], np.float32)
    scale = q.scale.astype(numpy_dtype("f8e4m3fn"))
    arrays = {"weight_packed": _nibbles(q.codes), "weight_scale": scale, "weight_global_scale": divisor}
    return Packed("nvfp4-pack-quantized", arrays)


def _nvfp4_unpack(packed: Packed) -> QTensor:
    scale = packed.array("weight_scale").astype(np.float64)
    factor = 1.0 / float(packed.array("weight_global_scale")[0])
    codes = _from_nibbles(packed.array("weight_packed"))
    return QTensor(codes, "f4e2m1", 1, 16, scale, "f8e4m3fn", global_scale=factor)


def _mxfp4_refuses(q: QTensor) -> str | None:
    return _fp4_refuses(q, 32, "f8e8m0")


def _mxfp4_pack(q: QTensor) -> Packed:
    exponent = (np.log2(q.scale) + 127).astype(np.uint8)
    return Packed("mxfp4-pack-quantized", {"weight_packed": _nibbles(q.codes), "weight_scale": exponent})


def _mxfp4_unpack(packed: Packed) -> QTensor:
    scale = np.exp2(packed.array("weight_scale").astype(np.float64) - 127)
    return QTensor(_from_nibbles(packed.array("weight_packed")), "f4e2m1", 1, 32, scale, "f8e8m0")


register(Container("int-quantized", _int_refuses, _int_pack, _int_unpack))
register(Container("pack-quantized", _pack_refuses, _pack_pack, _pack_unpack))
register(Container("float-quantized", _float_refuses, _float_pack, _float_unpack))
register(Container("nvfp4-pack-quantized", _nvfp4_refuses, _nvfp4_pack, _nvfp4_unpack))
register(Container("mxfp4-pack-quantized", _mxfp4_refuses, _mxfp4_pack, _mxfp4_unpack))
