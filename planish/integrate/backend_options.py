"""The options of the torch.compile backend, and the passes that they ask for.

    torch.compile(model, backend="planish", options={"recipe": "w4a16", "calibration": "statistics.safetensors"})

Without calibration a recipe is what is left of it: passes that read statistics are left out, weights are rounded to
nearest, and activations are quantised at run time. A recipe whose activations have calibrated ranges has no such form.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planish.integrate.recipes import Recipe, load_recipe
from planish.ir.errors import PlanishError, nearest
from planish.ir.stats import Stats
from planish.passes.base import Pass
from planish.passes.manager import Pipeline
from planish.passes.quantize import Quantize

DEFAULT = "w8a8-token"
TARGETS = ("auto", "aten")
OPTIONS = ("recipe", "calibration", "target", "validate", "strict", "seed", "cache", "inner", "mode")


@dataclass(frozen=True)
class BackendOptions:
    """What a user asked of the backend.

    Attributes:
        recipe: the name of the recipe, or the text of its pipeline.
        pipeline: its passes.
        named: True if the recipe was asked for, False if it is the default.
        calibration: statistics (`planish.calibrating`), or none.
        target: "auto": kernels of the device that the weights are on; "aten": ATen ops only.
        validate: check every exact pass in float64.
        strict: raise where the backend would fall back to float.
        seed: of every random choice.
        inner: what compiles the rewritten graph: the name of a backend of torch.compile.
        mode: of torch.compile, for Inductor.
        inductor: options of Inductor's own.
        cache: keep on disk what the passes make.
    """

    recipe: str
    pipeline: Pipeline
    named: bool = False
    calibration: Stats | None = None
    target: str = "auto"
    validate: bool = False
    strict: bool = False
    seed: int = 0
    inner: str = "inductor"
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    cache: bool = True


def read_options(options: Mapping[str, Any] | None, mode: str | None = None) -> BackendOptions:
    """The options as torch.compile hands them on.

    Args:
        options: those of planish, and of Inductor.
        mode: of torch.compile, which does not take both.

    Raises:
        PlanishError: an unknown option, a value of another kind, or no such recipe or file.
    """
    given = dict(options or {})
    own = {key: given.pop(key) for key in OPTIONS if key in given}
    _known(given)
    recipe = own.get("recipe")
    name, pipeline = pipeline_of(DEFAULT if recipe is None else recipe)
    for key in ("validate", "strict", "cache"):
        _expect(key, own.get(key, False), bool, "True or False")
    _expect("seed", own.get("seed", 0), int, "an integer")
    target = own.get("target", "auto")
    if target not in TARGETS:
        raise PlanishError(
            f"option 'target': unknown; expected {' or '.join(TARGETS)}; got {target!r}",
            hint=nearest(str(target), TARGETS),
        )
    return BackendOptions(
        name,
        pipeline,
        recipe is not None,
        _statistics(own.get("calibration")),
        target,
        own.get("validate", False),
        own.get("strict", False),
        own.get("seed", 0),
        _inner(own.get("inner", "inductor"), given),
        own.get("mode", mode),
        given,
        own.get("cache", True),
    )


def _expect(key: str, value: Any, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise PlanishError(f"option '{key}': expected {what}; got {value!r}")


def _known(others: Mapping[str, Any]) -> None:
    """Refuse what is no option of planish, nor of Inductor."""
    if not others:
        return
    from torch._inductor import config

    known = config.get_config_copy()
    for key in others:
        if key.replace("-", "_") not in known:
            raise PlanishError(
                f"option '{key}': unknown; expected {', '.join(OPTIONS)} or one of Inductor's",
                hint=nearest(key, [*OPTIONS, *known]),
            )


def _inner(name: Any, others: Mapping[str, Any]) -> str:
    from torch._dynamo.backends.registry import list_backends

    names = [n for n in list_backends(exclude_tags=()) if n != "planish"]
    if name not in names:
        raise PlanishError(
            f"option 'inner': unknown; expected a backend of torch.compile; got {name!r}",
            hint=nearest(str(name), names),
        )
    if others and name != "inductor":
        raise PlanishError(f"option '{next(iter(others))}': is one of Inductor's; the inner compiler is {name}")
    return str(name)


def pipeline_of(recipe: Any) -> tuple[str, Pipeline]:
    """The name and the passes of a recipe by its name or file, or of a pipeline."""
    if isinstance(recipe, Pipeline):
        return str(recipe), recipe
    if isinstance(recipe, str) and any(mark in recipe for mark in ",{"):
        return recipe, Pipeline(recipe)
    if not isinstance(recipe, str | Path | Recipe):
        raise PlanishError(f"option 'recipe': expected a name, a file or a pipeline; got {recipe!r}")
    chosen = load_recipe(recipe)
    return chosen.name, chosen.passes()


def _statistics(calibration: Any) -> Stats | None:
    if calibration is None or isinstance(calibration, Stats):
        return calibration
    if isinstance(calibration, str | Path):
        return _loaded(str(calibration), Path(calibration).stat().st_mtime_ns if Path(calibration).exists() else 0)
    raise PlanishError(
        f"option 'calibration': expected statistics or their file; got a {type(calibration).__name__}",
        hint="run a few batches inside `with planish.calibrating(model) as statistics:`",
    )


@functools.lru_cache(maxsize=4)
def _loaded(path: str, written: int) -> Stats:
    """The statistics in a file as it was written at that time; every graph of a model asks for them."""
    return Stats.load(path)


def uncalibrated(pipeline: Pipeline) -> tuple[Pipeline, list[str]]:
    """What is left of a pipeline where there are no statistics, and the passes that were left out or changed.

    Raises:
        PlanishError: its activations have calibrated ranges.
    """
    kept: list[Pass] = []
    without: list[str] = []
    for instance in pipeline.passes:
        if not instance.needs_stats:
            kept.append(instance)
            continue
        without.append(str(instance))
        if isinstance(instance, Quantize):
            kept.append(_by_rounding(instance))
    return Pipeline(kept), without


def _by_rounding(instance: Quantize) -> Quantize:
    made = dataclasses.replace(instance, solver="rtn", inputs="float", bias_correction=False)
    if made.needs_stats:
        raise PlanishError(
            "pass 'quantize': needs calibration statistics for its ranges",
            where=str(instance),
            hint="run a few batches inside `with planish.calibrating(model):`, or give options={'calibration': ...}",
        )
    return made
