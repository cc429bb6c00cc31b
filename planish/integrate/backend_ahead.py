"""What the first compilation of a process waits for, begun while the passes run.

Before its first kernel for the CPU, Inductor compiles a test program for each set of vector instructions and loads it
in a process of its own: seconds of waiting. A thread asks Inductor the same at the beginning of a compilation; Inductor
keeps what it finds. Kernels of planish need a library that hands tensors to them, the same for all: its compiler starts
here too. What goes wrong here goes wrong again, with its message, where it is needed.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Mapping
from typing import Any


def begin(settings: Mapping[str, Any]) -> None:
    """Begin what is done once in a process.

    Args:
        settings: of Inductor, that the user gave: where one concerns C++, Inductor asks with it in force.
    """
    _libraries()
    if not any(name.startswith("cpp") for name in settings):
        _instructions()


@functools.cache
def _libraries() -> None:
    from planish.codegen import cpp_build, cpp_op

    if cpp_build.compiler():
        cpp_op.begin()


@functools.cache
def _instructions() -> threading.Thread:
    thread = threading.Thread(target=_ask, name="planish-ahead", daemon=True)
    thread.start()
    return thread


def _ask() -> None:
    with contextlib.suppress(Exception):
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        pick_vec_isa()
