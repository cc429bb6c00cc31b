"""What one emitted kernel computes: a small typed program that `select` cuts out of a graph and `triton` writes.

    prologue  rows [M, K] of one value: norm, affine, gather, Hadamard, low-rank down, quantise. A program owns whole
              rows.
    gemm      Y [M, N] = A [M, K] W^T of one or more linears that read one activation; the accumulators run through the
              epilogue's steps; `closing` steps need whole rows and are run by the tile that finishes a block of rows.

A spec holds no weights: equal specs are equal kernels. What fills its border tensors is bound by `select.Region`.
All names are Python identifiers, unique within a kernel, and depend on nothing but the order of the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Option = int | float | str | bool
Size = int | Literal["M"]

SPAN = 64  # codes of a row that lie together: rows are padded to a multiple, and packed bytes hold codes of one span


def padded(columns: int) -> int:
    """The columns of a row of codes as it is stored: rounded up to a multiple of `SPAN`."""
    return -(-columns // SPAN) * SPAN


def half_of(bits: int) -> int:
    """The codes in a plane of a span: code k of a span lies in byte k % half, plane k // half."""
    return SPAN * bits // 8


@dataclass(frozen=True)
class Tensor:
    """A tensor at the border of a kernel.

    Attributes:
        name: its parameter in the kernel is called `name`_ptr.
        dtype: an IR dtype as it lies in memory (i8 u8 i32 f32 ...), or "float": the kernel's own float dtype.
        shape: row-major; "M" counts the rows of the activation, all leading axes flattened.
        role: "input" (computed), "weight" (bound once), "output", or "scratch" (written and read again).
        packed: codes per element (2: two 4-bit codes a byte), in the order of docs/kernels.md.
    """

    name: str
    dtype: str
    shape: tuple[Size, ...]
    role: Literal["input", "weight", "output", "scratch"]
    packed: int = 1


@dataclass(frozen=True)
class Step:
    """One row of `planish.kernels.table` applied to values of the kernel.

    Attributes:
        row: the row's name: "rms_norm", "affine", "hadamard", "gelu", "mul", "quantize_token" ...
        reads: names of locals or of border tensors, in the row's order; "" where an optional one is absent.
        writes: names of the locals that it makes; a local that is a result is stored to the tensor of that name.
        options: in the row's order.
        source: the IR node it stands for, as printed: for the docstring.
    """

    row: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    options: tuple[tuple[str, Option], ...] = ()
    source: str = ""

    def option(self, name: str) -> Option:
        """An option by name.

        Raises:
            KeyError: the step has none of that name.
        """
        return dict(self.options)[name]


@dataclass(frozen=True)
class Activation:
    """What a GEMM reads on its left.

    Attributes:
        kind: "float" (x itself) or "codes".
        bits: 8 or 4 of codes; 4-bit codes lie two a byte. Codes are signed: u8 codes of the graph less 128.
        granularity: of the scales, float32: "tensor", "token" or "group" along K.
        group: columns per scale for "group", else 0.
        codes, scale, zero: names of the border tensors; `zero` is i8 (u8 of the graph less 128) or "".
        signed: False for 4-bit codes from 0 to 15 without a zero point: of what cannot be negative.
    """

    kind: Literal["float", "codes"]
    codes: str
    bits: int = 16
    granularity: Literal["", "tensor", "token", "group"] = ""
    group: int = 0
    scale: str = ""
    zero: str = ""
    signed: bool = True


@dataclass(frozen=True)
class Weight:
    """A weight [N, K] in planish's Triton layout (container "triton").

    Attributes:
        decoder: the row of `planish.kernels.table` that decodes it: "int8", "int4", "int2", "split2", "float".
        group: columns per scale; 0: one scale per row of the weight.
        half: columns per plane of a packed byte: code k of a span of planes * half lies in byte k % half, plane
            k // half.
        codes, ids, scale, zero, sums: names of border tensors, "" where there is none. `scale` is [N] or
            [K / group, N]; `sums` f32 [N]: sum over k of the decoded weight times its scale, for activations with a
            zero point.
        clusters: of a split tensor; scale and zero then have a leading axis of clusters.
    """

    decoder: str
    codes: str
    scale: str = ""
    zero: str = ""
    ids: str = ""
    sums: str = ""
    group: int = 0
    half: int = 0
    clusters: int = 0


@dataclass(frozen=True)
class Branch:
    """A float branch of a linear: left [M, rank] @ right [N, rank]^T (low-rank up, static outlier columns)."""

    left: str
    right: str
    rank: int


@dataclass(frozen=True)
class Product:
    """One linear of a GEMM: activation x weight, branches, bias; its float32 [M, N] result is the local `result`."""

    weight: Weight
    result: str
    branches: tuple[Branch, ...] = ()
    bias: str = ""
    source: str = ""


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        columns: K, the width of the rows that it reads.
        outputs: N, the width of a gemm's result; 0 for a prologue.
        tensors: the border, in the order of the launcher's arguments.
        steps: of a prologue: its row program; of a gemm: the epilogue, on a tile, in order.
        closing: of a gemm: steps on whole rows of the result, run by the last tile of a block of rows.
        row: of a prologue: the border tensor whose rows are loaded, also the first local.
    """

    kind: Literal["prologue", "gemm"]
    columns: int
    outputs: int
    tensors: tuple[Tensor, ...]
    steps: tuple[Step, ...] = ()
    closing: tuple[Step, ...] = ()
    row: str = ""
    activation: Activation | None = None
    products: tuple[Product, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict, compare=False, hash=False)  # local -> value of the graph

    def tensor(self, name: str) -> Tensor:
        """A border tensor by name.

        Raises:
            KeyError: there is none.
        """
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)
