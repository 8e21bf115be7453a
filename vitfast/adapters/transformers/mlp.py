"""The MLPs of Transformers' models."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ... import kernels, layers
from ..known import Rebuilt


class ViTMLP(layers.FusedMlp, Rebuilt):
    """`fc1`, `activation_fn`, `fc2`."""

    act = layers.alias("activation_fn")
    drop1 = drop2 = layers.IDENTITY


class Dinov2MLP(ViTMLP):
    """Version 4: `fc1`, `activation`, `fc2`."""

    act = layers.alias("activation")


class ViTIntermediate(layers.FusedLayer, Rebuilt):
    """Version 4, and models that kept its layout: the MLP's first layer and its activation."""

    kind = "mlp"
    dense: Any
    intermediate_act_fn: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., D]` to `[..., F]`."""
        act, dense = self.intermediate_act_fn, self.dense
        activation = None if layers.hooked(act) else ViTMLP.epilogue(act)
        if layers.symbolic(hidden_states) or activation is None or not layers.plain_linear(dense):
            return super().forward(hidden_states)
        return kernels.linear(hidden_states, dense.weight, dense.bias, activation, tf32=self.tf32)

    def limits(self) -> list[str]:
        limits = layers._why_called("dense", self.dense, nn.Linear)
        act = self.intermediate_act_fn
        return limits + (["intermediate_act_fn has hooks: called as a module"] if layers.hooked(act) else [])


class ViTOutput(layers.FusedLayer, Rebuilt):
    """Version 4, and models that kept its layout: the MLP's second layer with the residual."""

    kind = "mlp"
    dense: Any
    dropout: Any

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """`[..., F]` and `[..., D]` to `[..., D]`."""
        if layers.symbolic(hidden_states) or not layers._inactive(self.dropout):
            return super().forward(hidden_states, input_tensor)
        return layers._linear(self.dense, hidden_states, input_tensor, None, self.tf32)

    def limits(self) -> list[str]:
        return layers._why_called("dense", self.dense, nn.Linear)
