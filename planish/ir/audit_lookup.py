"""The audit's instances of lookups, resizing and grouped products."""

from __future__ import annotations

import numpy as np

from planish.ir.audit_trial import Instance, Operand


def _a(*shape: int, constant: bool = False) -> Operand:
    return Operand(shape, constant)


def _positions(below: int, *shape: int, seed: int = 0) -> Operand:
    """A constant tensor of positions on an axis of size `below`; every one occurs where there is room."""
    count = int(np.prod(shape))
    drawn = np.random.default_rng(seed).permutation(np.arange(max(count, below)) % below)[:count]
    return Operand(shape, True, drawn.reshape(shape).astype(np.int64), "i64")


def _given(*values: int) -> Operand:
    return Operand((len(values),), True, np.array(values, np.int64), "i64")


def _distinct(below: int, *shape: int) -> Operand:
    """Positions along the last axis that differ within each row."""
    generator = np.random.default_rng(1)
    rows = [generator.permutation(below)[: shape[-1]] for _ in range(int(np.prod(shape[:-1])))]
    return Operand(shape, True, np.array(rows).reshape(shape).astype(np.int64), "i64")


def instances() -> dict[str, list[Instance]]:
    """Instances by op."""
    return {
        "cumsum": [
            Instance((_a(3, 4),), {"axis": 0}),
            Instance((_a(2, 3, 4),), {"axis": 1}),
            Instance((_a(3, 4),), {"axis": -1}),
        ],
        "gather_elements": [
            Instance((_a(3, 4), _positions(4, 3, 5)), {"axis": 1}),
            Instance((_a(5, 3), _positions(5, 2, 3)), {"axis": 0}),
            Instance((_a(2, 3, 4), _positions(3, 2, 2, 4)), {"axis": 1}),
        ],
        "gather_nd": [
            Instance((_a(3, 4, 5), _positions(3, 2), _positions(4, 2)), {}),
            Instance((_a(2, 3, 4, 5), _positions(3, 4, 1), _positions(4, 3)), {"axis": 1}),
            Instance((_a(3, 4), _positions(4, 2)), {"axis": 1}),
            Instance((_a(3, 4, 5), _positions(3, 6, 2)), {"stacked": True}),
            Instance((_a(2, 4, 5), _positions(4, 1)), {"axis": 1, "stacked": True}),
        ],
        "scatter_elements": [
            Instance((_a(3, 4), _distinct(4, 3, 2), _a(3, 2)), {"axis": 1}),
            Instance((_a(2, 3, 5), _distinct(5, 2, 3, 4), _a(2, 3, 4)), {"axis": -1}),
        ],
        "index_add": [
            Instance((_a(3, 4), _given(2, 0, 2), _a(3, 4)), {"axis": 0}),
            Instance((_a(2, 3, 4), _given(1, 1), _a(2, 2, 4)), {"axis": 1}),
        ],
        "topk": [
            Instance((_a(3, 5),), {"k": 2}),
            Instance((_a(5, 3),), {"k": 3, "axis": 0, "largest": False}),
            Instance((_a(2, 5, 3),), {"k": 1, "axis": 1}),
        ],
        "nonzero": [Instance((_a(5),), {})],
        "reassemble": [
            Instance((_a(3, 4), _given(2, 0, 1, 3), _given(1, 2, 1), _a(4, constant=True)), {}),
            Instance((_a(2, 3, 4), _given(0, 1, 1, 2, 0), _given(2, 1, 1, 1), _a(5, constant=True)), {"axis": 1}),
            Instance((_a(5, 2), _given(4, 3, 2, 1, 0, 0), _given(1, 1, 1, 1, 1, 1), _a(6)), {"axis": 0}),
        ],
        "resize": [
            Instance((_a(2, 3, 4, 4), _given(8, 6)), {}),
            Instance((_a(2, 3, 4, 4), _given(3, 7)), {"mode": "linear"}),
            Instance((_a(2, 3, 4, 4), _given(3, 7)), {"mode": "linear", "align_corners": True}),
            Instance((_a(2, 3, 4, 4),), {"mode": "cubic", "scales": (2.0, 1.5)}),
            Instance((_a(2, 3, 4),), {"mode": "nearest_exact", "scales": (1.7,)}),
        ],
        "grouped_matmul": [
            Instance((_a(6, 3), _a(2, 3, 4, constant=True), _given(2, 6)), {}),
            Instance((_a(5, 2), _a(3, 2, 4), _given(1, 1, 5)), {}),
            Instance((_a(6, 3), _a(2, 3, 4, constant=True), _given(2, 5)), {}),
        ],
    }
