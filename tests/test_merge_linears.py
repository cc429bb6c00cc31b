"""Linears that read one value become one linear and a split."""

import numpy as np
import pytest
from patterns import Build, counts, golden, reasons, run

from planish.ir.errors import ValidationError
from planish.passes import merge_linears
from planish.passes.manager import Pipeline

PIPELINE = "merge-linears"


def test_golden(update_golden):
    b = Build()
    x = b("relu", b.input("x", "f32[b, 4]"))
    ys = [b("linear", x, b.random(n, 4), b.random(n, name="b")) for n in (2, 3)]
    before = b.output(b("linear", b("relu", ys[0]), b.random(4, 2)), ys[1])
    after, _ = run(before, PIPELINE)
    golden("merge-linears", before, after, update_golden)


@pytest.mark.parametrize("biases", [(0, 0, 0), (1, 1, 1), (0, 1, 0)])
@pytest.mark.parametrize("turned", [(0, 0, 0), (1, 1, 1), (0, 1, 1), (1, 0, 0)])
def test_queries_keys_and_values(biases, turned):
    b = Build()
    x = b.input("x", "f32[b, s, 8]")
    ys = []
    for bias, turn, size in zip(biases, turned, (8, 4, 4), strict=True):
        weight = b.random(8, size) if turn else b.random(size, 8)
        vector = [b.random(size)] if bias else []
        ys.append(b("reshape", b("linear", x, weight, *vector, transposed=bool(turn)), [0, 0, -1, 4]))
    after, report = run(b.output(*ys), PIPELINE)
    assert counts(after) == {"linear": 1, "split": 1, "reshape": 3}
    merged, split = list(after.nodes)[:2]
    assert split.attributes["sizes"] == (8, 4, 4)
    assert len(merged.operands) == (3 if any(biases) else 2)
    assert bool(merged.attributes.get("transposed", False)) == (sum(turned) > 1)
    assert len(report.applied) == 1
    assert merged.operands[1].constant.array().dtype == np.float32


def test_results_keep_their_names():
    b = Build()
    x = b.input("x", "f32[b, 4]")
    ys = [b("linear", x, b.random(4, 4)) for _ in range(2)]
    after, _ = run(b.output(*ys), PIPELINE)
    assert [v.name for v in list(after.nodes)[1].results] == [y.name for y in ys]


def test_unrounded_weights_stay_unrounded():
    b = Build()
    x = b.input("x", "f32[b, 4]")
    graph = b.output(b("gemm", x, b.random(4, 4), alpha=1 / 3), b("linear", x, b.random(4, 4)))
    after, _ = run(graph, "raise-linear,merge-linears")
    assert next(after.nodes).operands[1].constant.is_wide


def test_a_tied_weight_stays_by_itself():
    b = Build()
    x, table = b.input("x", "f32[b, 4]"), b.random(5, 4)
    head = b("linear", x, table)
    ys = [b("linear", x, b.random(3, 4)) for _ in range(2)]
    after, report = run(b.output(head, *ys, b("embedding", table, b.input("ids", "i64[b]"))), PIPELINE)
    assert counts(after) == {"linear": 2, "split": 1, "embedding": 1}
    assert reasons(report) == ["its weight is tied: something else reads it"]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("weight", "its weight or bias is no constant"),
        ("bias", "its weight or bias is no constant"),
        ("scalar bias", "its bias is no vector of the dtype of its weight"),
    ],
)
def test_refusals(what, reason):
    b = Build()
    x = b.input("x", "f32[b, 4]")
    match what:
        case "weight":
            odd = b("linear", x, b.input("w", "f32[5, 4]"))
        case "bias":
            odd = b("linear", x, b.random(5, 4), b.input("c", "f32[5]"))
        case _:
            odd = b("linear", x, b.random(5, 4), b.random(1))
    graph = b.output(odd, b("linear", x, b.random(3, 4)))
    after, report = run(graph, PIPELINE)
    assert after == graph
    assert reasons(report) == [reason, "too few of its siblings can be merged with it"]


def test_small_groups_stay():
    b = Build()
    x = b.input("x", "f32[b, 4]")
    graph = b.output(b("linear", x, b.random(3, 4)), b("linear", x, b.random(3, 4)))
    after, report = run(graph, "merge-linears{min-group=3}")
    assert after == graph
    assert report.misses == ["the value with most linears is read by 2 of them"]


def test_the_validator_rejects_a_forgotten_bias(monkeypatch):
    true = merge_linears._joined

    def joined(rewriter, parts, axis, dtype, nodes, port):
        parts = [p * 0.999 for p in parts] if port == 2 else parts
        return true(rewriter, parts, axis, dtype, nodes, port)

    monkeypatch.setattr(merge_linears, "_joined", joined)
    b = Build()
    x = b.input("x", "f32[b, 4]")
    graph = b.output(*(b("linear", x, b.random(3, 4), b.random(3)) for _ in range(2)))
    with pytest.raises(ValidationError, match="pass 'merge-linears': changed the function"):
        Pipeline(PIPELINE).run(graph)
