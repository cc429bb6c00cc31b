"""Quantised embedding tables: rows are gathered as they are stored, and only those are dequantised.

In standard operators the codes lie in bytes, 2, 4 or 8 bits each (Gather of narrower types has no kernel in
onnxruntime), low bits first; a row is padded to whole bytes, and a byte looks up the numbers of its codes:

    y = (LUT[Gather(bytes, ids)] - zero) * scale          LUT [256, 8 / bits]; zero, scale gathered with the same ids
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planish.codegen.containers import pack, refusal
from planish.codegen.containers.bits import pack_bytes, unpack_bytes
from planish.codegen.containers.gather_block_quantized import NAME
from planish.codegen.containers.matmul_nbits import NAME as MATMUL
from planish.codegen.containers.matmul_nbits import blocked
from planish.codegen.ort_linears import contrib
from planish.codegen.ort_weights import Shared, array_operand, float_scales
from planish.ir.constant import Constant
from planish.ir.graph import Attribute, Node, Value
from planish.ir.qnodes import qtensor_of
from planish.ir.qtensor import QTensor
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.types import WIDE_FLOATS, bits, numpy_dtype


@dataclass(frozen=True)
class Lookup:
    """Rows that a node takes from a quantised table.

    Attributes:
        table: [V, D].
        ids: of the rows.
        codes: the constant that holds the codes in the graph.
    """

    table: QTensor
    ids: Value
    codes: Value


def lookup_of(node: Node) -> Lookup | None:
    """What a node looks up in a quantised table: as an embedding of the dequantised table, or of codes and scales.

    The node is the embedding, or the `dequantize` behind embeddings of codes and scales with the same ids.
    """
    if node.op.name == "embedding":
        made, ids = _producer(node.operands[0]), node.operand(1)
        q = qtensor_of(node.operands[0])
        if q is None or made is None or made.op.name == "gather" or ids is None or len(q.shape) != 2:
            return None
        assert made.operands[0] is not None
        return Lookup(q, ids, made.operands[0])
    if node.op.name != "dequantize":
        return None
    if any(u.op.name == "dequantize" and u.operand(1) is node.result for u in node.result.users):
        return None  # scales of other codes
    first = _producer(node.operands[0])
    if first is None or first.op.name != "embedding" or first.operand(1) is None:
        return None
    codes, ids = first.operands[0], first.operands[1]
    if codes is None or codes.constant is None or codes.is_input or codes.rank != 2 or codes.dtype in WIDE_FLOATS:
        return None
    assert ids is not None
    block, axis = node.attributes.get("block"), node.attributes.get("axis")
    if (block is None and axis is not None) or (block is not None and axis not in (-1, ids.rank)):
        return None
    found = _constant_rows(node.operands[1], ids)
    zero = None if node.operand(2) is None else _constant_rows(node.operand(2), ids)
    factor: float | None = None
    levels = _producer(node.operands[1])
    if found is None and levels is not None and levels.op.name == "dequantize" and levels.operand(2) is None:
        outer = levels.operands[1]
        found = _constant_rows(levels.operands[0], ids)
        if outer is None or outer.constant is None or outer.rank != 0:
            return None
        factor = float(outer.constant.wide())
    if found is None or found.dtype is None or (zero is None and node.operand(2) is not None):
        return None
    assert found.constant is not None

    def vector(held: np.ndarray) -> np.ndarray:
        return held if block is not None else held.reshape(-1) if held.ndim else held.reshape(())

    scale = vector(found.constant.wide())
    whole = block is None and scale.ndim == 0
    q = QTensor(
        codes.constant.array(),
        str(codes.dtype),
        None if whole else 1 if block is not None else 0,
        None if block is None else int(block),  # type: ignore[arg-type]
        scale,
        found.dtype,
        None if zero is None or zero.constant is None else vector(zero.constant.array().astype(np.float64)),
        zero_is_float=zero is not None and zero.dtype in WIDE_FLOATS,
        global_scale=factor,
    )
    return Lookup(q, ids, codes)


def _producer(value: Value | None) -> Node | None:
    return value.producer if value is not None else None


def _constant_rows(value: Value | None, ids: Value) -> Value | None:
    """The constant whose rows a value is, by the same ids, or the scalar constant that it is; None: neither."""
    if value is None:
        return None
    made = value.producer
    if made is not None and made.op.name == "embedding" and made.operands[1] is ids:
        value = made.operands[0]
    elif value.rank != 0:
        return None
    return value if value is not None and value.constant is not None and not value.is_input else None


def stays(node: Node, look: Lookup) -> bool:
    """True for codes of 8 bits that are gathered as they are: standard operators already, of every engine."""
    return node.op.name == "dequantize" and look.table.element in ("i8", "u8") and look.table.block is None


def gathered_by_kernel(node: Node, rewriter: Rewriter, shared: Shared) -> bool:
    """Rewrite rows of a quantised table to com.microsoft::GatherBlockQuantized; False if it is none.

    Args:
        shared: the arrays of tables that a linear reads too.

    Raises:
        Declined: the kernel cannot hold the table.
    """
    look = lookup_of(node)
    if look is None:
        return False
    tied = _tied(look)
    if stays(node, look) and not tied:
        return False  # faster than the kernel: 0.09 against 0.14 ms for 1024 rows of 384
    q = float_scales(look.table)
    if tied and refusal(q, MATMUL) is None and q.shape[1] % (blocked(q).block or 1) == 0:
        q = blocked(q)
    why = refusal(q, NAME)
    if why is None and node.result.dtype != "f32":
        why = f"numbers that are read as {node.result.dtype}"
    if why is not None:
        raise Declined(f"its table has {why}: GatherBlockQuantized cannot hold it", node)
    packed = pack(q, NAME)
    op, attributes = contrib("GatherBlockQuantized")
    name = look.codes.name.removesuffix(".codes")
    found = _shared_arrays(look, q, node, rewriter, shared) if tied else None
    data, scale, zero = found or (
        array_operand(packed, "data", f"{name}.codes", node, rewriter),
        array_operand(packed, "scales", f"{name}.scale", node, rewriter),
        array_operand(packed, "zero_points", f"{name}.zero", node, rewriter),
    )
    operands = [data, look.ids, scale, zero]
    made = rewriter.insert(
        op, operands if operands[-1] is not None else operands[:-1], {**packed.attributes, **attributes},
        before=node, types=[node.result.type], names=[node.result.name], source=node.source,
    )  # fmt: skip
    rewriter.replace_node(node, made.result)
    return True


def _tied(look: Lookup) -> bool:
    """True if a linear reads the whole table too."""
    whole = [u for u in look.codes.users if u.op.name == "dequantize" and qtensor_of(u.result) is not None]
    return any(reader.op.name == "linear" for made in whole for reader in made.result.users)


def _shared_arrays(
    look: Lookup, q: QTensor, node: Node, rewriter: Rewriter, shared: Shared
) -> tuple[Value | None, Value | None, Value | None] | None:
    """Codes, scales and zero points of a table as MatMulNBits has them, for both kernels; None: other bytes."""
    if refusal(q, MATMUL) is not None or q.block is None or q.shape[1] % q.block:
        return None
    packed = pack(q, MATMUL)
    parts = {
        key: array_operand(packed, key, f"{look.codes.name}.{key}", node, rewriter)
        for key in ("B", "scales", "zero_points")
    }
    shared[look.codes] = parts
    data = packed.array("B")
    flat = rewriter.constant(Constant.of(np.array([len(data), -1], np.int64)), "dims")
    rows = rewriter.insert("reshape", [parts["B"], flat], before=node, source=node.source).result
    return rows, parts["scales"], parts["zero_points"]


def gathered(node: Node, rewriter: Rewriter) -> bool:
    """Rewrite rows of a quantised table to standard operators; False if it is none, or is so already.

    Raises:
        Declined: the table has clusters, or scales that are neither of rows nor of blocks along them.
    """
    look = lookup_of(node)
    if look is None or stays(node, look):
        return False
    q = look.table
    if q.clusters is not None or q.group_index is not None:
        raise Declined("its table has clusters, or blocks that are not consecutive", node)
    if q.axis is not None and q.axis != (0 if q.block is None else 1):
        raise Declined("its table has scales that are neither of rows nor of blocks along them", node)
    write = _Writer(node, look, rewriter)
    stored = _Stored.of(q)
    found = write("cast", [write.bytes_of(stored.packed)], to="i32")
    codes = write("gather", [write.constant(stored.numbers, write.dtype, "numbers"), found], axis=0)
    codes = write.shaped(codes, (stored.blocks, stored.block))
    if stored.zero is not None:
        codes = write("sub", [codes, write("unsqueeze", [write.rows(stored.zero, "f32", "zero")], axes=(-1,))])
    scale = write.rows(stored.scale, stored.scale_dtype, "scale")
    numbers = write("mul", [codes, write("unsqueeze", [scale], axes=(-1,))])
    flat = write.shaped(numbers, (stored.block * stored.blocks,))
    if stored.block * stored.blocks != q.shape[1]:
        ends = [write.constant(np.array([v], np.int64), "i64", "cut") for v in (0, q.shape[1], -1)]
        flat = write("slice", [flat, *ends])
    rewriter.retype(flat, node.result.type)
    rewriter.replace_node(node, flat)
    return True


@dataclass(frozen=True)
class _Stored:
    """A table in bytes: rows padded to whole blocks that are whole bytes together.

    Attributes:
        packed: uint8 [V, n].
        numbers: what the codes of a byte stand for, before zero points and scales, [256, codes in a byte].
        block, blocks: elements of a block, and blocks of a row.
        zero: [V, blocks]; None: 0.
        scale: [V, blocks], the factor of the whole table included.
    """

    packed: np.ndarray
    numbers: np.ndarray
    block: int
    blocks: int
    zero: np.ndarray | None
    scale: np.ndarray
    scale_dtype: str

    @staticmethod
    def of(q: QTensor) -> _Stored:
        rows, columns = q.shape
        width = next(w for w in (2, 4, 8) if w >= bits(q.element))
        per = 8 // width
        block = q.block or -(-columns // per) * per
        full = -(-columns // block)
        blocks = full
        while block * blocks % per:
            blocks += 1
        raw = np.ascontiguousarray(q.codes).view(np.uint8) if q.is_float else q.codes.astype(np.int64)
        codes = np.pad(raw.astype(np.int64), ((0, 0), (0, block * blocks - columns)))

        def spread(held: np.ndarray) -> np.ndarray:
            table = np.broadcast_to(held.reshape(-1, 1) if q.block is None else held, (rows, full))
            return np.pad(table, ((0, 0), (0, blocks - full)))

        factor = 1.0 if q.global_scale is None else q.global_scale
        narrow = q.scale_dtype in ("f16", "bf16") and q.global_scale is None
        return _Stored(
            pack_bytes(codes, width),
            _numbers(q.element, width)[unpack_bytes(np.arange(256)[:, None], width, per)],
            block,
            blocks,
            None if q.zero is None else spread(q.zero),
            spread(q.scale) * factor,
            q.scale_dtype if narrow else "f32",
        )


def _numbers(element: str, width: int) -> np.ndarray:
    """What each of the 2^width codes of an element stands for; codes that it has not: 0."""
    codes = np.arange(1 << width)
    if element.startswith("u"):
        return codes.astype(np.float64)
    if element.startswith("i"):
        half = 1 << (width - 1)
        return ((codes ^ half) - half).astype(np.float64)
    found = np.zeros(1 << width)
    with np.errstate(invalid="ignore"):
        own = np.arange(1 << bits(element), dtype=np.uint8).view(numpy_dtype(element)).astype(np.float64)
    found[: len(own)] = np.nan_to_num(own, posinf=0.0, neginf=0.0)
    return found


class _Writer:
    """Nodes in front of a look-up, in the dtype of its result."""

    def __init__(self, node: Node, look: Lookup, rewriter: Rewriter) -> None:
        self.node, self.rewriter, self.dtype = node, rewriter, str(node.result.dtype)
        self.ids, self.name = look.ids, look.codes.name.removesuffix(".codes")

    def __call__(self, op: str, operands: Sequence[Value | None], **attributes: Attribute) -> Value:
        made = self.rewriter.insert(op, operands, attributes, before=self.node, source=self.node.source)
        return made.result

    def constant(self, data: np.ndarray, kind: str, suffix: str) -> Value:
        return self.rewriter.constant(Constant(data, kind, data.shape), f"{self.name}.{suffix}")

    def bytes_of(self, table: np.ndarray) -> Value:
        return self("embedding", [self.constant(table, "u8", "codes"), self.ids])

    def rows(self, table: np.ndarray, kind: str, suffix: str) -> Value:
        """The rows of a constant table, in the dtype of the result."""
        found = self("embedding", [self.constant(table, kind, suffix), self.ids])
        return found if kind == self.dtype else self("cast", [found], to=self.dtype)

    def shaped(self, held: Value, last: tuple[int, ...]) -> Value:
        """The same elements with the leading dims of the ids, then these."""
        dims = [self("shape", [self.ids]), self.constant(np.array(last, np.int64), "i64", "dims")]
        return self("reshape", [held, self("concat", dims, axis=0)])
