"""Checkpoints with timm's parameter names: timm itself, DeiT, DeiT III, and vitfast's own state dicts."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import Tensor

NAME = "timm"


def matches(names: Collection[str]) -> bool:
    """Whether tensor names look like timm's Vision Transformer."""
    return "patch_embed.proj.weight" in names and any(name.startswith("blocks.0.attn.qkv.") for name in names)


def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives the tensors vitfast's names, which are timm's; only DeiT III's LayerScale names differ."""
    gamma = re.compile(r"^(blocks\.\d+)\.gamma_([12])$")
    return {gamma.sub(r"\1.ls\2.gamma", name): tensor for name, tensor in tensors.items()}
