"""Options that are text with a grammar: regular expressions that name nodes, number formats."""

from __future__ import annotations

import re

from planish.ir.errors import PlanishError
from planish.ir.formats import Format
from planish.ir.graph import Node
from planish.ir.rewriter import Declined
from planish.passes.base import Pass


def check_patterns(instance: Pass, *options: str) -> None:
    """Check options of a pass that hold regular expressions.

    Raises:
        PlanishError: one is none.
    """
    for name in options:
        for pattern in getattr(instance, name):
            try:
                re.compile(pattern)
            except re.error as error:
                what = f"pass '{instance.name}': option '{name}': '{pattern}' is no regular expression: {error}"
                raise PlanishError(what) from error


def require_named(node: Node, skip: tuple[str, ...], only: tuple[str, ...]) -> None:
    """Refuse a node whose source or result name matches one of `skip`, or none of `only` if there are any.

    Raises:
        Declined: it is not wanted.
    """
    names = [name for name in (node.source, node.result.name) if name]
    if any(re.search(p, n) for p in skip for n in names):
        raise Declined("skipped by name", node)
    if only and not any(re.search(p, n) for p in only for n in names):
        raise Declined("not among those named", node)


def check_format(instance: Pass, name: str, *others: str) -> None:
    """Check an option of a pass that holds a number format which makes sense there, or one of some other words.

    Args:
        name: of the option: `activations`, or else something that is a weight.

    Raises:
        PlanishError: it is neither.
    """
    text = getattr(instance, name)
    if text in others:
        return
    try:
        form = Format.parse(text, "token" if name == "activations" else "channel")
    except PlanishError as error:
        words = f"; or {', '.join(others)}" if others else ""
        raise PlanishError(f"pass '{instance.name}': option '{name}': {error.what}{words}", hint=error.hint) from error
    wrong = ""
    if name == "activations":
        if form.granularity == "channel":
            wrong = "an activation has no output channels; expected tensor, token or gN"
        elif form.clusters > 1:
            wrong = "an activation is not split into clusters"
        elif form.static and form.granularity != "tensor" and form.name != "nvfp4":
            wrong = "only one range per tensor can be calibrated; expected tensor"
    elif form.granularity == "token":
        wrong = "a weight has no tokens; expected tensor, channel or gN"
    elif form.static:
        wrong = "static is for activations"
    if wrong:
        raise PlanishError(f"pass '{instance.name}': option '{name}': {text}: {wrong}")
