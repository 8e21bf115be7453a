"""`preprocess`: images of any size to the uint8 batch that a model wants, normalisation left to its kernel."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .photo import eight_bits, reading
from .spec import ImageSpec, Pixels, as_tensor, image_spec


def preprocess(images: Any, source: Any, *, device: torch.device | str | None = None) -> Tensor:
    """A batch of uint8 pixels, resized and cropped by a model's own transforms; the kernel normalises them.

        spec = vitfast.image_spec(model)
        vitfast.accelerate(model, normalize=(spec.mean, spec.std))
        logits = model(vitfast.preprocess(["cat.jpg", "dog.jpg"], spec, device="cuda"))

    Args:
        images: one image or a sequence of them: PIL images of any mode, paths, uint8 arrays `[H, W, 3]` or uint8
            tensors `[3, H, W]`; a batch of arrays or tensors is such a sequence. PIL images are converted to RGB, and
            not turned; 16-bit grey is scaled to 8 bits; of an animation the first frame counts.
        source: what `image_spec` takes.
        device: of the result; None for the first image's if that is a tensor, else the CPU. Tensors are resized where
            they are (on CUDA as the libraries do there, which rounds differently from their CPU path).

    Returns:
        `[B, 3, height, width]` uint8, in channels_last memory.

    Raises:
        TypeError: an image is none of these.
        ValueError: an image has a wrong shape or dtype, or is too long and thin; a file cannot be read; the transform
            does not take it. The message names the image.
        FileNotFoundError: there is no such file.
    """
    spec = image_spec(source)
    single = isinstance(images, (str, os.PathLike, Image.Image)) or (
        isinstance(images, (np.ndarray, Tensor)) and images.ndim == 3
    )
    batch = [images] if single else list(images)
    where = batch[0].device if batch and isinstance(batch[0], Tensor) else torch.device("cpu")
    out = torch.empty((len(batch), *spec.size, 3), dtype=torch.uint8, device=where)
    for i, image in enumerate(batch):
        out[i] = transformed(load(image, f"image {i}", spec), f"image {i}", spec).permute(1, 2, 0)
    return out.permute(0, 3, 1, 2).to(device if device is not None else where)


def load(image: Any, name: str, spec: ImageSpec) -> Pixels:
    """What `preprocess` is given, as `spec.transform` takes it."""
    if isinstance(image, (str, os.PathLike)):
        with reading(f"image file {os.fspath(image)!r}"), Image.open(image) as opened:
            opened.load()
            image = eight_bits(opened)
            if spec.upright:
                return ImageOps.exif_transpose(image).convert("RGB")
            return image if spec.any_mode else image.convert("RGB")
    if isinstance(image, Image.Image):
        with reading(name):
            image = eight_bits(image)
            return image if spec.any_mode else image.convert("RGB")
    if not isinstance(image, (np.ndarray, Tensor)):
        raise TypeError(
            f"{name} is a {type(image).__name__}; accepted are PIL images, paths, uint8 arrays and uint8 tensors"
        )
    channels, layout = (2, "[H, W, 3]") if isinstance(image, np.ndarray) else (0, "[3, H, W]")
    if image.dtype not in (np.uint8, torch.uint8):
        raise ValueError(f"{name} has dtype {image.dtype}; accepted is uint8, 0 to 255")
    if image.ndim != 3 or image.shape[channels] != 3 or 0 in image.shape:
        raise ValueError(f"{name} has shape {list(image.shape)}; accepted is {layout}")
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def transformed(image: Pixels, name: str, spec: ImageSpec) -> Tensor:
    """uint8 `[3, height, width]` of a loaded image."""
    width, height = image.size if isinstance(image, Image.Image) else (image.shape[2], image.shape[1])
    # libraries resize the whole before they crop: a thread of pixels would fill the memory
    whole = spec.size[0] * spec.size[1] * max(height, width) / min(height, width)
    if Image.MAX_IMAGE_PIXELS is not None and whole > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{name} is {width} x {height} pixels, so thin that {whole / 1e6:.0f} million pixels would come of "
            f"resizing its short side; accepted are {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million, so cut it first"
        )
    try:
        pixels = as_tensor(spec.transform(image))
    except (ValueError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        size = f"{width} x {height} pixels"
        raise ValueError(f"{name}, {size}, is not prepared by {spec.transform} ({reason})") from error
    if pixels.dtype != torch.uint8 or pixels.shape != (3, *spec.size):
        raise ValueError(
            f"{name} became {pixels.dtype} {list(pixels.shape)} by {spec.transform}; expected uint8 {[3, *spec.size]}"
        )
    return pixels
