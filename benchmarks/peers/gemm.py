"""GEMM peers: cuBLAS and cuBLASLt through torch, and QuACK."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitfast.kernels.activation import activate_ref

from ..workloads.base import Workload
from . import Peer, unusable

_OPS = frozenset({"linear"})


def _never(workload: Workload, device: torch.device) -> str | None:
    return None


def _addmm(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    """Bias, or the residual with the bias added to it before, as the C of the GEMM."""

    def run(inputs: dict[str, Any]) -> Tensor:
        x, weight, bias, residual = (inputs[name] for name in ("x", "weight", "bias", "residual"))
        with torch.inference_mode():
            c = bias if residual is None else (residual + bias).flatten(0, -2)
            y = torch.addmm(c, x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])
            return activate_ref(y, inputs["activation"])

    return run


def _epilogue_missing(workload: Workload, device: torch.device) -> str | None:
    if not workload.name.startswith("linear.fc1"):
        return "has a GELU epilogue and nothing else"
    # on CPU torch computes the exact GELU there, on CUDA cuBLASLt's tanh form, which the parity rule will judge
    return None


def _epilogue(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    def run(inputs: dict[str, Any]) -> Tensor:
        x, weight, bias = (inputs[name] for name in ("x", "weight", "bias"))
        with torch.inference_mode():
            y = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
            return y.unflatten(0, x.shape[:-1])

    return run


def _quack_missing(workload: Workload, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    if workload.name.startswith("linear.fc1"):
        return "has no epilogue with the exact GELU"
    return unusable("quack")


def _quack(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    from quack.gemm_interface import gemm, gemm_add

    def run(inputs: dict[str, Any]) -> Tensor:
        x, weight, bias, residual = (inputs[name] for name in ("x", "weight", "bias", "residual"))
        with torch.inference_mode():
            flat = x.flatten(0, -2)
            if residual is None:
                y = gemm(flat, weight.t(), bias=bias)
            else:
                y = gemm_add(flat, weight.t(), (residual + bias).flatten(0, -2))
            return y.unflatten(0, x.shape[:-1])

    return run


PEERS = (
    Peer("addmm", _OPS, _never, _addmm),
    Peer("_addmm_activation", _OPS, _epilogue_missing, _epilogue),
    Peer("QuACK", _OPS, _quack_missing, _quack),
)
