"""Named configurations: timm's names and timm's meaning, as keyword arguments of `VisionTransformer`.

A name reads `family_size_patchP_variant_resolution`. Everything in an entry can be overridden, so that sizes
without a name of their own are one argument away: `create_model("vit_large_patch16_224", patch_size=8)`.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import os
from typing import Any

from .vit import VisionTransformer

Options = dict[str, Any]

# width, depth and heads: table 1 of the paper (B, L, H), arXiv 2106.10270 (Ti, S), 2106.04560 (g, G),
# 2305.13035 (so400m)
_SIZES: dict[str, Options] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "medium": {"embed_dim": 512, "depth": 12, "num_heads": 8},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "so400m": {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    "giantopt": {"embed_dim": 1536, "depth": 40, "num_heads": 16},
    "gigantic": {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13},
}
# DINOv2's giant is its own: wider than ViT-g, with SwiGLU, whose ratio counts gate and value
_DINOV2_GIANT: Options = {
    "embed_dim": 1536,
    "depth": 40,
    "num_heads": 24,
    "mlp_ratio": 2.66667 * 2,
    "mlp_layer": "swiglu",
}

_DEIT3: Options = {"no_embed_class": True, "init_values": 1e-6}
_GAP: Options = {"class_token": False, "global_pool": "avg", "fc_norm": False}
_CLIP: Options = {"pre_norm": True, "norm_eps": 1e-5}
_SIGLIP: Options = {"class_token": False, "global_pool": "map", "num_classes": 0}
_DINOV2: Options = {"init_values": 1e-5, "num_classes": 0}
_REG4: Options = {"reg_tokens": 4, "no_embed_class": True}
_TANH: Options = {"act_layer": "gelu_tanh"}
_QUICK: Options = {"act_layer": "quick_gelu"}


def _entry(size: str, patch_size: int, img_size: int, *options: Options) -> Options:
    merged: Options = {"img_size": img_size, "patch_size": patch_size, **_SIZES[size]}
    for option in options:
        merged.update(option)
    return merged


def _table() -> dict[str, Options]:
    table: dict[str, Options] = {}

    # the paper's models and their relatives
    for size, patch, img in (
        ("tiny", 16, 224), ("tiny", 16, 384),
        ("small", 8, 224), ("small", 16, 224), ("small", 16, 384), ("small", 32, 224), ("small", 32, 384),
        ("base", 8, 224), ("base", 16, 224), ("base", 16, 384), ("base", 32, 224), ("base", 32, 384),
        ("large", 14, 224), ("large", 16, 224), ("large", 16, 384), ("large", 32, 224), ("large", 32, 384),
        ("huge", 14, 224), ("giant", 14, 224), ("gigantic", 14, 224),
    ):  # fmt: skip
        table[f"vit_{size}_patch{patch}_{img}"] = _entry(size, patch, img)
    # timm publishes these three without a head
    for name in ("vit_small_patch8_224", "vit_large_patch32_224", "vit_huge_patch14_224"):
        table[name]["num_classes"] = 0

    # no class token, mean of the patches
    table["vit_base_patch16_gap_224"] = _entry("base", 16, 224, _GAP, {"num_heads": 16})
    table["vit_huge_patch14_gap_224"] = _entry("huge", 14, 224, _GAP, {"num_classes": 0})
    table["vit_huge_patch16_gap_448"] = _entry("huge", 16, 448, _GAP, {"num_classes": 0})
    table["vit_giant_patch16_gap_224"] = _entry("giant", 16, 224, _GAP, {"num_classes": 0})
    for img in (256, 384):
        table[f"vit_medium_patch16_gap_{img}"] = _entry(
            "medium", 16, img, _GAP, {"qkv_bias": False, "init_values": 1e-6}
        )

    # arXiv 2012.12877 and 2204.07118
    for size in ("tiny", "small", "base"):
        for img in (224, 384) if size == "base" else (224,):
            table[f"deit_{size}_patch16_{img}"] = _entry(size, 16, img)
            table[f"deit_{size}_distilled_patch16_{img}"] = _entry(size, 16, img, {"distilled": True})
    for size, patch, img in (
        ("small", 16, 224), ("small", 16, 384), ("medium", 16, 224), ("base", 16, 224), ("base", 16, 384),
        ("large", 16, 224), ("large", 16, 384), ("huge", 14, 224),
    ):  # fmt: skip
        table[f"deit3_{size}_patch{patch}_{img}"] = _entry(size, patch, img, _DEIT3)

    # arXiv 2103.00020 and OpenCLIP; the head is CLIP's projection, or a classifier where timm's default
    # checkpoint is fine-tuned
    for size, patch, img, classes in (
        ("base", 32, 224, 1000), ("base", 32, 256, 512), ("base", 32, 384, 1000), ("base", 32, 448, 1000),
        ("base", 16, 224, 1000), ("base", 16, 384, 1000),
        ("large", 14, 224, 1000), ("large", 14, 336, 1000),
        ("huge", 14, 224, 1000), ("huge", 14, 336, 1000), ("huge", 14, 378, 1024),
        ("giant", 14, 224, 1024), ("gigantic", 14, 224, 1280), ("gigantic", 14, 378, 1280),
    ):  # fmt: skip
        table[f"vit_{size}_patch{patch}_clip_{img}"] = _entry(size, patch, img, _CLIP, {"num_classes": classes})
    for size, patch, img, classes in (
        ("base", 32, 224, 512), ("base", 16, 224, 512), ("large", 14, 224, 768), ("large", 14, 336, 768),
        ("huge", 14, 224, 1024), ("huge", 14, 378, 1024), ("gigantic", 14, 224, 1280),
    ):  # fmt: skip
        table[f"vit_{size}_patch{patch}_clip_quickgelu_{img}"] = _entry(
            size, patch, img, _CLIP, _QUICK, {"num_classes": classes}
        )

    # arXiv 2303.15343 and 2502.14786; which of them use the tanh GELU follows timm, for equal outputs
    for size, patch, img, gelu in (
        ("base", 32, 256, _TANH),
        ("base", 16, 224, {}), ("base", 16, 256, {}), ("base", 16, 384, {}), ("base", 16, 512, {}),
        ("large", 16, 256, {}), ("large", 16, 384, {}), ("large", 16, 512, _TANH),
        ("so400m", 14, 224, {}), ("so400m", 14, 378, {}),
        ("so400m", 16, 256, _TANH), ("so400m", 16, 384, _TANH), ("so400m", 16, 512, _TANH),
        ("giantopt", 16, 256, _TANH), ("giantopt", 16, 384, _TANH),
    ):  # fmt: skip
        table[f"vit_{size}_patch{patch}_siglip_{img}"] = _entry(size, patch, img, _SIGLIP, gelu)

    # arXiv 2304.07193, with registers 2309.16588
    for size in ("small", "base", "large", "giant"):
        own = _DINOV2_GIANT if size == "giant" else {}
        table[f"vit_{size}_patch14_dinov2"] = _entry(size, 14, 518, _DINOV2, own)
        table[f"vit_{size}_patch14_reg4_dinov2"] = _entry(size, 14, 518, _DINOV2, own, _REG4)
    return table


ARCHITECTURES: dict[str, Options] = _table()


_HALF = (0.5, 0.5, 0.5)
_IMAGENET: Options = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_OPENAI: Options = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}

# how timm's default checkpoint of a name wants its images, in timm's words; a later pattern overrides an earlier one
_IMAGES: tuple[tuple[str, Options], ...] = (
    ("*", {"interpolation": "bicubic", "mean": _HALF, "std": _HALF, "crop_pct": 0.9, "crop_mode": "center"}),
    ("*_384", {"crop_pct": 1.0}),
    ("*_siglip_*", {"crop_pct": 0.9}),
    ("vit_medium_*", {"crop_pct": 0.95}),
    ("deit*", _IMAGENET),
    ("vit_small_patch8_224", _IMAGENET),  # DINO
    ("vit_huge_*_gap_*", _IMAGENET),  # I-JEPA, as ViT-g
    ("vit_giant_*_gap_*", _IMAGENET),
    ("vit_huge_*_gap_448", {"crop_pct": 1.0}),
    ("*_dinov2", {**_IMAGENET, "crop_pct": 1.0}),
    ("*_clip_*", {**_OPENAI, "crop_pct": 1.0}),
    ("vit_large_patch14_clip_[23]*", {"mean": _HALF, "std": _HALF}),
    ("vit_base_patch32_clip_*224", {"crop_pct": 0.9}),
    ("vit_base_patch16_clip_224", {"crop_pct": 0.95}),
    *(
        (name, {"crop_mode": "squash"})
        for name in (
            "vit_medium_patch16_gap_384", "vit_base_patch16_clip_384", "vit_large_patch14_clip_336",
            "vit_huge_patch14_clip_336", "vit_gigantic_patch14_clip_378",
        )
    ),
)  # fmt: skip


def _images(name: str) -> Options:
    merged: Options = {}
    for pattern, options in _IMAGES:
        if fnmatch.fnmatchcase(name, pattern):
            merged.update(options)
    return merged


def _close_to(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, n=4, cutoff=0.5)
    return ", ".join(map(repr, close)) if close else "none is close"


def list_models(pattern: str | None = None) -> list[str]:
    """Names that `create_model` knows, sorted; with a shell pattern such as "*clip*", only those it matches."""
    return sorted(name for name in ARCHITECTURES if pattern is None or fnmatch.fnmatchcase(name, pattern))


def create_model(name: str, weights: str | os.PathLike[str] | None = None, **overrides: Any) -> VisionTransformer:
    """Builds a named Vision Transformer, in training mode and on the default device, like any torch module.

    Its `pretrained_cfg` says how timm's default checkpoint of that name wants its images, which `vitfast.image_spec`
    and timm's `resolve_data_config` read. A checkpoint from elsewhere may want other ones.

    Args:
        name: One of `list_models()`.
        weights: Checkpoint file to load with `vitfast.load_weights`; `None` for random weights.
        **overrides: Arguments of `VisionTransformer` that differ from the named configuration, such as
            `img_size=(384, 256)` or `num_classes=10`.

    Raises:
        ValueError: For an unknown name, with the closest known ones, or a value the model does not accept.
        TypeError: For an override that `VisionTransformer` does not have, with the closest that it has.
    """
    if name not in ARCHITECTURES:
        raise ValueError(
            f"unknown model {name!r}; close matches: {_close_to(name, list_models())}; list_models() has all names"
        )
    accepted = list(inspect.signature(VisionTransformer).parameters)
    for option in overrides:
        if option not in accepted:
            raise TypeError(f"unknown option {option!r}; close matches: {_close_to(option, accepted)}")
    model: Any = VisionTransformer(**{**ARCHITECTURES[name], **overrides})
    stem = model.patch_embed
    model.pretrained_cfg = {"input_size": (stem.proj.in_channels, *stem.img_size), **_images(name)}
    if weights is not None:
        from .weights.load import load_weights

        load_weights(model, weights)
    return model
