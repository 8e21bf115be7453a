"""Maps as colour over the image that they were computed from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..images.photo import eight_bits
from ..images.spec import image_spec
from ..images.view import seen_part
from .maps import AttentionMaps

# dark to light in equal steps of lightness, so that the picture reads in grey too
_COLOURS = np.array(
    [(14, 10, 46), (74, 22, 110), (150, 38, 110), (217, 70, 78), (249, 135, 46), (253, 205, 80), (253, 250, 205)],
    dtype=np.float32,
)


def colourise(values: np.ndarray) -> np.ndarray:
    """Values between 0 and 1, any shape `[...]`, as RGB `[..., 3]` between 0 and 255."""
    at = np.clip(values, 0.0, 1.0) * (len(_COLOURS) - 1)
    stops = np.arange(len(_COLOURS))
    return np.stack([np.interp(at, stops, _COLOURS[:, channel]) for channel in range(3)], axis=-1)


def overlay(
    image: Image.Image | Tensor, values: Tensor | np.ndarray, source: Any = None, *, alpha: float = 0.6
) -> Image.Image:
    """A map laid over the image that it was computed from, as colour.

        pixels = vitfast.preprocess("cat.jpg", spec)
        picture = vitfast.overlay(pixels[0], values)
        picture = vitfast.overlay(Image.open("cat.jpg"), values, spec)  # the same part, as sharp as the photograph

    Args:
        image: what the model saw, a PIL image of any size and mode or uint8 pixels `[3, H, W]`; with a `source` the
            whole photograph.
        values: `[rows, cols]`, any finite values; the smallest is drawn darkest, the largest brightest.
        source: what `image_spec` takes; the image is then cropped to the part that the model's transform leaves of it.
        alpha: share of the colour in the mixture, 0 to 1.

    Returns:
        An RGB image as large as what was seen of `image`, the map enlarged bilinearly.

    Raises:
        ValueError: `values` is no finite matrix, `alpha` is out of range, or an image without a `source` has other
            proportions than the map, so that the model saw only a part of it.
    """
    table = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float32)
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"the map has shape {list(table.shape)}; expected [rows, cols] of finite values")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha}; expected 0 to 1")
    if isinstance(image, Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    image = eight_bits(image).convert("RGB")
    if source is not None:
        image = seen_part(image, image_spec(source))
    else:
        # patches are square, and at most a part of one is cut off or padded
        rows, cols = table.shape
        ratio = image.width / cols * rows / image.height
        if max(ratio, 1 / ratio) > 1 + 1 / min(rows, cols):
            raise ValueError(
                f"the image has {image.width} x {image.height} pixels and the map {cols} x {rows} patches, so it is "
                "not what the model saw; expected the pixels of `preprocess`, or `source` to crop the photograph alike"
            )
    low, high = float(table.min()), float(table.max())
    table = (table - low) / (high - low) if high > low else np.zeros_like(table)
    enlarged = np.asarray(Image.fromarray(table).resize(image.size, Image.Resampling.BILINEAR))
    photo = np.asarray(image, dtype=np.float32)
    mixed = (1.0 - alpha) * photo + alpha * colourise(enlarged)
    return Image.fromarray(np.clip(np.rint(mixed), 0, 255).astype(np.uint8))


def draw(view: Image.Image, maps: AttentionMaps, flow: Tensor | None = None) -> Image.Image:
    """A sheet of pictures with labels: the image, what each layer's class token sees of it, and the rollout.

    Args:
        view: what the model saw as its first image, at any size.
        maps: of any layers; where heads were kept, there is a picture of each. See `AttentionMaps.seen`.
        flow: of `rollout` or `grad_rollout`, drawn last.
    """
    width, height = view.size
    scale = _PANEL / max(width, height)
    photo = view.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    panels: list[tuple[str, Image.Image]] = [("image", photo)]
    for layer, seen in zip(maps.layers, map(maps.seen, maps), strict=True):
        if seen.ndim == 3:
            panels.append((f"layer {layer}", overlay(photo, seen[0])))
        else:
            panels += [(f"layer {layer}, head {i}", overlay(photo, head)) for i, head in enumerate(seen[0])]
    if flow is not None:
        panels.append(("rollout", overlay(photo, flow[0])))
    return _sheet(panels)


# pixels: the longer side of a picture on a sheet, between pictures, and the height of a label
_PANEL, _GAP, _LABEL = 224, 6, 20


def _sheet(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures of one size below their labels, in a grid about as wide as high."""
    columns = math.ceil(math.sqrt(len(panels)))
    lines = -(-len(panels) // columns)
    across, down = panels[0][1].width + _GAP, _LABEL + panels[0][1].height + _GAP
    sheet = Image.new("RGB", (columns * across + _GAP, lines * down + _GAP), "white")
    text, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (label, picture) in enumerate(panels):
        x, y = _GAP + i % columns * across, _GAP + i // columns * down
        text.text((x, y + _LABEL // 2 - 1), label, fill="black", font=font, anchor="lm")
        sheet.paste(picture, (x, y + _LABEL))
    return sheet
