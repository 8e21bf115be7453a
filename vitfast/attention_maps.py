"""What a Vision Transformer attends to: probabilities per layer, attention rollout, and a picture of it.

Fused attention never writes its probabilities down, so they are computed again from what went into it. A hook on a
module *inside* a fused block would make the block call that module the slow way; here a hook on the block itself
catches the block's input, which leaves the fused path as it is, and the block's own first norm, qkv projection and
query and key norms are then applied to that input once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .adapters import match
from .layers import FusedAttention, FusedBlock

HEADS = ("mean", "max", "min")


@dataclass(frozen=True)
class AttentionMaps(Sequence[Tensor]):
    """Attention probabilities of some layers; a sequence of tensors, in the model's order.

    Attributes:
        maps: one per layer, `[B, N, N]`, or `[B, h, N, N]` where the heads were kept; fp32. Rows are queries and sum
            to one (after "max" or "min" over the heads they do not).
        layers: index of each map's layer in the model.
        grid: (rows, cols) of patches.
        num_prefix_tokens: tokens in front of the patches.
        has_class_token: whether the first of them is a class token.
    """

    maps: tuple[Tensor, ...]
    layers: tuple[int, ...]
    grid: tuple[int, int]
    num_prefix_tokens: int
    has_class_token: bool

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: Any) -> Any:
        return self.maps[index]

    def to_grid(self, rows: Tensor) -> Tensor:
        """The patches' part of attention rows `[..., N]`, as `[..., rows, cols]`."""
        return rows[..., self.num_prefix_tokens :].unflatten(-1, self.grid)


def _attentions(model: nn.Module) -> list[tuple[str, Any]]:
    """Self-attention modules whose arithmetic is known, in the model's order."""
    found = []
    for name, module in model.named_modules():
        kind: type[nn.Module] | None = type(module) if isinstance(module, FusedAttention) else None
        if kind is None and (matched := match(module)) is not None:
            kind = matched.fused
        if kind is not None and issubclass(kind, FusedAttention) and hasattr(module, "qkv"):
            found.append((name, module))
    return found


@contextmanager
def _inputs(model: nn.Module, attentions: Sequence[tuple[str, Any]]) -> Iterator[list[list[Tensor]]]:
    """While open, a forward of `model` appends what enters each attention's block, or itself, to its list."""
    caught: list[list[Tensor]] = [[] for _ in attentions]
    handles = []

    def catch(into: list[Tensor], name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
                raise ValueError(f"{name} is called with a mask; attention maps are made of unmasked attention only")
            into.append(args[0].detach())

        return hook

    try:
        for (name, attention), into in zip(attentions, caught, strict=True):
            owner = _owner(model, name, attention)
            target = attention if owner is None else owner
            handles.append(target.register_forward_pre_hook(catch(into, name), with_kwargs=True))
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def _owner(model: nn.Module, name: str, attention: nn.Module) -> Any | None:
    """The fused block that skips the attention's `forward`; None where the attention is called as a module."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return parent if isinstance(parent, FusedBlock) and parent.attn is attention else None


def _probabilities(attention: Any, x: Tensor) -> Tensor:
    """softmax(scale q k^T + bias) of tokens `[B, N, D]`: `[B, h, N, N]`, in fp32 from the model's own q and k."""
    # the plain modules have the same attributes under the same names, so one place knows the packing
    q, k, _ = FusedAttention.heads(attention, attention.qkv(x))
    logits = (q.float() * attention.scale) @ k.float().transpose(-2, -1)
    table = getattr(attention, "rel_pos_embed", None)
    if table is not None:
        logits = logits + attention.relative_logits(q, table).float()
    return logits.softmax(dim=-1)


def _fuse(probabilities: Tensor, heads: str | None) -> Tensor:
    if heads is None:
        return probabilities
    if heads == "mean":
        return probabilities.mean(dim=1)
    return probabilities.amax(dim=1) if heads == "max" else probabilities.amin(dim=1)


def _grid(model: nn.Module, pixels: Tensor, tokens: int) -> tuple[tuple[int, int], int, bool]:
    """((rows, cols), prefix tokens, whether there is a class token) of a forward that had `tokens` tokens."""
    owner: Any = next((module for module in model.modules() if hasattr(module, "patch_embed")), None)
    if owner is None:
        raise ValueError(f"{type(model).__name__} has no patch_embed, so the patch grid is not known")
    patch = owner.patch_embed.patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    # rounded up, since timm can pad the image to a multiple of the patch
    rows, cols = -(-pixels.shape[-2] // height), -(-pixels.shape[-1] // width)
    prefix = tokens - rows * cols
    if prefix < 0:
        raise ValueError(f"the blocks see {tokens} tokens; expected at least the {rows}x{cols} patches of the image")
    return (rows, cols), prefix, prefix > 0 and getattr(owner, "cls_token", None) is not None


@torch.no_grad()
def attention_maps(
    model: nn.Module,
    pixels: Tensor,
    *,
    layers: Sequence[int] | None = None,
    heads: str | None = "mean",
) -> AttentionMaps:
    """Attention probabilities of chosen layers in one forward, of a plain or an accelerated model.

    The model runs as it is, fused path and training mode included (dropout of the probabilities is not applied to
    what is returned). The hooks that this takes are gone when it returns or raises.

    Args:
        model: a `vitfast.VisionTransformer` or a timm one, accelerated or not, or a model that holds one.
        pixels: `[B, C, H, W]`, on the model's device and in its dtype; H and W may differ.
        layers: indices of attention layers, negative ones from the end; default all.
        heads: "mean", "max" or "min" over the heads; None keeps them.

    Returns:
        The maps, in the order of `layers`: `[B, N, N]` fp32 each, or `[B, h, N, N]`.

    Raises:
        ValueError: the model has no attention that is known here, or `layers` or `heads` does not fit.
    """
    if heads is not None and heads not in HEADS:
        raise ValueError(f"heads={heads!r}; expected one of {', '.join(HEADS)} or None")
    attentions = _attentions(model)
    if not attentions:
        raise ValueError(f"{type(model).__name__} has no attention modules that attention maps know")
    wanted = range(len(attentions)) if layers is None else layers
    if not all(-len(attentions) <= i < len(attentions) for i in wanted):
        raise ValueError(f"layers={list(wanted)}; expected indices from {-len(attentions)} to {len(attentions) - 1}")
    indices = tuple(i % len(attentions) for i in wanted)
    chosen = [attentions[i] for i in indices]

    with _inputs(model, chosen) as caught:
        model(pixels)
    maps = []
    for (name, attention), inputs in zip(chosen, caught, strict=True):
        if len(inputs) != 1:
            raise ValueError(f"{name} ran {len(inputs)} times in one forward; expected once")
        owner = _owner(model, name, attention)
        x = inputs[0] if owner is None else owner.norm1(inputs[0])
        maps.append(_fuse(_probabilities(attention, x), heads))
    tokens = maps[0].shape[-1] if maps else 0
    grid, prefix, has_class_token = _grid(model, pixels, tokens) if maps else ((0, 0), 0, False)
    return AttentionMaps(tuple(maps), indices, grid, prefix, has_class_token)


@torch.no_grad()
def rollout(maps: AttentionMaps, *, discard_ratio: float = 0.0) -> Tensor:
    """Attention rollout: how much of each patch reaches the class token through all layers.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (arXiv 2005.00928), section 3: heads are averaged,
    the residual connection counts as an identity of equal weight, and the layers' matrices are multiplied,

        A_l = rownorm(W_l + I),    R = A_L ... A_2 A_1.

    The result is R's row of the class token, at the patches. A model without one gives the mean over its patches' rows.

    Args:
        maps: of all layers, first to last, as `attention_maps` returns them.
        discard_ratio: share of each row's weights, the smallest ones, that count as zero; 0 <= ratio < 1.

    Returns:
        `[B, rows, cols]` float64, not negative; with the prefix tokens' part it would sum to one.

    Raises:
        ValueError: there is no map, or `discard_ratio` is out of range.
    """
    if len(maps) == 0:
        raise ValueError("rollout needs the map of at least one layer")
    if not 0.0 <= discard_ratio < 1.0:
        raise ValueError(f"discard_ratio={discard_ratio}; expected 0 <= discard_ratio < 1")
    identity = torch.eye(maps[0].shape[-1], dtype=torch.float64, device=maps[0].device)
    result = identity
    for layer in maps:
        weights = layer.double().mean(dim=1) if layer.ndim == 4 else layer.double()  # [B, N, N]
        discarded = int(weights.shape[-1] * discard_ratio)
        if discarded:
            smallest = weights.topk(discarded, dim=-1, largest=False).indices
            weights = weights.scatter(-1, smallest, 0.0)
        weights = weights + identity
        result = (weights / weights.sum(dim=-1, keepdim=True)) @ result
    rows = result[:, 0] if maps.has_class_token else result[:, maps.num_prefix_tokens :].mean(dim=1)
    return maps.to_grid(rows)


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


def overlay(image: Image.Image, values: Tensor | np.ndarray, *, alpha: float = 0.6) -> Image.Image:
    """A map laid over the image that it was computed from, as colour.

    Args:
        image: what the model saw; any size and mode.
        values: `[rows, cols]`, any finite values; the smallest is drawn darkest, the largest brightest.
        alpha: share of the colour in the mixture, 0 to 1.

    Returns:
        An RGB image of `image`'s size, the map enlarged bilinearly.

    Raises:
        ValueError: `values` is no finite matrix, or `alpha` is out of range.
    """
    table = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float32)
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"the map has shape {list(table.shape)}; expected [rows, cols] of finite values")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha}; expected 0 to 1")
    low, high = float(table.min()), float(table.max())
    table = (table - low) / (high - low) if high > low else np.zeros_like(table)
    enlarged = np.asarray(Image.fromarray(table).resize(image.size, Image.Resampling.BILINEAR))
    photo = np.asarray(image.convert("RGB"), dtype=np.float32)
    mixed = (1.0 - alpha) * photo + alpha * colourise(enlarged)
    return Image.fromarray(np.clip(np.rint(mixed), 0, 255).astype(np.uint8))
