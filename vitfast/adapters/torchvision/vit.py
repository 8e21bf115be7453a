"""torchvision's ViT, and the MLPs that its other models share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models import vision_transformer

from ... import layers
from ..known import Rebuilt
from ..torch_nn import FusedSequential, place


class FusedTorchvisionMlp(FusedSequential):
    """Linear layer, activation, dropout, linear layer, dropout."""

    length = 5
    drop1 = place(2)
    fc2 = place(3)
    drop2 = place(4)


class FusedTorchvisionBlock(layers.FusedBlock, Rebuilt):
    """`torchvision.models.vision_transformer.EncoderBlock`."""

    norm1 = layers.alias("ln_1")
    attn = layers.alias("self_attention")
    drop_path1 = layers.alias("dropout")
    norm2 = layers.alias("ln_2")
    ls1 = ls2 = None
    # the MLP drops for itself
    drop_path2 = layers.IDENTITY

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Call the attention as torchvision's block does."""
        out = self.self_attention(x, x, x, need_weights=False)[0]
        if layers.inactive(self.dropout):
            return out
        # in training torch's attention lays out [N, B, D] in memory, and dropout draws in that order
        return out.transpose(0, 1).contiguous().transpose(0, 1)

    def forward(self, input: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        plan = self.plan_for(input)
        # for its error
        return super().forward(input) if plan is None or input.dim() != 3 else self.fused(input, plan)


class FusedTorchvisionVisionTransformer(layers.FusedStemModel, Rebuilt):
    """`torchvision.models.VisionTransformer`: class token and position embedding written by the patch-embed kernel."""

    conv_name = "conv_proj"
    blocks = property(lambda self: self.encoder.layers)
    norm = property(lambda self: self.encoder.ln)

    def embeds(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what torchvision would."""
        return super().embeds(pixels) and tuple(pixels.shape[2:]) == (self.image_size, self.image_size)

    def pooled_tokens(self) -> int | None:
        """The class token."""
        return 1

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to logits; the last block computes the class token alone."""
        encoder = self.encoder
        if not layers.takes(x) or not layers.is_plain(encoder, vision_transformer.Encoder) or layers.overridden(self):
            return super().forward(x)
        # without a name, which would keep the first tokens' memory through all blocks
        x = self.norm(self.encode(encoder.dropout(self._embed(x)), self.prefix_length()))
        return self.heads(x[:, 0])

    def _embed(self, x: Tensor) -> Tensor:
        if self.embeds(x):
            return self.tokens(x, self.class_token[0], self.encoder.pos_embedding[0])
        x = self._process_input(x)
        return torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.encoder.pos_embedding
