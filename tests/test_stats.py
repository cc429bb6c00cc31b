"""Statistics: they follow transforms, and survive a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from encoder_blocks import pre_norm, record, statistics
from helpers import check_text
from safetensors.numpy import save_file

from planish.ir.errors import PlanishError
from planish.ir.ops.base import ACTS, Act
from planish.ir.stats import FIELDS, ChannelStats, Stats
from planish.ir.transform import Permute, Scale, Shift, apply, random_transform

CHANNELS = 6


def rows(seed: int, count: int = 50) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, CHANNELS)) * rng.lognormal(0, 1, CHANNELS) + rng.normal(0, 3, CHANNELS)
    return x.astype(np.float32)


def same(one: ChannelStats, two: ChannelStats, tolerance: float = 1e-5) -> None:
    for part in FIELDS:
        got, expected = getattr(one, part), getattr(two, part)
        assert got.shape == expected.shape, part
        assert got.dtype == expected.dtype, part
        assert np.allclose(got, expected, rtol=tolerance, atol=tolerance), part
    assert (one.axis, one.count) == (two.axis, two.count)


@pytest.mark.parametrize("variance", [1, -1])
@pytest.mark.parametrize("act", ACTS)
def test_a_record_follows_the_value(act: Act, variance: int, seed: int) -> None:
    """As if the transformed rows had been collected."""
    x = rows(seed)
    rng = np.random.default_rng(seed)
    transform = random_transform(act, CHANNELS, rng, positive=False)
    stats = Stats({"h": record(x)})
    stats.transform("h", 3, (2,), transform, None, variance)
    moved = apply(x.astype(np.float64), (1,), transform, None, variance)
    same(stats.of("h"), record(moved), 1e-4)
    assert (stats.of("h").minimum <= stats.of("h").maximum).all()


def test_a_negative_factor_swaps_the_extremes() -> None:
    stats = Stats({"h": record([[-1.0, 2.0], [3.0, 5.0]])})
    stats.transform("h", 2, (1,), Scale(np.array([-2.0, 1.0])), None, 1)
    found = stats.of("h")
    assert (found.minimum.tolist(), found.maximum.tolist()) == ([-6.0, 2.0], [2.0, 5.0])
    assert found.largest.tolist() == [6.0, 5.0]


def test_extremes_are_those_of_all_data_not_of_the_samples() -> None:
    """A scale, a shift and a permutation move them exactly, whatever was sampled."""
    x = rows(0)
    base = record(x)
    wide = ChannelStats(-1, base.minimum - 7, base.maximum + 9, base.mean_square, base.samples, 1000)
    stats = Stats({"h": wide})
    stats.transform("h", 3, (2,), Shift(np.arange(6.0)), None, 1)
    assert np.allclose(stats.of("h").maximum, wide.maximum + np.arange(6.0))
    stats.transform("h", 3, (2,), Permute(np.arange(6)[::-1]), None, 1)
    assert np.allclose(stats.of("h").minimum, (wide.minimum + np.arange(6.0))[::-1])


def test_some_channels_only() -> None:
    stats = Stats({"h": record(rows(0))})
    before = stats.of("h")
    atoms = np.array([-1, 0, -1, 1, -1, -1])
    stats.transform("h", 3, (2,), Scale(np.array([2.0, 4.0])), atoms, 1)
    assert np.allclose(stats.of("h").maximum / before.maximum, [1, 2, 1, 4, 1, 1])


def test_a_record_on_other_axes_is_dropped() -> None:
    for axes in ((1,), (1, 2), (0,)):
        stats = Stats({"h": record(rows(0)), "other": record(rows(1))})
        stats.transform("h", 3, axes, Scale(np.ones(CHANNELS)), None, 1)
        assert list(stats) == ["other"]
        stats.transform("nothing", 3, axes, Scale(np.ones(CHANNELS)), None, 1)
    stats = Stats({"image": record(rows(0), axis=-3)})
    stats.transform("image", 4, (1,), Scale(np.full(CHANNELS, 2.0)), None, 1)
    assert "image" in stats


def test_looking_up() -> None:
    stats = Stats({"hidden": record(rows(0))})
    assert "hidden" in stats and "other" not in stats
    assert list(stats) == ["hidden"] and len(stats) == 1
    with pytest.raises(PlanishError) as caught:
        stats.of("hiden")
    assert str(caught.value) == ("statistics: none for value 'hiden'; got 1 values\n  hint: did you mean 'hidden'?")


def test_copies_and_renames_do_not_reach_the_original() -> None:
    stats = Stats({"a": record(rows(0))}, {"data": "made up"})
    copy = stats.copy()
    copy.rename("a", "b")
    copy.rename("missing", "c")
    copy.source["data"] = "changed"
    assert (list(stats), list(copy)) == (["a"], ["b"])
    assert stats.source == {"data": "made up"}
    assert copy.of("b") is stats.of("a")


def test_through_a_file(tmp_path: Path) -> None:
    graph = pre_norm()
    check_text(graph)
    stats = statistics(graph)
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    again = Stats.load(path)
    assert sorted(again) == sorted(stats)
    assert again.source == stats.source
    for name in stats:
        same(again.of(name), stats.of(name), 0.0)
    stats.save(path)  # over an old file
    first = path.read_bytes()
    stats.save(path)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_odd_names(tmp_path: Path) -> None:
    stats = Stats({"/layer.0/Add_output_0": record(rows(0), axis=-2), "a/minimum": record(rows(1))})
    stats.save(tmp_path / "s")
    again = Stats.load(tmp_path / "s")
    assert set(again) == set(stats)
    assert again.of("/layer.0/Add_output_0").axis == -2


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(PlanishError) as caught:
        Stats.load(tmp_path / "no")
    assert str(caught.value) == f"{tmp_path}/no: no such statistics file"


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(PlanishError, match=f"^{path}: not a statistics file of planish: "):
        Stats.load(path)
    path.write_bytes(b"")
    with pytest.raises(PlanishError, match=f"^{path}: not a statistics file of planish: "):
        Stats.load(path)
    save_file({"w": np.ones(2)}, path)
    with pytest.raises(PlanishError, match=f"^{path}: not a statistics file of planish$"):
        Stats.load(path)
    save_file({"w": np.ones(2)}, path, {"planish.stats": "not json"})
    with pytest.raises(PlanishError, match=f"^{path}: not a statistics file of planish: "):
        Stats.load(path)
    for header in ('{"layout": {"h": [-1, 3]}, "source": {}}', '{"layout": {"h": 3}, "source": {}}', "{}", "[]"):
        save_file({"w": np.ones(2)}, path, {"planish.stats": header})
        with pytest.raises(PlanishError, match=f"^{path}: not a statistics file of planish"):
            Stats.load(path)


def test_an_unwritable_place(tmp_path: Path) -> None:
    with pytest.raises(PlanishError) as caught:
        Stats({"h": record(rows(0))}).save(tmp_path / "no" / "s")
    assert caught.value.what.startswith(f"{tmp_path}/no/s: cannot write statistics: ")
