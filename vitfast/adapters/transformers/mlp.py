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

    def make_plan(self, derive: bool = False) -> layers.Plan:
        """The kernel runs, or the original."""
        notes: list[str] = []
        if layers.epilogue(self.intermediate_act_fn) is None:
            layers.plain("intermediate_act_fn", self.intermediate_act_fn, nn.GELU, notes)
        layers.linear("dense", self.dense, notes)
        return layers.Plan("; ".join(notes), ())

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., D]` to `[..., F]`."""
        if self.plan_for(hidden_states) is None:
            return super().forward(hidden_states)
        dense, activation = self.dense, layers.epilogue(self.intermediate_act_fn) or "none"
        return kernels.linear(hidden_states, dense.weight, dense.bias, activation, tf32=self.tf32)


class ViTOutput(layers.FusedLayer, Rebuilt):
    """Version 4, and models that kept its layout: the MLP's second layer with the residual."""

    kind = "mlp"
    dense: Any
    dropout: Any

    def make_plan(self, derive: bool = False) -> layers.Plan:
        """The kernel runs, or the original."""
        notes: list[str] = []
        if not layers.inactive(self.dropout):
            notes.append("dropout is at work")
        layers.linear("dense", self.dense, notes)
        return layers.Plan("; ".join(notes), ())

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """`[..., F]` and `[..., D]` to `[..., D]`."""
        if self.plan_for(hidden_states) is None:
            return super().forward(hidden_states, input_tensor)
        return layers.compute_linear(True, self.dense, hidden_states, input_tensor, None, self.tf32)
