"""Channels gathered and summed in short segments, as `reassemble` does.

    y[c] = sum_t weights[t, c] x[index[t, c]]

A segment that is shorter than the longest one has index 0 and weight 0 beyond its end. Terms are added in order of t.
"""

from __future__ import annotations

import torch


def reassemble_reference(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Float32 [M, C] of float32 x [M, K], index and weights [T, C]."""
    y = x[:, index[0].long()] * weights[0].float()
    for t in range(1, index.shape[0]):
        y = y + x[:, index[t].long()] * weights[t].float()
    return y
