"""Products with constants become linears and embeddings, whatever gemm's attributes say."""

import itertools

import numpy as np
import pytest
from patterns import Build, counts, golden, reasons, run

from planish.ir.errors import ValidationError
from planish.passes import raise_linear
from planish.passes.manager import Pipeline


def test_matmul_and_bias_golden(update_golden):
    b = Build()
    y = b("add", b.random(5, name="bias"), b("matmul", b.input("x", "f32[b, s, 4]"), b.random(4, 5)))
    before = b.output(y)
    after, _ = run(before, "raise-linear")
    golden("raise-linear", before, after, update_golden)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 1, 5), (), (1,)])
@pytest.mark.parametrize("swap", [False, True])
def test_bias_shapes(shape, swap):
    b = Build()
    product = b("matmul", b.input("x", "f32[b, s, 4]"), b.random(4, 5))
    bias = b.random(*shape, name="bias")
    y = b("add", bias, product) if swap else b("add", product, bias)
    after, _ = run(b.output(b("relu", y)), "raise-linear")
    assert counts(after) == {"linear": 1, "relu": 1}
    linear = next(after.nodes)
    assert linear.attributes["transposed"] is True
    assert linear.operands[2].shape == (5,)
    assert linear.operands[1].name == "w"  # the constant itself: no data moved


def test_vector_input():
    b = Build()
    after, _ = run(b.output(b("matmul", b.input("x", "f32[4]"), b.random(4, 5))), "raise-linear")
    assert counts(after) == {"linear": 1}


def test_transposed_weight_stays_tied_to_its_embedding():
    b = Build()
    table = b.random(7, 4, name="table")
    hidden = b("gather", table, b.input("ids", "i64[b, s]"), axis=0)
    logits = b("matmul", b("relu", hidden), b("transpose", table, perm=(1, 0)))
    after, _ = run(b.output(logits), "raise-linear")
    assert counts(after) == {"embedding": 1, "relu": 1, "linear": 1}
    assert {n.op.name for n in after.values["table"].users} == {"embedding", "linear"}


@pytest.mark.parametrize(("trans_a", "trans_b"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, -2.0), (1.5, 0.0)])
@pytest.mark.parametrize("c", [None, (5,), (1, 5), (), (3, 5), (3, 1), "activation"])
def test_gemm(trans_a, trans_b, alpha, beta, c):
    b = Build()
    a = b.input("a", "f32[4, 3]" if trans_a else "f32[3, 4]")
    operands = [a, b.random(5, 4) if trans_b else b.random(4, 5)]
    if c == "activation":
        operands.append(b.input("c", "f32[3, 5]"))
    elif c is not None:
        operands.append(b.random(*c))
    attributes = {"alpha": alpha, "beta": beta, "trans_a": trans_a, "trans_b": trans_b}
    after, _ = run(b.output(b("gemm", *operands, **attributes)), "raise-linear")
    found = counts(after)
    assert found.pop("linear") == 1
    assert found.pop("transpose", 0) == trans_a
    loose = c in ((3, 5), (3, 1), "activation")
    assert found.pop("add", 0) == loose
    assert found.pop("mul", 0) == (c == "activation" and beta != 1.0)
    assert found == {}
    if alpha == 1.0:
        assert after.values["w"].constant is not None


def test_gemm_of_a_transposed_constant():
    b = Build()
    weight = b("transpose", b.random(4, 5), perm=(1, 0))
    y = b("gemm", b.input("a", "f32[3, 4]"), weight, trans_b=True)
    after, _ = run(b.output(y), "raise-linear")
    assert counts(after) == {"linear": 1}


def test_a_bias_on_a_linear_that_is_read_elsewhere():
    b = Build()
    product = b("matmul", b.input("x", "f32[b, 4]"), b.random(4, 5))
    after, report = run(b.output(b("add", product, b.random(5)), b("neg", product)), "raise-linear")
    assert counts(after) == {"linear": 1, "add": 1, "neg": 1}
    assert reasons(report) == ["the linear is read elsewhere without the sum"]


def test_a_bias_on_a_linear_that_is_an_output():
    b = Build()
    product = b("matmul", b.input("x", "f32[b, 4]"), b.random(4, 5))
    _, report = run(b.output(product, b("add", product, b.random(5))), "raise-linear")
    assert reasons(report) == ["the linear is read elsewhere without the sum"]


@pytest.mark.parametrize(
    ("what", "miss"),
    [
        ("left", "linear: 1 of 3 steps matched for matmul %matmul; the constant stands on the left at matmul"),
        ("stack", "the constant is no matrix: it has type f32[2, 4, 5]"),
        ("gemm", "linear from gemm: 1 of 3 steps matched for gemm %gemm; the constant stands on the left"),
        ("two", "linear from gemm: 1 of 3 steps matched for gemm %gemm; no operand is constant"),
        ("rows", "bias: 1 of 2 steps matched for add %add; the constant does not broadcast along the last axis"),
        ("second", "bias: 1 of 2 steps matched for add %add; the linear has a bias already"),
        ("axis", "embedding: 2 of 3 steps matched for gather %gather; it gathers along the channels"),
        ("cube", "embedding: 1 of 3 steps matched for gather %gather; the table has type f32[2, 3, 4]"),
    ],
)
def test_nearest_misses(what, miss):
    b = Build()
    x, ids = b.input("x", "f32[4, 4]"), b.input("ids", "i64[3]")
    match what:
        case "left":
            y = b("matmul", b.random(5, 4), x)
        case "stack":
            y = b("matmul", x, b.random(2, 4, 5))
        case "gemm":
            y = b("gemm", b.random(5, 4), x)
        case "two":
            y = b("gemm", x, x)
        case "rows":
            y = b("add", b("linear", x, b.random(5, 4)), b.random(4, 5))
        case "second":
            y = b("add", b("linear", x, b.random(5, 4), b.random(5)), b.random(5))
        case "axis":
            y = b("gather", b.random(2, 4), ids, axis=1)
        case _:
            y = b("gather", b.random(2, 3, 4), ids, axis=0)
    before = b.output(y)
    after, report = run(before, "raise-linear")
    assert after == before
    assert miss in "\n".join(report.misses)


def test_the_validator_rejects_a_forgotten_alpha(monkeypatch):
    monkeypatch.setattr(raise_linear, "_scaled", lambda rewriter, value, factor: value)
    b = Build()
    graph = b.output(b("gemm", b.input("a", "f32[3, 4]"), b.random(4, 5), alpha=1.001))
    with pytest.raises(ValidationError, match="pass 'raise-linear': changed the function"):
        Pipeline("raise-linear").run(graph)


def test_scales_are_folded_in_float64():
    b = Build()
    graph = b.output(b("gemm", b.input("a", "f32[3, 4]"), b.random(4, 5), alpha=1.0 / 3.0))
    weight = graph.values["w"].constant
    after, _ = run(graph, "raise-linear")
    folded = next(after.nodes).operands[1].constant
    assert folded.is_wide
    assert np.array_equal(folded.wide(), weight.wide() * (1.0 / 3.0))
