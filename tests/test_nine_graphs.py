"""The graphs on which table-driven tools go wrong (facts.md 7): planish applies what is legal and declines the rest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from exercise import exercise

from planish.ir.constant import Constant
from planish.ir.graph import Graph, Value
from planish.ir.ops import get
from planish.ir.ops.base import Act
from planish.ir.spaces import analyse
from planish.ir.types import TensorType

WIDTH = 8
TOLERANCE = 1e-12


class Builder:
    """A graph with an input x: f32[2, 6, WIDTH] and random weights."""

    def __init__(self, seed: int = 0) -> None:
        self.graph = Graph("main")
        self.rng = np.random.default_rng(seed)
        self.x = self.graph.add_input("x", TensorType("f32", (2, 6, WIDTH)))

    def constant(self, *shape: int, name: str = "c", data: np.ndarray | None = None) -> Value:
        array = self.rng.normal(size=shape) if data is None else data
        if array.dtype.kind == "f":
            array = array.astype(np.float32)
        return self.graph.add_constant(self.graph.fresh_name(name), Constant.of(array))

    def op(self, name: str, *operands: Value, **attributes: object) -> Value:
        return self.graph.append(get(name), operands, attributes).result  # type: ignore[arg-type]

    def linear(self, x: Value, outputs: int = WIDTH, weight: Value | None = None) -> Value:
        assert x.shape is not None
        if weight is None:
            weight = self.constant(outputs, int(x.shape[-1]), name="weight")  # type: ignore[arg-type]
        return self.op("linear", x, weight, self.constant(outputs, name="bias"))

    def finish(self, *outputs: Value) -> Graph:
        for number, value in enumerate(outputs):
            self.graph.add_output(f"y{number}", value)
        return self.graph


def add_constant(b: Builder) -> Graph:
    return b.finish(b.linear(b.op("add", b.linear(b.x), b.constant(WIDTH))))


def one_plus(b: Builder) -> Graph:
    return b.finish(b.linear(b.op("add", b.constant(data=np.ones(())), b.linear(b.x))))


def times_one_plus(b: Builder) -> Graph:
    a = b.op("sigmoid", b.linear(b.x))
    gate = b.op("add", b.constant(data=np.ones(())), a)
    return b.finish(b.linear(b.op("mul", b.linear(b.x), gate)))


def square(b: Builder) -> Graph:
    h = b.linear(b.x)
    return b.finish(b.linear(b.op("mul", h, h)))


def gather(b: Builder) -> Graph:
    index = b.constant(data=np.array([3, 0, 5, 1]), name="index")
    return b.finish(b.linear(b.op("gather", b.linear(b.x), index, axis=2)))


def flip(b: Builder) -> Graph:
    h = b.linear(b.x)
    bounds = [b.constant(data=np.array([v]), name="bound") for v in (-1, -WIDTH - 1, 2, -1)]
    return b.finish(b.linear(b.op("slice", h, *bounds)))


def shifting_reshape(b: Builder) -> Graph:
    shape = b.constant(data=np.array([2, WIDTH, 6]), name="shape")
    return b.finish(b.linear(b.op("reshape", b.linear(b.x), shape), 4))


def used_twice(b: Builder) -> Graph:
    weight = b.constant(WIDTH, WIDTH, name="weight")
    h = b.op("relu", b.linear(b.linear(b.x), weight=weight))
    return b.finish(b.linear(b.linear(h, weight=weight), 4))


def affine_norm(b: Builder) -> Graph:
    h = b.op("rms_norm", b.linear(b.x), b.constant(WIDTH, name="gain"), eps=1e-6)
    return b.finish(b.linear(h))


def hard_tanh(b: Builder) -> Graph:
    bounds = [b.constant(data=np.array(v, np.float32)) for v in (-1.0, 1.0)]
    return b.finish(b.linear(b.op("clip", b.linear(b.x), *bounds)))


def gated_norm(b: Builder) -> Graph:
    h = b.op("rms_norm", b.linear(b.x), b.constant(WIDTH, name="gain"), eps=1e-6)
    return b.finish(b.linear(b.op("mul", h, b.op("sigmoid", h))))


def tied_head(b: Builder) -> Graph:
    table = b.constant(16, WIDTH, name="table")
    ids = b.graph.add_input("ids", TensorType("i64", (2, 6)))
    h = b.op("rms_norm", b.op("embedding", table, ids), b.constant(WIDTH, name="gain"), eps=1e-6)
    return b.finish(b.op("linear", h, table))


def two_readers(b: Builder) -> Graph:
    h = b.op("rms_norm", b.x, b.constant(WIDTH, name="gain"), eps=1e-6)
    router = b.op("softmax", b.linear(h, 3))
    expert = b.linear(b.op("relu", b.linear(h, 12)), 3)
    return b.finish(b.op("mul", router, expert))


GRAPHS: dict[str, tuple[Callable[[Builder], Graph], dict[Act, int], str]] = {
    # graph, the number of admitted spaces per act that it must have at least, a blocker that must be named
    "x + constant": (add_constant, {Act.PERMUTE: 1, Act.SCALE: 1, Act.SHIFT: 1, Act.ROTATE: 1}, ""),
    "1 + x": (one_plus, {Act.PERMUTE: 1, Act.SCALE: 1, Act.SHIFT: 1}, ""),
    "x * (1 + a)": (times_one_plus, {Act.PERMUTE: 1, Act.SCALE: 1}, "mul"),
    "h * h": (square, {Act.PERMUTE: 1}, "mul"),
    "gather": (gather, {Act.PERMUTE: 1, Act.SCALE: 1, Act.SHIFT: 1, Act.ROTATE: 1, Act.LINEAR: 1}, ""),
    "flip": (flip, {Act.PERMUTE: 1, Act.SCALE: 1, Act.SHIFT: 1, Act.ROTATE: 1, Act.LINEAR: 1}, ""),
    "shifting reshape": (shifting_reshape, {}, "reshape"),
    "linear used twice": (used_twice, {Act.PERMUTE: 1}, ""),
    "affine norm": (affine_norm, {Act.PERMUTE: 1, Act.SCALE: 1, Act.SHIFT: 1}, "rms_norm"),
    "hardtanh": (hard_tanh, {Act.PERMUTE: 1}, "clip"),
    "h * sigmoid(h)": (gated_norm, {Act.PERMUTE: 1}, "sigmoid"),
    "tied embedding": (tied_head, {Act.PERMUTE: 1}, ""),
    "two readers": (two_readers, {Act.SCALE: 1, Act.SHIFT: 1, Act.PERMUTE: 1}, ""),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graph(name: str) -> None:
    build, admitted, blocker = GRAPHS[name]
    graph = build(Builder())
    counts = exercise(graph, seed=1, tolerance=TOLERANCE)
    for act, least in admitted.items():
        assert counts[act] >= least, f"{act.value}: {counts[act]} spaces transformed, expected {least}"
    if blocker:
        spaces = analyse(graph)
        named = {b.node.op.name for act in Act for s in spaces.of(act) for b in s.blockers if b.node is not None}
        assert blocker in named


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_with_explicit_ops(name: str) -> None:
    """Blocked spaces too: an explicit op on each blocked edge keeps the function."""
    graph = GRAPHS[name][0](Builder())
    exercise(graph, seed=2, tolerance=TOLERANCE, acts=(Act.SCALE, Act.SHIFT), insert=True)


def test_rotation_waits_for_the_gain() -> None:
    """An affine RMSNorm blocks a rotation; with the gain folded away it does not."""
    b = Builder()
    graph = affine_norm(b)
    norms = [n.result for n in graph.nodes if n.op.name == "rms_norm"]
    blocked = [s for s in analyse(graph).of(Act.ROTATE) if any(m.value in norms for m in s.activations)]
    assert blocked and not any(s.admitted for s in blocked)
    b = Builder()
    h = b.op("rms_norm", b.linear(b.x), eps=1e-6)
    graph = b.finish(b.linear(h))
    assert exercise(graph, seed=3, tolerance=TOLERANCE, acts=[Act.ROTATE])[Act.ROTATE] >= 1


def test_weight_used_twice_ties_its_readers() -> None:
    """Where the first use reads the graph input, the tie reaches it, and nothing is admitted."""
    b = Builder()
    weight = b.constant(WIDTH, WIDTH, name="weight")
    h = b.op("relu", b.linear(b.x, weight=weight))
    graph = b.finish(b.linear(b.linear(h, weight=weight), 4))
    for act in (Act.PERMUTE, Act.SCALE):
        reasons = {blocker.reason for s in analyse(graph).of(act) for blocker in s.blockers}
        assert "graph input" in reasons
        assert not any(m.value is weight for s in analyse(graph).admitted(act) for m in s.constants)


def test_square_has_no_scale() -> None:
    """h * h: no factor may carry a scale, since both are the same value."""
    spaces = analyse(square(Builder())).of(Act.SCALE)
    reasons = [b.reason for s in spaces for b in s.blockers if b.node is not None and b.node.op.name == "mul"]
    assert reasons
