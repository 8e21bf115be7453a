"""Subjects of a proof: the model of a name, with weights that hide nothing, and the device that it runs on."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..reference.architectures import create_model, list_models
from .libraries import build, has_weights, library_of, tower

Model = TypeVar("Model", bound=nn.Module)


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name; without one CUDA where torch sees it, else the CPU.

    Raises:
        ValueError: the name means nothing, or names a device that is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r}; expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r}; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def seed_weights(model: Model, seed: int = 0) -> Model:
    """Fill every parameter with seeded random values of a trained model's order of size, in place.

    A freshly made model hides errors: its head is zero, its biases are zero, LayerScale is next to nothing. Here
    matrices keep the variance of what passes through them, norms and LayerScale are near one, biases, tokens and
    position embeddings are not zero. The values depend on the seed and on the parameters' order and shapes, not on the
    device.

    Args:
        model: any model; its buffers stay.
        seed: of the generator.

    Returns:
        `model`.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                noise = 0.1 * noise if name.endswith("bias") else 1.0 + 0.1 * noise
            elif name.endswith("weight"):
                noise *= parameter[0].numel() ** -0.5
            else:
                noise *= 0.2
            parameter.copy_(noise)
    return model


def build_model(
    name: str, weights: str | Path | None = None, *, img_size: int | None = None, seed: int = 0
) -> nn.Module:
    """The model of a name in evaluation mode, with weights from a file or a folder, or seeded ones.

    Of a model that takes text too it is the part that takes pixels.

    Args:
        name: one of `vitfast.list_models()`; a timm name, with `timm:` in front where both have it; `torchvision:NAME`,
            `open_clip:NAME` or `transformers:NAME`; a folder that Transformers wrote, or a name of its hub.
        weights: checkpoint file, for vitfast's and timm's models; None for `seed_weights`, except where a folder or a
            hub has weights.
        img_size: native image size, default the named one.
        seed: for the seeded weights.

    Raises:
        ValueError: nobody has a model of that name, or weights or size do not fit it.
        FileNotFoundError: there is no such weights file.
        ImportError: a library is asked for and is not installed, or does not import.
    """
    options: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    ours = name in list_models()
    library = None if ours else library_of(name)
    model: nn.Module
    if ours and weights is None:
        # every value is about to be replaced, and drawing the first ones takes longer than all the rest
        with torch.device("meta"):
            model = create_model(name, **options)
        model.to_empty(device="cpu")
    elif library is None:
        # for an unknown name this raises, with the close ones
        model = create_model(name, weights, **options)
    elif weights is None:
        model = tower(build(name, img_size))
        if has_weights(name):
            return model.eval()
    else:
        if not Path(weights).is_file():
            raise FileNotFoundError(f"there is no weights file {str(weights)!r}")
        if library != "timm":
            raise ValueError(f"weights: a file is read for vitfast's and timm's models, not for {name!r}")
        model = build(name, img_size)
        importlib.import_module("timm.models").load_checkpoint(model, str(weights))
    return (seed_weights(model, seed) if weights is None else model).eval()
