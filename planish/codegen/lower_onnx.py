"""Lowering to standard ONNX: a form in which onnxruntime's optimiser keeps the numbers.

At its default level onnxruntime turns DequantizeLinear (of 2, 4 or 8 bits) + MatMul into MatMulNBits with activations
that it rounds to int8: relative errors of 5e-3. It looks for the two side by side. So the codes of such a weight are
stored with a leading axis of 1, K-major, and a Squeeze stands between:

    y = x Squeeze(DequantizeLinear(codes [1, K, N], scale [1, K / block, N]))

Weights of 8 bits with one scale for each output, read with an activation that is quantised with one scale, keep the
plain pair: there the optimiser makes an integer product of the same numbers. It makes one of fp8 codes too, which no
kernel takes (the session does not load), so that those are set apart beside a dequantised activation. Where all sizes
are known it first draws a MatMul and the sum of a vector into a Gemm, and that into MatMulNBits: the bias of such a
pair is a matrix [1, N], which stays a sum.

Tables are gathered as bytes and unpacked (`planish.codegen.tables`).
"""

from __future__ import annotations

import dataclasses

from planish.codegen.ort_linears import source_of
from planish.codegen.tables import gathered
from planish.ir.constant import Constant
from planish.ir.graph import Graph, Node
from planish.ir.qnodes import insert_dequantize, qtensor_of, weight_of
from planish.ir.qtensor import QTensor
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.types import bits, is_float
from planish.passes.base import PassReport, place

PRODUCTS = ("linear", "gemm", "matmul")


def lower(graph: Graph, report: PassReport) -> None:
    """Rewrite in place; what is left as it was is written by the emission in standard operators too."""
    with Rewriter(graph) as rewriter:
        for node in list(graph.nodes):
            if node.graph is None or node.op.name not in (*PRODUCTS, "conv", "embedding", "dequantize"):
                continue
            try:
                if node.op.name == "conv":
                    done = set_kernel_apart(node, rewriter)
                else:
                    done = set_apart(node, rewriter) if node.op.name in PRODUCTS else gathered(node, rewriter)
            except Declined as refusal:
                report.decline(str(refusal), node)
                continue
            if done:
                report.applied.append(place(node))


def integer_pair(node: Node, q: QTensor) -> bool:
    """True for 8 bits on both sides, one scale for each output and one for the activation."""
    back = source_of(node.operands[0])
    if back is None or back.op.name != "dequantize" or back.operands[1] is None:
        return False
    codes = back.operands[0]
    plain = q.block is None and q.axis in (0, None) and q.zero is None and q.clusters is None
    whole = back.operands[1].rank == 0 and codes is not None and codes.dtype in ("u8", "i8")
    return plain and whole and bits(q.element) == 8 and not is_float(q.element)


def float_pair(node: Node, q: QTensor) -> bool:
    """True for float codes that DequantizeLinear reads, on either side, beside a dequantised activation."""
    back = source_of(node.operands[0])
    return back is not None and back.op.name in ("dequantize", "dequantize_split") and q.element != "f4e2m1"


def drawn_in(node: Node) -> bool:
    """True for a linear whose MatMul and Add become one Gemm: a bias, and rows of known sizes that are no matrix."""
    x = node.operands[0]
    known = x is not None and x.shape is not None and all(isinstance(d, int) for d in x.shape)
    return node.op.name == "linear" and node.operand(2) is not None and known and x is not None and x.rank != 2


def set_bias_apart(node: Node, rewriter: Rewriter) -> bool:
    """Add the bias as a matrix [1, N], which the optimiser does not draw into the product; False for a vector x."""
    x, bias = node.operands[0], node.operand(2)
    if x is None or bias is None or x.rank == 1:
        return False
    source = node.source
    product = rewriter.insert("linear", [x, node.operands[1]], node.attributes, before=node, source=source).result
    if bias.constant is None:
        matrix = rewriter.insert("unsqueeze", [bias], {"axes": (0,)}, before=node, source=source).result
    else:
        assert bias.dtype is not None
        row = Constant(bias.constant.wide().reshape(1, -1), bias.dtype, (1, *bias.constant.shape))
        matrix = rewriter.constant(row, bias.name)
    made = rewriter.insert("add", [product, matrix], before=node, names=[node.result.name], source=source)
    rewriter.replace_node(node, made.result)
    return True


def apart(q: QTensor) -> QTensor:
    """A matrix [N, K] as [1, K, N]."""
    turned = q.transposed()
    zero = turned.zero if turned.zero is None or q.block is None else turned.zero[None]
    return dataclasses.replace(
        turned,
        codes=turned.codes[None],
        axis=None if turned.axis is None else turned.axis + 1,
        scale=turned.scale if q.block is None else turned.scale[None],
        zero=zero,
    )


def set_kernel_apart(node: Node, rewriter: Rewriter) -> bool:
    """The same for a convolution of dequantised codes that are not integers of 8 bits on both sides."""
    q, weight, back = qtensor_of(node.operand(1)), node.operand(1), source_of(node.operands[0])
    if q is None or weight is None or back is None or back.op.name != "dequantize" or q.clusters is not None:
        return False
    codes = back.operands[0]
    if q.element in ("i8", "u8") and codes is not None and codes.dtype in ("i8", "u8"):
        return False
    lead = 0 if q.block is None else 1
    grown = dataclasses.replace(
        q,
        codes=q.codes[None],
        axis=None if q.axis is None else q.axis + 1,
        scale=q.scale[None] if lead else q.scale,
        zero=q.zero[None] if lead and q.zero is not None else q.zero,
    )
    name = weight.name.removesuffix(".dequantized")
    made = insert_dequantize(rewriter, grown, name, before=node, source=node.source, dtype=str(weight.dtype))
    kernel = rewriter.insert("squeeze", [made], {"axes": (0,)}, before=node, source=node.source).result
    rewriter.set_operand(node, 1, kernel)
    return True


def set_apart(node: Node, rewriter: Rewriter) -> bool:
    """Put a Squeeze between a product and its dequantised weight; False if there is none, or it may stay."""
    q, weight = weight_of(node), node.operands[1]
    if q is None or weight is None or q.clusters is not None:
        return False
    if integer_pair(node, q) and not drawn_in(node):
        return False
    if integer_pair(node, q) and set_bias_apart(node, rewriter):
        return True
    if is_float(q.element) and not float_pair(node, q):
        return False
    if q.group_index is not None or q.codes.ndim != 2:
        return False
    name = weight.name.removesuffix(".dequantized")
    made = insert_dequantize(rewriter, apart(q), name, before=node, source=node.source, dtype=str(weight.dtype))
    matrix = rewriter.insert("squeeze", [made], {"axes": (0,)}, before=node, source=node.source).result
    rewriter.set_operand(node, 1, matrix)
    if node.op.name != "matmul":
        turned = {"transposed": True} if node.op.name == "linear" else {"trans_b": False}
        rewriter.set_attributes(node, {**node.attributes, **turned})
    return True
