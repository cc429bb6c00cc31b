"""Two 4-bit codes a byte, by halves of a span.

    byte j of a span = code j | code (j + HALF) << 4            a span: 2 HALF consecutive codes

so that both halves unpack by one shift to consecutive codes, with no permutation of bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def pack_halves(codes, ROWS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """Bytes, int32 [ROWS, WIDTH / 2], of integer codes [ROWS, WIDTH], signed or not."""
    spans = tl.reshape(codes.to(tl.int32), (ROWS, WIDTH // (2 * HALF), 2, HALF))
    low, high = tl.split(tl.permute(spans, (0, 1, 3, 2)))
    return tl.reshape((low & 15) | ((high & 15) << 4), (ROWS, WIDTH // 2))


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
