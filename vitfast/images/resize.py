"""timm's evaluation transform in Pillow's calls, for the reference model, which needs no other library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

INTERPOLATIONS = {mode.name.lower(): mode for mode in Image.Resampling}


@dataclass(frozen=True)
class ResizeCrop:
    """An image resized and cropped in the centre, byte for byte as timm does (`data/transforms_factory.py`).

    Attributes:
        size: (height, width) of the result.
        crop_pct: share of the resized image's sides that the crop takes.
        crop_mode: "center" keeps the ratio of the sides, "squash" does not.
        interpolation: one of `INTERPOLATIONS`, antialiased; of tensors bilinear or bicubic.
    """

    size: tuple[int, int]
    crop_pct: float = 0.9
    crop_mode: str = "center"
    interpolation: str = "bicubic"

    MODES: ClassVar = ("center", "squash")

    def __post_init__(self) -> None:
        for name, value, accepted in (
            ("crop_mode", self.crop_mode, self.MODES),
            ("interpolation", self.interpolation, tuple(INTERPOLATIONS)),
        ):
            if value not in accepted:
                raise ValueError(f"{name} is {value!r}; accepted are {', '.join(map(repr, accepted))}")
        if not 0.0 < self.crop_pct <= 1.0:
            raise ValueError(f"crop_pct is {self.crop_pct}; accepted is above 0 and at most 1")

    def _target(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) to resize an image to."""
        rows, cols = (math.floor(side / self.crop_pct) for side in self.size)
        if self.crop_mode == "squash":
            return rows, cols
        if rows == cols:
            # torchvision's, in this order of operations: the product is exact
            longest = int(rows * max(height, width) / min(height, width))
            return (longest, rows) if width <= height else (rows, longest)
        ratio = min(height / rows, width / cols)
        return round(height / ratio), round(width / ratio)

    def __call__(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        if isinstance(image, Tensor):
            have = self._target(image.shape[1], image.shape[2])
            if have != image.shape[1:]:
                if self.interpolation not in ("bilinear", "bicubic"):
                    raise ValueError(f"tensors are not resized by {self.interpolation}, but by bilinear or bicubic")
                y = F.interpolate(image[None].float(), have, mode=self.interpolation, antialias=True)[0]
                image = y.clamp(0, 255).round().to(torch.uint8)
        else:
            have = self._target(image.height, image.width)
            if have != (image.height, image.width):
                image = image.resize(have[::-1], INTERPOLATIONS[self.interpolation])
        (height, width), (top, left) = self.size, (round((h - w) / 2) for h, w in zip(have, self.size, strict=True))
        if isinstance(image, Tensor):
            return image[:, top : top + height, left : left + width]
        return image.crop((left, top, left + width, top + height))
