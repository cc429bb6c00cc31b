"""The rewriter keeps use lists, names and constants in order."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import check_text

from planish.ir.constant import Constant
from planish.ir.graph import Graph, Node
from planish.ir.rewriter import Declined, Rewriter
from planish.ir.text import parse, print_graph
from planish.ir.types import TensorType
from planish.ir.verifier import verify

TEXT = """\
graph @g(%x: f32[3]) {
  %w = constant : f32[3] = [1.0, 2.0, 3.0]
  %v = constant : f32[3] = [4.0, 5.0, 6.0]
  %a: f32[3] = add(%x, %w)
  %b: f32[3] = mul(%a, %w)
  %c: f32[3] = mul(%a, %a)
  %dead: f32[3] = add(%b, %v)
  %dice: f32[3] = onnx::RandomNormalLike(%c)
  return %b as "b", %c as "c"
}
"""


def graph() -> Graph:
    return parse(TEXT)


def node(g: Graph, name: str) -> Node:
    found = g.values[name].producer
    assert found is not None
    return found


def lines(g: Graph) -> list[str]:
    verify(g)
    check_text(g)
    return [line.strip() for line in print_graph(g).splitlines()[1:-1]]


def test_insert_and_replace() -> None:
    g = graph()
    with Rewriter(g) as rw:
        made = rw.insert("relu", [g.values["a"]], before=node(g, "b"), names=["a"], source="/here")
        rw.replace(g.values["a"], made.result)
    assert lines(g)[1:] == [
        "%a: f32[3] = add(%x, %w)",
        '%a_1: f32[3] = relu(%a) from "/here"',
        "%b: f32[3] = mul(%a_1, %w)",
        "%c: f32[3] = mul(%a_1, %a_1)",
        "%dice: f32[3] = onnx::RandomNormalLike(%c)",
        'return %b as "b", %c as "c"',
    ]


def test_replace_for_some_users() -> None:
    g = graph()
    rw = Rewriter(g)
    rw.replace(g.values["a"], g.values["x"], users=[node(g, "c")])
    rw.replace(g.values["b"], g.values["x"])
    assert "%b: f32[3] = mul(%a, %w)" in lines(g)
    assert "%c: f32[3] = mul(%x, %x)" in lines(g)
    assert lines(g)[-1] == 'return %x as "b", %c as "c"'


def test_sweep_keeps_what_has_effects() -> None:
    g = graph()
    rw = Rewriter(g)
    assert rw.sweep() == 1
    assert rw.sweep() == 0
    assert "%dice" in print_graph(g)
    assert not any(line.startswith(("%dead", "%v")) for line in lines(g))


def test_no_sweep_after_an_error() -> None:
    g = graph()
    with pytest.raises(RuntimeError), Rewriter(g):
        raise RuntimeError
    assert "dead" in g.values


def test_operands() -> None:
    g = graph()
    rw = Rewriter(g)
    clip = rw.insert("clip", [g.values["a"]], before=node(g, "b"), names=["clipped"])
    rw.set_operand(clip, 2, g.values["v"])
    assert clip.operands == (g.values["a"], None, g.values["v"])
    lines(g)
    rw.set_operand(clip, 2, None)
    assert clip.operands == (g.values["a"],)
    edits = rw.edits
    rw.set_operand(clip, 0, g.values["a"])
    assert rw.edits == edits
    rw.set_operand(node(g, "c"), 1, clip.result)
    assert g.values["a"].users.count(node(g, "c")) == 1
    lines(g)[0] = ""


def test_attributes() -> None:
    g = parse('graph @g(%x: f32[3]) {\n %y: f32[3] = softmax(%x) {axis = 0}\n return %y as "y"\n}')
    other = g.clone()
    rw = Rewriter(g)
    rw.set_attributes(node(g, "y"), {"axis": -1})
    assert node(g, "y").attributes == {"axis": -1}
    assert node(other, "y").attributes == {"axis": 0}
    rw.set_attributes(node(g, "y"), {"axis": None})
    assert node(g, "y").attributes == {}
    lines(g)


def test_constants_are_guarded() -> None:
    g = graph()
    other = g.clone()
    rw = Rewriter(g)
    twos = Constant.of(np.full(3, 2, np.float32))
    with pytest.raises(Declined) as caught:
        rw.set_constant(g.values["w"], twos)
    assert caught.value.reason == "other readers would see the change"
    assert caught.value.node is g.values["w"]
    rw.set_constant(g.values["w"], twos, readers="all")
    rw.set_constant(g.values["v"], twos)
    assert "%w = constant : f32[3] = [2.0, 2.0, 2.0]" in lines(g)
    assert "%w = constant : f32[3] = [1.0, 2.0, 3.0]" in lines(other)
    g.add_output("v", g.values["v"])
    with pytest.raises(Declined):
        rw.set_constant(g.values["v"], twos, readers="all")


def test_erase() -> None:
    g = graph()
    rw = Rewriter(g)
    for name in ("a", "b"):  # read by nodes, given out
        with pytest.raises(Declined, match="its result is still read"):
            rw.erase(node(g, name))
    rw.erase(node(g, "dead"))
    assert g.values["v"].users == []
    rw.replace_node(node(g, "b"), g.values["a"])
    assert lines(g)[-1] == 'return %a as "b", %c as "c"'


def test_erasing_while_iterating() -> None:
    g = graph()
    rw = Rewriter(g)
    seen = []
    for n in g.nodes:
        seen.append(n.result.name)
        if n.result.name in ("dead", "dice"):
            rw.erase(n)
    assert seen == ["a", "b", "c", "dead", "dice"]
    assert len(g) == 3
    lines(g)


def test_names_and_types() -> None:
    g = graph()
    rw = Rewriter(g)
    rw.rename(g.values["a"], "sum")
    rw.rename(g.values["sum"], "sum")
    with pytest.raises(ValueError, match="value name 'b' is taken"):
        rw.rename(g.values["sum"], "b")
    rw.retype(g.values["sum"], TensorType("f32", None))
    assert "%sum: f32[*] = add(%x, %w)" in lines(g)
    assert rw.constant(Constant.of(np.zeros(1)), "w").name == "w_1"
