"""What candidates of `scale-channels` are judged by."""

from typing import Literal

import numpy as np
import pytest
import torch

from planish.passes import scales
from planish.passes.scales import OUTPUTS, Judge, Quantiser, has_int8_products


def judge(outputs: int) -> Judge:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(16, 8, generator=generator) * torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 50])
    weight = torch.randn(outputs, 8, generator=generator)
    return Judge(samples, [weight[:5], weight], Quantiser("tensor", np.full(8, -100.0), np.full(8, 100.0)))


def test_a_large_reader_is_judged_by_some_of_its_outputs() -> None:
    """A head over a vocabulary counts as one reader, whatever its size: every so many-th output tells as much."""
    small, large = judge(OUTPUTS), judge(5 * OUTPUTS)
    assert small.readers == large.readers == [5, OUTPUTS]
    one, other = (j.error(np.array([1.0] * 7 + [4.0])) for j in (small, large))
    assert abs(one / other - 1) < 0.2


@pytest.mark.parametrize("granularity", ["token", "tensor", "static"])
@pytest.mark.parametrize("sign", ["both", "positive", "above"])
def test_products_of_codes_are_those_of_what_they_stand_for(
    granularity: Literal["token", "tensor", "static"], sign: str
) -> None:
    """With products of int8 or without: the same numbers, for symmetric codes and for those with a zero point."""
    if not has_int8_products():
        pytest.skip("no products of int8 on this processor")
    generator = torch.Generator().manual_seed(1)
    for rows, n, outputs in ((37, 130, 65), (1, 1, 1), (5, 257, 3)):
        x = torch.randn(rows, n, generator=generator)
        x = {"both": x, "positive": torch.relu(x), "above": x.clamp(min=-0.05)}[sign] * torch.linspace(0.1, 9, n)
        w = torch.randn(outputs, n, generator=generator)
        low, high = (e.numpy().astype(np.float64) for e in (x.amin(0), x.amax(0)))
        quantiser = Quantiser(granularity, low, high)
        s = np.linspace(0.5, 2.0, n)
        x = x / torch.from_numpy(s.astype(np.float32))
        want = quantiser.activations(x, s).double() @ quantiser.weight(w).double().T
        got = quantiser.product(x, s, w)
        size = quantiser.activations(x, s).double().abs() @ quantiser.weight(w).double().abs().T
        assert got.dtype == torch.float32
        assert bool(((got - want).abs() <= 2e-6 * size + 1e-30).all())


def test_candidates_judged_at_once_are_judged_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which they came, by workers or one after another; the number of threads stays."""
    made = judge(300)
    candidates = [np.full(8, 1.0 + i / 7) ** np.arange(8) for i in range(9)]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = made.errors(candidates)
        assert torch.get_num_threads() == 3
        torch.set_num_threads(1)
        assert found == pytest.approx([made.error(s) for s in candidates], rel=1e-6)
        assert made.errors(candidates) == pytest.approx(found, rel=1e-6)
        monkeypatch.setattr(scales, "HELD", 1)
        torch.set_num_threads(3)
        assert made.errors(candidates) == pytest.approx(found, rel=1e-6)
    finally:
        torch.set_num_threads(before)
    assert len(set(found)) == len(found)
