"""timm: the `VisionTransformer` family (`vision_transformer.py`, `deit.py`).

Imported only for models that hold a class of timm. Contracts read in timm 1.0.31's sources: `Attention.forward` and
`Block.forward` take `attn_mask` and `is_causal`; position embedding and prefix tokens are added in
`VisionTransformer._pos_embed`; `PatchEmbed` hands out NLC, or NHWC with `dynamic_img_size`.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import timm.layers
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import deit, vision_transformer
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from .. import kernels, layers
from . import Swap
from .torch import decline_layer_norm


class FusedTimmLayerNorm(layers.FusedLayerNorm, timm.layers.LayerNorm):
    """`timm.layers.LayerNorm`."""

    replaces = timm.layers.LayerNorm


class FusedTimmPatchEmbed(layers.FusedPatchEmbed, timm.layers.PatchEmbed):
    """`timm.layers.PatchEmbed` without image padding."""

    replaces = timm.layers.PatchEmbed

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


class FusedTimmAttention(layers.FusedAttention, timm.layers.Attention):
    """`timm.layers.Attention` without a gate."""

    replaces = timm.layers.Attention

    def merged(self, out: Tensor) -> Tensor:
        """timm's optional norm of the merged heads."""
        return self.norm(out)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; masked attention is timm's own."""
        if attn_mask is not None or is_causal or layers.symbolic(x):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.fused(x) if self.fusable() else super().forward(x)


class FusedTimmMlp(layers.FusedMlp, timm.layers.Mlp):
    """`timm.layers.Mlp` of linear layers."""

    replaces = timm.layers.Mlp
    activations: ClassVar = {
        timm.layers.activations.GELU: "gelu",
        timm.layers.activations.GELUTanh: "gelu_tanh",
        timm.layers.activations.QuickGELU: "quick_gelu",
    }

    def between(self, hidden: Tensor) -> Tensor:
        """timm's optional norm between the two layers."""
        return self.norm(hidden)


class FusedTimmBlock(layers.FusedBlock, vision_transformer.Block):
    """`timm.models.vision_transformer.Block`."""

    replaces = vision_transformer.Block
    layer_scale_class = timm.layers.LayerScale
    drop_path_class = timm.layers.DropPath

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Call the attention with the keywords that timm's block gives it: hooks see them."""
        return self.attn(x, attn_mask=None, is_causal=False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; masked attention is timm's own."""
        if attn_mask is not None or is_causal or layers.symbolic(x):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.fused(x)


class _FusedModel(layers.FusedModel):
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

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, C, H, W]` to `[B, T + N, D]`."""
        if attn_mask is not None or is_causal or layers.symbolic(x):
            return super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[misc]
        return self._features(x, None)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, C, H, W]` to logits; the last block computes what the head reads."""
        kept = None if attn_mask is not None or is_causal or layers.symbolic(x) else self.kept()
        if kept is None or self.grad_checkpointing:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[misc]
        return self.forward_head(self._features(x, kept))

    def _features(self, x: Tensor, kept: int | None) -> Tensor:
        # without a name, which would keep the first tokens' memory through all blocks
        if self.grad_checkpointing:
            return self.norm(checkpoint_seq(self.blocks, self._embed(x)))
        return self.norm(self.encode(self._embed(x), kept))

    def _embed(self, x: Tensor) -> Tensor:
        stem = self.patch_embed
        if (
            not isinstance(stem, FusedTimmPatchEmbed)
            or layers.hooked(stem)
            or not layers.plain(stem.norm, nn.Identity)
            or "_pos_embed" in vars(self)
            or not stem.fusable(x)
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
        # timm adds no dropout where there is no position embedding
        tokens = tokens if pos is None else self.pos_drop(tokens)
        return self.norm_pre(self.patch_drop(tokens))


class FusedTimmVisionTransformer(_FusedModel, vision_transformer.VisionTransformer):
    """`timm.models.vision_transformer.VisionTransformer`."""

    replaces = vision_transformer.VisionTransformer


class FusedTimmVisionTransformerDistilled(_FusedModel, deit.VisionTransformerDistilled):
    """`timm.models.deit.VisionTransformerDistilled`."""

    replaces = deit.VisionTransformerDistilled

    def _prefix(self) -> list[Tensor]:
        return [self.cls_token[0], self.dist_token[0]]

    def pooled_tokens(self) -> int | None:
        """Class and distillation token."""
        return 2


def _decline_norm(module: Any) -> str | None:
    if module._fast_norm:
        return "timm's fast norm is on: it keeps autocast's dtype, the kernel torch's"
    return decline_layer_norm(module)


def _decline_patch_embed(module: Any) -> str | None:
    if module.dynamic_img_pad:
        return "pads images (dynamic_img_pad)"
    if not module.flatten and module.output_fmt is not timm.layers.Format.NHWC:
        return f"hands out {module.output_fmt.value}; the kernel NLC or NHWC"
    return None


def _decline_attention(module: Any) -> str | None:
    if module.gate is not None:
        return "gated attention"
    if module.head_dim > kernels.MAX_HEAD_DIM:
        return f"head dim {module.head_dim}; the kernel takes up to {kernels.MAX_HEAD_DIM}"
    return None


def _decline_mlp(module: Any) -> str | None:
    if not isinstance(module.fc1, nn.Linear):
        return f"fc1 is a {type(module.fc1).__name__}; the kernel replaces nn.Linear"
    if FusedTimmMlp.epilogue(module.act) is None:
        return f"activation {type(module.act).__name__} is in no epilogue"
    return None


def _never(module: nn.Module) -> None:
    return None


@functools.cache
def swaps() -> dict[type[nn.Module], Swap]:
    """Replaceable classes of timm."""
    return {
        timm.layers.LayerNorm: Swap(FusedTimmLayerNorm, _decline_norm),
        timm.layers.PatchEmbed: Swap(FusedTimmPatchEmbed, _decline_patch_embed),
        timm.layers.Attention: Swap(FusedTimmAttention, _decline_attention),
        timm.layers.Mlp: Swap(FusedTimmMlp, _decline_mlp),
        vision_transformer.Block: Swap(FusedTimmBlock, _never),
        vision_transformer.VisionTransformer: Swap(FusedTimmVisionTransformer, _never),
        deit.VisionTransformerDistilled: Swap(FusedTimmVisionTransformerDistilled, _never),
    }


@functools.cache
def declined() -> dict[type[nn.Module], tuple[str, str]]:
    """Classes of timm that are known and left alone."""
    gated = ("mlp", "gated MLP: no kernel has its gate in an epilogue")
    pooling = ("attention", "attention pooling has one query and is not worth a kernel")
    other_block = ("block", "not the plain pre-norm block")
    return {
        timm.layers.GluMlp: gated,
        timm.layers.SwiGLU: gated,
        timm.layers.DiffAttention: ("attention", "differential attention: two softmaxes, no kernel"),
        timm.layers.AttentionPoolLatent: pooling,
        timm.layers.AttentionPoolPrr: pooling,
        vision_transformer.ResPostBlock: other_block,
        vision_transformer.ParallelScalingBlock: other_block,
        vision_transformer.DiffParallelScalingBlock: other_block,
        vision_transformer.ParallelThingsBlock: other_block,
    }
