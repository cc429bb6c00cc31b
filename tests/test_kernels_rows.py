"""Row programs in Triton's interpreter: against their eager references, against what the spec means, wrong on purpose.

Where a kernel and its reference make the same float32 operations in the same order, they are equal bit for bit
(`EXACT`): ranges are extremes, which no order changes, a Hadamard transform of a power of two adds pairs, codes are a
product with 1 / scale and one rounding. Norms and low-rank downs are sums, whose order differs: those are judged by the
intervals of `kernel_oracle`, which allow a neighbouring code only where a ratio lies within its float32 error of a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import kernel_rows
import pytest
import torch
from kernel_oracle import judged, problems
from kernel_rows import EXACT

from planish.codegen import row_writer, triton, triton_rows, triton_source
from planish.codegen.aot import Failure, compile_all
from planish.codegen.kernel_spec import Kernel
from planish.codegen.sheet import job
from planish.codegen.triton_file import results

ROWS = (1, 7, 16, 33, 128)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own."""
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))


def outputs(kernel: Kernel, made: torch.Tensor | tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    held = made if isinstance(made, tuple) else (made,)
    return {t.name: one for t, one in zip(results(kernel), held, strict=True)}


def differing(kernel: Kernel, module: ModuleType, count: int, dtype: str, seed: int, *, exact: bool) -> list[str]:
    """What the kernel, or its reference, computes wrongly; [] if nothing."""
    given = kernel_rows.given(kernel, count, dtype, seed)
    made, eager = (outputs(kernel, f(**given)) for f in (module.run, module.reference))
    expected = judged(kernel, given, dtype)
    found = [f"kernel {line}" for line in problems(kernel, expected, made, dtype)]
    found += [f"reference {line}" for line in problems(kernel, expected, eager, dtype)]
    if exact:
        found += [f"{name}: not equal" for name in made if not torch.equal(made[name], eager[name])]
    return found


def loaded(kernel: Kernel, dtype: str) -> ModuleType:
    return triton.load(triton.emit_kernel(kernel, dtype))


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("name", list(kernel_rows.kernels(64)))
def test_rows(name: str, dtype: str, seed: int) -> None:
    kernel = kernel_rows.kernels(200)[name]  # ragged: no power of two, no multiple of a group or of a span
    module = loaded(kernel, dtype)
    for count in ROWS:
        assert not differing(kernel, module, count, dtype, seed + count, exact=name in EXACT), (name, count)


@pytest.mark.parametrize("columns", [1, 5, 64, 96, 513])
def test_columns(columns: int, seed: int) -> None:
    for name in ("token", "group4", "rms_token", "layer_range", "static", "low_rank"):
        kernel = kernel_rows.kernels(columns)[name]
        found = differing(kernel, loaded(kernel, "f16"), 7, "f16", seed, exact=name in EXACT)
        assert not found, (name, columns)


@pytest.mark.parametrize("group", [2, 16, 128, 256, 1024])
def test_groups(group: int, seed: int) -> None:
    for name in ("group4", "group8", "relu_unsigned"):
        kernel = kernel_rows.kernels(200, group)[name]
        assert not differing(kernel, loaded(kernel, "f16"), 7, "f16", seed, exact=True), (name, group)


@pytest.mark.parametrize("block", [2, 16, 1024, 4096])
def test_hadamard_powers(block: int, seed: int) -> None:
    columns = max(block, 64)
    for name in ("hadamard", "hadamard_back"):
        kernel = kernel_rows.kernels(columns, block=block)[name]
        assert not differing(kernel, loaded(kernel, "f32"), 2, "f32", seed, exact=True), (name, block)


@pytest.mark.parametrize("order", [12, 24, 96, 40, 28 * 16, 44 * 2, 36 * 4, 60])
def test_hadamard_with_a_dense_factor(order: int, seed: int) -> None:
    for name in ("hadamard", "hadamard_back", "turned_low_rank"):
        kernel = kernel_rows.kernels(order, block=order)[name]
        assert not differing(kernel, loaded(kernel, "f16"), 7, "f16", seed, exact=False), (name, order)


def test_low_rank_by_tensor_cores_and_by_sums(seed: int) -> None:
    for name in ("low_rank", "turned_low_rank"):
        kernel = kernel_rows.kernels(200)[name]
        module = loaded(kernel, "f16")
        given = kernel_rows.given(kernel, 17, "f16", seed)
        for block, tile in ((16, 4), (32, 32), (4, 2)):
            made = outputs(kernel, module.run(**given, launch=module.Launch(BLOCK_M=block, ROWS=tile)))
            assert not problems(kernel, judged(kernel, given, "f16"), made, "f16"), (name, block, tile)


def test_low_rank_behind_a_large_transform(seed: int) -> None:
    """The transform mixes more columns than one step of the low-rank down has: rows are held, a sum for each rank."""
    kernel = kernel_rows.kernels(1024)["turned_low_rank"]
    text = triton_rows.body(kernel, "f16").kernel
    assert "for r in range(5)" in text
    assert "BLOCK_K" not in text
    assert not differing(kernel, loaded(kernel, "f16"), 3, "f16", seed, exact=False)


@pytest.mark.parametrize("name", [n for n in kernel_rows.kernels(64) if n != "turned_low_rank"])
def test_rows_in_parts(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are too long to be held, at a size that the interpreter runs."""
    monkeypatch.setattr(row_writer, "LARGEST", 128)
    monkeypatch.setattr(row_writer, "PART", 64)
    monkeypatch.setattr(triton_rows, "PART", 64)
    kernel = kernel_rows.kernels(190)[name]  # a size of its own: files are kept by spec
    assert "for start in range(0, " in triton_rows.body(kernel, "f16").kernel
    found = differing(kernel, loaded(kernel, "f16"), 7, "f16", seed, exact=name in EXACT)
    assert not found, name


# -- within another kernel -----------------------------------------------------------------------

CLOSING = """
import triton
import triton.language as tl

{functions}

@triton.jit
def kernel({pointers}, M, BLOCK_M: tl.constexpr, ROWS: tl.constexpr):
    first = tl.program_id(0) * BLOCK_M
    if first < M:
{lines}
"""


@pytest.mark.parametrize("name", ["rms_token", "outliers", "low_rank", "hadamard", "layer_range"])
def test_closing(name: str, tmp_path: Path, seed: int) -> None:
    """The same program on the rows of one tile of another kernel."""
    kernel, count = kernel_rows.kernels(200)[name], 21
    lines, calls = triton_rows.closing(kernel.steps, kernel.tensors, kernel.columns, 2)
    assert any('cache_modifier=".cg"' in line for line in lines)
    path = tmp_path / "closing.py"
    functions = "\n\n".join(piece.text for piece in triton_source.gathered(calls))
    pointers = ", ".join(f"{t.name}_ptr" for t in kernel.tensors)
    path.write_text(CLOSING.format(functions=functions, pointers=pointers, lines="\n".join(lines)))
    given = kernel_rows.given(kernel, count, "f16", seed)
    shapes = {t.name: [count if d == "M" else d for d in t.shape] for t in results(kernel)}
    kinds = {"float": torch.float16, "f32": torch.float32, "i8": torch.int8}
    made = {t.name: torch.full(shapes[t.name], 77, dtype=kinds[t.dtype]) for t in results(kernel)}
    run = triton.load_file(path).kernel[(2,)]
    run(*(given.get(t.name, made.get(t.name)) for t in kernel.tensors), count, BLOCK_M=16, ROWS=4)
    assert not problems(kernel, judged(kernel, given, "f16"), made, "f16")


# -- machine code --------------------------------------------------------------------------------


def spilled(names: Sequence[str], target: str, columns: int, warps: int) -> list[str]:
    """The kernels that do not compile for a target, or whose registers spill there; the interpreter sees neither."""
    found, kernels = [], kernel_rows.kernels(columns, group=64)
    launch = {"num_warps": warps, "num_stages": 2}
    jobs = [job(triton.emit_kernel(kernels[name]).text, target, launch) for name in names]
    for name, made in zip(names, compile_all(jobs), strict=True):
        if isinstance(made, Failure) or made.spills or not made.counts.get("load_16"):
            found.append(f"{name}: {made}")
    return found


def test_machine_code() -> None:
    assert not spilled(["rms_token", "hadamard", "low_rank"], "sm_90", 1024, 4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_machine_code_of_every_row(target: str) -> None:
    assert not spilled(list(kernel_rows.kernels(64)), target, 4096, 4)


# -- wrong on purpose ----------------------------------------------------------------------------

WRONG = [
    ("token", "x * (1.0 / scale)[:, None]", "x"),
    ("token", "token_scale(scale_top, 127.0)", "token_scale(scale_top, 128.0)"),
    ("token", "tl.max(tl.abs(x), 1)", "tl.max(x, 1)"),
    ("token", "mask_k = offs_k < 200", "mask_k = offs_k < 199"),
    ("token", "mask_m = offs_m < M", "mask_m = offs_m < M - 1"),
    ("token4", "(low & 15) | ((high & 15) << 4)", "(high & 15) | ((low & 15) << 4)"),
    ("range", "+ LOW", ""),
    ("range", "token_zero(scale_bottom", "token_zero(0.9 * scale_bottom"),
    ("floor", "tl.floor(", "("),
    ("group4", "tl.where(extreme == 0.0, 1.0, ", "(0.0 + "),
    ("group8", "scales_groups < 7", "scales_groups < 6"),
    ("static", "+ zero", ""),
    ("affine", "v1 = v + bias", "v1 = v"),
    ("permute", "[:, None] * 200 + v_index[None, :]", "[:, None] * 200 + offs_k[None, :]"),
    ("reassemble", "v_sum1 + ", ""),
    ("hadamard", "tl.join(a + b, a - b)", "tl.join(a - b, a + b)"),
    ("hadamard", "x * signs", "x"),
    ("hadamard_back", " * signs", ""),
    ("rms_token", " * gain", ""),
    ("rms_token", "200.0, 1e-06", "256.0, 1e-06"),
    ("layer_range", "tl.where(mask_k[None, :], x - out_mean[:, None], 0.0)", "x - out_mean[:, None]"),
    ("outliers", "v_factor[:, None] * gain_5_left_index", "v_factor[:, None]"),
    ("low_rank", "mask_k_block = offs_k_block < 200", "mask_k_block = offs_k_block < 199"),
    ("low_rank", "start + tl.arange(0, BLOCK_K)", "tl.arange(0, BLOCK_K)"),
]


@pytest.mark.parametrize(("name", "old", "new"), WRONG)
def test_a_wrong_kernel_is_seen(name: str, old: str, new: str, tmp_path: Path, seed: int) -> None:
    kernel = kernel_rows.kernels(200)[name]
    text = triton.emit_kernel(kernel, "f16").text
    assert old in text
    path = tmp_path / "wrong.py"
    path.write_text(text.replace(old, new))
    module = triton.load_file(path)
    assert any("kernel" in line or "equal" in line for line in differing(kernel, module, 7, "f16", seed, exact=False))
