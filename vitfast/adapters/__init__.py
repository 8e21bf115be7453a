"""Which modules of which library can be replaced, and by what.

One file per library. Each has `swaps()`, a table from a class to the fused class that takes its place, and
`declined()`, classes that do a replaceable module's work but are left alone, with the reason. A file is imported when
a model holds a class of its library, so nothing here imports a library that the user has not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..layers import overridden


@dataclass(frozen=True)
class Swap:
    """How one class is replaced.

    Attributes:
        fused: the class that takes its place; its `kind` is what `accelerate(only=...)` selects by.
        decline: says why a given module of the class must stay as it is, or None.
    """

    fused: type[nn.Module]
    decline: Callable[[nn.Module], str | None]


@dataclass(frozen=True)
class Match:
    """What an adapter says of one module.

    Attributes:
        kind: of replacement, see `vitfast.layers.KINDS`.
        fused: the class to put in its place, or None.
        reason: why not; empty where `fused` is set.
    """

    kind: str
    fused: type[nn.Module] | None
    reason: str


# first part of a class's module path -> adapter file
_ADAPTERS = {"torch": "torch", "vitfast": "reference", "timm": "timm"}


def match(module: nn.Module) -> Match | None:
    """What can be done with a module; None where it is of no interest.

    A subclass of a replaceable class is declined: its `forward` is not known.
    """
    kind = type(module)
    for ancestor in kind.__mro__:
        name = _ADAPTERS.get(ancestor.__module__.partition(".")[0])
        if name is None:
            continue
        adapter = importlib.import_module(f".{name}", __name__)
        if ancestor in adapter.declined():
            of_kind, reason = adapter.declined()[ancestor]
            return Match(of_kind, None, reason)
        swap = adapter.swaps().get(ancestor)
        if swap is None:
            continue
        if ancestor is not kind:
            return Match(swap.fused.kind, None, f"unknown subclass of {ancestor.__name__}")  # type: ignore[attr-defined]
        reason = "; ".join(overridden(module)) or swap.decline(module)
        return Match(swap.fused.kind, None if reason else swap.fused, reason or "")  # type: ignore[attr-defined]
    return None
