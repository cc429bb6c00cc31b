"""Containers: round trips, the byte vectors of the formats, and the same bytes as the packages that own them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from planish.codegen import containers
from planish.codegen.containers.base import Packed
from planish.codegen.containers.bits import pack_bytes, pack_words, unpack_bytes, unpack_words
from planish.codegen.containers.dequantize_linear import initialisers
from planish.ir.errors import PlanishError
from planish.ir.formats import Format
from planish.ir.qtensor import QTensor
from planish.ir.rounding import quantize_array

FORMATS = [
    *(f"{sign}int{n}:{g}" for sign in ("", "u") for n in (2, 3, 4, 8) for g in ("tensor", "channel", "g16", "g32")),
    "int4:g32:half", "int4:g32:extreme:f16", "uint4:g32:bf16", "e4m3:channel", "e4m3:g32", "e5m2:tensor",
    "e2m1:g16", "mxfp4", "mxfp8", "mxint8", "nvfp4", "e2m3:channel", "mxfp6",
]  # fmt: skip


def weight(rows: int, columns: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32).astype(np.float64)


def example(text: str, rows: int = 6, columns: int = 64, seed: int = 0) -> QTensor:
    return quantize_array(weight(rows, columns, seed), Format.parse(text))


# -- bits ------------------------------------------------------------------------------------------


def test_codes_0_to_7_in_every_container() -> None:
    """methods/b.md, F7: words 0x76543210, bytes 10 32 54 76."""
    codes = np.arange(8)
    assert pack_words(codes, 4).tolist() == [0x76543210]
    assert pack_bytes(codes, 4).tobytes().hex(" ") == "10 32 54 76"


def test_three_bits() -> None:
    """methods/b.md, F7: 32 codes in three words; ten codes in a word with two bits left over."""
    codes = (5 * np.arange(32) + 3) % 8
    dense = pack_words(codes, 3).view(np.uint32)
    assert [hex(w) for w in dense] == ["0x43c67543", "0x7543c675", "0xc67543c6"]
    whole = pack_words(codes, 3, dense=False).view(np.uint32)
    assert hex(whole[0]) == "0x3c67543"
    assert len(whole) == 4


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 70), st.integers(0, 99), st.booleans())
def test_bits_round_trip(width: int, rows: int, count: int, seed: int, dense: bool) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**width, (rows, count))
    packed = pack_bytes(codes, width)
    assert packed.shape == (rows, -(-count * width // 8))
    assert np.array_equal(unpack_bytes(packed, width, count), codes)
    words = pack_words(codes, width, dense=dense)
    per = 32 // width
    assert words.dtype == np.int32
    assert words.shape[1] == (-(-count * width // 32) if dense else -(-count // per))
    assert np.array_equal(unpack_words(words, width, count, dense=dense), codes)
    assert np.array_equal(pack_bytes(codes - 2**width, width), packed)  # only the low bits count


# -- round trips -----------------------------------------------------------------------------------


def same(one: QTensor, two: QTensor) -> None:
    """The same numbers; the same codes where the sign is the same."""
    assert one.shape == two.shape
    assert (
        np.allclose(one.dequantize(), two.dequantize(), rtol=1e-7, atol=0)
        if one.global_scale
        else np.array_equal(one.dequantize(), two.dequantize())
    )
    if one.element == two.element:
        assert np.array_equal(one.codes, two.codes)
    assert one.scale_dtype == two.scale_dtype


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FORMATS), st.sampled_from(containers.names()), st.integers(1, 5), st.integers(1, 5),
    st.integers(0, 31), st.integers(0, 99),
)  # fmt: skip
def test_round_trip(text: str, name: str, rows: int, groups: int, ragged: int, seed: int) -> None:
    q = example(text, rows, 32 * groups + ragged, seed)
    if containers.refusal(q, name) is not None:
        with pytest.raises(PlanishError, match=f"container '{name}': cannot hold "):
            containers.pack(q, name)
        return
    packed = containers.pack(q, name)
    again = containers.unpack(packed)
    same(q, again)
    twice = containers.pack(again, name)
    assert {k: v.tobytes() for k, v in twice.arrays.items()} == {k: v.tobytes() for k, v in packed.arrays.items()}


def test_what_each_container_holds() -> None:
    """The table of the formats: a container that is dropped, or takes what it cannot, shows."""
    held = {text: containers.can_hold(example(text)) for text in FORMATS}
    ort = ["gather-block-quantized", "matmul-nbits"]
    assert held["int4:g32"] == ["dequantize-linear", ort[0], "int-quantized", ort[1], "pack-quantized", "triton"]
    assert held["uint8:channel"] == held["uint2:g16"] == held["int4:tensor"] == held["int4:g32"]
    assert held["uint4:g32:bf16"] == ["dequantize-linear", "int-quantized", "matmul-nbits", "pack-quantized", "triton"]
    assert held["int3:g32"] == held["uint3:channel"] == ["int-quantized", "pack-quantized"]
    assert held["e4m3:channel"] == ["dequantize-linear", "float-quantized"]
    assert held["nvfp4"] == ["dequantize-linear", "nvfp4-pack-quantized"]
    assert held["mxfp4"] == ["dequantize-linear", "mxfp4-pack-quantized"]
    assert held["mxfp8"] == held["mxint8"] == held["e5m2:tensor"] == ["dequantize-linear"]
    assert held["e2m3:channel"] == held["mxfp6"] == []


def test_refusals() -> None:
    q = example("int4:g32")
    clusters = np.zeros(q.shape, np.uint8)
    split = dataclasses.replace(q, clusters=clusters, scale=np.stack([q.scale] * 3))
    per_input = dataclasses.replace(q, block=None, scale=np.ones(64))
    floats = dataclasses.replace(q, zero=np.full(q.scale.shape, 0.5), zero_is_float=True)
    mixed = dataclasses.replace(q, group_index=np.arange(64) % 2)
    cases: list[tuple[QTensor, str, str]] = [
        (example("int3:g32"), "matmul-nbits", "elements i3; expected i2, u2, i4, u4, i8, u8"),
        (quantize_array(weight(4), Format.parse("int4:g8")), "matmul-nbits", "blocks of 8; expected a power of two"),
        (quantize_array(weight(4, 96), Format.parse("int4:g48")), "matmul-nbits", "blocks of 48; expected a power of"),
        (per_input, "matmul-nbits", "a scale for each input channel"),
        (split, "matmul-nbits", "a scale for each of 3 clusters"),
        (example("mxint8"), "matmul-nbits", "scales of f8e8m0; expected f32, f16, bf16"),
        (example("e4m3:channel"), "matmul-nbits", "elements f8e4m3fn"),
        (dataclasses.replace(q, codes=q.codes[None], scale=q.scale[None]), "matmul-nbits", "a tensor of rank 3"),
        (dataclasses.replace(q, codes=q.codes[:0], scale=q.scale[:0]), "matmul-nbits", "a tensor without elements, of"),
        (dataclasses.replace(q, codes=q.codes[:, :0]), "int-quantized", "a tensor without elements, of shape"),
        (q.transposed(), "matmul-nbits", "blocks along the output channels"),
        (floats, "gather-block-quantized", "zero points that are floats"),
        (example("int4:channel", columns=63), "gather-block-quantized", "rows of 63 elements of 4 bits; expected"),
        (mixed, "gather-block-quantized", "blocks that are not consecutive"),
        (example("int3:g32"), "dequantize-linear", "elements i3"),
        (split, "dequantize-linear", "a scale for each of 3 clusters"),
        (floats, "dequantize-linear", "zero points that are floats"),
        (mixed, "dequantize-linear", "blocks that are not consecutive"),
        (mixed, "int-quantized", "blocks that are not consecutive"),
        (example("int4:g32", columns=65), "pack-quantized", "rows of 65 elements in blocks of 32; expected whole"),
        (floats, "pack-quantized", "zero points that are floats"),
        (example("e5m2:tensor"), "float-quantized", "elements f8e5m2; expected f8e4m3fn"),
        (example("e2m1:g16"), "nvfp4-pack-quantized", "blocks of 16 with scales of f32; expected blocks of"),
        (example("nvfp4"), "mxfp4-pack-quantized", "blocks of 16 with scales of f8e4m3fn; expected blocks of 32"),
    ]  # fmt: skip
    for tensor, name, text in cases:
        with pytest.raises(PlanishError, match=f"container '{name}': cannot hold {text}"):
            containers.pack(tensor, name)
    with pytest.raises(PlanishError, match="hint: can hold it: int-quantized, pack-quantized"):
        containers.pack(example("int3:g32"), "matmul-nbits")
    with pytest.raises(PlanishError, match="hint: no container can hold it"):
        containers.pack(example("e2m3:channel"), "matmul-nbits")
    with pytest.raises(PlanishError, match="hint: can hold it: triton"):
        containers.pack(split, "matmul-nbits")
    with pytest.raises(
        PlanishError, match=r"container 'matmulnbits': unknown; .*\n  hint: did you mean 'matmul-nbits'"
    ):
        containers.pack(q, "matmulnbits")
    with pytest.raises(PlanishError, match="option 'words': expected dense or whole; got 'half'"):
        containers.pack(q, "pack-quantized", words="half")
    packed = containers.pack(q, "matmul-nbits")
    with pytest.raises(PlanishError, match="container 'matmul-nbits': attribute 'N' is missing"):
        containers.unpack(Packed(packed.container, packed.arrays))
    with pytest.raises(PlanishError, match="container 'matmul-nbits': array 'B' is missing; got none"):
        containers.unpack(Packed(packed.container, {}, packed.attributes))
    with pytest.raises(PlanishError, match="container 'dequantize-linear': attribute 'type' or 'dims' is missing"):
        containers.unpack(Packed("dequantize-linear", {}))


# -- onnxruntime -----------------------------------------------------------------------------------


def by_ort(w: np.ndarray, bits: int, block: int, symmetric: bool) -> tuple[np.ndarray, ...]:
    """codes, scales and zero points of onnxruntime's own quantiser; w [N, K]."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits)
    quantizer = DefaultWeightOnlyQuantizer(config)
    return quantizer.qbits_block_quant(np.ascontiguousarray(w.T.astype(np.float32)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("columns", [64, 96, 100])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_bytes_of_onnxruntime(bits: int, symmetric: bool, block: int, columns: int) -> None:
    w = weight(12, columns)
    text = f"int{bits}:g{block}:extreme" if symmetric else f"uint{bits}:g{block}"
    packed = containers.pack(quantize_array(w, Format.parse(text)), "matmul-nbits")
    data, scales, zeros = by_ort(w, bits, block, symmetric)
    assert np.allclose(packed.arrays["scales"], scales, rtol=3e-7)
    assert np.array_equal(packed.arrays["B"], data)
    if symmetric:
        assert "zero_points" not in packed.arrays  # the default is what onnxruntime writes out
    else:
        assert np.array_equal(packed.arrays["zero_points"], zeros)


def product(packed: Packed, x: np.ndarray) -> np.ndarray:
    """x W^T by onnxruntime's kernel, activations in float (accuracy level 0)."""
    names = ["B", "scales", "zero_points", "g_idx"]
    inputs = [n if n in packed.arrays else "" for n in names]
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node("MatMulNBits", ["x", *inputs], ["y"], domain="com.microsoft", **packed.attributes)
    tensors = [onnx.numpy_helper.from_array(a, n) for n, a in packed.arrays.items()]
    return run([node], tensors, {"x": x}, [x.shape[0], packed.number("N")])


def run(nodes: list[Any], tensors: list[Any], feeds: dict[str, np.ndarray], shape: list[int]) -> np.ndarray:
    kinds = {np.dtype(np.float32): 1, np.dtype(np.int64): 7}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(k, kinds[v.dtype], v.shape) for k, v in feeds.items()],
        [helper.make_tensor_value_info("y", 1, shape)], tensors,
    )  # fmt: skip
    opset = 25 if any(t.data_type in (25, 26) for t in tensors) else 21
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)],
        ir_version=13 if opset == 25 else 10,
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("columns", [128, 100])
@pytest.mark.parametrize("text", ["int4:g32", "uint4:g16", "uint2:g32", "int8:g64", "uint8:channel", "int4:tensor"])
def test_onnxruntime_multiplies_the_same_numbers(text: str, columns: int) -> None:
    q = example(text, 16, columns)
    cases, bits = [q], q.element[1:]
    if bits != "8":  # onnxruntime 1.31.1: no float zero points of 8 bits, g_idx right only for 4 bits and these zeros
        cases.append(dataclasses.replace(q, zero=np.full(q.scale.shape, 1.25), zero_is_float=True))
    if bits == "4" and q.block:
        index = np.arange(columns) * 7 % q.scale.shape[1]
        signed = example(text.removeprefix("u"), 16, columns)
        cases += [dataclasses.replace(one, group_index=index) for one in (cases[1], signed)]
    x = weight(3, columns, 1).astype(np.float32)
    for one in cases:
        packed = containers.pack(one, "matmul-nbits")
        same(one, containers.unpack(packed))
        expected = x @ one.dequantize().T
        # float sums in another order
        assert np.abs(product(packed, x) - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("text", ["int4:g32", "uint4:g16", "uint2:channel", "int8:g64", "uint8:channel", "int4:tensor"])
def test_onnxruntime_gathers_the_same_rows(text: str) -> None:
    q = example(text, 40, 96)
    packed = containers.pack(q, "gather-block-quantized")
    ids = np.array([[3, 0, 39], [7, 7, 1]], np.int64)
    inputs = ["data", "ids", "scales"] + ["zero_points"] * ("zero_points" in packed.arrays)
    node = helper.make_node("GatherBlockQuantized", inputs, ["y"], domain="com.microsoft", **packed.attributes)
    tensors = [onnx.numpy_helper.from_array(a, n) for n, a in packed.arrays.items()]
    got = run([node], tensors, {"ids": ids}, [2, 3, 96])
    assert np.array_equal(got, q.dequantize().astype(np.float32)[ids])


@pytest.mark.parametrize("text", ["int4:g32", "uint4:g16", "int2:g32", "uint8:channel", "e4m3:g32", "e5m2:tensor"])
def test_standard_dequantize_linear(text: str) -> None:
    """ONNX's checker takes the initialisers, and onnxruntime computes the same numbers."""
    q = example(text, 6, 70)
    packed = containers.pack(q, "dequantize-linear")
    tensors = initialisers(packed, "w")
    for tensor in tensors.values():
        onnx.checker.check_tensor(tensor)
    block = packed.number("block_size")
    more = {"axis": packed.number("axis")} if "axis" in packed.attributes else {}
    more |= {"block_size": block} if block else {}
    node = helper.make_node("DequantizeLinear", [t.name for t in tensors.values()], ["y"], **more)
    got = run([node], list(tensors.values()), {}, [6, 70])
    assert np.array_equal(got, q.dequantize().astype(np.float32))


@pytest.mark.parametrize("text", ["mxfp4", "mxfp8", "nvfp4", "e2m1:g16"])
def test_floats_by_the_reference_evaluator(text: str) -> None:
    """onnxruntime has no kernel of fp4; ONNX's reference says what the initialisers mean."""
    from onnx.reference import ReferenceEvaluator

    q = example(text, 4, 64)
    packed = containers.pack(q, "dequantize-linear")
    tensors = initialisers(packed, "w")
    nodes, scale = [], "w_scale"
    if "scale_scale" in tensors:
        nodes.append(helper.make_node("DequantizeLinear", [scale, "w_scale_scale"], ["s"]))
        scale = "s"
    more = {"output_dtype": 1} if q.scale_dtype == "f8e8m0" else {}
    block = packed.number("block_size")
    nodes.append(helper.make_node("DequantizeLinear", ["w", scale], ["y"], axis=1, block_size=block, **more))
    output = helper.make_tensor_value_info("y", 1, [4, 64])
    graph = helper.make_graph(nodes, "g", [], [output], list(tensors.values()))
    version = max(int(packed.attributes["opset"]), 23)  # type: ignore[call-overload]
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=12)
    onnx.checker.check_model(model)
    got = ReferenceEvaluator(model).run(None, {})[0]
    assert np.allclose(got, q.dequantize(), rtol=1e-6)


# -- compressed-tensors ----------------------------------------------------------------------------


def scheme(bits: int, group: int | None, symmetric: bool, kind: str = "int", **more: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "group" if group else "channel"
    args = QuantizationArgs(
        num_bits=bits, type=kind, symmetric=symmetric, **({"strategy": strategy, "group_size": group} | more)
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


def by_compressed_tensors(w: np.ndarray, compressor: str, plan: Any, **more: torch.Tensor) -> dict[str, np.ndarray]:
    """The arrays of the package's own scales and compressor; w [N, K]."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    x = torch.from_numpy(w.astype(np.float32))
    parts = x.reshape(len(w), -1, plan.weights.group_size or w.shape[1])
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), plan.weights, more.get("weight_global_scale"))
    state = {"weight": x, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8), **more}
    made = BaseCompressor.get_value_from_registry(compressor).compress(state, plan)
    return {k: v.view(torch.uint8).numpy() if "float8" in str(v.dtype) else v.numpy() for k, v in made.items()}


def agree(packed: Packed, theirs: dict[str, np.ndarray]) -> None:
    """The same names, shapes and bytes; float32 scales to the last bit or two."""
    assert set(packed.arrays) == set(theirs)
    for name, array in packed.arrays.items():
        assert array.shape == theirs[name].shape, name
        if array.dtype == np.float32:
            assert np.allclose(array, theirs[name], rtol=3e-7), name
        else:
            assert array.tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_bytes_of_pack_quantized(bits: int, symmetric: bool, group: int | None) -> None:
    w = weight(12, 96)
    form = Format.parse(
        (f"int{bits}:{{}}:half" if symmetric else f"uint{bits}:{{}}").format(f"g{group}" if group else "channel")
    )
    packed = containers.pack(quantize_array(w, form), "pack-quantized")
    agree(packed, by_compressed_tensors(w, "pack-quantized", scheme(bits, group, symmetric)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_bytes_of_int_quantized(symmetric: bool) -> None:
    w = weight(12, 96)
    form = Format.parse("int8:channel:half" if symmetric else "uint8:channel")
    packed = containers.pack(quantize_array(w, form), "int-quantized")
    agree(packed, by_compressed_tensors(w, "int-quantized", scheme(8, None, symmetric)))


def test_the_bytes_of_float_quantized() -> None:
    w = weight(12, 96)
    packed = containers.pack(quantize_array(w, Format.parse("e4m3:channel")), "float-quantized")
    agree(packed, by_compressed_tensors(w, "float-quantized", scheme(8, None, True, "float")))


def test_the_bytes_of_nvfp4() -> None:
    w = weight(12, 64)
    q = quantize_array(w, Format.parse("nvfp4"))
    packed = containers.pack(q, "nvfp4-pack-quantized")
    plan = scheme(4, 16, True, "float", strategy="tensor_group", scale_dtype=torch.float8_e4m3fn)
    divisor = torch.tensor([2688.0 / np.abs(w).max()], dtype=torch.float32)
    agree(packed, by_compressed_tensors(w, "nvfp4-pack-quantized", plan, weight_global_scale=divisor))


def test_the_bytes_of_mxfp4() -> None:
    w = weight(12, 64)
    packed = containers.pack(quantize_array(w, Format.parse("mxfp4:even")), "mxfp4-pack-quantized")
    plan = scheme(4, 32, True, "float", scale_dtype=torch.uint8)
    agree(packed, by_compressed_tensors(w, "mxfp4-pack-quantized", plan))


def test_nvfp4_vector() -> None:
    """methods/b.md, F4: the largest of the tensor is 10."""
    row = [0.1, -0.2, 0.3, 0.4, -0.5, 0.6, 0.7, -0.8, 0.9, 1, -1.1, 1.2, 1.3, -1.4, 1.5, 1.6]
    w = np.array([row + [10.0] + [0.0] * 15])
    packed = containers.pack(quantize_array(w, Format.parse("nvfp4")), "nvfp4-pack-quantized")
    assert packed.arrays["weight_packed"][0, :8].tobytes().hex(" ") == "91 32 4c d5 65 6e f6 77"
    assert packed.arrays["weight_scale"].view(np.uint8)[0, 0] == 0x69
    assert np.isclose(1.0 / packed.arrays["weight_global_scale"][0], 0.003720238, rtol=1e-6)


def test_act_order_in_pack_quantized() -> None:
    q = dataclasses.replace(example("uint4:g32"), group_index=np.arange(64) % 2)
    packed = containers.pack(q, "pack-quantized")
    assert packed.arrays["weight_g_idx"].dtype == np.int32
    same(q, containers.unpack(packed))


def test_three_bits_in_whole_words() -> None:
    q = example("uint3:g32")
    packed = containers.pack(q, "pack-quantized", words="whole")
    assert packed.arrays["weight_packed"].shape == (6, 7)
    assert containers.pack(q, "pack-quantized").arrays["weight_packed"].shape == (6, 6)
    same(q, containers.unpack(packed))
