"""Compiles Triton kernels to machine code without a GPU: a script, run by `aot` in a process of its own.

One JSON line in (a `Job` and the file that holds its source), one JSON line out: the listing, registers, shared memory.
Nothing of planish is imported; `TRITON_INTERPRET` must not be set.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def load(path: str) -> Any:
    """The module of a source file, once a process."""
    name = f"planish_aot_{Path(path).stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def tool(name: str) -> str:
    """The path of a program that the Triton wheel ships."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def run_tool(name: str, option: str, file: str) -> str:
    """What a disassembler prints about a cubin."""
    done = subprocess.run([tool(name), option, file], capture_output=True, text=True, check=True)
    return done.stdout


def disassemble(cubin: bytes) -> tuple[str, str]:
    """SASS and resource usage of a cubin, as `cuobjdump` prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        return run_tool("cuobjdump", "-sass", file.name), run_tool("cuobjdump", "-res-usage", file.name)
    finally:
        os.unlink(file.name)


def constant(value: Any) -> Any:
    """A constant of a job: "tl.float16" and the like stand for Triton's dtypes."""
    if isinstance(value, str) and value.startswith("tl."):
        import triton.language as tl

        return getattr(tl, value[3:])
    return value


_LAYOUT = re.compile(r"^(#\w+) = #ttg\.(?:amd_mfma|amd_wmma|nvidia_mma)<\{(.*)\}>", re.MULTILINE)
_DOT = re.compile(r"(?:tt\.dot|ttng\.warp_group_dot)\b.* -> tensor<(\d+)x(\d+)x\w+, (#\w+)>")


def repeats(ttgir: str) -> float:
    """How often a product of a tile is computed: warps for which a tile is too small do the work of others again.

    Args:
        ttgir: Triton's IR with layouts; those of `tcgen05`, which a block issues once, count as 1.
    """
    layouts: dict[str, tuple[list[int], list[int]]] = {}
    for name, text in _LAYOUT.findall(ttgir):
        warps = re.search(r"warpsPerCTA = \[([\d, ]+)\]", text)
        shape = re.search(r"instrShape = \[([\d, ]+)\]", text)
        if warps and shape:
            layouts[name] = ([int(n) for n in warps[1].split(",")], [int(n) for n in shape[1].split(",")])
    issued = useful = 0.0
    for rows, columns, name in _DOT.findall(ttgir):
        if name in layouts:
            warps_, shape_ = layouts[name]
            covered = [max(int(n), w * s) for n, w, s in zip((rows, columns), warps_, shape_, strict=False)]
            issued += covered[0] * covered[1]
            useful += int(rows) * int(columns)
    return issued / useful if useful else 1.0


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Machine code of one job, as text."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    function = getattr(load(job["file"]), job["kernel"])
    while not isinstance(function, JITFunction):  # triton.autotune and triton.heuristics wrap it
        function = function.fn
    names = list(function.arg_names)
    given = {p.name: p.default for p in function.params if p.has_default and p.name not in job["signature"]}
    fixed = given | {n: constant(v) for n, v in job["constants"].items()}
    signature = {n: "constexpr" if n in fixed else job["signature"][n] for n in names}
    constants = {(names.index(n),): v for n, v in fixed.items()}
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*") or n in job["divisible"]]
    attributes: dict[tuple[int, ...], list[list[Any]]] = {(i,): [["tt.divisibility", 16]] for i in aligned}
    amd = job["target"].startswith("gfx")
    if amd:  # what Triton's launcher finds out about a tensor below 2 GB: its loads may be buffer instructions
        for i, n in enumerate(names):
            if signature[n].startswith("*"):
                attributes[(i,)].append(["tt.pointer_range", 32])
    target = GPUTarget("hip", job["target"], 64) if amd else GPUTarget("cuda", int(job["target"][3:]), 32)
    source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=target, options=job["options"])
    about = made.metadata
    answer: dict[str, Any] = {"shared": about.shared, "warps": about.num_warps}
    answer["columns"] = getattr(about, "tmem_size", 0)
    answer["repeats"] = repeats(made.asm["ttgir"])
    if amd:
        return answer | {"listing": made.asm["amdgcn"], "usage": "", "ptx": ""}
    listing, usage = disassemble(made.asm["cubin"])
    ptx = made.asm["ptx"]
    return answer | {"listing": listing, "usage": usage, "ptx": ptx if "tcgen05.mma" in ptx else ""}


def main() -> int:
    """Serve jobs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what compilers print must not end up between the answers
    for line in sys.stdin:
        try:
            answer = compile_job(json.loads(line))
        except Exception as error:  # noqa: BLE001  whatever the compiler raises is its answer
            text = str(error).strip() or repr(error)
            answer = {"error": f"{type(error).__name__}: {text[:2000]}"}
        answers.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
