"""Models whose attention probabilities are known, and rollouts by hand."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitfast
from vitfast.proof.subjects import seed_weights

TINY = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 3, "num_classes": 5}


def reference(**overrides) -> vitfast.VisionTransformer:
    options = {**TINY, **overrides}
    return seed_weights(vitfast.create_model("vit_tiny_patch16_224", **options), seed=1).eval()


def timm_vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    size = {"img_size": (16, 24), "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    return seed_weights(timm.create_model(name, **{**size, **options}), seed=7).eval()


def transformers_model(name: str, head: str = "Model", **changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 48}
    config = getattr(transformers, f"{name}Config")(**options, **{"image_size": 32, "patch_size": 8, **changes})
    return seed_weights(getattr(transformers, f"{name}{head}")(config), seed=3).eval()


def torchvision_vit() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    size = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 48}
    return torchvision.models.VisionTransformer(**size, num_classes=5)


def open_clip_vit() -> nn.Module:
    transformer = pytest.importorskip("open_clip.transformer")
    size = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "heads": 3, "mlp_ratio": 2.0}
    return transformer.VisionTransformer(**size, ls_init_value=0.1, output_dim=5)


def rollout_by_hand(maps: list[np.ndarray]) -> np.ndarray:
    result = np.eye(maps[0].shape[-1])
    for layer in maps:
        with_residual = 0.5 * layer + 0.5 * np.eye(layer.shape[-1])
        result = (with_residual / with_residual.sum(-1, keepdims=True)) @ result
    return result


def weighted_by_hand(probabilities: list[Tensor], gradients: Any) -> list[np.ndarray]:
    return [np.maximum((p.detach() * g).mean(1).numpy(), 0.0) for p, g in zip(probabilities, gradients, strict=True)]


def flow_by_hand(
    weighted: list[np.ndarray], prefix: int, grid: tuple[int, int], class_token: bool = True
) -> np.ndarray:
    """The paper's rollout of `[B, N, N]` layers, at the patches: `[B, rows, cols]`."""
    flows = [rollout_by_hand([layer[image] for layer in weighted]) for image in range(len(weighted[0]))]
    seen = [flow[0] if class_token else flow[prefix:].mean(0) for flow in flows]
    return np.stack([each[prefix:].reshape(grid) for each in seen])


@dataclass(frozen=True)
class Case:
    """A model, and how its own probabilities are had: `record` returns these and its logits."""

    build: Callable[[], nn.Module]
    record: Callable[[nn.Module, Tensor], tuple[Sequence[Tensor], Tensor]]
    prefix: int
    class_token: bool = True
    size: tuple[int, int] = (32, 48)
    tolerance: float = 1e-9


def by_softmax(model: nn.Module, pixels: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """Attention written out in the place of torch's."""
    seen: list[Tensor] = []

    def written_out(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        logits = torch.einsum("bhnd,bhmd->bhnm", q, k) * (scale or q.shape[-1] ** -0.5)
        logits = logits if attn_mask is None else logits + attn_mask
        seen.append(torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True))
        return seen[-1] @ v

    # with gradients, as torch's fast path calls no softmax of Python's
    with mock.patch.object(F, "scaled_dot_product_attention", written_out):
        return seen, model(pixels)


def by_timm(model: Any, pixels: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """Its unfused path hands its probabilities to a dropout."""
    seen: list[Tensor] = []
    handles = []
    for block in model.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    logits = model(pixels)
    for block, handle in zip(model.blocks, handles, strict=True):
        handle.remove()
        block.attn.fused_attn = True
    return seen, logits


def by_transformers(model: Any, pixels: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """Its eager attention, whose softmax is in fp32, whatever the model is in."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    output = eager(pixels, output_attentions=True)
    return output.attentions, by_first(output)


def by_first(output: Any) -> Tensor:
    """Logits of a record, or its class tokens."""
    return output[0] if output[0].ndim == 2 else output[0][:, 0]


def hugging_face(name: str, prefix: int, head: str = "ForImageClassification", **options: Any) -> Case:
    size = (32, 48) if "Dino" in name else (32, 32)
    labels = {"num_labels": 5} if head == "ForImageClassification" else {}
    build = functools.partial(transformers_model, name, head, **labels, **options)
    return Case(build, by_transformers, prefix, name != "SiglipVision", size, 1e-4)


def timm_case(prefix: int, *args: Any, **options: Any) -> Case:
    return Case(functools.partial(timm_vit, *args, **options), by_timm, prefix, size=(16, 24))


CASES = {
    "reference": Case(reference, by_softmax, 1),
    "no class token": Case(lambda: reference(class_token=False, global_pool="avg"), by_softmax, 0, False),
    "registers, qk norm": Case(lambda: reference(reg_tokens=4, qk_norm=True, no_embed_class=True), by_softmax, 5),
    "distilled, LayerScale": Case(lambda: reference(distilled=True, init_values=0.1), by_softmax, 2),
    "relative positions": Case(lambda: reference(pos_embed="relative"), by_softmax, 1),
    "timm": timm_case(3, qk_norm=True, reg_tokens=2),
    "BEiT": timm_case(1, "beit_base_patch16_224", init_values=0.1),
    "BEiT, shared bias": timm_case(1, "beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    "EVA-02": timm_case(1, "eva02_tiny_patch14_224"),
    "EVA-02, separate": timm_case(1, "eva02_base_patch14_224", qkv_fused=False, scale_attn_inner=True),
    "rotary ViT": timm_case(3, "vit_small_patch16_rope_224", num_reg_tokens=2),
    "torchvision": Case(torchvision_vit, by_softmax, 1, size=(32, 32)),
    "open_clip": Case(open_clip_vit, by_softmax, 1, size=(32, 32)),
    "Transformers ViT": hugging_face("ViT", 1),
    "DeiT": hugging_face("DeiT", 2),
    "CLIP": hugging_face("CLIPVision", 1, "Model"),
    "SigLIP": hugging_face("SiglipVision", 0, "Model"),
    "DINOv2": hugging_face("Dinov2", 1),
    "DINOv2, registers": hugging_face("Dinov2WithRegisters", 5),
    "Transformers BEiT": hugging_face("Beit", 1, use_relative_position_bias=True),
    "Transformers BEiT, shared bias": hugging_face("Beit", 1, use_shared_relative_position_bias=True),
}
