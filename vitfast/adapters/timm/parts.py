"""timm's norm, patch embedding and MLP, and q, k and v with biases of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import kernels, layers
from ..known import Rebuilt


class FusedTimmLayerNorm(layers.FusedLayerNorm, Rebuilt):
    """`timm.layers.LayerNorm`."""


class FusedTimmPatchEmbed(layers.FusedPatchEmbed, Rebuilt):
    """`timm.layers.PatchEmbed` without image padding."""

    def fusable(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what timm would; what timm refuses, timm shall refuse in its own words."""
        if not super().fusable(pixels):
            return False
        height, width = pixels.shape[2:]
        if self.img_size is not None and self.strict_img_size and (height, width) != tuple(self.img_size):
            return False
        return height % self.patch_size[0] == 0 and width % self.patch_size[1] == 0

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, N, D]`, or `[B, rows, cols, D]` where timm keeps the grid."""
        if not self.fusable(x):
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
        if getattr(self, "fused_attn", False):
            return (self.proj.in_features // self.num_heads) ** -0.5
        return vars(self)["scale"]

    @scale.setter
    def scale(self, value: float) -> None:
        self.__dict__["scale"] = value


class _PartBias(Scaled):
    """q and v have biases beside a qkv layer without: all are one layer."""

    q_bias: Any
    k_bias: Any
    v_bias: Any
    qkv_bias_separate: bool

    def _apart(self) -> bool:
        # the layer is called as a module, and what it hands out is rounded before a bias is added
        return self.q_bias is None or self.qkv_bias_separate

    def packed(self, x: Tensor) -> Tensor:
        """Normed `[..., D]` to q, k and v `[..., 3 * H * d]`."""
        if not self._apart():
            return kernels.linear(x, self.qkv.weight, self._bias(), tf32=self.tf32)
        qkv = layers._linear(self.qkv, x, None, None, self.tf32)
        if self.q_bias is not None:
            qkv += self._bias()
        return qkv

    def attended(self, x: Tensor, **given: Any) -> Tensor:
        """Normed tokens `[B, N, D]` to merged heads `[B, N, H * d]`."""
        return self.core(self.packed(x), **given)

    def plain_in(self) -> bool:
        """Whether the projection to q, k and v can be computed without calling a module."""
        return layers.plain_linear(self.qkv) and (self.q_bias is None or not self._apart())

    def weights_in(self) -> tuple[Tensor, Tensor | None]:
        """The layer's weight, and the bias, which may be three."""
        return self.qkv.weight, self.qkv.bias if self.q_bias is None else self._bias()

    def _bias(self) -> Tensor:
        biases = (self.q_bias, self.k_bias, self.v_bias)
        if not layers.derivable(self.q_bias) or any(bias.is_inference() for bias in biases):
            return torch.cat(biases)
        return kernels.derived("packed", _pack, *biases)[0]

    def whole(self) -> bool:
        """Never: what is added to the scores depends on where a token stands."""
        return False

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `FusedAttention.query_key`."""
        q, k, _ = self.heads(self.packed(x))
        return q, k, None

    def limits_in(self) -> list[str]:
        """`limits` of the projection to q, k and v."""
        return layers._why_called("qkv", self.qkv, nn.Linear) if self._apart() else []


def _pack(*biases: Tensor) -> tuple[Tensor]:
    return (torch.cat(biases),)
