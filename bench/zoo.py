"""Capture, spaces and all exact passes on tiny random models of many architectures.

    python bench/zoo.py [--quick] [--json FILE] [--only NAME ...] [--peers] [--docs] [--reuse FILE ...]

Models are built from config classes alone (`zoo_models`), with planted gains, biases and statistics. Each is
captured, raised, analysed, and put through every exact pass; the outputs are compared in float64 with those
of the captured graph and with those of the torch module itself, on two seeds. One that hangs or dies does not
stop the others.

Targets (issue B, 3): captured >= 95 %, none inequivalent (relative error <= 1e-10), capture with raising and
analysis < 15 s for each model on an idle core.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import zoo_models
import zoo_peers
from common import Outcome, Target, arguments, note, table
from zoo_measure import TOLERANCE

LIMIT = 240  # seconds for one model, both seeds
SEEDS = [0, 1]
QUICK = (
    "llama", "gemma2", "qwen3-moe", "deepseek-v3", "gpt2", "bert", "modernbert", "t5", "vit", "swin", "resnet18",
    "mamba", "flux", "moe-loop",
)  # fmt: skip
PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"


class Worker:
    """A process that answers one request after another, and is replaced when one hangs or kills it."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.process: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, text=True, env=environment, bufsize=1)
        if self._answer(self.process, 300) is None:
            raise SystemExit(f"{' '.join(self.command)}: does not start")
        return self.process

    def _answer(self, process: subprocess.Popen[str], limit: float) -> dict[str, Any] | None:
        """One line of the worker; None if there is none in time."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], limit)
        line = process.stdout.readline() if ready else ""
        return json.loads(line) if line else None

    def ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        """The answer to a request; where the worker hangs or dies, a failure that says so."""
        process = self.process or self._start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: there is no answer then
            process.stdin.write(json.dumps(request) + "\n")
        found = self._answer(process, limit)
        if found is None:
            try:
                code = process.wait(timeout=2)  # it may just have died
            except subprocess.TimeoutExpired:
                code = None
            self.stop()
            reason = f"no answer within {limit:g} s" if code is None else f"the process ended with code {code}"
            return {"name": request["name"], "captured": False, "errors": [], "failed": "measuring", "reason": reason}
        return found

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def error_of(row: dict[str, Any], kind: str) -> float:
    """The largest error of a row over its seeds; nan if it was not reached."""
    return max((e[kind] for e in row["errors"]), default=float("nan"))


def equivalent(row: dict[str, Any]) -> bool:
    """Captured, and equal to the torch module and to the captured graph after all exact passes on every seed."""
    errors = [e[kind] for e in row["errors"] for kind in ("torch", "passes")]
    return not row["failed"] and bool(errors) and all(e <= TOLERANCE for e in errors)


def total_seconds(row: dict[str, Any]) -> float:
    """Capture, raising and analysis."""
    return float(sum(row.get("seconds", {}).get(k, 0.0) for k in ("capture", "raise", "analysis")))


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


ROTATION = ("linears_with_rotation", "linears_with_rotation_folded")
COLUMNS = (
    "model", "kind", "nodes", "opaque", "seconds", "permute", "scale", "shift", "rotate", "linear", "with scale",
    "with rotation", "blockers", "error",
)  # fmt: skip


def cells(row: dict[str, Any], kind: str) -> list[str]:
    """The cells of a model in the order of COLUMNS."""
    if "nodes" not in row:
        return [row["name"], kind, "not captured", *["-"] * 10, row["failed"]]
    spaces = [
        f"{free}/{all_}" for all_, free in (row["spaces"][a] for a in ("permute", "scale", "shift", "rotate", "linear"))
    ]
    blockers = ", ".join(f"{op} {n}" for op, n in row["blockers"][:3])
    error = f"{max(error_of(row, 'passes'), error_of(row, 'torch')):.0e}" if equivalent(row) else "NOT EQUAL"
    if row["failed"]:
        error = f"failed: {row['failed']}"
    return [
        row["name"], kind, str(row["nodes"]), share(sum(row["opaque"].values()), row["nodes"]),
        f"{total_seconds(row):.1f}", *spaces, share(row["linears_with_scale"], row["linears"]),
        " / ".join(share(row[k], row["linears"]) for k in ROTATION if k in row), blockers, error,
    ]  # fmt: skip


def beside(rows: list[dict[str, Any]], peers: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table of verdicts, planish beside the peers."""

    def ours(row: dict[str, Any]) -> str:
        if equivalent(row):
            return "equivalent"
        return "not supported" if row["failed"] else f"NOT equivalent ({error_of(row, 'passes'):.0e})"

    header = ["model", "planish", *zoo_peers.TOOLS]
    return header, [
        [r["name"], ours(r), *map(zoo_peers.cell, peers[r["name"]].values())] for r in rows if r["name"] in peers
    ]


def earlier(files: Iterable[Path]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The rows, and the verdicts on the peers, of earlier runs with `--json`; of two files the later one counts."""
    rows: dict[str, dict[str, Any]] = {}
    peers: dict[str, dict[str, Any]] = {}
    for file in files:
        figures = json.loads(file.read_text())["figures"]
        rows |= {row["name"]: row for row in figures.get("models", [])}
        peers |= figures.get("peers") or figures.get("verdicts") or {}
    return rows, peers


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(r)} |" for r in rows)]


def put(text: str, mark: str, lines: list[str]) -> str:
    """A page with the lines between `<!-- mark -->` and `<!-- end -->` replaced."""
    head, begin, rest = text.partition(f"<!-- {mark} -->\n")
    _, end, tail = rest.partition("<!-- end -->")
    if not begin or not end:
        raise SystemExit(f"{PAGE}: no '<!-- {mark} -->' with an '<!-- end -->' behind it")
    return head + begin + "\n" + "\n".join(lines) + "\n\n" + end + tail


def summarise(rows: list[dict[str, Any]]) -> list[str]:
    """Sums over the models, in words."""
    good = [r for r in rows if "nodes" in r]
    opaque: Counter[str] = Counter()
    blockers: Counter[str] = Counter()
    groups: Counter[str] = Counter()
    for r in good:
        opaque.update(r["opaque"])
        blockers.update(dict(r["blockers"]))
        groups.update(r["groups"])
    linears = sum(r["linears"] for r in good)
    folded = ""
    if all(ROTATION[1] in r for r in good):
        folded = f", once gains and means are folded: {share(sum(r[ROTATION[1]] for r in good), linears)}"
    return [
        f"{sum(r['captured'] for r in rows)} of {len(rows)} models captured, {sum(map(equivalent, rows))} equivalent "
        "after all exact passes on both seeds",
        f"linears whose input has a scale space: {share(sum(r['linears_with_scale'] for r in good), linears)}; with a "
        f"rotation space on their input or output: {share(sum(r[ROTATION[0]] for r in good), linears)}" + folded,
        f"opaque nodes: {share(sum(opaque.values()), sum(r['nodes'] for r in good))}"
        + (f" ({_counts(opaque)})" if opaque else ""),
        f"what blocks most: {_counts(blockers)}",
        f"groups of the spaces: {_counts(groups, 10)}",
    ]


def _counts(counter: Counter[str], most: int = 8) -> str:
    return ", ".join(f"{name} {n}" for name, n in counter.most_common(most))


def targets(rows: list[dict[str, Any]], entries: dict[str, zoo_models.Entry]) -> list[Target]:
    """What the issue asks for."""
    chosen = [r for r in rows if entries[r["name"]].architecture]
    captured = [r for r in rows if r["captured"]]
    share_ = sum(r["captured"] for r in chosen) / max(len(chosen), 1)
    found = [
        Target("captured share", share_, 0.95, at_most=False),
        Target("inequivalent", sum(not equivalent(r) for r in captured), 0),
        Target("slowest seconds", max(map(total_seconds, captured), default=0.0), 15),
    ]
    if len(rows) == len(entries):
        of_transformers = [r for r in chosen if entries[r["name"]].kind not in ("diffusion", "conv", "written")]
        found.append(Target("architectures of transformers", len(of_transformers), 60, at_most=False))
    return found


def main() -> int:
    options = arguments(
        __doc__.splitlines()[0],
        only={"nargs": "+", "metavar": "NAME", "help": "these models only"},
        peers={"action": "store_true", "help": "run the peers on the same models (bench/zoo_peers.py)"},
        docs={"action": "store_true", "help": "write the table into docs/zoo.md"},
        reuse={"nargs": "+", "type": Path, "default": [], "metavar": "FILE", "help": "figures of the other models"},
        seeds={"nargs": "+", "type": int, "default": SEEDS, "help": "seeds of weights and inputs"},
        limit={"type": float, "default": LIMIT, "help": "seconds for one model"},
        list={"action": "store_true", "help": "print the names of the models"},
    )
    entries = zoo_models.entries()
    names = options.only or [n for n in entries if not options.quick or n in QUICK]
    unknown = [n for n in names if n not in entries]
    if unknown:
        raise SystemExit(f"model '{unknown[0]}': unknown; see --list")
    if options.list:
        print("\n".join(f"{e.name:24} {e.kind}" for e in entries.values()))
        return 0
    known, peers = earlier(options.reuse)
    if options.reuse:
        names = [n for n in entries if n in known or n in (options.only or ())]
    kinds = {name: entries[name].kind for name in names}
    os.environ.setdefault("COLUMNS", "200")  # for the table
    worker = Worker([sys.executable, str(Path(__file__).parent / "zoo_measure.py")])
    rows = []
    for name in names:
        if name in known and name not in (options.only or ()):
            rows.append(known[name])
            continue
        start = time.perf_counter()
        row = worker.ask({"name": name, "seeds": options.seeds}, options.limit)
        rows.append(row)
        verdict = "ok" if equivalent(row) else f"{row['failed'] or 'NOT EQUAL'}: {_why(row)}"
        note(f"{name:24} {time.perf_counter() - start:6.1f} s  {total_seconds(row):5.1f} s  {verdict}")
    worker.stop()
    lines = [cells(row, kinds[row["name"]]) for row in rows]
    table("the zoo", COLUMNS, lines)
    summary = summarise(rows)
    print("\n".join(summary))
    outcome = Outcome("zoo", {"models": rows, "summary": summary})
    outcome.targets += targets(rows, entries)
    page = PAGE.read_text()
    page = put(page, "the table", [*(f"- {s}" for s in summary), "", *markdown(COLUMNS, lines)])
    if options.peers:
        peers |= zoo_peers.run([n for n in names if n not in peers])
    peers = {name: peers[name] for name in names if name in peers}
    if peers:
        header, verdicts = beside(rows, peers)
        table("planish and its peers: the same function afterwards?", header, verdicts)
        tallies = [f"{tool}: {_counts(found)}" for tool, found in zoo_peers.counts(peers).items()]
        print("\n".join(tallies))
        outcome.figures["peers"] = peers
        page = put(page, "the peers", [*(f"- {t}" for t in tallies), "", *markdown(header, verdicts)])
    if options.docs:
        PAGE.write_text(page)
    return outcome.finish(options.json)


def _why(row: dict[str, Any]) -> str:
    if row["failed"]:
        return str(row.get("reason", "")).splitlines()[0][:200] if row.get("reason") else ""
    worst = max(row["errors"], key=lambda e: max(e["torch"], e["passes"]))
    return f"torch {worst['torch']:.1e} passes {worst['passes']:.1e} {worst.get('culprit', '')}"


if __name__ == "__main__":
    sys.exit(main())
