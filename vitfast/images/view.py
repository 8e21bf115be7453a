"""The part of a photograph that a model sees, for people to look at."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

from .spec import ImageSpec
from .transforms import preprocess


def seen_part(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """What a model's transform leaves of an RGB photograph, at the photograph's own resolution; where it pads, black.

    The transform is given a picture of ramps in the photograph's place: what comes out says where it came from.
    """
    width, height = image.size
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    ramps = np.rint(np.stack([across, down, np.full_like(down, 255)], axis=-1)).astype(np.uint8)
    red, green, blue = preprocess(Image.fromarray(ramps), spec)[0].double().numpy()
    inside = blue > 250  # not padded
    columns, rows = inside.any(axis=0).nonzero()[0], inside.any(axis=1).nonzero()[0]
    left, right = _ends(red[rows].mean(axis=0)[columns], columns, width, spec.size[1])
    top, bottom = _ends(green[:, columns].mean(axis=1)[rows], rows, height, spec.size[0])
    return image.crop((left, top, right, bottom))


def _ends(ramp: np.ndarray, at: np.ndarray, have: int, want: int) -> tuple[int, int]:
    """First pixel and the one behind the last of a side of `have` that became `want`, by the ramp found `at` there."""
    if have == 1:
        return 0, 1
    slope, first = np.polyfit(at + 0.5, ramp / 255 * (have - 1) + 0.5, 1)
    start = round(first)
    return start, max(round(slope * want + first), start + 1)


def look(image: Image.Image, spec: ImageSpec) -> tuple[Tensor, Image.Image]:
    """What a model sees of a photograph.

    Args:
        image: RGB.
        spec: how the model wants its images.

    Returns:
        `[1, 3, H, W]` fp32, normalised, and the same part at twice the size for people to look at.
    """
    height, width = spec.size
    view = seen_part(image, spec).resize((2 * width, 2 * height), Image.Resampling.LANCZOS)
    return spec.normalised(preprocess(image, spec)), view
