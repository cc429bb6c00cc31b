"""Lower bounds by op: never above what random inputs reach, and as tight as the shift of gelu needs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from patterns import Build

from planish.ir import ops
from planish.ir.evaluator import evaluate
from planish.ir.graph import Value
from planish.passes.bounds import KEEPS, LEAST, lower_bound
from planish.passes.branch_search import choose_shift


@pytest.mark.parametrize("op", sorted(LEAST))
def test_no_element_falls_below(op: str) -> None:
    b = Build()
    attributes = {"axis": -1} if op == "softmax" else {}
    y = b(op, b.input("x", "f32[n]"), **attributes)
    graph = b.output(y)
    x = torch.cat([torch.linspace(-30, 30, 200_001), torch.linspace(-2, 0, 200_001)])
    x = x.abs() if op in ("sqrt", "rsqrt") else x
    got = evaluate(graph, {"x": x})[y.name]
    bound = lower_bound(y)
    assert bound is not None
    assert float(got.min()) >= bound
    if op in ("gelu", "silu", "hard_swish"):
        assert float(got.min()) - bound < 2e-4


def test_every_op_is_there() -> None:
    for name in [*LEAST, *KEEPS]:
        assert ops.get(name).name == name


def test_the_tanh_form_of_gelu() -> None:
    x = torch.linspace(-2, 0, 400_001, dtype=torch.float64)
    assert float(torch.nn.functional.gelu(x, approximate="tanh").min()) >= LEAST["gelu"]


def test_shifts() -> None:
    """22/128 behind gelu, as SVDQuant's; 36/128 behind silu; nothing behind relu or above."""
    assert choose_shift(LEAST["gelu"]) == 0.171875
    assert choose_shift(LEAST["silu"]) == 36 / 128
    assert choose_shift(0.0) == choose_shift(3.0) == 0.0
    assert choose_shift(-1.0) == 1.0


def bound(make) -> float | None:  # type: ignore[no-untyped-def]
    b = Build()
    value: Value = make(b, b.input("x", "f32[n, 4]"))
    return lower_bound(value)


def test_sums_products_and_shapes() -> None:
    assert bound(lambda b, x: x) is None
    assert bound(lambda b, x: b("linear", b("relu", x), b.random(3, 4))) is None
    assert bound(lambda b, x: b("add", b("relu", x), b.constant([1.0, 2, 3, 4]))) == 1.0
    assert bound(lambda b, x: b("add", b("gelu", x), b.constant(0.171875))) == pytest.approx(0.171875 - 0.1701)
    assert bound(lambda b, x: b("mul", b("relu", x), b.constant([0.5, 2, 3, 4]))) == 0.0
    assert bound(lambda b, x: b("mul", b("tanh", x), b.constant([0.5, 2, 3, 4]))) == -4.0
    assert bound(lambda b, x: b("mul", b.constant([0.5, 2, 3, 4]), b("tanh", x))) == -4.0
    assert bound(lambda b, x: b("mul", b("relu", x), b.constant([-1.0, 2, 3, 4]))) is None
    assert bound(lambda b, x: b("mul", b("tanh", x), b("tanh", x))) is None
    assert bound(lambda b, x: b("mul", b("relu", x), x)) is None
    assert bound(lambda b, x: b("add", b("relu", x), x)) is None
    assert bound(lambda b, x: b("transpose", b("sigmoid", x), perm=(1, 0))) == 0.0
    assert bound(lambda b, x: b("concat", b("relu", x), b("tanh", x), axis=1)) == -1.0
    assert bound(lambda b, x: b("concat", b("relu", x), x, axis=1)) is None
    assert bound(lambda b, x: b("max", x, b.constant(2.0))) == 2.0
    assert bound(lambda b, x: b("clip", x, b.constant(-3.0), b.constant(6.0))) == -3.0
    assert bound(lambda b, x: b("clip", b("relu", x), None, b.constant(6.0))) == 0.0
    assert bound(lambda b, x: b("elu", x, alpha=2.0)) == -2.0


def test_a_bound_that_is_no_number_is_none() -> None:
    assert bound(lambda b, x: b("max", x, b.constant(np.nan))) is None
    assert bound(lambda b, x: b("clip", x, b.constant(-np.inf), None)) is None
