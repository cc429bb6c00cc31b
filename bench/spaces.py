"""The cost of the channel-space analysis on generated encoders of 10^3, 10^4 and 10^5 nodes.

    python bench/spaces.py [--quick] [--json FILE]

Target (issue A, 6): 100,000 nodes in under 10 s, all five acts together; near-linear growth.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from common import Outcome, Target, arguments, note, table

from planish.ir.constant import Constant
from planish.ir.graph import Graph, Value
from planish.ir.ops import get
from planish.ir.ops.base import ACTS
from planish.ir.spaces import analyse
from planish.ir.types import TensorType

WIDTH, HEADS, HIDDEN = 32, 4, 64


def encoder(nodes: int) -> Graph:
    """A pre-norm encoder with about that many nodes: attention written out, a gated MLP, residual sums."""
    graph = Graph("encoder")
    rng = np.random.default_rng(0)
    shared: dict[str, Value] = {}

    def constant(name: str, *shape: int) -> Value:
        data = rng.normal(size=shape).astype(np.float32)
        return graph.add_constant(graph.fresh_name(name), Constant.of(data))

    def integers(*values: int) -> Value:
        key = f"shape_{'_'.join(map(str, values))}"
        if key not in shared:
            shared[key] = graph.add_constant(graph.fresh_name("shape"), Constant.of(np.array(values)))
        return shared[key]

    def op(name: str, *operands: Value, **attributes: object) -> Value:
        return graph.append(get(name), operands, attributes).result  # type: ignore[arg-type]

    def linear(x: Value, outputs: int) -> Value:
        assert x.shape is not None
        return op("linear", x, constant("weight", outputs, int(x.shape[-1])), constant("bias", outputs))  # type: ignore[arg-type]

    def heads(x: Value) -> Value:
        return op("transpose", op("reshape", x, integers(0, -1, HEADS, WIDTH // HEADS)), perm=(0, 2, 1, 3))

    x = graph.add_input("x", TensorType("f32", ("batch", "sequence", WIDTH)))
    scale = graph.add_constant("scale", Constant.of(np.float32(0.35)))
    while len(graph) < nodes:
        h = op("layer_norm", x, constant("gain", WIDTH), constant("beta", WIDTH), eps=1e-5)
        q, k, v = (heads(linear(h, WIDTH)) for _ in range(3))
        scores = op("mul", op("matmul", q, op("transpose", k, perm=(0, 1, 3, 2))), scale)
        mixed = op("matmul", op("softmax", scores, axis=-1), v)
        merged = op("reshape", op("transpose", mixed, perm=(0, 2, 1, 3)), integers(0, -1, WIDTH))
        x = op("add", x, linear(merged, WIDTH))
        h = op("layer_norm", x, constant("gain", WIDTH), constant("beta", WIDTH), eps=1e-5)
        gated = op("mul", op("silu", linear(h, HIDDEN)), linear(h, HIDDEN))
        x = op("add", linear(gated, WIDTH), x)
    graph.add_output("y", x)
    return graph


def main() -> int:
    options = arguments(__doc__.splitlines()[0])
    outcome = Outcome("spaces")
    rows = []
    for nodes in (1_000, 10_000) if options.quick else (1_000, 10_000, 100_000):
        graph = encoder(nodes)
        note(f"{len(graph)} nodes")
        seconds = {}
        spaces = analyse(graph)
        start = time.perf_counter()
        for act in ACTS:
            begin = time.perf_counter()
            spaces.of(act)
            seconds[act.value] = time.perf_counter() - begin
        total = time.perf_counter() - start
        admitted = sum(len(spaces.admitted(act)) for act in ACTS)
        rows.append([len(graph), *seconds.values(), total, total / len(graph) * 1e6, admitted])
        outcome.figures[str(nodes)] = {"seconds": total, "nodes": len(graph), "admitted": admitted, **seconds}
    table("channel spaces", ["nodes", *(a.value for a in ACTS), "total s", "us / node", "admitted"], rows)
    growth = (rows[-1][-3] / rows[0][-3]) / (rows[-1][0] / rows[0][0])
    outcome.targets.append(Target("growth over linear", growth, 2.0))
    # --quick extrapolates linearly from its largest graph
    outcome.targets.append(Target("seconds at 100000 nodes", rows[-1][-2] * 0.1, 10.0))
    return outcome.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
