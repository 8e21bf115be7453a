"""vitfast's own reference model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import layers
from .known import FEATURES, Declined, Offer, Rebuilt, of_images, of_tokens
from .torch_nn import decline_activation, decline_head_dim


class FusedReferencePatchEmbed(layers.FusedPatchEmbed, Rebuilt):
    """`vitfast.reference.parts.PatchEmbed`."""

    def embeds(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what the model would."""
        height, width = self.patch_size
        return super().embeds(pixels) and pixels.shape[2] % height == 0 and pixels.shape[3] % width == 0

    def forward(self, pixels: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, N, D]`."""
        return self.tokens(pixels) if self.embeds(pixels) else super().forward(pixels)


class FusedReferenceAttention(layers.FusedAttention, Rebuilt):
    """`vitfast.reference.parts.Attention`, with its relative position logits as the kernel's bias."""

    def position_free(self) -> bool:
        """Relative logits are a query's own."""
        return self.rel_pos_embed is None

    def attend(self, qkv: Tensor, plan: layers.AttentionPlan) -> Tensor:
        """`[B, N, 3 * H * d]` to `[B, N, H * d]`."""
        if self.rel_pos_embed is None:
            return super().attend(qkv, plan)
        q, k, v = self.heads(qkv)
        return self.softmax_attention(q, k, v, self.relative_logits(q, self.rel_pos_embed))

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `FusedAttention.query_key`, with the relative logits."""
        q, k, _ = super().query_key(x)
        return q, k, None if self.rel_pos_embed is None else self.relative_logits(q, self.rel_pos_embed)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        plan = self.plan_for(x)
        return super().forward(x) if plan is None else self.fused(x, plan)


class FusedReferenceMlp(layers.FusedMlp, Rebuilt):
    """`vitfast.reference.parts.Mlp`."""


class FusedReferenceBlock(layers.FusedBlock, Rebuilt):
    """`vitfast.reference.parts.Block`."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        plan = self.plan_for(x)
        return super().forward(x) if plan is None else self.fused(x, plan)


class FusedReferenceVisionTransformer(layers.FusedModel, Rebuilt):
    """`vitfast.reference.vit.VisionTransformer`: the patch-embed kernel writes prefix tokens and positions too."""

    def pooled_tokens(self) -> int | None:
        """1 where the class token is the pooled output, 2 with a distillation token."""
        if self.dist_token is not None:
            return 2
        return 1 if self.global_pool == "token" and self.attn_pool is None else None

    def forward(self, x: Tensor) -> Any:
        """`[B, C, H, W]` to logits; the last block computes what the head reads."""
        prefix = None if not layers.takes(x) or self._loops_itself() else self.prefix_length()
        if prefix is None:
            return super().forward(x)
        # without a name, which would keep the first tokens' memory through all blocks
        return self.forward_head(self.norm(self.encode(self.norm_pre(self.pos_drop(self.embed(x))), prefix)))

    def _loops_itself(self) -> bool:
        return self.grad_checkpointing or self.pos_embed_at != "stem"

    def _encode(self, pixels: Tensor, depth: int, take: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        if take or self._loops_itself() or not layers.takes(pixels):
            return super()._encode(pixels, depth, take)
        return self.encode(self.norm_pre(self.pos_drop(self.embed(pixels)))), []

    def embed(self, pixels: Tensor) -> Tensor:
        """Equation 1: `[B, C, H, W]` to `[B, T + N, D]`."""
        stem = self.patch_embed
        if not isinstance(stem, FusedReferencePatchEmbed) or layers.hooked(stem) or not stem.embeds(pixels):
            return super().embed(pixels)
        pos = self.pos_embed_for(stem.grid(pixels.shape[2], pixels.shape[3]))
        prefix = [token[0] for token in (self.cls_token, self.dist_token, self.reg_token) if token is not None]
        tokens = stem.tokens(
            pixels,
            prefix[0] if len(prefix) == 1 else torch.cat(prefix) if prefix else None,
            None if pos is None else pos[0],
        )
        return tokens if prefix else layers.for_dropout(tokens, self.pos_drop)


def _decline_attention(module: Any) -> str | None:
    return decline_head_dim(module.head_dim)


def _patch(module: Any) -> Any:
    return getattr(module, "patch_embed", module).patch_size


OFFERS = (
    Offer("PatchEmbed", "patch_embed", (FusedReferencePatchEmbed,), "proj patch_size", of_images(_patch)),
    Offer("Attention", "attention", (FusedReferenceAttention,), "qkv proj head_dim", (of_tokens,), _decline_attention),
    Offer("Mlp", "mlp", (FusedReferenceMlp,), "fc1 act fc2", (of_tokens,), lambda m: decline_activation(m.act)),
    Offer("Block", "block", (FusedReferenceBlock,), "norm1 attn norm2 mlp", (of_tokens,)),
    Offer(
        "VisionTransformer",
        "model",
        (FusedReferenceVisionTransformer,),
        "patch_embed blocks norm",
        of_images(_patch, also=FEATURES),
    ),
)
DECLINED = (
    Declined("GluMlp", "mlp", "gated MLP: no kernel has its gate in an epilogue"),
    Declined("AttentionPool", "attention", "attention pooling has one query and is not worth a kernel"),
)
