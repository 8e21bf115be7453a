"""The ViT's MLP: two GEMMs with everything between and behind them in their epilogues.

    y = residual + scale * (activation(x W1^T + b1) W2^T + b2)

x, residual and y are `[..., D]`, W1 `[hidden, D]`, W2 `[D, hidden]`. Activation in the first epilogue, LayerScale and
residual in the second. FLOPs: 4*M*D*hidden. Bytes, elements of e bytes, without the weights: read x and residual, write
and read the hidden activation, write y: (3*D + 2*hidden)*M*e.

Both GEMMs in one kernel would keep the hidden activation on chip, but needs a `[128, D]` fp32 accumulator per program:
393 KB at D = 768, more than a multiprocessor has. So there is no kernel here: the op is two `linear` calls.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929), equation 3.
"""

from torch import Tensor

from .linear import linear, linear_ref


def mlp_ref(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str = "gelu",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """The same function in torch's own calls."""
    hidden = linear_ref(x, fc1_weight, fc1_bias, activation, None, None, False)
    return linear_ref(hidden, fc2_weight, fc2_bias, "none", residual, scale, False)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str = "gelu",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    tf32: bool = False,
) -> Tensor:
    """`residual + scale * fc2(activation(fc1(x)))`.

    Args:
        x: `[..., D]`, fp16, bf16 or fp32 (float64 on CPU).
        fc1_weight: `[hidden, D]`.
        fc1_bias: `[hidden]` or None.
        fc2_weight: `[D_out, hidden]`.
        fc2_bias: `[D_out]` or None.
        activation: one of `vitfast.kernels.ACTIVATIONS`.
        residual: `[..., D_out]` or None.
        scale: `[D_out]` (LayerScale) or None.
        tf32: as in `linear`.

    Returns:
        `[..., D_out]`, contiguous.

    Raises:
        ValueError: a shape, device or activation does not fit.
        TypeError: a dtype does not fit.
    """
    hidden = linear(x, fc1_weight, fc1_bias, activation, tf32=tf32)
    return linear(hidden, fc2_weight, fc2_bias, residual=residual, scale=scale, tf32=tf32)
