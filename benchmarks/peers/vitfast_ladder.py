"""vitfast, rung by rung: one kind of replacement more each time, then the compiler, then a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import vitfast
from vitfast import kernels

from ..registry import Workload
from . import Peer
from .plain import model_function, never_missing, plain_model

RUNGS = ("patch_embed", "layer_norm", "attention", "mlp", "block")


def _accelerated(workload: Workload, device: torch.device, rungs: int) -> nn.Module:
    model = plain_model(workload, device)
    precision = "tf32" if workload.dtype == "tf32" else None
    return vitfast.accelerate(model, only=RUNGS[:rungs], precision=precision)


def _rung(rungs: int) -> Callable[[Workload, torch.device], Callable[[dict[str, Any]], Tensor]]:
    def build(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
        model = _accelerated(workload, device, rungs)
        return model_function(workload, model, model)

    return build


def _compiled(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    torch.compiler.reset()
    model = _accelerated(workload, device, len(RUNGS))
    return model_function(workload, model, torch.compile(model, dynamic=False))


def graphed(function: Callable[[dict[str, Any]], Tensor]) -> Callable[[dict[str, Any]], Tensor]:
    """A function of one tensor of pixels as a CUDA graph, inputs copied in and the output copied out."""
    captured: dict[str, Any] = {}

    def run(inputs: dict[str, Any]) -> Tensor:
        if not captured:
            static = {name: value.clone() for name, value in inputs.items()}
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    function(static)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = function(static)
            captured.update(static=static, graph=graph, output=output)
        for name, value in captured["static"].items():
            value.copy_(inputs[name])
        captured["graph"].replay()
        return captured["output"].clone()

    return run


def _graph(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    return graphed(_rung(len(RUNGS))(workload, device))


def _compiled_graph(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    return graphed(_compiled(workload, device))


def _needs_cuda(workload: Workload, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "CUDA graphs need a CUDA device"


def _kernel(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    tf32: dict[str, Any] = {} if workload.op in ("layer_norm", "add_layer_norm") else {"tf32": workload.dtype == "tf32"}
    op = {"attention": kernels.attention_qkv}.get(workload.op) or getattr(kernels, workload.op)

    def run(inputs: dict[str, Any]) -> Tensor:
        with torch.inference_mode():
            out = op(**inputs, **tf32)
            return torch.cat(out, dim=-1) if isinstance(out, tuple) else out

    return run


_MODELS = frozenset({"model", "train"})
_KERNELS = frozenset({"patch_embed", "layer_norm", "add_layer_norm", "attention", "linear"})

PEERS = (
    Peer("vitfast", _KERNELS, never_missing, _kernel),
    *(
        Peer(f"vitfast +{rung}", _MODELS, never_missing, _rung(position))
        for position, rung in enumerate(RUNGS, start=1)
    ),
    Peer("vitfast +compile", _MODELS, never_missing, _compiled),
    Peer("vitfast +graph", frozenset({"model"}), _needs_cuda, _graph),
    Peer("vitfast +compile +graph", frozenset({"model"}), _needs_cuda, _compiled_graph),
)
