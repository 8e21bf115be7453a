"""Layers for `kernelize` of Hugging Face's package `kernels`.

    kernels.replace_kernel_forward_from_hub(modeling_clip.CLIPMLP, "CLIPMLP")
    with kernels.use_kernel_mapping(vitfast.hf_layers.mapping()):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cuda")

`kernelize` borrows a layer's `forward` for an object of another class. So each class here has a forward of the same
signature as what it stands for, no constructor, no other method, and no attribute but what `kernelize` reads:
`has_backward` and `can_torch_compile`. Activations by themselves have no layer here: an MLP's is in its first GEMM, and
stays a module where something else was put in its place. Attention has a door of its own, `vitfast.register`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import kernels
from .adapters.proved import activation
from .adapters.transformers.mlp import ViTMLP as _FusedMLP
from .layers import hooked, plain_linear


class LayerNorm(nn.Module):
    """`torch.nn.LayerNorm`."""

    has_backward = True
    can_torch_compile = True

    normalized_shape: tuple[int, ...]
    weight: Any
    bias: Any
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """`[..., *normalized_shape]` to the same."""
        rows = input.flatten(-len(self.normalized_shape))
        weight, bias = (None if p is None else p.flatten() for p in (self.weight, self.bias))
        return kernels.layer_norm(rows, weight, bias, self.eps).view(input.shape)


class CLIPMLP(nn.Module):
    """`CLIPMLP` of Transformers, and its copies in ViT, SigLIP, DINOv2 and others: the activation in the first GEMM."""

    has_backward = True
    can_torch_compile = True

    fc1: Any
    activation_fn: Any
    fc2: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        fc1, act, fc2 = self.fc1, self.activation_fn, self.fc2
        activation = _FusedMLP.epilogue(act) if isinstance(act, nn.Module) and not hooked(act) else None
        if activation is None or not plain_linear(fc1) or not plain_linear(fc2):
            # an activation in no epilogue, or something else in the place of a linear layer
            return fc2(act(fc1(hidden_states)))
        return kernels.mlp(hidden_states, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation)


# by the name of the class that a layer stands for
LAYERS: dict[str, type[nn.Module]] = {"LayerNorm": LayerNorm, "CLIPMLP": CLIPMLP}


@dataclass(frozen=True)
class Layer:
    """What `kernelize` loads a layer from: its own class, with nothing to download."""

    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        """The class whose forward is taken."""
        return self.layer


def mapping(devices: Sequence[str] = ("cuda",)) -> dict[str, dict[str, Layer]]:
    """All layers by name and device, for `kernels.register_kernel_mapping` and `kernels.use_kernel_mapping`.

    Args:
        devices: such as "cuda", "rocm" or "cpu"; on a CPU the layers run torch's own calls.
    """
    from transformers.activations import ACT2FN

    for name in ("gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "quick_gelu"):
        if name in ACT2FN:
            # the layers look where what is proved stands
            activation(ACT2FN[name])
    return {name: dict.fromkeys(devices, Layer(layer)) for name, layer in LAYERS.items()}
