"""One case of every op in the interpreter and one compiled of every file, for `make versions`: the lanes run all."""

from __future__ import annotations

import pytest
import torch

import vitfast.kernels
from tests.kernels._cases import CASES, check
from tests.kernels._compiler import TARGETS, compiling
from tests.kernels._data import FILES, Case

# an op for each file of kernels
COMPILED = ("layer_norm", "linear", "norm_linear", "attention_qkv", "window_attention", "patch_embed")


@pytest.mark.interpret
@pytest.mark.parametrize("case", [next(case for case in cases if case.interpret) for cases in CASES.values()], ids=str)
def test_interpreted(case: Case, through_op: None, poisoned: None) -> None:
    check(case, "cpu", torch.float32)


@pytest.mark.compile_only
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("case", [next(case for case in CASES[op] if case.real) for op in COMPILED], ids=str)
def test_compiles(case: Case, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case.arguments(torch.bfloat16, "meta", 256)
    with compiling(target, monkeypatch, *FILES) as compiled:
        getattr(vitfast.kernels, case.op)(**arguments)
    assert compiled, "nothing was launched"
    for kernel in compiled:
        assert kernel.shared <= TARGETS[target][1], f"{kernel.name}: {kernel.shared} bytes of shared memory"
