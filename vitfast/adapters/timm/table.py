"""timm: `VisionTransformer` and DeiT with their hybrids, BEiT, EVA-02, Swin and Swin-V2.

Imported only for models that hold a class of timm. Contracts read in timm 1.0.31's sources: `Attention.forward` and
`Block.forward` take `attn_mask` and `is_causal`; position embedding and prefix tokens are added in
`VisionTransformer._pos_embed`; `PatchEmbed` hands out NLC, or NHWC with `dynamic_img_size`. BEiT, EVA-02 and Swin-V2
keep biases of q and v beside a qkv layer that has none, and do not call that layer as a module. Swin's blocks take
maps `[B, H, W, D]`; their MLPs see them as `[B, H * W, D]`.

`fused_attn` chooses between two ways to write one formula, so it is not asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..known import FEATURES, Call, Declined, Offer, of_images, of_tokens, pair, tokens, width
from ..torch_nn import decline_activation, decline_head_dim, decline_layer_norm, of_norm
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
    if getattr(module, "dynamic_img_pad", False):
        return "pads images (dynamic_img_pad)"
    layout = getattr(module.output_fmt, "value", module.output_fmt)
    return None if module.flatten or layout == "NHWC" else f"hands out {layout}; the kernel NLC or NHWC"


def _decline_attention(module: Any) -> str | None:
    if getattr(module, "gate", None) is not None:
        return "gated attention"
    if getattr(module, "num_kv_groups", 1) != 1:
        return "grouped-query attention: k and v have fewer heads than q"
    # what stands in the place of a linear layer need not say how wide it is
    width = getattr(module, "head_dim", None) or getattr(module.proj, "in_features", 0) // module.num_heads
    return decline_head_dim(width)


def _decline_mlp(module: Any) -> str | None:
    if not isinstance(module.fc1, nn.Linear):
        return f"fc1 is a {type(module.fc1).__name__}; the kernel replaces nn.Linear"
    return decline_activation(module.act)


# examples: blocks are called as the attentions inside them


def _attention(module: Any) -> Any:
    return getattr(module, "attn", module)


def _of_relative(module: Any) -> list[Call]:
    """As many tokens as BEiT's table is for, and a bias that blocks share."""
    attn = _attention(module)
    size = attn.qkv.weight.shape[1]
    if attn.relative_position_bias_table is None:
        count = 10
    else:
        count = attn.window_size[0] * attn.window_size[1] + 1
    shared = torch.randn(attn.num_heads, count, count, dtype=torch.float64)
    return [
        Call((tokens(2, count, size),)),
        Call((tokens(1, count, size),), {"shared_rel_pos_bias": shared}),
    ]


def _of_rotated(module: Any) -> list[Call]:
    attn = _attention(module)
    size = width(attn)
    head = attn.proj.weight.shape[1] // attn.num_heads
    calls = [Call((tokens(1, 6, size),))]
    for batch, patches in ((2, 5), (1, 41)):
        # sines and cosines by channel
        rope = torch.randn(patches, 2 * head, dtype=torch.float64)
        x = tokens(batch, attn.num_prefix_tokens + patches, size)
        calls.append(Call((x,), {"rope": rope}, backward=batch > 1))
    return calls


def _of_windows(module: Any) -> list[Call]:
    rows, cols = pair(module.window_size)
    size = module.qkv.weight.shape[1]
    mask = torch.randn(2, rows * cols, rows * cols, dtype=torch.float64)
    return [Call((tokens(2, rows * cols, size),)), Call((tokens(4, rows * cols, size), mask))]


@contextmanager
def _small_map(block: Any) -> Iterator[None]:
    """A map of two windows a side in the place of a larger one; a twin's."""
    sides = zip(block.input_resolution, pair(block.window_size), strict=True)
    block.input_resolution = tuple(
        2 * window if side % window == 0 and side > window else side for side, window in sides
    )
    if block._buffers.get("attn_mask") is not None and not getattr(block, "dynamic_mask", False):
        block._buffers["attn_mask"] = block.get_attn_mask().double()
    yield


def _of_map(module: Any) -> list[Call]:
    height, cols = module.input_resolution
    return [Call((tokens(batch, height, cols, module.attn.qkv.weight.shape[1]),)) for batch in (2, 1)]


def _stem(module: Any) -> Any:
    return getattr(module, "patch_embed", module)


def _patch(module: Any) -> Any:
    return _stem(module).patch_size


def _size(module: Any) -> Any:
    return _stem(module).img_size


_PARTS = "qkv attn_drop proj proj_drop num_heads"
_MODEL = "patch_embed pos_embed blocks norm global_pool"
_IMAGES = of_images(_patch, _size, FEATURES)


def _swin_block(name: str, mixin: Any) -> Offer:
    return Offer(name, "block", (mixin,), "norm1 attn norm2 mlp input_resolution", (_of_map,), settings=(_small_map,))


OFFERS = (
    Offer("LayerNorm", "layer_norm", (FusedTimmLayerNorm,), "_fast_norm", (of_norm,), _decline_norm),
    Offer(
        "PatchEmbed",
        "patch_embed",
        (FusedTimmPatchEmbed,),
        "proj norm flatten output_fmt",
        of_images(_patch, _size),
        _decline_patch_embed,
    ),
    Offer(
        "Attention",
        "attention",
        (FusedTimmBeitAttention,),
        f"{_PARTS} q_bias relative_position_bias_table",
        (_of_relative,),
        _decline_attention,
    ),
    Offer(
        "EvaAttention", "attention", (FusedTimmEvaAttention,), f"{_PARTS} q_bias", (_of_rotated,), _decline_attention
    ),
    Offer(
        "AttentionRope",
        "attention",
        (FusedTimmAttentionRope,),
        f"{_PARTS} q_norm num_prefix_tokens",
        (_of_rotated,),
        _decline_attention,
    ),
    Offer("Attention", "attention", (FusedTimmAttention,), f"{_PARTS} q_norm", (of_tokens,), _decline_attention),
    Offer(
        "WindowAttention",
        "attention",
        (FusedTimmWindowAttentionV2,),
        f"{_PARTS} window_size cpb_mlp",
        (_of_windows,),
        _decline_attention,
    ),
    Offer(
        "WindowAttention",
        "attention",
        (FusedTimmWindowAttention,),
        f"{_PARTS} window_size relative_position_bias_table",
        (_of_windows,),
        _decline_attention,
    ),
    Offer("Mlp", "mlp", (FusedTimmMlp,), "fc1 act drop1 fc2 drop2", (of_tokens,), _decline_mlp),
    Offer("Block", "block", (FusedTimmBeitBlock,), "norm1 attn gamma_1 norm2 mlp gamma_2", (_of_relative,)),
    Offer("EvaBlock", "block", (FusedTimmEvaBlock,), "norm1 attn gamma_1 norm2 mlp gamma_2", (_of_rotated,)),
    Offer("Block", "block", (FusedTimmBlock,), "norm1 attn ls1 norm2 mlp ls2", (of_tokens,)),
    _swin_block("SwinTransformerBlock", FusedTimmSwinBlock),
    _swin_block("SwinTransformerV2Block", FusedTimmSwinV2Block),
    Offer(
        "VisionTransformerDistilled", "model", (FusedTimmVisionTransformerDistilled,), f"{_MODEL} dist_token", _IMAGES
    ),
    Offer("VisionTransformer", "model", (FusedTimmVisionTransformer,), f"{_MODEL} cls_token", _IMAGES),
)

_OTHER_BLOCK = "not the plain pre-norm block"
_POSITIONS = "relative positions from a module: no kernel reads them"
DECLINED = (
    Declined("GluMlp|SwiGLU", "mlp", "gated MLP: no kernel has its gate in an epilogue"),
    Declined("DiffAttention", "attention", "differential attention: two softmaxes, no kernel"),
    Declined(
        "AttentionPoolLatent|AttentionPoolPrr", "attention", "attention pooling has one query and is not worth a kernel"
    ),
    Declined("HybridEmbed|HybridEmbedWithSize", "patch_embed", "convolutional stem: the kernel embeds pixels"),
    Declined("EvaBlockPostNorm|ResPostBlock", "block", _OTHER_BLOCK),
    Declined("ParallelScalingBlock|DiffParallelScalingBlock|ParallelThingsBlock", "block", _OTHER_BLOCK),
    Declined("WindowMultiHeadAttention|RelPosAttention", "attention", _POSITIONS),
    Declined("Attention", "attention", _POSITIONS, "use_rel_pos"),
)
