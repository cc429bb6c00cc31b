"""On a GPU: are the kernels right, and how fast are they beside cuBLAS, gemlite and torchao?

    python bench/gpu.py [--quick] [--json FILE] [--recipes w4a16 ...]

Correctness first: every kernel of a decoder block under each recipe against its eager reference, at real sizes, with 1,
7, 33, 128 and 512 rows (a gemm with closing steps on many rows: the two kernels that are launched then). Only if
nothing differs is anything timed, by `triton.testing.do_bench` (median, caches cold):

1. every such kernel beside its roofline time (`planish.codegen.cost`), in the launch that `tune` finds fastest;
2. W4A16 (int4, groups of 128) and W8A8 linears of a 7 B model beside cuBLAS in float16, gemlite and torchao, which live
   in an environment of their own (kernel_anchors.py); W8A8 with the quantisation of the activation, and without.

Where there is no GPU this says so and ends with 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))
from common import Outcome, Target, arguments, note, table

if TYPE_CHECKING:
    import torch

    from planish.codegen.kernel_spec import Kernel

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # N, K
ROWS = (1, 16, 64, 512, 2048)
CHECKED = (1, 7, 33, 128, 512)
GROUP = 128


def has_gpu() -> str:
    """The name of the GPU that torch sees; "" without one."""
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else ""


def unique(recipes: list[str]) -> dict[Kernel, str]:
    """The kernels of the recipes, each with the first recipe that has it."""
    import kernel_cases

    found: dict[Kernel, str] = {}
    for recipe in recipes:
        for kernel in kernel_cases.kernels(recipe):
            found.setdefault(kernel, recipe)
    return found


def launches(kernels: Mapping[Kernel, str], rows: Iterable[int]) -> dict[Kernel, tuple[str, list[int]]]:
    """What is launched for so many rows: each kernel with its recipe and the numbers of rows."""
    from planish.codegen.gemm_parts import launched

    found: dict[Kernel, tuple[str, list[int]]] = {}
    for kernel, recipe in kernels.items():
        for m in rows:
            for part in launched(kernel, m):
                at = found.setdefault(part, (recipe, []))[1]
                if m not in at:
                    at.append(m)
    return found


# -- correctness ---------------------------------------------------------------------------------


def wrong(kernels: Mapping[Kernel, str], rows: tuple[int, ...]) -> list[str]:
    """What differs between kernels and their references."""
    import torch

    from planish.codegen.triton import emit_kernel, load

    found = []
    cases = launches(kernels, rows)
    for number, (kernel, (_, at)) in enumerate(cases.items(), 1):
        emitted = emit_kernel(kernel)
        module = load(emitted)
        for m in at:
            found += [f"{emitted.name} at M = {m}: {line}" for line in module.differences(m, m, "cuda")]
        torch.cuda.empty_cache()
        note(f"{number}/{len(cases)} {emitted.name}: {'ok' if not found else found[-1]}")
    return found


# -- times ---------------------------------------------------------------------------------------


def timed(run: Callable[[], object]) -> float:
    """Median seconds."""
    import triton

    return float(triton.testing.do_bench(run, return_mode="median")) / 1000


def own_times(kernels: Mapping[Kernel, str], rows: tuple[int, ...], target: str) -> list[dict[str, Any]]:
    """Each kernel's time beside its roofline time."""
    from planish.codegen.chips import CHIPS
    from planish.codegen.cost import cost
    from planish.codegen.triton import emit_kernel, load

    found = []
    for kernel, (recipe, at) in launches(kernels, rows).items():
        emitted = emit_kernel(kernel)
        module = load(emitted)
        for m in at:
            launch = module.tune(m)
            held = module.example(m, 0, "cuda")
            seconds = timed(lambda held=held, module=module, launch=launch: module.run(**held, launch=launch))
            roof = None
            if target in CHIPS:
                roof = cost(kernel, m, vars(launch), CHIPS[target]).seconds(CHIPS[target])
            line = {"recipe": recipe, "kernel": emitted.name, "rows": m, "us": seconds * 1e6}
            found.append(line | ({"roofline us": roof * 1e6, "part": roof / seconds} if roof else {}))
    return found


def contest(shapes: tuple[tuple[int, int], ...], rows: tuple[int, ...]) -> list[dict[str, Any]]:
    """Seconds of ours and of the opponents for each shape and number of rows."""
    import torch

    found = []
    for n, k in shapes:
        generator = torch.Generator("cuda").manual_seed(n + k)
        for m in rows:
            x = torch.randn(m, k, generator=generator, device="cuda", dtype=torch.float16)
            weight = torch.randn(n, k, generator=generator, device="cuda", dtype=torch.float16) / k**0.5
            runs: dict[str, Callable[[], object]] = {
                "cuBLAS float16": lambda x=x, w=weight: torch.nn.functional.linear(x, w)
            }
            runs |= ours(m, n, k, x)
            for name, make in OPPONENTS.items():
                try:
                    runs[name] = make(x, weight)
                    runs[name]()
                except Exception as error:  # noqa: BLE001  whatever the opponent raises is its answer
                    runs.pop(name, None)
                    note(f"{name} {m} x {n} x {k}: {type(error).__name__}: {str(error).splitlines()[:1]}")
            row = {"rows": m, "N": n, "K": k} | {name: timed(run) * 1e6 for name, run in runs.items()}
            found.append(row)
            note(" ".join(f"{name} {v:.4g}" for name, v in row.items()))
    return found


def ours(m: int, n: int, k: int, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Our kernels for a plain linear: W4A16; W8A8 from codes, and with the quantisation in front."""
    import kernels

    from planish.codegen.kernel_spec import Kernel, Step, Tensor
    from planish.codegen.triton import emit_kernel, load

    options = (("bits", 8), ("signed", True), ("mode", "symmetric"), ("levels", 127.0), ("low", -128), ("high", 127))
    border = (Tensor("x", "float", ("M", k), "input"), Tensor("codes", "i8", ("M", k), "output"),
              Tensor("scale", "f32", ("M",), "output"))  # fmt: skip
    first = Kernel("prologue", k, 0, border, (Step("quantize_token", ("x",), ("codes", "scale"), options),), row="x")
    made = {}
    for name, kernel in (
        ("w4a16", kernels.linear("w4a16", n, k)),
        ("w8a8", kernels.linear("w8a8", n, k)),
        ("rows", first),
    ):
        module = load(emit_kernel(kernel))
        made[name] = (module, module.tune(m), module.example(m, 0, "cuda"))

    def run(name: str, **given: torch.Tensor) -> Any:
        module, launch, held = made[name]
        return module.run(**{**held, **given}, launch=launch)

    def both() -> object:
        codes, scale = run("rows", x=x)
        return run("w8a8", a=codes, a_scale=scale)

    return {
        "planish w4a16": lambda: run("w4a16", a=x),
        "planish w8a8": both,
        "planish w8a8 codes": lambda: run("w8a8"),
    }


def _four(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unsigned 4-bit codes [N, K] around 8, and float16 scales [N, K / group]."""
    import torch

    grouped = weight.float().reshape(len(weight), -1, GROUP)
    scale = grouped.abs().amax(-1, keepdim=True) / 7
    codes = (grouped / scale).round().clamp(-8, 7) + 8
    return codes.reshape(weight.shape).to(torch.uint8), scale.squeeze(-1).to(torch.float16)


def gemlite_four(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    """gemlite's W4A16."""
    import torch
    from gemlite.helper import A16W4_HQQ_INT

    codes, scale = _four(weight)
    zeros = torch.full_like(scale, 8)
    layer = A16W4_HQQ_INT(device="cuda:0", dtype=torch.float16).from_weights(
        codes, scale.reshape(-1, 1), zeros.reshape(-1, 1)
    )
    return lambda: layer(x)


def gemlite_eight(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    """gemlite's W8A8, activations quantised by row."""
    import torch
    from gemlite.helper import A8W8_int8_dynamic

    layer = A8W8_int8_dynamic(device="cuda:0", dtype=torch.float16).from_weights(weight)
    return lambda: layer(x)


def torchao_four(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    """torchao's mixed product of float16 and int4."""
    from torchao.prototype.hqq.mixed_mm import triton_mixed_mm

    codes, scale = _four(weight)
    packed = (codes.t()[::2] << 4 | codes.t()[1::2]).contiguous()
    scale = scale.t().contiguous()
    return lambda: triton_mixed_mm(x, packed, scale, scale * 8, GROUP, transposed=False, kernel_type="max_autotune")


def torchao_eight(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    """torchao's product of int8 codes, scaled by row and column; the codes are there."""
    import torch
    from torchao.prototype.quantized_training.int8_mm import scaled_int8_mm

    def codes(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = a.abs().amax(1, keepdim=True).float() / 127
        return (a / scale).round().to(torch.int8), scale.squeeze(1).to(torch.float16)

    (a, row), (b, column) = codes(x), codes(weight)
    return lambda: scaled_int8_mm(a, b.t(), row, column)


OPPONENTS: dict[str, Callable[..., Callable[[], object]]] = {
    "gemlite w4a16": gemlite_four,
    "gemlite w8a8": gemlite_eight,
    "torchao w4a16": torchao_four,
    "torchao w8a8 codes": torchao_eight,
}


def main() -> int:
    options = arguments(__doc__.splitlines()[0], recipes={"nargs": "+", "default": [], "metavar": "RECIPE"})
    name = has_gpu()
    if not name:
        print("gpu: no GPU here; nothing was run, nothing was timed")
        return 0
    import kernel_anchors
    import kernel_cases
    import torch

    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if torch.version.hip:
        target = torch.cuda.get_device_properties(0).gcnArchName.partition(":")[0]
    recipes = options.recipes or list(kernel_cases.RECIPES[:3] if options.quick else kernel_cases.RECIPES)
    kernels = unique(recipes)
    found = wrong(kernels, CHECKED[:3] if options.quick else CHECKED)
    print("\n".join(found) or f"{len(kernels)} kernels equal their references on {name}")
    targets = [Target("kernels that differ", len(found), 0)]
    figures: dict[str, Any] = {"gpu": name, "target": target, "different": found}
    if not found:
        packages = next((kernel_anchors.environment().parent.parent / "lib").glob("python*/site-packages"))
        sys.path.append(str(packages))  # gemlite and torchao, beside this environment's torch
        rows = ROWS[:4:2] if options.quick else ROWS
        figures["kernels"] = own_times(kernels, rows, target)
        figures["linears"] = contest(SHAPES[:1] if options.quick else SHAPES, rows)
        for title, part in (("kernels", figures["kernels"]), ("linears, us", figures["linears"])):
            head = list(dict.fromkeys(key for row in part for key in row))
            table(f"{title} on {name}", head, [["-" if r.get(h) is None else r[h] for h in head] for r in part])
    return Outcome("gpu", figures, targets).finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
