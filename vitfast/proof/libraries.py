"""Other libraries' models by name, for the commands: `timm:NAME`, `torchvision:NAME`, `open_clip:NAME`,
`transformers:NAME` (a name of its hub, or the type of a model, such as `vit`, with that type's default sizes), or a
folder that Transformers wrote."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

EXTRAS = {"timm": "timm", "torchvision": "torchvision", "open_clip": "open-clip", "transformers": "transformers"}
"""Libraries, and the extra of vitfast that installs each."""


def library(name: str) -> Any:
    """Import one of `EXTRAS`.

    Raises:
        ImportError: it is not installed, or does not import; with what to do.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f'this needs {error.name}; pip install "vitfast[{EXTRAS[name]}]"') from error
    # torchvision's native half, which the others import, raises RuntimeError or OSError where it does not fit torch
    except (ImportError, RuntimeError, OSError) as error:
        raise ImportError(f"{name} is installed but does not import: {error}; `vitfast doctor` may say why") from error


def library_of(name: str) -> str | None:
    """Which library a model's name speaks of, or None: its prefix, or Transformers for a folder or a hub's name."""
    prefix = name.partition(":")[0]
    if prefix in EXTRAS and ":" in name:
        return prefix
    if (Path(name) / "config.json").is_file() or name.count("/") == 1:
        return "transformers"
    try:
        return "timm" if library("timm").is_model(name) else None
    except ImportError:
        return None


def has_weights(name: str) -> bool:
    """Whether a name brings trained weights: a folder that has them, or a name of Transformers' hub."""
    if library_of(name) != "transformers":
        return False
    plain = name.removeprefix("transformers:")
    folder = Path(plain)
    if folder.is_dir():
        return any(any(folder.glob(f"*.{suffix}")) for suffix in ("safetensors", "bin"))
    return "/" in plain


def build(name: str, img_size: int | None = None, *, weights: bool = True) -> nn.Module:
    """A library's model, with its weights where `has_weights`, else with the library's random ones.

    Args:
        name: as `library_of` knows it.
        img_size: native image size; default the model's own.
        weights: whether weights are wanted; without, the device of a `torch.device` context is obeyed.

    Raises:
        ValueError: the library has no such model, or not with this size.
        ImportError: the library is not installed, or does not import.
    """
    which = library_of(name)
    if which is None:
        raise ValueError(f"{name!r} is no model of {', '.join(EXTRAS)}, and no folder with a config.json")
    module = library(which)
    plain = name.removeprefix(f"{which}:")
    if which == "transformers":
        return _transformers(module, plain, img_size, weights and has_weights(name))
    return _BUILDERS[which](module, plain, img_size)


def _unknown(which: str, name: str, known: list[str]) -> ValueError:
    stem = name.lower().partition(".")[0]
    close = [other for other in known if stem in other.lower() or other.lower() in stem][:4]
    return ValueError(f"{which} has no model {name!r}; close matches: {', '.join(close) or 'none is close'}")


def _timm(timm: Any, name: str, img_size: int | None) -> nn.Module:
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    model: nn.Module = timm.create_model(name, **({} if img_size is None else {"img_size": img_size}))
    return model


def _torchvision(torchvision: Any, name: str, img_size: int | None) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    options = {} if img_size is None or not name.startswith("vit_") else {"image_size": img_size}
    model: nn.Module = models.get_model(name, weights=None, **options)
    return model


def _open_clip(open_clip: Any, name: str, img_size: int | None) -> nn.Module:
    if name not in open_clip.list_models():
        raise _unknown("open_clip", name, open_clip.list_models())
    # it moves the model, which a context's device would forbid
    device = torch.get_default_device()
    model: nn.Module = open_clip.create_model(name, force_image_size=img_size, device=device)
    return model


_BUILDERS: dict[str, Callable[[Any, str, int | None], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "open_clip": _open_clip,
}


def _transformers(transformers: Any, name: str, img_size: int | None, weights: bool) -> nn.Module:
    try:
        known = Path(name).is_dir() or "/" in name
        config = transformers.AutoConfig.from_pretrained(name) if known else transformers.AutoConfig.for_model(name)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name!r} is no folder with a model of Transformers, no name of its hub and no type of model: {why}"
        ) from error
    vision = getattr(config, "vision_config", config)
    if img_size is not None:
        vision.image_size = img_size
    try:
        kind = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
        if weights:
            model: nn.Module = kind.from_pretrained(name, config=config)
        else:
            model = kind.from_config(config) if kind is transformers.AutoModel else kind(config)
    except ModuleNotFoundError as error:
        # how Transformers says that one of its files does not import
        raise ImportError(f"transformers does not import this model: {error}; `vitfast doctor` may say why") from error
    return model


def tower(model: Any) -> nn.Module:
    """The part of a model that takes pixels alone: itself, or the vision tower of one that takes text too."""
    if callable(getattr(model, "encode_image", None)) and isinstance(getattr(model, "visual", None), nn.Module):
        return model.visual
    if getattr(model, "main_input_name", "pixel_values") != "pixel_values":
        base = getattr(model, "model", model)
        for name in ("vision_model", "vision_tower"):
            if isinstance(getattr(base, name, None), nn.Module):
                return getattr(base, name)
    return model


def image_shape(model: Any) -> tuple[int, int, int]:
    """(channels, height, width) of a model's pixels.

    Raises:
        ValueError: it does not say.
    """
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    stem = getattr(model, "patch_embed", None)
    size = getattr(stem, "img_size", None)
    channels: Any = getattr(getattr(stem, "proj", None), "in_channels", 3)
    if size is None and isinstance(getattr(model, "pretrained_cfg", None), dict):
        channels, *size = model.pretrained_cfg["input_size"]
    if size is None:
        size = getattr(config, "image_size", None) or getattr(model, "image_size", None)
        channels = getattr(config, "num_channels", 3)
    if size is None and type(model).__module__.startswith("torchvision."):
        # Swin takes any size, and was trained on this one
        size = 224
    if size is None:
        raise ValueError(f"{type(model).__name__} does not say which image size it takes")
    height, width = (size, size) if isinstance(size, int) else size
    return int(channels), int(height), int(width)
