"""One pass over a graph with all batches: the same values as the evaluator, and nothing kept that nobody reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decoder_blocks import decoder
from encoder_blocks import BLOCKS, WIDTH, data, linear, pre_norm
from helpers import check_text, random_inputs
from patterns import Build

from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph, Value
from planish.ir.rewriter import Rewriter
from planish.ir.sweep import Sweep, evaluate_batches


def read(graph: Graph) -> list[Value]:
    """What the linears read, in the order of the graph."""
    found = dict.fromkeys(n.operands[0] for n in graph.nodes if n.op.name == "linear")
    return [v for v in found if v is not None]


def same(graph: Graph, batches: list[dict[str, np.ndarray]], value: Value, tensors: list[torch.Tensor]) -> bool:
    expected = [evaluate(graph, batch, keep=[value.name])[value.name] for batch in batches]
    return all(torch.equal(a, b) for a, b in zip(expected, tensors, strict=True))


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_value_is_that_of_the_evaluator(kind: str) -> None:
    graph, batches = BLOCKS[kind](), data()
    sweep = Sweep(graph, batches, targets=read(graph))
    for value in read(graph):
        assert same(graph, batches, value, sweep.tensors(value))
        assert sweep.tensors(value) is sweep.tensors(value)  # asked again: not computed again


def test_a_graph_with_constants_that_are_computed() -> None:
    graph = decoder()
    check_text(graph)
    batches = [random_inputs(graph, seed, {"batch": 2, "tokens": 3 + seed}) for seed in range(3)]
    sweep = Sweep(graph, batches, targets=read(graph))
    for value in read(graph):
        assert same(graph, batches, value, sweep.tensors(value))


def test_what_is_rewritten_on_the_way_is_seen_by_what_follows() -> None:
    """Each linear gets another weight after it was asked about; in the end the whole graph is the new one."""
    graph, batches = pre_norm(), data()
    values = read(graph)
    sweep = Sweep(graph, batches, targets=values)
    seen = {}
    with Rewriter(graph) as rewriter:
        for node in [n for n in graph.nodes if n.op.name == "linear"]:
            x, weight = node.operands[:2]
            assert x is not None and weight is not None and weight.constant is not None
            if x not in seen:
                seen[x] = [t.clone() for t in sweep.tensors(x)]
            half = np.round(weight.constant.wide())
            codes = rewriter.constant(Constant.of(half.astype(np.int8)), "codes")
            one = rewriter.constant(Constant.of(np.float32(1.0)), "one")
            made = rewriter.insert("dequantize", [codes, one], before=node)
            rewriter.set_operand(node, 1, made.result)
    for value in values:
        assert same(graph, batches, value, seen[value])
    last = graph.outputs[0][1]
    assert last.producer is not None
    assert same(graph, batches, last, sweep.tensors(last))


def test_a_node_put_behind_what_was_asked_for() -> None:
    graph, batches = pre_norm(), data()
    sweep = Sweep(graph, batches, targets=read(graph))
    value = read(graph)[1]
    sweep.tensors(value)
    with Rewriter(graph) as rewriter:
        reader = value.users[0]
        made = rewriter.insert("neg", [value], before=reader).result
        rewriter.set_operand(reader, 0, made)
        assert all(torch.equal(a, -b) for a, b in zip(sweep.tensors(made), sweep.tensors(value), strict=True))
    assert same(graph, batches, read(graph)[2], sweep.tensors(read(graph)[2]))


def test_what_stands_for_a_value_is_kept_while_that_has_readers() -> None:
    """x is read first and last; its rounding takes its place in the first reader, later in the last."""
    b = Build()
    x = b.input("x", "f32[n, 6]")
    h = b("linear", x, b.random(6, 6))
    graph = b.output(b("add", b("linear", b("relu", h), b.random(3, 6)), b("linear", x, b.random(3, 6))))
    first, second, last = (n for n in graph.nodes if n.op.name == "linear")
    sweep = Sweep(graph, [{"x": np.ones((4, 6), np.float32)}], targets=read(graph))
    with Rewriter(graph) as rewriter:
        rounded = rewriter.insert("round", [x], before=first).result
        rewriter.set_operand(first, 0, rounded)
        moment = sweep.second_moment(rounded, stands_for=x)
        assert second.operands[0] is not None
        sweep.second_moment(second.operands[0])
        rewriter.set_operand(last, 0, rounded)
        assert sweep.second_moment(rounded, stands_for=x) is moment
    check_text(graph)


def chain(length: int) -> Graph:
    b = Build()
    x = b.input("x", f"f32[batch, {WIDTH}]")
    for i in range(length):
        x = b("relu", linear(b, x, WIDTH, f"l{i}"))
    return b.output(x)


def test_the_frontier_does_not_grow_with_depth() -> None:
    peaks = []
    for length in (3, 12):
        graph = chain(length)
        rows = [{"x": np.ones((16, WIDTH), np.float32)} for _ in range(4)]
        sweep = Sweep(graph, rows, targets=read(graph))
        for value in read(graph):
            sweep.tensors(value)
        assert sweep.held == 4 * 16 * WIDTH * 4  # the last one alone
        peaks.append(sweep.peak)
    assert peaks[0] == peaks[1]


def test_what_no_target_needs_is_never_held() -> None:
    b = Build()
    x = b.input("x", f"f32[batch, {WIDTH}]")
    h = linear(b, x, WIDTH, "a")
    wide = b("concat", h, h, h, h, axis=-1)
    graph = b.output(linear(b, b("relu", h), 2, "b"), wide)
    rows = [{"x": np.ones((16, WIDTH), np.float32)}]
    sweep = Sweep(graph, rows, targets=read(graph))
    for value in read(graph):
        sweep.tensors(value)
    assert sweep.held == 16 * WIDTH * 4
    with pytest.raises(PlanishError) as caught:
        sweep.tensors(wide)
    assert caught.value.what == "sweep: %concat is behind what is still held"
    assert caught.value.hint == "ask in the order of the graph, and name what will be asked for as a target"


def test_second_moments() -> None:
    """(2 / T) X^T X over the rows that count, whatever the batches."""
    b = Build()
    x = b.input("x", f"f32[batch, tokens, {WIDTH}]")
    mask = b.input("mask", "i64[batch, tokens]")
    graph = b.output(linear(b, b("relu", x), 2, "a"), b("identity", mask))
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(6, 5, WIDTH)).astype(np.float32)
    kept = rng.integers(0, 2, (6, 5))
    value = read(graph)[0]
    wide = np.maximum(rows, 0).astype(np.float64)
    for counted, masks in ((np.ones_like(kept), None), (kept, "mask")):
        chosen = wide[counted == 1]
        expected = 2 / len(chosen) * chosen.T @ chosen
        for size in (1, 2, 6):
            batches = [{"x": rows[i : i + size], "mask": kept[i : i + size]} for i in range(0, 6, size)]
            got = Sweep(graph, batches, targets=[value], row_mask=masks).second_moment(value)
            assert got.dtype == torch.float64
            assert np.allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)
    nothing = [{"x": rows, "mask": np.zeros_like(kept)}]
    with pytest.raises(PlanishError, match="calibration: no row of %relu counts"):
        Sweep(graph, nothing, targets=[value], row_mask="mask").second_moment(value)


def test_what_a_sweep_is_refused() -> None:
    graph = pre_norm()
    with pytest.raises(PlanishError, match="calibration: no data; expected at least one batch"):
        Sweep(graph, [])
    with pytest.raises(PlanishError, match="input 'x': is missing"):
        Sweep(graph, [{}])
    with pytest.raises(PlanishError, match="row mask 'm': not an input of the graph; expected one of x"):
        Sweep(graph, data(), row_mask="m")
    with pytest.raises(PlanishError, match="is no activation of this graph"):
        Sweep(graph, data()).tensors(graph.values["first.weight"])


def test_whole_graphs_batch_by_batch() -> None:
    graph, batches = pre_norm(), data()
    out = graph.outputs[0][1]
    for batch, rows in zip(batches, evaluate_batches(graph, batches, {out: -1}), strict=True):
        expected = evaluate(graph, batch)[out.name]
        assert torch.equal(rows[out], expected.reshape(-1, expected.shape[-1]))
