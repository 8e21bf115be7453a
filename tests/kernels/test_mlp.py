"""mlp: two linears, so what is tested is that they are put together as a ViT's MLP."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.kernels._cases import Lane, across_lanes, check
from tests.kernels._data import Case
from vitfast.kernels import INTERPRET, mlp


@across_lanes("mlp")
def test_numbers(case: Case, lane: Lane, through_op: None, poisoned: None) -> None:
    check(case, lane.device, lane.dtype)


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 replaces the reference on CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_cpu_it_is_torch(dtype: torch.dtype) -> None:
    shapes = ((2, 7, 13), (31, 13), (31,), (13, 31), (13,), (2, 7, 13), (13,))
    x, w1, b1, w2, b2, residual, scale = (torch.randn(shape).to(dtype) for shape in shapes)
    inner = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
    assert torch.equal(mlp(x, w1, b1, w2, b2), inner)
    assert torch.equal(mlp(x, w1, b1, w2, b2, residual=residual, scale=scale), residual + inner * scale)


def test_wrong_input_is_named() -> None:
    x, w1 = torch.zeros(2, 8), torch.zeros(16, 8)
    with pytest.raises(ValueError, match=r"activation 'relu'; expected one of none, gelu"):
        mlp(x, w1, None, w1.t(), None, activation="relu")
    with pytest.raises(ValueError, match=r"'x' has shape \[2, 16\] and 'weight' \[8, 15\]"):
        mlp(x, w1, None, torch.zeros(8, 15), None)
