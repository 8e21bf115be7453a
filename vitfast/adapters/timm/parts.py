"""timm's norm, patch embedding and MLP, and q, k and v with biases of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import kernels, layers
from ..known import Rebuilt


class FusedTimmLayerNorm(layers.FusedLayerNorm, Rebuilt):
    """`timm.layers.LayerNorm`."""


class FusedTimmPatchEmbed(layers.FusedPatchEmbed, Rebuilt):
    """`timm.layers.PatchEmbed` without image padding."""

    def embeds(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what timm would; what timm refuses, timm shall refuse in its own words."""
        if not super().embeds(pixels):
            return False
        height, width = pixels.shape[2:]
        if self.img_size is not None and self.strict_img_size and (height, width) != tuple(self.img_size):
            return False
        return height % self.patch_size[0] == 0 and width % self.patch_size[1] == 0

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, N, D]`, or `[B, rows, cols, D]` where timm keeps the grid."""
        if not self.embeds(x):
            return super().forward(x)
        tokens = self.tokens(x)
        if not self.flatten:
            tokens = tokens.unflatten(1, (x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1]))
        return self.norm(tokens)


class FusedTimmMlp(layers.FusedMlp, Rebuilt):
    """`timm.layers.Mlp` of linear layers."""

    def between(self, hidden: Tensor) -> Tensor:
        """timm's optional norm between the two layers."""
        return self.norm(hidden) if "norm" in self._modules else hidden


class Scaled(layers.FusedAttention, Rebuilt):
    """timm's attention scales by the heads' width where torch's function attends, else by its own attribute."""

    @property
    def scale(self) -> float:  # type: ignore[override]
        """Of the scores."""
        width = getattr(self, "head_dim", None)
        if width is None and hasattr(self.proj, "in_features"):
            width = self.proj.in_features // self.num_heads
        if width is not None and getattr(self, "fused_attn", False):
            return width**-0.5
        return vars(self)["scale"]

    @scale.setter
    def scale(self, value: float) -> None:
        self.__dict__["scale"] = value


class FusedTimmPartBias(Scaled):
    """q and v have biases beside a qkv layer without: all are one layer."""

    q_bias: Any
    k_bias: Any
    v_bias: Any
    qkv_bias_separate: bool

    def _calls_layer(self) -> bool:
        # the layer is called as a module, and what it hands out is rounded before a bias is added
        return self.q_bias is None or self.qkv_bias_separate

    def plan_in(self, notes: list[str]) -> bool:
        """Whether the projection to q, k and v is computed without calling a module."""
        if self._calls_layer():
            return layers.linear("qkv", self.qkv, notes) and self.q_bias is None
        if held := layers.foreign(self.qkv):
            notes.append(f"qkv holds a {held}: called as a module")
        return not held

    def derive(self, plan: layers.AttentionPlan) -> dict[str, Any]:
        """The three biases as one."""
        return {"packed": self.weights_in()} if plan.plain_in and self.q_bias is not None else {}

    def weights_in(self) -> tuple[Tensor, Tensor | None]:
        """The layer's weight, and the bias, which may be three."""
        return self.qkv.weight, self.qkv.bias if self.q_bias is None else self._bias()

    def _bias(self) -> Tensor:
        return torch.cat((self.q_bias, self.k_bias, self.v_bias))

    def project_in(self, x: Tensor, plan: layers.AttentionPlan) -> Tensor:
        """Normed `[..., D]` to q, k and v `[..., 3 * H * d]`."""
        if plan.plain_in and self.q_bias is not None:
            weight, bias = layers.kept(plan.packed, x, self.weights_in)
            return kernels.linear(x, weight, bias, tf32=self.tf32)
        qkv = layers.compute_linear(layers.is_linear(self.qkv), self.qkv, x, None, None, self.tf32)
        if self.q_bias is not None:
            qkv += self._bias()
        return qkv

    def position_free(self) -> bool:
        """Never: what is added to the scores depends on where a token stands."""
        return False

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `FusedAttention.query_key`."""
        qkv = self.qkv(x)
        q, k, _ = self.heads(qkv if self.q_bias is None else qkv + self._bias())
        return q, k, None
