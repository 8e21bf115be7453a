"""torchvision: `VisionTransformer`, and the MLPs that its other models share.

Contracts read in the sources of 0.28: the attention is `nn.MultiheadAttention`, called with `need_weights=False`; the
position embedding is the encoder's; images have one size, and others are refused by `torch._assert`; feature
extractors trace the model with `torch.fx`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import vision_transformer
from torchvision.ops.misc import MLP

from .. import layers
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
        vision_transformer.EncoderBlock: Swap(FusedTorchvisionBlock, never),
        vision_transformer.VisionTransformer: Swap(FusedTorchvisionVisionTransformer, never),
    }


@functools.cache
def declined() -> dict[type[nn.Module], tuple[str, str]]:
    """Classes of torchvision that are known and left alone."""
    return {}
