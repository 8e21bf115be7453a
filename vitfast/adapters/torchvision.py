"""torchvision: `VisionTransformer`, Swin and Swin V2, and the MLPs that its other models share.

Contracts read in the sources of 0.28: the attention is `nn.MultiheadAttention`, called with `need_weights=False`; the
position embedding is the encoder's; images have one size, and others are refused by `torch._assert`; feature
extractors trace the model with `torch.fx`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import swin_transformer, vision_transformer
from torchvision.ops import StochasticDepth
from torchvision.ops.misc import MLP

from .. import attention_backends, kernels, layers
from . import Swap
from .torch import SequentialMlp, never, place


class _Mlp(SequentialMlp):
    """Linear layer, activation, dropout, linear layer, dropout."""

    length = 5
    drop1 = place(2)
    fc2 = place(3)
    drop2 = place(4)


class FusedTorchvisionMlp(_Mlp, MLP):
    """`torchvision.ops.MLP` with one hidden layer and no norm."""

    replaces = MLP


class FusedTorchvisionMlpBlock(_Mlp, vision_transformer.MLPBlock):
    """`torchvision.models.vision_transformer.MLPBlock`."""

    replaces = vision_transformer.MLPBlock


class FusedTorchvisionBlock(layers.FusedBlock, vision_transformer.EncoderBlock):
    """`torchvision.models.vision_transformer.EncoderBlock`."""

    replaces = vision_transformer.EncoderBlock
    norm1 = layers.alias("ln_1")
    attn = layers.alias("self_attention")
    drop_path1 = layers.alias("dropout")
    norm2 = layers.alias("ln_2")
    ls1 = ls2 = None
    # the MLP drops for itself
    drop_path2 = layers.IDENTITY
    drop_path_class = nn.Dropout
    rate_name = "p"

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Call the attention as torchvision's block does."""
        out = self.self_attention(x, x, x, need_weights=False)[0]
        if layers._inactive(self.dropout):
            return out
        # in training torch's attention lays out [N, B, D] in memory, and dropout draws in that order
        return out.transpose(0, 1).contiguous().transpose(0, 1)

    def forward(self, input: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        # for its error
        return super().forward(input) if layers.symbolic(input) or input.dim() != 3 else self.fused(input)


class FusedTorchvisionVisionTransformer(layers.FusedStemModel, vision_transformer.VisionTransformer):
    """`torchvision.models.VisionTransformer`: class token and position embedding written by the patch-embed kernel."""

    replaces = vision_transformer.VisionTransformer
    conv_name = "conv_proj"
    blocks = property(lambda self: self.encoder.layers)
    norm = property(lambda self: self.encoder.ln)

    def fusable(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what torchvision would."""
        return super().fusable(pixels) and tuple(pixels.shape[2:]) == (self.image_size, self.image_size)

    def pooled_tokens(self) -> int | None:
        """The class token."""
        return 1

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to logits; the last block computes the class token alone."""
        encoder = self.encoder
        if layers.symbolic(x) or not layers.plain(encoder, vision_transformer.Encoder) or layers.overridden(self):
            return super().forward(x)
        # without a name, which would keep the first tokens' memory through all blocks
        x = self.norm(self.encode(encoder.dropout(self._embed(x)), self.kept()))
        return self.heads(x[:, 0])

    def _embed(self, x: Tensor) -> Tensor:
        if self.fusable(x):
            return self.tokens(x, self.class_token[0], self.encoder.pos_embedding[0])
        x = self._process_input(x)
        return torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.encoder.pos_embedding


class _ShiftedWindows(layers.FusedAttention):
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


class FusedTorchvisionWindows(_ShiftedWindows, swin_transformer.ShiftedWindowAttention):
    """`torchvision.models.swin_transformer.ShiftedWindowAttention`."""

    replaces = swin_transformer.ShiftedWindowAttention


class FusedTorchvisionWindowsV2(_ShiftedWindows, swin_transformer.ShiftedWindowAttentionV2):
    """`torchvision.models.swin_transformer.ShiftedWindowAttentionV2`: cosine attention, keys without bias."""

    replaces = swin_transformer.ShiftedWindowAttentionV2

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


class FusedTorchvisionSwinBlock(layers.FusedBlock, swin_transformer.SwinTransformerBlock):
    """`torchvision.models.swin_transformer.SwinTransformerBlock`."""

    replaces = swin_transformer.SwinTransformerBlock
    ls1 = ls2 = None
    drop_path1 = drop_path2 = layers.alias("stochastic_depth")
    drop_path_class = StochasticDepth
    rate_name = "p"

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, D]` to `[B, H, W, D]`."""
        attn: Any = self.attn
        if layers.symbolic(x) or not isinstance(attn, _ShiftedWindows) or not attn.cuts(x):
            return super().forward(x)
        return self.fused(x)


def _is_mlp(module: Any) -> bool:
    kinds = [nn.Linear, nn.Module, nn.Dropout, nn.Linear, nn.Dropout]
    return len(module) == len(kinds) and all(isinstance(m, kind) for m, kind in zip(module, kinds, strict=True))


def _decline_mlp(module: Any) -> str | None:
    if not _is_mlp(module):
        return "has other modules than torchvision puts there"
    if FusedTorchvisionMlp.epilogue(module[1]) is None:
        return f"activation {type(module[1]).__name__} is in no epilogue"
    return None


@functools.cache
def swaps() -> dict[type[nn.Module], Swap]:
    """Replaceable classes of torchvision."""
    return {
        MLP: Swap(FusedTorchvisionMlp, _decline_mlp, _is_mlp),
        vision_transformer.MLPBlock: Swap(FusedTorchvisionMlpBlock, _decline_mlp),
        swin_transformer.ShiftedWindowAttention: Swap(FusedTorchvisionWindows, never),
        swin_transformer.ShiftedWindowAttentionV2: Swap(FusedTorchvisionWindowsV2, never),
        swin_transformer.SwinTransformerBlock: Swap(FusedTorchvisionSwinBlock, never),
        vision_transformer.EncoderBlock: Swap(FusedTorchvisionBlock, never),
        vision_transformer.VisionTransformer: Swap(FusedTorchvisionVisionTransformer, never),
    }


@functools.cache
def declined() -> dict[type[nn.Module], tuple[str, str]]:
    """Classes of torchvision that are known and left alone."""
    return {swin_transformer.SwinTransformerBlockV2: ("block", "norms between branch and residual: parts are replaced")}
