"""C++ to a loaded library: compiled once, kept by the hash of its text, the compiler and the processor.

    pending = start(text, "gemm_a8_int8_384x384_f32_0123456789")      a compiler runs in the background
    pending.library()                                                 waits for it, once

A library is written to a temporary name and renamed: processes that compile the same text at once do not disturb each
other. It lies beside its source in `cpp/` in `$PLANISH_CACHE`, else in `~/.cache/planish`. PLANISH_CXX names another
compiler than g++ (an empty text: none), PLANISH_CPP_ARCH another architecture than "native".
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from planish.codegen.triton import cache_folder
from planish.ir.errors import PlanishError

FLAGS = (
    "-O3", "-std=gnu++17", "-fPIC", "-shared", "-fopenmp",
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wno-psabi",
    *(["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []),
)  # fmt: skip


@functools.cache
def _found(named: str | None) -> str:
    if named is not None:
        return (shutil.which(named) or named) if named else ""
    return shutil.which("g++") or ""


def compiler() -> str:
    """The path of the compiler; "" where there is none."""
    return _found(os.environ.get("PLANISH_CXX"))


def architecture() -> str:
    """What code is written for: the value of -march."""
    return os.environ.get("PLANISH_CPP_ARCH") or "native"


@functools.cache
def _machine() -> str:
    """What tells processors apart for which native code differs."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    wanted = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part")
    first = text.partition("\n\n")[0].splitlines()
    return "\n".join(line for line in first if line.partition(":")[0].strip() in wanted)


@functools.cache
def _compiler_id(path: str) -> str:
    """A compiler's file: another release has another size or date."""
    try:
        real = Path(path).resolve()
        held = real.stat()
    except OSError as error:
        raise PlanishError(f"{path}: no compiler: {error.strerror or error}", hint="set PLANISH_CXX") from error
    return f"{real} {held.st_size} {held.st_mtime_ns}"


def folder() -> Path:
    """Where libraries are kept."""
    return cache_folder().parent / "cpp"


def path_of(text: str, name: str) -> Path:
    """Where the library of a text lies or will lie."""
    target = architecture()
    parts = (text, _compiler_id(compiler()), " ".join(FLAGS), target, _machine() if target == "native" else "")
    return folder() / f"{name}_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:12]}.so"


def build(text: str, name: str) -> Path:
    """The library of a text, compiled if it is not there.

    Args:
        text: a C++ file.
        name: the stem of the library's name.

    Raises:
        PlanishError: there is no compiler, it refuses the text, or the cache cannot be written.
    """
    if not compiler():
        raise PlanishError("kernels for the CPU: need a C++ compiler", hint="install g++, or set PLANISH_CXX")
    path = path_of(text, name)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=path.parent) as made:
            source, library = Path(made, f"{name}.cpp"), Path(made, f"{name}.so")
            source.write_text(text, encoding="utf-8")
            command = [compiler(), *FLAGS, f"-march={architecture()}", str(source), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                raise PlanishError(f"{name}.cpp: does not compile; {lines[0] if lines else 'no message'}")
            os.replace(source, path.with_suffix(".cpp"))
            os.replace(library, path)
    except OSError as error:
        raise PlanishError(
            f"{path.parent}: the cache cannot be written: {error.strerror or error}",
            hint="set PLANISH_CACHE to another folder",
        ) from error
    return path


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads that wait for compilers; of this process, not of the one it was forked from."""
    return ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1), thread_name_prefix="planish-cpp")


@dataclass
class Pending:
    """A library that is being compiled.

    Attributes:
        text, name: see `build`.
        constants: what the library's `set_constants` is given when it is loaded. Each set of them has a copy of the
            library of its own: two files are loaded apart.
    """

    text: str
    name: str
    constants: tuple[float, ...] = ()
    _future: Future[Path] | None = None
    _process: int = 0
    _library: ctypes.CDLL | None = None

    def library(self) -> ctypes.CDLL:
        """The loaded library.

        Raises:
            PlanishError: as `build`.
        """
        if self._library is None:
            waited = self._future is not None and self._process == os.getpid()
            path = self._future.result() if waited and self._future is not None else build(self.text, self.name)
            if not path.is_file():
                path = build(self.text, self.name)
            self._library = self._loaded(path)
        return self._library

    def _loaded(self, path: Path) -> ctypes.CDLL:
        if not self.constants:
            return ctypes.CDLL(str(path))
        given = (ctypes.c_float * len(self.constants))(*self.constants)
        own = path.with_name(f"{path.stem}_{hashlib.sha256(bytes(given)).hexdigest()[:8]}.so")
        if not own.is_file():
            with tempfile.TemporaryDirectory(prefix=".making-", dir=path.parent) as made:
                os.replace(shutil.copy(path, made), own)
        library = ctypes.CDLL(str(own))
        library.set_constants(given)
        return library


_running: dict[tuple[object, ...], Future[Path]] = {}
_lock = threading.Lock()


def start(text: str, name: str, constants: tuple[float, ...] = ()) -> Pending:
    """Compile a text in the background; see `build`. One that is being compiled already is not compiled twice.

    Args:
        constants: see `Pending`.
    """
    process = os.getpid()
    key = (process, compiler(), architecture(), folder(), name, text)
    with _lock:
        future = _running.get(key)
        if future is None:
            future = _running[key] = _pool(process).submit(build, text, name)
            future.add_done_callback(lambda _: _running.pop(key, None))
    return Pending(text, name, constants, future, process)
