"""gemm_a8_int8_gelu_quantize_token_384x1536_f16_2fad4955d7

gemm on tiles of [M, 384] -> [M, 1536], written by planish

    input   %a: i8[M, 384]
    input   %a_scale: f32[M]
    weight  %weight: i8[1536, 384]
    weight  %weight_scale: f32[1536]
    weight  %bias: f32[1536]
    output  %codes: i8[M, 1536]
    output  %scale: f32[M]
    scratch %whole: f16[M, 1536]
    %acc = linear(%a, %a_scale {token}, int8(%weight, %weight_scale) + %bias)
    %whole = gelu(%acc) {approximate = "none"}
    on whole rows, by the last tile of a block of rows:
    %codes, %scale = quantize_token(%whole) {bits = 8, signed = true, mode = "symmetric", levels = 127.0, low = -128,
        high = 127}

Bytes, each input and weight read once, each output written once: 1928 M + 602112.
Operations: 33792 M f32, 1179648 M int8.
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

N = tl.constexpr(1536)


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
def gelu(x):
    """x Phi(x), Phi the normal distribution function."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


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
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    codes_ptr,
    scale_ptr,
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
    steps: tl.constexpr = (384 // BLOCK_K + SPLIT_K - 1) // SPLIT_K
    begin = tl.program_id(1) * steps if SPLIT_K > 1 else 0
    end = tl.minimum(begin + steps, 384 // BLOCK_K) if SPLIT_K > 1 else steps
    k = tl.arange(0, BLOCK_K)
    a_at = a_ptr + first.to(tl.int64) * 384 + m[:, None] * 384
    a_at += begin * BLOCK_K
    weight_at = weight_ptr + across.to(tl.int64) * 384 + n[:, None] * 384
    weight_at += begin * BLOCK_K
    weight_sum = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for step in range(begin, end):
        weight_0 = tl.load(weight_at + k[None, :])
        a_0 = tl.load(a_at + k[None, :])
        weight_sum = tl.dot(weight_0, tl.trans(a_0), weight_sum, out_dtype=tl.int32)
        a_at += BLOCK_K
        weight_at += BLOCK_K
    if SPLIT_K > 1:
        slot = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        own = parts_ptr + tl.program_id(0).to(tl.int64) * (BLOCK_N * BLOCK_M) + slot
        apart = tl.num_programs(0).to(tl.int64) * (BLOCK_N * BLOCK_M)
        tl.store(own + tl.program_id(1) * apart, weight_sum)
        if arrived(arrivals_ptr + tl.program_id(0)) < SPLIT_K - 1:
            return
        weight_sum = tl.load(own, cache_modifier=".cg")
        for part in range(1, SPLIT_K):
            weight_sum += tl.load(own + part * apart, cache_modifier=".cg")
    acc = weight_sum.to(tl.float32)
    weight_scale = tl.load(weight_scale_ptr + across + n).to(tl.float32)
    acc = acc * weight_scale[:, None]
    acc = acc * tl.load(a_scale_ptr + first + m)[None, :]
    acc = tl.trans(acc)
    acc = acc + tl.load(bias_ptr + across + n)[None, :]
    row = first + tl.arange(0, BLOCK_M)
    column = across + tl.arange(0, BLOCK_N)
    inside = (row < M)[:, None] & (column < N)[None, :]
    at = first.to(tl.int64) * N + (tl.arange(0, BLOCK_M)[:, None] * N + column[None, :])
    whole_tile = gelu(acc)
    tl.store(whole_ptr + at, whole_tile.to(whole_ptr.dtype.element_ty), mask=inside)
    if arrived(finished_ptr + tile_m) == tl.cdiv(N, BLOCK_N) - 1:
        for start_row in range(first, tl.minimum(first + BLOCK_M, M), ROWS):
            offs_m = start_row + tl.arange(0, ROWS)
            mask_m = offs_m < M
            offs_k = tl.arange(0, 2048)
            mask_k = offs_k < 1536
            mask = mask_m[:, None] & mask_k[None, :]
            whole = tl.load(
                whole_ptr + offs_m[:, None] * 1536 + offs_k[None, :],
                mask=mask,
                other=0.0,
                cache_modifier=".cg",
            ).to(tl.float32)
            scale_top = tl.max(tl.abs(whole), 1)
            scale = token_scale(scale_top, 127.0)
            tl.store(scale_ptr + offs_m, scale, mask=mask_m)
            codes = token_codes(whole, scale, -128.0, 127.0)
            tl.store(
                codes_ptr + offs_m[:, None] * 1536 + offs_k[None, :],
                codes.to(tl.int8),
                mask=mask_m[:, None] & (offs_k < 1536)[None, :],
            )


# the types of the kernel's parameters, for ahead-of-time compilation; the others are those of Launch
SIGNATURE = {
    "a_ptr": "*i8",
    "a_scale_ptr": "*fp32",
    "weight_ptr": "*i8",
    "weight_scale_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "codes_ptr": "*i8",
    "scale_ptr": "*fp32",
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
    ROWS: int = 2  # rows at a time, in closing steps
    num_warps: int = 8  # warps of a program
    num_stages: int = 3  # tiles in flight

    def __post_init__(self) -> None:
        for holds, name, rule in (
            (self.BLOCK_M in (16, 32, 64, 128, 256), "BLOCK_M", "BLOCK_M in (16, 32, 64, 128, 256)"),
            (self.BLOCK_N in (16, 32, 64, 128, 256), "BLOCK_N", "BLOCK_N in (16, 32, 64, 128, 256)"),
            (self.BLOCK_K in (128, 64), "BLOCK_K", "BLOCK_K in (128, 64)"),
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
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel.

    Raises:
        ValueError: a tensor of another shape, dtype or device, one that is not contiguous, or too many rows.
    """
    M, device = a.shape[0], a.device
    launch = launch or chosen(M, device)
    if M > 1398101:
        raise ValueError(f"M: expected at most 1398101 rows, got {M}")
    _check("a", a, torch.int8, (M, 384), device)
    _check("a_scale", a_scale, torch.float32, (M,), device)
    _check("weight", weight, torch.int8, (1536, 384), device)
    _check("weight_scale", weight_scale, torch.float32, (1536,), device)
    _check("bias", bias, torch.float32, (1536,), device)
    codes = a.new_empty((M, 1536), dtype=torch.int8)
    scale = a.new_empty((M,), dtype=torch.float32)
    whole = a.new_empty((M, 1536), dtype=torch.float16)
    parts = a.new_empty(
        (
            launch.SPLIT_K * 1 * triton.cdiv(
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
                weight,
                weight_scale,
                bias,
                codes,
                scale,
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
    return codes, scale


@torch.library.custom_op("planish::gemm_a8_int8_gelu_quantize_token_384x1536_f16_2fad4955d7", mutates_args=())
def op(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return run(a, a_scale, weight, weight_scale, bias)


@op.register_fake
def _(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    M = a.shape[0]
    codes = a.new_empty((M, 1536), dtype=torch.int8)
    scale = a.new_empty((M,), dtype=torch.float32)
    return codes, scale


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


def gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """x Phi(x)."""
    return torch.nn.functional.gelu(x)


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


def reference(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel computes, in plain torch."""
    dtype = torch.float16
    left_codes = int8_reference(a, 384)
    weight_held = int8_reference(weight, 384)
    acc = integer_product_reference(left_codes, weight_held, weight_scale, 0, None, 0)
    acc = acc * a_scale[:, None]
    acc = acc + bias.float()
    whole = gelu_reference(acc)
    whole = whole.to(dtype).float()
    codes, scale, _ = token_codes_reference(whole, "symmetric", 127.0, -128.0, 127.0, 0.0)
    codes = stored_reference(codes, 8, 64)
    return codes, scale


def example(M: int, seed: int, device: str) -> dict[str, torch.Tensor]:
    """Random inputs and weights."""
    g = torch.Generator().manual_seed(seed)
    made = {
        "a": stored_reference(torch.randint(-128, 128, (M, 384), generator=g).float(), 8, 64).to(torch.int8),
        "a_scale": ((torch.rand((M,), generator=g) + 0.5) * 0.015625).to(torch.float32),
        "weight": torch.randint(-127, 128, (1536, 384), generator=g).to(torch.int8),
        "weight_scale": ((torch.rand((1536,), generator=g) + 0.5) * 0.0009765625).to(torch.float32),
        "bias": torch.randn((1536,), generator=g).to(torch.float32),
    }
    return {name: held.to(device) for name, held in made.items()}


def differences(M: int, seed: int, device: str, launch: Launch | None = None) -> list[str]:
    """What differs between the kernel and its reference by more than rounding explains; [] if nothing does.

    Both add the same 384 products in float32, in different orders, and round once to the result's dtype. Codes may
    differ by one where a value lies on a border between two: in one place of fifty at most.
    """
    held = example(M, seed, device)
    one, other = run(**held, launch=launch), reference(**held)
    found = []
    for name, a, b in zip(("codes", "scale"), *(made if isinstance(made, tuple) else (made,) for made in (one, other))):
        if a.dtype.is_floating_point:
            rounding = torch.finfo(a.dtype).eps
            a, b = a.double(), b.double()
            size = b.abs().nan_to_num(posinf=0.0)
            size = size.amax(-1, keepdim=True) if b.ndim > 1 else size
            bad = ~((a == b) | ((a - b).abs() <= 2 * rounding * b.abs() + 448 * 2.0**-23 * size))
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
