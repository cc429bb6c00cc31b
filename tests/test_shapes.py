"""Arithmetic of symbolic dims, broadcasting, integer tensors that hold shapes, and the types they give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import check_text
from hypothesis import given
from hypothesis import strategies as st

from planish.ir import ops, shapes
from planish.ir.constant import Constant
from planish.ir.errors import InvalidModelError
from planish.ir.graph import Attribute, Graph, Value
from planish.ir.types import Dim, TensorType


def test_dims_have_one_normal_form() -> None:
    assert shapes.add("B", 1) == "B + 1"
    assert shapes.add(shapes.add(1, "T"), "B") == shapes.add("B", shapes.add("T", 1)) == "B + T + 1"
    assert shapes.multiply("T", shapes.multiply(12, "B")) == "12*B*T"
    assert shapes.subtract(shapes.add("B", 3), "B") == 3
    assert shapes.subtract(0, "T") == "0 - T"
    assert shapes.add(shapes.subtract(0, "T"), 2) == "0 - T + 2"
    assert shapes.multiply("2*s0 + 1", "s1") == "2*s0*s1 + s1"
    assert shapes.product(("B", 12, 64)) == "768*B"
    assert shapes.product(()) == 1
    assert shapes.multiply(0, None) == 0
    assert shapes.multiply("B", None) is None


def test_division_of_dims() -> None:
    assert shapes.floor_divide("768*B*T", "64*T") == "12*B"
    assert shapes.floor_divide("T", 4) == "(T//4)"
    assert shapes.multiply("(T//4)", 2) == "2*(T//4)"
    assert shapes.add("2*(T//4)", "(T//4)") == "3*(T//4)"
    assert shapes.floor_divide(shapes.add("T", 3), 4) == "((T + 3)//4)"
    assert shapes.exact_quotient("T", 4) is None
    assert shapes.exact_quotient("4*T + 8", 4) == "T + 2"
    assert shapes.exact_quotient("B + T", "B + T") == 1
    assert shapes.exact_quotient(7, 2) is None
    assert shapes.floor_divide(7, 0) is None


def test_names_that_are_no_expressions_are_equal_to_themselves_only() -> None:
    for name in ("batch-size", "seq len", "floor(s7/2)", "True", "lambda", "x" * 5000 + "!"):
        assert shapes.multiply(name, 1) == shapes.add(name, 0) == name
        assert shapes.subtract(name, name) == 0
        assert shapes.floor_divide(name, name) == 1
        assert shapes.add(name, 1) is None  # 2 * (a b + 1) and 2 * a b + 1 would be one string
    assert shapes.subtract("(" * 90 + "a" + ")" * 90, "a") == 0


_NAMES = ("a", "b", "c")
_EXPRESSIONS = st.recursive(
    st.integers(0, 9) | st.sampled_from(_NAMES),
    lambda inner: st.tuples(st.sampled_from(("add", "subtract", "multiply", "floor_divide")), inner, inner),
    max_leaves=8,
)


@given(tree=_EXPRESSIONS, values=st.tuples(*[st.integers(1, 30)] * 3))
def test_dim_arithmetic_agrees_with_integers(tree: Any, values: tuple[int, ...]) -> None:
    table = dict(zip(_NAMES, values, strict=True))

    def symbolic(node: Any) -> Dim:
        if isinstance(node, tuple):
            result: Dim = getattr(shapes, node[0])(symbolic(node[1]), symbolic(node[2]))
            return result
        return node

    def numeric(node: Any) -> int:
        if isinstance(node, tuple):
            one, two = numeric(node[1]), numeric(node[2])
            if node[0] == "floor_divide":
                return one // two
            return {"add": one + two, "subtract": one - two, "multiply": one * two}[node[0]]
        return table[node] if isinstance(node, str) else node

    dim = symbolic(tree)
    if dim is None:
        return
    try:
        expected = numeric(tree)
        got = eval(dim, {}, dict(table)) if isinstance(dim, str) else dim
    except ZeroDivisionError:
        return
    assert got == expected
    assert shapes.subtract(shapes.add(dim, "z"), "z") == shapes.add(dim, 0)


def test_broadcast_shapes() -> None:
    assert shapes.broadcast_shapes(("B", 1, 4), (3, 1)) == ("B", 3, 4)
    assert shapes.broadcast_shapes(("B", 4), ("T", 4)) == (None, 4)
    assert shapes.broadcast_shapes(("B", 4), (None, None)) == (None, 4)
    assert shapes.broadcast_shapes(("B", 4), None) is None
    assert shapes.broadcast_shapes((), (2,)) == (2,)
    assert shapes.broadcast_shapes(("B", 2), (7, 2)) == (7, 2)
    with pytest.raises(InvalidModelError, match="operand shapes: dims 2 and 3 do not broadcast"):
        shapes.broadcast_shapes((2,), (3,))


class Builder:
    """A graph with one input x: f32[B, T, 768]."""

    def __init__(self) -> None:
        self.graph = Graph("shapes")
        self.x = self.graph.add_input("x", TensorType("f32", ("B", "T", 768)))

    def __call__(self, op: str, *operands: Value | int | list[int], **attributes: Attribute) -> Value:
        values = [v if isinstance(v, Value) else self.ints(v) for v in operands]
        return self.graph.append(ops.get(op), values, attributes).result

    def ints(self, data: Any) -> Value:
        return self.graph.add_constant(self.graph.fresh_name("c"), Constant.of(np.array(data, np.int64)))

    def dim(self, axis: int) -> Value:
        return self("gather", self("shape", self.x), axis)


def test_shapes_are_followed_through_integer_arithmetic() -> None:
    b = Builder()
    whole = b("shape", b.x)
    assert shapes.known_ints(whole) == ("B", "T", 768)
    assert shapes.known_ints(b("shape", b.x, start=1, end=-1)) == ("T",)
    batch, time, width = b.dim(0), b.dim(1), b.dim(-1)
    assert shapes.known_ints(time) == ("T",)
    heads = b("div", width, 64)
    target = b(
        "concat",
        *(b("unsqueeze", v, axes=(0,)) for v in (batch, time, heads)),
        [64],
        axis=0,
    )
    assert shapes.known_ints(target) == ("B", "T", 12, 64)
    assert b("reshape", b.x, target).shape == ("B", "T", 12, 64)
    flat = b("concat", b("reshape", b("mul", batch, time), [-1]), b("slice", whole, [2], [1 << 62]), axis=0)
    assert shapes.known_ints(flat) == ("B*T", 768)
    assert b("reshape", b.x, flat).shape == ("B*T", 768)
    assert b("reshape", b("reshape", b.x, flat), b("concat", target, axis=0)).shape == ("B", "T", 12, 64)
    assert shapes.known_ints(b("slice", whole, [-1], [-1000], [0], [-1])) == (768, "T", "B")
    assert shapes.known_ints(b("sub", b("add", time, 3), time)) == (3,)
    assert shapes.known_ints(b("reduce_prod", whole, keepdims=False)) == ("768*B*T",)
    assert shapes.known_ints(b("div", -7, 2)) == (-3,)
    parts = b.graph.append(ops.get("split"), [whole], {"axis": 0, "sizes": (1, 2)})
    assert shapes.known_ints(parts.results[1]) == ("T", 768)
    assert shapes.known_ints(b("range", 0, 3, 1)) == (0, 1, 2)
    assert shapes.known_ints(b.x) is None
    check_text(b.graph)


def test_the_exporters_expand_idiom() -> None:
    """where(shape == -1, ones, shape), as torch writes expand(-1, ...)."""
    b = Builder()
    whole = b("shape", b.x)
    one = Constant.of(np.array([1]))
    ones = b("constant_of_shape", [3], value=one)
    minus = b("mul", ones, -1)
    assert shapes.known_ints(b("where", b("equal", whole, minus), ones, whole)) == ("B", "T", 768)
    asked = b.ints([2, -1, 768])
    assert shapes.known_ints(b("where", b("equal", asked, minus), ones, asked)) == (2, 1, 768)
    unknown = b("equal", whole, b.ints([5, 5, 5]))
    assert shapes.known_ints(unknown) == (None, None, 0)
    check_text(b.graph)


def test_following_is_bounded() -> None:
    b = Builder()
    value = b.dim(1)
    for _ in range(60):  # 2^60 paths
        value = b("add", value, value)
    assert shapes.known_ints(value) is None


RESHAPES = [
    (("B", "T", 768), [0, 0, 12, 64], ("B", "T", 12, 64)),
    (("B", "T", 768), [0, -1, 12, 64], ("B", "T", 12, 64)),
    (("B", "T", 768), [-1, 768], ("B*T", 768)),
    ((None, None, 768), [0, 0, -1], (None, None, 768)),
    ((None, None, 768), [0, -1, 12, 64], (None, None, 12, 64)),
    ((None, None, 768), [0, 0, 12, -1], (None, None, 12, 64)),
    (("B", 6, 4), [0, 8, -1], ("B", 8, 3)),
    ((2, 3), [-1], (6,)),
    (("B", 3), [2, -1], (2, "((3*B)//2)")),
]


@pytest.mark.parametrize(("shape", "target", "expected"), RESHAPES)
def test_reshape_types(shape: tuple[Dim, ...], target: list[int], expected: tuple[Dim, ...]) -> None:
    graph = Graph("g")
    x = graph.add_input("x", TensorType("f32", shape))
    c = graph.add_constant("c", Constant.of(np.array(target, np.int64)))
    assert graph.append(ops.get("reshape"), [x, c]).result.shape == expected
    check_text(graph)


def _infer(op: str, *operands: Any, **attributes: Attribute) -> Any:
    graph = Graph("g")
    values = [
        graph.add_input(f"x{i}", o)
        if isinstance(o, TensorType)
        else graph.add_input(f"x{i}", TensorType("f32", o))
        if isinstance(o, tuple)
        else None
        if o is None
        else graph.add_constant(f"c{i}", Constant.of(np.array(o, np.int64)))
        for i, o in enumerate(operands)
    ]
    node = graph.append(ops.get(op), values, attributes)
    check_text(graph)
    return node.results[0].shape if len(node.results) == 1 else [r.shape for r in node.results]


def test_types_of_structural_ops() -> None:
    assert _infer("transpose", ("B", "T", 4), perm=(2, 0, 1)) == (4, "B", "T")
    assert _infer("transpose", ("B", "T", 4)) == (4, "T", "B")
    assert _infer("unsqueeze", ("B", 4), axes=(0, -1)) == (1, "B", 4, 1)
    assert _infer("squeeze", (1, "B", 1, 4), axes=(0, -2)) == ("B", 4)
    assert _infer("flatten", ("B", 3, 4), axis=1) == ("B", 12)
    assert _infer("flatten", ("B", "T", 4), axis=-1) == ("B*T", 4)
    assert _infer("concat", ("B", None, 2), (None, 3, 2), axis=-1) == ("B", 3, 4)
    assert _infer("concat", ("B", "T", 2), ("B", "S", 2), axis=1) == ("B", "S + T", 2)
    assert _infer("split", ("B", 6), axis=1, sizes=(2, 4)) == [("B", 2), ("B", 4)]
    assert _infer("slice", ("B", 6), [1], [5], [1], [2]) == ("B", 2)
    assert _infer("slice", ("B", 6), [0], [1 << 40]) == ("B", 6)
    assert _infer("slice", ("B", 6), [-1], [-(1 << 40)], [-1], [-1]) == ("B", 6)
    assert _infer("slice", ("B", 6), [0], [1]) == (None, 6)
    assert _infer("slice", ("B", 6), TensorType("i64", (1,)), [9], [1]) == ("B", None)
    assert (
        _infer("slice", ("B", 6), TensorType("i64", (1,)), TensorType("i64", (1,)), TensorType("i64", (1,)))
        == (None,) * 2
    )
    assert _infer("gather", ("B", 6, 2), [[0, 1, 2]], axis=1) == ("B", 1, 3, 2)
    assert _infer("gather", ("B", 6, 2), 0, axis=1) == ("B", 2)
    assert _infer("embedding", (30, 8), TensorType("i64", ("B", "T"))) == ("B", "T", 8)
    assert _infer("expand", ("B", 1, 4), [1, 3, 1]) == ("B", 3, 4)
    assert _infer("expand", ("B", 1), TensorType("i64", (3,))) == (None, None, None)
    assert _infer("tile", ("B", 2), [1, 3]) == ("B", 6)
    assert _infer("pad", ("B", 2), [0, 1, 0, 2]) == ("B", 5)
    assert _infer("pad", ("B", 2), [1, -1], None, [1]) == ("B", 2)
    assert _infer("range", 0, 7, 2) == (4,)
    assert _infer("constant_of_shape", [2, 3], value=Constant.of(np.zeros(1))) == (2, 3)
    assert _infer("constant_of_shape", TensorType("i64", (2,)), value=Constant.of(np.zeros(1))) == (
        None,
        None,
    )
    assert _infer("reshape", ("B", 6), TensorType("i64", (3,))) == (None, None, None)
    assert _infer("reshape", ("B", 6), TensorType("i64")) is None
    assert _infer("reduce_sum", ("B", "T", 4), axes=(-1, 0), keepdims=True) == (1, "T", 1)
    assert _infer("reduce_sum", ("B", "T", 4), axes=(-1, 0), keepdims=False) == ("T",)
    assert _infer("reduce_max", ("B", 4), keepdims=False) == ()


def test_a_slice_up_to_a_symbol() -> None:
    b = Builder()
    table = b.graph.add_input("table", TensorType("f32", (1, 512, 4)))
    end = b("unsqueeze", b.dim(1), axes=(0,))
    assert b("slice", table, [0], end, [1]).shape == (1, "T", 4)
    assert b("slice", b.x, [0], end, [1]).shape == ("B", "T", 768)
    assert b("range", 0, b.dim(1), 1).shape == ("T",)
    check_text(b.graph)


def test_types_of_pools() -> None:
    pool = {"kernel": (3,), "strides": (2,)}
    assert _infer("max_pool", ("B", 4, 9), **pool) == ("B", 4, 4)
    assert _infer("max_pool", ("B", 4, 10), **pool, ceil_mode=True) == ("B", 4, 5)
    assert _infer("max_pool", ("B", 4, 9), kernel=(3,), pads=(1, 1)) == ("B", 4, 9)
    assert _infer("max_pool", ("B", 4, 9), **pool, auto_pad="same_upper") == ("B", 4, 5)
    assert _infer("average_pool", ("B", 4, "W"), kernel=(3,), pads=(1, 1)) == ("B", 4, "W")
    assert _infer("average_pool", ("B", 4, "W"), **pool) == ("B", 4, "((W - 3)//2) + 1")
    assert _infer("global_average_pool", ("B", 4, "H", "W")) == ("B", 4, 1, 1)


@pytest.mark.parametrize(
    ("op", "operands", "attributes", "message"),
    [
        ("reshape", ((2, 3), [4]), {}, r"reshape: 6 elements do not fill \[4\]"),
        ("reshape", ((2, 3), [4, -1]), {}, r"reshape: 6 elements do not fill \[4, -1\]"),
        ("transpose", ((2, 3),), {"perm": (0, 0)}, r"perm \(0, 0\) does not fit rank 2"),
        ("squeeze", ((2, 3),), {"axes": (0,)}, "axis 0 has size 2, expected 1"),
        ("concat", ((2, 3), (3, 3)), {"axis": 1}, r"concat: dims \[2, 3\] of axis 0 differ"),
        ("concat", ((2, 3), (3,)), {"axis": 0}, "different ranks"),
        ("split", ((2, 3),), {"axis": 1, "sizes": (1, 1)}, r"sizes \(1, 1\) do not add up to 3"),
        ("slice", ((2, 3), [0], [1], [5]), {}, "axis 5 of a tensor of rank 2"),
        ("slice", ((2, 3), [0], [1, 2]), {}, "differ in length"),
        ("pad", ((2, 3), [1, 1]), {}, "2 pads for 2 axes"),
        ("reduce_sum", ((2, 3),), {"axes": (2,)}, r"axes \[2\] of a tensor of rank 2"),
        ("max_pool", ((2, 3, 4),), {"kernel": (2, 2)}, r"kernel \(2, 2\) for 1 spatial axes"),
        ("constant_of_shape", ([2],), {}, "value is not a tensor of one element"),
    ],
)
def test_invalid_models(op: str, operands: Any, attributes: dict[str, Attribute], message: str) -> None:
    with pytest.raises(InvalidModelError, match=message):
        _infer(op, *operands, **attributes)


def test_inference_is_total() -> None:
    """Operands of unknown type give unknown results, never an error."""
    for row in ops.table().values():
        if row.family not in (
            "elementwise",
            "arithmetic",
            "structural",
            "sizes",
            "selection",
            "indexing",
            "reduction",
        ):
            continue
        attributes = {"value": Constant.of(np.zeros(1))} if row.name == "constant_of_shape" else {}
        for count in {len(row.params), sum(not p.optional for p in row.params)}:
            graph = Graph("g")
            values = [graph.add_input(f"x{i}", TensorType("f32")) for i in range(count)]
            node = graph.append(row, values, attributes)
            assert len(node.results) == (0 if row.name == "split" else 1)
            check_text(graph)
