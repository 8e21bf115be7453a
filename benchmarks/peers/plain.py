"""The reference in plain torch: eager, and compiled by inductor. What everybody can run without us."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from vitfast import preprocess

from ..workloads.base import Workload
from ..workloads.photos import photo_spec
from . import Peer, train_step

MODULES = frozenset({"block", "model", "library", "train", "end_to_end"})
KERNELS = frozenset(
    {"patch_embed", "layer_norm", "add_layer_norm", "attention", "relative_attention", "window_attention", "linear"}
)
OPS = KERNELS | MODULES

GRAPHED = frozenset({"block", "model", "library"})

PARTS = 4
"""In how many parts a batch of files goes through the model, where the batch can be divided so."""


def plain_module(workload: Workload, device: torch.device) -> nn.Module:
    """The reference with the workload's weights, dtype and mode, on the device: a model or a block."""
    assert isinstance(workload.reference, nn.Module)
    module = copy.deepcopy(workload.reference).to(device, workload.torch_dtype)
    return module.train(workload.op == "train")


def module_function(
    workload: Workload, module: nn.Module, forward: Callable[[Tensor], Tensor]
) -> Callable[[dict[str, Any]], Tensor]:
    """`forward` as a function of a workload's inputs: inference, a training step, or inference from files.

    Args:
        workload: what is measured.
        module: whose parameters are trained.
        forward: of pixels or tokens; from files, of decoded pixels in uint8.
    """
    if workload.op == "train":
        # a rate of zero costs what any rate does, and leaves the weights that parity was shown for
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, fused=True)

        def train(inputs: dict[str, Any]) -> Tensor:
            gradient = train_step(module, forward, inputs["pixels"])
            optimizer.step()
            return gradient

        return train
    if workload.op == "end_to_end":
        device = next(module.parameters()).device
        return lambda inputs: from_files(workload.model, forward, inputs["files"], device)

    def infer(inputs: dict[str, Any]) -> Tensor:
        (tensor,) = inputs.values()
        with torch.inference_mode():
            return forward(tensor)

    return infer


@functools.cache
def _decoders() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decoder")


def from_files(model: str, forward: Callable[[Tensor], Tensor], files: list[str], device: torch.device) -> Tensor:
    """Logits of JPEG files. Threads, as many as torch has, decode, resize and crop; whenever a part of the batch is
    decoded, it goes to the device, which computes while the next one is decoded. All parts are of one size, and nothing
    of one call is done in the time of another.

    Args:
        model: whose size the pixels get.
        forward: logits of decoded pixels `[B, 3, H, W]` in uint8.
        files: paths.
        device: where `forward` runs.
    """
    spec = photo_spec(model)
    decoding = [_decoders().submit(preprocess, file, spec) for file in files]
    part = len(files) // math.gcd(len(files), PARTS)
    logits = []
    with torch.inference_mode():
        for first in range(0, len(files), part):
            pixels = torch.cat([image.result() for image in decoding[first : first + part]])
            if device.type == "cuda":
                # from pinned memory the copy does not stop the host
                pixels = pixels.pin_memory().to(device, non_blocking=True)
            logits.append(forward(pixels))
        return torch.cat(logits)


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
        return module_function(workload, model, lambda pixels: logits(call(pixels)))

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


def needs_cuda(what: str) -> Callable[[Workload, torch.device], str | None]:
    """For peers that are measured on CUDA alone."""
    return lambda workload, device: None if device.type == "cuda" else f"{what} needs a CUDA device"


def _eager(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    if workload.op in MODULES:
        module = plain_module(workload, device)
        return module_function(workload, module, module)

    def run(inputs: dict[str, Any]) -> Tensor:
        with torch.inference_mode():
            return workload.reference(**inputs)

    return run


def _compiled(mode: str | None) -> Callable[[Workload, torch.device], Callable[[dict[str, Any]], Tensor]]:
    def build(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
        # each workload is compiled for its own sizes, as a user with one batch size gets it
        torch.compiler.reset()
        if workload.op in MODULES:
            module = plain_module(workload, device)
            return module_function(workload, module, torch.compile(module, mode=mode, dynamic=False))
        compiled = torch.compile(workload.reference, mode=mode, dynamic=False)

        def run(inputs: dict[str, Any]) -> Tensor:
            with torch.inference_mode():
                return compiled(**inputs)

        return run

    return build


PEERS = (
    Peer("torch eager", OPS, never_missing, _eager),
    Peer("torch compiled", OPS, never_missing, _compiled(None)),
    Peer("torch compiled +graph", GRAPHED, needs_cuda("a CUDA graph"), _compiled("reduce-overhead")),
    Peer("torch max-autotune", OPS, max_autotune_missing, _compiled("max-autotune-no-cudagraphs")),
    Peer("torch max-autotune +graph", GRAPHED, max_autotune_missing, _compiled("max-autotune")),
)
