"""The bytes of a graph's constants by what they are for."""

from __future__ import annotations

from dataclasses import dataclass

from planish.ir.graph import Graph, Node, Value
from planish.ir.types import bits

KINDS = ("weights", "scales", "embeddings", "other")
TABLES = {"embedding": range(1), "gather": range(1), "GatherBlockQuantized": (0, 2, 3)}
MULTIPLY = frozenset({"linear", "gemm", "matmul", "conv", "conv_transpose", "grouped_matmul", "einsum"})
LAYOUT = frozenset({"transpose", "reshape", "cast", "squeeze", "unsqueeze", "neg"})
# the operands of an op on codes that are scales, zero points or block indices
SCALES = {
    "dequantize": range(1, 3),
    "quantize": range(1, 3),
    "dequantize_split": range(2, 4),
    "DequantizeLinear": range(1, 3),
    "QuantizeLinear": range(1, 3),
    "MatMulNBits": range(2, 5),
    "MatMulIntegerToFloat": range(2, 6),
}


@dataclass(frozen=True)
class Sizes:
    """Bytes as the file holds them: elements below 8 bits are packed.

    Attributes:
        weights: of linears and convolutions: floats or codes, and cluster numbers.
        scales: scales and zero points.
        embeddings: tables that rows are looked up in, tied heads and scales of rows included.
        other: biases, gains, and whatever else is constant.
        elements: of the weights, as they are held: a target that packs two into a byte counts bytes.
    """

    weights: int = 0
    scales: int = 0
    embeddings: int = 0
    other: int = 0
    elements: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.scales + self.embeddings + self.other

    def as_dict(self) -> dict[str, int]:
        """Plain data for JSON."""
        return {kind: getattr(self, kind) for kind in (*KINDS, "elements", "total")}


def sizes(graph: Graph) -> Sizes:
    """The sizes of the constants that some node reads or the graph returns."""
    found = dict.fromkeys((*KINDS, "elements"), 0)
    returned = set(graph.output_values())
    for value in graph.constants:
        if value.constant is None or not (value.users or value in returned):
            continue
        kind = _kind(value)
        found[kind] += value.constant.nbytes
        if kind == "weights":
            found["elements"] += value.constant.size
    return Sizes(**found)


def _name(node: Node) -> str:
    return node.op.name.rpartition("::")[2]


def _kind(value: Value) -> str:
    seen = {_read(value, node, port) for node in value.users for port, v in enumerate(node.operands) if v is value}
    for kind in ("embeddings", "scales", "weights"):
        if kind in seen:
            return kind
    return "weights" if (value.rank or 0) > 1 and _codes(value.dtype) else "other"


def _read(value: Value, node: Node, port: int) -> str:
    """What a constant is to one of its readers; empty: nothing that tells."""
    name = _name(node)
    if port in SCALES.get(name, ()):
        return "scales"
    if port in TABLES.get(name, ()) and value.rank == 2:
        return "embeddings"
    if name in MULTIPLY and value.rank != 1 and port < 2:
        return "weights"
    if name in LAYOUT and port == 0:
        return _result(node)
    if name in ("dequantize", "dequantize_split", "DequantizeLinear") and port == 0:
        return _result(node) or "weights"
    return ""


def _result(node: Node) -> str:
    """What the result of a node is to its readers."""
    readers = [(u, p) for u in node.result.users for p, v in enumerate(u.operands) if v is node.result]
    found = {_read(node.result, u, p) for u, p in readers}
    return next((kind for kind in ("embeddings", "scales", "weights") if kind in found), "")


def _codes(dtype: str | None) -> bool:
    """True for the dtypes of quantised weights."""
    return dtype is not None and dtype != "bool" and 0 < bits(dtype) <= 8
