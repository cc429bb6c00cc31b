"""Elementwise rows: what they pass, checked by numbers, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from row_checks import ACTS, LINEAR, Act, build, check, check_acts, error, options, relate

from planish.ir import ops
from planish.ir.constant import Constant
from planish.ir.errors import InvalidModelError, PlanishError
from planish.ir.graph import Graph
from planish.ir.ops.base import Block, Carry, Link, OneOf, Wide
from planish.ir.types import UNKNOWN, TensorType

P, S, T, R, L = Act.PERMUTE, Act.SCALE, Act.SHIFT, Act.ROTATE, Act.LINEAR
VECTOR = np.array([0.5, -2.0, 3.0, 0.25])
FLOAT = TensorType("f64", (2, 3, 4))


@pytest.mark.parametrize(
    ("name", "passing"),
    [
        ("neg", ACTS),
        ("identity", ACTS),
        ("relu", (P, S)),
        ("leaky_relu", (P, S)),
        ("abs", (P, S)),
        ("reciprocal", (P, S)),
        *((name, (P,)) for name in ("gelu", "silu", "sigmoid", "tanh", "erf", "exp", "elu", "softplus", "sin", "cos")),
        *((name, (P,)) for name in ("hard_sigmoid", "hard_swish", "floor", "ceil", "round", "sign")),
    ],
)
def test_unary(name: str, passing: tuple[Act, ...]) -> None:
    node = build(name, (2, 3, 4))
    for port in (0, -1):
        for axes in ((2,), (1, 2), (0,)):
            answers = check_acts(node, port, axes, passing)
            if name in ("relu", "leaky_relu", "abs"):
                assert answers[S].positive
    if name == "reciprocal":
        assert answers[S].links[0].variance == -1
    if name == "neg":
        assert answers[T].links[0].variance == -1


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "abs"])
def test_a_sign_does_not_pass_a_kink(name: str) -> None:
    node = build(name, (2, 5))
    wrong = Carry((Link(-1, (1,)),))  # as if factors of any sign passed
    assert error(node, S, 0, (1,), wrong) > 1e-3


def test_add_of_activations_joins() -> None:
    node = build("add", (2, 3, 4), (3, 4))
    for port, axes in ((0, (2,)), (1, (1,)), (-1, (2,)), (0, (1, 2)), (1, (0, 1)), (-1, (1, 2))):
        answers = check_acts(node, port, axes, ACTS)
        for act in LINEAR:
            assert len(answers[act].links) == 2
        assert len(answers[T].options) == 2


def test_add_of_a_constant_grows_or_absorbs() -> None:
    scalar = build("add", (2, 3, 4), 1.0)
    for port in (0, -1):
        answers = check_acts(scalar, port, (2,), ACTS)
        assert any(link.grow == (4,) for link in answers[S].links)  # 1 + x: the constant is scaled too
        assert [o.links[0].port for o in answers[T].options] == [
            ~(port if port < 0 else 0) if port < 0 else -1,
            1,
        ]
    vector = build("add", (2, 3, 4), VECTOR)
    answers = check_acts(vector, 0, (2,), ACTS)
    assert [(o.links[0].port, o.links[0].variance) for o in answers[T].options] == [(1, -1), (-1, 1)]
    answers = check_acts(vector, -1, (2,), ACTS)
    assert [(o.links[0].port, o.links[0].variance) for o in answers[T].options] == [(1, 1), (0, 1)]
    answers = check_acts(vector, 0, (1, 2), ACTS)
    assert [link.grow for link in answers[P].links] == [None, (3, 4)] or answers[P].links[0].grow == (3, 4)
    bias = build("add", (2, 3, 4, 4), VECTOR[:3].reshape(3, 1, 1))
    check_acts(bias, 0, (1,), ACTS)
    check_acts(bias, 1, (0,), ACTS)  # asked at the constant, by its other reader
    check_acts(bias, 0, (2,), ACTS)
    zero = check(build("add", (2, 4), 0.0), L, 0, 1)
    assert [link.port for link in zero.links] == [-1]


def test_sub_signs() -> None:
    node = build("sub", (3, 4), (3, 4))
    for port in (0, 1, -1):
        answers = check_acts(node, port, (1,), ACTS)
    got = {
        port: [(o.links[0].port, o.links[0].variance) for o in options(relate(node, T, port, 1))] for port in (0, 1, -1)
    }
    assert got == {0: [(-1, 1), (1, 1)], 1: [(-1, -1), (0, 1)], -1: [(0, 1), (1, -1)]}
    assert all(link.variance == 1 for link in answers[S].links)


def test_broadcast_activations() -> None:
    add = build("add", (2, 3, 4), (2, 3, 1))
    check_acts(add, 0, (2,), (P, T))
    assert [o.links[0].port for o in options(relate(add, T, 0, 2))] == [-1]
    answers = check_acts(add, 0, (1, 2), (P, S, T))  # tied within each of the 3
    assert answers[P].block_axes == (1,)
    assert any(link.pairs is not None for link in answers[S].links)
    check_acts(add, 1, (1,), ACTS)
    mul = build("mul", (2, 3, 4), (2, 3, 1))
    for port in (0, -1):
        answers = check_acts(mul, port, (2,), LINEAR)
        assert [link.port for link in answers[S].links] == [-1 if port == 0 else 0]
        answers = check_acts(mul, port, (1, 2), LINEAR)
        assert answers[R].block_axes == (1,)
        assert isinstance(answers[S], OneOf)
    check_acts(mul, 1, (1,), (P, S))
    check_acts(mul, 1, (2,), (P,))  # one element for all channels
    missing = build("mul", (2, 3, 4), (4,))
    check_acts(missing, 0, (1,), LINEAR)
    check_acts(missing, 0, (2,), (P, S))


def test_mul_and_div() -> None:
    mul = build("mul", (3, 4), (3, 4))
    for port in (0, 1, -1):
        answers = check_acts(mul, port, (1,), (P, S))
        assert isinstance(answers[S], OneOf)
    assert [(o.links[0].port, o.links[0].variance) for o in relate(mul, S, 0, 1).options] == [
        (-1, 1),
        (1, -1),
    ]
    vector = build("mul", (3, 4), VECTOR)
    assert [(o.links[0].port, o.links[0].variance) for o in check(vector, S, 0, 1).options] == [
        (1, -1),
        (-1, 1),
    ]
    assert [(o.links[0].port, o.links[0].variance) for o in check(vector, S, -1, 1).options] == [
        (1, 1),
        (0, 1),
    ]
    scalar = build("mul", (3, 4), np.array(0.125))
    for port in (0, -1):
        answers = check_acts(scalar, port, (1,), LINEAR)
        assert all(len(answers[act].links) == 1 for act in LINEAR)
    div = build("div", (3, 4), (3, 4))
    for port in (0, 1, -1):
        check_acts(div, port, (1,), (P, S))
    assert [(o.links[0].port, o.links[0].variance) for o in relate(div, S, 1, 1).options] == [
        (-1, -1),
        (0, 1),
    ]
    over = build("div", 2.0, (3, 4))  # c / x
    for port in (1, -1):
        answers = check_acts(over, port, (1,), (P, S))
        assert options(answers[S])[0].links[0].variance == -1
    check_acts(build("div", (3, 4), 2.0), 0, (1,), LINEAR)


def test_the_same_value_twice() -> None:
    square = build("mul", (3, 4), "same:0")
    answers = check_acts(square, 0, (1,), (P,))
    assert answers[S] == Block("both factors are the same value")
    double = build("add", (3, 4), "same:0")
    answers = check_acts(double, 1, (1,), LINEAR)
    assert answers[T] == Block("both operands are the same value")
    check_acts(build("max", (3, 4), "same:0"), 0, (1,), (P, S, T))


def test_choices() -> None:
    for name in ("max", "min"):
        node = build(name, (2, 3, 4), (4,), VECTOR)
        for port, axes in ((0, (2,)), (1, (0,)), (-1, (2,))):
            assert check_acts(node, port, axes, (P, S, T))[S].positive
        node = build(name, (2, 4), np.array(0.0))  # a relu
        assert [link.port for link in check(node, S, 0, 1).links] == [-1]
        check(build(name, (2, 4), np.array(1.5)), S, 0, 1)
        check(build(name, (2, 4), np.array(1.5)), T, 0, 1)


def test_where() -> None:
    node = build("where", TensorType("bool", (2, 3, 1)), (2, 3, 4), (4,))
    for port, axes in ((1, (2,)), (2, (0,)), (-1, (2,))):
        check_acts(node, port, axes, ACTS)
    assert check(build("where", TensorType("bool", (2, 3, 1)), (2, 3, 4), (2, 3, 4)), R, 1, 1, 2).block_axes == (1,)
    node = build("where", TensorType("bool", (2, 3, 4)), (2, 3, 4), (2, 3, 4))
    for port in (1, 2, -1):
        check_acts(node, port, (2,), (P, S, T))
    check_acts(node, 0, (2,), (P,))
    mask = build("where", TensorType("bool", (3, 1)), (2, 3, 4), np.array(-math.inf))
    assert check(mask, S, 1, 2).positive
    check(mask, T, 1, 2)
    assert isinstance(relate(mask, R, 1, 2), Block)
    zero = build("where", TensorType("bool", (3, 1)), (2, 3, 4), np.array(0.0))
    assert [link.port for link in check(zero, L, 1, 2).links] == [-1]


def test_prelu_pow_clip_compare() -> None:
    node = build("prelu", (2, 3, 4), VECTOR)
    for port in (0, -1):
        assert check_acts(node, port, (2,), (P, S))[S].positive
    check_acts(node, 1, (0,), (P,))
    check_acts(build("pow", (2, 4), np.array(2.0)), 0, (1,), (P,))
    clip = build("clip", (2, 4), np.array(-1.0), np.array(0.5))
    check_acts(clip, 0, (1,), (P,))
    check_acts(build("clip", (2, 4)), 0, (1,), ACTS)
    check_acts(build("less", (2, 4), (4,)), 0, (1,), (P,))
    check_acts(build("mod", (2, 4), (4,)), 1, (0,), (P,))


def test_casts() -> None:
    check_acts(build("cast", TensorType("f32", (2, 4)), to="f64"), 0, (1,), ACTS)
    check_acts(build("cast", TensorType("f16", (2, 4)), to="bf16"), -1, (1,), ACTS)
    answers = check_acts(build("cast", (2, 4), to="i64"), 0, (1,), (P,))
    assert answers[S] == Block("it rounds to i64")
    answers = check_acts(build("cast", (2, 4), to="f8e4m3fn"), -1, (1,), (P,))
    answers = check_acts(build("cast", TensorType("i64", (2, 4)), to="f32"), -1, (1,), (P,))
    assert answers[L] == Block("it casts from i64")


def test_integers_are_only_permuted() -> None:
    node = build("add", TensorType("i64", (2, 4)), TensorType("i64", (2, 4)))
    answers = check_acts(node, 0, (1,), (P,))
    assert answers[S] == Block("i64 values can only be permuted")


def test_unknown_dims_are_not_guessed() -> None:
    node = build("add", ("B", "T", 4), ("B", "T", None))
    assert isinstance(relate(node, P, 0, 2), Block)
    assert node.result.shape == ("B", "T", 4)
    graph = Graph("g")
    x = graph.add_input("x", TensorType("f32", (2, 4)))
    y = graph.add_input("y", TensorType("f32"))
    node = graph.append(ops.get("mul"), [x, y])
    assert node.result.type == TensorType("f32")
    assert relate(node, S, 0, 1) == Block("an operand's rank is unknown")


def test_channels_are_where_a_vector_is() -> None:
    assert list(ops.get("mul").channels(build("mul", (2, 3, 4), VECTOR))) == [(-1, (2,))]
    assert list(ops.get("add").channels(build("add", VECTOR[:3].reshape(3, 1, 1), (2, 3, 4, 4)))) == [(-1, (1,))]
    assert not ops.get("mul").channels(build("mul", (2, 3, 4), 2.0))
    assert not ops.get("mul").channels(build("mul", (2, 3, 4), (4,)))


# -- evaluation and types -------------------------------------------------------------------------


def _run(
    name: str, *tensors: torch.Tensor | None, wide: torch.dtype | None = None, **attributes: object
) -> torch.Tensor:
    graph = Graph("g")
    values = [None if x is None else graph.add_constant(f"c{i}", Constant.of(x)) for i, x in enumerate(tensors)]
    node = graph.append(ops.get(name), values, attributes)  # type: ignore[arg-type]
    (result,) = node.op.evaluate(node, list(tensors), Wide(wide))
    return result


def test_evaluation_follows_onnx() -> None:
    t = torch.tensor
    assert _run("div", t([7, -7]), t([2, 2])).tolist() == [3, -3]
    assert _run("mod", t([-7, 7]), t([3, -3])).tolist() == [2, -2]
    assert _run("mod", t([-7.0, 7.0]), t([3.0, -3.0]), fmod=True).tolist() == [-1.0, 1.0]
    assert _run("pow", t([2, 3]), t([2.0, 0.5])).tolist() == [4, 1]
    assert _run("pow", t([2.0]), t([3])).dtype == torch.float32
    assert _run("round", t([0.5, 1.5, -0.5])).tolist() == [0.0, 2.0, -0.0]
    assert _run("clip", t([-3.0, 0.0, 3.0]), t(-1.0), None).tolist() == [-1.0, 0.0, 3.0]
    assert _run("clip", t([-3.0, 0.0, 3.0]), t(2.0), t(1.0)).tolist() == [1.0, 1.0, 1.0]
    assert _run("add", t([1, 65535]).to(torch.uint16), t([1, 1]).to(torch.uint16)).tolist() == [2, 0]
    assert _run("max", t([1.0, math.nan]), t([2.0, 0.0]), t([0.0, 0.0])).isnan().tolist() == [False, True]
    assert _run("prelu", t([-2, 2]), t([3, 3])).tolist() == [-6, 2]
    softplus = _run("softplus", t([30.0, -800.0, 800.0], dtype=torch.float64))
    assert softplus.tolist() == [30.0 + math.log1p(math.exp(-30.0)), 0.0, 800.0]
    assert _run("elu", t([-1.0], dtype=torch.float64), alpha=2.0).item() == pytest.approx(2 * math.expm1(-1), rel=1e-15)
    assert _run("gelu", t([1.0], dtype=torch.float64)).item() == pytest.approx(0.8413447460685429, rel=1e-15)


def test_casts_follow_onnx() -> None:
    t = torch.tensor
    assert _run("cast", t([1.9, -1.9]), to="i32").tolist() == [1, -1]
    assert _run("cast", t([0.0, 0.5]), to="bool").tolist() == [False, True]
    assert _run("cast", t([300.0]), to="u16").dtype == torch.uint16
    assert _run("cast", t([9, -9, 7]), to="i4").tolist() == [-7, 7, 7]
    assert _run("cast", t([17]), to="u4").tolist() == [1]
    assert _run("cast", t([1e4, -1e4]), to="f8e4m3fn").to(torch.float32).tolist() == [448.0, -448.0]
    assert _run("cast", t([1.0001]), to="f16", wide=torch.float64).dtype == torch.float64
    assert _run("cast", t([1e4]), to="f8e4m3fn", saturate=False).to(torch.float32).isnan().all()
    assert _run("cast", t([1e9, 3.2]), to="f4e2m1").to(torch.float32).tolist() == [6.0, 3.0]
    with pytest.raises(PlanishError, match="rounding to dtype f8e8m0 is not supported"):
        _run("cast", t([1.0]), to="f8e8m0")


def test_types() -> None:
    assert build("less", (2, 1), (3,)).result.type == TensorType("bool", (2, 3))
    assert build("where", TensorType("bool", (2, 1)), (3,), ()).result.type == TensorType("f64", (2, 3))
    assert build("cast", ("B", 3), to="i8").result.type == TensorType("i8", ("B", 3))
    assert build("is_nan", ("B", 3)).result.type == TensorType("bool", ("B", 3))
    graph = Graph("g")
    odd = graph.add_input("odd", UNKNOWN)
    assert graph.append(ops.get("identity"), [odd]).result.type == UNKNOWN
    assert graph.append(ops.get("add"), [odd, odd]).result.type == UNKNOWN
    with pytest.raises(InvalidModelError, match=r"operand shapes: dims 3 and 4 do not broadcast\n  in .*add"):
        build("add", (2, 3), (2, 4))
