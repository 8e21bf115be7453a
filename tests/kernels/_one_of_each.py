"""One case of every op in the interpreter and one compiled, for `make versions`: the lanes run all of them."""

from __future__ import annotations

import pytest
import torch

import vitfast.kernels
from tests.kernels._cases import CASES, FILES, Case, check
from tests.kernels._compiler import TARGETS, compiling


@pytest.mark.interpret
@pytest.mark.parametrize("case", [next(case for case in cases if case.interpret) for cases in CASES.values()], ids=str)
def test_interpreted(case: Case, through_op: None, poisoned: None) -> None:
    check(case, "cpu", torch.float32)


@pytest.mark.compile_only
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("case", [next(case for case in cases if case.real) for cases in CASES.values()], ids=str)
def test_compiles(case: Case, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case.arguments(torch.bfloat16, "meta", 256)
    with compiling(target, monkeypatch, *FILES) as compiled:
        getattr(vitfast.kernels, case.op)(**arguments)
    assert compiled, "nothing was launched"
    for kernel in compiled:
        assert kernel.shared <= TARGETS[target][1], f"{kernel.name}: {kernel.shared} bytes of shared memory"
