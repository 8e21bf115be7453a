"""DINOv2's layers and model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import layers
from ..known import Rebuilt, asked, pair


class DinoPatchEmbed(layers.FusedPatchEmbed, Rebuilt):
    """`PatchEmbed`."""

    def embeds(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what the original would."""
        rows, cols = self.patch_size
        return super().embeds(pixels) and pixels.shape[2] % rows == 0 and pixels.shape[3] % cols == 0

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, N, D]`, or `[B, rows, cols, D]` where the grid is kept."""
        if not self.embeds(x):
            return super().forward(x)
        tokens = self.norm(self.tokens(x))
        if self.flatten_embedding:
            return tokens
        return tokens.unflatten(1, (x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1]))


class CopiedPatchEmbed(layers.FusedPatchEmbed, Rebuilt):
    """`PatchEmbed` of MAE, BEiT and others: a convolution, flat, and nothing behind it."""

    def embeds(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what the original would; other sizes than its own it may refuse."""
        own = getattr(self, "img_size", None)
        return super().embeds(pixels) and (own is None or tuple(pixels.shape[2:]) == pair(own))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[B, C, H, W]` to `[B, N, D]`."""
        if asked(args, kwargs) or not self.embeds(x):
            return super().forward(x, *args, **kwargs)
        return self.tokens(x)


class DinoAttention(layers.FusedAttention, Rebuilt):
    """`Attention`, and `MemEffAttention`, whose bias is that of nested tensors."""

    q_norm = k_norm = layers.IDENTITY

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; biased and causal attention is the original's."""
        plan = None if asked(args, kwargs) else self.plan_for(x)
        return super().forward(x, *args, **kwargs) if plan is None else self.fused(x, plan)


class DinoFixedAttention(DinoAttention):
    """`Attention` by torch's function: scaled by the head's width, and `attn_drop` may be a rate."""

    @property
    def scale(self) -> float:  # type: ignore[override]
        """Of the scores."""
        return (self.qkv.out_features // (3 * self.num_heads)) ** -0.5

    def why_dropout(self, notes: list[str]) -> str:
        """Why dropout has the original run."""
        return self.why_rate("attention dropout", getattr(self.attn_drop, "p", self.attn_drop), notes)


class DinoMlp(layers.FusedMlp, Rebuilt):
    """`Mlp`: one dropout in both places."""

    drop1 = drop2 = layers.alias("drop")


class LateDropMlp(layers.FusedMlp, Rebuilt):
    """`Mlp` of MAE's and BEiT's kind: one dropout, behind the second layer alone."""

    drop1 = layers.IDENTITY
    drop2 = layers.alias("drop")


class CopiedMlp(layers.FusedMlp, Rebuilt):
    """timm's `Mlp`, without a norm."""


class DinoBlock(layers.FusedBlock, Rebuilt):
    """`Block` and `NestedTensorBlock`."""

    sample_drop_ratio: float

    def drop_paths(self) -> tuple[Any, Any]:
        """Nothing is called to drop in evaluation, and nothing without a rate."""
        return layers.IDENTITY, layers.IDENTITY

    def make_plan(self, derive: bool = False) -> layers.BlockPlan:
        """In training the original drops samples."""
        if self.training and self.sample_drop_ratio:
            return layers.BlockPlan(f"drop_path {self.sample_drop_ratio:.3g}, in training", ())
        plan = super().make_plan(derive)
        if not self.sample_drop_ratio:
            return plan
        note = f"drop_path {self.sample_drop_ratio:.3g}: the original forward runs in training"
        return plan._replace(notes=(*plan.notes, note))

    def forward(self, x: Any) -> Any:
        """`[B, N, D]` to `[B, N, D]`; dropped branches and nested tensors are the original's."""
        plan = self.plan_for(x)
        return super().forward(x) if plan is None else self.fused(x, plan)


class CopiedBlock(layers.FusedBlock, Rebuilt):
    """`Block` of MAE's kind: one `drop_path` for both branches, no LayerScale."""

    ls1 = ls2 = layers.IDENTITY
    drop_path1 = drop_path2 = layers.alias("drop_path")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        plan = None if asked(args, kwargs) else self.plan_for(x)
        return super().forward(x, *args, **kwargs) if plan is None else self.fused(x, plan)


class DinoVisionTransformer(layers.FusedModel, Rebuilt):
    """`DinoVisionTransformer`: prefix tokens and position embedding written by the patch-embed kernel."""

    patch_embed: Any
    cls_token: Any
    register_tokens: Any
    head: Any
    num_register_tokens: int

    def pooled_tokens(self) -> int | None:
        """The class token is what the head reads."""
        return 1

    def straight(self) -> bool:
        """Whether `run_blocks` runs the blocks one after another and nothing else."""
        return layers.is_plain(self.blocks, nn.ModuleList) and not self.chunked_blocks

    def run_blocks(self, x: Tensor) -> Tensor:
        """All blocks as the original runs them: `[B, N, D]` to `[B, N, D]`."""
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """Pixels to the head's output, or with `is_training` to the dictionary of `forward_features`."""
        pixels = args[0] if args else kwargs.get("x")
        prefix = None
        if layers.takes(pixels) and not is_training and not layers.overridden(self):
            prefix = self.prefix_length()
        if prefix is None:
            return super().forward(*args, is_training=is_training, **kwargs)
        # without a name, which would keep the first tokens' memory through all blocks
        return self.head(self.norm(self.encode(self.prepare_tokens_with_masks(*args, **kwargs), prefix))[:, 0])

    def forward_features(self, x: Any, masks: Tensor | None = None) -> Any:
        """Pixels to a dictionary of the normalised tokens by kind, and the tokens before the norm."""
        # without folding the original's loop is the same
        if not layers.takes(x) or not layers.deriving(x) or layers.overridden(self):
            return super().forward_features(x, masks)
        tokens = self.encode(self.prepare_tokens_with_masks(x, masks))
        normed = self.norm(tokens)
        first = 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first],
            "x_norm_patchtokens": normed[:, first:],
            "x_prenorm": tokens,
            "masks": masks,
        }

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """`[B, C, H, W]` to `[B, T + N, D]`; masked patches are the original's."""
        stem = self.patch_embed
        if (
            masks is not None
            or not layers.takes(x)
            or not isinstance(stem, DinoPatchEmbed)
            or layers.hooked(stem)
            or not layers.is_plain(stem.norm, nn.Identity)
            or not stem.flatten_embedding
            or not stem.embeds(x)
        ):
            return super().prepare_tokens_with_masks(x, masks)
        height, width = x.shape[2:]
        rows, cols = stem.patch_size
        # only its shape and dtype are read
        like = self.cls_token.expand(1, 1 + (height // rows) * (width // cols), -1)
        prefix, pos = self.cls_token[0], self.interpolate_pos_encoding(like, height, width)[0]
        if self.register_tokens is not None:
            prefix, pos = torch.cat((prefix + pos[:1], self.register_tokens[0])), pos[1:]
        return stem.tokens(x, prefix, pos)
