"""Attention as ONNX's Attention operator on [batch, tokens, heads * d], without transposes.

A row that is masked throughout gives zeros there, see `_bounded`.
"""

from __future__ import annotations

import numpy as np

from planish.capture.onnx_file import META_IR_VERSION, META_OPSETS, opsets_of
from planish.codegen.onnx_emission import Emission
from planish.codegen.ort_linears import source_of
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.graph import Graph, Node, Value
from planish.ir.ops import get
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.types import TensorType, is_float
from planish.passes.base import PassReport, place

ATTENTION_OPSET = 23
MASK_FLOOR = float(np.finfo(np.float32).min) / 2


def attention_opset(graph: Graph, wanted: int | None) -> int:
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
    turn = source_of(value)
    if turn is None or turn.op.name != "transpose" or turn.attributes.get("perm") != perm:
        return None
    split = source_of(turn.operands[0])
    if split is None or split.op.name != "reshape" or turn.operands[0] is None or turn.operands[0].shape is None:
        return None
    before = split.operands[0]
    heads = turn.operands[0].shape[-2]
    if before is None or before.rank != 3 or len(turn.operands[0].shape) != 4 or not isinstance(heads, int):
        return None
    return before, heads


def attention(
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
