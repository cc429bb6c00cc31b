"""What every benchmark script shares: options, the table, the last line of figures, the exit code."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def arguments(description: str, **extra: dict[str, Any]) -> argparse.Namespace:
    """Parse `--json FILE`, `--quick` and the extra options (`name={...add_argument keywords}`)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repetitions; targets still hold")
    for name, options in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    return parser.parse_args()


@dataclass
class Target:
    """A figure with the bound that an issue set for it."""

    name: str
    value: float
    bound: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{self.name} {self.value:.4g} ({'ok' if self.met else 'MISSED'}: {sign} {self.bound:g})"


@dataclass
class Outcome:
    """The figures of one run."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)

    def finish(self, json_file: Path | None) -> int:
        """Write the figures, print the targets and the last line; the exit code."""
        missed = [t for t in self.targets if not t.met]
        record = {
            "bench": self.name,
            "machine": f"{platform.machine()} {_cpu()}",
            "figures": self.figures,
            "targets": [{**vars(t), "met": t.met} for t in self.targets],
        }
        if json_file is not None:
            json_file.write_text(json.dumps(record, indent=1, default=float) + "\n")
        for target in self.targets:
            print(target)
        short = " ".join(f"{t.name.replace(' ', '_')}={t.value:.4g}" for t in self.targets)
        print(f"{self.name}: {len(self.targets) - len(missed)}/{len(self.targets)} targets met {short}")
        return 1 if missed else 0


def environment(name: str, pins: Sequence[str], *, borrow: bool = False) -> Path:
    """The Python of a virtual environment `name` in the cache, which is made where it is missing or has other pins.

    Args:
        pins: requirements, as pip takes them.
        borrow: install these alone; everything else is that of the environment which runs this.
    """
    folder = Path(os.environ.get("PLANISH_CACHE") or Path.home() / ".cache" / "planish") / name
    python, stamp = folder / "bin" / "python", folder / "planish-pins.txt"
    if not stamp.exists() or stamp.read_text().split() != list(pins):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, *["--no-deps"] * borrow, *pins], check=True)
        if borrow:
            packages = next((folder / "lib").glob("python*/site-packages"))
            (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        stamp.write_text("\n".join(pins) + "\n")
    return python


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table with rich."""
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        made.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row))
    Console(width=max(100, Console().width)).print(made)


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int, warm: int = 2) -> dict[str, float]:
    """Median seconds of each callable; in every round each is called once, in turn."""
    for _ in range(warm):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def note(text: str) -> None:
    """A line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)
