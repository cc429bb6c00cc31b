"""`docs/ir.md`: the op table, rendered from the rows.

    python -m planish.report.op_table > docs/ir.md

What a row does with an act is read off its answers to the questions of the audit (`planish.ir.audit`),
so the page says what has been tried on numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import numpy as np

from planish.ir import ops
from planish.ir.audit import questions
from planish.ir.audit_instances import instances
from planish.ir.audit_trial import Trial
from planish.ir.ops.base import ACTS, Act, Carry, Fold, OneOf, OpDef, Port, Relation

HEAD = """\
# The IR and its op table

This page is made from the code by `python -m planish.report.op_table > docs/ir.md`; a test compares it.

## Graphs

A graph is flat SSA in topological order. A value is a graph input, a constant, or the result of a node; it
has a name, and a type `dtype[dim, dim, ...]` in which a dim is a number, a name, or `?`. A node has an op,
operands (an absent optional one is `_`), attributes, results, and its source: the module or ONNX node that
it came from. Constants are immutable and lazily loaded. Graphs change through
`planish.ir.rewriter.Rewriter` only, and `parse(print(graph))` is the same graph.

An op whose name has `::` (`onnx::NonZero`, `torch::aten.foo.default`) is opaque: planish evaluates it by
calling it, and moves nothing across it.

## Reading the table

For each op: its operands (`?`: optional, `*`: any number), its attributes with their defaults, and what it
computes. Then, for each act, the ports at which it is not refused:

| act | what becomes of the channels x |
|---|---|
| permute | P x, P a permutation |
| scale | s x, factor by factor; of any sign unless the row says positive |
| shift | x + t |
| rotate | Q x, Q orthogonal |
| linear | M x, M invertible |
| split | x_j becomes T_j channels; a constant that contracts them is divided by T_j |

A port stands there if the row has an answer for a transform on some of its axes, for some operands. The
mark after it says which:

| mark | the answer |
|---|---|
| (none) | other ports carry the transform as well: it passes, or a constant among them takes it up |
| `+` | the same, for positive factors only |
| `\\|` | one of several answers is to be chosen: a scale rides on either factor of a product |
| `f` | the node's own constants take it up by a formula: a bias takes up a shift of the input |
| `.` | the op does not see it: nothing else changes |

Each of these answers is tried on numbers in float64 (`tests/test_op_table.py`), and so is each refusal:
where an identity would hold that a row does not use, the row says why under *refused although it would
hold*.
"""

_TITLES = {
    "elementwise": "Elementwise",
    "arithmetic": "Arithmetic, comparisons, choices",
    "structural": "Structure",
    "sizes": "Sizes",
    "indexing": "Indexing",
    "selection": "Selection",
    "lookup": "Lookups",
    "resize": "Resizing",
    "contraction": "Contractions",
    "grouped": "Grouped products",
    "normalisation": "Norms and softmax",
    "reduction": "Reductions and pooling",
    "attention": "Attention",
    "rotation": "Rotations",
    "reassembly": "Reassembled channels",
    "scan": "Recurrences",
    "quantization": "Quantisation",
}


def _mark(relation: Relation) -> str | None:
    """The mark of an answer, None for a refusal."""
    match relation:
        case OneOf():
            return "\\|"
        case Fold():
            return "f"
        case Carry(links, _, positive):
            return "." if not links else "+" if positive else ""
        case _:
            return None


def answers(row: OpDef) -> dict[Act, dict[Port, set[str]]]:
    """For each act, the marks of the answers at each port, over all instances of the audit."""
    found: dict[Act, dict[Port, set[str]]] = {act: {} for act in ACTS}
    rng = np.random.default_rng(0)
    for instance in instances().get(row.name, []):
        trial = Trial(row, instance, rng)
        for act, port, axes in questions(trial):
            if all(trial.data[port].shape[a] == 1 for a in axes):
                continue
            mark = _mark(row.relate(trial.node, act, port, axes))
            if mark is not None:
                found[act].setdefault(port, set()).add(mark)
    return found


def _port_name(row: OpDef, port: Port) -> str:
    if port < 0:
        return "result" if port == -1 else f"result {~port}"
    return row.params[min(port, len(row.params) - 1)].name


def _cell(row: OpDef, ports: dict[Port, set[str]]) -> str:
    """`x f, weight, result`: operands first."""
    marks: dict[str, set[str]] = {}
    for port in sorted(ports, key=lambda p: (p < 0, abs(p))):
        marks.setdefault(_port_name(row, port), set()).update(ports[port])
    shown = []
    for name, own in marks.items():
        text = " ".join(sorted(m for m in own if m and not (m == "." and "" in own)))
        shown.append(f"{name} `{text}`" if text else name)
    return ", ".join(shown) or "-"


def _signature(row: OpDef) -> str:
    params = [f"{p.name}{'?' if p.optional else '*' if p.variadic else ''}" for p in row.params]
    attributes = [f"{name}={value!r}" for name, value in row.attributes.items()]
    inside = f" {{{', '.join(attributes)}}}" if attributes else ""
    return f"`{row.name}({', '.join(params)}){inside}`"


def _grid(rows: Iterable[OpDef]) -> list[str]:
    lines = [f"| op | {' | '.join(a.value for a in ACTS)} |", "|---" * (len(ACTS) + 1) + "|"]
    for row in rows:
        found = answers(row)
        lines.append(f"| {row.name} | {' | '.join(_cell(row, found[act]) for act in ACTS)} |")
    return lines


def _equations(rows: Iterable[OpDef]) -> list[str]:
    lines = []
    for row in rows:
        equation = row.summary.replace("`", "")
        summary = f": `{equation}`" if equation else ""
        lines.append(f"- {_signature(row)}{summary}")
    return lines


def _conservative(rows: Iterable[OpDef]) -> list[str]:
    """One line for each op and reason: `op: scale of x, y; shift: why`."""
    lines: list[str] = []
    for row in rows:
        reasons: dict[str, dict[str, list[str]]] = {}
        for key, why in row.conservative.items():
            act, _, port = key.partition("@")
            name = _port_name(row, int(port)) if port.lstrip("-").isdigit() else port
            reasons.setdefault(why, {}).setdefault(act, []).extend([name] if name else [])
        for why, acts in reasons.items():
            what = "; ".join(f"{act} of {', '.join(dict.fromkeys(on))}" if on else act for act, on in acts.items())
            lines.append(f"- `{row.name}`, {what}: {why}")
    return ["", "Refused although it would hold (in some cases):", "", *lines] if lines else []


def render() -> str:
    """The text of docs/ir.md."""
    families: dict[str, list[OpDef]] = {}
    for row in ops.table().values():
        families.setdefault(row.family, []).append(row)
    lines = [HEAD]
    for family, rows in families.items():
        lines += [f"## {_TITLES.get(family, family)}", "", *_equations(rows), "", *_grid(rows)]
        lines += [*_conservative(rows), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(render())
