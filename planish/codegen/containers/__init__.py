"""Containers: how quantised tensors lie in the memory of others.

    packed = containers.pack(q, "matmul-nbits")         arrays and attributes
    containers.unpack(packed)                           the same numbers

| container | holds |
|---|---|
| `matmul-nbits` | onnxruntime's MatMulNBits: 2, 4 and 8 bits, blocks along the rows |
| `gather-block-quantized` | onnxruntime's GatherBlockQuantized: tables of 2, 4 and 8 bits |
| `dequantize-linear` | ONNX DequantizeLinear: integers of 2, 4 and 8 bits, fp8, fp4 |
| `int-quantized` `pack-quantized` | compressed-tensors: integers of 2, 3, 4 and 8 bits |
| `float-quantized` `nvfp4-pack-quantized` `mxfp4-pack-quantized` | compressed-tensors: fp8, NVFP4, MXFP4 |
| `triton` | planish's Triton kernels: integers of 2, 4 and 8 bits, with scales for 2 to 4 clusters |

Signed and unsigned codes differ by 2^(bits - 1); a container keeps the numbers, and where it has no sign of its own,
`unpack` gives unsigned codes if there are zero points and signed ones if there are none.
"""

from __future__ import annotations

from planish.codegen.containers import (
    compressed_tensors,
    dequantize_linear,
    gather_block_quantized,
    matmul_nbits,
    triton,
)
from planish.codegen.containers.base import Container, Packed, containers
from planish.ir.errors import PlanishError, nearest
from planish.ir.qtensor import QTensor

__all__ = ["Container", "Packed", "can_hold", "containers", "names", "pack", "refusal", "unpack"]
__all__ += ["compressed_tensors", "dequantize_linear", "gather_block_quantized", "matmul_nbits", "triton"]


def names() -> list[str]:
    """The names of all containers."""
    return sorted(containers())


def _named(name: str) -> Container:
    known = containers()
    if name not in known:
        raise PlanishError(
            f"container '{name}': unknown; expected one of {', '.join(sorted(known))}", hint=nearest(name, known)
        )
    return known[name]


def refusal(q: QTensor, name: str) -> str | None:
    """Why a container cannot hold a tensor; None if it can.

    Raises:
        PlanishError: there is no such container.
    """
    return _named(name).refuses(q)


def can_hold(q: QTensor) -> list[str]:
    """The names of the containers that can hold a tensor."""
    return [name for name, container in sorted(containers().items()) if container.refuses(q) is None]


def pack(q: QTensor, name: str, **options: object) -> Packed:
    """A tensor in the arrays of a container.

    Args:
        q: codes in their element's dtype, scales float64.
        name: of the container.
        options: of that container: `words="whole"` for pack-quantized.

    Raises:
        PlanishError: there is no such container, or it cannot hold the tensor: the error says why and which can.
    """
    container = _named(name)
    why = container.refuses(q)
    if why is not None:
        others = can_hold(q)
        raise PlanishError(
            f"container '{name}': cannot hold {why}",
            hint=f"can hold it: {', '.join(others)}" if others else "no container can hold it",
        )
    return container.pack(q, **options)


def unpack(packed: Packed) -> QTensor:
    """The tensor that the arrays of a container hold.

    Raises:
        PlanishError: there is no such container, or an array or attribute is missing.
    """
    return _named(packed.container).unpack(packed)
