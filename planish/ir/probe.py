"""Random inputs for a graph, and the comparison of two sets of outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from planish.ir.graph import Graph, Value
from planish.ir.types import TensorType, is_float

if TYPE_CHECKING:
    import numpy as np
    import torch

_SEE_THROUGH = frozenset(
    {"cast", "identity", "unsqueeze", "squeeze", "reshape", "transpose", "expand", "flatten", "slice"}
)
FIRST_SIZE = 2  # of the first symbol of an input (the batch)


def index_bound(value: Value, depth: int = 8) -> int | None:
    """The number of rows of the smallest table that an integer value indexes; None if it indexes none."""
    bounds = []
    for node in value.users:
        if node.op.name in ("gather", "embedding"):
            table, index = node.operands[0], node.operands[1]
            if index is value and table is not None and table is not value:
                axis = node.attributes.get("axis", 0) if node.op.name == "gather" else 0
                assert isinstance(axis, int)
                dim = table.type.dim(axis) if isinstance(table.type, TensorType) else None
                if isinstance(dim, int):
                    bounds.append(dim)
        elif depth and node.op.name in _SEE_THROUGH and node.operands[0] is value:
            bound = index_bound(node.result, depth - 1)
            if bound is not None:
                bounds.append(bound)
    return min(bounds) if bounds else None


def random_inputs(
    graph: Graph, seed: int, *, size: int = 8, sizes: Mapping[str, int] | None = None
) -> dict[str, torch.Tensor]:
    """Random inputs: floats normal with planted zeros and large values, indices in range, masks of 0 and 1.

    What is no tensor of numbers of known rank is left out.

    Args:
        seed: of the generator.
        size: of every symbolic or unknown dim, but for the first dim of an input, which gets 2.
        sizes: sizes of some symbols.
    """
    import numpy as np

    from planish.ir.types import torch_dtype

    rng = np.random.default_rng(seed)
    bound_sizes = dict(sizes or {})
    inputs: dict[str, torch.Tensor] = {}
    for value in graph.inputs:
        if value.constant is not None or not _drawable(value):
            continue
        assert isinstance(value.type, TensorType) and value.type.shape is not None
        dims = []
        for axis, dim in enumerate(value.type.shape):
            if isinstance(dim, int):
                dims.append(dim)
            elif dim is None:
                dims.append(FIRST_SIZE if axis == 0 else size)
            else:
                dims.append(bound_sizes.setdefault(dim, FIRST_SIZE if axis == 0 else size))
        inputs[value.name] = _draw(value, tuple(dims), rng).to(torch_dtype(value.type.dtype))
    return inputs


def _drawable(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type.shape is not None and value.type.dtype != "str"


def undrawn(graph: Graph) -> Value | None:
    """The first input that `random_inputs` leaves out although it has no default."""
    return next((v for v in graph.inputs if v.constant is None and not _drawable(v)), None)


def _draw(value: Value, dims: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
    import torch

    assert isinstance(value.type, TensorType)
    dtype = value.type.dtype
    if is_float(dtype):
        data = rng.normal(0.0, 1.0, dims)
        data *= 1.0 + 19.0 * (rng.random(dims) < 0.01)
        data *= rng.random(dims) >= 0.01
        return torch.from_numpy(data) if dims else torch.tensor(float(data))
    if dtype == "bool":
        return torch.from_numpy(rng.random(dims) < 0.8) if dims else torch.tensor(True)
    bound = index_bound(value)
    integers = rng.integers(0, bound or 2, dims)
    if bound is None and integers.ndim:
        integers[..., 0] = 1  # a mask keeps at least one position
    return torch.as_tensor(integers)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """max |got - expected| / (max |expected| + tiny) in float64; infinite where shapes or non-finite values differ."""
    import torch

    if got.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if not (got.is_floating_point() or expected.is_floating_point()):
        return 0.0 if torch.equal(got, expected) else float("inf")
    a, b = got.double(), expected.double()
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite) or not torch.equal(
        torch.nan_to_num(a[~finite]), torch.nan_to_num(b[~finite])
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(b[finite].abs().max()) + torch.finfo(torch.float64).tiny
    return float((a[finite] - b[finite]).abs().max()) / scale


def worst_element(got: torch.Tensor, expected: torch.Tensor) -> str:
    """The position of the largest difference with both values."""
    import torch

    if got.shape != expected.shape:
        return f"shapes {tuple(got.shape)} and {tuple(expected.shape)}"
    if got.numel() == 0:
        return "has no elements"
    difference = torch.nan_to_num((got.double() - expected.double()).abs(), nan=float("inf"))
    index = int(difference.argmax())
    position = [int(i) for i in torch.unravel_index(torch.tensor(index), got.shape)]
    return f"at {position}: {got.flatten()[index].item()!r} against {expected.flatten()[index].item()!r}"
