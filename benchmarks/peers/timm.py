"""timm's own model of the same name, with the same weights."""

from __future__ import annotations

import torch
from torch import nn

from ..workloads.base import MODELS, Workload, reference_model
from . import unusable
from .plain import eager_and_compiled


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


PEERS = eager_and_compiled("timm", _missing, _model)
