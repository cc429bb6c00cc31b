"""Gemms in C++: weights and activations of every kind against an oracle in float64 and the eager reference.

Kernels are compiled once for the file; M is an argument of each. The portable build has no AVX-512.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import kernel_models
import kernel_oracle
import pytest
import torch
from gemm_cases import Case, Made, build
from test_kernels_gemm import CLOSINGS, EPILOGUES, LEFTS, VALUES, WEIGHTS, N, epilogue, far, fill, step

from planish.codegen import cpp, cpp_build, cpp_gemm, cpp_pack, triton_source
from planish.codegen.kernel_spec import Kernel, Tensor
from planish.codegen.triton_check import check_text, example_text
from planish.ir.errors import PlanishError

ROWS = (1, 3, 7, 16, 33, 128)
PORTABLE = "x86-64-v3"
BUILDS = ("native", PORTABLE)
COLUMNS, OUTPUTS = 130, 72  # neither fills its blocks


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of the file: a kernel that several tests read is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLANISH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@functools.cache
def compiled(kernel: Kernel, dtype: str, build_for: str = "native") -> Callable[..., Any]:
    """A kernel's function for an architecture, on inputs and prepared weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLANISH_CPP_ARCH", build_for)
        pending = cpp_build.start(cpp.text_of(kernel, dtype), "kernel", cpp.constants_of(kernel))
        pending.library()
    return cpp.runner(kernel, dtype, pending)


def results(made: Made, run: Callable[..., Any], dtype: str) -> dict[str, torch.Tensor]:
    """What a function makes of operands as `Region.bind` gives them."""
    kernel = made.kernel
    held = dict(made.held)
    held |= cpp_pack.prepared(kernel, dtype, {t.name: held[t.name] for t in kernel.tensors if t.role == "weight"})
    given = [held[t.name] for role in ("input", "weight") for t in kernel.tensors if t.role == role]
    return named(kernel, run(*given))


def named(kernel: Kernel, found: Any) -> dict[str, torch.Tensor]:
    names = [t.name for t in kernel.tensors if t.role == "output"]
    return dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))


def eager(made: Made, dtype: str) -> dict[str, torch.Tensor]:
    return named(made.kernel, cpp.kernel(made.kernel, dtype).reference(**made.held))


def check(case: Case, build_for: str = "native", rows: tuple[int, ...] = ROWS) -> None:
    """A case with operands of every kind against the exact products."""
    for i, count in enumerate(rows):
        for values in (VALUES[i % 4], "normal") if count == 7 else (VALUES[i % 4],):
            one = Case(**{**vars(case), "values": values})
            made = build(one, count, seed=count)
            got = results(made, compiled(made.kernel, case.dtype, build_for), case.dtype)
            assert problems(one, made, got) == [], (count, values)


def problems(case: Case, made: Made, got: dict[str, torch.Tensor]) -> list[str]:
    """What is not as it should be; operands that bfloat16 rounds have no exact products but those of the oracle."""
    if case.dtype != "bf16":
        return far(case, made, got)
    return kernel_oracle.problems(made.kernel, kernel_oracle.judged(made.kernel, made.held, "bf16"), got, "bf16")


# -- products ------------------------------------------------------------------------------------

KINDS = [
    # (weight, left, dtype): each decoder and each kind of activation, once; all pairs are in the slow tests
    ("int8:channel", "i8:token", "f32"), ("int8:channel", "u8:token", "f16"), ("uint8:channel", "i8:tensor", "f32"),
    ("int8:g32", "u4:g64", "bf16"), ("int4:channel", "i4:token", "f32"), ("uint4:g32", "i8:token", "f16"),
    ("int4:g64", "i4:g32", "f32"), ("uint2:g64", "i8:token", "f32"), ("int4:g32", "float", "f32"),
    ("uint4:g128:bf16", "float", "bf16"), ("uint8:channel", "float", "f16"), ("float", "float", "bf16"),
    ("uint4:g32", "float", "bf16"), ("int2:channel", "float", "bf16"), ("uint2:channel:split3", "float", "f32"),
    ("int2:g32:split4", "i8:token", "f32"), ("uint8:g64", "float", "bf16"), ("int2:g64:split2", "float", "bf16"),
]  # fmt: skip


@pytest.mark.parametrize(("weight", "left", "dtype"), KINDS)
def test_products(weight: str, left: str, dtype: str) -> None:
    check(Case(weight, left, OUTPUTS, COLUMNS, bias=True, dtype=dtype))


@pytest.mark.parametrize("at", [0, 14])
def test_products_without_avx512(at: int) -> None:
    weight, left, dtype = KINDS[at]
    check(Case(weight, left, OUTPUTS, COLUMNS, bias=True, dtype=dtype), PORTABLE)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_one_row_of_floats_beside_codes(dtype: str) -> None:
    """What is multiplied as integers of 24 bits (dot_limbs.h): every kind of numbers, and one that is none."""
    for values in VALUES:
        one = Case("int4:g32", "float", OUTPUTS, COLUMNS, bias=True, dtype=dtype, values=values)
        made = build(one, 1, seed=3)
        assert problems(one, made, results(made, compiled(made.kernel, dtype), dtype)) == [], values
    made.held["a"][0, 5] = torch.inf
    assert not results(made, compiled(made.kernel, dtype), dtype)["out"].isfinite().any()


@pytest.mark.slow
@pytest.mark.parametrize("left", LEFTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_all_products(weight: str, left: str) -> None:
    at = WEIGHTS.index(weight) + LEFTS.index(left)
    check(Case(weight, left, OUTPUTS, COLUMNS, dtype=("f32", "bf16", "f16")[at % 3]), BUILDS[at % 2])


@pytest.mark.parametrize(
    ("weight", "left"), [("int8:channel", "i8:token"), ("uint4:g32", "i8:token"), ("int4:g64", "i4:g32")]
)
def test_integers_are_exact(weight: str, left: str) -> None:
    """Codes that meet codes: the bits of the reference, whose sums are integers in float64."""
    for rows in (1, 7, 33):
        made = build(Case(weight, left, OUTPUTS, COLUMNS, bias=True, dtype="f32", values="huge"), rows)
        assert torch.equal(results(made, compiled(made.kernel, "f32"), "f32")["out"], eager(made, "f32")["out"])


def test_sums_reach_the_ends_of_int32() -> None:
    """The largest codes on both sides, and rows as long as sums of products can be."""
    columns = cpp_pack.MOST_COLUMNS
    made = build(Case("int8:channel", "i8:token", 2, columns, dtype="f32"), 1)
    for sign in (-128, 127):
        made.held["a"][...] = sign
        made.held["weight"][0], made.held["weight"][1] = -128, 127
        got = results(made, compiled(made.kernel, "f32"), "f32")
        assert torch.equal(got["out"], eager(made, "f32")["out"])
    longer = build(Case("int8:channel", "i8:token", 2, columns + 64, dtype="f32"), 1).kernel
    assert not cpp_pack.form_of(longer, "f32").integer


def test_branches_and_products_that_share_an_activation() -> None:
    check(Case("int4:g64", "i4:g64", OUTPUTS, 128, products=2, ranks=(32, 5), bias=True, dtype="f16"))


@pytest.mark.parametrize("outputs", [32, 96])
def test_nothing_is_written_behind_the_result(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels have 64 columns: with 32 or 96 outputs the last one holds tiles that lie behind the result."""
    case = Case("int4:g32", "float", outputs, COLUMNS, bias=True, dtype="f32")
    kernel = build(case, 1, seed=1).kernel
    memory: list[torch.Tensor] = []

    def empty(shape: list[int], *, dtype: torch.dtype) -> torch.Tensor:
        memory.append(torch.full((math.prod(shape) + 256,), 7.0, dtype=dtype))
        return memory[-1][: math.prod(shape)].view(shape)

    pending = cpp_build.start(cpp.text_of(kernel, "f32"), "kernel", cpp.constants_of(kernel))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        run = cpp.runner(kernel, "f32", pending)
    for count in (1, 7, 24, 70):
        made = build(case, count, seed=count)
        assert problems(case, made, results(made, run, "f32")) == [], count
        assert bool((memory.pop()[-256:] == 7.0).all()), count


def test_float_zero_points() -> None:
    check(Case("uint4:g32", "float", OUTPUTS, 96, float_zero=True, dtype="f32"))


def test_threads_change_nothing() -> None:
    """Rows and columns are shared out; what is added up in which order stays."""
    before = torch.get_num_threads()
    for weight, left in (("int8:channel", "i8:token"), ("int4:g32", "float")):
        for rows in (1, 5, 130):
            made = build(Case(weight, left, 200, COLUMNS, bias=True, dtype="f32"), rows)
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                try:
                    found.append(results(made, compiled(made.kernel, "f32"), "f32")["out"])
                finally:
                    torch.set_num_threads(before)
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# -- row programs --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # huge values beyond float16 become infinite
@pytest.mark.parametrize("name", ["silu-mul", "relu-residual", "static-zero", "groups"])
def test_epilogues(name: str) -> None:
    check_epilogue(name, "f32", "i8:token", ((33, "normal"), (7, "huge"), (1, "zero")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("left", ["float", "u8:token"])
@pytest.mark.parametrize("name", EPILOGUES)
def test_all_epilogues(name: str, left: str, dtype: str) -> None:
    check_epilogue(name, dtype, left, ((128, "normal"), (16, "huge"), (3, "negative"), (1, "zero")))


def check_epilogue(name: str, dtype: str, left: str, cases: tuple[tuple[int, str], ...]) -> None:
    for rows, values in cases:
        made = epilogue(name, left, dtype, rows, values)
        expected = kernel_oracle.judged(made.kernel, made.held, dtype)
        got = results(made, compiled(made.kernel, dtype), dtype)
        assert kernel_oracle.problems(made.kernel, expected, got, dtype) == [], rows


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("name", CLOSINGS)
def test_closing(name: str, dtype: str) -> None:
    """Steps on whole rows, where a thread has them and where threads wait for each other."""
    closing, tensors = CLOSINGS[name]
    case = Case("int4:g32", "i8:token", N, 96, bias=True, dtype=dtype, steps=(step("relu", "acc", "y"),),
                closing=closing, tensors=tensors, stored=False)  # fmt: skip
    before = torch.get_num_threads()
    for rows, threads in ((1, 1), (3, 2), (37, 1), (130, 2)):
        made = build(case, rows)
        fill(made, dtype, rows)
        expected = kernel_oracle.judged(made.kernel, made.held, dtype)
        torch.set_num_threads(threads)
        try:
            got = results(made, compiled(made.kernel, dtype), dtype)
        finally:
            torch.set_num_threads(before)
        assert kernel_oracle.problems(made.kernel, expected, got, dtype) == [], rows


def floored(floor: float) -> Kernel:
    """gelu and codes from -floor on, as calibration chooses it."""
    options = {"bits": 8, "signed": True, "mode": "floor", "levels": 255.0, "low": -128, "high": 127, "floor": floor}
    tensors = (Tensor("y", "float", ("M", N), "scratch"), Tensor("codes", "i8", ("M", 128), "output"),
               Tensor("scale", "f32", ("M",), "output"), Tensor("zero", "i8", ("M",), "output"))  # fmt: skip
    closing = (step("quantize_token", "y", "codes scale zero", **options),)
    case = Case("int8:channel", "i8:token", N, 96, dtype="f32", steps=(step("gelu", "acc", "y", approximate="none"),),
                closing=closing, tensors=tensors, stored=False)  # fmt: skip
    return build(case, 130).kernel


def test_numbers_that_calibration_chooses_are_no_text() -> None:
    """Kernels that differ in them alone are compiled once and do what is theirs."""
    one, two = (cpp.kernel(floored(floor), "f32") for floor in (0.17, 0.21))
    assert one.text == two.text and one.name != two.name and one is cpp.kernel(floored(0.17), "f32")
    held = build(Case("int8:channel", "i8:token", N, 96, dtype="f32"), 130).held
    found = []
    for made in (one, two, one):
        wanted = named(made.kernel, made.reference(**{n: held[n] for n in (*made.inputs, *made.weights)}))
        weights = made.prepare({n: held[n] for n in made.weights})
        got = named(made.kernel, made.op(*(held[n] for n in made.inputs), *weights.values()))
        assert torch.equal(got["zero"], wanted["zero"])
        assert torch.allclose(got["scale"], wanted["scale"], rtol=1e-6)
        assert int((got["codes"].int() - wanted["codes"].int()).abs().max()) <= 1
        found.append(got["scale"])
    assert not torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# -- the kernels of real plans -------------------------------------------------------------------


def differences(kernel: Kernel, dtype: str, rows: int, build_for: str = "native") -> list[str]:
    """What an emitted Triton file's self-check says of the C++ kernel."""
    example, functions = example_text(kernel, dtype)
    pieces = [piece.text for piece in triton_source.gathered(functions)]
    names: dict[str, Any] = {"torch": torch, "Launch": None, "reference": cpp.kernel(kernel, dtype).reference}

    def run_named(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return results(Made(kernel, held), compiled(kernel, dtype, build_for), dtype)

    names["run"] = lambda launch, **held: tuple(run_named(held).values())
    text = "from __future__ import annotations\n" + "\n\n".join([*pieces, example, check_text(kernel)])
    exec(compile(text, "<check>", "exec"), names)
    if dtype == "bf16":  # what is rounded in the middle of a kernel moves its scales by more than the self-check allows
        held = names["example"](rows, rows, "cpu")
        for product in kernel.products:
            if product.weight.sums:  # the example's are random; the oracle knows what they stand for
                wide = kernel_oracle.decoded(product, held, kernel.columns)
                held[product.weight.sums] = wide.sum(1).float()
        return kernel_oracle.problems(kernel, kernel_oracle.judged(kernel, held, dtype), run_named(held), dtype)
    found: list[str] = names["differences"](rows, rows, "cpu")
    return found


PLANS = ["w8a8", "w4a16", "w4a8", "w4a4-rank32", "split-int2", "llm-int8"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["encoder", "decoder"])
@pytest.mark.parametrize("recipe", PLANS)
def test_kernels_of_plans(model: str, recipe: str) -> None:
    kernels = {r.kernel for r in kernel_models.plan_of(model, recipe).kernels if r.kernel is not None}
    for kernel in kernels:
        if kernel.kind == "gemm":
            for dtype, build_for in (("f32", "native"), ("bf16", "native"), ("f32", PORTABLE)):
                for rows in ROWS:
                    assert differences(kernel, dtype, rows, build_for) == [], (dtype, rows, build_for)


# -- wrong kernels are seen ----------------------------------------------------------------------

WRONG = [
    # (weight, left, what is written, what a wrong kernel has instead)
    ("int8:channel", "i8:token", "floats(sum[i][j] - 128 * left.sums[row + i])", "floats(sum[i][j])"),
    ("int8:channel", "u8:token", "y = y - (float)b.a_zero", "y = y - 0.99f * (float)b.a_zero"),
    ("int8:channel", "i8:token", "b.a_scale[first + row + i]", "b.a_scale[row + i]"),
    ("int8:channel", "i8:token", "row < rows - R ? row : rows - R", "row < rows - R ? row : rows - R - 1"),
    ("uint4:g32", "i8:token", "held[j] >> (BITS * part)", "held[j] >> (BITS * (1 - part))"),  # swapped planes
    ("uint4:g32", "i8:token", "* 5 + group]", "* 5 + 1]"),  # a group's sums for its neighbour
    ("int4:g32", "float", "+ group * 32,", "+ group * 16,"),
    ("uint2:channel:split3", "float", "choose(id[j], place, of[0][j], of[1][j])",
     "choose(id[j], place, of[1][j], of[0][j])"),
]  # fmt: skip


@pytest.mark.parametrize(("weight", "left", "text", "instead"), WRONG)
def test_wrong_kernels_are_rejected(weight: str, left: str, text: str, instead: str) -> None:
    case = Case(weight, left, OUTPUTS, COLUMNS, dtype="f32", bias=True)
    made = build(case, 133)
    whole = cpp.text_of(made.kernel, "f32")
    assert text in whole
    assert far(case, made, results(made, compiled(made.kernel, "f32"), "f32")) == []
    wrong = cpp.runner(made.kernel, "f32", cpp_build.start(whole.replace(text, instead), "wrong"))
    other = build(case, 133, seed=1)  # rows that are left out hold what was in memory: the results above
    assert far(case, other, results(other, wrong, "f32")) != []


# -- tile registers ------------------------------------------------------------------------------

EMULATED = "#define EMULATE_TILES\n"  # the loops of dot_amx.h, with plain C++ for what AMX does
TILED = [
    ("int8:channel", "i8:token", "f32"), ("int4:g64", "i8:token", "f32"), ("uint2:g64", "i8:token", "f32"),
    ("uint8:channel", "u8:token", "f16"), ("int4:channel", "i4:token", "bf16"), ("uint8:g64", "float", "bf16"),
    ("float", "float", "bf16"), ("int2:g64:split2", "float", "bf16"),
]  # fmt: skip


@pytest.mark.parametrize(("weight", "left", "dtype"), TILED)
def test_tile_registers(weight: str, left: str, dtype: str) -> None:
    """On this machine by emulation; blocks of 32 rows and more, the last of which begins early, and of fewer."""
    case = Case(weight, left, OUTPUTS, COLUMNS, products=2, bias=True, dtype=dtype)
    for rows in (31, 33, 133):
        made = build(case, rows)
        text = cpp.text_of(made.kernel, dtype)
        assert "tile_products<" in text or "tile_pairs(sum" in text
        run = cpp.runner(made.kernel, dtype, cpp_build.start(EMULATED + text, "tiled"))
        assert problems(case, made, results(made, run, dtype)) == [], rows


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("TILE_LOAD(7, at + 64, 256);", "TILE_LOAD(7, at, 256);"),
        ("TILE_LOAD(5, left + 16 * step, step);", "TILE_LOAD(5, left + 15 * step, step);"),
        ("TILE_STORE(2, &sum[16][0], 128);", "TILE_STORE(2, &sum[16][1], 128);"),
        ("unit += EACH, left += 64", "unit += EACH, left += 0"),
    ],
)
def test_wrong_tiles_are_found_by_the_process_or_the_tests(text: str, instead: str) -> None:
    """A tile that multiplies wrongly is not used: its own check finds it. Without the check the numbers are wrong."""
    case = Case("int8:channel", "i8:token", OUTPUTS, COLUMNS, dtype="f32")
    made = build(case, 133)
    whole = EMULATED + cpp.text_of(made.kernel, "f32")
    assert text in whole
    wrong = whole.replace(text, instead)
    if "left += 0" not in instead:  # the check has one turn of the loop
        run = cpp.runner(made.kernel, "f32", cpp_build.start(wrong, "wrong"))
        assert far(case, made, results(made, run, "f32")) == []
    unchecked = wrong.replace("static const bool ready = tiles_right();", "static const bool ready = true;")
    run = cpp.runner(made.kernel, "f32", cpp_build.start(unchecked, "wrong"))
    assert far(case, made, results(made, run, "f32")) != []


def test_amx_is_what_is_written_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code for a processor that has tile registers; it is not run here."""
    monkeypatch.setenv("PLANISH_CPP_ARCH", "sapphirerapids")
    for weight, left, dtype, word in (TILED[0][:3] + ("tdpbsud",), TILED[6][:3] + ("tdpbf16ps",)):
        made = build(Case(weight, left, OUTPUTS, COLUMNS, dtype=dtype), 1)
        library = cpp_build.build(cpp.text_of(made.kernel, dtype), "amx")
        done = subprocess.run(["objdump", "-d", str(library)], capture_output=True, text=True, check=True)
        assert word in done.stdout and "ldtilecfg" in done.stdout


# -- the op --------------------------------------------------------------------------------------


def test_the_op() -> None:
    made = build(Case("int4:g32", "i8:token", OUTPUTS, COLUMNS, products=2, dtype="bf16"), 5)
    kernel = cpp.kernel(made.kernel, "bf16")
    assert kernel is cpp.kernel(made.kernel, "bf16") and kernel.text
    held: Mapping[str, torch.Tensor] = made.held
    weights = kernel.prepare({name: held[name] for name in kernel.weights})
    given = [*(held[name] for name in kernel.inputs), *(weights[name] for name in kernel.weights)]
    torch.library.opcheck(kernel.op, tuple(given))
    found = kernel.op(*given)
    assert isinstance(found, tuple) and [t.dtype for t in found] == [torch.bfloat16] * 2
    apart = held["a"].t().contiguous().t()
    assert not apart.is_contiguous() and torch.equal(kernel.op(apart, *given[1:])[0], found[0])
    count = len(kernel.inputs)
    assert kernel.op(*(t[:0] for t in given[:count]), *given[count:])[0].shape == (0, OUTPUTS)


def test_inputs_are_checked() -> None:
    made = build(Case("int8:channel", "i8:token", OUTPUTS, COLUMNS, dtype="f32"), 5)
    kernel = cpp.kernel(made.kernel, "f32")
    weights = list(kernel.prepare({name: made.held[name] for name in kernel.weights}).values())
    a, scale = made.held["a"], made.held["a_scale"]
    native, python = kernel.op, compiled(made.kernel, "f32")
    for run, error in ((native, RuntimeError), (python, PlanishError)):
        with pytest.raises(error, match=r"a: expected .*\[5, 192\], got .*\[5, 130\]"):
            run(a[:, :130], scale, *weights)
        with pytest.raises(error, match=r"a_scale: expected .*\[5\], got .*\[4\]"):
            run(a, scale[:4], *weights)
        with pytest.raises(error, match=r"a_scale: expected "):
            run(a, scale.double(), *weights)


def test_without_a_compiler_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANISH_CXX", "")
    made = build(Case("int4:g64", "i8:token", 24, 64, dtype="f32"), 3)
    kernel = cpp.kernel(made.kernel, "f32")
    assert kernel.text == ""
    weights = kernel.prepare({name: made.held[name] for name in kernel.weights})
    assert all(weights[name] is made.held[name] for name in kernel.weights)
    given = [*(made.held[name] for name in kernel.inputs), *weights.values()]
    torch.library.opcheck(kernel.op, tuple(given))
    assert torch.equal(kernel.op(*given), kernel.reference(**made.held))


def test_specs_that_differ_in_no_text_share_an_op() -> None:
    made = build(Case("int4:g32", "i8:token", OUTPUTS, COLUMNS, dtype="f32"), 5).kernel
    other = dataclasses.replace(made, products=(dataclasses.replace(made.products[0], source="%other = linear()"),))
    assert made != other and cpp.kernel(made, "f32") is cpp.kernel(other, "f32")


def test_texts_are_the_same_for_equal_specs() -> None:
    one, two = (build(Case("uint4:g32", "i8:token"), 4, seed).kernel for seed in (1, 2))
    assert cpp.text_of(one, "f32") == cpp.text_of(two, "f32")
    assert str(Path.home()) not in cpp.text_of(one, "f32")
    assert cpp_gemm.body(one, "f32") == cpp_gemm.body(two, "f32")
