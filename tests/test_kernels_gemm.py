"""Gemm kernels in Triton's interpreter: decoders, branches, products, split K, epilogues, closing steps.

The interpreter is wrong for bfloat16 (facts.md 1): kernels run here in float16 and float32 only; bfloat16 is compiled
ahead of time elsewhere. It does not contract a * b + c, as a GPU may: bounds hold with and without that.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import kernel_oracle
import numpy as np
import pytest
import torch
from gemm_cases import Case, Made, build, eager, run

from planish.codegen import gemm_plan, triton, triton_gemm
from planish.codegen.kernel_spec import Activation, Kernel, Product, Step, Tensor, Weight
from planish.ir.errors import PlanishError
from planish.kernels import decode_int8
from planish.kernels.decoders import DECODERS, functions_of

U = 2.0**-24  # one rounding of float32
ROUND = {"f16": 2.0**-11, "f32": 2.0**-24}
LEAST = {"f16": 2.0**-25, "f32": 2.0**-149}  # half a step of the least numbers
LARGEST = {"f16": 65504.0, "f32": 3.4e38}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))


def far(case: Case, made: Made, results: dict[str, torch.Tensor]) -> list[str]:
    """Results that are not what the products are in float64; [] if all are within the bound.

    y = sum_k a_k w_k + branches + bias, and S = the same sum of magnitudes. Operands are exact in the kernel's float
    (u = 2^-24), so the error has these terms, doubled for their products:

        products and sums       K u S of a float dot in any order; an integer dot has none
        scales of groups        a group's sum is converted, scaled twice and added: (groups + 3) u S
        scales after the loop   convert, weight's scale, activation's zero point (2), activation's scale: 5 u S
        branches, bias          (rank + 1) u S each, in S
        a decoded weight        where scales meet it in the kernel's float r: one rounding, r S, of clusters two more
                                (the ratio of the scales, code less zero point); below the normal numbers `least` an
                                element, which is less than least sum |a| <= least K max S, in the store's term
        the store               r |y| + least
    """
    found = []
    cut = gemm_plan.cut_of(made.kernel, case.dtype)
    weight = made.kernel.products[0].weight
    unit = cut.unit or made.kernel.columns
    groups = -(-made.kernel.columns // unit)
    relative = (groups + 8 + sum(case.ranks) + 2) * U
    if not cut.integer:
        roundings = 3 if weight.clusters else int(cut.on_weight or case.float_zero)
        relative += made.kernel.columns * U + roundings * ROUND[case.dtype]
    for name, exact in made.exact.items():
        got = results[name].double().numpy()
        # a zero point of the activation is taken from sums of codes alone: up to 255 beside codes of 0
        size = made.size[name] + (_zero_size(made) if made.kernel.activation.zero else 0.0)  # type: ignore[union-attr]
        bound = 2 * relative * size + ROUND[case.dtype] * np.abs(exact) + LEAST[case.dtype] * made.kernel.columns
        over = (np.abs(exact) + bound >= LARGEST[case.dtype]) & np.isinf(got) & (np.sign(got) == np.sign(exact))
        error = np.where(over, 0.0, np.abs(got - exact))
        bad = ~(error <= bound)
        if bad.any():
            at = np.unravel_index(int(np.argmax(np.where(bad, error / np.maximum(bound, 1e-300), 0))), bad.shape)
            found.append(f"{name}{list(map(int, at))}: {got[at]} expected {exact[at]} +- {bound[at]:.3g}")
    return found


def _zero_size(made: Made) -> np.ndarray:
    """(|codes| + |zero|) scale |w|, summed: what is added up where the zero point is taken off afterwards."""
    a = made.kernel.activation
    assert a is not None
    codes = made.held[a.codes].double().abs().numpy()[:, : made.kernel.columns]
    scale = made.held[a.scale].double().numpy().reshape(-1, 1)
    zero = made.held[a.zero].double().abs().numpy().reshape(-1, 1)
    weight = kernel_oracle.decoded(made.kernel.products[0], made.held, made.kernel.columns).abs().numpy()
    found: np.ndarray = ((codes + zero) * scale) @ weight.T
    return found


# -- decoders ------------------------------------------------------------------------------------

WEIGHTS = [
    "float", "int8:channel", "uint8:channel", "int8:g32", "int4:channel", "int4:tensor", "int4:g16", "int4:g32:f16",
    "uint4:g32", "uint4:g64:f16", "int4:g64", "int4:g128", "uint4:g128:bf16", "int2:channel", "uint2:g64",
    "uint2:channel:split3", "uint2:g64:f16:split2", "int2:g32:split4", "uint4:g32:split3",
]  # fmt: skip
LEFTS = ["float", "i8:token", "u8:token", "i8:tensor", "u8:tensor", "i4:g32", "u4:g64", "i4:token"]
SHAPES = [(1, 40, 96), (7, 129, 160), (16, 72, 256), (33, 40, 130), (128, 24, 128)]  # M, N, K: ragged, and not
VALUES = ["normal", "zero", "huge", "negative"]
TILES = {1: 16, 7: 16, 16: 16, 33: 32, 128: 64}


def grid() -> list[tuple[str, str, tuple[int, int, int], str, str]]:
    """Every weight with every second left side, and all of them on codes; shapes, dtypes and values take turns."""
    found = []
    for i, weight in enumerate(WEIGHTS):
        for j, left in enumerate(LEFTS):
            if (left != "float") if weight == "float" else ((i + j) % 2 and j):
                continue
            count = 3 * i + j
            dtype = ("f16", "f32")[(i + j) % 2]
            found.append((weight, left, SHAPES[count % 5], VALUES[(count // 2) % 4], dtype))
    return found


@pytest.mark.parametrize(("weight", "left", "shape", "values", "dtype"), grid())
def test_decoders(weight: str, left: str, shape: tuple[int, int, int], values: str, dtype: str) -> None:
    rows, outputs, columns = shape
    case = Case(weight, left, outputs, columns, values=values, dtype=dtype)
    made = build(case, rows, seed=rows)
    made_by_kernel = run(made, dtype, BLOCK_M=TILES[rows], BLOCK_N=64)
    assert far(case, made, made_by_kernel) == []
    assert far(case, made, eager(made, dtype)) == []


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("weight", ["int8:channel", "uint4:g64", "uint2:g64:f16:split2"])
def test_values(weight: str, values: str) -> None:
    """Zeros, huge values and rows without a positive number, on floats and on codes."""
    for left, dtype in (("float", "f16"), ("i8:token", "f32")):
        case = Case(weight, left, 24, 128, values=values, dtype=dtype)
        made = build(case, 9)
        assert far(case, made, run(made, dtype, BLOCK_M=16, BLOCK_N=32)) == []


@pytest.mark.parametrize("left", ["i8:token", "i8:tensor", "i4:g32", "u4:g64", "i4:token"])
@pytest.mark.parametrize("weight", ["int8:channel", "int4:channel", "uint4:g32", "int4:g64", "uint2:g64", "int8:g32"])
def test_integers_are_exact(weight: str, left: str) -> None:
    """Codes that meet codes: the same bits as the reference, whose sums are integers in float64."""
    made = build(Case(weight, left, 40, 160, dtype="f32"), 33)
    assert gemm_plan.cut_of(made.kernel, "f32").integer
    one, other = run(made, "f32", BLOCK_M=64, BLOCK_N=64)["out"], eager(made, "f32")["out"]
    assert torch.equal(one, other)


def test_what_is_multiplied_in_integers() -> None:
    """Float weights, float zero points, 9-bit differences, clusters and groups of 16 are multiplied as floats."""
    for weight, left in [("uint8:channel", "i8:token"), ("uint2:g64:f16:split2", "i8:token"), ("int4:g16", "i8:token")]:
        assert not gemm_plan.cut_of(build(Case(weight, left), 2).kernel, "f16").integer
    assert not gemm_plan.cut_of(build(Case("uint4:g32", "i8:token", float_zero=True), 2).kernel, "f16").integer
    assert not gemm_plan.cut_of(build(Case("int8:channel", "float"), 2).kernel, "f16").integer


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("weight", ["uint4:g32", "uint4:channel", "uint8:g64", "uint2:g32"])
def test_zero_points_that_are_floats(weight: str, dtype: str) -> None:
    for left in ("float", "i8:token"):
        case = Case(weight, left, 40, 96, float_zero=True, dtype=dtype)
        made = build(case, 7)
        assert far(case, made, run(made, dtype, BLOCK_M=16, BLOCK_N=64)) == []


def test_scales_that_float16_cannot_hold() -> None:
    """Clusters with scales of 1e-9 and of 1e-12: their ratio is what is rounded."""
    case = Case("uint2:channel:split2", "float", 24, 128, dtype="f16")
    made = build(case, 5)
    made.held["weight_scale"] *= 1e-9
    made.held["weight_scale"][1] *= 1e-3
    kernel = dataclasses.replace(made.kernel, tensors=tuple(_as(t, "out", "f32") for t in made.kernel.tensors))
    expected = kernel_oracle.judged(kernel, made.held, "f16")
    got = run(dataclasses.replace(made, kernel=kernel), "f16", BLOCK_M=16, BLOCK_N=32)
    assert bool((got["out"] != 0).any())
    assert kernel_oracle.problems(kernel, expected, got, "f16") == []


def _as(tensor: Tensor, name: str, dtype: str) -> Tensor:
    return dataclasses.replace(tensor, dtype=dtype) if tensor.name == name else tensor


# -- the skeleton --------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [{"BLOCK_M": 16, "BLOCK_N": 32}, {"BLOCK_M": 64, "BLOCK_N": 128, "GROUP_M": 1}])
@pytest.mark.parametrize("weight", ["int8:channel", "int4:g128:f16"])
def test_tiles(weight: str, tiles: dict[str, int]) -> None:
    """The same bits for any tile, where the order of sums is that of K."""
    case = Case(weight, "i8:token", 70, 256, dtype="f32")
    made = build(case, 40)
    one = run(made, "f32", BLOCK_M=64, BLOCK_N=128)["out"]
    for step in gemm_plan.cut_of(made.kernel, "f32").steps:
        other = run(made, "f32", BLOCK_K=step, **tiles)["out"]
        assert far(case, made, {"out": other}) == []
        if weight == "int8:channel":
            assert torch.equal(one, other)


@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize(
    ("weight", "left"), [("int8:channel", "u8:token"), ("uint4:g32", "i8:token"), ("int4:g64", "float")]
)
def test_split_k(weight: str, left: str, parts: int) -> None:
    """Parts of K, some of them empty: exact where sums are integers, else within the bound, always the same."""
    case = Case(weight, left, 40, 320, dtype="f32", products=2, bias=True)
    made = build(case, 9)
    whole = run(made, "f32", BLOCK_M=16, BLOCK_N=64)
    split = run(made, "f32", BLOCK_M=16, BLOCK_N=64, SPLIT_K=parts)
    again = run(made, "f32", BLOCK_M=16, BLOCK_N=64, SPLIT_K=parts)
    assert far(case, made, split) == []
    for name in whole:
        assert torch.equal(split[name], again[name])
        assert weight != "int8:channel" or torch.equal(split[name], whole[name])


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("ranks", [(5,), (16,), (32,), (120,), (32, 5)])
def test_branches(ranks: tuple[int, ...], dtype: str) -> None:
    """Low-rank up and outlier columns: ranks that fill a multiplication, and that do not."""
    case = Case("int4:g64", "i4:g64", 40, 128, ranks=ranks, bias=True, dtype=dtype)
    made = build(case, 17)
    assert far(case, made, run(made, dtype, BLOCK_M=32, BLOCK_N=64)) == []


@pytest.mark.parametrize("weight", ["int8:channel", "uint4:g32:f16", "uint2:g64:f16:split2"])
def test_products_share_the_activation(weight: str) -> None:
    for left in ("float", "i8:token"):
        case = Case(weight, left, 40, 128, products=3, ranks=(8,), bias=True)
        made = build(case, 7)
        assert far(case, made, run(made, "f16", BLOCK_M=16, BLOCK_N=32)) == []


# -- epilogues -----------------------------------------------------------------------------------


def vector(name: str, outputs: int) -> Tensor:
    return Tensor(name, "f32", (outputs,), "weight")


def output(name: str, outputs: int) -> Tensor:
    return Tensor(name, "float", ("M", outputs), "output")


def step(row: str, reads: str, writes: str, **options: float | str | bool) -> Step:
    return Step(row, tuple(reads.split()), tuple(writes.split()), tuple(options.items()))


STATIC = {"bits": 8, "signed": True, "low": -128, "high": 127}
GROUPS = {"bits": 4, "signed": True, "mode": "symmetric", "levels": 7.0, "low": -8, "high": 7, "group": 32}
TOKEN = {"bits": 8, "signed": True, "mode": "symmetric", "levels": 127.0, "low": -127, "high": 127}
N = 72
EPILOGUES: dict[str, tuple[int, tuple[Step, ...], tuple[Tensor, ...]]] = {
    "gelu": (1, (step("gelu", "acc", "v", approximate="none"), step("gelu", "v", "y", approximate="tanh")),
             (output("y", N),)),
    "silu-mul": (2, (step("silu", "acc", "v"), step("mul", "v acc1", "y")), (output("y", N),)),
    "gelu-mul": (2, (step("gelu", "acc", "v", approximate="tanh"), step("mul", "acc1 v", "y")), (output("y", N),)),
    "relu-residual": (1, (step("relu", "acc", "v"), step("add", "residual v", "y")),
                      (Tensor("residual", "float", ("M", N), "input"), output("y", N))),
    "affine-twice": (1, (step("mul", "acc by", "v"), step("sub", "v by1", "y"), step("max", "y by", "z")),
                     (vector("by", N), vector("by1", N), output("y", N), output("z", N))),
    "scalar": (1, (step("mul", "acc by", "y"),), (Tensor("by", "f32", (), "weight"), output("y", N))),
    "static": (1, (step("relu", "acc", "y"), step("quantize_static", "y y_scale", "codes", **STATIC)),
               (Tensor("y_scale", "f32", (), "weight"), output("y", N), Tensor("codes", "i8", ("M", 128), "output"))),
    "static-zero": (1, (step("quantize_static", "acc y_scale y_zero", "codes", **STATIC),),
                    (Tensor("y_scale", "f32", (), "weight"), Tensor("y_zero", "i8", (), "weight"),
                     Tensor("codes", "i8", ("M", 128), "output"))),
    "groups": (1, (step("gelu", "acc", "v", approximate="none"), step("quantize_group", "v", "codes scale", **GROUPS)),
               (Tensor("codes", "i8", ("M", 64), "output", 2), Tensor("scale", "f32", ("M", 3), "output"))),
}  # fmt: skip


def epilogue(name: str, left: str, dtype: str, rows: int, values: str = "normal", **more: object) -> Made:
    """A gemm with an epilogue; its vectors and scales filled."""
    products, steps, tensors = EPILOGUES[name]
    case = Case("int8:channel", left, N, 96, products, bias=True, dtype=dtype, values=values, steps=steps,
                tensors=tensors, stored=False, **more)  # type: ignore[arg-type]  # fmt: skip
    made = build(case, rows)
    fill(made, dtype, rows)
    return made


def fill(made: Made, dtype: str, rows: int) -> None:
    rng = torch.Generator().manual_seed(rows)
    for tensor in made.kernel.tensors:
        if tensor.role in ("input", "weight") and tensor.name not in made.held:
            shape = [rows if d == "M" else int(d) for d in tensor.shape]
            held = torch.randn(shape, generator=rng)
            if tensor.name.endswith("scale"):
                held = held.abs() * 0.02 + 0.02
            if tensor.dtype == "i8":
                held = torch.tensor(-7)
            kind = {"float": getattr(torch, {"f16": "float16", "f32": "float32"}[dtype]), "i8": torch.int8}
            made.held[tensor.name] = held.to(kind.get(tensor.dtype, torch.float32))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # huge values beyond float16 become infinite
@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name: str, dtype: str) -> None:
    for rows, left, values in ((33, "i8:token", "normal"), (7, "float", "huge"), (1, "u8:token", "zero")):
        made = epilogue(name, left, dtype, rows, values)
        expected = kernel_oracle.judged(made.kernel, made.held, dtype)
        for launch in ({"BLOCK_M": 16, "BLOCK_N": 64}, {"BLOCK_M": 32, "BLOCK_N": 128, "SPLIT_K": 2, "BLOCK_K": 64}):
            got = run(made, dtype, **launch)
            assert kernel_oracle.problems(made.kernel, expected, got, dtype) == [], (rows, left, launch)
        assert kernel_oracle.problems(made.kernel, expected, eager(made, dtype), dtype) == []


CLOSINGS: dict[str, tuple[tuple[Step, ...], tuple[Tensor, ...]]] = {
    "token": ((step("quantize_token", "y", "codes scale", **TOKEN),),
              (Tensor("y", "float", ("M", N), "scratch"), Tensor("codes", "i8", ("M", 128), "output"),
               Tensor("scale", "f32", ("M",), "output"))),
    "norm-token": ((step("rms_norm", "y gain ", "v", eps=1e-5), step("quantize_token", "v", "codes scale", **TOKEN)),
                   (vector("gain", N), output("y", N), Tensor("codes", "i8", ("M", 128), "output"),
                    Tensor("scale", "f32", ("M",), "output"))),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("name", CLOSINGS)
def test_closing(name: str, dtype: str) -> None:
    """Steps on whole rows, by the last tile of a block of rows; several blocks, the last one ragged."""
    closing, tensors = CLOSINGS[name]
    case = Case("int4:g32", "i8:token", N, 96, bias=True, dtype=dtype, steps=(step("relu", "acc", "y"),),
                closing=closing, tensors=tensors, stored=False)  # fmt: skip
    made = build(case, 37)
    fill(made, dtype, 37)
    expected = kernel_oracle.judged(made.kernel, made.held, dtype)
    for launch in ({"BLOCK_M": 16, "BLOCK_N": 32}, {"BLOCK_M": 32, "BLOCK_N": 64, "SPLIT_K": 2, "ROWS": 8}):
        got = run(made, dtype, **launch)
        assert kernel_oracle.problems(made.kernel, expected, got, dtype) == [], launch


# -- wrong kernels are seen ----------------------------------------------------------------------

PLAIN = "int4:g32"
WRONG = [
    # (weight, left, epilogue, what is written, what a wrong kernel has instead)
    (PLAIN, "float", "half_plane(weight_0, 0.0, 4, 0)", "half_plane(weight_0, 0.0, 4, 1)"),  # swapped nibble
    (PLAIN, "i8:token", "scaled_plane(weight_0, 4, 1)", "scaled_plane(weight_0, 4, 0)"),
    (PLAIN, "i8:token", "* (weight_scale * 0.0625)[:, None]", "* 0.0625"),  # no scale
    (PLAIN, "i8:token", " * 0.0625)[:, None]", ")[:, None]"),
    (PLAIN, "i8:token", "out = out * tl.load(a_scale_ptr + first + m)[None, :]", "out = out * 1.0"),
    (PLAIN, "i8:token", "a_scale_ptr + first + m", "a_scale_ptr + m"),
    (PLAIN, "float", "M - 1 - first", "M - 2 - first"),  # off by one
    (PLAIN, "float", "(column < N)[None, :]", "(column < N - 1)[None, :]"),
    (PLAIN, "float", "(row < M)[:, None]", "(row < M - 1)[:, None]"),
    (PLAIN, "float", "130 - step * BLOCK_K", "129 - step * BLOCK_K"),
    (PLAIN, "float", "a_at += BLOCK_K", "a_at += BLOCK_K // 2"),
    (PLAIN, "float", "step * BLOCK_K + 32", "step * BLOCK_K"),  # a group's scale for its neighbour
    ("uint4:g32", "i8:token", "plane_less_zero(weight_0, weight_zero", "plane_less_zero(weight_0, 0 * weight_zero"),
    ("int8:channel", "u8:token", " * weight_sums[:, None]", " * 0.99 * weight_sums[:, None]"),
    ("uint2:channel:split3", "float", "choose3(weight_ids, weight_scale_0, weight_scale_1",
     "choose3(weight_ids, weight_scale_1, weight_scale_0"),
    ("uint2:channel:split3", "float", "weight_ids_0.to(tl.int32) >> 2", "weight_ids_0.to(tl.int32) >> 4"),
]  # fmt: skip


@pytest.mark.parametrize(("weight", "left", "text", "instead"), WRONG)
def test_wrong_kernels_are_rejected(weight: str, left: str, text: str, instead: str, tmp_path: Path) -> None:
    case = Case(weight, left, 40, 130, dtype="f16")
    made = build(case, 33)
    emitted = triton.emit_kernel(made.kernel, "f16")
    start = emitted.text.index("\ndef kernel(")
    end = emitted.text.index("\nSIGNATURE")
    own = emitted.text[start:end]
    assert text in own, f"the kernel has no '{text}':\n{own}"
    launch = {"BLOCK_M": 32, "BLOCK_N": 64}
    assert far(case, made, run(made, "f16", **launch)) == []
    changed = emitted.text[:start] + own.replace(text, instead) + emitted.text[end:]
    module = loaded(changed.replace(emitted.name, "wrong"), tmp_path)
    got = module.run(**made.held, launch=module.Launch(**launch))
    assert far(case, made, {"out": got}) != []


def loaded(text: str, folder: Path) -> ModuleType:
    """A file's module: Triton reads the kernel's source from it."""
    path = folder / "wrong_kernel.py"
    path.write_text(text.replace('custom_op("planish::wrong"', f'custom_op("planish::wrong_{abs(hash(text))}"'))
    spec = importlib.util.spec_from_file_location(f"wrong_{abs(hash(text))}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# -- refusals ------------------------------------------------------------------------------------


def test_refusals() -> None:
    kernel = build(Case("int4:g32", "float"), 2).kernel
    assert gemm_plan.refusal(kernel) == ""
    weight = kernel.products[0].weight
    odd = dataclasses.replace(kernel, products=(Product(dataclasses.replace(weight, group=24), "out"),))
    assert gemm_plan.refusal(odd) == "groups of 24 columns are no multiple of 16"
    unknown = dataclasses.replace(kernel, products=(Product(Weight("fp4", "weight"), "out"),))
    assert gemm_plan.refusal(unknown) == "there is no decoder 'fp4' in planish.kernels.decoders"
    other = Product(Weight("float", "out"), "out")
    assert gemm_plan.refusal(dataclasses.replace(kernel, products=(*kernel.products, other))) == (
        "its products have weights of different kinds"
    )
    assert gemm_plan.refusal(dataclasses.replace(kernel, activation=None)) == "it has no activation"
    with pytest.raises(PlanishError, match="gemm: cannot be written: groups of 24 columns are no multiple of 16"):
        triton_gemm.body(odd, "f16")
    rows = dataclasses.replace(kernel, steps=(step("rms_norm", "out", "v", eps=1e-6),))
    with pytest.raises(PlanishError, match="step 'rms_norm': it needs whole rows; expected it among the closing steps"):
        triton_gemm.body(rows, "f16")


def test_launch_parameters_are_checked() -> None:
    made = epilogue("groups", "i8:token", "f16", 3)
    module = triton.load(triton.emit_kernel(made.kernel, "f16"))
    with pytest.raises(ValueError, match="launch BLOCK_N: expected BLOCK_N in"):
        module.Launch(BLOCK_N=32)  # spans of codes and groups lie within a tile
    with pytest.raises(ValueError, match="launch BLOCK_K: expected BLOCK_K in"):
        module.Launch(BLOCK_K=256)


def test_no_masks_in_the_loop_of_codes() -> None:
    """Rows beyond the matrices repeat the last, columns are padded: loads of the main loop have no masks."""
    body = triton_gemm.body(build(Case("int4:g32", "i8:token", 40, 130), 2).kernel, "f16").kernel
    loop = body[body.index("for step in range") : body.index("if SPLIT_K > 1")]
    assert "mask" not in loop and "other" not in loop


def test_kernels_are_equal_where_specs_are() -> None:
    one, two = (build(Case("uint4:g32", "i8:token"), 4, seed).kernel for seed in (1, 2))
    assert one == two and triton_gemm.body(one, "f16") == triton_gemm.body(two, "f16")
    assert isinstance(one, Kernel) and isinstance(one.activation, Activation)


def test_decoders_are_rows() -> None:
    """Every function that a row's expressions call stands in the row's file."""
    folder = Path(decode_int8.__file__).parent
    for row in DECODERS.values():
        called = [f for e in (row.integer, row.less_zero, row.half, row.wide, row.reference) for f in functions_of(e)]
        assert bool(called) == bool(row.file)
        if row.file:
            text = (folder / f"{row.file}.py").read_text()
            assert [f for f in called if f"def {f}(" not in text] == []
