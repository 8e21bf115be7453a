"""LayerNorm over the last dimension, alone and behind a residual addition.

    layer_norm:      y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    add_layer_norm:  s = residual + scale * x,  y = layer_norm(s);  both s and y are returned

x, residual, s, y are `[..., D]`; weight, bias and scale (LayerScale) are `[D]`. Statistics are fp32 whatever the
dtype, kept for the backward as `[..., 1]`. In `add_layer_norm` the sum is rounded once, to its own dtype, and
the norm is taken of the rounded sum, as the unfused pair of calls does.

Fused: one read and one write of the row; both passes over it (mean, then centred variance) stay in registers.
Bytes per row of D elements of e bytes: 2*D*e for layer_norm, 4*D*e for add_layer_norm (unfused: 6*D*e with the
LayerScale folded away, 8*D*e with it). FLOPs: about 8*D, so both are bound by memory on every GPU.

Source: Ba, Kiros, Hinton, "Layer Normalization" (arXiv 1607.06450), equations 3 and 4. LayerScale: Touvron et al.,
"Going deeper with Image Transformers" (arXiv 2103.17239), equation 4.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._config import Key, early, lookup
from ._launch import launch
from ._op import autocast, check_shape, check_tensors, dense, flatten_rows, kernel_op
from ._triton import cdiv, next_power_of_2, tl, triton, wait_for_previous

MAX_WIDTH = 16384
"""Widest row a kernel holds in registers; a wider one has no use in a ViT and is refused."""


def _affine_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    """That of weight and bias, which is x's or a wider one."""
    return next((t.dtype for t in (weight, bias) if t is not None), x.dtype)


def layer_norm_ref(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, mean, rstd)` in torch's own calls; the statistics are at least fp32."""
    dtype = x.dtype
    # torch's backward on CUDA takes one dtype alone
    x = x.to(_affine_dtype(x, weight, bias))
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    if x.dtype in (torch.float16, torch.bfloat16):
        mean, rstd = mean.float(), rstd.float()
    return y.to(dtype).contiguous(), mean, rstd


def add_layer_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(s, y, mean, rstd)` in torch's own calls."""
    # dense whatever the inputs' strides, as the kernel writes it
    total = (residual + (x if scale is None else x * scale)).contiguous()
    return total, *layer_norm_ref(total, weight, bias, eps)


@triton.jit
def _normalize(x, row_mask, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, rows, cols, D, eps):
    # x: [BLOCK_M, BLOCK_D] fp32, zero outside the row
    col_mask = cols < D
    mean = tl.sum(x, axis=1) / D  # [BLOCK_M]
    centred = tl.where(col_mask[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)
    tl.store(mean_ptr + rows, mean, mask=row_mask)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["n_rows"])
def _layer_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    n_rows,
    D,
    stride_xm,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    row_mask = rows < n_rows
    mask = row_mask[:, None] & (cols < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    y = _normalize(x, row_mask, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, rows, cols, D, eps)
    tl.store(y_ptr + rows[:, None] * D + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _add_layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    sum_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    n_rows,
    D,
    stride_xm,
    stride_rm,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    row_mask = rows < n_rows
    mask = row_mask[:, None] & (cols < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        x *= tl.load(scale_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    residual = tl.load(residual_ptr + rows[:, None] * stride_rm + cols[None, :], mask=mask, other=0.0)
    total = (x + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + rows[:, None] * D + cols[None, :], total, mask=mask)
    y = _normalize(total.to(tl.float32), row_mask, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, rows, cols, D, eps)
    tl.store(y_ptr + rows[:, None] * D + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    """Rows per program and its warps; the whole width is always one tile."""

    block_m: int
    num_warps: int


@functools.cache
def heuristic(tile: int) -> Config:
    """16 elements per thread: two 16-byte loads in 16-bit, four in fp32, all in flight before the first use.

    Short rows share a program so that it has at least 4 warps' worth of work, also where there are fewer, so that
    another batch compiles nothing. Neither dtype nor architecture makes a difference to a kernel that only streams.

    Args:
        tile: elements that a row takes in a program.
    """
    block_m = max(1, 2048 // tile)
    return Config(block_m, num_warps=max(1, min(16, block_m * tile // 512)))


def launch_config(op: str, x: Tensor, least: int = 1) -> tuple[int, Config]:
    """Number of rows, and the config; `least` is that of the elements that a row takes."""
    width = x.shape[-1]
    rows = x.numel() // width
    key = Key(op, (("rows", rows), ("width", width)), x.dtype)
    return rows, lookup(key, x.device, Config, lambda: heuristic(max(least, next_power_of_2(width))))


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], 1)
    return (
        torch.empty(shape, dtype=torch.float32, device=x.device),
        torch.empty(shape, dtype=torch.float32, device=x.device),
    )


def _check_norm(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, **more: Tensor | None) -> None:
    check_tensors(op, x=x, weight=weight, bias=bias, **more)
    shape = x.shape
    if not shape or not 1 <= shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{op}: 'x' has shape {list(shape)}; expected [..., D] with 1 <= D <= {MAX_WIDTH}")
    check_shape(op, "weight", weight, shape[-1])
    check_shape(op, "bias", bias, shape[-1])
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(f"{op}: 'weight' is {weight.dtype}, 'bias' is {bias.dtype}; expected one dtype")


def _check_parameter_dtype(op: str, dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in (dtype, torch.float32):
            raise TypeError(f"{op}: '{name}' has dtype {tensor.dtype}; expected {dtype} (the input's) or float32")


def _check_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    _check_norm("layer_norm", x, weight, bias)
    _check_parameter_dtype("layer_norm", x.dtype, weight, bias)


def _check_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None
) -> None:
    _check_norm("add_layer_norm", x, weight, bias, residual=residual, scale=scale)
    check_shape("add_layer_norm", "residual", residual, *x.shape)
    check_shape("add_layer_norm", "scale", scale, x.shape[-1])
    _check_parameter_dtype("add_layer_norm", _sum_dtype(x, residual, scale), weight, bias)


def _sum_dtype(x: Tensor, residual: Tensor, scale: Tensor | None) -> torch.dtype:
    scaled = x.dtype if scale is None else torch.promote_types(x.dtype, scale.dtype)
    return torch.promote_types(scaled, residual.dtype)


def launch_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate and launch: `layer_norm(x)`, and mean and 1 / deviation of each row in fp32."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = _statistics(x)
    if x.numel():
        rows, config = launch_config("layer_norm", x)
        width, x = x.shape[-1], flatten_rows(x)
        launch(
            _layer_norm_fwd_kernel,
            (cdiv(rows, config.block_m),),
            x_ptr=x,
            weight_ptr=dense(weight),
            bias_ptr=dense(bias),
            y_ptr=y,
            mean_ptr=mean,
            rstd_ptr=rstd,
            n_rows=rows,
            D=width,
            stride_xm=x.stride(0),
            eps=eps,
            BLOCK_M=config.block_m,
            BLOCK_D=next_power_of_2(width),
            EARLY=early(x.device),
            num_warps=config.num_warps,
        )
    return y, mean, rstd


@kernel_op("vitfast::layer_norm", reference=layer_norm_ref, check=_check_layer_norm)
def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return launch_layer_norm(x, weight, bias, eps)


@kernel_op("vitfast::add_layer_norm", reference=add_layer_norm_ref, check=_check_add_layer_norm)
def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = torch.empty(x.shape, dtype=_sum_dtype(x, residual, scale), device=x.device)
    y = torch.empty_like(total)
    mean, rstd = _statistics(x)
    if x.numel():
        rows, config = launch_config("add_layer_norm", x)
        width, x, residual = x.shape[-1], flatten_rows(x), flatten_rows(residual)
        launch(
            _add_layer_norm_fwd_kernel,
            (cdiv(rows, config.block_m),),
            x_ptr=x,
            residual_ptr=residual,
            weight_ptr=dense(weight),
            bias_ptr=dense(bias),
            scale_ptr=dense(scale),
            sum_ptr=total,
            y_ptr=y,
            mean_ptr=mean,
            rstd_ptr=rstd,
            n_rows=rows,
            D=width,
            stride_xm=x.stride(0),
            stride_rm=residual.stride(0),
            eps=eps,
            BLOCK_M=config.block_m,
            BLOCK_D=next_power_of_2(width),
            EARLY=early(x.device),
            num_warps=config.num_warps,
        )
    return total, y, mean, rstd


def norm_gradients(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias) by torch's own LayerNorm backward from the saved statistics."""
    dtype = _affine_dtype(x, weight, bias)
    # torch's CPU kernel wants statistics in the other tensors' dtype, its CUDA kernel in fp32; second derivatives know
    # that they are x's
    mean, rstd = (t.detach().to(torch.float32 if x.is_cuda else dtype) for t in (mean, rstd))
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.to(dtype), x.to(dtype), x.shape[-1:], mean, rstd, weight, bias, wanted
    )
    return None if dx is None else dx.to(x.dtype), dweight, dbias


def _layer_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias)


def _layer_norm_backward(ctx: Any, dy, dmean, drstd) -> tuple[Any, ...]:
    x, mean, rstd, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = norm_gradients(dy, x, mean, rstd, weight, bias, list(ctx.needs_input_grad[:3]))
    return dx, dweight, dbias, None


def _add_layer_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, residual, weight, bias, _, scale = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(x if scale is not None else None, total, mean, rstd, weight, bias, scale)
    ctx.dtypes = x.dtype, residual.dtype


def _add_layer_norm_backward(ctx: Any, dtotal, dy, dmean, drstd) -> tuple[Any, ...]:
    x, total, mean, rstd, weight, bias, scale = ctx.saved_tensors
    wanted = [True, *ctx.needs_input_grad[2:4]]
    dsum, dweight, dbias = norm_gradients(dy, total, mean, rstd, weight, bias, wanted)
    dsum = dsum + dtotal
    x_dtype, residual_dtype = ctx.dtypes
    dx = (dsum if scale is None else dsum * scale).to(x_dtype)
    dscale = None
    if scale is not None and ctx.needs_input_grad[5]:
        dscale = (dsum * x).reshape(-1, x.shape[-1]).sum(0).to(scale.dtype)
    return dx, dsum.to(residual_dtype), dweight, dbias, None, dscale


_layer_norm.op.register_autograd(_layer_norm_backward, setup_context=_layer_norm_setup)
_add_layer_norm.op.register_autograd(_add_layer_norm_backward, setup_context=_add_layer_norm_setup)


def _norm_dtype(x: Tensor) -> torch.dtype | None:
    # torch's autocast takes LayerNorm in fp32 on CUDA and leaves it alone on CPU
    return torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else None


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: `[..., D]`, fp16, bf16 or fp32 (float64 on CPU), any strides, D at most 16384.
        weight: `[D]` in x's dtype or fp32, or None for 1.
        bias: `[D]` in the weight's dtype, or None for 0.
        eps: added to the variance in fp32.

    Returns:
        `[..., D]` in x's dtype, contiguous. Under autocast on CUDA fp32, as `torch.nn.functional.layer_norm`.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype is not one of those above.
    """
    dtype = _norm_dtype(x)
    if dtype is not None:
        x, weight, bias = autocast(x, weight, bias, to=dtype)
    return _layer_norm(x, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`s = residual + scale * x` and LayerNorm of `s`, in one pass.

    Args:
        x: `[..., D]`, a branch's output.
        residual: `[..., D]`, the stream it is added to; may be of wider dtype than x.
        weight: `[D]` in the sum's dtype or fp32, or None for 1.
        bias: `[D]` in the weight's dtype, or None for 0.
        eps: added to the variance in fp32.
        scale: `[D]` (LayerScale), or None for 1.

    Returns:
        `(s, y)`, both `[..., D]` in the dtype that torch promotes `residual + scale * x` to, contiguous.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype is not fp16, bf16 or fp32 (float64 on CPU).
    """
    dtype = _norm_dtype(x)
    if dtype is not None:
        x, residual, weight, bias, scale = autocast(x, residual, weight, bias, scale, to=dtype)
    total, y, _, _ = _add_layer_norm(x, residual, weight, bias, eps, scale)
    return total, y
