"""After every pass the statistics say of each value what collecting them anew would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from channel_blocks import calibration as random_batches
from channel_blocks import convolutions
from encoder_blocks import linear, post_norm, pre_norm, record
from patterns import Build
from test_finite import batch_norms, streams
from test_fold_gates import conv_scale, head_gates, layer_scale, multipliers

from planish.calibrate.collect import collect
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph
from planish.ir.rewriter import Rewriter
from planish.ir.stats import Stats
from planish.passes.base import Context, Exactness, Pass, PassReport
from planish.passes.manager import Pipeline
from planish.passes.pipeline import REGISTRY, make_pass, parse_pipeline, pass_class

ROWS = 1000  # all there are: extremes and moments of samples are then those of the data


def arithmetic() -> Graph:
    """What the raising passes read: norms, linears and activations in parts; a norm between casts."""
    b = Build()
    x = b("add", b("matmul", b.input("x", "f32[batch, tokens, 6]"), b.random(6, 8)), b.random(8))
    centred = b("sub", x, b("reduce_mean", x, axes=(-1,), keepdims=True))
    variance = b("reduce_mean", b("mul", centred, centred), axes=(-1,), keepdims=True)
    h = b("div", centred, b("sqrt", b("add", variance, np.float32(1e-5))))
    h = b("add", b("mul", h, b.random(8)), b.random(8))
    h = b("add", b("matmul", h, b.random(8, 8)), b.random(8))
    h = b("add", x, b("matmul", b("mul", h, b("sigmoid", h)), b("transpose", b.random(8, 8), perm=(1, 0))))
    root = b("sqrt", b("add", b("reduce_mean", b("mul", h, h), axes=(-1,), keepdims=True), np.float32(1e-6)))
    h = b("mul", b("div", h, b("expand", root, b("shape", h))), b.random(8))
    return b.output(b("matmul", h, b.random(8, 4)), b("matmul", h, b.random(8, 5)))


def batch_norms_in_rows() -> Graph:
    """A batch norm behind a linear, by way of a node that changes nothing, and one that only its reader takes up."""
    b = Build()
    ones = b.constant(np.full(6, 0.5), name="v")
    h = b("identity", linear(b, b.input("x", "f32[n, 4]"), 6, "first"))
    h = b("relu", b("batch_norm", h, b.random(6), b.random(6), b.random(6), ones))
    h = b("batch_norm", h, b.random(6), b.random(6), b.random(6), ones)
    return b.output(linear(b, h, 3, "last"))


GRAPHS = {
    f.__name__: f
    for f in (
        arithmetic, batch_norms, batch_norms_in_rows, conv_scale, convolutions, head_gates, layer_scale, multipliers,
        post_norm, pre_norm, streams,
    )
}  # fmt: skip
EXACT = [n for n in REGISTRY if pass_class(n).exactness in (Exactness.EXACT, Exactness.IDENTITY)]
TEXTS = [
    *EXACT, "scale-channels{insert=true min-gain=0}", "scale-channels{method=balance}", "permute-channels{group=2}",
    "rotate-channels{untie=true}", "fold-norm-gain{untie=true}", "insert-hadamard{sites=all}",
    "shift-channels{min-gain=0}", "transform-channels{kind=block block=2}", "isolate-outliers{count=2 ratio=1}",
    "raise,scale-channels{insert=true min-gain=0},fold-gates", "raise,fold-norm-gain,rotate-channels,insert-hadamard",
    "insert-hadamard{sites=all},merge-hadamards", "raise,merge-linears,scale-channels{min-gain=0}",
    "extract-low-rank{rank=2 iterations=2 grid=4}", "extract-low-rank{rank=2 fold=true iterations=2 grid=4}",
]  # fmt: skip


def calibration(graph: Graph) -> list[dict[str, np.ndarray]]:
    """Random batches; whole numbers for tokens."""
    whole = graph.inputs[0].dtype == "i64"
    return [{k: (v * 3).astype(np.int64) % 10 if whole else v for k, v in b.items()} for b in random_batches(graph)]


def everything(graph: Graph, batches: Sequence[Mapping[str, np.ndarray]]) -> Stats:
    """What `collect` collects, and all other activations of floats along their last axes."""
    stats = collect(graph, batches, rows=ROWS)
    for value in [v for n in graph.nodes for v in n.results if v.dtype == "f32" and v.name not in stats and v.rank]:
        seen = [evaluate(graph, {k: torch.from_numpy(v) for k, v in b.items()}, keep=[value.name]) for b in batches]
        stats.channels[value.name] = record(np.concatenate([s[value.name].flatten(0, -2).numpy() for s in seen]))
    return stats


def stale(graph: Graph, stats: Stats, batches: Sequence[Mapping[str, np.ndarray]]) -> list[str]:
    """The values of which the statistics say what is not so."""
    names = [n for n in stats if n in graph.values and not graph.values[n].is_constant]
    seen = [evaluate(graph, {k: torch.from_numpy(v) for k, v in b.items()}, torch.float64, keep=names) for b in batches]
    found = []
    for name in names:
        held = stats.of(name)
        parts = [s[name].movedim(held.axis, -1).reshape(-1, len(held.minimum)).double().numpy() for s in seen]
        rows = np.concatenate(parts)
        size = np.abs(rows).max() + 1e-6
        apart = max(
            np.abs(rows.min(0) - held.minimum).max() / size,
            np.abs(rows.max(0) - held.maximum).max() / size,
            np.abs((rows**2).mean(0) - held.mean_square).max() / size**2,
        )
        if apart > 1e-3:
            found.append(f"{name}: {apart:.3g}")
    return found


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("text", TEXTS)
def test_the_statistics_are_true(kind: str, text: str) -> None:
    graph = GRAPHS[kind]()
    batches = calibration(graph)
    context = Context(everything(graph, batches))
    assert context.stats is not None and not stale(graph, context.stats, batches)
    for instance in parse_pipeline(text):
        instance.run(graph, context)
        assert stale(graph, context.stats, batches) == [], instance.name


def test_it_would_be_seen() -> None:
    graph = layer_scale()
    batches = calibration(graph)
    stats = everything(graph, batches)
    make_pass("fold-gates", {}).run(graph, Context())
    assert stale(graph, stats, batches) != []


def test_a_name_that_is_taken_again() -> None:
    """What was known of a value that is gone is not said of a later one of its name."""
    seen = []

    @dataclass(frozen=True)
    class Drop(Pass):
        name = "drop"
        exactness = Exactness.LOSSY

        def run(self, graph: Graph, context: Context) -> PassReport:
            with Rewriter(graph) as rewriter:
                node = next(n for n in graph.nodes if n.op.name == "tanh")
                assert node.operands[0] is not None
                rewriter.replace_node(node, node.operands[0])
            return PassReport(self.name)

    @dataclass(frozen=True)
    class Make(Pass):
        name = "make"
        exactness = Exactness.LOSSY

        def run(self, graph: Graph, context: Context) -> PassReport:
            assert context.stats is not None
            with Rewriter(graph) as rewriter:
                node = rewriter.insert("tanh", [graph.inputs[0]], before=next(iter(graph.nodes)))
                rewriter.replace(graph.inputs[0], node.result)
                seen.append((node.result.name, node.result.name in context.stats))
            return PassReport(self.name)

    b = Build()
    h = b("tanh", linear(b, b.input("x", "f32[n, 4]"), 4, "first"))
    graph = b.output(linear(b, h, 4, "last"))
    Pipeline([Drop(), Make()]).run(graph, stats=everything(graph, calibration(graph)))
    assert seen == [("tanh", False)]
