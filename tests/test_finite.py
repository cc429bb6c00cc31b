"""Weights that hold NaN or infinity: passes that compute with them decline, name them, and warn of nothing."""

from __future__ import annotations

import numpy as np
import pytest
from channel_blocks import conv
from encoder_blocks import WIDTH, linear, norm, pre_norm, statistics
from patterns import Build

from planish.ir.constant import Constant
from planish.ir.graph import Graph
from planish.passes.manager import Pipeline


def spoiled(graph: Graph, name: str, number: float) -> Graph:
    """A copy with one number of a constant replaced."""
    graph = graph.clone()
    value = graph.values[name]
    assert value.constant is not None
    data = value.constant.array().copy()
    data.reshape(-1)[1] = number
    value.constant = Constant.of(data, value.dtype)
    return graph


def gated() -> Graph:
    b = Build()
    x = linear(b, b.input("x", "f32[n, 4]"), 6, "up")
    return b.output(linear(b, b("mul", x, b.random(6, name="gate")), 4, "down"))


def streams() -> Graph:
    """A stream that only layer norms read."""
    b = Build()
    x = linear(b, b.input("x", "f32[n, 4]"), WIDTH, "first")
    x = b("add", x, linear(b, norm(b, x, "norm1"), WIDTH, "down"))
    return b.output(linear(b, norm(b, x, "norm2"), 4, "last"))


def batch_norms() -> Graph:
    """One behind its layer, one before two."""
    b = Build()
    one, two = (([b.random(4, name=n) for n in ("g", "b", "m")], b.constant(np.ones(4), name="v")) for _ in range(2))
    x = b("batch_norm", conv(b, b.input("x", "f32[n, 4, 3, 3]"), 4, "before"), *one[0], one[1])
    x = b("batch_norm", b("relu", x), *two[0], two[1])
    return b.output(conv(b, x, 3, "first"), conv(b, x, 3, "second"))


RMS = {"op": "rms_norm"}
# pipeline: the graph, the constant that is spoiled, whether statistics are given, and the start of the reason
CASES = {
    "scale-channels": (pre_norm, {}, "up.weight", ""),
    "scale-channels{method=balance}": (pre_norm, {}, "up.weight", ""),
    "permute-channels{group=2}": (pre_norm, {}, "up.weight", ""),
    "shift-channels": (pre_norm, {}, "up.weight", ""),
    "reparameterize-norm": (pre_norm, {}, "up.weight", ""),
    "fold-norm-gain": (pre_norm, {}, "up.weight", "gain: "),
    "center-layer-norm": (streams, {}, "down.weight", ""),
    "fold-norm-gain,rotate-channels": (pre_norm, RMS, "down.weight", ""),
    "fold-norm-gain,rotate-channels{space=value}": (pre_norm, RMS, "v.weight", ""),
    "transform-channels": (pre_norm, {}, "v.weight", ""),
    "insert-hadamard": (pre_norm, {}, "down.weight", ""),
    "fold-gates": (gated, {}, "up.weight", ""),
    "fold-gates ": (gated, {}, "gate", ""),
}
WITH_STATISTICS = ("scale-channels", "shift-channels", "reparameterize-norm")


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("text", CASES)
def test_it_declines_and_names_the_constant(text: str, number: float) -> None:
    make, options, name, prefix = CASES[text]
    clean = make(**options)
    stats = statistics(clean) if text in WITH_STATISTICS else None
    graph = spoiled(clean, name, number)
    after, report = Pipeline(text).run(graph, stats=stats)  # a warning is an error
    what = "NaN" if np.isnan(number) else "infinity"
    assert f"{prefix}the constant %{name} holds {what}" in report.passes[-1].declined
    assert after.values[name].constant == graph.values[name].constant
    _, whole = Pipeline(text).run(clean, stats=stats)
    assert len(whole.passes[-1].applied) > len(report.passes[-1].applied)


@pytest.mark.parametrize("name", ["before.weight", "first.weight", "second.weight", "second.bias", "g", "v"])
def test_batch_norms(name: str) -> None:
    graph = spoiled(batch_norms(), name, np.nan)
    after, report = Pipeline("fold-batch-norm").run(graph)
    (reason,) = report.passes[0].declined
    assert f"the constant %{name} holds NaN" in reason
    assert sum(n.op.name == "batch_norm" for n in after.nodes) == 1
    for each in ("first.weight", "second.weight") if name != "before.weight" else ():
        changed = after.values[each].constant != graph.values[each].constant
        assert changed == (name in ("g", "v"))
