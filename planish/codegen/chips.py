"""The chips that the kernel sheet speaks of: what one multiprocessor holds, and the peaks of the whole chip.

Limits of a multiprocessor, NVIDIA: CUDA Programming Guide, appendix "Compute Capabilities", tables of technical
specifications (registers, warps, blocks, shared memory); registers are given out to a warp in pieces of 256; every
block takes 1 KiB of shared memory for the system. Tensor memory of sm_100: 512 columns (PTX ISA, tcgen05).
AMD: "AMD Instinct MI300 ISA" and LLVM's AMDGPU guide: 512 vector registers a lane, pieces of 8, at most 8 wavefronts on
each of the 4 SIMDs of a compute unit, 64 KiB of LDS.

Peaks are those of the data sheets, dense, at boost clock, sums of products in float32 (16-bit floats) or int32:

    A100      NVIDIA A100 80GB SXM data sheet, A100 white paper (L2)
    L40S      NVIDIA L40S data sheet, Ada white paper (L2)
    H100      NVIDIA H100 SXM5 data sheet, H100 white paper (L2)
    B200      NVIDIA HGX B200 data sheet, an eighth of the board; Blackwell tuning guide (L2)
    RTX 5090  NVIDIA RTX Blackwell white paper, appendix
    MI300X    AMD Instinct MI300X data sheet, CDNA 3 white paper; L2 is 4 MiB for each of 8 dies, the cache
              behind it holds 256 MiB and is what DRAM traffic is counted behind

Instructions: a multiprocessor starts 4 warp instructions a cycle (NVIDIA), a compute unit of MI300X one vector
instruction a cycle (four SIMDs of 16 lanes, 64 lanes a wavefront), at boost clock.

They are upper bounds: no kernel reaches them, and nothing here was timed on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from planish.ir.errors import PlanishError, nearest

KIB = 1024
MIB = 1024 * 1024


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        registers: 32-bit registers of a multiprocessor.
        register_piece: registers are given to a warp in multiples of this.
        per_thread: the most registers that a thread may have.
        warps, blocks: the most on a multiprocessor. A warp has `lanes` threads.
        shared, block_shared: bytes of a multiprocessor, and the most for one block.
        block_reserve: bytes of shared memory that a block takes besides its own.
        units: multiprocessors.
        cache: bytes of the last cache before DRAM.
        copies: how often it holds what all multiprocessors read: once for each of its partitions (A100 white paper).
        bandwidth: bytes a second of DRAM.
        peak: operations a second by kind: "int8" and "f16" of the tensor cores, "f32" of the others.
        clock: cycles a second, boost.
        issue: warp instructions that a multiprocessor starts in a cycle.
    """

    name: str
    target: str
    units: int
    cache: int
    bandwidth: float
    peak: MappingProxyType[str, float]
    clock: float
    issue: int = 4
    copies: int = 1
    registers: int = 65536
    register_piece: int = 256
    per_thread: int = 255
    warps: int = 64
    blocks: int = 32
    shared: int = 228 * KIB
    block_shared: int = 227 * KIB
    block_reserve: int = KIB
    lanes: int = 32
    columns: int = 0

    def resident_blocks(self, registers: int, warps: int, shared: int, columns: int = 0) -> int:
        """How many blocks fit on a multiprocessor at once; 0 where not one does.

        Args:
            registers: of a thread. warps: of a block. shared: bytes of a block. columns: of tensor memory of a block.
        """
        if shared > self.block_shared or registers > self.per_thread:
            return 0
        piece = self.register_piece
        of_warp = -(-max(registers, 1) * self.lanes // piece) * piece
        quarter = min(self.registers // 4 // of_warp, self.warps // 4)  # a multiprocessor has four schedulers
        limits = [self.blocks, 4 * quarter // warps]
        if shared or self.block_reserve:
            limits.append(self.shared // (-(-shared // 128) * 128 + self.block_reserve))
        if columns:
            limits.append(self.columns // columns)
        return min(limits)

    def occupancy(self, registers: int, warps: int, shared: int, columns: int = 0) -> float:
        """Resident warps as a part of the most that a multiprocessor holds."""
        return self.resident_blocks(registers, warps, shared, columns) * warps / self.warps


def _peaks(int8: float, f16: float, f32: float) -> MappingProxyType[str, float]:
    return MappingProxyType({"int8": int8 * 1e12, "f16": f16 * 1e12, "bf16": f16 * 1e12, "f32": f32 * 1e12})


A100 = Chip(
    "A100",
    "sm_80",
    108,
    40 * MIB,
    2.039e12,
    _peaks(624, 312, 19.5),
    1.41e9,
    copies=2,
    shared=164 * KIB,
    block_shared=163 * KIB,
)
L40S = Chip(
    "L40S", "sm_89", 142, 96 * MIB, 0.864e12, _peaks(733, 362, 91.6), 2.52e9,
    warps=48, blocks=24, shared=100 * KIB, block_shared=99 * KIB,
)  # fmt: skip
H100 = Chip("H100", "sm_90", 132, 50 * MIB, 3.35e12, _peaks(1979, 989.4, 67), 1.98e9, copies=2)
B200 = Chip("B200", "sm_100", 148, 126 * MIB, 8e12, _peaks(4500, 2250, 75), 1.98e9, copies=2, columns=512)
RTX5090 = Chip(
    "RTX 5090", "sm_120", 170, 96 * MIB, 1.792e12, _peaks(838, 209.5, 104.8), 2.41e9,
    warps=48, blocks=24, shared=100 * KIB, block_shared=99 * KIB,
)  # fmt: skip
MI300X = Chip(
    "MI300X", "gfx942", 304, 256 * MIB, 5.3e12, _peaks(2614.9, 1307.4, 163.4), 2.1e9, 1,
    registers=4 * 512 * 64, register_piece=8 * 64, per_thread=512, warps=32, blocks=32,
    shared=64 * KIB, block_shared=64 * KIB, block_reserve=0, lanes=64,
)  # fmt: skip

CHIPS = MappingProxyType({chip.target: chip for chip in (A100, L40S, H100, B200, RTX5090, MI300X)})
TARGETS = tuple(CHIPS)


def chip(target: str) -> Chip:
    """The chip of a target.

    Raises:
        PlanishError: no chip has it.
    """
    if target not in CHIPS:
        raise PlanishError(
            f"target '{target}': unknown; expected one of {', '.join(CHIPS)}", hint=nearest(target, CHIPS)
        )
    return CHIPS[target]
