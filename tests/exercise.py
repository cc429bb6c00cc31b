"""Putting random transforms on every space that the analysis admits, and checking the function."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from helpers import check_text

from planish.ir.absorb import absorb
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph
from planish.ir.ops.base import ACTS, Act
from planish.ir.probe import random_inputs, relative_error
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import analyse
from planish.ir.transform import random_transform
from planish.ir.verifier import verify


def exercise(
    graph: Graph, *, seed: int, tolerance: float, acts: Iterable[Act] = ACTS, insert: bool = False
) -> dict[Act, int]:
    """Transform every admitted space of each act in turn (all of one act on one clone), and compare.

    Returns the number of spaces transformed per act.
    """
    check_text(graph)
    rng = np.random.default_rng(seed)
    inputs = random_inputs(graph, seed)
    expected = evaluate(graph, inputs, torch.float64)
    counts = {}
    for act in acts:
        clone = graph.clone()
        done = 0
        # one space at a time: a rewrite may retie constants, so that the next space is analysed afresh
        for number in range(len(analyse(clone).of(act))):
            spaces = analyse(clone).of(act)
            if number >= len(spaces) or not (spaces[number].admitted or insert):
                continue
            space = spaces[number]
            transform = random_transform(act, space.size, rng, labels=space.labels, positive=space.positive)
            trial = clone.clone()
            try:
                with Rewriter(trial) as rewriter:
                    absorb(rewriter, analyse(trial).of(act)[number], transform, insert=insert)
            except Declined:
                assert insert, "an admitted space was declined"
                continue
            verify(trial)
            got = evaluate(trial, inputs, torch.float64)
            for name, tensor in expected.items():
                error = relative_error(got[name], tensor)
                members = [f"{m.value}{m.axes}" for m in space.activations]
                assert error <= tolerance, f"{act.value} on {members} changed output '{name}' by {error:.3g}\n{graph}"
            clone = trial
            done += 1
        check_text(clone)
        counts[act] = done
    return counts
