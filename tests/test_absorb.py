"""Absorbing a transform: constants, folds, explicit ops, and every refusal."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from encoder_blocks import BLOCKS, WIDTH, linear, pre_norm
from helpers import check_text, random_inputs, relative_error
from patterns import Build

from planish.ir.absorb import absorb, transformed
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph, Value
from planish.ir.ops.base import ACTS, Act
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.spaces import Member, Space, analyse
from planish.ir.transform import Mix, Permute, Scale, Shift, Transform, random_transform
from planish.ir.verifier import verify

TOLERANCE = 1e-12


def between(middle: str = "relu", **attributes: object) -> Graph:
    """linear, `middle`, linear."""
    b = Build()
    h = linear(b, b.input("x", f"f32[2, 3, {WIDTH}]"), WIDTH, "a")
    return b.output(linear(b, b(middle, h, **attributes) if middle else h, WIDTH, "b"))


def space_at(graph: Graph, name: str, act: Act, axis: int = 2) -> Space:
    (space,) = analyse(graph).at(graph.values[name], (axis,), act)
    return space


def apply(graph: Graph, transforms: list[tuple[Space, Transform]], *, insert: bool = False) -> int:
    """Absorb all of them in one go, and check the text and the function."""
    before = graph.clone()
    inputs = random_inputs(graph, 1)
    with Rewriter(graph) as rewriter:
        inserted = sum(absorb(rewriter, s, t, insert=insert) for s, t in transforms)
    verify(graph)
    check_text(graph)
    expected, got = (evaluate(g, inputs, torch.float64) for g in (before, graph))
    for name in expected:
        assert relative_error(got[name], expected[name]) <= TOLERANCE
    return inserted


def counts(graph: Graph) -> Counter[str]:
    return Counter(n.op.name for n in graph.nodes)


# -- explicit ops --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "middle", "op"),
    [
        (Act.SCALE, "tanh", "mul"),
        (Act.SHIFT, "tanh", "add"),
        (Act.PERMUTE, "softmax", "gather"),
        (Act.ROTATE, "tanh", "matmul"),
        (Act.LINEAR, "tanh", "matmul"),
    ],
)
def test_an_explicit_op_of_each_act(act: Act, middle: str, op: str) -> None:
    """Before and behind the op that blocks: one op each way."""
    graph = between(middle)
    if act is Act.PERMUTE:  # a permutation passes all but opaque ops: block it with an output
        graph.add_output("h", graph.values["linear"])
    space = space_at(graph, "linear", Act.ROTATE if act is Act.LINEAR else act)
    assert space.blockers
    transform = random_transform(act, space.size, np.random.default_rng(0), positive=False)
    if act is Act.LINEAR:
        space = Space(act, space.size, space.activations, space.constants, space.folds, None, False, space.blockers)
    inserted = apply(graph, [(space, transform)], insert=True)
    assert inserted == 1
    assert counts(graph) == {"linear": 2, middle: 1, op: 1}
    (made,) = [n for n in graph.nodes if n.op.name == op]
    assert made.result.name == f"linear.{act.value}"
    if act is not Act.PERMUTE:
        assert graph.values["tanh"].producer.operands[0] is made.result


@pytest.mark.parametrize("act", [Act.SCALE, Act.SHIFT])
def test_behind_a_blocked_producer(act: Act) -> None:
    graph = between("tanh")
    space = space_at(graph, "tanh", act)
    assert [(b.node.op.name, b.port) for b in space.blockers if b.node] == [("tanh", -1)]
    transform = random_transform(act, WIDTH, np.random.default_rng(0))
    assert apply(graph, [(space, transform)], insert=True) == 1
    assert graph.outputs[0][1].producer.operands[0].producer.op.name == ("mul" if act is Act.SCALE else "add")


def test_at_the_border_of_the_graph() -> None:
    b = Build()
    x = b.input("x", "f32[2, 3, 8]")
    graph = b.output(linear(b, x, 8, "a"), x)
    transforms = []
    for name in ("x", "linear"):
        space = space_at(graph, name, Act.SCALE)
        assert {f"{b.reason}" for b in space.blockers} == {"graph input", "graph output"} - (
            {"graph input"} if name == "linear" else set()
        )
        transforms.append((space, random_transform(Act.SCALE, 8, np.random.default_rng(0))))
    assert apply(graph, transforms, insert=True) == 3
    assert [name for name, _ in graph.outputs] == ["linear", "x"]
    assert counts(graph) == {"linear": 1, "mul": 3}


def test_one_op_for_all_blocked_reads_of_an_edge() -> None:
    """h * h blocks both of its operands: both get an op, and the other reader of h none."""
    b = Build()
    h = linear(b, b.input("x", "f32[2, 3, 8]"), 8, "a")
    graph = b.output(linear(b, b("mul", h, h), 8, "b"), linear(b, h, 8, "c"))
    space = space_at(graph, "linear", Act.SCALE)
    inserted = apply(graph, [(space, random_transform(Act.SCALE, 8, np.random.default_rng(0)))], insert=True)
    assert inserted == 2


@pytest.mark.parametrize("end", ["tanh", "output"])
def test_two_axes_of_one_blocked_edge(end: str) -> None:
    """Both explicit ops stand on the edge, one behind the other."""
    b = Build()
    t = b("matmul", b.random(3, 3, name="mix"), b.input("x", "f32[2, 3, 8]"))
    h = linear(b, t, 8, "a", bias=False)
    graph = b.output(b("tanh", h) if end == "tanh" else h)
    spaces = [s for s in analyse(graph).of(Act.SCALE) if any(m.value is h for m in s.activations)]
    assert sorted(s.size for s in spaces) == [3, 8]
    rng = np.random.default_rng(0)
    assert apply(graph, [(s, random_transform(Act.SCALE, s.size, rng)) for s in spaces], insert=True) == 2
    assert counts(graph) - Counter(["tanh"]) == {"matmul": 1, "linear": 1, "mul": 2}
    assert [name for name, _ in graph.outputs] == ["tanh" if end == "tanh" else "linear"]


# -- refusals ------------------------------------------------------------------------------------


def refused(graph: Graph, space: Space, transform: Transform, *, insert: bool = False) -> Declined:
    before = graph.clone()
    with pytest.raises(Declined) as caught, Rewriter(graph) as rewriter:
        absorb(rewriter, space, transform, insert=insert)
    assert graph == before
    check_text(graph)
    return caught.value


N = WIDTH
NAN = np.full(N, np.nan)
CASES = {
    "a shift is not a scale": (Act.SCALE, Shift(np.ones(N))),
    "a rotate is not a permute": (Act.PERMUTE, Mix([(np.arange(N), np.eye(N))], N, True)),
    "the transform has 3 channels, the space 8": (Act.SCALE, Scale(np.ones(3))),
    "the transform is not finite": (Act.SCALE, Scale(NAN)),
    "a scale is zero": (Act.SCALE, Scale(np.arange(N) * 1.0)),
    "a scale is negative and the space admits positive ones only": (Act.SCALE, Scale(-np.ones(N))),
    "not a permutation": (Act.PERMUTE, Permute(np.zeros(N, np.int64))),
}


@pytest.mark.parametrize("text", CASES)
def test_a_transform_that_does_not_fit(text: str) -> None:
    act, transform = CASES[text]
    graph = between("relu")
    refusal = refused(graph, space_at(graph, "linear", act), transform)
    assert str(refusal) == text


def test_a_shift_that_is_not_finite() -> None:
    graph = between("")
    space = space_at(graph, "linear", Act.SHIFT)
    assert str(refused(graph, space, Shift(np.full(N, np.inf)))) == "the transform is not finite"


def test_a_mix_that_is_not_finite_or_leaves_its_blocks() -> None:
    graph = pre_norm()
    heads = [s for s in analyse(graph).admitted(Act.ROTATE) if s.labels is not None]
    assert len(heads) == 2
    whole = np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))[0]
    for space in heads:
        leaves = Mix([(np.arange(N), whole)], N, orthogonal=True)
        assert str(refused(graph, space, leaves)) == "the transform leaves its blocks"
        bad = Mix([(np.arange(4), np.full((4, 4), np.nan))], N, orthogonal=True)
        assert str(refused(graph, space, bad)) == "the transform is not finite"
    space = next(s for s in analyse(graph).admitted(Act.PERMUTE) if s.labels is not None)
    assert str(refused(graph, space, Permute(np.arange(N)[::-1]))) == "the permutation leaves its blocks"


def test_a_blocked_space_names_the_node() -> None:
    graph = between("tanh")
    refusal = refused(graph, space_at(graph, "linear", Act.SCALE), Scale(np.ones(N)))
    assert str(refusal) == "its result is not proportional to its operand"
    assert refusal.node is graph.values["tanh"].producer


def test_no_explicit_op_on_a_constant() -> None:
    b = Build()
    weight = b.random(8, 8, name="weight")
    graph = b.output(b("linear", b("linear", b.input("x", "f32[2, 3, 8]"), weight), b.random(8, 8)), weight)
    space = space_at(graph, "linear", Act.SCALE)
    refusal = refused(graph, space, Scale(np.ones(8)), insert=True)
    assert str(refusal) == "no explicit op can lift it: the constant is a graph output"


def test_no_explicit_op_where_a_space_meets_its_inverse() -> None:
    """Queries and keys of one weight."""
    b = Build()
    h = linear(b, b.input("x", "f32[2, 3, 8]"), 8, "a")
    graph = b.output(b("matmul", h, b("transpose", h, perm=(0, 2, 1))))
    (space,) = [s for s in analyse(graph).of(Act.SCALE) if any("inverse" in v.reason for v in s.blockers)]
    refusal = refused(graph, space, Scale(np.ones(8)), insert=True)
    assert str(refusal) == "no explicit op can lift it: it meets its own inverse"


def test_no_explicit_mixing_on_joint_axes() -> None:
    b = Build()
    h = linear(b, b.input("x", "f32[2, 3, 8]"), 8, "a")
    split = b("reshape", h, b.constant(np.array([2, 3, 2, 4])))
    graph = b.output(linear(b, b("reshape", b("tanh", split), b.constant(np.array([2, 3, 8]))), 8, "b"))
    space = space_at(graph, "linear", Act.ROTATE)
    transform = random_transform(Act.ROTATE, space.size, np.random.default_rng(0), labels=space.labels)
    refusal = refused(graph, space, transform, insert=True)
    assert str(refusal) == "an explicit op on joint axes is not supported"
    assert refusal.node is graph.values["tanh"].producer
    # a scale or a shift is a constant of the shape of the axes
    for act in (Act.SCALE, Act.SHIFT):
        clone = graph.clone()
        space = space_at(clone, "linear", act)
        assert apply(clone, [(space, random_transform(act, 8, np.random.default_rng(0)))], insert=True) == 1


def test_an_explicit_rotation_needs_the_last_axis() -> None:
    b = Build()
    h = b("matmul", b.random(5, 3, name="mix"), b.input("x", "f32[2, 3, 8]"))
    graph = b.output(b("tanh", h))
    space = space_at(graph, "matmul", Act.ROTATE, axis=1)
    with pytest.raises(Declined, match=r"^an explicit rotation needs the last axis$"), Rewriter(graph) as rewriter:
        absorb(rewriter, space, random_transform(Act.ROTATE, 5, np.random.default_rng(0)), insert=True)


def test_an_explicit_op_needs_a_float_tensor() -> None:
    b = Build()
    ids = b("gather", b.input("ids", "i64[2, 3]"), b.constant(np.array([2, 0, 1]), name="index"), axis=1)
    graph = b.output(b("cast", ids, to="f32"))
    value = graph.values["gather"]
    blocker = analyse_blocker(value)
    space = Space(Act.SCALE, 3, [Member(value, (1,))], [], [], blockers=[blocker])
    refusal = refused(graph, space, Scale(np.ones(3)), insert=True)
    assert str(refusal) == "an explicit op needs a float tensor"


def analyse_blocker(value: Value):
    from planish.ir.spaces import Blocker

    return Blocker(value.users[0], 0, value, (1,), "made up")


def test_a_fold_without_a_formula() -> None:
    graph = between("")
    shift = space_at(graph, "linear", Act.SHIFT)
    space = Space(Act.SCALE, N, shift.activations, [], shift.folds)
    refusal = refused(graph, space, Scale(np.ones(N)))
    assert str(refusal) == "linear has no formula for this transform"
    assert refusal.node is shift.folds[0].node


# -- constants -----------------------------------------------------------------------------------


def test_the_graph_keeps_its_nodes_and_the_data_stays_wide() -> None:
    graph = between("")
    before = graph.clone()
    scale = Scale(np.full(N, 1.0 / 3.0))
    apply(graph, [(space_at(graph, "linear", Act.SCALE), scale)])
    assert counts(graph) == counts(before)
    for name, factor in (("a.weight", 1 / 3), ("a.bias", 1 / 3), ("b.weight", 3.0)):
        constant, old = graph.values[name].constant, before.values[name].constant
        assert constant.dtype == "f32"
        assert np.allclose(constant.wide(), old.wide() * factor, rtol=1e-15, atol=0)
        assert constant.array().dtype == np.float32
        assert (constant.wide() != constant.array()).any()  # float64 until it is written
    unchanged = graph.values["b.bias"].constant
    assert np.array_equal(unchanged.wide(), before.values["b.bias"].constant.wide())


def test_there_and_back_rounds_once() -> None:
    """Folds compose in float64: forty random ones leave an error of 1e-13, not of float32."""
    graph = between("")
    before = graph.values["b.weight"].constant.wide()
    rng = np.random.default_rng(0)
    for _ in range(20):
        transform = random_transform(Act.SCALE, N, rng)
        for one in (transform, transform.inverse()):
            apply(graph, [(space_at(graph, "linear", Act.SCALE), one)])
    assert np.allclose(graph.values["b.weight"].constant.wide(), before, rtol=1e-13, atol=0)


def test_shift_folds_into_the_bias() -> None:
    graph = between("")
    before = graph.clone()
    t = np.arange(N) * 1.0
    space = space_at(graph, "linear", Act.SHIFT)
    assert [f.node for f in space.folds] == [graph.values["linear_1"].producer]
    apply(graph, [(space, Shift(t))])
    old = {n: before.values[n].constant.wide() for n in ("a.bias", "b.bias", "b.weight")}
    assert np.allclose(graph.values["a.bias"].constant.wide(), old["a.bias"] + t, rtol=1e-14)
    assert np.allclose(graph.values["b.bias"].constant.wide(), old["b.bias"] - old["b.weight"] @ t, rtol=1e-13)
    assert np.array_equal(graph.values["b.weight"].constant.wide(), old["b.weight"])


def test_an_absent_bias_is_made() -> None:
    b = Build()
    h = linear(b, b.input("x", "f32[2, 3, 8]"), 8, "a", bias=False)
    graph = b.output(linear(b, h, 8, "b", bias=False))
    apply(graph, [(space_at(graph, "linear", Act.SHIFT), Shift(np.ones(8)))])
    first, second = (n for n in graph.nodes)
    assert first.operands[2].name == "linear.bias"
    assert (first.operands[2].constant.wide() == 1.0).all()
    assert np.allclose(second.operands[2].constant.wide(), -graph.values["b.weight"].constant.wide().sum(1))


def test_a_grown_constant_is_private() -> None:
    """1 + x: the scalar becomes a vector for this node; its other reader keeps the old one."""
    b = Build()
    one = b.constant(np.float32(1.0), name="one")
    h = linear(b, b.input("x", "f32[2, 3, 8]"), 8, "a")
    graph = b.output(linear(b, b("add", one, h), 8, "b"), b("add", b.input("z", "f32[2]"), one))
    apply(graph, [(space_at(graph, "add", Act.SCALE), Scale(np.arange(1.0, 9.0)))])
    grown, other = (n.operands[0 if n.result.rank == 3 else 1] for n in graph.nodes if n.op.name == "add")
    assert grown is not other
    assert grown.shape == (8,)
    assert grown.constant.wide().tolist() == list(range(1, 9))
    assert other is graph.values["one"]
    assert other.constant.wide() == 1.0


def test_a_constant_that_is_given_out_stays() -> None:
    b = Build()
    bias = b.random(8, name="bias")
    h = linear(b, b.input("x", "f32[2, 3, 8]"), 8, "a")
    graph = b.output(b("linear", h, b.random(8, 8, name="w"), bias), bias)
    apply(graph, [(space_at(graph, "linear", Act.SHIFT), Shift(np.ones(8)))])
    assert graph.outputs[1][1] is graph.values["bias"]
    assert graph.outputs[0][1].producer.operands[2] is not graph.values["bias"]


def test_transformed_counts_from_the_offset() -> None:
    b = Build()
    gain = b.constant(np.array([0.5, -0.5], np.float32), name="gain")
    b.graph.append(__import__("planish.ir.ops", fromlist=["get"]).get("rms_norm"), [b.input("x", "f32[2]"), gain])
    member = Member(gain, (0,), node=gain.users[0], port=1, offset=1.0)
    assert transformed(member, Scale(np.array([2.0, 4.0]))).tolist() == [2.0, 1.0]


# -- several spaces of one analysis ----------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("shape", [(), (4,), (3, 1)])
def test_two_axes_of_one_constant(shape: tuple[int, ...], first: int) -> None:
    """The scale of the rows and the scale of the columns both land in c."""
    b = Build()
    t = b("matmul", b.random(3, 3, name="mix"), b.input("x", "f32[2, 3, 4]"))
    c = b.random(*shape, name="c") if shape else b.constant(np.float32(1.5), name="c")
    y = b("add", linear(b, t, 4, "a", bias=False), c)
    graph = b.output(linear(b, b("matmul", b.random(5, 3, name="pool"), y), 2, "r", bias=False))
    spaces = analyse(graph).admitted(Act.SCALE)
    assert sorted(s.size for s in spaces) == [3, 4]
    rng = np.random.default_rng(0)
    transforms = [(s, random_transform(Act.SCALE, s.size, rng)) for s in spaces]
    apply(graph, transforms if first == 0 else transforms[::-1])


def test_two_axes_of_a_constant_with_two_readers() -> None:
    b = Build()
    x, c = b.input("x", "f32[2, 3, 4]"), b.random(4, name="c")
    t = b("matmul", b.random(3, 3, name="mix"), x)
    y = b("add", linear(b, t, 4, "a", bias=False), c)
    z = b("add", linear(b, x, 4, "d", bias=False), c)
    one = linear(b, b("matmul", b.random(5, 3, name="pool"), y), 2, "r", bias=False)
    graph = b.output(one, linear(b, z, 2, "s", bias=False))
    spaces = analyse(graph).admitted(Act.SCALE)
    assert sorted(s.size for s in spaces) == [3, 4]
    rng = np.random.default_rng(0)
    for order in (1, -1):
        trial = graph.clone()
        found = analyse(trial).admitted(Act.SCALE)[::order]
        apply(trial, [(s, random_transform(Act.SCALE, s.size, rng)) for s in found])


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", ACTS)
def test_all_spaces_of_a_block_at_once(act: Act, bias: bool, order: int) -> None:
    """A bias that is made by the shift of one space takes up the shift of the next."""
    graph = pre_norm(bias=bias)
    rng = np.random.default_rng(0)
    spaces = analyse(graph).admitted(act)
    assert spaces
    apply(graph, [(s, random_transform(act, s.size, rng, labels=s.labels)) for s in spaces[::order]])


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("act", [Act.SCALE, Act.SHIFT])
def test_all_spaces_of_a_block_with_explicit_ops(act: Act, kind: str) -> None:
    graph = BLOCKS[kind]()
    rng = np.random.default_rng(0)
    transforms = [(s, random_transform(act, s.size, rng, positive=s.positive)) for s in analyse(graph).of(act)]
    assert apply(graph, transforms, insert=True) > 0
