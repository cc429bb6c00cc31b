"""Selective scans written step by step are raised, in every spelling; what is no selective scan is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from patterns import counts, golden, reasons, run
from scan_graphs import Spelling

from planish.ir.errors import ValidationError
from planish.ir.rewriter import Rewriter
from planish.ir.types import TensorType
from planish.passes import raise_selective_scan
from planish.passes.manager import Pipeline
from planish.passes.recurrence import Parts

PIPELINE = "raise-selective-scan"

SPELLINGS = {
    "reference": Spelling(),
    "two steps": Spelling(length=2),
    "symbolic batch": Spelling(batch="batch", zeros=False),
    "kernel layout": Spelling(states="bnt"),
    "rows last": Spelling(rows="btd"),
    "each step by itself": Spelling(fused=False),
    "input first": Spelling(association="(delta u) b"),
    "delta last": Spelling(association="delta (b u)"),
    "first input is the first state": Spelling(zeros=False),
    "sum of products": Spelling(readout="sum"),
    "joined columns": Spelling(joined="cat"),
    "joined as rows": Spelling(joined="rows"),
    "slices": Spelling(take="slice"),
    "split": Spelling(take="split"),
    "no skip": Spelling(skip=False),
    "commuted": Spelling(commuted=True),
    "rates that are computed": Spelling(constant=False),
    "several at once": Spelling(fused=False, association="delta (b u)", zeros=False, readout="sum", commuted=True),
}


def test_golden(update_golden: bool) -> None:
    before = Spelling(length=2, batch="batch", zeros=False).graph()
    after, _ = run(before, PIPELINE)
    golden("raise-selective-scan", before, after, update_golden)


@pytest.mark.parametrize("name", SPELLINGS)
def test_raised(name: str) -> None:
    spelling = SPELLINGS[name]
    after, report = run(spelling.graph(), PIPELINE)
    assert len(report.applied) == 1
    (node,) = [n for n in after.nodes if n.op.name == "selective_scan"]
    assert (node.operand(5) is not None) == (spelling.skip and spelling.joined != "rows")
    left = counts(after)
    assert "exp" not in left and "mul" not in left and "concat" not in left, left


def test_a_transpose_of_the_graph_is_used_again() -> None:
    after, _ = run(Spelling(states="bnt").graph(), PIPELINE)
    assert counts(after) == {"softplus": 1, "selective_scan": 1}  # b and c come as the row wants them


WRONG = {
    "backwards": "step 0 reads no state by position 0",
    "reads early": "step 1 reads no state by position 1",
    "reads ahead": "step 1 does not take delta b u in",
    "another rate": "step 2 reads other tensors than the steps before",
    "starts elsewhere": "the first state is neither zero nor the first input",
    "forgets": "step 3 does not carry the state of the step before on",
    "no exponential": "step 1 does not decay by exp(delta a)",
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("wrong", WRONG)
def test_not_raised(wrong: str, fused: bool) -> None:
    graph = Spelling(wrong=wrong, fused=fused).graph()
    after, report = Pipeline(PIPELINE).run(graph, validate=False)
    assert report.passes[0].applied == []
    assert "concat" in counts(after) and "selective_scan" not in counts(after)
    if wrong != "backwards":
        assert WRONG[wrong] in "\n".join(report.passes[0].misses)


def test_a_state_that_is_read_elsewhere() -> None:
    after, report = run(Spelling(wrong="gives the state away").graph(), PIPELINE)
    assert "selective_scan" not in counts(after)
    assert reasons(report) == ["an intermediate value is a graph output"]


def test_a_read_out_that_is_the_same_for_every_sequence() -> None:
    graph = Spelling(readout="matmul").graph()
    c = graph.values["c"]
    c.type = TensorType("f32", (1, *c.shape[1:]))
    for node in graph.nodes:
        if c in node.operands or node.op.name in ("gather", "unsqueeze"):
            for result, made in zip(node.results, node.op.infer(node), strict=True):
                result.type = made
    after, report = run(graph, PIPELINE)
    assert report.applied == []
    assert "matmul" in counts(after)


def test_a_part_of_the_time_is_no_scan() -> None:
    """Four steps over tensors with five positions: the fifth is left out."""
    spelling = Spelling()
    graph = spelling.graph()
    (joined,) = [n for n in graph.nodes if n.op.name == "concat"]
    with Rewriter(graph) as rewriter:
        short = rewriter.insert("concat", list(joined.operands[:-1]), {"axis": -1}, before=None).result
        graph.outputs = [("y", short)]
    _, report = Pipeline(PIPELINE).run(graph, validate=False)
    assert report.passes[0].applied == []
    assert "the tensors do not have 4 positions each" in report.passes[0].misses[0]


def test_the_validator_rejects_swapped_states(monkeypatch: pytest.MonkeyPatch) -> None:
    true = raise_selective_scan.step_parts

    def wrong(*question: Any) -> Parts | None:
        parts = true(*question)
        return parts and replace(parts, b=parts.c, c=parts.b)

    monkeypatch.setattr(raise_selective_scan, "step_parts", wrong)
    with pytest.raises(ValidationError, match="pass 'raise-selective-scan': changed the function"):
        Pipeline(PIPELINE).run(Spelling().graph())
