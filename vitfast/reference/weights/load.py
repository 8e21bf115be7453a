"""Loading of checkpoint files: reads the file, finds its format, hands over to the file of that format.

A format is a module with `NAME`, `matches(names)` and `convert(tensors)`, which returns the tensors under timm's
names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..vit import VisionTransformer
from . import timm_names
from .resize import fit_pos_embed

FORMATS = (timm_names,)
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
HEADS = ("head.", "head_dist.", "pre_logits.")


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {str(path)!r}")
    if path.stat().st_size == 0:
        raise ValueError(f"weights file {str(path)!r} is empty")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError("reading .safetensors files needs `pip install safetensors`") from error
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"weights file {str(path)!r} is no readable safetensors file: {error}") from error
    if suffix in TORCH_SUFFIXES:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        # what torch.load raises depends on where the bytes stop making sense: any exception means the same here
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"weights file {str(path)!r} is no readable torch checkpoint: {reason}") from error
    raise ValueError(
        f"weights file {str(path)!r} has the suffix {path.suffix!r}; accepted are .safetensors, "
        f"{', '.join(TORCH_SUFFIXES)}"
    )


def _unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside what training scripts save around it."""
    for wrapper in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    whole = isinstance(loaded, Mapping) and all(isinstance(tensor, Tensor) for tensor in loaded.values())
    if not whole or not loaded:
        raise ValueError(
            f"weights file {str(path)!r} holds no state dict; accepted is a mapping of names to tensors, bare "
            "or under 'model' or 'state_dict'"
        )
    tensors = {str(name): tensor for name, tensor in loaded.items()}
    # left by DataParallel and torch.compile, in either order
    prefixes = ("module.", "_orig_mod.")
    while prefix := next((p for p in prefixes if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _some(names: set[str]) -> str:
    shown = sorted(names)[:12] or ["none"]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _check(tensors: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> None:
    for name in ("head", "head_dist"):
        weight, mine = tensors.get(f"{name}.weight"), own.get(f"{name}.weight")
        if weight is not None and mine is not None and weight.shape[0] != mine.shape[0]:
            raise ValueError(
                f"{name} in {str(path)!r} has {weight.shape[0]} classes and the model has {mine.shape[0]}; build "
                f"the model with num_classes={weight.shape[0]}, or pass skip_head=True to keep its own head"
            )
    missing, unexpected = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    if missing or unexpected:
        raise ValueError(
            f"weights in {str(path)!r} do not fit the model; missing: {_some(missing)}; unexpected: {_some(unexpected)}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{name} in {str(path)!r} has shape {tuple(tensor.shape)}; the model's is {tuple(own[name].shape)}"
            )


def load_weights(
    model: VisionTransformer,
    path: str | os.PathLike[str],
    *,
    skip_head: bool = False,
    source_grid: tuple[int, int] | None = None,
) -> VisionTransformer:
    """Loads a checkpoint file into a model, in place; position embeddings are resized to the model's grid.

    Parameters keep the model's dtype and device. Everything is checked before the first value is copied, so a
    model is left as it was when this raises.

    Args:
        model: The model to fill.
        path: A `.safetensors`, `.pth`, `.pt` or `.bin` file. Torch files are read with `weights_only=True`.
        skip_head: Keep the model's own head, and ignore the checkpoint's.
        source_grid: (rows, cols) of the checkpoint's position embeddings; needed only if it is not square.

    Returns:
        `model`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file can't be read or its tensors do not fit the model; the message says how.
        ImportError: If a `.safetensors` file is given and safetensors is not installed.
    """
    path = Path(path)
    tensors = _unwrap(_read(path), path)
    form = next((form for form in FORMATS if form.matches(tensors.keys())), None)
    if form is None:
        raise ValueError(
            f"weights file {str(path)!r} has no known format (its names begin {_some(set(tensors))}); "
            f"accepted are {', '.join(form.NAME for form in FORMATS)}"
        )
    tensors = form.convert(tensors)
    own = model.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError("the model is on the meta device; call model.to_empty(device=...) before loading weights")
    if skip_head:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEADS)}
        tensors |= {name: tensor for name, tensor in own.items() if name.startswith(HEADS)}
    tensors = fit_pos_embed(tensors, model, source_grid)
    _check(tensors, own, path)
    model.load_state_dict(tensors)
    return model
