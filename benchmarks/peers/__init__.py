"""Who is measured: one file per implementation, each with a tuple `PEERS`.

A peer says which ops it offers, why it cannot run here (a library that is not installed, a device without the feature)
and how to build its function for a workload. It imports its library inside those functions, so a missing one is a row
in the results and never a crash.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..workloads.base import Workload


@dataclass(frozen=True)
class Peer:
    """One candidate.

    Attributes:
        name: as rows show it, such as "timm compiled".
        ops: values of `Workload.op` it has a function for.
        missing: why it cannot run this workload on this device, or None if it can.
        build: its function of one set of inputs, weights in place on the device. It returns what the workload's
            reference does; for "train" what `train_step` does.
    """

    name: str
    ops: frozenset[str]
    missing: Callable[[Workload, torch.device], str | None]
    build: Callable[[Workload, torch.device], Callable[[dict[str, Any]], Tensor]]


def peers() -> tuple[Peer, ...]:
    """All peers, in order of their files' names."""
    found: list[Peer] = []
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        found += importlib.import_module(f".{info.name}", __name__).PEERS
    return tuple(found)


def unusable(module: str, extra: str | None = None) -> str | None:
    """Why a library cannot be used, with what to install; None where it imports."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed" + (f' (pip install "vitfast[{extra}]")' if extra else "")
    except Exception as error:
        return f"{module} does not import: {str(error).splitlines()[0]}"
    return None


def train_step(model: torch.nn.Module, forward: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """A forward and a backward pass; the gradient of the patch embedding's weights, which all others lead to.

    The loss is the mean square of the logits, in fp32: it needs no labels and its gradient reaches everything.
    """
    model.zero_grad(set_to_none=True)
    logits = forward(pixels)
    (logits if logits.dtype == torch.float64 else logits.float()).square().mean().backward()
    # the only convolution of a ViT is its patch embedding
    weight = next(p for p in model.parameters() if p.dim() == 4)
    assert weight.grad is not None
    return weight.grad
