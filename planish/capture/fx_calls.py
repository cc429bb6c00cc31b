"""What a graph does not say of the calls that it was captured from, so that torch code is theirs bit for bit.

Some torch ops become several rows, which round otherwise than the op's own kernel does; and the kernel that torch
takes can depend on what is no part of the function (a copy that makes a tensor contiguous, how key heads are
shared). `Graph.meta` keeps, by the names of values:

    torch.notes   (value, "contiguous") for one that was copied so, (value, "shared-heads") for an attention that
                  was told to share key heads
    torch.calls   (value, op, operands, attributes, fingerprint): the call that the value's nodes stand for; it
                  holds as long as these nodes still have that fingerprint
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from planish.ir.graph import Attribute, Graph, Node, Value
from planish.ir.text import node_text

if TYPE_CHECKING:
    from planish.capture.fx_builder import Builder

# ops that become several rows with other roundings, or a row whose torch code calls another kernel
_SEVERAL = frozenset(
    {"aten.baddbmm.default", "aten.mish.default", "aten.glu.default", "aten.log_sigmoid.default",
     "aten.addcmul.default", "aten.addcdiv.default", "aten.softplus.default", "aten.lerp.Scalar", "aten.lerp.Tensor",
     "aten.linalg_vector_norm.default"}
)  # fmt: skip
_OTHER_KERNELS = frozenset(
    {"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default", "aten.einsum.default"}
)
# with alpha: the kernel rounds once, a product and a sum round twice
_SCALED = frozenset({"aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar", "aten.rsub.Scalar",
                     "aten.rsub.Tensor"})  # fmt: skip
_COPIES = frozenset({"aten.clone.default", "aten.contiguous.default"})


def note(b: Builder, target: Any, bound: Mapping[str, Any], made: Any, last: Node | None) -> None:
    """Keep what the nodes after `last`, of which `made` is the result, do not say of their call."""
    from planish.capture import fx_opaque
    from planish.capture.fx_builder import Size

    if not isinstance(made, Value):
        return
    name = str(target)
    if name in _COPIES and bound.get("memory_format", torch.contiguous_format) is torch.contiguous_format:
        b.notes.append((made, "contiguous"))
    if name == "aten.scaled_dot_product_attention.default" and bound.get("enable_gqa"):
        b.notes.append((made, "shared-heads"))
    if any(isinstance(given, Size) for given in bound.values()):
        return
    several = name in _SEVERAL or (name in _SCALED and bound.get("alpha", 1) != 1)
    if not (several or name in _OTHER_KERNELS) or made.producer is None:
        return
    nodes = list(_after(b.graph, last))
    if len(nodes) < (2 if several else 1):
        return
    end = b.graph._last
    kept = fx_opaque.append(b, target, bound)[0].producer
    assert kept is not None
    b.calls.append((made, name, [v for v in kept.operands if v is not None], dict(kept.attributes), nodes))
    b.erase_after(end)


def _after(graph: Graph, last: Node | None) -> Iterator[Node]:
    node = graph._first if last is None else last._next
    while node is not None:
        yield node
        node = node._next


def fingerprint(nodes: Sequence[Node]) -> str:
    """The text of nodes, with the values of the scalars that they read."""
    lines = []
    for node in nodes:
        scalars = [
            repr(v.constant.wide().item())
            for v in node.operands
            if v is not None and v.constant is not None and not v.shape
        ]
        lines.append(" ".join([node_text(node), *scalars]))
    return "\n".join(lines)


def as_meta(b: Builder) -> dict[str, Attribute]:
    """The entries of `Graph.meta`, once all values have their names."""
    meta: dict[str, Attribute] = {}
    notes = tuple(dict.fromkeys((value.name, what) for value, what in b.notes if value.producer is not None))
    if notes:
        meta["torch.notes"] = notes
    calls = tuple(
        (made.name, op, tuple(v.name for v in operands), tuple(attributes.items()), tuple(n.result.name for n in nodes),
         fingerprint(nodes))
        for made, op, operands, attributes, nodes in b.calls
        if all(n.graph is b.graph for n in nodes)
    )  # fmt: skip
    if calls:
        meta["torch.calls"] = calls
    return meta


def noted(graph: Graph, what: str) -> frozenset[str]:
    """The names of the values with a note."""
    kept = graph.meta.get("torch.notes")
    pairs = kept if isinstance(kept, tuple) else ()
    return frozenset(str(pair[0]) for pair in pairs if isinstance(pair, tuple) and pair[1] == what)


def calls(graph: Graph) -> dict[Value, Node]:
    """The calls that still hold, as nodes outside of the graph, by the values that they give."""
    from planish.ir import ops

    found: dict[Value, Node] = {}
    kept: Any = graph.meta.get("torch.calls", ())
    for name, op, operands, attributes, members, text in kept:
        values = [graph.values.get(member) for member in members]
        given = [graph.values.get(operand) for operand in operands]
        if any(v is None or v.producer is None for v in values) or any(v is None for v in given):
            continue
        nodes = [v.producer for v in values if v is not None and v.producer is not None]
        if fingerprint(nodes) == text:
            found[graph.values[name]] = Node(ops.get(f"torch::{op}"), given, dict(attributes))
    return found
