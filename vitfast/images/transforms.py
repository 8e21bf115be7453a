"""`preprocess`: images of any size to the uint8 batch that a model wants, normalisation left to its kernel.

`image_spec` reads what timm, torchvision or Transformers says of a model's images, and `preprocess` does that, pixel
for pixel: the same resizer, the same rounding of sizes and crops. The libraries differ in all of these:

    library                resizes               crop starts at          pads before     opens files
    timm, torchvision      PIL: Pillow;          round((have - want)/2)  short // 2      as they lie
                           tensors: torch, fp32
    transformers           torch, uint8          (have - want) // 2      short // 2      upright (EXIF)
    transformers-pil       Pillow                (have - want) // 2      ceil(short/2)   upright (EXIF)

Read in the sources of timm 1.0.31 (`data/transforms_factory.py`), torchvision 0.28 (`transforms/_presets.py`,
`transforms/functional.py`) and Transformers 5.23 (`image_processing_backends.py`, `image_transforms.py`).
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ..model import VisionTransformer

FORMATS = "JPEG, PNG, WebP, TIFF, GIF, BMP or another format that Pillow reads"

FITS = ("shortest", "cover", "contain", "stretch")
INTERPOLATIONS = {mode.name.lower(): mode for mode in Image.Resampling}
LIBRARIES = ("timm", "torchvision", "transformers", "transformers-pil")


@dataclass(frozen=True)
class ImageSpec:
    """How a model wants its images. Sizes are (height, width) in pixels.

    Attributes:
        size: of the result, cut out of the middle; where the resized image is smaller, `fill` surrounds it.
        resize: what the image is resized to; None: it is not.
        fit: how the aspect ratio goes with that. "shortest": the shorter side becomes `resize[0]`, the longer one is
            rounded down; "cover" and "contain": the smallest image that covers `resize`, the largest within it, sides
            rounded; "stretch": to `resize`, whatever the ratio.
        interpolation: one of `INTERPOLATIONS`, antialiased.
        mean, std: per channel, for pixels between 0 and 1: what `accelerate(normalize=(spec.mean, spec.std))` takes.
        fill: RGB colour, 0 to 255.
        library: one of `LIBRARIES`, whose rules for rounding, resizing and opening files apply.
        white_behind: transparency in a PIL image is laid on white; without it the alpha channel is dropped.
    """

    size: tuple[int, int]
    resize: tuple[int, int] | None
    fit: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fill: tuple[int, int, int] = (0, 0, 0)
    library: str = "timm"
    white_behind: bool = False

    def __post_init__(self) -> None:
        for name, value, accepted in (
            ("fit", self.fit, FITS),
            ("interpolation", self.interpolation, tuple(INTERPOLATIONS)),
            ("library", self.library, LIBRARIES),
        ):
            if value not in accepted:
                raise ValueError(f"{name} is {value!r}; accepted are {', '.join(map(repr, accepted))}")
        for name, numbers in (("mean", self.mean), ("std", self.std), ("fill", self.fill)):
            if len(numbers) != 3:
                raise ValueError(f"{name} is {numbers}; accepted are three numbers, since images are RGB")


def image_spec(source: Any) -> ImageSpec:
    """What a library says of a model's images.

    Args:
        source: a model of timm or of `vitfast.create_model`, by its `pretrained_cfg` (for the latter that of timm's
            default checkpoint of the name); what `timm.data.resolve_data_config` returns; weights of torchvision
            (`ViT_B_16_Weights.IMAGENET1K_V1`) or their `transforms()`; an image processor of Transformers 5, or a
            processor that has one; an `ImageSpec`, which comes back.

    Raises:
        TypeError: `source` is none of these.
        ValueError: it asks for what `preprocess` cannot do exactly; the message says what.
    """
    if isinstance(source, ImageSpec):
        return source
    if isinstance(source, Mapping):
        return _of_data_config(source)
    source = getattr(source, "_orig_mod", source)
    if config := getattr(source, "pretrained_cfg", None):
        if isinstance(source, VisionTransformer):
            return _of_data_config(config)
        from timm.data import resolve_data_config

        return _of_data_config(resolve_data_config(model=source))
    # by name, so that no library is imported for it
    if _ancestor(source, "torchvision.models._api", "WeightsEnum"):
        source = source.transforms()
    if _ancestor(source, "torchvision.transforms._presets", "ImageClassification"):
        return _of_torchvision(source)
    for name in ("TorchvisionBackend", "PilBackend"):
        if backend := _ancestor(source, "transformers.image_processing_backends", name):
            return _of_transformers(source, backend)
    if hasattr(source, "image_processor"):
        return image_spec(source.image_processor)
    raise TypeError(
        f"a {type(source).__name__} does not say how it wants its images; expected a model of timm or vitfast's "
        "create_model, a timm data config, torchvision weights, a Transformers 5 image processor or an ImageSpec"
    )


def _ancestor(source: Any, module: str, name: str) -> type | None:
    return next((kind for kind in type(source).__mro__ if (kind.__module__, kind.__name__) == (module, name)), None)


_DATA_CONFIG = {"input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"}


def _of_data_config(config: Mapping[str, Any]) -> ImageSpec:
    missing = _DATA_CONFIG - config.keys()
    if missing:
        raise ValueError(f"data config without {', '.join(sorted(missing))}; timm.data.resolve_data_config fills it in")
    channels, *size = config["input_size"]
    if channels != 3:
        raise ValueError(f"input_size is {tuple(config['input_size'])}; accepted are 3 channels, since images are RGB")
    mode = config["crop_mode"]
    if mode not in ("center", "squash", "border"):
        raise ValueError(f"crop_mode is {mode!r}; accepted are 'center', 'squash' and 'border'")
    height, width = (math.floor(side / config["crop_pct"]) for side in size)
    center = "shortest" if height == width else "cover"
    return ImageSpec(
        size=(size[0], size[1]),
        resize=(height, width),
        fit={"center": center, "squash": "stretch", "border": "contain"}[mode],
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        fill=cast(Any, tuple(round(255 * m) for m in config["mean"]) if mode == "border" else (0, 0, 0)),
        library="timm",
    )


def _of_torchvision(preset: Any) -> ImageSpec:
    if preset.antialias is not True:
        raise ValueError(f"antialias is {preset.antialias}; accepted is True, torchvision's default")
    (crop,), (resize,) = preset.crop_size, preset.resize_size
    return ImageSpec(
        size=(crop, crop),
        resize=(resize, resize),
        fit="shortest",
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        library="torchvision",
    )


def _of_transformers(processor: Any, backend: type) -> ImageSpec:
    name = type(processor).__name__
    steps = ("preprocess", "process_image", "convert_to_rgb", "_preprocess_image_like_inputs", "_preprocess")
    for step in (*steps, "resize", "center_crop"):
        if getattr(type(processor), step) is not getattr(backend, step):
            raise ValueError(f"{name} has a {step} of its own; accepted are processors that leave it to the backend")
    pil = backend.__name__ == "PilBackend"
    if not processor.do_rescale or not math.isclose(processor.rescale_factor, 1 / 255):
        raise ValueError(f"{name} does not divide pixels by 255, which uint8 pixels need")
    if processor.do_pad:
        raise ValueError(f"{name} pads images to each other's size (do_pad), not to one")

    size, crop = (None if s is None else dict(s) for s in (processor.size, processor.crop_size))
    crop = crop if processor.do_center_crop else None
    resize, fit = None, "stretch"
    if processor.do_resize:
        if size is not None and size.keys() == {"height", "width"}:
            resize = (size["height"], size["width"])
        elif size is not None and size.keys() == {"shortest_edge"}:
            resize, fit = (size["shortest_edge"],) * 2, "shortest"
        else:
            raise ValueError(f"{name} has size {size}; accepted are 'height' and 'width', or 'shortest_edge'")
    if crop is None and (resize is None or fit == "shortest"):
        raise ValueError(f"{name} has no center crop, so its images differ in size and make no batch")
    resample = Image.Resampling.BILINEAR if processor.resample is None else processor.resample
    # Pillow's number or name, or torchvision's
    interpolation = (Image.Resampling(resample) if isinstance(resample, int) else resample).name.lower()
    if not pil and resize is not None and interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"{name} resizes by {interpolation}; accepted on torchvision's backend: bilinear, bicubic")
    normalize = processor.do_normalize
    return ImageSpec(
        size=(crop["height"], crop["width"]) if crop is not None else cast(Any, resize),
        resize=resize,
        fit=fit,
        interpolation=interpolation,
        mean=_three(processor.image_mean) if normalize else (0.0,) * 3,
        std=_three(processor.image_std) if normalize else (1.0,) * 3,
        library="transformers-pil" if pil else "transformers",
        white_behind=bool(processor.do_convert_rgb),
    )


def _three(value: float | Sequence[float]) -> tuple[float, ...]:
    return (float(value),) * 3 if isinstance(value, (int, float)) else tuple(value)


def preprocess(images: Any, source: Any, *, device: torch.device | str | None = None) -> Tensor:
    """A batch of uint8 pixels, resized and cropped as a model's own transforms do; the kernel normalises them.

        spec = vitfast.image_spec(model)
        vitfast.accelerate(model, normalize=(spec.mean, spec.std))
        logits = model(vitfast.preprocess(["cat.jpg", "dog.jpg"], spec, device="cuda"))

    Args:
        images: one image or a sequence of them: PIL images of any mode, paths, uint8 arrays `[H, W, 3]` or uint8
            tensors `[3, H, W]`; a batch of arrays or tensors is such a sequence. PIL images are converted to RGB, and
            not turned.
        source: what `image_spec` takes.
        device: of the result; None for the first image's if that is a tensor, else the CPU. Tensors are resized where
            they are (on CUDA as the libraries do there, which rounds differently from their CPU path).

    Returns:
        `[B, 3, height, width]` uint8, in channels_last memory.

    Raises:
        TypeError: an image is none of these.
        ValueError: an image has a wrong shape or dtype, or a file cannot be read; the message names it.
        FileNotFoundError: there is no such file.
    """
    spec = image_spec(source)
    single = (
        isinstance(images, (str, os.PathLike, Image.Image))
        or (isinstance(images, (np.ndarray, Tensor)) and images.ndim == 3)
    )
    batch = [images] if single else list(images)
    where = batch[0].device if batch and isinstance(batch[0], Tensor) else torch.device("cpu")
    out = torch.empty((len(batch), *spec.size, 3), dtype=torch.uint8, device=where)
    for i, image in enumerate(batch):
        _place(_resize(_load(image, f"image {i}", spec), spec), out[i], spec)
    return out.permute(0, 3, 1, 2).to(device if device is not None else where)


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


def _load(image: Any, name: str, spec: ImageSpec) -> Image.Image | Tensor:
    """RGB, as what the library resizes: a PIL image, or a tensor `[3, H, W]`."""
    if isinstance(image, (str, os.PathLike)):
        with reading(f"image file {os.fspath(image)!r}"), Image.open(image) as opened:
            upright = ImageOps.exif_transpose(opened) if spec.library.startswith("transformers") else opened
            image = upright.convert("RGB")
    elif isinstance(image, Image.Image):
        with reading(name):
            if spec.white_behind and image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    elif isinstance(image, (np.ndarray, Tensor)):
        channels, layout = (2, "[H, W, 3]") if isinstance(image, np.ndarray) else (0, "[3, H, W]")
        if image.dtype not in (np.uint8, torch.uint8):
            raise ValueError(f"{name} has dtype {image.dtype}; accepted is uint8, 0 to 255")
        if image.ndim != 3 or image.shape[channels] != 3 or 0 in image.shape:
            raise ValueError(f"{name} has shape {list(image.shape)}; accepted is {layout}")
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
    else:
        raise TypeError(
            f"{name} is a {type(image).__name__}; accepted are PIL images, paths, uint8 arrays and uint8 tensors"
        )
    if spec.library == "transformers" and isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    if spec.library == "transformers-pil" and isinstance(image, Tensor):
        return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    return image


def _target(height: int, width: int, spec: ImageSpec) -> tuple[int, int]:
    """(height, width) to resize an image of `height` by `width` to."""
    if spec.resize is None:
        return height, width
    rows, cols = spec.resize
    if spec.fit == "stretch":
        return rows, cols
    if spec.fit == "shortest":
        # this order of operations: the product is exact
        longest = int(rows * max(height, width) / min(height, width))
        return (longest, rows) if width <= height else (rows, longest)
    ratio = (min if spec.fit == "cover" else max)(height / rows, width / cols)
    return round(height / ratio), round(width / ratio)


def _resize(image: Image.Image | Tensor, spec: ImageSpec) -> Tensor:
    """`[H, W, 3]`."""
    if isinstance(image, Image.Image):
        size = _target(image.height, image.width, spec)
        if size != (image.height, image.width):
            image = image.resize(size[::-1], INTERPOLATIONS[spec.interpolation])
        return torch.from_numpy(np.array(image))
    size = _target(image.shape[1], image.shape[2], spec)
    if size != image.shape[1:]:
        image = _resize_tensor(image[None], size, spec)[0]
    return image.permute(1, 2, 0)


def _resize_tensor(x: Tensor, size: tuple[int, int], spec: ImageSpec) -> Tensor:
    mode = spec.interpolation
    if mode not in ("bilinear", "bicubic"):
        raise ValueError(f"tensors are not resized by {mode}; accepted are bilinear and bicubic, or PIL images")
    # what torchvision's second generation of transforms, Transformers' backend, leaves to torch in uint8
    native = x.device.type == "cpu" and (
        mode == "bicubic"
        or torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        or platform.machine() in ("aarch64", "arm64")
    )
    if native and spec.library == "transformers":
        return F.interpolate(x, size, mode=mode, align_corners=False, antialias=True)
    y = F.interpolate(x.float(), size, mode=mode, align_corners=False, antialias=True)
    return y.clamp(0, 255).round().to(torch.uint8)


def _first(have: int, want: int, library: str) -> int:
    """Where a crop of `want` begins on a side of `have`; negative for padding in front of it."""
    if have < want:
        return -((want - have + (library == "transformers-pil")) // 2)
    return (have - want) // 2 if library.startswith("transformers") else round((have - want) / 2)


def _place(pixels: Tensor, out: Tensor, spec: ImageSpec) -> None:
    """Write the middle of `pixels` `[h, w, 3]` into `out` `[H, W, 3]`, and the fill around it."""
    height, width = out.shape[:2]
    top, left = (_first(have, want, spec.library) for have, want in zip(pixels.shape, (height, width), strict=False))
    if top < 0 or left < 0:
        out.copy_(torch.tensor(spec.fill, dtype=torch.uint8))
    seen = pixels[max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]
    out[max(-top, 0) :, max(-left, 0) :][: seen.shape[0], : seen.shape[1]] = seen
