"""Random quantised graphs through their emitted kernels, in the interpreter: what the evaluator gives.

float32 throughout, so that a code differs only where a ratio lies on a tie to a rounding (`kernels/quantize_rows.py`);
the seeds are fixed, and none of these graphs has one.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from random_graphs import random_graph
from test_select import FORMATS, quantised

from planish.codegen.select import Options, select
from planish.ir.evaluator import evaluate
from planish.ir.probe import relative_error

CLOSE = 1e-5  # relative; sums of at most 64 products in another order, through at most a dozen layers


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [6, 20, 42, 61, 88, 112, 118, 124])
@pytest.mark.parametrize("closing", [True, False])
def test_random_graphs(seed: int, closing: bool) -> None:
    from planish.codegen.triton_run import Runner

    drawn = random.Random(seed)
    steps = [
        (drawn.randrange(48), drawn.randrange(8), drawn.randrange(8), drawn.randrange(4))
        for _ in range(drawn.randrange(2, 10))
    ]
    graph = random_graph(steps, seed)
    rng = np.random.default_rng(seed)
    shape = [int(str(d)) for d in graph.inputs[0].shape or ()]
    batch = {"x": rng.normal(size=shape).astype(np.float32), "ids": rng.integers(0, 7, (2, 3))}
    made = quantised(graph, FORMATS[seed % len(FORMATS)], [batch])
    plan = select(made, Options(closing=closing))
    runner = Runner(plan, "f32")
    got, expected = runner.run(batch), evaluate(made, batch)
    closing = sum(bool(r.kernel.closing) for r in plan.kernels if r.kernel is not None)
    assert runner.launched - len(plan.kernels) in (0, closing) and plan.kernels
    for name, value in expected.items():
        assert relative_error(got[name].double(), value.double()) < CLOSE, name
