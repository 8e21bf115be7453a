"""torchvision: `VisionTransformer`, Swin and Swin V2, and the MLPs that its other models share.

Contracts read in the sources of 0.28: the attention is `nn.MultiheadAttention`, called with `need_weights=False`; the
position embedding is the encoder's; images have one size, and others are refused by `torch._assert`; feature
extractors trace the model with `torch.fx`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..known import Call, Declined, Offer, of_images, of_tokens, pair, tokens
from ..torch_nn import decline_activation
from .swin import FusedTorchvisionSwinBlock, FusedTorchvisionWindows, FusedTorchvisionWindowsV2
from .vit import FusedTorchvisionBlock, FusedTorchvisionMlp, FusedTorchvisionVisionTransformer


def _is_mlp(module: Any) -> bool:
    kinds = [nn.Linear, nn.Module, nn.Dropout, nn.Linear, nn.Dropout]
    return len(module) == len(kinds) and all(isinstance(m, kind) for m, kind in zip(module, kinds, strict=True))


def _decline_mlp(module: Any) -> str | None:
    return decline_activation(module[1]) if _is_mlp(module) else "has other modules than torchvision puts there"


def _of_map(module: Any) -> list[Call]:
    """Maps of two windows by three, and one that windows do not divide."""
    attn = getattr(module, "attn", module)
    (rows, cols), width = pair(attn.window_size), attn.proj.weight.shape[0]
    return [Call((tokens(2, 2 * rows, 3 * cols, width),)), Call((tokens(1, 2 * rows + 1, cols, width),))]


OFFERS = (
    Offer("MLP", "mlp", (FusedTorchvisionMlp,), "", (of_tokens,), _decline_mlp, _is_mlp),
    Offer("MLPBlock", "mlp", (FusedTorchvisionMlp,), "", (of_tokens,), _decline_mlp),
    Offer("ShiftedWindowAttention", "attention", (FusedTorchvisionWindows,), "qkv proj window_size", (_of_map,)),
    Offer("ShiftedWindowAttentionV2", "attention", (FusedTorchvisionWindowsV2,), "qkv proj window_size", (_of_map,)),
    Offer("SwinTransformerBlock", "block", (FusedTorchvisionSwinBlock,), "norm1 attn norm2 mlp", (_of_map,)),
    Offer("EncoderBlock", "block", (FusedTorchvisionBlock,), "ln_1 self_attention ln_2 mlp", (of_tokens,)),
    Offer(
        "VisionTransformer",
        "model",
        (FusedTorchvisionVisionTransformer,),
        "conv_proj class_token encoder heads",
        of_images(lambda model: model.patch_size, lambda model: model.image_size),
    ),
)
DECLINED = (Declined("SwinTransformerBlockV2", "block", "norms between branch and residual: parts are replaced"),)
