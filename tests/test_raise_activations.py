"""Activations written as arithmetic are raised, in every spelling; near misses and refusals are explained."""

import itertools
import math

import numpy as np
import pytest
from patterns import Build, counts, golden, reasons, run

from planish.ir.errors import ValidationError
from planish.ir.graph import Graph
from planish.passes import raise_activations
from planish.passes.manager import Pipeline

PIPELINE = "name-constants,raise-activations"
TYPE = "f32[b, 6]"


def gelu(order: int, *, divide: bool, left: bool, half: float = 0.5) -> Graph:
    """x * 0.5 * (1 + erf(x / sqrt 2)) with its factors in one of the orders."""
    b = Build()
    x = b("exp", b.input("x", TYPE))
    scaled = b("div", x, math.sqrt(2.0)) if divide else b("mul", math.sqrt(0.5), x)
    erf = b("erf", scaled)
    one = b("add", 1.0, erf) if left else b("add", erf, 1.0)
    factors = list(itertools.permutations([x, half, one]))[order % 6]
    if order < 6:
        y = b("mul", b("mul", factors[0], factors[1]), factors[2])
    else:
        y = b("mul", factors[0], b("mul", factors[1], factors[2]))
    return b.output(b("neg", y))


@pytest.mark.parametrize("order", range(12))
@pytest.mark.parametrize(("divide", "left"), [(True, True), (False, False)])
def test_gelu_in_every_association(order, divide, left):
    after, report = run(gelu(order, divide=divide, left=left), PIPELINE)
    assert counts(after) == {"exp": 1, "gelu": 1, "neg": 1}
    assert len(report.applied) == 1


def test_gelu_golden(update_golden):
    before = gelu(3, divide=True, left=False)
    after, _ = run(before, PIPELINE)
    golden("raise-activations", before, after, update_golden)


def test_distributed_gelu():
    b = Build()
    x = b.input("x", TYPE)
    half = b("mul", x, 0.5)
    y = b("add", half, b("mul", half, b("erf", b("mul", x, math.sqrt(0.5)))))
    after, _ = run(b.output(y), PIPELINE)
    assert counts(after) == {"gelu": 1}


@pytest.mark.parametrize("cube", ["pow", "products", "square"])
@pytest.mark.parametrize("swap", [False, True])
def test_gelu_tanh(cube, swap):
    b = Build()
    x = b.input("x", TYPE)
    match cube:
        case "pow":
            cubic = b("mul", b("pow", x, 3.0), 0.044715)
        case "products":
            cubic = b("mul", 0.044715, b("mul", b("mul", x, x), x))
        case _:
            cubic = None
    if cubic is None:  # x (1 + 0.044715 x^2)
        inner = b("mul", x, b("add", 1.0, b("mul", b("mul", x, x), 0.044715)))
    else:
        inner = b("add", cubic, x) if swap else b("add", x, cubic)
    tanh = b("tanh", b("mul", inner, math.sqrt(2 / math.pi)))
    y = b("mul", b("mul", 0.5, x), b("add", tanh, 1.0))
    after, _ = run(b.output(y), PIPELINE)
    assert counts(after) == {"gelu": 1}
    assert next(after.nodes).attributes["approximate"] == "tanh"


@pytest.mark.parametrize("swap", [False, True])
def test_silu(swap):
    b = Build()
    x, gate = b.input("x", TYPE), b.input("gate", TYPE)
    s = b("sigmoid", x)
    y = b("mul", b("mul", s, x) if swap else b("mul", x, s), gate)
    after, _ = run(b.output(y), PIPELINE)
    assert counts(after) == {"silu": 1, "mul": 1}


@pytest.mark.parametrize("spelling", ["hard_sigmoid", "divide", "multiply"])
def test_hard_swish(spelling):
    b = Build()
    x = b.input("x", TYPE)
    if spelling == "hard_sigmoid":
        y = b("mul", x, b("hard_sigmoid", x, alpha=float(np.float32(1 / 6)), beta=0.5))
    else:
        clipped = b("clip", b("add", x, 3.0), 0.0, 6.0)
        y = b("mul", x, clipped)
        y = b("div", y, 6.0) if spelling == "divide" else b("mul", y, 1 / 6)
    after, _ = run(b.output(y), PIPELINE)
    assert counts(after) == {"hard_swish": 1}


def test_half_precision_between_casts():
    b = Build()
    x = b("cast", b.input("x", "f16[b, 6]"), to="f32")
    y = b("mul", b("mul", x, 0.5), b("add", b("erf", b("div", x, math.sqrt(2.0))), 1.0))
    after, _ = run(b.output(b("cast", y, to="f16")), PIPELINE)
    assert counts(after) == {"cast": 2, "gelu": 1}  # still computed in float32


def test_named_constants_keep_their_bits():
    before = gelu(0, divide=True, left=False)
    named, report = Pipeline("name-constants").run(before)
    assert len(report["name-constants"].applied) == 1
    pairs = list(zip(before.nodes, named.nodes, strict=True))
    for one, two in pairs:
        for old, new in zip(one.operands, two.operands, strict=True):
            if old.is_constant:
                assert old.constant.array().tobytes() == new.constant.array().tobytes()
    (root,) = [two.operands[1].constant for one, two in pairs if two.op.name == "div"]
    assert root.wide() == math.sqrt(2.0)
    assert root.dtype == "f32"


def test_a_rounded_constant_is_declined():
    _, report = run(gelu(0, divide=True, left=False), "raise-activations")
    assert reasons(report) == ["a constant is a rounding of the one expected: run name-constants before"]


def test_an_intermediate_value_read_elsewhere():
    b = Build()
    x = b.input("x", TYPE)
    scaled = b("div", x, math.sqrt(2.0))
    y = b("mul", b("mul", x, 0.5), b("add", b("erf", scaled), 1.0))
    _, report = run(b.output(y, b("neg", scaled)), PIPELINE)
    assert report.applied == []
    assert report.misses[0].startswith("gelu: 1 of 5 steps matched for erf %erf; its argument is 1 x")


def test_an_intermediate_product_read_elsewhere():
    b = Build()
    x = b.input("x", TYPE)
    half = b("mul", x, 0.5)
    y = b("mul", half, b("add", b("erf", b("div", x, math.sqrt(2.0))), 1.0))
    _, report = run(b.output(y, b("neg", half)), PIPELINE)
    assert reasons(report) == ["an intermediate value is read elsewhere"]


def test_an_intermediate_output():
    b = Build()
    x = b.input("x", TYPE)
    half = b("mul", x, 0.5)
    y = b("mul", half, b("add", b("erf", b("div", x, math.sqrt(2.0))), 1.0))
    _, report = run(b.output(y, half), PIPELINE)
    assert reasons(report) == ["an intermediate value is a graph output"]


def test_nearest_misses():
    b = Build()
    x = b.input("x", TYPE)
    y = b("mul", x, b("sigmoid", b("mul", x, 1.702)))  # quick gelu
    z = b("mul", b("mul", x, 0.25), b("add", b("erf", b("div", x, math.sqrt(2.0))), 1.0))
    after, report = run(b.output(y, z), PIPELINE)
    assert report.applied == []
    misses = "\n".join(report.misses)
    assert "silu: 1 of 5 steps matched for sigmoid" in misses
    assert "its argument is 1.702 x; expected 1 x at sigmoid" in misses
    assert "gelu: 4 of 5 steps matched for erf" in misses
    assert "it is 0.25 x + 0.25 x e; expected 0.5 x + 0.5 x e at mul" in misses
    assert "gelu-tanh: no candidate among tanh" in misses
    assert counts(after)["erf"] == 1


def test_the_validator_rejects_a_wrong_factor(monkeypatch):
    monkeypatch.setattr(raise_activations, "LOOSE", {"f32": 0.01})
    monkeypatch.setattr(raise_activations, "TIGHT", 0.01)
    with pytest.raises(ValidationError, match="pass 'raise-activations': changed the function"):
        Pipeline("raise-activations").run(gelu(0, divide=True, left=True, half=0.5 * 1.001))
