"""Headers of planish/kernels/cpp as text: what an emitted C++ file takes over.

A header names what it needs by `#include "other.h"`, a file of the same folder. Those lines are left out of the text:
the other file stands before it, once. System includes stay where they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from planish.ir.errors import PlanishError, nearest

FOLDER = Path(__file__).parent.parent / "kernels" / "cpp"
_INCLUDE = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)


@cache
def _read(name: str) -> str:
    path = FOLDER / name
    if not path.is_file():
        known = [p.name for p in FOLDER.glob("*.h")]
        raise PlanishError(f"header '{name}': there is none in planish/kernels/cpp", hint=nearest(name, known))
    return path.read_text(encoding="utf-8")


def ordered(names: Iterable[str]) -> list[str]:
    """The headers and what they include, each once, dependencies first.

    Raises:
        PlanishError: there is no such header.
    """
    found: list[str] = []
    for name in names:
        for needed in (*ordered(_INCLUDE.findall(_read(name))), name):
            if needed not in found:
                found.append(needed)
    return found


def text(names: Iterable[str]) -> str:
    """The text of headers and of what they include.

    Args:
        names: of files of planish/kernels/cpp.

    Raises:
        PlanishError: there is no such header.
    """
    return "\n".join(_INCLUDE.sub("", _read(name)) for name in ordered(names))
