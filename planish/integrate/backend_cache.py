"""Quantised graphs on disk: a second process does not search for scales again.

The name of an entry is a digest of all that it was made of: the captured graph with the bytes of its weights, the
passes, the statistics, the seed, the source text of planish and the version of torch. Entries are written once, to a
temporary name, by `planish.ir.store`; one that cannot be read is made again. Only what took long is kept
(`LEAST` seconds), and the oldest go when the folder exceeds `MOST` bytes.

They lie in `folds/` in `$PLANISH_CACHE`, else in `~/.cache/planish`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import planish
from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.graph import Graph
from planish.ir.stats import FIELDS, Stats
from planish.ir.store import load, save
from planish.ir.text import render

LEAST = 1.0  # seconds of work that is worth an entry
MOST = 8 << 30  # bytes


def cached(
    graph: Graph,
    made_of: Sequence[str],
    stats: Stats | None,
    data: Sequence[Mapping[str, torch.Tensor]] | None,
    make: Callable[[], Graph],
) -> Graph:
    """What `make` makes of a graph, or made of it before.

    Args:
        graph: as it was captured.
        made_of: the passes, the seed: whatever else decides.
        stats, data: of calibration.
    """
    path = _folder() / f"{_key(graph, made_of, stats, data)}.ir"
    if path.exists():
        with contextlib.suppress(PlanishError, OSError):
            found = load(path)
            os.utime(path)  # the entries that nobody reads go first
            return found
    begin = time.process_time()
    made = make()
    if time.process_time() - begin >= LEAST:
        with contextlib.suppress(PlanishError, OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            save(made, path)
            _prune(path.parent)
    return made


def _folder() -> Path:
    return Path(os.environ.get("PLANISH_CACHE") or Path.home() / ".cache" / "planish").expanduser() / "folds"


def _key(
    graph: Graph, made_of: Sequence[str], stats: Stats | None, data: Sequence[Mapping[str, torch.Tensor]] | None
) -> str:
    digest = hashlib.blake2b(digest_size=20)
    text, constants = render(graph)
    for part in (_sources(), torch.__version__, *made_of, text):
        digest.update(part.encode() + b"\0")
    for name, constant in sorted(constants.items()):
        _add(digest, name, constant)
    if stats is not None:
        for name in sorted(stats):
            record = stats.of(name)
            digest.update(f"{name} {record.axis} {record.count}\0".encode())
            for field in FIELDS:
                digest.update(np.ascontiguousarray(getattr(record, field)).tobytes())
    for batch in data or ():
        for name in sorted(batch):
            _add(digest, name, Constant.of(batch[name]))
    return digest.hexdigest()


def _add(digest: Any, name: str, constant: Constant) -> None:
    array = np.ascontiguousarray(constant._raw())
    digest.update(f"{name} {constant.type} {array.dtype}\0".encode())
    if array.dtype.kind == "O":
        digest.update(repr(array.tolist()).encode())
    elif array.size:
        digest.update(array.reshape(-1).view(np.uint8).data)


@functools.cache
def _sources() -> str:
    """A digest of the code that makes quantised graphs."""
    digest = hashlib.blake2b(digest_size=20)
    root = Path(planish.__file__).parent
    for folder in ("ir", "passes", "capture", "calibrate"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _prune(folder: Path) -> None:
    """Remove the entries that were read longest ago, while all take more than `MOST` bytes."""
    entries = sorted(folder.glob("*.ir"), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(part.stat().st_size for part in folder.glob(f"{path.name}*")) for path in entries}
    total = sum(sizes.values())
    for path in entries[:-1]:
        if total <= MOST:
            return
        total -= sizes[path]
        for part in folder.glob(f"{path.name}*"):
            part.unlink(missing_ok=True)
