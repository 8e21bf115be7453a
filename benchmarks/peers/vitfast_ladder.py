"""vitfast, rung by rung: one kind of replacement more each time, then the compiler, then a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import vitfast
from vitfast import kernels
from vitfast.layers import KINDS

from ..workloads.base import Workload
from ..workloads.photos import MEAN, STD, Normalized
from . import Peer
from .plain import GRAPHED, KERNELS, MODULES, module_function, needs_cuda, never_missing, plain_module

RUNGS: dict[str, frozenset[str]] = {
    "patch_embed": frozenset({"model", "train", "end_to_end"}),
    "layer_norm": frozenset({"block", "model", "train"}),
    "attention": frozenset({"block", "model", "train"}),
    "mlp": frozenset({"block", "model", "train"}),
    "block": MODULES - {"library"},
    # what these two leave out is needed in training
    "fold": frozenset({"model"}),
    "tail": frozenset({"model", "library", "end_to_end"}),
}
"""Kinds of replacement in the order they are added, each with the ops it is measured in: those where it changes what
runs, from files only the first rung and what is left when all are there, and of other libraries' models only that."""


def _rung(
    last: str, compile: bool = False, cuda_graph: bool = False
) -> Callable[[Workload, torch.device], Callable[[dict[str, Any]], Tensor]]:
    """All kinds up to the last one, compiled and as CUDA graphs by `accelerate` itself."""
    kinds = KINDS[: KINDS.index(last) + 1]

    def build(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
        torch.compiler.reset()
        module: nn.Module = plain_module(workload, device)
        normalize = None
        if isinstance(module, Normalized):
            # the patch embedding does it instead
            module, normalize = module.model, ((MEAN,) * 3, (STD,) * 3)
        vitfast.accelerate(
            module,
            precision="tf32" if workload.dtype == "tf32" else None,
            only=kinds,
            normalize=normalize,
            frozen=workload.layer != "train",
            compile=compile,
            cuda_graph=cuda_graph,
        )
        return module_function(workload, module, module)

    return build


def _relative_attention(qkv: Tensor, table: Tensor, grid: tuple[int, int], tf32: bool) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return kernels.relative_attention(q, k, v, table, grid, tf32=tf32).transpose(1, 2).flatten(2)


def _kernel(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    tf32: dict[str, Any] = {} if workload.op in ("layer_norm", "add_layer_norm") else {"tf32": workload.dtype == "tf32"}
    others: dict[str, Any] = {"attention": kernels.attention_qkv, "relative_attention": _relative_attention}
    op = others.get(workload.op) or getattr(kernels, workload.op)

    def run(inputs: dict[str, Any]) -> Tensor:
        with torch.inference_mode():
            out = op(**inputs, **tf32)
            return torch.cat(out, dim=-1) if isinstance(out, tuple) else out

    return run


_INFERENCE = MODULES - {"train"}

PEERS = (
    Peer("vitfast", KERNELS, never_missing, _kernel),
    *(
        Peer(f"vitfast +{kind}", ops, needs_cuda("folding") if kind == "fold" else never_missing, _rung(kind))
        for kind, ops in RUNGS.items()
    ),
    Peer("vitfast +compile", MODULES, never_missing, _rung(KINDS[-1], compile=True)),
    Peer("vitfast +graph", _INFERENCE, needs_cuda("a CUDA graph"), _rung(KINDS[-1], cuda_graph=True)),
    Peer(
        "vitfast +compile +graph",
        GRAPHED,
        needs_cuda("a CUDA graph"),
        _rung(KINDS[-1], compile=True, cuda_graph=True),
    ),
)
