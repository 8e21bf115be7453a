"""norm_linear, linear_stats and row_stats: LayerNorm folded into the GEMM that reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests._close import assert_close
from tests.kernels._cases import Lane, across_lanes, check
from tests.kernels._data import Case, module
from vitfast.kernels import (
    INTERPRET,
    layer_norm,
    linear,
    linear_stats,
    norm_linear,
    row_stats,
)

FILE = module("norm_linear")
GEMM = module("gemm")
reference_lane = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 replaces the reference on CPU")


@across_lanes("row_stats", "linear_stats", "norm_linear")
def test_numbers(case: Case, lane: Lane, through_op: None, poisoned: None) -> None:
    check(case, lane.device, lane.dtype)


def _moments(stats: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and rstd by the definition, from groups."""
    sizes = torch.tensor([min(64, width - start) for start in range(0, width, 64)], dtype=stats.dtype)
    mean = (stats[0] * sizes).sum(-1) / width
    squares = (stats[1] + sizes * (stats[0] - mean[..., None]).square()).sum(-1)
    return mean, (squares / width + eps).rsqrt()


@pytest.mark.interpret
@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
def test_groups_hold_the_row_s_moments(width: int, poisoned: None) -> None:
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0)) + 100.0
    mean, rstd = _moments(row_stats(x).double(), width, 1e-6)
    torch.testing.assert_close(mean, x.double().mean(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd, (x.double().var(-1, correction=0) + 1e-6).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.interpret
@pytest.mark.parametrize("form", ["pointers", "split", "descriptors", "halves"])
def test_every_kernel_has_both_epilogues(form: str, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # two tiles of columns, the last one ragged, and several rounds of every loop
    config = {
        "pointers": GEMM.Config(16, 64, 16, 2, num_warps=4, num_stages=2),
        "split": GEMM.Config(16, 64, 16, 2, num_warps=4, num_stages=2, split_k=3),
        "descriptors": GEMM.Config(16, 64, 16, 2, num_warps=4, num_stages=2, tma=True),
        "halves": GEMM.Config(16, 128, 16, 2, num_warps=4, num_stages=2, tma=True, subtile=True),
    }[form]
    monkeypatch.setattr(GEMM, "arch", lambda device: 90)
    monkeypatch.setattr(GEMM, "heuristic", lambda *args: config)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, w1, residual = draw(2, 37, 72), draw(200, 72) / 8, draw(2, 37, 200)
    g, beta, w2, bias = draw(200), draw(200), draw(136, 200) / 14, draw(136)
    y, stats = linear_stats(x, w1, None, "none", residual)
    torch.testing.assert_close(y, residual + x @ w1.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats, FILE.row_stats_ref(y), rtol=1e-4, atol=1e-5)
    if INTERPRET:
        # the op itself folds in 16 bits alone, which would hide small errors
        made = FILE.fold(w2, bias, g, beta)
        norm = {"stats": stats, "colsum": made.colsum, "eps": 1e-5}
        z = GEMM.launch_gemm(y, made.weight, made.bias, "gelu", None, None, False, **norm)
    else:
        z = norm_linear(y, stats, g, beta, 1e-5, w2, bias, "gelu")
    wanted = F.gelu(F.linear(F.layer_norm(y, (200,), g, beta, 1e-5), w2, bias))
    torch.testing.assert_close(z, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("height", [0.0, 30.0, 400.0])
def test_folded_is_as_accurate_as_unfolded(height: float, dtype: torch.dtype, poisoned: None) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 192, generator=generator)
    x[:, [7, 100]] += height
    g, beta = torch.rand(192, generator=generator) + 0.5, torch.randn(192, generator=generator)
    weight, bias = torch.randn(96, 192, generator=generator) / 14, torch.randn(96, generator=generator)
    x, g, beta, weight, bias = (t.to(dtype) for t in (x, g, beta, weight, bias))
    folded = norm_linear(x, row_stats(x), g, beta, 1e-6, weight, bias)
    unfolded = linear(layer_norm(x, g, beta, 1e-6), weight, bias)
    wide = [t.double() for t in (x, g, beta, weight, bias)]
    truth = F.linear(F.layer_norm(wide[0], (192,), wide[1], wide[2], 1e-6), wide[3], wide[4])
    assert_close(folded, truth, unfolded)


def _folding_on_bf16(height: float) -> tuple[float, float]:
    """Root mean square errors of the folded and the unfolded form in bf16, fp32 sums, against float64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, 768, generator=generator)
    x[:, [7, 300, 511]] += height
    g, beta = torch.rand(768, generator=generator) + 0.5, torch.randn(768, generator=generator)
    weight = torch.randn(256, 768, generator=generator) / 768**0.5
    x, g, beta, weight = (t.bfloat16() for t in (x, g, beta, weight))
    wide = x.double()
    truth = F.layer_norm(wide, (768,), g.double(), beta.double(), 1e-6) @ weight.double().t()
    mean, rstd = wide.mean(1, keepdim=True), (wide.var(1, correction=0, keepdim=True) + 1e-6).rsqrt()
    ours = FILE.fold(weight, None, g, beta)
    product = (wide @ ours.weight.double().t()).float()
    folded = (rstd.float() * (product - mean.float() * ours.colsum) + ours.bias).bfloat16()
    normed = F.layer_norm(x.float(), (768,), g.float(), beta.float(), 1e-6).bfloat16()
    unfolded = (normed.double() @ weight.double().t()).bfloat16()
    return tuple((y.double() - truth).square().mean().sqrt().item() for y in (folded, unfolded))


@pytest.mark.parametrize("height", [0.0, 20.0, 100.0, 400.0])
def test_folding_is_accurate_in_bf16(height: float) -> None:
    # the interpreter has no bf16 dot: the arithmetic of the kernel, not the kernel
    folded, unfolded = _folding_on_bf16(height)
    assert folded <= 1.25 * unfolded, (folded, unfolded)


# what is made of the parameters


def _parameters() -> tuple[nn.Linear, nn.LayerNorm]:
    torch.manual_seed(0)
    norm = nn.LayerNorm(72)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return nn.Linear(72, 16), norm


@pytest.mark.parametrize("norm_weight", [False, True], ids=["no norm weight", "norm weight"])
@pytest.mark.parametrize("norm_bias", [False, True], ids=["no norm bias", "norm bias"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@torch.no_grad()
def test_fold(norm_weight: bool, norm_bias: bool, bias: bool) -> None:
    lin, norm = _parameters()
    given = (norm.weight if norm_weight else None, norm.bias if norm_bias else None)
    made = FILE.fold(lin.weight, lin.bias if bias else None, *given)
    torch.testing.assert_close(made.weight, lin.weight * norm.weight if norm_weight else lin.weight.clone())
    torch.testing.assert_close(made.colsum, made.weight.sum(1))
    shift = (lin.weight @ norm.bias if norm_bias else 0) + (lin.bias if bias else 0) + torch.zeros(16)
    torch.testing.assert_close(made.bias, shift)
    # memory of its own, whatever was left out: a parameter is nobody's fold
    parameters = {p.data_ptr() for p in (*lin.parameters(), *norm.parameters())}
    assert not parameters & {part.data_ptr() for part in vars(made).values()}


@pytest.mark.interpret
def test_folded_before_the_call(poisoned: None) -> None:
    lin, norm = (module.half() for module in _parameters())
    x = torch.randn(5, 72).half()
    made = FILE.fold(lin.weight, lin.bias, norm.weight, norm.bias)
    arguments = (x, row_stats(x), norm.weight, norm.bias, norm.eps, lin.weight, lin.bias)
    with torch.no_grad():
        torch.testing.assert_close(norm_linear(*arguments, folded=made), norm_linear(*arguments))
        if INTERPRET:
            # it is what is read
            made.weight.zero_()
            made.bias.fill_(2.0)
            made.colsum.zero_()
            twos = torch.full((5, 16), 2.0, dtype=torch.float16)
            torch.testing.assert_close(norm_linear(*arguments, folded=made), twos)


def test_a_fold_of_another_shape_is_refused() -> None:
    lin, norm = _parameters()
    x = torch.randn(5, 72)
    made = FILE.fold(lin.weight[:8], lin.bias[:8], norm.weight, norm.bias)
    with pytest.raises(ValueError, match=r"folded.weight.*\[8, 72\]; expected \[16, 72\]"):
        norm_linear(x, row_stats(x), norm.weight, norm.bias, norm.eps, lin.weight, lin.bias, folded=made)


@pytest.mark.interpret
def test_a_changed_weight_is_seen(poisoned: None) -> None:
    lin, norm = _parameters()
    x = torch.randn(5, 72)

    def ours() -> Tensor:
        return norm_linear(x, row_stats(x), norm.weight, norm.bias, norm.eps, lin.weight, lin.bias)

    with torch.no_grad():
        torch.testing.assert_close(ours(), lin(norm(x)), rtol=1e-4, atol=1e-4)
        norm.weight.neg_()
        torch.testing.assert_close(ours(), lin(norm(x)), rtol=1e-4, atol=1e-4)


def _t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"stats": _t(2, 3, 2)}, ValueError, r"'stats' has shape \[2, 3, 2\]; expected \[2, 3, 1\]"),
        ({"stats": _t(2, 3, 1, dtype=torch.float16)}, TypeError, r"'stats' has dtype torch\.float16; expected"),
        ({"norm_weight": _t(7)}, ValueError, r"'norm_weight' has shape \[7\]; expected \[8\]"),
        ({"norm_bias": _t(8, dtype=torch.float16)}, TypeError, r"'norm_bias' has dtype torch\.float16, but 'norm_w"),
        ({"weight": _t(5, 7)}, ValueError, r"'x' has shape \[3, 8\] and 'weight' \[5, 7\]; expected"),
        ({"activation": "relu"}, ValueError, r"activation 'relu'; expected one of none, gelu"),
    ],
)
def test_wrong_input_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"x": _t(3, 8), "stats": _t(2, 3, 1), "norm_weight": _t(8), "norm_bias": _t(8), "eps": 1e-6}
    with pytest.raises(error, match=message):
        norm_linear(**{**good, "weight": _t(5, 8), **arguments})


def test_too_wide_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"row_stats: 'x' has shape \[1, 16385\]; expected \[\.\.\., D\]"):
        row_stats(_t(1, 16385))


@reference_lane
def test_stats_have_no_gradient() -> None:
    x = torch.randn(3, 72, requires_grad=True)
    assert not row_stats(x).requires_grad
    y, stats = linear_stats(x, torch.randn(16, 72))
    assert y.requires_grad
    assert not stats.requires_grad
