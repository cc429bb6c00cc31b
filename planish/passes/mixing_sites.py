"""What passes that mix channels look at: the second moment of a space, and words for reports."""

from __future__ import annotations

import numpy as np

from planish.ir.spaces import Member, Space
from planish.ir.stats import Stats
from planish.ir.transform import copies

READERS = frozenset({"linear", "gemm", "matmul"})


def second_moment(space: Space, stats: Stats) -> np.ndarray | None:
    """C = E[x x'] over what the linear readers of a space read: float64 [n, n]; None without statistics.

    Activations that are read count alike (each C by its trace); copies of a channel count as more rows.
    """
    total = np.zeros((space.size, space.size))
    found = False
    for member in space.activations:
        rows = _rows(member, space.size, stats)
        if rows is None:
            continue
        moment = rows.T @ rows / len(rows)
        trace = float(np.trace(moment))
        if trace > 0.0:
            total += moment / trace
            found = True
    return total if found else None


def _rows(member: Member, size: int, stats: Stats) -> np.ndarray | None:
    """The samples [N, size] of an activation that a linear with a constant weight reads."""
    value = member.value
    assert value is not None
    assert value.rank is not None
    if value.name not in stats or not any(
        u.op.name in READERS and u.operands[0] is value and u.operands[1] is not None and u.operands[1].is_constant
        for u in value.users
    ):
        return None
    record = stats.of(value.name)
    if member.axes != (record.axis + value.rank,):
        return None
    samples = record.samples.astype(np.float64)
    if member.atoms is None:
        return samples
    table = copies(member.atoms, size)
    return np.concatenate([samples[:, table[:, copy]] for copy in range(table.shape[1])])


def mixable(space: Space) -> bool:
    """True if some channels may be mixed."""
    return any(len(index) > 1 for index in space.blocks)


def said_blocks(blocks: list[np.ndarray]) -> str:
    sizes = sorted({len(index) for index in blocks})
    if len(blocks) == 1:
        return f"{sizes[0]} channels"
    return f"{len(blocks)} blocks of {' or '.join(map(str, sizes))}"


def said_ties(space: Space) -> str:
    """A remark on constants that several nodes read: they stay one."""
    shared = {
        member.value.name
        for member in space.constants
        if member.value is not None and not member.private and len(set(member.value.users)) > 1
    }
    return f"; stays tied: {' '.join(f'%{name}' for name in sorted(shared))}" if shared else ""
