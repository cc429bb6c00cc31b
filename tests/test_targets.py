"""What a target and an opset allow: refused early where they do not, and the same numbers where they do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from block_models import WIDTH as BLOCK_WIDTH
from block_models import block
from encoder_blocks import WIDTH, data, heads, linear, merged, pre_norm, statistics
from helpers import ACTIVATIONS
from onnx import TensorProto, helper, numpy_helper
from patterns import Build

import planish
from planish.calibrate.data import load_calibration
from planish.capture.from_onnx import from_onnx
from planish.capture.onnx_file import META_OPSETS
from planish.codegen.onnx import to_model
from planish.integrate import convert as converting
from planish.ir.errors import PlanishError
from planish.ir.graph import Graph
from planish.ir.types import TensorType
from planish.passes.manager import Pipeline

ORT = "quantize{activations=uint8:tensor},lower{target=ort}"


def op_types(model: onnx.ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in model.graph.node)


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def opset(model: onnx.ModelProto) -> int:
    return next(i.version for i in model.opset_import if i.domain == "")


# -- targets ---------------------------------------------------------------------------------------


def test_contrib_operators_are_not_in_target_onnx() -> None:
    graph, _ = Pipeline(ORT).run(pre_norm())
    with pytest.raises(PlanishError) as caught:
        to_model(graph, target="onnx")
    assert caught.value.what == "op 'com.microsoft::MatMulIntegerToFloat': is not in target onnx"
    assert caught.value.hint == "write for --target ort"
    assert "MatMulIntegerToFloat" in op_types(to_model(graph, target="ort"))


def test_contrib_operators_that_the_model_had_are() -> None:
    graph, _ = Pipeline(ORT).run(pre_norm())
    captured = from_onnx(to_model(graph, target="ort"))
    assert op_types(to_model(captured, target="onnx")) == op_types(to_model(captured, target="ort"))


# -- opsets ----------------------------------------------------------------------------------------


def old_model(version: int) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n)
        for n, s in (("one", (8, 16)), ("two", (16, 4)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "one"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "two"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 5, d]) for n, d in (("x", 8), ("y", 4))]
    graph = helper.make_graph(nodes, "old", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=7)


@pytest.mark.parametrize("version", [9, 11, 12, 13, 17])
@pytest.mark.parametrize("activations", ["dynamic", "token", "static"])
def test_old_models_are_quantised(version: int, activations: str) -> None:
    """Scales per channel are in opset 13: the model is moved there, and is valid."""
    model = old_model(version)
    x = np.random.default_rng(1).normal(size=(3, 5, 8)).astype(np.float32)
    expected = session(model).run(None, {"x": x})[0]
    graph, _ = Pipeline("raise").run(from_onnx(model))
    stats = planish.collect(graph, [{"x": x}])
    for target in ("onnx", "ort"):
        pipeline = f"quantize{{activations={ACTIVATIONS[activations]}}},lower{{target={target}}}"
        made = to_model(Pipeline(pipeline).run(graph, stats=stats)[0], target=target)
        if target == "onnx":
            onnx.checker.check_model(made, full_check=True)
            assert opset(made) == max(version, 13)
        got = session(made).run(None, {"x": x})[0]
        assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_scales_per_channel_are_refused_below_13() -> None:
    graph, _ = Pipeline("quantize{activations=uint8:tensor}").run(pre_norm())
    with pytest.raises(PlanishError, match="op 'dequantize': a scale per channel is not possible in ONNX opset 12"):
        to_model(graph, opset=12)


def test_forms_that_old_opsets_lack() -> None:
    """Shape has limits since 15, Reshape allowzero since 14."""
    b = Build()
    x = b.input("x", "f32[a, 3, c]")
    graph = b.output(b("shape", x, start=1, end=2), b("shape", x, start=-2))
    feeds = {"x": np.zeros((2, 3, 4), np.float32)}
    for version in (8, 11, 14, 15):
        model = to_model(graph, opset=version)
        onnx.checker.check_model(model)
        got = session(model).run(None, feeds)
        assert [g.tolist() for g in got] == [[3], [3, 4]]
    for dims, fine in (([6, 4], True), ([0, 6], False)):
        b = Build()
        x = b.input("x", "f32[2, 3, 4]" if fine else "f32[0, 3, 4]")
        graph = b.output(b("reshape", x, b.constant(np.array(dims)), allowzero=True))
        assert op_types(to_model(graph, opset=14)) == {"Reshape": 1}
        if fine:
            onnx.checker.check_model(to_model(graph, opset=13))
        else:
            with pytest.raises(PlanishError, match="'Reshape': has no attribute 'allowzero' in opset 13"):
                to_model(graph, opset=13)


@pytest.mark.parametrize("version", [18, 22, 23, 24])
def test_lowering_keeps_to_the_opset(version: int) -> None:
    graph = pre_norm()
    feeds = data()[0]
    expected = session(to_model(graph)).run(None, feeds)[0]
    lowered, report = Pipeline(f"quantize{{activations=uint8:tensor}},lower{{target=ort opset={version}}}").run(graph)
    model = to_model(lowered, target="ort", opset=version)
    assert opset(model) == version
    assert op_types(model)["Attention"] == (version >= 23)
    declined = [] if version >= 23 else [f"the operator is in opset 23; {version} was asked for"]
    assert list(report["lower"].declined) == declined
    got = session(model).run(None, feeds)[0]
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_lowering_a_model_of_a_newer_opset() -> None:
    graph = pre_norm()
    graph.meta[META_OPSETS] = (("", 24),)
    model = to_model(Pipeline(ORT).run(graph)[0], target="ort")
    assert (opset(model), op_types(model)["Attention"]) == (24, 1)
    assert np.isfinite(session(model).run(None, data()[0])[0]).all()


def test_an_opset_is_refused_before_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collect(*arguments: object, **more: object) -> None:
        raise AssertionError("calibration ran")

    monkeypatch.setattr(converting, "collect", collect)
    model = block(1)
    kept = helper.make_node("BitwiseNot", ["i"], ["n"])  # since opset 18, and unknown to planish
    model.graph.node.append(kept)
    model.graph.input.append(helper.make_tensor_value_info("i", TensorProto.INT32, [2]))
    model.graph.output.append(helper.make_tensor_value_info("n", TensorProto.INT32, [2]))
    batches = [{"x": np.ones((1, 2, BLOCK_WIDTH), np.float32), "i": np.ones(2, np.int32)}]
    for version, message in (
        (17, "BitwiseNot': differs between opset 20 and 17"),
        (12, "opset 12: has no scales per channel"),
        (99, "opset 99: unknown"),
    ):
        with pytest.raises(PlanishError, match=message):
            planish.convert(model, tmp_path / "q.onnx", "w8a8-dynamic", calibration=batches, opset=version)
    assert not list(tmp_path.iterdir())


def test_convert_at_an_opset_below_attention(tmp_path: Path) -> None:
    batches = data()
    graph = pre_norm()
    planish.convert(graph, tmp_path / "q.onnx", "w8a8-dynamic", calibration=batches, opset=18)
    made = onnx.load(tmp_path / "q.onnx")
    assert opset(made) == 18
    assert "MatMulIntegerToFloat" in op_types(made)
    assert np.isfinite(session(made).run(None, batches[0])[0]).all()


# -- rows that are masked throughout -----------------------------------------------------------------


def masked(kind: str) -> Graph:
    """Attention over keys that an int64 mask keeps, the way exporters write it; guarded where `kind` says so."""
    b = Build()
    x, keep = b.input("x", f"f32[batch, tokens, {WIDTH}]"), b.input("keep", "i64[batch, tokens]")
    low = np.float32(np.finfo(np.float32).min)
    flag = b("unsqueeze", keep, axes=(1, 2))
    if kind.startswith("product"):
        mask = b("mul", b("sub", np.float32(1), b("cast", flag, to="f32")), low)
    elif kind.startswith("choice"):
        mask = b("where", b("cast", flag, to="bool"), np.float32(0), low)
    elif kind.startswith("infinite"):
        mask = b("where", b("cast", flag, to="bool"), np.float32(0), np.float32(-np.inf))
    else:
        mask = b("cast", flag, to="bool")
    q, k, v = (heads(b, linear(b, x, WIDTH, letter)) for letter in "qkv")
    attention = b("attention", q, k, v, mask, **({"safe": True} if kind.endswith("guarded") else {}))
    return b.output(linear(b, merged(b, attention), WIDTH, "o"))


@pytest.mark.parametrize(
    "kind",
    ["product", "choice", "product guarded", "choice guarded", "infinite guarded", "bool guarded", "infinite", "bool"],
)
def test_rows_that_are_masked_throughout(kind: str) -> None:
    graph = masked(kind)
    keep = np.ones((3, 5), np.int64)
    keep[0, 3:], keep[1] = 0, 0
    feeds = {"x": data()[0]["x"][[0, 1, 0]], "keep": keep}
    expected = session(to_model(graph, opset=18)).run(None, feeds)[0]
    finite = kind.endswith("guarded") or kind in ("product", "choice")
    assert np.isfinite(expected[1]).all() == finite
    lowered, report = Pipeline("lower{target=ort}").run(graph)
    model = to_model(lowered, target="ort")
    assert op_types(model)["Attention"] == 1
    assert op_types(model)["Max"] == kind.startswith("product")  # a choice takes other constants
    got = session(model).run(None, feeds)[0]
    assert np.isfinite(got).all()
    rows = slice(None) if finite else [0, 2]
    assert np.abs(got[rows] - expected[rows]).max() < 1e-5
    assert any("masks throughout give 0" in note for note in report["lower"].notes) == (kind == "infinite guarded")


@pytest.mark.parametrize("shape", ["batch, 1, 1, tokens", "1, tokens", "1, 1, tokens", "tokens, 1", "tokens, tokens"])
@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_masks_that_are_broadcast(shape: str, target: str) -> None:
    """ONNX Runtime's Attention broadcasts a mask over batch and heads only."""
    b = Build()
    x = b.input("x", f"f32[batch, tokens, {WIDTH}]")
    mask = b.input("mask", f"f32[{shape}]")
    q, k, v = (heads(b, linear(b, x, WIDTH, letter)) for letter in "qkv")
    graph = b.output(merged(b, b("attention", q, k, v, mask)))
    sizes = {"batch": 2, "tokens": 5, "1": 1}
    feeds = {"x": data()[0]["x"], "mask": np.random.default_rng(2).normal(size=[sizes[d] for d in shape.split(", ")])}
    feeds["mask"] = feeds["mask"].astype(np.float32)
    expected = session(to_model(graph, opset=18)).run(None, feeds)[0]
    lowered, _ = Pipeline(f"lower{{target={target}}}").run(graph)
    got = session(to_model(lowered, target=target, opset=23)).run(None, feeds)[0]
    assert np.abs(got - expected).max() < 1e-5


# -- once more ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w8a8-token", "w8a8-static"])
@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_a_recipe_on_its_own_output(recipe: str, target: str, tmp_path: Path) -> None:
    batches = data()
    once, twice = tmp_path / "once.onnx", tmp_path / "twice.onnx"
    planish.convert(pre_norm(), once, recipe, calibration=batches, target=target)
    done = planish.convert(once, twice, recipe, calibration=batches, target=target)
    assert not done.report["quantize"].applied
    first, second = (session(onnx.load(path)).run(None, batches[0])[0] for path in (once, twice))
    assert np.abs(first - second).max() <= 1e-5 * np.abs(first).max()
    sizes = [sum(numpy_helper.to_array(t).nbytes for t in onnx.load(p).graph.initializer) for p in (once, twice)]
    assert sizes[1] <= 1.05 * sizes[0]


def test_lowering_twice() -> None:
    graph, _ = Pipeline(ORT).run(pre_norm(), stats=statistics(pre_norm()))
    again, report = Pipeline("lower{target=ort}").run(graph)
    assert again == graph
    assert not report["lower"].applied


def test_a_type_that_is_no_float_has_no_bound() -> None:
    """A mask in float16 is left as it is: the kernel's lowest value is that of float32."""
    b = Build()
    x = b.input("x", f"f16[2, 3, {WIDTH}]")
    mask = b.graph.add_input("mask", TensorType("f16", (2, 1, 3, 3)))
    parts = [heads(b, b("linear", x, b.random(WIDTH, WIDTH, dtype="f16"))) for _ in range(3)]
    lowered, _ = Pipeline("lower{target=ort}").run(b.output(merged(b, b("attention", *parts, mask))))
    assert not [n for n in lowered.nodes if n.op.name == "max"]


# -- odd models --------------------------------------------------------------------------------------


def product(x: list[int | str], weight: tuple[int, int], *, given: bool = False) -> onnx.ModelProto:
    """x w; `given`: w is an input with a default."""
    w = numpy_helper.from_array(np.ones(weight, np.float32), "w")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)]
    if given:
        inputs.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, weight))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*x[:-1], weight[1]])]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", inputs, outputs, [w])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_exact_passes_on_empty_tensors() -> None:
    for x, weight in (([0, 4], (4, 3)), (["b", 4], (4, 0)), (["b", 0], (0, 3))):
        _, report = Pipeline("raise,merge-linears").run(from_onnx(product(x, weight)))  # type: ignore[arg-type]
        assert report.validated


def test_calibration_without_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", x=np.zeros((0, 4), np.float32))
    with pytest.raises(PlanishError, match=r"none\.npz: holds no samples"):
        load_calibration(tmp_path / "none.npz", from_onnx(product([0, 4], (4, 3))))


def test_inputs_with_a_default_do_not_fix_the_batch(tmp_path: Path) -> None:
    np.savez(tmp_path / "three.npz", x=np.zeros((3, 4), np.float32))
    found = load_calibration(tmp_path / "three.npz", from_onnx(product(["b", 4], (4, 3), given=True)))
    assert [b["x"].shape for b in found] == [(3, 4)]


@pytest.mark.parametrize("type", ["str[b]", "f32[*]"])
def test_inputs_that_cannot_be_drawn(type: str) -> None:
    b = Build()
    graph = b.output(b("identity", b.input("x", type)))
    _, report = Pipeline("raise").run(graph)
    assert report.unchecked.endswith(f"input 'x': there are no random values of type {type}")


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ([np.zeros((2, 3), np.float32)], "got a batch of ndarray"),
        ({"x": np.zeros(3)}, "got one dict"),
        (5, "got one int"),
    ],
)
def test_calibration_that_is_no_sequence_of_batches(given: object, what: str, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    with pytest.raises(PlanishError) as caught:
        planish.convert(pre_norm(), out, "w8a8-static", calibration=given)  # type: ignore[arg-type]
    assert caught.value.what == f"calibration: expected batches, each a dict of name to tensor, {what}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize("weights", ["int4:g16", "e4m3:channel", "uint4:channel"])
def test_the_opset_stays_where_another_node_would_change(weights: str, target: str) -> None:
    """If differs between 17 and 21: nobody asked for 21, and the codes have a form at 17."""
    rng = np.random.default_rng(0)
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, ["h"], [name])], name, [], [helper.make_tensor_value_info(name, 1, ["n", 16])]
        )
        for name, op in (("then", "Relu"), ("else", "Neg"))
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["y"], **branches),
    ]
    held = {"w": rng.normal(size=(32, 16)).astype(np.float32), "zero": np.zeros((), np.float32)}
    infos = [helper.make_tensor_value_info(name, 1, ["n", width]) for name, width in (("x", 32), ("y", 16))]
    tensors = [numpy_helper.from_array(data, name) for name, data in held.items()]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    quantised, _ = Pipeline(f"raise,quantize{{weights={weights}}},lower{{target={target}}}").run(from_onnx(model))
    written = to_model(quantised, target=target)
    assert opset(written) == 17
    x = {"x": rng.normal(size=(3, 32)).astype(np.float32)}
    before, after = (session(m).run(None, x)[0] for m in (model, written))
    assert np.abs(after - before).max() < 0.2 * np.abs(before).max()
    with pytest.raises(PlanishError, match="op 'onnx::If': differs between opset 17 and 21 of onnx"):
        to_model(quantised, target=target, opset=21)
