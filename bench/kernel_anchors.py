"""gemlite's and torchao's Triton kernels, compiled ahead of time: the opponents of bench/kernels.py.

gemlite 0.6.0.post2: `gemm_INT_kernel` (what it runs from 64 rows on) and `gemm_splitK_INT_kernel` (below).
torchao 0.18.0: `_mixed_mm_kernel` (4 bits, prototype/hqq), `_scaled_int8_mm_kernel` (8 bits, quantized_training) and
`scaled_matmul_kernel_with_block_pointers` (8 bits, kernel/intmm_triton, which leaves the weight's scales to a second
kernel). They live in an environment of their own with this one's torch and Triton.

Each kernel is compiled in the configurations of its own autotuner (gemlite: its "fast" list, pruned as it does) that
fit the chip; the one without spills that needs the fewest instructions for an operation stands for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import common

from planish.codegen.aot import Failure, Job, compile_all
from planish.codegen.chips import chip
from planish.codegen.machine import Machine

PINS = ("gemlite==0.6.0.post2", "torchao==0.18.0")

# gemlite asks the driver which chip is there when it is imported, and imports what needs a GPU: neither is needed here
GEMLITE = """
import importlib.util, sys, types
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

torch.cuda.get_device_capability = lambda *a: (9, 0)
_about = types.SimpleNamespace(name="{name}", multi_processor_count={units})
torch.cuda.get_device_properties = lambda *a: _about
_amd = "{target}".startswith("gfx")
_target = GPUTarget("hip", "{target}", 64) if _amd else GPUTarget("cuda", int("{target}"[3:]), 32)
_utils = types.SimpleNamespace(get_device_properties=lambda i: {{"max_shared_mem": {shared}}})
driver.set_active(types.SimpleNamespace(get_current_target=lambda: _target, utils=_utils,
                                        get_active_torch_device=lambda: torch.device("cpu")))
_package = types.ModuleType("gemlite")
_package.__path__ = list(importlib.util.find_spec("gemlite").submodule_search_locations)
sys.modules.setdefault("gemlite", _package)
from gemlite.triton_kernels.{module} import {kernel}
"""


@dataclass(frozen=True)
class Anchor:
    """An opponent's kernel in one configuration.

    Attributes:
        name: whose kernel.
        kind: "w4a16" or "w8a8".
        tile: (rows, columns, columns of K) of a turn of its loop.
        extra: bytes that it moves besides x, weights, scales and the result.
    """

    name: str
    kind: str
    job: Job
    tile: tuple[int, int, int]
    split: int = 1
    group: int = 8
    weight_bytes: float = 0.0
    extra: float = 0.0
    constants: dict[str, int] = field(default_factory=dict)


def environment() -> Path:
    """The Python of the environment with the opponents, which is made where it is missing."""
    return common.environment("venv-kernels", PINS, borrow=True)


# -- gemlite -------------------------------------------------------------------------------------

# (M, N, K, warps, stages, load order): get_fast_autotune_config_* of gemlite/triton_kernels/gemm_kernels.py
_GEMLITE_NVIDIA = (
    (64, 64, 64, 4, 0), (64, 128, 32, 8, 2), (64, 128, 64, 4, 0), (64, 128, 128, 4, 2), (64, 256, 64, 8, 2),
    (64, 256, 128, 8, 0), (128, 128, 128, 4, 2), (128, 128, 128, 8, 0), (128, 128, 128, 8, 2), (128, 256, 128, 8, 2),
    (128, 256, 128, 8, 0), (64, 128, 256, 4, 0), (128, 128, 256, 4, 2), (128, 128, 256, 8, 0),
)  # fmt: skip
_GEMLITE_AMD = (
    (64, 32, 32, 4, 0), (64, 32, 64, 4, 0), (64, 32, 64, 8, 0), (64, 32, 128, 8, 0), (64, 64, 32, 8, 0),
    (64, 64, 64, 8, 0), (64, 64, 64, 4, 0), (64, 64, 128, 4, 0), (64, 64, 128, 8, 0), (64, 128, 32, 8, 0),
    (64, 128, 64, 4, 0), (64, 128, 128, 8, 0), (64, 128, 128, 4, 0), (64, 256, 128, 4, 0),
)  # fmt: skip
_SPLIT_NVIDIA = (
    (16, 32, 128, 4, 4, 2), (16, 64, 128, 4, 4, 0), (16, 128, 64, 4, 8, 2), (16, 128, 128, 4, 4, 0),
    (16, 256, 128, 2, 4, 2), (16, 128, 32, 8, 8, 2), (16, 64, 64, 4, 4, 0), (16, 256, 64, 4, 8, 2),
    (16, 256, 128, 1, 8, 2), (16, 128, 256, 4, 4, 0), (16, 512, 32, 4, 4, 2),
)  # fmt: skip
_SPLIT_AMD = (
    (16, 32, 64, 1, 4, 0), (16, 32, 128, 1, 4, 0), (16, 32, 256, 1, 8, 0), (16, 64, 32, 2, 4, 0), (16, 64, 64, 2, 4, 0),
    (16, 64, 128, 1, 4, 0), (16, 64, 128, 4, 8, 0), (16, 64, 256, 8, 4, 0), (16, 128, 32, 1, 8, 0),
    (16, 128, 64, 4, 8, 0), (16, 128, 128, 2, 8, 0),
)  # fmt: skip


def gemlite(kind: str, target: str, rows: int, n: int, k: int, group: int = 128) -> list[Anchor]:
    """gemlite's kernel for so many rows, in its configurations."""
    of, amd, four = chip(target), target.startswith("gfx"), kind == "w4a16"
    decode = rows < 64
    kernel = "gemm_splitK_INT_kernel" if decode else "gemm_INT_kernel"
    module = "gemm_splitK_kernels" if decode else "gemm_kernels"
    source = GEMLITE.format(
        name=of.name, units=of.units, target=target, shared=of.block_shared, module=module, kernel=kernel
    )
    each = 8 if four else 1  # 4-bit codes in int32
    found, seen = [], set()
    if decode:
        listed = _SPLIT_AMD if amd else _SPLIT_NVIDIA
    else:
        listed = tuple((m, wide, deep, 1, w, a) for m, wide, deep, w, a in (_GEMLITE_AMD if amd else _GEMLITE_NVIDIA))
        listed += tuple((256, *rest) for m, *rest in listed if m == 128) if not amd else ()
    for m, wide, deep, split, warps, order in listed:
        deep = min(deep, group) if four else deep
        for stages in (2,) if amd else (5, 4, 3, 2):
            held = m * deep * (2 if four else 1) + (deep * wide * 2.5 if four else deep * wide)
            if amd or held * (stages * 1.2 if four else max(stages - 1, 1)) <= of.block_shared:
                break
        if (m, wide, deep, split, warps, order) in seen:
            continue
        seen.add((m, wide, deep, split, warps, order))
        floats = "tl.float16"
        constants = {
            "N": n, "K": k, "W_nbits": 4 if four else 8, "group_size": group if four else k,
            "unpack_mask": 15 if four else 255, "elements_per_sample": each, "type_id": 104 if four else 408,
            "a_sizeof": 2 if four else 1,
            "b_sizeof": 4 if four else 1, "stride_ak": 1, "stride_bk": n if four else 1, "stride_bn": 1 if four else k,
            "stride_cn": 1, "stride_meta_a_m": 1, "stride_meta_a_g": 1, "stride_meta_n": 1,
            "load_scales_as_block": False, "input_dtype": floats if four else "tl.int8", "output_dtype": floats,
            "acc_dtype": "tl.float32" if four else "tl.int32", "meta_dtype": floats if four else "tl.float32",
            "channel_scale_mode": 0 if four else 3, "W_group_mode": 3 if four else 0, "zero_is_scalar": four,
            "BLOCK_SIZE_M": m, "BLOCK_SIZE_N": wide, "BLOCK_SIZE_K": deep, "GROUP_SIZE_M": 8, "NUM_STAGES": stages,
            "A_load_order": order, "data_contiguous": four, "EVEN_M": rows % m == 0, "EVEN_N": n % wide == 0,
            "EVEN_K": k % (deep * split) == 0, "use_tma": False, "meta_scale_norm_ptr": None,
        }  # fmt: skip
        if decode:
            constants |= {"SPLIT_K": split}
        signature = {
            "a_ptr": "*fp16" if four else "*i8", "b_ptr": "*i32" if four else "*i8", "c_ptr": "*fp16",
            "scales_ptr": "*fp16" if four else "*fp32", "zeros_ptr": "*i32", "scales_a_ptr": "*fp32", "M": "i32",
            "M_CLOSEST": "i32", "stride_am": "i32", "stride_cm": "i32", "stride_meta_g": "i32",
        }  # fmt: skip
        job = Job(
            source, kernel, signature, constants, target, warps, stages, ("stride_am", "stride_cm", "stride_meta_g")
        )
        weight = n * k / 2 + n * k / group * 2 if four else n * k + 4 * n
        found.append(Anchor("gemlite", kind, job, (m, wide, deep), split, 8, weight))
    return found


# -- torchao -------------------------------------------------------------------------------------

_TORCHAO_FOUR = (  # get_configs_compute_bound of torchao/prototype/hqq/kernels.py, BLOCK_K at most the group
    (128, 256, 32, 8, 3), (256, 128, 32, 8, 3), (256, 64, 32, 4, 4), (64, 256, 32, 4, 4), (128, 128, 32, 4, 4),
    (128, 64, 32, 4, 4), (64, 128, 32, 4, 4), (128, 256, 128, 8, 3), (256, 128, 128, 8, 3), (256, 64, 128, 4, 4),
    (64, 256, 128, 4, 4), (128, 128, 128, 4, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4),
)  # fmt: skip
_TORCHAO_FEW = (  # get_configs_io_bound
    (16, 32, 32, 2, 4), (16, 64, 32, 2, 4), (16, 128, 32, 4, 4), (16, 256, 32, 4, 4), (16, 32, 64, 2, 4),
    (16, 64, 64, 2, 4), (16, 128, 64, 4, 4), (16, 256, 64, 4, 4),
)  # fmt: skip
_TORCHAO_EIGHT = (  # configs of torchao/prototype/quantized_training/int8_mm.py
    (128, 256, 64, 8, 3), (64, 256, 32, 4, 4), (128, 128, 32, 4, 4), (128, 64, 32, 4, 4), (64, 128, 32, 4, 4),
    (128, 256, 128, 8, 3), (256, 128, 128, 8, 3), (256, 64, 128, 4, 4), (64, 256, 128, 4, 4), (128, 128, 128, 4, 4),
    (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 8, 3), (128, 128, 32, 8, 2),
)  # fmt: skip


def torchao(kind: str, target: str, rows: int, n: int, k: int, group: int = 128) -> list[Anchor]:
    """torchao's kernels for so many rows, in their configurations."""
    found = []
    strides = {"stride_ak": 1, "stride_cn": 1}
    if kind == "w4a16":
        source = "from torchao.prototype.hqq.kernels import _mixed_mm_kernel\n"
        for m, wide, deep, warps, stages in _TORCHAO_FEW if rows < 64 else _TORCHAO_FOUR:
            deep = min(deep, group)
            for split in (1, 4) if rows < 64 else (1,):
                constants = strides | {
                    "IS_BFLOAT16": False, "QGROUP_SIZE": group, "BLOCK_M": m, "BLOCK_N": wide, "BLOCK_K": deep,
                    "SPLIT_K": split, "EVEN_K": k % (deep * split) == 0, "stride_bn": 1, "stride_scale_n": 1,
                }  # fmt: skip
                pointers = {"A": "*fp16", "B": "*u8", "scales_ptr": "*fp16", "zeros_ptr": "*fp16", "C": "*fp16"}
                sizes = dict.fromkeys(("M", "N", "K", "stride_am", "stride_bk", "stride_cm", "stride_scale_k"), "i32")
                aligned = tuple(s for s in sizes if s != "M")
                job = Job(source, "_mixed_mm_kernel", pointers | sizes, constants, target, warps, stages, aligned)
                weight = n * k / 2 + n * k / group * 4
                found.append(Anchor("torchao", kind, job, (m, wide, deep), split, 8, weight))
        return found
    for kernel, module, extra in (
        ("_scaled_int8_mm_kernel", "torchao.prototype.quantized_training.int8_mm", 0.0),
        ("scaled_matmul_kernel_with_block_pointers", "torchao.kernel.intmm_triton", 4.0 * rows * n),
    ):
        source = f"from {module} import {kernel}\n"
        whole = kernel.startswith("_scaled")
        for m, wide, deep, warps, stages in _TORCHAO_EIGHT:
            constants = strides | {
                "BLOCK_M": m,
                "BLOCK_N": wide,
                "BLOCK_K": deep,
                "GROUP_M": 8,
                "EVEN_K": True,
                "stride_bk": 1,
            }
            sizes = dict.fromkeys(("M", "N", "K", "stride_am", "stride_bn", "stride_cm"), "i32")
            if whole:
                names = ("A_ptr", "B_ptr", "C_ptr", "row_scale_ptr", "col_scale_ptr")
                pointers = dict(zip(names, ("*i8", "*i8", "*fp16", "*fp16", "*fp16"), strict=True))
            else:
                names = ("a_ptr", "b_ptr", "c_ptr", "s1_ptr")
                pointers = dict(zip(names, ("*i8", "*i8", "*fp16", "*fp16"), strict=True))
                constants |= {"stride_s1m": 1, "stride_s1n": 1, "ACC_TYPE": "tl.int32"}
            aligned = tuple(s for s in sizes if s != "M")
            job = Job(source, kernel, pointers | sizes, constants, target, warps, stages, aligned)
            name = "torchao" if whole else "torchao, one scale"
            found.append(Anchor(name, kind, job, (m, wide, deep), 1, 8, n * k + 2.0 * n, extra))
    return found


def best(anchors: list[Anchor], rows: int, workers: int = 1) -> dict[str, tuple[Anchor, Machine]]:
    """By name, the configuration that fits the chip with no spills and the fewest instructions for an operation."""
    made = compile_all([a.job for a in anchors], workers, limit=120, python=str(environment()))
    found: dict[str, tuple[Anchor, Machine]] = {}
    for anchor, machine in zip(anchors, made, strict=True):
        if isinstance(machine, Failure) or per_kflop(anchor.tile, machine, rows) == float("inf"):
            continue
        of = chip(machine.target)
        if not of.resident_blocks(machine.registers, machine.warps, machine.shared, machine.columns):
            continue
        held = found.get(anchor.name)
        key = (machine.spills > 0, per_kflop(anchor.tile, machine, rows))
        if held is None or key < (held[1].spills > 0, per_kflop(held[0].tile, held[1], rows)):
            found[anchor.name] = (anchor, machine)
    return found


def per_kflop(tile: tuple[int, int, int], machine: Machine, rows: int) -> float:
    """Warp instructions of the main loop for 1000 useful operations; infinity for a kernel without a loop.

    Args:
        tile: rows, columns and columns of K of a step; a turn of the compiled loop may hold several.
        rows: of the activation: a tile is padded to its height.
    """
    m, n, k = tile
    if not machine.loop_length or not machine.loop.get("tensor"):
        return float("inf")
    step = 2.0 * m * n * k
    steps = max(1.0, round(machine.loop_flops / step))
    return 1000.0 * machine.loop_length * machine.warps / (steps * step) * (-(-rows // m) * m / rows)
