"""The text form: what it looks like, that it comes back exactly, and what its errors say."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import pytest
from helpers import check_text
from hypothesis import given
from hypothesis import strategies as st

from planish.ir import ops, store
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.graph import Attribute, Blob, Graph
from planish.ir.literals import quote, unquote
from planish.ir.text import constants_of, difference, node_text, parse, print_graph, same_attribute
from planish.ir.types import DTYPES, UNKNOWN, OtherType, TensorType, bits, is_float, numpy_dtype

X = TensorType("f32", ("batch", 4))
SMALL = """\
graph @main(%x: f32[batch, 4], %"/in/y": f32[4] = constant : f32[4] = [0.0, 1.0, -2.5, 1e-05]) {
  meta onnx.opset = 20
  %w = constant : f32[] = 0.1
  %big = constant : f32[5, 4] @"big"
  %a: f32[batch, 4] = mul(%x, %w) from "/encoder/Mul"
  %b: f32[5, 4], %c: unknown = onnx::Odd(%big, _, %"/in/y") {axis = -1, eps = 1e-12, mode = "a \\"b\\""}
  torch::aten._assert_async.default(%a)
  return %a as "out", %b as "out 2"
}
"""


def with_attributes(**attributes: Attribute) -> Graph:
    graph = Graph("main")
    x = graph.add_input("x", X)
    node = graph.append(ops.get("onnx::Odd"), [x], attributes, names=["y"], types=[X])
    graph.add_output("y", node.result)
    return graph


def test_form() -> None:
    constants = {"big": Constant.of(np.arange(20, dtype=np.float32).reshape(5, 4))}
    graph = parse(SMALL, constants)
    assert print_graph(graph) == SMALL
    assert constants_of(graph) == constants
    check_text(graph)
    check_text(graph.clone())
    loose = SMALL.replace(", ", " ,  # a comment\n ").replace(" = ", "=")
    assert parse(loose.replace('"a \\"b\\""', '"a \\"b\\""'), constants) == graph


def test_long_lists_of_inputs_and_outputs_go_on_lines_of_their_own() -> None:
    graph = Graph("wide graph")
    for i in range(12):
        graph.add_output(f"output {i}", graph.add_input(f"input_{i}", X))
    text = print_graph(graph)
    assert text.startswith('graph @"wide graph"(\n    %input_0: f32[batch, 4],\n    %input_1')
    assert '\n  return\n    %input_0 as "output 0",\n' in text
    check_text(graph)
    check_text(Graph(""))


ATTRIBUTES: list[Attribute] = [
    None,
    True,
    False,
    0,
    1,
    -(2**63),
    2**64,
    1.0,
    -0.0,
    0.0,
    1e300,
    5e-324,
    float("inf"),
    float("-inf"),
    float("nan"),
    9.999999974752427e-07,
    "",
    'a"\\\n\t\x00\x7f é 😀 \ud800',
    b"",
    b'\x00\xff"',
    b"x" * 65,
    b"y" * 5000,
    (),
    ((),),
    (1, 1.0, True, "1", b"1", None, ((2,), ())),
    TensorType("f32"),
    TensorType("i4", (2, None, "s t")),
    Blob("onnx.GraphProto", b""),
    Blob("k", b"small"),
    Blob("k", bytes(range(256)) * 9),
    (Blob("k", b"z" * 2000),) * 2,
    Constant.of(np.arange(3)),
    Constant.of(np.arange(30.0)),
    (Constant.of(np.float32(2)), Constant.of(np.zeros(99))),
]


@pytest.mark.parametrize("attribute", ATTRIBUTES, ids=lambda a: repr(a)[:24])
def test_attributes(attribute: Attribute) -> None:
    graph = with_attributes(value=attribute, **{"odd name": attribute})
    graph.meta["a b"] = attribute
    check_text(graph)


def test_attributes_that_look_alike_differ() -> None:
    alike: list[Attribute] = [1, 1.0, True, (1,), (1.0,), "1", b"1", (), ((),), 0.0, -0.0, None, "none"]
    for i, a in enumerate(alike):
        for j, b in enumerate(alike):
            assert same_attribute(a, b) == (i == j)
            assert (with_attributes(v=a) == with_attributes(v=b)) == (i == j)
    with pytest.raises(TypeError, match="a list is no attribute"):
        print_graph(with_attributes(v=[1]))  # type: ignore[arg-type]


def leaves() -> st.SearchStrategy[Attribute]:
    blobs = st.builds(Blob, st.text(max_size=5), st.binary(max_size=1500))
    return st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters()), st.binary(), blobs)


@given(st.recursive(leaves(), lambda inner: st.lists(inner, max_size=4).map(tuple)), st.text(min_size=1))
def test_any_attribute_and_name(attribute: Attribute, name: str) -> None:
    graph = Graph(name)
    x = graph.add_input(name, TensorType("f32", (name, 1, None)))
    node = graph.append(
        ops.get("onnx::Odd"),
        [x, None, x],
        {name: attribute},
        names=[name + "'"],
        types=[UNKNOWN],
        source=name,
    )
    graph.add_output(name, node.result)
    graph.meta[name] = attribute
    check_text(graph)


@given(st.text(st.characters(codec=None, exclude_categories=())))
def test_quote(text: str) -> None:
    quoted = quote(text)
    assert quoted.isascii()
    assert quoted.isprintable()
    assert unquote(quoted[1:-1]) == text


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (3, 2), (3, 0, 2), (17, 3)])
def test_constants(dtype: str, shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    if dtype == "str":
        array = np.empty(shape, object)
        words = ["", "a, b", "\n]é", b"\xff"]
        array.reshape(-1)[:] = [words[i % 4] for i in range(array.size)]
    elif bits(dtype) < 8 or dtype == "bool":
        array = rng.integers(0, 2, shape).astype(numpy_dtype(dtype))
    else:  # any bits: NaNs with payloads too
        codes = rng.integers(0, 256, int(np.prod(shape)) * bits(dtype) // 8, np.uint8)
        array = codes.view(numpy_dtype(dtype)).reshape(shape)
    graph = Graph()
    graph.add_output("y", graph.add_constant("c", Constant(array, dtype, shape)))
    if is_float(dtype):
        with np.errstate(invalid="ignore"):
            wide = array.astype(np.float64) / 3
        graph.add_constant("folded", Constant(wide, dtype, shape))
        if dtype != "f64":
            assert " wide" in print_graph(graph)
    check_text(graph)


def test_special_floats_are_readable() -> None:
    data = np.array([np.nan, np.inf, -np.inf, -0.0, 0.1, 1e10], np.float32)
    data = np.append(data, np.array([0xFFC00001], np.uint32).view(np.float32))
    graph = Graph()
    graph.add_constant("c", Constant.of(data))
    assert "= [nan, inf, -inf, -0.0, 0.1, 1e+10, 0xffc00001]" in print_graph(graph)


def test_tied_data_has_one_key_and_stays_tied() -> None:
    graph = Graph()
    data = Constant.of(np.zeros(100))
    for name in ("a", "b"):
        graph.add_constant(name, data)
    graph.meta["x"] = Constant.of(np.ones(100))
    graph.add_constant("meta/x", Constant.of(np.ones(101)))
    assert list(constants_of(graph)) == ["meta/x'", "a", "meta/x"]
    check_text(graph)
    again = parse(print_graph(graph), constants_of(graph))
    assert again.values["a"].constant is again.values["b"].constant


def test_types() -> None:
    graph = Graph()
    odd = ("a b", "?", None, 0, "ü", "x1")
    for i, t in enumerate(
        [TensorType("str"), TensorType("f16", ()), TensorType("c64", odd), UNKNOWN, OtherType("s {}")]
    ):
        graph.add_input(f"x{i}", t)
    assert '%x2: c64["a b", "?", ?, 0, "\\xfc", x1]' in print_graph(graph)
    check_text(graph)


def test_node_text() -> None:
    assert repr(next(with_attributes(axis=1).nodes)) == "%y: f32[batch, 4] = onnx::Odd(%x) {axis = 1}"
    node = next(with_attributes(big=Constant.of(np.zeros(50))).nodes)
    assert node_text(node).endswith('{big = constant : f64[50] @"y/big"}')


MISTAKES = [
    ("mul(", "mull(", "op 'mull': unknown", "line 5, column 23", "did you mean 'mul'?"),
    ("(%x, %w)", "(%x, %v)", "%v: not defined here", "line 5, column 31", None),
    ("%a: f32[batch, 4] =", "%x: f32[batch, 4] =", "%x: defined twice", "line 5, column 3", None),
    ("%a: f32[batch", "%a: f33[batch", "dtype 'f33': unknown", "line 5, column 7", "did you mean 'f32'?"),
    ("%a: f32[batch, 4] =", "%a =", "a result of a node needs a type, got 'mul'", "line 5", None),
    ("f32[] = 0.1", "f32[] = 0.x", "bad element: could not convert", "line 3, column 27", None),
    ("f32[] = 0.1", "f32[2] = [0.1]", "wrong number of elements; expected 2, got 1", "line 3", None),
    ("f32[] = 0.1", "u8[] = 256", "integer out of the range of u8", "line 3", None),
    ("f32[] = 0.1", "f32[batch] = 0.1", "a constant needs a static type", "line 3, column 19", None),
    ('@"big"', '@"bog"', "data 'bog': not given", "line 4", "did you mean 'big'?"),
    ("f32[5, 4] @", "f32[4, 5] @", "data of another type; expected f32[4, 5], got f32[5, 4]", "line 4", None),
    ("axis = -1", "axis = -1x", "expected an attribute", "line 6", None),
    ("axis = -1", "axis = " + "[" * 99 + "]" * 99, "lists are nested too deeply", "line 6", None),
    ("axis = -1", "mode = -1", "attribute 'mode' is given twice", "line 6", None),
    ("axis = -1", 'axis = blob("k", base64 "?")', "bad base64", "line 6", None),
    ("axis = -1", 'axis = "\\q"', "bad string: unknown escape '\\q'", "line 6", None),
    ("%a as", "%a is", "expected 'as', got 'is'", "line 8, column 13", None),
    ("\n}\n", "\n", "expected ',', got the end", "line 9", None),
    ("\n}\n", "\n} again", "expected the end, got 'again'", "line 9, column 3", None),
    ("graph @main", "module", "expected 'graph', got 'module'", "line 1, column 1", None),
    (SMALL, "", "expected 'graph', got the end", "line 1, column 1", None),
]


@pytest.mark.parametrize(("right", "wrong", "what", "where", "hint"), MISTAKES, ids=[m[2][:30] for m in MISTAKES])
def test_errors(right: str, wrong: str, what: str, where: str, hint: str | None) -> None:
    assert right in SMALL
    with pytest.raises(PlanishError) as caught:
        parse(SMALL.replace(right, wrong, 1), {"big": Constant.of(np.zeros((5, 4), np.float32))})
    assert what in caught.value.what
    assert caught.value.where is not None
    assert caught.value.where.startswith(where)
    assert caught.value.where.endswith("^")
    assert (caught.value.hint or "").startswith(hint or "")


@given(st.data())
def test_damaged_text_gives_a_clean_error(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(SMALL)))
    cut = data.draw(st.integers(0, 12))
    put = data.draw(
        st.sampled_from(["", "%", "(", "]", '"', "{", "0x", "\\", "9" * 5000, "*", "?", "@", "-", "nan:0x0"])
    )
    text = SMALL[:at] + put + SMALL[at + cut :]
    with contextlib.suppress(PlanishError):
        parse(text, {"big": Constant.of(np.zeros((5, 4), np.float32))})


def test_caret_stands_under_the_mistake() -> None:
    with pytest.raises(PlanishError) as caught:
        parse("graph @g(%x: f32[2]) {\n  %y: f32[2] = relu(%z)\n  return\n}")
    assert str(caught.value) == (
        "text: %z: not defined here\n  in line 2, column 21\n      %y: f32[2] = relu(%z)\n                        ^"
    )


DIFFERENCES = [
    ("@main", "@other", 'graph is named "main", not "other"'),
    ("opset = 20", "opset = 21", "meta: 'onnx.opset' is 20, not 21"),
    ("%x: f32[batch, 4]", "%x: f32[batch, 5]", "input %x: type is f32[batch, 4], not f32[batch, 5]"),
    ("-2.5", "-2.25", 'input %"/in/y": the data differ'),
    ("f32[] = 0.1", "f32[] wide = 0.1", "constant %w: the data differ"),
    ("mul(%x, %w)", "add(%x, %w)", "node %a: op is mul, not add"),
    ("mul(%x, %w)", "mul(%w, %x)", "node %a: operands are (%x, %w), not (%w, %x)"),
    ("%a: f32[batch, 4]", "%a: f32[batch, ?]", "node %a: type of %a is f32[batch, 4], not f32[batch, ?]"),
    (' from "/encoder/Mul"', "", 'node %a: source is "/encoder/Mul", not ""'),
    ("eps = 1e-12, ", "", "node %b: only the first has 'eps'"),
    ("  torch::aten._assert_async.default(%a)\n", "", "number of nodes is 3, not 2"),
    (', %b as "out 2"', "", 'outputs are %a as "out", %b as "out 2", not %a as "out"'),
]


@pytest.mark.parametrize(("old", "new", "sentence"), DIFFERENCES, ids=[d[2][:30] for d in DIFFERENCES])
def test_difference(old: str, new: str, sentence: str) -> None:
    constants = {"big": Constant.of(np.zeros((5, 4), np.float32))}
    first, second = parse(SMALL, constants), parse(SMALL.replace(old, new, 1), constants)
    assert old in SMALL
    assert (difference(first, second) or "").startswith(sentence)
    assert first != second
    assert difference(first, first.clone()) is None


@pytest.mark.slow
def test_large_graphs_take_seconds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph = Graph("large")
    x = graph.add_input("x", X)
    for i in range(100_000):
        w = graph.add_constant(f"w{i}", Constant.of(rng.normal(size=1))) if i % 10 == 0 else x
        x = graph.append(ops.get("onnx::Odd"), [x, w], {"axis": -1, "perm": (0, 1)}, types=[X], source=f"/l.{i}").result
    graph.add_output("y", x)
    start = time.perf_counter()
    check_text(graph)
    assert time.perf_counter() - start < 40  # about 8 s on a quiet machine


def test_save_and_load(tmp_path, seed: int) -> None:
    from safetensors.numpy import load_file

    rng = np.random.default_rng(seed)
    constants = {"big": Constant.of(rng.normal(size=(5, 4)).astype(np.float32))}
    graph = parse(SMALL, constants)
    graph.meta["blob"] = Blob("k", b"\x01" * 3001)
    for dtype in ("i4", "u2", "i3", "bf16", "f8e5m2fnuz", "c64", "bool", "i64", "f4e2m1", "f6e3m2"):
        graph.add_constant(dtype, Constant.of(rng.integers(0, 2, (3, 7)).astype(numpy_dtype(dtype)), dtype))
    graph.add_constant("wide", Constant.of(rng.normal(size=20), "f16"))
    graph.add_constant("words", Constant.of(np.array(["a\n", b"\xff", "é"] * 7, object)))
    path = tmp_path / "g.ir"
    store.save(graph, path)
    again = store.load(path)
    assert difference(graph, again) is None
    assert not again.values["big"].constant.loaded
    assert again.values["wide"].constant.is_wide
    files = sorted(p.name for p in tmp_path.iterdir())
    assert len(files) == 2
    assert files[0] == "g.ir"
    stored = load_file(tmp_path / files[1])
    np.testing.assert_array_equal(stored["big"], constants["big"].array())
    store.save(again, path)  # what it reads is what it writes
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    smaller = parse(SMALL, {"big": Constant.of(np.zeros((5, 4), np.float32))})
    store.save(smaller, path)
    assert store.load(path) == smaller
    now = sorted(p.name for p in tmp_path.iterdir())
    assert len(now) == 2  # the old data file is gone
    assert now != files


def test_save_keeps_data_that_the_graph_still_reads(tmp_path) -> None:
    path = tmp_path / "g.ir"
    store.save(parse(SMALL, {"big": Constant.of(np.ones((5, 4), np.float32))}), path)
    lazy = store.load(path)
    lazy.add_constant("more", Constant.of(np.zeros(100)))
    store.save(lazy, path)
    assert len(list(tmp_path.iterdir())) == 3
    assert lazy.values["big"].constant.array().sum() == 20
    assert store.load(path) == lazy


def test_small_graphs_have_no_data_file(tmp_path) -> None:
    graph = with_attributes(axis=1)
    store.save(graph, tmp_path / "g.ir")
    assert [p.name for p in tmp_path.iterdir()] == ["g.ir"]
    assert store.load(tmp_path / "g.ir") == graph


def test_store_errors(tmp_path) -> None:
    path = tmp_path / "g.ir"
    with pytest.raises(PlanishError, match=r"g\.ir: cannot be read: No such file"):
        store.load(path)
    with pytest.raises(PlanishError, match=r"cannot be written: No such file"):
        store.save(with_attributes(), tmp_path / "none" / "g.ir")
    store.save(parse(SMALL, {"big": Constant.of(np.ones((5, 4), np.float32))}), path)
    text = path.read_bytes()
    (data,) = (p for p in tmp_path.iterdir() if p != path)
    whole = data.read_bytes()
    for damaged, what in [
        (whole[:5], "ends early"),
        (whole[:-8], "wrong extent"),
        (b"\xff" * 40, "ends early"),
        (whole.replace(b'"F32"', b'"X32"'), "damaged safetensors header"),
        (whole.replace(b"[5,4]", b"[5,9]"), "wrong extent"),
    ]:
        data.write_bytes(damaged)
        with pytest.raises(PlanishError, match=what):
            store.load(path)
    data.unlink()
    with pytest.raises(PlanishError, match="cannot be read"):
        store.load(path)
    path.write_bytes(text.replace(data.name.encode(), b"../" + data.name.encode()))
    with pytest.raises(PlanishError, match="is not one of this graph's"):
        store.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PlanishError, match="not ASCII"):
        store.load(path)
    path.write_text("graph @g() {")
    with pytest.raises(PlanishError, match=r"g\.ir: text: wrong word"):
        store.load(path)


def test_an_interrupted_save_leaves_the_old_files(tmp_path, monkeypatch) -> None:
    path = tmp_path / "g.ir"
    store.save(with_attributes(axis=1), path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.save(parse(SMALL, {"big": Constant.of(np.ones((5, 4), np.float32))}), path)
    assert [p.name for p in tmp_path.iterdir()] == ["g.ir"]
    assert store.load(path) == with_attributes(axis=1)
