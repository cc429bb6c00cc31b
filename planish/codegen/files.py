"""Write the weights of models beside them; see `planish.ir.files` for how files are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

from planish.ir.errors import InvalidModelError, PlanishError

if TYPE_CHECKING:
    from planish.ir.constant import Constant, FileRange

_CHUNK = 8 << 20  # bytes that are copied at a time
_ALIGN = 64  # bytes; weights of a megabyte and more start on a page, so that readers can map them
_PAGE = 4096


def append_weight(handle: IO[bytes], constant: Constant) -> tuple[int, int]:
    """Append a constant's bytes to a data file; (offset, length).

    Data that lies in a file is copied in chunks and never held as a whole.
    """
    from planish.ir.onnx_attributes import data_bytes

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
