"""The passes and recipes there are, as data."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from planish.integrate.recipes import builtin_names, load_recipe
from planish.passes.pipeline import GROUPS, REGISTRY, pass_class


def passes() -> list[dict[str, Any]]:
    """Each pass: name, exactness, first line of its documentation, options with types and defaults."""
    found = []
    for name in REGISTRY:
        cls = pass_class(name)
        options = [
            {
                "name": field.name.replace("_", "-"),
                "type": str(field.type),
                "default": _text(_default(field)),
            }
            for field in dataclasses.fields(cls)
        ]
        found.append(
            {
                "name": name,
                "exactness": cls.exactness.value,
                "summary": (inspect.getdoc(cls) or "").splitlines()[0],
                "needs": sorted(cls.needs),
                "gives": sorted(cls.gives),
                "breaks": sorted(cls.breaks),
                "needs_stats": cls().needs_stats,  # with its defaults
                "options": options,
            }
        )
    for name, text in GROUPS.items():
        found.append(
            {
                "name": name,
                "exactness": "group",
                "summary": f"Stands for {text}.",
                "needs": [],
                "gives": [],
                "breaks": [],
                "needs_stats": False,
                "options": [],
            }
        )
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + " ".join(map(_text, value)) + "]"
    return str(getattr(value, "value", value))


def recipes() -> list[dict[str, Any]]:
    """Each recipe that comes with planish."""
    return [load_recipe(name).model_dump() for name in builtin_names()]
