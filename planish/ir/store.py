"""Save a graph to a text file with its large constants in a safetensors file beside it, and load it again.

    save(graph, "model.ir")      model.ir  and  model.ir.<digest>.safetensors
    load("model.ir")             the constants are mapped when they are read

The name of the data file follows from its content and stands in the first line of the text. So a graph that
still maps an older file never reads another's bytes, and an interrupted save leaves the old pair whole.
Constants of dtypes that safetensors lacks are stored as packed bytes; their type stands in the metadata.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

from planish.ir.constant import Constant, FileRange, pack_bits
from planish.ir.errors import InvalidModelError, PlanishError
from planish.ir.files import atomic
from planish.ir.graph import Graph
from planish.ir.literals import encode_elements, unquote
from planish.ir.text import parse, render
from planish.ir.types import TensorType, bits

if TYPE_CHECKING:
    import numpy as np

_SAFETENSORS = {
    "f64": "F64",
    "f32": "F32",
    "f16": "F16",
    "bf16": "BF16",
    "i64": "I64",
    "i32": "I32",
    "i16": "I16",
    "i8": "I8",
    "u64": "U64",
    "u32": "U32",
    "u16": "U16",
    "u8": "U8",
    "bool": "BOOL",
    "f8e4m3fn": "F8_E4M3",
    "f8e5m2": "F8_E5M2",
}
_HEADER = re.compile(r'# planish graph, format 1(?:, data in "([^"\\\n]+)")?\n')
_LIMIT = 100_000_000  # bytes of a safetensors header


def save(graph: Graph, path: str | Path) -> None:
    """Write a graph. An older data file of the same graph file is removed, unless `graph` itself reads it.

    Raises:
        PlanishError: a file cannot be written, or a constant not be read.
    """
    path = Path(path)
    text, constants = render(graph)
    old = _data_name(path)
    new = None
    if constants:
        new = _write_data(constants, path)
    data = f', data in "{new}"' if new else ""
    with atomic(path) as file:
        file.write(f"# planish graph, format 1{data}\n".encode("ascii"))
        file.write(text.encode("ascii"))
        _flush(file)
    if old is not None and old != new:
        stale = path.with_name(old)
        if not any(c.file is not None and c.file.path.name == old for c in constants.values()):
            with contextlib.suppress(OSError):
                stale.unlink()


def load(path: str | Path) -> Graph:
    """Read a graph; its large constants are mapped when they are first needed.

    Raises:
        PlanishError: a file is missing or damaged, or the text is not a graph.
    """
    path = Path(path)
    text = _read_text(path)
    header = _HEADER.match(text)
    constants: Mapping[str, Constant] = {}
    if header is not None and header[1] is not None:
        if "/" in header[1] or os.sep in header[1] or not header[1].startswith(f"{path.name}."):
            raise InvalidModelError(f"{path}: data file '{header[1]}' is not one of this graph's")
        constants = _read_data(path.with_name(header[1]))
    try:
        return parse(text, constants)
    except PlanishError as error:
        raise PlanishError(f"{path}: {error.what}", where=error.where, hint=error.hint) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("ascii")
    except OSError as error:
        raise PlanishError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InvalidModelError(f"{path}: not the text of a graph (byte {error.start} is not ASCII)") from error


def _data_name(path: Path) -> str | None:
    """The data file that an existing graph file names; None if there is none."""
    try:
        with path.open("rb") as file:
            first = file.readline(4096).decode("latin-1")
    except OSError:
        return None
    header = _HEADER.match(first)
    name = header[1] if header is not None else None
    return name if name is not None and name.startswith(f"{path.name}.") and "/" not in name else None


# -- safetensors ---------------------------------------------------------------------------------


def _write_data(constants: Mapping[str, Constant], path: Path) -> str:
    """Write the data file of `path`; its name."""
    if "__metadata__" in constants:
        raise PlanishError("constant '__metadata__': safetensors keeps this name for itself")
    order = sorted(constants, key=lambda key: (-_element_bytes(constants[key]), key))  # so all are aligned
    metadata: dict[str, str] = {"format": "planish"}
    header: dict[str, object] = {"__metadata__": metadata}
    strings: dict[str, bytes] = {}
    offset = 0
    for key in order:
        constant = constants[key]
        if constant.dtype == "str":
            strings[key] = "\n".join(encode_elements(constant.array(), "str")).encode("ascii")
        name, shape = _SAFETENSORS.get(constant.dtype), list(constant.shape)
        length = constant.nbytes
        if constant.is_wide:
            name, length = "F64", constant.size * 8
        elif name is None:
            length = len(strings[key]) if key in strings else length
            name, shape = "U8", [length]
        if constant.is_wide or constant.dtype not in _SAFETENSORS:
            metadata[f"type:{key}"] = f"{constant.type}"
        header[key] = {"dtype": name, "shape": shape, "data_offsets": [offset, offset + length]}
        offset += length
    head = json.dumps(header, separators=(",", ":")).encode("ascii")
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256(head)

    def name_of_data() -> str:
        return f"{path.name}.{digest.hexdigest()[:12]}.safetensors"

    with atomic(path, name_of_data) as file:
        file.write(len(head).to_bytes(8, "little"))
        file.write(head)
        for key in order:
            data = strings[key] if key in strings else _bytes_of(constants[key])
            digest.update(data)
            file.write(data)
        _flush(file)
    return name_of_data()


def _flush(file: IO[bytes]) -> None:
    """Wait until the data lies on the disk: the text must not name data that a power cut loses."""
    file.flush()
    os.fsync(file.fileno())


def _element_bytes(constant: Constant) -> int:
    return 8 if constant.is_wide else bits(constant.dtype) // 8


def _bytes_of(constant: Constant) -> memoryview | bytes:
    import numpy as np

    array: np.ndarray = constant._raw() if constant.is_wide else constant.array()
    if array.size == 0:
        return b""
    if bits(constant.dtype) < 8:
        array = pack_bits(array, constant.dtype)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _read_data(path: Path) -> dict[str, Constant]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LIMIT):
                raise InvalidModelError(f"{path}: not a safetensors file, or one that ends early")
            head = file.read(length)
    except OSError as error:
        raise PlanishError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(head)
        metadata = header.pop("__metadata__", {})
        entries = []
        for key, entry in header.items():
            begin, end = map(int, entry["data_offsets"])
            entries.append((key, *_entry(key, entry, metadata), begin, end))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, PlanishError) as error:
        raise InvalidModelError(f"{path}: damaged safetensors header: {error}") from error
    found: dict[str, Constant] = {}
    for key, type_, stored, begin, end in entries:
        file_range = FileRange(path, 8 + length + begin, end - begin)
        expected = (_product(stored.shape or ()) * bits(stored.dtype) + 7) // 8
        if not 0 <= begin <= end <= size - 8 - length or end - begin != expected:
            raise InvalidModelError(f"{path}: data '{key}': wrong extent; expected {expected} bytes in the file")
        found[key] = _constant(type_, stored, file_range)
    return found


def _entry(key: str, entry: Mapping[str, object], metadata: Mapping[str, str]) -> tuple[TensorType, TensorType]:
    """The type of a constant, and the type of what is stored for it."""
    from planish.ir.parser import parse_type

    shape = entry["shape"]
    if not isinstance(shape, list) or not all(isinstance(d, int) and d >= 0 for d in shape):
        raise ValueError(f"shape of '{key}'")
    names = {name: dtype for dtype, name in _SAFETENSORS.items()}
    stored = TensorType(names[str(entry["dtype"])], tuple(shape))
    declared = metadata.get(f"type:{key}")
    if declared is None:
        return stored, stored
    type_ = parse_type(declared)
    if not isinstance(type_, TensorType) or not all(isinstance(d, int) for d in type_.shape or (None,)):
        raise ValueError(f"type of '{key}'")
    if stored.dtype != "f64" and type_.dtype != "str":
        stored = type_  # packed bytes
    return type_, stored


def _constant(type_: TensorType, stored: TensorType, file_range: FileRange) -> Constant:
    shape = tuple(d for d in type_.shape or () if isinstance(d, int))
    if type_ == stored:
        return Constant(None, type_.dtype, shape, file=file_range)
    held = Constant(None, stored.dtype, tuple(d for d in stored.shape or () if isinstance(d, int)), file=file_range)
    raw = held.array()
    if type_.dtype == "str":
        raw = _strings(raw.tobytes().decode("ascii").split("\n") if raw.size else [], file_range.path)
    return Constant(raw.reshape(shape), type_.dtype, shape)


def _strings(words: Iterable[str], path: Path) -> np.ndarray:
    import numpy as np

    found: list[str | bytes] = []
    for word in words:
        try:
            is_bytes = word.startswith("b")
            text = unquote(word[2:-1] if is_bytes else word[1:-1])
            found.append(text.encode("latin-1") if is_bytes else text)
        except ValueError as error:
            raise InvalidModelError(f"{path}: damaged strings: {error}") from error
    array = np.empty(len(found), object)
    array[:] = found
    return array


def _product(shape: Iterable[object]) -> int:
    n = 1
    for d in shape:
        n *= d if isinstance(d, int) else 0
    return n
