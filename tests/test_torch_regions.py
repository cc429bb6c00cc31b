"""Emitted torch modules with kernels compute what their graphs do, for any sizes, in any form that torch makes of them.

What may differ is derived, not fitted: see `BOUND`, and `compared` for codes that lie on a border between two.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import kernel_models
import numpy as np
import pytest
import torch
from kernel_models import RECIPES, encoder_inputs, plan_of, quantised
from patterns import Build

from planish.capture.from_fx import from_module
from planish.codegen import torch_regions
from planish.codegen.cpp_attention import AttentionForm
from planish.codegen.cpp_attention import kernel as attention_kernel
from planish.codegen.regions import Plan
from planish.codegen.select import Options, select
from planish.codegen.torch_regions import emit, float_of, options_for
from planish.codegen.torch_regions_merge import siblings
from planish.codegen.torch_regions_ops import operator_of
from planish.ir.errors import PlanishError
from planish.ir.evaluator import bind_inputs, evaluate, evaluate_nodes
from planish.ir.graph import Graph
from planish.ir.ops.base import Wide
from planish.ir.types import is_float, torch_dtype
from planish.passes.manager import Pipeline

# Between codes that are the same and the next ones at most four sums of up to 512 products follow each other, each in
# another order than the evaluator's: sqrt(512) u S, S the sum of magnitudes, at most 25 times the largest result of a
# row here; u = 2^-24.
UNIT = 2.0**-24
BOUND = 4 * 512**0.5 * 25 * UNIT
# between two kernels a value is rounded to 16 bits; five of them follow each other until the end of a block
BOUND_16 = {"f16": 5 * 4 * 2.0**-11, "bf16": 5 * 4 * 2.0**-8}

MORE = {
    "w8a8-static": "raise,quantize{activations=uint8:tensor:static}",
    "w8a16": "raise,quantize{weights=int8:channel}",
}


@cache
def plan(recipe: str) -> Plan:
    """A small encoder layer by a recipe."""
    graph = kernel_models.encoder(width=128, heads=4, hidden=256)
    batches = [encoder_inputs(i, width=128) for i in range(2)]
    if recipe in MORE:
        from planish.calibrate.collect import collect
        from planish.passes.manager import Pipeline

        passes = Pipeline(MORE[recipe])
        stats = collect(graph, batches) if any(p.needs_stats for p in passes.passes) else None
        return select(passes.run(graph, stats=stats, validate=False)[0])
    return select(quantised(graph, recipe, batches, 64))


def graph_rows(seed: int, rows: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 64)).astype(np.float32)


def inputs(batch: int, tokens: int, seed: int = 5) -> dict[str, Any]:
    return {k: torch.from_numpy(v) for k, v in encoder_inputs(seed, batch, tokens, 128).items()}


class Recorder(torch.fx.Interpreter):
    """Runs a module and keeps what its nodes gave, by their names."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        self.found[n.name] = super().run_node(n)
        return self.found[n.name]


def compared(made: Plan, module: torch.fx.GraphModule, given: dict[str, Any], bound: float) -> tuple[int, int]:
    """Compare what each kernel of a module gave with the evaluator, which takes the kernels' codes over.

    A value that lies on a border between two codes may be rounded to either; what follows then differs by a step of
    its scale. So codes are compared where they are made, from the same codes before them.

    Returns:
        Codes, and how many of them differ (by one).

    Raises:
        AssertionError: a float differs by more than `bound`, relative to the largest of its row; a code by more than 1.
    """
    recorder = Recorder(module)
    with torch.no_grad():
        recorder.run(*given.values())
    wide = Wide(torch.float32)
    environment = bind_inputs(made.graph, given, wide)
    count = differing = kernels = 0
    for region in made.regions:
        before = {v: environment[v] for v in region.inputs if v in environment}
        environment |= evaluate_nodes(region.nodes, before, region.outputs, wide)
        if region.kernel is None or region.name not in recorder.found:
            continue
        kernels += 1
        results = recorder.found[region.name]
        names = [t.name for t in region.kernel.tensors if t.role == "output"]
        for name, held in zip(names, results if isinstance(results, tuple) else (results,), strict=True):
            value = region.bound[name].value
            assert value is not None
            if value not in environment:
                continue
            expected = environment[value]
            left = region.bound[name].leave(held, tuple(expected.shape), expected.dtype)
            if is_float(value.dtype):
                error, size = (left - expected).abs().double(), expected.abs().double().amax(-1, keepdim=True)
                assert bool((error <= bound * size + 1e-30).all()), (value.name, float((error / size).max()))
            else:
                far = (left.int() - expected.int()).abs()
                assert int(far.max()) <= 1, value.name
                count, differing = count + far.numel(), differing + int(far.sum())
                environment[value] = left
    assert kernels == len(made.kernels)
    return count, differing


def kernel_calls(module: torch.fx.GraphModule, space: str = "planish_cpu") -> list[str]:
    """The ops of the kernels of regions that a module calls."""
    names = [str(n.target) for n in module.graph.nodes if str(n.target).startswith(f"{space}.")]
    return [name for name in names if not name.startswith("planish_cpu.attention")]


def attentions(module: torch.fx.GraphModule) -> list[Any]:
    return [n.target for n in module.graph.nodes if str(n.target).startswith("planish_cpu.attention")]


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [*RECIPES, *MORE])
def test_modules_equal_their_graphs(recipe: str) -> None:
    """One module for every batch and length."""
    made = plan(recipe)
    module = emit(made, half=False)
    branches = recipe in ("w4a4-rank32", "llm-int8")  # else q, k and v are one
    assert len(kernel_calls(module)) == len(made.kernels) - (0 if branches else 2)
    for batch, tokens in ((1, 1), (2, 7), (1, 128)):
        given = inputs(batch, tokens)
        count, differing = compared(made, module, given, BOUND)
        assert differing <= count // 500 + 1
        expected = evaluate(made.graph, given)
        (name,) = expected
        got = module(**given)
        assert got.shape == expected[name].shape and got.dtype == torch.float32
        error = float((got - expected[name]).abs().max() / expected[name].abs().max())
        assert differing or error <= BOUND


@pytest.mark.parametrize("recipe", [*RECIPES, *MORE])
def test_gemms_that_end_with_a_norm(recipe: str) -> None:
    """What the backend selects for the CPU: a norm and what is behind it finish the rows of a gemm."""
    made = select(plan(recipe).graph, options_for("cpu"))
    assert len(made.kernels) == len(plan(recipe).kernels) - 1  # the norm before the MLP; the first reads the input
    assert options_for("cuda") == Options()
    module = emit(made, half=False)
    for batch, tokens in ((1, 1), (2, 7), (1, 128)):
        count, differing = compared(made, module, inputs(batch, tokens), BOUND)
        assert differing <= count // 500 + 1


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "w4a4-rank32"])
def test_a_decoder_equals_its_graph(recipe: str) -> None:
    """Tokens in, logits out; rotary positions, grouped heads, gate and up in one kernel."""
    made = plan_of("decoder", recipe)
    given = {k: torch.from_numpy(v) for k, v in kernel_models.decoder_inputs(5, 2).items()}
    count, differing = compared(
        made, emit(made, half=False), given, 2 * BOUND
    )  # sums of up to 704 products, and of 2 floats
    assert differing <= count // 500 + 1


@pytest.mark.parametrize(("recipe", "half"), [("w8a8", None), ("w4a16", None), ("w4a16", True)])
def test_attention(recipe: str, half: bool | None) -> None:
    """A kernel of its own; in bf16 where activations are quantised anyway, or where it is asked for."""
    made = plan(recipe)
    module = emit(made, half=half)
    (op,) = {*attentions(module)}
    rounds = half if half is not None else recipe == "w8a8"
    assert (op != attentions(emit(made, half=False))[0]) == rounds
    given = inputs(2, 7)
    recorder = Recorder(module)
    recorder.run(*given.values())
    name = next(n.op.name for n in made.graph.nodes if n.op.name == "attention")
    node = next(n for n in made.graph.nodes if n.op.name == name)
    q, k, v = (recorder.found[operand.name] for operand in node.operands if operand is not None)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    # q, k and v and the weights of v are rounded to 2^-9: the first two move a score by at most 2^-8 |q| |k| scale,
    # and the weights by a factor of exp of twice that; then two more roundings of v's size
    scores = 2.0**-8 * float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * q.shape[-1] ** -0.5 if rounds else 0.0
    bound = (2 * scores + 2 * 2.0**-9 if rounds else 0.0) + 64 * UNIT
    assert float((recorder.found[node.result.name] - expected).abs().max()) <= bound * float(v.abs().max())


def test_rows_that_are_masked_throughout() -> None:
    """The least float as a mask weighs all keys of such a row alike: none of them is left out."""
    made = attention_kernel(AttentionForm("f32", 16, 16, 0.25, "f32"))
    q, k, v, mask = (torch.randn(1, 2, 5, n, generator=torch.Generator().manual_seed(n)) for n in (16, 17, 18, 5))
    k, v = k[..., :16].contiguous(), v[..., :16].contiguous()
    mask[:, :, 2] = torch.finfo(torch.float32).min
    mask[:, :, :, 4] = torch.finfo(torch.float32).min
    assert float((made.op(q, k, v, mask) - made.reference(q, k, v, mask)).abs().max()) <= 64 * UNIT * float(
        v.abs().max()
    )


def test_attention_reads_a_mask_without_its_repetitions() -> None:
    b = Build()
    q, k, v = (b.input(name, "f32[2, 2, 5, 16]") for name in "qkv")
    keys = b("unsqueeze", b.input("keys", "bool[2, 5]"), axes=(1, 2))
    every = b.constant(np.ones((1, 1, 5, 5), dtype=bool))
    graph = b.output(b("attention", q, k, v, b("logical_and", every, keys), scale=0.25))
    module = emit(select(graph), half=False)
    assert not [n for n in module.graph.nodes if n.name.startswith("logical_and")]
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(2, 2, 5, 16, generator=generator) for name in "qkv"}
    given["keys"] = torch.tensor([[True] * 5, [True, True, False, False, True]])
    (expected,) = evaluate(graph, given).values()
    found = module(*given.values())
    assert float((found - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_narrow_floats(dtype: str) -> None:
    """In 16 bits kernels still compute in float32: what differs is the rounding between them."""
    torch_dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for recipe in ("w8a8", "w4a16"):
        made = plan(recipe)
        module = emit(made, dtype=torch_dtype)
        assert all(f"_{dtype}_" in name for name in kernel_calls(module))
        given = inputs(2, 7)
        expected = next(iter(evaluate(made.graph, given).values()))
        got = module(given["x"].to(torch_dtype))
        assert got.dtype == torch_dtype
        # 5 roundings of a block, and codes that flip by one where they are made of rounded values: a step of 1 / 127
        most = BOUND_16[dtype] + (1 / 127 if recipe == "w8a8" else 0.0)
        assert float((got.float() - expected).abs().max() / expected.abs().max()) <= most


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_kernels_of_a_narrow_model(dtype: str) -> None:
    """What a model casts to float32 around its linears enters and leaves kernels as it is held between them."""
    made = torch_dtype(dtype)
    model = (
        torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)).eval().to(made)
    )
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(made)
    graph, _ = Pipeline("raise,quantize{weights=int4:g32}").run(from_module(model, (x,)))
    module = emit(select(graph))
    assert all(f"_{dtype}_" in name for name in kernel_calls(module))
    (expected,) = evaluate(graph, {graph.inputs[0].name: x}, dtype=torch.float64).values()
    got = module(x).detach()
    assert got.dtype == made
    assert float((got.double() - expected).abs().max() / expected.abs().max()) < 4 * torch.finfo(made).eps


def test_float64_has_no_kernels() -> None:
    made = plan("w8a8")
    module = emit(made, dtype="float64")
    given = {k: v.double() for k, v in inputs(2, 7).items()}
    assert kernel_calls(module) == []
    expected = next(iter(evaluate(made.graph, given, torch.float64).values()))
    assert float((module(**given) - expected).abs().max() / expected.abs().max()) <= 1e-12


def test_no_rows() -> None:
    assert emit(plan("w8a8"))(**inputs(0, 7)).shape == (0, 7, 128)


# -- form ----------------------------------------------------------------------------------------


def test_nothing_lies_between_two_kernels() -> None:
    """Codes, scales and rows go on as they lie: one reshape into the first kernel, and those of attention."""
    module = emit(plan("w8a8"))
    calls = [n.target.__name__ if callable(n.target) else str(n.target) for n in module.graph.nodes]
    assert "pack_codes" not in calls and "unpack_codes" not in calls and "full.default" not in calls
    nodes = {n.name: n for n in module.graph.nodes}
    for reader, maker in (("gemm_1_merged", "prologue_0"), ("gemm_6", "prologue_5"), ("gemm_9", "gemm_8")):
        assert nodes[reader].args[0].args[0] is nodes[maker]  # the first of its results
    assert nodes["prologue_7"].args[0] is nodes["gemm_6"]  # rows
    weights = [n for n, _ in module.named_buffers() if n.startswith(("gemm_", "prologue_"))]
    assert weights and not {*weights} & {*module.state_dict()}


def test_one_gemm_for_queries_keys_and_values() -> None:
    """The codes are made once, and multiplied once."""
    module = emit(plan("w8a8"))
    nodes = {n.name: n for n in module.graph.nodes}
    (cut,) = {nodes[name].args[0] for name in ("gemm_1", "gemm_2", "gemm_3")}
    assert cut.args == (nodes["gemm_1_merged"], [128, 128, 128], 1)
    assert nodes["gemm_1_merged"].args[0].args[0] is nodes["prologue_0"]
    assert module.gemm_1.bias.shape == (384,)


def widths() -> Graph:
    """Linears of one value: of several widths, without a bias, and one whose result goes through a gelu."""
    b = Build()
    x = b.input("x", "f32[rows, 64]")
    parts = [b.constant(b.rng.normal(size=(n, 64)) / 8, name=f"w{n}") for n in (64, 16, 48, 32)]
    biases = [b.constant(b.rng.normal(size=n), name=f"b{n}") for n in (64, 16)]
    made = [b("linear", x, parts[0], biases[0]), b("linear", x, parts[1], biases[1])]
    made += [b("linear", x, parts[2]), b("gelu", b("linear", x, parts[3]))]
    normed = b("layer_norm", made[0], b.constant(b.rng.normal(size=64), name="gain"))
    after = b("linear", normed, b.constant(b.rng.normal(size=(8, 64)) / 8, name="next"))
    return b.output(*made, after)


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16", "split-int2"])
def test_merged_gemms(recipe: str) -> None:
    """Siblings of other widths are merged; those with another bias, or with an epilogue, are not."""
    graph = widths()
    made = select(quantised(graph, recipe, [{"x": graph_rows(i)} for i in range(2)], 32))
    assert [len(group) for group in siblings(made)] == [2]
    module = emit(made)
    given = {"x": torch.from_numpy(graph_rows(9))}
    count, differing = compared(made, module, given, BOUND)
    assert differing <= count // 100 + 1


def test_a_value_leaves_once_it_is_read() -> None:
    """Codes that the caller asks for are put into the graph's form; those that nobody asks for are not."""
    graph = plan("w8a8").graph.clone()
    codes = next(v for v in graph.values.values() if v.name == "layer_norm.codes")
    zero = next(v for v in graph.values.values() if v.name == "layer_norm.zero")
    graph.add_output("codes", codes)
    graph.add_output("zero", zero)
    made = select(graph)
    given = inputs(2, 7)
    found, expected = emit(made)(**given), evaluate(graph, given)
    assert {*found} == {*expected}
    for name in ("codes", "zero"):
        assert found[name].dtype == expected[name].dtype == torch.uint8
        assert found[name].shape == expected[name].shape
        assert int((found[name].int() - expected[name].int()).abs().max()) <= 1


def unknown_sizes() -> Graph:
    b = Build()
    x = b.input("x", "f32[?, ?, 64]")
    h = b("linear", x, b.constant(b.rng.normal(size=(64, 64)), name="w"))
    return b.output(b("linear", b("relu", h), b.constant(b.rng.normal(size=(64, 64)), name="v")))


def test_sizes_that_nobody_knows_are_left_to_torch() -> None:
    made = select(quantised(unknown_sizes(), "w8a8", [], 64))
    module = emit(made)
    given = {"x": torch.randn(2, 3, 64)}
    assert len(kernel_calls(module)) < len(made.kernels)
    expected = next(iter(evaluate(made.graph, given).values()))
    assert float((module(**given) - expected).abs().max()) <= BOUND * float(expected.abs().max()) + 0.02


def test_a_float_of_its_own() -> None:
    region = plan("w8a8").kernels[0]
    assert float_of(region) == "f32"
    assert float_of(region, torch.bfloat16) == "bf16"
    assert float_of(region, torch.float64) is None


def test_an_unknown_dtype() -> None:
    with pytest.raises(PlanishError, match="dtype: expected a float dtype of torch, got 'int8'"):
        emit(plan("w8a8"), dtype="int8")


# -- torch's own forms ---------------------------------------------------------------------------


def test_export_with_open_sizes() -> None:
    module = emit(plan("w8a8"))
    auto = torch.export.Dim.AUTO
    program = torch.export.export(module, (inputs(2, 7)["x"],), dynamic_shapes=({0: auto, 1: auto},), strict=False)
    assert len(kernel_calls(program.graph_module)) == len(plan("w8a8").kernels) - 2
    for batch, tokens in ((2, 7), (5, 128)):
        given = inputs(batch, tokens)
        assert torch.equal(program.module()(given["x"]), module(**given))


def test_compiled_without_inductor() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = emit(plan("w4a16"))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, tokens in ((2, 7), (3, 16), (4, 128)):
        given = inputs(batch, tokens)
        assert torch.allclose(compiled(**given), module(**given), rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "llm-int8"])
def test_compiled_by_inductor(recipe: str) -> None:
    torch._dynamo.reset()
    module = emit(plan(recipe))
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for batch, tokens in ((2, 7), (3, 16), (4, 128)):
        given = inputs(batch, tokens)
        got, expected = compiled(**given), module(**given)
        # ATen ops in between are compiled to other orders of sums; a code may flip by one step of 1 / 127
        assert float((got - expected).abs().max() / expected.abs().max()) <= BOUND + 1 / 127


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4-rank32"])
def test_ops_are_clean(recipe: str) -> None:
    """`torch.library.opcheck`: schema, fake implementation, dispatch."""
    module = emit(plan(recipe))
    calls: dict[Any, Any] = {}

    class Calls(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if str(target).startswith("planish_cpu."):
                calls[target] = args
            return super().call_function(target, args, kwargs)

    Calls(module).run(*inputs(2, 7).values())
    assert calls
    for target, args in calls.items():
        torch.library.opcheck(target, args, test_utils=("test_schema", "test_faketensor"))


def test_copies() -> None:
    module, given = emit(plan("w8a8")), inputs(2, 7)
    copied = copy.deepcopy(module)
    assert torch.equal(copied(**given), module(**given))
    copied.gemm_6.weight.zero_()
    assert not torch.equal(copied(**given), module(**given))


# -- other devices -------------------------------------------------------------------------------


def test_other_devices_get_triton() -> None:
    """On the meta device the ops are those of CUDA: their fake implementations give the shapes."""
    made = plan("w8a8")
    module = emit(made, device="meta")
    assert kernel_calls(module) == []
    assert len(kernel_calls(module, "planish")) == len(made.kernels) - 2
    assert all(held.device.type == "meta" for held in module.buffers())
    got = module(torch.empty(3, 5, 128, device="meta"))
    assert got.shape == (3, 5, 128) and got.device.type == "meta"


@pytest.mark.parametrize("rows", [3, 17])
def test_triton_ops_in_the_interpreter(rows: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The module of another device, run in Triton's interpreter: a gemm with closing steps is two launches there."""
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path))
    made = plan("w8a8")
    monkeypatch.setattr(torch_regions, "operator_of", lambda k, d, _: operator_of(k, d, torch.device("cuda")))
    module = emit(made, half=False)
    assert len(kernel_calls(module, "planish")) == len(made.kernels) - 2
    assert sum(name.endswith("_by_rows.default") for name in kernel_calls(module, "planish")) == 1
    count, differing = compared(made, module, inputs(1, rows), BOUND)
    assert differing <= count // 500 + 1
