"""Self-attention modules of a model, what one forward calls them with, and their probabilities.

A hook on a module *inside* a fused block would make the block call that module the slow way; a hook on the block itself
catches the block's input, which leaves the fused path as it is.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import match
from ..layers import FusedAttention, FusedBlock, view_as


class Attention(NamedTuple):
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


def attentions_of(model: nn.Module) -> list[Attention]:
    """Self-attention modules, in the model's order."""
    found: list[Attention] = []
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
            found.append(Attention(name, module, view_as(kind, module), block))
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
def hooks() -> Iterator[list[Any]]:
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
Call = tuple[Tensor, dict[str, Any]] | None


def call_of(attention: Attention, called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """What a hook on `called`, the attention or its block, was given."""
    # more arguments than names: the rest is of no known meaning, and refused below
    names = itertools.chain(inspect.signature(called.forward).parameters, map(str, itertools.count()))
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    x = next(iter(tensors.values()))
    # nn.MultiheadAttention is given its tokens three times
    others = {name: tensor for name, tensor in tensors.items() if tensor is not x}
    if may_cross(attention) and "key" in others:
        return None
    wanted = inspect.signature(attention.view.query_key).parameters.keys()
    unknown = others.keys() - wanted
    if unknown or kwargs.get("is_causal") or getattr(attention.module, "is_causal", False):
        raise ValueError(
            f"{attention.name} is called with a mask ({', '.join(sorted(unknown)) or 'is_causal'}); attention maps are "
            "made of unmasked attention only"
        )
    return x, {
        name: value for name, value in arguments.items() if name in wanted and value is not None and value is not x
    }


def may_cross(attention: Attention) -> bool:
    """Whether only its calls show if it attends to its own tokens, or pools those of others."""
    return isinstance(attention.module, nn.MultiheadAttention)


def own_calls(by_attention: dict[Attention, list[Any]]) -> dict[Attention, Any]:
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


def probabilities_of(attention: Any, x: Tensor, given: dict[str, Any], rows: str) -> Tensor:
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
