"""The search of extract-low-rank on one group of linears."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoder_blocks import outliers

from planish.ir.formats import Format
from planish.passes import branch_search
from planish.passes.branch_search import BranchSearch, unsigned
from planish.passes.scales import FormatQuantiser

INT4 = Format.parse("int4:g16")


def search(outputs: int = 48, *, shift: float = 0.0, inputs: Format | None = INT4) -> tuple[BranchSearch, np.ndarray]:
    x = outliers(np.random.default_rng(0))
    x = np.maximum(x, -shift) if shift else x
    weights = [np.random.default_rng(1).normal(size=(n, 64)) for n in (outputs, outputs // 2)]
    quantiser = FormatQuantiser(INT4, inputs, x.min(0).astype(float), x.max(0).astype(float))
    return BranchSearch(torch.from_numpy(x), weights, quantiser, 8, shift), np.abs(x).max(0).astype(float)


def test_smoothing_and_branch_each_lower_the_error() -> None:
    """Outliers in what is read: neither > smoothing > smoothing with an iterated branch (methods/a.md, 7)."""
    found, largest = search()
    choice = found.smoothing(largest, 20)
    assert choice.label != "none"
    branch = found.branch(choice.s, 50)
    assert branch.error < choice.error * (1 + 1e-6)
    assert choice.error < found.plain / 3


def test_nothing_rounded_is_nothing_lost() -> None:
    found, largest = search(inputs=None)
    found.quantiser = FormatQuantiser(None, None, largest, largest)
    for shift in (0.0, 0.25):
        found.shift = shift
        assert found.branch(np.linspace(0.5, 2.0, 64), 3).error < 1e-9


def test_an_unsigned_format() -> None:
    assert str(unsigned(Format.parse("int4:g64"))) == "uint4:g64"
    assert str(unsigned(Format.parse("int8:token:half"))) == "uint8:token"
    for same in ("nvfp4", "uint4:g64", "mxint8", "e4m3:token"):
        assert unsigned(Format.parse(same)) == Format.parse(same)


def test_a_large_group_is_searched_by_some_of_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice hardly differs, whatever the shift; the branch is that of all of them."""
    for shift in (0.0, 2.0):
        monkeypatch.setattr(branch_search, "SEARCHED", 4096)
        found, largest = search(400, shift=shift, inputs=unsigned(INT4) if shift else INT4)
        whole = found.smoothing(largest, 20)
        monkeypatch.setattr(branch_search, "SEARCHED", 200)
        thin = found.smoothing(largest, 20)
        assert found.branch(thin.s, 3).error < 1.2 * found.branch(whole.s, 3).error
        assert found.branch(thin.s, 3).low.up.shape == (600, 8)


def test_static_ranges_follow_the_shift() -> None:
    found, _ = search(shift=3.0, inputs=Format.parse("uint8:tensor:static"))
    assert np.isclose(found.quantiser.low.min(), 0.0)
