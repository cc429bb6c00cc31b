"""Eager references of row programs against the graph's own rows, what binds their weights, what is refused."""

from __future__ import annotations

from pathlib import Path

import kernel_rows
import numpy as np
import pytest
import torch
from helpers import check_text
from kernel_oracle import Near, run_steps
from kernel_rows import step

from planish.codegen import row_weights, triton, triton_rows, triton_source
from planish.codegen.kernel_spec import Kernel, Option, Step, Tensor
from planish.codegen.triton_eager import eager_lines
from planish.ir import hadamard
from planish.ir.evaluator import evaluate
from planish.ir.text import parse
from planish.kernels import gather, low_rank_down, norms, quantize_groups, quantize_rows, quantize_static, segment_mean
from planish.kernels import hadamard as hadamard_kernel
from planish.kernels.table import ROWS as ROW_TABLE

REFERENCES = (gather, hadamard_kernel, low_rank_down, norms, quantize_groups, quantize_rows, quantize_static)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own."""
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))


# -- the graph's own rows ------------------------------------------------------------------------

STEPS = {
    "token": (
        step("quantize_token", "x", "codes scale", kernel_rows.symmetric(8)),
        "%codes: u8[M, 200], %scale: f32[M, 1], %zero: u8[M, 1] = dynamic_quantize(%x) "
        '{granularity = "token", symmetric = true}',
        128,
    ),
    "range": (
        step("quantize_token", "x", "codes scale zero", kernel_rows.RANGE),
        '%codes: u8[M, 200], %scale: f32[M, 1], %zero: u8[M, 1] = dynamic_quantize(%x) {granularity = "token"}',
        128,
    ),
    "floor": (
        step("quantize_token", "x", "codes scale zero", kernel_rows.FLOOR),
        "%codes: u8[M, 200], %scale: f32[M, 1], %zero: u8[M, 1] = dynamic_quantize(%x) "
        '{granularity = "token", floor = 0.171875}',
        128,
    ),
    "token4": (
        step("quantize_token", "x", "codes scale", kernel_rows.symmetric(4)),
        "%codes: i4[M, 200], %scale: f32[M, 1], %zero: i4[M, 1] = dynamic_quantize(%x) "
        '{granularity = "token", dtype = "i4", symmetric = true}',
        0,
    ),
    "group": (
        step("quantize_group", "x", "codes scale", {**kernel_rows.symmetric(4), "group": 64}),
        "%codes: i4[M, 200], %scale: f32[M, 4], %zero: i4[M, 4] = dynamic_quantize(%x) "
        '{granularity = "group", block = 64, dtype = "i4", symmetric = true}',
        0,
    ),
    "group_half": (
        step("quantize_group", "x", "codes scale", {**kernel_rows.symmetric(4), "group": 64, "levels": 7.5}),
        "%codes: i4[M, 200], %scale: f32[M, 4], %zero: i4[M, 4] = dynamic_quantize(%x) "
        '{granularity = "group", block = 64, dtype = "i4", symmetric = true, rule = "half"}',
        0,
    ),
    "static": (
        step("quantize_static", "x step -", "codes", kernel_rows.STATIC),
        '%codes: i8[M, 200] = quantize(%x, %step) {dtype = "i8"}',
        0,
    ),
    "rms_norm": (
        step("rms_norm", "x gain -", "out", kernel_rows.EPS),
        "%out: f32[M, 200] = rms_norm(%x, %gain) {eps = 1e-06}",
        0,
    ),
    "layer_norm": (
        step("layer_norm", "x gain bias", "out", kernel_rows.EPS),
        "%out: f32[M, 200] = layer_norm(%x, %gain, %bias) {eps = 1e-06}",
        0,
    ),
    "hadamard": (
        step("hadamard", "x - -", "out", {"block": 8, "transpose": False, "base": 1}),
        "%out: f32[M, 200] = hadamard(%x) {block = 8}",
        0,
    ),
    "hadamard_dense": (
        step("hadamard", "x - matrix", "out", {"block": 40, "transpose": True, "base": 20}),
        "%out: f32[M, 200] = hadamard(%x) {block = 40, transpose = true}",
        0,
    ),
    "gather": (
        step("gather", "x index", "out", {"columns": 200}),
        "%out: f32[M, 200] = gather(%x, %index) {axis = -1}",
        0,
    ),
    "down": (
        step("down", "x down", "out", {"rank": 5}),
        "%out: f32[M, 5] = linear(%x, %down)",
        0,
    ),
}  # fmt: skip
GIVEN = {"gain": "f32[200]", "bias": "f32[200]", "step": "f32[]", "index": "i64[200]", "down": "f32[5, 200]"}


@pytest.mark.parametrize("name", STEPS)
def test_references_mean_what_the_graph_says(name: str, seed: int) -> None:
    """Reference and evaluator, float32 both, lie in the same interval around float64; codes without padding."""
    one, text, shift = STEPS[name]
    generator = torch.Generator().manual_seed(seed)
    held = {
        "x": kernel_rows.rows(generator, 21, 200, 1e4),
        "gain": torch.randn(200, generator=generator),
        "bias": torch.randn(200, generator=generator),
        "step": torch.tensor(0.02),
        "index": torch.randint(0, 200, (200,), generator=generator),
        "down": torch.randn(5, 200, generator=generator),
    }
    matrix = row_weights.hadamard_matrix(40, transpose=True)
    assert matrix is not None
    used = {k: v for k, v in held.items() if k in one.reads}
    signature = ", ".join(f"%{k}: {GIVEN.get(k, 'f32[M, 200]')}" for k in used)
    back = ", ".join(f'%{k} as "{k}"' for k in one.writes)
    graph = parse(f"graph @one({signature}) {{\n  {text}\n  return {back}\n}}", {})
    check_text(graph)
    meant = evaluate(graph, used)
    expected = {k: Near.exact(v) for k, v in (used | {"matrix": matrix}).items()}
    run_steps([one], expected, "f32")
    lines, _ = eager_lines([one], {})
    made = {**used, "matrix": matrix, "dtype": torch.float32}
    scope = {name: piece for module in REFERENCES for name, piece in vars(module).items()}
    bits = int(dict(one.options).get("bits", 8))
    exec("\n".join(line for line in lines if "stored_reference" not in line), scope, made)
    for output in one.writes:
        near = expected[output]
        codes = near.low is not None and near.high is not None
        for found in (made[output], meant[output].double() - (shift if codes else 0)):
            got = found.double().reshape(near.value.shape)
            if codes:
                assert near.low is not None and near.high is not None
                assert bool(((got >= near.low) & (got <= near.high)).all()), output
            else:
                assert bool(((got - near.value).abs() <= near.rounded("f32").radius).all()), output
    if "codes" in one.writes:
        least, most = made["codes"].min(), made["codes"].max()
        assert -(2 ** (bits - 1)) <= least < most <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("rule", ["token", "range", "floor", "token4", "group"])
def test_codes_differ_from_the_graph_at_ties_only(rule: str, seed: int) -> None:
    """x (1 / s) and x / s differ by 3 roundings at most: a code by one, where the ratio is that close to a tie."""
    one, text, shift = STEPS[rule]
    x = kernel_rows.rows(torch.Generator().manual_seed(seed), 210, 200, 1e4)
    graph = parse(f'graph @one(%x: f32[M, 200]) {{\n  {text}\n  return %codes as "codes", %scale as "scale"\n}}', {})
    meant = evaluate(graph, {"x": x})
    scope = {name: piece for module in REFERENCES for name, piece in vars(module).items()}
    made: dict[str, object] = {"x": x}
    lines, _ = eager_lines([one], {})
    exec("\n".join(line for line in lines if "stored_reference" not in line), scope, made)
    scale, codes = made["scale"], made["codes"]
    assert isinstance(scale, torch.Tensor) and isinstance(codes, torch.Tensor)
    assert torch.equal(scale.reshape(meant["scale"].shape), meant["scale"])
    wide = scale.reshape(210, -1).repeat_interleave(64, -1)[:, :200] if rule == "group" else scale.reshape(210, 1)
    ratio = x.double() / wide.double()
    tie = ((ratio.abs() % 1) - 0.5).abs() <= 3 * 2.0**-24 * ratio.abs()
    far = (codes.double() + shift - meant["codes"].double()).abs()
    assert bool((far <= tie.double()).all())


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # 0 / 0 in rows that are not there
def test_every_elementwise_row_is_the_evaluators(seed: int) -> None:
    """Kernel text in the interpreter, eager text and the evaluator's row, on numbers of all sizes."""
    options = {"gelu": {"approximate": "tanh"}, "leaky_relu": {"alpha": 0.1}, "elu": {"alpha": 1.5},
               "hard_sigmoid": {"alpha": 0.2, "beta": 0.5}}  # fmt: skip
    x = torch.cat([torch.linspace(-12, 12, 63), torch.tensor([0.0, 1e-4, -1e-4, 30.0, -30.0])]).reshape(4, 17)
    y = torch.linspace(-2, 3, 68).reshape(4, 17) + 0.01
    for name, row in ROW_TABLE.items():
        if not row.text:
            continue
        own = options.get(name, {})
        positive = name in ("log", "sqrt", "rsqrt", "reciprocal")
        a, two = x.abs() + 0.01 if positive else x, "{1}" in row.text
        kernel = Kernel(
            "prologue",
            17,
            0,
            (Tensor("x", "f32", ("M", 17), "input"), Tensor("y", "f32", ("M", 17), "input"),
             Tensor("out", "f32", ("M", 17), "output")),
            (step(name, "x y" if two else "x", "out", dict(own)),),
            row="x",
        )  # fmt: skip
        module = triton.load(triton.emit_kernel(kernel, "f32"))
        given = ", ".join(f"%{n}: f32[M, 17]" for n in ("x", "y"))
        held = ", ".join(f"{k} = {f'{chr(34)}{v}{chr(34)}' if isinstance(v, str) else v}" for k, v in own.items())
        text = f"{name}(%x{', %y' if two else ''})" + (f" {{{held}}}" if held else "")
        graph = parse(f'graph @one({given}) {{\n  %out: f32[M, 17] = {text}\n  return %out as "out"\n}}', {})
        meant = evaluate(graph, {"x": a, "y": y}, torch.float64)["out"]
        for made in (module.run(a, y), module.reference(a, y)):
            bound = 16 * 2.0**-24 * (meant.abs() + a.abs()) + 2.0**-24
            assert bool(((made.double() - meant).abs() <= bound).all()), name


# -- weights and refusals ------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "base"), [(1, 1), (64, 1), (4096, 1), (12, 12), (384, 12), (40, 20), (14336, 28)])
def test_hadamard_base(order: int, base: int) -> None:
    assert row_weights.hadamard_base(order) == base
    matrix = row_weights.hadamard_matrix(order)
    assert (matrix is None) == (base == 1)
    if matrix is not None and order <= 384:
        outer = np.kron(matrix.numpy(), hadamard.hadamard(order // base))
        assert (outer == hadamard.hadamard(order)).all()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("block", [8, 24])
def test_folded_down(block: int, transpose: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, 48, generator=generator, dtype=torch.float64) for n in (3, 5))
    signs = torch.randint(0, 2, (48,), generator=generator).double() * 2 - 1
    turned = hadamard.apply(x if transpose else x * signs, block, transpose=transpose)
    turned = turned * signs if transpose else turned
    folded = row_weights.folded_down(weight, block, signs, transpose)
    assert torch.allclose(turned @ weight.T, x @ folded.T, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(turned @ weight.T, x @ weight.T, rtol=1e-3, atol=1e-3)


def test_segment_tables(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1, 3, 2, 1, 4])
    index, weights = torch.randint(0, 9, (11,), generator=generator), torch.randn(11, generator=generator)
    places, parts = row_weights.segment_tables(index, sizes, weights)
    assert places.shape == parts.shape == (4, 5)
    x = torch.randn(3, 9, generator=generator)
    text = "%y: f32[M, 5] = reassemble(%x, %index, %sizes, %weights) {axis = -1}"
    given = "%x: f32[M, 9], %index: i64[11], %sizes: i64[5], %weights: f32[11]"
    graph = parse(f'graph @one({given}) {{\n  {text}\n  return %y as "y"\n}}', {})
    meant = evaluate(graph, {"x": x, "index": index, "sizes": sizes, "weights": weights})["y"]
    assert torch.equal(segment_mean.reassemble_reference(x, places, parts), meant)


def turn(block: int, base: int) -> dict[str, Option]:
    return {"block": block, "transpose": False, "base": base}


@pytest.mark.parametrize(
    ("steps", "columns", "reason"),
    [
        ((step("fourier", "x", "v"),), 64, "there is no row 'fourier' in planish.kernels.table"),
        ((step("hadamard", "x - m", "v", turn(11008, 344)),), 11008,
         "the Hadamard matrix of order 11008 has a dense factor of 344, more than 64"),
        ((step("hadamard", "x - m", "v", turn(96, 12)),), 192,
         "several blocks of 96 columns, each with a dense factor of 12, do not lie on a tile"),
        ((step("hadamard", "x - -", "v", turn(8192, 1)),), 32768,
         "a row of 32768 columns is read in parts, which blocks of 8192 do not divide"),
        ((step("hadamard", "x - -", "v", turn(64, 1)), step("gelu", "v", "v1"),
          step("gather", "v1 index", "v2", {"columns": 5})), 64,
         "columns are gathered behind a Hadamard transform: they cannot be computed one by one"),
        ((step("hadamard", "x - -", "v", turn(4096, 1)), step("down", "v down", "left", {"rank": 5})), 32768,
         "a low-rank down behind blocks of 4096 columns, of a row that is read in parts: fold the transform"),
        ((step("quantize_group", "x", "codes scales", {**kernel_rows.symmetric(4), "group": 48}),), 96,
         "groups of 48 columns are no power of two"),
    ],
)  # fmt: skip
def test_refusals(steps: tuple[Step, ...], columns: int, reason: str) -> None:
    assert triton_rows.refusal(steps, columns) == reason


def test_no_refusal() -> None:
    for kernel in kernel_rows.kernels(96, block=96).values():
        assert not triton_rows.refusal(kernel.steps, 96)
    assert not triton_rows.refusal((step("hadamard", "x - -", "v", turn(4096, 1)),), 32768)


def test_the_table_names_functions_that_there_are() -> None:
    known = triton_source.library()
    for row in ROW_TABLE.values():
        for one in (row, *(row.variants or {}).values()):
            assert all(known[name].kind == "device" for name in one.device), row.name
            assert all(known[name].kind == "eager" for name in one.reference), row.name
            assert bool(one.text) == bool(one.eager), row.name
            assert not row.file or any(known[name].file == f"{row.file}.py" for name in (*one.device, *one.reference))
