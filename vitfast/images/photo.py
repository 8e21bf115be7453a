"""Photographs as people have them: every format and mode that Pillow reads."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = "JPEG, PNG, WebP, TIFF, GIF, BMP or another format that Pillow reads"


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what Pillow's readers raise into a `ValueError` that names the image."""
    try:
        yield
    except FileNotFoundError:
        raise
    # Pillow's readers raise what they stumble over
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} cannot be read ({reason}); accepted is {FORMATS}") from error


def eight_bits(image: Image.Image) -> Image.Image:
    """An image whose channels have 8 bits: 16-bit grey is scaled, which Pillow's own conversion cuts off at 255.

    Raises:
        ValueError: its pixels are of no known range.
    """
    # before Pillow 11 a PNG of 16 bits has mode I
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"pixels are {kind}, mode {image.mode}, of no known range: scale them to uint8, 0 to 255")
    return image


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """A picture of any kind as upright RGB: EXIF orientation applied, transparency on white, 16 bits reduced to 8.

    Of an animation it is the first frame.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture, or a broken one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no image file {str(path)!r}")
    with reading(f"image file {str(path)!r}"), Image.open(path) as opened:
        image = ImageOps.exif_transpose(eight_bits(opened))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def sample_image() -> Path:
    """The photograph that matplotlib carries (Rear Admiral Grace Hopper).

    Raises:
        ImportError: matplotlib is not installed.
        FileNotFoundError: it is, without its sample data.
    """
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the sample photograph comes with matplotlib: pip install matplotlib, or give --image FILE")
    path = Path(next(iter(spec.submodule_search_locations)), "mpl-data", "sample_data", "grace_hopper.jpg")
    if not path.is_file():
        raise FileNotFoundError("this matplotlib came without its sample data; give --image FILE")
    return path
