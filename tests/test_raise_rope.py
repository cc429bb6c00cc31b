"""Rotary embeddings written as arithmetic are raised in every spelling; what only looks like one is not."""

import numpy as np
import pytest
from patterns import Build, counts, golden, reasons, run

from planish.ir.errors import ValidationError
from planish.ir.graph import Graph, Value
from planish.passes import raise_rope
from planish.passes.manager import Pipeline

PIPELINE = "raise-rope"
TYPE = "f32[b, 3, 5, 8]"  # batch, heads, tokens, channels
END = np.iinfo(np.int64).max


def part(b: Build, x: Value, start: int, end: int, step: int = 1) -> Value:
    return b("slice", x, [start], [end], [x.rank - 1], [step])


def halves(b: Build, x: Value, how: str = "slice") -> tuple[Value, Value]:
    size = x.shape[-1] // 2
    if how == "split":
        node = b("split", x, axis=-1, sizes=(size, size)).producer
        return node.results[0], node.results[1]
    return part(b, x, 0, size), part(b, x, size, END)


def pairs(b: Build, x: Value, how: str = "slice") -> tuple[Value, Value]:
    if how == "slice":
        return part(b, x, 0, END, 2), part(b, x, 1, END, 2)
    dims = x.shape
    split = b("reshape", x, [-1, *dims[1:-1], dims[-1] // 2, 2])
    if how == "select":
        return b("gather", split, 0, axis=-1), b("gather", split, 1, axis=-1)
    node = b("split", split, axis=-1, sizes=(1, 1)).producer
    return tuple(b("squeeze", r, axes=(-1,)) for r in node.results)


def side_by_side(b: Build, one: Value, two: Value) -> Value:
    stacked = b("concat", b("unsqueeze", one, axes=(-1,)), b("unsqueeze", two, axes=(-1,)), axis=-1)
    return b("reshape", stacked, [-1, *one.shape[1:-1], 2 * one.shape[-1]])


def rotated(b: Build, x: Value, interleaved: bool, how: str = "slice", negate: str = "neg") -> Value:
    one, two = pairs(b, x, how) if interleaved else halves(b, x, how)
    minus = b("neg", two) if negate == "neg" else b("mul", two, -1.0)
    return side_by_side(b, minus, one) if interleaved else b("concat", minus, one, axis=-1)


def tables(b: Build, kind: str, width: int = 8) -> tuple[Value, Value]:
    match kind:
        case "inputs":
            return b.input("cos", f"f32[b, 1, 5, {width}]"), b.input("sin", f"f32[b, 1, 5, {width}]")
        case "constants":
            return b.random(5, width, name="cos"), b.random(5, width, name="sin")
        case _:
            angles = b("unsqueeze", b.input("angles", f"f32[b, 5, {width}]"), axes=(1,))
            return b("cos", angles), b("sin", angles)


def rope(b: Build, x: Value, cos: Value, sin: Value, turned: Value, swap: bool = False) -> Value:
    if swap:
        return b("add", b("mul", sin, turned), b("mul", cos, x))
    return b("add", b("mul", x, cos), b("mul", turned, sin))


def the_rope(graph: Graph):
    (node,) = [n for n in graph.nodes if n.op.name == "rope"]
    return node


@pytest.mark.parametrize("kind", ["inputs", "constants", "computed"])
@pytest.mark.parametrize(("how", "negate"), [("slice", "neg"), ("split", "mul")])
@pytest.mark.parametrize("swap", [False, True])
def test_halves(kind, how, negate, swap):
    b = Build()
    x, (cos, sin) = b.input("x", TYPE), tables(b, kind)
    after, _ = run(b.output(rope(b, x, cos, sin, rotated(b, x, False, how, negate), swap)), PIPELINE)
    node = the_rope(after)
    assert [v.name for v in node.operands] == [x.name, cos.name, sin.name]
    assert "interleaved" not in node.attributes
    assert not {"concat", "slice", "split", "add"} & set(counts(after))


@pytest.mark.parametrize("kind", ["inputs", "constants"])
@pytest.mark.parametrize("how", ["second half negated", "difference"])
def test_turned_backward(kind, how):
    b = Build()
    x, (cos, sin) = b.input("x", TYPE), tables(b, kind)
    one, two = halves(b, x)
    if how == "difference":
        turned = b("concat", b("neg", two), one, axis=-1)
        y = b("sub", b("mul", x, cos), b("mul", turned, sin))
    else:
        y = rope(b, x, cos, sin, b("concat", two, b("neg", one), axis=-1))
    after, _ = run(b.output(y), PIPELINE)
    assert counts(after) == {"rope": 1, **({"neg": 1} if kind == "inputs" else {})}


def test_two_parts_turned_backward():
    b = Build()
    x, (cos, sin) = b.input("x", TYPE), tables(b, "inputs", 4)
    one, two = halves(b, x)
    first = b("add", b("mul", one, cos), b("mul", two, sin))
    y = b("concat", first, b("sub", b("mul", two, cos), b("mul", one, sin)), axis=-1)
    after, _ = run(b.output(y), PIPELINE)
    assert counts(after) == {"rope": 1, "neg": 1, "concat": 2}


def test_tables_are_made_once():
    b = Build()
    cos, sin = tables(b, "inputs", 4)
    made = [b("concat", *two_parts(b, *pairs(b, b.input(n, TYPE)), cos, sin), axis=-1) for n in "qk"]
    after, _ = run(b.output(*made), PIPELINE)
    assert counts(after) == {"gather": 2, "concat": 2, "rope": 2}


@pytest.mark.parametrize("merged", [False, True])
def test_pairs_split_off_by_the_reshape_that_splits_heads(merged):
    b = Build()
    cos, sin = b.input("cos", "f32[b, 5, 1, 4]"), b.input("sin", "f32[b, 5, 1, 4]")
    x = b.input("x", "f32[b, 5, 24]" if merged else "f32[b, 5, 3, 8]")
    split = b("reshape", x, [-1, 5, 3, 4, 2])
    one, two = b("gather", split, 0, axis=-1), b("gather", split, 1, axis=-1)
    after, _ = run(b.output(side_by_side(b, *two_parts(b, one, two, cos, sin))), PIPELINE)
    assert counts(after) == {"gather": 2, "rope": 1, **({"reshape": 2} if merged else {})}
    assert the_rope(after).operands[0].shape == ("b", 5, 3, 8)


@pytest.mark.parametrize("how", ["slice", "select", "split"])
def test_pairs(how):
    b = Build()
    x, (cos, sin) = b.input("x", TYPE), tables(b, "inputs")
    after, _ = run(b.output(rope(b, x, cos, sin, rotated(b, x, True, how))), PIPELINE)
    assert the_rope(after).attributes == {"interleaved": True}
    assert counts(after) == {"rope": 1}


def two_parts(b: Build, one: Value, two: Value, cos: Value, sin: Value, swap: bool = False) -> tuple[Value, Value]:
    if swap:
        first = b("sub", b("mul", cos, one), b("mul", sin, two))
        return first, b("add", b("mul", sin, one), b("mul", cos, two))
    return b("sub", b("mul", one, cos), b("mul", two, sin)), b("add", b("mul", two, cos), b("mul", one, sin))


@pytest.mark.parametrize("kind", ["inputs", "constants"])
@pytest.mark.parametrize("source", ["halves", "pairs"])
@pytest.mark.parametrize("target", ["halves", "pairs"])
@pytest.mark.parametrize("swap", [False, True])
def test_two_parts(kind, source, target, swap):
    b = Build()
    x, (cos, sin) = b.input("x", TYPE), tables(b, kind, 4)
    one, two = halves(b, x) if source == "halves" else pairs(b, x)
    one, two = two_parts(b, one, two, cos, sin, swap)
    y = b("concat", one, two, axis=-1) if target == "halves" else side_by_side(b, one, two)
    after, _ = run(b.output(y), PIPELINE)
    node = the_rope(after)
    assert bool(node.attributes.get("interleaved")) == (target == "pairs")
    assert node.operands[1].shape[-1] == 8
    assert (node.operands[0].name == "x") == (source == target)


def test_golden(update_golden):
    b = Build()
    x, (cos, sin) = b.input("x", TYPE), tables(b, "inputs", 4)
    before = b.output(b("concat", *two_parts(b, *pairs(b, x), cos, sin), axis=-1))
    after, _ = run(before, PIPELINE)
    golden("raise-rope", before, after, update_golden)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_part_of_the_channels(interleaved):
    b = Build()
    x, (cos, sin) = b.input("x", TYPE), tables(b, "inputs", 4)
    turning, rest = part(b, x, 0, 4), part(b, x, 4, END)
    y = rope(b, turning, cos, sin, rotated(b, turning, interleaved))
    after, _ = run(b.output(b("concat", y, rest, axis=-1)), PIPELINE)
    assert counts(after) == {"slice": 2, "rope": 1, "concat": 1}
    assert the_rope(after).operands[0].producer.op.name == "slice"


def test_tokens_before_heads():
    b = Build()
    x = b.input("x", "f32[b, 5, 3, 8]")
    cos, sin = b.input("cos", "f32[b, 5, 1, 8]"), b.input("sin", "f32[b, 5, 1, 8]")
    after, _ = run(b.output(rope(b, x, cos, sin, rotated(b, x, False))), PIPELINE)
    assert counts(after) == {"rope": 1}


def test_what_else_reads_the_halves_stays():
    b = Build()
    x, (cos, sin) = b.input("x", TYPE), tables(b, "inputs")
    turned = rotated(b, x, False)
    after, _ = run(b.output(rope(b, x, cos, sin, turned), b("abs", turned)), PIPELINE)
    assert counts(after) == {"rope": 1, "slice": 2, "neg": 1, "concat": 1, "abs": 1}


NEITHER = ("shifted parts", "other tensor", "pairs become halves", "wide tables", "dtypes")


@pytest.mark.parametrize(
    ("what", "miss"),
    [
        ("not negated", ""),
        ("wrong half negated", "rope: 2 of 5 steps matched for add %add; the parts are not the two halves"),
        ("shifted parts", "rope: 2 of 5 steps matched for add %add; the parts are not the two halves of one tensor"),
        ("other tensor", "rope: 3 of 5 steps matched for add %add; another tensor stands beside the rotated one"),
        ("pairs become halves", "rope: 3 of 5 steps matched for add %add; the parts change places as well"),
        ("wide tables", "rope: 4 of 5 steps matched for add %add; the tables have axes that x does not have"),
        ("dtypes", "rope: 4 of 5 steps matched for add %add; x and the tables differ in dtype at add %add"),
        ("same sign", "rope of two parts: 1 of 5 steps matched for concat %concat; no rotation of two parts"),
        ("other angle", "rope of two parts: 1 of 5 steps matched for concat %concat; no rotation of two parts"),
        ("two tensors", "rope of two parts: 3 of 5 steps matched for concat %concat; the parts are not the two halves"),
    ],
)
def test_nearest_misses(what, miss):
    b = Build()
    x, (cos, sin) = (
        b.input("x", TYPE),
        tables(b, "inputs", 4 if what in ("same sign", "other angle", "two tensors") else 8),
    )
    if what == "two tensors":
        one, two = part(b, x, 0, 4), x
    else:
        one, two = halves(b, x) if what not in NEITHER else (x, x)
    match what:
        case "not negated":
            y = rope(b, x, cos, sin, b("concat", two, one, axis=-1))
        case "wrong half negated":
            y = rope(b, x, cos, sin, b("concat", b("neg", one), two, axis=-1))
        case "shifted parts":
            turned = b("concat", b("neg", part(b, x, 3, 7)), part(b, x, 0, 4), axis=-1)
            y = rope(b, x, cos, sin, turned)
        case "other tensor":
            y = rope(b, b.input("z", TYPE), cos, sin, rotated(b, x, False))
        case "pairs become halves":
            even, odd = pairs(b, x)
            y = rope(b, x, cos, sin, b("concat", b("neg", odd), even, axis=-1))
        case "wide tables":
            row = b.input("row", "f32[b, 3, 1, 8]")
            y = rope(b, row, cos, sin, rotated(b, row, False))
        case "dtypes":
            narrow = b.input("narrow", "f16[b, 3, 5, 8]")
            y = rope(b, narrow, cos, sin, b("cast", rotated(b, narrow, False), to="f32"))
        case "same sign":
            y = b("concat", b("sub", b("mul", one, cos), b("mul", two, sin)),
                  b("add", b("mul", two, cos), b("mul", two, sin)), axis=-1)  # fmt: skip
        case "other angle":
            y = b("concat", b("sub", b("mul", one, cos), b("mul", two, sin)),
                  b("add", b("mul", two, sin), b("mul", one, cos)), axis=-1)  # fmt: skip
        case _:
            y = b("concat", *two_parts(b, one, part(b, b.input("z", TYPE), 4, END), cos, sin), axis=-1)
    before = b.output(y)
    after, report = run(before, PIPELINE)
    assert after == before
    assert reasons(report) == []
    assert miss in "\n".join(report.misses)


def test_the_validator_rejects_a_wrong_table(monkeypatch):
    true = raise_rope.doubled
    monkeypatch.setattr(raise_rope, "doubled", lambda r, t, n, i: true(r, t, n, not i))
    b = Build()
    x, (cos, sin) = b.input("x", TYPE), tables(b, "constants", 4)
    graph = b.output(b("concat", *two_parts(b, *halves(b, x), cos, sin), axis=-1))
    with pytest.raises(ValidationError, match="pass 'raise-rope': changed the function"):
        Pipeline(PIPELINE).run(graph)
