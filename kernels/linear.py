"""Linear layer with everything a ViT does to its output in the GEMM's epilogue.

    y = residual + scale * activation(x W^T + bias)

x is `[..., K]`, weight `[N, K]` (as `nn.Linear` keeps it), bias and scale (LayerScale) `[N]`, residual and y
`[..., N]`. The accumulator is fp32; bias, activation, scale and residual are applied to it in fp32, and y is rounded
once. `gemm.py` has the kernels, `activation.py` the activations, `norm_linear.py` two more ops of the same kernels.

FLOPs: 2*M*N*K. Bytes, elements of e bytes: (M*K + N*K + M*N + residual M*N) * e. Unfused, each of activation, scale
and residual reads and writes M*N*e more. For ViT-B/16's fc1 at batch 256 (M = 50432, N = 3072, K = 768, bf16) that is
238 GFLOP and 392 MB, so the GEMM is bound by compute while one unfused GELU adds 620 MB of traffic.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ._op import autocast, check_same_dtype, check_shape, check_tensors, kernel_op
from .activation import ACTIVATIONS, activate_ref, activation_backward
from .gemm import launch_gemm


def linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    tf32: bool,
) -> Tensor:
    """The same function in torch's own calls. `tf32` chooses a kernel's arithmetic and has no meaning here."""
    y = activate_ref(F.linear(x, weight, bias), activation)
    if scale is not None:
        y = y * scale
    # dense whatever the inputs' strides, as the kernel writes it
    return (y if residual is None else residual + y).contiguous()


def check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    tf32: bool,
) -> None:
    check_tensors("linear", x=x, weight=weight, bias=bias, residual=residual, scale=scale)
    check_same_dtype("linear", x=x, weight=weight, bias=bias)
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    shape, weight_shape = x.shape, weight.shape
    if not shape or len(weight_shape) != 2 or shape[-1] != weight_shape[1]:
        raise ValueError(
            f"linear: 'x' has shape {list(shape)} and 'weight' {list(weight_shape)}; expected [..., K] and [N, K]"
        )
    check_shape("linear", "bias", bias, weight_shape[0])
    check_shape("linear", "scale", scale, weight_shape[0])
    if residual is not None:
        check_shape("linear", "residual", residual, *shape[:-1], weight_shape[0])


@kernel_op("vitfast::linear", reference=linear_ref, check=check_linear)
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    tf32: bool,
) -> Tensor:
    return launch_gemm(x, weight, bias, activation, residual, scale, tf32)


def linear_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    activation: str,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias, dscale) where `needs` says so; the residual's gradient is dy."""
    needs_x, needs_weight, needs_bias, needs_scale = needs
    dscale = None
    dz = dy if scale is None else dy * scale
    if activation != "none" or needs_scale:
        # one GEMM again instead of keeping the widest activation of the network
        z = F.linear(x, weight, bias)
        if needs_scale:
            dscale = (dy * activate_ref(z, activation)).reshape(-1, dy.shape[-1]).sum(0).to(scale.dtype)  # type: ignore[union-attr]
        if activation != "none":
            dz = activation_backward(dz.to(z.dtype), z, activation)
    dz = dz.to(x.dtype)
    dz2d = dz.reshape(-1, dz.shape[-1])
    dx = dz @ weight if needs_x else None
    dweight = dz2d.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None
    dbias = dz2d.sum(0) if needs_bias else None
    return dx, dweight, dbias, dscale


def linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """What `linear_backward` needs."""
    x, weight, bias, activation, residual, scale, _ = inputs
    ctx.save_for_backward(x, weight, bias, scale)
    ctx.activation = activation
    ctx.residual_dtype = None if residual is None else residual.dtype


def linear_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """Gradients of `linear`'s arguments."""
    x, weight, bias, scale = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _, _, needs_scale, _ = ctx.needs_input_grad
    needs = (needs_x, needs_weight, needs_bias, needs_scale)
    dx, dweight, dbias, dscale = linear_gradients(dy, x, weight, bias, scale, ctx.activation, needs)
    dresidual = None if ctx.residual_dtype is None else dy.to(ctx.residual_dtype)
    return dx, dweight, dbias, None, dresidual, dscale, None


_linear.op.register_autograd(linear_backward, setup_context=linear_setup)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    tf32: bool = False,
) -> Tensor:
    """`residual + scale * activation(x @ weight.T + bias)` in one GEMM.

    Args:
        x: `[..., K]`, fp16, bf16 or fp32 (float64 on CPU), any strides.
        weight: `[N, K]` in x's dtype.
        bias: `[N]` in x's dtype, or None.
        activation: `"none"`, `"gelu"` (erf), `"gelu_tanh"` or `"quick_gelu"`.
        residual: `[..., N]`, added last; may be of wider dtype than x.
        scale: `[N]` (LayerScale), multiplied in after the activation.
        tf32: let fp32 operands be multiplied in tf32 on CUDA even where
            `torch.backends.cuda.matmul.allow_tf32` is off.

    Returns:
        `[..., N]`, contiguous, in the dtype that torch promotes the expression to. Under autocast x, weight and bias
        are cast as `torch.nn.functional.linear`'s are.

    Raises:
        ValueError: a shape, device or activation does not fit.
        TypeError: a dtype does not fit.
    """
    x, weight, bias = autocast(x, weight, bias)
    return _linear(x, weight, bias, activation, residual, scale, tf32)
