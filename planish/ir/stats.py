"""Statistics of activations: what calibration collects and passes read.

Keyed by value name. Each record describes one value along one channel axis: extremes, second moment
and a sample of rows. When a pass transforms a value it transforms the record with it
(`Stats.transform`), so that the statistics stay true without another run over the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from planish.ir.errors import PlanishError, nearest
from planish.ir.files import atomic

if TYPE_CHECKING:
    import numpy as np

    from planish.ir.ops.base import Axes
    from planish.ir.transform import Transform

FIELDS = ("minimum", "maximum", "mean_square", "samples")


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """Statistics of one value along one axis with C channels.

    Attributes:
        axis: the channel axis, negative (counted from the end).
        minimum, maximum: float64 [C], over all calibration data.
        mean_square: float64 [C], the mean of x^2.
        samples: float32 [N, C], rows drawn evenly from all batches.
        count: the number of rows seen.
    """

    axis: int
    minimum: np.ndarray
    maximum: np.ndarray
    mean_square: np.ndarray
    samples: np.ndarray
    count: int

    @property
    def largest(self) -> np.ndarray:
        """max |x| of each channel, float64 [C]."""
        import numpy as np

        largest: np.ndarray = np.maximum(np.abs(self.minimum), np.abs(self.maximum))
        return largest

    def take(self, channels: np.ndarray) -> ChannelStats:
        """The statistics of some of the channels, by index."""
        parts = {name: getattr(self, name)[..., channels] for name in FIELDS}
        return replace(self, **parts)

    def keep(self, kept: np.ndarray) -> ChannelStats:
        """The statistics where the channels that are not kept (bool [C]) have become 0."""
        parts = {name: getattr(self, name) * kept for name in FIELDS}
        return replace(self, **parts)


@dataclass
class Stats:
    """Statistics of a graph's values by name.

    Attributes:
        channels: per value.
        source: what was collected: the description of the data, the number of batches, the graph's name.
    """

    channels: dict[str, ChannelStats] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        return name in self.channels

    def __iter__(self) -> Iterator[str]:
        return iter(self.channels)

    def __len__(self) -> int:
        return len(self.channels)

    def of(self, name: str) -> ChannelStats:
        """The statistics of a value.

        Raises:
            PlanishError: none were collected for it.
        """
        if name not in self.channels:
            raise PlanishError(
                f"statistics: none for value '{name}'; got {len(self.channels)} values",
                hint=nearest(name, self.channels),
            )
        return self.channels[name]

    def along(self, name: str, axis: int = -1) -> ChannelStats | None:
        """The statistics of a value by channels of one axis (negative); None: there are none, or of another axis.

        What a convolution and a linear both read has those of one of them.
        """
        record = self.channels.get(name)
        return record if record is not None and record.axis == axis else None

    def copy(self) -> Stats:
        return Stats(dict(self.channels), dict(self.source))

    def rename(self, old: str, new: str) -> None:
        """Follow a value that a rewrite renamed."""
        if old in self.channels:
            self.channels[new] = self.channels.pop(old)

    def copy_record(self, source: str, target: str) -> None:
        """Say of a value what is known of another, or nothing where nothing is."""
        if source in self.channels:
            self.channels[target] = self.channels[source]
        else:
            self.channels.pop(target, None)

    def transform(
        self, name: str, rank: int, axes: Axes, transform: Transform, atoms: np.ndarray | None, variance: int
    ) -> None:
        """Follow a transform of a value on `axes` (non-negative); a record on other axes is dropped.

        Extremes follow a scale, a shift and a permutation exactly. Under a mixing transform they are those
        of the transformed samples.
        """
        import numpy as np

        from planish.ir.transform import Mix, Scale, Shift, Split, apply

        record = self.channels.get(name)
        if record is None:
            return
        if tuple(axes) != (record.axis + rank,):
            del self.channels[name]
            return

        def moved(array: np.ndarray) -> np.ndarray:
            return apply(array.astype(np.float64), (array.ndim - 1,), transform, atoms, variance)

        samples = moved(record.samples)
        low, high = moved(record.minimum), moved(record.maximum)
        if isinstance(transform, Mix):
            low, high, square = samples.min(0), samples.max(0), (samples**2).mean(0)
        elif isinstance(transform, Scale):
            square = record.mean_square * moved(np.ones_like(low)) ** 2
        elif isinstance(transform, Shift):
            square = (samples**2).mean(0)
        elif isinstance(transform, Split):
            square = moved(np.sqrt(record.mean_square)) ** 2
        else:
            square = moved(record.mean_square)
        self.channels[name] = replace(
            record,
            minimum=np.minimum(low, high),
            maximum=np.maximum(low, high),
            mean_square=square,
            samples=samples.astype(np.float32),
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file (atomically)."""
        import json

        import numpy as np
        from safetensors import SafetensorError
        from safetensors.numpy import save

        tensors = {
            f"{name}/{part}": np.ascontiguousarray(getattr(record, part))
            for name, record in self.channels.items()
            for part in FIELDS
        }
        layout = {name: [record.axis, record.count] for name, record in self.channels.items()}
        try:
            data = save(tensors, {"planish.stats": json.dumps({"layout": layout, "source": self.source})})
        except SafetensorError as error:
            raise PlanishError(f"{path}: cannot write statistics: {error}") from error
        with atomic(path, failure="cannot write statistics") as handle:
            handle.write(data)

    @staticmethod
    def load(path: str | Path) -> Stats:
        """Read a file written by `save`.

        Raises:
            PlanishError: no such file, or not statistics of planish.
        """
        import json

        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise PlanishError(f"{path}: no such statistics file")
        try:
            with safe_open(path, "numpy") as handle:
                header = json.loads((handle.metadata() or {}).get("planish.stats", "null"))
                if not isinstance(header, dict):
                    raise PlanishError(f"{path}: not a statistics file of planish")
                channels = {
                    name: ChannelStats(
                        axis=axis, count=count, **{part: handle.get_tensor(f"{name}/{part}") for part in FIELDS}
                    )
                    for name, (axis, count) in header["layout"].items()
                }
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise PlanishError(f"{path}: not a statistics file of planish: {error}") from error
        return Stats(channels, header["source"])
