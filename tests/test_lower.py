"""Lowering for ONNX Runtime: the forms its kernels are fast at, and the same numbers as before."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from encoder_blocks import BLOCKS, WIDTH, data, heads, linear, merged, post_norm, pre_norm, statistics
from helpers import ACTIVATIONS, check_text, relative_error
from patterns import Build

from planish.capture.onnx_file import META_OPSETS
from planish.codegen.onnx import to_model
from planish.ir import ops
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph, Node
from planish.ir.types import TensorType
from planish.ir.verifier import verify
from planish.passes.base import PassReport
from planish.passes.manager import Pipeline

MATMUL = "com.microsoft::MatMulIntegerToFloat"
ATTENTION = "onnx::Attention"


def lower(graph: Graph, options: str, *, floors: bool = False) -> tuple[Graph, Graph, PassReport]:
    """(quantised, lowered, the report of lowering); `floors`: per row with what statistics say about the sign."""
    stats = None if options == "activations=int8:token" and not floors else statistics(graph)
    quantised, _ = Pipeline(f"quantize{{{options}}}").run(graph, stats=stats)
    lowered, report = Pipeline("lower{target=ort}").run(quantised)
    verify(lowered)
    check_text(lowered)
    return quantised, lowered, report.passes[-1]


def counts(graph: Graph) -> Counter[str]:
    return Counter(n.op.name for n in graph.nodes)


def products(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op.name == MATMUL]


def session(graph: Graph, path: Path | None = None) -> onnxruntime.InferenceSession:
    """Under the session's default options; the optimised model is written to `path`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if path is not None:
        options.optimized_model_filepath = str(path)
        options.log_severity_level = 3  # the warning that such a file is for this machine
    model = to_model(graph, target="ort").SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def error(graph: Graph, got: list[np.ndarray], expected: dict[str, torch.Tensor]) -> float:
    names = [name for name, _ in graph.outputs]
    return max(relative_error(torch.from_numpy(g), expected[n]) for n, g in zip(names, got, strict=True))


# -- what is built ---------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_one_scale_for_the_tensor(activations: str) -> None:
    """Every linear is one MatMulIntegerToFloat, bias inside, one quantised activation for all readers."""
    quantised, lowered, report = lower(pre_norm(), f"activations={ACTIVATIONS[activations]}")
    before, after = counts(quantised), counts(lowered)
    assert after[MATMUL] == before["linear"] == 8
    assert after["linear"] == after["dequantize"] == 0
    op = "dynamic_quantize" if activations == "dynamic" else "quantize"
    assert after[op] == before[op] == 6
    assert not report.declined
    assert len([a for a in report.applied if not a.endswith("residual")]) >= 8
    for node in products(lowered):
        codes, weight, scale, scales, zero, offset, bias = node.operands
        assert (codes.dtype, weight.dtype, zero.dtype) == ("u8", "i8", "u8")
        assert scale.rank == zero.rank == 0
        assert offset is None
        assert (scales.shape, bias.shape) == ((weight.shape[1],), (weight.shape[1],))
        assert node.attributes == {"onnx_opset": 1}
        assert node.result.dtype == "f32"


def test_one_scale_for_a_row() -> None:
    """The row scale is multiplied back behind the product; the bias has the shape [1, N]."""
    quantised, lowered, report = lower(pre_norm(), "activations=int8:token")
    assert counts(lowered)[MATMUL] == counts(quantised)["linear"]
    assert counts(lowered)["linear"] == counts(lowered)["dynamic_quantize"] == counts(lowered)["dequantize"] == 0
    assert counts(lowered)["quantize"] == counts(quantised)["dynamic_quantize"]  # one for all readers of a value
    assert not report.declined
    for node in products(lowered):
        quantise = node.operands[0].producer
        assert quantise.op.name == "quantize"
        assert quantise.attributes["axis"] == 0
        assert node.operands[0].rank == 2
    vectors = [n for n in lowered.nodes if n.op.name == "add" and n.operands[1].is_constant]
    assert all(n.operands[1].shape[0] == 1 for n in vectors)


def test_weights_are_the_codes_turned() -> None:
    for transposed in (False, True):
        b = Build()
        w = b.rng.normal(size=(4, 8)).astype(np.float32)
        weight = b.constant(w.T if transposed else w, name="w")
        x = b.input("x", "f32[batch, tokens, 8]")
        quantised, lowered, _ = lower(
            b.output(b("linear", x, weight, transposed=transposed)), "activations=uint8:tensor"
        )
        codes = quantised.values["w.codes"].constant.array()
        (node,) = products(lowered)
        assert np.array_equal(node.operands[1].constant.array(), codes if transposed else codes.T)
        assert node.operand(6) is None  # no bias


@pytest.mark.parametrize("activations", ["dynamic", "token", "static"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_residual_sums_are_differences(kind: str, activations: str) -> None:
    """norm(x + linear) becomes norm(x - (-linear)), with the sign in the codes and the bias."""
    graph = BLOCKS[kind]()
    quantised, lowered, report = lower(graph, f"activations={ACTIVATIONS[activations]}")
    sums = [
        n.operands[0].producer for n in quantised.nodes
        if n.op.name == "layer_norm" and n.operands[0].producer.op.name == "add"
    ]  # fmt: skip
    made = [n for n in lowered.nodes if n.op.name == "sub"]
    read_by_norms = [s for s in sums if len(s.result.users) == 1]
    assert len(made) == len(read_by_norms) == len([a for a in report.applied if a.endswith(": residual")])
    assert len(made) == (2 if kind == "post-norm" else 0)
    for node in made:
        (norm,) = node.result.users
        assert norm.op.name == "layer_norm"
    if made and activations == "dynamic":
        product = made[0].operands[1].producer
        old = quantised.values["o.weight.codes"].constant.array().T
        assert product.op.name == MATMUL
        assert np.array_equal(product.operands[1].constant.array(), -old)
        bias = quantised.values["o.bias"].constant.wide()
        assert np.array_equal(product.operands[6].constant.wide(), -bias)


def test_a_sum_that_others_read_stays() -> None:
    graph = post_norm()
    value = next(n.result for n in graph.nodes if n.op.name == "add")
    graph.add_output("sum", value)
    _, lowered, _ = lower(graph, "activations=uint8:tensor")
    inputs = data(3, samples=1)[0]
    expected = evaluate(lowered, inputs)
    assert error(lowered, session(lowered).run(None, inputs), expected) < 0.02


def test_attention_without_transposes() -> None:
    _, lowered, report = lower(pre_norm(), "activations=uint8:tensor")
    (node,) = [n for n in lowered.nodes if n.op.name == ATTENTION]
    assert counts(lowered)["transpose"] == counts(lowered)["reshape"] == counts(lowered)["attention"] == 0
    assert node.attributes == {"onnx_opset": 23, "q_num_heads": 2, "kv_num_heads": 2}
    assert node.result.shape == ("batch", "tokens", WIDTH)
    assert any(a.startswith("attention") for a in report.applied)
    assert dict(lowered.meta[META_OPSETS])[""] >= 23
    assert [i.version for i in to_model(lowered, target="ort").opset_import if i.domain == ""] == [23]


def attending(*, causal: bool = False, scale: float | None = None, mask: str = "", kv: int = 4) -> Graph:
    """Attention alone, four heads of two channels."""
    b = Build()
    x = b.input("x", f"f32[batch, tokens, {WIDTH}]")
    q = heads(b, linear(b, x, WIDTH, "q"), 4, 2)
    k, v = (heads(b, linear(b, x, 2 * kv, c), kv, 2) for c in "kv")
    operands = [q, k, v] + ([b.input("mask", mask)] if mask else [])
    return b.output(linear(b, merged(b, b("attention", *operands, causal=causal, scale=scale)), WIDTH, "o"))


CASES = {
    "plain": {},
    "causal": {"causal": True},
    "scaled": {"scale": 0.25},
    "shared heads": {"kv": 2},
    "mask": {"mask": "f32[batch, 1, tokens, tokens]"},
    "mask of keys": {"mask": "f32[batch, 1, 1, tokens]"},
    "bool mask": {"mask": "bool[batch, 1, 1, tokens]"},
}


@pytest.mark.parametrize("case", CASES)
def test_attention_forms(case: str) -> None:
    """The operator computes what the op of the IR does, masks and shared heads included."""
    graph = attending(**CASES[case])
    lowered, _ = Pipeline("lower{target=ort}").run(graph)
    verify(lowered)
    check_text(lowered)
    assert counts(lowered)[ATTENTION] == 1
    rng = np.random.default_rng(1)
    inputs = {"x": rng.normal(size=(2, 5, WIDTH)).astype(np.float32)}
    kind = CASES[case].get("mask", "")
    if kind:
        shape = (2, 1, 5 if kind.count("tokens") == 2 else 1, 5)
        keep = rng.random(shape) < 0.7
        keep[..., 0] = True
        inputs["mask"] = keep if kind.startswith("bool") else np.where(keep, 0.0, -1e4).astype(np.float32)
    got = session(lowered).run(None, inputs)
    assert error(graph, got, evaluate(graph, inputs)) < 1e-5


@pytest.mark.parametrize("kv", [4, 2])
def test_attention_before_what_knows_its_width(kv: int) -> None:
    """A session must infer the operator's width, also where its operands come from linears of integers."""
    b = Build()
    x = b.input("x", f"f32[2, 5, {WIDTH}]")
    q = heads(b, linear(b, x, WIDTH, "q"), 4, 2)
    k, v = (heads(b, linear(b, x, 2 * kv, c), kv, 2) for c in "kv")
    mixed = b("mul", merged(b, b("attention", q, k, v)), b.random(WIDTH))
    graph = b.output(linear(b, mixed, WIDTH, "o"))
    quantised, _ = Pipeline("quantize{activations=int8:token}").run(graph)
    lowered, _ = Pipeline("lower{target=ort}").run(quantised)
    check_text(lowered)
    assert counts(lowered)[ATTENTION] == 1
    inputs = {"x": np.random.default_rng(1).normal(size=(2, 5, WIDTH)).astype(np.float32)}
    assert error(graph, session(lowered).run(None, inputs), evaluate(quantised, inputs)) < 1e-2


def test_no_higher_opset_no_attention_operator() -> None:
    """An opaque node whose operator is another one in opset 23 keeps the graph where it is."""
    b = Build()
    x = b.input("x", f"f32[batch, tokens, {WIDTH}]")
    q, k, v = (heads(b, linear(b, x, WIDTH, c)) for c in "qkv")
    h = linear(b, merged(b, b("attention", q, k, v)), WIDTH, "o")
    # LpNormalization: defined for opset 1, changed in 22
    odd = b.graph.append(
        ops.get("onnx::LpNormalization"), [h], {"axis": -1, "p": 2, "onnx_opset": 17},
        types=[TensorType("f32", ("batch", "tokens", WIDTH))],
    ).result  # fmt: skip
    graph = b.output(odd)
    graph.meta[META_OPSETS] = (("", 17),)
    lowered, _ = Pipeline("lower{target=ort}").run(graph)
    check_text(lowered)
    assert counts(lowered)["attention"] == 1
    assert dict(lowered.meta[META_OPSETS])[""] == 17
    inputs = {"x": np.random.default_rng(0).normal(size=(2, 5, WIDTH)).astype(np.float32)}
    one, two = (session(g).run(None, inputs)[0] for g in (graph, lowered))
    assert np.allclose(one, two, rtol=1e-5, atol=1e-6)


# -- refusals ------------------------------------------------------------------------------------


def declined(graph: Graph) -> dict[str, list[str]]:
    lowered, report = Pipeline("lower{target=ort}").run(graph)
    check_text(lowered)
    verify(lowered)
    assert counts(lowered)["attention"] == 1
    return dict(report.passes[-1].declined)


def test_attention_in_other_shapes() -> None:
    def three(b: Build) -> list:
        return [b.input(c, "f32[2, 4, 5, 2]") for c in "qkv"]

    b = Build()
    assert declined(b.output(b("attention", *three(b)))) == {
        "its operands are not transposed head splits": ["attention %attention"]
    }

    def split(b: Build) -> list:
        x = b.input("x", "f32[2, 5, 8]")
        return [heads(b, linear(b, x, 8, c), 4, 2) for c in "qkv"]

    b = Build()
    assert list(declined(b.output(b("attention", *split(b))))) == ["its result is not transposed back"]
    b = Build()
    turned = b("transpose", b("attention", *split(b)), perm=(0, 2, 1, 3))
    assert list(declined(b.output(turned))) == ["its heads are not merged"]
    b = Build()
    turned = b("transpose", b("attention", *split(b)), perm=(0, 2, 1, 3))
    other = b("reshape", turned, b.constant(np.array([2, 10, 4])))
    assert list(declined(b.output(other))) == ["its heads are merged into another shape"]


def test_codes_without_a_fast_kernel() -> None:
    """int8 activations, and a vector of scales, stay in standard form."""
    for codes, scale, axis, reason in (
        ("i8", np.float32(0.1), None, "its activation codes are not uint8: no fast kernel"),
        ("u8", np.full(8, 0.1, np.float32), 1, "its activation has a vector of scales: no fast kernel"),
    ):
        b = Build()
        made = b("dequantize", b.input("x", f"{codes}[2, 8]"), b.constant(scale), axis=axis)
        w = b.constant(b.rng.integers(-127, 128, (4, 8)).astype(np.int8), "i8", name="w")
        weight = b("dequantize", w, b.constant(np.full(4, 0.1, np.float32)), axis=0)
        graph = b.output(b("linear", made, weight))
        lowered, report = Pipeline("lower{target=ort}").run(graph)
        assert dict(report.passes[-1].declined) == {reason: ["linear %linear"]}
        assert counts(lowered)["linear"] == 1
        # beside another activation, the optimiser would round it to int8 in blocks
        assert counts(lowered)["squeeze"] == (axis is not None)
        assert (lowered == graph) == (axis is None)


def test_a_float_graph_and_the_portable_target_stay() -> None:
    graph = pre_norm()
    lowered, report = Pipeline("lower").run(graph)
    assert lowered == graph
    assert str(Pipeline("lower{target=onnx}")) == "lower"
    assert not report.passes[-1].applied
    float_only, report = Pipeline("lower{target=ort}").run(graph)
    assert counts(float_only)["linear"] == 8


# -- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["dynamic", "token", "floors", "static"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_same_numbers(kind: str, activations: str, tmp_path: Path) -> None:
    """Evaluated, and run by ONNX Runtime with its optimiser on: none of the fusions that are slower appear."""
    graph = BLOCKS[kind]()
    form, floors = f"activations={ACTIVATIONS[activations]}", activations == "floors"
    quantised, lowered, _ = lower(graph, form, floors=floors)
    inputs = data(5, samples=1)[0]
    expected = evaluate(quantised, inputs)
    # a rounding that falls otherwise in one place shows as one step of one activation
    again = evaluate(lowered, inputs)
    assert all(relative_error(again[n], expected[n]) < 0.02 for n in expected)
    path = tmp_path / "optimised.onnx"
    got = session(lowered, path).run(None, inputs)
    assert error(lowered, got, expected) < 0.02
    ran = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert not {"SkipLayerNormalization", "BiasGelu", "MatMulNBits"} & set(ran)
    # DynamicQuantizeMatMul: with the quantisation of an activation that one linear reads
    assert ran["MatMulIntegerToFloat"] + ran["DynamicQuantizeMatMul"] == counts(quantised)["linear"]
    assert ran["Attention"] == 1
    assert ran["Transpose"] == 0


def test_a_lowered_model_comes_back(tmp_path: Path) -> None:
    """Written, captured and run again: the same bytes of output."""
    from planish.capture.from_onnx import from_onnx

    _, lowered, _ = lower(post_norm(), "activations=uint8:tensor")
    model = to_model(lowered, target="ort")
    again = to_model(from_onnx(model), target="ort")
    inputs = data(5, samples=1)[0]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    one, two = (
        onnxruntime.InferenceSession(m.SerializeToString(), options, providers=providers).run(None, inputs)
        for m in (model, again)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
