"""Lowering for ONNX Runtime on the CPU.

What its kernels reward, measured (docs/targets.md):

- quantised linears as MatMulIntegerToFloat, uint8 activations times int8 weights (any other pairing is
  slow), the bias inside, one DynamicQuantizeLinear shared by all readers of a value;
- per-row activations: QuantizeLinear with a run-time scale vector along axis 0 of the flattened
  tensor, the row scale multiplied back behind the product, and a bias of shape [1, N]: a
  one-dimensional one would be fused into BiasGelu, which is slower than Gelu;
- attention as ONNX's Attention operator on [batch, tokens, heads * d], without transposes. A row that
  is masked throughout gives zeros there, see `_bounded`;
- a residual sum spelled x - (-linear): the session's SkipLayerNormalization fusion, slower than
  its parts, looks for Add. The sign goes into the weight codes.
"""

from __future__ import annotations

import numpy as np

from planish.capture.onnx_file import META_IR_VERSION, META_OPSETS, opsets_of
from planish.codegen.onnx_emission import CONTRIB, Emission
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.graph import Graph, Node, Value
from planish.ir.ops import get
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.types import TensorType, is_float
from planish.passes.base import PassReport, place

ATTENTION_OPSET = 23
MASK_FLOOR = float(np.finfo(np.float32).min) / 2
ROW_FLOOR = 1e-30  # the least row maximum: a row of zeros keeps a positive scale


def lower(graph: Graph, report: PassReport, opset: int | None = None) -> None:
    """Rewrite in place; what cannot be rewritten stays in standard form and is reported.

    Args:
        opset: that the graph will be written at; the model's own by default.
    """
    with Rewriter(graph) as rewriter:
        rows: dict[Value, _Rows] = {}
        for node in list(graph.nodes):
            if node.graph is None or node.op.name != "linear":
                continue
            try:
                if _linear(node, rewriter, rows):
                    report.applied.append(place(node))
            except Declined as refusal:
                report.decline(str(refusal), node)
    with Rewriter(graph) as rewriter:
        for node in list(graph.nodes):
            if node.graph is not None and node.op.name == "layer_norm" and _residual(node, rewriter):
                report.applied.append(f"{place(node)}: residual")
    version = None
    masks: dict[tuple[Value, bool], Value] = {}
    with Rewriter(graph) as rewriter:
        for node in list(graph.nodes):
            if node.graph is None or node.op.name != "attention":
                continue
            try:
                version = version or _attention_opset(graph, opset)
                _attention(node, rewriter, report, masks, version)
                report.applied.append(place(node))
            except Declined as refusal:
                report.decline(str(refusal), node)


# -- quantised linears -----------------------------------------------------------------------------


class _Rows:
    """A value quantised per row: flattened codes, row scales [T, 1], the leading dims to go back to.

    The codes stand for x - `offset`, and `zero` is their constant zero point.
    """

    def __init__(self, codes: Value, scale: Value, dims: Value, zero: int, offset: float) -> None:
        self.codes, self.scale, self.dims, self.zero, self.offset = codes, scale, dims, zero, offset


def _source(value: Value | None) -> Node | None:
    return value.producer if value is not None else None


def _weight(node: Node) -> tuple[np.ndarray, Value] | None:
    """The codes [K, N] and the scales [N] of a linear's quantised weight."""
    made = _source(node.operand(1))
    if made is None or made.op.name != "dequantize" or made.operand(2) is not None:
        return None
    codes, scale = made.operands[0], made.operands[1]
    if codes is None or scale is None or codes.constant is None or codes.dtype != "i8" or scale.rank != 1:
        return None
    array = codes.constant.array()
    transposed = bool(node.attributes.get("transposed", False))
    if made.attributes.get("axis") not in ((1, -1) if transposed else (0, -2)):
        return None
    return (array if transposed else np.ascontiguousarray(array.T)), scale


def _contrib(name: str) -> tuple[str, dict[str, int]]:
    return f"{CONTRIB}::{name}", {"onnx_opset": 1}


def _linear(node: Node, rewriter: Rewriter, rows: dict[Value, _Rows]) -> bool:
    activation, weight = _source(node.operand(0)), _weight(node)
    if activation is None or activation.op.name != "dequantize" or weight is None:
        return False
    codes, scale, zero = (activation.operand(i) for i in range(3))
    if codes is None or scale is None or codes.dtype != "u8":
        raise Declined("its activation codes are not uint8: no fast kernel", node)
    data, weight_scale = weight
    held = rewriter.constant(Constant.of(data), f"{node.result.name}.codes")
    dynamic = codes.producer
    token = (
        dynamic is not None
        and dynamic.op.name == "dynamic_quantize"
        and dynamic.attributes.get("granularity") == "token"
    )
    op, attributes = _contrib("MatMulIntegerToFloat")
    if not token:
        if scale.rank != 0:
            raise Declined("its activation has a vector of scales: no fast kernel", node)
        operands = [codes, held, scale, weight_scale, zero, None, node.operand(2)]
        made = rewriter.insert(
            op,
            operands,
            attributes,
            before=node,
            types=[node.result.type],
            names=[node.result.name],
            source=node.source,
        )
        rewriter.replace_node(node, made.result)
        return True
    assert dynamic is not None
    x = dynamic.operands[0]
    assert x is not None
    if x not in rows:
        rows[x] = _quantise_rows(x, dynamic, rewriter)
    flat = rows[x]
    one = rewriter.constant(Constant.of(np.float32(1.0)), "one")
    half = rewriter.constant(Constant.of(np.uint8(flat.zero)), "zero")
    outputs = data.shape[1]
    flat_type = TensorType("f32", (None, outputs))
    product = rewriter.insert(
        op, [flat.codes, held, one, weight_scale, half], attributes, before=node, types=[flat_type], source=node.source
    ).result
    scaled = rewriter.insert("mul", [product, flat.scale], before=node, types=[flat_type], source=node.source).result
    bias = _row_bias(node, rewriter, data, weight_scale, flat.offset)
    if bias is not None:
        scaled = rewriter.insert("add", [scaled, bias], before=node, types=[flat_type], source=node.source).result
    last = rewriter.constant(Constant.of(np.array([outputs], np.int64)), "last")
    dims = rewriter.insert("concat", [flat.dims, last], {"axis": 0}, before=node, source=node.source).result
    back = rewriter.insert("reshape", [scaled, dims], before=node, types=[node.result.type], source=node.source)
    rewriter.replace_node(node, back.result)
    return True


def _row_bias(node: Node, rewriter: Rewriter, codes: np.ndarray, scale: Value, offset: float) -> Value | None:
    """The bias as [1, N], with what the offset of the codes adds to each output."""
    bias = node.operand(2)
    if bias is not None and not bias.is_constant:
        if offset:
            raise Declined("its bias is not a constant", node)
        return bias
    if bias is None and not offset:
        return None
    matrix = bias.constant.wide().reshape(1, -1) if bias is not None and bias.constant is not None else 0.0
    if offset:
        assert scale.constant is not None
        matrix = matrix + offset * codes.astype(np.float64).sum(0, keepdims=True) * scale.constant.wide()
    assert isinstance(matrix, np.ndarray)
    name = bias.name if bias is not None else f"{node.result.name}.bias"
    return rewriter.constant(Constant(matrix, "f32", matrix.shape), name)


def _quantise_rows(x: Value, dynamic: Node, rewriter: Rewriter) -> _Rows:
    """QuantizeLinear of the flattened rows, each with its own scale (see `dynamic_quantize`)."""
    assert x.shape is not None
    width = x.shape[-1]
    source = dynamic.source

    def insert(
        op: str, operands: list[Value | None], attributes: dict[str, object] | None = None, **more: object
    ) -> Value:
        return rewriter.insert(op, operands, attributes, before=dynamic, source=source, **more).result  # type: ignore[arg-type]

    def constant(data: np.ndarray, hint: str) -> Value:
        return rewriter.constant(Constant.of(data), hint)

    def scalar(value: float) -> Value:
        return constant(np.array(value, np.float32), "scalar")

    if not isinstance(width, int):
        raise Declined("its width is not static", dynamic)
    flat = insert("reshape", [x, constant(np.array([-1, width], np.int64), "rows")])
    high = insert("reduce_max", [flat], {"axes": (-1,), "keepdims": False})
    floor = dynamic.attributes.get("floor")
    if isinstance(floor, float):
        room = insert("add", [insert("max", [high, scalar(0.0)]), scalar(floor)])
        zero = insert("max", [insert("floor", [insert("div", [scalar(255.0 * floor), room])]), scalar(1.0)])
        scale = insert("div", [scalar(floor), zero])
        zeros = insert("cast", [zero], {"to": "u8"})
        constant_zero, offset = 0, -floor
    else:
        low = insert("reduce_min", [flat], {"axes": (-1,), "keepdims": False})
        largest = insert("max", [insert("max", [high, insert("neg", [low])]), scalar(ROW_FLOOR)])
        scale = insert("mul", [largest, scalar(1.0 / 127.0)])
        zeros = insert("expand", [constant(np.array([128], np.uint8), "half"), insert("shape", [scale])])
        constant_zero, offset = 128, 0.0
    codes = insert("quantize", [flat, scale, zeros], {"dtype": "u8", "axis": 0})
    column = insert("unsqueeze", [scale], {"axes": (-1,)})
    dims = insert("shape", [x], {"start": 0, "end": -1})
    return _Rows(codes, column, dims, constant_zero, offset)


# -- residual sums ---------------------------------------------------------------------------------


def _residual(norm: Node, rewriter: Rewriter) -> bool:
    """layer_norm(x + linear(..)) -> layer_norm(x - (-linear)(..)), the sign in codes and bias."""
    total = _source(norm.operands[0])
    if total is None or total.op.name != "add" or len(total.result.users) != 1:
        return False
    for index in (1, 0):
        addend, other = total.operands[index], total.operands[1 - index]
        chain = _negatable(addend)
        if chain is None or other is None:
            continue
        for node in chain:
            for port in _signed_operands(node):
                value = node.operand(port)
                if value is None:
                    continue
                assert value.constant is not None
                array = value.constant.wide() if value.dtype == "f32" else value.constant.array()
                negative = Constant(-array, value.constant.dtype, array.shape)
                rewriter.set_operand(node, port, rewriter.constant(negative, value.name))
        made = rewriter.insert("sub", [other, addend], before=total, types=[total.result.type], source=total.source)
        rewriter.replace_node(total, made.result)
        return True
    return False


def _signed_operands(node: Node) -> tuple[int, ...]:
    """The operands that change sign when the result does."""
    return (1,) if node.op.name == "add" else (1, 6)


def _negatable(value: Value | None) -> list[Node] | None:
    """The nodes from quantised products to `value` whose constants can take a sign; None if there are none."""
    chain: list[Node] = []
    node = _source(value)
    while node is not None and len(node.result.users) == 1:
        if node.op.name == f"{CONTRIB}::MatMulIntegerToFloat":
            bias, codes = node.operand(6), node.operands[1]
            good = codes is not None and codes.is_constant and (bias is None or bias.is_constant)
            return [*chain, node] if good else None
        bias = node.operand(1)
        if node.op.name == "add" and bias is not None and not bias.is_constant:
            both = _negatable(node.operands[0]), _negatable(bias)  # a sum of two products
            return None if both[0] is None or both[1] is None else [*chain, *both[0], *both[1]]
        if node.op.name not in ("reshape", "mul", "add"):
            return None
        if node.op.name == "add":
            chain.append(node)
        node = _source(node.operands[0])
    return None


# -- attention ---------------------------------------------------------------------------------------


def _attention_opset(graph: Graph, wanted: int | None) -> int:
    """The opset at which attention is written; the graph is moved to it unless `wanted` says where it will be.

    Raises:
        Declined: the operator is younger than `wanted`, or a node of the model has another form there.
    """
    if wanted is not None and wanted < ATTENTION_OPSET:
        raise Declined(f"the operator is in opset {ATTENTION_OPSET}; {wanted} was asked for")
    opsets = opsets_of(graph)
    own = opsets.get("onnx", opsets.get("", 0))
    version = wanted or max(own, ATTENTION_OPSET)
    if version == own:
        return version
    try:
        Emission(graph, opset=version).check_versions()
    except PlanishError as error:
        raise Declined(f"the operator is in opset {ATTENTION_OPSET}: {error.what}") from error
    if wanted is None:
        pairs = tuple((domain, version if domain in ("", "onnx") else v) for domain, v in opsets.items())
        graph.meta[META_OPSETS] = pairs or (("", version),)
        ir_version = graph.meta.get(META_IR_VERSION)
        graph.meta[META_IR_VERSION] = max(ir_version, 11) if isinstance(ir_version, int) else 11
    return version


def _merged(value: Value | None, perm: tuple[int, ...]) -> tuple[Value, int] | None:
    """[B, T, heads * d] behind transpose(reshape(.. [B, T, heads, d])), and the number of heads."""
    turn = _source(value)
    if turn is None or turn.op.name != "transpose" or turn.attributes.get("perm") != perm:
        return None
    split = _source(turn.operands[0])
    if split is None or split.op.name != "reshape" or turn.operands[0] is None or turn.operands[0].shape is None:
        return None
    before = split.operands[0]
    heads = turn.operands[0].shape[-2]
    if before is None or before.rank != 3 or len(turn.operands[0].shape) != 4 or not isinstance(heads, int):
        return None
    return before, heads


def _attention(
    node: Node, rewriter: Rewriter, report: PassReport, masks: dict[tuple[Value, bool], Value], version: int
) -> None:
    if node.operand(4) is not None or node.attributes.get("softcap") is not None:
        raise Declined("the operator has no sinks, and caps its scores behind the mask", node)
    q, k, v = (_merged(node.operands[i], (0, 2, 1, 3)) for i in range(3))
    if q is None or k is None or v is None:
        raise Declined("its operands are not transposed head splits", node)
    turn = node.result.users[0] if len(node.result.users) == 1 else None
    if turn is None or turn.op.name != "transpose" or turn.attributes.get("perm") != (0, 2, 1, 3):
        raise Declined("its result is not transposed back", node)
    merge = turn.result.users[0] if len(turn.result.users) == 1 else None
    if merge is None or merge.op.name != "reshape" or merge.result.rank != 3:
        raise Declined("its heads are not merged", node)
    size = v[0].shape[-1] if v[0].shape is not None else None
    width = q[1] * (size // v[1]) if isinstance(size, int) else None
    if merge.result.shape is None or width is None or merge.result.shape[-1] != width:
        raise Declined("its heads are merged into another shape", node)
    attributes: dict[str, object] = {
        "onnx_opset": version,
        "q_num_heads": q[1],
        "kv_num_heads": k[1],
    }
    if node.attributes.get("causal", False):
        attributes["is_causal"] = 1
    if node.attributes.get("scale") is not None:
        attributes["scale"] = node.attributes["scale"]
    mask = node.operand(3)
    if mask is not None:
        if mask.shape is None or mask.shape[-1] == 1:
            raise Declined("its mask is broadcast over the keys", node)
        safe = bool(node.attributes.get("safe", False))
        if (mask, safe) not in masks:  # made before the first reader: every other one comes later
            bounded = _bounded(mask, safe, node, rewriter, report)
            masks[mask, safe] = _expanded(bounded, q[0], node, rewriter)
        mask = masks[mask, safe]
    made = rewriter.insert(
        get("onnx::Attention"), [q[0], k[0], v[0], mask], attributes,  # type: ignore[arg-type]
        before=node, types=[merge.result.type], source=node.source,
    )  # fmt: skip
    rewriter.replace(merge.result, made.result)


def _bounded(mask: Value, safe: bool, node: Node, rewriter: Rewriter, report: PassReport) -> Value:
    """The mask as the kernel must see it: where the lowest float does not mean -inf, without it.

    The kernel gives 0 for a row whose scores are all -inf or the lowest float. That is what a guarded softmax (`safe`)
    does on -inf; on finite scores, and without the guard, softmax spreads such a row evenly, as the kernel does on
    half of the lowest float.
    """
    if mask.dtype != "f32" or (safe and not _finite(mask)):
        if mask.dtype == "f32":
            report.notes.append(f"{place(node)}: rows that %{mask.name} masks throughout give 0")
        return mask
    if mask.is_constant and mask.constant is not None and not mask.is_input:
        if (mask.constant.wide() >= MASK_FLOOR).all():
            return mask
    chosen = mask.producer
    if chosen is not None and chosen.op.name == "where" and all(u.op.name == "attention" for u in mask.users):
        if all(v is not None and v.is_constant for v in chosen.operands[1:]) and not _given_out(mask, rewriter):
            for port in (1, 2):  # nothing to compute: the constants themselves
                old = chosen.operands[port]
                assert old is not None and old.constant is not None
                data = np.maximum(old.constant.wide(), MASK_FLOOR)
                made = rewriter.constant(Constant(data, "f32", data.shape), old.name)
                rewriter.set_operand(chosen, port, made)
            return mask
    least = rewriter.constant(Constant.of(np.float32(MASK_FLOOR)), "least")
    return rewriter.insert("max", [mask, least], before=node, types=[mask.type]).result


def _given_out(value: Value, rewriter: Rewriter) -> bool:
    return any(v is value for v in rewriter.graph.output_values())


def _finite(value: Value | None, depth: int = 8) -> bool:
    """True if a mask is made from finite constants and numbers that were no floats, so that it is never -inf."""
    if value is None or depth == 0:
        return False
    if value.is_constant and value.constant is not None and not value.is_input:
        return bool(np.isfinite(value.constant.wide()).all())
    node = value.producer
    if node is None:
        return False
    if node.op.name == "cast":
        return node.operands[0] is not None and not is_float(node.operands[0].dtype)
    if node.op.name in ("where", "mul", "sub"):
        return all(_finite(v, depth - 1) for v in node.operands[node.op.name == "where" :])
    shaping = ("expand", "unsqueeze", "squeeze", "reshape", "slice", "transpose")
    return node.op.name in shaping and _finite(node.operands[0], depth - 1)


def _expanded(mask: Value, query: Value, node: Node, rewriter: Rewriter) -> Value:
    """The mask with its query axis at full length: the kernel does not broadcast it."""
    if mask.rank is None or mask.shape is None or mask.shape[-2] != 1 or query.shape is None:
        return mask
    one = rewriter.constant(Constant.of(np.array([1], np.int64)), "one")
    length = rewriter.insert("shape", [query], {"start": 1, "end": 2}, before=node).result
    dims = rewriter.insert("concat", [*[one] * (mask.rank - 2), length, one], {"axis": 0}, before=node).result
    full = TensorType(str(mask.dtype), (*mask.shape[:-2], query.shape[1], mask.shape[-1]))
    return rewriter.insert("expand", [mask, dims], before=node, types=[full]).result
