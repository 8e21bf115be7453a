"""torch.nn: the modules that every library's models share."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from .. import layers
from . import Swap


class FusedLayerNorm(layers.FusedLayerNorm, nn.LayerNorm):
    """`torch.nn.LayerNorm` over one dimension."""

    replaces = nn.LayerNorm


def decline_layer_norm(module: Any) -> str | None:
    """Why a LayerNorm must stay: the kernel normalises one dimension, of bounded width."""
    shape = module.normalized_shape
    if len(shape) != 1:
        return f"normalises {len(shape)} dimensions; the kernel one"
    if shape[0] > (widest := layers.kernels.MAX_WIDTH):
        return f"is {shape[0]} wide; the kernel takes up to {widest}"
    return None


@functools.cache
def swaps() -> dict[type[nn.Module], Swap]:
    """Replaceable classes of torch.nn."""
    return {nn.LayerNorm: Swap(FusedLayerNorm, decline_layer_norm)}


@functools.cache
def declined() -> dict[type[nn.Module], tuple[str, str]]:
    """Classes of torch.nn that are known and left alone."""
    return {nn.MultiheadAttention: ("attention", "torch's nn.MultiheadAttention has no adapter")}
