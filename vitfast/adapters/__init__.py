"""Which modules of which library can be replaced, and by what.

One file per library. Each has `OFFERS`, fused layers by the names of the classes that they may stand for, and
`DECLINED`, classes that do a replaceable module's work but have no fused layer, with the reason. A class counts once
its own module proved to compute the same (`proved.py`), in whatever version, and whoever copied or changed it.
A file is imported when a model holds a class of its library, so nothing here imports a library that the user has not.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys

from torch import nn

from ..layers import overridden
from . import proved
from .known import Declined, Match, Offer, around, original_class, stray_arguments

# first part of a class's module path -> adapter file
_ADAPTERS = {
    "torch": "torch_nn",
    "vitfast": "reference",
    "timm": "timm.table",
    "transformers": "transformers.table",
    "torchvision": "torchvision.table",
    "open_clip": "open_clip",
}


def match(module: nn.Module) -> Match | None:
    """What can be done with a module, fused or not; None where it is of no interest."""
    kind = original_class(type(module))
    offers, declined = _said_of(kind)  # type: ignore[arg-type]
    found: Match | None = None
    for offer in offers:
        if not offer.takes(module):
            continue
        reason = "; ".join(overridden(module)) or _made_for_one(module) or offer.decline(module)
        if reason:
            return Match(offer.kind, None, reason)
        for mixin in offer.mixins:
            if stray := stray_arguments(mixin, kind):
                reason = f"its forward takes {', '.join(stray)}, which {mixin.__name__} does not"
            elif (reason := proved.prove(module, offer, mixin, match)) is None:
                return Match(offer.kind, around(mixin, kind), "")
            found = found or Match(offer.kind, None, reason, proved.disproves(reason))
    for known in declined:
        if all(hasattr(module, name) for name in known.has.split()):
            return Match(known.kind, None, known.reason)
    return found


def _made_for_one(module: nn.Module) -> str | None:
    """Why a class that torch made around a library's, for this object alone, stays: torch takes it apart again."""
    if hasattr(module, "parametrizations"):
        return "is parametrised"
    if any(base.__module__.startswith("torch.distributed.") for base in type(module).__mro__):
        return "its class is one of torch.distributed's, made around the library's: accelerate before sharding"
    return None


@functools.cache
def _said_of(kind: type[nn.Module]) -> tuple[tuple[Offer, ...], tuple[Declined, ...]]:
    """What is offered for a class and said against it: by its name, then by those of what it is made of."""
    offers: dict[Offer, None] = {}
    declined: dict[Declined, None] = {}
    for ancestor in kind.__mro__:
        if not issubclass(ancestor, nn.Module) or ancestor is nn.Module:
            continue
        for name in _adapters(ancestor):
            adapter = importlib.import_module(f".{name}", __name__)
            offers.update((offer, None) for offer in adapter.OFFERS if re.fullmatch(offer.name, ancestor.__name__))
            declined.update((said, None) for said in adapter.DECLINED if re.fullmatch(said.name, ancestor.__name__))
    return tuple(offers), tuple(declined)


def _adapters(kind: type) -> list[str]:
    library = kind.__module__.partition(".")[0]
    if library in _ADAPTERS:
        return [_ADAPTERS[library]]
    # classes are copied from project to project, DINOv2's and Transformers' more than others
    return ["dinov2.table", *(["transformers.table"] if "transformers" in sys.modules else [])]
