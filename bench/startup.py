"""Seconds that `import planish` and `planish --help` take: the least of several runs, against 0.5 s.

    python bench/startup.py [--runs 7] [--json]

The least, since anything else on the machine only adds. A bare interpreter is timed beside them.
"""

import argparse
import json
import subprocess
import sys
import time

LIMIT_S = 0.5
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import planish": [sys.executable, "-c", "import planish"],
    "planish --help": [
        sys.executable,
        "-c",
        "import sys; from planish.cli import main; sys.exit(main())",
        "--help",
    ],
}


def least_seconds(command: list[str], runs: int) -> float:
    """The least wall-clock time of `runs` runs of a command, after one run that warms the file cache."""
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        if done.returncode:
            raise SystemExit(f"startup: {' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return min(seconds[1:])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure how long planish takes to start.")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each command")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    measured = {name: least_seconds(command, options.runs) for name, command in COMMANDS.items()}
    if options.json:
        print(json.dumps({"limit_s": LIMIT_S, "seconds": measured}))
    else:
        for name, seconds in measured.items():
            verdict = "ok" if seconds < LIMIT_S else f"OVER the limit of {LIMIT_S} s"
            print(f"{name:16} {seconds:6.3f} s   {verdict}")
    return int(max(measured.values()) >= LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
