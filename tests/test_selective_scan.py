"""The row selective_scan: what it computes, what it commutes with, and what it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from row_checks import LINEAR, build, check, check_acts, draw, relate, run

from planish.ir import ops
from planish.ir.errors import InvalidModelError
from planish.ir.graph import Graph, Node
from planish.ir.ops.base import Act, Block, Carry, Link, Wide
from planish.ir.types import TensorType

B, D, N, T = 2, 4, 3, 5
DECAY = "each channel and each state decays at a rate of its own"
SHIFTED = "its recurrence multiplies what is added"


def scan(skip: bool = True, constant: bool = True) -> Node:
    rng = np.random.default_rng(0)
    a = -np.exp(rng.normal(size=(D, N))) / 1e3  # the checks plant large steps
    more = (rng.normal(size=D),) if skip else ()
    return build("selective_scan", (B, D, T), (B, D, T), a if constant else (D, N), (B, N, T), (B, N, T), *more)


def written_out(u, delta, a, b, c, skip=None):
    """One number at a time."""
    y = np.zeros_like(u)
    for i in range(u.shape[0]):
        for d in range(u.shape[1]):
            for n in range(a.shape[1]):
                h = 0.0
                for t in range(u.shape[2]):
                    h = np.exp(delta[i, d, t] * a[d, n]) * h + delta[i, d, t] * b[i, n, t] * u[i, d, t]
                    y[i, d, t] += c[i, n, t] * h
    return y if skip is None else y + skip[:, None] * u


@pytest.mark.parametrize("skip", [True, False])
def test_evaluates(skip: bool) -> None:
    node = scan(skip)
    data = draw(node, np.random.default_rng(1))
    np.testing.assert_allclose(run(node, data)[0], written_out(*data), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_evaluates_in_the_dtype_of_its_operands(dtype: torch.dtype) -> None:
    node = scan()
    data = [torch.from_numpy(np.array(x)).to(dtype) for x in draw(node, np.random.default_rng(1)) if x is not None]
    (y,) = node.op.evaluate(node, data, Wide())
    assert y.dtype is dtype
    assert y.shape == (B, D, T)


def test_no_time_at_all() -> None:
    rows, states = np.zeros((2, D, 0)), np.zeros((2, N, 0))
    assert run(scan(), [rows, rows, np.zeros((D, N)), states, states, np.ones(D)])[0].shape == (2, D, 0)


def test_result_type_comes_from_every_operand() -> None:
    graph = Graph("g")
    types = [("b", None, "t"), ("b", 4, None), (4, 3), ("b", 3, None), (None, 3, 7)]
    operands = [graph.add_input(f"x{i}", TensorType("f32", shape)) for i, shape in enumerate(types)]
    node = graph.append(ops.get("selective_scan"), operands, {})
    assert node.result.type == TensorType("f32", ("b", 4, 7))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 4), (2, 4, 5), (4, 3), (2, 3, 5), (2, 3, 5)], "expected u of rank 3, not 2"),
        ([(2, 4, 5), (2, 4, 5), (6, 3), (2, 3, 5), (2, 3, 5)], "a has 6 along d, another operand 4"),
        ([(2, 4, 5), (2, 4, 5), (4, 3), (2, 8, 5), (2, 3, 5)], "b has 8 along n, another operand 3"),
        ([(2, 4, 5), (2, 4, 6), (4, 3), (2, 3, 5), (2, 3, 5)], "delta has 6 along t, another operand 5"),
    ],
)
def test_wrong_shapes(shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(InvalidModelError, match=message):
        build("selective_scan", *shapes)


# -- the algebra -------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("port", [0, -1])
def test_channels(skip: bool, port: int) -> None:
    """A factor per channel of u shows on y; channels change places with their rates."""
    node = scan(skip)
    answers = check_acts(node, port, (1,), [Act.SCALE, Act.PERMUTE])
    assert answers[Act.SCALE] == Carry((Link(~port, (1,)),))
    others = {(0, (1,)), (1, (1,)), (2, (0,)), (-1, (1,))} | ({(5, (0,))} if skip else set())
    permuted = answers[Act.PERMUTE]
    assert isinstance(permuted, Carry)
    assert {(link.port, link.axes) for link in permuted.links} == others - {(port, (1,))}
    assert relate(node, Act.ROTATE, port, 1) == relate(node, Act.LINEAR, port, 1) == Block(DECAY)


@pytest.mark.parametrize("port", [3, 4])
def test_states(port: int) -> None:
    """b and c are dual on the states (b.md 9, S4)."""
    node = scan()
    answers = check_acts(node, port, (1,), [Act.SCALE, Act.PERMUTE])
    assert answers[Act.SCALE] == Carry((Link(7 - port, (1,), -1),))
    assert answers[Act.PERMUTE] == Carry(
        tuple(sorted((Link(2, (1,)), Link(7 - port, (1,))), key=lambda link: link.port))
    )
    assert relate(node, Act.ROTATE, port, 1) == Block(DECAY)


def test_sequences() -> None:
    node = scan()
    for port in (0, 1, 3, 4, -1):
        check(node, Act.PERMUTE, port, 0)
    for port in (0, 3, 4, -1):
        check(node, Act.SCALE, port, 0)
    check(node, Act.SCALE, 0, 0, 1)
    check(node, Act.SCALE, 3, 0, 1)


def test_time() -> None:
    node, bare = scan(), scan(skip=False)
    assert relate(node, Act.PERMUTE, 0, 2) == Block("its recurrence goes through time in order")
    assert relate(node, Act.SCALE, 0, 2) == Block("its states remember what came before")
    assert relate(node, Act.SCALE, 4, 2) == Block("its result has a part that does not pass through the states")
    assert check(bare, Act.SCALE, 4, 2) == Carry((Link(-1, (2,)),))
    assert check(bare, Act.SCALE, -1, 0, 2) == Carry((Link(4, (0, 2)),))


def test_rates_and_steps_stand_in_an_exponential() -> None:
    node = scan(constant=False)
    for port, axis in ((1, 1), (2, 0), (2, 1)):
        assert relate(node, Act.SCALE, port, axis) == Block("it stands in an exponential")
        for act in LINEAR:
            answer = relate(node, act, port, axis)
            assert isinstance(answer, Block if act is not Act.PERMUTE else Carry)
        check(node, Act.PERMUTE, port, axis)
    assert relate(scan(), Act.SCALE, 5, 0) == Block("its result is a sum of two parts")


@pytest.mark.parametrize("port", [0, 1, 2, 3, 4, 5, -1])
def test_no_shift(port: int) -> None:
    assert relate(scan(), Act.SHIFT, port, 0) == Block(SHIFTED)


def test_joint_axes_that_an_operand_lacks() -> None:
    assert relate(scan(), Act.PERMUTE, 0, 0, 1) == Block("an operand has only some of these axes")
