"""torchvision: `VisionTransformer`, Swin and Swin V2, and the MLPs that its other models share.

Contracts read in the sources of 0.28: the attention is `nn.MultiheadAttention`, called with `need_weights=False`; the
position embedding is the encoder's; images have one size, and others are refused by `torch._assert`; feature
extractors trace the model with `torch.fx`.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torchvision.models import swin_transformer, vision_transformer
from torchvision.ops.misc import MLP

from ... import layers
from ..known import Swap, around
from ..torch_nn import never
from .swin import FusedTorchvisionSwinBlock, FusedTorchvisionWindows, FusedTorchvisionWindowsV2
from .vit import FusedTorchvisionBlock, FusedTorchvisionMlp, FusedTorchvisionVisionTransformer


def _is_mlp(module: Any) -> bool:
    kinds = [nn.Linear, nn.Module, nn.Dropout, nn.Linear, nn.Dropout]
    return len(module) == len(kinds) and all(isinstance(m, kind) for m, kind in zip(module, kinds, strict=True))


def _decline_mlp(module: Any) -> str | None:
    if not _is_mlp(module):
        return "has other modules than torchvision puts there"
    if layers.epilogue(module[1]) is None:
        return f"activation {type(module[1]).__name__} is in no epilogue"
    return None


@functools.cache
def swaps() -> dict[type[nn.Module], Swap]:
    """Replaceable classes of torchvision."""
    return {
        MLP: Swap(around(FusedTorchvisionMlp, MLP), _decline_mlp, _is_mlp),
        vision_transformer.MLPBlock: Swap(around(FusedTorchvisionMlp, vision_transformer.MLPBlock), _decline_mlp),
        swin_transformer.ShiftedWindowAttention: Swap(
            around(FusedTorchvisionWindows, swin_transformer.ShiftedWindowAttention), never
        ),
        swin_transformer.ShiftedWindowAttentionV2: Swap(
            around(FusedTorchvisionWindowsV2, swin_transformer.ShiftedWindowAttentionV2), never
        ),
        swin_transformer.SwinTransformerBlock: Swap(
            around(FusedTorchvisionSwinBlock, swin_transformer.SwinTransformerBlock), never
        ),
        vision_transformer.EncoderBlock: Swap(around(FusedTorchvisionBlock, vision_transformer.EncoderBlock), never),
        vision_transformer.VisionTransformer: Swap(
            around(FusedTorchvisionVisionTransformer, vision_transformer.VisionTransformer), never
        ),
    }


@functools.cache
def declined() -> dict[type[nn.Module], tuple[str, str]]:
    """Classes of torchvision that are known and left alone."""
    return {swin_transformer.SwinTransformerBlockV2: ("block", "norms between branch and residual: parts are replaced")}
