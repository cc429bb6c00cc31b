"""Lowering for ONNX Runtime on the CPU.

What its kernels reward, measured (docs/targets.md):

- quantised linears as MatMulIntegerToFloat, uint8 activations times int8 weights (any other pairing is
  slow), the bias inside, one DynamicQuantizeLinear shared by all readers of a value;
- weights of 2, 4 or 8 bits in blocks, or with float activations, as MatMulNBits;
- 4-bit tables as GatherBlockQuantized;
- per-row activations: QuantizeLinear with a run-time scale vector along axis 0 of the flattened
  tensor, the row scale multiplied back behind the product, and a bias of shape [1, N]: a
  one-dimensional one would be fused into BiasGelu, which is slower than Gelu;
- attention as ONNX's Attention operator on [batch, tokens, heads * d], without transposes. A row that
  is masked throughout gives zeros there, see `_bounded`;
- a residual sum spelled x - (-linear): the session's SkipLayerNormalization fusion, slower than
  its parts, looks for Add. The sign goes into the weight codes.
"""

from __future__ import annotations

from planish.codegen.lower_onnx import PRODUCTS, set_apart, set_kernel_apart
from planish.codegen.ort_attention import attention, attention_opset
from planish.codegen.ort_linears import Form, integer_linear
from planish.codegen.ort_residual import residual
from planish.codegen.ort_rows import Rows
from planish.codegen.ort_weights import Shared, block_linear, slow_level
from planish.codegen.tables import gathered, gathered_by_kernel
from planish.ir.graph import Graph, Node, Value
from planish.ir.rewriter import Declined, Rewriter
from planish.passes.base import PassReport, place

INT4_OPSET = 21


def lower(
    graph: Graph, report: PassReport, opset: int | None = None, *, form: Form = "auto", level: int | None = None
) -> None:
    """Rewrite in place; what cannot be rewritten stays in standard form and is reported.

    Args:
        opset: that the graph will be written at; the model's own by default.
        form: the kernel of 4-bit weights with 8-bit activations.
        level: the accuracy level of MatMulNBits; None: what the activations say.
    """
    with Rewriter(graph) as rewriter:
        rows: dict[Value, Rows] = {}
        shared: Shared = {}
        narrow = opset is None or opset >= INT4_OPSET
        for node in list(graph.nodes):
            if node.graph is None or node.op.name not in (*PRODUCTS, "conv", "embedding", "dequantize"):
                continue
            try:
                if node.op.name == "conv":
                    done = set_kernel_apart(node, rewriter)
                elif node.op.name == "linear":
                    done = _linear(node, rewriter, rows, shared, report, form, level, narrow)
                    done = done or set_apart(node, rewriter)
                elif node.op.name in PRODUCTS:
                    done = set_apart(node, rewriter)
                else:
                    done = _table(node, rewriter, shared, report)
            except Declined as refusal:
                report.decline(str(refusal), node)
                done = node.op.name == "linear" and set_apart(node, rewriter)
            if done:
                report.applied.append(place(node))
    slow = [n for n in graph.nodes if slow_level(n)]
    if slow:
        report.notes.append(
            f"{len(slow)} linears of 2 or 8 bits with float activations: the kernel is slower than float at few rows; "
            "accuracy-level=4 rounds activations to int8 and is fast"
        )
    with Rewriter(graph) as rewriter:
        for node in list(graph.nodes):
            if node.graph is not None and node.op.name == "layer_norm" and residual(node, rewriter):
                report.applied.append(f"{place(node)}: residual")
    version = None
    masks: dict[tuple[Value, bool], Value] = {}
    with Rewriter(graph) as rewriter:
        for node in list(graph.nodes):
            if node.graph is None or node.op.name != "attention":
                continue
            try:
                version = version or attention_opset(graph, opset)
                attention(node, rewriter, report, masks, version)
                report.applied.append(place(node))
            except Declined as refusal:
                report.decline(str(refusal), node)


def _linear(
    node: Node,
    rewriter: Rewriter,
    rows: dict[Value, Rows],
    shared: Shared,
    report: PassReport,
    form: Form,
    level: int | None,
    narrow: bool,
) -> bool:
    """The integer product, else MatMulNBits: the first that takes the weight; the reason of the first if none does."""
    why: Declined | None = None
    try:
        if integer_linear(node, rewriter, rows, form, narrow=narrow):
            return True
    except Declined as refusal:
        why = refusal
    if block_linear(node, rewriter, level, shared):
        if why is not None:
            report.decline(str(why), node)
        return True
    if why is not None:
        raise why
    return False


def _table(node: Node, rewriter: Rewriter, shared: Shared, report: PassReport) -> bool:
    try:
        return gathered_by_kernel(node, rewriter, shared)
    except Declined as refusal:
        report.decline(str(refusal), node)
        return gathered(node, rewriter)
