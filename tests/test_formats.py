"""Number formats: their texts, and rounding to them, bit for bit against ml_dtypes and vectors worked out by hand.

Vectors: OCP Microscaling Formats 1.0; the scale modes of torchao and microxcaling; NVFP4 of TransformerEngine and
torchao; the integer rules of GPTQ, compressed-tensors and onnxruntime.
"""

from __future__ import annotations

from itertools import product

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from planish.ir.constant import pack_bits
from planish.ir.errors import PlanishError
from planish.ir.formats import FLOATS, NAMES, Format
from planish.ir.rounding import blocks_of, fake_quantize, grid_of, quantize_array, round_element, round_scale, unblocked
from planish.ir.types import numpy_dtype

ML = {"f8e4m3fn": ml_dtypes.float8_e4m3fn, "f8e5m2": ml_dtypes.float8_e5m2, "f6e3m2": ml_dtypes.float6_e3m2fn,
      "f6e2m3": ml_dtypes.float6_e2m3fn, "f4e2m1": ml_dtypes.float4_e2m1fn}  # fmt: skip
FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
WORLD = [
    "int2:channel", "int3:g8", "int4:g8", "int4:g8:half", "int4:g8:extreme", "int8:tensor", "uint2:g8", "uint3:token",
    "uint4:g16:f16", "uint8:tensor", "int8:token:bf16", "e4m3:channel", "e5m2:g8", "e3m2:g8", "e2m3:tensor", "e2m1:g8",
    "mxfp4", "mxfp4:ceil", "mxfp4:even", "mxfp4:rceil", "mxfp6", "mxfp6-e2m3", "mxfp8", "mxfp8-e5m2:rceil", "mxint8",
    "nvfp4",
]  # fmt: skip


# -- texts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_text_comes_back(name: str) -> None:
    suffixes = [("", ":tensor", ":channel", ":token", ":g64"), ("", ":half", ":extreme", ":ceil", ":even", ":rceil"),
                ("", ":f16", ":bf16"), ("", ":split3"), ("", ":static")]  # fmt: skip
    parsed = 0
    for parts in product(*suffixes):
        try:
            form = Format.parse(name + "".join(parts))
        except PlanishError:
            continue
        parsed += 1
        assert Format.parse(str(form)) == form
        assert form.name == name
    assert parsed >= 2


def test_texts_are_short() -> None:
    for text in ("int8:channel", "uint4:g128", "uint8:tensor:static", "nvfp4", "mxfp4:even", "uint2:g64:split3"):
        assert str(Format.parse(text)) == text
    assert str(Format.parse("int4")) == "int4:channel"
    assert str(Format.parse("int8", "token")) == "int8:token"
    assert str(Format.parse("mxfp4:floor")) == "mxfp4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int5", "format 'int5': 'int5' is unknown; expected one of int2, int3, int4, int8, uint2"),
        ("int4:g1", "'g1' is no group; expected 2 to 1048576 elements"),
        (
            "int4:grouped",
            "suffix 'grouped' is unknown; expected one of tensor, channel, token, g64, max, half, extreme",
        ),
        ("mxfp4:g16", "'g16' does not fit: its blocks have 32 elements"),
        ("mxfp4:f16", "'f16' does not fit: its scales are f8e8m0"),
        ("mxfp4:half", "'half' does not fit; expected one of floor, ceil, even, rceil"),
        ("int4:ceil", "'ceil' does not fit; expected one of max, half, extreme"),
        ("e4m3:half", "'half' does not fit; expected one of max"),
        ("uint4:half", "'half' does not fit: the range of an unsigned format has two ends"),
        ("e4m3:split2", "'split2' does not fit: clusters have integer codes and scales of their own"),
        ("int2:split5", "'split5' has no form; expected 2 to 4 clusters"),
        ("int4:g64:token", "'token' contradicts an earlier suffix"),
        ("int4:half:extreme", "'extreme' contradicts an earlier suffix"),
    ],
)
def test_refused_texts(text: str, message: str) -> None:
    with pytest.raises(PlanishError) as caught:
        Format.parse(text)
    assert message in str(caught.value)


# -- elements ------------------------------------------------------------------------------------------


def test_the_table_of_float_elements() -> None:
    """b.md F1: largest, least normal, least number of each, and no other in between than ml_dtypes has."""
    table = {"f8e4m3fn": (448.0, 2.0**-6, 2.0**-9), "f8e5m2": (57344.0, 2.0**-14, 2.0**-16),
             "f6e3m2": (28.0, 0.25, 0.0625), "f6e2m3": (7.5, 1.0, 0.125), "f4e2m1": (6.0, 1.0, 0.5)}  # fmt: skip
    for element, (most, normal, least) in table.items():
        limits = ml_dtypes.finfo(ML[element])
        assert (float(limits.max), float(limits.smallest_normal), float(limits.smallest_subnormal)) == (
            most,
            normal,
            least,
        )
        largest, mantissa, exponent, top = FLOATS[element]
        assert (largest, 2.0**exponent, 2.0 ** (exponent - mantissa)) == (most, normal, least)
        assert 2.0**top <= largest < 2.0 ** (top + 1)


@pytest.mark.parametrize("element", list(FLOATS))
def test_every_element_stays(element: str) -> None:
    every = np.arange(2 ** int(element[1]), dtype=np.uint8).view(ML[element])
    numbers = every.astype(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    held = round_element(torch.from_numpy(numbers), element).numpy()
    assert held.tobytes() == numbers.tobytes()  # -0 too


@settings(max_examples=200)
@given(st.sampled_from(list(FLOATS)), arrays(np.float32, 16, elements=FINITE), st.booleans())
def test_elements_are_those_of_ml_dtypes(element: str, x: np.ndarray, small: bool) -> None:
    if small:
        x = np.ldexp(x / np.float32(2.0**127), 6)
    most = np.float32(FLOATS[element][0])
    expected = np.clip(x, -most, most).astype(ML[element])
    for dtype in (np.float32, np.float64):
        held = round_element(torch.from_numpy(x.astype(dtype)), element).numpy()
        assert held.astype(ML[element]).tobytes() == expected.tobytes()
        np.testing.assert_array_equal(held, expected.astype(dtype))


@pytest.mark.parametrize("element", list(FLOATS))
def test_ties_go_to_even(element: str) -> None:
    every = np.unique(np.arange(2 ** int(element[1]), dtype=np.uint8).view(ML[element]).astype(np.float64))
    every = every[np.isfinite(every)]
    middle = (every[1:] + every[:-1]) / 2
    held = round_element(torch.from_numpy(middle), element).numpy()
    codes = held.astype(ML[element]).view(np.uint8)
    assert (codes % 2 == 0).all()
    assert np.isin(held, every).all()
    for x, y in zip(middle, held, strict=True):
        assert np.float64(np.float64(x).astype(ML[element])) == y


def test_ties_of_fp4() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 1e9, -0.1, -0.25, np.inf, -np.inf])
    held = round_element(x, "f4e2m1").numpy()
    assert held.tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6, 0, 0, 6, -6]
    assert held.astype(ML["f4e2m1"]).view(np.uint8)[[9, 10]].tolist() == [8, 8]  # -0 is produced


def test_e4m3_saturates_where_a_cast_gives_nan() -> None:
    x = np.array([448, 464, 465, 1e4, np.inf, -np.inf, -466], np.float32)
    with np.errstate(invalid="ignore"):
        assert np.isnan(x[2:].astype(ML["f8e4m3fn"]).astype(np.float32)).all()  # the trap
    held = round_element(torch.from_numpy(x), "f8e4m3fn").numpy()
    assert held.tolist() == [448, 448, 448, 448, 448, -448, -448]
    assert np.isnan(round_element(torch.tensor([np.nan]), "f8e4m3fn").numpy()).all()


def test_denormals_and_zeros() -> None:
    tiny = torch.tensor([1e-45, -1e-45, 0.0, -0.0])
    for element in FLOATS:
        assert round_element(tiny, element).numpy().tobytes() == np.array([0, -0.0, 0, -0.0], np.float32).tobytes()


def test_scales_are_rounded_to_their_dtype() -> None:
    scale = torch.tensor([1 / 3, 3e-6, 1e-12, 1e6], dtype=torch.float64)
    half = np.array([1 / 3, 3e-6, 2.0**-24, 65504]).astype(np.float16)
    assert round_scale(scale, "f16").tolist() == half.astype(np.float64).tolist()
    brain = scale.numpy().astype(ml_dtypes.bfloat16)
    assert round_scale(scale, "bf16").tolist() == brain.astype(np.float64).tolist()
    assert round_scale(torch.zeros(1, dtype=torch.float64), "f32").item() > 0


# -- scales of blocks ----------------------------------------------------------------------------------


def exponents(amax: float, text: str) -> int:
    block = np.zeros((1, 32))
    block[0, 3] = -amax
    q = quantize_array(block, Format.parse(text))
    return int(np.log2(q.scale.item()))


RULES = ("floor", "ceil", "even", "rceil")
# amax: exponents by floor, ceil, even, rceil
TABLE = {
    "mxfp4": {1.5: (-2, -1, -2, -2), 1.51: (-2, -1, -2, -1), 1.75: (-2, -1, -1, -1), 1.0: (-2, -2, -2, -2),
              6.0: (0, 1, 0, 0), 6.5: (0, 1, 0, 1), 7.0: (0, 1, 1, 1), 8.0: (1, 1, 1, 1), 1.7499999: (-2, -1, -2, -1)},
    "mxfp8": {448.0: (0, 1, 0, 0), 449.0: (0, 1, 0, 1), 495.0: (0, 1, 0, 1), 496.0: (0, 1, 1, 1), 256.0: (0, 0, 0, 0)},
    "mxfp8-e5m2": {57344.0: (0, 1, 0, 0), 61440.0: (0, 1, 1, 1), 57345.0: (0, 1, 0, 1)},
    "mxfp6": {28.0: (0, 1, 0, 0), 30.0: (0, 1, 1, 1), 16.0: (0, 0, 0, 0), 29.0: (0, 1, 0, 1)},
    "mxfp6-e2m3": {7.5: (0, 1, 0, 0), 7.75: (0, 1, 1, 1), 7.6: (0, 1, 0, 1)},
}  # fmt: skip


@pytest.mark.parametrize("name", list(TABLE))
def test_the_four_deployed_scale_rules(name: str) -> None:
    for amax, expected in TABLE[name].items():
        assert tuple(exponents(amax, f"{name}:{rule}") for rule in RULES) == expected, amax


def by_bits(amax: np.float32, mantissa: int, top: int) -> int:
    """torchao's EVEN: half of the element's last place is added to the bits of a float32, and the exponent read."""
    bits = amax.view(np.uint32) + np.uint32(1 << (23 - mantissa - 1))
    return int(bits >> 23 & 0xFF) - 127 - top


@given(st.sampled_from(list(TABLE)), st.floats(2.0**-100, 2.0**100, width=32))
def test_rules_by_their_bits(name: str, amax: float) -> None:
    form = Format.parse(name)
    most, mantissa, _, top = FLOATS[form.element]
    floor = int(np.floor(np.log2(np.float64(amax)))) - top
    assert exponents(amax, f"{name}:floor") == floor
    assert exponents(amax, f"{name}:ceil") == floor + (np.frexp(amax)[0] > 0.5)
    assert exponents(amax, f"{name}:even") == by_bits(np.float32(amax), mantissa, top)
    rceil = exponents(amax, f"{name}:rceil")
    ratio = float(np.float32(amax) / np.float32(most))
    assert 2.0 ** (rceil - 1) < ratio <= 2.0**rceil


def test_extreme_blocks_of_microscaling() -> None:
    assert exponents(1e-44, "mxfp4") == -127
    assert exponents(3e38, "mxfp8:ceil") == 127 - 8 + 1
    assert quantize_array(np.zeros((1, 32)), Format.parse("mxfp4")).scale.tolist() == [[1.0]]


def test_mxint8_is_block_floating_point() -> None:
    """b.md F5 with 8 bits: E = floor(log2 amax), q = RNE(x 2^(6 - E)) in [-127, 127]."""
    x = np.random.default_rng(0).normal(size=(4, 64)) * 50
    q = quantize_array(x, Format.parse("mxint8"))
    blocks = x.reshape(4, 2, 32)
    exponent = np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True)))
    codes = np.clip(np.rint(blocks * 2.0 ** (6 - exponent)), -127, 127)
    np.testing.assert_array_equal(q.codes.reshape(codes.shape), codes)
    np.testing.assert_array_equal(q.dequantize().reshape(codes.shape), codes * 2.0 ** (exponent - 6))


def test_the_vector_of_nvfp4() -> None:
    """b.md F4: amax of the tensor 10; the block's e4m3 scale is 71.68 -> 72 = 0x69."""
    x = np.array([0.1, -0.2, 0.3, 0.4, -0.5, 0.6, 0.7, -0.8, 0.9, 1, -1.1, 1.2, 1.3, -1.4, 1.5, 1.6])
    q = quantize_array(np.stack([np.concatenate([x, np.full(16, 10.0)])]), Format.parse("nvfp4"))
    assert q.global_scale == np.float32(10 / 2688)
    assert q.scale[0].tolist() == [72.0, 448.0]
    assert q.scale[0].astype(ML["f8e4m3fn"]).view(np.uint8)[0] == 0x69
    packed = pack_bits(q.codes[0, :16], "f4e2m1")
    assert packed.tobytes().hex(" ") == "91 32 4c d5 65 6e f6 77"
    assert q.bits == 4 + (2 * 8 + 32) / 32


def test_integer_rules_by_hand() -> None:
    x = np.array([[-1.0, 1.0, 0.5, -0.25, 0.0, 0.9, 0.1, -0.6]])
    half = quantize_array(7.5 * x, Format.parse("int4:half"))
    assert half.codes[0].tolist() == [-8, 7, 4, -2, 0, 7, 1, -4]  # +-7.5: both extremes are ties
    assert half.scale.item() == 1.0
    float32 = quantize_array(x, Format.parse("int4:half"))  # 1 / float32(1 / 7.5) is no tie: as in compressed-tensors
    assert float32.codes[0].tolist() == [-7, 7, 4, -2, 0, 7, 1, -4]
    assert float32.scale.item() == np.float32(1 / 7.5)
    plain = quantize_array(x, Format.parse("int4"))
    assert plain.codes[0].tolist() == [-7, 7, 3, -2, 0, 6, 1, -4]
    assert plain.scale.item() == np.float32(1 / 7)
    signed = quantize_array(np.array([[-0.5, 1.0, 0.25, 0.0]]), Format.parse("int4:extreme"))
    assert signed.scale.item() == -0.125  # the extreme has the code -8
    assert signed.codes[0].tolist() == [4, -8, -2, 0]
    unsigned = quantize_array(np.array([[-0.5, 1.0, 0.25, 2.5]]), Format.parse("uint4"))
    assert unsigned.scale.item() == np.float32(3 / 15)
    assert unsigned.zero.item() == 2  # RNE(2.5)
    assert unsigned.codes[0].tolist() == [0, 7, 3, 14]
    positive = quantize_array(np.array([[3.0, 6.0]]), Format.parse("uint2"))  # 0 belongs to the range
    assert (positive.scale.item(), positive.zero.item(), positive.codes[0].tolist()) == (2.0, 0, [2, 3])


def test_the_range_of_gptq_is_the_rule_half() -> None:
    """Scale 2 amax / (2^b - 1), zero point 2^(b-1), codes unsigned (AutoGPTQ)."""
    x = np.random.default_rng(1).normal(size=(3, 16))
    q = quantize_array(x, Format.parse("int4:half"))
    scale = (2 * np.abs(x).max(-1, keepdims=True) / 15).astype(np.float32)
    codes = np.clip(np.round(x.astype(np.float32) / scale) + 8, 0, 15)
    np.testing.assert_array_equal(q.codes + 8, codes)


# -- properties ----------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.just(0.0), st.just(-0.0), st.floats(-4, 4), st.floats(-1e30, 1e30),
                    st.floats(-1e-40, 1e-40))  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(WORLD), arrays(np.float64, (3, 40), elements=NUMBERS))
def test_rounding_is_sound(text: str, x: np.ndarray) -> None:
    """Codes in range and on their grid, stored exactly, no further off than half a step, idempotent on the grid."""
    form = Format.parse(text)
    x = x.astype(np.float32).astype(np.float64)
    q = quantize_array(x, form)
    y = q.dequantize()
    assert np.isfinite(y).all()
    codes = q.codes.astype(np.float64)
    assert codes.min() >= form.range[0]
    assert codes.max() <= form.range[1]
    dtype = numpy_dtype(q.scale_dtype)
    np.testing.assert_array_equal(q.scale.astype(dtype).astype(np.float64), q.scale)
    assert (q.scale != 0).all()
    if q.zero is not None:
        assert ((q.zero >= form.range[0]) & (q.zero <= form.range[1]) & (q.zero == np.rint(q.zero))).all()
    factor = np.broadcast_to(np.abs(q.spread(q.scale)) * (q.global_scale or 1.0), x.shape)
    if form.is_float:
        most, mantissa, least, _ = FLOATS[form.element]
        exponent = np.maximum(np.frexp(np.abs(codes))[1] - 1, least)
        step = 2.0 ** (exponent - mantissa)
    else:
        step, most = np.ones(x.shape), max(abs(v) for v in form.range)
    ratio = np.abs(x) / factor
    inside = (ratio <= most) if form.symmetric else np.ones(x.shape, bool)
    if not form.symmetric:
        shifted = x / factor + np.broadcast_to(q.spread(q.zero), x.shape)
        inside = (shifted >= 0) & (shifted <= form.range[1])
    off = np.abs(x - y) / factor / step
    assert (off[inside] <= 0.5 * (1 + 1e-6) + 1e-6 * (form.rule == "half")).all()
    assert np.array_equal(fake_quantize(torch.from_numpy(x), form).numpy().reshape(x.shape), y)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("text", ["int4:g8", "mxfp4", "nvfp4", "uint8"])
def test_what_is_not_finite_is_refused(text: str, bad: float) -> None:
    weight = np.ones((2, 8))
    weight[1, 3] = bad
    with pytest.raises(PlanishError, match="weight: holds NaN or infinity; expected finite numbers"):
        quantize_array(weight, Format.parse(text))


def test_clusters_must_be_given() -> None:
    with pytest.raises(PlanishError, match="format 'uint2:g8:split3': needs the cluster of each element"):
        quantize_array(np.ones((2, 8)), Format.parse("uint2:g8:split3"))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
@pytest.mark.parametrize("text", ["int4:g4", "uint8:tensor", "mxfp4", "int8:channel"])
def test_a_weight_without_elements(text: str, shape: tuple[int, int]) -> None:
    with pytest.raises(PlanishError, match=r"weight: is empty, of shape \(\d, \d\); expected at least one element"):
        quantize_array(np.zeros(shape), Format.parse(text))


def test_a_block_that_is_longer_than_the_rows_takes_no_room() -> None:
    x = torch.arange(1.0, 8.0).reshape(1, 7)
    for text in ("int4:g1048576", "uint4:g8", "mxfp4"):
        assert blocks_of(x, Format.parse(text)).shape == (1, 1, 7)
    assert quantize_array(x.numpy(), Format.parse("int8:g1048576")).scale.shape == (1, 1)


@pytest.mark.parametrize("size", [1, 5, 8, 13])
def test_blocks_of_a_vector_come_back(size: int) -> None:
    x = torch.arange(1.0, size + 1)
    for text in ("int4:g8", "mxfp8", "int8:token", "uint8:tensor"):
        assert torch.equal(unblocked(blocks_of(x, Format.parse(text)), (size,)), x)


@given(st.sampled_from(WORLD), st.integers(1, 3), st.integers(1, 70))
def test_blocks_come_back(text: str, rows: int, width: int) -> None:
    form = Format.parse(text)
    x = torch.arange(rows * width, dtype=torch.float64).reshape(rows, width) + 1
    blocks = blocks_of(x, form)
    assert torch.equal(unblocked(blocks, (rows, width)), x)
    if form.block:
        assert blocks.shape == (rows, -(-width // form.block), min(form.block, width))
    assert grid_of(blocks, form).scale.shape == (*blocks.shape[:-1], 1)
