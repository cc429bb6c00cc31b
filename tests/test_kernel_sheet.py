"""The kernel sheet: machine code read as text, occupancy, the model of bytes and operations, a real compilation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planish.codegen import aot_worker, configs, machine
from planish.codegen.aot import Failure, Job, compile_all, listing
from planish.codegen.chips import CHIPS, chip
from planish.codegen.cost import cost, least_size, step_operations, tile_order
from planish.codegen.kernel_spec import Activation, Branch, Kernel, Product, Step, Tensor, Weight
from planish.codegen.machine import Machine
from planish.codegen.sheet import HEAD, Line, cells, job, parameters, record, sheet, text
from planish.codegen.triton import emit_kernel
from planish.codegen.triton_body import Parameter
from planish.ir.errors import PlanishError

# -- machine code as text ------------------------------------------------------------------------

# Of cuobjdump -sass: one tensor-core instruction ahead of the loop, two in it, the spin at the end.
SASS = """
	code for sm_90a
		Function : kernel
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                                 /* 0x00000a00ff017b82 */
                                                                                          /* 0x000fe20000000800 */
        /*0010*/               @P0 LDGSTS.E.BYPASS.128 [R16], desc[UR8][R4.64] ;          /* 0x0000000004107fae */
        /*0020*/                   LDGSTS.E.LTC128B [R17], desc[UR8][R4.64], !P6 ;        /* 0x0000000004117fae */
        /*0030*/                   LDG.E.128 R8, desc[UR8][R4.64] ;                       /* 0x0000000804087981 */
        /*0040*/              @!P1 LDG.E.U16 R9, desc[UR8][R4.64] ;                       /* 0x0000000804097981 */
        /*0050*/                   IGMMA.64x128x32.S8.S8 R24, gdesc[UR4], R24 ;           /* 0x03600000041879f1 */
        /*0060*/                   STL [R1], R8 ;                                         /* 0x0000000801007387 */
        /*0070*/                   PRMT R8, R8, 0x5410, R9 ;                              /* 0x0000541008087816 */
        /*0080*/                   IGMMA.64x128x32.S8.S8 R24, gdesc[UR4], R24 ;           /* 0x03600000041879f1 */
        /*0090*/                   IGMMA.64x128x32.S8.S8 R24, gdesc[UR4], R24, gsb0 ;     /* 0x03600000041879f1 */
        /*00a0*/                   UTMALDG.2D [UR8], [UR4] ;                              /* 0x00000008040075b4 */
        /*00b0*/                   LDSM.16.M88.4 R4, [R2] ;                               /* 0x000000000204783b */
        /*00c0*/              @!P0 BRA 0x70 ;                                             /* 0xfffffff800fc8947 */
        /*00d0*/                   LDL.LU R8, [R1] ;                                      /* 0x0000000001087983 */
        /*00e0*/                   STG.E.128 desc[UR8][R2.64], R4 ;                       /* 0x0000000402007986 */
        /*00f0*/                   EXIT ;                                                 /* 0x000000000000794d */
        /*0100*/                   BRA 0x100;                                             /* 0xfffffffc00fc7947 */
        /*0110*/                   NOP;                                                   /* 0x0000000000007918 */
"""
USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function kernel:
  REG:103 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

GCN = """
kernel:                                 ; @kernel
; %bb.0:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	global_load_dwordx4 v[2:5], v[40:41], off
	buffer_load_dword v6, v1, s[4:7], 0 offen
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	v_mfma_i32_32x32x16_i8 v[16:31], v[64:65], v[36:37], v[16:31]
	v_mfma_f32_16x16x16_f16 v[0:3], v[64:65], v[36:37], v[0:3]
	ds_read_b64 v[70:71], v32
	s_cbranch_scc1 .LBB0_1
; %bb.2:
	v_perm_b32 v1, v2, v3, s4
	global_store_dwordx4 v[2:3], v[4:7], off
	s_endpgm
    .agpr_count:     16
    .private_segment_fixed_size: 12
    .vgpr_count:     76
    .vgpr_spill_count: 3
"""


def read() -> Machine:
    return machine.read_nvidia("sm_90", SASS, USAGE, shared=49152, warps=8)


def test_classes_of_a_listing() -> None:
    found = read()
    assert (found.registers, found.stack, found.shared, found.warps) == (103, 8, 49152, 8)
    assert found.spills == 2  # one store, one load
    assert found.tensor == {"IGMMA.64x128x32.S8.S8": 3}
    assert found.counts["async_copy"] == 2
    assert found.counts["bulk_copy"] == 1
    assert (found.counts["load_16"], found.counts["load"]) == (1, 1)
    assert found.counts["store_16"] == 1 and found.counts["permute"] == 1
    assert (found.wide, found.narrow) == (3, 2)  # LDGSTS .128, LDG .128 and the bulk copy; LDGSTS of 4 bytes, LDG of 2
    assert found.instructions == 17  # padding is not counted


def test_the_main_loop_has_the_tensor_cores() -> None:
    found = read()
    assert found.loop == {"tensor": 2, "bulk_copy": 1, "shared": 1, "permute": 1, "branch": 1}
    assert found.loop_length == 6
    assert found.loop_flops == 2 * (2 * 64 * 128 * 32) * 2  # two instructions, two groups of four warps
    assert found.per_kflop == pytest.approx(1000 * 6 * 8 / found.loop_flops)


def test_a_loop_without_tensor_cores_is_the_longest() -> None:
    body = [machine.Instruction(16 * i, "FADD", "") for i in range(9)]
    body[3] = machine.Instruction(48, "BRA", "0x20")
    body[8] = machine.Instruction(128, "BRA.U", "!UP0, 0x40")
    assert [i.address for i in machine.main_loop(body)] == [64, 80, 96, 112, 128]
    assert machine.main_loop(body[:2]) == []


def test_amd_assembly() -> None:
    found = machine.read_amd("gfx942", GCN, shared=32768, warps=4)
    assert (found.registers, found.spills, found.stack) == (76, 3, 12)
    assert found.tensor == {"v_mfma_f32_16x16x16_f16": 1, "v_mfma_i32_32x32x16_i8": 1}
    assert (found.wide, found.narrow) == (1, 1)
    assert found.loop == {"tensor": 2, "shared": 1, "branch": 1}
    assert found.loop_flops == 4 * 2 * (32 * 32 * 16 + 16 * 16 * 16)
    assert found.counts["permute"] == 1 and found.counts["store_16"] == 1


@pytest.mark.parametrize(
    ("opcode", "flops"),
    [
        ("IMMA.16832.S8.S8.SAT", 2 * 16 * 8 * 32 * 4),
        ("HMMA.16816.F32", 2 * 16 * 8 * 16 * 4),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8 * 4),
        ("HGMMA.64x256x16.F32", 2 * 64 * 256 * 16),
        ("v_mfma_f32_32x32x8_f16", 2 * 32 * 32 * 8 * 4),
        ("v_mfma_f32_4x4x4_16b_f16", 2 * 4 * 4 * 4 * 16 * 4),
        ("UTCIMMA", 2 * 128 * 64 * 32),
        ("UTCHMMA", 2 * 128 * 256 * 16),
        ("FFMA", 0),
    ],
)
def test_operations_of_an_instruction(opcode: str, flops: float) -> None:
    shapes = {"i8": (128, 64), "f16": (128, 256)}
    assert machine.operations(machine.Instruction(0, opcode), 4, shapes) == flops


def test_tcgen05_descriptors() -> None:
    ptx = """
	mov.b32 	%r46, 136316064;
	@%p12 tcgen05.mma.cta_group::1.kind::i8 [ %r258 + 0 ], %rd27, %rd28, %r46, %p11;
	@%p12 tcgen05.mma.cta_group::1.kind::f16 [ %r9 ], %rd1, %rd2, %r99, %p11;
    """
    assert machine.tcgen05_shapes(ptx) == {"i8": (128, 128)}  # the other descriptor is no constant


# -- chips ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "blocks"),
    [
        ("sm_80", 32, 4, 0, 16),  # 64 warps
        ("sm_80", 128, 4, 0, 4),  # 16 warps of 4096 registers
        ("sm_80", 129, 4, 0, 3),  # 4352 registers a warp: 3 for each scheduler
        ("sm_80", 255, 8, 0, 1),  # 2 for each scheduler
        ("sm_80", 32, 4, 40 * 1024, 4),  # 164 KiB by 41
        ("sm_90", 64, 8, 100 * 1024, 2),  # 228 KiB by 101
        ("sm_90", 64, 8, 228 * 1024, 0),  # more than a block may have
        ("sm_90", 256, 4, 0, 0),
        ("sm_89", 32, 4, 0, 12),  # 48 warps
        ("sm_120", 40, 1, 0, 24),  # 24 blocks at most
        ("gfx942", 128, 4, 0, 4),  # 4 wavefronts a SIMD
        ("gfx942", 129, 4, 0, 3),
        ("gfx942", 32, 4, 32 * 1024, 2),
        ("gfx942", 512, 8, 0, 0),  # one wavefront a SIMD, the block needs two
    ],
)
def test_resident_blocks(target: str, registers: int, warps: int, shared: int, blocks: int) -> None:
    of = chip(target)
    assert of.resident_blocks(registers, warps, shared) == blocks
    assert of.occupancy(registers, warps, shared) == blocks * warps / of.warps


def test_tensor_memory_limits_blocks() -> None:
    assert CHIPS["sm_100"].resident_blocks(64, 4, 16384, columns=256) == 2


def test_an_unknown_target() -> None:
    with pytest.raises(PlanishError) as error:
        chip("sm_91")
    assert str(error.value).splitlines()[0] == (
        "target 'sm_91': unknown; expected one of sm_80, sm_89, sm_90, sm_100, sm_120, gfx942"
    )


# -- bytes and operations ------------------------------------------------------------------------


def gemm(k: int = 4096, n: int = 4096, **changes: object) -> Kernel:
    """W8A8 by token, half of a model's float."""
    tensors = (
        Tensor("a", "i8", ("M", -(-k // 64) * 64), "input"), Tensor("a_scale", "f32", ("M",), "input"),
        Tensor("weight", "i8", (n, -(-k // 64) * 64), "weight"), Tensor("weight_scale", "f32", (n,), "weight"),
        Tensor("out", "float", ("M", n), "output"),
    )  # fmt: skip
    values: dict[str, object] = {
        "activation": Activation("codes", "a", 8, "token", scale="a_scale"),
        "products": (Product(Weight("int8", "weight", "weight_scale"), "out"),),
        "tensors": tensors,
    }
    return Kernel("gemm", k, n, **{**values, **changes})  # type: ignore[arg-type]


TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "GROUP_M": 8}


def test_a_gemm_whose_operands_stay_in_the_cache() -> None:
    found = cost(gemm(), 2048, TILE, chip("sm_89"))
    least = 2048 * 4096 + 4 * 2048 + 4096 * 4096 + 4 * 4096 + 2 * 2048 * 4096
    assert (found.least, found.moved, found.cached) == (least, least, 0)
    assert found.operations["int8"] == found.useful["int8"] == 2 * 2048 * 4096 * 4096


def test_a_gemm_whose_weight_does_not_stay() -> None:
    """Two groups of 8 row blocks sweep a weight of 90 MB: it comes from DRAM twice, the activation once a group."""
    found = cost(gemm(k=4096, n=22016), 2048, TILE, chip("sm_90"))
    weight = 22016 * (4096 + 4)
    assert found.moved - found.least == weight
    assert found.ratio > 1.4
    whole = cost(gemm(k=4096, n=22016), 2048, TILE | {"GROUP_M": 16}, chip("sm_90"))
    assert whole.moved == whole.least


def test_padded_tiles_and_codes() -> None:
    """One row in a tile of 16, 100 columns in codes padded to 128: issued and moved, not useful and not least."""
    found = cost(gemm(k=100, n=256), 1, {"BLOCK_M": 16, "BLOCK_N": 128}, chip("sm_80"))
    assert found.useful["int8"] == 2 * 256 * 100
    assert found.operations["int8"] == 2 * 16 * 256 * 128
    assert found.least == 100 + 4 + 256 * 100 + 4 * 256 + 2 * 256
    assert found.moved == 128 + 4 + 256 * 128 + 4 * 256 + 2 * 256


def test_packed_codes() -> None:
    codes = Tensor("weight", "i8", (256, 64), "weight", packed=2)
    assert least_size(codes, 1, "f16", 100) == 256 * 50
    assert least_size(codes, 1, "f16", 128) == 256 * 64


def test_partial_sums_stay_in_the_cache_or_are_moved() -> None:
    split = {"BLOCK_M": 16, "BLOCK_N": 64, "SPLIT_K": 2}
    found = cost(gemm(), 16, split, chip("sm_90"))  # 128 blocks on 132 multiprocessors
    assert found.cached == 2 * 4 * 2 * 16 * 4096
    assert found.moved == found.least
    late = cost(gemm(n=22016), 16, split, chip("sm_90"))  # the weight streams through between the parts
    assert late.cached == 0 and late.moved == late.least + 2 * 4 * 2 * 16 * 22016


def test_rows_of_closing_steps_stay_in_the_cache_or_are_moved() -> None:
    whole = (*gemm().tensors, Tensor("whole", "float", ("M", 4096), "scratch"))
    close = (Step("quantize_token", ("whole",), ("codes", "scale")),)
    kernel = gemm(tensors=whole, closing=close)
    found = cost(kernel, 512, TILE, chip("sm_89"))
    assert found.moved == found.least and found.cached == 2 * 2 * 512 * 4096
    found = cost(kernel, 512, TILE, chip("sm_80"))  # 16 MB of weight and 4 MB of results pass by
    assert found.moved == found.least + 2 * 2 * 512 * 4096 and found.cached == 0


def test_branches_and_two_products() -> None:
    product = Product(Weight("int8", "weight", "weight_scale"), "a0", (Branch("left", "up", 20),))
    found = cost(gemm(products=(product, product)), 128, TILE, chip("sm_90"))
    assert found.useful["int8"] == 2 * (2 * 128 * 4096 * 4096)
    assert found.useful["f16"] == 2 * (2 * 128 * 4096 * 20)
    assert found.operations["f16"] == 2 * (2 * 128 * 4096 * 32)  # the rank is padded to 16s


def test_the_order_of_tiles() -> None:
    assert list(tile_order(3, 2, 2)) == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (2, 0, 0), (2, 1, 0)]
    assert list(tile_order(1, 2, 1, 2)) == [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]


PROLOGUE = Kernel(
    "prologue", 256, 0,
    (
        Tensor("x", "float", ("M", 256), "input"), Tensor("gain", "f32", (256,), "weight"),
        Tensor("down", "float", (32, 256), "weight"), Tensor("codes", "i8", ("M", 256), "output"),
        Tensor("scale", "f32", ("M",), "output"), Tensor("left", "float", ("M", 32), "output"),
    ),
    (
        Step("rms_norm", ("x", "gain", ""), ("v",), (("eps", 1e-6),)),
        Step("down", ("v", "down"), ("left",), (("rank", 32),)),
    ),
    row="x",
)  # fmt: skip


def test_a_prologue() -> None:
    found = cost(PROLOGUE, 10, {"BLOCK_M": 16}, chip("sm_90"))
    assert found.least == found.moved == 10 * (512 + 256 + 4 + 64) + 4 * 256 + 64 * 256
    assert found.useful["f16"] == 2 * 10 * 256 * 32
    assert found.operations["f16"] == 2 * 16 * 256 * 32
    assert step_operations(Step("hadamard", ("x", "", ""), ("v",), (("block", 64),)), 256) == 256 * 7


def test_roofline_time() -> None:
    found = cost(gemm(), 1, {"BLOCK_M": 16, "BLOCK_N": 64}, chip("sm_90"))
    assert found.bound(chip("sm_90")) == "bytes"
    assert found.seconds(chip("sm_90")) == found.moved / 3.35e12
    many = cost(gemm(), 2048, TILE, chip("sm_90"))
    assert many.bound(chip("sm_90")) == "int8"
    assert many.seconds(chip("sm_90")) == 2 * 2048 * 4096 * 4096 / 1979e12


# -- configurations ------------------------------------------------------------------------------


def test_classes_of_kernels() -> None:
    assert configs.class_of(gemm()) == "gemm int8 int8 channel"
    assert configs.class_of(PROLOGUE) == "prologue 256 down"
    four = Product(Weight("int4", "weight", "weight_scale", group=128), "out", (Branch("left", "up", 32),))
    assert configs.class_of(gemm(products=(four, four))) == "gemm int8 int4 group x2 branch g128"


def test_what_is_not_known_of_a_class_is_taken_from_a_wider_one(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {"16": {"BLOCK_M": 16}, "64": {"BLOCK_M": 32}, "None": {"BLOCK_M": 128}}
    data = {"sm_90": {"gemm": wide, "gemm int8": {"None": {"BLOCK_M": 256}}, "gemm int8 int8 channel": {"64": {}}}}
    monkeypatch.setattr(configs, "_data", lambda: data)
    found = ((16, {"BLOCK_M": 16}), (64, {}), (None, {"BLOCK_M": 256}))
    assert configs.launches(gemm(), "sm_90") == found
    assert configs.launches(PROLOGUE, "sm_90") == ()


def test_parts_of_k_run_at_once_and_have_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"BLOCK_M": 16, "BLOCK_N": 64, "SPLIT_K": 8}
    monkeypatch.setattr(configs, "_data", lambda: {"sm_90": {"gemm": {"16": entry}}})
    for n, k, split in ((1024, 4096, 8), (4096, 4096, 4), (11008, 4096, 2), (32000, 4096, 1), (1024, 512, 2)):
        assert configs.launch(gemm(k, n), "sm_90", 1)["SPLIT_K"] == split
    entry["resident"] = 1  # large blocks: fewer at once
    for n, split in ((1024, 8), (4096, 2), (11008, 1)):
        found = configs.launch(gemm(4096, n), "sm_90", 1)
        assert found["SPLIT_K"] == split and "resident" not in found


def test_every_target_has_launch_parameters_for_every_number_of_rows() -> None:
    for target in configs.TARGETS:
        for rows in (1, 16, 17, 64, 65, 100000):
            found = configs.launch(gemm(), target, rows)
            assert {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"} <= set(found), (target, rows)
        assert configs.launch(gemm(), target, 16)["BLOCK_M"] == 16
    assert configs.launch(gemm(), "sm_70", 1) == {}


def test_launch_parameters_that_do_not_fit_are_left_to_the_default() -> None:
    parameters = (
        Parameter("BLOCK_K", 64, "BLOCK_K in (64,)", "columns at a time"),
        Parameter("BLOCK_M", 64, "BLOCK_M in (16, 64, 128) and BLOCK_M % ROWS == 0", "rows"),
        Parameter("ROWS", 4, "ROWS in (1, 2, 4)", "rows at a time"),
    )
    wanted = {"BLOCK_K": 128, "BLOCK_M": 128, "SPLIT_K": 2, "num_warps": 8}
    assert configs.fitting(wanted, parameters) == {"BLOCK_K": 64, "BLOCK_M": 128, "ROWS": 4, "num_warps": 8}
    assert configs.fitting({}, parameters) == {"BLOCK_K": 64, "BLOCK_M": 64, "ROWS": 4}


# -- lines of the sheet --------------------------------------------------------------------------

FILE = """
import triton
import triton.language as tl
from dataclasses import dataclass

SIGNATURE = {"x_ptr": "*i8", "out_ptr": "*fp32", "M": "i32"}


@dataclass(frozen=True)
class Launch:
    BLOCK_M: int = 64  # rows
    num_warps: int = 4
    num_stages: int = 3


WIDTH = tl.constexpr(64)


def reference(x: torch.Tensor) -> torch.Tensor:
    return x.float() @ x.float().T


@triton.jit
def kernel(x_ptr, out_ptr, M, BLOCK_M: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, WIDTH)
    x = tl.load(x_ptr + rows[:, None] * WIDTH + columns[None, :], mask=rows[:, None] < M, other=0)
    products = tl.dot(x, tl.trans(x))
    at = rows[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    tl.store(out_ptr + at, products.to(tl.float32), mask=rows[:, None] < M)
"""


def test_the_job_of_an_emitted_file() -> None:
    made = job(FILE, "sm_90", {"BLOCK_M": 128, "num_warps": 8, "SPLIT_K": 4})
    assert made.constants == {"BLOCK_M": 128}  # a parameter that the kernel does not have is left out
    assert (made.warps, made.stages, made.kernel) == (8, 3, "kernel")
    assert "torch" not in made.source and "reference" not in made.source and "WIDTH = tl.constexpr(64)" in made.source
    assert parameters(made) == {"BLOCK_M": 128, "num_warps": 8, "num_stages": 3}
    with pytest.raises(ValueError, match="expected SIGNATURE, Launch and kernel"):
        job("x = 1", "sm_90", {})


def line(found: Machine | None, **changes: object) -> Line:
    launch = {"BLOCK_M": 128, "BLOCK_N": 128, "GROUP_M": 8}
    values: dict[str, object] = {
        "name": "gemm_0123456789", "kernel": gemm(), "count": 2, "target": "sm_90", "rows": 2048, "launch": launch,
        "machine": found, "reason": "" if found else "boom", "cost": cost(gemm(), 2048, launch, chip("sm_89")),
    }  # fmt: skip
    return Line(**{**values, **changes})  # type: ignore[arg-type]


GOOD = Machine("sm_90", 100, 0, 0, 49152, 8, 500, {"tensor": 4, "async_copy": 4}, {"tensor": 4, "other": 46},
               {"IGMMA.64x128x32.S8.S8": 4}, 2.0 * 128 * 128 * 64, 0, 8, 0)  # fmt: skip


def test_a_line_without_problems() -> None:
    found = line(GOOD)
    assert found.problems == ()
    assert found.resident == 2 and found.occupancy == 0.25
    turns = 4096 / 64
    assert found.instructions == 16 * 32 * 8 * (500 + 50 * (turns - 1))
    shown = dict(zip(HEAD, cells(found), strict=True))
    assert shown["tensor cores"] == "4 IGMMA" and shown["16-byte loads"] == "8 of 8" and shown["spills"] == "0"
    assert "modelled, not timed" in text([found])
    assert json.loads(json.dumps(record(found)))["ratio"] == 1.0
    assert text([]) == "no kernels"


def test_problems_of_a_line() -> None:
    bad = Machine("sm_90", 255, 12, 64, 300000, 8, 500)
    slow = cost(gemm(n=22016), 2048, TILE, chip("sm_90"))
    problems = line(bad, cost=slow).problems
    assert problems[0] == "12 spills"
    assert problems[1] == "does not fit: 255 registers, 300000 bytes of shared memory"
    assert problems[2:4] == ("no tensor-core instruction", "no 16-byte load")
    assert problems[4].endswith("of the least possible bytes")
    assert line(None).problems == ("does not compile: boom",)
    assert "boom" in text([line(None)])


def test_products_that_warps_repeat() -> None:
    """Eight warps on a tile of 16 x 64, all of them along its rows: each computes the whole tile."""
    ir = """
#mma = #ttg.amd_mfma<{version = 3, warpsPerCTA = [8, 1], instrShape = [16, 16, 16], isTransposed = true}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [1, 8], instrShape = [16, 8]}>
    %acc = tt.dot %a, %b, %c : tensor<16x128xf16, #ttg.dot_op<{opIdx = 0, parent = #mma}>> -> tensor<16x64xf32, #mma>
"""
    assert aot_worker.repeats(ir) == 8
    assert aot_worker.repeats(ir.replace("64xf32, #mma>", "64xf32, #mma1>")) == 1
    assert aot_worker.repeats(ir.replace("64xf32, #mma>", "32xf32, #mma1>")) == 2
    assert aot_worker.repeats("tensor<16x64xf32>") == 1


# -- a real compilation --------------------------------------------------------------------------


def test_compilation_for_chips_that_are_not_here(tmp_path: Path) -> None:
    jobs = [job(FILE, target, {}) for target in ("sm_90", "gfx942")]
    jobs.append(Job(jobs[0].source, "missing", {}, {}, "sm_90"))
    tile = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "SPLIT_K": 1, "num_warps": 8}
    jobs.append(job(emit_kernel(gemm(k=2048, n=256)).text, "gfx942", tile))
    first, amd, failed, small = compile_all(jobs, cache=tmp_path)
    assert isinstance(first, Machine) and isinstance(amd, Machine)
    assert first.counts["tensor"] > 0 and first.spills == 0 and 0 < first.registers < 255 and first.wide > 0
    assert any(op.startswith("v_mfma_i32") for op in amd.tensor) and amd.registers > 0
    assert isinstance(failed, Failure) and "missing" in failed.reason
    assert isinstance(small, Machine)
    whole = machine.read_amd("gfx942", listing(jobs[3], tmp_path), small.shared, small.warps)
    steps = small.loop_flops / (2 * 16 * 32 * 128)
    assert steps >= 1 and steps == int(steps) and whole.loop_flops > small.loop_flops  # the tile is work for two warps
    assert "MMA" in listing(jobs[0], tmp_path)
    assert compile_all(jobs[:2], cache=tmp_path, python="/nowhere/python") == [first, amd]  # from the cache
    with pytest.raises(FileNotFoundError, match="not compiled yet"):
        listing(job(FILE, "sm_80", {}), tmp_path)


def test_the_sheet_of_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path))
    kernel = gemm(k=256, n=128)
    [found] = sheet([kernel, kernel], "sm_90", (16,))
    assert found.machine is not None, found.reason
    assert (found.count, found.rows, found.launch["BLOCK_M"]) == (2, 16, 16)
    assert found.machine.spills == 0 and found.machine.tensor and found.resident > 0
    assert found.cost.least == 16 * 256 + 4 * 16 + 128 * 256 + 4 * 128 + 2 * 16 * 128
    assert (tmp_path / "aot").is_dir()


def test_rows_that_are_no_numbers() -> None:
    from planish.report.kernels import sheet_of

    for rows in ("", "1,x", "0", "1,,2", "-3"):
        with pytest.raises(PlanishError) as error:
            sheet_of(None, "sm_90", rows)  # type: ignore[arg-type]
        assert str(error.value) == f"option --rows: expected positive numbers separated by commas, got '{rows}'"
