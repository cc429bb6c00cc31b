"""Residual sinks: channels that a tiny gain hides, and that folding the gain re-exposes.

Behind an RMS norm the readers see g_c u_c, u = x / rms(x), |u_c| <= sqrt(n). Trained gains are near 0.004 where u
is near that bound (arXiv:2601.22966). Folded into the weights, the gain hides nothing any more: u is what is quantised.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHOWN = 8  # channels listed for each norm


@dataclass(frozen=True)
class Sink:
    """A channel that stands out by `after` times the median channel, by `before` times behind its gain.

    `measured` is False where there were no statistics: `after` is then the ratio of the gains, `before` is 1.
    """

    channel: int
    gain: float
    before: float
    after: float
    measured: bool

    def __str__(self) -> str:
        if self.measured:
            return (
                f"channel {self.channel} (gain {self.gain:.3g}) reaches {self.after:.3g} times the median channel, "
                f"{self.before:.3g} times behind the gain"
            )
        return f"channel {self.channel} (gain {self.gain:.3g}) grows {self.after:.3g} times against the median channel"


def residual_sinks(gain: np.ndarray, largest: np.ndarray | None, factor: float) -> list[Sink]:
    """The channels that stand out once a gain is folded, the largest first.

    Args:
        gain: float64 [n], what the channels are multiplied by; no zeros.
        largest: float64 [n], the largest |result| of the norm (behind the gain); None: judged by the gains alone.
        factor: a channel stands out from this many times the median channel on, if the gain hid at least half of it.
    """
    size = np.abs(gain)
    if largest is None:
        after = np.median(size) / size
        before = np.ones_like(after)
    else:
        exposed = largest / size
        after = exposed / max(float(np.median(exposed)), 1e-300)
        before = largest / max(float(np.median(largest)), 1e-300)
    chosen = np.flatnonzero((after >= factor) & (after >= 2.0 * before))
    order = chosen[np.argsort(-after[chosen], kind="stable")]
    return [Sink(int(c), float(gain[c]), float(before[c]), float(after[c]), largest is not None) for c in order]


def warning(where: str, sinks: list[Sink]) -> str:
    """The note for a report."""
    listed = "; ".join(map(str, sinks[:SHOWN]))
    more = f"; and {len(sinks) - SHOWN} more" if len(sinks) > SHOWN else ""
    how = "" if sinks[0].measured else " (no statistics: from the gains alone)"
    return f"folding the gain of {where} re-exposes what it hid{how}: {listed}{more}"
