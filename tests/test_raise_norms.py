"""Norms written as arithmetic are raised, in every spelling; near misses and refusals are explained."""

import numpy as np
import pytest
from patterns import Build, counts, golden, reasons, run

from planish.ir.errors import ValidationError
from planish.ir.graph import Graph, Value
from planish.passes import raise_norms
from planish.passes.manager import Pipeline

TYPE = "f32[b, 3, 6]"
EPS = 0.1  # large enough to be seen


def square(b: Build, x: Value, how: str) -> Value:
    return b("pow", x, 2.0) if how == "pow" else b("mul", x, x)


def mean(b: Build, x: Value, how: str, axes: tuple[int, ...] = (-1,)) -> Value:
    match how:
        case "mean":
            return b("reduce_mean", x, axes=axes, keepdims=True)
        case "sum":
            return b("div", b("reduce_sum", x, axes=axes, keepdims=True), 6.0)
        case _:
            return b("unsqueeze", b("reduce_mean", x, axes=axes, keepdims=False), axes=axes)


def normalised(b: Build, x: Value, variance: Value, how: str, swap: bool = False, eps: float = EPS) -> Value:
    under = b("add", eps, variance) if swap else b("add", variance, eps)
    match how:
        case "div":
            return b("div", x, b("sqrt", under))
        case "div-pow":
            return b("div", x, b("pow", under, 0.5))
        case "reciprocal":
            inverse = b("reciprocal", b("sqrt", under))
        case "one-over":
            inverse = b("div", 1.0, b("sqrt", under))
        case "rsqrt":
            inverse = b("rsqrt", under)
        case "sqrt-of-reciprocal":
            inverse = b("sqrt", b("reciprocal", under))
        case _:
            inverse = b("pow", under, -0.5)
    return b("mul", inverse, x) if swap else b("mul", x, inverse)


ROOTS = ("div", "div-pow", "reciprocal", "one-over", "sqrt-of-reciprocal", "rsqrt", "power")


def layer_norm(b: Build, x: Value, *, root: str = "div", sq: str = "pow", how: str = "mean", swap=False) -> Value:
    centred = b("sub", x, mean(b, x, how))
    return normalised(b, centred, mean(b, square(b, centred, sq), how), root, swap)


def affine(b: Build, y: Value, swap: bool) -> Value:
    gain, bias = b.random(6, name="gain"), b.random(6, name="bias")
    y = b("mul", gain, y) if swap else b("mul", y, gain)
    return b("add", bias, y) if swap else b("add", y, bias)


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize(("sq", "how", "swap"), [("pow", "mean", False), ("mul", "sum", True), ("mul", "late", False)])
def test_layer_norm(root, sq, how, swap):
    b = Build()
    x = b.input("x", TYPE)
    y = affine(b, layer_norm(b, x, root=root, sq=sq, how=how, swap=swap), swap)
    after, _ = run(b.output(y), "raise-norms")
    (node,) = after.nodes
    assert node.op.name == "layer_norm"
    assert node.attributes == {"axis": -1, "eps": float(np.float32(EPS))}
    assert [v.name for v in node.operands] == ["x", "gain", "bias"]
    assert node.result.name == y.name


def test_layer_norm_golden(update_golden):
    b = Build()
    before = b.output(affine(b, layer_norm(b, b.input("x", TYPE)), False))
    after, _ = run(before, "raise-norms")
    golden("raise-norms", before, after, update_golden)


def test_centred_twice():
    b = Build()
    x = b.input("x", TYPE)
    first = b("sub", x, mean(b, x, "mean"))
    second = b("sub", x, mean(b, x, "mean"))
    y = normalised(b, second, mean(b, square(b, first, "pow"), "mean"), "div")
    after, _ = run(b.output(y), "raise-norms")
    assert counts(after) == {"layer_norm": 1}


@pytest.mark.parametrize("root", ROOTS)
def test_variance_from_moments(root):
    b = Build()
    x = b.input("x", TYPE)
    m = mean(b, x, "mean")
    variance = b("sub", mean(b, square(b, x, "mul"), "mean"), square(b, m, "pow"))
    y = normalised(b, b("sub", x, m), variance, root)
    after, _ = run(b.output(y), "raise-norms")
    assert counts(after) == {"layer_norm": 1}


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("swap", [False, True])
def test_rms_norm(root, swap):
    b = Build()
    x = b.input("x", TYPE)
    y = normalised(b, x, mean(b, square(b, x, "pow"), "mean"), root, swap)
    gain = b.random(6, name="gain")
    y = b("mul", gain, y) if swap else b("mul", y, gain)
    after, _ = run(b.output(y), "raise-norms")
    (node,) = after.nodes
    assert node.op.name == "rms_norm"
    assert [v.name for v in node.operands] == ["x", "gain"]


@pytest.mark.parametrize("swap", [False, True])
def test_gain_of_one_plus_w(swap):
    b = Build()
    x = b.input("x", TYPE)
    w = b.random(6, name="w")
    gain = b("add", 1.0, w) if swap else b("add", w, 1.0)
    y = b("mul", gain, normalised(b, x, mean(b, square(b, x, "pow"), "mean"), "power"))
    after, _ = run(b.output(y), "raise-norms")
    (node,) = after.nodes
    assert node.op.name == "rms_norm"
    assert node.attributes["gain_offset"] == 1.0
    assert node.operands[1].name == "w"


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_gain_for_all_channels(shape):
    b = Build()
    x = b.input("x", TYPE)
    y = b("mul", normalised(b, x, mean(b, square(b, x, "pow"), "mean"), "rsqrt"), b.random(*shape, name="gain"))
    after, _ = run(b.output(y), "raise-norms")
    (node,) = after.nodes
    assert node.operands[1].shape == (6,)


def test_one_number_is_no_bias():
    b = Build()
    y = b("add", b("rms_norm", b.input("x", TYPE)), 1.0)
    assert "the constant does not vary over the normalised axes alone" in refused(b.output(y))[1]


def test_several_trailing_axes():
    b = Build()
    x = b.input("x", "f32[b, 4, 3, 6]")
    centred = b("sub", x, mean(b, x, "mean", (1, 2, 3)))
    y = normalised(b, centred, mean(b, square(b, centred, "pow"), "mean", (-3, -2, -1)), "div")
    y = b("mul", y, b.random(1, 4, 1, 1))
    after, _ = run(b.output(y), "raise-norms")
    (node,) = after.nodes
    assert node.attributes["axis"] == -3
    assert node.operands[1].shape == (4, 3, 6)


def test_half_precision_with_statistics_in_float32():
    b = Build()
    x = b.input("x", "f16[b, 3, 6]")
    wide = b("cast", x, to="f32")
    y = normalised(b, wide, mean(b, square(b, wide, "pow"), "mean"), "power")
    y = b("mul", b.random(6, dtype="f16"), b("cast", y, to="f16"))
    after, _ = run(b.output(y), "raise-norms")
    (node,) = after.nodes
    assert node.op.name == "rms_norm"
    assert node.result.dtype == "f16"


def test_half_precision_cast_in_the_middle():
    b = Build()
    x = b.input("x", "f16[b, 3, 6]")
    wide = b("cast", x, to="f32")
    inverse = b("pow", b("add", mean(b, square(b, wide, "pow"), "mean"), EPS), -0.5)
    y = b("mul", x, b("cast", inverse, to="f16"))
    after, _ = run(b.output(y), "raise-norms")
    assert counts(after) == {"rms_norm": 1}


def refused(graph: Graph) -> tuple[str, str]:
    after, report = run(graph, "raise-norms")
    assert report.applied == []
    assert after == graph
    return "\n".join(reasons(report)), "\n".join(report.misses)


def test_eps_must_be_a_scalar():
    b = Build()
    x = b.input("x", TYPE)
    y = b("div", x, b("sqrt", b("add", mean(b, square(b, x, "pow"), "mean"), b.constant(np.full(6, EPS)))))
    assert refused(b.output(y))[0] == "its eps is not a scalar"


def test_an_intermediate_value_read_elsewhere():
    b = Build()
    x = b.input("x", TYPE)
    centred = b("sub", x, mean(b, x, "mean"))
    y = normalised(b, centred, mean(b, square(b, centred, "pow"), "mean"), "div")
    assert refused(b.output(y, b("neg", centred)))[0] == "an intermediate value is read elsewhere"


def test_an_intermediate_output():
    b = Build()
    x = b.input("x", TYPE)
    centred = b("sub", x, mean(b, x, "mean"))
    y = normalised(b, centred, mean(b, square(b, centred, "pow"), "mean"), "div")
    assert refused(b.output(y, centred))[0] == "an intermediate value is a graph output"


def test_the_norm_itself_read_elsewhere():
    b = Build()
    normed = b("layer_norm", b.input("x", TYPE))
    graph = b.output(b("mul", normed, b.random(6)), b("neg", normed))
    assert refused(graph)[0] == "the norm is read elsewhere without it"


@pytest.mark.parametrize(
    ("what", "miss"),
    [
        ("no eps", "norm: 1 of 6 steps matched for div %div; expected an add of eps under the root at reduce_mean"),
        ("no square", "3 of 6 steps matched for div %div; expected the mean of a square at abs"),
        ("other tensor", "4 of 6 steps matched for div %div; the squares are of another tensor"),
        ("axis", "5 of 6 steps matched for div %div; the axes [1] are not the last ones"),
        ("two axes", "4 of 6 steps matched for div %div; mean and variance are over different axes"),
        ("variance", "2 of 6 steps matched for div %div; expected a mean of squares at abs"),
    ],
)
def test_nearest_misses(what, miss):
    b = Build()
    x = b.input("x", TYPE)
    match what:
        case "no eps":
            y = b("div", x, b("sqrt", mean(b, square(b, x, "pow"), "mean")))
        case "no square":
            y = normalised(b, x, mean(b, b("abs", x), "mean"), "div")
        case "other tensor":
            y = normalised(b, b("neg", x), mean(b, square(b, x, "pow"), "mean"), "div")
        case "axis":
            y = normalised(b, x, mean(b, square(b, x, "pow"), "mean", (1,)), "div")
        case "two axes":
            centred = b("sub", x, mean(b, x, "mean", (1, 2)))
            y = normalised(b, centred, mean(b, square(b, centred, "pow"), "mean"), "div")
        case _:
            y = normalised(b, x, b("abs", x), "div")
    assert miss in refused(b.output(y))[1]


def test_a_gain_over_other_axes_stays():
    b = Build()
    y = b("mul", b("rms_norm", b.input("x", TYPE)), b.random(3, 1))
    assert "the constant does not vary over the normalised axes alone" in refused(b.output(y))[1]


def test_a_second_gain_stays():
    b = Build()
    y = b("mul", b("rms_norm", b.input("x", TYPE), b.random(6)), b.random(6))
    assert "the norm has its own already" in refused(b.output(y))[1]


def test_the_validator_rejects_a_wrong_eps(monkeypatch):
    b = Build()
    graph = b.output(layer_norm(b, b.input("x", TYPE)))
    true = raise_norms.scalar
    monkeypatch.setattr(raise_norms, "scalar", lambda v: (true(v) or 0.0) * 1.001)
    with pytest.raises(ValidationError, match="pass 'raise-norms': changed the function"):
        Pipeline("raise-norms").run(graph)
