"""Transformers' Swin: a layer of shifted windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import attention_backends, kernels, layers
from ..known import Rebuilt, beside
from .attention import IMPLEMENTATIONS


class SwinLayer(layers.FusedBlock, Rebuilt):
    """A layer of shifted windows: one kernel for what Transformers does by rolling, cutting and pasting the map."""

    norm1 = layers.alias("layernorm_before")
    attn = layers.alias("attention")
    norm2 = layers.alias("layernorm_after")
    ls1 = ls2 = layers.IDENTITY
    drop_path1 = layers.alias("drop_path")
    # the second branch has a dropout where the first has a drop path
    drop_path2 = layers.alias("dropout")
    # computed here, not by a layer in its place
    covers = ("attention",)
    attention_class: type[nn.Module]
    bias_class: type[nn.Module]
    window_size: int
    shift_size: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if original := vars(cls).get("replaces"):
            cls.drop_path_class = beside(original, ".*DropPath")
            cls.attention_class = beside(original, ".*Attention")
            cls.bias_class = beside(original, ".*RelativePositionBias")

    def _undropped(self, module: nn.Module) -> bool:
        return layers._inactive(module) or super()._undropped(module)

    def _fits(self, tokens: Tensor, size: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the kernel computes what the original would of a map of this size."""
        attn, window = self.attention, self.window_size
        return (
            not layers.symbolic(tokens)
            and layers.windows_pay(tokens)
            and not torch.jit.is_tracing()
            # padded maps have tokens that are none; the libraries pad in different ways
            and size[0] % window == 0
            and size[1] % window == 0
            and layers.plain(attn, self.attention_class)
            and layers.plain(attn.relative_position_bias, self.bias_class)
            # a map smaller than the window fails in the original
            and attn.relative_position_bias.window_size == (window, window)
            and all(layers.plain_linear(m) for m in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj))
            and not (self.training and attn.attention_dropout)
            and self._undropped(self.drop_path1)
            and self._undropped(self.dropout)
            and attn.config._attn_implementation in IMPLEMENTATIONS
            and self.attention_backend in attention_backends.OURS
            # what hands out weights
            and not kwargs.get("output_attentions")
            and attn.config._attn_implementation != "eager"
        )

    def forward(
        self, hidden_states: Tensor, input_dimensions: Any, always_partition: bool = False, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """`[B, H * W, D]` to `([B, H * W, D], None)`."""
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        if not self._fits(hidden_states, input_dimensions, kwargs):
            return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)  # type: ignore[misc]
        attn: Any = self.attention
        normed = self.norm1(hidden_states)
        parts = (attn.q_proj, attn.k_proj, attn.v_proj)
        if layers.packable(normed, *parts):
            qkv = kernels.linear(normed, *layers.packed(*parts), tf32=self.tf32)
        elif normed.shape[:-1].numel() > normed.shape[-1]:
            # weights are fewer than what comes of them
            qkv = kernels.linear(normed, *layers.joined(*parts), tf32=self.tf32)
        else:
            qkv = torch.cat([layers._linear(part, normed, None, None, self.tf32) for part in parts], dim=-1)
        out = kernels.window_attention(
            qkv.unflatten(1, tuple(input_dimensions)),
            attn.q_proj.weight.shape[0] // attn.head_dim,
            (self.window_size,) * 2,
            (int(self.shift_size),) * 2,
            layers.by_columns(attn.relative_position_bias.relative_position_bias_table),
            attn.scaling,
            tf32=self.tf32,
        )
        x = layers._linear(attn.o_proj, out.flatten(1, 2), hidden_states, None, self.tf32)
        if self._takes_residual(self.mlp):
            return self.mlp.fused(self.norm2(x), x), None
        return self.mlp(self.norm2(x)) + x, None

    def limits(self) -> list[str]:
        if not layers.plain(self.attention, self.attention_class):
            return ["attention has hooks or is another: the original forward runs"]
        if self.attention.config._attn_implementation == "eager":
            return ["attn_implementation 'eager' hands out weights: the original forward runs"]
        return layers.why_uncut(self.attention_backend)
