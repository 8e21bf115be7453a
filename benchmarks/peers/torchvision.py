"""torchvision's ViT, with the same weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..workloads.base import Workload, dimensions, reference_model
from . import unusable
from .plain import eager_and_compiled


def _missing(workload: Workload, device: torch.device) -> str | None:
    if "dinov2" in workload.model:
        return "its ViT has no LayerScale"
    return unusable("torchvision.models.vision_transformer")


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's parameter names as torchvision's."""
    top = {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj.": "conv_proj.",
        "norm.": "encoder.ln.",
        "head.": "heads.head.",
    }
    rename = {
        "norm1.": "ln_1.",
        "norm2.": "ln_2.",
        "attn.qkv.": "self_attention.in_proj_",
        "attn.proj.": "self_attention.out_proj.",
        "mlp.fc1.": "mlp.0.",
        "mlp.fc2.": "mlp.3.",
    }
    out = {}
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            prefix = next(p for p in rename if rest.startswith(p))
            out[f"encoder.layers.encoder_layer_{index}.{rename[prefix]}{rest[len(prefix) :]}"] = tensor
        else:
            prefix = next(p for p in top if name.startswith(p))
            out[top[prefix] + name[len(prefix) :]] = tensor
    return out


def _model(workload: Workload, device: torch.device) -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    size = dimensions(workload.model)
    model = VisionTransformer(
        image_size=size["height"],
        patch_size=size["patch"],
        num_layers=size["depth"],
        num_heads=size["heads"],
        hidden_dim=size["dim"],
        mlp_dim=size["hidden"],
        num_classes=size["classes"],
    )
    model.load_state_dict(convert(reference_model(workload.model).state_dict()))
    return model.to(device, workload.torch_dtype).train(workload.op == "train")


PEERS = eager_and_compiled("torchvision", _missing, _model)
