"""Regions of a quantised graph: they compute what the graph does, and fuse what they are said to fuse."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from encoder_blocks import HIDDEN, WIDTH, data, linear, norm, post_norm, pre_norm
from helpers import check_text
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import Build
from random_graphs import random_graph, steps

from planish.calibrate.collect import collect
from planish.codegen.kernel_spec import Kernel
from planish.codegen.partition import Partition
from planish.codegen.regions import Bound, Plan, Region, pack_codes, unpack_codes
from planish.codegen.select import Options, select
from planish.codegen.select_sites import weight_kind
from planish.codegen.triton import emit_kernel
from planish.codegen.triton_rows import refusal
from planish.integrate.recipes import builtin_names, load_recipe
from planish.ir.errors import PlanishError
from planish.ir.evaluator import evaluate
from planish.ir.graph import Graph, Value
from planish.ir.qnodes import weight_of
from planish.passes.manager import Pipeline

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import assets
import blocks
import zoo_models

Batch = dict[str, np.ndarray]
TOKEN = "quantize{activations=int8:token}"


def quantised(graph: Graph, passes: str, batches: list[Batch]) -> Graph:
    """A graph after a pipeline, or after a recipe of that name."""
    pipeline = load_recipe(passes).passes() if passes in builtin_names() else Pipeline(passes)
    stats = collect(graph, batches) if any(p.needs_stats for p in pipeline.passes) else None
    made, _ = pipeline.run(graph, stats=stats, data=batches, validate=False)
    check_text(made)
    return made


def check(plan: Plan, inputs: Batch | dict[str, torch.Tensor]) -> None:
    """Region by region the plan computes what the graph does, to the bit; regions cover the nodes; specs are closed."""
    for dtype in (None, torch.float64):
        expected, got = evaluate(plan.graph, inputs, dtype), plan.evaluate(inputs, dtype)
        assert list(got) == list(expected)
        for name, value in expected.items():
            assert torch.equal(got[name].nan_to_num(7.0), value.nan_to_num(7.0)), name
    homes = Counter(node for region in plan.regions for node in region.nodes)
    for node in plan.graph.nodes:
        decoder = node.op.name in ("dequantize", "dequantize_split", "transpose")  # of a weight
        assert homes[node] == 1 or (decoder and homes[node] > 1), node
    made: set[Value] = {*plan.graph.inputs}
    for region in plan.regions:  # convex and in order: nothing is read before its region has run
        assert made.issuperset(region.inputs), region.name
        made.update(region.outputs)
    for region in plan.kernels:
        check_spec(region)


def check_spec(region: Region) -> None:
    """Every name that a kernel reads is made before; every output is made; every border tensor is bound."""
    kernel = region.kernel
    assert kernel is not None
    assert [t.name for t in kernel.tensors] == list(dict.fromkeys(t.name for t in kernel.tensors))
    assert {t.name for t in kernel.tensors} == set(region.bound)
    assert refusal(kernel.steps, kernel.columns) == ""
    assert refusal(kernel.closing, kernel.outputs) == ""
    given = {t.name for t in kernel.tensors if t.role in ("input", "weight")}
    known = given | {p.result for p in kernel.products}
    for product in kernel.products:
        weight = product.weight
        read = {weight.codes, weight.scale, weight.zero, weight.ids, weight.sums, product.bias}
        read |= {name for b in product.branches for name in (b.left, b.right)}
        assert given >= read - {""}
    for step in (*kernel.steps, *kernel.closing):
        assert known >= set(step.reads) - {""}, step
        assert not known & set(step.writes), step
        known |= set(step.writes)
    results = {t.name for t in kernel.tensors if t.role in ("output", "scratch")}
    assert known >= results
    assert not results & given


def inputs_of(graph: Graph, tokens: int = 16) -> Batch:
    if [v.name for v in graph.inputs] == ["ids"]:
        return blocks.batches(tokens, 1, seed=9, rows=2)[0]
    return data(9, samples=1)[0]


# -- the property ------------------------------------------------------------------------------------


QUICK = ("w8a8-token", "w8a8-static", "w4a16", "w4a4", "w4a8", "w2a16", "llm-int8")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in builtin_names() if name not in QUICK]
SVDQUANT = pytest.param("svdquant", marks=pytest.mark.slow)


@pytest.mark.parametrize("recipe", [*QUICK, *SLOW])
def test_regions_compute_the_graph(recipe: str) -> None:
    for graph, batches in (
        (blocks.decoder(128, tokens=16), blocks.batches(16, 2)),
        (post_norm(), data(samples=2)),
    ):
        made = quantised(graph, recipe, batches)
        check(select(made), inputs_of(graph))
        check(select(made, Options(closing=False)), inputs_of(graph))
        check(select(made, Options(norms=128)), inputs_of(graph))


FORMATS = (
    TOKEN,
    "quantize{activations=uint8:tensor}",
    "quantize{activations=uint8:tensor:static}",
    "quantize{weights=int4:g16 activations=int4:g16}",
    "quantize{weights=uint4:g16}",
    "raise,insert-hadamard{sites=all},quantize{activations=int4:token}",
    "extract-low-rank{rank=2 weights=int4:g16 activations=int4:g16},quantize{weights=int4:g16 activations=int4:g16}",
    "extract-outliers{mode=static threshold=1.0},quantize{activations=int8:token}",
    "split-layers{clusters=2 form=packed},quantize{weights=uint2:g16:split2}",
    "merge-linears,quantize{activations=int8:token}",
)


@settings(max_examples=40)
@given(steps, st.integers(0, 99), st.sampled_from(FORMATS), st.booleans(), st.sampled_from((0, 128)))
def test_random_graphs(
    plan: list[tuple[int, int, int, int]], seed: int, passes: str, closing: bool, norms: int
) -> None:
    graph = random_graph(plan, seed)
    rng = np.random.default_rng(seed)
    shape = [int(str(d)) for d in graph.inputs[0].shape or ()]
    batch = {"x": rng.normal(size=shape).astype(np.float32), "ids": rng.integers(0, 7, (2, 3))}
    check(select(quantised(graph, passes, [batch]), Options(closing=closing, norms=norms)), batch)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", ["w8a8-token", "w8a8-static", "w4a16", "w4a4", "llm-int8"])
def test_minilm(recipe: str) -> None:
    """Six layers: of each a prologue for q, k and v, one for the output and one for the MLP, and six gemms.

    (w8a8-static isolates outlying channels of some MLPs, in linears of their own: two more gemms for each.)
    """
    from planish.integrate.api import capture

    texts = assets.sentences("calibration", 8)
    batch = assets.encode(texts, 32)
    plan = select(quantised(capture(assets.minilm_onnx()), recipe, [batch]))
    check(plan, assets.encode(assets.sentences("judge", 2), 16))
    quantised_linears = [n for n in plan.graph.nodes if weight_kind(n) is not None and n.op.name == "linear"]
    assert plan.count("gemm") == len(quantised_linears)
    assert len(quantised_linears) == 36 or recipe == "w8a8-static"
    assert plan.count("prologue") == (12 if recipe == "w4a16" else 18)
    gelus = [n for n in plan.graph.nodes if n.op.name == "gelu"]
    assert {n for r in plan.kernels if r.kind == "gemm" for n in r.nodes} >= {*gelus}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "phi3", "cohere", "mixtral", "t5", "vit", "mamba", "flux"])
def test_zoo(name: str) -> None:
    from planish.integrate.api import capture

    module, arguments = zoo_models.build(name, seed=3)
    made, _ = Pipeline(f"raise,{TOKEN}").run(capture(module, arguments), validate=False)
    check(select(made), {k: v for k, v in arguments.items() if any(k == value.name for value in made.inputs)})


# -- what is fused -----------------------------------------------------------------------------------


def kernel_with(plan: Plan, name: str) -> Kernel:
    """The kernel that computes the linear whose weight is called so."""
    for region in plan.kernels:
        read = [b.how for b in region.bound.values()]
        if region.kernel is not None and region.kernel.kind == "gemm" and any(f"%{name}.weight" in how for how in read):
            return region.kernel
    raise AssertionError(f"no kernel has {name}.weight")


def rows(kernel: Kernel | None) -> list[str]:
    if kernel is None:
        return []
    return [s.row for s in kernel.steps] + [f"closing {s.row}" for s in kernel.closing]


def reasons(plan: Plan) -> dict[str, str]:
    return {m.node.result.name: m.reason for m in plan.misses}


@cache
def planned(model: str, passes: str, closing: bool = True) -> Plan:
    graph, batches = {
        "decoder": lambda: (blocks.decoder(128, tokens=16), blocks.batches(16, 2)),
        "pre": lambda: (pre_norm(), data(samples=2)),
        "post": lambda: (post_norm(), data(samples=2)),
    }[model]()
    return select(quantised(graph, passes, batches), Options(closing=closing))


def test_each_quantised_linear_is_one_prologue_and_one_gemm() -> None:
    """x + attention, h + mlp, between two linears: q, k, v share a prologue and gelu is in fc1's kernel."""
    plan = planned("pre", TOKEN)
    assert plan.count("gemm") == 8  # first, q, k, v, o, up, down, last
    assert [r.kernel.steps[0].row for r in plan.kernels if r.kernel and r.kernel.kind == "prologue"] == [
        "quantize_token",  # the input
        "layer_norm",  # q, k, v
        "quantize_token",  # o
        "layer_norm",  # up
    ]
    assert rows(kernel_with(plan, "last")) == []
    assert rows(kernel_with(plan, "down")) == ["add", "closing quantize_token"]  # the sum, and what last reads


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        (TOKEN, ["gelu", "closing quantize_token"]),
        ("quantize{weights=int4:g16 activations=int4:g16}", ["gelu", "quantize_group"]),
        ("w8a8-static", ["gelu", "mul", "quantize_static"]),
        ("quantize{weights=int4:g16}", ["gelu"]),
        ("insert-hadamard{sites=down},quantize{activations=int4:token}",
         ["gelu", "closing hadamard", "closing quantize_token"]),
    ],
)  # fmt: skip
def test_fc1_gelu_and_the_next_quantise_are_one_kernel(passes: str, expected: list[str]) -> None:
    plan = planned("post", passes)
    found = rows(kernel_with(plan, "up"))
    assert [r for r in found if r != "mul"] == [r for r in expected if r != "mul"]
    closing = planned("post", passes, False)
    if any(r.startswith("closing") for r in expected):
        assert rows(kernel_with(closing, "up")) == ["gelu"]
        assert "it needs whole rows, and closing steps are switched off" in reasons(closing).values()
    else:
        assert rows(kernel_with(closing, "up")) == found


@pytest.mark.parametrize("passes", [TOKEN, "w8a8-static", "w4a4", SVDQUANT, "llm-int8", "w4a8", "qllm"])
def test_q_k_and_v_share_one_prologue(passes: str) -> None:
    plan = planned("decoder", passes)
    made = {name: kernel_with(plan, f"layers.0.{name}") for name in "qkv"}
    assert all(not rows(k) and len(k.products) == 1 for k in made.values())
    prologues = [r for r in plan.kernels if r.kind == "prologue"]
    assert len(prologues) == 4  # q k v, o, gate up, head
    readers = [
        r for r in plan.kernels if r.kind == "gemm" and {*r.inputs} & {*prologues[0].outputs}
    ]  # fmt: skip
    assert [r.kernel for r in readers] == [made["q"], made["k"], made["v"]]


@pytest.mark.parametrize("passes", [TOKEN, "w8a8-static", "w4a4", SVDQUANT, "llm-int8", "w4a8", "w4a16", "w2a16"])
def test_gate_up_and_silu_mul_are_one_kernel(passes: str) -> None:
    plan = planned("decoder", passes)
    gate = kernel_with(plan, "layers.0.gate")
    assert gate == kernel_with(plan, "layers.0.up")
    assert [p.result for p in gate.products] == ["acc", "acc1"]
    assert rows(gate)[:2] == ["silu", "mul"]
    assert plan.count("gemm") == 6 + 1  # q k v o gate-up down, and the head
    down = [row for row in rows(gate)[2:] if row not in ("mul", "closing mul")]
    assert (
        down
        == {
            TOKEN: ["closing quantize_token"],
            "w8a8-static": ["quantize_static"],
            "w4a4": ["closing hadamard", "closing quantize_group", "closing down"],
            "svdquant": ["closing quantize_group", "closing down"],
            "llm-int8": ["closing quantize_token", "closing gather"],
            "w4a8": ["closing quantize_token"],
            "w4a16": [],
            "w2a16": [],
        }[passes]
    )


@pytest.mark.parametrize("passes", ["merge-linears", "merge-linears,extract-low-rank{rank=4}"])
def test_gate_and_up_of_a_merged_linear_are_two_products(passes: str) -> None:
    """The rows of the merged weight, of its bias and of its branch are parted; q, k and v stay merged."""

    def make(b: Build, x: Value) -> list[Value]:
        y = norm(b, x, "n", "rms_norm")
        gate, up = linear(b, y, HIDDEN, "gate"), linear(b, y, HIDDEN, "up")
        z = norm(b, linear(b, b("mul", b("silu", gate), up), WIDTH, "down"), "m", "rms_norm")
        return [b("softmax", linear(b, z, WIDTH, letter), axis=-1) for letter in "qkv"]

    plan = build(make, f"{passes},{TOKEN}")
    assert plan.count("gemm") == 3
    (found,) = [r for r in plan.kernels if r.kernel and len(r.kernel.products) == 2]
    assert found.kernel is not None
    assert rows(found.kernel)[:2] == ["silu", "mul"]
    assert found.kernel.outputs == HIDDEN
    held = found.bind("f32")
    node = next(n for n in found.nodes if n.op.name == "linear")
    q = weight_of(node)
    assert q is not None
    assert q.shape == (2 * HIDDEN, WIDTH)
    scale = np.concatenate([held["weight_scale"].numpy(), held["weight1_scale"].numpy()])
    codes = np.concatenate([held["weight"].numpy(), held["weight1"].numpy()])[:, :WIDTH]
    np.testing.assert_allclose(codes * scale.astype(np.float64)[:, None], q.dequantize(), rtol=1e-6)
    bias = node.operands[2]
    assert bias is not None and bias.constant is not None
    np.testing.assert_array_equal(np.concatenate([held["bias"], held["bias1"]]), bias.constant.array())
    if "low-rank" in passes:
        assert [held[b.right].shape for p in found.kernel.products for b in p.branches] == [(HIDDEN, 4)] * 2
        assert not torch.equal(held["up"], held["up1"])


def test_other_shapes_of_the_same_rows_are_fused_over() -> None:
    """Reshapes that keep the last axis, as they stand around linears of flattened rows."""

    def make(b: Build, x: Value) -> list[Value]:
        flat = b("reshape", norm(b, x, "n"), b.constant(np.array([10, WIDTH])))
        y = b("reshape", linear(b, flat, HIDDEN, "up"), b.constant(np.array([2, 5, HIDDEN])))
        y = b("reshape", b("gelu", y), b.constant(np.array([-1, HIDDEN])))
        return [b("add", x, b("reshape", linear(b, y, WIDTH, "down"), b.constant(np.array([2, 5, WIDTH]))))]

    plan = build(make)
    assert [r.kind for r in plan.regions] == ["prologue", "gemm", "gemm"]
    assert rows(kernel_with(plan, "up")) == ["gelu", "closing quantize_token"]
    assert rows(kernel_with(plan, "down")) == ["add"]
    last = plan.regions[-1]
    leads = last.leads({v: torch.empty(*(int(str(d)) for d in v.shape or ())) for v in last.inputs})
    assert leads[last.outputs[0]] == (2, 5)
    assert leads[next(n for n in last.nodes if n.op.name == "linear").result] == (10,)


def test_results_that_are_views_of_others_are_known() -> None:
    def make(b: Build, x: Value) -> list[Value]:
        y = norm(b, x, "n")
        flat = b("reshape", y, b.constant(np.array([10, WIDTH])))
        return [linear(b, flat, 4, "one"), b("softmax", flat, axis=-1), b("softmax", y, axis=-1)]

    plan = build(make)
    (prologue,) = [r for r in plan.kernels if r.kind == "prologue"]
    ((view, shown),) = prologue.views.items()
    assert {view, shown} <= set(prologue.outputs)
    assert prologue.bound["out"].value is shown


def test_squares_are_products() -> None:
    plan = build(lambda b, x: [b("pow", b("relu", linear(b, x, WIDTH, "one")), b.constant(2.0))])
    kernel = kernel_with(plan, "one")
    assert [(s.row, s.reads) for s in kernel.steps] == [("relu", ("acc",)), ("mul", ("v", "v"))]


def test_the_residual_sum_is_in_the_epilogue_of_the_linear_that_ends_it() -> None:
    plan = planned("decoder", TOKEN)
    for name in ("o", "down"):
        kernel = kernel_with(plan, f"layers.0.{name}")
        assert rows(kernel) == ["add"]
        assert kernel.steps[0].reads == ("residual", "acc")
        assert kernel.tensor("residual").shape == ("M", 128)


def test_branches_and_gathers() -> None:
    low_rank, outliers = planned("decoder", "w4a4"), planned("decoder", "llm-int8")
    for plan, row in ((low_rank, "down"), (outliers, "gather")):
        lefts = [r for r in plan.kernels if r.kind == "prologue" and row in rows(r.kernel)]
        assert len(lefts) >= 2
        for region in plan.kernels:
            assert region.kernel is not None
            if any(p.branches for p in region.kernel.products):
                (left,) = {b.left for p in region.kernel.products for b in p.branches}
                made = region.bound[left].value
                assert made is not None and made.producer is not None
                assert all(made.producer not in r.nodes for r in plan.regions if r.kind == "graph")
            assert "linear" not in rows(region.kernel)
    assert all(len(p.branches) == 1 for r in low_rank.kernels if r.kernel for p in r.kernel.products)


def test_a_norm_that_others_read_is_an_output_beside_the_codes() -> None:
    plan = planned("post", TOKEN)
    found = [
        r.kernel for r in plan.kernels if r.kind == "prologue" and r.kernel and r.kernel.steps[0].row == "layer_norm"
    ]
    assert found
    for kernel in found[:2]:  # norm0 and norm1 are residuals too
        assert {t.name for t in kernel.tensors if t.role == "output"} >= {"out", "codes", "scale"}
        assert kernel.steps[-1].row == "quantize_token"


def test_a_norm_ends_the_gemm_that_makes_its_rows_where_it_may() -> None:
    """Rows of up to so many columns; what others read of it goes out beside the codes."""
    graph, batches = post_norm(), data(samples=2)
    made = quantised(graph, TOKEN, batches)
    columns = {r.kernel.outputs for r in select(made).kernels if r.kernel and r.kernel.kind == "gemm"}
    wide = max(columns)
    for options in (Options(), Options(norms=min(columns) - 1), Options(norms=wide, closing=False)):
        plan = select(made, options)
        assert any(r.kernel and r.kernel.steps[0].row == "layer_norm" for r in plan.kernels if r.kind == "prologue")
        assert "a norm starts a kernel of its own, whose rows are spread over the whole chip" in reasons(plan).values()
    plan = select(made, Options(norms=wide))
    prologues = [r.kernel.steps[0].row for r in plan.kernels if r.kind == "prologue" and r.kernel]
    closing = [k for r in plan.kernels if (k := r.kernel) and any(s.row == "layer_norm" for s in k.closing)]
    assert len(closing) >= 2 and prologues.count("layer_norm") < 2
    for kernel in closing[:2]:
        assert {t.name for t in kernel.tensors if t.role == "output"} >= {"out", "codes", "scale"}
    check(plan, inputs_of(graph))


def test_float_activations_have_a_prologue_only_where_a_norm_stands() -> None:
    plan = planned("decoder", "quantize{weights=uint4:g32}")
    prologues = [r.kernel for r in plan.kernels if r.kind == "prologue"]
    assert [rows(k) for k in prologues if k is not None] == [["rms_norm"]] * 3
    assert all(r.kernel.activation.kind == "float" for r in plan.kernels if r.kernel and r.kernel.activation)
    b = Build()
    x = b.input("x", "f32[batch, 32]")
    graph = b.output(b("linear", b("mul", x, b.random(32)), b.random(16, 32)))
    made = quantised(graph, "quantize{weights=uint4:g16}", [])
    found = select(made)
    check(found, {"x": np.ones((3, 32), np.float32)})
    assert (found.count("prologue"), found.count("gemm")) == (0, 1)
    assert set(reasons(found).values()) == {
        "only elementwise work before a linear with float activations: nothing to quantise"
    }


def test_a_range_of_the_whole_tensor_stays_in_the_graph() -> None:
    plan = planned("decoder", "quantize{activations=uint8:tensor}")
    assert plan.count("prologue") == 0
    assert set(reasons(plan).values()) == {
        "its range is that of the whole tensor: no program sees all of it",
        "no kernel reads what it makes",  # the norms before
    }
    kernel = kernel_with(plan, "layers.0.q")
    assert [(t.name, t.role, t.shape) for t in kernel.tensors][:3] == [
        ("a", "input", ("M", 128)), ("a_scale", "input", ()), ("a_zero", "input", ()),
    ]  # fmt: skip
    assert kernel.products[0].weight.sums == "weight_sums"


def test_weights_of_onnx_files_are_read_through_their_transposes(tmp_path: Path) -> None:
    """QDQ as files have it: dequantize, transpose, matmul, and a bias that is added."""
    from planish.integrate.api import capture, to_onnx

    made = quantised(post_norm(), "w8a8-static", data(samples=2))
    to_onnx(made, tmp_path / "m.onnx")
    graph, direct = capture(tmp_path / "m.onnx"), select(made)
    assert any(n.op.name == "transpose" and n.operands[0].producer.op.name == "dequantize" for n in graph.nodes)  # type: ignore[union-attr]
    plan = select(graph)
    check(plan, data(9, samples=1)[0])
    assert (plan.count("prologue"), plan.count("gemm")) == (direct.count("prologue"), direct.count("gemm"))
    for one, two in zip(plan.kernels, direct.kernels, strict=True):
        held, expected = one.bind("f32"), two.bind("f32")
        assert one.kind == two.kind
        if one.kind == "gemm":
            for name in {"weight", "weight_scale", "weight_sums"} & {*expected}:
                assert torch.equal(held[name], expected[name])


def test_equal_layers_have_equal_kernels() -> None:
    graph = blocks.decoder(128, 2, tokens=16)
    plan = select(quantised(graph, "w8a8-token", blocks.batches(16, 2)))
    assert kernel_with(plan, "layers.0.down") == kernel_with(plan, "layers.1.down")
    assert kernel_with(plan, "layers.0.q") != kernel_with(plan, "layers.0.k")
    assert hash(kernel_with(plan, "layers.0.gate")) == hash(kernel_with(plan, "layers.1.gate"))


# -- what is not ---------------------------------------------------------------------------------------


def build(make: object, passes: str = TOKEN, batches: list[Batch] | None = None) -> Plan:
    """The plan of a small graph that reads x [2, 5, WIDTH]."""
    b = Build(3)
    x = b.input("x", f"f32[2, 5, {WIDTH}]")
    graph = b.output(*make(b, x))  # type: ignore[operator]
    plan = select(quantised(graph, passes, batches or data(samples=2)))
    check(plan, data(5, samples=1)[0])
    return plan


def test_a_value_that_others_read_is_stored_and_ends_the_epilogue() -> None:
    def make(b: Build, x: Value) -> list[Value]:
        y = linear(b, x, WIDTH, "one")
        return [b("gelu", y), b("reduce_mean", y, axes=(-1,), keepdims=True)]

    plan = build(make)
    assert rows(kernel_with(plan, "one")) == []
    assert "what it reads is also read by others, which do not fuse" in reasons(plan).values()


def test_readers_that_all_fuse_do() -> None:
    def make(b: Build, x: Value) -> list[Value]:
        y = linear(b, x, WIDTH, "one")
        return [b("mul", y, b("sigmoid", y))]

    assert rows(kernel_with(build(make), "one")) == ["sigmoid", "mul"]


def test_an_operand_that_depends_on_the_result_is_no_residual() -> None:
    """y + f(y) with f outside of the kernel: the sum would have to wait for itself."""

    def make(b: Build, x: Value) -> list[Value]:
        y = linear(b, x, WIDTH, "one")
        return [b("add", y, b("softmax", y, axis=-1))]

    plan = build(make)
    assert rows(kernel_with(plan, "one")) == []


def test_gates_of_other_widths_or_activations_are_two_kernels() -> None:
    def make(b: Build, x: Value) -> list[Value]:
        y = linear(b, x, HIDDEN, "gate")
        return [b("mul", b("silu", y), linear(b, b("tanh", x), HIDDEN, "up"))]

    plan = build(make)
    assert kernel_with(plan, "gate") != kernel_with(plan, "up")
    assert plan.count("gemm") == 2
    assert rows(kernel_with(plan, "up")) == ["mul"]  # the gate is an input


def test_broadcast_and_wide_constants_are_left() -> None:
    def make(b: Build, x: Value) -> list[Value]:
        y = linear(b, x, WIDTH, "one")
        share = b("reduce_mean", x, axes=(-1,), keepdims=True)
        z = linear(b, x, WIDTH, "two")
        return [b("mul", y, share), b("add", z, b.random(5, WIDTH))]

    plan = build(make)
    assert set(reasons(plan).values()) >= {
        "an operand is broadcast",
        "a constant operand is no scalar and no vector along the columns",
    }


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        ("quantize{weights=nvfp4}", "no decoder for a weight of f4e2m1"),
        ("quantize{weights=int3:channel}", "no decoder for a weight of i3"),
        ("quantize{weights=int4:g40}", "its weight has groups of 40 columns; kernels have multiples of 16"),
        ("quantize{weights=int4:g48 activations=int4:g32}",
         "groups of 32 columns of the activation and of 48 of the weight"),
        ("quantize{activations=int4:g48}",
         "activations in groups of 48 columns; kernels have powers of two from 16 on"),
        ("quantize{activations=mxfp8}", "activations of f8e4m3fn: no kernel"),
        ("quantize{activations=uint4:g16}", "activations with a zero point for each group: no kernel"),
    ],
)  # fmt: skip
def test_formats_without_a_kernel(passes: str, reason: str) -> None:
    plan = build(lambda b, x: [linear(b, x, WIDTH, "one")], passes)
    assert plan.count("gemm") == 0
    assert reason in reasons(plan).values()


def test_a_linear_that_is_not_quantised_says_so() -> None:
    plan = build(lambda b, x: [b("linear", norm(b, x, "n"), b.random(4, WIDTH))], "raise")
    assert plan.count("graph") == len(plan.regions) == 1
    assert list(reasons(plan).values()) == ["no kernel reads what it makes", "its weight is not quantised"]


# -- bindings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200])
def test_codes_go_in_and_come_back(bits: int, columns: int) -> None:
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (3, columns))
    packed = pack_codes(codes, bits, 0)
    assert packed.shape == (3, -(-columns // 64) * 64 * bits // 8)
    assert packed.dtype == torch.int8
    assert torch.equal(unpack_codes(packed, bits, columns), codes.to(torch.int16))
    shifted = Bound("codes", bits=bits, shift=-low)
    held = (codes - low).to(torch.uint8).reshape(3, 1, columns)
    entered = shifted.enter(held, torch.float16)
    assert torch.equal(entered, packed)
    assert torch.equal(shifted.leave(entered, (3, 1, columns), torch.uint8), held)


def test_scales_of_groups_have_an_axis_for_them_even_if_there_is_one() -> None:
    plan = planned("post", "quantize{weights=int4:g16 activations=int4:g16}")  # 8 and 12 columns
    for region in plan.kernels:
        assert region.kernel is not None
        for tensor in region.kernel.tensors:
            if tensor.name in ("scale", "a_scale"):
                assert tensor.shape == ("M", 1)
                assert region.bound[tensor.name].enter(torch.ones(2, 3, 1), torch.float32).shape == (6, 1)
    token = planned("post", TOKEN).kernels[0]
    assert token.kernel is not None
    assert token.kernel.tensor("scale").shape == ("M",)
    assert token.bound["scale"].enter(torch.ones(2, 3, 1), torch.float32).shape == (6,)


def test_four_bit_codes_lie_in_planes_by_halves_of_a_span() -> None:
    codes = torch.arange(64).remainder(16).reshape(1, 64) - 8
    packed = pack_codes(codes, 4, 0).view(torch.uint8)[0]
    for byte in (0, 5, 31):
        assert packed[byte] & 15 == codes[0, byte] & 15
        assert packed[byte] >> 4 == codes[0, byte + 32] & 15


@pytest.mark.parametrize("passes", ["w8a8-static", "w4a4", "llm-int8", "qllm", "w2a16", "w8a8-static-hadamard", "w4a8"])
def test_constants_are_bound_in_the_shapes_of_the_spec(passes: str) -> None:
    plan = planned("decoder", passes)
    sizes = {"f32": torch.float32, "i8": torch.int8, "i32": torch.int32, "u8": torch.uint8, "float": torch.bfloat16}
    sizes |= {"f16": torch.float16}
    for region in plan.kernels:
        assert region.kernel is not None
        held = region.bind("bf16")
        expected = {t.name: t for t in region.kernel.tensors if t.role == "weight"}
        assert set(held) == set(expected)
        for name, tensor in held.items():
            assert (tuple(tensor.shape), tensor.dtype) == (expected[name].shape, sizes[expected[name].dtype]), name


def test_zero_points_sums_and_gains_are_folded() -> None:
    """A static u8 activation: zero - 128 and the sums of the weight; a norm's gain counts from its offset."""
    b = Build(1)
    x = b.input("x", f"f32[batch, {WIDTH}]")
    gain = b.random(WIDTH, name="gain")
    y = b("linear", b("rms_norm", x, gain, eps=1e-6, gain_offset=1.0), b.random(4, WIDTH, name="one.weight"))
    batch = {"x": np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)}
    plan = select(quantised(b.output(y), "quantize{activations=uint8:tensor:static}", [batch]))
    check(plan, batch)
    prologue, gemm = (r.bind("f32") for r in plan.kernels)
    assert gain.constant is not None
    np.testing.assert_array_equal(prologue["gain"], gain.constant.array() + np.float32(1.0))
    zero = next(v.constant for v in plan.graph.constants if v.name.endswith(".zero") and v.rank == 0)
    assert zero is not None
    assert gemm["a_zero"].item() == prologue["zero"].item() == int(zero.array()) - 128
    decoded = gemm["weight"][:, :WIDTH].double() * gemm["weight_scale"].double()[:, None]
    np.testing.assert_allclose(gemm["weight_sums"].double(), decoded.sum(1), rtol=1e-6, atol=1e-6)


# -- the tests have teeth ------------------------------------------------------------------------------


def waiting(b: Build, x: Value) -> list[Value]:
    """tanh y + softmax(relu y): behind the kernel of y the sum would have to wait for what reads that kernel."""
    y = linear(b, x, WIDTH, "one")
    return [b("add", b("tanh", y), b("softmax", b("relu", y), axis=-1))]


def test_a_cycle_of_regions_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build(waiting)
    assert rows(kernel_with(plan, "one")) == ["tanh", "relu"]
    assert list(reasons(plan).values()) == ["its other operand depends on the kernel's result through other regions"]
    monkeypatch.setattr(Partition, "can_join", lambda self, nodes: True)
    with pytest.raises((AssertionError, PlanishError)):
        build(waiting)


def test_wrong_plans_would_be_seen() -> None:
    plan, inputs = planned("pre", TOKEN), data(9, samples=1)[0]
    check(plan, inputs)
    turned = [*plan.regions[1:], plan.regions[0]]
    lost = [r for r in plan.regions if r is not plan.kernels[3]]
    short = [replace(r, nodes=r.nodes[:-1]) if r is plan.kernels[-1] else r for r in plan.regions]
    silent = [replace(r, outputs=r.outputs[1:]) if r is plan.kernels[0] else r for r in plan.regions]
    for regions in (turned, lost, short, silent):
        with pytest.raises((AssertionError, PlanishError)):
            check(replace(plan, regions=tuple(regions)), inputs)
    kernel = plan.kernels[-1].kernel
    assert kernel is not None
    unbound = replace(plan.kernels[-1], bound={})
    unmade = replace(plan.kernels[-1], kernel=replace(kernel, products=()))
    for region in (unbound, unmade):
        with pytest.raises(AssertionError):
            check_spec(region)


def test_a_weight_that_is_computed_from_constants_says_why_it_has_no_kernel() -> None:
    b = Build()
    lowered = b.output(b("linear", b.input("x", "f32[batch, 8]"), b.random(16, 8)))
    plan = select(quantised(lowered, "quantize{activations=int8:token},lower", []))
    assert [miss.reason for miss in plan.misses] == ["its weight is decoded before a squeeze"]
    b = Build()
    turned = b("transpose", b.random(8, 16), perm=(1, 0))
    plan = select(b.output(b("linear", b.input("x", "f32[batch, 8]"), turned)))
    assert [miss.reason for miss in plan.misses] == ["its weight is not quantised"]
    b = Build()
    x = b.input("x", "f32[batch, 8]")
    assert select(b.output(b("matmul", x, b("transpose", x, perm=(1, 0))))).misses == ()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_rows(bits: int) -> None:
    codes = torch.zeros(0, 70, dtype=torch.int8)
    packed = pack_codes(codes, bits, 0)
    assert packed.shape == (0, 128 * bits // 8)
    assert unpack_codes(packed, bits, 70).shape == (0, 70)


def test_a_batch_of_none_is_quantised_by_groups() -> None:
    b = Build()
    graph = b.output(b("linear", b.input("x", "f32[batch, 32]"), b.random(16, 32)))
    made = quantised(graph, "quantize{weights=int4:g16 activations=int4:g16}", [])
    plan, none = select(made), {"x": torch.zeros(0, 32)}
    assert len(plan.kernels) == 2
    check(plan, none)
    (out,) = plan.evaluate(none).values()
    assert out.shape == (0, 16)


def test_an_operand_for_each_row_stays_in_torch() -> None:
    """1.5 - linear(x) * c with c [2, 3, 1]: no vector of the kernel's columns, and no residual either."""
    b = Build()
    made = b("linear", b.input("x", "f32[2, 3, 32]"), b.random(16, 32))
    graph = b.output(b("sub", 1.5, b("mul", made, b.random(2, 3, 1))))
    plan = select(quantised(graph, "quantize{weights=int8:channel activations=int8:token}", []))
    held = {"x": torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))}
    check(plan, held)
    assert "mul" in {n.op.name for r in plan.regions if r.kernel is None for n in r.nodes}
    for region in plan.kernels:
        assert region.kernel is not None and emit_kernel(region.kernel, "f32").text
