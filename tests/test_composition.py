"""Passes after passes: what a rotation leaves behind guards the norms that it went through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoder_blocks import WIDTH, pre_norm
from helpers import check_text

from planish.ir.absorb import absorb
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph
from planish.ir.ops.base import Act
from planish.ir.probe import random_inputs, relative_error
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import Space, analyse
from planish.ir.text import parse, print_graph
from planish.ir.transform import Scale, random_transform
from planish.passes.base import FOLDED, Context
from planish.passes.manager import Pipeline


def rotated() -> Graph:
    """A pre-norm block of plain RMS norms whose stream was rotated."""
    graph, _ = Pipeline("fold-norm-gain").run(pre_norm(op="rms_norm"))
    rng = np.random.default_rng(0)
    with Rewriter(graph) as rewriter:
        for space in analyse(graph).admitted(Act.ROTATE):
            transform = random_transform(Act.ROTATE, space.size, rng, labels=space.labels)
            absorb(rewriter, space, transform)
            Context().transformed(rewriter, space, transform)
    check_text(graph)
    return graph


def behind_norm(graph: Graph) -> Space:
    norm = next(n for n in graph.nodes if n.op.name == "rms_norm")
    (space,) = analyse(graph).at(norm.result, (2,), Act.SCALE)
    return space


def test_a_scale_does_not_return_into_a_folded_gain() -> None:
    graph = rotated()
    space = behind_norm(graph)
    assert space.admitted  # the algebra would allow it
    guarded = Context().guarded(graph, space)
    assert [b.reason for b in guarded.blockers] == [FOLDED]
    with Rewriter(graph) as rewriter, pytest.raises(Declined, match="its gain was folded for a rotation"):
        absorb(rewriter, guarded, Scale(np.full(WIDTH, 2.0)))


def test_it_may_stand_behind_the_norm_when_asked() -> None:
    graph = rotated()
    inputs = random_inputs(graph, 1)
    expected = evaluate(graph, inputs, torch.float64)
    norm = next(n for n in graph.nodes if n.op.name == "rms_norm")
    gain = norm.operand(1)
    with Rewriter(graph) as rewriter:
        factors = np.exp(np.random.default_rng(0).normal(size=WIDTH))
        assert absorb(rewriter, Context().guarded(graph, behind_norm(graph)), Scale(factors), insert=True) == 1
    assert norm.operand(1) is gain
    assert [n.op.name for n in norm.result.users] == ["mul"]
    for name, value in evaluate(graph, inputs, torch.float64).items():
        assert relative_error(value, expected[name]) < 1e-12


def test_the_guard_is_kept_with_the_graph() -> None:
    graph = rotated()
    again = parse(print_graph(graph), {v.name: v.constant for v in graph.constants})
    assert Context().guarded(again, behind_norm(again)).blockers


def test_without_a_rotation_the_gain_takes_scales() -> None:
    graph = pre_norm(op="rms_norm")
    space = behind_norm(graph)
    assert Context().guarded(graph, space) is space
