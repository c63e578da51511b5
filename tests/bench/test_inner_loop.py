"""What the prediction reads from assembly, on short loops written by hand."""
import pytest

from tests.bench.inner_loop import Instruction, inner_loop
from tests.bench.rates import MULTIPROCESSORS

SASS = """
        /*0000*/                   S2R R42, SR_TID.X ;
.L_x_1:
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0020*/                   IMMA.16832.S8.S8.SAT R8, R4.ROW, R5.COL, R8 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   MUFU.EX2 R8, R8 ;
.L_x_2:
        /*0050*/                   HMMA.16816.F32 R12, R8, R6, R12 ;
        /*0060*/                   HMMA.16816.F32 R12, R8, R7, R12 ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   IMMA.16832.S8.S8.SAT R8, R4.ROW, R5.COL, R8 ;
        /*0090*/                   EXIT ;
"""
AMDGCN = """
.LBB0_1:
\tds_load_b128 v[0:3], v9
\tv_wmma_i32_16x16x16_iu8 v[10:17], v[0:3], v[4:7], v[10:17]
\ts_cbranch_scc1 .LBB0_2
\tv_exp_f32 v1, v2
.LBB0_2:
\tv_wmma_f32_16x16x16_f16 v[20:27], v[0:7], v[8:15], v[20:27]
\ts_branch .LBB0_1
\ts_endpgm
"""


def test_inner_loop_of_sass():
    loop = inner_loop(SASS, block_q=32, block_k=8, dim=32, warps=2, lanes=32)
    assert loop.pairs == 1
    assert loop.products == {"IMMA.16832.S8.S8.SAT": 1, "HMMA.16816.F32": 2}
    assert loop.tensor == {"int8": 2 * 16 * 8 * 32, "fp16, fp32 sums": 2 * 2 * 16 * 8 * 16}
    assert (loop.instructions, loop.exponentials, loop.shared_bytes) == (7, 1, 512)


def test_a_loop_over_two_block_pairs_counts_for_one():
    loop = inner_loop(SASS, block_q=16, block_k=8, dim=32, warps=2, lanes=32)
    assert (loop.pairs, loop.instructions, loop.shared_bytes) == (2, 3.5, 256)


def test_inner_loop_of_amdgcn():
    loop = inner_loop(AMDGCN, block_q=16, block_k=16, dim=16, warps=1, lanes=32)
    assert loop.tensor == {"int8": 4096, "fp16, fp32 sums": 4096}
    assert (loop.instructions, loop.vector, loop.exponentials, loop.shared_bytes) == (6, 3, 1, 512)


def test_no_loop_with_both_products():
    with pytest.raises(ValueError, match="no loop"):
        inner_loop(SASS, block_q=64, block_k=64, dim=64, warps=2, lanes=32)


@pytest.mark.parametrize("opcode, product", [
    ("IMMA.16832.U8.S8", ("int8", 4096)), ("HMMA.16816.F16", ("fp16, fp16 sums", 2048)),
    ("QMMA.16832.F32.E4M3.E4M3", ("fp8, fp32 sums", 4096)), ("QMMA.16832.F16.E4M3.E4M3", ("fp8, fp16 sums", 4096)),
    ("IGMMA.64x128x32.S8.S8", ("int8", 64 * 128 * 32)), ("HGMMA.64x128x16.F32", ("fp16, fp32 sums", 64 * 128 * 16)),
    ("QGMMA.64x64x32.F32.E4M3.E4M3", ("fp8, fp32 sums", 64 * 64 * 32)), ("UTCIMMA", ("int8", 0)), ("FFMA", None),
    ("v_mfma_i32_32x32x16_i8", ("int8", 32 * 32 * 16)), ("v_wmma_f16_16x16x16_f16", ("fp16, fp16 sums", 4096))])
def test_products(opcode, product):
    assert Instruction(opcode, "").product == product


@pytest.mark.parametrize("opcode, lanes, bytes_moved", [
    ("LDSM.16.M88", 32, 128), ("LDSM.16.MT88.4", 32, 512), ("STS.128", 32, 512), ("LDS.U8", 32, 128), ("LDS", 32, 128),
    ("LDGSTS.E.BYPASS.128", 32, 512), ("LDG.E.128", 32, 0), ("ds_load_b128", 32, 512), ("ds_read2st64_b64", 64, 1024),
    ("ds_read_u16", 64, 256), ("ds_load_2addr_b64", 32, 512), ("buffer_load_b128", 32, 0)])
def test_shared_bytes(opcode, lanes, bytes_moved):
    assert Instruction(opcode, "").shared_bytes(lanes) == bytes_moved


def test_resident_thread_blocks():
    hopper, ada, cdna = (MULTIPROCESSORS[arch] for arch in ("sm90", "sm89", "gfx942"))
    assert hopper.resident(warps=4, registers=168, shared=50 << 10) == 3  # by registers
    assert hopper.resident(warps=4, registers=168, shared=100 << 10) == 2  # by shared memory
    assert hopper.resident(warps=8, registers=24, shared=0) == 8  # by warps
    assert ada.resident(warps=8, registers=255, shared=32 << 10) == 1
    assert cdna.resident(warps=4, registers=240, shared=16 << 10) == 2
