"""Which modules of which library can be replaced, and by what.

One file per library. Each has `swaps()`, a table from a class to the fused class that takes its place, and
`declined()`, classes that do a replaceable module's work but are left alone, with the reason; or, where copies of one
class stand in many places, `find()`, which knows a class by what it does. A file is imported when a model holds a class
of its library, so nothing here imports a library that the user has not.
"""

from __future__ import annotations

import importlib

from torch import nn

from ..layers import overridden
from .known import Match

# first part of a class's module path -> adapter file
_ADAPTERS = {
    "torch": "torch_nn",
    "vitfast": "reference",
    "timm": "timm.table",
    "transformers": "transformers.table",
    "torchvision": "torchvision.table",
    "open_clip": "open_clip",
}

# names of classes that are copied from project to project, and so stand under any module path -> adapter file
_COPIED = dict.fromkeys(
    (
        "Attention",
        "Block",
        "DinoVisionTransformer",
        "MemEffAttention",
        "Mlp",
        "NestedTensorBlock",
        "PatchEmbed",
        "SwiGLUFFN",
        "SwiGLUFFNFused",
    ),
    "dinov2.table",
)


def match(module: nn.Module) -> Match | None:
    """What can be done with a module; None where it is of no interest.

    A subclass of a replaceable class is declined: its `forward` is not known.
    """
    kind = type(module)
    for ancestor in kind.__mro__:
        name = _ADAPTERS.get(ancestor.__module__.partition(".")[0], _COPIED.get(ancestor.__name__))
        if name is None:
            continue
        adapter = importlib.import_module(f".{name}", __name__)
        if hasattr(adapter, "find"):
            swap = adapter.find(ancestor)
        elif ancestor in adapter.declined():
            of_kind, reason = adapter.declined()[ancestor]
            return Match(of_kind, None, reason)
        else:
            swap = adapter.swaps().get(ancestor)
        if swap is None or not (swap.concerns is None or swap.concerns(module)):
            continue
        if ancestor is not kind:
            return Match(swap.fused.kind, None, f"unknown subclass of {ancestor.__name__}")  # type: ignore[attr-defined]
        reason = "; ".join(overridden(module)) or swap.decline(module)
        return Match(swap.fused.kind, None if reason else swap.fused, reason or "")  # type: ignore[attr-defined]
    return None
