"""The plan of a model's kernels: region by region, and below it what did not fuse and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planish.codegen.kernel_spec import Kernel
from planish.codegen.regions import Plan, Region
from planish.ir.errors import PlanishError
from planish.ir.graph import Value
from planish.passes.base import place

if TYPE_CHECKING:
    from planish.codegen.sheet import Line
    from planish.report.terminal import Terminal


def first_like(plan: Plan) -> dict[str, str]:
    """The region whose kernel a region runs too: the first one with an equal spec."""
    known: dict[Kernel, str] = {}
    return {r.name: known.setdefault(r.kernel, r.name) for r in plan.kernels if r.kernel is not None}


def what(region: Region) -> str:
    """What a region does, in order."""
    kernel = region.kernel
    if kernel is None:
        counted = Counter(node.op.name for node in region.nodes)
        return ", ".join(f"{count} {name}" if count > 1 else name for name, count in counted.items())
    chain: list[str] = []
    if kernel.activation is not None:
        left = kernel.activation
        read = "float" if left.kind == "float" else f"int{left.bits}"
        per = f" per {left.granularity}" if left.granularity else ""
        weights = dict.fromkeys(
            p.weight.decoder + (f":g{p.weight.group}" if p.weight.group else "") for p in kernel.products
        )
        times = f"{len(kernel.products)} products: " if len(kernel.products) > 1 else ""
        chain.append(f"{times}{read}{per} x {' and '.join(weights)}")
        first = kernel.products[0]
        chain += [f"rank {b.rank} branch" for b in first.branches]
        chain += ["bias"] if any(p.bias for p in kernel.products) else []
    chain += [step.row for step in kernel.steps]
    if kernel.closing:
        chain.append("finished rows: " + " > ".join(step.row for step in kernel.closing))
    return " > ".join(chain)


def _shown(values: Sequence[Value]) -> str:
    return ", ".join(f"{v.name} {v.type}" for v in values)


def _carried(region: Region, *, out: bool) -> list[Value]:
    """The values that a region reads or writes; of a kernel those that it touches in memory."""
    if region.kernel is None:
        return list(region.outputs if out else region.inputs)
    role = "output" if out else "input"
    found = (region.bound[t.name].value for t in region.kernel.tensors if t.role == role)
    return [v for v in found if v is not None]


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as data."""
    like = first_like(plan)
    regions = []
    for region in plan.regions:
        entry: dict[str, Any] = {
            "name": region.name,
            "kind": region.kind,
            "nodes": [place(node) for node in region.nodes],
            "inputs": [{"name": v.name, "type": str(v.type)} for v in _carried(region, out=False)],
            "outputs": [{"name": v.name, "type": str(v.type)} for v in _carried(region, out=True)],
            "does": what(region),
        }
        if region.kernel is not None:
            entry |= {"kernel": like[region.name], "steps": list(region.fused)}
        regions.append(entry)
    return {
        "counts": {kind: plan.count(kind) for kind in ("prologue", "gemm", "graph")},
        "different_kernels": len(set(like.values())),
        "regions": regions,
        "not_fused": [{"node": place(m.node), "op": m.node.op.name, "reason": m.reason} for m in plan.misses],
    }


def show_plan(terminal: Terminal, plan: Plan) -> None:
    """The table of regions, what did not fuse, and the sums."""
    from rich.text import Text

    like = first_like(plan)
    table = terminal.table("region", "nodes", "reads", "writes", "does", right=("nodes",))
    for region in plan.regions:
        same = like.get(region.name, region.name)
        does = what(region) + (f" (the kernel of {same})" if same != region.name else "")
        cells = (
            region.name,
            len(region.nodes),
            _shown(_carried(region, out=False)),
            _shown(_carried(region, out=True)),
        )
        table.add_row(*(Text(str(cell)) for cell in (*cells, does)))
    terminal.show(table)
    if plan.misses:
        table = terminal.table("not fused", "op", "why")
        for miss in plan.misses:
            table.add_row(*(Text(cell) for cell in (place(miss.node), miss.node.op.name, miss.reason)))
        terminal.show(table)
    inside = {node for region in plan.kernels for node in region.nodes}
    different = f"{len(set(like.values()))} different kernels of {len(plan.kernels)}"
    terminal.show(
        f"{plan.count('prologue')} prologues and {plan.count('gemm')} gemms, {different}; {len(inside)} of "
        f"{len(plan.graph)} nodes in kernels, the rest in {plan.count('graph')} regions of the graph"
    )


def sheet_of(plan: Plan, target: str, rows: str) -> list[Line]:
    """The kernel sheet of a plan.

    Args:
        target: a chip of `planish.codegen.chips`.
        rows: numbers of rows, separated by commas.

    Raises:
        PlanishError: an unknown target, rows that are no numbers, or Triton is not installed.
    """
    from planish.codegen.sheet import sheet

    return sheet(plan, target, check_sheet(target, rows))


def check_sheet(target: str, rows: str) -> list[int]:
    """The numbers of rows of a sheet that can be made: see `sheet_of`, whose errors are raised."""
    from importlib.util import find_spec

    from planish.codegen.chips import chip

    words = [word.strip() for word in rows.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise PlanishError(f"option --rows: expected positive numbers separated by commas, got '{rows}'")
    chip(target)
    if find_spec("triton") is None:
        raise PlanishError("kernels: need triton", hint="pip install 'planish[triton]'")
    return [int(word) for word in words]


def show_sheet(terminal: Terminal, lines: Sequence[Line]) -> None:
    """The kernel sheet, what is wrong with its kernels, and the sums."""
    from planish.codegen.sheet import text

    terminal.show(text(lines))


def sheet_as_dict(lines: Sequence[Line]) -> dict[str, Any]:
    """The kernel sheet for JSON."""
    from planish.codegen.sheet import record

    return {"timed": False, "kernels": [record(line) for line in lines]}
