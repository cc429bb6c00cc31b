"""Calibration data from files: arrays in .npz, a folder of them, or text with a tokenizer.

An .npz holds one array per input, by the input's name. Either the first dim of each array counts
samples that the model takes in batches, or every array has one dim more than its input: then each
index of it is one whole set of inputs. A text file holds one sample a line; the tokenizer's own
output names say which inputs it fills.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from planish.calibrate.tokens import load_tokenizer, padding
from planish.ir.errors import PlanishError, nearest
from planish.ir.graph import Graph, Value
from planish.ir.types import TensorType, from_numpy_dtype, is_float, numpy_dtype

Arrays = dict[str, np.ndarray]
MASK = "attention_mask"  # what tokenizers call their mask
TOKENIZER_OUTPUTS = ("input_ids", MASK, "token_type_ids")


@dataclass(frozen=True)
class Calibration:
    """Batches of inputs; iterating again starts again.

    Attributes:
        batches: mappings from input names to arrays.
        row_mask: the input that marks the rows that count, where the data knows it.
        source: a description.
        samples: their number.
    """

    batches: list[Arrays] = field(repr=False)
    row_mask: str | None = None
    source: str = ""
    samples: int = 0

    def __iter__(self) -> Iterator[Arrays]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def load_calibration(
    path: str | Path,
    graph: Graph,
    tokenizer: str | Path | None = None,
    batch: int = 8,
    length: int = 128,
    samples: int | None = None,
) -> Calibration:
    """Read calibration data for a graph.

    Args:
        path: an .npz file, a folder of .npz files (read in the order of their names), or a text file.
        graph: whose inputs the data must fit.
        tokenizer: for text: the folder with tokenizer.json (or vocab.txt).
        batch: samples per batch, where the model takes any number.
        length: for text: tokens at which a sample is cut.
        samples: use only this many, spread evenly over the data.

    Raises:
        PlanishError: no such file, not of these kinds, or names, shapes or dtypes that do not fit the graph.
    """
    path = Path(path)
    if batch < 1 or length < 1 or (samples is not None and samples < 1):
        raise PlanishError(
            f"calibration: batch, length and samples must be at least 1; got {batch}, {length}, {samples}"
        )
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise PlanishError(f"{path}: no .npz file in this folder")
        return _from_arrays(files, graph, batch, samples, str(path))
    if not path.is_file():
        raise PlanishError(f"{path}: no such calibration file or folder")
    if path.suffix == ".npz":
        return _from_arrays([path], graph, batch, samples, str(path))
    if path.suffix in (".txt", ".text"):
        if tokenizer is None:
            raise PlanishError(
                f"{path}: text needs a tokenizer",
                hint="give the folder that holds tokenizer.json (--tokenizer)",
            )
        return _from_text(path, graph, Path(tokenizer), batch, length, samples)
    raise PlanishError(
        f"{path}: unknown kind of calibration data; expected .npz, a folder of .npz, or .txt with a tokenizer"
    )


def load_inputs(path: str | Path, graph: Graph) -> Arrays:
    """One set of inputs of a graph from an .npz file whose arrays have the inputs' own shapes.

    Raises:
        PlanishError: it cannot be read, or it does not fit the graph.
    """
    path = Path(path)
    arrays = _read(path)
    inputs = _match_names(path, arrays, graph)
    return {name: _check(path, inputs[name], array, lead=False) for name, array in arrays.items()}


# -- arrays --------------------------------------------------------------------------------------


def _read(path: Path) -> Arrays:
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise PlanishError(f"{path}: not an .npz archive")
            return {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlanishError(f"{path}: cannot be read as .npz: {reason}") from error
    except OSError as error:
        raise PlanishError(f"{path}: cannot be read: {error.strerror or error}") from error


def _match_names(path: Path, arrays: Arrays, graph: Graph) -> dict[str, Value]:
    inputs = {v.name: v for v in graph.inputs}
    for name in arrays:
        if name not in inputs:
            raise PlanishError(
                f"{path}: array '{name}': not an input of the model; expected {', '.join(inputs) or 'none'}",
                hint=nearest(name, inputs),
            )
    missing = [name for name, value in inputs.items() if value.constant is None and name not in arrays]
    if missing:
        raise PlanishError(
            f"{path}: input '{missing[0]}' is missing; got {', '.join(arrays) or 'no arrays'}",
            where=str(inputs[missing[0]]),
        )
    return inputs


def _check(path: Path, value: Value, array: np.ndarray, *, lead: bool) -> np.ndarray:
    """An array in the dtype of its input, shapes checked; `lead`: it has one dim more, in front."""
    what = f"{path}: array '{value.name}'"
    type_ = value.type
    if not isinstance(type_, TensorType):
        raise PlanishError(f"{what}: the model expects {type_}; only tensors can be calibrated with")
    shape = array.shape[1:] if lead else array.shape
    if type_.shape is not None:
        fits = len(shape) == len(type_.shape) and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(type_.shape, shape, strict=True)
        )
        if not fits:
            more = " (after the dim that counts samples)" if lead else ""
            raise PlanishError(f"{what}: wrong shape; expected {type_}{more}, got {list(array.shape)}")
    try:
        got = from_numpy_dtype(array.dtype)
    except KeyError:
        got = str(array.dtype)
    if got == type_.dtype:
        return array
    wanted = numpy_dtype(type_.dtype)
    whole = array.dtype.kind in "iub" and wanted.kind in "iub"
    if not (whole or (array.dtype.kind == "f" and is_float(type_.dtype))):
        raise PlanishError(f"{what}: wrong dtype; expected {type_.dtype}, got {got}")
    cast = array.astype(wanted)
    if whole and not np.array_equal(cast.astype(array.dtype), array):
        raise PlanishError(f"{what}: wrong dtype; its {got} values do not fit {type_.dtype}")
    return cast


def _from_arrays(files: list[Path], graph: Graph, batch: int, samples: int | None, source: str) -> Calibration:
    sets: list[Arrays] = []  # whole sets of inputs
    count = 0
    for path in files:
        arrays = _read(path)
        inputs = _match_names(path, arrays, graph)
        if not arrays:
            raise PlanishError(f"{path}: holds no arrays")
        lead = all(
            value.rank is not None and array.ndim == value.rank + 1
            for value, array in ((inputs[n], a) for n, a in arrays.items())
        )
        if not lead:
            arrays = _fix_first(inputs, arrays, path)
        checked = {
            name: _check(path, _loose(inputs[name]) if not lead else inputs[name], array, lead=lead)
            for name, array in arrays.items()
        }
        counted = {name: len(array) for name, array in checked.items() if array.ndim}
        if 0 in counted.values():
            raise PlanishError(f"{path}: holds no samples")
        if len(set(counted.values())) > 1:
            raise PlanishError(
                f"{path}: arrays hold different numbers of samples: "
                + ", ".join(f"'{n}' {c}" for n, c in counted.items())
            )
        total = next(iter(counted.values()), 1)
        count += total
        if lead:
            sets += [{name: array[i] for name, array in checked.items()} for i in range(total)]
        else:
            sets.append(checked)
    return _thin(sets, inputs, batch, samples, source, count)


def _loose(value: Value) -> Value:
    """The input with any number of samples: its first dim left open."""
    assert isinstance(value.type, TensorType)
    shape = value.type.shape
    if not shape:
        return value
    return Value(value.name, TensorType(value.type.dtype, (None, *shape[1:])), is_input=True)


def _fix_first(inputs: dict[str, Value], arrays: Arrays, path: Path) -> Arrays:
    """Arrays whose first dim counts samples: a static first dim of the model must divide their number."""
    for name, array in arrays.items():
        value = inputs[name]
        if not isinstance(value.type, TensorType):
            continue
        if value.rank is not None and array.ndim == value.rank + 1:
            raise PlanishError(
                f"{path}: array '{name}': wrong shape; expected {value.type}, got {list(array.shape)}",
                hint="either every array has one dim more than its input, or none has",
            )
        first = value.type.dim(0) if value.rank else None
        if isinstance(first, int) and array.ndim and len(array) % (first or 1):
            raise PlanishError(
                f"{path}: array '{name}': wrong shape; expected {value.type} "
                f"(or a multiple of {first} samples), got {list(array.shape)}"
            )
    return arrays


def _thin(
    sets: list[Arrays], inputs: dict[str, Value], batch: int, samples: int | None, source: str, count: int
) -> Calibration:
    """Cut sets of inputs into batches, of `samples` samples spread evenly over all of them."""
    fixed = [
        first
        for name, value in inputs.items()
        if name in sets[0]
        and isinstance(value.type, TensorType)
        and value.rank
        and isinstance(first := value.type.dim(0), int)
    ]
    if len(sets) == count:  # each set is one sample
        chosen = sets if samples is None else [sets[i] for i in _spread(count, samples)]
        return Calibration(chosen, None, source, len(chosen))
    step = fixed[0] if fixed else batch
    wanted = None
    if samples is not None:
        wanted = set(_spread(count, samples if not fixed else max(samples // step, 1) * step))
    batches: list[Arrays] = []
    first, kept = 0, 0
    for arrays in sets:
        total = max((len(a) for a in arrays.values() if a.ndim), default=1)
        rows = np.array([i for i in range(total) if wanted is None or first + i in wanted], np.int64)
        first += total
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            if fixed and len(part) < step:
                continue
            kept += len(part)
            batches.append({n: a[part] if a.ndim else a for n, a in arrays.items()})
    return Calibration(batches, None, source, kept)


def _spread(count: int, samples: int) -> list[int]:
    if samples >= count:
        return list(range(count))
    return [i * count // samples for i in range(samples)]


# -- text ----------------------------------------------------------------------------------------


def _from_text(path: Path, graph: Graph, folder: Path, batch: int, length: int, samples: int | None) -> Calibration:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise PlanishError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise PlanishError(f"{path}: cannot be read: {error.strerror or error}") from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise PlanishError(f"{path}: holds no text")
    if samples is not None:
        texts = [texts[i] for i in _spread(len(texts), samples)]
    inputs = {v.name: v for v in graph.inputs if v.constant is None}
    unknown = [n for n in inputs if n not in TOKENIZER_OUTPUTS]
    if unknown:
        raise PlanishError(
            f"input '{unknown[0]}': a tokenizer does not give it; expected only {', '.join(TOKENIZER_OUTPUTS)}",
            where=str(inputs[unknown[0]]),
            hint="calibrate with arrays (.npz)",
        )
    encoder = load_tokenizer(folder)
    fixed = _static_length(inputs)
    encoder.enable_truncation(max_length=fixed or length)
    pad = padding(encoder, folder)
    if fixed:
        encoder.enable_padding(length=fixed, **pad)
    else:
        encoder.enable_padding(**pad)
    batches: list[Arrays] = []
    firsts = {v.type.dim(0) for v in inputs.values() if isinstance(v.type, TensorType)}
    sizes = {d for d in firsts if isinstance(d, int)}
    step = sizes.pop() if sizes else batch
    kept = 0
    for start in range(0, len(texts), step):
        part = texts[start : start + step]
        if firsts and len(part) < step and any(isinstance(d, int) for d in firsts):
            continue
        encoded = encoder.encode_batch(part)
        columns = (
            [e.ids for e in encoded],
            [e.attention_mask for e in encoded],
            [e.type_ids for e in encoded],
        )
        given = {name: np.asarray(c) for name, c in zip(TOKENIZER_OUTPUTS, columns, strict=True)}
        batches.append({n: _check(path, inputs[n], a, lead=False) for n, a in given.items() if n in inputs})
        kept += len(part)
    return Calibration(batches, MASK if MASK in inputs else None, f"{path} ({folder})", kept)


def _static_length(inputs: dict[str, Value]) -> int | None:
    for value in inputs.values():
        if isinstance(value.type, TensorType) and isinstance(dim := value.type.dim(1), int):
            return dim
    return None
