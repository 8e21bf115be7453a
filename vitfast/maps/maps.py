"""`attention_maps`: the probabilities of chosen layers.

Fused attention never writes its probabilities down, so they are computed again from what went into it: the block's own
first norm, its projection to queries and keys, and their norms are applied once more to the input that a hook caught.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calls import Attention, Call, attentions_of, call_of, hooks, may_cross, own_calls, probabilities_of

HEADS = ("mean", "max", "min")
ROWS = ("all", "cls")


@dataclass(frozen=True)
class AttentionMaps(Sequence[Tensor]):
    """Attention probabilities of some layers; a sequence of tensors, in the order that was asked for.

    Attributes:
        maps: one per layer, `[B, N, N]`, or `[B, h, N, N]` where the heads were kept; of the class token's row alone
            `[B, N]`, or `[B, h, N]`. fp32 (fp64 of a model in fp64). Rows are queries and sum to one (after "max" or
            "min" over the heads they do not).
        layers: index of each map's layer in the model.
        grid: (rows, cols) of patches.
        num_prefix_tokens: tokens in front of the patches: class, distillation, registers.
        has_class_token: whether the first of them is a class token.
        rows: "all", or "cls" for the class token's row alone.
    """

    maps: tuple[Tensor, ...]
    layers: tuple[int, ...]
    grid: tuple[int, int]
    num_prefix_tokens: int
    has_class_token: bool
    rows: str = "all"

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: Any) -> Any:
        return self.maps[index]

    def to_grid(self, rows: Tensor) -> Tensor:
        """The patches' part of attention rows `[..., N]`, as `[..., rows, cols]`."""
        return rows[..., self.num_prefix_tokens :].unflatten(-1, self.grid)

    def seen(self, layer: Tensor) -> Tensor:
        """What the class token sees of each patch in a map; without a class token, what the patches see on average.

        Args:
            layer: one of `maps`, or something of its shape.

        Returns:
            `[B, rows, cols]`, or `[B, h, rows, cols]`.
        """
        if self.rows == "all":
            layer = layer[..., 0, :] if self.has_class_token else layer[..., self.num_prefix_tokens :, :].mean(dim=-2)
        return self.to_grid(layer)


def _indices(layers: Sequence[int] | None, count: int) -> list[int]:
    wanted = range(count) if layers is None else layers
    if not wanted or not all(-count <= i < count for i in wanted):
        raise ValueError(f"layers={list(wanted)}; expected indices from {-count} to {count - 1}")
    return [i % count for i in wanted]


def _fuse(probabilities: Tensor, heads: str | None) -> Tensor:
    if heads is None:
        return probabilities
    if heads == "mean":
        return probabilities.mean(dim=1)
    return probabilities.amax(dim=1) if heads == "max" else probabilities.amin(dim=1)


def _has_class_token(model: nn.Module) -> bool:
    # timm, DINOv2, Transformers; torchvision; CLIP
    names = ("cls_token", "class_token", "class_embedding")
    return any(isinstance(getattr(module, name, None), Tensor) for module in model.modules() for name in names)


def _grid(model: nn.Module, pixels: Tensor, width: int) -> tuple[int, int]:
    """(rows, cols) of patches, by the convolution that makes tokens of this width of these pixels."""
    stems: list[Any] = [module for module in model.modules() if hasattr(module, "dynamic_feat_size")]
    convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    conv = next((c for c in convs if (c.in_channels, c.out_channels) == (pixels.shape[1], width)), None)
    # timm's stems know their grid: one that pads the image, or that is a whole convolutional network
    if stems and (conv is None or any(stem.dynamic_img_pad for stem in stems)):
        grid = stems[0].dynamic_feat_size(pixels.shape[-2:])
    elif conv is not None:
        image, weight = (torch.empty(shape, device="meta") for shape in (pixels.shape, conv.weight.shape))
        grid = F.conv2d(image, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups).shape[-2:]
    elif isinstance(patch := getattr(model, "patch_size", None), int):
        # torchvision's, behind a stem of several convolutions
        grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
    else:
        raise ValueError(
            f"{type(model).__name__} has no convolution from {pixels.shape[1]} channels to tokens of width {width}, so "
            "the patch grid is not known"
        )
    return grid[0], grid[1]


def layout_of(model: nn.Module, pixels: Tensor, count: int, width: int) -> tuple[tuple[int, int], int, bool]:
    """((rows, cols), prefix tokens, whether there is a class token) of a forward with so many tokens, so wide."""
    if any(isinstance(getattr(module, "detection_tokens", None), Tensor) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has tokens behind its patches; expected all others in front of them")
    rows, cols = _grid(model, pixels, width)
    prefix = count - rows * cols
    if prefix < 0:
        raise ValueError(f"the blocks see {count} tokens; expected at least the {rows}x{cols} patches of the image")
    return (rows, cols), prefix, prefix > 0 and _has_class_token(model)


@torch.no_grad()
def attention_maps(
    model: nn.Module,
    pixels: Tensor,
    *,
    layers: Sequence[int] | None = None,
    heads: str | None = "mean",
    rows: str = "all",
) -> AttentionMaps:
    """Attention probabilities of chosen layers in one forward, of a plain or an accelerated model.

    The model runs as it is, fused path and training mode included (dropout of the probabilities is not applied to
    what is returned); a compiled model runs without its compiled code. The hooks that this takes are gone when it
    returns or raises.

    Only what is asked for is computed again, beside the queries and keys of the chosen layers: N numbers per head with
    `rows="cls"`, N * N with "all". The softmax runs over whole rows, so it needs nothing that the kernel would have to
    save, such as the logarithm of its sum.

    Args:
        model: any model whose attention `vitfast.accelerate` knows, accelerated or not.
        pixels: `[B, C, H, W]`, on the model's device and in its dtype; H and W may differ.
        layers: indices of attention layers, negative ones from the end; default all.
        heads: "mean", "max" or "min" over the heads; None keeps them.
        rows: "all" queries, which `rollout` needs, or "cls", the class token's alone.

    Returns:
        The maps, in the order of `layers`: `[B, N, N]` each, `[B, N]` with `rows="cls"`, with heads behind the batch
        where they are kept.

    Raises:
        ValueError: attention of the model is not known here, is called with a mask that its adapter does not know, or
            attends within windows; `layers`, `heads` or `rows` does not fit.
    """
    if heads is not None and heads not in HEADS:
        raise ValueError(f"heads={heads!r}; expected one of {', '.join(HEADS)} or None")
    if rows not in ROWS:
        raise ValueError(f"rows={rows!r}; expected one of {', '.join(ROWS)}")
    attentions = attentions_of(model)
    if rows == "cls" and not _has_class_token(model):
        raise ValueError(f"rows='cls', but this {type(model).__name__} has no class token; accepted is rows='all'")
    # which layers those are, only the forward shows
    unsure = any(map(may_cross, attentions))
    chosen = attentions if unsure else [attentions[i] for i in _indices(layers, len(attentions))]
    # a layer that is asked for twice is caught once
    caught: dict[Attention, list[Call]] = {attention: [] for attention in chosen}

    def catch(attention: Attention, into: list[Call]) -> Any:
        return lambda called, args, kwargs: into.append(call_of(attention, called, args, kwargs))

    with hooks() as handles:
        for attention, into in caught.items():
            target = attention.module if attention.block is None else attention.block
            handles.append(target.register_forward_pre_hook(catch(attention, into), with_kwargs=True))
        model(pixels)
    inputs = own_calls(caught)
    if unsure:
        attentions = list(inputs)
    indices = _indices(layers, len(attentions))
    maps = {}
    for i in set(indices):
        (x, given), block = inputs[attentions[i]], attentions[i].block
        normed = x if block is None else block.norm1(x)
        maps[i] = _fuse(probabilities_of(attentions[i].view, normed, given, rows), heads)
    width = inputs[attentions[indices[0]]][0].shape[-1]
    layout = layout_of(model, pixels, maps[indices[0]].shape[-1], width)
    return AttentionMaps(tuple(maps[i] for i in indices), tuple(indices), *layout, rows)
