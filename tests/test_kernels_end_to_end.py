"""Emitted kernels run: each by the oracle over a grid, whole plans against the graph, wrong kernels found.

In Triton's interpreter where there is no GPU (tests/conftest.py). What it gets wrong is avoided so: bf16 is converted
to float32 right after it is loaded, and no bf16 operand reaches a dot (the bf16 cases here are prologues without a
low-rank down; their results may be cut off where a GPU rounds: `kernel_oracle.ROUND`); what becomes int8 is clamped
first; tiles are few and big, since each takes milliseconds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kernel_models
import kernel_oracle
import pytest
import torch
from kernel_models import RECIPES, plan_of

from planish.codegen import triton as emission
from planish.codegen.kernel_spec import Kernel
from planish.codegen.regions import Plan
from planish.codegen.select import select
from planish.codegen.triton_file import Emitted
from planish.codegen.triton_run import Runner
from planish.ir.evaluator import bind_inputs, evaluate_nodes
from planish.ir.ops.base import Wide
from planish.ir.types import is_float

DEVICE = "cpu"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of this file's own."""
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path_factory.getbasetemp() / "kernels-end-to-end"))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is wrong for certain."""

    def new_empty(like: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        made = like.new_zeros(*args, **options)
        return made.fill_(float("nan") if made.is_floating_point() else 101)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def named(kernel: Kernel, made: Any) -> dict[str, torch.Tensor]:
    """A launcher's results by name."""
    names = [t.name for t in kernel.tensors if t.role == "output"]
    return dict(zip(names, made if isinstance(made, tuple) else (made,), strict=True))


def judge(module: Any, kernel: Kernel, dtype: str, given: dict[str, torch.Tensor], launch: Any = None) -> list[str]:
    """What is wrong with a kernel's results, and with its reference's, on these tensors."""
    for product in kernel.products:
        if product.weight.sums:  # drawn at random by `example`: the oracle knows what they are sums of
            decoded = kernel_oracle.decoded(product, given, kernel.columns)
            given = given | {product.weight.sums: decoded.sum(1).to(given[product.weight.sums].dtype)}
    expected = kernel_oracle.judged(kernel, given, dtype)
    found = kernel_oracle.problems(kernel, expected, named(kernel, module.run(**given, launch=launch)), dtype)
    reference = kernel_oracle.problems(kernel, expected, named(kernel, module.reference(**given)), dtype)
    return [f"kernel: {line}" for line in found] + [f"reference: {line}" for line in reference]


def kernels_of(*recipes: str, models: tuple[str, ...] = ("decoder", "encoder")) -> list[Kernel]:
    """The distinct kernels of models and recipes."""
    return list({k: None for m in models for r in recipes for k in (x.kernel for x in plan_of(m, r).kernels) if k})


# -- one kernel ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_kernels_are_right(recipe: str) -> None:
    """Every kernel of the decoder block, 7 rows: normal, zero, huge, negative."""
    for kernel in kernels_of(recipe, models=("decoder",)):
        module = emission.load(emission.emit_kernel(kernel, "f16"))
        assert judge(module, kernel, "f16", module.example(7, 1, DEVICE)) == [], module.__name__


def test_rows_of_bf16() -> None:
    for kernel in kernels_of("w8a8", models=("encoder",)):
        if kernel.kind == "prologue":
            module = emission.load(emission.emit_kernel(kernel, "bf16"))
            assert judge(module, kernel, "bf16", module.example(7, 1, DEVICE)) == [], module.__name__


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_kernels_are_right_for_any_rows(recipe: str, dtype: str) -> None:
    for kernel in kernels_of(recipe):
        module = emission.load(emission.emit_kernel(kernel, dtype))
        for rows in (1, 7, 16, 33, 128):
            assert judge(module, kernel, dtype, module.example(rows, rows, DEVICE)) == [], (module.__name__, rows)


# -- whole plans ---------------------------------------------------------------------------------


def compared(plan: Plan, inputs: dict[str, Any], dtype: str, bound: float) -> tuple[int, int, float]:
    """Run a plan through its kernels and beside it in the evaluator (float32), which takes the kernels' codes over.

    A value that lies on a border between two codes may be rounded to either; one such code changes what follows by a
    step of its scale times a weight. So codes are compared where they are made, from the same codes before them, and
    the evaluator goes on with those of the kernels: whatever is float then differs by float rounding only.

    Returns:
        Codes, those that differ (by one), and the relative error of the outputs to the graph left to itself.

    Raises:
        AssertionError: a float differs by more than `bound`, relative to the largest of its row; a code by more than 1.
    """
    wide = Wide(torch.float32)
    made = [v for r in plan.kernels for v in r.outputs]
    runner = Runner(plan, dtype, DEVICE)
    found = runner.run(inputs, keep=[v.name for v in made])
    closing = sum(bool(r.kernel.closing) for r in plan.kernels if r.kernel is not None)
    assert runner.launched - len(plan.kernels) in (0, closing)  # twice the launches on many rows: gemm_parts
    environment = bind_inputs(plan.graph, inputs, wide)
    count = differing = 0
    for region in plan.regions:
        given = {v: environment[v] for v in region.inputs if v in environment}
        environment |= evaluate_nodes(region.nodes, given, region.outputs, wide)
        for value in region.outputs if region.kernel is not None else ():
            held, expected = found[value.name], environment[value]
            assert held.shape == expected.shape and held.dtype == expected.dtype, value.name
            if is_float(value.dtype):
                error = (held - expected).abs().double()
                size = expected.abs().double().amax(-1, keepdim=True)
                assert bool((error <= bound * size + 1e-30).all()), (value.name, (error / size).max())
            else:
                far = (held.int() - expected.int()).abs()
                assert int(far.max()) <= 1, value.name
                count, differing = count + far.numel(), differing + int(far.sum())
                environment[value] = held
    error = 0.0
    for name, expected in plan.evaluate(inputs, torch.float32).items():
        error = max(error, float((found[name] - expected).abs().max() / expected.abs().max()))
    return count, differing, error


# From codes that are the same to the next ones, at most four sums of up to 1600 products follow each other (a product,
# two of an attention, a norm), each in another order than the evaluator's: an error of sqrt(1600) u S, S the sum of
# magnitudes, at most 25 times the largest result of a row here; u = 2^-24.
BOUND = 4 * 1600**0.5 * 25 * 2.0**-24
# between two kernels a value is rounded to float16 (2^-11); five of them follow each other until the end of a block
BOUND_F16 = 5 * 2.0**-11 * 4


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "w4a4-rank32", "llm-int8"])
def test_a_decoder_block_equals_its_graph(recipe: str) -> None:
    count, differing, error = compared(plan_of("decoder", recipe), kernel_models.decoder_inputs(5), "f32", BOUND)
    assert differing <= count // 1000
    assert differing or error <= BOUND


def test_an_encoder_layer_equals_its_graph() -> None:
    """Width 384, 12 heads, an MLP of 1536: every kernel of it, W8A8."""
    count, differing, error = compared(plan_of("encoder", "w8a8"), kernel_models.encoder_inputs(5, 1, 8), "f32", BOUND)
    assert count == 3 * 8 * 384 + 8 * 1536 + 4 * 8  # codes, and the zero points of four rows of scales
    assert differing <= count // 1000
    assert differing or error <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("model", ["encoder", "decoder"])
def test_models_equal_their_graphs(model: str, recipe: str, dtype: str) -> None:
    inputs = kernel_models.encoder_inputs(5) if model == "encoder" else kernel_models.decoder_inputs(5, 2)
    bound = BOUND if dtype == "f32" else BOUND_F16
    count, differing, error = compared(plan_of(model, recipe), inputs, dtype, bound)
    assert differing <= count // (1000 if dtype == "f32" else 20)
    assert differing or error <= bound


@pytest.mark.slow
def test_the_real_encoder_equals_its_graph() -> None:
    """MiniLM, six layers, W8A8: 54 kernels."""
    plan = select(kernel_models.quantised(kernel_models.real_encoder(), "w8a8", [], 128))
    count, differing, error = compared(plan, kernel_models.real_inputs(0), "f32", BOUND)
    assert len(plan.kernels) == 54 and count > 54 * 24 * 384 // 4
    assert differing <= count // 1000
    assert error <= 0.02  # a step of 1/127 here and there, in six layers


# -- wrong kernels -------------------------------------------------------------------------------

# what is wrong: (recipe, model, part of the kernel's name, what to look for, what stands there instead)
WRONG = {
    "planes swapped": ("w4a16", "decoder", "_add_704x256_", r"(weight_0, weight_zero, 4), 0", r"\1, 1"),
    "planes of an activation": (
        "w4a4-rank32",
        "decoder",
        "_add_704x256_",
        r"signed_plane\(a_0, 4, 0\)",
        "signed_plane(a_0, 4, 1)",
    ),
    "no weight scale": ("w4a8", "decoder", "_add_704x256_", r" \* weight_scale\[:, None\]", ""),
    "no activation scale": (
        "w8a8",
        "decoder",
        "_add_704x256_",
        r" \* tl.load\(a_scale_ptr \+ first \+ m\)\[None, :\]",
        "",
    ),
    "no zero point": ("w4a8", "decoder", "_add_704x256_", r"(weight_zero = tl.load\(.*)", r"\1 * 0"),
    "the next group": (
        "w4a8",
        "decoder",
        "_add_704x256_",
        r"group = step \* BLOCK_K // 32",
        "group = step * BLOCK_K // 32 + 1",
    ),
    "groups twice as wide": (
        "w4a16",
        "encoder",
        "_add_384x384_",
        r"group = step \* BLOCK_K // 128",
        "group = step * BLOCK_K // 256",
    ),
    "no bias": ("w8a8", "encoder", "_add_384x384_", r"acc \+ tl.load\(bias_ptr.*", "acc"),
    "no residual": ("w8a8", "decoder", "_add_704x256_", r"residual_tile \+ acc|acc \+ residual_tile", "acc"),
    "no branch": ("w4a4-rank32", "decoder", "_add_704x256_", r"acc = low_rank_up\(acc.*", "acc = acc"),
    "one row too few": ("w8a8", "decoder", "_add_704x256_", r"\(row < M\)", "(row < M - 1)"),
    "one column too few": ("w8a8", "decoder", "_add_704x256_", r"\(column < N\)", "(column < N - 1)"),
    "the other cluster": ("split-int2", "decoder", "_add_704x256_", r"ids == 0", "ids == 1"),
    "gate and up swapped": ("w8a8", "decoder", "silu_mul", r"silu\(acc\)", "silu(acc1)"),
    "tanh for erf": ("w8a8", "encoder", "gelu", r"0.7071067811865476", "0.7073"),
    "rows closed too early": ("w8a8", "encoder", "gelu", r"== tl.cdiv\(N, BLOCK_N\) - 1", "== 0"),
    "a code cut off": ("w8a8", "decoder", "rms_norm_quantize_token", r"v \+ 12582912.0", "v - 0.25 + 12582912.0"),
    "eps forgotten": ("w8a8", "decoder", "rms_norm_quantize_token", r"1e-06", "1e-3"),
    "a column too few in the norm": ("w8a8", "encoder", "layer_norm_quantize_token", r"offs_k < 384", "offs_k < 383"),
    "a butterfly turned": ("w4a4-rank32", "encoder", "layer_norm_hadamard", r"a - b", "b - a"),
}


def test_wrong_kernels_are_found(tmp_path: Path) -> None:
    """Each by the oracle that finds nothing wrong with the right kernel."""
    missed = []
    for number, (what, (recipe, model, part, text, instead)) in enumerate(WRONG.items()):
        kernel, right = emitted_with(model, recipe, part)
        wrong, count = re.subn(text, instead, right.text)
        assert count, f"{what}: '{text}' does not stand in {right.name}"
        path = tmp_path / f"wrong_{number}.py"
        path.write_text(wrong.replace(right.name, f"wrong_{number}"))
        module = emission.load_file(path)
        given = module.example(7, 3, DEVICE)
        expected = kernel_oracle.judged(kernel, given, "f32")
        if not kernel_oracle.problems(kernel, expected, named(kernel, module.run(**given)), "f32"):
            missed.append(what)
        assert kernel_oracle.problems(kernel, expected, named(kernel, emission.load(right).run(**given)), "f32") == []
    assert missed == []


def emitted_with(model: str, recipe: str, part: str) -> tuple[Kernel, Emitted]:
    """The first kernel of a plan whose name has this part, in float32."""
    for region in plan_of(model, recipe).kernels:
        assert region.kernel is not None
        emitted = emission.emit_kernel(region.kernel, "f32")
        if part in emitted.name:
            return region.kernel, emitted
    raise KeyError(part)
