"""Machine code of a kernel read as text: registers, spills, instructions by class, the main loop.

NVIDIA: what `cuobjdump -sass` and `-res-usage` print. AMD: the assembly that Triton keeps, with its metadata.
An instruction is one of a warp (AMD: a wavefront); `tcgen05` instructions are issued once for a block.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)([^;]*);", re.MULTILINE)
_BRANCH = re.compile(r"0x([0-9a-f]+)\s*$")
_GCN = re.compile(r"^\s+([sv]_\w+|ds_\w+|buffer_\w+|global_\w+|flat_\w+|scratch_\w+)\b(.*)$")

# The classes, in order: the first that matches an opcode counts it.
_NVIDIA_CLASSES = (
    ("tensor", r"(I|H|Q|O|D|B)MMA\b|(I|H|Q|B)GMMA\b|UTC(I|H|Q|O)MMA"),
    ("spill", r"(LDL|STL)\b"),
    ("async_copy", r"LDGSTS\b"),
    ("bulk_copy", r"UBLKCP\b|UTMALDG\b|UTMASTG\b|UTMAREDG\b"),
    ("load_16", r"LDG\b.*\.(128|256)\b"),
    ("load", r"LDG\b|LD\b"),
    ("store_16", r"STG\b.*\.(128|256)\b"),
    ("store", r"STG\b|ST\b"),
    ("atomic", r"ATOM\w*\b|RED\b|REDG\b"),
    ("shared", r"LDS\w*\b|STS\w*\b|ATOMS\b|LDTM\b|STTM\b|UTCCP\b"),
    ("permute", r"PRMT\b"),
    ("shuffle", r"SHFL\b|REDUX\b"),
    ("convert", r"(I2F|F2I|F2F|I2I|I2FP|F2FP|I2IP|F2IP|FRND)\b"),
    ("float", r"(FADD|FMUL|FFMA|FMNMX|FSET|FSETP|HADD2|HMUL2|HFMA2|FADD2|FMUL2|FFMA2|MUFU|FSEL|FMNMX3|HMNMX2)\b"),
    ("barrier", r"BAR\b|WARPSYNC\b|DEPBAR\b|LDGDEPBAR\b|SYNCS\b|MEMBAR\b|FENCE\b|WARPGROUP\b|UTCBAR\b|ERRBAR\b"),
    ("branch", r"BRA\w*\b|EXIT\b|CALL\b|RET\b|BSSY\b|BSYNC\b"),
)
_AMD_CLASSES = (
    ("tensor", r"v_(mfma|smfmac|wmma|swmmac)"),
    ("spill", r"scratch_(load|store)"),
    ("async_copy", r"(buffer|global)_load.*\blds\b"),
    ("load_16", r"(buffer|global|flat)_load_(dwordx4|b128)"),
    ("load", r"(buffer|global|flat)_load"),
    ("store_16", r"(buffer|global|flat)_store_(dwordx4|b128)"),
    ("store", r"(buffer|global|flat)_store"),
    ("atomic", r"(buffer|global|flat|ds)_(atomic|add|cmpst)"),
    ("shuffle", r"ds_b?permute|ds_swizzle|v_readlane|v_readfirstlane|v_permlane"),
    ("shared", r"ds_"),
    ("permute", r"v_perm_"),
    ("convert", r"v_cvt_"),
    ("float", r"v_(pk_)?(add|sub|mul|fma|max|min|mac|fmac|rcp|exp|log|sqrt|rsq|ldexp|rndne)_(legacy_)?f"),
    ("barrier", r"s_(barrier|waitcnt)"),
    ("branch", r"s_(c?branch|endpgm|setpc|swappc)"),
)
CLASSES = tuple(name for name, _ in _NVIDIA_CLASSES) + ("other",)

_NVIDIA = tuple((name, re.compile(pattern)) for name, pattern in _NVIDIA_CLASSES)
_AMD = tuple((name, re.compile(pattern)) for name, pattern in _AMD_CLASSES)


@dataclass(frozen=True)
class Instruction:
    """One instruction: where it stands, its opcode with modifiers, its operands."""

    address: int
    opcode: str
    operands: str = ""


@dataclass(frozen=True)
class Machine:
    """What the machine code of a kernel says.

    Attributes:
        registers: 32-bit registers of a thread (AMD: vector registers, accumulators included).
        spills: instructions that move registers to local memory and back; AMD: spilled registers, by its metadata.
        stack: bytes of local memory of a thread.
        shared: bytes of shared memory of a block, static and dynamic.
        warps: of a block.
        counts: instructions by class, of the whole kernel.
        loop: the same, of the main loop: the smallest loop with the most tensor-core instructions; without any, the
            longest loop.
        tensor: tensor-core opcodes and their number.
        columns: of tensor memory that a block takes (sm_100).
        wide, narrow: loads from global memory, asynchronous copies among them, by what one thread moves: 16 bytes or
            more (and bulk copies), or less.
        loop_wide: the wide ones of the main loop.
        loop_flops: operations (2 a multiplication with its sum) of the tensor cores in one turn of the main loop, for
            the whole block; as `aot` gives it, those that warps repeat are left out.
        instructions: of the whole kernel.
    """

    target: str
    registers: int
    spills: int
    stack: int
    shared: int
    warps: int
    instructions: int
    counts: dict[str, int] = field(default_factory=dict)
    loop: dict[str, int] = field(default_factory=dict)
    tensor: dict[str, int] = field(default_factory=dict)
    loop_flops: float = 0.0
    columns: int = 0
    wide: int = 0
    narrow: int = 0
    loop_wide: int = 0

    @property
    def loop_length(self) -> int:
        """Instructions of one turn of the main loop; 0 without a loop."""
        return sum(self.loop.values())

    @property
    def per_kflop(self) -> float:
        """Warp instructions of the main loop for 1000 tensor-core operations; infinity without any."""
        return 1000.0 * self.loop_length * self.warps / self.loop_flops if self.loop_flops else float("inf")


def read_sass(listing: str) -> list[Instruction]:
    """The instructions that `cuobjdump -sass` lists."""
    return [Instruction(int(a, 16), op, rest.strip()) for a, op, rest in _SASS.findall(listing)]


def read_gcn(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of AMD assembly, numbered, and the number at which each label stands."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        label = re.match(r"^([.\w$]+):", line)
        if label:
            labels[label[1]] = len(instructions)
        else:
            found = _GCN.match(line.split(";")[0])
            if found:
                instructions.append(Instruction(len(instructions), found[1], found[2].strip()))
    return instructions, labels


def classify(instruction: Instruction, amd: bool = False) -> str:
    """The class of an instruction: one of `CLASSES`."""
    text = f"{instruction.opcode} {instruction.operands}" if amd else instruction.opcode
    for name, pattern in _AMD if amd else _NVIDIA:
        if pattern.match(text):
            return name
    return "other"


def count(instructions: Iterable[Instruction], amd: bool = False) -> dict[str, int]:
    """Instructions by class; padding (NOP) is left out."""
    kinds = Counter(classify(i, amd) for i in instructions if i.opcode not in ("NOP", "s_nop"))
    return {name: kinds[name] for name in CLASSES if kinds[name]}


def main_loop(instructions: list[Instruction], labels: dict[str, int] | None = None) -> list[Instruction]:
    """The smallest loop with the most tensor-core instructions; the longest where none has any."""
    amd = labels is not None
    spans: list[tuple[int, int]] = []
    for instruction in instructions:
        start = _destination(instruction, labels)
        if start is not None and start < instruction.address:
            spans.append((start, instruction.address))
    best: list[Instruction] = []
    best_key = (0, 0)
    for start, end in spans:
        body = [i for i in instructions if start <= i.address <= end]
        tensor = sum(classify(i, amd) == "tensor" for i in body)
        key = (tensor, -len(body) if tensor else len(body))
        if not best or key > best_key:
            best, best_key = body, key
    return best


def _destination(instruction: Instruction, labels: dict[str, int] | None) -> int | None:
    """Where a branch goes; None for any other instruction."""
    if labels is not None:
        branch = instruction.opcode.startswith(("s_cbranch", "s_branch"))
        return labels.get(instruction.operands.strip()) if branch else None
    if not instruction.opcode.startswith("BRA"):
        return None
    found = _BRANCH.search(instruction.operands)
    return int(found[1], 16) if found else None


# -- operations of a tensor-core instruction -----------------------------------------------------

_MMA = re.compile(r"^[IHQODB]MMA\.(?:SF\.)?(?:SP\.)?(\d+)")
_GROUP_MMA = re.compile(r"^[IHQB]GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)")
_MFMA = re.compile(r"^v_(?:mfma|smfmac|wmma)_\w*?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?")
_SHAPES = {
    "884": (8, 8, 4), "1684": (16, 8, 4), "1688": (16, 8, 8), "16816": (16, 8, 16), "16832": (16, 8, 32),
    "16864": (16, 8, 64), "8816": (8, 8, 16), "8832": (8, 8, 32),
}  # fmt: skip
_KIND = {"UTCIMMA": ("i8", 32), "UTCHMMA": ("f16", 16), "UTCQMMA": ("f8f6f4", 32), "UTCOMMA": ("mxf4", 64)}


def tcgen05_shapes(ptx: str) -> dict[str, tuple[int, int]]:
    """Rows and columns of the tcgen05 products in PTX, by kind ("i8", "f16", ..), from their instruction descriptors.

    The descriptor holds N / 8 in bits 17 to 22 and M / 16 in bits 24 to 28 (PTX ISA 9, "instruction descriptor").
    """
    shapes: dict[str, tuple[int, int]] = {}
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+),\s*(-?\d+);", ptx))
    pattern = r"tcgen05\.mma\.cta_group::\d\.kind::(\w+)[.\w:]*\s+\[[^\]]*\],\s*[^,]+,\s*[^,]+,\s*(%r\d+|\d+)"
    for kind, descriptor in re.findall(pattern, ptx):
        value = int(constants.get(descriptor, descriptor if descriptor.isdigit() else "0"))
        if value:
            shapes[kind] = ((value >> 24 & 0x1F) * 16, (value >> 17 & 0x3F) * 8)
    return shapes


def operations(instruction: Instruction, warps: int, shapes: dict[str, tuple[int, int]] | None = None) -> float:
    """Operations of a tensor-core instruction, summed over the block of `warps` that executes it; 0 for any other."""
    opcode = instruction.opcode
    if found := _MMA.match(opcode):
        m, n, k = _SHAPES.get(found[1], (0, 0, 0))
        return 2.0 * m * n * k * warps
    if found := _GROUP_MMA.match(opcode):
        return 2.0 * int(found[1]) * int(found[2]) * int(found[3]) * warps / 4
    if found := _MFMA.match(opcode):
        return 2.0 * int(found[1]) * int(found[2]) * int(found[3]) * int(found[4] or 1) * warps
    for name, (kind, k) in _KIND.items():
        if opcode.startswith(name):
            rows, columns = next((v for n, v in (shapes or {}).items() if n.startswith(kind)), (0, 0))
            return 2.0 * rows * columns * k
    return 0.0


# -- whole kernels -------------------------------------------------------------------------------


def read_nvidia(
    target: str, listing: str, usage: str, shared: int, warps: int, ptx: str = "", columns: int = 0
) -> Machine:
    """A `Machine` from what `cuobjdump -sass` and `cuobjdump -res-usage` print."""
    body = read_sass(listing)
    loop = main_loop(body)
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)", usage)
    registers, stack, local = (int(found[1]), int(found[2]), int(found[4])) if found else (0, 0, 0)
    machine = _machine(target, body, loop, registers, stack + local, shared, warps, False, tcgen05_shapes(ptx))
    return replace(machine, columns=columns)


def read_amd(target: str, listing: str, shared: int, warps: int) -> Machine:
    """A `Machine` from AMD assembly with its metadata."""
    body, labels = read_gcn(listing)
    loop = main_loop(body, labels)

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", listing)
        return int(found[1]) if found else 0

    registers = max(metadata("vgpr_count"), metadata("agpr_count"))
    machine = _machine(target, body, loop, registers, metadata("private_segment_fixed_size"), shared, warps, True)
    spills = max(metadata("vgpr_spill_count"), machine.spills)
    return replace(machine, spills=spills)


def _machine(
    target: str, body: list[Instruction], loop: list[Instruction], registers: int, stack: int, shared: int, warps: int,
    amd: bool, shapes: dict[str, tuple[int, int]] | None = None,
) -> Machine:  # fmt: skip
    counts = count(body, amd)
    tensor = Counter(i.opcode for i in body if classify(i, amd) == "tensor")
    kinds = ("load", "load_16", "async_copy", "bulk_copy")
    loads = [i for i in body if classify(i, amd) in kinds]
    wide = sum(_is_wide(i, amd) for i in loads)
    loop_wide = sum(_is_wide(i, amd) for i in loop if classify(i, amd) in kinds)
    return Machine(
        target=target, registers=registers, spills=counts.get("spill", 0), stack=stack, shared=shared, warps=warps,
        instructions=sum(counts.values()), counts=counts, loop=count(loop, amd), tensor=dict(sorted(tensor.items())),
        loop_flops=sum(operations(i, warps, shapes) for i in loop), wide=wide, narrow=len(loads) - wide,
        loop_wide=loop_wide,
    )  # fmt: skip


def _is_wide(load: Instruction, amd: bool) -> bool:
    """Whether a load from global memory moves 16 bytes or more a thread, or is a bulk copy."""
    if amd:
        return bool(re.search(r"dwordx4|b128", load.opcode))
    return classify(load) == "bulk_copy" or bool(re.search(r"\.(128|256)(?!B)(\.|$)", load.opcode))
