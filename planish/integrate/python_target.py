"""A model named by a Python target: `package.module:callable` or `path/file.py:callable`.

The callable takes no arguments and returns the model and its example inputs, or a model that needs none:

    def build():
        model = ...
        return model, {"input_ids": ids}
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import traceback
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from planish.ir.errors import FOREIGN, PlanishError, nearest

_TARGET = re.compile(r"(?P<module>[^:]+(?::[\\/][^:]*)?):(?P<callable>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")
FORM = "expected a function that returns (model, example inputs)"
FAILURES = (*FOREIGN, NameError, OSError, SyntaxError)  # of importing a file and calling a function


def is_target(text: str) -> bool:
    """True for `module:callable` and `file.py:callable`, unless a file has that name."""
    return _TARGET.fullmatch(text) is not None and not Path(text).exists()


def load(text: str) -> tuple[Any, Any]:
    """The model and the example inputs that a target gives.

    Raises:
        PlanishError: no such module, file or callable, code that fails, or a result of another kind.
    """
    match = _TARGET.fullmatch(text)
    if match is None:
        raise PlanishError(f"target '{text}': expected module:callable or file.py:callable")
    name, path = match["module"], match["callable"]
    found: Any = _module(name)
    for part in path.split("."):
        if not hasattr(found, part):
            public = [n for n in dir(found) if not n.startswith("_")]
            where = f"module '{name}'" if isinstance(found, ModuleType) else f"'{path}'"
            raise PlanishError(f"target '{text}': {where} has no '{part}'", hint=nearest(part, public))
        found = getattr(found, part)
    if not callable(found):
        raise PlanishError(f"target '{text}': '{path}' is a {type(found).__name__}; {FORM}")
    try:
        made = found()
    except FAILURES as error:
        raise _failed(f"target '{text}': fails", error) from error
    if isinstance(made, tuple) and len(made) == 2:
        return made[0], made[1]
    if made is None or isinstance(made, tuple | list | dict):
        raise PlanishError(f"target '{text}': returns a {type(made).__name__}; {FORM}")
    return made, None


def check_inputs(text: str, model: Any, inputs: Any) -> None:
    """Refuse a torch module without example inputs.

    Raises:
        PlanishError: the target gave none, and no others are there.
    """
    torch = sys.modules.get("torch")
    if inputs is None and torch is not None and isinstance(model, torch.nn.Module):
        raise PlanishError(
            f"target '{text}': returns a torch module without inputs; {FORM}",
            hint="return model, inputs: a tensor, a tuple of arguments, or a dict of keyword arguments",
        )


def _module(name: str) -> ModuleType:
    try:
        if name.endswith(".py"):
            return _from_file(Path(name))
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise _failed(f"module '{name}': cannot be imported", error) from error
        hint = f"give the file: {name}.py:..." if Path(f"{name}.py").exists() else None
        raise PlanishError(f"module '{name}': not found", hint=hint or _nearest_file(name)) from error
    except FAILURES as error:
        raise _failed(f"module '{name}': cannot be imported", error) from error


def _nearest_file(name: str) -> str | None:
    return nearest(name, [p.stem for p in Path().glob("*.py")])


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        folder = path.parent
        beside = [p.name for p in folder.glob("*.py")] if folder.is_dir() else []
        raise PlanishError(f"{path}: no such file", hint=nearest(path.name, beside))
    name = path.stem
    spec: ModuleSpec | None = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PlanishError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    home = str(path.resolve().parent)
    if home not in sys.path:
        sys.path.insert(0, home)  # the file may import its neighbours
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        if before is not None:
            sys.modules[name] = before
    return module


def _failed(what: str, error: BaseException) -> PlanishError:
    """An error of the user's code: its first line, and where it arose."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and "<" not in f.filename]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
    return PlanishError(f"{what}: {text}", where=where)
