"""Attention rollout weighted by the gradients of a class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calls import Attention, attentions_of, call_of, hooks, own_calls, probabilities_of
from .maps import AttentionMaps, layout_of
from .rollouts import check_rollout, rollout

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
    check_rollout(method, discard_ratio)
    attentions = attentions_of(model)
    caught: dict[Attention, list[tuple[Tensor, int] | None]] = {attention: [] for attention in attentions}

    def explicit(attention: Attention, into: list[Any]) -> Any:
        def hook(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            given = call_of(attention, called, args, kwargs)
            if given is None:
                into.append(None)
                return output
            out, probabilities = _explicit(attention, *given)
            into.append((probabilities, given[0].shape[-1]))
            return (out, *output[1:]) if isinstance(output, tuple) else out

        return hook

    # whoever calls may be in inference mode, whose tensors cannot be differentiated
    with hooks() as handles, torch.inference_mode(False), torch.enable_grad():
        for attention, into in caught.items():
            handles.append(attention.module.register_forward_hook(explicit(attention, into), with_kwargs=True))
        output = model(pixels.clone() if pixels.is_inference() else pixels)
        found = list(own_calls(caught).values())
        probabilities = [p for p, _ in found]
        # still under the hooks, as activation checkpointing runs parts of the forward again
        gradients = torch.autograd.grad(_explained(output, target), probabilities)
    weighted = [(p.detach() * g).mean(dim=1).clamp(min=0.0) for p, g in zip(probabilities, gradients, strict=True)]
    layout = layout_of(model, pixels, weighted[0].shape[-1], found[0][1])
    maps = AttentionMaps(tuple(weighted), tuple(range(len(weighted))), *layout)
    return rollout(maps, method=method, discard_ratio=discard_ratio)


def _explicit(attention: Attention, x: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """An attention's output for `x`, by way of its probabilities `[B, h, N, N]`, which gradients are asked of."""
    view, batch_first = attention.view, getattr(attention.module, "batch_first", True)
    probabilities = probabilities_of(view, x, given, "all")
    if not probabilities.requires_grad:
        # nothing in front of it is trained
        probabilities.requires_grad_()
    notes: list[str] = []
    if getattr(view, "v_proj", None) is not None:
        v = view.v_proj(x)
    elif view.plan_in(notes):
        weight, bias = view.weights_in()
        first = 2 * weight.shape[0] // 3
        v = F.linear(x, weight[first:], None if bias is None else bias[first:])
    else:
        raise ValueError(
            f"the values of {attention.name} come from something else than one linear layer "
            f"({'; '.join(notes)}), which the gradient rollout does not know"
        )
    v = (v if batch_first else v.transpose(0, 1)).unflatten(2, (view.num_heads, -1)).transpose(1, 2)
    out = (probabilities.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    out = view.project(view.merged(out), view.make_plan())
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
