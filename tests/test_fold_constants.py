"""What does not depend on the inputs is computed; what does nothing goes; nothing else does."""

import math

import numpy as np
import pytest
import torch
from helpers import random_inputs
from patterns import Build, counts, golden, reasons, run

from planish.ir.errors import ValidationError
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph
from planish.passes import fold_constants
from planish.passes.manager import Pipeline


def fold(graph: Graph, options: str = "") -> tuple[dict[str, int], Graph]:
    after, _ = run(graph, f"fold-constants{options}")
    return counts(after), after


def test_golden(update_golden):
    b = Build()
    x = b.input("x", "f32[b, 4, 6]")
    gain = b("add", b("exp", [0.5]), 1.0)
    rows = b("slice", b("shape", x), [1], [2])
    y = b("reshape", b("mul", x, gain), b("concat", [-1], rows, [3, 2], axis=0))
    before = b.output(b("transpose", b("transpose", y, perm=(0, 2, 1, 3)), perm=(0, 3, 2, 1)))
    after, _ = run(before, "fold-constants")
    golden("fold-constants", before, after, update_golden)


def test_floats_fold_in_float64():
    b = Build()
    third = b("div", 1.0, 3.0)
    found, after = fold(b.output(b("mul", b.input("x", "f32[b]"), third)))
    assert found == {"mul": 1}
    constant = next(after.nodes).operands[1].constant
    assert constant.is_wide
    assert float(constant.wide()) == 1.0 / 3.0
    assert constant.dtype == "f32"


def test_integers_fold_exactly():
    b = Build()
    large = b.constant(np.array(2**62 + 1), "i64")
    found, after = fold(b.output(b("add", b.input("x", "i64[b]"), b("add", large, 1))))
    assert found == {"add": 1}
    assert int(next(after.nodes).operands[1].constant.array()) == 2**62 + 2


def test_a_result_that_hinges_on_a_rounding_stays():
    b = Build()
    one, tenth = b.constant(np.float32(1.0)), b.constant(np.float32(0.1))
    ratio = b("floor", b("div", one, tenth))  # 10 in float32; in float64 the float32 0.1 is more than a tenth: 9
    found, _ = fold(b.output(b("mul", b.input("x", "f32[b]"), ratio)))
    assert found == {"mul": 1, "floor": 1}


@pytest.mark.parametrize(
    ("op", "constant", "left"),
    [("mul", 1.0, True), ("mul", 1.0, False), ("add", 0.0, True), ("add", 0.0, False)]
    + [("div", 1.0, False), ("sub", 0.0, False), ("pow", 1.0, False)]
    + [("mul", [1.0] * 6, False), ("add", np.zeros((4, 1)), True)],
)
def test_neutral_elements_go(op, constant, left):
    b = Build()
    x = b("exp", b.input("x", "f32[b, 4, 6]"))
    found, _ = fold(b.output(b("neg", b(op, constant, x) if left else b(op, x, constant))))
    assert found == {"exp": 1, "neg": 1}


@pytest.mark.parametrize(
    ("op", "constant", "left"),
    [("div", 1.0, True), ("sub", 0.0, True), ("pow", 1.0, True), ("mul", 2.0, False)]
    + [("mul", np.ones((3, 1, 1, 1)), False), ("add", [0.0, 0.0, 1.0, 0.0, 0.0, 0.0], False)],
)
def test_other_elements_stay(op, constant, left):
    b = Build()
    x = b("exp", b.input("x", "f32[b, 4, 6]"))
    found, _ = fold(b.output(b("neg", b(op, constant, x) if left else b(op, x, constant))))
    assert found == {"exp": 1, op: 1, "neg": 1}


def test_identities_go():
    b = Build()
    x = b("exp", b.input("x", "f32[b, 4, 6]"))
    y = b("cast", b("identity", x), to="f32")
    y = b("concat", b("transpose", y, perm=(0, 1, 2)), axis=1)
    y = b("expand", b("reshape", y, [0, 4, 6]), [1, 4, 6])
    keep = b("logical_and", b("less", y, 1.0), b.constant(np.ones((1, 1), bool)))
    found, _ = fold(b.output(b("where", keep, y, b("neg", y))))
    assert found == {"exp": 1, "less": 1, "neg": 1, "where": 1}


def test_an_identity_between_an_input_and_an_output_stays():
    b = Build()
    graph = b.output(b("identity", b.input("x", "f32[b]")))
    after, report = run(graph, "fold-constants")
    assert counts(after) == {"identity": 1}
    assert reasons(report) == ["it gives a graph input, or another output, out once more"]


def test_static_shapes_fold():
    b = Build()
    x = b.input("x", "f32[b, 4, 6]")
    rows = b("gather", b("shape", x), 1, axis=0)
    count = b("mul", rows, b("cast", b("slice", b("shape", x), [2], [3]), to="i64"))
    y = b("reshape", x, b("concat", [-1], count, axis=0))
    found, after = fold(b.output(y))
    assert found == {"reshape": 1}
    assert next(after.nodes).operands[1].constant.array().tolist() == [-1, 24]


def test_dynamic_shapes_stay():
    b = Build()
    x = b.input("x", "f32[b, 4, 6]")
    batch = b("slice", b("shape", x), [0], [1])
    found, _ = fold(b.output(b("reshape", x, b("concat", batch, [24], axis=0))))
    assert found == {"shape": 1, "slice": 1, "concat": 1, "reshape": 1}


def test_reshapes_merge_unless_the_second_copies_a_dim():
    b = Build()
    x = b.input("x", "f32[b, 4, 6]")
    one = b("reshape", b("reshape", x, [-1, 6]), [-1, 3, 2])
    two = b("reshape", b("reshape", x, [-1, 8]), [0, 4, 2])
    found, _ = fold(b.output(one, two))
    assert found == {"reshape": 3}


def test_the_size_limit():
    b = Build()
    wide = b("expand", b.random(1, 1 << 16), [64, 1 << 16])  # 16 MB
    graph = b.output(b("matmul", b.input("x", "f32[1, 64]"), wide))
    after, report = run(graph, "fold-constants")
    assert "expand" in counts(after)
    assert reasons(report) == ["the constant would grow the model by more than 1 MB"]
    after, report = run(graph, "fold-constants{max-growth=16.0}")
    assert "expand" not in counts(after)


@pytest.mark.parametrize("op", ["div", "mul", "max", "less", "where"])
def test_an_expansion_that_the_op_makes_itself(op: str) -> None:
    b = Build()
    x = b.input("x", "f32[batch, 4]")
    n = b("reduce_l2", x, axes=(1,), keepdims=True)
    wide = b("expand", n, b("shape", x))
    operands = [b("less", x, 0.5), wide, x] if op == "where" else [x, wide]
    before = b.output(b(op, *operands))
    after, _ = run(before, "fold-constants")
    assert counts(after).get("expand") is None
    assert n.name in {v.name for v in after.outputs[0][1].producer.operands}
    inputs = random_inputs(before, 0)
    one, two = (next(iter(evaluate(g, inputs).values())) for g in (before, after))
    assert torch.equal(one, two)


def test_a_norm_by_an_expanded_length_lets_a_rotation_pass() -> None:
    b = Build()
    y = b("linear", b.input("x", "f32[4, 5]"), b.random(6, 5), b.random(6))
    length = b("clip", b("reduce_l2", y, axes=(1,), keepdims=True), np.float32(1e-12))
    graph = b.output(b("linear", b("div", y, b("expand", length, [4, 6])), b.random(3, 6)))
    assert Pipeline("rotate-channels").run(graph)[1].passes[-1].applied == []
    (line,) = Pipeline("fold-constants,rotate-channels").run(graph)[1].passes[-1].applied
    assert line.startswith("%linear: hidden, 6 channels: ")


@pytest.mark.parametrize("kind", ["it makes the rank", "it makes the shape", "an unknown dim", "both are expanded"])
def test_expansions_that_stay(kind: str) -> None:
    b = Build()
    match kind:
        case "it makes the rank":
            x = b.input("x", "f32[4]")
            graph = b.output(b("mul", b("expand", b.input("y", "f32[1, 4]"), [3, 1, 4]), x))
        case "it makes the shape":
            graph = b.output(b("mul", b.input("x", "f32[1, 4]"), b("expand", b.input("y", "f32[1, 4]"), [3, 4])))
        case "an unknown dim":
            x = b.input("x", "f32[m, 4]")
            graph = b.output(b("mul", x, b("expand", b.input("y", "f32[n, 4]"), b("shape", x))))
        case "both are expanded":
            x, y = (b("expand", b.input(name, "f32[1, 4]"), [3, 4]) for name in "xy")
            graph = b.output(b("mul", x, y))
    after, _ = Pipeline("fold-constants").run(graph, validate=kind != "an unknown dim")
    assert counts(after)["expand"] == 1


def test_an_expansion_that_others_read_stays_for_them() -> None:
    b = Build()
    x = b.input("x", "f32[3, 4]")
    wide = b("expand", b.input("y", "f32[1, 4]"), [3, 4])
    after, _ = run(b.output(b("mul", x, wide), b("neg", wide)), "fold-constants")
    assert [[v.name for v in n.operands] for n in after.nodes if n.op.name == "mul"] == [["x", "y"]]
    assert counts(after) == {"expand": 1, "mul": 1, "neg": 1}


def test_transposes_of_weights_are_left_to_raise_linear():
    b = Build()
    x, w = b.input("x", "f32[b, 4]"), b.random(5, 4)
    y = b("matmul", x, b("transpose", w, perm=(1, 0)))
    z = b("matmul", b("transpose", b.random(4, 5), perm=(1, 0)), b("transpose", x, perm=(1, 0)))
    graph = b.output(y, z)
    found, _ = fold(graph)
    assert found == {"transpose": 2, "matmul": 2}  # that of w, and that of x
    after, _ = run(graph, "fold-constants,raise-linear")
    assert counts(after) == {"linear": 2, "transpose": 1}  # W x^T is a linear, transposed back


def test_opaque_and_random_ops_stay():
    b = Build()
    graph = b.graph
    from planish.ir import ops
    from planish.ir.parser import parse_type

    one = b.constant([1.0, 2.0])
    made = graph.append(ops.get("onnx::RandomNormalLike"), [one], {"onnx_opset": 20}, types=[parse_type("f32[2]")])
    b.output(b("mul", b.input("x", "f32[b, 2]"), made.result))
    after, _ = Pipeline("fold-constants").run(graph, validate=False)
    assert counts(after) == {"onnx::RandomNormalLike": 1, "mul": 1}


def guarded() -> Graph:
    b = Build()
    p = b("softmax", b.input("x", "f32[b, 4, 6]"), axis=-1)
    return b.output(b("neg", b("where", b("is_nan", p), 0.0, p)))


def test_nan_guards():
    assert fold(guarded())[0] == {"softmax": 1, "is_nan": 1, "where": 1, "neg": 1}
    assert fold(guarded(), "{nan-guards=true}")[0] == {"softmax": 1, "neg": 1}


def test_guards_of_other_ops_stay():
    b = Build()
    p = b("log", b.input("x", "f32[b, 4, 6]"))
    found, _ = fold(b.output(b("where", b("is_nan", p), 0.0, p)), "{nan-guards=true}")
    assert found == {"log": 1, "is_nan": 1, "where": 1}


def test_the_validator_rejects_a_wrong_fold(monkeypatch):
    true = fold_constants._run
    monkeypatch.setattr(fold_constants, "_run", lambda n, d: [t * 1.001 for t in true(n, d)])
    b = Build()
    graph = b.output(b("mul", b.input("x", "f32[b]"), b("sqrt", math.pi)))
    with pytest.raises(ValidationError, match="pass 'fold-constants': changed the function"):
        Pipeline("fold-constants").run(graph)
