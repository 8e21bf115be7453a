"""timm's ViT and DeiT: attention, block and model."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import resample_abs_pos_embed
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from ... import layers
from ..known import Rebuilt, asked, handed_on, without_proxies
from .parts import FusedTimmPatchEmbed, Scaled


class FusedTimmAttention(Scaled):
    """`timm.layers.Attention` without a gate."""

    def merged(self, out: Tensor) -> Tensor:
        """timm's optional norm of the merged heads."""
        return self.norm(out) if "norm" in self._modules else out

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; masked attention is timm's own."""
        if layers.symbolic(x):
            return super().forward(x, *without_proxies(args), **without_proxies(kwargs))
        plan = None if asked(args, kwargs) else self.plan_for(x)
        return super().forward(x, *args, **kwargs) if plan is None else self.fused(x, plan)


class FusedTimmBlock(layers.FusedBlock, Rebuilt):
    """`timm.models.vision_transformer.Block`."""

    # what a block takes and hands on to its attention, by name; versions differ
    handed: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if original := vars(cls).get("replaces"):
            cls.handed = handed_on(original, 2)

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Call the attention with the keywords that timm's block gives it: hooks see them."""
        return self.attn(x, **self.handed)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; masked attention is timm's own."""
        if layers.symbolic(x):
            return super().forward(x, *without_proxies(args), **without_proxies(kwargs))
        plan = None if asked(args, kwargs) else self.plan_for(x)
        return super().forward(x, *args, **kwargs) if plan is None else self.fused(x, plan)


class FusedTimmVisionTransformer(layers.FusedModel, Rebuilt):
    """Prefix tokens and position embedding written by the patch-embed kernel, blocks run by `encode`."""

    patch_embed: Any
    pos_embed: Any
    cls_token: Any
    reg_token: Any

    def _prefix(self) -> list[Tensor]:
        return [token[0] for token in (self.cls_token, self.reg_token) if token is not None]

    def pooled_tokens(self) -> int | None:
        """1 where the class token is the pooled output."""
        return 1 if self.global_pool == "token" and self.attn_pool is None else None

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[B, C, H, W]` to `[B, T + N, D]`."""
        if layers.symbolic(x):
            return super().forward_features(x, *without_proxies(args), **without_proxies(kwargs))  # type: ignore[misc]
        if asked(args, kwargs) or not layers.takes(x):
            return super().forward_features(x, *args, **kwargs)  # type: ignore[misc]
        return self._features(x, None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[B, C, H, W]` to logits; the last block computes what the head reads."""
        if layers.symbolic(x):
            return super().forward(x, *without_proxies(args), **without_proxies(kwargs))  # type: ignore[misc]
        prefix = None if asked(args, kwargs) or not layers.takes(x) else self.prefix_length()
        if prefix is None or self.grad_checkpointing:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return self.forward_head(self._features(x, prefix))

    def _features(self, x: Tensor, prefix: int | None) -> Tensor:
        # without a name, which would keep the first tokens' memory through all blocks
        if self.grad_checkpointing:
            return self.norm(checkpoint_seq(self.blocks, self._embed(x)))
        return self.norm(self.encode(self._embed(x), prefix))

    def _embed(self, x: Tensor) -> Tensor:
        stem = self.patch_embed
        if (
            not isinstance(stem, FusedTimmPatchEmbed)
            or layers.hooked(stem)
            or not layers.is_plain(stem.norm, nn.Identity)
            or "_pos_embed" in vars(self)
            or not stem.embeds(x)
        ):
            return self.norm_pre(self.patch_drop(self._pos_embed(stem(x))))
        pos = self.pos_embed
        if pos is not None and self.dynamic_img_size:
            pos = resample_abs_pos_embed(
                pos,
                new_size=[x.shape[2] // stem.patch_size[0], x.shape[3] // stem.patch_size[1]],
                old_size=stem.grid_size,
                num_prefix_tokens=0 if self.no_embed_class else self.num_prefix_tokens,
            )
        prefix = self._prefix()
        tokens = stem.tokens(
            x,
            prefix[0] if len(prefix) == 1 else torch.cat(prefix) if prefix else None,
            None if pos is None else pos[0],
        )
        if not prefix:
            tokens = layers.for_dropout(tokens, self.pos_drop)
        # timm adds no dropout where there is no position embedding
        tokens = tokens if pos is None else self.pos_drop(tokens)
        return self.norm_pre(self.patch_drop(tokens))


class FusedTimmVisionTransformerDistilled(FusedTimmVisionTransformer):
    """`timm.models.deit.VisionTransformerDistilled`."""

    def _prefix(self) -> list[Tensor]:
        return [self.cls_token[0], self.dist_token[0]]

    def pooled_tokens(self) -> int | None:
        """Class and distillation token."""
        return 2
