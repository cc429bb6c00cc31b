"""Recipes: named pipelines in YAML, one file each.

    name: w8a8-dynamic
    summary: int8 weights, uint8 activations quantised at run time
    pipeline: raise,merge-linears,scale-channels,quantize{activations=uint8:tensor}
    target: ort
    needs: {calibration: true, targets: [ort]}
    source: https://arxiv.org/abs/2304.09145

`needs` says what a recipe cannot do without: calibration data, and a target that can express what it makes (any,
if `targets` is left out). `target` is the one that is written where none is asked for.

Those that come with planish stand in `planish/integrate/recipes/`.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from planish.integrate.yaml_file import Document, load_yaml, parse_yaml
from planish.ir.errors import PlanishError, nearest
from planish.passes.manager import Pipeline

Target = Literal["onnx", "ort"]
TARGETS: tuple[Target, ...] = ("onnx", "ort")


class Needs(BaseModel):
    """What a recipe cannot do without.

    Attributes:
        calibration: whether calibration data must be given.
        targets: the targets that can express what it makes.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    calibration: bool = False
    targets: tuple[Target, ...] = Field(default=TARGETS, strict=False)

    @field_validator("targets")
    @classmethod
    def _some_target(cls, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        if not targets:
            raise PydanticCustomError("no_target", "expected at least one target")
        return tuple(t for t in TARGETS if t in targets)


class Recipe(BaseModel):
    """A named pipeline.

    Attributes:
        name: lower case, words joined by hyphens.
        summary: one line.
        pipeline: the text of the pipeline.
        target: the default target of the emission.
        needs: what it cannot do without.
        source: where the method is described (a citation or an address).
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    summary: str = Field(min_length=1)
    pipeline: str = Field(min_length=1)
    target: Target = "onnx"
    needs: Needs = Needs()
    source: str = ""

    @field_validator("pipeline")
    @classmethod
    def _no_line_breaks(cls, text: str) -> str:
        return " ".join(text.split()).replace(", ", ",")

    @model_validator(mode="after")
    def _default_target_can(self) -> Recipe:
        if self.target not in self.needs.targets:
            raise PydanticCustomError(
                "target_cannot",
                "field 'target': {target} is not among needs.targets: {targets}",
                {"target": self.target, "targets": ", ".join(self.needs.targets)},
            )
        return self

    def check_target(self, target: str) -> None:
        """An error if a target cannot express what the recipe makes.

        Raises:
            PlanishError: with the nearest target that can.
        """
        if target not in self.needs.targets:
            able = ", ".join(self.needs.targets)
            raise PlanishError(
                f"recipe '{self.name}': target {target} cannot express it; expected {able}",
                hint=f"write for --target {self.needs.targets[-1]}",
            )

    def passes(self) -> Pipeline:
        """The pipeline.

        Raises:
            PlanishError: an unknown pass or option, or an order that breaks what a pass needs.
        """
        return Pipeline(self.pipeline)


def builtin_names() -> list[str]:
    """The names of the recipes that come with planish."""
    return sorted(f.name.removesuffix(".yaml") for f in _folder().iterdir() if f.name.endswith(".yaml"))


def _folder() -> Any:
    return resources.files("planish.integrate") / "recipes"


def load_recipe(name: str | Path | Recipe) -> Recipe:
    """A recipe by its name or from a YAML file; its pipeline is checked.

    Raises:
        PlanishError: no such recipe or file, or not a valid one, with line, field and the nearest name.
    """
    if isinstance(name, Recipe):
        name.passes()
        return name
    text = str(name)
    if text.endswith((".yaml", ".yml")) or "/" in text:
        return recipe_of(load_yaml(text))
    names = builtin_names()
    if text not in names:
        raise PlanishError(
            f"recipe '{text}': unknown; expected a file (.yaml) or one of {', '.join(names) or 'none'}",
            hint=nearest(text, names),
        )
    file = _folder() / f"{text}.yaml"
    return recipe_of(parse_yaml(file.read_text(encoding="utf-8"), f"{text}.yaml"))


def recipe_of(document: Document) -> Recipe:
    """The recipe that a YAML document describes.

    Raises:
        PlanishError: see `load_recipe`.
    """
    if not isinstance(document.data, dict):
        raise PlanishError(f"{document.where(())}: not a recipe; expected a mapping with {_fields(Recipe)}")
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        raise _explained(error, document) from error
    try:
        recipe.passes()
    except PlanishError as error:
        where = f"{document.where(('pipeline',))}: {error.where or recipe.pipeline}"
        raise PlanishError(f"recipe '{recipe.name}': {error.what}", where=where, hint=error.hint) from error
    return recipe


def _fields(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _explained(error: ValidationError, document: Document) -> PlanishError:
    """The first complaint of pydantic as an error with line and field."""
    first = error.errors()[0]
    place = tuple(first["loc"])
    field = ".".join(map(str, place))
    known = Needs.model_fields if place[:1] == ("needs",) else Recipe.model_fields
    match first["type"]:
        case "extra_forbidden":
            what = f"field '{field}': unknown; expected {', '.join(known)}"
            hint = nearest(str(place[-1]), known)
        case "missing":
            what, hint, place = f"field '{field}': is missing", None, place[:-1]
        case "literal_error":
            given = str(first["input"])
            what = f"field '{field}': expected {first.get('ctx', {}).get('expected', '')}; got '{given}'"
            hint = nearest(given, TARGETS)
        case "target_cannot":
            what, hint, place = first["msg"], None, ("target",) if ("target",) in document.lines else ("needs",)
        case "tuple_type":
            what, hint = f"field '{field}': expected a list of {', '.join(TARGETS)}; got {first['input']!r}", None
        case "model_type":
            what, hint = f"field '{field}': expected a mapping with {', '.join(known)}; got {first['input']!r}", None
        case "string_pattern_mismatch":
            given = str(first["input"])
            what = f"field '{field}': expected lower-case words joined by hyphens; got '{given}'"
            hint = None
        case _:
            reason = first["msg"][:1].lower() + first["msg"][1:]
            what, hint = f"field '{field}': {reason}; got {first['input']!r}", None
    return PlanishError(f"{document.where(place)}: {what}", hint=hint)
