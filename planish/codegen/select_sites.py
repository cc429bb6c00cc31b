"""What the selection finds in a graph: quantised linears, what they read on their left, rows of ops that fuse.

Everything is told from the op, its attributes and the types of what it reads; a refusal says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planish.codegen.containers.triton import ELEMENTS, MOST_CLUSTERS, SCALES
from planish.codegen.gemm_plan import LEAST
from planish.codegen.kernel_spec import Option
from planish.codegen.row_weights import LARGEST_BASE, hadamard_base
from planish.codegen.row_writer import LARGEST, PART
from planish.ir.graph import Node, Value
from planish.ir.ops.rotation import block_size
from planish.ir.qnodes import by_columns as by_columns_of
from planish.ir.qnodes import qtensor_of
from planish.ir.qtensor import QTensor
from planish.ir.types import WIDE_FLOATS, bits
from planish.kernels.decoders import DECODERS
from planish.kernels.table import ROWS
from planish.passes.bounds import lower_bound

# elementwise steps of the kernels' table, by the names of the IR's rows
_ELEMENTWISE = {name: row for name, row in ROWS.items() if row.text}
# rows of the IR with two operands; of `pow` squares alone
BINARY = frozenset(name for name, row in _ELEMENTWISE.items() if "{1}" in row.text) | {"pow"}
UNARY = frozenset(_ELEMENTWISE) - BINARY
NORMS = frozenset({"rms_norm", "layer_norm"})
ROW_LIMIT = 65536  # columns of a row of which one program takes care
RANK_LIMIT = 512  # columns of a float branch
# integers that the kernels' layout holds and a decoder of theirs reads
_ELEMENTS = {sign + str(row.bits) for row in DECODERS.values() for sign in "iu"} & {*ELEMENTS}
VIEWS = frozenset({"reshape", "squeeze", "unsqueeze", "identity"})
LEAST_GROUP = LEAST[False]  # columns that share a scale: a multiple for weights, powers of two for activations


def attribute(node: Node, name: str) -> object:
    """An attribute, or its default."""
    return node.attributes.get(name, node.op.attributes.get(name))


def width(value: Value | None) -> int | None:
    """The size of the last axis of a float tensor; None: it is no float, a scalar, or dynamic there."""
    if value is None or value.dtype not in WIDE_FLOATS or not value.shape:
        return None
    last = value.shape[-1]
    return last if isinstance(last, int) and last > 0 else None


def vector(value: Value | None, columns: int) -> tuple[int, ...] | None:
    """The shape in which a kernel reads a constant beside rows: (columns,) or (); None: it has another shape."""
    if value is None or not value.is_constant or value.shape is None or value.dtype not in WIDE_FLOATS:
        return None
    if all(d == 1 for d in value.shape):
        return ()
    return (columns,) if value.shape[-1] == columns and all(d == 1 for d in value.shape[:-1]) else None


# -- weights and activations ------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightKind:
    """The weight of a linear, as its types tell: see `planish.codegen.kernel_spec.Weight`.

    Attributes:
        scale: the dtype of its scales.
    """

    bits: int
    group: int
    clusters: int
    zero: Literal["", "integer", "float"]
    scale: str = "f32"

    @property
    def decoder(self) -> str:
        """The row of the kernels' table that decodes it."""
        return f"split{self.clusters}" if self.clusters else f"int{self.bits}"


@dataclass(frozen=True, eq=False)
class Left:
    """What a linear reads on its left: codes with scales, or a float.

    Attributes:
        value: the float that is read, or the codes.
        scale, zero: of codes; `zero` None where kernels need none.
        bits, signed, shift: of codes: stored are those of the graph less `shift`.
        decoder: the `dequantize` node.
    """

    value: Value
    scale: Value | None = None
    zero: Value | None = None
    bits: int = 16
    granularity: Literal["", "tensor", "token", "group"] = ""
    group: int = 0
    signed: bool = True
    shift: int = 0
    decoder: Node | None = None

    @property
    def is_codes(self) -> bool:
        """True for codes."""
        return self.decoder is not None


def linear_shape(node: Node) -> tuple[int, int] | str:
    """Columns and outputs of a linear on rows; else why it is none."""
    x, weight = node.operand(0), node.operand(1)
    if node.op.name == "gemm" and (
        attribute(node, "alpha") != 1.0 or attribute(node, "beta") != 1.0 or attribute(node, "trans_a")
    ):
        return "it scales or transposes what it reads"
    if weight is None or weight.rank != 2:
        return "its weight is no matrix"
    columns, outputs = width(x), width(node.result)
    if columns is None or outputs is None:
        return "its width is not static"
    return columns, outputs


def weight_kind(node: Node) -> WeightKind | str | None:
    """The kind of a linear's weight; why kernels do not decode it; None: it is not quantised."""
    held, by_columns = weight_value(node)
    made = held.producer if held is not None else None
    if made is None:
        return None
    if made.op.name == "gather" and _is_decoder(made.operand(0)):
        return "its groups are not consecutive columns"
    if not _is_decoder(held):
        return f"its weight is decoded before a {made.op.name}" if fixed(held) and decoders(held, True) else None
    split = made.op.name == "dequantize_split"
    codes, scale, zero = (made.operand(i) for i in ((0, 2, 3) if split else (0, 1, 2)))
    assert codes is not None and codes.dtype is not None
    if codes.dtype in WIDE_FLOATS:
        return None
    if codes.dtype not in _ELEMENTS:
        return f"no decoder for a weight of {codes.dtype}"
    if scale is None or not scale.is_constant or scale.shape is None:
        return "its weight has scales of two levels, or computed ones"
    if scale.dtype is None or scale.dtype not in SCALES:
        return f"its weight has scales of {scale.dtype}"
    rows_axis = 1 if by_columns else 0
    lead, axis, block = int(split), attribute(made, "axis"), attribute(made, "block")
    group = 0
    if block is not None:
        if axis not in (1 - rows_axis, -1 - rows_axis):
            return "its weight has groups along its outputs"
        group = int(str(block))
        if group < 1 or group % LEAST_GROUP:
            return f"its weight has groups of {group} columns; kernels have multiples of {LEAST_GROUP}"
    elif axis is not None and axis not in (rows_axis, rows_axis - 2):
        return "its weight has a scale for each column"
    elif axis is None and any(d != 1 for d in scale.shape[lead:]):
        return "its weight has scales that broadcast"
    clusters = 0
    if split:
        if attribute(made, "index") is not None:
            return "its weight is one cluster of several"
        clusters = int(str(scale.shape[0]))
        if not 2 <= clusters <= MOST_CLUSTERS:
            return f"no decoder for {clusters} clusters"
    unsigned = codes.dtype.startswith("u")
    kind: Literal["", "integer", "float"] = "integer" if zero is not None or unsigned else ""
    if zero is not None and zero.dtype in WIDE_FLOATS:
        kind = "float"
    return WeightKind(bits(codes.dtype), group, clusters, kind, scale.dtype)


def weight_value(node: Node) -> tuple[Value | None, bool]:
    """The decoded weight of a linear, gemm or matmul, and whether it lies as [inputs, outputs]."""
    held, by_columns = node.operand(1), by_columns_of(node)
    made = held.producer if held is not None else None
    if made is not None and made.op.name == "transpose" and held is not None and held.rank == 2:
        if attribute(made, "perm") in (None, (1, 0), [1, 0]):
            return made.operand(0), not by_columns
    return held, by_columns


def weight_tensor(node: Node) -> QTensor:
    """The quantised weight [outputs, inputs] of a linear that has a `weight_kind`."""
    held, by_columns = weight_value(node)
    found = qtensor_of(held)
    assert found is not None
    return found.transposed() if by_columns else found


def _is_decoder(value: Value | None) -> bool:
    """True for the numbers of a quantised constant."""
    made = value.producer if value is not None else None
    if made is None or made.op.name not in ("dequantize", "dequantize_split"):
        return False
    return all(v is None or v.is_constant or _is_decoder(v) for v in made.operands)


def fixed(value: Value | None) -> bool:
    """True for a constant, for what nodes make of constants alone, and for an operand that is left out."""
    if value is None or value.is_constant:
        return True
    return value.producer is not None and all(fixed(v) for v in value.producer.operands)


def decoders(value: Value | None, alone: bool = False) -> list[Node]:
    """The nodes that make the numbers of a quantised constant; `alone`: only those that decode."""
    made = value.producer if value is not None else None
    if made is None:
        return []
    found = [node for v in made.operands if v is not None and v.producer for node in decoders(v, alone)]
    return [*found, made] if not alone or made.op.name in ("dequantize", "dequantize_split") else found


def left_of(node: Node) -> Left | str:
    """What a linear reads on its left; why kernels cannot read it."""
    x = node.operand(0)
    assert x is not None
    made = x.producer
    if made is None or made.op.name != "dequantize" or _is_decoder(x):
        return Left(x)
    codes, scale, zero = (made.operand(i) for i in range(3))
    quantiser = codes.producer if codes is not None else None
    if codes is None or scale is None or quantiser is None or quantiser.op.name not in QUANTISERS:
        return "its activation is not quantised by rows"
    found = quantised(quantiser)
    if isinstance(found, str):
        return found
    if not (scale is found.scale or scale is quantiser.operand(1)) or zero not in (None, _zero(quantiser)):
        return "its activation has other scales than it was quantised with"
    return Left(codes, scale, found.zero, found.bits, found.granularity, found.group, found.signed, found.shift, made)


QUANTISERS = frozenset({"quantize", "dynamic_quantize"})


def _zero(node: Node) -> Value | None:
    return node.operand(2) if node.op.name == "quantize" else node.results[2]


@dataclass(frozen=True)
class Quantised:
    """What a quantiser makes, as kernels hold it.

    Attributes:
        options: of the step: see `quantize_static`, `quantize_token`, `quantize_group` of the kernels' table.
        zero: None where the stored codes need none.
    """

    granularity: Literal["tensor", "token", "group"]
    bits: int
    signed: bool
    shift: int
    group: int
    scale: Value
    zero: Value | None
    options: tuple[tuple[str, Option], ...]


def quantised(node: Node) -> Quantised | str:
    """What a `quantize` or `dynamic_quantize` of an activation makes; why kernels cannot make or read it."""
    dtype = str(attribute(node, "dtype"))
    if dtype not in ("u8", "i8", "u4", "i4"):
        return f"activations of {dtype}: no kernel"
    size, unsigned = bits(dtype), dtype.startswith("u")
    half = 1 << (size - 1)
    if node.op.name == "quantize":
        return _static(node, size, unsigned, half)
    granularity = str(attribute(node, "granularity"))
    if attribute(node, "scale") is not None or node.operand(1) is not None:
        return f"activations with scales of {attribute(node, 'scale')}: no kernel"
    rule = attribute(node, "rule") or "max"
    if rule not in ("max", "half"):
        return f"activations with the scale rule '{rule}': no kernel"
    if width(node.operand(0)) is None:
        return "its width is not static"
    symmetric, floor = bool(attribute(node, "symmetric")), attribute(node, "floor")
    group = int(str(attribute(node, "block"))) if granularity == "group" else 0
    if granularity == "group" and (group < LEAST_GROUP or group & (group - 1)):
        return f"activations in groups of {group} columns; kernels have powers of two from {LEAST_GROUP} on"
    bound = lower_bound(node.operand(0))
    natural = unsigned and size < 8 and not symmetric and floor is None and bound is not None and bound >= 0.0
    if granularity == "group" and not symmetric and not natural:
        return "activations with a zero point for each group: no kernel"
    mode = "floor" if isinstance(floor, float) else "symmetric" if symmetric or natural else "range"
    shift = half if unsigned and not natural else 0
    levels = float((1 << size) - 1 if natural or mode != "symmetric" else half - 1) + (0.5 if rule == "half" else 0.0)
    options: list[tuple[str, Option]] = [
        ("bits", size), ("signed", not natural), ("mode", mode), ("levels", levels),
        ("low", 0 if natural else -half), ("high", (1 << size) - 1 if natural else half - 1),
    ]  # fmt: skip
    if mode == "floor":
        options.append(("floor", float(str(floor))))
    if granularity == "group":
        options.append(("group", group))
    zero = node.results[2] if mode in ("floor", "range") else None
    kind: Literal["tensor", "token", "group"] = granularity  # type: ignore[assignment]
    return Quantised(kind, size, not natural, shift, group, node.results[1], zero, tuple(options))


def _static(node: Node, size: int, unsigned: bool, half: int) -> Quantised | str:
    scale, zero = node.operand(1), node.operand(2)
    if scale is None or not scale.is_constant or scale.rank != 0 or (zero is not None and zero.rank != 0):
        return "its activation is not quantised with one calibrated scale"
    if zero is not None and (zero.constant is None or zero.dtype in WIDE_FLOATS):
        return "its activation has a computed zero point, or a float"
    point = 0 if zero is None or zero.constant is None else int(zero.constant.array())
    natural = unsigned and size < 8 and point == 0
    shift = half if unsigned and not natural else 0
    options: tuple[tuple[str, Option], ...] = (
        ("bits", size), ("signed", not natural),
        ("low", 0 if natural else -half), ("high", (1 << size) - 1 if natural else half - 1),
    )  # fmt: skip
    needed = zero if point != shift else None
    if zero is None and shift:
        return "its activation has unsigned codes without a zero point"
    return Quantised("tensor", size, not natural, shift, 0, scale, needed, options)


# -- rows of ops that fuse --------------------------------------------------------------------------


def refuses_elementwise(node: Node) -> str | None:
    """Why a node is no elementwise step on rows; None: it is one."""
    if node.op.name in UNARY:
        return None if width(node.result) is not None and width(node.operand(0)) is not None else "no float rows"
    if node.op.name == "pow":
        exponent = node.operand(1)
        if exponent is None or exponent.constant is None or exponent.constant.size != 1 or width(node.result) is None:
            return "it is no power of float rows with a constant exponent"
        return None if float(exponent.constant.wide().item()) == 2.0 else "powers other than squares are no step"
    if node.op.name not in BINARY or len(node.operands) != 2:
        return f"{node.op.name} is no elementwise step of the kernels"
    columns = width(node.result)
    if columns is None:
        return "no float rows"
    for operand in node.operands:
        if operand is None or operand.dtype not in WIDE_FLOATS:
            return "an operand is no float"
        if operand.is_constant:
            if vector(operand, columns) is None:
                return "a constant operand is no scalar and no vector along the columns"
        elif operand.shape != node.result.shape or None in (operand.shape or (None,)):
            return "an operand is broadcast"
    return None


def is_view(node: Node) -> bool:
    """True for a node that changes the leading axes of rows at most: the same rows in the same order."""
    x = node.operand(0)
    columns = width(x)
    if node.op.name not in VIEWS or columns is None or columns < 2 or x is None or x.is_constant:
        return False
    return width(node.result) == columns and node.result.dtype == x.dtype


def refuses_rows(node: Node) -> str | None:
    """Why a node is no step of a row program; None: it is one."""
    x = node.operand(0)
    name, columns = node.op.name, width(x)
    if name in UNARY or name in BINARY:
        refusal = refuses_elementwise(node)
        if refusal is not None:
            return refusal
        return _too_wide(width(node.result))
    if x is None or columns is None or x.rank is None or x.is_constant:
        return f"{name} is no step on float rows"
    last = (x.rank - 1, -1)
    match name:
        case "rms_norm" | "layer_norm":
            if attribute(node, "axis") not in last:
                return "it normalises over several axes"
            for operand in node.operands[1:]:
                if operand is not None and vector(operand, columns) is None:
                    return "its gain or bias is no constant vector"
        case "hadamard":
            size = block_size(node)
            if attribute(node, "axis") not in last or size is None:
                return "it rotates another axis"
            if hadamard_base(size) > LARGEST_BASE:
                return f"no kernel for a dense factor of {hadamard_base(size)} in blocks of {size} columns"
            if columns > LARGEST and (hadamard_base(size) > 1 or PART % size):
                return f"rows of {columns} columns are read in parts, which blocks of {size} do not divide"
        case "gather":
            index = node.operand(1)
            if index is None or not index.is_constant or index.rank != 1 or attribute(node, "axis") not in last:
                return "it gathers no constant list of columns"
        case "reassemble":
            held = node.operands[1:]
            if attribute(node, "axis") not in last or any(v is None or not v.is_constant for v in held):
                return "it reassembles no constant lists of columns"
        case "quantize" | "dynamic_quantize":
            found = quantised(node)
            if isinstance(found, str):
                return found
            if name == "dynamic_quantize" and found.granularity == "tensor":
                return "its range is that of the whole tensor: no program sees all of it"
        case _:
            return f"{name} is no step of a row program"
    return _too_wide(columns)


def _too_wide(columns: int | None) -> str | None:
    if columns is not None and columns > ROW_LIMIT:
        return f"rows of {columns} columns; a program takes {ROW_LIMIT}"
    return None


def narrow_linear(node: Node | None) -> int | str:
    """The rank of the float linear that makes, or reads, the left of a branch; else why it is none."""
    if node is None or node.op.name != "linear":
        return "no linear"
    x, weight = node.operand(0), node.operand(1)
    if weight is None or not weight.is_constant or weight.dtype not in WIDE_FLOATS or node.operand(2) is not None:
        return "its weight is no float constant, or it has a bias"
    columns, outputs = width(x), width(node.result)
    if columns is None or outputs is None:
        return "its width is not static"
    return min(columns, outputs)
