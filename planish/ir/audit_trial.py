"""What the audit tries: an op on drawn operands.

An `Instance` gives operand shapes and attributes, a `Trial` makes a node of it, draws its operands in
float64 and evaluates it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from planish.ir.constant import Constant
from planish.ir.graph import Attribute, Graph, Value
from planish.ir.ops.base import OpDef, Port, Wide
from planish.ir.types import TensorType, bits, numpy_dtype


@dataclass(frozen=True)
class Operand:
    """One operand of an instance.

    Attributes:
        shape: static dims.
        constant: a constant rather than an activation.
        draw: how its data is drawn: normal, positive, nonzero, few (few different values), integer, bool,
            rows (they sum to 1), power (of two), equal (one value everywhere), or the data itself.
        dtype: its dtype.
        same: the operand that is the same value.
    """

    shape: tuple[int, ...]
    constant: bool = False
    draw: str | np.ndarray = "normal"
    dtype: str = "f32"
    same: int | None = None


@dataclass(frozen=True)
class Instance:
    """An op on given operands; an absent operand is None."""

    operands: tuple[Operand | None, ...]
    attributes: Mapping[str, Attribute]


def draw(operand: Operand, rng: np.random.Generator) -> np.ndarray:
    """Data for an operand: among normal numbers some zeros and some that are large."""
    if isinstance(operand.draw, np.ndarray):
        return operand.draw
    shape = operand.shape
    data = rng.normal(size=shape)
    match operand.draw:
        case "integer":
            most = min(4, 2 ** bits(operand.dtype) // (1 if operand.dtype.startswith("u") else 2))
            least = 0 if operand.dtype.startswith("u") else 1 - most
            return rng.integers(least, most, shape).astype(numpy_dtype(operand.dtype))
        case "few":
            return rng.integers(-2, 3, shape).astype(np.float64)
        case "bool":
            return rng.random(shape) < 0.6
        case "power":
            return np.exp2(rng.integers(-3, 4, shape))
        case "equal":
            return np.full(shape, rng.normal())
        case "rows":
            data = np.exp(data)
            return np.asarray(data / data.sum(-1, keepdims=True))
        case "positive":
            data = np.exp(data)
        case "nonzero":
            data = data + np.sign(data) * 0.1
        case _:
            data = np.where(rng.random(shape) < 0.1, 0.0, data)
    large = rng.random(shape) < 0.05
    return np.asarray(np.where(large, 40.0 * data, data))


def _held(data: np.ndarray) -> torch.Tensor:
    """Data as an evaluation in float64 holds it."""
    if data.dtype.name in ("int2", "uint2", "int4", "uint4"):
        return torch.from_numpy(data.astype(np.int8 if data.dtype.name[0] == "i" else np.uint8))
    return torch.from_numpy(np.array(data if data.dtype.isbuiltin else data.astype(np.float64)))


class Trial:
    """A node made of an instance, with its operands' data and its results."""

    def __init__(self, row: OpDef, instance: Instance, rng: np.random.Generator) -> None:
        self.graph = Graph("audit")
        self.instance = instance
        values: list[Value | None] = []
        self.data: dict[Port, np.ndarray] = {}
        for index, operand in enumerate(instance.operands):
            if operand is None:
                values.append(None)
                continue
            if operand.same is not None:
                values.append(values[operand.same])
                self.data[index] = self.data[operand.same]
                continue
            data = draw(operand, rng)
            self.data[index] = data
            name = f"operand{index}"
            if operand.constant:
                values.append(self.graph.add_constant(name, Constant(data, operand.dtype, data.shape)))
                continue
            value = self.graph.add_input(name, TensorType(operand.dtype, data.shape))
            if isinstance(operand.draw, str) and operand.draw == "rows":
                from planish.ir.ops import get

                value = self.graph.append(get("softmax"), [value], {"axis": -1}).result
            values.append(value)
        self.node = self.graph.append(row, values, instance.attributes)
        self.evaluate_types = [v.type for v in self.node.results]
        for index, result in enumerate(self.evaluate(self.data)):
            self.data[~index] = result

    def evaluate(self, data: Mapping[Port, np.ndarray]) -> list[np.ndarray]:
        """The results in float64 for operands' data."""
        count = max((p for p in data if p >= 0), default=-1) + 1
        tensors = [_held(data[p]) if p in data else None for p in range(count)]
        results = self.node.op.evaluate(self.node, tensors, Wide(torch.float64))
        return [r.detach().numpy() for r in results]

    @property
    def degenerate(self) -> bool:
        """One value at several operands: x - x is 0 whatever becomes of x, so refusals are not judged."""
        return any(operand is not None and operand.same is not None for operand in self.instance.operands)

    @property
    def ports(self) -> list[Port]:
        return sorted(self.data)

    def redraw(self, rng: np.random.Generator) -> Trial:
        """The same instance with other data."""
        return Trial(self.node.op, self.instance, rng)

    def wrong_types(self) -> str | None:
        """What is wrong with the inferred types, compared with what was computed."""
        for index, value in enumerate(self.node.results):
            computed = self.data[~index]
            if not isinstance(value.type, TensorType):
                return f"result {index} has no inferred type"
            shape = value.type.shape
            if shape is not None and (
                len(shape) != computed.ndim
                or any(isinstance(d, int) and d != c for d, c in zip(shape, computed.shape, strict=True))
            ):
                return f"result {index} is inferred as {value.type}, computed {computed.shape}"
        return None
