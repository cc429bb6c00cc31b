"""planish's own layout, which its Triton kernels read: W [N, K], rows of codes K by K.

    codes  int8 [N, K_pad * bits / 8]    K_pad: K rounded up to spans of 64 columns; bits of the padding are 0
    scale  [N] or [ceil(K / block), N]   in the tensor's own scale dtype, f32, f16 or bf16
    zero   int8, or f32 if they are floats, like scale; absent for signed codes without zero points
    ids    uint8 [N, K_pad / 8] for two clusters, [N, K_pad / 4] for three and four; scale and zero then have a leading
           axis of clusters

8-bit codes are signed, u8 less 128. Codes of 4 and 2 bits lie in planes: with half = 64 * bits / 8, column c of a span
is in byte c % half, in the bits from bits * (c // half) on, as code + 2^(bits - 1) (u4 and u2 as they are). Zero points
are those of signed codes: u4's less 8; floats are those of unsigned codes: u4's as they are. Ids lie like codes of 1
and 2 bits. Where rows are padded, a kernel's activation is 0.

Why so, by the instructions of the main loop, compiled for sm_80 to sm_120 and gfx942 (not timed on a GPU): K runs along
the rows because tensor cores take 8-bit operands only so ([K, N]: 3 to 6 times the instructions, byte by byte through
the registers on sm_80). Planes by halves make two operands of consecutive columns by one mask each, where neighbours in
a byte need a permutation of bytes. Unsigned nibbles are one `or` away from a float16; where they are multiplied as
int8, one `xor` of four bytes makes them signed and a mask leaves 16 times the code. Spans of 64 let groups of 32 begin
with a plane. 16-bit words of four planes were no better (820 against 810 instructions for 128 x 128 x 128 on sm_80).
"""

from __future__ import annotations

import numpy as np

from planish.codegen.containers.base import Container, Packed, is_signed, one_level, register, rows_and_groups, width_of
from planish.codegen.kernel_spec import half_of, padded
from planish.ir.qtensor import QTensor
from planish.ir.types import from_numpy_dtype, numpy_dtype

NAME = "triton"
ELEMENTS = ("i2", "u2", "i4", "u4", "i8", "u8")
SCALES = ("f32", "f16", "bf16")
MOST_CLUSTERS = 4


def refuses(q: QTensor) -> str | None:
    """Why the kernels' layout cannot hold a matrix [N, K]; None if it can."""
    if q.codes.ndim != 2:
        return f"a tensor of rank {q.codes.ndim}; expected a matrix"
    if q.codes.size == 0:
        return f"a tensor without elements, of shape {q.shape}"
    if q.element not in ELEMENTS:
        return f"elements {q.element}; expected {', '.join(ELEMENTS)}"
    if q.clusters is not None and not 2 <= len(q.scale) <= MOST_CLUSTERS:
        return f"a scale for each of {len(q.scale)} clusters; expected 2 to {MOST_CLUSTERS}"
    if q.clusters is not None and q.axis is None and q.scale[0].size != 1:
        return f"scales of shape {q.scale.shape} that broadcast"
    why = rows_and_groups(q) if q.clusters is None or q.axis is not None else None
    why = why or one_level(q, SCALES)
    if why is not None:
        return why
    if q.group_index is not None:
        return "blocks that are not consecutive"
    zero = _zero(q)
    if zero is not None and q.zero_is_float and (zero != zero.astype(np.float32)).any():
        return f"zero points of {q.element} that are no float32"
    low, high = -(1 << (width_of(q) - 1)), (1 << (width_of(q) - 1)) - 1
    if zero is not None and not q.zero_is_float and ((zero < low) | (zero > high) | (zero != np.round(zero))).any():
        return f"zero points beyond the codes of {q.element}"
    return None


def planes(codes: np.ndarray, width: int) -> np.ndarray:
    """Unsigned codes [N, K] of 1, 2 or 4 bits in bytes, uint8 [N, K_pad * width / 8]; the padding is 0."""
    rows, columns = codes.shape
    held = np.pad(codes.astype(np.uint8), ((0, 0), (0, padded(columns) - columns)))
    spans = held.reshape(rows, -1, 8 // width, half_of(width))
    shifts = (np.arange(8 // width, dtype=np.uint8) * np.uint8(width)).reshape(1, 1, -1, 1)
    packed: np.ndarray = np.bitwise_or.reduce(spans << shifts, axis=2)
    return packed.reshape(rows, -1)


def columns_of(packed: np.ndarray, width: int, columns: int) -> np.ndarray:
    """The inverse of `planes`: uint8 codes [N, columns]."""
    rows = len(packed)
    spans = packed.view(np.uint8).reshape(rows, -1, 1, half_of(width))
    shifts = (np.arange(8 // width, dtype=np.uint8) * np.uint8(width)).reshape(1, 1, -1, 1)
    return ((spans >> shifts) & np.uint8((1 << width) - 1)).reshape(rows, -1)[:, :columns]


def id_bits(clusters: int) -> int:
    """The bits of a cluster's id."""
    return 1 if clusters <= 2 else 2


def _shift(q: QTensor) -> int:
    """What stored zero points and 8-bit codes are less than the tensor's own."""
    return 0 if is_signed(q) else 1 << (width_of(q) - 1)


def _zero(q: QTensor) -> np.ndarray | None:
    """The zero points as they are stored; None for signed codes without any."""
    if q.zero is None and is_signed(q):
        return None
    held = np.zeros(q.scale.shape) if q.zero is None else np.asarray(q.zero, np.float64)
    middle = 1 << (width_of(q) - 1)
    stored: np.ndarray = held + (middle if is_signed(q) else 0) if q.zero_is_float else held - _shift(q)
    return stored


def _placed(held: np.ndarray, q: QTensor) -> np.ndarray:
    """Scales or zero points [.., N] or [.., blocks, N]; the leading axis is that of clusters."""
    lead = (len(q.scale),) if q.clusters is not None else ()
    if q.block is not None:
        return np.ascontiguousarray(np.swapaxes(held, -1, -2))
    return np.broadcast_to(held.reshape(*lead, -1), (*lead, q.shape[0])).copy()


def pack(q: QTensor) -> Packed:
    """The arrays `codes`, `scale`, `zero`, `ids`; attributes K, N, bits, block, clusters."""
    width, columns = width_of(q), q.shape[1]
    if width == 8:
        held = q.codes.astype(np.int16) - _shift(q)
        codes = np.pad(held.astype(np.int8), ((0, 0), (0, padded(columns) - columns)))
    else:
        codes = planes(q.codes.astype(np.int16) + (1 << (width - 1)) - _shift(q), width).view(np.int8)
    arrays = {"codes": codes, "scale": _placed(q.scale, q).astype(numpy_dtype(q.scale_dtype))}
    zero = _zero(q)
    if zero is not None:
        arrays["zero"] = _placed(zero, q).astype(np.float32 if q.zero_is_float else np.int8)
    clusters = 0 if q.clusters is None else len(q.scale)
    if q.clusters is not None:
        arrays["ids"] = planes(q.clusters, id_bits(clusters))
    shape = {"K": columns, "N": q.shape[0], "bits": width, "block": q.block or 0, "clusters": clusters}
    return Packed(NAME, arrays, {**shape})


def unpack(packed: Packed) -> QTensor:
    """The matrix [N, K]: signed codes without zero points, else unsigned ones."""
    columns, width, block = packed.number("K"), packed.number("bits"), packed.number("block")
    clusters, scale, zero = packed.number("clusters"), packed.array("scale"), packed.arrays.get("zero")
    middle = 1 << (width - 1)
    held = packed.array("codes")
    wide = held[:, :columns].astype(np.int16) + middle if width == 8 else columns_of(held, width, columns)
    unsigned, floats = zero is not None, zero is not None and zero.dtype != np.int8

    def turned(found: np.ndarray) -> np.ndarray:
        return np.swapaxes(found, -1, -2) if block else found

    return QTensor(
        wide.astype(np.uint8) if unsigned else (wide.astype(np.int16) - middle).astype(np.int8),
        f"{'u' if unsigned else 'i'}{width}",
        1 if block else 0,
        block or None,
        turned(scale).astype(np.float64),
        from_numpy_dtype(scale.dtype),
        None if zero is None else turned(zero).astype(np.float64) + (0 if floats else middle),
        zero_is_float=floats,
        clusters=columns_of(packed.array("ids"), id_bits(clusters), columns) if clusters else None,
    )


register(Container(NAME, refuses, pack, unpack))
