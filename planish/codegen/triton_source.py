"""Device functions and eager references as text: what an emitted file takes over from `planish/kernels/*.py`.

The files are read with `ast` and never imported, so that kernels are emitted where Triton is not installed. A piece is
a function or a constant at module level, with its decorators and the comment lines right above it; its name is unique
over the folder. What a piece reads from its own folder comes along, dependencies first.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from planish.ir.errors import PlanishError, nearest

KERNELS = Path(__file__).parent.parent / "kernels"
TABLE = "table.py"  # what emission itself imports, never a part of a kernel


@dataclass(frozen=True)
class Piece:
    """A module-level function or constant of a kernel file.

    Attributes:
        file: its file's name.
        text: as written there, without a line break at the end.
        reads: the names that it uses, in order of their first use; not only those of pieces.
        kind: "device" (a `triton.jit` function), "eager" (any other function) or "constant".
    """

    name: str
    file: str
    text: str
    reads: tuple[str, ...]
    kind: str


def _reads(node: ast.AST) -> tuple[str, ...]:
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    return tuple(dict.fromkeys(n.id for n in sorted(names, key=lambda n: (n.lineno, n.col_offset))))


def _is_jit(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(d).partition("(")[0] in ("triton.jit", "jit") for d in node.decorator_list)


def _target(node: ast.stmt) -> str | None:
    """The name that a module-level statement defines, if a kernel may use it."""
    if isinstance(node, ast.FunctionDef):
        return node.name
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
        return node.target.id
    return None


def pieces_of(source: str, file: str) -> list[Piece]:
    """The pieces of one kernel file, in order.

    Raises:
        PlanishError: the text is not Python.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise PlanishError(f"{file}: not Python; {error.msg}", where=f"{file}:{error.lineno}") from error
    lines, found = source.splitlines(), []
    for node in tree.body:
        name = _target(node)
        if name is None or name.startswith("__"):
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1
        while first > 0 and lines[first - 1].startswith("#"):
            first -= 1
        kind = "constant" if not isinstance(node, ast.FunctionDef) else "device" if _is_jit(node) else "eager"
        found.append(Piece(name, file, "\n".join(lines[first : node.end_lineno]), _reads(node), kind))
    return found


@cache
def library(folder: Path = KERNELS) -> Mapping[str, Piece]:
    """All pieces of the kernel files of a folder, by name.

    Raises:
        PlanishError: a function's name stands in two files.
    """
    found: dict[str, Piece] = {}
    for path in sorted(folder.glob("*.py")):
        if path.name in ("__init__.py", TABLE):
            continue
        for piece in pieces_of(path.read_text(encoding="utf-8"), path.name):
            other = found.get(piece.name)
            if other is not None and other.text != piece.text:
                raise PlanishError(f"'{piece.name}': stands in {other.file} and in {piece.file}, not alike")
            found.setdefault(piece.name, piece)
    return found


def gathered(names: Iterable[str], known: Mapping[str, Piece] | None = None) -> list[Piece]:
    """These pieces and all that they read, dependencies first, each once.

    Args:
        names: of pieces, in the order in which they are wanted.
        known: see `library`.

    Raises:
        PlanishError: there is no piece of a name.
    """
    held = library() if known is None else known
    found: dict[str, Piece] = {}

    def take(name: str) -> None:
        if name in found:
            return
        for read in held[name].reads:
            if read in held and read != name:
                take(read)
        found[name] = held[name]

    for name in names:
        if name not in held:
            raise PlanishError(f"'{name}': no function of planish/kernels", hint=nearest(name, held))
        take(name)
    return list(found.values())
