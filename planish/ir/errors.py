"""Errors that a user can act on: what is wrong, where, and a hint."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What code that is not planish's may raise when it is run: a user's module, or torch looking into it.
FOREIGN = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, NotImplementedError,
    ArithmeticError, ImportError,
)  # fmt: skip


class PlanishError(Exception):
    """An error caused by input: a model, a file, an option.

    Args:
        what: `object: what is wrong; expected X, got Y`, lower case, no final stop.
        where: the node line or the file position, printed after `in`.
        hint: what to try, printed after `hint:`.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        lines = [what]
        if where:
            lines.append(f"  in {where}")
        if hint:
            lines.append(f"  hint: {hint}")
        super().__init__("\n".join(lines))


class InvalidModelError(PlanishError):
    """The model file or graph is not valid."""


class VerificationError(PlanishError):
    """The IR breaks one of its own rules: a bug of a pass, never of a user."""


class ValidationError(PlanishError):
    """An exact rewrite changed the function."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """A hint with the known name nearest to `name`, or None."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else None
