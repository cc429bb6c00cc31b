"""Raise a selective scan that is written step by step.

    h_t = exp(delta_t a) h_(t-1) + (delta_t b_t) u_t,   y_t = h_t c_t,   y = stack(y_0, y_1, ...) [+ skip u]

becomes one `selective_scan`. The exponential and the input may be computed for all steps at once, or in each; the
products in any association; the first state from zeros, or from the first input alone; the read-out by a matrix
product or by a sum of products. Every step must read position t of the same tensors, in the order of time, and
nothing else may read a state. Exact over the reals.

The op is the S6 layer of arXiv:2312.00752.
"""

from __future__ import annotations

from dataclasses import dataclass

from planish.ir.graph import Node, Value
from planish.ir.rewriter import Declined, Rewriter
from planish.passes.axis_labels import Label, Seen, arranged, broadcast, factors, follow
from planish.passes.base import Exactness
from planish.passes.match import (
    PatternPass,
    Rule,
    Site,
    Trail,
    attribute,
    both,
    interior,
    is_output,
    only_reader,
    origin,
)
from planish.passes.recurrence import STATE, Parts, readouts, step_parts

STEPS = 6
_VIEWS = frozenset({"identity", "cast", "transpose", "unsqueeze", "squeeze", "gather", "slice", "split"})


def _match(node: Node, trail: Trail) -> Site | None:
    shape, length = node.result.shape, len(node.operands)
    if shape is None or len(shape) != 3 or length < 2:
        return None
    time = attribute(node, "axis") % 3
    outer: list[Label] = ["x", "y"]
    outer.insert(time, None)
    found: list[Parts] = []
    first: tuple[Seen, Seen] | None = None  # the first state and its read-out, where it has no decay
    last: Value | None = None
    batch, channel = "x", "y"
    for step, operand in enumerate(node.operands):
        if operand is None or operand.shape is None or operand.shape[time] != 1:
            return None
        pairs = list(readouts(follow(Seen(operand, tuple(outer)))))
        if step == 0 and any(readout.has("y", STATE, 0) for _, readout in pairs):
            batch, channel = "y", "x"
        pairs = [(state, readout) for state, readout in pairs if readout.has(batch, STATE, step)]
        if not pairs:
            return trail.miss(1 if step else 0, f"step {step} reads no state by position {step}", operand)
        state, readout = Seen(origin(pairs[0][0].value), pairs[0][0].labels), pairs[0][1]
        parts = step_parts(state, readout, last, batch, channel, step, trail)
        if parts is None and step == 0:
            first = state, readout
        elif parts is None:
            return None
        elif found and parts != found[0]:
            return trail.miss(5, f"step {step} reads other tensors than the steps before", state.value)
        else:
            found.append(parts)
        last = state.value
    parts = found[0]
    if first is not None and not parts.takes(*first, batch, channel):
        return trail.miss(5, "the first state is neither zero nor the first input", first[0].value)
    if any(seen.dim("t") != length for seen in (parts.delta, parts.b, parts.c, parts.u)):
        return trail.miss(5, f"the tensors do not have {length} positions each", node)
    outer[time] = "t"
    return _with_skip(node, parts, tuple(outer), (batch, channel))


def _with_skip(node: Node, parts: Parts, outer: tuple[Label, ...], axes: tuple[Label, Label]) -> Site:
    """The site, with the addend skip u if that is all that reads the result."""
    root, skip = node, None
    reader = only_reader(node.result)
    if reader is not None and reader.op.name == "add" and reader.result.rank == 3:
        for one, other in both(reader):
            labels = broadcast(other, reader.result, outer) if one is node.result else None
            terms = factors(follow(Seen(other, labels)), "mul") if labels is not None else None
            for u, factor in (terms, terms[::-1]) if terms is not None else ():
                if u == parts.u and factor.has(axes[1]) and skip is None:
                    root, skip = reader, factor
    tensors = (parts.u, parts.delta, parts.a, parts.b, parts.c, *([skip] if skip is not None else []))
    found = {"tensors": tensors, "outer": outer, "axes": axes}
    return Site(root, tuple(seen.value for seen in tensors), found)


def _check(nodes: list[Node], root: Node) -> None:
    """Nobody else may read a state or a factor; views may be read elsewhere."""
    inside = set(nodes)
    for node in nodes:
        if node is root or node.op.name in _VIEWS:
            continue
        for result in node.results:
            if is_output(result):
                raise Declined("an intermediate value is a graph output", node)
            if any(user not in inside for user in result.users):
                raise Declined("an intermediate value is read elsewhere", node)


def _raise(site: Site, rewriter: Rewriter) -> None:
    root, (batch, channel) = site.root, site.parts["axes"]
    nodes = interior(root, site.sources)
    _check(nodes, root)
    orders = [
        (batch, channel, "t"), (batch, channel, "t"), (channel, STATE), (batch, STATE, "t"), (batch, STATE, "t"),
        (channel,),
    ]  # fmt: skip
    operands = []
    for seen, order in zip(site.parts["tensors"], orders, strict=False):
        value = arranged(rewriter, seen, order, root, nodes)
        if value.dtype != root.result.dtype and root.result.dtype is not None:
            value = rewriter.insert("cast", [value], {"to": root.result.dtype}, before=root).result
        operands.append(value)
    value = rewriter.insert("selective_scan", operands, before=root, source=root.source).result
    perm = tuple((batch, channel, "t").index(label) for label in site.parts["outer"])
    if perm != (0, 1, 2):
        value = rewriter.insert("transpose", [value], {"perm": perm}, before=root).result
    site.supersede(rewriter, value)


@dataclass(frozen=True)
class RaiseSelectiveScan(PatternPass):
    """Selective scans from their steps."""

    name = "raise-selective-scan"
    exactness = Exactness.EXACT
    rules = (Rule("selective-scan", frozenset({"concat"}), STEPS, _match, _raise),)
