"""The audit of the op table: every claim of every row is tried on numbers, and every refusal too.

For an instance of an op (operand shapes, attributes), an act, a port and axes, the row says what must
carry the transform (`OpDef.relate`). The audit draws operands and a transform T in float64, gives T to
the ports that the row names, and demands that the node computes what the row says:

    f(T operands) = T f(operands)          for `Carry`, each option of `OneOf`, and `Fold`

For a `Block` it looks for an identity that the row overlooks: T on the port alone leaves the results as
they are, or shows on a result (or comes from one operand) unchanged or inverted. If one holds for all
draws, the row must list the refusal in `conservative`.

The transform acts on *channels*: the connected components of atoms under the links' pairs, as in
`planish.ir.spaces`; channels that lie in different ports, or are repeated differently, are not mixed.
Atoms that meet no channel of the asker stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from planish.ir.audit_trial import Instance, Trial
from planish.ir.ops.base import (
    ACTS,
    MIXING,
    Act,
    Axes,
    Block,
    Carry,
    Fold,
    Link,
    OneOf,
    OpDef,
    Port,
    Relation,
)
from planish.ir.transform import Permute, Shift, Split, Transform, apply, random_transform
from planish.ir.types import is_float

DRAWS = 20  # for a refusal to count as an overlooked identity


@dataclass(frozen=True)
class Finding:
    """What is wrong with a row."""

    op: str
    act: Act | None
    port: Port
    axes: Axes
    what: str
    where: str

    def __str__(self) -> str:
        act = f" {self.act.value} at port {self.port} axes {self.axes}" if self.act is not None else ""
        return f"{self.op}:{act} {self.what}; in {self.where}"


# -- claims ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Element:
    """A value (or a constant that has yet to be made) with axes: what carries a transform."""

    ports: list[Port]
    axes: Axes
    dims: tuple[int, ...]
    variance: int
    grow: tuple[int, ...] | None = None
    view: tuple[int, ...] | None = None
    neutral: float | None = None
    offset: float = 0.0
    start: int = 0

    @property
    def size(self) -> int:
        return int(np.prod(self.dims, dtype=np.int64))


class _Claim:
    """What a row claims for an asker: elements, ties between their atoms, and walls between channels."""

    def __init__(self, trial: Trial, act: Act) -> None:
        self.trial = trial
        self.act = act
        self.elements: list[_Element] = []
        self.ties: list[tuple[_Element, _Element, tuple[np.ndarray, np.ndarray] | None]] = []
        self.walls: list[tuple[_Element, Axes]] = []
        self.positive = False
        self.clash = False

    def ports_of(self, port: Port) -> list[Port]:
        value = self.trial.node.port(port)
        return [p for p in self.trial.ports if value is not None and self.trial.node.port(p) is value] or [port]

    def element(self, port: Port, axes: Axes, variance: int, link: Link | None = None) -> _Element:
        grow, view = (None, None) if link is None else (link.grow, link.view)
        ports = self.ports_of(port)
        shape = grow or view or self.trial.data[port].shape
        for element in self.elements:
            if element.ports == ports and element.axes == axes and (element.grow, element.view) == (grow, view):
                if element.variance != variance and self.act not in (Act.PERMUTE, Act.ROTATE):
                    self.clash = True
                return element
            # axes that meet: the analysis ties such elements, the audit leaves them alone
            self.clash |= element.ports == ports and bool({*element.axes} & {*axes})
        element = _Element(ports, axes, tuple(shape[a] for a in axes), variance, grow, view)
        if link is not None:
            element.neutral, element.offset = link.neutral, link.offset
        self.elements.append(element)
        return element

    def add(self, asker: _Element, carry: Carry) -> list[_Element]:
        """Take the links of a `Carry` in; returns the elements that are new."""
        if carry.block_axes:
            self.walls.append((asker, carry.block_axes))
        self.positive |= carry.positive
        fresh = []
        for link in carry.links:
            node = self.trial.node
            value = node.port(link.port)
            if value is None and (link.neutral is None or (link.neutral == 0.0 and self.act is not Act.SHIFT)):
                continue
            known = len(self.elements)
            other = self.element(link.port, link.axes, asker.variance * link.variance, link)
            if len(self.elements) > known:
                fresh.append(other)
            self.ties.append((asker, other, link.pairs))
        return fresh

    def parts(self) -> Iterator[tuple[dict[int, np.ndarray], int, np.ndarray]]:
        """Sets of channels that may be mixed: ({element: channel of each atom or -1}, channels, labels)."""
        total = 0
        for element in self.elements:
            element.start = total
            total += element.size
        parent = list(range(total))

        def find(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        for one, two, pairs in self.ties:
            mine, theirs = pairs if pairs is not None else (np.arange(one.size), np.arange(two.size))
            for i, j in zip(mine.tolist(), theirs.tolist(), strict=True):
                parent[find(one.start + i)] = find(two.start + j)
        roots = np.array([find(i) for i in range(total)])
        _, channel = np.unique(roots, return_inverse=True)
        count = int(channel.max()) + 1 if total else 0
        signature: list[list[int]] = [[0] * len(self.elements) for _ in range(count)]
        for k, element in enumerate(self.elements):
            for c in channel[element.start : element.start + element.size]:
                signature[c][k] += 1
        labels: list[set[tuple[int, ...]]] = [set() for _ in range(count)]
        for k, (element, axes) in enumerate(self.walls):
            places = [element.axes.index(a) for a in axes]
            for atom, index in enumerate(np.ndindex(*element.dims)):
                labels[channel[element.start + atom]].add((k, *(index[p] for p in places)))
        for kind in sorted({tuple(s) for s in signature}):
            if not kind[0]:
                continue  # none of the asker's channels: left as it is
            members = [c for c in range(count) if tuple(signature[c]) == kind]
            renumber = np.full(count, -1)
            renumber[members] = np.arange(len(members))
            atoms = {k: renumber[channel[e.start : e.start + e.size]] for k, e in enumerate(self.elements) if kind[k]}
            distinct: dict[frozenset[tuple[int, ...]], int] = {}
            label = [distinct.setdefault(frozenset(labels[c]), len(distinct)) for c in members]
            yield atoms, len(members), np.array(label)

    def fails(self, rng: np.random.Generator) -> str | None:
        """Try the claim on a random transform; what went wrong, or None."""
        data = dict(self.trial.data)
        for element in self.elements:
            bad = self._made(element, data)
            if bad is not None:
                return bad
        if self.act is Act.SPLIT:
            self._split(data, rng)
        for atoms, size, labels in self.parts() if self.act is not Act.SPLIT else ():
            transform = random_transform(
                self.act, size, rng, labels=labels if self.act in MIXING else None, positive=self.positive
            )
            for k, own in atoms.items():
                element = self.elements[k]
                for port in element.ports:
                    data[port] = _given(data[port], element, transform, own)
        try:
            results = self.trial.evaluate(data)
        except (IndexError, RuntimeError, ValueError) as error:  # operands whose sizes do not fit
            return f"it cannot be computed ({error})"
        return _difference(results, data)

    def _split(self, data: dict[Port, np.ndarray], rng: np.random.Generator) -> None:
        """Split the channels of all parts at once: afterwards an axis has another size."""
        counts = [np.ones(element.size, np.int64) for element in self.elements]
        for atoms, size, _ in self.parts():
            drawn = rng.integers(1, 4, size)
            for k, own in atoms.items():
                counts[k][own >= 0] = drawn[own[own >= 0]]
        for element, of_each in zip(self.elements, counts, strict=True):
            for port in element.ports:
                data[port] = _given(data[port], element, Split(of_each), None)

    def _made(self, element: _Element, data: dict[Port, np.ndarray]) -> str | None:
        """Make or expand the constant of an element."""
        port = element.ports[0]
        value = self.trial.node.port(port)
        if value is None:
            if element.grow is None or element.neutral is None:
                return "an absent operand would carry it, but the link gives no shape to make it of"
            data[port] = np.full(element.grow, element.neutral)
            return None
        if (element.grow is not None or element.view is not None) and not value.is_constant:
            return "an activation cannot be expanded or viewed in another shape"
        if element.offset and not value.is_constant:
            return "an activation cannot be read beside an offset"
        if element.grow is not None:
            data[port] = np.broadcast_to(data[port], element.grow)
        return None


def _given(data: np.ndarray, element: _Element, transform: Transform, atoms: np.ndarray | None) -> np.ndarray:
    """Data with the transform on an element."""
    shape = data.shape
    if element.view is not None:
        data = data.reshape(element.view)
    if element.offset:
        data = data + element.offset
    data = apply(data, element.axes, transform, atoms, element.variance)
    if transform.act is Act.SPLIT:
        return data  # of another shape
    return (data - element.offset if element.offset else data).reshape(shape)


def _difference(results: Sequence[np.ndarray], expected: Mapping[Port, np.ndarray]) -> str | None:
    """Where computed results differ from the expected ones: relative to the largest value, 1e-10."""
    for index, result in enumerate(results):
        wanted = expected[~index]
        if result.shape != wanted.shape:
            return f"result {index} has shape {result.shape}, expected {wanted.shape}"
        if result.dtype.kind not in "fc":
            if not np.array_equal(result, wanted):
                return f"result {index} differs"
            continue
        same = (result == wanted) | (np.isnan(result) & np.isnan(wanted))
        finite = np.isfinite(result) & np.isfinite(wanted)
        if not (same | finite).all():
            return f"result {index} is not finite in other places"
        error = np.abs(np.where(same, 0.0, np.where(finite, result - wanted, 0.0)))
        largest = np.abs(np.where(np.isfinite(wanted), wanted, 0.0)).max(initial=0.0)
        if error.max(initial=0.0) > 1e-10 * (largest + 1e-30):
            return f"result {index} differs by {error.max():.3g}, its largest value is {largest:.3g}"
    return None


def _claims(trial: Trial, act: Act, port: Port, axes: Axes) -> tuple[Relation, list[_Claim]]:
    """The row's answer, and the claims in it (several for `OneOf`).

    A value that stands at several operands is asked about at each of them, until nothing new is linked; a
    refusal or a choice on the way ends that: it is the analysis that settles those.
    """
    relation = trial.node.op.relate(trial.node, act, port, axes)
    if isinstance(relation, (Block, Fold)):
        return relation, []
    options = relation.options if isinstance(relation, OneOf) else (relation,)
    claims = []
    for option in options:
        claim = _Claim(trial, act)
        asker = claim.element(port, axes, 1)
        waiting = [asker, *claim.add(asker, option)]
        asked = {(port, axes)}
        settled = True
        while waiting and settled:
            element = waiting.pop()
            if len(element.ports) == 1:
                continue
            for other in element.ports:
                if (other, element.axes) in asked:
                    continue
                asked.add((other, element.axes))
                answer = trial.node.op.relate(trial.node, act, other, element.axes)
                if not isinstance(answer, Carry):
                    settled = False
                    break
                waiting += claim.add(element, answer)
        if settled and not claim.clash:
            claims.append(claim)
    return relation, claims


def _fold_fails(trial: Trial, relation: Fold, port: Port, axes: Axes, rng: np.random.Generator) -> str | None:
    row = trial.node.op
    if row.fold is None:
        return "it claims a fold and has no formula"
    dims = tuple(trial.data[port].shape[a] for a in axes)
    t = rng.normal(size=dims)
    new = row.fold(trial.node, Act.SHIFT, port, axes, t)
    if set(new) != set(relation.operands):
        return f"its fold changes operands {sorted(new)}, and it claims {sorted(relation.operands)}"
    data = {**trial.data, **new}
    data[port] = apply(trial.data[port], axes, Shift(t.reshape(-1)))
    return _difference(trial.evaluate(data), data)


# -- refusals ----------------------------------------------------------------------------------------


def _overlooked(trial: Trial, act: Act, port: Port, axes: Axes, rng: np.random.Generator) -> str | None:
    """An identity that holds for every draw although the row refuses; None if there is none."""
    candidates: list[tuple[Port | None, Axes, int]]
    dims = tuple(trial.data[port].shape[a] for a in axes)
    size = int(np.prod(dims, dtype=np.int64))
    if size < 2 or (len(axes) > 1 and 1 in dims):  # nothing to tell apart, or the same as with fewer axes
        return None
    others = [p for p in trial.ports if (p < 0) != (port < 0)]
    candidates = [(None, (), 1)] if port >= 0 else []
    for other in others:
        if trial.data[other].dtype.kind != "f" and act not in (Act.PERMUTE, Act.SPLIT):
            continue
        shape = trial.data[other].shape
        for there in itertools.combinations(range(len(shape)), len(axes)):
            if tuple(shape[a] for a in there) == dims:
                candidates += [(other, there, v) for v in ((1,) if act in MIXING else (1, -1))]
    for _ in range(DRAWS):
        if not candidates:
            return None
        transform = random_transform(act, size, rng, positive=True)
        if isinstance(transform, Permute) and (transform.order == np.arange(size)).all():
            continue
        candidates = [c for c in candidates if _holds(trial, transform, port, axes, c)]
        trial = trial.redraw(rng)
    if not candidates:
        return None
    found, there, variance = candidates[0]
    if found is None:
        return "leaves every result as it is"
    inverted = " inverted" if variance < 0 else ""
    return f"goes with the same{inverted} at port {found} axes {there}"


def _holds(
    trial: Trial, transform: Transform, port: Port, axes: Axes, candidate: tuple[Port | None, Axes, int]
) -> bool:
    other, there, variance = candidate
    data = dict(trial.data)
    for p in (q for q in trial.ports if trial.node.port(q) is trial.node.port(port)):
        data[p] = apply(data[p], axes, transform)
    if other is not None:
        for p in (q for q in trial.ports if trial.node.port(q) is trial.node.port(other)):
            data[p] = apply(data[p], there, transform, None, variance)
    try:
        results = trial.evaluate(data)
    except (IndexError, RuntimeError, ValueError):  # indices or shapes that were permuted
        return False
    return _difference(results, data) is None


# -- the audit ---------------------------------------------------------------------------------------


def questions(trial: Trial) -> Iterator[tuple[Act, Port, Axes]]:
    """Every (act, port, axes) that the audit asks: each axis, and each pair of axes."""
    for port in trial.ports:
        value = trial.node.port(port)
        assert value is not None
        if value.shape is None or (port >= 0 and trial.ports.index(port) > _first_of(trial, port)):
            continue
        static = [a for a, d in enumerate(value.shape) if isinstance(d, int) and d > 0]
        for axes in (*((a,) for a in static), *itertools.combinations(static, 2)):
            for act in ACTS:
                if act is Act.SPLIT and len(axes) > 1:
                    continue  # joint axes have no room for more channels
                if act in (Act.PERMUTE, Act.SPLIT) or is_float(value.dtype):
                    yield act, port, axes


def _first_of(trial: Trial, port: Port) -> int:
    value = trial.node.port(port)
    return next(i for i, p in enumerate(trial.ports) if trial.node.port(p) is value)


def excused(row: OpDef, act: Act, port: Port) -> bool:
    """True if the row lists refusals of this act (at this port) as conservative."""
    if act is Act.SPLIT and row.repeats is None:
        return True  # its reason says that no rule was derived
    count = len(row.params)
    if port < 0:
        names = {"result", str(port)}
    else:
        names = {row.params[min(port, count - 1)].name, str(port)} if count else {str(port)}
    return act.value in row.conservative or any(f"{act.value}@{name}" in row.conservative for name in names)


def audit(row: OpDef, instances: Sequence[Instance], seed: int) -> list[Finding]:
    """Try every claim and every refusal of a row; what is wrong with it, empty if nothing is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny
    try:
        return list(_findings(row, instances, seed))
    finally:
        torch.set_num_threads(threads)


def _findings(row: OpDef, instances: Sequence[Instance], seed: int) -> Iterator[Finding]:
    if not instances:
        yield Finding(row.name, None, 0, (), "no instance in the audit: a hole in the grid", row.name)
    for index, param in enumerate(row.params):
        if instances and not any(i.operands[index : index + 1] not in ((), (None,)) for i in instances):
            yield Finding(row.name, None, index, (), f"no instance has operand {param.name}", row.name)
    for number, instance in enumerate(instances):
        rng = np.random.default_rng((seed, number))
        trial = Trial(row, instance, rng)
        where = repr(trial.node)
        wrong = trial.wrong_types()
        if wrong is not None:
            yield Finding(row.name, None, -1, (), wrong, where)
            continue
        for act, port, axes in questions(trial):
            what = _judge(trial, act, port, axes, rng)
            if what is not None:
                yield Finding(row.name, act, port, axes, what, where)


def _judge(trial: Trial, act: Act, port: Port, axes: Axes, rng: np.random.Generator) -> str | None:
    relation, claims = _claims(trial, act, port, axes)
    if isinstance(relation, Block):
        if not relation.reason:
            return "refuses without a reason"
        if trial.degenerate or excused(trial.node.op, act, port):
            return None
        overlooked = _overlooked(trial, act, port, axes, rng)
        return None if overlooked is None else f"is refused ({relation.reason}), but {overlooked}"
    if isinstance(relation, Fold):
        what = _fold_fails(trial, relation, port, axes, rng)
        return None if what is None else f"does not fold: {what}"
    for claim in claims:
        what = claim.fails(rng)
        if what is not None:
            links = ", ".join(f"port {e.ports[0]} axes {e.axes} variance {e.variance}" for e in claim.elements)
            return f"does not hold: {what}; carried by {links}"
    return None
