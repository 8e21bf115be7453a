"""Pictures to prepare."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# (width, height): both orientations, larger and smaller than the crops, odd remainders, equal to a resize
SIZES = ((512, 333), (250, 399), (256, 256), (224, 224), (97, 61), (40, 150), (225, 301))
MODES = ("RGB", "L", "RGBA", "CMYK", "P", "1", "LA")


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise on a gradient: rounding shows in the one, aliasing in the other."""
    rng = np.random.default_rng(width * 1000 + height)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)], axis=-1)
    noise = rng.integers(-40, 41, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).convert(mode)


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
