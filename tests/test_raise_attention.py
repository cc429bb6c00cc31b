"""Attention written as products around a softmax is raised; masks, scales and transposes in every spelling."""

import math

import numpy as np
import pytest
import torch
from patterns import Build, counts, golden, reasons, run

from planish.ir.errors import ValidationError
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph, Value
from planish.passes import raise_attention
from planish.passes.manager import Pipeline

PIPELINE = "raise-attention"


def heads(b: Build, name: str, perm: tuple[int, ...] = (0, 2, 1, 3), tokens: str = "s") -> Value:
    """[b, s, 3, 4] with its axes permuted."""
    return b("transpose", b.input(name, f"f32[b, {tokens}, 3, 4]"), perm=perm)


def finish(b: Build, scores: Value, v: Value | None = None) -> Graph:
    p = b("softmax", scores, axis=-1)
    return b.output(b("transpose", b("matmul", p, v or heads(b, "v")), perm=(0, 2, 1, 3)))


def the_attention(graph: Graph) -> dict:
    (node,) = [n for n in graph.nodes if n.op.name == "attention"]
    return {"scale": node.attributes["scale"], "mask": node.operand(3), "k": node.operand(1), "node": node}


def test_golden(update_golden):
    b = Build()
    scores = b("matmul", heads(b, "q"), heads(b, "k", (0, 2, 3, 1)))
    scores = b("add", b("mul", scores, 0.5), b.input("mask", "f32[b, 1, 1, s]"))
    before = finish(b, scores)
    after, _ = run(before, PIPELINE)
    golden("raise-attention", before, after, update_golden)


@pytest.mark.parametrize("where", ["scores", "scores-div", "q", "k", "kt", "roots", "none", "twice"])
@pytest.mark.parametrize("swap", [False, True])
def test_scales(where, swap):
    def scale(x: Value, s: float) -> Value:
        return b("mul", s, x) if swap else b("mul", x, s)

    b = Build()
    q, k, root = heads(b, "q", tokens="t"), heads(b, "k"), math.sqrt(0.5)
    q = scale(q, 0.5) if where in ("q", "twice") else scale(q, root) if where == "roots" else q
    k = scale(k, 0.5) if where == "k" else k
    kt = b("transpose", k, perm=(0, 1, 3, 2))
    kt = scale(kt, 0.5) if where == "kt" else b("div", kt, 1 / root) if where == "roots" else kt
    scores = b("matmul", q, kt)
    if where in ("scores", "twice"):
        scores = scale(scores, 0.5)
    elif where == "scores-div":
        scores = b("div", scores, 2.0)
    after, _ = run(finish(b, scores), PIPELINE)
    expected = {"none": 1.0, "twice": 0.25}.get(where, 0.5)
    assert the_attention(after)["scale"] == pytest.approx(expected, rel=1e-7)
    assert counts(after) == {"transpose": 4, "attention": 1}


@pytest.mark.parametrize("perm", [(0, 2, 3, 1), (0, 2, 1, 3)])
def test_keys_are_transposed_once(perm):
    b = Build()
    k = heads(b, "k", perm)
    kt = k if perm == (0, 2, 3, 1) else b("transpose", k, perm=(0, 1, 3, 2))
    after, _ = run(finish(b, b("matmul", heads(b, "q"), kt)), PIPELINE)
    k = the_attention(after)["k"]
    assert k.producer.attributes["perm"] == (0, 2, 1, 3)
    assert k.producer.operand(0).is_input


def test_keys_that_come_transposed():
    b = Build()
    after, _ = run(finish(b, b("matmul", heads(b, "q"), b.input("kt", "f32[b, 3, 4, s]"))), PIPELINE)
    assert the_attention(after)["k"].producer.attributes["perm"] == (0, 1, 3, 2)


def test_keys_transposed_between_reshapes():
    b = Build()
    q, k = heads(b, "q"), heads(b, "k")
    dims = b("shape", k)
    batch, rows = b("slice", dims, [0], [2]), b("slice", dims, [2], [3])
    flat = b("reshape", k, b("concat", [-1], rows, [4], axis=0))
    turned = b("transpose", flat, perm=(0, 2, 1))
    kt = b("reshape", turned, b("concat", batch, [4], rows, axis=0))
    kt = b("mul", kt, math.sqrt(0.5))
    after, _ = run(finish(b, b("matmul", b("mul", q, math.sqrt(0.5)), kt)), PIPELINE)
    assert counts(after) == {"transpose": 4, "attention": 1}
    assert the_attention(after)["scale"] == pytest.approx(0.5, rel=1e-7)


def masked(kind: str) -> Graph:
    b = Build()
    scores = b("mul", b("matmul", heads(b, "q"), heads(b, "k", (0, 2, 3, 1))), 0.5)
    float_mask, keep = b.input("mask", "f32[b, 1, s, s]"), b.input("keep", "bool[b, 1, 1, s]")
    bias = b.random(3, 8, 8, name="bias")
    match kind:
        case "add":
            scores = b("add", scores, float_mask)
        case "add-left":
            scores = b("add", float_mask, scores)
        case "twice":
            scores = b("add", bias, b("add", scores, float_mask))
        case "keep":
            scores = b("where", keep, scores, -math.inf)
        case "drop":
            scores = b("where", b("logical_not", keep), -math.inf, scores)
        case "keep-twice":
            scores = b("where", keep, b("where", b("less", float_mask, 1.5), scores, -math.inf), -math.inf)
        case _:
            scores = b("where", keep, b("add", scores, float_mask), -math.inf)
    return finish(b, scores)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("add", "f32"),
        ("add-left", "f32"),
        ("twice", "f32"),
        ("keep", "bool"),
        ("drop", "bool"),
        ("keep-twice", "bool"),
        ("both", "f32"),
    ],
)
def test_masks(kind, dtype):
    after, _ = run(masked(kind), PIPELINE)
    assert the_attention(after)["mask"].dtype == dtype
    assert "softmax" not in counts(after)


def guarded(*, casts: bool = False) -> Graph:
    """As torch's exporter writes scaled_dot_product_attention: a guard around the softmax, masks of -inf."""
    b = Build()
    mask = b("where", b.input("keep", "bool[b, 1, 1, s]"), 0.0, -math.inf)
    scores = b("add", b("matmul", heads(b, "q"), heads(b, "k", (0, 2, 3, 1))), mask)
    p = b("softmax", b("cast", scores, to="f64") if casts else scores, axis=-1)
    p = b("cast", p, to="f32") if casts else p
    return b.output(b("matmul", b("where", b("is_nan", p), 0.0, p), heads(b, "v")))


def rows_of(graph: Graph) -> torch.Tensor:
    """The result with the first row of the batch masked throughout."""
    inputs = {k: torch.from_numpy(np.random.default_rng(0).normal(size=(2, 8, 3, 4))) for k in "qkv"}
    keep = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    keep[0] = False
    (result,) = evaluate(graph, {**inputs, "keep": keep}, torch.float64).values()
    return result


@pytest.mark.parametrize("casts", [False, True])
def test_the_guard_is_kept(casts):
    before = guarded(casts=casts)
    after, _ = run(before, PIPELINE)
    assert counts(after) == {"where": 1, "transpose": 3, "attention": 1}
    assert the_attention(after)["node"].attributes["safe"] is True
    assert torch.equal(rows_of(after)[0], torch.zeros(3, 8, 4, dtype=torch.float64))
    assert torch.allclose(rows_of(after), rows_of(before), rtol=1e-12)


def test_the_guard_is_dropped_on_demand():
    for pipeline in ("raise-attention{nan-guards=true}", "raise-attention,fold-constants{nan-guards=true}"):
        after, _ = Pipeline(pipeline).run(guarded())  # the probes mask no row throughout
        node = the_attention(after)["node"]
        assert "safe" not in node.attributes
        result = rows_of(after)
        assert result[0].isnan().all()
        assert torch.allclose(result[1], rows_of(guarded())[1], rtol=1e-12)


def test_softmax_in_a_wider_dtype():
    b = Build()
    q, k, v = (b.input(n, "f16[b, 3, s, 4]") for n in "qkv")
    scores = b("cast", b("matmul", q, b("transpose", k, perm=(0, 1, 3, 2))), to="f32")
    p = b("cast", b("softmax", scores, axis=-1), to="f16")
    after, _ = run(b.output(b("matmul", p, v)), PIPELINE)
    assert counts(after) == {"attention": 1}


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("scores", "an intermediate value is read elsewhere"),
        ("scores out", "an intermediate value is a graph output"),
    ],
)
def test_refusals(what, reason):
    b = Build()
    scores = b("mul", b("matmul", heads(b, "q"), heads(b, "k", (0, 2, 3, 1))), 0.5)
    y = b("matmul", b("softmax", scores, axis=-1), heads(b, "v"))
    before = b.output(y, scores if what == "scores out" else b("neg", scores))
    after, report = run(before, PIPELINE)
    assert after == before
    assert reasons(report) == [reason]


@pytest.mark.parametrize(
    ("what", "miss"),
    [
        ("softmax out", "1 of 6 steps matched for softmax %softmax; the softmax is read by several nodes"),
        ("second factor", "1 of 6 steps matched for softmax %softmax; the softmax is not the first factor at matmul"),
        ("no values", "1 of 6 steps matched for softmax %softmax; expected a product with the values"),
        ("rank", "2 of 6 steps matched for softmax %softmax; the scores have 3 axes; expected 4"),
        ("tanh", "2 of 6 steps matched for softmax %softmax; expected a scale, a mask or the product of queries"),
        ("finite", "3 of 6 steps matched for softmax %softmax; masked scores become -1e+30; expected -inf at where"),
        ("outer scale", "3 of 6 steps matched for softmax %softmax; the scale stands behind the mask at mul"),
        ("shared", "4 of 6 steps matched for softmax %softmax; q, k and v are broadcast against each other"),
        ("wide mask", "5 of 6 steps matched for softmax %softmax; the scores are broadcast against the mask"),
    ],
)
def test_nearest_misses(what, miss):
    b = Build()
    q, v = heads(b, "q"), heads(b, "v")
    kt = heads(b, "k", (0, 2, 3, 1))
    scores = b("matmul", q, kt)
    extra: list[Value] = []
    match what:
        case "softmax out":
            p = b("softmax", scores, axis=-1)
            extra, y = [p], b("matmul", p, v)
        case "second factor":
            y = b("matmul", b("transpose", v, perm=(0, 1, 3, 2)), b("softmax", scores, axis=-1))
        case "no values":
            y = b("neg", b("softmax", scores, axis=-1))
        case "rank":
            flat = b("reshape", scores, [-1, 8, 8])
            y = b("matmul", b("softmax", flat, axis=-1), b("reshape", v, [-1, 8, 4]))
        case "tanh":
            y = b("matmul", b("softmax", b("tanh", scores), axis=-1), v)
        case "finite":
            kept = b("where", b.input("keep", "bool[b, 1, 1, s]"), scores, -1e30)
            y = b("matmul", b("softmax", kept, axis=-1), v)
        case "outer scale":
            scores = b("mul", b("add", scores, b.input("mask", "f32[b, 1, 1, s]")), 0.5)
            y = b("matmul", b("softmax", scores, axis=-1), v)
        case "shared":
            scores = b("matmul", q, b.input("one", "f32[b, 1, 4, s]"))
            y = b("matmul", b("softmax", scores, axis=-1), v)
        case _:
            scores = b("matmul", b.input("row", "f32[b, 3, 1, 4]"), kt)
            scores = b("add", scores, b.input("mask", "f32[b, 1, s, s]"))
            y = b("matmul", b("softmax", scores, axis=-1), v)
    after, report = run(b.output(y, *extra), PIPELINE)
    assert "attention" not in counts(after)
    assert miss in "\n".join(report.misses)


def test_the_validator_rejects_a_wrong_scale(monkeypatch):
    true = raise_attention._unscaled
    monkeypatch.setattr(raise_attention, "_unscaled", lambda v, r: (true(v, r)[0], true(v, r)[1] * 1.001))
    with pytest.raises(ValidationError, match="pass 'raise-attention': changed the function"):
        Pipeline(PIPELINE).run(masked("add"))
