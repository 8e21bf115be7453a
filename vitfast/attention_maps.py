"""What a Vision Transformer attends to: probabilities per layer, attention rollout, and a picture of it.

Fused attention never writes its probabilities down, so they are computed again from what went into it. A hook on a
module *inside* a fused block would make the block call that module the slow way; here a hook on the block itself
catches the block's input, which leaves the fused path as it is, and the block's own first norm, its projection to
queries and keys, and their norms are then applied to that input once more.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from .adapters import match
from .layers import FusedAttention, FusedBlock, face

HEADS = ("mean", "max", "min")
ROWS = ("all", "cls")
METHODS = ("abnar", "vit_keras", "vit_explain")


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


class _Attention(NamedTuple):
    """A self-attention module whose arithmetic is known.

    Attributes:
        name: in the model.
        module: the module itself.
        view: it, seen as the fused class that is its own or could take its place.
        block: the fused block that may skip the module's `forward`, or None.
    """

    name: str
    module: nn.Module
    view: Any
    block: Any | None


def _attentions(model: nn.Module) -> list[_Attention]:
    """Self-attention modules, in the model's order."""
    found: list[_Attention] = []
    declined = []
    for name, module in model.named_modules():
        kind: type[nn.Module] | None = type(module) if isinstance(module, FusedAttention) else None
        if kind is None and (matched := match(module)) is not None and matched.kind == "attention":
            kind = matched.fused
            if kind is None:
                declined.append((name, module, matched.reason))
        if kind is not None and issubclass(kind, FusedAttention):
            above = name.rpartition(".")[0]
            if any(attention.name == above for attention in found):
                # the wrapper has it
                continue
            parent = model.get_submodule(above)
            skips = isinstance(parent, FusedBlock) and parent.attn is module and not parent.bias_from_block
            block = parent if skips else None
            found.append(_Attention(name, module, face(kind, module), block))
    known = tuple({attention.view.replaces for attention in found})
    # one of the same class is a layer that the count would miss; another class pools
    missing = [
        f"{name}: {why}"
        for name, module, why in declined
        # an nn.MultiheadAttention without this weight has keys of another width than its queries
        if not found or (isinstance(module, known) and getattr(module, "in_proj_weight", module) is not None)
    ]
    if missing:
        raise ValueError(f"{type(model).__name__} has attention that attention maps do not know: {'; '.join(missing)}")
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention modules that attention maps know")
    return found


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    """Handles put into the list are removed at the end; compiled code, which would not see hooks, is not used."""
    handles: list[Any] = []
    try:
        with torch.compiler.set_stance("force_eager"):
            yield handles
    finally:
        for handle in handles:
            handle.remove()


# the tokens that an attention is called with, and what else `query_key` wants, by name; None where it is called with
# keys of another sequence
_Given = tuple[Tensor, dict[str, Tensor]] | None


def _given(attention: _Attention, called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Given:
    # more arguments than names: the rest is of no known meaning, and refused below
    names = itertools.chain(inspect.signature(called.forward).parameters, map(str, itertools.count()))
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    x = next(iter(tensors.values()))
    # nn.MultiheadAttention is given its tokens three times
    others = {name: tensor for name, tensor in tensors.items() if tensor is not x}
    if _may_cross(attention) and "key" in others:
        return None
    unknown = others.keys() - inspect.signature(attention.view.query_key).parameters.keys()
    if unknown or kwargs.get("is_causal") or getattr(attention.module, "is_causal", False):
        raise ValueError(
            f"{attention.name} is called with a mask ({', '.join(sorted(unknown)) or 'is_causal'}); attention maps are "
            "made of unmasked attention only"
        )
    return x, others


def _may_cross(attention: _Attention) -> bool:
    """Whether only its calls show if it attends to its own tokens, or pools those of others."""
    return isinstance(attention.module, nn.MultiheadAttention)


def _caught(by_attention: dict[_Attention, list[Any]]) -> dict[_Attention, Any]:
    """What one forward gave, of the attentions that attend to their own tokens."""
    for attention, calls in by_attention.items():
        if len(calls) != 1:
            raise ValueError(f"{attention.name} ran {len(calls)} times in one forward; expected once")
    caught = {attention: call for attention, (call,) in by_attention.items() if call is not None}
    if not caught:
        raise ValueError(
            f"{next(iter(by_attention)).name} attends to other tokens than its own; expected self-attention"
        )
    return caught


def _indices(layers: Sequence[int] | None, count: int) -> list[int]:
    wanted = range(count) if layers is None else layers
    if not wanted or not all(-count <= i < count for i in wanted):
        raise ValueError(f"layers={list(wanted)}; expected indices from {-count} to {count - 1}")
    return [i % count for i in wanted]


def _probabilities(attention: Any, x: Tensor, given: dict[str, Tensor], rows: str) -> Tensor:
    """softmax(scale q k^T + bias) of normed tokens `[B, N, D]`: `[B, h, N, N]`, or `[B, h, N]` of the first token."""
    q, k, bias = attention.query_key(x, **given)
    if rows == "cls":
        q = q[:, :, :1]
        bias = bias if bias is None or bias.shape[-2] == 1 else bias[..., :1, :]
    dtype = torch.promote_types(q.dtype, torch.float32)
    # the model's own q and k, but autocast would round the logits too
    with torch.autocast(q.device.type, enabled=False):
        logits = (q.to(dtype) * attention.scale) @ k.to(dtype).transpose(-2, -1)
        logits = logits if bias is None else logits + bias.to(dtype)
        probabilities = logits.softmax(dim=-1)
    return probabilities[:, :, 0] if rows == "cls" else probabilities


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


def _layout(model: nn.Module, pixels: Tensor, count: int, width: int) -> tuple[tuple[int, int], int, bool]:
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
    attentions = _attentions(model)
    if rows == "cls" and not _has_class_token(model):
        raise ValueError(f"rows='cls', but this {type(model).__name__} has no class token; accepted is rows='all'")
    # which layers those are, only the forward shows
    unsure = any(map(_may_cross, attentions))
    chosen = attentions if unsure else [attentions[i] for i in _indices(layers, len(attentions))]
    # a layer that is asked for twice is caught once
    caught: dict[_Attention, list[_Given]] = {attention: [] for attention in chosen}

    def catch(attention: _Attention, into: list[_Given]) -> Any:
        return lambda called, args, kwargs: into.append(_given(attention, called, args, kwargs))

    with _hooks() as handles:
        for attention, into in caught.items():
            target = attention.module if attention.block is None else attention.block
            handles.append(target.register_forward_pre_hook(catch(attention, into), with_kwargs=True))
        model(pixels)
    inputs = _caught(caught)
    if unsure:
        attentions = list(inputs)
    indices = _indices(layers, len(attentions))
    maps = {}
    for i in set(indices):
        (x, given), block = inputs[attentions[i]], attentions[i].block
        normed = x if block is None else block.norm1(x)
        maps[i] = _fuse(_probabilities(attentions[i].view, normed, given, rows), heads)
    width = inputs[attentions[indices[0]]][0].shape[-1]
    layout = _layout(model, pixels, maps[indices[0]].shape[-1], width)
    return AttentionMaps(tuple(maps[i] for i in indices), tuple(indices), *layout, rows)


@torch.no_grad()
def rollout(maps: AttentionMaps, *, method: str = "abnar", discard_ratio: float = 0.0) -> Tensor:
    """Attention rollout: how much of each patch reaches the class token through all layers.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (arXiv 2005.00928), section 3: heads are averaged,
    the residual connection counts as an identity of equal weight, and the layers' matrices are multiplied,

        A_l = rownorm(W_l + I),    R = A_L ... A_2 A_1.

    The result is R's row of the class token, at the patches. Two libraries compute it in ways of their own, which can
    be had by name:

    - "abnar": the paper's. A model without a class token gives the mean over its patches' rows.
    - "vit_keras", as `vit_keras.visualize.attention_map`: each W_l + I is divided by the sum of the whole matrix, and
      the result by its largest value. Of averaged heads this is "abnar" but for its scale. The products shrink by
      N a layer, which underflows in fp32 and does not in fp64, which everything here is computed in.
    - "vit_explain", as jacobgil's `vit-explain`: `discard_ratio` is a share of the whole matrix's weights, and never
      takes the one of the class token on itself; column j, not row j, is divided by the sum of row j (the same where
      rows sum to one); the result is divided by its largest value. Its choice of heads is `attention_maps(heads=...)`.

    Args:
        maps: of all layers, first to last, as `attention_maps` returns them; kept heads are averaged.
        method: "abnar", "vit_keras" or "vit_explain".
        discard_ratio: share of the weights, the smallest ones, that count as zero: of each row's for "abnar", of the
            matrix's for "vit_explain"; 0 <= ratio < 1.

    Returns:
        `[B, rows, cols]` float64, not negative. For "abnar" it would sum to one with the prefix tokens' part, for the
        others the largest value is one.

    Raises:
        ValueError: there is no map, only the class token's row of it, or no class token for a method that needs one;
            `method` or `discard_ratio` is out of range.
    """
    _check_rollout(method, discard_ratio)
    if len(maps) == 0:
        raise ValueError("rollout needs the map of at least one layer")
    if maps.rows != "all":
        raise ValueError(f"rollout multiplies whole maps, and these have rows={maps.rows!r}; expected rows='all'")
    if method != "abnar" and not maps.has_class_token:
        raise ValueError(f"method={method!r} reads the class token's row, and there is none; accepted is 'abnar'")
    identity = torch.eye(maps[0].shape[-1], dtype=torch.float64, device=maps[0].device)
    result = identity
    for layer in maps:
        weights = layer.double().mean(dim=1) if layer.ndim == 4 else layer.double()  # [B, N, N]
        weights = _discard(weights, method, discard_ratio) + identity
        if method == "vit_keras":
            weights = weights / weights.sum(dim=(-2, -1), keepdim=True)
        else:
            weights = weights / weights.sum(dim=-1).unsqueeze(-1 if method == "abnar" else -2)
        result = weights @ result
    flow = maps.seen(result)
    if method == "abnar":
        return flow
    # where everything was discarded, nothing is seen
    return flow / flow.amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def _check_rollout(method: str, discard_ratio: float) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r}; expected one of {', '.join(METHODS)}")
    if not 0.0 <= discard_ratio < 1.0:
        raise ValueError(f"discard_ratio={discard_ratio}; expected 0 <= discard_ratio < 1")
    if discard_ratio and method == "vit_keras":
        raise ValueError(f"discard_ratio={discard_ratio}, but method='vit_keras' discards nothing; expected 0")


def _discard(weights: Tensor, method: str, ratio: float) -> Tensor:
    """Weights `[B, N, N]` with the smallest ones set to zero."""
    among = weights if method == "abnar" else weights.flatten(1)
    count = int(among.shape[-1] * ratio)
    if not count:
        return weights
    smallest = among.topk(count, dim=-1, largest=False).indices
    kept = among.scatter(-1, smallest, 0.0).view_as(weights)
    if method == "vit_explain":
        kept[:, 0, 0] = weights[:, 0, 0]
    return kept


Target = int | Sequence[int] | Tensor | Callable[[Any], Tensor] | None


def grad_rollout(
    model: nn.Module, pixels: Tensor, target: Target = None, *, method: str = "abnar", discard_ratio: float = 0.0
) -> Tensor:
    """Rollout of what speaks for a class: each attention probability times the class's gradient with respect to it.

    In the place of a layer's probabilities stands max(0, mean over heads of P * dL/dP), L the class's logit; the rest
    is `rollout`. This is `vit-explain`'s gradient rollout, with each layer's own gradient beside it, for one class or
    one per image. Fused attention has no probabilities to differentiate by, so this forward computes attention as an
    explicit softmax in its place, for every layer: it keeps 2 * B * h * N * N numbers a layer. Weights get no
    gradients, need not ask for any, and the hooks that this takes are gone when it returns or raises.

    Args:
        model: as for `attention_maps`, accelerated or not; put it into evaluation mode.
        pixels: `[B, C, H, W]`, as for `attention_maps`.
        target: index of the class in the model's logits `[B, classes]` (its first output); one for all images or one
            each; None for each image's best. Or a function from what the model returns to the number that is explained,
            one per image or their sum, such as a similarity with a text.
        method, discard_ratio: see `rollout`.

    Returns:
        `[B, rows, cols]` float64, not negative, see `rollout`.

    Raises:
        ValueError: as from `attention_maps`; values come from a LoRA layer in the place of a packed linear one;
            `target` or an option does not fit.
    """
    _check_rollout(method, discard_ratio)
    attentions = _attentions(model)
    caught: dict[_Attention, list[tuple[Tensor, int] | None]] = {attention: [] for attention in attentions}

    def explicit(attention: _Attention, into: list[Any]) -> Any:
        def hook(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            given = _given(attention, called, args, kwargs)
            if given is None:
                into.append(None)
                return output
            out, probabilities = _explicit(attention, *given)
            into.append((probabilities, given[0].shape[-1]))
            return (out, *output[1:]) if isinstance(output, tuple) else out

        return hook

    # whoever calls may be in inference mode, whose tensors cannot be differentiated
    with _hooks() as handles, torch.inference_mode(False), torch.enable_grad():
        for attention, into in caught.items():
            handles.append(attention.module.register_forward_hook(explicit(attention, into), with_kwargs=True))
        output = model(pixels.clone() if pixels.is_inference() else pixels)
        found = list(_caught(caught).values())
        probabilities = [p for p, _ in found]
        # still under the hooks, as activation checkpointing runs parts of the forward again
        gradients = torch.autograd.grad(_explained(output, target), probabilities)
    weighted = [(p.detach() * g).mean(dim=1).clamp(min=0.0) for p, g in zip(probabilities, gradients, strict=True)]
    layout = _layout(model, pixels, weighted[0].shape[-1], found[0][1])
    maps = AttentionMaps(tuple(weighted), tuple(range(len(weighted))), *layout)
    return rollout(maps, method=method, discard_ratio=discard_ratio)


def _explicit(attention: _Attention, x: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """An attention's output for `x`, by way of its probabilities `[B, h, N, N]`, which gradients are asked of."""
    view, batch_first = attention.view, getattr(attention.module, "batch_first", True)
    probabilities = _probabilities(view, x, given, "all")
    if not probabilities.requires_grad:
        # nothing in front of it is trained
        probabilities.requires_grad_()
    if getattr(view, "v_proj", None) is not None:
        v = view.v_proj(x)
    elif view.plain_in():
        weight, bias = view.weights_in()
        first = 2 * weight.shape[0] // 3
        v = F.linear(x, weight[first:], None if bias is None else bias[first:])
    else:
        raise ValueError(
            f"the values of {attention.name} come from something else than one linear layer "
            f"({'; '.join(view.limits_in())}), which the gradient rollout does not know"
        )
    v = (v if batch_first else v.transpose(0, 1)).unflatten(2, (view.num_heads, -1)).transpose(1, 2)
    out = (probabilities.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    out = view.project(view.merged(out), None, None)
    return out if batch_first else out.transpose(0, 1), probabilities


def _explained(output: Any, target: Target) -> Tensor:
    """The number that is differentiated."""
    if callable(target) and not isinstance(target, Tensor):
        score = target(output)
        if not isinstance(score, Tensor) or score.ndim > 1:
            raise ValueError(f"target returned {_shape(score)}; expected one number, or one per image")
        return score.sum()
    if isinstance(output, dict):
        output = next(iter(output.values()))
    logits = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError(
            f"the model returns {_shape(logits)}; expected logits [B, classes], or a function as target that picks the "
            "number to explain"
        )
    count, classes = logits.shape
    # a copy, since the caller's may be of inference mode
    chosen = logits.argmax(dim=-1) if target is None else torch.as_tensor(target, device=logits.device).clone()
    fits = chosen.shape in ((), (count,)) and not chosen.is_floating_point()
    if not fits or chosen.min() < 0 or chosen.max() >= classes:
        raise ValueError(f"target={target!r}; expected one class or {count}, from 0 to {classes - 1}")
    return logits.gather(1, chosen.expand(count)[:, None]).sum()


def _shape(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


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


def draw(view: Image.Image, maps: AttentionMaps, flow: Tensor | None = None) -> Image.Image:
    """A sheet of pictures with labels: the image, what each layer's class token sees of it, and the rollout.

    Args:
        view: what the model saw as its first image, at any size.
        maps: of any layers; where heads were kept, there is a picture of each. See `AttentionMaps.seen`.
        flow: of `rollout` or `grad_rollout`, drawn last.
    """
    width, height = view.size
    scale = _PANEL / max(width, height)
    photo = view.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    panels: list[tuple[str, Image.Image]] = [("image", photo)]
    for layer, seen in zip(maps.layers, map(maps.seen, maps), strict=True):
        if seen.ndim == 3:
            panels.append((f"layer {layer}", overlay(photo, seen[0])))
        else:
            panels += [(f"layer {layer}, head {i}", overlay(photo, head)) for i, head in enumerate(seen[0])]
    if flow is not None:
        panels.append(("rollout", overlay(photo, flow[0])))
    return _sheet(panels)


# pixels: the longer side of a picture on a sheet, between pictures, and the height of a label
_PANEL, _GAP, _LABEL = 224, 6, 20


def _sheet(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures of one size below their labels, in a grid about as wide as high."""
    columns = math.ceil(math.sqrt(len(panels)))
    lines = -(-len(panels) // columns)
    across, down = panels[0][1].width + _GAP, _LABEL + panels[0][1].height + _GAP
    sheet = Image.new("RGB", (columns * across + _GAP, lines * down + _GAP), "white")
    text, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (label, picture) in enumerate(panels):
        x, y = _GAP + i % columns * across, _GAP + i // columns * down
        text.text((x, y + _LABEL // 2 - 1), label, fill="black", font=font, anchor="lm")
        sheet.paste(picture, (x, y + _LABEL))
    return sheet
