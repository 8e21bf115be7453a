"""DINOv2's layers and model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import layers
from ..known import Rebuilt, asked, beside, pair


class DinoPatchEmbed(layers.FusedPatchEmbed, Rebuilt):
    """`PatchEmbed`."""

    def fusable(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what the original would."""
        rows, cols = self.patch_size
        return super().fusable(pixels) and pixels.shape[2] % rows == 0 and pixels.shape[3] % cols == 0

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, N, D]`, or `[B, rows, cols, D]` where the grid is kept."""
        if not self.fusable(x):
            return super().forward(x)
        tokens = self.norm(self.tokens(x))
        if self.flatten_embedding:
            return tokens
        return tokens.unflatten(1, (x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1]))


class CopiedPatchEmbed(layers.FusedPatchEmbed, Rebuilt):
    """`PatchEmbed` of MAE, BEiT and others: a convolution, flat, and nothing behind it."""

    def fusable(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what the original would; other sizes than its own it may refuse."""
        own = getattr(self, "img_size", None)
        return super().fusable(pixels) and (own is None or tuple(pixels.shape[2:]) == pair(own))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[B, C, H, W]` to `[B, N, D]`."""
        if asked(args, kwargs) or not self.fusable(x):
            return super().forward(x, *args, **kwargs)
        return self.tokens(x)


class DinoAttention(layers.FusedAttention, Rebuilt):
    """`Attention`, and `MemEffAttention`, whose bias is that of nested tensors."""

    q_norm = k_norm = layers.IDENTITY

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; biased and causal attention is the original's."""
        asked = any(value is not None and value is not False for value in (*args, *kwargs.values()))
        if asked or layers.symbolic(x) or not self.fusable():
            return super().forward(x, *args, **kwargs)
        return self.fused(x)


class DinoFixedAttention(DinoAttention):
    """`Attention` by torch's function: scaled by the head's width, and `attn_drop` may be a rate."""

    @property
    def scale(self) -> float:  # type: ignore[override]
        """Of the scores."""
        return (self.qkv.out_features // (3 * self.num_heads)) ** -0.5

    def fusable(self) -> bool:
        """Whether the attention kernel computes what the original would: it has no dropout."""
        return not (self.training and getattr(self.attn_drop, "p", self.attn_drop))

    def limits(self) -> list[str]:
        limits = self.limits_in() + layers._why_called("proj", self.proj, nn.Linear)
        if rate := getattr(self.attn_drop, "p", self.attn_drop):
            limits.append(f"attention dropout {rate:g}: the original forward runs in training")
        return limits


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
    gamma_name = "gamma"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if original := vars(cls).get("replaces"):
            cls.layer_scale_class = beside(original, "LayerScale")

    def _undropped(self, module: nn.Module) -> bool:
        # nothing is called to drop in evaluation, and nothing without a rate
        return not (self.training and self.sample_drop_ratio)

    def forward(self, x: Any) -> Any:
        """`[B, N, D]` to `[B, N, D]`; dropped branches and nested tensors are the original's."""
        if not isinstance(x, Tensor) or layers.symbolic(x) or (self.training and self.sample_drop_ratio):
            return super().forward(x)
        return self.fused(x)

    def limits(self) -> list[str]:
        limits = [limit for limit in super().limits() if not limit.startswith("drop_path")]
        if self.sample_drop_ratio:
            limits.append(f"drop_path {self.sample_drop_ratio:.3g}: the original forward runs in training")
        return limits


class CopiedBlock(layers.FusedBlock, Rebuilt):
    """`Block` of MAE's kind: one `drop_path` for both branches, no LayerScale."""

    ls1 = ls2 = layers.IDENTITY
    drop_path1 = drop_path2 = layers.alias("drop_path")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if original := vars(cls).get("replaces"):
            cls.drop_path_class = beside(original, "DropPath")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        if asked(args, kwargs) or layers.symbolic(x):
            return super().forward(x, *args, **kwargs)
        return self.fused(x)


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
        """Whether `through` runs the blocks one after another and nothing else."""
        return layers.plain(self.blocks, nn.ModuleList) and not self.chunked_blocks

    def through(self, x: Tensor) -> Tensor:
        """All blocks as the original runs them: `[B, N, D]` to `[B, N, D]`."""
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """Pixels to the head's output, or with `is_training` to the dictionary of `forward_features`."""
        pixels = args[0] if args else kwargs.get("x")
        kept = None
        if isinstance(pixels, Tensor) and not is_training and not layers.symbolic(pixels):
            kept = None if layers.overridden(self) else self.kept()
        if kept is None:
            return super().forward(*args, is_training=is_training, **kwargs)
        # without a name, which would keep the first tokens' memory through all blocks
        return self.head(self.norm(self.encode(self.prepare_tokens_with_masks(*args, **kwargs), kept))[:, 0])

    def forward_features(self, x: Any, masks: Tensor | None = None) -> Any:
        """Pixels to a dictionary of the normalised tokens by kind, and the tokens before the norm."""
        # without folding the original's loop is the same
        if not isinstance(x, Tensor) or layers.symbolic(x) or not self.fold or layers.overridden(self):
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
            or layers.symbolic(x)
            or not isinstance(stem, DinoPatchEmbed)
            or layers.hooked(stem)
            or not layers.plain(stem.norm, nn.Identity)
            or not stem.flatten_embedding
            or not stem.fusable(x)
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
