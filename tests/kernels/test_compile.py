"""The compile lane: what every op launches is compiled for GPUs that are not there, and the machine code is read.

All real sizes are compiled for sm_80 and sm_90, a core of them and all attention sizes for the other targets. Batches are 256
(and 1, where the size of the problem chooses another kernel); the tensors have no memory.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vitfast.kernels
from tests.kernels._cases import ATTENTION_QKV, CASES, FILES, OPS, Case, module
from tests.kernels._compiler import TARGETS, Compiled, compiling, disassemble, meta
from tests.kernels._ranges import overflows

pytestmark = pytest.mark.compile_only

SPILL_BUDGET = 0
"""Bytes of stack a thread may use; the config that needs more must show a measured gain."""

# what multiplies fp16 and bf16 matrices, in PTX or AMD assembly
TENSOR_CORES = {
    "sm_80": r"mma\.sync",
    "sm_86": r"mma\.sync",
    "sm_89": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async",
    "sm_100": r"tcgen05\.mma",
    "sm_120": r"mma\.sync",
    "gfx942": r"v_mfma_",
}
ANY_TENSOR_CORE = r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma_"
# the same in NVIDIA's machine code
TENSOR_CORES_SASS = {
    "sm_80": r"\bHMMA\.",
    "sm_86": r"\bHMMA\.",
    "sm_89": r"\bHMMA\.",
    "sm_90": r"\bHGMMA\.",
    "sm_100": r"\bUTCHMMA",
    "sm_120": r"\bHMMA\.",
}
# a load of 16 bytes by one thread: to registers, to shared memory, or a tile by the copy engine
WIDE_LOADS = (
    r"ld\.global[\w.:]*\.(v4\.b32|v2\.b64)|cp\.async\.cg\.shared\.global[^;]*, 0x10|cp\.async\.bulk\.tensor"
    r"|(buffer|global)_load_dwordx4"
)
PIPELINED_LOADS = r"cp\.async\.c[ag]\.shared|cp\.async\.bulk\.tensor"


def launch(target: str, monkeypatch: pytest.MonkeyPatch, case: Case, dtype: torch.dtype, batch: int) -> list[Compiled]:
    """What a case's call launches on `target`."""
    arguments = case.arguments(dtype, "meta", batch)
    with compiling(target, monkeypatch, *FILES) as compiled:
        getattr(vitfast.kernels, case.op)(**arguments)
    assert compiled, "nothing was launched"
    return compiled


def plan() -> list[Any]:
    """`(case, target, dtype, batch)` of this lane."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    chosen: dict[tuple[str, str, torch.dtype, int], Case] = {}

    def add(cases: list[Case], target: str, dtype: torch.dtype, batch: int) -> None:
        chosen.update({(str(case), target, dtype, batch): case for case in cases})

    every = [case for op in OPS for case in CASES[op]]
    real = [case for case in every if case.real]
    core = [case for case in real if case.core]
    for target in ("sm_80", "sm_90"):
        add(real, target, bf16, 256)
        # one image gives a GEMM too few tiles for a large GPU, and so another config
        add([case for case in real if case.op in ("linear", "patch_embed")], target, bf16, 1)
        add([case for case in real if case.core or case.op == "attention_qkv"], target, fp32, 256)
        add(core, target, fp16, 256)
    # odd sizes and layouts, with their unaligned loads
    add([case for case in every if not case.real], "sm_90", bf16, 2)
    for target in ("sm_86", "sm_89", "sm_100", "sm_120", "gfx942"):
        add(core, target, bf16, 256)
        add(core, target, fp16, 256)
        add(core, target, fp32, 256)
    # registers are tightest in attention
    for target in ("sm_86", "sm_100", "sm_120"):
        add(ATTENTION_QKV, target, bf16, 256)
    return [
        pytest.param(case, target, dtype, batch, id=f"{name}-{target}-{str(dtype)[6:]}-batch{batch}")
        for (name, target, dtype, batch), case in chosen.items()
    ]


def check_resources(kernel: Compiled, target: str) -> None:
    limit = TARGETS[target][1]
    assert kernel.shared <= limit, f"{kernel.name}: {kernel.shared} bytes of shared memory; {target} has {limit}"
    assert kernel.spills <= SPILL_BUDGET, (
        f"{kernel.name}: {kernel.spills} bytes of stack a thread ({kernel.registers} registers); allowed {SPILL_BUDGET}"
    )


def check_tensor_cores(kernel: Compiled, target: str, dtype: torch.dtype) -> None:
    """fp16 and bf16 dots run on the tensor cores, exact fp32 ones must not."""
    if dtype == torch.float32:
        assert not re.search(ANY_TENSOR_CORE, kernel.assembly), f"{kernel.name}: exact fp32 on tensor cores"
        assert re.search(r"fma\.rn(\.ftz)?\.f32|v_(pk_)?fmac?_f32", kernel.assembly), f"{kernel.name}: no fused multiply-add"
        return
    wanted = TENSOR_CORES[target]
    if target in ("sm_90", "sm_100") and kernel.arguments["BLOCK_M"] < 64:
        # 64 rows are the least that the asynchronous instructions take
        wanted = TENSOR_CORES["sm_80"]
    assert re.search(wanted, kernel.assembly), f"{kernel.name} on {target}: no {wanted}"


@pytest.mark.parametrize(("case", "target", "dtype", "batch"), plan())
def test_compiles(
    case: Case, target: str, dtype: torch.dtype, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernel in launch(target, monkeypatch, case, dtype, batch):
        check_resources(kernel, target)
        if case.dot:
            check_tensor_cores(kernel, target, dtype)
        if case.real:
            assert re.search(WIDE_LOADS, kernel.assembly), f"{kernel.name} on {target}: no 16-byte load"
