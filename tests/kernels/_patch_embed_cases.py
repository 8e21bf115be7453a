"""Cases of patch_embed."""

from __future__ import annotations

import torch

from tests.kernels._data import Arguments, Case, Data

# patch_embed


def _patch_embed(
    name: str,
    size: tuple[int, int, int],
    patch: tuple[int, int],
    d: int,
    *,
    prefix: int = 1,
    pos: str | None = "all",
    bias: bool = True,
    layout: str = "dense",
    uint8: bool = False,
    normalize: bool = False,
    wide: bool = False,
    crop: bool = False,
    weight_layout: str = "dense",
    real: bool = False,
    **marks: bool,
) -> Case:
    (c, height, width), (p, q) = size, patch
    n = (height // p) * (width // q)

    def make(data: Data, batch: int) -> Arguments:
        added = torch.promote_types(data.dtype, torch.float32) if wide else None
        shape = (batch, c, height + 5, width + 3) if crop else (batch, c, height, width)
        step = 1 / 255 if uint8 else 1.0
        pixels = data(*shape, layout=layout, dtype=torch.uint8 if uint8 else None)
        return {
            "pixels": pixels[:, :, 2 : 2 + height, 1 : 1 + width] if crop else pixels,
            "weight": data(d, c, p, q, scale=(c * p * q) ** -0.5, layout=weight_layout),
            "bias": data(d) if bias else None,
            "prefix": data(prefix, d, dtype=added) if prefix else None,
            "pos_embed": None if pos is None else data(n + (prefix if pos == "all" else 0), d, dtype=added),
            "scale": data(c, scale=0.1 * step, shift=4.0 * step) if normalize else None,
            "shift": data(c, scale=0.1, shift=-2.0) if normalize else None,
        }

    wrt = ["weight", *([] if uint8 else ["pixels"]), *(["bias"] if bias else [])]
    wrt += (["prefix"] if prefix else []) + ([] if pos is None else ["pos_embed"])
    return Case("patch_embed", name, make, tuple(wrt), real, **marks)


PATCH_EMBED = [
    _patch_embed("1x1", (1, 1, 1), (1, 1), 1),
    _patch_embed("small", (3, 12, 20), (4, 4), 13),
    _patch_embed("plain", (3, 12, 20), (4, 4), 13, prefix=0, pos=None, bias=False),
    _patch_embed("pos-of-patches", (3, 12, 20), (4, 4), 13, prefix=2, pos="patches"),
    _patch_embed("prefix-without-pos", (3, 12, 20), (4, 4), 13, prefix=5, pos=None),
    _patch_embed("prefix9", (3, 12, 20), (4, 4), 13, prefix=9),
    _patch_embed("non-square", (3, 14, 12), (7, 3), 31),
    _patch_embed("channels-last", (3, 12, 20), (4, 4), 13, layout="channels_last"),
    _patch_embed("channels-last-4", (4, 12, 20), (4, 2), 13, layout="channels_last", normalize=True),
    _patch_embed("channels-last-1", (1, 12, 20), (4, 4), 13, layout="channels_last"),
    _patch_embed("weight-channels-last", (3, 12, 20), (4, 4), 13, weight_layout="channels_last"),
    _patch_embed("normalized", (3, 12, 20), (4, 4), 13, normalize=True),
    _patch_embed("uint8", (3, 12, 20), (4, 4), 13, uint8=True, normalize=True),
    _patch_embed("uint8-plain", (3, 12, 20), (4, 4), 13, uint8=True),
    _patch_embed("uint8-channels-last", (3, 12, 20), (4, 4), 13, uint8=True, normalize=True, layout="channels_last"),
    _patch_embed("uint8-crop", (3, 12, 20), (4, 4), 13, uint8=True, normalize=True, crop=True),
    _patch_embed(
        "uint8-crop-channels-last",
        (3, 12, 20),
        (4, 4),
        13,
        uint8=True,
        normalize=True,
        crop=True,
        layout="channels_last",
    ),
    _patch_embed("crop", (3, 12, 20), (4, 4), 13, crop=True),
    _patch_embed("channels-last-cut", (3, 12, 20), (4, 4), 13, layout="channels_last_cut", normalize=True),
    _patch_embed("transposed", (3, 12, 20), (4, 4), 13, layout="transposed"),
    _patch_embed("broadcast", (3, 12, 20), (4, 4), 13, layout="broadcast"),
    _patch_embed("fp32-pos", (3, 12, 20), (4, 4), 13, wide=True),
    _patch_embed("many-images", (3, 4, 4), (2, 2), 71),
    _patch_embed("ViT-Ti-16", (3, 224, 224), (16, 16), 192, real=True),
    _patch_embed("ViT-B-16", (3, 224, 224), (16, 16), 768, real=True, interpret=False, core=True),
    _patch_embed(
        "ViT-B-16-uint8",
        (3, 224, 224),
        (16, 16),
        768,
        uint8=True,
        normalize=True,
        real=True,
        interpret=False,
        core=True,
    ),
    _patch_embed(
        "ViT-B-16-channels-last", (3, 224, 224), (16, 16), 768, layout="channels_last", real=True, interpret=False
    ),
    _patch_embed(
        "ViT-B-16-uint8-channels-last",
        (3, 224, 224),
        (16, 16),
        768,
        uint8=True,
        normalize=True,
        layout="channels_last",
        real=True,
        interpret=False,
        core=True,
    ),
    _patch_embed("CLIP-L-14", (3, 224, 224), (14, 14), 1024, bias=False, real=True, interpret=False),
    _patch_embed("DINOv2-registers", (3, 224, 224), (14, 14), 384, prefix=5, real=True, interpret=False),
    _patch_embed("ViT-B-32-384", (3, 384, 384), (32, 32), 768, real=True, interpret=False),
    _patch_embed("ViT-H-14-518", (3, 518, 518), (14, 14), 1280, real=True, interpret=False),
    _patch_embed("ViT-S-8", (3, 224, 224), (8, 8), 384, prefix=0, pos="patches", real=True, interpret=False),
]
