"""Transformers' ViT with SDPA attention, with the same weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..workloads.base import Workload, dimensions, reference_model
from . import unusable
from .plain import eager_and_compiled


def _missing(workload: Workload, device: torch.device) -> str | None:
    if "dinov2" in workload.model:
        return "its ViT has no LayerScale"
    return unusable("transformers.models.vit.modeling_vit", "transformers")


def convert(state: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """timm's parameter names as Transformers', in the module layout that `names` shows (4.x or 5.x)."""
    modern = any(".attention.q_proj." in name for name in names)
    layer = "vit.layers." if modern else "vit.encoder.layer."
    old_projections = ("attention.query", "attention.key", "attention.value")
    projections = ("q_proj", "k_proj", "v_proj") if modern else old_projections
    rename = {
        "norm1.": "layernorm_before.",
        "norm2.": "layernorm_after.",
        "attn.proj.": "attention.o_proj." if modern else "attention.output.dense.",
        "mlp.fc1.": "mlp.fc1." if modern else "intermediate.dense.",
        "mlp.fc2.": "mlp.fc2." if modern else "output.dense.",
    }
    top = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj.": "vit.embeddings.patch_embeddings.projection.",
        "norm.": "vit.layernorm.",
        "head.": "classifier.",
    }
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith("blocks."):
            prefix = next(p for p in top if name.startswith(p))
            out[top[prefix] + name[len(prefix) :]] = tensor
            continue
        _, index, rest = name.split(".", 2)
        if rest.startswith("attn.qkv."):
            for projection, part in zip(projections, tensor.chunk(3), strict=True):
                out[f"{layer}{index}.attention.{projection}.{rest.rpartition('.')[2]}"] = part
            continue
        prefix = next(p for p in rename if rest.startswith(p))
        out[f"{layer}{index}.{rename[prefix]}{rest[len(prefix) :]}"] = tensor
    return out


def _model(workload: Workload, device: torch.device) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    size = dimensions(workload.model)
    config = ViTConfig(
        hidden_size=size["dim"],
        num_hidden_layers=size["depth"],
        num_attention_heads=size["heads"],
        intermediate_size=size["hidden"],
        image_size=size["height"],
        patch_size=size["patch"],
        layer_norm_eps=reference_model(workload.model).norm.eps,
        num_labels=size["classes"],
    )
    config._attn_implementation = "sdpa"
    model = ViTForImageClassification(config)
    model.load_state_dict(convert(reference_model(workload.model).state_dict(), set(model.state_dict())))
    return model.to(device, workload.torch_dtype).train(workload.op == "train")


PEERS = eager_and_compiled("Transformers", _missing, _model, lambda output: output.logits)
