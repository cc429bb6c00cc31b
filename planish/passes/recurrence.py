"""One step of a selective scan, as it is written with broadcast products.

    h_t = exp(delta_t a) h_(t-1) + (delta_t b_t) u_t,   y_t = h_t c_t

Axes have labels (`planish.passes.axis_labels`): batch and channel as the caller calls them, "n" for the states, and
the step's position for time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from planish.ir.constant import Constant
from planish.ir.graph import Value
from planish.passes.axis_labels import Label, Seen, broadcast, factors, follow
from planish.passes.match import Trail, attribute, both, is_op, origin, same

STATE = "n"  # the label of the axis that is summed over


@dataclass(frozen=True)
class Parts:
    """The tensors of a step. Axes have labels: b and d of the caller, "n", and the position in time."""

    delta: Seen
    a: Seen
    b: Seen
    c: Seen
    u: Seen

    def timeless(self, step: int) -> Parts:
        """The same for every step: the position in time becomes "t"."""

        def named(seen: Seen) -> Seen:
            return Seen(seen.value, tuple("t" if label == step else label for label in seen.labels))

        return Parts(*(named(seen) for seen in (self.delta, self.a, self.b, self.c, self.u)))

    def takes(self, state: Seen, readout: Seen, batch: Label, channel: Label) -> bool:
        """True if a state is nothing but the input of the first step, and is read by these parts."""

        def first(seen: Seen) -> Seen:
            return Seen(seen.value, tuple(0 if label == "t" else label for label in seen.labels))

        inputs = _inputs(state, first(self.delta), batch, channel, 0)
        return inputs == (first(self.delta), first(self.b), first(self.u)) and readout == first(self.c)


def readouts(seen: Seen) -> Iterator[tuple[Seen, Seen]]:
    """(state, read-out) of a sum over an axis of their product, either way round."""
    node, labels = seen.value.producer, seen.labels
    if node is None:
        return
    one, two = node.operand(0), node.operand(1)
    if node.op.name == "matmul" and one is not None and two is not None and one.rank == two.rank == 3:
        batch, row, column = labels
        if one.shape is None or two.shape is None or one.shape[0] != two.shape[0]:
            return  # one of them is broadcast over the batch
        if column is None:
            yield Seen(one, (batch, row, STATE)), follow(Seen(two, (batch, STATE, None)))
        if row is None:
            yield Seen(two, (batch, STATE, column)), follow(Seen(one, (batch, None, STATE)))
    elif node.op.name == "reduce_sum" and one is not None and is_op(one, "mul"):
        axes, product = attribute(node, "axes"), one.producer
        if axes is None or len(axes) != 1 or one.rank is None or product is None:
            return
        wide, axis = list(labels), axes[0] % one.rank
        wide[axis : axis + (1 if attribute(node, "keepdims") else 0)] = [STATE]
        for state, other in both(product):
            given = [broadcast(x, one, tuple(wide)) for x in (state, other)]
            if given[0] is not None and given[1] is not None:
                yield Seen(state, given[0]), follow(Seen(other, given[1]))


def _is_zero(value: Value) -> bool:
    value = origin(value)
    node, constant = value.producer, value.constant if value.is_constant else None
    if node is not None and node.op.name == "constant_of_shape":
        fill = attribute(node, "value")
        constant = fill if isinstance(fill, Constant) else None
    elif node is not None and node.op.name == "expand":
        source = node.operand(0)
        return source is not None and _is_zero(source)
    return constant is not None and constant.dtype != "str" and not np.any(constant.array())


def _updates(state: Seen, last: Value | None) -> Iterator[tuple[Seen | None, Seen]]:
    """(decay, input) of a state: decay times the last state plus input; without a decay for a first state."""
    node = state.value.producer
    if node is not None and node.op.name == "add":
        for product, given in both(node):
            times = origin(product).producer
            if times is None or times.op.name != "mul":
                continue
            for decay, before in both(times):
                if _is_zero(before) if last is None else same(before, last):
                    yield Seen(decay, state.labels), Seen(given, state.labels)
    if last is None:
        yield None, state


def _decay(decay: Seen, batch: Label, channel: Label, step: int) -> tuple[Seen, Seen] | None:
    """(delta, a) of exp(delta a)."""
    decay = follow(decay)
    node = decay.value.producer
    operand = node.operand(0) if node is not None and node.op.name == "exp" else None
    found = factors(follow(Seen(operand, decay.labels)), "mul") if operand is not None else None
    for delta, a in (found, found[::-1]) if found is not None else ():
        if delta.has(batch, channel, step) and a.has(channel, STATE):
            return delta, a
    return None


def _inputs(given: Seen, delta: Seen | None, batch: Label, channel: Label, step: int) -> tuple[Seen, Seen, Seen] | None:
    """(delta, b, u) of delta b u; which of the two is delta is told by the decay where there is one."""
    outer = factors(follow(given), "mul")
    for one, two in (outer, outer[::-1]) if outer is not None else ():
        inner = factors(one, "mul")
        if inner is None:
            continue
        triple = (two, *inner)
        rows = [seen for seen in triple if seen.has(batch, channel, step)]
        states = [seen for seen in triple if seen.has(batch, STATE, step)]
        if len(rows) != 2 or len(states) != 1:
            continue
        if delta is None or rows[0] == delta:
            return rows[0], states[0], rows[1]
        if rows[1] == delta:
            return rows[1], states[0], rows[0]
    return None


def step_parts(
    state: Seen, readout: Seen, last: Value | None, batch: Label, channel: Label, step: int, trail: Trail
) -> Parts | None:
    """The tensors of one step."""
    if {*state.labels} != {batch, channel, STATE}:
        return None
    miss: tuple[int, str, Value] = (2, f"step {step} does not carry the state of the step before on", state.value)
    for decay, given in _updates(state, last):
        if decay is None:
            continue
        rates = _decay(decay, batch, channel, step)
        if rates is None:
            miss = max(miss, (3, f"step {step} does not decay by exp(delta a)", decay.value), key=itemgetter(0))
            continue
        delta, a = rates
        inputs = _inputs(given, delta, batch, channel, step)
        if inputs is not None:
            return Parts(delta, a, inputs[1], readout, inputs[2]).timeless(step)
        miss = (4, f"step {step} does not take delta b u in", given.value)
    if step:  # the first step may have no decay: what is wrong with it is told later
        trail.miss(*miss)
    return None
