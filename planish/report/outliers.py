"""How far out the outliers of an activation lie, from its calibration statistics.

    ratio      max_c m_c / median_c m_c,    m_c = max |x| of channel c
    kurtosis   E[(x - E x)^4] / Var[x]^2 over the sampled elements: 3 for a normal distribution
    sinks      sampled rows (tokens) whose norm exceeds `MASSIVE` times the median norm of a row
    row ratio  the largest norm of a row over the median

Outlying channels are what shift, scale and rotation take away; massive rows (attention sinks; Sun et al.,
arXiv 2402.17762) are not, and want a range per row or a range that clips.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from planish.ir.stats import ChannelStats

MASSIVE = 10.0  # times the median norm
BINS = 81  # of the histogram, centred on zero
TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Outliers:
    """Figures of one activation at one time.

    Attributes:
        largest: max |x|.
        ratio, kurtosis, row_ratio: see the module.
        sinks: massive rows among the sampled.
        rows: sampled rows.
        channels: float64 [C], max |x| of each channel.
        counts: int64 [BINS], the sampled elements by value, in equal bins over [-largest, largest].
    """

    largest: float
    ratio: float
    kurtosis: float
    row_ratio: float
    sinks: int
    rows: int
    channels: np.ndarray = field(repr=False)
    counts: np.ndarray = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the arrays left out."""
        return {k: v for k, v in vars(self).items() if k not in ("channels", "counts")}


def outliers(record: ChannelStats) -> Outliers:
    """The figures of a record; extremes are those of all data, the rest those of the sampled rows."""
    channels = record.largest
    x = record.samples.astype(np.float64)
    spread = x - x.mean() if x.size else x
    variance = float((spread**2).mean()) if x.size else 0.0
    norms = np.sqrt((x**2).sum(1))
    middle = float(np.median(norms)) if len(norms) else 0.0
    largest = float(channels.max(initial=0.0))
    edge = largest or 1.0
    return Outliers(
        largest,
        largest / max(float(np.median(channels)), TINY) if largest else 1.0,
        float((spread**4).mean()) / variance**2 if variance > 0 else 0.0,
        float(norms.max()) / middle if middle > 0 else 1.0,
        int((norms > MASSIVE * middle).sum()) if middle > 0 else 0,
        len(x),
        channels,
        np.histogram(x, BINS, (-edge, edge))[0],
    )
