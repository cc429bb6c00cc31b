"""Linear layers that are written with the weight on the left."""

from __future__ import annotations

import numpy as np
import pytest
from patterns import Build, counts, reasons, run

from planish.ir.graph import Value

PIPELINE = "raise-linear"


def product(b: Build, type: str = "f32[b, s, 4]", perm: tuple[int, ...] = (0, 2, 1)) -> Value:
    return b("matmul", b.random(5, 4), b("transpose", b.input("x", type), perm=perm))


@pytest.mark.parametrize(("type", "perm"), [("f32[b, s, 4]", (0, 2, 1)), ("f32[s, 4]", (1, 0))])
def test_one_transpose_takes_the_place_of_another(type: str, perm: tuple[int, ...]) -> None:
    b = Build()
    after, _ = run(b.output(product(b, type, perm)), PIPELINE)
    assert [n.op.name for n in after.nodes] == ["linear", "transpose"]
    assert next(after.nodes).operands[1].name == "w"  # the constant itself: no data moved


@pytest.mark.parametrize("shape", [(5, 1), (1, 5, 1)])
@pytest.mark.parametrize("swap", [False, True])
def test_bias(shape: tuple[int, ...], swap: bool) -> None:
    b = Build()
    bias, y = b.random(*shape, name="bias"), product(b)
    after, _ = run(b.output(b("relu", b("add", bias, y) if swap else b("add", y, bias))), PIPELINE)
    assert [n.op.name for n in after.nodes] == ["linear", "transpose", "relu"]
    bias = next(after.nodes).operand(2)
    assert bias is not None and bias.shape == (5,)


@pytest.mark.parametrize("bias", [np.ones((5,)), np.ones((1, 1)), np.ones((2, 5, 1))])
def test_what_is_no_bias(bias: np.ndarray) -> None:
    b = Build()
    y = b("add", product(b, "f32[2, 5, 4]"), bias)
    after, report = run(b.output(b("relu", y)), PIPELINE)
    assert counts(after)["add"] == 1
    assert any("no column over its channels" in miss for miss in report.misses)


def test_a_product_that_is_read_elsewhere() -> None:
    b = Build()
    y = product(b)
    after, report = run(b.output(b("add", y, b.random(5, 1)), b("relu", y)), PIPELINE)
    assert counts(after) == {"linear": 1, "transpose": 1, "add": 1, "relu": 1}
    assert reasons(report) == ["the linear is read elsewhere without the sum"]


@pytest.mark.parametrize("perm", [(1, 0, 2), (2, 0, 1)])
def test_another_transpose(perm: tuple[int, ...]) -> None:
    b = Build()
    x = b.input("x", "f32[4, 4, 4]")
    after, _ = run(b.output(b("matmul", b.random(5, 4), b("transpose", x, perm=perm))), PIPELINE)
    assert counts(after) == {"matmul": 1, "transpose": 1}
