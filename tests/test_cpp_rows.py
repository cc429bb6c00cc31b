"""Row programs in C++: against their eager references, against what the spec means, wrong on purpose.

Twice each: as this machine runs them ("native"), and in instructions that most x86 machines have ("x86-64-v3"). Where a
kernel makes the float32 operations of its reference in the same order (`EXACT`), they are equal bit for bit; the others
are judged by the intervals of `kernel_oracle`.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cpp_cases
import kernel_rows
import pytest
import torch
from kernel_oracle import judged, problems
from kernel_rows import EXACT, step, symmetric

from planish.codegen import cpp, cpp_attention, cpp_headers, cpp_rows
from planish.codegen.kernel_spec import Kernel, Tensor
from planish.ir.errors import PlanishError
from planish.kernels import activations
from planish.kernels.table import ROWS as TABLE

X86 = platform.machine() in ("x86_64", "AMD64")
TARGETS = ["native", "x86-64-v3"] if X86 else ["native"]
ROWS = (0, 1, 7, 33)


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An architecture to compile for, with a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLANISH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PLANISH_CPP_ARCH", request.param)
        patch.setitem(kernel_rows.DTYPES, "bf16", torch.bfloat16)
        yield request.param


def named(columns: int, *dtypes: str, names: tuple[str, ...] = (), group: int = 32) -> dict[str, tuple[Kernel, str]]:
    """Row programs by label: name_columns_dtype."""
    found = kernel_rows.kernels(columns, group)
    return {f"{n}_{columns}_{d}": (found[n], d) for n in names or found for d in dtypes}


def eager(kernel: Kernel, dtype: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the reference makes."""
    made = cpp.kernel(kernel, dtype).reference(**given)
    names = [t.name for t in kernel.tensors if t.role == "output"]
    return dict(zip(names, made if isinstance(made, tuple) else (made,), strict=True))


def differing(library: cpp_cases.Library, label: str, count: int, seed: int) -> list[str]:
    """What a kernel computes wrongly; [] if nothing."""
    kernel, dtype = library.named[label]
    given = kernel_rows.given(kernel, count, dtype, seed)
    made = library.run(label, given, threads=1 + count % 2)
    if not count:
        return []
    found = problems(kernel, judged(kernel, given, dtype), made, dtype)
    if label.rpartition("_")[0].rpartition("_")[0] in EXACT:
        expected = eager(kernel, dtype, given)
        found += [f"{name}: not equal" for name in made if not torch.equal(made[name], expected[name])]
    return found


def check(library: cpp_cases.Library, seed: int, counts: tuple[int, ...] = ROWS) -> None:
    for label in library.named:
        for count in counts:
            assert not differing(library, label, count, seed + count), (label, count)


def test_rows(target: str, seed: int) -> None:
    """Ragged rows: no power of two, no multiple of a group or of a span."""
    check(cpp_cases.Library(named(200, *(("f32", "bf16") if target == "native" else ("f32",)))).built(), seed)


def test_columns(target: str, seed: int) -> None:
    picked = ("token", "group4", "rms_token", "layer_range", "static", "low_rank")
    given = {label: one for columns in (1, 5, 64, 513) for label, one in named(columns, "f32", names=picked).items()}
    check(cpp_cases.Library(given).built(), seed, (3,))


@pytest.mark.slow
def test_every_dtype_group_and_order(target: str, seed: int) -> None:
    check(cpp_cases.Library(named(200, "f16", "bf16")).built(), seed)
    for group in (2, 16, 128, 1024):
        check(
            cpp_cases.Library(named(200, "f32", names=("group4", "group8", "relu_unsigned"), group=group)).built(), seed
        )
    for order in (2, 16, 1024, 12, 96, 28 * 16, 60):
        found = kernel_rows.kernels(max(order, 64) if order & (order - 1) == 0 else order, block=order)
        label = f"hadamard_{order}_f32"
        library = cpp_cases.Library({label: (found["hadamard"], "f32")}).built()
        given = kernel_rows.given(found["hadamard"], 7, "f32", seed)
        made = library.run(label, given)
        assert not problems(found["hadamard"], judged(found["hadamard"], given, "f32"), made, "f32"), order
        expected = eager(found["hadamard"], "f32", given)
        assert order & (order - 1) or torch.equal(made["out"], expected["out"]), order


def test_threads_do_not_change_a_bit(target: str, seed: int) -> None:
    picked = ("rms_token", "layer_range", "low_rank")
    library = cpp_cases.Library(named(512, "f32", names=picked)).built()
    for label, (kernel, dtype) in library.named.items():
        given = kernel_rows.given(kernel, 67, dtype, seed)
        one, other = (library.run(label, given, threads=n) for n in (1, 3))
        assert all(torch.equal(one[name], other[name]) for name in one), label


# -- functions -----------------------------------------------------------------------------------

ULPS = {  # units in the last place of what a correctly rounded function gives; of those that cancel: of max(1, |y|)
    "exp": 1.5, "log": 1.5, "sqrt": 0.5, "rsqrt": 1.6, "reciprocal": 0.5, "erf": 1.5, "tanh": 2.0, "sin": 1.0,
    "cos": 1.0, "floor": 0.0, "ceil": 0.0, "neg": 0.0, "abs": 0.0, "relu": 0.0,
}  # fmt: skip
NEAR = {"sigmoid": 1.5e-7, "silu": 2e-7, "gelu": 2e-7, "gelu_tanh": 2e-7, "softplus": 2e-7, "hard_sigmoid": 1.5e-7,
        "hard_swish": 2e-7, "leaky_relu": 1e-7, "elu": 1.5e-7}  # fmt: skip
OPTIONS: dict[str, dict[str, float | str]] = {
    "gelu": {"approximate": "none"}, "gelu_tanh": {"approximate": "tanh"}, "hard_sigmoid": {"alpha": 0.2, "beta": 0.5},
    "leaky_relu": {"alpha": 0.01}, "elu": {"alpha": 1.0},
}  # fmt: skip


def function(name: str, columns: int) -> Kernel:
    """out = f(x)."""
    tensors = tuple(Tensor(n, "float", ("M", columns), r) for n, r in (("x", "input"), ("out", "output")))  # type: ignore[arg-type]
    own = step(name.removesuffix("_tanh") if name == "gelu_tanh" else name, "x", "out", OPTIONS.get(name, {}))  # type: ignore[arg-type]
    return Kernel("prologue", columns, 0, tensors, (own,), row="x")


def true(name: str, x: torch.Tensor) -> torch.Tensor:
    """The function in float64."""
    if name == "gelu":
        return x * torch.special.erfc(-x / 2**0.5) / 2
    if name == "gelu_tanh":
        return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    if name == "softplus":
        return torch.nn.functional.softplus(x, threshold=700.0)
    scope = {"torch": torch} | {n: f for n, f in vars(activations).items() if n.endswith("_reference")}
    row = TABLE[name]
    result: torch.Tensor = eval(row.eager.format("x", **OPTIONS.get(name, {})), scope, {"x": x})
    return result


def test_functions(target: str, seed: int) -> None:
    names = [*ULPS, *NEAR]
    assert {n for n, row in TABLE.items() if row.cpp and "{1}" not in row.cpp} - {*names, "cast"} == set()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-(2**31), 2**31, (40, 997), generator=generator).to(torch.int32).view(torch.float32)
    x = torch.where(x.isfinite(), x, 0.0)
    x[20:30] = torch.randn(10, 997, generator=generator) * 3
    x[30:] = (torch.rand(10, 997, generator=generator) - 0.5) * 200
    library = cpp_cases.Library({f"f_{n}": (function(n, 997), "f32") for n in names}).built()
    for name in names:
        given = x.abs().clamp(min=1e-38) if name in ("log", "sqrt", "rsqrt", "reciprocal") else x
        made = library.run(f"f_{name}", {"x": given})["out"].double()
        wanted = true(name, given.double())
        over = wanted.abs() >= 3.4028235e38
        assert bool((made[over] == wanted[over].sign() * float("inf")).all()), name
        size = wanted.abs() if name in ULPS else wanted.abs().clamp(min=1.0)
        unit = 2.0 ** (torch.floor(torch.log2(size.clamp(min=2.0**-126))) - 23)
        allowed = unit * (ULPS[name] + 0.5) if name in ULPS else NEAR[name] * size
        far = torch.where(over | ((made - wanted).abs() <= allowed), 0.0, (made - wanted).abs() / unit)
        at = int(far.argmax())
        assert not bool(far.any()), (name, given.flatten()[at].item(), made.flatten()[at].item(), far.max().item())


def test_gelus_are_near_everywhere(target: str) -> None:
    """|error| < 1.5e-7 |x|, where one polynomial follows another as well; a wrong coefficient is seen."""
    steps = torch.arange(-(2**18), 2**18, dtype=torch.float32).reshape(-1, 1024) * (6.5 / 2**18)
    kernels = {f"f_{n}": (function(n, 1024), "f32") for n in ("gelu", "gelu_tanh")}
    tables = target == "native" and cpp_attention.suits()
    wrong = ("{0.5f, 0.3613552153110504f,", "{0.5f, 0.361356f,")
    if not tables:
        wrong = ("-0.0004212378116790205f", "-0.000422f")

    def near(name: str, library: cpp_cases.Library) -> bool:
        made = library.built().run(f"f_{name}", {"x": steps})["out"]
        return bool(((made - true(name, steps.double())).abs() <= 1.5e-7 * steps.abs().double()).all())

    assert all(near(name, cpp_cases.Library(kernels)) for name in ("gelu", "gelu_tanh"))
    assert not near("gelu", cpp_cases.Library(kernels, wrong=wrong))


def test_what_is_no_number_stays_none(target: str) -> None:
    names = ["exp", "log", "erf", "tanh", "sigmoid", "silu", "gelu", "softplus"]
    library = cpp_cases.Library({f"f_{n}": (function(n, 3), "f32") for n in names}).built()
    x = torch.tensor([[float("nan"), float("inf"), 0.0]])
    made = {n: library.run(f"f_{n}", {"x": x})["out"][0] for n in names}
    assert all(bool(one[0].isnan()) for one in made.values())
    assert {n: one[1].item() for n, one in made.items()} == {
        "exp": float("inf"), "log": float("inf"), "erf": 1.0, "tanh": 1.0, "sigmoid": 1.0, "silu": float("inf"),
        "gelu": float("inf"), "softplus": float("inf"),
    }  # fmt: skip
    assert made["gelu"][2] == 0.0


# -- behind the products of a gemm ---------------------------------------------------------------


def finish_kernel(columns: int) -> Kernel:
    """silu(acc) acc1, and its codes: as select writes gate and up with the quantise of the next linear."""
    from planish.codegen.kernel_spec import Activation, Product, Weight

    tensors = (
        Tensor("a", "float", ("M", 64), "input"),
        Tensor("codes", "i8", ("M", -(-columns // 64) * 64), "output"),
        Tensor("scale", "f32", ("M",), "output"),
        Tensor("whole", "float", ("M", columns), "scratch"),
    )
    products = tuple(Product(Weight("float", "w"), result) for result in ("acc", "acc1"))
    return Kernel(
        "gemm", 64, columns, tensors, (step("silu", "acc", "v"), step("mul", "v acc1", "whole")),
        (step("quantize_token", "whole", "codes scale", symmetric(8)),), activation=Activation("float", "a"),
        products=products,
    )  # fmt: skip


def parts(kernel: Kernel, dtype: str) -> tuple[str, str]:
    """What runs on a tile of results, and on rows."""
    plan = cpp_rows.tile_plan(kernel, dtype)
    return cpp_rows.tile_function(kernel, plan, dtype).text, cpp_rows.rest_function(kernel, plan, dtype).text


def test_elementwise_steps_run_on_tiles() -> None:
    """With the extreme of the row that the scale of its codes follows from, of what closing steps read: rounded."""
    kernel = finish_kernel(200)
    near, rest = parts(kernel, "bf16")
    assert "const float *acc_row, const float *acc1_row, float *whole_kept, int32_t *scale_top_lanes" in near
    assert "row::order(row::wide(row::narrow<bf16_t>(whole)))" in near
    assert "whole_held = row::wide(row::narrow<bf16_t>(whole))" in rest
    assert "const float *whole_rows, int64_t lanes, const int32_t *scale_top_all, float *scratch" in rest
    near, rest = parts(kernel, "f32")
    assert "row::larger(row::order(whole), scale_top_lanes[j])" in near and "whole_held" not in rest
    assert "row::codes_of<-128, 127>(whole_row, 200, scale_inverse, 0, codes_to)" in rest


def test_extremes_come_with_the_tiles_that_make_all_of_a_value() -> None:
    """A step that other columns are read by stands between: its row is reduced where it is made."""
    kernel = finish_kernel(200)
    norm = step("rms_norm", "whole", "normed", {"eps": 1e-5})
    quantise = step("quantize_token", "normed", "codes scale", symmetric(8))
    for steps, closing in (((), (norm, quantise)), ((norm,), (quantise,))):
        made = replace(kernel, steps=(*kernel.steps, *steps), closing=closing)
        plan = cpp_rows.tile_plan(made, "f32")
        assert (plan.near, plan.kept, plan.extremes) == (2, ("whole",), ())
        assert "reduction(max : scale_top_size)" in cpp_rows.rest_function(made, plan, "f32").text
    norm = step("rms_norm", "acc", "normed", {"eps": 1e-5})
    plain = cpp_rows.tile_plan(replace(kernel, steps=(), closing=(norm,)), "f32")
    assert not plain.direct and plain.kept == ("acc",)  # the other product is not kept


def test_finish_gathers_from_what_it_makes() -> None:
    kernel = finish_kernel(200)
    gather = step("gather", "whole loud", "left", {"columns": 5})
    more = (Tensor("loud", "i32", (5,), "weight"), Tensor("left", "float", ("M", 5), "output"))
    kernel = replace(kernel, tensors=(*kernel.tensors, *more), closing=(*kernel.closing, gather))
    assert "row::wide(whole_row[loud_row[j]])" in parts(kernel, "f32")[1]
    assert "row::wide(whole_held_row[loud_row[j]])" in parts(kernel, "bf16")[1]


def test_columns_of_a_row_take_no_whole_rows() -> None:
    kernel = finish_kernel(200)
    made = cpp_rows.row_function(kernel, kernel.steps, "f32", accumulators=("acc", "acc1"), whole=False)
    assert "int64_t first, int64_t last" in made.text
    assert "for (int64_t j = first; j < last; ++j)" in made.text
    with pytest.raises(PlanishError, match="step 'quantize_token': it needs whole rows"):
        cpp_rows.row_function(kernel, kernel.closing, "f32", accumulators=("whole",), whole=False)


def test_unknown_steps_and_headers() -> None:
    kernel = Kernel("prologue", 8, 0, kernel_rows.kernels(8)["token"].tensors, (step("down", "x x", "codes"),), row="x")
    assert cpp_headers.ordered(["functions.h", "base.h"]) == ["base.h", "functions.h"]
    with pytest.raises(PlanishError, match=r"header 'quantise.h': there is none in planish/kernels/cpp"):
        cpp_headers.text(["quantise.h"])
    assert kernel.steps[0].row == "down"


# -- wrong on purpose ----------------------------------------------------------------------------

WRONG = [
    ("token", "x * scale_inverse", "x"),
    ("token", "row::scale_of(scale_top, 127.0f)", "row::scale_of(scale_top, 128.0f)"),
    ("token", "row::larger(row::order(x), scale_top_size)", "row::larger(row::order(row::above(x)), scale_top_size)"),
    ("token", "extreme == 0.0f ? 1.0f : ", ""),
    ("token", "for (int j = 200; j < 256; ++j) codes_to[j] = 0;", ""),
    ("token", "__builtin_irintf(minimum(", "(int32_t)(minimum("),
    ("token4", "codes[start + j] & 15) | (uint8_t)((uint8_t)codes[start + 32 + j] << 4)",
     "codes[start + 32 + j] & 15) | (uint8_t)((uint8_t)codes[start + j] << 4)"),
    ("range", "clamp(__builtin_rintf(-bottom / scale), 0.0f, levels) + low",
     "clamp(__builtin_rintf(-bottom / scale), 0.0f, levels)"),
    ("range", "row::order(row::below(x))", "row::order(row::below(0.9f * x))"),
    ("floor", "__builtin_floorf(1.0f", "(1.0f"),
    ("group4", "scales[start / group] = scale", "scales[start / group] = inverse"),
    ("group8", "start + group < last ? start + group : last", "start + group"),
    ("static", "row::shifted_code(x * step_inverse, (int32_t)middle", "row::shifted_code(x * step_inverse, 0"),
    ("rms_token", "v_squares / 200.0f", "v_squares / 199.0f"),
    ("layer_range", "out_sum / 200.0f", "out_sum / 201.0f"),
    ("layer_range", " + bias", ""),
    ("hadamard", "own ^ half", "own ^ 0"),
    ("hadamard", "second & INT32_MIN", "~second & INT32_MIN"),
    ("hadamard_back", " * signs;", ";"),
    ("permute", "[index_row[j]]", "[j]"),
    ("reassemble", "made[j] + x[place[j]] * factor[j]", "made[j] + x[place[j]]"),
    ("low_rank", "sums[r] += held", "sums[r] += held + held"),
    ("gelu_floor", "row::gelus(x_row, 200, v_row)", "row::gelus(x_row, 199, v_row)"),
    ("silu_mul_group", "x / (1.0f + exp_normal(-x))", "x / (1.0f + exp_normal(x))"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [pytest.param(*one, marks=() if i < 4 else pytest.mark.slow) for i, one in enumerate(WRONG)],
)
def test_wrong_programs_are_seen(
    name: str, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path))
    label = f"{name}_200_f32"
    library = cpp_cases.Library(named(200, "f32", names=(name,)), wrong=(right, wrong)).built()
    with pytest.raises(AssertionError):
        assert not differing(library, label, 33, seed)
