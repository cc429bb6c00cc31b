"""Checking one answer of a row by numbers: f(A x) = A f(x) in float64.

`check(node, act, port, axes)` reads the row's answer, draws a transform on the channels that it says are
one (ties, walls and partial pairs included), applies it to every port that the answer names, evaluates,
and compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from helpers import check_text
from scipy.sparse.csgraph import connected_components

from planish.ir import ops
from planish.ir.constant import Constant
from planish.ir.graph import Attribute, Graph, Node, Value
from planish.ir.ops.base import MIXING, Act, Axes, Block, Carry, Link, OneOf, Port, Relation, Wide
from planish.ir.types import TensorType

TOLERANCE = 1e-12
ACTS = tuple(a for a in Act if a is not Act.SPLIT)  # a split follows from PERMUTE: see test_split_act.py
LINEAR = (Act.PERMUTE, Act.SCALE, Act.ROTATE, Act.LINEAR)


def build(op: str, *operands: Any, outputs: int = 1, **attributes: Attribute) -> Node:
    """A graph of one node.

    An operand is a shape (an input of float64), a `TensorType` (an input), an array (a constant), a number
    that names an earlier operand's value ("same:0"), or None.
    """
    graph = Graph("row")
    values: list[Value | None] = []
    for index, operand in enumerate(operands):
        if operand is None:
            values.append(None)
        elif isinstance(operand, str):
            values.append(values[int(operand.removeprefix("same:"))])
        elif isinstance(operand, tuple):
            values.append(graph.add_input(f"x{index}", TensorType("f64", operand)))
        elif isinstance(operand, TensorType):
            values.append(graph.add_input(f"x{index}", operand))
        else:
            values.append(graph.add_constant(f"c{index}", Constant.of(np.asarray(operand))))
    node = graph.append(ops.get(op), values, attributes)
    for index, result in enumerate(node.results):
        graph.add_output(f"y{index}", result)
    check_text(graph)
    return node


def draw(node: Node, rng: np.random.Generator) -> list[np.ndarray | None]:
    """Random operand data, with zeros, large and negative values."""
    data: list[np.ndarray | None] = []
    for index, value in enumerate(node.operands):
        if value is None:
            data.append(None)
        elif value in node.operands[:index]:
            data.append(data[node.operands.index(value)])
        elif value.is_constant:
            assert value.constant is not None
            data.append(value.constant.array())
        else:
            shape = tuple(d if isinstance(d, int) else 3 for d in value.shape or ())
            if value.dtype == "bool":
                data.append(rng.random(shape) < 0.5)
            elif value.dtype == "i64":
                data.append(rng.integers(0, 2, shape))
            else:
                x = rng.standard_normal(shape)
                x[rng.random(shape) < 0.05] *= 1e3
                data.append(x)
    return data


def run(node: Node, data: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    """The results in float64."""
    tensors = [None if x is None else torch.from_numpy(np.array(x)) for x in data]
    results = node.op.evaluate(node, tensors, Wide(torch.float64))
    return [np.array(y.numpy()) for y in results]


class Transform:
    """A random transform of the channels that an answer ties together."""

    def __init__(self, node: Node, act: Act, port: Port, axes: Axes, carry: Carry, rng: np.random.Generator) -> None:
        self.act = act
        dims = self._dims(node, Link(port, axes))
        size = int(np.prod(dims))
        sites: list[tuple[Link, int]] = [(Link(port, axes), size)]
        edges: list[tuple[np.ndarray, np.ndarray]] = []
        offset = size
        for link in carry.links:
            n = int(np.prod(self._dims(node, link)))
            mine, theirs = link.pairs if link.pairs is not None else (np.arange(size), np.arange(n))
            assert len(mine) == len(theirs), (link, size, n)
            edges.append((mine, theirs + offset))
            sites.append((link, n))
            offset += n
        adjacency = np.zeros((offset, offset), np.int8)
        for one, two in edges:
            adjacency[one, two] = 1
        count, label = connected_components(adjacency, directed=False)
        starts = np.cumsum([0, *(n for _, n in sites)])
        self.sites = [(link, label[a:b]) for (link, n), a, b in zip(sites, starts, starts[1:], strict=False)]
        kinds = np.stack([np.bincount(own, minlength=count) for _, own in self.sites], axis=1)
        walls = np.zeros((count, 1), np.int64)
        if carry.block_axes and act in MIXING:
            grid = np.indices(dims).reshape(len(dims), -1)
            own = np.ravel_multi_index(
                [grid[axes.index(a)] for a in carry.block_axes],
                [dims[axes.index(a)] for a in carry.block_axes],
            )
            np.add.at(walls[:, 0], self.sites[0][1], (own + 1) * 7919**2 % 104729)
        _, kind = np.unique(np.concatenate([kinds, walls], axis=1), axis=0, return_inverse=True)
        self.vector = rng.standard_normal(count) * 3
        if act is Act.SCALE:
            self.vector = (
                np.exp(self.vector)
                if carry.positive
                else np.where(rng.random(count) < 0.5, 1.0, -1.0) * np.exp(self.vector / 2)
            )
        self.matrix = np.zeros((count, count))
        for k in np.unique(kind):
            members = np.flatnonzero(kind == k)
            if not kinds[members, 0].any():  # not of the asker: as it is
                self.vector[members] = 1.0 if act is Act.SCALE else 0.0
                self.matrix[members, members] = 1.0
            else:
                self.matrix[np.ix_(members, members)] = _matrix(act, len(members), rng)

    @staticmethod
    def _dims(node: Node, link: Link) -> list[int]:
        shape = link.grow
        if shape is None:
            value = node.port(link.port)
            assert value is not None
            assert value.shape is not None
            shape = tuple(d if isinstance(d, int) else -1 for d in value.shape)
        dims = [shape[a] for a in link.axes]
        assert all(d >= 0 for d in dims), f"{link} is on a dynamic axis"
        return dims

    def apply(self, x: np.ndarray, link: Link, label: np.ndarray) -> np.ndarray:
        """The tensor after the transform."""
        if link.grow is not None:
            x = np.broadcast_to(x, link.grow)
        moved = np.moveaxis(x, link.axes, range(len(link.axes)))
        flat = np.array(moved.reshape(len(label), -1), np.float64)
        if self.act is Act.SCALE:
            flat *= (self.vector[label] ** link.variance)[:, None]
        elif self.act is Act.SHIFT:
            flat += (self.vector[label] * link.variance)[:, None]
        else:
            matrix = self.matrix if link.variance > 0 else np.linalg.inv(self.matrix).T
            out = np.array(flat)
            channels, copies = np.unique(label, return_counts=True)
            for copy in range(copies.max()):
                atoms = {c: np.flatnonzero(label == c)[copy] for c, n in zip(channels, copies, strict=True) if n > copy}
                order = list(atoms)
                places = list(atoms.values())
                out[places] = matrix[np.ix_(order, order)] @ flat[places]
            flat = out
        return np.moveaxis(flat.reshape(moved.shape), range(len(link.axes)), link.axes)


def _matrix(act: Act, n: int, rng: np.random.Generator) -> np.ndarray:
    if act is Act.PERMUTE:
        return np.eye(n)[rng.permutation(n)]
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return q if act is Act.ROTATE else q @ np.diag(np.exp(rng.standard_normal(n) / 2)) @ q.T + 0.1 * np.eye(n)


def error(node: Node, act: Act, port: Port, axes: Axes, carry: Carry, seed: int = 0) -> float:
    """How far the function is from f(A x) = A f(x) under a random transform, relative to its size."""
    rng = np.random.default_rng(seed)
    data = draw(node, rng)
    before = run(node, data)
    transform = Transform(node, act, port, axes, carry, rng)
    expected = list(before)
    changed: dict[Port, np.ndarray] = {}
    for link, label in transform.sites:
        if link.port < 0:
            expected[~link.port] = transform.apply(before[~link.port], link, label)
            continue
        x = data[link.port]
        assert x is not None
        moved = transform.apply(x, link, label)
        changed[link.port] = moved if x.dtype.kind == "f" else moved.astype(x.dtype)
    operands = [changed.get(index, x) for index, x in enumerate(data)]
    after = run(node, operands)
    worst = 0.0
    for got, want in zip(after, expected, strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        with np.errstate(invalid="ignore"):
            finite = np.where(same, 0, np.abs(got - want))
        worst = max(
            worst,
            float(finite.max(initial=0)) / (float(np.abs(want[np.isfinite(want)]).max(initial=0)) + 1e-30),
        )
    return worst


def options(relation: Relation) -> Sequence[Carry]:
    assert isinstance(relation, Carry | OneOf), relation
    return relation.options if isinstance(relation, OneOf) else (relation,)


def relate(node: Node, act: Act, port: Port, *axes: int) -> Relation:
    return node.op.relate(node, act, port, axes)


def check(node: Node, act: Act, port: Port, *axes: int) -> Relation:
    """The row's answer, each option of which holds by numbers."""
    relation = relate(node, act, port, *axes)
    for option in options(relation):
        for seed in (0, 1):
            off = error(node, act, port, axes, option, seed)
            assert off <= TOLERANCE, f"{node.op.name} {act.value} port {port} axes {axes}: {off:.3g}\n{option}"
    return relation


def check_acts(node: Node, port: Port, axes: Axes, passing: Sequence[Act]) -> Mapping[Act, Relation]:
    """Exactly these acts pass, and do so by numbers; the others are refused with a reason."""
    answers: dict[Act, Relation] = {}
    for act in ACTS:
        if act in passing:
            answers[act] = check(node, act, port, *axes)
        else:
            relation = relate(node, act, port, *axes)
            assert isinstance(relation, Block), (act, relation)
            assert relation.reason
            answers[act] = relation
    return answers
