"""The reference in plain torch: eager, and compiled by inductor. What everybody can run without us."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import Workload, reference_model
from . import Peer, train_step

OPS = frozenset({"patch_embed", "layer_norm", "add_layer_norm", "attention", "linear", "model", "train"})


def plain_model(workload: Workload, device: torch.device) -> nn.Module:
    """The reference model with the workload's weights, dtype and mode, on the device."""
    model = copy.deepcopy(reference_model(workload.model)).to(device, workload.torch_dtype)
    return model.train() if workload.op == "train" else model.eval()


def model_function(
    workload: Workload, model: nn.Module, forward: Callable[[Tensor], Tensor]
) -> Callable[[dict[str, Any]], Tensor]:
    """`forward` as a function of a workload's inputs: inference, or a training step."""
    if workload.op == "train":
        return lambda inputs: train_step(model, forward, inputs["pixels"])

    def infer(inputs: dict[str, Any]) -> Tensor:
        with torch.inference_mode():
            return forward(inputs["pixels"])

    return infer


def eager_and_compiled(
    library: str,
    missing: Callable[[Workload, torch.device], str | None],
    make: Callable[[Workload, torch.device], nn.Module],
    logits: Callable[[Any], Tensor] = lambda output: output,
) -> tuple[Peer, Peer]:
    """The two peers of a library's model: as it is, and compiled by inductor.

    Args:
        library: its name.
        missing: as `Peer.missing`.
        make: the model with the workload's weights, dtype and mode, on the device.
        logits: takes the logits out of what the model returns.
    """

    def build(compiled: bool, workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
        torch.compiler.reset()
        model = make(workload, device)
        call = torch.compile(model, dynamic=False) if compiled else model
        return model_function(workload, model, lambda pixels: logits(call(pixels)))

    ops = frozenset({"model", "train"})
    return (
        Peer(f"{library} eager", ops, missing, functools.partial(build, False)),
        Peer(f"{library} compiled", ops, missing, functools.partial(build, True)),
    )


def never_missing(workload: Workload, device: torch.device) -> str | None:
    """For peers that run everywhere."""
    return None


def max_autotune_missing(workload: Workload, device: torch.device) -> str | None:
    """max-autotune searches GEMM kernels on CUDA; on CPU it is inductor's default under another name."""
    return None if device.type == "cuda" else "max-autotune is measured on CUDA only"


def _eager(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    if workload.op in ("model", "train"):
        model = plain_model(workload, device)
        return model_function(workload, model, model)

    def run(inputs: dict[str, Any]) -> Tensor:
        with torch.inference_mode():
            return workload.reference(**inputs)

    return run


def _compiled(mode: str | None) -> Callable[[Workload, torch.device], Callable[[dict[str, Any]], Tensor]]:
    def build(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
        # each workload is compiled for its own sizes, as a user with one batch size gets it
        torch.compiler.reset()
        if workload.op in ("model", "train"):
            model = plain_model(workload, device)
            return model_function(workload, model, torch.compile(model, mode=mode, dynamic=False))
        compiled = torch.compile(workload.reference, mode=mode, dynamic=False)

        def run(inputs: dict[str, Any]) -> Tensor:
            with torch.inference_mode():
                return compiled(**inputs)

        return run

    return build


PEERS = (
    Peer("torch eager", OPS, never_missing, _eager),
    Peer("torch compiled", OPS, never_missing, _compiled(None)),
    Peer("torch max-autotune", OPS, max_autotune_missing, _compiled("max-autotune-no-cudagraphs")),
    Peer("torch max-autotune +graph", frozenset({"model"}), max_autotune_missing, _compiled("max-autotune")),
)
