"""`image_spec`: how a model wants its images, told by its own library's transform without the last step.

timm's `create_transform`, open_clip's `image_transform_v2`, torchvision's presets and Transformers' processors end by
dividing by 255 and normalising. What they do before that is called here as it is, and what is left out stands as mean
and standard deviation in the spec, for the patch-embed kernel. That nothing else was left out is proved by two images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..reference.vit import VisionTransformer
from .resize import ResizeCrop

Pixels: TypeAlias = Image.Image | Tensor


@dataclass(frozen=True)
class ImageSpec:
    """How a model wants its images.

    Attributes:
        size: (height, width) in pixels.
        mean, std: per channel, for pixels between 0 and 1: what `accelerate(normalize=(spec.mean, spec.std))` takes.
        transform: makes an RGB image of `size` of an RGB PIL image or a uint8 tensor `[3, H, W]`; either comes back.
        upright: whether files are turned by their EXIF orientation, as Transformers opens them; timm, torchvision and
            open_clip take them as they lie.
        any_mode: whether `transform` takes PIL images of every mode and converts them by itself.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    transform: Callable[[Pixels], Pixels]
    upright: bool = False
    any_mode: bool = False

    def __post_init__(self) -> None:
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) != 3:
                raise ValueError(f"{name} is {numbers}; accepted are three numbers, since images are RGB")

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 pixels `[..., 3, H, W]` as the fp32 ones that the model takes."""
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return (pixels.float() / 255.0 - mean) / std


def as_tensor(pixels: Pixels) -> Tensor:
    """`[3, H, W]`."""
    if isinstance(pixels, Tensor):
        return pixels
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def image_spec(source: Any) -> ImageSpec:
    """What a library says of a model's images.

    Args:
        source: a model of timm, open_clip or `vitfast.create_model` (the latter as timm's default checkpoint of the
            name); a data config of timm; weights of torchvision (`ViT_B_16_Weights.IMAGENET1K_V1`) or their
            `transforms()`; a `Compose` of torchvision, such as open_clip's and timm's transforms; an image processor of
            Transformers, or a processor that has one; an `ImageSpec`, which comes back.

    Raises:
        TypeError: `source` is none of these.
        ValueError: it does more than a model on uint8 pixels can make good; the message says what.
    """
    if isinstance(source, ImageSpec):
        return source
    if isinstance(source, Mapping):
        return _of_timm(source)
    source = getattr(source, "_orig_mod", source)
    # timm's models, and Transformers' processor of them
    if config := getattr(source, "pretrained_cfg", None) or getattr(source, "data_config", None):
        if isinstance(source, VisionTransformer) and config["crop_mode"] in ResizeCrop.MODES:
            size = _three_channels(config["input_size"])
            transform = ResizeCrop(size, config["crop_pct"], config["crop_mode"], config["interpolation"])
            return ImageSpec(size, tuple(config["mean"]), tuple(config["std"]), transform)
        return _of_timm(config)
    if config := getattr(getattr(source, "visual", source), "preprocess_cfg", None):
        from open_clip.transform import PreprocessCfg, image_transform_v2

        return image_spec(image_transform_v2(PreprocessCfg(**config), is_train=False))
    # by name, so that no library is imported for it
    if _is_a(source, "torchvision.models._api", "WeightsEnum"):
        source = source.transforms()
    if _is_a(source, "torchvision.transforms._presets", "ImageClassification"):
        return _of_torchvision(source)
    if type(source).__name__ == "Compose" and hasattr(source, "transforms"):
        return _of_compose(source)
    if hasattr(source, "image_processor"):
        source = source.image_processor
    if hasattr(source, "do_normalize") and callable(source):
        return _of_processor(source)
    raise TypeError(
        f"a {type(source).__name__} does not say how it wants its images; expected a model of timm, open_clip or "
        "vitfast's create_model, a timm data config, torchvision weights or a Compose, a Transformers image processor "
        "or an ImageSpec"
    )


def _is_a(source: Any, module: str, name: str) -> bool:
    return any((kind.__module__, kind.__name__) == (module, name) for kind in type(source).__mro__)


def _three_channels(input_size: Sequence[int]) -> tuple[int, int]:
    channels, height, width = input_size
    if channels != 3:
        raise ValueError(f"input_size is {tuple(input_size)}; accepted are 3 channels, since images are RGB")
    return height, width


@dataclass(frozen=True)
class Steps:
    """Transforms one after the other."""

    steps: tuple[Callable[[Any], Any], ...]

    def __call__(self, image: Any) -> Any:
        for step in self.steps:
            image = step(image)
        return image

    def __str__(self) -> str:
        return ", ".join(str(step) for step in self.steps)


# what turns bytes into normalised floats: torchvision's of both generations, and timm's and open_clip's
_LAST = ("ToTensor", "MaybeToTensor", "ToDtype", "ConvertImageDtype", "Normalize")
# open_clip's of today and before
_CONVERTS = ("MaybeConvertMode", "_convert_to_rgb")


def _name(step: Any) -> str:
    return getattr(step, "__name__", type(step).__name__)


def _of_compose(compose: Any, whole: Any = None, **known: tuple[float, ...]) -> ImageSpec:
    last = [step for step in compose.transforms if _name(step) == "Normalize"]
    mean, std = ([float(v) for v in getattr(last[0], name)] if last else [] for name in ("mean", "std"))
    return _proved(
        f"the transform {' '.join(str(compose).split())}",
        Steps(tuple(step for step in compose.transforms if _name(step) not in _LAST)),
        known.get("mean", tuple(mean) or (0.0,) * 3),
        known.get("std", tuple(std) or (1.0,) * 3),
        whole or compose,
        any_mode=any(_name(step) in _CONVERTS for step in compose.transforms),
    )


def _of_timm(config: Mapping[str, Any]) -> ImageSpec:
    from timm.data import create_transform, resolve_data_config

    resolved = resolve_data_config(pretrained_cfg=dict(config))
    _three_channels(resolved["input_size"])
    transform = create_transform(**resolved, is_training=False)
    # the config's own numbers, which the transform rounds to fp32
    return _of_compose(transform, mean=tuple(resolved["mean"]), std=tuple(resolved["std"]))


def _of_torchvision(preset: Any) -> ImageSpec:
    from torchvision import transforms

    resize = transforms.Resize(preset.resize_size, preset.interpolation, antialias=preset.antialias)
    steps = [resize, transforms.CenterCrop(preset.crop_size), transforms.Normalize(preset.mean, preset.std)]
    return _of_compose(transforms.Compose(steps), preset)


@dataclass(frozen=True)
class Processed:
    """An image processor of Transformers without rescaling and normalising."""

    processor: Any

    def __call__(self, image: Pixels) -> Tensor:
        layout = "channels_first" if isinstance(image, Tensor) else None
        given = {"do_rescale": False, "do_normalize": False, "input_data_format": layout, "return_tensors": "pt"}
        return self.processor(image, **given)["pixel_values"][0]

    def __str__(self) -> str:
        return type(self.processor).__name__


def _of_processor(processor: Any) -> ImageSpec:
    scale = 255.0 * (processor.rescale_factor if getattr(processor, "do_rescale", False) else 1.0)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    if mean is None or std is None:
        raise ValueError(f"{type(processor).__name__} does not normalise by one mean and one standard deviation")
    # (255 f x - mean) / std of x between 0 and 1; f is 1 / 255 but for models that want other ranges
    means, stds = (
        tuple(value if scale == 1.0 else value / scale for value in np.broadcast_to(values, 3).tolist())
        for values in (mean, std)
    )
    return _proved(
        type(processor).__name__,
        Processed(processor),
        means,
        stds,
        lambda image: processor(image, return_tensors="pt")["pixel_values"][0],
        upright=True,
        any_mode=bool(getattr(processor, "do_convert_rgb", False)),
    )


def _proved(
    name: str,
    transform: Callable[[Pixels], Pixels],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    whole: Callable[[Image.Image], Tensor],
    **flags: bool,
) -> ImageSpec:
    """A spec whose bytes, normalised, are what the library's whole transform makes of two images."""
    spec = ImageSpec((0, 0), mean, std, transform, **flags)
    sizes = set()
    for width, height in ((97, 61), (61, 140)):
        image = Image.fromarray((np.arange(height * width * 3) * 89 % 251).astype(np.uint8).reshape(height, width, 3))
        try:
            pixels, wanted = as_tensor(transform(image)), whole(image)
        except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
            raise ValueError(f"{name} does not make pixels of one image ({' '.join(str(error).split())})") from error
        if not isinstance(wanted, Tensor) or wanted.ndim != 3 or wanted.shape[0] != 3:
            raise ValueError(f"{name} makes no [3, H, W] of an image, which is what the kernel takes")
        sizes.add((wanted.shape[1], wanted.shape[2]))
        # half a step of a byte tells two of them apart
        close = 1e-3 / 255 / max(std)
        if (
            pixels.dtype != torch.uint8
            or pixels.shape != wanted.shape
            or not torch.allclose(spec.normalised(pixels), wanted.float(), rtol=0, atol=close)
        ):
            raise ValueError(f"{name} does not end in (pixels / 255 - mean) / std of uint8 pixels, as the kernel does")
    if len(sizes) > 1:
        raise ValueError(f"{name} makes images of different sizes, which are no batch; accepted is one size for all")
    return dataclasses.replace(spec, size=sizes.pop())
