"""Reports as JSON: the same bytes for the same data, and valid JSON whatever the numbers are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any


def dumps(data: Any) -> str:
    """JSON text of plain data, numpy numbers and arrays included; infinity and NaN become strings."""
    return json.dumps(_plain(data), indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def _plain(data: Any) -> Any:
    if isinstance(data, Enum):
        return _plain(data.value)
    if data is None or isinstance(data, bool | int | str):
        return data
    if isinstance(data, float):
        return data if math.isfinite(data) else str(data)
    if isinstance(data, Mapping):
        return {str(k): _plain(v) for k, v in data.items()}
    if isinstance(data, list | tuple | set | frozenset):
        items = [_plain(v) for v in data]
        return sorted(items, key=str) if isinstance(data, set | frozenset) else items
    if hasattr(data, "tolist"):
        return _plain(data.tolist())
    return str(data)
