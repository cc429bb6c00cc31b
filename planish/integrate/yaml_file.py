"""YAML files with the line of every entry, so that an error can name the line and the field."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planish.ir.errors import PlanishError

Place = tuple[str | int, ...]  # keys and indices from the root


@dataclass(frozen=True)
class Document:
    """The plain data of a YAML file, and the line on which each entry stands."""

    path: str
    data: Any
    lines: dict[Place, int]

    def where(self, place: Place) -> str:
        """`file:line`, of the entry or of the nearest one around it."""
        while place and place not in self.lines:
            place = place[:-1]
        return f"{self.path}:{self.lines.get(place, 1)}"


def load_yaml(path: str | Path) -> Document:
    """Read a YAML file; only plain data is made, never an object.

    Raises:
        PlanishError: no such file, or not YAML, with the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PlanishError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise PlanishError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, path: str = "<text>") -> Document:
    """`load_yaml` of a text."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_twice(root, path, set())  # before merge keys are written out
        loader = yaml.SafeLoader("")
        data = None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise PlanishError(f"{path}{line}: not YAML: {error.problem or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PlanishError(f"{path}: not YAML: {str(error).splitlines()[0]}") from error
    lines: dict[Place, int] = {}
    if root is not None:
        _lines(root, (), lines, set())
    return Document(path, data, lines)


def _refuse_twice(node: Any, path: str, seen: set[int]) -> None:
    """Refuse a mapping that has a key twice: YAML forbids it, and its library takes the last."""
    import yaml

    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(item, path, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in first:
                    what = f"field '{key.value}': stands twice; first on line {first[key.value]}"
                    raise PlanishError(f"{path}:{line}: {what}")
                first[key.value] = line
            _refuse_twice(value, path, seen)


def _lines(node: Any, place: Place, lines: dict[Place, int], seen: set[int]) -> None:
    """Record the line of a node and of everything in it (an alias that contains itself ends the walk)."""
    import yaml

    lines.setdefault(place, node.start_mark.line + 1)
    if id(node) in seen:
        return
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, str(key.value))
            lines[inner] = key.start_mark.line + 1
            _lines(value, inner, lines, seen | {id(node)})
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _lines(item, (*place, index), lines, seen | {id(node)})
