"""Which modules of a model can be replaced, and which look as if they should be."""

from __future__ import annotations

import torch
from torch import nn

from ..adapters import Match, match
from ..adapters.alike import alike, innermost
from ..adapters.decides import at_once
from ..layers import FusedLayer, FusedModel


def matches(model: nn.Module) -> list[tuple[str, nn.Module, Match]]:
    """What can be done with each module that is not replaced and is of interest, by name, in the model's order."""
    found: dict[str, Match] = {}
    looks: dict[str, str] = {}
    taken: dict[str, str] = {}
    covered: tuple[str, ...] = ()
    with at_once():
        modules = dict(model.named_modules())
        for name, module in modules.items():
            matched_here = None if isinstance(module, FusedLayer) else matched(module)
            fused = type(module) if isinstance(module, FusedLayer) else matched_here and matched_here.fused
            if fused is not None:
                # what a fused layer computes without a fused layer in the place of its own
                covered += tuple(f"{name}.{inner}" if name else inner for inner in getattr(fused, "covers", ()))
            if matched_here is not None:
                found[name] = matched_here
            if isinstance(module, FusedLayer) or matched_here is not None:
                taken[name] = module.kind if isinstance(module, FusedLayer) else matched_here.kind  # type: ignore[union-attr]
            elif name not in covered and (kind := alike(module)) is not None:
                looks[name] = kind
    for name, kind in innermost(looks, taken).items():
        found[name] = Match(kind, None, f"no fused layer is offered for {type(modules[name]).__name__}")
    return [(name, module, found[name]) for name, module in modules.items() if name in found]


def matched(module: nn.Module) -> Match | None:
    """What an adapter says of a module, unless it is a matter of devices: a kernel reads from one."""
    found = match(module)
    if found is None:
        return None
    if "_hf_hook" in vars(module):
        return Match(found.kind, None, "run by a hook of Hugging Face's accelerate (device_map, offloading)")
    devices = {str(tensor.device) for tensor in (*module.parameters(), *module.buffers())}
    if found.fused is not None and len(devices) > 1:
        return Match(found.kind, None, f"spread over {' and '.join(sorted(devices))}")
    return found


def disproved(module: FusedLayer) -> str | None:
    """Why a fused module does not compute any more what its original would, whose class or options changed, or None."""
    found = match(module)
    return found.reason if found is not None and found.disproved else None


def offloaded(model: nn.Module) -> bool:
    """Whether Hugging Face's accelerate keeps weights elsewhere and lends them to each module for its forward."""
    return any(
        "_hf_hook" in vars(module) and any(p.is_meta for p in module.parameters(recurse=False))
        for module in model.modules()
    )


def check_model(model: nn.Module) -> None:
    """Raise `TypeError` unless this is a model whose modules can be exchanged."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a scripted model cannot be accelerated; accelerate it before torch.jit.script")


def serves(found: Match) -> tuple[str, ...]:
    """The kinds for whose sake a module is replaced."""
    return FusedModel.serves if found.kind == FusedModel.kind else (found.kind,)
