"""Kernels as readable, standalone Triton files.

    emitted = emit_kernel(region.kernel, "f16")    one kernel's file: its name and its text
    emit_plan(plan, "kernels/", "f16")             a plan's files, and plan.txt, which says who runs where
    module = load(emitted)                         the file imported from the cache

The same kernel gives the same bytes, whatever the graph calls its values; so a model's equal layers share a file. A
file's name ends with the hash of its text: a cached file (`$PLANISH_CACHE`, else `~/.cache/planish`, in `kernels/`)
is what its name says, or it is written again.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from planish.codegen import configs, triton_gemm, triton_rows
from planish.codegen.gemm_parts import MOST_ROWS, parts
from planish.codegen.kernel_spec import Kernel
from planish.codegen.triton_file import Emitted, Launches, render
from planish.ir.errors import PlanishError
from planish.ir.files import atomic, atomic_group

if TYPE_CHECKING:
    from planish.codegen.regions import Plan

DTYPES = ("f16", "bf16", "f32")
# for Triton's interpreter, which takes its time for each tile
INTERPRETER = ((16, {"BLOCK_M": 16, "BLOCK_N": 256}), (None, {"BLOCK_M": 64, "BLOCK_N": 256}))


def launches_of(kernel: Kernel) -> Launches:
    """The launch parameters of a kernel for every target that has some."""
    found: dict[str, Sequence[tuple[int | None, Mapping[str, int]]]] = {"interpreter": INTERPRETER}
    for target in configs.TARGETS:
        known = configs.launches(kernel, target)
        if known:
            found[target] = known
    return found


def check_dtype(dtype: str) -> None:
    """Refuse a float dtype that kernels are not written for.

    Raises:
        PlanishError: it is none of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise PlanishError(f"kernel dtype '{dtype}': unknown; expected {', '.join(DTYPES)}")


@lru_cache(maxsize=1024)
def emit_kernel(kernel: Kernel, dtype: str = "f16") -> Emitted:
    """A kernel's file.

    Args:
        kernel: the spec.
        dtype: what "float" stands for: "f16", "bf16" or "f32".

    Raises:
        PlanishError: another dtype, or a step that no kernel can be written for.
    """
    check_dtype(dtype)
    body = (triton_gemm if kernel.kind == "gemm" else triton_rows).body(kernel, dtype)
    return render(kernel, body, dtype, launches_of(kernel))


def emit_plan(plan: Plan, folder: str | Path, dtype: str = "f16") -> list[Emitted]:
    """Write the files of a plan's kernels to a folder, and `plan.txt`: each region with its file.

    A gemm with closing steps has two more: its parts, which are launched on more rows (`gemm_parts`).

    Args:
        plan: the regions.
        folder: made where it is missing; files of other kernels in it stay. On an error it is left as it was.
        dtype: see `emit_kernel`.

    Returns:
        The files, each once, in the order of the plan.

    Raises:
        PlanishError: the folder cannot be written, or as `emit_kernel`.
    """
    of: dict[str, list[Emitted]] = {}
    for region in plan.kernels:
        if region.kernel is not None:
            kernels = (region.kernel, *(parts(region.kernel) if region.kernel.closing else ()))
            of[region.name] = [emit_kernel(kernel, dtype) for kernel in kernels]
    files = list({emitted.name: emitted for made in of.values() for emitted in made}.values())
    target = Path(folder)
    old = target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanishError(f"{target}: cannot be made: {error.strerror or error}") from error
    lines = [f"{region.name}: {_files(of.get(region.name, []))}" for region in plan.regions]
    texts = {f"{emitted.name}.py": emitted.text for emitted in files} | {"plan.txt": "\n".join(lines) + "\n"}
    try:
        with atomic_group([target / name for name in texts]) as handles:
            for handle, text in zip(handles, texts.values(), strict=True):
                handle.write(text.encode())
    except BaseException:
        if not old:
            target.rmdir()
        raise
    return files


def _files(made: Sequence[Emitted]) -> str:
    """What `plan.txt` says of a region."""
    if not made:
        return "torch"
    more = " and ".join(f"{emitted.name}.py" for emitted in made[1:])
    return f"{made[0].name}.py" + (f"; on more than {MOST_ROWS} rows {more}" if more else "")


def _write(path: Path, text: str) -> None:
    with atomic(path) as handle:
        handle.write(text.encode())


# -- the cache -----------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where emitted files are kept: `kernels/` in `$PLANISH_CACHE`, else in `~/.cache/planish`."""
    return Path(os.environ.get("PLANISH_CACHE") or Path.home() / ".cache" / "planish").expanduser() / "kernels"


def cached(emitted: Emitted) -> Path:
    """The path of an emitted file in the cache, where it is written if it is missing or not as it should be.

    Raises:
        PlanishError: the cache cannot be written.
    """
    path = cache_folder() / f"{emitted.name}.py"
    try:
        if path.read_text(encoding="utf-8") == emitted.text:
            return path
    except (OSError, UnicodeDecodeError):
        pass
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanishError(
            f"{path.parent}: the cache cannot be made: {error.strerror or error}",
            hint="set PLANISH_CACHE to another folder",
        ) from error
    _write(path, emitted.text)
    return path


def load_file(path: str | Path) -> ModuleType:
    """Import an emitted file; once for each path.

    Raises:
        PlanishError: Triton is not installed, or the file is not there.
    """
    name = f"planish_kernels.{Path(path).stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(path):
        return known
    if importlib.util.find_spec("triton") is None:
        raise PlanishError("kernels: need triton", hint="pip install 'planish[triton]'")
    if not Path(path).is_file():
        raise PlanishError(f"{path}: not found")
    spec = importlib.util.spec_from_file_location(name, str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load(emitted: Emitted) -> ModuleType:
    """Import an emitted kernel from the cache: see `load_file` and `cached`."""
    return load_file(cached(emitted))
