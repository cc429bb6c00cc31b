"""Structural, indexing and reducing rows: where axes go, checked by numbers, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from row_checks import ACTS, LINEAR, Act, build, check, check_acts, relate

from planish.ir import ops
from planish.ir.constant import Constant
from planish.ir.graph import Attribute, Graph
from planish.ir.ops.base import Block, Carry, Link, Wide
from planish.ir.types import Dim, TensorType

P, S, T, R, L = Act.PERMUTE, Act.SCALE, Act.SHIFT, Act.ROTATE, Act.LINEAR


def ints(*data: int) -> np.ndarray:
    return np.array(data, np.int64)


def link_of(node: object, port: int, *axes: int, act: Act = L) -> Link:
    relation = check(node, act, port, *axes)  # type: ignore[arg-type]
    assert isinstance(relation, Carry)
    (link,) = relation.links
    return link


# -- reshape --------------------------------------------------------------------------------------


def test_heads_split_and_merge() -> None:
    split = build("reshape", (2, 3, 20), ints(0, 0, 4, 5))
    assert link_of(split, 0, 2) == Link(-1, (2, 3))
    assert link_of(split, -1, 2, 3) == Link(0, (2,))
    for axis, repeats in ((2, np.repeat(np.arange(4), 5)), (3, np.tile(np.arange(5), 4))):
        link = link_of(split, -1, axis)
        assert link.axes == (2,)
        assert link.pairs is not None
        assert (link.pairs[0] == repeats).all()
        assert (link.pairs[1] == np.arange(20)).all()
    merge = build("reshape", (2, 3, 4, 5), ints(2, 3, -1))
    check_acts(merge, 0, (2, 3), ACTS)
    check_acts(merge, 0, (3,), ACTS)
    check_acts(merge, 0, (2,), ACTS)
    check_acts(merge, -1, (2,), ACTS)
    assert link_of(merge, 0, 1, 3).axes == (1, 2)
    assert link_of(merge, 0, 1) == Link(-1, (1,))


def test_repeated_key_heads() -> None:
    """[B, Kh, T, d] -> unsqueeze, expand, reshape -> [B, Kh * G, T, d]."""
    expand = build("expand", (2, 3, 1, 4, 5), ints(2, 3, 2, 4, 5))
    assert link_of(expand, 0, 1, 4) == Link(-1, (1, 4))
    assert link_of(expand, -1, 1, 4) == Link(0, (1, 4))
    assert link_of(expand, -1, 1, 2, 4).axes == (1, 4)
    check_acts(expand, -1, (1, 2), ACTS)
    check_acts(expand, -1, (2,), (P,))
    merge = build("reshape", (2, 3, 2, 4, 5), ints(2, 6, 4, 5))
    link = link_of(merge, 0, 1, 4)
    assert link.axes == (1, 3)
    assert link.pairs is not None
    assert link.pairs[0].reshape(3, 2, 5)[1, 1].tolist() == [5, 6, 7, 8, 9]
    assert link_of(merge, -1, 1, 3).axes == (1, 2, 4)


@pytest.mark.parametrize(
    ("shape", "target", "axes", "expected"),
    [
        (("B", "T", 768), (0, 0, 12, 64), (2,), (2, 3)),
        (("B", "T", 768), (0, -1, 12, 64), (2,), (2, 3)),
        ((None, None, 768), (0, 0, 12, 64), (2,), (2, 3)),
        ((None, None, 768), (-1, 768), (2,), (1,)),
        (("B", 4, "T", 6), (0, 0, -1), (1,), (1,)),
        (("B", 1, 8), (-1, 8), (2,), (1,)),
        (("B", 4, "T"), (0, 2, 2, -1), (1,), (1, 2)),
        ((None, 4, None), (0, 2, 2, -1), (1,), (1, 2)),
        ((None, 4, None), (-1, 2, 2, 7), (1,), None),
        ((1, 128, 12), (128, 3, 4), (2,), (1, 2)),
    ],
)
def test_dynamic_reshapes(
    shape: tuple[Dim, ...], target: tuple[int, ...], axes: tuple[int, ...], expected: object
) -> None:
    node = build("reshape", shape, ints(*target))
    relation = relate(node, L, 0, *axes)
    if expected is None:
        assert isinstance(relation, Block)
    else:
        assert relation == Carry((Link(-1, expected),))  # type: ignore[arg-type]


def test_reshapes_that_shift_channels_block() -> None:
    shifting = build("reshape", ("B", 6, 4), ints(0, 8, 3))
    for axes in ((1,), (2,), (1, 2)):
        for port in (0, -1):
            assert relate(shifting, S, port, *axes) == Block("its new shape cuts across the channels")
    dynamic = build("reshape", ("B", "T", 6), ints(0, -1, 4))
    assert relate(dynamic, P, 0, 2) == Block("it mixes the axis with a dynamic one")
    assert relate(dynamic, P, -1, 2) == Block("it mixes the axis with a dynamic one")
    assert isinstance(relate(build("reshape", ("B", 4, 6), ints(-1, 6)), S, 0, 1), Block)
    graph = Graph("g")
    x, shape = graph.add_input("x", TensorType("f32", ("B", 6))), graph.add_input("s", TensorType("i64"))
    node = graph.append(ops.get("reshape"), [x, shape])
    assert relate(node, S, 0, 1) == Block("a rank is unknown")


def test_windows_are_cut_into_common_factors() -> None:
    node = build("reshape", (6, 4), ints(3, 8))  # [3 * 2, 4] -> [3, 2 * 4]
    assert link_of(node, 0, 1).axes == (1,)
    assert link_of(node, 0, 0).axes == (0, 1)
    check_acts(node, -1, (1,), ACTS)
    check_acts(node, 0, (0, 1), ACTS)


def test_axes_of_size_one() -> None:
    node = build("reshape", (2, 1, 6), ints(2, 6))
    assert link_of(node, 0, 1, 2) == Link(-1, (1,))
    assert check(node, P, 0, 1) == Carry()
    assert relate(node, S, 0, 1) == Block("the axis has size 1 and no place of its own")


def test_flatten_squeeze_unsqueeze_transpose() -> None:
    flatten = build("flatten", ("B", 3, 4), axis=1)
    assert relate(flatten, L, 0, 1, 2) == Carry((Link(-1, (1,)),))
    check_acts(build("flatten", (2, 3, 4), axis=1), 0, (2,), ACTS)
    check_acts(build("flatten", (2, 3, 4), axis=2), -1, (0,), ACTS)
    assert isinstance(relate(build("flatten", ("B", 3, 4), axis=2), S, 0, 1), Block)
    squeeze = build("squeeze", (2, 1, 3, 1, 4), axes=(1, -2))
    assert link_of(squeeze, 0, 2, 4) == Link(-1, (1, 2))
    assert link_of(squeeze, -1, 1, 2) == Link(0, (2, 4))
    assert link_of(squeeze, 0, 1, 2) == Link(-1, (1,))
    unsqueeze = build("unsqueeze", (2, 3, 4), axes=(1, -1))
    assert link_of(unsqueeze, 0, 1, 2) == Link(-1, (2, 3))
    assert link_of(unsqueeze, -1, 0, 2) == Link(0, (0, 1))
    transpose = build("transpose", (2, 3, 4, 5), perm=(0, 2, 1, 3))
    assert link_of(transpose, 0, 1, 3) == Link(-1, (2, 3))
    for perm in ((3, 1, 0, 2), (2, 3, 0, 1), (3, 2, 1, 0)):
        node = build("transpose", (2, 3, 4, 5), perm=perm)
        for port in (0, -1):
            for axes in ((0,), (1, 3), (0, 2, 3)):
                check_acts(node, port, axes, ACTS)
    reordered = link_of(build("transpose", (2, 3, 4), perm=(0, 2, 1)), 0, 1, 2)
    assert reordered.axes == (1, 2)
    assert reordered.pairs is not None
    assert reordered.pairs[0][:4].tolist() == [0, 4, 8, 1]


def test_expand() -> None:
    lower = build("expand", (4,), ints(2, 3, 4))
    assert link_of(lower, 0, 0) == Link(-1, (2,))
    assert link_of(lower, -1, 2) == Link(0, (0,))
    check_acts(lower, -1, (1,), (P,))
    check_acts(lower, -1, (1, 2), ACTS)
    one = build("expand", (2, 1), ints(2, 5))
    check_acts(one, 0, (1,), (P, S, T))
    assert relate(build("expand", (4,), ints(2, 4)), S, 1, 0) == Block("it reads this operand as a shape or an index")


# -- positions ------------------------------------------------------------------------------------


def test_concat() -> None:
    node = build("concat", (2, 3, 4), (2, 2, 4), np.ones((2, 1, 4)), axis=1)
    for port in (0, 1, 2, -1):
        check_acts(node, port, (1,), ACTS)
        check_acts(node, port, (1, 2), ACTS)
        assert len(check_acts(node, port, (2,), ACTS)[L].links) == 3  # type: ignore[union-attr]
    link = link_of(node, 1, 1)
    assert link.pairs is not None
    assert link.pairs[1].tolist() == [3, 4]
    dynamic = build("concat", ("B", "T", 4), ("B", 2, 4), axis=1)
    assert relate(dynamic, P, 1, 1) == Block("the sizes along the axis are not known")
    assert len(relate(dynamic, L, 0, 2).links) == 2  # type: ignore[union-attr]
    twice = build("concat", (2, 3), "same:0", axis=1)
    places = [check(twice, P, port, 1).links[0].pairs[1].tolist() for port in (0, 1)]  # type: ignore[union-attr, index]
    assert places == [[0, 1, 2], [3, 4, 5]]


def test_split() -> None:
    node = build("split", (2, 6, 4), axis=1, sizes=(1, 2, 3))
    for port in (0, -1, -2, -3):
        check_acts(node, port, (1,), ACTS)
        check_acts(node, port, (1, 2), ACTS)
        assert len(check_acts(node, port, (2,), ACTS)[S].links) == 3  # type: ignore[union-attr]
    assert len(check(node, L, -2, 1).links) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [
        (ints(1), ints(5), ints(1), None),
        (ints(-1), ints(-(1 << 60)), ints(1), ints(-1)),
        (ints(1, 0), ints(1 << 60, -1), ints(1, 2), ints(2, 1)),
        (ints(-2, 3), ints(1 << 60, 0), ints(-1, 1), ints(1, -2)),
    ],
)
def test_slice(starts: np.ndarray, ends: np.ndarray, axes: np.ndarray, steps: np.ndarray | None) -> None:
    node = build("slice", (2, 6, 4), starts, ends, axes, steps)
    for port in (0, -1):
        for asked in ((0,), (1,), (2,), (1, 2), (0, 2)):
            check_acts(node, port, asked, ACTS)


def test_flip_and_dynamic_slices() -> None:
    flip = build("slice", (2, 6), ints(-1), ints(-(1 << 62)), ints(1), ints(-1))
    link = link_of(flip, 0, 1)
    assert link.pairs is not None
    assert link.pairs[0].tolist() == [5, 4, 3, 2, 1, 0]
    whole = build("slice", ("B", 6), ints(0), ints((1 << 63) - 1), ints(1))
    assert relate(whole, L, 0, 1) == Carry((Link(-1, (1,)),))
    late = build("slice", (2, 6), TensorType("i64", (1,)), ints(6), ints(1))
    assert relate(late, P, 0, 1) == Block("the sizes along the axis are not known")
    assert relate(late, L, 0, 0) == Carry((Link(-1, (0,)),))
    unknown = build("slice", (2, 6), *[TensorType("i64", (1,))] * 3)
    assert isinstance(relate(unknown, L, 0, 0), Block)
    check_acts(build("slice", (2, 6), ints(1), ints(1), ints(1)), 0, (0,), ACTS)


def test_gather() -> None:
    node = build("gather", (2, 5, 4), ints(3, 0, -1, 3), axis=1)  # position 3 twice, 1 and 2 dropped
    for port in (0, -1):
        for axes in ((0,), (1,), (2,), (1, 2), (0, 1)):
            check_acts(node, port, axes, ACTS)
    matrix = build("gather", (2, 5, 4), np.array([[1, 2, 3], [4, 0, 1]]), axis=1)
    assert check(matrix, P, 0, 1).links[0].axes == (1, 2)  # type: ignore[union-attr]
    for axes in ((1, 2), (3,), (1, 2, 3)):
        check_acts(matrix, -1, axes, ACTS)
    assert isinstance(relate(matrix, P, -1, 1), Block)
    packed = build("gather", (3, 2, 4, 5), np.array(1), axis=0)  # q, k, v stacked on axis 0
    assert link_of(packed, 0, 0, 3).axes == (2,)
    assert link_of(packed, -1, 2) == Link(0, (3,))
    assert relate(packed, P, 0, 0) == Block("it takes one channel out")
    dynamic = build("gather", (2, 2, 4), TensorType("i64", (3,)), axis=1)
    assert relate(dynamic, S, 0, 1) == Block("its indices are not constant")
    assert relate(dynamic, S, -1, 1) == Block("its indices are not constant")
    check_acts(dynamic, 0, (2,), ACTS)
    check_acts(dynamic, 1, (0,), (P,))
    assert check(dynamic, P, -1, 1) == Carry((Link(1, (0,)),))


def test_embedding() -> None:
    node = build("embedding", np.random.default_rng(0).standard_normal((7, 4)), TensorType("i64", (2, 3)))
    assert list(node.op.channels(node)) == [(-1, (2,))]
    assert link_of(node, -1, 2) == Link(0, (1,))
    assert link_of(node, 0, 1) == Link(-1, (2,))
    check_acts(node, 0, (1,), ACTS)
    check_acts(node, -1, (1,), (P,))
    check_acts(node, 1, (0, 1), (P,))
    assert relate(node, P, 0, 0) == Block("it looks rows up")


def test_tile() -> None:
    node = build("tile", (2, 3, 4), ints(1, 2, 3))
    for port in (0, -1):
        for axes in ((0,), (1,), (2,), (0, 2), (1, 2)):
            check_acts(node, port, axes, ACTS)
    dynamic = build("tile", (2, 3), TensorType("i64", (2,)))
    assert isinstance(relate(dynamic, P, 0, 1), Block)


def test_pad() -> None:
    zero = build("pad", (2, 3, 4), ints(0, 1, 0, 0, 2, 0))
    for port in (0, -1):
        for axes in ((0,), (1,), (2,), (1, 2)):
            check_acts(zero, port, axes, LINEAR)
    ones = build("pad", (2, 3, 4), ints(1, 2), np.array(1.0), ints(1))
    for axes in ((1,), (2,)):
        check_acts(ones, 0, axes, (P,))
    crop = build("pad", (2, 5, 4), ints(-1, -2), None, ints(1))
    for axes in ((1,), (2,)):
        check_acts(crop, 0, axes, ACTS)
    for mode in ("reflect", "edge", "wrap"):
        node = build("pad", (2, 5, 4), ints(2, -1), None, ints(1), mode=mode)
        for port in (0, -1):
            for axes in ((1,), (2,), (1, 2)):
                check_acts(node, port, axes, ACTS)
    late = build("pad", (2, 5), TensorType("i64", (4,)))
    assert isinstance(relate(late, P, 0, 1), Block)


def test_trilu() -> None:
    node = build("trilu", (2, 3, 4), upper=False)
    for port in (0, -1):
        check_acts(node, port, (0,), LINEAR)
        check_acts(node, port, (2,), (S,))
        check_acts(node, port, (0, 1), (S,))


def test_sizes() -> None:
    node = build("shape", (2, 3))
    assert all(relate(node, act, 0, 1) == Carry() for act in ACTS)
    assert all(isinstance(relate(node, act, -1, 0), Block) for act in ACTS)
    zeros = build("constant_of_shape", ints(2, 3), value=Constant.of(np.zeros(1)))
    assert [act for act in ACTS if relate(zeros, act, -1, 1) == Carry()] == list(LINEAR[:2] + LINEAR[2:])
    ones = build("constant_of_shape", ints(2, 3), value=Constant.of(np.ones(1)))
    assert [act for act in ACTS if relate(ones, act, -1, 1) == Carry()] == [P]
    assert isinstance(relate(build("range", ints(0)[0], ints(5)[0], ints(1)[0]), P, -1, 0), Block)


# -- reductions and pools -------------------------------------------------------------------------


@pytest.mark.parametrize("keepdims", [True, False])
@pytest.mark.parametrize(
    ("name", "passing", "invisible"),
    [
        ("reduce_sum", LINEAR, (P,)),
        ("reduce_mean", ACTS, (P,)),
        ("reduce_max", (P, S, T), (P,)),
        ("reduce_min", (P, S, T), (P,)),
        ("reduce_prod", (P,), (P,)),
        ("reduce_l2", (P, S), (P, R)),
    ],
)
def test_reductions(name: str, passing: tuple[Act, ...], invisible: tuple[Act, ...], keepdims: bool) -> None:
    node = build(name, (2, 3, 4, 5), axes=(1, -1), keepdims=keepdims)
    for axes in ((0,), (2,), (0, 2)):
        check_acts(node, 0, axes, passing)
    last = 2 if keepdims else 1
    check_acts(node, -1, (last,), passing)
    check_acts(node, -1, (0, last), passing)
    for axes in ((1,), (3,), (1, 3)):
        answers = check_acts(node, 0, axes, invisible)
        assert all(answers[act] == Carry() for act in invisible)
    assert relate(node, P, 0, 2, 3) == Block("it reduces some of the axes")
    if keepdims:
        assert relate(node, S, -1, 1) == Block("it reduces the axis")
    everything = build(name, (2, 3), keepdims=keepdims)
    assert check(everything, P, 0, 1) == Carry()


@pytest.mark.parametrize(
    ("name", "attributes", "passing"),
    [
        ("max_pool", {"pads": (1, 0, 1, 1)}, (P, S, T)),
        ("average_pool", {"pads": (1, 0, 1, 1)}, ACTS),
        ("average_pool", {"pads": (1, 0, 1, 1), "count_include_pad": True}, LINEAR),
        ("average_pool", {"count_include_pad": True, "ceil_mode": True}, ACTS),
        ("average_pool", {"auto_pad": "same_lower"}, ACTS),
    ],
)
def test_pools(name: str, attributes: dict[str, Attribute], passing: tuple[Act, ...]) -> None:
    node = build(name, (2, 3, 6, 7), kernel=(2, 3), strides=(1, 2), **attributes)
    for port in (0, -1):
        for axes in ((1,), (0,), (0, 1)):
            check_acts(node, port, axes, passing)
        assert relate(node, P, port, 2) == Block("it slides along the axis")


def test_global_pools() -> None:
    for name, passing in (("global_average_pool", ACTS), ("global_max_pool", (P, S, T))):
        node = build(name, (2, 3, 4, 5))
        check_acts(node, 0, (1,), passing)
        check_acts(node, -1, (1,), passing)
        assert check(node, P, 0, 2, 3) == Carry()


# -- evaluation -----------------------------------------------------------------------------------


def _run(name: str, *tensors: torch.Tensor | None, **attributes: Attribute) -> torch.Tensor:
    graph = Graph("g")
    values = [None if x is None else graph.add_constant(f"c{i}", Constant.of(x)) for i, x in enumerate(tensors)]
    node = graph.append(ops.get(name), values, attributes)
    results = node.op.evaluate(node, list(tensors), Wide())
    for result, value in zip(results, node.results, strict=True):
        assert value.shape == tuple(result.shape)
    return results[0]


def test_pools_agree_with_torch() -> None:
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    got = _run("max_pool", x, kernel=(3, 2), strides=(2, 2), pads=(1, 1, 1, 1), dilations=(2, 1))
    assert torch.equal(got, F.max_pool2d(x, (3, 2), 2, 1, (2, 1)))
    got = _run("max_pool", x, kernel=(3, 3), strides=(2, 3), ceil_mode=True)
    assert torch.equal(got, F.max_pool2d(x, 3, (2, 3), ceil_mode=True))
    for counted in (True, False):
        got = _run("average_pool", x, kernel=(3, 3), strides=(2, 3), pads=(1,) * 4, count_include_pad=counted)
        assert torch.allclose(got, F.avg_pool2d(x, 3, (2, 3), 1, count_include_pad=counted), rtol=1e-14)
        got = _run(
            "average_pool",
            x,
            kernel=(3, 3),
            strides=(2, 2),
            pads=(1,) * 4,
            count_include_pad=counted,
            ceil_mode=True,
        )
        expected = F.avg_pool2d(x, 3, 2, 1, count_include_pad=counted, ceil_mode=True)
        assert torch.allclose(got, expected, rtol=1e-14)
    got = _run("max_pool", torch.arange(8, dtype=torch.int8).reshape(1, 1, 8) - 4, kernel=(3,), pads=(1, 1))
    assert got.tolist() == [[[-3, -2, -1, 0, 1, 2, 3, 3]]]


def test_structural_evaluation() -> None:
    x = torch.arange(6)
    i = torch.tensor
    assert _run("slice", x, i([4]), i([0]), i([0]), i([-2])).tolist() == [4, 2]
    assert _run("slice", x.to(torch.uint16), i([-1]), i([-100]), None, i([-3])).tolist() == [5, 2]
    assert _run("pad", x, i([2, 1]), mode="reflect").tolist() == [2, 1, 0, 1, 2, 3, 4, 5, 4]
    assert _run("pad", x, i([1, -3]), mode="wrap").tolist() == [2, 0, 1, 2]
    assert _run("pad", x, i([1, 2]), i(9)).tolist() == [9, 0, 1, 2, 3, 4, 5, 9, 9]
    assert _run("pad", x, i([-2, 1])).tolist() == [2, 3, 4, 5, 0]
    assert _run("gather", x, i([[-1, 0]])).tolist() == [[5, 0]]
    assert _run("gather", x, i(2)).item() == 2
    assert _run("tile", x.reshape(2, 3), i([1, 2])).tolist() == [[0, 1, 2, 0, 1, 2], [3, 4, 5, 3, 4, 5]]
    assert _run("trilu", torch.ones(3, 3), i(1)).sum() == 3
    assert _run("range", i(5), i(0), i(-2)).tolist() == [5, 3, 1]
    assert _run("reshape", torch.zeros(0, 4), i([0, -1])).shape == (0, 0)
    assert _run("reshape", torch.zeros(0, 4), i([4, 0]), allowzero=True).shape == (4, 0)
    assert _run("shape", torch.zeros(2, 3, 4), start=-2).tolist() == [3, 4]
    assert _run("concat", *[torch.ones(2, dtype=torch.uint32)] * 2).tolist() == [1, 1, 1, 1]


def test_reduction_evaluation() -> None:
    x = torch.tensor([[3.0, -4.0], [0.0, 1.0]])
    assert _run("reduce_l2", x, axes=(1,), keepdims=False).tolist() == [5.0, 1.0]
    assert _run("reduce_l2", x, axes=()).tolist() == [[3.0, 4.0], [0.0, 1.0]]
    assert _run("reduce_sum", x, axes=()).tolist() == x.tolist()
    assert _run("reduce_sum", torch.ones(3, dtype=torch.int32)).dtype == torch.int32
    assert _run("reduce_mean", torch.tensor([-3, -4]), keepdims=False).item() == -3
    assert _run("reduce_prod", x + 1, keepdims=False).item() == 4 * -3 * 1 * 2
    assert _run("reduce_max", torch.zeros(0, 2), axes=(0,)).tolist() == [[-math.inf, -math.inf]]
    assert _run("reduce_min", torch.tensor([True, False]), keepdims=False).item() is False
