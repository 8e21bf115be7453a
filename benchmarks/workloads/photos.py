"""Photographs, and how they become a model's pixels."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vitfast import ImageSpec
from vitfast.images.resize import ResizeCrop

from .base import reference_model

PHOTOS = 32
PHOTO_SIZES = ((500, 375), (375, 500), (640, 480), (500, 333))
"""How many photographs, and their widths and heights: ImageNet's usual ones."""

MEAN = STD = 0.5
"""Of every channel, for pixels between 0 and 1: timm's for its ViTs."""


class Normalized(nn.Module):
    """A model behind what pipelines do with decoded pixels, `[B, 3, H, W]` uint8: normalise in fp32, then cast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        wide = pixels.to(torch.promote_types(dtype, torch.float32))
        return self.model(((wide / 255 - MEAN) / STD).to(dtype))


def photo_spec(model: str) -> ImageSpec:
    """How photographs become a model's pixels: resized and cropped as timm does for its ViTs."""
    size = reference_model(model).patch_embed.img_size
    return ImageSpec(size, (MEAN,) * 3, (STD,) * 3, ResizeCrop(size))


@functools.cache
def photo_files() -> tuple[Any, list[str]]:
    """A temporary folder of JPEG files, and their paths: seeded noise of all scales, which compresses as photographs
    do (2 to 4 bits a pixel)."""
    folder = tempfile.TemporaryDirectory(prefix="vitfast-photos-")
    generator = torch.Generator().manual_seed(0)
    paths = []
    for i in range(PHOTOS):
        width, height = PHOTO_SIZES[i % len(PHOTO_SIZES)]
        image = torch.full((1, 3, height, width), 127.0)
        for scale in (1, 2, 4, 8, 16, 32, 64, 128):
            noise = torch.randn(1, 3, height // scale + 2, width // scale + 2, generator=generator)
            image += 4.0 * scale**0.6 * F.interpolate(noise, (height, width), mode="bicubic")
        pixels = image[0].clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy()
        paths.append(str(Path(folder.name) / f"{i:02}.jpg"))
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return folder, paths
