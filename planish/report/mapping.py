"""Judge somebody's smoothing mapping: is it an identity on this model?

A mapping, in the form of llm-compressor's SmoothQuantModifier and AWQModifier, names a smooth layer
(a norm or a linear) whose gain and bias are divided by s, and balance layers whose weights are
multiplied by s. That leaves the function alone iff the balance layers are *all* that reads the smooth
layer, through ops that a scale passes. Two judges say so, independently of each other:

1. *The analysis.* What the tool does to each constant, channel by channel, must be what some scale of
   the admitted SCALE spaces does to them. If not, the reader or op that breaks it is named.
2. *The numbers.* The constants are changed just as the tool would, and both graphs are evaluated in
   float64.

Layers are matched by name: the module path in a node's name or in the names of its constants.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from planish.integrate.yaml_file import Document, load_yaml
from planish.ir.errors import PlanishError, nearest
from planish.ir.evaluator import Evaluator
from planish.ir.graph import Graph
from planish.ir.probe import relative_error
from planish.ir.spaces import ChannelSpaces, analyse
from planish.passes.validation import NARROW_TOLERANCE, TOLERANCE, Probe, make_probe
from planish.report.smoothing import Layer, apply_mapping, judge, layers, touched


@dataclass(frozen=True)
class Entry:
    """One entry of a mapping: patterns as the tool reads them (`re:` starts a regular expression).

    Attributes:
        smooth: pattern of the layer whose output is divided.
        balance: patterns of the layers that read it.
        ignore: patterns of layers left out.
        where: the line of the file.
        converted: the tool turns norms that multiply by w + c into plain ones before it scales their gain.
    """

    smooth: str
    balance: tuple[str, ...]
    ignore: tuple[str, ...] = ()
    where: str = ""
    converted: bool = False


@dataclass(frozen=True)
class Verdict:
    """The judgement of one smooth layer and its balance layers.

    Attributes:
        smooth: name of the smooth layer.
        balance: names of the balance layers.
        identity: the analysis says that the mapping leaves the function alone.
        reasons: what breaks it; empty for an identity.
        error: relative, in float64, when the mapping is applied as the tool would; None: not evaluated.
        tolerance: the error up to which the numbers say identity.
        where: the line of the mapping.
    """

    smooth: str
    balance: tuple[str, ...]
    identity: bool
    reasons: tuple[str, ...]
    error: float | None
    tolerance: float
    where: str = ""

    @property
    def numerical(self) -> bool | None:
        """What the numbers say; None if they were not asked."""
        return None if self.error is None else self.error <= self.tolerance

    @property
    def agree(self) -> bool:
        return self.numerical is None or self.numerical == self.identity


@dataclass(frozen=True)
class Lint:
    """The judgement of a mapping on a model.

    Attributes:
        verdicts: one for each smooth layer that the mapping matches.
        unchecked: why the numbers could not be asked.
        passed_over: the lines of entries none of whose patterns matches a layer; the tool passes over them.
    """

    verdicts: tuple[Verdict, ...]
    unchecked: str = ""
    passed_over: tuple[str, ...] = ()

    @property
    def identity(self) -> bool:
        """True if every entry is an identity by both judges."""
        return all(v.identity and v.agree for v in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        verdicts = [{**asdict(v), "agree": v.agree} for v in self.verdicts]
        return {
            "identity": self.identity,
            "unchecked": self.unchecked,
            "verdicts": verdicts,
            "passed_over": list(self.passed_over),
        }


# -- the mapping file ----------------------------------------------------------------------------


def read_mappings(mapping: str | Path | Mapping[str, Any] | Sequence[Any]) -> list[Entry]:
    """The entries of a mapping: a YAML file, or the plain data of one.

    Entries are `[[balance, ...], smooth]` or `{smooth_layer: ..., balance_layers: [...]}`, in a list under
    the key `mappings`, at the top or inside the modifiers of a recipe. Beside it may stand `ignore`, a list of
    patterns, and `offset_gains`: `kept` (the tool scales the weights of norms as they are, the default) or
    `converted` (where a norm multiplies by 1 + weight, it scales that gain, as llm-compressor 0.14 does).

    Raises:
        PlanishError: no such file, no mappings in it, or an entry of another form, with the line.
    """
    if isinstance(mapping, str | Path):
        document = load_yaml(mapping)
    else:
        document = Document("mapping", mapping, {})
    found: list[Entry] = []
    if isinstance(document.data, list):
        found = _entries(document, (), document.data, ())
    else:
        _search(document, (), document.data, found)
    if not found:
        raise PlanishError(
            f"{document.path}: no mappings; expected a list under the key 'mappings'",
            hint="each entry is [[balance, ...], smooth] or {smooth_layer: ..., balance_layers: [...]}",
        )
    return found


def _search(document: Document, at: tuple[str | int, ...], data: Any, found: list[Entry]) -> None:
    if isinstance(data, Mapping):
        if isinstance(data.get("mappings"), list):
            ignore = data.get("ignore") or []
            names = [ignore] if isinstance(ignore, str) else list(ignore)
            converted = _converted(document, at, data.get("offset_gains", "kept"))
            entries = _entries(document, (*at, "mappings"), data["mappings"], tuple(map(str, names)))
            found += [replace(entry, converted=converted) for entry in entries]
        for key, value in data.items():
            if key != "mappings":
                _search(document, (*at, str(key)), value, found)
    elif isinstance(data, list):
        for index, value in enumerate(data):
            _search(document, (*at, index), value, found)


def _converted(document: Document, at: tuple[str | int, ...], value: Any) -> bool:
    if value not in ("kept", "converted"):
        where = document.where((*at, "offset_gains"))
        raise PlanishError(f"{where}: field 'offset_gains': expected kept or converted; got {value!r}")
    return bool(value == "converted")


def _entries(
    document: Document, at: tuple[str | int, ...], entries: Sequence[Any], ignore: tuple[str, ...]
) -> list[Entry]:
    return [_entry(document, (*at, index), entry, ignore) for index, entry in enumerate(entries)]


def _entry(document: Document, at: tuple[str | int, ...], entry: Any, ignore: tuple[str, ...]) -> Entry:
    where = document.where(at)
    smooth: Any
    balance: Any
    if isinstance(entry, Mapping):
        known = ("smooth_layer", "balance_layers")
        for key in entry:
            if key not in (*known, "activation_hook_target"):
                raise PlanishError(
                    f"{document.where((*at, str(key)))}: field '{key}': unknown; expected {', '.join(known)}",
                    hint=nearest(str(key), known),
                )
        missing = [key for key in known if key not in entry]
        if missing:
            raise PlanishError(f"{where}: field '{missing[0]}': is missing; expected {', '.join(known)}")
        smooth, balance = entry["smooth_layer"], entry["balance_layers"]
    elif isinstance(entry, list | tuple) and len(entry) == 2:
        balance, smooth = entry
        if isinstance(balance, str) and not isinstance(smooth, str):
            balance, smooth = smooth, balance
    else:
        raise PlanishError(f"{where}: not a mapping; expected [[balance, ...], smooth], got {entry!r}")
    if isinstance(balance, str):
        balance = [balance]
    if isinstance(smooth, list | tuple) and len(smooth) == 1:
        smooth = smooth[0]
    if not isinstance(smooth, str) or not isinstance(balance, list | tuple) or not balance:
        raise PlanishError(f"{where}: expected one smooth layer and a list of balance layers; got {entry!r}")
    patterns = (smooth, *balance, *ignore)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise PlanishError(f"{where}: a layer's name is text; got {pattern!r}")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise PlanishError(f"{where}: '{pattern}' is not a regular expression: {error}") from error
    return Entry(smooth, tuple(balance), ignore, where)


# -- matching ------------------------------------------------------------------------------------


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return name == pattern or name.endswith(f".{pattern}")


def matches_nothing(entry: Entry, known: Mapping[str, Layer]) -> bool:
    """True if no pattern of the entry matches a layer: the tool then passes over it."""
    return not any(_matches(name, pattern) for pattern in (entry.smooth, *entry.balance) for name in known)


def resolve(entry: Entry, known: Mapping[str, Layer]) -> list[tuple[list[Layer], list[list[Layer]]]]:
    """The layers that an entry means: (smooth layers, balance layers for each pattern) for each group.

    Layers belong together that share the longest module path, as the tool groups them: for each smooth
    layer the nearest module around it that holds a match of every balance pattern.

    Raises:
        PlanishError: a pattern matches nothing.
    """

    def matching(pattern: str) -> list[Layer]:
        chosen = [
            layer
            for name, layer in known.items()
            if _matches(name, pattern) and not any(_matches(name, i) for i in entry.ignore)
        ]
        if not chosen:
            plain = pattern.removeprefix("re:").strip(".*^$")
            tails = {name.rpartition(".")[2] for name in known}
            raise PlanishError(
                f"{entry.where}: '{pattern}' matches no layer of the model",
                hint=nearest(plain.rpartition(".")[2], tails) or f"layers are named like {_few(known)}",
            )
        return chosen

    smooth = matching(entry.smooth)
    balance = [matching(p) for p in entry.balance]
    groups: dict[str, tuple[list[Layer], list[list[Layer]]]] = {}
    for layer in smooth:
        parts = layer.name.split(".")
        for depth in range(len(parts) - 1, -1, -1):
            around = ".".join(parts[:depth])
            prefix = around + "." if around else ""
            inside = [[b for b in of if b.name.startswith(prefix) and b is not layer] for of in balance]
            if all(inside):
                groups.setdefault(around, ([], inside))[0].append(layer)
                break
        else:
            raise PlanishError(f"{entry.where}: no balance layer goes with the smooth layer '{layer.name}'")
    return list(groups.values())


def _few(known: Mapping[str, Layer]) -> str:
    names = list(known)
    return ", ".join(f"'{n}'" for n in names[:3]) or "nothing: the model has no named layers"


# -- judging -------------------------------------------------------------------------------------


class _Numbers:
    """The outputs of the graph in float64, evaluated once."""

    def __init__(self, graph: Graph, probe: Probe) -> None:
        self.probe = probe
        self.expected: list[dict[str, Any]] = []
        self.narrow = False
        for inputs in probe.inputs:
            evaluator = Evaluator(graph, torch.float64)
            self.expected.append(evaluator.run(inputs))
            self.narrow = self.narrow or bool(evaluator.narrowed)

    def error(self, other: Graph) -> tuple[float, float]:
        """The relative error of another graph, and the tolerance."""
        worst = 0.0
        for inputs, expected in zip(self.probe.inputs, self.expected, strict=True):
            got = Evaluator(other, torch.float64).run(inputs)
            for name, tensor in expected.items():
                if isinstance(tensor, torch.Tensor):
                    worst = max(worst, relative_error(got[name], tensor))
        return worst, NARROW_TOLERANCE if self.narrow else TOLERANCE


def lint(
    graph: Graph,
    mapping: str | Path | Mapping[str, Any] | Sequence[Any],
    *,
    check: bool = True,
    seed: int = 0,
    progress: Any = lambda items, label: items,
) -> Lint:
    """Judge a smoothing mapping on a graph.

    Args:
        graph: after the passes of the `raise` group.
        mapping: a YAML file or its data: see `read_mappings`.
        check: ask the numbers too.
        seed: of the factors and the random inputs.
        progress: wraps the loop over the groups in a progress bar.

    Raises:
        PlanishError: a bad mapping, one that matches no layer, or an entry of which only some patterns do.
    """
    entries = read_mappings(mapping)
    known = layers(graph)
    idle = [entry for entry in entries if matches_nothing(entry, known)]
    if len(idle) < len(entries):
        entries = [entry for entry in entries if entry not in idle]
    spaces = analyse(graph)
    numbers = _Numbers(graph, make_probe(graph, seed) if check else Probe())
    rng = np.random.default_rng(seed)
    groups = [(entry, *group) for entry in entries for group in resolve(entry, known)]
    verdicts = []
    for entry, smooth, patterns in progress(groups, "judging"):
        names = tuple(b.name for of in patterns for b in of)
        if len(smooth) > 1:
            several = ", ".join(s.name for s in smooth)
            reason = f"{len(smooth)} smooth layers match for the same balance layers: {several}"
            verdicts.append(Verdict(several, names, False, (reason,), None, 0.0, entry.where))
            continue
        balance = list({b.name: b for of in patterns for b in of}.values())
        verdicts.append(_verdict(graph, spaces, smooth[0], balance, known, numbers, rng, entry))
    unchecked = "" if numbers.probe.inputs or not check else numbers.probe.reason
    return Lint(tuple(verdicts), unchecked, tuple(entry.where for entry in idle))


def _verdict(
    graph: Graph,
    spaces: ChannelSpaces,
    smooth: Layer,
    balance: list[Layer],
    known: Mapping[str, Layer],
    numbers: _Numbers,
    rng: np.random.Generator,
    entry: Entry,
) -> Verdict:
    names, where = tuple(b.name for b in balance), entry.where
    changes, size, impossible = touched(smooth, balance, entry.converted)
    if impossible:
        return Verdict(smooth.name, names, False, (impossible,), None, 0.0, where)
    reasons = judge(spaces, changes, size, smooth.name, known)
    error, tolerance = None, 0.0
    if numbers.probe.inputs:
        factors = np.exp(rng.normal(0.0, 0.5, size))
        error, tolerance = numbers.error(apply_mapping(graph, changes, factors))
    return Verdict(smooth.name, names, not reasons, tuple(reasons), error, tolerance, where)
