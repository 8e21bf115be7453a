"""The activations of a ViT's MLP, each in torch's calls, in a kernel's epilogue, and backward.

Exact GELU (erf), GELU's tanh form, and QuickGELU `x * sigmoid(1.702 x)`.

GELU in 16 bits: `max(x, 0) - t * Phi(-t)` with t = |x| and log2(Phi(-t)) a polynomial, 7 or 6 multiply-adds and one
exp2 where erf takes about 30 instructions. Its error is below half an ulp of the output over every input, in the left
tail too, where `1 + erf` cancels. fp32 outputs take erf.

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (arXiv 1606.08415), section 2 for all three.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import tl, triton

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu")


def activate_ref(x: Tensor, activation: str) -> Tensor:
    """One of `ACTIVATIONS` in torch's own calls."""
    if activation == "none":
        return x
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


@triton.jit
def _gelu_16(x, FP16: tl.constexpr):
    # log2(Phi(-t)), Phi the normal distribution, by minimax fit: relative error of Phi 4.3e-5 up to 5.9, where fp16
    # ends, or 6.5e-4 up to 13.65, where bf16 does
    if FP16:
        t = tl.minimum(tl.abs(x), 5.9)
        q = 2.3604587113368325e-05 * t - 0.0006211158470250666
        q = q * t + 0.007256273180246353
        q = q * t - 0.05135330185294151
        q = q * t - 0.4610641598701477
        q = q * t - 1.1502671241760254
        q = q * t - 1.0000580549240112
    else:
        t = tl.minimum(tl.abs(x), 13.65)
        q = -2.845966378117737e-07 * t + 1.6326719560311176e-05
        q = q * t - 0.00039368937723338604
        q = q * t + 0.005254117306321859
        q = q * t - 0.04357541725039482
        q = q * t - 0.4745479226112366
        q = q * t - 1.1418009996414185
        # times 2^16, which goes back into t: below 2^-126 exp2 gives 0
        q = q * t + (16.0 - 1.0009092092514038)
        t *= 1.0 / 65536.0
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - t * tl.exp2(q)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    # of an fp32 tile that is rounded to dtype afterwards
    if ACTIVATION == "gelu":
        if dtype == tl.float32:
            return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        else:
            return _gelu_16(x, dtype == tl.float16)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) = sigmoid(2u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    else:
        return x


def activation_backward(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """The gradient of z from that of `activate_ref(z, activation)`."""
    if activation == "quick_gelu":
        gate = torch.sigmoid(1.702 * z)
        return dy * (gate + 1.702 * z * gate * (1.0 - gate))
    return torch.ops.aten.gelu_backward(dy, z, approximate="tanh" if activation == "gelu_tanh" else "none")
