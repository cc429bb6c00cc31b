"""Residual sums in front of a norm: x + linear is spelled x - (-linear).

The session's SkipLayerNormalization fusion, slower than its parts, looks for Add.
"""

from __future__ import annotations

from planish.codegen.onnx_emission import CONTRIB
from planish.codegen.ort_linears import source_of
from planish.ir.constant import Constant
from planish.ir.graph import Node, Value
from planish.ir.rewriter import Rewriter
from planish.ir.types import is_float

PRODUCTS = (f"{CONTRIB}::MatMulIntegerToFloat", f"{CONTRIB}::MatMulNBits")


def residual(norm: Node, rewriter: Rewriter) -> bool:
    """layer_norm(x + linear(..)) -> layer_norm(x - (-linear)(..)), the sign in codes and bias."""
    total = source_of(norm.operands[0])
    if total is None or total.op.name != "add" or len(total.result.users) != 1:
        return False
    for index in (1, 0):
        addend, other = total.operands[index], total.operands[1 - index]
        chain = _negatable(addend)
        if chain is None or other is None:
            continue
        for node in chain:
            for port in _signed_operands(node):
                value = _constant_of(node.operand(port))
                if value is None:
                    continue
                assert value.constant is not None
                array = value.constant.wide() if is_float(value.dtype) else value.constant.array()
                negative = rewriter.constant(Constant(-array, value.constant.dtype, array.shape), value.name)
                cast = source_of(node.operand(port))
                rewriter.set_operand(*((node, port) if cast is None else (cast, 0)), negative)
        made = rewriter.insert("sub", [other, addend], before=total, types=[total.result.type], source=total.source)
        rewriter.replace_node(total, made.result)
        return True
    return False


def _signed_operands(node: Node) -> tuple[int, ...]:
    """The operands that change sign when the result does."""
    if node.op.name == f"{CONTRIB}::MatMulNBits":
        return (2, 5)  # scales and bias
    if node.op.name == "add":
        return (1,)
    # the codes; their scales where the codes have a zero point, stand behind a cast, or one has no negative
    codes = node.operands[1]
    plain = node.operand(5) is None and codes is not None and codes.is_constant and codes.constant is not None
    return (1, 6) if plain and codes.constant.array().min(initial=0) > -128 else (3, 6)  # type: ignore[union-attr]


def _constant_of(value: Value | None) -> Value | None:
    """The constant that a value is, or is cast from for this reader alone; None: absent, or no such constant."""
    cast = source_of(value)
    if value is not None and cast is not None and cast.op.name == "cast" and len(value.users) == 1:
        value = cast.operands[0]
    return value if value is not None and value.is_constant else None


def _negatable(value: Value | None) -> list[Node] | None:
    """The nodes from quantised products to `value` whose constants can take a sign; None if there are none."""
    chain: list[Node] = []
    node = source_of(value)
    while node is not None and len(node.result.users) == 1:
        if node.op.name in PRODUCTS:
            held = [v for v in (node.operand(i) for i in _signed_operands(node)) if v is not None]
            return [*chain, node] if all(_constant_of(v) is not None for v in held) else None
        bias = node.operand(1)
        if node.op.name == "add" and bias is not None and not bias.is_constant:
            both = _negatable(node.operands[0]), _negatable(bias)  # a sum of two products
            return None if both[0] is None or both[1] is None else [*chain, *both[0], *both[1]]
        if node.op.name not in ("reshape", "mul", "add"):
            return None
        if node.op.name == "add":
            chain.append(node)
        node = source_of(node.operands[0])
    return None
