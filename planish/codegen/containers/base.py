"""What every container is: a name, what it cannot hold, packing and unpacking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from planish.ir.errors import PlanishError
from planish.ir.qtensor import QTensor
from planish.ir.types import bits


@dataclass(frozen=True)
class Packed:
    """A quantised tensor in the arrays of a container.

    Attributes:
        container: its name.
        arrays: by the names that the container gives them.
        attributes: what is not in the arrays: the attributes of a node, or of the scheme.
    """

    container: str
    arrays: dict[str, np.ndarray]
    attributes: dict[str, int | str | tuple[int, ...]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in self.arrays.values())

    def number(self, name: str) -> int:
        """An integer attribute.

        Raises:
            PlanishError: it is missing.
        """
        value = self.attributes.get(name)
        if not isinstance(value, int):
            raise PlanishError(f"container '{self.container}': attribute '{name}' is missing; expected an integer")
        return value

    def array(self, name: str) -> np.ndarray:
        """One array.

        Raises:
            PlanishError: it is missing.
        """
        if name not in self.arrays:
            held = ", ".join(self.arrays) or "none"
            raise PlanishError(f"container '{self.container}': array '{name}' is missing; got {held}")
        return self.arrays[name]


@dataclass(frozen=True)
class Container:
    """A way in which quantised tensors lie in memory.

    Attributes:
        name: as `pack` takes it.
        refuses: why it cannot hold a tensor; None if it can.
        pack: the arrays of a tensor that it can hold, under options of its own.
        unpack: the inverse: the same numbers.
    """

    name: str
    refuses: Callable[[QTensor], str | None]
    pack: Callable[..., Packed]
    unpack: Callable[[Packed], QTensor]


_containers: dict[str, Container] = {}


def register(container: Container) -> Container:
    """Add a container to those that `pack` knows."""
    _containers[container.name] = container
    return container


def containers() -> dict[str, Container]:
    """All of them by name."""
    return dict(_containers)


def plain(q: QTensor, *elements: str) -> str | None:
    """Why a tensor is no matrix of such elements under one set of scales; None if it is."""
    if q.clusters is not None:
        return f"a scale for each of {len(q.scale)} clusters"
    if q.codes.ndim != 2:
        return f"a tensor of rank {q.codes.ndim}; expected a matrix"
    if q.codes.size == 0:
        return f"a tensor without elements, of shape {q.shape}"
    if q.element not in elements:
        return f"elements {q.element}; expected {', '.join(elements)}"
    return None


def width_of(q: QTensor) -> int:
    """Bits of a code."""
    return bits(q.element)


def is_signed(q: QTensor) -> bool:
    """True if its codes are signed integers."""
    return q.element.startswith("i")


def one_level(q: QTensor, dtypes: tuple[str, ...]) -> str | None:
    """Why a tensor has scales of two levels, or of other dtypes; None if it has not."""
    if q.global_scale is not None:
        return "a scale of the whole tensor beside those of the blocks"
    return None if q.scale_dtype in dtypes else f"scales of {q.scale_dtype}; expected {', '.join(dtypes)}"


def rows_and_groups(q: QTensor) -> str | None:
    """Why a matrix has other scales than of the tensor, its rows, or groups along its rows; None if it has not."""
    if q.axis is None:
        return None if q.scale.size == 1 else f"scales of shape {q.scale.shape} that broadcast"
    if q.block is None:
        return None if q.axis == 0 else "a scale for each input channel"
    return None if q.axis == 1 else "blocks along the output channels"
