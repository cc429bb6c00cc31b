"""rms_norm_256_f16_8e9c0770f7

prologue on whole rows of [M, 256], written by planish

    input   %x: f16[M, 256]
    weight  %gain: f32[256]
    output  %out: f16[M, 256]
    %out = rms_norm(%x, %gain, -) {eps = 1e-06}

Bytes, each input and weight read once, each output written once: 1024 M + 1024.
Operations: 1024 M f32.
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
def kernel(x_ptr, gain_ptr, out_ptr, M, BLOCK_M: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    offs_k = tl.arange(0, 256)
    x = tl.load(x_ptr + offs_m[:, None] * 256 + offs_k[None, :], mask=mask_m[:, None], other=0.0).to(tl.float32)
    out_squares = tl.sum(x * x, 1)
    out_factor = rms_factor(out_squares, 256.0, 1e-06)
    gain = tl.load(gain_ptr + offs_k).to(tl.float32)[None, :]
    out = x * out_factor[:, None] * gain
    tl.store(out_ptr + offs_m[:, None] * 256 + offs_k[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_m[:, None])


# the types of the kernel's parameters, for ahead-of-time compilation; the others are those of Launch
SIGNATURE = {
    "x_ptr": "*fp16",
    "gain_ptr": "*fp32",
    "out_ptr": "*fp16",
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


def run(x: torch.Tensor, gain: torch.Tensor, launch: Launch | None = None) -> torch.Tensor:
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
    out = x.new_empty((M, 256), dtype=torch.float16)
    if M:
        with torch.cuda.device(device) if x.is_cuda else nullcontext():
            kernel[(triton.cdiv(M, launch.BLOCK_M),)](
                x,
                gain,
                out,
                M,
                BLOCK_M=launch.BLOCK_M,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
    return out


@torch.library.custom_op("planish::rms_norm_256_f16_8e9c0770f7", mutates_args=())
def op(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return run(x, gain)


@op.register_fake
def _(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    M = x.shape[0]
    out = x.new_empty((M, 256), dtype=torch.float16)
    return out


def rms_norm_reference(
    x: torch.Tensor, gain: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Float32 [M, K] of float32 x [M, K], gain and bias [K]."""
    y = x * torch.rsqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps)
    y = y if gain is None else y * gain.float()
    return y if bias is None else y + bias.float()


def reference(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """What the kernel computes, in plain torch."""
    dtype = torch.float16
    x = x.float()
    out = rms_norm_reference(x, gain, None, 1e-06)
    out = out.to(dtype)
    return out


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
    for name, a, b in zip(("out",), *(made if isinstance(made, tuple) else (made,) for made in (one, other))):
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
