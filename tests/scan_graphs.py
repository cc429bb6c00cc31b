"""Selective scans written step by step, in every spelling that the tests need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from patterns import Build

from planish.ir import ops
from planish.ir.graph import Graph, Value

BATCH, CHANNELS, STATES = 2, 4, 3


@dataclass
class Spelling:
    """How the recurrence is written; the defaults are transformers' reference path.

    `rows` is the layout of u and delta, `states` that of b and c ("bnt" as the kernels have it, "btn").
    """

    length: int = 5
    batch: str = "2"
    rows: str = "bdt"
    states: str = "btn"
    fused: bool = True  # exp(delta a) and delta b u for all steps at once
    association: str = "(delta b) u"
    zeros: bool = True
    readout: str = "matmul"  # "matmul", "swapped", "sum"
    joined: str = "stack"  # "stack", "cat", "rows"
    take: str = "gather"  # "gather", "slice", "split"
    skip: bool = True
    commuted: bool = False
    constant: bool = True  # a and skip are constants
    wrong: str = ""  # what to get wrong

    def graph(self) -> Graph:
        return _Writer(self).graph()


class _Writer:
    def __init__(self, spelling: Spelling) -> None:
        self.s, self.b = spelling, Build()
        self.sizes = {"b": spelling.batch, "d": CHANNELS, "n": STATES, "t": spelling.length}
        self.parts: dict[int, list[Value]] = {}

    def tensor(self, name: str, layout: str, wanted: str) -> Value:
        b = self.b
        value = b.input(name, f"f32[{', '.join(str(self.sizes[label]) for label in layout)}]")
        if name == "delta":
            value = b("softplus", value)
        if layout == wanted:
            return value
        return b("transpose", value, perm=tuple(layout.index(label) for label in wanted))

    def at(self, value: Value, axis: int, step: int) -> Value:
        """value[..., step, ...] without the axis."""
        b, axis = self.b, axis % (value.rank or 0)
        if self.s.take == "gather":
            return b("gather", value, np.array(step, np.int64), axis=axis)
        if self.s.take == "slice":
            ends = np.array([step + 1], np.int64)
            value = b("slice", value, np.array([step], np.int64), ends, np.array([axis], np.int64))
            return b("squeeze", value, axes=(axis,))
        if id(value) not in self.parts:
            sizes = (1,) * self.s.length
            node = b.graph.append(ops.get("split"), [value], {"axis": axis, "sizes": sizes})
            self.parts[id(value)] = list(node.results)
        return b("squeeze", self.parts[id(value)][step], axes=(axis,))

    def product(self, one: Value, two: Value) -> Value:
        return self.b("mul", two, one) if self.s.commuted else self.b("mul", one, two)

    def total(self, one: Value, two: Value) -> Value:
        return self.b("add", two, one) if self.s.commuted else self.b("add", one, two)

    def scanned(self, delta: Value, a: Value, b: Value, u: Value, wide: int) -> tuple[Value, Value]:
        """(decay, input) from values whose axes before the last are (.., t) if `wide` is 1, else without t."""
        make = self.b
        column = (-1,)
        rate = self.product(make("unsqueeze", a, axes=(0, 2)[: wide + 1]), make("unsqueeze", delta, axes=column))
        row = make("unsqueeze", b, axes=(1,))
        step, now = make("unsqueeze", delta, axes=column), make("unsqueeze", u, axes=column)
        match self.s.association:
            case "(delta b) u":
                given = self.product(self.product(step, row), now)
            case "(delta u) b":
                given = self.product(self.product(step, now), row)
            case _:
                given = self.product(step, self.product(row, now))
        decay = make("tanh", rate) if self.s.wrong == "no exponential" else make("exp", rate)
        return decay, given

    def alone(self, delta: Value, a: Value, b: Value, u: Value, position: int, late: int) -> tuple[Value, Value]:
        """(decay, input) of one step, computed in that step."""
        return self.scanned(self.at(delta, 2, position), a, self.at(b, 1, late), self.at(u, 2, late), 0)

    def graph(self) -> Graph:
        s, make = self.s, self.b
        u, delta = self.tensor("u", s.rows, "bdt"), self.tensor("delta", s.rows, "bdt")
        b, c = self.tensor("b", s.states, "btn"), self.tensor("c", s.states, "btn")
        if s.constant:
            a, skip = make.constant(-np.exp(make.rng.normal(size=(CHANNELS, STATES))), name="a"), make.random(CHANNELS)
        else:
            a = make.input("a", f"f32[{CHANNELS}, {STATES}]")
            skip = make.input("skip", f"f32[{CHANNELS}]")
        other = make("abs", a) if s.wrong == "another rate" else a
        decay, given = self.scanned(delta, a, b, u, 1) if s.fused else (None, None)
        changed = self.scanned(delta, other, b, u, 1)[0] if s.fused and other is not a else decay
        state: Value | None = None
        rows = []
        for step in range(s.length):
            position = s.length - 1 - step if s.wrong == "backwards" else step
            late = min(step + 1, s.length - 1) if s.wrong == "reads ahead" else position
            if s.wrong == "forgets" and step == 3:
                assert state is not None
                state = make("neg", state)
            source, rates = (changed, other) if step == 2 else (decay, a)
            if state is None and not s.zeros:
                state = self.at(given, 2, late) if given is not None else self.alone(delta, a, b, u, position, late)[1]
            else:
                if given is not None and source is not None:
                    factor, put = self.at(source, 2, position), self.at(given, 2, late)
                else:
                    factor, put = self.alone(delta, rates, b, u, position, late)
                if state is None:
                    fill = np.ones if s.wrong == "starts elsewhere" else np.zeros
                    state = make.constant(fill((BATCH, CHANNELS, STATES)), name="start")
                state = self.total(self.product(factor, state), put)
            rows.append(self.read(state, self.at(c, 1, position if s.wrong != "reads early" else max(step - 1, 0))))
        axis = 1 if s.joined == "rows" else -1
        if s.joined != "cat":
            rows = [make("unsqueeze", make("squeeze", row, axes=(2,)), axes=(axis,)) for row in rows]
        y = make("concat", *rows, axis=axis)
        if s.skip and s.joined != "rows":
            y = self.total(y, self.product(u, make("unsqueeze", skip, axes=(0, 2))))
        outputs = [y]
        if s.wrong == "gives the state away":
            outputs.append(state)
        return make.output(*outputs)

    def read(self, state: Value, c: Value) -> Value:
        """[b, d, 1]."""
        make = self.b
        if self.s.readout == "matmul":
            return make("matmul", state, make("unsqueeze", c, axes=(2,)))
        if self.s.readout == "sum":
            return make("reduce_sum", self.product(state, make("unsqueeze", c, axes=(1,))), axes=(2,), keepdims=True)
        turned = make("matmul", make("unsqueeze", c, axes=(1,)), make("transpose", state, perm=(0, 2, 1)))
        return make("transpose", turned, perm=(0, 2, 1))
