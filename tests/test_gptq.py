"""GPTQ: its loss is what it says, it beats rounding on every format, and it survives what it is given."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.errors import PlanishError
from planish.ir.formats import Format
from planish.ir.qtensor import QTensor
from planish.ir.rounding import quantize_array, round_element
from planish.passes import gptq as module
from planish.passes.gptq import Solution, damped
from planish.passes.kmeans import choose_clusters

FORMATS = [
    "int2:g16", "int3:tensor", "int4:channel", "int4:g16:half", "int4:g24:extreme", "int4:g16:f16", "int8:channel",
    "uint2:g16:split3", "int3:g16:split2", "uint4:g16", "uint4:tensor", "uint8:channel", "e4m3:channel", "e5m2:g16",
    "e2m1:g16", "e3m2:tensor", "mxfp4:even", "mxfp6", "mxfp6-e2m3:rceil", "mxfp8:ceil", "mxint8", "nvfp4",
]  # fmt: skip
ROWS, COLUMNS = 24, 72
gptq = partial(module.gptq, dtype=torch.float64)


def problem(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> tuple[np.ndarray, torch.Tensor]:
    """A weight, and the Hessian of inputs whose channels move together and differ in size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(400, columns // 3)) @ rng.normal(size=(columns // 3, columns))
    x = (x + 0.3 * rng.normal(size=x.shape)) * rng.lognormal(0, 1, columns)
    return rng.normal(size=(rows, columns)) * 0.1, torch.from_numpy(2 / len(x) * x.T @ x)


def rounded(weight: np.ndarray, form: Format) -> QTensor:
    ids = choose_clusters(weight, form.clusters, "tensor") if form.clusters > 1 else None
    return quantize_array(weight, form, clusters=ids)


def half_trace(weight: np.ndarray, q: QTensor, h: torch.Tensor) -> float:
    d = torch.from_numpy(weight - q.dequantize())
    return float(((d @ h) * d).sum()) / 2.0


def by_the_book(weight: np.ndarray, q: QTensor, form: Format, h: torch.Tensor) -> tuple[np.ndarray, float]:
    """The algorithm as published: the Cholesky factor of the inverse, one column at a time; float64, as it stands."""
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    left, got, loss = torch.from_numpy(weight.copy()), np.zeros_like(weight), 0.0
    for j in range(weight.shape[1]):
        held = (left[:, j].numpy()[:, None], q.spread(q.scale)[:, j : j + 1] * (q.global_scale or 1.0))
        ratio = held[0] / held[1]
        if q.is_float:
            codes = round_element(torch.from_numpy(ratio), q.element).numpy()
        else:
            zero = 0.0 if q.zero is None else q.spread(q.zero)[:, j : j + 1]
            codes = np.clip(np.round(ratio) + zero, *form.range) - zero
        got[:, j] = (codes * held[1])[:, 0]
        error = (left[:, j] - torch.from_numpy(got[:, j])) / upper[j, j]
        left[:, j:] -= torch.outer(error, upper[j, j:])
        loss += float((error**2).sum()) / 2.0
    return got, loss


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("text", FORMATS)
def test_the_loss_is_half_the_trace_and_beats_rounding(text: str, act_order: bool) -> None:
    form = Format.parse(text)
    weight, h = problem(0)
    q = rounded(weight, form)
    before = (q.codes.copy(), h.clone(), weight.copy())
    solved = gptq(weight, q, form, h, act_order=act_order)
    full = damped(h, solved.damping)
    assert solved.loss == pytest.approx(half_trace(weight, solved.weight, full), rel=1e-9)
    assert solved.loss < half_trace(weight, q, full) * 0.75
    assert solved.damping == 0.01
    # the grid is the one it was given, and so are the arguments
    assert np.array_equal(solved.weight.scale, q.scale) and solved.weight.codes.dtype == q.codes.dtype
    codes = solved.weight.codes.astype(np.float64)
    assert form.range[0] <= codes.min() and codes.max() <= form.range[1]
    for held, now in zip(before, (q.codes, h, weight), strict=True):
        assert (np.asarray(held) == np.asarray(now)).all()


@pytest.mark.parametrize("text", [f for f in FORMATS if "split" not in f and "tensor" not in f and "channel" not in f])
def test_the_published_recursion_gives_the_same_codes(text: str) -> None:
    form = Format.parse(text)
    weight, h = problem(1)
    q = rounded(weight, form)
    solved = gptq(weight, q, form, h, act_order=False)
    got, loss = by_the_book(weight, q, form, damped(h, 0.01))
    assert np.allclose(solved.weight.dequantize(), got, rtol=1e-12, atol=1e-12)
    assert solved.loss == pytest.approx(loss, rel=1e-9)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 150), st.sampled_from(["int4:g16", "uint4:channel"]))
def test_any_shape(seed: int, rows: int, columns: int, text: str) -> None:
    form = Format.parse(text)
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(5, columns)), rng.normal(size=(rows, columns))
    h = torch.from_numpy(x.T @ x)
    solved = gptq(weight, rounded(weight, form), form, h)
    assert solved.loss == pytest.approx(half_trace(weight, solved.weight, damped(h, solved.damping)), rel=1e-7)


def test_rows_beyond_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    form = Format.parse("uint4:g16")
    weight, h = problem(2, rows=21)
    whole = gptq(weight, rounded(weight, form), form, h)
    monkeypatch.setattr("planish.passes.gptq.ROWS", 8)
    parts = gptq(weight, rounded(weight, form), form, h)
    assert np.array_equal(parts.weight.codes, whole.weight.codes)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)


def test_the_order_of_the_columns() -> None:
    """By falling diag(H): the codes follow a permutation of the inputs, and the loss is lower where sizes differ."""
    form = Format.parse("int4:channel")
    better = []
    for seed in range(5):
        weight, h = problem(seed)
        first = gptq(weight, rounded(weight, form), form, h)
        order = np.random.default_rng(seed).permutation(COLUMNS)
        turned = gptq(weight[:, order], rounded(weight[:, order], form), form, h[order][:, order])
        assert np.array_equal(turned.weight.codes, first.weight.codes[:, order])
        better.append(first.loss / gptq(weight, rounded(weight, form), form, h, act_order=False).loss)
    assert np.mean(better) < 0.9


def test_static_groups() -> None:
    """A column keeps the scale of the group it stands in, wherever its turn comes."""
    form = Format.parse("int4:g24")
    weight, h = problem(3)
    weight[:, 24:48] *= 50.0
    q = rounded(weight, form)
    solved = gptq(weight, q, form, h)
    step = np.abs(weight - solved.weight.dequantize())
    assert np.array_equal(solved.weight.scale, q.scale)
    assert step[:, :24].max() < q.scale[:, 1].min()
    assert solved.loss < half_trace(weight, q, damped(h, 0.01)) / 2


def test_columns_that_are_never_used() -> None:
    """They are rounded to nearest and pass nothing on."""
    form = Format.parse("int4:channel")
    weight, h = problem(4)
    dead = [0, 7, 71]
    h[dead], h[:, dead] = 0.0, 0.0
    q = rounded(weight, form)
    solved = gptq(weight, q, form, h)
    assert np.array_equal(solved.weight.codes[:, dead], q.codes[:, dead])
    alive = np.setdiff1d(np.arange(COLUMNS), dead)
    small = gptq(
        weight[:, alive], replace(q, codes=q.codes[:, alive]), form, h[alive][:, alive], damping=_same(h, alive)
    )
    assert np.array_equal(small.weight.codes, solved.weight.codes[:, alive])


def _same(h: torch.Tensor, alive: np.ndarray) -> float:
    """The damping of the live part that adds as much as .01 does to the whole."""
    whole = damped(h, 0.0).diagonal().mean()
    return 0.01 * float(whole / h.diagonal()[alive].mean())


def test_damping_is_raised_until_it_can_be_factored() -> None:
    form = Format.parse("int4:channel")
    weight, h = problem(5)
    values, vectors = torch.linalg.eigh(h)
    mean = float(h.diagonal().mean())
    values[0] = -0.0114 * mean  # more than the damping makes up for
    indefinite = vectors @ torch.diag(values) @ vectors.T
    solved = gptq(weight, rounded(weight, form), form, indefinite)
    assert 0.0114 < solved.damping < 0.014
    assert solved.damping == pytest.approx(0.01 * round(solved.damping / 0.001) / 10)  # a tenth more each time
    again = half_trace(weight, solved.weight, damped(indefinite, solved.damping))
    assert solved.loss == pytest.approx(again, rel=1e-6)
    values[0] = -mean
    with pytest.raises(PlanishError) as caught:
        gptq(weight, rounded(weight, form), form, vectors @ torch.diag(values) @ vectors.T)
    assert caught.value.what == "gptq: the Hessian could not be factored with a damping of 0.01 to 0.029"
    assert caught.value.hint == "more damping, or more calibration data"


def test_inputs_that_are_not_finite() -> None:
    weight, h = problem(6)
    h[3, 3] = torch.nan
    form = Format.parse("int4:channel")
    with pytest.raises(PlanishError, match="gptq: what the layer reads is not finite"):
        gptq(weight, rounded(weight, form), form, h)


def test_float32_is_close() -> None:
    form = Format.parse("int4:g24")
    weight, h = problem(7)
    wide: Solution = gptq(weight, rounded(weight, form), form, h)
    narrow = module.gptq(weight, rounded(weight, form), form, h)
    assert narrow.loss == pytest.approx(half_trace(weight, narrow.weight, damped(h, 0.01)), rel=1e-4)
    assert narrow.loss == pytest.approx(wide.loss, rel=0.02)


@pytest.mark.parametrize("wrong", ["no update", "a factor", "the scale of another group"])
def test_the_invariant_has_teeth(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong in the recursion shows in the identity or in the loss."""
    form = Format.parse("int4:g24")
    weight, h = problem(8)
    good = gptq(weight, rounded(weight, form), form, h).loss
    if wrong == "no update":
        monkeypatch.setattr(module, "LEAF", 1 << 20)
        monkeypatch.setattr(torch.Tensor, "addmv_", lambda self, *_: self)
    elif wrong == "a factor":
        monkeypatch.setattr(torch.Tensor, "addmm_", lambda self, a, b: self.add_(1.001 * (a @ b)))
    else:
        plain = module._Levels.nearest
        monkeypatch.setattr(module._Levels, "nearest", lambda self, w, k: plain(self, w, (k + 24) % COLUMNS))
    solved = gptq(weight, rounded(weight, form), form, h)
    trace = half_trace(weight, solved.weight, damped(h, 0.01))
    assert abs(solved.loss / trace - 1) > 1e-6 or solved.loss > 1.2 * good
