"""Which modules of a model can be replaced."""

from __future__ import annotations

import torch
from torch import nn

from ..adapters import Match, match
from ..layers import FusedLayer, FusedModel


def matches(model: nn.Module) -> list[tuple[str, nn.Module, Match]]:
    modules = [(name, module) for name, module in model.named_modules() if not isinstance(module, FusedLayer)]
    found = ((name, module, matched(module)) for name, module in modules)
    return [(name, module, m) for name, module, m in found if m is not None]


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


def offloaded(model: nn.Module) -> bool:
    """Whether Hugging Face's accelerate keeps weights elsewhere and lends them to each module for its forward."""
    return any(
        "_hf_hook" in vars(module) and any(p.is_meta for p in module.parameters(recurse=False))
        for module in model.modules()
    )


def check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a scripted model cannot be accelerated; accelerate it before torch.jit.script")


def serves(found: Match) -> tuple[str, ...]:
    """The kinds for whose sake a module is replaced."""
    return FusedModel.serves if found.kind == FusedModel.kind else (found.kind,)
