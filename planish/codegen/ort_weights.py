"""Linears whose weight alone is quantised, or in blocks: com.microsoft::MatMulNBits.

`accuracy_level` says in what the kernel multiplies: 0 in float, 4 with activations that it rounds to int8 itself,
one scale for each block of a row (relative error 5e-3 at 4 and 8 bits, 9e-3 at 2). By default it follows the graph:
4 where the graph rounds the activation to 8 bits at run time, whose rounding then goes (a block of a row is finer
than a row); else 0, and an activation of any other format is rounded by the graph, in standard operators.
"""

from __future__ import annotations

from dataclasses import replace

from planish.codegen.containers import Packed, pack, refusal
from planish.codegen.containers.matmul_nbits import NAME, kernel_refuses
from planish.codegen.ort_linears import contrib, source_of
from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.qnodes import weight_of
from planish.ir.qtensor import QTensor
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.types import bits, from_numpy_dtype

FAST_LEVEL = 4
Shared = dict[Value, dict[str, Value | None]]  # by the codes of a table: its arrays in the graph


def rounded_to_8_bits(x: Value | None) -> Value | None:
    """What a value was before the graph rounded it to 8 bits at run time; None if it did not."""
    back = source_of(x)
    if back is None or back.op.name != "dequantize":
        return None
    made = source_of(back.operands[0])
    if made is None or made.op.name != "dynamic_quantize" or back.operands[0] is not made.results[0]:
        return None
    if made.attributes.get("dtype", "u8") not in ("u8", "i8") or made.attributes.get("scale") is not None:
        return None
    return made.operands[0]


def float_scales(q: QTensor) -> QTensor:
    """The tensor with scales that the kernels take: f16 stays, everything else is f32."""
    return q if q.scale_dtype == "f16" else replace(q, scale_dtype="f32")


def widened(value: Value, before: Node, rewriter: Rewriter) -> Value:
    """Scales in f32: those in f16 behind a cast, which the session folds when it loads the model."""
    if value.dtype != "f16":
        return value
    return rewriter.insert("cast", [value], {"to": "f32"}, before=before, source=before.source).result


def array_operand(packed: Packed, key: str, name: str, before: Node, rewriter: Rewriter) -> Value | None:
    """An array of a container as a constant; None if it has none of that name."""
    array = packed.arrays.get(key)
    if array is None:
        return None
    held = rewriter.constant(Constant(array, from_numpy_dtype(array.dtype), array.shape), name)
    return widened(held, before, rewriter)


def block_linear(node: Node, rewriter: Rewriter, level: int | None, shared: Shared) -> bool:
    """Rewrite a linear with a quantised weight that the integer product did not take; False if it has none.

    Args:
        level: the accuracy level; None: what the activation says.
        shared: the arrays of tables that an embedding reads too.

    Raises:
        Declined: the kernel cannot hold the weight.
    """
    q, x = weight_of(node), node.operands[0]
    if q is None or x is None:
        return False
    raw = rounded_to_8_bits(x)
    quantised = source_of(x) is not None and x.producer is not None and x.producer.op.name == "dequantize"
    if bits(q.element) == 8 and q.block is None and quantised:
        return False  # for the integer product, which said why it does not take it
    if x.dtype != "f32" or node.result.dtype != "f32":
        raise Declined(f"it computes in {x.dtype}: MatMulNBits is for f32", node)
    q = float_scales(q)
    if q.group_index is not None and q.zero is not None:
        q = replace(q, zero_is_float=True)  # the only zero points with which the kernel gets the groups right
    why = refusal(q, NAME) or kernel_refuses(q)
    if why is not None:
        raise Declined(f"its weight has {why}: MatMulNBits cannot hold it", node)
    if level is None:
        level = FAST_LEVEL if raw is not None else 0
    if level == FAST_LEVEL and raw is not None:
        x = raw
    packed = pack(q, NAME)
    op, attributes = contrib("MatMulNBits")
    name = node.result.name
    parts = _shared(node, shared)
    if parts is None:
        keys = {"B": "codes", "scales": "scale", "zero_points": "zero", "g_idx": "index"}
        parts = {k: array_operand(packed, k, f"{name}.{suffix}", node, rewriter) for k, suffix in keys.items()}
    if level == FAST_LEVEL:
        parts = {**parts, "scales": _constant_scales(parts["scales"], f"{name}.scale", rewriter)}
    arrays = [parts.get(key) for key in ("B", "scales", "zero_points", "g_idx")]
    operands = [x, *arrays, _bias(node, rewriter)]
    while operands[-1] is None:
        operands.pop()
    made = rewriter.insert(
        op, operands, {**packed.attributes, "accuracy_level": level, **attributes}, before=node,
        types=[node.result.type], names=[name], source=node.source,
    )  # fmt: skip
    rewriter.replace_node(node, made.result)
    return True


def _constant_scales(scales: Value | None, name: str, rewriter: Rewriter) -> Value | None:
    """Scales in f32 without a cast: at level 4 the kernel is wrong (no error) where no optimiser folded it."""
    narrow = scales.producer.operands[0] if scales is not None and scales.producer is not None else None
    if narrow is None or narrow.constant is None:
        return scales
    return rewriter.constant(Constant(narrow.constant.wide(), "f32", narrow.constant.shape), name)


def slow_level(node: Node) -> bool:
    """True for a MatMulNBits whose kernel is slow: 20 to 30 times a float product of one row of 1536; 4 bits: once."""
    own = node.attributes
    return (
        node.op.name == contrib("MatMulNBits")[0] and own.get("accuracy_level") != FAST_LEVEL and own.get("bits") != 4
    )


def _shared(node: Node, shared: Shared) -> dict[str, Value | None] | None:
    """The arrays that an embedding of the same table has already; None if there are none."""
    made = source_of(node.operands[1])
    if made is None or made.op.name != "dequantize" or node.attributes.get("transposed", False):
        return None
    codes = made.operands[0]
    return shared.get(codes) if codes is not None else None


def _bias(node: Node, rewriter: Rewriter) -> Value | None:
    """The bias as a vector of the outputs."""
    bias = node.operand(2)
    if bias is None or bias.rank == 1:
        return bias
    if bias.constant is None or not bias.is_constant or bias.constant.size != node.result.shape[-1]:  # type: ignore[index]
        raise Declined("its bias is no vector", node)
    flat = bias.constant.wide().reshape(-1)
    return rewriter.constant(Constant(flat, str(bias.dtype), flat.shape), bias.name)
