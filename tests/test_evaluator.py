"""The evaluator: values, dtypes, inputs, memory; and the opaque ops."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import check_text, random_inputs, relative_error
from onnx import TensorProto, helper

from planish.ir import ops
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.evaluator import Evaluator, evaluate, evaluate_nodes
from planish.ir.graph import Attribute, Blob, Graph, Value
from planish.ir.ops.base import Wide
from planish.ir.text import parse
from planish.ir.types import UNKNOWN, OtherType, TensorType, Type, numpy_dtype

TEXT = """
graph @g(%x: f32[batch, 3], %y: f32[batch, 3], %t: i64[2], %d: f32[3] = constant : f32[3] = [1.0, 1.0, 1.0]) {
  %w = constant : f32[3] = [1.0, 2.0, 3.0]
  %third = constant : f32[] wide = 0.3333333333333333
  %unused: f32[2] = onnx::Nonsense(%x)
  %a: f32[batch, 3] = add(%x, %w)
  %b: f32[batch, 3] = mul(%a, %y)
  %c: f32[batch, 3] = mul(%b, %third)
  %e: f32[batch, 3] = add(%c, %d)
  return %e as "e", %a as "a", %w as "w", %x as "x", %e as "again"
}
"""


def graph() -> Graph:
    return parse(TEXT)


def inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    return {
        "x": torch.ones(batch, 3),
        "y": torch.full((batch, 3), 2.0),
        "t": torch.zeros(2, dtype=torch.int64),
    }


def test_values() -> None:
    g = graph()
    check_text(g)
    found = evaluate(g, inputs(), keep=["b", "third", "t"])
    assert sorted(found) == ["a", "again", "b", "e", "t", "third", "w", "x"]
    torch.testing.assert_close(found["e"], torch.tensor([[7.0, 9.0, 11.0]] * 2) / 3)
    assert found["e"].dtype == torch.float32
    assert found["again"] is found["e"]
    given = evaluate(g, {**inputs(), "d": torch.zeros(3)})
    torch.testing.assert_close(given["e"], torch.tensor([[4.0, 6.0, 8.0]] * 2) / 3)


def test_wide() -> None:
    found = evaluate(graph(), inputs(), torch.float64, keep=["t", "third"])
    assert found["e"].dtype == torch.float64
    assert found["t"].dtype == torch.int64
    assert found["third"].item() == 0.3333333333333333  # unrounded
    assert relative_error(found["e"], torch.tensor([[7.0, 9.0, 11.0]] * 2).double() / 3) < 1e-15
    assert evaluate(graph(), inputs(), torch.float32, keep=["third"])["third"].item() == np.float32(1 / 3)


def test_numpy_inputs() -> None:
    given = {name: tensor.numpy() for name, tensor in inputs().items()}
    assert torch.equal(evaluate(graph(), given)["e"], evaluate(graph(), inputs())["e"])
    for array in given.values():
        array.flags.writeable = False  # torch warns of these
    evaluate(graph(), given)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"z": 0}, "input 'z': not an input of the graph; expected x, y, t, d"),
    ({"x": None}, "input 'x': is missing"),
    ({"x": torch.ones(2, 3).double()}, "input 'x': wrong dtype; expected f32, got f64"),
    ({"x": np.ones((2, 3), np.int32)}, "input 'x': wrong dtype; expected f32, got i32"),
    ({"x": np.array([["a"] * 3] * 2)}, "input 'x': wrong dtype; expected f32, got ndarray of <U1"),
    ({"t": torch.zeros(2)}, "input 't': wrong dtype; expected i64, got f32"),
    ({"x": [1.0]}, "input 'x': expected a tensor, got list"),
    ({"x": torch.ones(3)}, "input 'x': wrong rank; expected f32[batch, 3], got shape [3]"),
    ({"x": torch.ones(2, 4)}, "input 'x': wrong size of dim 1; expected f32[batch, 3], got shape [2, 4]"),
    ({"x": torch.ones(5, 3)}, "input 'y': dim 0 'batch' is 2, but 5 in input 'x'"),
]


@pytest.mark.parametrize(("change", "what"), MISTAKES, ids=[m[1][:40] for m in MISTAKES])
def test_wrong_inputs(change: dict[str, Any], what: str) -> None:
    given = {name: value for name, value in {**inputs(), **change}.items() if value is not None}
    with pytest.raises(PlanishError) as caught:
        evaluate(graph(), given)
    assert caught.value.what == what


def test_hints() -> None:
    g = Graph()
    g.add_output("y", g.add_input("input_ids", TensorType("f32", ("n", "n"))))
    with pytest.raises(PlanishError, match="did you mean 'input_ids'"):
        evaluate(g, {"inputs_ids": torch.zeros(1)})
    with pytest.raises(PlanishError, match="dim 1 'n' is 3, but 2 elsewhere in it"):
        evaluate(g, {"input_ids": torch.zeros(2, 3)})
    with pytest.raises(PlanishError, match="value 'input_id': not in the graph"):
        evaluate(g, {"input_ids": torch.zeros(2, 2)}, keep=["input_id"])
    check_text(g)


def test_failures_name_the_node() -> None:
    g = parse(
        'graph @g(%x: f32[n, m], %y: f32[k, l]) {\n %z: f32[?, ?] = matmul(%x, %y) from "/mm"\n return %z as "z"\n}'
    )
    check_text(g)
    with pytest.raises(PlanishError) as caught:
        evaluate(g, {"x": torch.ones(2, 3), "y": torch.ones(2, 3)})
    assert caught.value.what.startswith("matmul: cannot be evaluated: ")
    assert caught.value.what.endswith("operands are (float32[2, 3], float32[2, 3])")
    assert caught.value.where == '%z: f32[?, ?] = matmul(%x, %y) from "/mm"'


def test_gradients_are_off() -> None:
    given = inputs()
    given["x"].requires_grad_()
    found = evaluate(graph(), given)
    assert not found["e"].requires_grad
    assert not found["x"].requires_grad


def chain(length: int) -> Graph:
    g = Graph()
    x = g.add_input("x", TensorType("f32", (4,)))
    for i in range(length):
        w = g.add_constant(f"w{i}", Constant.of(np.full(4, 0.5, np.float32)))
        x = g.append(ops.get("add"), [x, w], names=[f"v{i}"]).result
    g.add_output("y", x)
    return g


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_only_live_values_are_held(dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    g = chain(40)
    check_text(g)
    held: list[weakref.ref[Any]] = []
    peak = 0

    def watch(value: Value, tensor: Any) -> None:
        nonlocal peak
        held.append(weakref.ref(tensor))
        peak = max(peak, sum(ref() is not None for ref in held))

    real = Wide.hold

    def hold(self: Wide, constant: Constant) -> Any:
        tensor = real(self, constant)
        held.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Wide, "hold", hold)
    found = evaluate(g, {"x": torch.zeros(4)}, dtype, observe=watch)
    torch.testing.assert_close(found["y"], torch.full((4,), 20.0, dtype=dtype or torch.float32))
    assert len(held) == 1 + 2 * 40
    assert peak <= 4  # the operand, the constant and the result of one node; the input, which is the caller's
    del found
    assert sum(ref() is not None for ref in held) <= 1


def test_observers() -> None:
    g = graph()
    seen: dict[str, list[float]] = {}

    def observe(value: Value, tensor: torch.Tensor) -> None:
        seen[value.name] = tensor[0].tolist()

    observed = {g.values["x"], g.values["b"]}
    found = Evaluator(g).run(inputs(), observe=observe, observed=observed)
    assert seen == {"x": [1.0, 1.0, 1.0], "b": [4.0, 6.0, 8.0]}
    assert "b" not in found


def test_what_no_output_reads_is_not_run() -> None:
    with pytest.raises(PlanishError, match="onnx::Nonsense: cannot be evaluated here"):
        evaluate(graph(), inputs(), keep=["unused"])
    evaluate(graph(), inputs())


def test_window() -> None:
    g = graph()
    named = g.values
    window = [n for n in g.nodes if n.result.name in ("b", "c")]
    environment = {named["a"]: torch.ones(1, 3), named["y"]: torch.full((1, 3), 3.0)}
    found = evaluate_nodes(window, environment, [named["c"]], Wide(torch.float64))
    assert list(found) == [named["c"]]
    torch.testing.assert_close(found[named["c"]].float(), torch.ones(1, 3))
    assert len(environment) == 2
    with pytest.raises(PlanishError, match="%y: has no tensor in the environment"):
        evaluate_nodes(window, {named["a"]: torch.ones(1, 3)}, [named["c"]])
    with pytest.raises(PlanishError, match="%e: is not computed by the nodes evaluated"):
        evaluate_nodes(window, environment, [named["e"]])


def test_random_inputs(seed: int) -> None:
    g = graph()
    given = random_inputs(g, seed, {"batch": 5})
    assert given["x"].shape == (5, 3)
    assert sorted(given) == ["t", "x", "y"]
    assert torch.equal(given["x"], random_inputs(g, seed, {"batch": 5})["x"])
    evaluate(g, given, torch.float64)


# -- opaque ops ----------------------------------------------------------------------------------

F32 = TensorType("f32")


def opaque(
    name: str,
    operands: Sequence[Any],
    attributes: dict[str, Attribute] | None = None,
    types: Sequence[Type] = (UNKNOWN,),
    dtype: torch.dtype | None = None,
) -> tuple[list[Any], bool]:
    """The results of one node (constants are operands that stay constants), and whether it was narrowed."""
    g = Graph()
    values: list[Value | None] = []
    given: dict[str, Any] = {}
    for i, operand in enumerate(operands):
        if operand is None:
            values.append(None)
        elif isinstance(operand, Constant):
            values.append(g.add_constant(f"c{i}", operand))
        else:
            of = "str" if isinstance(operand, np.ndarray) else Constant.of(operand).dtype
            values.append(g.add_input(f"x{i}", TensorType(of)))
            given[f"x{i}"] = operand
    node = g.append(ops.get(name), values, attributes, types=types)
    for i, result in enumerate(node.results):
        g.add_output(f"y{i}", result)
    check_text(g)
    evaluator = Evaluator(g, dtype)
    first = evaluator.run(given)
    second = evaluator.run(given)  # from the session that is kept
    for name_, tensor in first.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, second[name_])
    assert evaluator.narrowed in ([], [node])
    return list(first.values()), bool(evaluator.narrowed)


X = torch.tensor([[0.5, -1.5, 3.0], [0.25, 0.0, -2.0]])


def test_onnx_node_in_its_own_dtype() -> None:
    (y,), narrowed = opaque("onnx::Mish", [X], {"onnx_opset": 20})
    torch.testing.assert_close(y, torch.nn.functional.mish(X))
    assert not narrowed


def test_onnx_node_in_float64() -> None:
    (y,), narrowed = opaque("onnx::Mish", [X], {"onnx_opset": 20}, dtype=torch.float64)
    assert relative_error(y, torch.nn.functional.mish(X.double())) < 1e-14
    assert not narrowed


def test_onnx_node_that_runs_in_float32_only() -> None:
    packed = Constant.of(np.full((4, 1, 8), 0x9A, np.uint8))
    scales = Constant.of(np.ones((4, 1), np.float32))
    attributes: dict[str, Attribute] = {"K": 16, "N": 4, "bits": 4, "block_size": 16, "onnx_opset": 1}
    for dtype in (None, torch.float64):
        (y,), narrowed = opaque(
            "com.microsoft::MatMulNBits", [torch.ones(2, 16), packed, scales], attributes, dtype=dtype
        )
        torch.testing.assert_close(y, torch.full((2, 4), 24.0, dtype=dtype or torch.float32))
        assert narrowed == (dtype is not None)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_dtypes_that_numpy_lacks(dtype: torch.dtype | None) -> None:
    codes = Constant.of(np.array([[1, -2, 7, -8]], numpy_dtype("i4")))
    (y,), _ = opaque("onnx::DequantizeLinear", [codes, Constant.of(np.float32(0.5))], {"onnx_opset": 21}, [F32], dtype)
    assert y.tolist() == [[0.5, -1.0, 3.5, -4.0]]
    (y,), _ = opaque("onnx::Neg", [X.bfloat16()], {"onnx_opset": 13}, [TensorType("bf16")], dtype)
    assert y.dtype == (dtype or torch.bfloat16)
    assert torch.equal(y.float(), -X)
    zero = Constant.of(np.array(0, numpy_dtype("f8e4m3fn")))
    (y,), _ = opaque(
        "onnx::QuantizeLinear", [X, Constant.of(np.float32(1)), zero], {"onnx_opset": 21},
        [TensorType("f8e4m3fn")], dtype,
    )  # fmt: skip
    assert y.dtype == (dtype or torch.float8_e4m3fn)
    assert torch.equal(y.float(), X)


def branches() -> dict[str, Attribute]:
    two = helper.make_tensor("two", TensorProto.FLOAT, [], [2.0])
    bodies = {
        "then_branch": ([helper.make_node("Mul", ["planish_in_0", "two"], ["t"])], "t", [two]),
        "else_branch": ([helper.make_node("Neg", ["planish_in_0"], ["e"])], "e", []),
    }
    found: dict[str, Attribute] = {"captures": ("planish_in_0",), "onnx_opset": 20}
    for name, (nodes, result, tensors) in bodies.items():
        output = helper.make_tensor_value_info(result, TensorProto.FLOAT, None)
        body = helper.make_graph(nodes, name, [], [output], tensors)
        found[name] = Blob("onnx.GraphProto", body.SerializeToString())
    return found


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("condition", [True, False])
def test_subgraphs_read_what_they_capture(condition: bool, dtype: torch.dtype | None) -> None:
    (y,), _ = opaque("onnx::If", [torch.tensor(condition), X], branches(), [F32], dtype)
    assert torch.equal(y.float(), 2 * X if condition else -X)
    assert y.dtype == (dtype or torch.float32)


def test_absent_operands_and_results() -> None:
    rng = np.random.default_rng(3)
    x, w, r = (torch.from_numpy(rng.normal(size=s).astype(np.float32)) for s in ((5, 2, 3), (1, 16, 3), (1, 16, 4)))
    start = torch.ones(1, 2, 4)
    types = [OtherType("absent"), F32, F32]
    results, narrowed = opaque(
        "onnx::LSTM", [x, w, r, None, None, start], {"hidden_size": 4, "onnx_opset": 14}, types, torch.float64
    )
    assert results[0] is None
    assert results[1].shape == (1, 2, 4)
    assert not narrowed


def test_strings_and_sequences() -> None:
    words = np.array(["Ab", "c"], object)
    (y,), _ = opaque("onnx::StringNormalizer", [words], {"case_change_action": "LOWER", "onnx_opset": 20})
    assert y.tolist() == ["ab", "c"]
    g = Graph()
    x = g.add_input("x", F32)
    sequence = g.append(ops.get("onnx::SplitToSequence"), [x], {"onnx_opset": 11}, types=[UNKNOWN]).result
    joined = g.append(ops.get("onnx::ConcatFromSequence"), [sequence], {"axis": 1, "onnx_opset": 11}, types=[F32])
    g.add_output("y", joined.result)
    check_text(g)
    assert evaluate(g, {"x": X})["y"].shape == (1, 6)
    assert evaluate(g, {"x": X}, torch.float64)["y"].dtype == torch.float64


def test_a_local_function_is_found_in_the_model() -> None:
    import zlib

    body = [helper.make_node("Mul", ["a", "a"], ["b"])]
    function = helper.make_function("my.domain", "Square", ["a"], ["b"], body, [helper.make_opsetid("", 20)])
    rest = onnx.ModelProto()
    rest.functions.append(function)
    g = Graph()
    g.meta["onnx.rest"] = Blob("zlib:onnx.ModelProto", zlib.compress(rest.SerializeToString()))
    g.meta["onnx.opsets"] = (("", 20), ("my.domain", 1))
    x = g.add_input("x", F32)
    node = g.append(ops.get("my.domain::Square"), [x], {"onnx_opset": 1}, types=[F32])
    g.add_output("y", node.result)
    check_text(g)
    assert torch.equal(evaluate(g, {"x": X})["y"], X * X)
    assert torch.equal(evaluate(g, {"x": X}, torch.float64)["y"], X.double() ** 2)


def test_changed_attributes_are_seen() -> None:
    from planish.ir.rewriter import Rewriter

    g = Graph()
    node = g.append(
        ops.get("onnx::ThresholdedRelu"),
        [g.add_input("x", F32)],
        {"alpha": 0.0, "onnx_opset": 10},
        types=[F32],
    )
    g.add_output("y", node.result)
    assert evaluate(g, {"x": X})["y"].sum() == 3.75
    Rewriter(g).set_attributes(node, {"alpha": 1.0})
    assert evaluate(g, {"x": X})["y"].sum() == 3.0


def test_unknown_ops() -> None:
    with pytest.raises(PlanishError) as caught:
        opaque("my.domain::Foo", [X], {"onnx_opset": 1})
    assert caught.value.what == "my.domain::Foo: cannot be evaluated here"
    assert "onnxruntime: " in (caught.value.hint or "")
    assert "reference: " in (caught.value.hint or "")
    with pytest.raises(PlanishError, match="has no such op"):
        opaque("torch::aten.nonsense.default", [X])
    with pytest.raises(PlanishError, match="has no such op"):
        opaque("torch::load_library", [X])
    with pytest.raises(PlanishError, match="op 'reluu': unknown"):
        ops.get("reluu")


def test_torch_ops() -> None:
    (y,), _ = opaque("torch::aten.leaky_relu.default", [X], {"negative_slope": 0.5}, dtype=torch.float64)
    assert torch.equal(y, torch.nn.functional.leaky_relu(X.double(), 0.5))
    (y,), _ = opaque("torch::aten.cat.default", [X, X], {"dim": 1})
    assert y.shape == (2, 6)
    (values, indices), _ = opaque("torch::aten.topk.default", [X], {"k": 1}, [F32, TensorType("i64")])
    assert values.tolist() == [[3.0], [0.25]]
    assert indices.tolist() == [[2], [0]]
    (y,), _ = opaque("torch::aten.permute.default", [X], {"dims": (1, 0)})
    assert y.shape == (3, 2)


@pytest.mark.parametrize(
    ("name", "pure"),
    [
        ("onnx::Mish", True),
        ("onnx::RandomNormal", False),
        ("onnx::Dropout", False),
        ("torch::aten.relu.default", True),
        ("torch::aten.relu_.default", False),
        ("torch::aten.dropout.default", False),
        ("torch::aten.rand.default", False),
        ("torch::aten.nonsense.default", False),
    ],
)
def test_purity(name: str, pure: bool) -> None:
    assert ops.get(name).pure is pure
    assert ops.get(name) is ops.get(name)
    assert ops.get(name).opaque


def test_onnx_runtime_takes_dtypes_that_numpy_lacks() -> None:
    from planish.ir.ops.onnx_node import _memories

    g = Graph()
    codes, scale = g.add_input("codes", TensorType("i4")), g.add_input("scale", F32)
    node = g.append(ops.get("onnx::DequantizeLinear"), [codes, scale], {"onnx_opset": 21}, types=[F32])
    g.add_output("y", node.result)
    check_text(g)
    given = {"codes": torch.tensor([-8, 7], dtype=torch.int8), "scale": torch.tensor(0.5)}
    assert evaluate(g, given)["y"].tolist() == [-4.0, 3.5]
    assert [engine for engine, _ in _memories[node].best.values()] == ["onnxruntime"]
