"""timm's own model of the same name, with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import MODELS, Workload, reference_model
from . import Peer, unusable
from .plain import model_function


def _missing(workload: Workload, device: torch.device) -> str | None:
    reason = unusable("timm", "timm")
    if reason is None:
        import timm

        if not timm.is_model(workload.model):
            return f"timm has no model named {workload.model}"
    return reason


def _model(workload: Workload, device: torch.device) -> nn.Module:
    import timm

    model = timm.create_model(workload.model, **MODELS.get(workload.model, {}))
    model.load_state_dict(reference_model(workload.model).state_dict())
    return model.to(device, workload.torch_dtype).train(workload.op == "train")


def _eager(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    model = _model(workload, device)
    return model_function(workload, model, model)


def _compiled(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    torch.compiler.reset()
    model = _model(workload, device)
    return model_function(workload, model, torch.compile(model, dynamic=False))


PEERS = (
    Peer("timm eager", frozenset({"model", "train"}), _missing, _eager),
    Peer("timm compiled", frozenset({"model", "train"}), _missing, _compiled),
)
