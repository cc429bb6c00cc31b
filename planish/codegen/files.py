"""Write files whole or not at all, and models with their weights beside them.

An output is written under a temporary name in its own folder and renamed at the end: an interrupted
run leaves the old file as it was.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from planish.ir.errors import InvalidModelError, PlanishError

if TYPE_CHECKING:
    from planish.ir.constant import Constant, FileRange

_CHUNK = 8 << 20  # bytes that are copied at a time
_ALIGN = 64  # bytes; weights of a megabyte and more start on a page, so that readers can map them
_PAGE = 4096


@contextmanager
def atomic(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path` when the block ends without an error.

    Raises:
        PlanishError: the file cannot be written.
    """
    with atomic_group([path]) as (handle,):
        yield handle


@contextmanager
def atomic_group(paths: list[str | Path] | list[Path] | list[str]) -> Iterator[list[IO[bytes]]]:
    """Several files that take their names together: on an error all old ones stay, or come back."""
    targets = [Path(p) for p in paths]
    handles: list[IO[bytes]] = []
    staged: list[Path] = []
    try:
        try:
            for target in targets:
                if target.is_dir():
                    raise PlanishError(f"{target}: cannot be written: is a directory")
                number, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
                staged.append(Path(name))
                handles.append(os.fdopen(number, "wb"))
            yield handles
            for handle in handles:
                handle.close()
            for name_, target in zip(staged, targets, strict=True):
                os.chmod(name_, _mode(target))
            _rename_all(staged, targets)
        except OSError as error:
            where = error.filename2 or targets[min(len(handles), len(targets) - 1)]
            raise PlanishError(f"{where}: cannot be written: {error.strerror or error}") from error
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


def append_weight(handle: IO[bytes], constant: Constant) -> tuple[int, int]:
    """Append a constant's bytes to a data file; (offset, length).

    Data that lies in a file is copied in chunks and never held as a whole.
    """
    from planish.capture.onnx_proto import data_bytes

    align = _PAGE if constant.nbytes >= 1 << 20 else _ALIGN
    offset = handle.tell()
    padding = -offset % align
    handle.write(bytes(padding))
    if constant.file is not None:
        _copy(handle, constant.file)
    else:
        handle.write(data_bytes(constant))
    return offset + padding, handle.tell() - offset - padding


def _copy(handle: IO[bytes], source: FileRange) -> None:
    try:
        reader = source.path.open("rb")
    except OSError as error:
        raise InvalidModelError(f"{source.path}: cannot read external data: {error.strerror}") from error
    with reader:
        reader.seek(source.offset)
        left = source.length
        while left:
            chunk = reader.read(min(_CHUNK, left))
            if not chunk:
                raise InvalidModelError(
                    f"{source.path}: external data ends early; expected {source.offset + source.length} bytes"
                )
            handle.write(chunk)
            left -= len(chunk)


def refuse_overwriting(path: Path, constants: Mapping[str, Constant]) -> None:
    """An error if `path` is a file from which constants are still read.

    Raises:
        PlanishError: it is.
    """
    if not path.exists():
        return
    sources = {c.file.path for c in constants.values() if c.file is not None}
    if any(source.exists() and os.path.samefile(source, path) for source in sources):
        raise PlanishError(
            f"{path}: the weights that are being written are read from it",
            hint="write to another name or folder",
        )


def free_space(path: Path, needed: int) -> None:
    """An error if the disk of `path` has not `needed` bytes left.

    Raises:
        PlanishError: the disk is too full.
    """
    try:
        free = shutil.disk_usage(path.parent or Path(".")).free
    except OSError as error:
        raise PlanishError(f"{path}: cannot be written: {error.strerror}") from error
    if free < needed:
        raise PlanishError(f"{path}: cannot be written: {needed} bytes needed, {free} free on the disk")
