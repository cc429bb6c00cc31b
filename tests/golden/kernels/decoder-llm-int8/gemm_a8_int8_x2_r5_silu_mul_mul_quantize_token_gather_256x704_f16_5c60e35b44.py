"""gemm_a8_int8_x2_r5_silu_mul_mul_quantize_token_gather_256x704_f16_5c60e35b44

gemm on tiles of [M, 256] -> [M, 704], written by planish

    input   %a: i8[M, 256]
    input   %a_scale: f32[M]
    input   %left: f16[M, 5]
    weight  %weight: i8[704, 256]
    weight  %weight_scale: f32[704]
    weight  %up: f16[704, 5]
    weight  %weight1: i8[704, 256]
    weight  %weight1_scale: f32[704]
    weight  %up1: f16[704, 5]
    weight  %by: f32[704]
    weight  %index: i32[83]
    output  %codes: i8[M, 704]
    output  %scale: f32[M]
    output  %left1: f16[M, 83]
    scratch %whole: f16[M, 704]
    %acc = linear(%a, %a_scale {token}, int8(%weight, %weight_scale) + %left @ %up^T)
    %acc1 = linear(%a, %a_scale {token}, int8(%weight1, %weight1_scale) + %left @ %up1^T)
    %v = silu(%acc)
    %whole = mul(%v, %acc1)
    on whole rows, by the last tile of a block of rows:
    %v1 = mul(%whole, %by)
    %codes, %scale = quantize_token(%v1) {bits = 8, signed = true, mode = "symmetric", levels = 127.0, low = -128,
        high = 127}
    %left1 = gather(%whole, %index) {columns = 83}

Bytes, each input and weight read once, each output written once: 1144 M + 383308.
Operations: 14080 M f16, 11264 M f32, 720896 M int8.
Not timed on a GPU.

    TRITON_INTERPRET=1 python FILE    compares the kernel with its eager reference, in the interpreter
    python FILE                       the same on a GPU
"""

import math
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

N = tl.constexpr(704)


@triton.jit
def tile_of(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The block of rows and the block of columns of a tile."""
    columns = tl.cdiv(N, BLOCK_N)
    group = index // (GROUP_M * columns)
    size = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
    within = index % (GROUP_M * columns)
    return group * GROUP_M + within % size, within // size


@triton.jit
def arrived(counter):
    """How many programs came to this counter before; what they stored before is visible to those that come later."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel")


@triton.jit
def low_rank_up(sums, left, right, m, n, RANK: tl.constexpr, CHUNK: tl.constexpr):
    """sums, float32, plus the branch.

    Args:
        left, right: pointers to the first row of the tile, rows of RANK numbers.
        m, n: rows of the tile.
        CHUNK: columns of the rank at a time, a power of two of at least 16.
    """
    r = tl.arange(0, CHUNK)
    for start in tl.static_range(0, RANK, CHUNK):
        if RANK % CHUNK == 0:
            narrow = tl.load(left + m[:, None] * RANK + (start + r)[None, :])
            wide = tl.load(right + n[:, None] * RANK + (start + r)[None, :])
        else:
            there = (start + r < RANK)[None, :]
            narrow = tl.load(left + m[:, None] * RANK + (start + r)[None, :], mask=there, other=0.0)
            wide = tl.load(right + n[:, None] * RANK + (start + r)[None, :], mask=there, other=0.0)
        sums = tl.dot(wide, tl.trans(narrow), sums, input_precision="ieee")
    return sums


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow on either side."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x * sigmoid(x)


@triton.jit
def token_scale(extreme, LEVELS: tl.constexpr):
    """The scale of rows whose range is `extreme` wide; 1 where they are all zero."""
    return tl.where(extreme == 0.0, 1.0, tl.maximum(extreme / LEVELS, 1.1754943508222875e-38))


@triton.jit
def code_of(v):
    """The nearest int8, halves to even, of float32 |v| < 128.5: the last bits of v + 1.5 * 2^23 are the integer's."""
    return (v + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def clamp(v, LOW: tl.constexpr, HIGH: tl.constexpr):
    """v kept within [LOW, HIGH]."""
    return tl.minimum(tl.maximum(v, LOW), HIGH)


@triton.jit
def token_codes(x, scale, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Codes int8 of rows [ROWS, WIDTH] by the scale [ROWS] of each."""
    return code_of(clamp(x * (1.0 / scale)[:, None], LOW, HIGH))


@triton.jit
def kernel(
    a_ptr,
    a_scale_ptr,
    left_ptr,
    weight_ptr,
    weight_scale_ptr,
    up_ptr,
    weight1_ptr,
    weight1_scale_ptr,
    up1_ptr,
    by_ptr,
    index_ptr,
    codes_ptr,
    scale_ptr,
    left1_ptr,
    whole_ptr,
    parts_ptr,
    arrivals_ptr,
    finished_ptr,
    M,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ROWS: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first = tile_m * BLOCK_M
    across = tile_n * BLOCK_N
    m = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first)
    n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - across)
    steps: tl.constexpr = (256 // BLOCK_K + SPLIT_K - 1) // SPLIT_K
    begin = tl.program_id(1) * steps if SPLIT_K > 1 else 0
    end = tl.minimum(begin + steps, 256 // BLOCK_K) if SPLIT_K > 1 else steps
    k = tl.arange(0, BLOCK_K)
    a_at = a_ptr + first.to(tl.int64) * 256 + m[:, None] * 256
    a_at += begin * BLOCK_K
    weight_at = weight_ptr + across.to(tl.int64) * 256 + n[:, None] * 256
    weight_at += begin * BLOCK_K
    weight_sum = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    weight1_at = weight1_ptr + across.to(tl.int64) * 256 + n[:, None] * 256
    weight1_at += begin * BLOCK_K
    weight1_sum = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for step in range(begin, end):
        weight_0 = tl.load(weight_at + k[None, :])
        weight1_0 = tl.load(weight1_at + k[None, :])
        a_0 = tl.load(a_at + k[None, :])
        weight_sum = tl.dot(weight_0, tl.trans(a_0), weight_sum, out_dtype=tl.int32)
        weight1_sum = tl.dot(weight1_0, tl.trans(a_0), weight1_sum, out_dtype=tl.int32)
        a_at += BLOCK_K
        weight_at += BLOCK_K
        weight1_at += BLOCK_K
    if SPLIT_K > 1:
        slot = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        own = parts_ptr + tl.program_id(0).to(tl.int64) * (BLOCK_N * BLOCK_M) + slot
        apart = tl.num_programs(0).to(tl.int64) * (BLOCK_N * BLOCK_M)
        tl.store(own + (tl.program_id(1) * 2 + 0) * apart, weight_sum)
        tl.store(own + (tl.program_id(1) * 2 + 1) * apart, weight1_sum)
        if arrived(arrivals_ptr + tl.program_id(0)) < SPLIT_K - 1:
            return
        weight_sum = tl.load(own, cache_modifier=".cg")
        for part in range(1, SPLIT_K):
            weight_sum += tl.load(own + (part * 2 + 0) * apart, cache_modifier=".cg")
        weight1_sum = tl.load(own + apart, cache_modifier=".cg")
        for part in range(1, SPLIT_K):
            weight1_sum += tl.load(own + (part * 2 + 1) * apart, cache_modifier=".cg")
    acc = weight_sum.to(tl.float32)
    weight_scale = tl.load(weight_scale_ptr + across + n).to(tl.float32)
    acc = acc * weight_scale[:, None]
    acc = acc * tl.load(a_scale_ptr + first + m)[None, :]
    acc = low_rank_up(acc, left_ptr + first.to(tl.int64) * 5, up_ptr + across.to(tl.int64) * 5, m, n, 5, 16)
    acc = tl.trans(acc)
    acc1 = weight1_sum.to(tl.float32)
    weight1_scale = tl.load(weight1_scale_ptr + across + n).to(tl.float32)
    acc1 = acc1 * weight1_scale[:, None]
    acc1 = acc1 * tl.load(a_scale_ptr + first + m)[None, :]
    acc1 = low_rank_up(acc1, left_ptr + first.to(tl.int64) * 5, up1_ptr + across.to(tl.int64) * 5, m, n, 5, 16)
    acc1 = tl.trans(acc1)
    row = first + tl.arange(0, BLOCK_M)
    column = across + tl.arange(0, BLOCK_N)
    inside = (row < M)[:, None] & (column < N)[None, :]
    at = first.to(tl.int64) * N + (tl.arange(0, BLOCK_M)[:, None] * N + column[None, :])
    v = silu(acc)
    whole_tile = v * acc1
    tl.store(whole_ptr + at, whole_tile.to(whole_ptr.dtype.element_ty), mask=inside)
    if arrived(finished_ptr + tile_m) == tl.cdiv(N, BLOCK_N) - 1:
        for start_row in range(first, tl.minimum(first + BLOCK_M, M), ROWS):
            offs_m = start_row + tl.arange(0, ROWS)
            mask_m = offs_m < M
            offs_k = tl.arange(0, 1024)
            mask_k = offs_k < 704
            mask = mask_m[:, None] & mask_k[None, :]
            whole = tl.load(
                whole_ptr + offs_m[:, None] * 704 + offs_k[None, :],
                mask=mask,
                other=0.0,
                cache_modifier=".cg",
            ).to(tl.float32)
            by = tl.load(by_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
            v1 = whole * by
            scale_top = tl.max(tl.abs(v1), 1)
            scale = token_scale(scale_top, 127.0)
            tl.store(scale_ptr + offs_m, scale, mask=mask_m)
            codes = token_codes(v1, scale, -128.0, 127.0)
            tl.store(
                codes_ptr + offs_m[:, None] * 704 + offs_k[None, :],
                codes.to(tl.int8),
                mask=mask_m[:, None] & (offs_k < 704)[None, :],
            )
            offs_k_83 = tl.arange(0, 128)
            mask_k_83 = offs_k_83 < 83
            left1_index_83 = tl.load(index_ptr + offs_k_83, mask=mask_k_83, other=0)
            whole_83_left1_index = tl.load(
                whole_ptr + offs_m[:, None] * 704 + left1_index_83[None, :],
                mask=mask_m[:, None],
                other=0.0,
                cache_modifier=".cg",
            ).to(tl.float32)
            left1_83 = tl.where(mask_k_83[None, :], whole_83_left1_index, 0.0)
            mask_83 = mask_m[:, None] & mask_k_83[None, :]
            tl.store(
                left1_ptr + offs_m[:, None] * 83 + offs_k_83[None, :],
                left1_83.to(left1_ptr.dtype.element_ty),
                mask=mask_83,
            )


# the types of the kernel's parameters, for ahead-of-time compilation; the others are those of Launch
SIGNATURE = {
    "a_ptr": "*i8",
    "a_scale_ptr": "*fp32",
    "left_ptr": "*fp16",
    "weight_ptr": "*i8",
    "weight_scale_ptr": "*fp32",
    "up_ptr": "*fp16",
    "weight1_ptr": "*i8",
    "weight1_scale_ptr": "*fp32",
    "up1_ptr": "*fp16",
    "by_ptr": "*fp32",
    "index_ptr": "*i32",
    "codes_ptr": "*i8",
    "scale_ptr": "*fp32",
    "left1_ptr": "*fp16",
    "whole_ptr": "*fp16",
    "parts_ptr": "*i32",
    "arrivals_ptr": "*i32",
    "finished_ptr": "*i32",
    "M": "i32",
}


@dataclass(frozen=True)
class Launch:
    """Launch parameters.

    Raises:
        ValueError: one that the kernel cannot run with.
    """

    BLOCK_M: int = 64  # rows of a tile
    BLOCK_N: int = 128  # columns of a tile
    BLOCK_K: int = 128  # columns of the operands at a time
    SPLIT_K: int = 1  # programs that share a tile
    GROUP_M: int = 8  # row blocks that are swept together
    ROWS: int = 4  # rows at a time, in closing steps
    num_warps: int = 8  # warps of a program
    num_stages: int = 3  # tiles in flight

    def __post_init__(self) -> None:
        for holds, name, rule in (
            (self.BLOCK_M in (16, 32, 64, 128, 256), "BLOCK_M", "BLOCK_M in (16, 32, 64, 128, 256)"),
            (self.BLOCK_N in (16, 32, 64, 128, 256), "BLOCK_N", "BLOCK_N in (16, 32, 64, 128, 256)"),
            (self.BLOCK_K in (128, 64, 256), "BLOCK_K", "BLOCK_K in (128, 64, 256)"),
            (self.SPLIT_K in (1, 2, 4, 8, 16), "SPLIT_K", "SPLIT_K in (1, 2, 4, 8, 16)"),
            (self.GROUP_M >= 1, "GROUP_M", "GROUP_M >= 1"),
            (
                self.ROWS in (1, 2, 4, 8, 16, 32, 64, 128) and self.BLOCK_M % self.ROWS == 0,
                "ROWS",
                "ROWS in (1, 2, 4, 8, 16, 32, 64, 128) and BLOCK_M % ROWS == 0",
            ),
            (self.num_warps in (1, 2, 4, 8, 16), "num_warps", "num_warps in (1, 2, 4, 8, 16)"),
            (1 <= self.num_stages <= 8, "num_stages", "1 <= num_stages <= 8"),
        ):
            if not holds:
                raise ValueError(f"launch {name}: expected {rule}, got {getattr(self, name)}")


# target -> (up to so many rows, Launch); the last holds for any number
CONFIGS: dict[str, tuple[tuple[float, Launch], ...]] = {
    "interpreter": (
        (16, Launch(BLOCK_M=16, BLOCK_N=256)),
        (math.inf, Launch(BLOCK_M=64, BLOCK_N=256)),
    ),
}


TUNED: dict[tuple[str, int], Launch] = {}


def target_of(device: torch.device) -> str:
    """The name of a device in CONFIGS: sm_90, gfx942; "interpreter" for the CPU."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def chosen(M: int, device: torch.device) -> Launch:
    """The launch parameters for so many rows on a device: what `tune` found, else of CONFIGS, else the defaults."""
    target = target_of(device)
    if (target, M) in TUNED:
        return TUNED[target, M]
    return next((launch for most, launch in CONFIGS.get(target, ()) if most >= M), Launch())


def _check(name: str, held: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(held.shape) != shape or held.dtype != dtype or held.device != device or not held.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous {dtype} tensor of shape {list(shape)} on {device}, "
            f"got {held.dtype} {list(held.shape)} with strides {list(held.stride())} on {held.device}"
        )


def run(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    left: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    up: torch.Tensor,
    weight1: torch.Tensor,
    weight1_scale: torch.Tensor,
    up1: torch.Tensor,
    by: torch.Tensor,
    index: torch.Tensor,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the kernel.

    Raises:
        ValueError: a tensor of another shape, dtype or device, one that is not contiguous, or too many rows.
    """
    M, device = a.shape[0], a.device
    launch = launch or chosen(M, device)
    if M > 3050402:
        raise ValueError(f"M: expected at most 3050402 rows, got {M}")
    _check("a", a, torch.int8, (M, 256), device)
    _check("a_scale", a_scale, torch.float32, (M,), device)
    _check("left", left, torch.float16, (M, 5), device)
    _check("weight", weight, torch.int8, (704, 256), device)
    _check("weight_scale", weight_scale, torch.float32, (704,), device)
    _check("up", up, torch.float16, (704, 5), device)
    _check("weight1", weight1, torch.int8, (704, 256), device)
    _check("weight1_scale", weight1_scale, torch.float32, (704,), device)
    _check("up1", up1, torch.float16, (704, 5), device)
    _check("by", by, torch.float32, (704,), device)
    _check("index", index, torch.int32, (83,), device)
    codes = a.new_empty((M, 704), dtype=torch.int8)
    scale = a.new_empty((M,), dtype=torch.float32)
    left1 = a.new_empty((M, 83), dtype=torch.float16)
    whole = a.new_empty((M, 704), dtype=torch.float16)
    parts = a.new_empty(
        (
            launch.SPLIT_K * 2 * triton.cdiv(
                M,
                launch.BLOCK_M,
            ) * triton.cdiv(N, launch.BLOCK_N) * launch.BLOCK_M * launch.BLOCK_N if launch.SPLIT_K > 1 else 1,
        ),
        dtype=torch.int32,
    )
    arrivals = a.new_zeros(
        (triton.cdiv(M, launch.BLOCK_M) * triton.cdiv(N, launch.BLOCK_N) if launch.SPLIT_K > 1 else 1,),
        dtype=torch.int32,
    )
    finished = a.new_zeros((triton.cdiv(M, launch.BLOCK_M),), dtype=torch.int32)
    if M:
        with torch.cuda.device(device) if a.is_cuda else nullcontext():
            kernel[(triton.cdiv(M, launch.BLOCK_M) * triton.cdiv(N, launch.BLOCK_N), launch.SPLIT_K)](
                a,
                a_scale,
                left,
                weight,
                weight_scale,
                up,
                weight1,
                weight1_scale,
                up1,
                by,
                index,
                codes,
                scale,
                left1,
                whole,
                parts,
                arrivals,
                finished,
                M,
                BLOCK_M=launch.BLOCK_M,
                BLOCK_N=launch.BLOCK_N,
                BLOCK_K=launch.BLOCK_K,
                SPLIT_K=launch.SPLIT_K,
                GROUP_M=launch.GROUP_M,
                ROWS=launch.ROWS,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
    return codes, scale, left1


@torch.library.custom_op(
    "planish::gemm_a8_int8_x2_r5_silu_mul_mul_quantize_token_gather_256x704_f16_5c60e35b44",
    mutates_args=(),
)
def op(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    left: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    up: torch.Tensor,
    weight1: torch.Tensor,
    weight1_scale: torch.Tensor,
    up1: torch.Tensor,
    by: torch.Tensor,
    index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return run(a, a_scale, left, weight, weight_scale, up, weight1, weight1_scale, up1, by, index)


@op.register_fake
def _(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    left: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    up: torch.Tensor,
    weight1: torch.Tensor,
    weight1_scale: torch.Tensor,
    up1: torch.Tensor,
    by: torch.Tensor,
    index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    M = a.shape[0]
    codes = a.new_empty((M, 704), dtype=torch.int8)
    scale = a.new_empty((M,), dtype=torch.float32)
    left1 = a.new_empty((M, 83), dtype=torch.float16)
    return codes, scale, left1


def int8_reference(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Signed codes, float64 [N, columns], of int8 [N, K_pad]."""
    return packed[:, :columns].double()


def integer_product_reference(
    left: torch.Tensor,
    right: torch.Tensor,
    scale: torch.Tensor,
    group: int,
    left_scale: torch.Tensor | None,
    left_group: int,
) -> torch.Tensor:
    """float32 [M, N] of codes, float64 [M, K] and [N, K], before the scales of rows of the left side.

    Args:
        scale: [N], or with a group [ceil(K / group), N].
        left_scale: with `left_group` [M, ceil(K / left_group)], else None.
    """
    unit = min(g for g in (group, left_group, left.shape[1]) if g)
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.float32, device=left.device)
    for start in range(0, left.shape[1], unit):
        part = (left[:, start : start + unit] @ right[:, start : start + unit].T).float()
        factor = scale.float()[start // group] if group else torch.ones_like(scale[..., :1], dtype=torch.float32)
        if left_scale is not None:
            factor = factor * left_scale.float()[:, start // left_group, None]
        total = total + part * factor
    return total if group else total * scale.float()


def low_rank_up_reference(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The branch, float32 [M, N], of [M, R] and [N, R]: rounded once."""
    return (left.double() @ right.double().T).float()


def silu_reference(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(x)."""
    return torch.nn.functional.silu(x)


def token_codes_reference(
    x: torch.Tensor, mode: str, levels: float, low: float, high: float, floor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [M, K] and zero points [M] as float32 integers, scales [M], of float32 x [M, K].

    Args:
        mode: "symmetric", "range" or "floor".
        low, high: the codes that are stored.
    """
    bottom, top = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if mode == "floor":
        zero = torch.floor(levels * floor / (top.clamp(min=0.0) + floor)).clamp(min=1.0)
        scale = floor / zero
    else:
        bottom, top = (bottom, top) if mode == "symmetric" else (bottom.clamp(max=0.0), top.clamp(min=0.0))
        extreme = torch.maximum(-bottom, top) if mode == "symmetric" else top - bottom
        scale = (extreme / levels).clamp(min=torch.finfo(torch.float32).tiny)
        scale = torch.where(extreme == 0, torch.ones_like(scale), scale)
        zero = torch.round(-bottom / scale).clamp(0.0, levels)
    ratio = x * (1.0 / scale)
    if mode == "symmetric":
        return torch.round(ratio).clamp(low, high), scale.squeeze(-1), torch.zeros_like(scale).squeeze(-1)
    codes = torch.round(ratio) + zero + low
    return codes.clamp(low, high), scale.squeeze(-1), zero.squeeze(-1) + low


def stored_reference(codes: torch.Tensor, bits: int, span: int) -> torch.Tensor:
    """Codes [M, K] (float32 integers) as they lie in memory: int8 [M, K_pad * bits / 8].

    Args:
        bits: 8 or 4.
        span: K_pad is K rounded up to a multiple; the codes beyond K are 0.
    """
    whole = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % span)).to(torch.int32)
    if bits == 8:
        return whole.to(torch.int8)
    spans = whole.reshape(whole.shape[0], -1, 2, span // 2) & 15
    packed = (spans[:, :, 0] | (spans[:, :, 1] << 4)).reshape(whole.shape[0], -1)
    return packed.to(torch.uint8).view(torch.int8)


def gather_reference(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[:, index]."""
    return x[:, index.long()]


def reference(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    left: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    up: torch.Tensor,
    weight1: torch.Tensor,
    weight1_scale: torch.Tensor,
    up1: torch.Tensor,
    by: torch.Tensor,
    index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the kernel computes, in plain torch."""
    dtype = torch.float16
    left_codes = int8_reference(a, 256)
    weight_held = int8_reference(weight, 256)
    acc = integer_product_reference(left_codes, weight_held, weight_scale, 0, None, 0)
    acc = acc * a_scale[:, None]
    acc = acc + low_rank_up_reference(left, up)
    weight1_held = int8_reference(weight1, 256)
    acc1 = integer_product_reference(left_codes, weight1_held, weight1_scale, 0, None, 0)
    acc1 = acc1 * a_scale[:, None]
    acc1 = acc1 + low_rank_up_reference(left, up1)
    v = silu_reference(acc)
    whole = v * acc1
    whole = whole.to(dtype).float()
    v1 = whole * by
    codes, scale, _ = token_codes_reference(v1, "symmetric", 127.0, -128.0, 127.0, 0.0)
    codes = stored_reference(codes, 8, 64)
    left1 = gather_reference(whole, index)
    left1 = left1.to(dtype)
    return codes, scale, left1


def example(M: int, seed: int, device: str) -> dict[str, torch.Tensor]:
    """Random inputs and weights."""
    g = torch.Generator().manual_seed(seed)
    made = {
        "a": stored_reference(torch.randint(-128, 128, (M, 256), generator=g).float(), 8, 64).to(torch.int8),
        "a_scale": ((torch.rand((M,), generator=g) + 0.5) * 0.015625).to(torch.float32),
        "left": torch.randn((M, 5), generator=g).to(torch.float16),
        "weight": torch.randint(-127, 128, (704, 256), generator=g).to(torch.int8),
        "weight_scale": ((torch.rand((704,), generator=g) + 0.5) * 0.0009765625).to(torch.float32),
        "up": (torch.randn((704, 5), generator=g) / 16).to(torch.float16),
        "weight1": torch.randint(-127, 128, (704, 256), generator=g).to(torch.int8),
        "weight1_scale": ((torch.rand((704,), generator=g) + 0.5) * 0.0009765625).to(torch.float32),
        "up1": (torch.randn((704, 5), generator=g) / 16).to(torch.float16),
        "by": torch.randn((704,), generator=g).to(torch.float32),
        "index": torch.randint(0, 256, (83,), generator=g).to(torch.int32),
    }
    return {name: held.to(device) for name, held in made.items()}


def differences(M: int, seed: int, device: str, launch: Launch | None = None) -> list[str]:
    """What differs between the kernel and its reference by more than rounding explains; [] if nothing does.

    Both add the same 266 products in float32, in different orders, and round once to the result's dtype. Codes may
    differ by one where a value lies on a border between two: in one place of fifty at most.
    """
    held = example(M, seed, device)
    one, other = run(**held, launch=launch), reference(**held)
    found = []
    for name, a, b in zip(
        ("codes", "scale", "left1"),
        *(made if isinstance(made, tuple) else (made,) for made in (one, other)),
    ):
        if a.dtype.is_floating_point:
            rounding = torch.finfo(a.dtype).eps
            a, b = a.double(), b.double()
            size = b.abs().nan_to_num(posinf=0.0)
            size = size.amax(-1, keepdim=True) if b.ndim > 1 else size
            bad = ~((a == b) | ((a - b).abs() <= 2 * rounding * b.abs() + 330 * 2.0**-23 * size))
        else:
            far = (a.int() - b.int()).abs()
            bad = far > (1 if (far > 0).double().mean() <= 0.02 else 0)
        if bool(bad.any()):
            at = tuple(bad.nonzero()[0].tolist())
            found.append(f"{name}{list(at)}: kernel {a[at].item()}, reference {b[at].item()}")
    return found


def tune(M: int, device: str = "cuda") -> Launch:
    """The fastest launch that is known for this device, timed on it with so many rows; `run` takes it from now on."""
    held, target = example(M, 0, device), target_of(torch.device(device))
    known = dict.fromkeys([*(launch for _, launch in CONFIGS.get(target, ())), Launch()])
    times = {launch: triton.testing.do_bench(lambda: run(**held, launch=launch)) for launch in known}
    TUNED[target, M] = min(times, key=times.__getitem__)
    return TUNED[target, M]


def main() -> int:
    """Compare on random data; 1 if anything differs, 2 if there is nothing to run the kernel on."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        print("no GPU: set TRITON_INTERPRET=1 to compare in Triton's interpreter")
        return 2
    device = "cpu" if interpreted else "cuda"
    found = [f"M = {M}: {line}" for M in (1, 7, 33) for line in differences(M, M, device)]
    print("\n".join(found) or f"equal to the reference, {'in the interpreter' if interpreted else 'on the GPU'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
