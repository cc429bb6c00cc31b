"""Graphs on which an admitted transform once changed the function, each for a reason of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from exercise import exercise
from patterns import Build

from planish.calibrate.collect import collect
from planish.ir.absorb import absorb
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph, Value
from planish.ir.ops import get
from planish.ir.ops.base import Act
from planish.ir.probe import random_inputs, relative_error
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import analyse
from planish.ir.transform import random_transform
from planish.passes.base import Context
from planish.passes.fold_batch_norm import FoldBatchNorm
from planish.passes.manager import Pipeline


def linear(b: Build, x: Value, outputs: int, bias: Value | None = None) -> Value:
    assert x.shape is not None
    return b("linear", x, b.random(outputs, int(x.shape[-1])), bias)  # type: ignore[arg-type]


def tokens_and_channels() -> Graph:
    """One linear reads the channels of a jointly written tensor, another its tokens."""
    b = Build()
    h = b("reshape", linear(b, b.input("x", "f32[2, 4]"), 24), np.array([2, 4, 6]))
    mixed = b("transpose", linear(b, b("transpose", h, perm=(0, 2, 1)), 4), perm=(0, 2, 1))
    return b.output(linear(b, mixed, 3))


def product_of_jointly_written() -> Graph:
    """A product of two activations whose factors are written, and whose result is read, on three axes at once."""
    b = Build()
    x = b.input("x", "f32[2, 4]")
    left = b("reshape", linear(b, x, 24), np.array([2, 3, 2, 4]))
    right = b("reshape", linear(b, x, 24), np.array([2, 3, 4, 2]))
    return b.output(linear(b, b("reshape", b("matmul", left, right), np.array([2, 12])), 2))


def crossing_axes() -> Graph:
    """A constant that would take a factor up on each of two axes."""
    b = Build()
    h = b("reshape", linear(b, b.input("x", "f32[2, 4]"), 9), np.array([2, 3, 3]))
    part, rest = b.graph.append(get("split"), [h], {"axis": -1, "sizes": (1, 2)}).results
    scaled = b("mul", part, b.random(2, 3, 1))
    return b.output(linear(b, scaled, 3), linear(b, b("transpose", rest, perm=(1, 2, 0)), 2))


def table_and_bias() -> Graph:
    """A rotary table that is a linear's bias as well."""
    b = Build()
    x = b.input("x", "f32[2, 3, 4]")
    table, other = b.random(4), b.random(4)
    turned = b("rope", linear(b, x, 4), table, other)
    return b.output(linear(b, linear(b, x, 4, table), 2), linear(b, turned, 2))


def table_and_bias_of_what_turns() -> Graph:
    """A rotary table that is the bias of the linear in front of the rope: shared and private in one space."""
    b = Build()
    table, other = b.random(4), b.random(4)
    h = linear(b, b.input("x", "f32[2, 3, 4]"), 4, table)
    return b.output(linear(b, b("rope", h, other, table), 2))


def one_number_twice() -> Graph:
    """A constant of one element that is a bias here and is spread along the channels there."""
    b = Build()
    x, c = b.input("x", "f32[2, 3, 4]"), b.random(1)
    return b.output(linear(b, b("add", linear(b, x, 4), c), 2), linear(b, linear(b, x, 1, c), 2))


def own_copy_on_another_axis() -> Graph:
    """A constant that is spread along one axis for a rotation and carries its inverse on the other."""
    b = Build()
    h = b("reshape", linear(b, b.input("x", "f32[2, 4]"), 12), np.array([2, 4, 3]))
    square = b("add", b.random(3, 3), b.random(3, 1))
    return b.output(linear(b, b("reshape", b("sub", b("matmul", h, square), h), np.array([2, 12])), 3))


def computed_gain() -> Graph:
    """A batch norm whose gain is computed."""
    b = Build()
    h = b("conv", b.input("x", "f32[2, 4, 5]"), b.random(6, 4, 1), b.random(6))
    variance = b.constant(np.full(6, 0.5))
    y = b("batch_norm", h, b("neg", b.random(6)), b.random(6), b.random(6), variance)
    return b.output(b("conv", y, b.random(3, 6, 1), b.random(3)))


def computed_kernel(op: str = "conv") -> Graph:
    """A depthwise convolution with weight norm."""
    b = Build()
    h = b("conv", b.input("x", "f32[2, 4, 5]"), b.random(6, 4, 1), b.random(6))
    y = b(op, h, b("mul", b.random(6, 1, 3), b.random(6, 1, 1)), b.random(6), groups=6)
    return b.output(b("conv", y, b.random(3, 6, 1), b.random(3)))


def narrow_table() -> Graph:
    """A rotary table of one angle that is computed."""
    b = Build()
    x = b.input("x", "f32[2, 3, 4]")
    turned = b("rope", linear(b, x, 4), linear(b, x, 1), b.random(3, 4), interleaved=True)
    return b.output(linear(b, turned, 2))


GRAPHS: list[Callable[[], Graph]] = [
    tokens_and_channels,
    product_of_jointly_written,
    crossing_axes,
    table_and_bias,
    table_and_bias_of_what_turns,
    one_number_twice,
    own_copy_on_another_axis,
    computed_gain,
    computed_kernel,
    lambda: computed_kernel("conv_transpose"),
    narrow_table,
]


@pytest.mark.parametrize("make", GRAPHS, ids=lambda f: f.__name__)
def test_what_is_admitted_is_exact(make: Callable[[], Graph]) -> None:
    for seed in range(3):
        exercise(make(), seed=seed, tolerance=1e-11)


@pytest.mark.parametrize("make", GRAPHS, ids=lambda f: f.__name__)
def test_all_spaces_of_one_analysis_together(make: Callable[[], Graph]) -> None:
    for act in Act:
        graph = make()
        inputs = random_inputs(graph, 0)
        expected = evaluate(graph, inputs, torch.float64)
        rng = np.random.default_rng(0)
        with Rewriter(graph) as rewriter:
            for space in analyse(graph).admitted(act):
                absorb(rewriter, space, random_transform(act, space.size, rng, labels=space.labels))
        for name, value in evaluate(graph, inputs, torch.float64).items():
            assert relative_error(value, expected[name]) < 1e-11, act


def grouped_maximum() -> Graph:
    """A tensor that an op reads on two of its axes and a linear on one: an explicit op would stand there twice."""
    b = Build()
    h = b("reshape", linear(b, b.input("x", "f32[2, 4]"), 6), np.array([2, 3, 2]))
    return b.output(linear(b, b("tanh", h), 3), linear(b, h, 3), linear(b, b("reshape", h, np.array([2, 6])), 2))


@pytest.mark.parametrize("act", [Act.SCALE, Act.SHIFT, Act.PERMUTE, Act.ROTATE])
def test_explicit_ops_are_exact_or_declined_untouched(act: Act) -> None:
    for make in (*GRAPHS, grouped_maximum):
        for number in range(len(analyse(make()).of(act))):
            graph = make()
            before, inputs = str(graph), random_inputs(graph, 0)
            expected = evaluate(graph, inputs, torch.float64)
            space = analyse(graph).of(act)[number]
            transform = random_transform(act, space.size, np.random.default_rng(1), labels=space.labels)
            with Rewriter(graph) as rewriter:
                try:
                    absorb(rewriter, space, transform, insert=True)
                except Declined:
                    assert str(graph) == before
                    continue
            for name, value in evaluate(graph, inputs, torch.float64).items():
                assert relative_error(value, expected[name]) < 1e-11, (make, number)


def test_statistics_follow_a_batch_norm_into_its_layer() -> None:
    b = Build()
    h = b("conv", b.input("x", "f32[2, 4, 5]"), b.random(6, 4, 1), b.random(6))
    variance = b.constant(np.full(6, 0.01))
    y = b("batch_norm", h, b.random(6), b.random(6), b.random(6), variance)
    graph = b.output(b("conv", y, b.random(3, 6, 1), b.random(3)))
    inputs = [random_inputs(graph, seed) for seed in range(2)]
    seen = {}
    stats = collect(graph, inputs)
    context = Context(stats.copy())
    folded = graph.clone()
    FoldBatchNorm().run(folded, context)
    fresh = collect(folded, inputs)
    assert context.stats is not None
    for node in folded.nodes:
        name = node.result.name
        if name in context.stats and name in fresh:
            seen[name] = np.abs(context.stats.of(name).maximum - fresh.of(name).maximum).max()
    assert seen and max(seen.values()) < 1e-4
    after, _ = Pipeline("fold-batch-norm,scale-channels{method=smoothquant}").run(graph, stats=stats)
    assert len(after) == 2
