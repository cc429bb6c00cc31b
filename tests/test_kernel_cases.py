"""bench/kernel_cases.py: a kernel at another size is the same kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from planish.codegen.kernel_spec import Activation, Kernel, Product, Step, Tensor, Weight

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import kernel_cases

GEMM = Kernel(
    "gemm", 256, 704,
    (
        Tensor("a", "i8", ("M", 128), "input", packed=2), Tensor("a_scale", "f32", ("M", 4), "input"),
        Tensor("weight", "i8", (704, 128), "weight", packed=2), Tensor("weight_scale", "f32", (4, 704), "weight"),
        Tensor("bias", "f32", (704,), "weight"), Tensor("up", "float", (704, 32), "weight"),
        Tensor("codes", "i8", ("M", 704), "output"), Tensor("scale", "f32", ("M", 22), "output"),
    ),
    (
        Step("hadamard", ("out",), ("v",), (("block", 704), ("base", 44))),
        Step("quantize_group", ("v",), ("codes", "scale"), (("group", 32),)),
    ),
    activation=Activation("codes", "a", 4, "group", 64, "a_scale"),
    products=(Product(Weight("int4", "weight", "weight_scale", group=64, half=32), "out", bias="bias"),),
)  # fmt: skip


def test_every_size_follows_the_widths() -> None:
    made = kernel_cases.resized(GEMM)
    assert (made.columns, made.outputs) == (4096, 11264)
    assert {t.name: t.shape for t in made.tensors} == {
        "a": ("M", 2048), "a_scale": ("M", 64), "weight": (11264, 2048), "weight_scale": (64, 11264),
        "bias": (11264,), "up": (11264, 32), "codes": ("M", 11264), "scale": ("M", 352),
    }  # fmt: skip
    assert made.steps[0].options == (("block", 11264), ("base", 44))
    assert made.steps[1].options == (("group", 32),)
    assert (made.activation, made.products) == (GEMM.activation, GEMM.products)


def test_the_same_widths_give_the_same_kernel() -> None:
    assert kernel_cases.resized(GEMM, {256: 256, 704: 704}) == GEMM
    with pytest.raises(KeyError):
        kernel_cases.resized(GEMM, {256: 4096})
