"""The architectures of docs/support.md: each the library's own class and options, made tiny, and how it is asked."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.vitfast import _dinov2 as _dinov2_copy
from tests.vitfast._models import randomise, timm_model
from vitfast import create_model

Call = Callable[[nn.Module, Tensor], Any]

WINDOWS = "attention within windows has no map over all patches"


def _itself(model: Any) -> nn.Module:
    return model


@dataclass(frozen=True)
class Architecture:
    """One architecture of one library.

    Attributes:
        library: as it is imported.
        name: the library's own.
        build: makes it, in evaluation mode and with weights that matter.
        size: (height, width) of the images.
        calls: the ways to ask for an output; the first is the plain one.
        hidden: the ways to ask for hidden states.
        no_maps: why it has no attention maps, if so.
        tower: the module that takes pixels alone.
        features: makes the library's feature extractor of it, which is called as it is.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    size: tuple[int, int]
    calls: tuple[Call, ...]
    hidden: tuple[Call, ...]
    no_maps: str = ""
    tower: Callable[[Any], nn.Module] = _itself
    features: Callable[[], nn.Module] | None = None

    def __str__(self) -> str:
        return f"{self.library}: {self.name}"


def _forward(model: nn.Module, x: Tensor) -> Any:
    return model(x)


# the reference and timm: the same names, options and calls

_FEATURES: tuple[Call, ...] = (
    _forward,
    lambda model, x: model.forward_features(x),
    lambda model, x: model.forward_head(model.forward_features(x), pre_logits=True),
)
_INTERMEDIATES: tuple[Call, ...] = (
    lambda model, x: model.forward_intermediates(x),
    lambda model, x: model.forward_intermediates(x, indices=[0], intermediates_only=True),
)
_VIT_INTERMEDIATES: tuple[Call, ...] = (*_INTERMEDIATES, lambda model, x: model.get_intermediate_layers(x, 2))


def _sized(name: str, head: int) -> dict[str, Any]:
    """Two blocks of two heads as wide as the architecture's own, and an image that is not square."""
    size = (28, 42) if "patch14" in name else (64, 96) if "patch32" in name or "_s32_" in name else (32, 48)
    return {"img_size": size, "embed_dim": 2 * head, "depth": 2, "num_heads": 2, "num_classes": 5}


def _reference(name: str, head: int = 64) -> Architecture:
    options = _sized(name, head)

    def build() -> nn.Module:
        return randomise(create_model(name, **options)).eval()

    return Architecture("vitfast", name, build, options["img_size"], _FEATURES, _VIT_INTERMEDIATES)


def _timm(
    name: str, options: dict[str, Any], hidden: tuple[Call, ...] = _VIT_INTERMEDIATES, no_maps: str = ""
) -> Architecture:
    def build(**more: Any) -> nn.Module:
        model: Any = timm_model(name, **options, **more)
        if hasattr(model, "set_distilled_training"):
            # two outputs in training
            model.set_distilled_training(True)
        return model

    features = partial(build, features_only=True, out_indices=(0, 1))
    return Architecture("timm", name, build, options["img_size"], _FEATURES, hidden, no_maps, features=features)


def _timm_vit(name: str, head: int = 64, **changes: Any) -> Architecture:
    return _timm(name, {**_sized(name, head), **changes})


def _timm_eva(name: str, head: int = 64) -> Architecture:
    """A model of timm that has no `get_intermediate_layers`."""
    return _timm(name, _sized(name, head), _INTERMEDIATES)


def timm_swin(name: str, window: int, **changes: Any) -> Architecture:
    # two windows by three, merged to one by one and a half that timm pads
    options = {"embed_dim": 64, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5, "window_size": window}
    size = (8 * window, 12 * window)
    return _timm(name, {**options, "img_size": size, **changes}, _INTERMEDIATES, WINDOWS)


# Transformers: a class, its configuration, and what it is called with

_TINY: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 99,
    "max_position_embeddings": 24,
}
_SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}


def _hf(
    name: str,
    config: Callable[[Any], Any],
    size: int = 32,
    tokens: Tensor | None = None,
    no_maps: str = "",
    tower: Callable[[Any], nn.Module] = _itself,
) -> Architecture:
    """A class of Transformers, of a configuration that is made of `transformers`; with `tokens` it reads text too."""

    def build() -> nn.Module:
        transformers = importlib.import_module("transformers")
        return randomise(getattr(transformers, name)(config(transformers))).eval()

    def call(model: nn.Module, x: Tensor, **options: Any) -> Any:
        text = {} if tokens is None else {"input_ids": tokens.to(x.device).expand(len(x), -1)}
        return model(pixel_values=x, **text, **options)

    calls = (call, partial(call, return_dict=False))
    hidden = tuple(partial(way, output_hidden_states=True) for way in calls)
    return Architecture("transformers", name, build, (size, size), calls, hidden, no_maps, tower)


def _hf_vit(name: str, config: str, **changes: Any) -> Architecture:
    return _hf(name, lambda transformers: getattr(transformers, config)(**{**_TINY, **changes}))


def _hf_swin(name: str, config: str) -> Architecture:
    return _hf(name, lambda transformers: getattr(transformers, config)(**_SWIN), no_maps=WINDOWS)


def _hf_towers(name: str, config: str) -> Architecture:
    return _hf(
        name,
        lambda transformers: getattr(transformers, config)(text_config=_TEXT, vision_config=_TINY),
        tokens=torch.arange(3, 12)[None],
        tower=lambda model: model.vision_model,
    )


def _llava(transformers: Any) -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_TINY),
        text_config=transformers.LlamaConfig(**_TEXT, num_key_value_heads=2, pad_token_id=0, use_cache=False),
        image_token_index=98,
    )


# torchvision: the options that its builders fix, at another size

_TV_NODES = "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"


def _torchvision(
    name: str, make: Callable[[Any], nn.Module], size: tuple[int, int], nodes: tuple[str, ...], no_maps: str = ""
) -> Architecture:
    def build() -> nn.Module:
        return randomise(make(importlib.import_module("torchvision.models"))).eval()

    def extract(model: nn.Module, x: Tensor) -> Any:
        extraction = importlib.import_module("torchvision.models.feature_extraction")
        return extraction.create_feature_extractor(model, list(nodes)).train(model.training)(x)

    return Architecture("torchvision", name, build, size, (_forward,), (extract,), no_maps)


def _tv_vit(name: str, patch: int, head: int = 64, **changes: Any) -> Architecture:
    options = {"num_layers": 2, "num_heads": 2, "hidden_dim": 2 * head, "mlp_dim": 4 * head, "num_classes": 5}

    def make(models: Any) -> nn.Module:
        extra = {key: value(models) if callable(value) else value for key, value in changes.items()}
        vit = models.vision_transformer.VisionTransformer
        return vit(image_size=3 * patch, patch_size=patch, **options, **extra)

    return _torchvision(name, make, (3 * patch, 3 * patch), _TV_NODES)


def _conv_stem(models: Any) -> Any:
    layer = models.vision_transformer.ConvStemConfig
    return [layer(out_channels=16, kernel_size=3, stride=4), layer(out_channels=24, kernel_size=3, stride=4)]


def _tv_swin(name: str, window: int, block: str, merging: str) -> Architecture:
    def make(models: Any) -> nn.Module:
        module = models.swin_transformer
        return module.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=64,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=[window, window],
            stochastic_depth_prob=0.2,
            num_classes=5,
            block=getattr(module, block),
            downsample_layer=getattr(module, merging),
        )

    return _torchvision(name, make, (8 * window, 12 * window), ("features.1", "features.3"), WINDOWS)


# open_clip: the model's own configuration, at another size

_OC_HIDDEN: tuple[Call, ...] = (
    lambda model, x: model.forward_intermediates(x),
    lambda model, x: model.forward_intermediates(x, indices=[0], normalize_intermediates=True, output_fmt="NLC"),
)


def _open_clip(name: str, head: int = 64) -> Architecture:
    patch = int(name.split("-")[2])
    size = (2 * patch, 3 * patch)

    def build() -> nn.Module:
        open_clip = importlib.import_module("open_clip")
        config = open_clip.get_model_config(name)
        config["vision_cfg"].update(image_size=size, layers=2, width=2 * head)
        config["text_cfg"].update(width=32, heads=2, layers=1, vocab_size=99)
        config["embed_dim"] = 32
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CLIP
        if "multimodal_cfg" in config:
            config["multimodal_cfg"].update(width=32, heads=2, layers=1)
            config["vision_cfg"].update(attn_pooler_heads=2)
        config.pop("custom_text", None)
        return randomise(kind(**config).visual).eval()

    # CoCa's last norm has another width than its blocks
    hidden = _OC_HIDDEN[:1] if name.startswith("coca") else _OC_HIDDEN
    return Architecture("open_clip", f"{name}, visual", build, size, (_forward,), hidden)


def _open_clip_both() -> Architecture:
    size = (64, 64)

    def build() -> nn.Module:
        open_clip = importlib.import_module("open_clip")
        config = open_clip.get_model_config("ViT-B-32")
        config["vision_cfg"].update(image_size=size, layers=2, width=128)
        config["text_cfg"].update(width=32, heads=2, layers=2, vocab_size=99, context_length=12)
        return randomise(open_clip.CLIP(**{**config, "embed_dim": 32})).eval()

    def call(model: nn.Module, x: Tensor) -> Any:
        return model(x, torch.arange(12, device=x.device).expand(len(x), -1))

    def hidden(model: Any, x: Tensor) -> Any:
        return model.forward_intermediates(x, torch.arange(12, device=x.device).expand(len(x), -1))

    tower: Callable[[Any], nn.Module] = lambda model: model.visual  # noqa: E731
    return Architecture("open_clip", "ViT-B-32, both towers", build, size, (call,), (hidden,), tower=tower)


def _open_clip_timm() -> Architecture:
    def build() -> nn.Module:
        kind = importlib.import_module("open_clip.timm_model").TimmModel
        return randomise(kind("test_vit", embed_dim=32, image_size=(32, 48), pool="token")).eval()

    return Architecture("open_clip", "TimmModel of test_vit", build, (32, 48), (_forward,), _OC_HIDDEN)


# DINOv2: its repository's classes, which are no package, by a copy of their structure

_DINO_CALLS: tuple[Call, ...] = (
    _forward,
    lambda model, x: model(x, is_training=True),
    lambda model, x: model.forward_features(x, masks=(torch.arange(6, device=x.device) % 2 == 0).expand(len(x), -1)),
)
_DINO_HIDDEN: tuple[Call, ...] = (
    lambda model, x: model.get_intermediate_layers(x, 2),
    lambda model, x: model.get_intermediate_layers(x, [0], reshape=True, return_class_token=True, norm=False),
)


def _dinov2(name: str, **options: Any) -> Architecture:
    def build() -> nn.Module:
        kind = _dinov2_copy.DinoVisionTransformer
        model = kind(img_size=42, patch_size=14, embed_dim=128, num_heads=2, init_values=1.0, **options)
        return randomise(model).eval()

    # positions are resized to it
    return Architecture("dinov2", name, build, (28, 42), _DINO_CALLS, _DINO_HIDDEN)


ARCHITECTURES = (
    _reference("vit_base_patch16_224"),
    _reference("vit_huge_patch14_224", head=80),
    _reference("vit_base_patch16_gap_224"),
    _reference("vit_base_patch16_clip_quickgelu_224"),
    _reference("vit_so400m_patch14_siglip_224", head=72),
    _reference("vit_small_patch14_reg4_dinov2"),
    _reference("deit_tiny_distilled_patch16_224"),
    _reference("deit3_small_patch16_224"),
    _timm_vit("vit_base_patch16_224"),
    _timm_vit("vit_base_patch32_224"),
    _timm_vit("vit_base_patch8_224"),
    _timm_vit("vit_base_patch16_224_miil"),
    _timm_vit("vit_base_patch16_gap_224"),
    _timm_vit("vit_huge_patch14_224", head=80),
    _timm_vit("vit_giant_patch14_224", head=88),
    _timm_vit("vit_base_patch16_clip_224"),
    _timm_vit("vit_base_patch16_clip_quickgelu_224"),
    _timm_vit("vit_gigantic_patch14_clip_224", head=104),
    _timm_vit("vit_base_patch16_siglip_224"),
    _timm_vit("vit_base_patch16_siglip_gap_224"),
    _timm_vit("vit_so400m_patch14_siglip_224", head=72),
    _timm_vit("vit_so150m_patch16_reg4_map_256"),
    _timm_vit("vit_small_patch14_dinov2"),
    _timm_vit("vit_small_patch14_reg4_dinov2"),
    _timm_vit("vit_giant_patch14_dinov2"),
    _timm_vit("vit_mediumd_patch16_reg4_gap_256"),
    _timm_vit("vit_intern300m_patch14_448"),
    _timm_vit("flexivit_small"),
    _timm_vit("aimv2_large_patch14_224", head=128),
    _timm_vit("vit_tiny_r_s16_p8_224", img_size=(64, 96)),
    _timm_vit("vit_small_r26_s32_224"),
    _timm_vit("vit_base_resnet26d_224", img_size=(64, 96)),
    _timm_vit("vit_pwee_patch16_reg1_gap_256"),
    _timm_vit("vit_base_patch16_rpn_224"),
    _timm_vit("deit_tiny_distilled_patch16_224"),
    _timm_vit("deit3_small_patch16_224"),
    _timm_eva("beit_base_patch16_224"),
    _timm_eva("beitv2_base_patch16_224"),
    _timm_eva("eva_giant_patch14_224", head=88),
    _timm_vit("eva_large_patch14_196"),
    _timm_eva("eva02_tiny_patch14_224"),
    _timm_eva("eva02_base_patch16_clip_224"),
    _timm_eva("vit_base_patch16_rope_224"),
    _timm_eva("vit_small_patch16_dinov3"),
    _timm_eva("vit_relpos_base_patch16_224"),
    timm_swin("swin_tiny_patch4_window7_224", 7),
    timm_swin("swin_s3_tiny_224", 7, window_size=(7, 14)),
    # timm 1.0.29 does not make masks for windows of Swin V2 that it pads
    timm_swin("swinv2_tiny_window8_256", 8, img_size=(64, 128)),
    timm_swin("swinv2_cr_tiny_224", 7, img_size=(56, 112)),
    _hf_vit("ViTModel", "ViTConfig"),
    _hf_vit("ViTForImageClassification", "ViTConfig", num_labels=5),
    _hf_vit("ViTForMaskedImageModeling", "ViTConfig", encoder_stride=8),
    _hf_vit("ViTMSNModel", "ViTMSNConfig"),
    # all patches, since which ones are masked is drawn anew
    _hf_vit("ViTMAEModel", "ViTMAEConfig", mask_ratio=0.0),
    _hf_vit("IJepaModel", "IJepaConfig"),
    _hf_vit("DeiTModel", "DeiTConfig"),
    _hf_vit("DeiTForImageClassificationWithTeacher", "DeiTConfig", num_labels=5),
    _hf_vit("BeitModel", "BeitConfig", use_relative_position_bias=True),
    _hf_vit("BeitForImageClassification", "BeitConfig", use_shared_relative_position_bias=True, num_labels=5),
    _hf_vit("Data2VecVisionModel", "Data2VecVisionConfig", use_relative_position_bias=True),
    _hf_vit("Dinov2Model", "Dinov2Config", mlp_ratio=2),
    _hf_vit("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2, use_swiglu_ffn=True, num_labels=5),
    _hf_vit("Dinov2Backbone", "Dinov2Config", mlp_ratio=2, out_features=["stage1", "stage2"]),
    _hf_vit("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", mlp_ratio=2),
    _hf_vit("DINOv3ViTModel", "DINOv3ViTConfig"),
    _hf_vit("CLIPVisionModel", "CLIPVisionConfig"),
    _hf_vit("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=16),
    _hf_towers("CLIPModel", "CLIPConfig"),
    _hf_vit("CLIPSegVisionModel", "CLIPSegVisionConfig"),
    _hf_vit("MetaClip2VisionModel", "MetaClip2VisionConfig"),
    _hf_vit("SiglipVisionModel", "SiglipVisionConfig"),
    _hf_towers("SiglipModel", "SiglipConfig"),
    _hf(
        "LlavaForConditionalGeneration",
        _llava,
        tokens=torch.tensor([[3, *[98] * 16, 4, 5]]),
        tower=lambda model: model.model.vision_tower,
    ),
    _hf_swin("SwinModel", "SwinConfig"),
    _hf_swin("Swinv2Model", "Swinv2Config"),
    _tv_vit("vit_b_16", 16),
    _tv_vit("vit_b_32", 32),
    _tv_vit("vit_h_14", 14, head=80),
    _tv_vit("VisionTransformer with a ConvStem", 16, conv_stem_configs=_conv_stem),
    _tv_swin("swin_t", 7, "SwinTransformerBlock", "PatchMerging"),
    _tv_swin("swin_v2_t", 8, "SwinTransformerBlockV2", "PatchMergingV2"),
    _open_clip("ViT-B-32"),
    _open_clip("ViT-L-14-quickgelu"),
    _open_clip("ViT-H-14", head=80),
    _open_clip("ViT-bigG-14", head=104),
    _open_clip("ViT-H-14-CLIPA", head=80),
    _open_clip("coca_ViT-B-32"),
    _open_clip_both(),
    _open_clip_timm(),
    _dinov2("dinov2_vitb14"),
    _dinov2("dinov2_vitb14_reg", num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0),
    _dinov2("dinov2_vitg14", ffn_layer=_dinov2_copy.SwiGLUFFN),
    _dinov2("DinoVisionTransformer in two chunks", block_chunks=2),
)
