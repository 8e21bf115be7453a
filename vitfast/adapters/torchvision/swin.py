"""torchvision's Swin and Swin V2: attention in shifted windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import StochasticDepth

from ... import attention_backends, kernels, layers
from ..known import Rebuilt


class FusedTorchvisionWindows(layers.FusedAttention, Rebuilt):
    """Attention in shifted windows of a map; one that they do not divide is torchvision's own, which pads it.

    torchvision reads the weights of `qkv` and `proj` and calls neither, so hooks on them never fire.
    """

    q_norm = k_norm = attn_drop = proj_drop = layers.IDENTITY
    scale = property(lambda self: (self.qkv.weight.shape[1] // self.num_heads) ** -0.5)  # type: ignore[assignment]
    window_size: list[int]
    shift_size: list[int]
    attention_dropout: float
    dropout: float

    def fusable(self) -> bool:
        """Whether the kernel computes what torchvision would: no dropout, no backend that knows no windows."""
        dropout = self.training and (self.attention_dropout or self.dropout)
        return not dropout and self.attention_backend in attention_backends.OURS

    def cuts(self, x: Tensor) -> bool:
        """Whether the kernel cuts this map `[B, H, W, D]`: windows divide it."""
        sides = zip(x.shape[1:3], self.window_size, strict=True)
        return x.dim() == 4 and layers.windows_pay(x) and not any(side % window for side, window in sides)

    def bias_in(self) -> Tensor | None:
        """Of the projection to q, k and v."""
        return self.qkv.bias

    def table(self) -> Tensor:
        """`[(2 * wh - 1) * (2 * ww - 1), H]`."""
        return layers.by_columns(self.relative_position_bias_table)

    def scales(self) -> Any:
        """Of the scores: a number, or one per head for cosine attention."""
        return self.scale

    def attended(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Normed map `[B, H, W, D]` to the heads' `[B, H, W, H * d]`."""
        qkv = kernels.linear(x, self.qkv.weight, self.bias_in(), tf32=self.tf32)
        window = (self.window_size[0], self.window_size[1])
        # no shift where one window is as long as the map
        down, right = (
            0 if window >= side else shift
            for window, side, shift in zip(window, x.shape[1:3], self.shift_size, strict=True)
        )
        return kernels.window_attention(
            qkv, self.num_heads, window, (down, right), self.table(), self.scales(), tf32=self.tf32
        )

    def project(self, out: Tensor, residual: Tensor | None, scale: Tensor | None) -> Tensor:
        """`residual + scale * proj(out)`, `[B, H, W, H * d]` to `[B, H, W, D]`."""
        proj = self.proj
        return kernels.linear(out, proj.weight, proj.bias, residual=residual, scale=scale, tf32=self.tf32)

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Refused: tokens of two windows do not meet."""
        raise ValueError(f"{type(self).__name__} attends within windows; it has no map of all tokens")

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, D]` to `[B, H, W, D]`."""
        if layers.symbolic(x) or not self.fusable() or not self.cuts(x):
            return super().forward(x)  # type: ignore[misc]
        return self.fused(x)

    def limits(self) -> list[str]:
        limits = []
        for what, rate in (("attention dropout", self.attention_dropout), ("dropout", self.dropout)):
            if rate:
                limits.append(f"{what} {rate:g}: the original forward runs in training")
        return limits + layers.why_uncut(self.attention_backend)


class FusedTorchvisionWindowsV2(FusedTorchvisionWindows):
    """`torchvision.models.swin_transformer.ShiftedWindowAttentionV2`: cosine attention, keys without bias."""

    def bias_in(self) -> Tensor | None:
        """Of the projection to q, k and v; the keys' part counts as zero, whatever it is."""
        bias = self.qkv.bias
        if bias is None:
            return None
        if layers.derivable(bias) and not bias.is_inference():
            return kernels.derived("bias without keys", _without_keys, bias)[0]
        return _without_keys(bias)[0]

    def table(self) -> Tensor:
        """`[(2 * wh - 1) * (2 * ww - 1), H]`."""
        return layers.position_table(self.cpb_mlp, self.relative_coords_table)

    def scales(self) -> Tensor:
        """Of the cosines, one per head."""
        return layers.cosine_scales(self.logit_scale)


def _without_keys(bias: Tensor) -> tuple[Tensor]:
    q, k, v = bias.chunk(3)
    return (torch.cat((q, torch.zeros_like(k), v)),)


class FusedTorchvisionSwinBlock(layers.FusedBlock, Rebuilt):
    """`torchvision.models.swin_transformer.SwinTransformerBlock`."""

    ls1 = ls2 = None
    drop_path1 = drop_path2 = layers.alias("stochastic_depth")
    drop_path_class = StochasticDepth
    rate_name = "p"

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, D]` to `[B, H, W, D]`."""
        attn: Any = self.attn
        if layers.symbolic(x) or not isinstance(attn, FusedTorchvisionWindows) or not attn.cuts(x):
            return super().forward(x)
        return self.fused(x)
