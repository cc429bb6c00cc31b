"""The verifier names what is broken and where."""

from __future__ import annotations

import time

import numpy as np
import pytest
from helpers import check_text

from planish.ir import ops
from planish.ir.constant import Constant
from planish.ir.errors import VerificationError
from planish.ir.graph import Graph, Node, Value
from planish.ir.text import parse
from planish.ir.types import TensorType
from planish.ir.verifier import verify

TEXT = """
graph @g(%x: f32[batch, 3], %d: f32[3] = constant : f32[3] = [0.0, 1.0, 2.0]) {
  %w = constant : f32[3] = [1.0, 2.0, 3.0]
  %a: f32[batch, 3] = add(%x, %w)
  %b: f32[?, 3] = relu(%a)
  %c: f32[seq, 3] = clip(%b, _, %w)
  %e: unknown = onnx::Odd(%c, _) {anything = 1}
  return %b as "b", %b as "again", %e as "e"
}
"""


def graph() -> Graph:
    return parse(TEXT)


def node(g: Graph, name: str) -> Node:
    found = g.values[name].producer
    assert found is not None
    return found


def broken(g: Graph, text: str) -> None:
    with pytest.raises(VerificationError, match=text):
        verify(g)


def test_valid() -> None:
    g = graph()
    verify(g)
    verify(g.clone())
    verify(Graph())
    check_text(g)


def test_order() -> None:
    g = graph()
    late = node(g, "a")
    g._unlink(late)
    g._link(late, None)
    late.graph = g
    broken(g, r"%a: is read before it is defined\n  in %b: f32\[\?, 3\] = relu\(%a\)")


def test_foreign_value() -> None:
    g = graph()
    node(g, "b").operands = (Value("a", TensorType("f32")),)
    broken(g, "%a: is read but is not in the graph")


def test_names() -> None:
    g = graph()
    g.values["a"].name = "z"
    broken(g, "%z: is registered under the name 'a'")
    g = graph()
    g.values["z"] = Value("z", TensorType("f32"))
    broken(g, "%z: is defined nowhere")
    g = graph()
    node(g, "b").results = (g.values["a"],)
    broken(g, "%a: has another producer")


def test_users() -> None:
    g = graph()
    g.values["a"].users.append(node(g, "b"))
    broken(g, "%a: the list of users is wrong; expected 1 uses, got 2")
    g = graph()
    g.values["a"].users[0] = node(g, "c")
    broken(g, "%a: the list of users is wrong")
    g = parse('graph @g(%x: f32[2]) {\n %a: f32[2] = relu(%x)\n %b: f32[2] = neg(%x)\n return %a as "a"\n}')
    g.values["x"].users.reverse()  # the order of users is free
    verify(g)


def test_list_of_nodes() -> None:
    g = graph()
    g._count += 1
    broken(g, "graph: number of nodes; expected 5, got 4")
    g = graph()
    node(g, "b")._prev = None
    broken(g, "relu: the list of nodes is broken")


def test_operands() -> None:
    g = graph()
    g.append(ops.get("relu"), [], types=[TensorType("f32")])
    broken(g, "relu: wrong number of operands; expected 1, got 0")
    g = graph()
    w = g.values["w"]
    g.append(ops.get("clip"), [w] * 4, types=[TensorType("f32")])
    broken(g, "clip: wrong number of operands; expected 1 to 3, got 4")
    g = graph()
    g.append(ops.get("add"), [None, g.values["w"]], types=[TensorType("f32")])
    broken(g, "add: operand '.*' is absent")


def test_attributes() -> None:
    g = graph()
    node(g, "b").attributes["slope"] = 1.0
    broken(g, r"relu: attribute 'slope': unknown\n  in %b")


@pytest.mark.parametrize("type_", ["f32[4]", "f16[batch, 3]", "f32[batch, 4]", "f32[batch, 3, 1]"])
def test_types(type_: str) -> None:
    text = TEXT.replace("%a: f32[batch, 3]", f"%a: {type_}")
    with pytest.raises(VerificationError) as caught:
        verify(parse(text))
    assert caught.value.what == f"%a: wrong type; expected f32[batch, 3], got {type_}"


@pytest.mark.parametrize("type_", ["f32[*]", "f32[?, ?]", "f32[other, 3]", "f32[8, 3]", "f32[batch, n]", "unknown"])
def test_types_that_leave_something_open_fit(type_: str) -> None:
    verify(parse(TEXT.replace("%a: f32[batch, 3]", f"%a: {type_}")))


def test_impossible_operands() -> None:
    g = graph()
    two = g.add_constant("two", Constant.of(np.zeros((3, 2), np.float32)))
    node_ = g.append(ops.get("matmul"), [two, two], types=[TensorType("f32", (3, 2))], names=["m"])
    with pytest.raises(VerificationError) as caught:
        verify(g)
    assert str(node_) in str(caught.value)


def test_number_of_results() -> None:
    g = graph()
    g.append(ops.get("relu"), [g.values["w"]], types=[TensorType("f32", (3,))] * 2)
    broken(g, "relu: wrong number of results; expected 1, got 2")


def test_constants() -> None:
    g = graph()
    g.values["w"].type = TensorType("f32", (4,))
    broken(g, r"%w: wrong type; expected f32\[3\] as its data, got f32\[4\]")
    g = graph()
    g.inputs[1].type = TensorType("f16", (3,))
    broken(g, r"%d: the default has another type; expected f16\[3\], got f32\[3\]")
    g = graph()
    constant = g.values["w"].constant
    assert constant is not None
    constant._data = np.zeros(3, np.int32)
    broken(g, r"%w: the data are int32\[3\]; expected f32\[3\]")
    constant._data = np.zeros(3, np.float32)
    broken(g, "%w: the data can be written to")


def test_outputs() -> None:
    g = graph()
    g.add_output("z", Value("z", TensorType("f32")))
    broken(g, "output 'z': %z is not in the graph")
    g = graph()
    g.add_output("b", g.values["a"])
    broken(g, "output 'b': is given twice")


def test_inputs() -> None:
    g = graph()
    g.inputs.append(g.values["a"])
    broken(g, "%a: is listed as an input but is none")
    g = graph()
    g.inputs.append(g.inputs[0])
    broken(g, "%x: is defined twice")


@pytest.mark.slow
def test_large_graphs_take_seconds() -> None:
    g = Graph()
    x = g.add_input("x", TensorType("f32", ("batch", 8)))
    for _ in range(50_000):
        y = g.append(ops.get("relu"), [x]).result
        x = g.append(ops.get("add"), [x, y]).result
    g.add_output("x", x)
    start = time.perf_counter()
    verify(g)
    assert time.perf_counter() - start < 15  # about 1 s on a quiet machine
    check_text(g)
