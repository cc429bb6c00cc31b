"""Codes of a few bits in bytes and words: little end first, along the last axis."""

from __future__ import annotations

import numpy as np


def pack_bytes(codes: np.ndarray, width: int) -> np.ndarray:
    """Codes [..., n] as a stream of bits in uint8 [..., ceil(n * width / 8)]; the last byte is padded with zeros.

    Args:
        codes: integers; only their low `width` bits are kept.
        width: bits per code, 1 to 8.
    """
    held = (np.asarray(codes).astype(np.int64) & ((1 << width) - 1)).astype(np.uint8)
    if width == 8:
        return held
    if 8 % width == 0:
        per = 8 // width
        short = -held.shape[-1] % per
        held = np.pad(held, [(0, 0)] * (held.ndim - 1) + [(0, short)]).reshape(*held.shape[:-1], -1, per)
        shifts = np.arange(per, dtype=np.uint8) * np.uint8(width)
        packed: np.ndarray = np.bitwise_or.reduce(held << shifts, axis=-1, dtype=np.uint8)
        return packed
    stream = np.unpackbits(held[..., None], axis=-1, bitorder="little")[..., :width]
    return np.packbits(stream.reshape(*held.shape[:-1], -1), axis=-1, bitorder="little")


def unpack_bytes(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """The inverse of `pack_bytes`: uint8 codes [..., count]."""
    packed = np.asarray(packed, np.uint8)
    if 8 % width == 0:
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        codes = (packed[..., None] >> shifts) & np.uint8((1 << width) - 1)
        return codes.reshape(*packed.shape[:-1], -1)[..., :count]
    stream = np.unpackbits(packed, axis=-1, count=count * width, bitorder="little")
    padded = np.zeros((*packed.shape[:-1], count, 8), np.uint8)
    padded[..., :width] = stream.reshape(*packed.shape[:-1], count, width)
    return np.packbits(padded, axis=-1, bitorder="little")[..., 0]


def pack_words(codes: np.ndarray, width: int, *, dense: bool = True) -> np.ndarray:
    """Codes [..., n] in int32 words.

    Args:
        dense: a code may lie across two words: ceil(n * width / 32) of them; else every word has 32 // width codes
            and its high bits are 0.
    """
    codes = np.asarray(codes)
    if not dense and 32 % width:
        per = 32 // width
        short = -codes.shape[-1] % per
        groups = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)]).reshape(*codes.shape[:-1], -1, per)
        return pack_words(groups, width)[..., 0]
    packed = pack_bytes(codes, width)
    short = -packed.shape[-1] % 4
    packed = np.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, short)])
    return np.ascontiguousarray(packed).view("<i4").astype(np.int32, copy=False)


def unpack_words(words: np.ndarray, width: int, count: int, *, dense: bool = True) -> np.ndarray:
    """The inverse of `pack_words`: uint8 codes [..., count]."""
    if not dense and 32 % width:
        codes = unpack_words(np.asarray(words)[..., None], width, 32 // width)
        return codes.reshape(*words.shape[:-1], -1)[..., :count]
    held = np.ascontiguousarray(words, "<i4").view(np.uint8)
    return unpack_bytes(held, width, count)


def as_unsigned(codes: np.ndarray, width: int, signed: bool) -> np.ndarray:
    """Codes as they are stored without a sign: signed ones plus 2^(width - 1); float64 stays float64."""
    return codes + (2.0 if codes.dtype.kind == "f" else 2) ** (width - 1) if signed else codes
