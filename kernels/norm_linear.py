"""LayerNorm folded into the linear layer that reads it, and the row statistics for that.

    norm_linear:   y = activation(LN(x) W^T + b),  LN(x) = (x - mean) * rstd * g + beta
    linear_stats:  `linear` that returns the statistics of its output's rows too
    row_stats:     those of any rows, in a pass of their own

    LN(x) W^T + b = rstd * (x (g W)^T - mean * colsum(g W)) + (W beta + b)

x is `[..., K]`, weight `[N, K]`, g and beta `[K]`. The GEMM reads x as it is; mean and rstd enter in its epilogue. So
the normalised tensor is neither written nor read: 2*M*K*e bytes less for each LayerNorm, and one launch less. For
ViT-B/16 at batch 256 (M = 50432, K = 768, bf16) that is 155 MB a norm and 3.7 GB a forward of 24.

Statistics are `[2, ..., ceil(K / 64)]` fp32: the mean and the sum of squared deviations of each 64 columns, which the
epilogue of the GEMM that writes x computes of the rounded values (6 % of x's bytes in bf16) and `norm_linear` merges.
Keeping deviations from a group's own mean is what makes outlier channels harmless; a sum of squares would cancel.

g W, its column sums (of the rounded product, in fp32) and W beta + b are made by `fold`, which reads and writes W once.
Who knows that weights stay hands them over; otherwise they are made in each call. In fp32 nothing is folded, and two
kernels run: statistics no finer than what they normalise break the tolerance rule.

FLOPs: 2*M*N*K. Bytes of e-byte elements: (M*K + N*K + M*N) * e + statistics.

Source: the identity is algebra; LayerNorm is Ba, Kiros, Hinton (arXiv 1607.06450), equations 3 and 4.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._config import early
from ._launch import launch
from ._op import autocast, check_same_dtype, check_shape, check_tensors, flatten_rows, kernel_op
from ._triton import cdiv, next_power_of_2, tl, triton, wait_for_previous
from .epilogue import STATS_WIDTH, store_stats
from .gemm import launch_gemm
from .layer_norm import MAX_WIDTH, launch_config, launch_layer_norm, layer_norm_ref, norm_gradients
from .linear import check_linear, linear_backward, linear_gradients, linear_ref, linear_setup


def row_stats_ref(x: Tensor) -> Tensor:
    """The same function in torch's own calls; at least fp32."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    groups = cdiv(x.shape[-1], STATS_WIDTH)
    padded = F.pad(x, (0, groups * STATS_WIDTH - x.shape[-1])).unflatten(-1, (groups, STATS_WIDTH))
    inside = (torch.arange(groups * STATS_WIDTH, device=x.device) < x.shape[-1]).unflatten(0, (groups, STATS_WIDTH))
    mean = padded.sum(-1) / inside.sum(-1)
    apart = torch.where(inside, padded - mean[..., None], 0.0)
    return torch.stack((mean, apart.square().sum(-1)))


def linear_stats_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    """`(y, stats)` in torch's own calls."""
    y = linear_ref(x, weight, bias, activation, residual, scale, tf32)
    return y, row_stats_ref(y.detach())


def norm_linear_ref(
    x: Tensor,
    stats: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    tf32: bool,
    folded_weight: Tensor | None = None,
    colsum: Tensor | None = None,
    folded_bias: Tensor | None = None,
) -> Tensor:
    """The same function in torch's own calls, unfolded; `stats` are x's, so it has no need of them."""
    return linear_ref(layer_norm_ref(x, norm_weight, norm_bias, eps)[0], weight, bias, activation, None, None, tf32)


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["squares_ptr"])
def _row_stats_fwd_kernel(
    x_ptr,
    means_ptr,
    squares_ptr,
    n_rows,
    D,
    stride_xm,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < n_rows)[:, None] & (cols < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0)
    store_stats(x, means_ptr, squares_ptr, rows, 0, n_rows, D, WIDTH)


@dataclass(frozen=True)
class Folded:
    """What `norm_linear` computes with.

    Attributes:
        weight: `[N, K]` g W in the weight's dtype.
        colsum: `[N]` fp32, sums of its rows.
        bias: `[N]` fp32, W beta + b.
    """

    weight: Tensor
    colsum: Tensor
    bias: Tensor


def fold(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None
) -> Folded:
    """What `norm_linear` computes with, of a linear layer and the norm in front of it; new memory in every case.

    Args:
        weight: `[N, K]`, fp16, bf16 or fp32.
        bias: `[N]`, or None.
        norm_weight: `[K]`, or None for 1.
        norm_bias: `[K]`, or None for 0.
    """
    wide = weight.float()
    shift = torch.zeros_like(wide[:, 0]) if norm_bias is None else (wide * norm_bias.float()).sum(1)
    scaled = torch.empty_like(weight).copy_(wide if norm_weight is None else wide * norm_weight.float())
    return Folded(scaled, scaled.float().sum(1), shift if bias is None else shift + bias.float())


def _check_stats(op: str, stats: Tensor, x: Tensor) -> None:
    check_shape(op, "stats", stats, 2, *x.shape[:-1], cdiv(x.shape[-1], STATS_WIDTH))
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if stats.dtype != wanted:
        raise TypeError(f"{op}: 'stats' has dtype {stats.dtype}; expected {wanted}")


def _check_row_stats(x: Tensor) -> None:
    check_tensors("row_stats", x=x)
    if not x.shape or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"row_stats: 'x' has shape {list(x.shape)}; expected [..., D] with 1 <= D <= {MAX_WIDTH}")


def _check_norm_linear(
    x: Tensor,
    stats: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    tf32: bool,
    folded_weight: Tensor | None = None,
    colsum: Tensor | None = None,
    folded_bias: Tensor | None = None,
) -> None:
    check_linear(x, weight, bias, activation, None, None, tf32)
    check_tensors("norm_linear", x=x, stats=stats, norm_weight=norm_weight, norm_bias=norm_bias)
    _check_stats("norm_linear", stats, x)
    check_shape("norm_linear", "norm_weight", norm_weight, x.shape[-1])
    check_shape("norm_linear", "norm_bias", norm_bias, x.shape[-1])
    check_same_dtype("norm_linear", norm_weight=norm_weight, norm_bias=norm_bias)
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None and tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"norm_linear: '{name}' has dtype {tensor.dtype}; expected {x.dtype} (x's) or float32")
    if folded_weight is not None:
        check_shape("norm_linear", "folded.weight", folded_weight, *weight.shape)
        check_same_dtype("norm_linear", weight=weight, folded_weight=folded_weight)
        for name, tensor in (("folded.colsum", colsum), ("folded.bias", folded_bias)):
            check_shape("norm_linear", name, tensor, weight.shape[0])


def _empty_stats(x: Tensor, width: int) -> Tensor:
    return torch.empty((2, *x.shape[:-1], cdiv(width, STATS_WIDTH)), dtype=torch.float32, device=x.device)


@kernel_op("vitfast::row_stats", reference=row_stats_ref, check=_check_row_stats)
def _row_stats(x: Tensor) -> Tensor:
    stats = _empty_stats(x, x.shape[-1])
    if x.numel():
        rows, config = launch_config("row_stats", x, STATS_WIDTH)
        width, x = x.shape[-1], flatten_rows(x)
        launch(
            _row_stats_fwd_kernel,
            (cdiv(rows, config.block_m),),
            x_ptr=x,
            means_ptr=stats[0],
            squares_ptr=stats[1],
            n_rows=rows,
            D=width,
            stride_xm=x.stride(0),
            WIDTH=STATS_WIDTH,
            BLOCK_M=config.block_m,
            BLOCK_D=max(STATS_WIDTH, next_power_of_2(width)),
            EARLY=early(x.device),
            num_warps=config.num_warps,
        )
    return stats


@kernel_op("vitfast::linear_stats", reference=linear_stats_ref, check=check_linear)
def _linear_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    stats = _empty_stats(x, weight.shape[0])
    return launch_gemm(x, weight, bias, activation, residual, scale, tf32, y_stats=stats), stats


@kernel_op("vitfast::norm_linear", reference=norm_linear_ref, check=_check_norm_linear)
def _norm_linear(
    x: Tensor,
    stats: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    tf32: bool,
    folded_weight: Tensor | None = None,
    colsum: Tensor | None = None,
    folded_bias: Tensor | None = None,
) -> Tensor:
    if x.dtype == torch.float32:
        # the statistics are no finer than the tokens there: from a mean of ten deviations on, folding breaks the rule
        normed = launch_layer_norm(x, norm_weight, norm_bias, eps)[0]
        return launch_gemm(normed, weight, bias, activation, None, None, tf32)
    if folded_weight is None or colsum is None or folded_bias is None:
        ours = fold(weight, bias, norm_weight, norm_bias)
    else:
        ours = Folded(folded_weight, colsum, folded_bias)
    stats = stats.contiguous()
    return launch_gemm(
        x, ours.weight, ours.bias, activation, None, None, tf32, stats=stats, colsum=ours.colsum, eps=eps
    )


def _linear_stats_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(output[1])
    linear_setup(ctx, inputs, output)


def _linear_stats_backward(ctx: Any, dy: Tensor, dstats: Tensor | None) -> tuple[Any, ...]:
    return linear_backward(ctx, dy)


def _norm_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, _, norm_weight, norm_bias, eps, weight, bias, activation, *_ = inputs
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias)
    ctx.eps, ctx.activation = eps, activation


def _norm_linear_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, norm_weight, norm_bias, weight, bias = ctx.saved_tensors
    needs_x, _, needs_norm_weight, needs_norm_bias, _, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
    normed, mean, rstd = layer_norm_ref(x, norm_weight, norm_bias, ctx.eps)
    through_norm = needs_x or needs_norm_weight or needs_norm_bias
    needs = (through_norm, needs_weight, needs_bias, False)
    dnormed, dweight, dbias, _ = linear_gradients(dy, normed, weight, bias, None, ctx.activation, needs)
    dx = dnorm_weight = dnorm_bias = None
    if dnormed is not None:
        wanted = [needs_x, needs_norm_weight, needs_norm_bias]
        dx, dnorm_weight, dnorm_bias = norm_gradients(dnormed, x, mean, rstd, norm_weight, norm_bias, wanted)
    return dx, None, dnorm_weight, dnorm_bias, None, dweight, dbias, None, None, None, None, None


_linear_stats.op.register_autograd(_linear_stats_backward, setup_context=_linear_stats_setup)
_norm_linear.op.register_autograd(_norm_linear_backward, setup_context=_norm_linear_setup)


def row_stats(x: Tensor) -> Tensor:
    """Statistics of each row, in groups of 64 columns.

    Args:
        x: `[..., D]`, fp16, bf16 or fp32 (float64 on CPU), any strides, D at most 16384.

    Returns:
        `[2, ..., ceil(D / 64)]` fp32 (float64 of float64): each group's mean, and the sum of its squared deviations
        from that. They have no gradient.

    Raises:
        ValueError: x has no dimension or is too wide.
        TypeError: a dtype is not one of those above.
    """
    return _row_stats(x.detach())


def linear_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """`linear`, and the statistics of what it returns from the same pass.

    Args:
        x, weight, bias, activation, residual, scale, tf32: as in `linear`.

    Returns:
        `(y, stats)`: y as `linear` returns it, stats `[2, ..., ceil(N / 64)]` as `row_stats(y)`, without gradient.

    Raises:
        ValueError: a shape, device or activation does not fit.
        TypeError: a dtype does not fit.
    """
    x, weight, bias = autocast(x, weight, bias)
    return _linear_stats(x, weight, bias, activation, residual, scale, tf32)


def norm_linear(
    x: Tensor,
    stats: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    tf32: bool = False,
    folded: Folded | None = None,
) -> Tensor:
    """`activation(layer_norm(x) @ weight.T + bias)` without a normalised tensor.

    Args:
        x: `[..., K]`, fp16, bf16 or fp32 (float64 on CPU), any strides, K at most 16384.
        stats: of x, from `row_stats` or `linear_stats`, read where `folded` is. Others give wrong results there.
        norm_weight: `[K]` in x's dtype or fp32, or None for 1.
        norm_bias: `[K]` in the norm weight's dtype, or None for 0.
        eps: added to the variance in fp32.
        weight: `[N, K]` in x's dtype.
        bias: `[N]` in x's dtype, or None.
        activation: as in `linear`.
        tf32: as in `linear`.
        folded: `fold(weight, bias, norm_weight, norm_bias)`, of these very values; None: made in this call. It is read
            on a GPU in 16 bits alone, and gradients are those of the parameters.

    Returns:
        `[..., N]` in x's dtype, contiguous. Autocast changes nothing here.

    Raises:
        ValueError: a shape, device or activation does not fit.
        TypeError: a dtype does not fit.
    """
    made = (None, None, None) if folded is None else (folded.weight, folded.colsum, folded.bias)
    return _norm_linear(x, stats, norm_weight, norm_bias, eps, weight, bias, activation, tf32, *made)
