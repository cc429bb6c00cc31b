"""Quantised graphs on disk: read where everything is the same, made anew where anything differs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import backend_cases as cases
import pytest
import torch
from backend_cases import Block, close, compiled, filled, numbers, reference

import planish
from planish.integrate import backend_cache, backend_passes
from planish.integrate.convert import Rest
from planish.ir.stats import ChannelStats, Stats


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path))
    monkeypatch.setattr(backend_cache, "LEAST", 0.0)
    with cases.fresh(), torch.no_grad():
        yield


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "folds").glob("*.ir"))


def test_another_process_reads_what_the_passes_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = filled(Block(), 1), numbers(4, 32)
    found = compiled(model, cache=True)(x)
    close(found, reference(model, x), 1e-6)
    assert len(entries(tmp_path)) == 1
    torch._dynamo.reset()

    class Broken(Rest):
        def run(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            raise RuntimeError("the passes ran")

    monkeypatch.setattr(backend_passes, "Rest", Broken)
    close(compiled(model, cache=True)(x), found, 0.0)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="the passes ran"):
        compiled(model, cache=False)(x)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="the passes ran"):
        compiled(filled(Block(), 2), cache=True)(x)


def test_an_entry_that_is_damaged_is_made_anew(tmp_path: Path) -> None:
    model, x = filled(Block(), 1), numbers(4, 32)
    found = compiled(model, cache=True)(x)
    (entry,) = entries(tmp_path)
    for damage in (b"", b"# planish graph, format 1\ngraph @x() {\n", entry.read_bytes()[:200]):
        entry.write_bytes(damage)
        torch._dynamo.reset()
        close(compiled(model, cache=True)(x), found, 0.0)


def test_what_a_later_fold_makes_is_not_kept(tmp_path: Path) -> None:
    model, x = filled(Block(), 1), numbers(4, 32)
    run = compiled(model, cache=True)
    for _ in range(3):
        run(x)
        model.up.weight.mul_(1.1)
    assert len(entries(tmp_path)) == 1


def test_quick_work_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_cache, "LEAST", 1000.0)
    compiled(filled(Block(), 1), cache=True)(numbers(4, 32))
    assert entries(tmp_path) == []


def test_all_that_decides_is_in_the_name() -> None:
    graph = planish.capture(filled(Block(), 1), (numbers(4, 32),))
    other = planish.capture(filled(Block(), 2), (numbers(4, 32),))
    samples = numbers(3, 4).numpy()

    def stats(largest: float) -> Stats:
        ends = samples.max(0).astype("f8")
        return Stats({"x": ChannelStats(-1, -ends, ends * largest, ends**2, samples, 3)})

    batch = [{"x": numbers(2, 2)}]
    names = [
        backend_cache._key(graph, ["raise"], None, None),
        backend_cache._key(other, ["raise"], None, None),
        backend_cache._key(graph, ["raise", "1"], None, None),
        backend_cache._key(graph, ["raise"], stats(1.0), None),
        backend_cache._key(graph, ["raise"], stats(2.0), None),
        backend_cache._key(graph, ["raise"], stats(2.0), batch),
    ]
    assert len(set(names)) == len(names)
    again = planish.capture(filled(Block(), 1), (numbers(4, 32),))
    assert backend_cache._key(again, ["raise"], None, None) == names[0]


def test_the_oldest_entries_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    x = numbers(4, 32)
    for seed in (1, 2):
        torch._dynamo.reset()
        compiled(filled(Block(), seed), cache=True)(x)
        for entry in entries(tmp_path):
            os.utime(entry, (seed, seed) if seed == 1 else None)
    old = min(entries(tmp_path), key=lambda path: path.stat().st_mtime)
    os.utime(old, (1, 1))
    monkeypatch.setattr(backend_cache, "MOST", 1)
    torch._dynamo.reset()
    compiled(filled(Block(), 3), cache=True)(x)
    assert not old.exists() and len(entries(tmp_path)) == 1
