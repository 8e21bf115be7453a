"""No kernel for Hopper reads a uniform register that may not have been written."""

from __future__ import annotations

import pytest
import torch

from tests.kernels._compiler import compiling, meta
from tests.kernels._data import FILES, module
from tests.kernels._sass import check_uniform_registers, shares_descriptors, unwritten
from vitfast.kernels import attention

FILE = module("attention")

LOOP = """
        /*0000*/                   UMOV UR4, 0x400 ;
        /*0010*/                   R2UR UR8, R2 ;
        /*0020*/              @!P0 BRA 0x50 ;
        /*0030*/                   UIADD3 UR6, UP0, UR4, 0x20, URZ ;
        /*0040*/                   UIADD3.X UR7, UR8, -0x3ffffff0, URZ, UP0, !UPT ;
        /*0050*/                   HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4].tnspB, R24 ;
        /*0060*/               @P1 BRA 0x30 ;
        /*0070*/                   EXIT ;
"""


def test_what_one_path_leaves_unwritten_is_found() -> None:
    # the branch leaves out what writes UR6 and UR7
    (found,) = unwritten(LOOP)
    assert found.startswith("HGMMA")
    assert unwritten(LOOP.replace("BRA 0x50", "BRA 0x30")) == []
    # the loop's own write comes too late for its first round
    before = LOOP.replace("BRA 0x50", "BRA 0x30").replace("UR6, UP0, UR4", "UR6, UP0, UR6")
    (found,) = unwritten(before)
    assert found.startswith("UIADD3 UR6, UP0, UR6")


def test_descriptors_of_two_shapes_are_found() -> None:
    ptx = "wgmma.mma_async.sync.aligned.m64n{}k16.f32.bf16.bf16 {{%r1}}, %rd1, %rd2, %p1, 1, 1, 0, 0;\n"
    assert not shares_descriptors(ptx.format(64) * 2)
    assert shares_descriptors(ptx.format(64) + ptx.format(16))


@pytest.mark.compile_only
@pytest.mark.parametrize("tokens", [50, 131])
@pytest.mark.parametrize("d", [36, 72, 80, 88])
def test_tails_of_rows_that_are_not_aligned(d: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # such rows reach shared memory by way of registers, where their tiles may follow one another in one place
    q = meta(2, 3, tokens, d + 1, dtype=torch.bfloat16)[..., :d]
    with compiling("sm_90", monkeypatch, *FILES) as compiled:
        attention(q, q, q)
    (kernel,) = compiled
    assert kernel.arguments["D_TAIL"] > 0
    check_uniform_registers(kernel)
