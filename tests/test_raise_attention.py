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
    return {"scale": node.attributes.get("scale"), "mask": node.operand(3), "k": node.operand(1), "node": node}


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
        case "subtracted":
            scores = b("sub", scores, float_mask)
        case "floor":
            scores = b("max", b("add", scores, float_mask), float(np.finfo(np.float32).min))
        case "floor of a choice":
            scores = b("clip", b("where", keep, scores, -math.inf), float(np.finfo(np.float32).min))
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
        ("subtracted", "f32"),
        ("floor", "f32"),
        ("floor of a choice", "f32"),
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


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_a_guard_that_asks_for_finite_scores(fill):
    """As torch decomposes scaled_dot_product_attention into its core ops."""
    b = Build()
    scores = b("matmul", heads(b, "q"), heads(b, "k", (0, 2, 3, 1)))
    scores = b("add", scores, b("where", b.input("keep", "bool[b, 1, 1, s]"), 0.0, -math.inf))
    finite = b("cast", b("logical_not", b("equal", scores, -math.inf)), to="i64")
    some = b("cast", b("reduce_max", finite, axes=(-1,), keepdims=True), to="bool")
    p = b("where", b("logical_not", some), fill, b("softmax", scores, axis=-1))
    before = b.output(b("matmul", p, heads(b, "v")))
    after, _ = run(before, PIPELINE)
    assert ("softmax" in counts(after)) == (fill == 1.0)
    if fill == 0.0:
        assert the_attention(after)["node"].attributes["safe"] is True
    assert torch.allclose(rows_of(after), rows_of(before), rtol=1e-12)


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


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 3, 1, 1), (8, 1)])
def test_a_factor_of_each_head_or_row(shape):
    b = Build()
    scores = b("matmul", heads(b, "q"), heads(b, "k", (0, 2, 3, 1)))
    scores = b("add", b("mul", scores, b.random(*shape, name="scales")), b.random(3, 8, 8, name="bias"))
    after, _ = run(finish(b, scores), PIPELINE)
    assert counts(after) == {"transpose": 4, "mul": 1, "attention": 1}
    assert the_attention(after)["node"].operand(0).producer.op.name == "mul"


@pytest.mark.parametrize("lowest", [False, True])
def test_a_scale_behind_the_masks(lowest):
    b = Build()
    scores = b("add", b("matmul", heads(b, "q"), heads(b, "k", (0, 2, 3, 1))), b.random(3, 1, 8, name="slopes"))
    keep = b.input("keep", "bool[b, 1, 1, s]")
    scores = b("where", keep, scores, float(np.finfo(np.float32).min) if lowest else -math.inf)
    before = finish(b, b("mul", scores, 0.5))
    after, _ = run(before, PIPELINE)
    assert the_attention(after)["scale"] == 0.5
    assert torch.allclose(rows_of(after)[1:], rows_of(before)[1:], rtol=1e-12)


@pytest.mark.parametrize("outer", [False, True])
def test_soft_cap(outer):
    """30 tanh(scores / 60), 60 times a half of it."""
    b = Build()
    scores = b("mul", b("matmul", heads(b, "q"), heads(b, "k", (0, 2, 3, 1))), 0.5)
    scores = b("mul", 60.0 if outer else 30.0, b("tanh", b("div", scores, 60.0 if outer else 30.0)))
    scores = b("div", scores, 2.0) if outer else scores
    scores = b("where", b.input("keep", "bool[b, 1, 1, s]"), scores, -math.inf)
    after, _ = run(finish(b, scores), PIPELINE)
    attributes = the_attention(after)["node"].attributes
    assert attributes["softcap"] == pytest.approx(30.0)
    assert attributes["scale"] == pytest.approx(0.25 if outer else 0.5)
    assert the_attention(after)["mask"].dtype == "bool"


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", ["vector", "constant", "activation"])
def test_sinks(kind, shift):
    b = Build()
    q, k, v = (b("transpose", b.input(n, "f32[2, 5, 3, 4]"), perm=(0, 2, 1, 3)) for n in "qkv")
    scores = b("add", b("matmul", q, b("transpose", k, perm=(0, 1, 3, 2))), b.input("mask", "f32[2, 1, 5, 5]"))
    sinks = b.input("sinks", "f32[3]") if kind == "activation" else b.random(3, name="sinks")
    if kind == "constant":
        column = b.constant(np.broadcast_to(sinks.constant.array().reshape(1, 3, 1, 1), (2, 3, 5, 1)).copy())
    else:
        column = b("expand", b("reshape", sinks, [1, -1, 1, 1]), [2, 3, 5, 1])
    joined = b("concat", scores, column, axis=-1)
    if shift:
        joined = b("sub", joined, b("reduce_max", joined, axes=(-1,), keepdims=True))
    p = b("slice", b("softmax", joined, axis=-1), [0], [-1], [3])
    after, _ = run(b.output(b("matmul", p, v)), PIPELINE)
    assert counts(after) == {"transpose": 3, "attention": 1}
    found = the_attention(after)["node"].operand(4)
    assert found.shape == (3,)
    if kind != "constant":
        assert found.name == "sinks"


def test_sinks_must_be_one_number_per_head():
    b = Build()
    scores = b("matmul", b.input("q", "f32[2, 3, 5, 4]"), b.input("kt", "f32[2, 3, 4, 5]"))
    joined = b("concat", scores, b.random(2, 3, 5, 1, name="column"), axis=-1)
    p = b("slice", b("softmax", joined, axis=-1), [0], [-1], [3])
    before = b.output(b("matmul", p, b.input("v", "f32[2, 3, 5, 4]")))
    after, report = run(before, PIPELINE)
    assert after == before
    assert reasons(report) == ["the sinks are not one number for each head"]


@pytest.mark.parametrize("kind", ["drop", "keep", "after a bias"])
def test_masked_with_the_lowest_float(kind):
    b = Build()
    keep, least = b.input("keep", "bool[b, 1, 1, s]"), float(np.finfo(np.float32).min)
    scores = b("mul", b("matmul", heads(b, "q"), heads(b, "k", (0, 2, 3, 1))), 0.5)
    if kind == "after a bias":
        scores = b("add", scores, b.random(3, 8, 8, name="bias"))
    chosen = (scores, least) if kind == "keep" else (least, scores)
    before = finish(b, b("where", keep if kind == "keep" else b("logical_not", keep), *chosen))
    after, _ = run(before, PIPELINE)
    assert "softmax" not in counts(after)
    assert torch.allclose(rows_of(after), rows_of(before), rtol=1e-12)  # also where a row is masked throughout


def flat_heads(b: Build, name: str) -> Value:
    """[6, 5, 4] from [2, 5, 3, 4]."""
    four = b("transpose", b.input(name, "f32[2, 5, 3, 4]"), perm=(0, 2, 1, 3))
    return b("reshape", four, [6, 5, 4])


@pytest.mark.parametrize("where", ["four", "three", "none"])
@pytest.mark.parametrize("back", [False, True])
def test_products_over_three_axes(where, back):
    b = Build()
    q, k, v = (flat_heads(b, n) for n in "qkv")
    scores = b("mul", b("matmul", q, b("transpose", k, perm=(0, 2, 1))), 0.5)
    if where == "four":
        scores = b("add", b("reshape", scores, [2, 3, 5, 5]), b.input("mask", "f32[2, 1, 5, 5]"))
    elif where == "three":
        scores = b("add", b.input("mask", "f32[6, 1, 5]"), b("add", scores, b.random(1, 5, 5, name="bias")))
    p = b("softmax", scores, axis=-1)
    p = b("reshape", p, [6, 5, 5]) if where == "four" else p
    y = b("matmul", p, v)
    y = b("transpose", b("reshape", y, [2, 3, 5, 4]), perm=(0, 2, 1, 3)) if back else y
    after, _ = run(b.output(y), PIPELINE)
    node = the_attention(after)["node"]
    assert node.attributes["scale"] == 0.5
    assert [v.shape for v in node.operands[:3]] == [(2, 3, 5, 4)] * 3
    assert counts(after).get("reshape", 0) == (where == "three") + (not back)


@pytest.mark.parametrize("batch", [2, "b"])
@pytest.mark.parametrize("masked", [False, True])
def test_products_over_five_axes(batch, masked):
    b = Build()
    q, k, v = (b.input(n, f"f32[{batch}, 6, 3, 5, 4]") for n in "qkv")
    scores = b("matmul", b("mul", q, 0.5), b("transpose", k, perm=(0, 1, 2, 4, 3)))
    scores = b("add", scores, b.random(3, 5, 5, name="bias")) if masked else scores
    after, _ = run(b.output(b("matmul", b("softmax", scores, axis=-1), v)), PIPELINE)
    assert counts(after) == {"reshape": 4, "attention": 1}
    assert the_attention(after)["k"].shape[1:] == (3, 5, 4)
    assert the_attention(after)["scale"] == 0.5


def test_three_axes_of_their_own():
    b = Build()
    q, k, v = (b.input(n, "f32[n, s, 4]") for n in "qkv")
    p = b("softmax", b("matmul", q, b("transpose", k, perm=(0, 2, 1))), axis=-1)
    after, _ = run(b.output(b("matmul", p, v)), PIPELINE)
    assert counts(after) == {"unsqueeze": 3, "attention": 1, "squeeze": 1}


def test_a_mask_over_windows():
    """[batch windows, heads, ..] split into [batch, windows, heads, ..] for a mask of each window."""
    b = Build()
    q, k, v = (b.input(n, "f32[6, 3, 5, 4]") for n in "qkv")
    scores = b("matmul", b("mul", q, 0.5), b("transpose", k, perm=(0, 1, 3, 2)))
    scores = b("add", scores, b.random(1, 3, 5, 5, name="bias"))
    scores = b("add", b("reshape", scores, [2, 3, 3, 5, 5]), b.random(1, 3, 1, 5, 5, name="windows"))
    p = b("softmax", b("reshape", scores, [6, 3, 5, 5]), axis=-1)
    after, _ = run(b.output(b("matmul", p, v)), PIPELINE)
    assert counts(after)["attention"] == 1
    assert "softmax" not in counts(after)


def grouped(kind: str, b: Build, name: str) -> Value:
    """Four heads from two (one)."""
    x = b.input(name, "f32[b, 5, 2, 4]" if kind != "one" else "f32[b, 5, 1, 4]")
    match kind:
        case "expanded":
            wide = b("unsqueeze", b("transpose", x, perm=(0, 2, 1, 3)), axes=(2,))
            wide = b("expand", wide, [1, 1, 2, 1, 1])
            return b("reshape", wide, [-1, 4, 5, 4])
        case "before the transpose":
            wide = b("expand", b("unsqueeze", x, axes=(3,)), [1, 1, 1, 2, 1])
            return b("transpose", b("reshape", wide, [-1, 5, 4, 4]), perm=(0, 2, 1, 3))
        case "looked up":
            return b("gather", b("transpose", x, perm=(0, 2, 1, 3)), [0, 0, 1, 1], axis=1)
        case "sliced":
            wide = b("reshape", b("concat", x, x, axis=-1), [-1, 5, 2, 2, 4])
            wide = b("expand", b("gather", wide, [1], axis=3), [1, 1, 1, 2, 1])
            return b("transpose", b("reshape", wide, [-1, 5, 4, 4]), perm=(0, 2, 1, 3))
        case "one":
            return b("expand", b("transpose", x, perm=(0, 2, 1, 3)), [1, 4, 1, 1])
        case _:  # in another order: heads 0, 1, 0, 1
            return b("gather", b("transpose", x, perm=(0, 2, 1, 3)), [0, 1, 0, 1], axis=1)


@pytest.mark.parametrize("kind", ["expanded", "before the transpose", "sliced", "looked up", "one", "tiled"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_repeated_heads(kind, turned, eager):
    b = Build()
    q, k, v = b.input("q", "f32[b, 4, 5, 4]"), grouped(kind, b, "k"), grouped(kind, b, "v")
    if turned:
        k = b("rope", k, b.random(5, 4), b.random(5, 4))
    if eager:
        p = b("softmax", b("matmul", q, b("transpose", k, perm=(0, 1, 3, 2))), axis=-1)
        y = b("matmul", p, v)
    else:
        y = b("attention", q, k, v)
    after, _ = run(b.output(y), PIPELINE)
    assert "softmax" not in counts(after)
    k = the_attention(after)["k"]
    assert k.shape[1] == {"tiled": 4, "one": 1}.get(kind, 2)
    assert ("expand" in counts(after), "gather" in counts(after)) == (False, kind in ("tiled", "sliced"))


def test_one_key_head_for_all():
    b = Build()
    q, kt, v = b.input("q", "f32[b, 4, s, 8]"), b.input("kt", "f32[b, 1, 8, s]"), b.input("v", "f32[b, 1, s, 8]")
    after, _ = run(b.output(b("matmul", b("softmax", b("matmul", q, kt), axis=-1), v)), PIPELINE)
    assert counts(after) == {"transpose": 1, "attention": 1}


def test_keys_repeated_otherwise_than_values():
    b = Build()
    q = b.input("q", "f32[b, 4, 5, 4]")
    before = b.output(b("attention", q, grouped("expanded", b, "k"), grouped("one", b, "v")))
    after, report = run(before, PIPELINE)
    assert after == before
    assert "repeated heads: 2 of 3 steps matched for attention %attention; keys and values" in "\n".join(report.misses)


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
        ("rank", "2 of 6 steps matched for softmax %softmax; the scores have 2 axes; expected 3 or more"),
        ("sigmoid", "2 of 6 steps matched for softmax %softmax; expected a scale, a mask or the product of queries"),
        ("cap behind", "3 of 6 steps matched for softmax %softmax; the soft-cap stands behind the mask at tanh"),
        (
            "finite",
            "3 of 6 steps matched for softmax %softmax; masked scores become -1e+09; expected -inf or the lowest",
        ),
        ("late rows", "3 of 6 steps matched for softmax %softmax; a factor for each head or row stands behind a mask"),
        ("kept sink", "4 of 6 steps matched for softmax %softmax; a column is set beside the scores or dropped behind"),
        ("wide sink", "2 of 6 steps matched for softmax %softmax; the scores are set beside something else than one"),
        ("outer scale", "3 of 6 steps matched for softmax %softmax; the factor behind a mask or a soft-cap is not pos"),
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
            q, k, v = (b.input(f"{n}2", "f32[s, 4]") for n in "qkv")
            y = b("matmul", b("softmax", b("matmul", q, b("transpose", k, perm=(1, 0))), axis=-1), v)
        case "sigmoid":
            y = b("matmul", b("softmax", b("sigmoid", scores), axis=-1), v)
        case "cap behind":
            capped = b("tanh", b("add", scores, b.input("mask", "f32[b, 1, 1, s]")))
            y = b("matmul", b("softmax", capped, axis=-1), v)
        case "late rows":
            scores = b("add", scores, b.input("mask", "f32[b, 1, 1, s]"))
            y = b("matmul", b("softmax", b("mul", scores, b.random(3, 1, 1)), axis=-1), v)
        case "kept sink":
            column = b.random(1, 3, 1, 1)
            column = b("expand", column, b("concat", b("slice", b("shape", scores), [0], [3]), [1], axis=0))
            wide = b("concat", v, b("slice", v, [0], [1], [2]), axis=2)
            y = b("matmul", b("softmax", b("concat", scores, column, axis=-1), axis=-1), wide)
        case "wide sink":
            p = b("softmax", b("concat", scores, scores, axis=-1), axis=-1)
            y = b("matmul", p, b("concat", v, v, axis=2))
        case "finite":
            kept = b("where", b.input("keep", "bool[b, 1, 1, s]"), scores, -1e9)
            y = b("matmul", b("softmax", kept, axis=-1), v)
        case "outer scale":
            scores = b("mul", b("add", scores, b.input("mask", "f32[b, 1, 1, s]")), -0.5)
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
    true = raise_attention.unscaled
    monkeypatch.setattr(raise_attention, "unscaled", lambda v, r: (true(v, r)[0], true(v, r)[1] * 1.001))
    with pytest.raises(ValidationError, match="pass 'raise-attention': changed the function"):
        Pipeline(PIPELINE).run(masked("add"))
