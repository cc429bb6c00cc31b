"""What candidates of `scale-channels` are judged by."""

import numpy as np
import torch

from planish.passes.scales import OUTPUTS, Judge, Quantiser


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
