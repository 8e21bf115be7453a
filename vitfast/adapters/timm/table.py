"""timm: `VisionTransformer` and DeiT with their hybrids, BEiT, EVA-02, Swin and Swin-V2.

Imported only for models that hold a class of timm. Contracts read in timm 1.0.31's sources: `Attention.forward` and
`Block.forward` take `attn_mask` and `is_causal`; position embedding and prefix tokens are added in
`VisionTransformer._pos_embed`; `PatchEmbed` hands out NLC, or NHWC with `dynamic_img_size`. BEiT, EVA-02 and Swin-V2
keep biases of q and v beside a qkv layer that has none, and do not call that layer as a module. Swin's blocks take
maps `[B, H, W, D]`; their MLPs see them as `[B, H * W, D]`.

`fused_attn` chooses between two ways to write one formula, so it is not asked for.
"""

from __future__ import annotations

import functools
from typing import Any

import timm.layers
from timm.models import (
    beit,
    deit,
    eva,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    vision_transformer,
    vision_transformer_relpos,
    vision_transformer_sam,
)
from torch import nn

from ... import layers
from ..known import Swap, around
from ..torch_nn import decline_head_dim, decline_layer_norm, never
from .beit_eva import (
    FusedTimmAttentionRope,
    FusedTimmBeitAttention,
    FusedTimmBeitBlock,
    FusedTimmEvaAttention,
    FusedTimmEvaBlock,
)
from .parts import FusedTimmLayerNorm, FusedTimmMlp, FusedTimmPatchEmbed
from .swin import FusedTimmSwinBlock, FusedTimmSwinV2Block, FusedTimmWindowAttention, FusedTimmWindowAttentionV2
from .vit import FusedTimmAttention, FusedTimmBlock, FusedTimmVisionTransformer, FusedTimmVisionTransformerDistilled


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
    return decline_head_dim(module.head_dim)


def _decline_rotary(module: Any) -> str | None:
    if getattr(module, "num_kv_groups", 1) != 1:
        return "grouped-query attention: k and v have fewer heads than q"
    return _decline_attention(module)


def _decline_merged(module: Any) -> str | None:
    return decline_head_dim(module.proj.in_features // module.num_heads)


def _decline_mlp(module: Any) -> str | None:
    if not isinstance(module.fc1, nn.Linear):
        return f"fc1 is a {type(module.fc1).__name__}; the kernel replaces nn.Linear"
    if layers.epilogue(module.act) is None:
        return f"activation {type(module.act).__name__} is in no epilogue"
    return None


@functools.cache
def swaps() -> dict[type[nn.Module], Swap]:
    """Replaceable classes of timm."""
    return {
        timm.layers.LayerNorm: Swap(around(FusedTimmLayerNorm, timm.layers.LayerNorm), _decline_norm),
        timm.layers.PatchEmbed: Swap(around(FusedTimmPatchEmbed, timm.layers.PatchEmbed), _decline_patch_embed),
        timm.layers.Attention: Swap(around(FusedTimmAttention, timm.layers.Attention), _decline_attention),
        timm.layers.Mlp: Swap(around(FusedTimmMlp, timm.layers.Mlp), _decline_mlp),
        timm.layers.AttentionRope: Swap(around(FusedTimmAttentionRope, timm.layers.AttentionRope), _decline_rotary),
        beit.Attention: Swap(around(FusedTimmBeitAttention, beit.Attention), _decline_merged),
        eva.EvaAttention: Swap(around(FusedTimmEvaAttention, eva.EvaAttention), _decline_rotary),
        swin_transformer.WindowAttention: Swap(
            around(FusedTimmWindowAttention, swin_transformer.WindowAttention), _decline_merged
        ),
        swin_transformer_v2.WindowAttention: Swap(
            around(FusedTimmWindowAttentionV2, swin_transformer_v2.WindowAttention), _decline_merged
        ),
        vision_transformer.Block: Swap(around(FusedTimmBlock, vision_transformer.Block), never),
        beit.Block: Swap(around(FusedTimmBeitBlock, beit.Block), never),
        eva.EvaBlock: Swap(around(FusedTimmEvaBlock, eva.EvaBlock), never),
        swin_transformer.SwinTransformerBlock: Swap(
            around(FusedTimmSwinBlock, swin_transformer.SwinTransformerBlock), never
        ),
        swin_transformer_v2.SwinTransformerV2Block: Swap(
            around(FusedTimmSwinV2Block, swin_transformer_v2.SwinTransformerV2Block), never
        ),
        vision_transformer.VisionTransformer: Swap(
            around(FusedTimmVisionTransformer, vision_transformer.VisionTransformer), never
        ),
        deit.VisionTransformerDistilled: Swap(
            around(FusedTimmVisionTransformerDistilled, deit.VisionTransformerDistilled), never
        ),
    }


@functools.cache
def declined() -> dict[type[nn.Module], tuple[str, str]]:
    """Classes of timm that are known and left alone."""
    gated = ("mlp", "gated MLP: no kernel has its gate in an epilogue")
    pooling = ("attention", "attention pooling has one query and is not worth a kernel")
    other_block = ("block", "not the plain pre-norm block")
    positions = ("attention", "relative positions from a module: no kernel reads them")
    stem = ("patch_embed", "convolutional stem: the kernel embeds pixels")
    return {
        timm.layers.GluMlp: gated,
        timm.layers.SwiGLU: gated,
        timm.layers.DiffAttention: ("attention", "differential attention: two softmaxes, no kernel"),
        timm.layers.AttentionPoolLatent: pooling,
        timm.layers.AttentionPoolPrr: pooling,
        timm.layers.HybridEmbed: stem,
        timm.layers.HybridEmbedWithSize: stem,
        eva.EvaBlockPostNorm: other_block,
        swin_transformer_v2_cr.WindowMultiHeadAttention: positions,
        vision_transformer_relpos.RelPosAttention: positions,
        vision_transformer_sam.Attention: positions,
        vision_transformer.ResPostBlock: other_block,
        vision_transformer.ParallelScalingBlock: other_block,
        vision_transformer.DiffParallelScalingBlock: other_block,
        vision_transformer.ParallelThingsBlock: other_block,
    }
