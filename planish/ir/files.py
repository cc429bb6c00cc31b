"""Write files whole or not at all.

An output is written under a temporary name in its own folder and renamed at the end: an interrupted
run leaves the old file as it was.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from planish.ir.errors import PlanishError


@contextmanager
def atomic(
    path: str | Path, name: Callable[[], str] | None = None, failure: str = "cannot be written"
) -> Iterator[IO[bytes]]:
    """A binary file that takes its name when the block ends without an error.

    Args:
        path: the file.
        name: its name, where that is known only when all is written; `path` gives the folder then.
        failure: what an error says of the file.

    Raises:
        PlanishError: the file cannot be written.
    """
    with _staged([Path(path)], name, failure) as (handle,):
        yield handle


@contextmanager
def atomic_group(paths: list[str | Path] | list[Path] | list[str]) -> Iterator[list[IO[bytes]]]:
    """Several files that take their names together: on an error all old ones stay, or come back.

    Raises:
        PlanishError: one cannot be written.
    """
    with _staged([Path(p) for p in paths]) as handles:
        yield handles


@contextmanager
def _staged(
    targets: list[Path], name: Callable[[], str] | None = None, failure: str = "cannot be written"
) -> Iterator[list[IO[bytes]]]:
    handles: list[IO[bytes]] = []
    staged: list[Path] = []
    try:
        try:
            for target in targets:
                if target.is_dir():
                    raise PlanishError(f"{target}: {failure}: is a directory")
                number, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
                staged.append(Path(temporary))
                handles.append(os.fdopen(number, "wb"))
            yield handles
            for handle in handles:
                handle.close()
            if name is not None:
                targets = [target.with_name(name()) for target in targets]
            for name_, target in zip(staged, targets, strict=True):
                os.chmod(name_, _mode(target))
            _rename_all(staged, targets)
        except OSError as error:
            where = error.filename2 or targets[min(len(handles), len(targets) - 1)]
            raise PlanishError(f"{where}: {failure}: {error.strerror or error}") from error
    finally:
        for handle in handles:
            with suppress(OSError):
                handle.close()
        for name_ in staged:
            name_.unlink(missing_ok=True)


def _mode(target: Path) -> int:
    """The permissions of the old file, or those that a new one would get."""
    try:
        return target.stat().st_mode & 0o777
    except OSError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def _rename_all(staged: list[Path], targets: list[Path]) -> None:
    """Rename each; if one fails or the user interrupts, put the old files back."""
    kept: dict[Path, Path] = {}
    moved: list[Path] = []
    try:
        if len(targets) > 1:
            for name, target in zip(staged, targets, strict=True):
                if target.exists():
                    kept[target] = name.with_suffix(".old")
                    os.link(target, kept[target])
        for name, target in zip(staged, targets, strict=True):
            os.replace(name, target)
            moved.append(target)
    except BaseException:
        for target in moved:
            if target in kept:
                os.replace(kept[target], target)
            else:
                target.unlink(missing_ok=True)
        raise
    finally:
        for old in kept.values():
            old.unlink(missing_ok=True)
