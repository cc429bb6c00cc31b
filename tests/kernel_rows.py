"""Specs of row programs, and rows to run them on: zeros, huge values, all-negative rows among them."""

from __future__ import annotations

import torch

from planish.codegen.kernel_spec import Kernel, Option, Step, Tensor, padded
from planish.codegen.row_weights import hadamard_base, hadamard_matrix, segment_tables

RANK = 5
EPS = {"eps": 1e-6}
DTYPES = {"f16": torch.float16, "f32": torch.float32}


def symmetric(bits: int) -> dict[str, Option]:
    most = 2 ** (bits - 1) - 1
    return {"bits": bits, "signed": True, "mode": "symmetric", "levels": float(most), "low": -most - 1, "high": most}


RANGE = {"bits": 8, "signed": True, "mode": "range", "levels": 255.0, "low": -128, "high": 127}
FLOOR = {**RANGE, "mode": "floor", "floor": 0.171875}
UNSIGNED = {"bits": 4, "signed": False, "mode": "symmetric", "levels": 15.0, "low": 0, "high": 15}
STATIC = {"bits": 8, "signed": True, "low": -128, "high": 127}


def step(row: str, reads: str, writes: str, options: dict[str, Option] | None = None) -> Step:
    """A step; "-" stands for an operand that is absent."""
    given = tuple("" if name == "-" else name for name in reads.split())
    return Step(row, given, tuple(writes.split()), tuple((options or {}).items()))


def _tensors(columns: int, names: str, group: int, block: int, bits: int) -> list[Tensor]:
    base = hadamard_base(block)
    known = {
        "x": Tensor("x", "float", ("M", columns), "input"),
        "other": Tensor("other", "float", ("M", columns), "input"),
        "gain": Tensor("gain", "float", (columns,), "weight"),
        "bias": Tensor("bias", "float", (columns,), "weight"),
        "by": Tensor("by", "f32", (columns,), "weight"),
        "signs": Tensor("signs", "f32", (columns,), "weight"),
        "matrix": Tensor("matrix", "i8", (base, base), "weight"),
        "index": Tensor("index", "i32", (columns,), "weight"),
        "loud": Tensor("loud", "i32", (RANK,), "weight"),
        "places": Tensor("places", "i32", (3, columns), "weight"),
        "parts": Tensor("parts", "f32", (3, columns), "weight"),
        "down": Tensor("down", "float", (RANK, columns), "weight"),
        "step": Tensor("step", "f32", (), "weight"),
        "middle": Tensor("middle", "i8", (), "weight"),
        "left": Tensor("left", "float", ("M", RANK), "output"),
        "out": Tensor("out", "float", ("M", columns), "output"),
        "codes": Tensor("codes", "i8", ("M", padded(columns) * bits // 8), "output", 8 // bits),
        "scale": Tensor("scale", "f32", ("M",), "output"),
        "zero": Tensor("zero", "i8", ("M",), "output"),
        "scales": Tensor("scales", "f32", ("M", -(-columns // group)), "output"),
    }
    return [known[name] for name in names.split()]


def kernels(columns: int, group: int = 32, block: int = 0) -> dict[str, Kernel]:
    """Row programs over rows of so many columns, by name.

    Args:
        group: of the groups.
        block: of the Hadamard transforms; 0: the largest power of two that divides the columns.
    """
    block = block or columns & -columns
    base = hadamard_base(block)
    matrix = "matrix" if base > 1 else "-"
    turn: dict[str, Option] = {"block": block, "transpose": False, "base": base}
    back = {**turn, "transpose": True}

    def made(names: str, *steps: Step, bits: int = 8) -> Kernel:
        return Kernel("prologue", columns, 0, tuple(_tensors(columns, names, group, block, bits)), steps, row="x")

    grouped = {**symmetric(4), "group": group}
    return {
        "token": made("x codes scale", step("quantize_token", "x", "codes scale", symmetric(8))),
        "token4": made("x codes scale", step("quantize_token", "x", "codes scale", symmetric(4)), bits=4),
        "range": made("x codes scale zero", step("quantize_token", "x", "codes scale zero", RANGE)),
        "floor": made("x codes scale", step("quantize_token", "x", "codes scale", FLOOR)),
        "group4": made("x codes scales", step("quantize_group", "x", "codes scales", grouped), bits=4),
        "group8": made("x codes scales", step("quantize_group", "x", "codes scales", {**symmetric(8), "group": group})),
        "static": made("x step middle codes", step("quantize_static", "x step middle", "codes", STATIC)),
        "affine": made(
            "x by bias other out codes scale",
            step("mul", "x by", "v"),
            step("add", "v bias", "v1"),
            step("mul", "v1 other", "out"),
            step("quantize_token", "out", "codes scale", symmetric(8)),
        ),
        "relu_unsigned": made(
            "x codes scales",
            step("relu", "x", "v"),
            step("quantize_group", "v", "codes scales", {**UNSIGNED, "group": group}),
            bits=4,
        ),
        "permute": made(
            "x index codes scales",
            step("gather", "x index", "v", {"columns": columns}),
            step("quantize_group", "v", "codes scales", grouped),
            bits=4,
        ),
        "reassemble": made(
            "x places parts codes scale",
            step("reassemble", "x places parts", "v", {"columns": columns, "terms": 3}),
            step("quantize_token", "v", "codes scale", symmetric(4)),
            bits=4,
        ),
        "hadamard": made(
            "x signs" + (" matrix" if base > 1 else "") + " out codes scale",
            step("hadamard", f"x signs {matrix}", "out", turn),
            step("quantize_token", "out", "codes scale", symmetric(8)),
        ),
        "hadamard_back": made(
            "x signs" + (" matrix" if base > 1 else "") + " codes scales",
            step("hadamard", f"x signs {matrix}", "v", back),
            step("quantize_group", "v", "codes scales", grouped),
            bits=4,
        ),
        "rms_token": made(
            "x gain codes scale",
            step("rms_norm", "x gain -", "v", EPS),
            step("quantize_token", "v", "codes scale", symmetric(8)),
        ),
        "layer_range": made(
            "x gain bias out codes scale zero",
            step("layer_norm", "x gain bias", "out", EPS),
            step("quantize_token", "out", "codes scale zero", RANGE),
        ),
        "residual_static": made(
            "x other step out codes",
            step("add", "x other", "out"),
            step("layer_norm", "out - -", "v", EPS),
            step("quantize_static", "v step -", "codes", STATIC),
        ),
        "gelu_floor": made(
            "x codes scale",
            step("gelu", "x", "v", {"approximate": "none"}),
            step("quantize_token", "v", "codes scale", FLOOR),
        ),
        "silu_mul_group": made(
            "x other codes scales",
            step("silu", "x", "v"),
            step("mul", "v other", "v1"),
            step("quantize_group", "v1", "codes scales", grouped),
            bits=4,
        ),
        "outliers": made(
            "x gain by loud codes scale left",
            step("rms_norm", "x gain -", "v", EPS),
            step("mul", "v by", "v1"),
            step("quantize_token", "v1", "codes scale", symmetric(8)),
            step("gather", "v loud", "left", {"columns": RANK}),
        ),
        "low_rank": made(
            "x by down codes scales left",
            step("rms_norm", "x - -", "v", EPS),
            step("mul", "v by", "v1"),
            step("quantize_group", "v1", "codes scales", grouped),
            step("down", "v down", "left", {"rank": RANK}),
            bits=4,
        ),
        "turned_low_rank": made(
            "x" + (" matrix" if base > 1 else "") + " down codes scales left",
            step("rms_norm", "x - -", "v", EPS),
            step("hadamard", f"v - {matrix}", "v1", turn),
            step("quantize_group", "v1", "codes scales", grouped),
            step("down", "v1 down", "left", {"rank": RANK}),
            bits=4,
        ),
    }


# kernels whose float32 operations are those of their reference, in the same order: nothing is summed, or in pairs
EXACT = ("token", "token4", "range", "floor", "group4", "group8", "static", "affine", "relu_unsigned", "permute",
         "reassemble", "hadamard", "hadamard_back")  # fmt: skip


def rows(generator: torch.Generator, count: int, columns: int, huge: float) -> torch.Tensor:
    """Rows [count, columns] in turn: normal, zero, huge, all negative, one outlier, small, all positive."""
    x = torch.randn(count, columns, generator=generator)
    turn = torch.arange(count) % 7
    x[turn == 1] = 0.0
    x[turn == 2] *= huge
    x[turn == 3] = -x[turn == 3].abs() - 0.01
    x[turn == 4, columns // 2] = 200.0
    x[turn == 5] *= 1e-3
    x[turn == 6] = x[turn == 6].abs() + 0.01
    return x


def given(kernel: Kernel, count: int, dtype: str, seed: int) -> dict[str, torch.Tensor]:
    """Inputs and weights of a kernel for so many rows."""
    generator = torch.Generator().manual_seed(seed)
    columns, held = kernel.columns, DTYPES[dtype]
    turned = next((dict(s.options) for s in kernel.steps if s.row == "hadamard"), {"block": 1, "transpose": False})
    sizes = torch.ones(columns, dtype=torch.int64)
    sizes[: columns // 4] = torch.randint(1, 4, (columns // 4,), generator=generator)
    sizes[0] = 3
    entries = int(sizes.sum())
    places, parts = segment_tables(
        torch.randint(0, columns, (entries,), generator=generator), sizes, torch.randn(entries, generator=generator)
    )
    matrix = hadamard_matrix(int(turned["block"]), bool(turned["transpose"]))
    huge = 1e3 if dtype == "f16" else 1e12
    made = {
        "x": lambda: rows(generator, count, columns, huge).to(held),
        "other": lambda: torch.randn(count, columns, generator=generator).to(held),
        "gain": lambda: torch.randn(columns, generator=generator).to(held),
        "bias": lambda: torch.randn(columns, generator=generator).to(held),
        "by": lambda: (torch.rand(columns, generator=generator) > 0.1) * torch.rand(columns, generator=generator),
        "signs": lambda: torch.randint(0, 2, (columns,), generator=generator).float() * 2 - 1,
        "matrix": lambda: matrix,
        "index": lambda: torch.randperm(columns, generator=generator).to(torch.int32),
        "loud": lambda: torch.randperm(columns, generator=generator)[:RANK].to(torch.int32),
        "places": lambda: places,
        "parts": lambda: parts,
        "down": lambda: (torch.randn(RANK, columns, generator=generator) / columns**0.5).to(held),
        "step": lambda: torch.tensor(0.031),
        "middle": lambda: torch.tensor(-17, dtype=torch.int8),
    }
    return {t.name: made[t.name]() for t in kernel.tensors if t.role == "input" or t.role == "weight"}
