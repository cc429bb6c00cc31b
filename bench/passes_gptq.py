"""GPTQ of one layer beside a published implementation, on the same weight, grid and Hessian, in the same run.

    python bench/passes_gptq.py [--quick] [--json FILE]

The peer is llm-compressor 0.14's `quantize_weight` (eager torch, float32), in the virtual environment of
`zoo_peers.py`; AutoGPTQ and GPTQModel run the same column loop. Both get float32 tensors in memory and the same
scales: int4, groups of 128, amax / 7.5, act-order, damping .01. Ours factors H in float64, and its time counts the
rounding that finds the scales, which for the peer an observer does beforehand. The two take turns; the median of each
is stated, with the loss tr((W - Q) H (W - Q)^T) / 2 of both results, computed here in float64.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import Outcome, Target, arguments, note, table

GROUP = 128


def problem(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight [rows, columns] and the Hessian of 2 * columns inputs whose channels move together; float32."""
    import torch

    source = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=source) / columns**0.5
    x = torch.randn(2 * columns, columns, generator=source) @ mixing
    x *= torch.exp(torch.randn(columns, generator=source))
    h = (2.0 / len(x)) * (x.T @ x)
    return (torch.randn(rows, columns, generator=source) * 0.02).numpy(), h.numpy()


def ours(weight: np.ndarray, h: np.ndarray) -> tuple[float, np.ndarray]:
    """Seconds, and the weight that the codes stand for."""
    import torch

    from planish.ir.formats import Format
    from planish.ir.rounding import quantize_array
    from planish.passes.gptq import gptq

    start = time.perf_counter()
    form, wide = Format.parse(f"int4:g{GROUP}:half"), weight.astype(np.float64)
    solved = gptq(wide, quantize_array(wide, form), form, torch.from_numpy(h))
    seconds = time.perf_counter() - start
    return seconds, solved.weight.dequantize()


def serve(folder: Path, threads: int) -> int:
    """The peer's side: one measurement for each line on stdin."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # not bench/kernels.py
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    torch.set_num_threads(threads)
    data = np.load(folder / "problem.npz")
    weight, h = (torch.from_numpy(data[name])[None] for name in ("weight", "h"))
    own = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=GROUP, actorder="weight")
    scale = weight.reshape(1, weight.shape[1], -1, GROUP).abs().amax(-1) / 7.5
    zero = torch.zeros_like(scale)
    answers.write("ready\n")
    for line in sys.stdin:
        copies = weight.clone(), h.clone()
        start = time.perf_counter()
        with torch.no_grad():
            got, _, fallback = quantize_weight(*copies, scale, zero, None, own)
        seconds = time.perf_counter() - start
        if bool(fallback.any()):
            raise SystemExit("the peer fell back to rounding")
        np.save(folder / line.strip(), got[0].numpy())
        answers.write(f"{seconds}\n")
    return 0


def measure(rows: int = 4096, columns: int = 4096, rounds: int = 3, threads: int = 1) -> dict[str, Any]:
    """Seconds of each (median over the rounds, and all of them) and the losses; see the module."""
    import torch
    from zoo_peers import environment

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    weight, h = problem(rows, columns)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "problem.npz", weight=weight, h=h)
        command = [str(environment()), str(Path(__file__)), "--serve", folder, "--threads", str(threads)]
        wanted = {**os.environ, "OMP_NUM_THREADS": str(threads), "LLM_COMPRESSOR_LOG_DISABLED": "true"}
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=wanted)
        assert peer.stdin is not None and peer.stdout is not None
        if peer.stdout.readline() != "ready\n":
            raise RuntimeError("the peer did not start")
        seconds: dict[str, list[float]] = {"planish": [], "llm-compressor": []}
        results = {}
        for _ in range(rounds):
            taken, results["planish"] = ours(weight, h)
            seconds["planish"].append(taken)
            peer.stdin.write("got.npy\n")
            peer.stdin.flush()
            seconds["llm-compressor"].append(float(peer.stdout.readline()))
            note(f"gptq {rows}x{columns}: planish {taken:.2f} s, llm-compressor {seconds['llm-compressor'][-1]:.2f} s")
        peer.stdin.close()
        peer.wait()
        results["llm-compressor"] = np.load(Path(folder) / "got.npy").astype(np.float64)
    torch.set_num_threads(before)
    damped = h.astype(np.float64) + 0.01 * float(np.diag(h).astype(np.float64).mean()) * np.eye(columns)
    losses = {name: float((((weight - got) @ damped) * (weight - got)).sum() / 2) for name, got in results.items()}
    middle = {name: median(times) for name, times in seconds.items()}
    return {
        "rows": rows, "columns": columns, "threads": threads, "seconds": middle, "all_seconds": seconds,
        "loss": losses, "ratio": middle["planish"] / middle["llm-compressor"],
        "loss_ratio": losses["planish"] / losses["llm-compressor"],
    }  # fmt: skip


def main() -> int:
    options = arguments(
        __doc__.splitlines()[0],
        serve={"type": Path, "metavar": "DIR", "help": "the peer's side (used by the script itself)"},
        threads={"type": int, "default": 1, "help": "of both"},
    )
    if options.serve is not None:
        return serve(options.serve, options.threads)
    sizes = [(1024, 1024)] if options.quick else [(1024, 1024), (2048, 2048), (4096, 4096)]
    found = [measure(*size, threads=options.threads) for size in sizes]
    rows = [
        [f"{f['rows']} x {f['columns']}", *(f"{f['seconds'][n]:.2f}" for n in f["seconds"]), f"{f['ratio']:.2f}",
         f"{f['loss_ratio']:.4f}"] for f in found
    ]  # fmt: skip
    title = f"GPTQ, int4 groups of {GROUP}, act-order, {options.threads} thread"
    table(title, ["layer", "planish s", "llm-compressor s", "time ratio", "loss ratio"], rows)
    outcome = Outcome("passes_gptq", {"gptq": found})
    outcome.targets = [
        Target(f"GPTQ {f['rows']} x {f['columns']}, time / llm-compressor", f["ratio"], 1.0) for f in found
    ]
    print(json.dumps(found[-1]["loss"]))
    return outcome.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
