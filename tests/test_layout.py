"""The kernels' own layout: its bytes, round trips, and what it keeps of tensors that come from other containers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from gemm_cases import Case, Made, build, run, weight_of
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.codegen import containers, regions
from planish.codegen.containers import triton as layout
from planish.codegen.kernel_spec import SPAN, half_of, padded
from planish.ir.errors import PlanishError
from planish.ir.formats import Format
from planish.ir.qtensor import QTensor
from planish.ir.rounding import quantize_array

FORMATS = [
    *(f"{sign}int{bits}:{group}" for sign in ("", "u") for bits in (2, 4, 8) for group in ("tensor", "channel", "g32")),
    "int4:g64:f16", "uint4:g16:bf16", "uint2:g64:f16:split2", "uint2:channel:split3", "int4:g32:split4",
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))


def example(text: str, rows: int = 6, columns: int = 96, seed: int = 0) -> QTensor:
    return weight_of(Case(text, outputs=rows, columns=columns), np.random.default_rng(seed))


def same(one: QTensor, two: QTensor) -> None:
    """The same numbers, in the same scales."""
    assert one.shape == two.shape
    assert np.array_equal(one.dequantize(), two.dequantize())
    assert one.scale_dtype == two.scale_dtype


# -- bytes ---------------------------------------------------------------------------------------


def test_where_a_code_lies() -> None:
    """Byte c % half of a span has column c in its bits from bits * (c // half) on, as code + 2^(bits - 1)."""
    for bits in (2, 4):
        codes = np.arange(2 * SPAN).reshape(1, -1) * 7 % 2**bits - 2 ** (bits - 1)
        q = QTensor(codes.astype(np.int8), f"i{bits}", 0, None, np.ones(1))
        held = containers.pack(q, "triton").array("codes").view(np.uint8)
        assert held.shape == (1, 2 * SPAN * bits // 8)
        half = half_of(bits)
        for c in range(2 * SPAN):
            byte = int(held[0, c // SPAN * half + c % half])
            assert (byte >> bits * (c % SPAN // half)) & (2**bits - 1) == codes[0, c] + 2 ** (bits - 1)


def test_bytes() -> None:
    """One span by hand: codes 0 to 63 modulo 16, halves of 32: column j and column j + 32 in byte j."""
    q = QTensor(np.arange(64, dtype=np.uint8).reshape(1, 64) % 16, "u4", 0, None, np.ones(1), zero=np.array([8.0]))
    packed = containers.pack(q, "triton")
    assert packed.array("codes").view(np.uint8).tobytes().hex() == "00112233445566778899aabbccddeeff" * 2
    assert packed.array("zero").tolist() == [0]  # of signed codes: 8 less 8
    q = QTensor(np.array([[-128, 127, 0]], np.int8), "i8", 0, None, np.ones(1))
    assert containers.pack(q, "triton").array("codes").tolist() == [[-128, 127, 0] + [0] * 61]
    q = QTensor(np.array([[0, 255]], np.uint8), "u8", None, None, np.ones(()), zero=np.array(3.0))
    packed = containers.pack(q, "triton")
    assert packed.array("codes")[0, :2].tolist() == [-128, 127]
    assert packed.array("zero").tolist() == [-125]
    assert packed.array("scale").tolist() == [1.0]


def test_ids() -> None:
    """Two clusters: a bit an element, eight columns of a span in a byte; three: two bits, four columns."""
    for clusters, bits in ((2, 1), (3, 2), (4, 2)):
        q = example(f"uint2:channel:split{clusters}", 3, 100)
        held = containers.pack(q, "triton").array("ids")
        assert held.shape == (3, 128 * bits // 8)
        half, c = half_of(bits), np.arange(100)
        found = held[:, c // SPAN * half + c % half] >> (bits * (c % SPAN // half)) & (2**bits - 1)
        assert q.clusters is not None
        assert np.array_equal(found, q.clusters)


def test_shapes_and_dtypes() -> None:
    packed = containers.pack(example("uint4:g32:f16", 5, 100), "triton")
    assert packed.array("codes").shape == (5, 64)
    assert packed.array("scale").shape == packed.array("zero").shape == (4, 5)
    assert packed.array("scale").dtype == np.float16
    assert packed.array("zero").dtype == np.int8
    assert "zero" not in containers.pack(example("int4:g32"), "triton").arrays
    packed = containers.pack(example("uint2:g64:f16:split2", 5, 100), "triton")
    assert packed.array("scale").shape == (2, 2, 5)
    floats = dataclasses.replace(example("uint4:g32"), zero=np.full((6, 3), 7.25), zero_is_float=True)
    packed = containers.pack(floats, "triton")
    assert packed.array("zero").dtype == np.float32
    assert (packed.array("zero") == 7.25).all()  # of unsigned codes, as they are
    signed = dataclasses.replace(example("int4:g32"), zero=np.full((6, 3), 0.25), zero_is_float=True)
    assert (containers.pack(signed, "triton").array("zero") == 8.25).all()
    assert packed.nbytes == sum(a.nbytes for a in packed.arrays.values())


def test_padding_is_no_more_than_a_span() -> None:
    for columns in (1, 63, 64, 65, 4096):
        held = containers.pack(example("int4:channel", 2, columns), "triton").array("codes")
        assert held.shape[1] * 2 == padded(columns) < columns + SPAN


def test_activations_lie_like_weights() -> None:
    """Codes of activations and of weights meet in a kernel: the same columns in the same planes."""
    codes = np.random.default_rng(0).integers(0, 16, (3, 100))
    one = regions.pack_codes(torch.from_numpy(codes), 4, 0).numpy().view(np.uint8)
    assert np.array_equal(one, layout.planes(codes, 4))


# -- round trips ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 5), st.integers(1, 150), st.integers(0, 99), st.booleans())
def test_round_trip(text: str, rows: int, columns: int, seed: int, float_zero: bool) -> None:
    case = Case(text, outputs=rows, columns=columns, float_zero=float_zero)
    q = weight_of(case, np.random.default_rng(seed))
    packed = containers.pack(q, "triton")
    again = containers.unpack(packed)
    same(q, again)
    twice = containers.pack(again, "triton")
    assert {k: v.tobytes() for k, v in twice.arrays.items()} == {k: v.tobytes() for k, v in packed.arrays.items()}
    assert twice.attributes == packed.attributes


OTHERS = ["matmul-nbits", "dequantize-linear", "int-quantized", "pack-quantized", "gather-block-quantized"]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMATS), st.sampled_from(OTHERS), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_numbers_survive_other_containers(text: str, other: str, rows: int, groups: int, seed: int) -> None:
    q = example(text, rows, 32 * groups, seed)
    if containers.refusal(q, other) is not None:
        return
    back = containers.unpack(containers.pack(containers.unpack(containers.pack(q, "triton")), other))
    same(q, containers.unpack(containers.pack(back, "triton")))


@pytest.mark.parametrize("other", OTHERS[:4])
@pytest.mark.parametrize("text", ["int8:channel", "int4:g32", "uint4:g32", "uint2:g32", "int4:channel"])
def test_the_kernel_gives_the_same_after_another_container(text: str, other: str) -> None:
    """Exported and read back: the same bits from the kernel, on codes and on floats."""
    for left, dtype in (("i8:token", "f32"), ("float", "f16")):
        case = Case(text, left, 24, 96, dtype=dtype)
        made = build(case, 9)
        q = weight_of(case, _rng_of(case, 9))
        assert np.array_equal(containers.pack(q, "triton").array("codes"), made.held["weight"].numpy())
        back = containers.unpack(containers.pack(q, other))
        if back.block != q.block:  # matmul-nbits repeats a channel's scale over blocks
            back = dataclasses.replace(back, axis=0, block=None, scale=back.scale[:, 0],
                                       zero=None if back.zero is None else back.zero[:, 0])  # fmt: skip
        assert _swapped(made, back) is not None
        one, two = run(made, dtype, BLOCK_M=16, BLOCK_N=32), run(_swapped(made, back), dtype, BLOCK_M=16, BLOCK_N=32)
        assert torch.equal(one["out"], two["out"])


def _rng_of(case: Case, rows: int) -> np.random.Generator:
    """The generator of `build` where it draws the weight."""
    from gemm_cases import _left

    rng = np.random.default_rng(0)
    _left(case, rows, rng)
    return rng


def _swapped(made: Made, q: QTensor) -> Made:
    """The same gemm with another weight of the same kind; zero points that a container drops are written out."""
    arrays = dict(containers.pack(q, "triton").arrays)
    if "weight_zero" in made.held and "zero" not in arrays:
        arrays["zero"] = np.zeros_like(made.held["weight_zero"].numpy())
    if "weight_zero" not in made.held:
        assert not arrays.pop("zero", np.zeros(1)).any()
    names = {"codes": "weight", "scale": "weight_scale", "zero": "weight_zero", "ids": "weight_ids"}
    held = made.held | {names[k]: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
    return dataclasses.replace(made, held=held)


def test_a_wrong_layout_shows() -> None:
    """Nibbles swapped, a span moved: another result."""
    case = Case("int4:g32", "i8:token", 24, 128, dtype="f32")
    made = build(case, 9)
    one = run(made, "f32", BLOCK_M=16, BLOCK_N=32)["out"]
    bytes_ = made.held["weight"].numpy().view(np.uint8)
    for wrong in (bytes_ >> 4 | bytes_ << 4, np.roll(bytes_, 1, 1), np.roll(bytes_, half_of(4), 1)):
        other = dataclasses.replace(made, held=made.held | {"weight": torch.from_numpy(wrong.view(np.int8).copy())})
        assert not torch.equal(one, run(other, "f32", BLOCK_M=16, BLOCK_N=32)["out"])


# -- refusals ------------------------------------------------------------------------------------


def test_refusals() -> None:
    q = example("int4:g32")
    split = example("uint2:channel:split3")
    many = dataclasses.replace(split, scale=np.ones((5, 6)), zero=None)
    cases: list[tuple[QTensor, str]] = [
        (quantize_array(np.ones((2, 8)), Format.parse("int3:channel")), "elements i3; expected i2, u2, i4, u4, i8, u8"),
        (quantize_array(np.ones((2, 8)), Format.parse("e4m3:channel")), "elements f8e4m3fn; expected i2"),
        (quantize_array(np.ones((2, 64)), Format.parse("mxint8")), "scales of f8e8m0; expected f32, f16, bf16"),
        (dataclasses.replace(q, codes=q.codes[None], scale=q.scale[None]), "a tensor of rank 3; expected a matrix"),
        (dataclasses.replace(q, codes=q.codes[:0], scale=q.scale[:0]), "a tensor without elements, of shape"),
        (q.transposed(), "blocks along the output channels"),
        (dataclasses.replace(q, block=None, scale=np.ones(96)), "a scale for each input channel"),
        (dataclasses.replace(q, group_index=np.arange(96) % 3), "blocks that are not consecutive"),
        (dataclasses.replace(q, global_scale=2.0), "a scale of the whole tensor beside those of the blocks"),
        (dataclasses.replace(q, zero=np.full((6, 3), 9.0)), "zero points beyond the codes of i4"),
        (dataclasses.replace(q, zero=np.full((6, 3), 2.0**-30), zero_is_float=True), "zero points of i4 that are no f"),
        (many, "a scale for each of 5 clusters; expected 2 to 4"),
        (dataclasses.replace(split, axis=None, scale=np.ones((3, 6, 1))), r"scales of shape \(3, 6, 1\) that broad"),
    ]  # fmt: skip
    for tensor, text in cases:
        with pytest.raises(PlanishError, match=f"container 'triton': cannot hold {text}"):
            containers.pack(tensor, "triton")
    packed = containers.pack(q, "triton")
    with pytest.raises(PlanishError, match="container 'triton': array 'scale' is missing; got codes"):
        containers.unpack(dataclasses.replace(packed, arrays={"codes": packed.array("codes")}))
    with pytest.raises(PlanishError, match="container 'triton': attribute 'K' is missing"):
        containers.unpack(dataclasses.replace(packed, attributes={}))
