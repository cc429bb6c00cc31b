"""The IR on disk: the text in one file, the data of large constants in a safetensors file beside it.

`net.ir` is the text (`planish.ir.text`); `net.ir.safetensors` holds what the text names by key, as raw
little-endian bytes with dtype and shape in its header. Small graphs have no second file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from planish.ir.constant import Constant
from planish.ir.errors import PlanishError
from planish.ir.files import atomic_group
from planish.ir.graph import Graph
from planish.ir.text import parse, render
from planish.ir.types import numpy_dtype

if TYPE_CHECKING:
    import numpy as np

_HEADER = "planish.constants"


def write_ir(graph: Graph, path: str | Path) -> None:
    """Write a graph as text, with a safetensors file beside it where it has large constants.

    Raises:
        PlanishError: a file cannot be written.
    """
    from safetensors.numpy import save

    path = Path(path)
    text, constants = render(graph)
    if not constants:
        with atomic_group([path]) as (handle,):
            handle.write(text.encode())
        return
    layout = {key: [c.dtype, list(c.shape), c.is_wide] for key, c in constants.items()}
    data = save({key: _bytes(c) for key, c in constants.items()}, {_HEADER: json.dumps(layout)})
    with atomic_group([_beside(path), path]) as (weights, handle):
        weights.write(data)
        handle.write(text.encode())


def read_ir(path: str | Path) -> Graph:
    """Read a graph that `write_ir` wrote.

    Raises:
        PlanishError: no such file, or it does not parse.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="ascii")
    except UnicodeDecodeError as error:
        raise PlanishError(f"{path}: not the text of a graph (byte {error.start} is not ASCII)") from error
    except OSError as error:
        raise PlanishError(f"{path}: cannot be read: {error.strerror or error}") from error
    beside = _beside(path)
    return parse(text, _read_constants(beside) if beside.is_file() else {})


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".safetensors")


def _bytes(constant: Constant) -> np.ndarray:
    import numpy as np

    if constant.dtype == "str":
        words = [w.decode("latin-1") if isinstance(w, bytes) else str(w) for w in constant.array().reshape(-1)]
        return np.frombuffer(json.dumps(words).encode(), np.uint8)
    data = constant.wide() if constant.is_wide else constant.array()
    return np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)


def _read_constants(path: Path) -> dict[str, Constant]:
    import numpy as np
    from safetensors import SafetensorError, safe_open

    constants: dict[str, Constant] = {}
    try:
        with safe_open(path, "numpy") as handle:
            layout = json.loads((handle.metadata() or {}).get(_HEADER, "null"))
            if not isinstance(layout, dict):
                raise PlanishError(f"{path}: not the constants of a graph")
            for key, (dtype, shape, wide) in layout.items():
                raw = handle.get_tensor(key)
                if dtype == "str":
                    data = np.array(json.loads(raw.tobytes()), object).reshape(shape)
                else:
                    data = raw.view(np.dtype("float64") if wide else numpy_dtype(dtype)).reshape(shape)
                constants[key] = Constant(data, dtype, tuple(shape))
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise PlanishError(f"{path}: not the constants of a graph: {error}") from error
    return constants
