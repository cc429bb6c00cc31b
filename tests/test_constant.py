"""Constants: immutable, lazily mapped, rounded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planish.ir.constant import Constant, FileRange, pack_bits, unpack_bits
from planish.ir.errors import InvalidModelError, PlanishError
from planish.ir.literals import decode_elements
from planish.ir.onnx_attributes import tensor_of
from planish.ir.types import (
    DTYPES,
    HOLDERS,
    TensorType,
    bits,
    from_numpy_dtype,
    from_onnx_enum,
    is_float,
    numpy_dtype,
    onnx_enum,
)


def test_immutable() -> None:
    source = np.zeros(3)
    constant = Constant.of(source)
    for array in (constant.array(), constant._raw()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    constant.wide()[0] = 1  # a copy
    constant.tensor()[0] = 1  # a copy
    assert constant.array()[0] == 0
    assert source.flags.writeable


def test_a_fold_is_rounded_once() -> None:
    third = np.array([1 / 3])
    constant = Constant(third, "f16", (1,))
    assert constant.is_wide
    assert constant.array() == np.float16(1 / 3)
    assert constant.array().dtype == np.float16
    assert not constant.array().flags.writeable
    assert constant.wide() == third
    assert constant.tensor().dtype == torch.float16
    assert constant.tensor(torch.float64).numpy() == third
    assert constant.tensor(torch.float32).numpy() == np.float32(1 / 3)
    assert not Constant.of(third).is_wide
    assert constant != Constant.of(constant.array())


def test_of() -> None:
    assert Constant.of([1, 2], "f32").array().dtype == np.float32
    assert Constant.of([1, 2], "i32") == Constant.of(np.array([1, 2], np.int32))
    assert Constant.of(np.float32(1.5) * 2).type == TensorType("f32", ())
    assert Constant.of(["a", "b"]) == Constant.of(np.array(["a", "b"], object))
    for dtype in (
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float16,
        torch.bool,
        torch.int8,
    ):
        tensor = torch.tensor([[1, 0, -1.5]]).to(dtype)
        again = Constant.of(tensor).tensor()
        assert again.dtype == dtype
        assert torch.equal(again.float(), tensor.float())
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(2,\)"):
        Constant(np.zeros(3), "f64", (2,))


def test_equality_is_of_bits() -> None:
    assert Constant.of([np.nan]) == Constant.of([np.nan])
    assert Constant.of([0.0]) != Constant.of([-0.0])
    assert Constant.of([1.0]) != Constant.of(np.array([1.0], np.float32))
    assert Constant.of([1.0]) != Constant.of(1.0)
    assert Constant.of([1.0]) != 1.0


@pytest.mark.parametrize("dtype", sorted(DTYPES - {"str"}))
def test_mapped_data(dtype: str, tmp_path: Path, seed: int) -> None:
    array = np.random.default_rng(seed).integers(dtype == "f8e8m0", 2, (3, 5)).astype(numpy_dtype(dtype))
    raw = (pack_bits(array, dtype) if bits(dtype) < 8 else array).tobytes()
    path = tmp_path / "data"
    path.write_bytes(b"\0" * 4999 + raw)
    constant = Constant(None, dtype, (3, 5), file=FileRange(path, 4999, len(raw)))
    assert constant.nbytes == len(raw)
    assert not constant.loaded
    np.testing.assert_array_equal(constant.array(), array)
    assert not constant.array().flags.writeable
    assert not constant.loaded  # it is not kept
    assert constant == Constant.of(array, dtype)
    if dtype in HOLDERS:
        assert bits(HOLDERS[dtype]) > bits(dtype)
        with pytest.raises(PlanishError, match=rf"dtype {dtype}: ONNX has no number for it\n.*{HOLDERS[dtype]} holds"):
            onnx_enum(dtype)
    else:
        assert from_onnx_enum(onnx_enum(dtype)) == dtype
        assert from_numpy_dtype(numpy_dtype(dtype)) == dtype
    if is_float(dtype):
        np.testing.assert_array_equal(constant.tensor(torch.float64).numpy(), array.astype(np.float64))


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"\0" * 10)
    with pytest.raises(InvalidModelError, match="data: external data ends early; expected 12 bytes, got 10"):
        Constant(None, "f32", (2,), file=FileRange(path, 4, 8)).array()
    with pytest.raises(InvalidModelError, match="wrong length of external data; expected 8 bytes, got 4"):
        Constant(None, "f32", (2,), file=FileRange(path, 4, 4)).array()
    with pytest.raises(InvalidModelError, match="cannot read external data: No such file"):
        Constant(None, "f32", (2,), file=FileRange(tmp_path / "none", 0, 8)).array()
    assert Constant(None, "f32", (0, 2), file=FileRange(path, 0, 0)).array().shape == (0, 2)


@given(st.sampled_from(["i2", "u2", "i3", "u3", "i4", "u4", "f4e2m1", "f6e2m3", "f6e3m2"]), st.binary(max_size=21))
def test_packed_elements(dtype: str, packed: bytes) -> None:
    """One bitstream, low bits first: its bytes as one little-endian number hold element i at bit i * width."""
    width = bits(dtype)
    size = len(packed) * 8 // width
    codes = unpack_bits(np.frombuffer(packed, np.uint8), dtype, size)
    assert codes.shape == (size,)
    number = int.from_bytes(packed, "little")
    expected = [number >> i * width & (2**width - 1) for i in range(size)]
    assert (codes.view(np.uint8) & np.uint8(2**width - 1)).tolist() == expected
    if dtype[0] == "i":
        assert all(-(2 ** (width - 1)) <= int(c) < 2 ** (width - 1) for c in codes)
    again = pack_bits(codes, dtype)
    assert len(again) == (size * width + 7) // 8
    assert int.from_bytes(again.tobytes(), "little") == number & (1 << size * width) - 1


def test_three_bits_are_the_words_of_gptq() -> None:
    codes = np.array([(5 * i + 3) % 8 for i in range(32)], np.uint8)
    assert pack_bits(codes, "u3").view("<u4").tolist() == [0x43C67543, 0x7543C675, 0xC67543C6]


@pytest.mark.parametrize("dtype", ["f6e2m3", "f6e3m2", "f4e2m1", "u2", "i4"])
def test_the_bytes_are_those_of_onnx(dtype: str) -> None:
    array = np.arange(13, dtype=np.uint8).view(numpy_dtype(dtype)) if is_float(dtype) else None
    held = np.array([1, 0, 2, 3, 1], numpy_dtype(dtype)) if array is None else array
    assert tensor_of(Constant.of(held)).raw_data == onnx.numpy_helper.from_array(held).raw_data


def test_codes_are_read_within_their_range() -> None:
    assert decode_elements(["-4", "3"], "i3", wide=False).tolist() == [-4, 3]
    for word, dtype in (("4", "i3"), ("-5", "i3"), ("8", "u3"), ("4", "u2")):
        with pytest.raises(ValueError, match=f"integer out of the range of {dtype}"):
            decode_elements([word], dtype, wide=False)
