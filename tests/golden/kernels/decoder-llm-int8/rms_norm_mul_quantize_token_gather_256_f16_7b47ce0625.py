"""rms_norm_mul_quantize_token_gather_256_f16_7b47ce0625

prologue on whole rows of [M, 256], written by planish

    input   %x: f16[M, 256]
    weight  %gain: f32[256]
    weight  %by: f32[256]
    weight  %index: i32[4]
    output  %codes: i8[M, 256]
    output  %scale: f32[M]
    output  %left: f16[M, 4]
    %v = rms_norm(%x, %gain, -) {eps = 1e-06}
    %v1 = mul(%v, %by)
    %codes, %scale = quantize_token(%v1) {bits = 8, signed = true, mode = "symmetric", levels = 127.0, low = -128,
        high = 127}
    %left = gather(%v, %index) {columns = 4}

Bytes, each input and weight read once, each output written once: 780 M + 2064.
Operations: 3584 M f32.
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

@triton.jit
def rms_factor(squares, COUNT: tl.constexpr, EPS: tl.constexpr):
    """1 / sqrt(squares / COUNT + EPS) of the sums of squares [ROWS]."""
    return tl.rsqrt(squares * (1.0 / COUNT) + EPS)


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
def kernel(x_ptr, gain_ptr, by_ptr, index_ptr, codes_ptr, scale_ptr, left_ptr, M, BLOCK_M: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    offs_k = tl.arange(0, 256)
    x = tl.load(x_ptr + offs_m[:, None] * 256 + offs_k[None, :], mask=mask_m[:, None], other=0.0).to(tl.float32)
    v_squares = tl.sum(x * x, 1)
    v_factor = rms_factor(v_squares, 256.0, 1e-06)
    gain = tl.load(gain_ptr + offs_k).to(tl.float32)[None, :]
    v = x * v_factor[:, None] * gain
    by = tl.load(by_ptr + offs_k).to(tl.float32)[None, :]
    v1 = v * by
    scale_top = tl.max(tl.abs(v1), 1)
    scale = token_scale(scale_top, 127.0)
    tl.store(scale_ptr + offs_m, scale, mask=mask_m)
    codes = token_codes(v1, scale, -128.0, 127.0)
    tl.store(codes_ptr + offs_m[:, None] * 256 + offs_k[None, :], codes.to(tl.int8), mask=mask_m[:, None])
    offs_k_4 = tl.arange(0, 4)
    left_index_4 = tl.load(index_ptr + offs_k_4)
    x_4_left_index = tl.load(
        x_ptr + offs_m[:, None] * 256 + left_index_4[None, :],
        mask=mask_m[:, None],
        other=0.0,
    ).to(tl.float32)
    gain_4_left_index = tl.load(gain_ptr + left_index_4).to(tl.float32)[None, :]
    v_4_left_index = x_4_left_index * v_factor[:, None] * gain_4_left_index
    left_4 = v_4_left_index
    tl.store(
        left_ptr + offs_m[:, None] * 4 + offs_k_4[None, :],
        left_4.to(left_ptr.dtype.element_ty),
        mask=mask_m[:, None],
    )


# the types of the kernel's parameters, for ahead-of-time compilation; the others are those of Launch
SIGNATURE = {
    "x_ptr": "*fp16",
    "gain_ptr": "*fp32",
    "by_ptr": "*fp32",
    "index_ptr": "*i32",
    "codes_ptr": "*i8",
    "scale_ptr": "*fp32",
    "left_ptr": "*fp16",
    "M": "i32",
}


@dataclass(frozen=True)
class Launch:
    """Launch parameters.

    Raises:
        ValueError: one that the kernel cannot run with.
    """

    BLOCK_M: int = 16  # rows of a program
    num_warps: int = 8  # warps of a program
    num_stages: int = 3  # tiles in flight

    def __post_init__(self) -> None:
        for holds, name, rule in (
            (self.BLOCK_M in (1, 2, 4, 8, 16, 32, 64, 128), "BLOCK_M", "BLOCK_M in (1, 2, 4, 8, 16, 32, 64, 128)"),
            (self.num_warps in (1, 2, 4, 8, 16), "num_warps", "num_warps in (1, 2, 4, 8, 16)"),
            (1 <= self.num_stages <= 8, "num_stages", "1 <= num_stages <= 8"),
        ):
            if not holds:
                raise ValueError(f"launch {name}: expected {rule}, got {getattr(self, name)}")


# target -> (up to so many rows, Launch); the last holds for any number
CONFIGS: dict[str, tuple[tuple[float, Launch], ...]] = {
    "interpreter": (
        (16, Launch(BLOCK_M=16)),
        (math.inf, Launch(BLOCK_M=64)),
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
    x: torch.Tensor,
    gain: torch.Tensor,
    by: torch.Tensor,
    index: torch.Tensor,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the kernel.

    Raises:
        ValueError: a tensor of another shape, dtype or device, one that is not contiguous, or too many rows.
    """
    M, device = x.shape[0], x.device
    launch = launch or chosen(M, device)
    if M > 8388607:
        raise ValueError(f"M: expected at most 8388607 rows, got {M}")
    _check("x", x, torch.float16, (M, 256), device)
    _check("gain", gain, torch.float32, (256,), device)
    _check("by", by, torch.float32, (256,), device)
    _check("index", index, torch.int32, (4,), device)
    codes = x.new_empty((M, 256), dtype=torch.int8)
    scale = x.new_empty((M,), dtype=torch.float32)
    left = x.new_empty((M, 4), dtype=torch.float16)
    if M:
        with torch.cuda.device(device) if x.is_cuda else nullcontext():
            kernel[(triton.cdiv(M, launch.BLOCK_M),)](
                x,
                gain,
                by,
                index,
                codes,
                scale,
                left,
                M,
                BLOCK_M=launch.BLOCK_M,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
    return codes, scale, left


@torch.library.custom_op("planish::rms_norm_mul_quantize_token_gather_256_f16_7b47ce0625", mutates_args=())
def op(
    x: torch.Tensor,
    gain: torch.Tensor,
    by: torch.Tensor,
    index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return run(x, gain, by, index)


@op.register_fake
def _(
    x: torch.Tensor,
    gain: torch.Tensor,
    by: torch.Tensor,
    index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    M = x.shape[0]
    codes = x.new_empty((M, 256), dtype=torch.int8)
    scale = x.new_empty((M,), dtype=torch.float32)
    left = x.new_empty((M, 4), dtype=torch.float16)
    return codes, scale, left


def rms_norm_reference(
    x: torch.Tensor, gain: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Float32 [M, K] of float32 x [M, K], gain and bias [K]."""
    y = x * torch.rsqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps)
    y = y if gain is None else y * gain.float()
    return y if bias is None else y + bias.float()


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
    x: torch.Tensor,
    gain: torch.Tensor,
    by: torch.Tensor,
    index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the kernel computes, in plain torch."""
    dtype = torch.float16
    x = x.float()
    v = rms_norm_reference(x, gain, None, 1e-06)
    v1 = v * by
    codes, scale, _ = token_codes_reference(v1, "symmetric", 127.0, -128.0, 127.0, 0.0)
    codes = stored_reference(codes, 8, 64)
    left = gather_reference(v, index)
    left = left.to(dtype)
    return codes, scale, left


def rows(g: torch.Generator, *size: int) -> torch.Tensor:
    """Random rows, in turn: normal, zero, huge, all negative."""
    x, turn = torch.randn(size, generator=g), torch.arange(size[0])[:, None] % 4
    return torch.where(turn == 3, -x.abs(), x * torch.tensor([1.0, 0.0, 16.0, 1.0])[turn])


def example(M: int, seed: int, device: str) -> dict[str, torch.Tensor]:
    """Random inputs and weights."""
    g = torch.Generator().manual_seed(seed)
    made = {
        "x": rows(g, M, 256).to(torch.float16),
        "gain": torch.randn((256,), generator=g).to(torch.float32),
        "by": torch.randn((256,), generator=g).to(torch.float32),
        "index": torch.randint(0, 256, (4,), generator=g).to(torch.int32),
    }
    return {name: held.to(device) for name, held in made.items()}


def differences(M: int, seed: int, device: str, launch: Launch | None = None) -> list[str]:
    """What differs between the kernel and its reference by more than rounding explains; [] if nothing does.

    Both add the same 256 products in float32, in different orders, and round once to the result's dtype. Codes may
    differ by one where a value lies on a border between two: in one place of fifty at most.
    """
    held = example(M, seed, device)
    one, other = run(**held, launch=launch), reference(**held)
    found = []
    for name, a, b in zip(
        ("codes", "scale", "left"),
        *(made if isinstance(made, tuple) else (made,) for made in (one, other)),
    ):
        if a.dtype.is_floating_point:
            rounding = torch.finfo(a.dtype).eps
            a, b = a.double(), b.double()
            size = b.abs().nan_to_num(posinf=0.0)
            size = size.amax(-1, keepdim=True) if b.ndim > 1 else size
            bad = ~((a == b) | ((a - b).abs() <= 2 * rounding * b.abs() + 320 * 2.0**-23 * size))
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
