"""Building small graphs, running passes on them, and the golden texts in tests/golden/."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import check_text

from planish.ir import ops
from planish.ir.constant import Constant
from planish.ir.graph import Graph, Value
from planish.ir.parser import parse_type
from planish.ir.text import print_graph
from planish.ir.verifier import verify
from planish.passes.base import PassReport
from planish.passes.manager import Pipeline

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-10  # relative, in float64


class Build:
    """A graph under construction; a number or array as an operand becomes a constant (float32, or int64)."""

    def __init__(self, seed: int = 0) -> None:
        self.graph = Graph("main")
        self.rng = np.random.default_rng(seed)

    def input(self, name: str, type: str) -> Value:
        return self.graph.add_input(name, parse_type(type))

    def constant(self, data: Any, dtype: str | None = None, name: str = "c") -> Value:
        array = np.asarray(data)
        if dtype is None:
            dtype = {"f": "f32", "i": "i64", "b": "bool"}[array.dtype.kind]
            array = array.astype(np.float32) if dtype == "f32" else array
        return self.graph.add_constant(self.graph.fresh_name(name), Constant.of(array, dtype))

    def random(self, *shape: int, dtype: str = "f32", name: str = "w") -> Value:
        data = self.rng.normal(size=shape).astype(np.float32)
        return self.graph.add_constant(self.graph.fresh_name(name), Constant.of(data, dtype))

    def __call__(self, op: str, *operands: Any, **attributes: Any) -> Value:
        values = [v if isinstance(v, Value) or v is None else self.constant(v) for v in operands]
        return self.graph.append(ops.get(op), values, attributes).result

    def output(self, *values: Value) -> Graph:
        for value in values:
            self.graph.add_output(value.name, value)
        verify(self.graph)
        check_text(self.graph)
        return self.graph


def counts(graph: Graph) -> dict[str, int]:
    return dict(Counter(n.op.name for n in graph.nodes))


def run(graph: Graph, pipeline: str) -> tuple[Graph, PassReport]:
    """Run a pipeline, validated; a second run must find nothing to do. The report of the last pass."""
    after, report = Pipeline(pipeline).run(graph, validate=True)
    assert report.validated, report.unchecked
    for done in report.passes:
        assert done.error is None or done.error <= TOLERANCE
        assert done.checked_narrow == 0
    check_text(after)
    again, second = Pipeline(pipeline).run(after, validate=False)
    assert [p.applied for p in second.passes] == [[]] * len(second.passes)
    assert again == after
    return after, report.passes[-1]


def golden(name: str, before: Graph, after: Graph, update: bool) -> None:
    """Compare the texts before and after with tests/golden/<name>.ir; a missing file fails."""
    text = f"# before\n{print_graph(before)}\n# after\n{print_graph(after)}"
    path = GOLDEN / f"{name}.ir"
    if update:
        path.write_text(text)
        return
    if not path.exists():
        pytest.fail(f"{path} is missing: run pytest with --update-golden")
    assert text == path.read_text()


def reasons(report: PassReport) -> Sequence[str]:
    return list(report.declined)
