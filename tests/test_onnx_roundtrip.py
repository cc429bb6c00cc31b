"""ONNX in, ONNX out: the same bits, the same names, and what has no place in the IR comes back too."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from helpers import check_text
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx_models import encoder, encoder_feeds, linear, node_model

from planish.capture.from_onnx import from_onnx
from planish.codegen.onnx import to_model
from planish.codegen.torch import to_torch
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.graph import Graph
from planish.ir.rewriter import Rewriter
from planish.ir.types import TensorType

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import roundtrip
from ort_run import Feeds, run, same
from roundtrip import Case, check


def capture(model: ModelProto, **options: bool) -> Graph:
    graph = from_onnx(model, **options)
    check_text(graph)
    return graph


def round_trip(model: ModelProto, feeds: list[Feeds], **options: bool) -> ModelProto:
    """Capture and emit; the outputs must be the same bits."""
    again = to_model(capture(model, **options))
    if all(v.type.tensor_type.HasField("shape") for v in (*model.graph.input, *model.graph.output)):
        onnx.checker.check_model(again)  # it wants shapes of inputs and outputs
    assert same(run(model, feeds), run(again, feeds))
    assert [v.name for v in again.graph.input] == [v.name for v in model.graph.input]
    assert [v.name for v in again.graph.output] == [v.name for v in model.graph.output]
    return again


def ops(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def failures(cases: list[Case]) -> tuple[list[str], Counter[str]]:
    outcomes = [check(case) for case in cases]
    wrong = [f"{o.name}: {o.why}" for o in outcomes if o.status == "failed"]
    wrong += [f"{o.name}: evaluated {o.evaluated}" for o in outcomes if o.evaluated == "far"]
    return wrong, Counter(o.status for o in outcomes)


# Fully masked rows: ONNX's Attention gives zeros there, the IR's attention NaN as a plain softmax does.
KNOWN_FAR = (
    "test_attention_causal_boolmask_nan_robustness: evaluated far",
    "test_attention_23_boolmask_fullymasked_row_nan_robustness: evaluated far",
)


def test_node_cases_sample() -> None:
    cases = list(roundtrip.node_cases())
    assert len(cases) >= 1884
    wrong, counts = failures(cases[5::12])
    assert [w for w in wrong if w not in KNOWN_FAR] == []
    assert counts["ok"] >= 120


@pytest.mark.slow
def test_every_onnx_case() -> None:
    wrong, counts = failures([*roundtrip.node_cases(), *roundtrip.folder_cases(), *roundtrip.light_cases()])
    assert [w for w in wrong if w not in KNOWN_FAR] == []
    assert counts["ok"] >= 1683


def test_encoder_keeps_its_bits_and_its_extras() -> None:
    model = encoder()
    model.doc_string = "about the model"
    model.graph.doc_string = "about the graph"
    model.graph.node[0].doc_string = "a constant"
    model.graph.node[2].doc_string = "looks words up"
    model.graph.node[2].metadata_props.add(key="layer", value="0")
    next(t for t in model.graph.initializer if t.name == "table").doc_string = "a table"
    model.graph.value_info.append(helper.make_tensor_value_info("normed", 1, ["batch", 6, 8]))
    again = round_trip(model, encoder_feeds())
    assert (again.ir_version, again.producer_name, again.doc_string) == (8, "tests", "about the model")
    assert [(p.key, p.value) for p in again.metadata_props] == [("author", "planish")]
    assert again.graph.doc_string == "about the graph"
    gather = next(n for n in again.graph.node if n.op_type == "Gather")
    assert (gather.doc_string, gather.metadata_props[0].value) == ("looks words up", "0")
    table = next(t for t in again.graph.initializer if t.name == "table")
    assert table.doc_string == "a table"
    assert "unused" in {t.name for t in again.graph.initializer}
    assert [v.name for v in again.graph.value_info] == ["normed"]
    assert list(again.graph.input) == list(model.graph.input)
    assert list(again.graph.output) == list(model.graph.output)


def test_encoder_is_canonical_but_for_its_if() -> None:
    graph = capture(encoder())
    assert [n.op.name for n in graph.nodes if n.op.opaque] == ["onnx::If"]
    conditional = next(n for n in graph.nodes if n.op.opaque)
    captures = conditional.attributes["captures"]
    assert captures == ("y", "mixed", "eps", "half")
    assert [v.name for v in conditional.operands[1:] if v is not None] == list(captures)


def test_everything_opaque_keeps_the_bits() -> None:
    model = encoder()
    graph = capture(model, canonical=False)
    assert all(n.op.opaque for n in graph.nodes)
    assert same(run(model, encoder_feeds()), run(to_model(graph), encoder_feeds()))


def test_the_model_given_is_not_changed() -> None:
    model = encoder()
    before = model.SerializeToString(deterministic=True)
    to_model(from_onnx(model))
    assert model.SerializeToString(deterministic=True) == before


def test_emission_is_deterministic() -> None:
    graph = from_onnx(encoder())
    first, second = (to_model(graph).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert to_model(graph.clone()).SerializeToString(deterministic=True) == first


# -- names ---------------------------------------------------------------------------------------


def test_captured_values_may_be_replaced() -> None:
    """A value that a subgraph reads gets another name: the subgraph is rewritten."""
    model = encoder()
    graph = capture(model)
    with Rewriter(graph) as rewriter:
        mixed = graph.values["mixed"]
        producer = mixed.producer
        assert producer is not None
        copy = rewriter.insert("matmul", producer.operands, before=producer, names=["blend"]).result
        rewriter.replace_node(producer, copy)
    check_text(graph)
    again = to_model(graph)
    onnx.checker.check_model(again)
    assert "mixed" not in {o for n in again.graph.node for o in n.output}
    assert same(run(model, encoder_feeds()), run(again, encoder_feeds()))


def test_new_names_do_not_shadow_those_of_subgraphs() -> None:
    model = encoder()
    graph = capture(model)
    with Rewriter(graph) as rewriter:
        old = graph.values["scores"].producer
        assert old is not None
        new = rewriter.insert("matmul", old.operands, before=old, names=["doubled"]).result  # an inner name
        rewriter.replace_node(old, new)
    again = to_model(graph)
    assert "doubled_1" in {o for n in again.graph.node for o in n.output}
    assert same(run(model, encoder_feeds()), run(again, encoder_feeds()))


def test_outputs_keep_their_names_when_their_value_is_replaced() -> None:
    model = linear()
    graph = capture(model)
    with Rewriter(graph) as rewriter:
        old = graph.values["y"].producer
        assert old is not None
        new = rewriter.insert("add", old.operands, before=old, names=["another"]).result
        rewriter.replace_node(old, new)
    feeds = [{"x": np.ones((2, 32), np.float32)}]
    again = to_model(graph)
    assert [o.name for o in again.graph.output] == ["y"]
    assert ops(again) == ["MatMul", "Add"]
    assert same(run(model, feeds), run(again, feeds))


def test_one_value_under_two_output_names() -> None:
    graph = capture(linear())
    graph.add_output("z", graph.values["y"])
    graph.add_output("w_out", graph.values["w"])
    graph.add_output("x_out", graph.values["x"])
    check_text(graph)
    again = to_model(graph)
    onnx.checker.check_model(again)
    assert ops(again)[-3:] == ["Identity"] * 3
    x = np.ones((2, 32), np.float32)
    y, z, w, x_out = run(again, [{"x": x}])[0]
    assert same(y, z)
    assert same(x, x_out)
    assert w.shape == (32, 32)


def test_an_output_must_not_take_the_name_of_an_input() -> None:
    graph = from_onnx(linear())
    graph.outputs = [("x", graph.values["y"])]
    with pytest.raises(PlanishError, match="output 'x': an input has that name, and is another value"):
        to_model(graph)


def test_outputs_that_are_inputs_or_initialisers() -> None:
    model = linear()
    for name, shape in (("x", ["n", 32]), ("w", [32, 32])):
        model.graph.output.append(helper.make_tensor_value_info(name, 1, shape))
    round_trip(model, [{"x": np.ones((2, 32), np.float32)}])


# -- forms of models -----------------------------------------------------------------------------


def test_old_ir_version_lists_initialisers_as_inputs() -> None:
    model = linear()
    model.ir_version = 3
    model.opset_import[0].version = 7
    constant = helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.float32(2)))
    model.graph.node.insert(0, constant)
    model.graph.node.append(helper.make_node("Mul", ["y", "two"], ["doubled"]))
    model.graph.output[0].name = "doubled"
    model.graph.input.insert(0, helper.make_tensor_value_info("w", 1, [32, 32]))
    model.graph.input.append(helper.make_tensor_value_info("b", 1, [32]))
    graph = capture(model)
    assert [v.name for v in graph.inputs] == ["x"]
    again = round_trip(model, [{"x": np.ones((2, 32), np.float32)}])
    assert ops(again) == ["Constant", "MatMul", "Add", "Mul"]


def test_inputs_with_defaults_stay_inputs() -> None:
    model = linear()
    model.graph.input.append(helper.make_tensor_value_info("b", 1, [32]))
    graph = capture(model)
    assert graph.values["b"].is_input
    assert graph.values["b"].constant is not None
    feeds = [{"x": np.ones((2, 32), np.float32)}, {"x": np.ones((2, 32), np.float32), "b": np.zeros(32, np.float32)}]
    round_trip(model, feeds)


def test_absent_results_stay_absent() -> None:
    node = helper.make_node("LSTM", ["x", "w", "r"], ["", "", "cell"], hidden_size=3)
    model = node_model(node, ["x", "w", "r"], ["cell"], 14)
    rng = np.random.default_rng(0)
    shapes = {"x": (4, 2, 5), "w": (1, 12, 5), "r": (1, 12, 3)}
    again = round_trip(model, [{n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}])
    assert list(again.graph.node[0].output) == ["", "", "cell"]


def test_absent_operands_stay_absent() -> None:
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="linear")
    model = node_model(node, ["x"], ["y"], 13)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 6, 6]), "sizes"))
    again = round_trip(model, [{"x": np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)}])
    assert list(again.graph.node[0].input) == ["x", "", "", "sizes"]


FUNCTIONS = """
<ir_version: 8, opset_import: ["": 17, "local": 1]>
calls (float[n, 4] x) => (float[n, 4] y)
<float[4] w = {1.0, 2.0, 3.0, 4.0}>
{
  a = local.scaled <factor = 3.0> (x, w)
  y = local.scaled <factor = 0.5> (a, w)
}
<domain: "local", opset_import: ["": 17]>
scaled <factor> (x, w) => (z)
{
  f = Constant <value_float: float = @factor> ()
  m = Mul (x, w)
  z = Mul (m, f)
}
"""


@pytest.mark.parametrize("inline", [True, False])
def test_local_functions(inline: bool) -> None:
    model = onnx.parser.parse_model(FUNCTIONS)
    again = round_trip(model, [{"x": np.ones((2, 4), np.float32)}], inline_functions=inline)
    assert len(again.functions) == (0 if inline else 1)
    graph = capture(model, inline_functions=inline)
    names = {n.op.name for n in graph.nodes}
    assert names == ({"mul"} if inline else {"local::scaled"})


def test_custom_domain() -> None:
    node = helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", alpha=0.5, transB=1)
    model = node_model(node, ["x", "w"], ["y"], 17)
    model.opset_import.add(domain="com.microsoft", version=1)
    rng = np.random.default_rng(0)
    again = round_trip(model, [{n: rng.standard_normal((3, 3)).astype(np.float32) for n in "xw"}])
    assert again.graph.node[0] == model.graph.node[0]
    assert {(o.domain, o.version) for o in again.opset_import} == {("", 17), ("com.microsoft", 1)}


def test_sparse_initialiser() -> None:
    model = linear()
    values = numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "s")
    indices = numpy_helper.from_array(np.array([3, 70]), "s_indices")
    model.graph.sparse_initializer.add(values=values, indices=indices, dims=[32, 32])
    model.graph.node[0].input[1] = "s"
    again = round_trip(model, [{"x": np.ones((2, 32), np.float32)}])
    assert ops(again)[0] == "Constant"


def test_strings_and_sequences() -> None:
    text = """
    <ir_version: 8, opset_import: ["": 17]>
    words (string[n] w, float[2] x) => (string[n] same, seq(float[2]) pair)
    {
      same = Identity (w)
      pair = SequenceConstruct (x, x)
    }
    """
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(helper.make_tensor("names", TensorProto.STRING, [2], [b"a", b"\xff"]))
    feeds = [{"w": np.array(["one", "t\u00fc"], object), "x": np.ones(2, np.float32)}]
    round_trip(model, feeds)
    graph = capture(model)
    assert graph.values["w"].type == TensorType("str", ("n",))
    assert "sequence_type" in str(graph.values["pair"].type)


def test_quantised_model() -> None:
    text = """
    <ir_version: 8, opset_import: ["": 17]>
    quantised (float[n, 4] x) => (float[n, 4] y)
    <float s = {0.1}, uint8 z = {128}, int8[4, 4] w = {1,2,3,4,5,6,7,8,-1,-2,-3,-4,-5,-6,-7,-8}, int8 wz = {0}>
    {
      q = QuantizeLinear (x, s, z)
      m = QLinearMatMul (q, s, z, w, s, wz, s, z)
      y = DequantizeLinear (m, s, z)
    }
    """
    model = onnx.parser.parse_model(text)
    model.graph.quantization_annotation.add(tensor_name="m").quant_parameter_tensor_names.add(key="S", value="s")
    again = round_trip(model, [{"x": np.linspace(-3, 3, 8, dtype=np.float32).reshape(2, 4)}])
    assert again.graph.quantization_annotation[0].tensor_name == "m"


def test_unsorted_nodes_are_sorted() -> None:
    model = linear()
    feeds = [{"x": np.ones((2, 32), np.float32)}]
    expected = run(model, feeds)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    assert same(expected, run(to_model(capture(model)), feeds))


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (TensorProto.BFLOAT16, [1.5, -2.0, 0.1]),
        (TensorProto.FLOAT16, [1.5, -2.0, 65504.0]),
        (TensorProto.FLOAT8E4M3FN, [1.5, -2.0, 448.0]),
        (TensorProto.INT4, [-8, 7, 3]),
        (TensorProto.UINT4, [0, 15, 3]),
        (TensorProto.BOOL, [True, False, True]),
        (TensorProto.UINT64, [0, 2**63, 2**64 - 1]),
        (TensorProto.COMPLEX64, [1 + 2j, -3j, 0.5]),
    ],
)
@pytest.mark.parametrize("raw", [True, False])
def test_tensors_of_every_layout(dtype: int, values: list[float], raw: bool) -> None:
    """Weights keep their bits, whether they came raw or in a typed field."""
    typed = helper.make_tensor("t", dtype, [3], values)
    tensor = numpy_helper.from_array(numpy_helper.to_array(typed), "t") if raw else typed
    model = linear()
    model.graph.initializer.append(tensor)
    graph = capture(model)
    again = next(t for t in to_model(graph).graph.initializer if t.name == "t")
    assert again.data_type == dtype
    assert numpy_helper.to_array(again).tobytes() == numpy_helper.to_array(tensor).tobytes()


# -- converters ----------------------------------------------------------------------------------

X = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("op_type", "opset", "attributes", "canonical"),
    [
        ("Clip", 6, {"min": -0.5, "max": 0.5}, "clip"),
        ("Clip", 6, {}, "clip"),
        ("Softmax", 11, {"axis": 2}, "softmax"),
        ("Softmax", 11, {"axis": 1}, "onnx::Softmax"),
        ("LogSoftmax", 11, {"axis": -1}, "log_softmax"),
        ("Softmax", 13, {"axis": 1}, "softmax"),
        ("Squeeze", 11, {"axes": [0]}, "squeeze"),
        ("Unsqueeze", 11, {"axes": [-1, 0]}, "unsqueeze"),
        ("ReduceSum", 11, {"axes": [-1, 0], "keepdims": 0}, "reduce_sum"),
        ("ReduceMean", 17, {"axes": [1]}, "reduce_mean"),
        ("ReduceMax", 11, {}, "reduce_max"),
        ("ReduceL2", 13, {"axes": [2]}, "reduce_l2"),
        ("ReduceL1", 13, {"axes": [2]}, "onnx::ReduceL1"),
        ("Slice", 9, {"starts": [1], "ends": [100], "axes": [2]}, "slice"),
        ("Pad", 10, {"pads": [0, 1, 0, 0, 0, 2], "value": 0.5}, "pad"),
        ("Pad", 10, {"pads": [0, 1, 0, 0, 1, 0], "mode": "reflect"}, "pad"),
        ("Split", 11, {"axis": -1, "split": [4]}, "split"),
        ("Dropout", 7, {"ratio": 0.5}, "identity"),
        ("Dropout", 13, {"seed": 3}, "identity"),
        ("Gelu", 20, {"approximate": "tanh"}, "gelu"),
        ("HardSigmoid", 6, {"alpha": 0.3}, "hard_sigmoid"),
        ("Cast", 13, {"to": 10}, "cast"),
        ("Transpose", 13, {}, "transpose"),
        ("Flatten", 13, {"axis": 2}, "flatten"),
        ("Shape", 15, {"start": 1}, "shape"),
        ("GlobalMaxPool", 13, {}, "global_max_pool"),
        ("Softsign", 13, {}, "onnx::Softsign"),
    ],
)
def test_converters(op_type: str, opset: int, attributes: dict[str, object], canonical: str) -> None:
    x = X[:1] if op_type in ("Squeeze", "Split") else X
    model = node_model(helper.make_node(op_type, ["x"], ["y"], **attributes), ["x"], ["y"], opset)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", 1, list(x.shape)))
    if op_type == "Cast":
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    if op_type == "Shape":
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    graph = capture(model)
    assert [n.op.name for n in graph.nodes] == [canonical]
    assert graph.values["y"].shape is not None
    round_trip(model, [{"x": x}])


@pytest.mark.parametrize("op_type", ["ReduceSum", "Unsqueeze", "Squeeze", "Split"])
def test_operands_computed_at_run_time_stay_opaque(op_type: str) -> None:
    node = helper.make_node(op_type, ["x", "n"], ["y"])
    model = node_model(node, ["x"], ["y"], 13)
    model.graph.input.append(helper.make_tensor_value_info("n", TensorProto.INT64, [1]))
    assert [n.op.name for n in capture(model).nodes] == [f"onnx::{op_type}"]
    size = 1 if op_type == "Split" else 0
    round_trip(model, [{"x": X[:1], "n": np.array([size])}])


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_stacked_indices(batch_dims: int) -> None:
    """GatherND becomes a gather_nd with negative positions too, and torch code; with batch axes it stays opaque."""
    rng = np.random.default_rng(0)
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("GatherND", ["x", "at"], ["y"], batch_dims=batch_dims)],
            "gather",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 4, 5]),
                helper.make_tensor_value_info("at", TensorProto.INT64, [3, 7, 2]),
            ],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 7, 5] if batch_dims == 0 else [3, 7])],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    feeds = {"x": rng.standard_normal((3, 4, 5)).astype(np.float32), "at": rng.integers(-3, 3, (3, 7, 2))}
    round_trip(model, [feeds])
    graph = capture(model)
    assert [n.op.name for n in graph.nodes] == ["onnx::GatherND" if batch_dims else "gather_nd"]
    if not batch_dims:
        held = to_torch(graph)(*map(torch.from_numpy, feeds.values()))
        assert np.array_equal(held.numpy(), run(model, [feeds])[0][0])


def test_results_beyond_the_first_keep_a_node_opaque() -> None:
    node = helper.make_node("MaxPool", ["x"], ["y", "where"], kernel_shape=[2])
    model = node_model(node, ["x"], ["y"], 13)
    assert [n.op.name for n in capture(model).nodes] == ["max_pool"]  # nobody reads the second one
    model.graph.output.append(helper.make_tensor_value_info("where", TensorProto.INT64, None))
    assert [n.op.name for n in capture(model).nodes] == ["onnx::MaxPool"]
    round_trip(model, [{"x": X}])


def test_constants_are_rounded_when_they_are_written() -> None:
    graph = from_onnx(linear())
    third = Constant(np.full(32, 1 / 3), "f32", (32,))
    with Rewriter(graph) as rewriter:
        rewriter.set_constant(graph.values["b"], third)
    written = next(t for t in to_model(graph).graph.initializer if t.name == "b")
    assert numpy_helper.to_array(written)[0] == np.float32(1 / 3)


# -- other opsets --------------------------------------------------------------------------------


def test_another_opset() -> None:
    model = node_model(helper.make_node("Squeeze", ["x"], ["y"], axes=[0]), ["x"], ["y"], 11)
    again = to_model(capture(model), opset=21)
    assert again.opset_import[0].version == 21
    assert len(again.graph.node[0].input) == 2
    assert same(run(model, [{"x": X[:1]}]), run(again, [{"x": X[:1]}]))


def test_opaque_nodes_move_only_to_opsets_where_they_are_the_same() -> None:
    softsign = from_onnx(node_model(helper.make_node("Softsign", ["x"], ["y"]), ["x"], ["y"], 13))
    assert to_model(softsign, opset=21).opset_import[0].version == 21
    with pytest.raises(PlanishError, match="op 'onnx::Softsign': differs between opset 13 and 22 of onnx") as caught:
        to_model(softsign, opset=22)
    assert caught.value.hint == "write at opset 13"
    text = """
    <ir_version: 8, opset_import: ["": 17]>
    inside (float[2] x, bool c) => (float[k] y)
    {
      y = If (c) <
        then_branch = a () => (float[1] t) { t = ReduceMean <axes = [0]> (x) },
        else_branch = b () => (float[2] e) { e = Identity (x) }
      >
    }
    """
    conditional = from_onnx(onnx.parser.parse_model(text))
    with pytest.raises(PlanishError, match="op 'onnx::ReduceMean': differs between opset 17 and 18 of onnx"):
        to_model(conditional, opset=18)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 99}, "opset 99: unknown; expected 7 to"),
        ({"opset": 0}, "opset 0: unknown; expected 7 to"),
        ({"opset": 6}, "opset 6: is not written; expected 7 to"),
        ({"target": "tpu"}, "target 'tpu': unknown; expected onnx or ort"),
    ],
)
def test_unknown_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanishError, match=message):
        to_model(from_onnx(linear()), **options)  # type: ignore[arg-type]


def test_ops_without_an_onnx_form_are_named() -> None:
    graph = from_onnx(linear())
    with Rewriter(graph) as rewriter:
        y = graph.values["y"]
        made = rewriter.insert("torch::aten.frac.default", [y], before=None, types=[y.type], names=["f"])
        rewriter.replace(y, made.result)
        rewriter.set_operand(made, 0, y)
    with pytest.raises(PlanishError, match=r"op 'torch::aten\.frac\.default': has no ONNX form"):
        to_model(graph)
