"""The ranges of the options of passes, and their check.

A pass gives the range with the default of the field:

    alpha: float = option(0.5, Range(0, 1))
    block: int | None = option(None, Range(1))

Every pass checks its values when it is made: from a pipeline's text, from YAML, in Python.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from planish.ir.errors import PlanishError

if TYPE_CHECKING:
    from planish.passes.base import Pass

RANGE = "range"  # the key in a field's metadata


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`, both included; `above` excludes its own number. None: no end."""

    least: float | None = None
    most: float | None = None
    above: float | None = None

    def __contains__(self, value: float) -> bool:
        if self.least is not None and not value >= self.least:
            return False
        if self.most is not None and not value <= self.most:
            return False
        return self.above is None or value > self.above

    def __str__(self) -> str:
        if self.above is not None:
            return f"above {self.above:g}" + ("" if self.most is None else f", at most {self.most:g}")
        if self.least is not None and self.most is not None:
            return f"from {self.least:g} to {self.most:g}"
        return f"of at least {self.least:g}" if self.least is not None else f"of at most {self.most:g}"


def option(default: Any, allowed: Range) -> Any:
    """A field of a pass with that default, whose numbers must lie in a range."""
    return dataclasses.field(default=default, metadata={RANGE: allowed})


def numeric_options(cls: type[Pass]) -> dict[str, tuple[bool, bool, Range | None]]:
    """The numeric fields of a pass: whether integers only, whether None is allowed, and the range."""
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        kinds = set(typing.get_args(hints[field.name]) or (hints[field.name],))
        if kinds & {int, float} and kinds <= {int, float, type(None)}:
            found[field.name] = (float not in kinds, type(None) in kinds, field.metadata.get(RANGE))
    return found


def check_options(instance: Pass) -> None:
    """Check the numbers among the options of a pass.

    Raises:
        PlanishError: one is of another type, not finite, or outside of its range.
    """
    for name, (whole, absent, given) in numeric_options(type(instance)).items():
        value: Any = getattr(instance, name)
        if value is None and absent:
            continue
        good = type(value) is not bool and isinstance(value, numbers.Integral if whole else numbers.Real)
        good = good and math.isfinite(value)
        if good and (given is None or value in given):
            continue
        wanted = ("an integer" if whole else "a number") + (f" {given}" if given is not None else "")
        raise PlanishError(
            f"pass '{instance.name}': option '{name.replace('_', '-')}': expected {wanted}"
            f"{', or none' if absent else ''}; got {value!r}"
        )
