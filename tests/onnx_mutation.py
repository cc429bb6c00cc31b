"""Damaged copies of a model, and the judgement of what planish makes of each.

    python tests/onnx_mutation.py MODEL FIRST COPIES      one line of JSON a copy; SIGALRM ends the process
                                                          after 60 s on one copy

A copy must give a clean error, or a graph that is written again as a model with equal outputs (where ONNX
Runtime can run the copy at all).
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from ort_run import ORT_ERRORS, run, same, session

from planish.capture.from_onnx import from_onnx
from planish.codegen.onnx import to_model
from planish.ir.errors import PlanishError

SECONDS = 60
MEMORY = 12 << 30  # bytes of address space: a damaged shape must not take the machine down
KINDS = ("flip", "truncate", "delete", "change")


def mutate(data: bytes, seed: int) -> tuple[str, bytes]:
    """A damaged copy: bytes flipped, cut off, a field deleted, or a field changed."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    if kind == "flip":
        array = np.frombuffer(data, np.uint8).copy()
        where = rng.integers(0, len(array), rng.integers(1, 9))
        array[where] ^= rng.integers(1, 256, len(where)).astype(np.uint8)
        return kind, array.tobytes()
    if kind == "truncate":
        return kind, data[: int(rng.integers(0, len(data)))]
    model = ModelProto.FromString(data)
    places = list(_fields(model))
    for _ in range(int(rng.integers(1, 4))):
        message, field = places[int(rng.integers(len(places)))]
        if kind == "delete":
            _delete(message, field, rng)
        else:
            _change(message, field, rng)
    return kind, model.SerializeToString()


def _fields(message: Any) -> Iterator[tuple[Any, Any]]:
    """Every set field of a message and of the messages in it."""
    for field, value in message.ListFields():
        yield message, field
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from _fields(inner)


def _delete(message: Any, field: Any, rng: np.random.Generator) -> None:
    if field.is_repeated and len(getattr(message, field.name)) > 1:
        values = getattr(message, field.name)
        del values[int(rng.integers(len(values)))]
    else:
        message.ClearField(field.name)


def _change(message: Any, field: Any, rng: np.random.Generator) -> None:
    value = getattr(message, field.name)
    if field.message_type is not None:
        if field.is_repeated and len(value):
            value.add().CopyFrom(value[int(rng.integers(len(value)))])
        return
    if field.is_repeated:
        if len(value):
            index = int(rng.integers(len(value)))
            value[index] = _other(value[index], rng)
    else:
        try:
            setattr(message, field.name, _other(value, rng))
        except ValueError:  # an enum without that number
            message.ClearField(field.name)


def _other(value: Any, rng: np.random.Generator) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return int(rng.choice([0, 1, 2, 3, 7, 100, 2**31 - 1]) if value >= 0 else -1)
    if isinstance(value, float):
        return float(rng.choice([0.0, -1.0, 1e30, np.nan, np.inf]))
    text = str(rng.choice(["", "x", "Relu", "nothing", "\u00e9"]))
    if isinstance(value, bytes):
        return text.encode() if len(value) < 64 else value[:-1]
    return text


def judge(data: bytes, folder: Path, feeds: list[dict[str, Any]]) -> tuple[str, str]:
    """What became of a copy: `error`, `same`, `unrunnable` (by ONNX Runtime), or `wrong` with why."""
    path = folder / "copy.onnx"
    path.write_bytes(data)
    try:
        graph = from_onnx(path)
        again = to_model(graph)
    except PlanishError as error:
        return "error", str(error)
    try:
        before = run(path, feeds)
    except ORT_ERRORS as error:
        return "unrunnable", str(error)[:200]
    except (MemoryError, UnicodeDecodeError) as error:
        return "unrunnable", repr(error)
    try:
        after = run(again, feeds)
    except ORT_ERRORS as error:
        return "wrong", f"only the original runs: {str(error)[:300]}"
    if not same(before, after) and same(before, run(path, feeds)):
        return "wrong", "other outputs"
    return "same", ""


def feeds_for(path: Path) -> list[dict[str, Any]]:
    """Random inputs; symbolic dims are 2."""
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for info in session(path).get_inputs():
        dims = [d if isinstance(d, int) else 2 for d in info.shape]
        kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
        if info.type in kinds:
            feeds[info.name] = rng.integers(0, 2, dims).astype(kinds[info.type])
        else:
            feeds[info.name] = rng.standard_normal(dims).astype(np.float32)
    return [feeds]


def main() -> None:
    source, first, copies = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    data = source.read_bytes()
    feeds = feeds_for(source)
    onnx.checker.check_model(source)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + copies):
            kind, damaged = mutate(data, seed)
            signal.alarm(SECONDS)
            verdict, why = judge(damaged, Path(folder), feeds)
            signal.alarm(0)
            print(json.dumps({"seed": seed, "kind": kind, "verdict": verdict, "why": why}), flush=True)


if __name__ == "__main__":
    main()
